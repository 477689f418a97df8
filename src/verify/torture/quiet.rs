//! What must hold at a node once all is quiet: it recovers in time, its counters add up, it keeps its bounds, and a row takes as
//! many loads as it should.

use std::{fs, sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    node::Subject,
    readers,
    table::{DECODED, PANICS, PLACES},
    wire::{Asked, Counts, PATIENCE, Quiet, RECOVERY, Told},
};
use crate::{Lookup, Status};

/// A look at what gives no event.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Becomes coherent, and tells all.
pub(super) async fn quiet(subject: &Subject) -> Quiet {
    let began = subject.now();
    let mut quiet = Quiet::default();
    // Trust of a table comes back with a fence, which comes back with a barrier.
    let coherent = async {
        loop {
            let trusted = |status| matches!(status, Status::Coherent { .. });
            if subject.node.barrier().await.is_ok() && subject.tables.iter().all(|table| trusted(table.status())) {
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    };
    if timeout(RECOVERY, coherent).await.is_err() {
        let why: Vec<_> = subject.tables.iter().map(|table| table.status().to_string()).collect();
        quiet.wrong.push(format!("not coherent {RECOVERY:?} after all is well: {}", why.join("; ")));
    }
    quiet.recovered = Duration::from_nanos(subject.now() - began);
    settle(subject, &mut quiet).await;
    for (place, table) in PLACES.iter().zip(&subject.tables) {
        for key in place.all() {
            match table.peek(&key) {
                Lookup::Row(row) => quiet.holds.push((key, Some(row.number))),
                Lookup::Absent => quiet.holds.push((key, None)),
                Lookup::Unknown => {}
            }
        }
    }
    quiet.at = subject.now();
    let mut reads = Vec::new();
    for (place, table) in PLACES.iter().zip(&subject.tables) {
        let keys: Vec<_> = place.all().collect();
        readers::one(subject, Asked::Barrier, &keys, &mut reads).await;
        let held = keys.iter().filter(|key| table.peek(key).is_known()).count();
        subject.evicted.fetch_add((keys.len() - held) as u64, Relaxed);
        let (stats, capacity) = (table.stats(), subject.setup.kind.capacity());
        let rows = stats.entries - stats.absent;
        if rows > capacity as u64 {
            quiet.wrong.push(format!("{} has {rows} rows where {capacity} are the most", place.name));
        }
    }
    subject.tell(Told::Reads(reads)).await;
    quiet.counts = counts(subject);
    quiet
}

/// Waits for loads that are under way, and sees whether the counters add up.
async fn settle(subject: &Subject, quiet: &mut Quiet) {
    for table in &subject.tables {
        let settled = async {
            loop {
                let stats = table.stats();
                if stats.loads == stats.published + stats.voided + stats.uncached + stats.failed {
                    return;
                }
                sleep(LOOK_EVERY).await;
            }
        };
        if timeout(PATIENCE, settled).await.is_err() {
            quiet.wrong.push(format!("loads of {} do not end: {:?}", table.name(), table.stats()));
        }
        let stats = table.stats();
        if stats.gets != stats.hits + stats.stale + stats.misses
            || stats.misses != stats.led + stats.joined + stats.declined
        {
            quiet.wrong.push(format!("the counters of {} do not add up: {stats:?}", table.name()));
        }
    }
}

fn counts(subject: &Subject) -> Counts {
    let node = subject.node.stats();
    let mut counts = Counts {
        gaps: node.gaps,
        fences: node.fences,
        unreadable: node.unreadable,
        overflows: node.overflows,
        cancelled: subject.cancelled.load(Relaxed),
        evicted: subject.evicted.load(Relaxed),
        panics: PANICS.load(Relaxed),
        memory: memory(),
        ..Counts::default()
    };
    for stats in subject.tables.iter().map(crate::Table::stats) {
        counts.hits += stats.hits;
        counts.stale += stats.stale;
        counts.loads += stats.loads;
        counts.voided += stats.voided;
        counts.uncached += stats.uncached;
        counts.failed += stats.failed;
        counts.clears += stats.clears;
        counts.invalidations += stats.invalidations;
        counts.tier_hits += stats.tier.hits;
        counts.tier_refused += stats.tier.refused + stats.tier.misses;
        counts.tier_failed += stats.tier.failed;
    }
    counts
}

/// Bytes of memory in use by this process; 0 where that cannot be known.
fn memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or_default() << 10
}

/// Callers at the same time.
const CALLERS: usize = 32;

/// Loads after which a row that everybody wants is held again, after one invalidation: the one that it overtakes, the one that its
/// own message overtakes, and the one that is kept (X28).
const LOADS_MAX: u64 = 4;

/// Counts loads while nobody else does anything.
pub(super) async fn lively(subject: &Subject) -> Vec<String> {
    let mut wrong = Vec::new();
    for (place, table) in PLACES.iter().zip(&subject.tables) {
        // A key that has a row.
        let Some(key) = existing(subject, table, place.first).await else { continue };
        let before = table.stats().loads;
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let table = table.clone();
            callers.spawn(async move {
                while table.get(&key).await.is_err() || !table.peek(&key).is_known() {
                    tokio::task::yield_now().await;
                }
            });
        }
        let told = table.invalidate(&key).await;
        let all = async { while callers.join_next().await.is_some() {} };
        if timeout(PATIENCE, all).await.is_err() {
            wrong.push(format!("{} {key} is not held {PATIENCE:?} after an invalidation", place.name));
            continue;
        }
        let barrier = subject.node.barrier().await;
        let loads = table.stats().loads - before;
        if loads > LOADS_MAX {
            wrong.push(format!("{} {key} took {loads} loads after one invalidation", place.name));
        }
        // A generation: after the message has been applied, many callers share one load.
        if told.is_err() || barrier.is_err() {
            continue;
        }
        let (gaps, decoded) = (subject.node.stats().gaps, DECODED.load(Relaxed));
        crate::store::Store::invalidate(&table.store, &key);
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let table = table.clone();
            callers.spawn(async move { table.get(&key).await.map(drop) });
        }
        while callers.join_next().await.is_some() {}
        let decoded = DECODED.load(Relaxed) - decoded;
        if decoded > 1 && subject.node.stats().gaps == gaps {
            wrong.push(format!(
                "{} {key} was decoded {decoded} times for {CALLERS} callers at the same time",
                place.name
            ));
        }
    }
    wrong
}

async fn existing(subject: &Subject, table: &crate::Table<i64, super::table::Row>, first: i64) -> Option<i64> {
    for key in first..first + 40 {
        if subject.node.barrier().await.is_ok() && matches!(table.get(&key).await, Ok(Some(_))) {
            return Some(key);
        }
    }
    None
}
