//! What happened in a run, as its writers, nodes and readers noted it: the input of the [checker](super::checker).
//!
//! All notes of a run are stamped by one clock, and every note has an interval or a bound where the moment itself is not
//! known: a write became visible somewhere between `sent` and `ended`; a read was answered somewhere between `start` and `end`.
//!
//! The versions of a key are numbered by the writers, inside of their transactions and under a lock, so they are in the order in
//! which they became visible. A deletion is a version too.

use std::time::Duration;

/// Time since the run began, in nanoseconds; in a simulation in whatever its clock counts.
pub type Time = u64;

/// A key of the table that is written and read.
pub type Key = i64;

/// One cache of one node, from its start to its end. A process that is started again is another node.
pub type NodeId = u32;

/// The place of a write among the writes of its key. Grows with a number that the writers count in the database, which may lose
/// some of them in a crash and count them again: so first by the crashes and promotions before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// How many crashes and promotions of the server there had been.
    pub era: u32,
    /// Counts the writes of the key.
    pub number: u64,
}

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the database that has survived.
    Committed,
    /// Its transaction, or its savepoint, was rolled back.
    RolledBack,
    /// It may have been visible, and was lost in a crash or by a promotion.
    Lost {
        /// The last era that it was part of.
        with: u32,
    },
}

/// One version of one key.
#[derive(Clone, Debug)]
pub struct Write {
    /// Of this key.
    pub key: Key,
    /// Its place among the writes of the key.
    pub version: Version,
    /// Whether the row is gone then.
    pub deletes: bool,
    /// The transaction that wrote it.
    pub xid: u64,
    /// Before COMMIT was sent.
    pub sent: Time,
    /// When COMMIT had returned; `Time::MAX` if it never did.
    pub ended: Time,
    /// What became of it.
    pub outcome: Outcome,
}

/// What a reader asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// `get`, or `Freshness::Coherent`.
    Coherent,
    /// `Freshness::Within`.
    Within(Duration),
    /// `Freshness::Fenced`.
    Fenced,
    /// `Freshness::AtLeast` the token of this transaction.
    AtLeast(u64),
    /// `Freshness::Any`, or a read that a fallback answers with old rows.
    Any,
}

/// One read that was answered. A read that failed is no note: it promises nothing.
#[derive(Clone, Debug)]
pub struct Read {
    /// Of this node.
    pub node: NodeId,
    /// Of this key.
    pub key: Key,
    /// What was asked for.
    pub mode: Mode,
    /// Before the call.
    pub start: Time,
    /// After it returned.
    pub end: Time,
    /// The version; `None`: no such row.
    pub seen: Option<Version>,
    /// When the row was decoded, if there is one and it is known.
    pub loaded: Option<Time>,
    /// Reads with the same number were one call that promises rows of one snapshot.
    pub snapshot: Option<u64>,
}

/// Something that happened to a node.
#[derive(Clone, Debug)]
pub enum Noted {
    /// It had applied what this transaction did to these keys; `None`: to all.
    Applied {
        /// The transaction, as the message named it.
        xid: u64,
        /// The keys.
        keys: Option<Vec<Key>>,
    },
    /// It had ceased to be coherent. What it held before this time must not be served again.
    Gap {
        /// Not later than the gap.
        since: Time,
    },
    /// It had become coherent, on a server of this era.
    Coherent {
        /// How many crashes and promotions there had been.
        era: u32,
    },
    /// After all was quiet and a barrier: what it holds of this key; `None`: that there is no row.
    Holds {
        /// Of this key.
        key: Key,
        /// The version.
        seen: Option<Version>,
    },
}

/// All notes of one run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Every version, also those that were rolled back. A key begins as absent, unless a write that ended at 0 says otherwise.
    pub writes: Vec<Write>,
    /// Every answered read.
    pub reads: Vec<Read>,
    /// Every event of a node, with the moment *after* it at which it was noted.
    pub notes: Vec<(NodeId, Time, Noted)>,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.era == 0 { write!(f, "v{}", self.number) } else { write!(f, "v{}.{}", self.era, self.number) }
    }
}
