//! The database: servers with transactions, their log, and their queue of notifications. No time passes in here.
//!
//! What is assumed of Postgres (A6 to A10, A13 of the design) is what this does: the order of the queue is the order of
//! commits; a listener is sent a message only once its transaction is visible; LISTEN takes its place at the first message of a
//! transaction that is not; a crash loses what was not flushed, and gives its transaction ids away again.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tokio::sync::{Mutex as Lock, Notify, RwLock};
use uuid::Uuid;

use crate::{
    change_log::Position,
    coherence::Incarnation,
    verify::history::{Key, Version, Write},
};

/// A transaction: a number that is never used again, unlike its id.
pub(super) type Number = u64;

/// The rows that are there.
pub(super) type Rows = BTreeMap<Key, Version>;

/// One message in the queue.
#[derive(Clone)]
pub(super) struct Message {
    /// Of the node with this channel alone; `None`: of all.
    pub(super) channel: Option<String>,
    pub(super) payload: String,
    pub(super) by: Number,
}

/// A commit, in the log.
#[derive(Clone)]
pub(super) struct Commit {
    pub(super) by: Number,
    pub(super) xid: u64,
    /// What is there afterwards.
    pub(super) rows: Vec<(Key, Option<Version>)>,
    /// It survives a crash.
    pub(super) flushed: bool,
    /// What it has put into the change log.
    pub(super) messages: Vec<String>,
}

/// One server, from a start to a crash: a server that is started again is another one.
pub(super) struct Server {
    pub(super) incarnation: Incarnation,
    pub(super) era: u32,
    /// It answers who is connected.
    pub(super) alive: bool,
    /// It lets nobody in.
    pub(super) refuses: bool,
    pub(super) triggers_on: bool,
    /// Grows with each change of the triggers.
    pub(super) catalogue: u64,
    pub(super) rows: Rows,
    next_xid: u64,
    /// Transactions with an id that have not ended.
    running: BTreeSet<u64>,
    pub(super) log: Vec<Commit>,
    /// What was there before the log.
    base: Rows,
    pub(super) queue: Vec<Message>,
    pub(super) visible: BTreeSet<Number>,
    /// Moves with all that is removed from the change log, and is beyond it.
    pub(super) log_horizon: u64,
    /// The transactions whose messages have been removed.
    trimmed: BTreeSet<u64>,
    pub(super) locks: Locks,
}

/// The locks of a server.
#[derive(Clone)]
pub(super) struct Locks {
    /// Writers share it; a TRUNCATE, and whoever changes triggers, has it alone.
    pub(super) table: Arc<RwLock<()>>,
    pub(super) rows: Arc<Vec<Arc<Lock<()>>>>,
    /// Held by who notifies, from before its messages are queued until it is visible.
    pub(super) commit: Arc<Lock<()>>,
    /// Told when messages can be sent, and when the server has ended.
    pub(super) changed: Arc<Notify>,
}

impl Server {
    pub(super) fn new(canary: u64, era: u32, base: Rows, log: Vec<Commit>, keys: usize) -> Self {
        let mut rows = base.clone();
        for (key, version) in log.iter().flat_map(|commit| &commit.rows) {
            set(&mut rows, *key, *version);
        }
        Self {
            incarnation: Incarnation { canary: Uuid::from_u64_pair(canary, 1), started: i64::from(era) },
            era,
            alive: true,
            refuses: false,
            triggers_on: true,
            catalogue: canary,
            rows,
            next_xid: log.iter().map(|commit| commit.xid).max().map_or(700, |last| last + 1),
            running: BTreeSet::new(),
            visible: log.iter().map(|commit| commit.by).collect(),
            log,
            base,
            queue: Vec::new(),
            log_horizon: 0,
            trimmed: BTreeSet::new(),
            locks: Locks {
                table: Arc::default(),
                rows: Arc::new((0..keys).map(|_| Arc::default()).collect()),
                commit: Arc::default(),
                changed: Arc::default(),
            },
        }
    }

    /// Gives a transaction its id.
    pub(super) fn begin(&mut self) -> u64 {
        let xid = self.next_xid;
        self.next_xid += 1;
        self.running.insert(xid);
        xid
    }

    /// A transaction has ended without effect.
    pub(super) fn forget(&mut self, xid: u64) {
        self.running.remove(&xid);
    }

    /// `pg_current_snapshot()`.
    pub(super) fn snapshot(&self) -> String {
        let xmin = self.xmin();
        let running: Vec<_> = self.running.iter().map(ToString::to_string).collect();
        format!("{xmin}:{}:{}", self.next_xid, running.join(","))
    }

    /// The oldest transaction that runs, or the next one.
    pub(super) fn xmin(&self) -> u64 {
        self.running.first().copied().unwrap_or(self.next_xid)
    }

    /// The position in the log: commits logged so far.
    pub(super) fn lsn(&self) -> u64 {
        self.log.len() as u64 + 1
    }

    /// What a poll from this position on finds in the change log, and of which transactions.
    pub(super) fn logged_since(&self, since: &Position) -> Vec<(u64, String)> {
        let is_new = |xid: u64| xid >= since.since() || since.pending().contains(&xid);
        let commits = self.log.iter().filter(|it| self.visible.contains(&it.by) && is_new(it.xid));
        commits
            .filter(|it| !self.trimmed.contains(&it.xid))
            .flat_map(|it| it.messages.iter().map(|message| (it.xid, message.clone())))
            .collect()
    }

    /// Whether the messages of this transaction have been removed.
    pub(super) fn is_trimmed(&self, xid: u64) -> bool {
        self.trimmed.contains(&xid)
    }

    /// Removes the messages of all that has ended below the horizon, which moves up by at least one, and to this id. What runs
    /// below it may yet write some.
    pub(super) fn trim(&mut self, at_least: u64) {
        self.log_horizon = at_least.min(self.next_xid).max(self.log_horizon + 1);
        let ended = self.log.iter().filter(|it| self.visible.contains(&it.by)).map(|it| it.xid);
        self.trimmed.extend(ended.filter(|xid| *xid < self.log_horizon));
    }

    /// Writes the commit record.
    pub(super) fn record(&mut self, commit: Commit) {
        let flushed = commit.flushed;
        self.log.push(commit);
        if flushed {
            self.flush();
        }
    }

    pub(super) fn flush(&mut self) {
        for commit in self.log.iter_mut().rev() {
            if commit.flushed && self.visible.contains(&commit.by) {
                break;
            }
            commit.flushed = true;
        }
    }

    /// A commit becomes visible, and its messages may be sent.
    pub(super) fn show(&mut self, number: Number, xid: u64, rows: &[(Key, Option<Version>)]) {
        for (key, version) in rows {
            set(&mut self.rows, *key, *version);
        }
        self.visible.insert(number);
        self.running.remove(&xid);
        self.locks.changed.notify_waiters();
    }

    /// Where LISTEN takes its place (A8).
    pub(super) fn listen_at(&self) -> usize {
        self.queue.iter().position(|message| !self.visible.contains(&message.by)).unwrap_or(self.queue.len())
    }

    /// Those behind `from` that can be sent now.
    pub(super) fn to_send(&self, from: usize) -> &[Message] {
        let rest = &self.queue[from..];
        let n = rest.iter().position(|message| !self.visible.contains(&message.by)).unwrap_or(rest.len());
        &rest[..n]
    }

    /// The server that follows a crash of this one; and what is lost.
    pub(super) fn crash(&mut self, canary: u64) -> (Server, Vec<Number>) {
        let kept = self.log.iter().rposition(|commit| commit.flushed).map_or(0, |last| last + 1);
        self.end();
        self.follow(canary, kept)
    }

    /// A standby that had received all but the last `lag` commits is promoted; and what is lost. This one goes on.
    pub(super) fn promote(&self, canary: u64, lag: usize) -> (Server, Vec<Number>) {
        self.follow(canary, self.log.len().saturating_sub(lag))
    }

    fn follow(&self, canary: u64, kept: usize) -> (Server, Vec<Number>) {
        let lost = self.log[kept..].iter().map(|commit| commit.by).collect();
        let mut log = self.log[..kept].to_vec();
        for commit in &mut log {
            commit.flushed = true;
        }
        let keys = self.locks.rows.len();
        let mut new = Server::new(canary, self.era + 1, self.base.clone(), log, keys);
        (new.triggers_on, new.catalogue) = (self.triggers_on, self.catalogue);
        new.log_horizon = self.log_horizon.min(new.next_xid);
        new.trimmed = self.trimmed.iter().copied().filter(|xid| *xid < new.next_xid).collect();
        (new, lost)
    }

    pub(super) fn end(&mut self) {
        self.alive = false;
        self.locks.changed.notify_waiters();
    }
}

fn set(rows: &mut Rows, key: Key, version: Option<Version>) {
    match version {
        Some(version) => rows.insert(key, version),
        None => rows.remove(&key),
    };
}

/// The rows that a run begins with, as their history.
pub(super) fn first_rows(keys: usize) -> (Rows, Vec<Write>) {
    let version = Version { era: 0, number: 1 };
    let rows: Rows = (0..keys).filter(|n| n % 3 != 2).map(|n| (key(n), version)).collect();
    let write = |(key, version): (&Key, &Version)| Write {
        key: *key,
        version: *version,
        deletes: false,
        xid: 0,
        sent: 0,
        ended: 0,
        outcome: crate::verify::history::Outcome::Committed,
    };
    let writes = rows.iter().map(write).collect();
    (rows, writes)
}

pub(super) fn key(n: usize) -> Key {
    Key::try_from(n).expect("there are few keys")
}
