//! The check: no node returns a row that is older than a change it had applied.
//!
//! 1. A node applies a change: transaction `x` changed key `k`. Its follower notes `k → x` *afterwards*.
//! 2. A reader looks up `x`, *then* gets `k`, and hands over what it got.
//! 3. The history says, in the order of commits, what happened to `k`. What the reader got must not come before the
//!    last thing that `x` did to `k`; it may well come after it.
//!
//! The history is written by triggers in the writer's own transaction, so whatever the reader got is in there, whoever
//! wrote it. What is not in there is older than all of it.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use sqlx::PgPool;
use tokio::sync::mpsc;

/// Keys noted per node at most; the oldest are forgotten first, which is only a check less.
const KEYS_MAX: usize = 20_000;

/// Changes are checked for this long. Well below [`HISTORY_KEPT`].
const NOTED_FOR: Duration = Duration::from_mins(2);

/// How long the history is kept, and how often it is swept.
const HISTORY_KEPT: &str = "10 minutes";
const SWEEP_EVERY: Duration = Duration::from_secs(30);

/// Reads that wait to be checked at most; more are not checked.
pub(super) const WAITING_MAX: usize = 4096;

/// Checks in one statement.
const BATCH_MAX: usize = 512;

/// The last transaction that a node has applied, by key.
#[derive(Default)]
pub(super) struct Applied {
    last: HashMap<i64, u64>,
    noted: VecDeque<(Instant, i64, u64)>,
    /// Keys that no reader has looked at since they changed.
    unread: VecDeque<i64>,
}

impl Applied {
    /// To be called after the node has applied it.
    pub(super) fn note(&mut self, now: Instant, key: i64, xid: u64) {
        self.last.insert(key, xid);
        self.noted.push_back((now, key, xid));
        self.unread.push_back(key);
        while self.noted.front().is_some_and(|(at, ..)| self.noted.len() > KEYS_MAX || *at + NOTED_FOR < now) {
            let (_, key, xid) = self.noted.pop_front().expect("there is a front");
            if self.last.get(&key) == Some(&xid) {
                self.last.remove(&key);
            }
        }
        while self.unread.len() > KEYS_MAX {
            self.unread.pop_front();
        }
    }

    /// A change of the whole table: which keys it touched is not known.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The last transaction that changed this key, as far as this node has applied them.
    pub(super) fn xid(&self, key: i64) -> Option<u64> {
        self.last.get(&key).copied()
    }

    /// Up to `n` keys that changed and have not been read since.
    pub(super) fn take_unread(&mut self, n: usize) -> Vec<i64> {
        let n = n.min(self.unread.len());
        self.unread.drain(..n).collect()
    }
}

/// One read, to be checked.
#[derive(Clone, Debug)]
pub(super) struct Read {
    pub(super) node: usize,
    pub(super) key: i64,
    /// What the node had applied before the read.
    pub(super) applied: u64,
    /// The version that was returned; `None`: no such row.
    pub(super) version: Option<i64>,
}

/// What the history says about one read, in its own steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, sqlx::FromRow)]
struct Facts {
    /// The last thing that the applied transaction did to the key.
    applied: Option<i64>,
    /// When the returned version was written.
    written: Option<i64>,
    /// When the key was last deleted.
    deleted: Option<i64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    Stale,
    /// The history has forgotten the transaction.
    Unknown,
}

fn judge(version: Option<i64>, facts: Facts) -> Verdict {
    let Some(applied) = facts.applied else { return Verdict::Unknown };
    let returned = if version.is_some() { facts.written } else { facts.deleted };
    if returned.is_some_and(|returned| returned >= applied) { Verdict::Fine } else { Verdict::Stale }
}

/// Counts of one run.
#[derive(Default)]
pub(super) struct Findings {
    pub(super) checked: AtomicU64,
    pub(super) stale: AtomicU64,
    /// The first of them, in words.
    pub(super) first_stale: Mutex<Option<String>>,
}

impl Findings {
    fn add(&self, read: &Read, facts: Facts) {
        let verdict = judge(read.version, facts);
        self.checked.fetch_add(u64::from(verdict != Verdict::Unknown), Relaxed);
        if verdict == Verdict::Stale {
            self.stale.fetch_add(1, Relaxed);
            let Read { node, key, applied, version } = read;
            let returned = version.map_or_else(|| "no row".to_owned(), |version| format!("version {version}"));
            let text = format!(
                "node {} returned {returned} for id {key}, although it had applied transaction {applied} ({facts:?})",
                node + 1
            );
            self.first_stale.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
        }
    }
}

/// Checks reads until all their senders are gone.
pub(super) async fn check(pool: PgPool, mut reads: mpsc::Receiver<Read>, findings: Arc<Findings>) {
    let mut batch = Vec::new();
    let mut swept_at = Instant::now();
    while reads.recv_many(&mut batch, BATCH_MAX).await > 0 {
        match look_up(&pool, &batch).await {
            Ok(facts) => batch.iter().zip(facts).for_each(|(read, facts)| findings.add(read, facts)),
            // The database is away for a while: these are not checked, and not counted.
            Err(error) => tracing::warn!(%error, reads = batch.len(), "cannot check reads"),
        }
        batch.clear();
        if swept_at.elapsed() > SWEEP_EVERY {
            swept_at = Instant::now();
            let sweep = sqlx::query("delete from rowcache_demo.history where at < now() - $1::text::interval");
            if let Err(error) = sweep.bind(HISTORY_KEPT).execute(&pool).await {
                tracing::warn!(%error, "cannot sweep the history");
            }
        }
    }
}

/// What the history says about each read, in their order.
async fn look_up(pool: &PgPool, reads: &[Read]) -> sqlx::Result<Vec<Facts>> {
    let ask = sqlx::query_as(
        "select
           greatest(
             (select max(h.step) from rowcache_demo.history h where h.id = r.id and h.xid = r.xid::xid8),
             (select max(h.step) from rowcache_demo.history h where h.id is null and h.xid = r.xid::xid8)) as applied,
           (select max(h.step) from rowcache_demo.history h where h.id = r.id and h.version = r.version) as written,
           greatest(
             (select max(h.step) from rowcache_demo.history h where h.id = r.id and h.version is null),
             (select max(h.step) from rowcache_demo.history h where h.id is null)) as deleted
         from unnest($1::bigint[], $2::text[], $3::bigint[]) with ordinality as r(id, xid, version, n)
         order by r.n",
    );
    ask.bind(reads.iter().map(|read| read.key).collect::<Vec<_>>())
        .bind(reads.iter().map(|read| read.applied.to_string()).collect::<Vec<_>>())
        .bind(reads.iter().map(|read| read.version).collect::<Vec<_>>())
        .fetch_all(pool)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happened to one key, in the order of commits; the place in the list is the step.
    struct History(Vec<Written>);

    /// A transaction, and the version that it wrote; `None`: it deleted the row.
    type Written = (u64, Option<i64>);

    impl History {
        fn verdict(&self, applied: u64, version: Option<i64>) -> Verdict {
            let last = |wanted: &dyn Fn(&Written) -> bool| {
                self.0.iter().rposition(wanted).map(|step| i64::try_from(step).expect("few steps"))
            };
            let facts = Facts {
                applied: last(&|(xid, _)| *xid == applied),
                written: last(&|(_, written)| version.is_some() && *written == version),
                deleted: last(&|(_, written)| written.is_none()),
            };
            judge(version, facts)
        }
    }

    #[test]
    fn a_sequence_as_it_should_be() {
        let history = History(vec![(1, Some(10)), (2, Some(20)), (3, None), (4, Some(40))]);
        for (applied, version) in [
            (1, Some(10)),
            (1, Some(20)), // newer than what was applied is fine: the read went to Postgres
            (2, Some(20)),
            (2, None),
            (3, None),
            (3, Some(40)),
            (4, Some(40)),
        ] {
            assert_eq!(history.verdict(applied, version), Verdict::Fine, "{applied} applied, {version:?} returned");
        }
    }

    #[test]
    fn a_wrong_sequence_is_caught() {
        let history = History(vec![(1, Some(10)), (2, Some(20)), (3, None), (4, Some(40))]);
        for (applied, version) in [
            (2, Some(10)), // an old row after its UPDATE
            (3, Some(20)), // a row after its DELETE
            (4, None),     // no row after its INSERT
            (4, Some(10)),
            (1, Some(7)), // a row from before all history
        ] {
            assert_eq!(history.verdict(applied, version), Verdict::Stale, "{applied} applied, {version:?} returned");
        }
        assert_eq!(history.verdict(99, Some(10)), Verdict::Unknown, "nothing is known about transaction 99");
    }

    #[test]
    fn the_last_thing_a_transaction_did_counts() {
        let history = History(vec![(1, None), (1, Some(11)), (1, Some(12))]);
        assert_eq!(history.verdict(1, Some(12)), Verdict::Fine);
        assert_eq!(history.verdict(1, Some(11)), Verdict::Stale, "it was overwritten by the same transaction");
        assert_eq!(history.verdict(1, None), Verdict::Stale);
    }

    #[test]
    fn findings_count_and_describe() {
        let findings = Findings::default();
        let read = Read { node: 1, key: 42, applied: 7, version: Some(3) };
        findings.add(&read, Facts { applied: Some(5), written: Some(5), deleted: None });
        findings.add(&read, Facts::default());
        findings.add(&read, Facts { applied: Some(5), written: Some(4), deleted: None });
        assert_eq!((findings.checked.load(Relaxed), findings.stale.load(Relaxed)), (2, 1));
        let text = findings.first_stale.lock().unwrap().clone().expect("it is described");
        assert!(text.starts_with("node 2 returned version 3 for id 42"), "{text}");
    }

    #[test]
    fn what_was_applied_is_bounded_and_the_last_counts() {
        let mut applied = Applied::default();
        let start = Instant::now();
        applied.note(start, 1, 100);
        applied.note(start, 1, 101);
        assert_eq!(applied.xid(1), Some(101));
        assert_eq!(applied.take_unread(10), [1, 1]);
        applied.note(start + 2 * NOTED_FOR, 2, 102);
        assert_eq!((applied.xid(1), applied.xid(2)), (None, Some(102)), "the old one is forgotten");
        for key in 0..30_000 {
            applied.note(start + 2 * NOTED_FOR, key, 103);
        }
        assert_eq!(applied.last.len(), KEYS_MAX);
        applied.clear();
        assert_eq!((applied.xid(29_999), applied.take_unread(1)), (None, vec![]));
    }
}
