//! A node process: a real [`Node`] with its tables open, readers in every mode, and a writer of its own. It does what it is told on
//! its standard input, and tells what happens on its standard output; when its input ends, so does it.

use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _, stdin, stdout},
    panic,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use anyhow::{Context as _, Result};
use tokio::{
    sync::{broadcast, mpsc, watch},
    task::JoinSet,
};

use super::{
    super::history::{Key, Time},
    quiet, readers,
    table::{ON_PURPOSE, PANIC_EVERY, PLACES, Place, Row},
    wire::{Kind, Order, RawNote, Setup, Told, machine_time, nanos, now},
};
use crate::{Change, Config, Event, Events, Fallback, KeyHash, Node, Rows, Status, Table, TableOptions, Tier};

/// Messages to the run that may wait.
const TOLD_MAX: usize = 256;

/// A token of another node's transaction, the number it wrote, and where.
pub(super) type Handed = (String, u64, Vec<Key>);

/// What the tasks of the process share.
pub(super) struct Subject {
    pub(super) setup: Setup,
    pub(super) node: Node,
    pub(super) tables: Vec<Table<Key, Row>>,
    /// The same caches, with handles that serve old rows.
    pub(super) stale: Vec<Table<Key, Row>>,
    /// What the messages of hashed tables say of each key.
    hashes: HashMap<KeyHash, Key>,
    pub(super) told: mpsc::Sender<Told>,
    /// Numbers calls.
    pub(super) calls: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) evicted: AtomicU64,
}

impl Subject {
    pub(super) fn now(&self) -> Time {
        now(self.setup.origin)
    }

    pub(super) async fn tell(&self, what: Told) {
        // The run has ended, and so will this process.
        let _ = self.told.send(what).await;
    }

    pub(super) async fn wrong(&self, what: String) {
        self.tell(Told::Wrong(format!("node {}: {what}", self.setup.id))).await;
    }
}

/// Runs a node until the end of its input.
///
/// # Errors
///
/// It cannot start.
pub(in super::super) async fn run() -> Result<ExitCode> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if info.payload_as_str() != Some(ON_PURPOSE) {
            hook(info);
        }
    }));
    let mut lines = BufReader::new(stdin()).lines();
    let setup: Setup = serde_json::from_str(&lines.next().context("no first line")??)?;
    let (orders, mut taken) = mpsc::channel(64);
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let Ok(order) = serde_json::from_str::<Order>(&line) else { return };
            if orders.blocking_send(order).is_err() {
                return;
            }
        }
    });
    let (told, to_tell) = mpsc::channel(TOLD_MAX);
    let telling = thread::spawn(move || tell_all(to_tell));
    let subject = start(setup, told).await?;
    let mut events = tokio::spawn(follow(Arc::clone(&subject), subject.node.subscribe()));
    subject.tell(Told::Ready).await;
    let (stop, stopping) = watch::channel(false);
    let (hand, _) = broadcast::channel(256);
    let mut work = JoinSet::new();
    while let Some(order) = taken.recv().await {
        match order {
            Order::Go { panics, storm } => {
                PANIC_EVERY.store(panics.unwrap_or_default(), Relaxed);
                stop.send_replace(false);
                readers::start(&subject, storm, &hand, &stopping, &mut work);
            }
            Order::Token { token, number, keys } => drop(hand.send((token, number, keys))),
            Order::Stop => {
                stop.send_replace(true);
                while work.join_next().await.is_some() {}
                PANIC_EVERY.store(0, Relaxed);
                subject.tell(Told::Stopped).await;
            }
            Order::Quiet => {
                let quiet = quiet::quiet(&subject).await;
                subject.tell(Told::Quiet(Box::new(quiet))).await;
            }
            Order::Lively => {
                let wrong = quiet::lively(&subject).await;
                subject.tell(Told::Lively(wrong)).await;
            }
        }
    }
    work.shutdown().await;
    subject.node.shutdown().await;
    let _ = (&mut events).await;
    drop(subject);
    let _ = tokio::task::spawn_blocking(move || telling.join()).await;
    Ok(ExitCode::SUCCESS)
}

/// Writes lines until nobody has anything to say. Many at a time.
fn tell_all(mut to_tell: mpsc::Receiver<Told>) {
    let mut batch = Vec::new();
    while let Some(first) = to_tell.blocking_recv() {
        batch.clear();
        let mut next = Some(first);
        while let Some(told) = next {
            serde_json::to_writer(&mut batch, &told).expect("plain data");
            batch.push(b'\n');
            next = if batch.len() < 1 << 16 { to_tell.try_recv().ok() } else { None };
        }
        // Nobody reads: our input ends as well.
        if stdout().lock().write_all(&batch).and_then(|()| stdout().flush()).is_err() {
            return;
        }
    }
}

/// On a busy machine opening a line can take longer than it may; a service would be started again.
async fn start_node(config: Config) -> Result<Node> {
    let mut tries_left = 5;
    loop {
        match Node::start(config.clone()).await {
            Err(error) if error.is_unavailable() && tries_left > 0 => tries_left -= 1,
            started => return started.context("the node does not start"),
        }
    }
}

async fn start(setup: Setup, told: mpsc::Sender<Told>) -> Result<Arc<Subject>> {
    let node = start_node(setup.config()?).await?;
    let (mut tables, mut stale, mut hashes) = (Vec::new(), Vec::new(), HashMap::new());
    for place in &PLACES {
        let options = TableOptions::default().capacity(setup.kind.capacity());
        let options = options.refill(if setup.kind == Kind::Redundant { 50 } else { 0 });
        let options = match &setup.tier {
            Some(url) if place.tiered => options.tier::<Row>(&Tier::redis(url)?),
            _ => options,
        };
        let table: Table<Key, Row> = node.table_with(place.name, options.clone()).await?;
        stale.push(
            node.table_with(place.name, options.fallback(Fallback::ServeStale { max: super::wire::LEASE * 4 })).await?,
        );
        if let Some(hashed) = table.store.hashed() {
            hashes.extend(place.all().map(|key| (hashed.hash(&key), key)));
        }
        tables.push(table);
    }
    let (calls, cancelled, evicted) = Default::default();
    Ok(Arc::new(Subject { setup, node, tables, stale, hashes, told, calls, cancelled, evicted }))
}

/// Notes what the node applies.
async fn follow(subject: Arc<Subject>, mut events: Events) {
    while let Some(event) = events.recv().await {
        let at = subject.now();
        let note = match event {
            Event::Change(change) => match (change.xid, named(&subject, &change)) {
                (Some(xid), Some(keys)) => RawNote::Applied { xid, keys },
                _ => continue,
            },
            Event::Gap(why) => RawNote::Gap { since: gap_began(&subject), why: why.to_string() },
            Event::Coherent => {
                let incarnation = subject.tables[0].shared().look(|coherence| coherence.incarnation());
                let Some(incarnation) = incarnation.map(crate::token::incarnation_id) else { continue };
                RawNote::Coherent { incarnation }
            }
            Event::Handoff(_) | Event::SpareLost(_) => RawNote::LineLost,
            Event::Unreadable { .. } => RawNote::Unreadable,
            // What was missed is not checked.
            Event::Covered | Event::Lagged(_) | Event::Incoherent { .. } => continue,
        };
        subject.tell(Told::Note(at, note)).await;
    }
}

/// The keys that a message is about; `Some(None)`: all there are. `None`: of no table of ours.
fn named(subject: &Subject, change: &Change) -> Option<Option<Vec<Key>>> {
    let Some(table) = &change.table else { return Some(None) };
    let place: &Place = PLACES.iter().find(|place| place.name == table)?;
    Some(Some(match &change.rows {
        Rows::All => place.all().collect(),
        Rows::Keys(keys) => keys.iter().filter_map(|key| <Key as crate::Key>::from_parts(key.parts())).collect(),
        Rows::Hashed { hashes, .. } => hashes.iter().filter_map(|hash| subject.hashes.get(hash).copied()).collect(),
    }))
}

/// Not later than the gap that has just been told of; 0 if it is over already, and nobody knows.
fn gap_began(subject: &Subject) -> Time {
    match subject.node.status() {
        Status::Bypassed { since, .. } => {
            let began = machine_time().saturating_sub(nanos(since.elapsed())).saturating_sub(subject.setup.origin);
            // Two clocks were compared.
            began.saturating_sub(1_000_000)
        }
        Status::Coherent { .. } => 0,
    }
}
