//! What the demo shows: filled by the followers, drawn by the screen and printed by the plain view.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use super::{
    checker::Findings,
    world::{TABLE, YOURS},
};
use crate::{
    Change, Key as _, RowKey, Rows, Stats, Status,
    cli::{report::with_causes, text},
};

/// Latencies count for this long, and are at most this many per node.
const WINDOW: Duration = Duration::from_mins(1);
const SAMPLES_MAX: usize = 20_000;

/// Commits remembered, and keys of each.
const COMMITS_MAX: usize = 200;
const KEYS_MAX: usize = 20;

/// Hit ratios are those of the last so many looks, which are a second apart.
const RATIO_OVER: usize = 10;

pub(super) struct Board {
    pub(super) started: Instant,
    pub(super) findings: Arc<Findings>,
    /// Statements of the writers that changed rows, and those that were refused.
    pub(super) commits: AtomicU64,
    pub(super) refused: AtomicU64,
    /// Protects what a writer said when it could not go on; `None`: they all can.
    trouble: Mutex<Option<String>>,
    /// Protects what the followers have seen.
    seen: Mutex<Seen>,
}

struct Seen {
    rows: i64,
    latencies: Vec<VecDeque<(Instant, Duration)>>,
    /// Oldest first.
    commits: VecDeque<Commit>,
    next_number: u64,
    /// Per node, the counters of the last looks, oldest first.
    looks: Vec<VecDeque<Stats>>,
    looked_at: Option<Instant>,
}

/// One transaction, as the nodes saw it.
#[derive(Clone)]
pub(super) struct Commit {
    /// Counts up.
    pub(super) number: u64,
    pub(super) at: SystemTime,
    pub(super) xid: Option<u64>,
    table: String,
    /// All rows of the table; else the first keys, and how many there are.
    all: bool,
    keys: Vec<RowKey>,
    count: usize,
    /// It touches rows that the writers leave alone, or all.
    pub(super) yours: bool,
    /// A bit per node that has applied it.
    nodes: u64,
    /// The node whose keys were counted.
    counted: usize,
    /// Of the slowest node.
    pub(super) latency: Option<Duration>,
}

impl Commit {
    /// Its rows, after the table if that is another one than the demo's.
    pub(super) fn rows(&self, width: usize) -> String {
        let table = if self.table == TABLE { String::new() } else { format!("{} ", self.table) };
        let rows = if self.all { "all".to_owned() } else { text::keys(&self.keys, self.count, width) };
        table + &rows
    }

    pub(super) fn nodes(&self) -> u32 {
        self.nodes.count_ones()
    }

    fn add(&mut self, change: &Change, rows: i64) {
        match &change.rows {
            Rows::All | Rows::Hashed { .. } => (self.all, self.yours) = (true, true),
            Rows::Keys(keys) => {
                self.count += keys.len();
                let room = KEYS_MAX.saturating_sub(self.keys.len());
                self.keys.extend(keys.iter().take(room).cloned());
                // The writers use the ids above `YOURS`, and move rows up by `rows`.
                let theirs = i64::try_from(YOURS).unwrap_or(0) + 1..=2 * rows;
                self.yours |=
                    keys.iter().any(|key| i64::from_parts(key.parts()).is_none_or(|key| !theirs.contains(&key)));
            }
        }
    }
}

/// One line about a node.
pub(super) struct NodeLine {
    pub(super) stats: Stats,
    /// Of the last seconds; `None`: nothing was asked.
    pub(super) ratio: Option<f64>,
    pub(super) latency: Option<Latency>,
    pub(super) status: Status,
}

/// Over the last minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Latency {
    pub(super) p50: Duration,
    pub(super) p99: Duration,
    pub(super) max: Duration,
}

impl Board {
    pub(super) fn new(nodes: usize, rows: u64) -> Arc<Self> {
        let seen = Seen {
            rows: i64::try_from(rows).unwrap_or(i64::MAX / 2),
            latencies: vec![VecDeque::new(); nodes],
            commits: VecDeque::new(),
            next_number: 0,
            looks: vec![VecDeque::new(); nodes],
            looked_at: None,
        };
        Arc::new(Self {
            started: Instant::now(),
            findings: Arc::default(),
            commits: AtomicU64::default(),
            refused: AtomicU64::default(),
            trouble: Mutex::default(),
            seen: Mutex::new(seen),
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node has applied a message. Those of one transaction become one commit.
    pub(super) fn add(&self, node: usize, at: SystemTime, change: &Change) {
        let mut seen = self.seen();
        let seen = &mut *seen;
        let table = change.table.as_deref().unwrap_or("every table");
        let known = seen.commits.iter_mut().rev().find(|it| change.xid.is_some() && it.xid == change.xid);
        if let Some(commit) = known.filter(|commit| commit.table == table) {
            commit.nodes |= 1 << node;
            if commit.counted == node {
                commit.add(change, seen.rows);
            }
            return;
        }
        let mut commit = Commit {
            number: seen.next_number,
            at,
            xid: change.xid,
            table: table.to_owned(),
            all: false,
            keys: Vec::new(),
            count: 0,
            yours: false,
            nodes: 1 << node,
            counted: node,
            latency: None,
        };
        commit.add(change, seen.rows);
        seen.next_number += 1;
        if seen.commits.len() == COMMITS_MAX {
            // Those of the person who looks on are few, and stay.
            let oldest = seen.commits.iter().position(|commit| !commit.yours).unwrap_or(0);
            seen.commits.remove(oldest);
        }
        seen.commits.push_back(commit);
    }

    /// A message of this transaction was applied so long after its commit.
    pub(super) fn time(&self, node: usize, xid: u64, latency: Duration) {
        let mut seen = self.seen();
        let now = Instant::now();
        let window = &mut seen.latencies[node];
        window.push_back((now, latency));
        while window.front().is_some_and(|(at, _)| window.len() > SAMPLES_MAX || *at + WINDOW < now) {
            window.pop_front();
        }
        if let Some(commit) = seen.commits.iter_mut().rev().find(|commit| commit.xid == Some(xid)) {
            commit.latency = commit.latency.max(Some(latency));
        }
    }

    /// A line for each node, from its counters and its status now, in the order of the nodes.
    pub(super) fn nodes(&self, nodes: impl Iterator<Item = (Stats, Status)>) -> Vec<NodeLine> {
        let mut seen = self.seen();
        let now = Instant::now();
        let look = seen.looked_at.is_none_or(|at| at + Duration::from_secs(1) <= now);
        if look {
            seen.looked_at = Some(now);
        }
        nodes
            .enumerate()
            .map(|(node, (stats, status))| {
                let looks = &mut seen.looks[node];
                let ratio = ratio(&looks.front().copied().unwrap_or_default(), &stats);
                if look {
                    looks.push_back(stats);
                    if looks.len() > RATIO_OVER {
                        looks.pop_front();
                    }
                }
                let window = &mut seen.latencies[node];
                while window.front().is_some_and(|(at, _)| *at + WINDOW < now) {
                    window.pop_front();
                }
                let latency = Latency::of(window.iter().map(|(_, latency)| *latency).collect());
                NodeLine { stats, ratio, latency, status }
            })
            .collect()
    }

    /// All that are remembered from this number on, oldest first.
    pub(super) fn commits_from(&self, number: u64) -> Vec<Commit> {
        self.seen().commits.iter().filter(|commit| commit.number >= number).cloned().collect()
    }

    /// Over all nodes.
    pub(super) fn latency(&self) -> Option<Latency> {
        let seen = self.seen();
        Latency::of(seen.latencies.iter().flatten().map(|(_, latency)| *latency).collect())
    }

    /// A writer has committed something.
    pub(super) fn add_commit(&self) {
        if self.commits.fetch_add(1, Relaxed).is_multiple_of(16) {
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// A writer cannot go on, and tries again.
    pub(super) fn add_trouble(&self, error: &anyhow::Error) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(with_causes(error));
    }

    /// What keeps the writers, if anything does.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `12,345 reads checked, 0 stale`.
    pub(super) fn checks(&self) -> String {
        let (checked, stale) = (self.findings.checked.load(Relaxed), self.findings.stale.load(Relaxed));
        format!("{} reads checked, {} stale", text::number(checked), text::number(stale))
    }
}

/// The share of hits between two looks.
fn ratio(before: &Stats, now: &Stats) -> Option<f64> {
    let (hits, gets) = (now.hits - before.hits, now.gets - before.gets);
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    (gets > 0).then(|| hits as f64 / gets as f64)
}

impl Latency {
    fn of(mut latencies: Vec<Duration>) -> Option<Self> {
        latencies.sort_unstable();
        let max = *latencies.last()?;
        let at = |percent: usize| latencies[(latencies.len() * percent / 100).min(latencies.len() - 1)];
        Some(Self { p50: at(50), p99: at(99), max })
    }
}

/// `p50 0.42 ms, p99 1.30 ms, max 7.00 ms`.
pub(super) fn latency_text(latency: Option<Latency>) -> String {
    let Some(latency) = latency else { return "commit latency unknown".to_owned() };
    let ms = |latency| text::millis(Some(latency));
    format!("p50 {} ms, p99 {} ms, max {} ms", ms(latency.p50), ms(latency.p99), ms(latency.max))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn change(xid: u64, rows: Rows) -> Change {
        Change { table: Some("t".into()), rows, columns: BTreeMap::new(), xid: Some(xid) }
    }

    fn keys(keys: impl IntoIterator<Item = i64>) -> Rows {
        Rows::Keys(keys.into_iter().map(|key| RowKey::new(&[crate::KeyPart::Int(key)])).collect())
    }

    #[test]
    fn messages_of_a_transaction_are_one_commit() {
        let board = Board::new(2, 1000);
        let now = SystemTime::now();
        for node in [0, 1] {
            board.add(node, now, &change(7, keys(200..250)));
            board.add(node, now, &change(7, keys(250..300)));
            board.time(node, 7, Duration::from_millis(1 + node as u64));
        }
        board.add(0, now, &change(8, keys([42])));
        board.add(0, now, &change(9, Rows::All));
        let commits = board.commits_from(0);
        let counts: Vec<_> = commits.iter().map(|it| (it.count, it.nodes(), it.yours, it.all)).collect();
        assert_eq!(counts, [(100, 2, false, false), (1, 1, true, false), (0, 1, true, true)]);
        assert_eq!(commits[0].latency, Some(Duration::from_millis(2)), "that of the slowest node");
    }

    #[test]
    fn percentiles() {
        let latencies = (1..=100).map(Duration::from_millis).collect();
        let ms = Duration::from_millis;
        assert_eq!(Latency::of(latencies), Some(Latency { p50: ms(51), p99: ms(100), max: ms(100) }));
        assert_eq!(Latency::of(Vec::new()), None);
    }
}
