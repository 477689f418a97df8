//! Rows that nodes share outside of Postgres, for working sets that are larger than the memory of a node.
//!
//! ```text
//! get ── held ──→ the entry
//!  └ miss → a runner takes the key → the tier ── a row that may be admitted ──→ published like any load
//!                                      └ nothing, too old, late, broken → Postgres ──→ published, and put into the tier
//! ```
//!
//! Nothing in a tier is believed but what its seal covers (`seal.rs`), and that only says what a load *saw*. Whether that is enough, a node
//! decides by what it has applied itself (`admission.rs`). So a tier may forget, delay, exchange or resurrect whatever it likes.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `source` | how a load asks a tier first |
//! | `seal` | what lies in a tier |
//! | `form` | how values become bytes, and back, without being changed by it |
//! | `redis` | Redis and Valkey |

#![cfg_attr(not(feature = "redis"), allow(dead_code, reason = "without the feature nobody has a tier"))]

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use crate::{
    admission::Needs,
    coherence::Boot,
    sync::{AtomicU64, Ordering},
};

mod form;
#[cfg(feature = "redis")]
mod redis;
mod seal;
mod source;

pub(crate) use form::Form;
pub(crate) use source::Tiered;

/// A server that keeps rows for all nodes: Redis or Valkey. Cheap to clone; one for all tables will do.
///
/// A node asks it for what it does not hold, before it asks Postgres, and puts into it what it has read. For tables of which more is in
/// use than a node can hold, and whose rows cost Postgres much; not for tables that fit: their rows are in memory after one load
/// by key.
///
/// # Coherence
///
/// The promise is the same with a tier as without. Each row in it says what its load saw, and a node takes it only if that includes every
/// change that the node has been told of, everything from before it began to listen, and whatever it has returned for the key before. What the
/// tier lost, delayed, mixed up, or restored from an old dump is a miss. Nobody has to delete there, and nobody does.
///
/// Three consequences. A node that starts, or had a gap, takes nothing that was put in before that. A transaction that stays open for
/// long, and has written, keeps what is read meanwhile from being taken by others. And after what no transaction is named with
/// ([`Table::invalidate`](crate::Table::invalidate), [`clear`](crate::Table::clear), a [`snapshot`](crate::Table::snapshot) that read Postgres, a row that was
/// [put](crate::Ticket::put)) the node takes nothing until two more fences have come back: up to two [beats](crate::Config::beat).
///
/// # When it fails
///
/// An answer is awaited for [`timeout`](Self::timeout). After a failure it is left alone for a second; then one load tries it. A
/// service starts, and runs, without it.
///
/// # What is in it
///
/// Your rows, in clear, for [`ttl`](Self::ttl): whoever can read the server can read them. They are sealed with a key that is in the
/// database, so that who can write to the server cannot make a node take what no node has put there. Tables whose keys are hashed in
/// messages can have none.
#[derive(Clone)]
pub struct Tier {
    pub(crate) shelf: Arc<dyn Shelf>,
    pub(crate) settings: Settings,
    pub(crate) health: Arc<Health>,
}

#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) prefix: Arc<str>,
    pub(crate) timeout: Duration,
    pub(crate) patience: Duration,
    pub(crate) ttl: Duration,
    pub(crate) bytes_max: usize,
}

impl Tier {
    pub(crate) fn on(shelf: Arc<dyn Shelf>) -> Self {
        let settings = Settings {
            prefix: "rowcache".into(),
            timeout: Duration::from_millis(50),
            patience: Duration::from_millis(50),
            ttl: Duration::from_hours(1),
            bytes_max: 1 << 20,
        };
        let health = Health { tries_at: AtomicU64::new(0), writers: Arc::new(Semaphore::new(WRITERS_MAX)) };
        Self { shelf, settings, health: Arc::new(health) }
    }

    /// Names in it begin with this. Default `rowcache`.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.settings.prefix = prefix.into();
        self
    }

    /// An answer that takes longer is a failure. It is what a tier that fails can cost a load. Default 50 ms.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = timeout;
        self
    }

    /// How long a load waits for another node that is loading the row already; and how long others wait for this one. Zero: they all read
    /// Postgres. Default 50 ms.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.settings.patience = patience;
        self
    }

    /// Rows are kept there for so long. Default 1 hour.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.settings.ttl = ttl;
        self
    }

    /// Larger rows, as bytes, are not put there. Default 1 MiB.
    #[must_use]
    pub fn value_bytes_max(mut self, bytes: usize) -> Self {
        self.settings.bytes_max = bytes;
        self
    }
}

impl fmt::Debug for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tier")
            .field("server", &self.shelf.to_string())
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// What keeps bytes under names. A simulation can be one.
pub(crate) trait Shelf: fmt::Display + Send + Sync {
    /// What lies under each of these names, in one round trip, within [`Settings::timeout`]. Who finds nothing that would do is noted
    /// there, for [`Settings::patience`], as somebody who will put it in.
    fn take<'a>(&'a self, asked: &'a [Asked], settings: &'a Settings) -> Answer<'a, Vec<Found>>;

    /// Whether it answers.
    fn ping(&self) -> Answer<'_, ()>;

    /// Puts these under their names, for [`Settings::ttl`], within the same time.
    fn put<'a>(&'a self, rows: &'a [(String, Vec<u8>)], settings: &'a Settings) -> Answer<'a, ()>;
}

/// An answer that may never come. The error is for the log.
pub(crate) type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, String>> + Send + 'a>>;

/// A row that somebody wants.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) name: String,
    pub(crate) needs: Needs,
}

/// What lies under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    /// Somebody else is about to put it in.
    Awaited,
    Bytes(Vec<u8>),
}

/// Whether a tier answers.
pub(crate) struct Health {
    /// Nanoseconds since boot: it is not asked before. 0: it answers.
    tries_at: AtomicU64,
    /// Turns of those who put rows in.
    pub(crate) writers: Arc<Semaphore>,
}

/// More than so many batches are not put in at a time.
const WRITERS_MAX: usize = 32;

/// A tier that has failed is left alone for so long.
const REST: Duration = Duration::from_secs(1);

impl Health {
    /// Whether it may be asked now. After a failure, one who asks finds out for all.
    pub(crate) fn may_ask(&self, now: Boot) -> bool {
        let tries_at = self.tries_at.load(Ordering::Acquire);
        tries_at == 0 || {
            nanos(now) >= tries_at
                && self
                    .tries_at
                    .compare_exchange(tries_at, nanos(now + REST), Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
        }
    }

    /// Whether it is worth its while to put something in.
    pub(crate) fn may_put(&self) -> bool {
        self.tries_at.load(Ordering::Acquire) == 0
    }

    /// It has answered. Returns whether that is news.
    pub(crate) fn answered(&self) -> bool {
        self.tries_at.load(Ordering::Acquire) != 0 && self.tries_at.swap(0, Ordering::AcqRel) != 0
    }

    /// It has failed. Returns whether that is news.
    pub(crate) fn failed(&self, now: Boot) -> bool {
        self.tries_at.swap(nanos(now + REST), Ordering::AcqRel) == 0
    }
}

fn nanos(at: Boot) -> u64 {
    u64::try_from(at.as_nanos()).unwrap_or(u64::MAX).max(1)
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn a_tier_that_fails_is_tried_once_a_second() {
        let health = Health { tries_at: AtomicU64::new(0), writers: Arc::new(Semaphore::new(1)) };
        let at = Duration::from_millis;
        assert!(health.may_ask(at(0)) && health.may_ask(at(0)));
        assert!(health.failed(at(10)) && !health.failed(at(10)));
        assert!(!health.may_ask(at(1009)));
        assert_eq!([1010, 1010, 2009].map(|now| health.may_ask(at(now))), [true, false, false], "one of them");
        assert!(health.may_ask(at(2010)));
        assert!(health.answered() && !health.answered());
        assert!(health.may_ask(at(2010)) && health.may_ask(at(2010)));
    }
}
