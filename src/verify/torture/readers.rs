//! The readers of a node, each in every mode, and its writer, whose transactions yield tokens.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use sqlx::{AssertSqlSafe, Row as _};
use tokio::{
    sync::{broadcast, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    super::history::{Key, Time},
    node::{Handed, Subject},
    plan::{Plan, Step},
    table::{Place, Row},
    wire::{Asked, Attempt, PATIENCE, RawRead, Told, Written},
};
use crate::{Cached, Freshness, Lookup, Result, Table, Token, Transaction};

const READERS: u64 = 6;

/// So many of them never ask for a fence, and go on reading when none comes back.
const AT_ONCE: u64 = 3;

/// Reads that are told of at a time.
const BATCH: usize = 200;

/// Keys of one call.
const KEYS_MAX: usize = 6;

/// Starts all of them; they end once they are told to.
pub(super) fn start(
    subject: &Arc<Subject>,
    storm: bool,
    hand: &broadcast::Sender<Handed>,
    stopping: &watch::Receiver<bool>,
    work: &mut JoinSet<()>,
) {
    let seed = subject.setup.seed ^ subject.now();
    for n in 0..READERS {
        let modes = if n < AT_ONCE { 0..70 } else { 0..100 };
        work.spawn(read(Arc::clone(subject), StdRng::seed_from_u64(seed + n), modes, stopping.clone()));
    }
    work.spawn(read_tokens(Arc::clone(subject), hand.subscribe(), stopping.clone()));
    work.spawn(write(Arc::clone(subject), StdRng::seed_from_u64(seed + READERS), stopping.clone()));
    if storm {
        work.spawn(cancel(Arc::clone(subject), StdRng::seed_from_u64(seed + READERS + 1), stopping.clone()));
    }
}

async fn read(subject: Arc<Subject>, mut rng: StdRng, modes: Range<u32>, stopping: watch::Receiver<bool>) {
    let mut reads = Vec::new();
    while !*stopping.borrow() {
        for _ in 0..4 {
            if *stopping.borrow() {
                break;
            }
            let place = Place::any(&mut rng);
            let asked = draw(&mut rng, modes.clone());
            let keys = match asked {
                Asked::GetMany | Asked::Snapshot => place.draw_some(&mut rng, KEYS_MAX),
                _ => vec![place.draw(&mut rng)],
            };
            one(&subject, asked, &keys, &mut reads).await;
        }
        if reads.len() >= BATCH {
            subject.tell(Told::Reads(std::mem::take(&mut reads))).await;
        }
        sleep(Duration::from_millis(rng.random_range(1..8))).await;
    }
    subject.tell(Told::Reads(reads)).await;
}

fn draw(rng: &mut StdRng, modes: Range<u32>) -> Asked {
    match rng.random_range(modes) {
        0..40 => Asked::Get,
        40..50 => Asked::GetMany,
        50..58 => Asked::TryGet,
        58..63 => Asked::Any,
        63..70 => Asked::Stale,
        70..78 => Asked::Snapshot,
        78..90 => Asked::Within(*[20, 100, 400, 1200].choose(rng).expect("some")),
        _ => Asked::Fenced,
    }
}

/// One call, and what came of it. One that takes too long is told of; one that fails promises nothing.
pub(super) async fn one(subject: &Subject, asked: Asked, keys: &[Key], reads: &mut Vec<RawRead>) {
    let call = subject.calls.fetch_add(1, Relaxed);
    let place = Place::of(keys[0]);
    let (table, stale) = (&subject.tables[place], &subject.stale[place]);
    let start = subject.now();
    let answer = timeout(PATIENCE, ask(table, stale, asked, keys)).await;
    let end = subject.now();
    match answer {
        Ok(Ok(rows)) => note(subject, asked, keys, rows, (start, end, call), reads),
        Ok(Err(_)) => {}
        Err(_) => subject.wrong(format!("a read ({asked:?}) of {keys:?} has not ended after {PATIENCE:?}")).await,
    }
}

type Found = Option<Cached<Row>>;

/// The rows with these keys; fewer, if they are not known.
async fn ask(table: &Table<Key, Row>, stale: &Table<Key, Row>, asked: Asked, keys: &[Key]) -> Result<Vec<Found>> {
    let key = &keys[0];
    let with = async |freshness| Ok(vec![table.get_with(key, freshness).await?]);
    match asked {
        Asked::Get | Asked::Own(_) => Ok(vec![table.get(key).await?]),
        Asked::GetMany | Asked::Barrier => table.get_many(keys).await,
        Asked::TryGet => Ok(match table.try_get(key) {
            Lookup::Row(row) => vec![Some(row)],
            Lookup::Absent => vec![None],
            Lookup::Unknown => Vec::new(),
        }),
        Asked::Snapshot => table.snapshot(keys).await,
        Asked::Within(millis) => with(Freshness::Within(Duration::from_millis(millis))).await,
        Asked::Fenced => with(Freshness::Fenced).await,
        Asked::Any => with(Freshness::Any).await,
        Asked::Stale => Ok(vec![stale.get(key).await?]),
        Asked::AtLeast(_) => unreachable!("has a token"),
    }
}

fn note(
    subject: &Subject,
    asked: Asked,
    keys: &[Key],
    rows: Vec<Found>,
    (start, end, call): (Time, Time, u64),
    reads: &mut Vec<RawRead>,
) {
    reads.extend(keys.iter().zip(rows).map(|(key, row)| RawRead {
        key: *key,
        asked,
        start,
        end,
        seen: row.as_ref().map(|row| row.number),
        loaded: row.as_ref().map(|row| row.decoded.saturating_sub(subject.setup.origin)),
        call,
    }));
}

/// Reads what other nodes have just written.
async fn read_tokens(
    subject: Arc<Subject>,
    mut handed: broadcast::Receiver<Handed>,
    mut stopping: watch::Receiver<bool>,
) {
    loop {
        let (token, number, keys) = tokio::select! {
            _ = stopping.wait_for(|stopping| *stopping) => return,
            handed = handed.recv() => match handed {
                Ok(handed) => handed,
                Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            },
        };
        let Ok(token) = token.parse::<Token>() else {
            subject.wrong(format!("`{token}` is no token")).await;
            continue;
        };
        let mut reads = Vec::new();
        let table = &subject.tables[Place::of(keys[0])];
        let start = subject.now();
        match timeout(PATIENCE, table.get_many_with(&keys, Freshness::AtLeast(token))).await {
            Ok(Ok(rows)) => {
                let when = (start, subject.now(), subject.calls.fetch_add(1, Relaxed));
                note(&subject, Asked::AtLeast(number), &keys, rows, when, &mut reads);
                subject.tell(Told::Reads(reads)).await;
            }
            Ok(Err(_)) => {}
            Err(_) => subject.wrong(format!("a read of token {token} has not ended after {PATIENCE:?}")).await,
        }
    }
}

/// Writes by `Node::begin`, and reads its own writes.
async fn write(subject: Arc<Subject>, mut rng: StdRng, stopping: watch::Receiver<bool>) {
    while !*stopping.borrow() {
        let place = Place::any(&mut rng);
        let keys = place.draw_some(&mut rng, 3);
        let step = if rng.random_bool(0.8) { Step::Upsert(keys) } else { Step::Delete(keys) };
        // A failure before COMMIT is sent leaves nothing.
        if let Ok(attempt) = transact(&subject, &Plan::of(place, step)).await {
            let number = attempt.rows.first().map(|row| row.number);
            let keys: Vec<_> = attempt.rows.iter().map(|row| row.key).collect();
            let committed = attempt.ended.is_some();
            subject.tell(Told::Wrote(attempt)).await;
            if let Some(number) = number.filter(|_| committed) {
                let mut reads = Vec::new();
                for key in keys {
                    one(&subject, Asked::Own(number), &[key], &mut reads).await;
                }
                subject.tell(Told::Reads(reads)).await;
            }
        }
        sleep(Duration::from_millis(rng.random_range(1..40))).await;
    }
}

async fn transact(subject: &Subject, plan: &Plan) -> anyhow::Result<Attempt> {
    let mut transaction = subject.node.begin().await?;
    let locked = fetch(&mut transaction, plan.lock()).await?;
    let column = |n| locked.first().and_then(|row| row.try_get::<i64, _>(n).ok()).unwrap_or_default();
    let (xid, port) = (column(0).cast_unsigned(), u16::try_from(column(1))?);
    let number = subject.now();
    let (step, _) = &plan.steps[0];
    let mut rows = Vec::new();
    for row in fetch(&mut transaction, step.sql(plan.place, number, xid)).await? {
        rows.push(Written { key: row.try_get(0)?, number, deletes: row.try_get(1)?, undone: false });
    }
    for row in &rows {
        transaction.invalidates(&subject.tables[Place::of(row.key)], &row.key);
    }
    let sent = subject.now();
    let mut attempt = Attempt { port, xid, sent, ended: None, rolled_back: false, rows, token: None };
    match transaction.commit().await {
        Ok(token) => {
            attempt.ended = Some(subject.now());
            attempt.token = Some(token.to_string());
        }
        Err(error) => attempt.rolled_back = error.is_refused(),
    }
    Ok(attempt)
}

async fn fetch(transaction: &mut Transaction, sql: String) -> sqlx::Result<Vec<sqlx::postgres::PgRow>> {
    sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_all(&mut **transaction).await
}

/// Calls that are cancelled before, while or just after they wait.
async fn cancel(subject: Arc<Subject>, mut rng: StdRng, stopping: watch::Receiver<bool>) {
    while !*stopping.borrow() {
        let mut calls = JoinSet::new();
        for _ in 0..100 {
            let place = Place::any(&mut rng);
            let (key, limit) = (place.draw(&mut rng), Duration::from_micros(rng.random_range(0..2000)));
            let subject = Arc::clone(&subject);
            calls.spawn(async move {
                let table = &subject.tables[Place::of(key)];
                let freshness = if key % 4 == 0 { Freshness::Fenced } else { Freshness::Coherent };
                if timeout(limit, table.get_with(&key, freshness)).await.is_err() {
                    subject.cancelled.fetch_add(1, Relaxed);
                }
            });
        }
        sleep(Duration::from_millis(1)).await;
        calls.abort_all();
        while calls.join_next().await.is_some() {}
        sleep(Duration::from_millis(20)).await;
    }
}
