//! What the run and its node processes tell each other: one JSON value a line. All times are of one clock of the machine.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::history::{Key, Time};
use crate::{Config, Result, clock};

/// The first line to a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Setup {
    pub(super) id: u32,
    /// The run began at this time of the machine's clock.
    pub(super) origin: Time,
    pub(super) seed: u64,
    pub(super) kind: Kind,
    /// It hears NOTIFY.
    pub(super) listens: bool,
    /// For loads and transactions.
    pub(super) pool: String,
    /// For the line.
    pub(super) listener: String,
    /// The address of the tier.
    pub(super) tier: Option<String>,
}

/// What a node is like.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum Kind {
    /// One line, room for all.
    Plain,
    /// So little room that it evicts all the time.
    Small,
    /// Two lines, and rows read again after a gap.
    Redundant,
}

impl Kind {
    pub(super) fn of(number: u32) -> Self {
        [Self::Plain, Self::Small, Self::Redundant][number as usize % 3]
    }

    /// Entries of each table.
    pub(super) fn capacity(self) -> usize {
        if self == Self::Small { SMALL } else { 100_000 }
    }
}

/// Entries of a node that evicts.
pub(super) const SMALL: usize = 24;

/// Messages that may wait at a node, so little that a flood overflows it.
const INBOX_MAX: usize = 256 << 10;

impl Setup {
    pub(super) fn config(&self) -> Result<Config> {
        let name = format!("torture {}", self.id);
        let mut config = Config::from_url(&self.pool)?;
        config.pool_connect = config.pool_connect.application_name(&name);
        config.listener = Config::from_url(&self.listener)?.listener;
        config.listener.application_name(&name);
        config.beat = BEAT;
        config.beat_timeout = BEAT_TIMEOUT;
        config.lease = LEASE;
        config.load_timeout = LOAD_TIMEOUT;
        config.inbox_bytes_max = INBOX_MAX;
        config.events_max = 65_536;
        config.listen = self.listens;
        config.redundant_listener = self.listens && self.kind == Kind::Redundant;
        Ok(config)
    }
}

const BEAT: Duration = Duration::from_millis(200);
const BEAT_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const LEASE: Duration = Duration::from_millis(1500);
pub(super) const LOAD_TIMEOUT: Duration = Duration::from_secs(2);

/// A node is coherent again this long after all is well: ten times what a late fence and the longest pause between two attempts
/// take, as the machine may be busy.
pub(super) const RECOVERY: Duration = Duration::from_secs(20);

/// Whoever waits for a read or a reply waits this long: for two fences, several loads and a turn, and that on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Now, counted from when the run began.
pub(super) fn now(origin: Time) -> Time {
    machine_time().saturating_sub(origin)
}

/// Now, by the machine's clock.
pub(super) fn machine_time() -> Time {
    nanos(clock::now())
}

pub(super) fn nanos(duration: Duration) -> Time {
    Time::try_from(duration.as_nanos()).unwrap_or(Time::MAX)
}

/// To a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) enum Order {
    /// Read and write, until `Stop`. How often a row cannot be decoded, one in so many; and whether to cancel reads by the hundred.
    Go { panics: Option<u32>, storm: bool },
    /// Another node's transaction: read what it wrote.
    Token { token: String, number: u64, keys: Vec<Key> },
    /// Stop reading and writing. Answered by `Stopped`.
    Stop,
    /// Become coherent, and tell what is held. Answered by `Quiet`.
    Quiet,
    /// While nobody else reads or writes: how many loads it takes. Answered by `Lively`.
    Lively,
}

/// From a node.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Told {
    Ready,
    Stopped,
    Reads(Vec<RawRead>),
    Note(Time, RawNote),
    Wrote(Attempt),
    Quiet(Box<Quiet>),
    /// What is wrong with the number of loads.
    Lively(Vec<String>),
    /// Something that must not be.
    Wrong(String),
}

/// What was asked for.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub(super) enum Asked {
    Get,
    GetMany,
    TryGet,
    Snapshot,
    /// In milliseconds.
    Within(u64),
    Fenced,
    /// After a barrier, when nobody writes.
    Barrier,
    /// The transaction that wrote this number.
    AtLeast(u64),
    /// On the node whose own transaction wrote this number, which was named to it.
    Own(u64),
    Any,
    /// From a handle that serves old rows.
    Stale,
}

/// A read that was answered.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct RawRead {
    #[serde(rename = "k")]
    pub(super) key: Key,
    #[serde(rename = "a")]
    pub(super) asked: Asked,
    #[serde(rename = "s")]
    pub(super) start: Time,
    #[serde(rename = "e")]
    pub(super) end: Time,
    /// The number in the row.
    #[serde(rename = "n")]
    pub(super) seen: Option<u64>,
    #[serde(rename = "l")]
    pub(super) loaded: Option<Time>,
    /// Numbers calls of this node.
    #[serde(rename = "c")]
    pub(super) call: u64,
}

/// What happened to a node.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) enum RawNote {
    Applied {
        xid: u64,
        /// `None`: all.
        keys: Option<Vec<Key>>,
    },
    Gap {
        since: Time,
        why: String,
    },
    /// On this run of this server.
    Coherent {
        incarnation: u64,
    },
    /// One of two lines was lost.
    LineLost,
    Unreadable,
}

/// A transaction that somebody tried.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct Attempt {
    /// The server's port.
    pub(super) port: u16,
    pub(super) xid: u64,
    pub(super) sent: Time,
    /// When COMMIT returned.
    pub(super) ended: Option<Time>,
    /// Whether it was rolled back for certain.
    pub(super) rolled_back: bool,
    pub(super) rows: Vec<Written>,
    /// For other nodes.
    pub(super) token: Option<String>,
}

/// A row that a transaction changed.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Written {
    pub(super) key: Key,
    pub(super) number: u64,
    pub(super) deletes: bool,
    /// In a savepoint that was rolled back.
    pub(super) undone: bool,
}

/// What a node holds when all is quiet, and its counters.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(super) struct Quiet {
    /// When it was asked, and when that was.
    pub(super) at: Time,
    /// It took this long to become coherent.
    pub(super) recovered: Duration,
    pub(super) holds: Vec<(Key, Option<u64>)>,
    pub(super) wrong: Vec<String>,
    pub(super) counts: Counts,
}

/// Counters of a node since it started, all tables together.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(super) struct Counts {
    pub(super) hits: u64,
    pub(super) stale: u64,
    pub(super) loads: u64,
    pub(super) voided: u64,
    pub(super) uncached: u64,
    pub(super) failed: u64,
    pub(super) clears: u64,
    pub(super) invalidations: u64,
    /// Rows that were read and are not held, though nothing changed.
    pub(super) evicted: u64,
    pub(super) gaps: u64,
    pub(super) fences: u64,
    pub(super) unreadable: u64,
    pub(super) overflows: u64,
    /// Calls that were cancelled, and rows whose decoding panicked.
    pub(super) cancelled: u64,
    pub(super) panics: u64,
    /// Rows of the tier that were taken, and that were not; and times that it did not answer.
    pub(super) tier_hits: u64,
    pub(super) tier_refused: u64,
    pub(super) tier_failed: u64,
    /// Memory of the process, in bytes.
    pub(super) memory: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: &Self) {
        let mut other = *other;
        for (to, from) in self.all().into_iter().zip(other.all()) {
            *to += *from;
        }
    }

    /// What has been counted since.
    pub(super) fn since(&self, before: &Self) -> Self {
        let (mut grown, mut before) = (*self, *before);
        for (now, before) in grown.all().into_iter().zip(before.all()) {
            *now = now.saturating_sub(*before);
        }
        grown
    }

    fn all(&mut self) -> [&mut u64; 19] {
        [
            &mut self.hits,
            &mut self.stale,
            &mut self.loads,
            &mut self.voided,
            &mut self.uncached,
            &mut self.failed,
            &mut self.clears,
            &mut self.invalidations,
            &mut self.evicted,
            &mut self.gaps,
            &mut self.fences,
            &mut self.unreadable,
            &mut self.overflows,
            &mut self.cancelled,
            &mut self.panics,
            &mut self.tier_hits,
            &mut self.tier_refused,
            &mut self.tier_failed,
            &mut self.memory,
        ]
    }
}
