//! Where rows come from: the one interface between loads and a database.

use std::{future::Future, pin::Pin, time::Duration};

use sqlx::PgConnection;
use tokio::time::{Instant, timeout_at};

use crate::{
    coherence::Incarnation,
    digest::{Digest, Tenths},
    error::{Error, Kind, Result},
    snapshot::Sight,
    tags::Tag,
};

/// Reads rows by key.
pub(crate) trait Source<K, V>: Send + Sync {
    /// Reads the rows of these keys, each key once, in one statement of its own: never inside a transaction
    /// that began earlier, whose snapshot could be older than a change that was already applied.
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V>;

    /// As [`load`](Self::load), but never as more than one statement: the rows are of one snapshot, and a key that the
    /// database does not take spoils them all.
    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V>;

    /// What the rows of these keys are now, by one statement of its own, with no code of the user's. A key may be there
    /// more than once.
    fn digests<'a>(&'a self, keys: &'a [K]) -> Digesting<'a>;

    /// What it loads comes from no database: it takes no turn among the node's statements, and there is no server to tell apart.
    fn is_local(&self) -> bool {
        false
    }

    /// The keys that a query of the user's returns, at most so many.
    fn keys<'a>(&'a self, _query: &'a str, _max: usize, _limit: Duration) -> Listing<'a, K> {
        Box::pin(async { Err(Error::new(Kind::Config, "this cache has no database that could be asked for keys")) })
    }

    /// The row of this key in this transaction, which nobody else changes before it ends; and who calls this for the same key waits for that.
    fn lock<'a>(&'a self, _key: &'a K, _transaction: &'a mut PgConnection) -> Locking<'a, V> {
        Box::pin(async {
            let message =
                "only rows of a table, by its own key, can be modified: a view and a list are made of several";
            Err(Error::new(Kind::Config, message))
        })
    }
}

/// What an attempt answers by then. `None`: nothing, or too late.
///
/// An answer that has come, and lay there while the process was stopped, is as late as one that has not: who asked since it goes on, while
/// the node is in doubt, waits for this load, and must not get a row of before.
pub(crate) async fn in_time<T>(deadline: Instant, attempt: impl Future<Output = T>) -> Option<T> {
    let answer = timeout_at(deadline, attempt).await.ok();
    answer.filter(|_| Instant::now() <= deadline)
}

/// Keys that are being read.
pub(crate) type Listing<'a, K> = Pin<Box<dyn Future<Output = Result<Vec<K>>> + Send + 'a>>;

/// A row that is being locked.
pub(crate) type Locking<'a, V> = Pin<Box<dyn Future<Output = Result<Option<V>>> + Send + 'a>>;

/// A load under way.
pub(crate) type Loading<'a, V> = Pin<Box<dyn Future<Output = Result<Loaded<V>>> + Send + 'a>>;

/// What one statement read.
pub(crate) struct Loaded<V> {
    /// One result per key, in the order of the keys. `None`: no such row.
    pub(crate) rows: Vec<Result<Option<V>>>,
    /// Of the rows, in the same order; empty unless somebody wants it.
    pub(crate) received: Vec<Received>,
    pub(crate) stamp: Stamp,
}

impl<V> Loaded<V> {
    /// Nothing.
    pub(crate) fn none() -> Self {
        Self { rows: Vec::new(), received: Vec::new(), stamp: Stamp::default() }
    }

    /// Adds what was read of one more key. One stamp stands for all: of the same server, or of none.
    pub(crate) fn push(&mut self, one: Result<Self>) {
        match one {
            Ok(one) => {
                if self.rows.iter().all(Result::is_err) {
                    self.stamp.incarnation = one.stamp.incarnation;
                } else if self.stamp.incarnation != one.stamp.incarnation {
                    self.stamp.incarnation = None;
                }
                self.stamp.dirty |= one.stamp.dirty;
                self.stamp.lsn = self.stamp.lsn.max(one.stamp.lsn);
                // That of one of them would not do for the others: each row says what its own load saw.
                self.stamp.saw = None;
                self.rows.extend(one.rows);
                self.received.extend(one.received);
            }
            Err(error) => {
                self.rows.push(Err(error));
                self.received.push(Received::default());
            }
        }
    }
}

/// What is kept of a row as it was received.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Received {
    /// If the table is audited.
    pub(crate) digest: Digest,
    /// Its length, if rows are weighed by that. What is more than 4 GB is as much.
    pub(crate) bytes: u32,
    /// What it depends on beside its key, if the loader says so.
    pub(crate) tags: Vec<Tag>,
    /// It was read by another load than the one that the stamp is of.
    pub(crate) earlier: Option<Earlier>,
}

/// What is known of a load that somebody else has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Earlier {
    pub(crate) saw: Sight,
    /// The commits that it saw were logged before this position.
    pub(crate) lsn: u64,
    /// It started no earlier than this.
    pub(crate) at: Tenths,
}

impl Received {
    pub(crate) const ABSENT: Self = Self { digest: Digest::ABSENT, bytes: 0, tags: Vec::new(), earlier: None };
}

/// An audit's reading under way.
pub(crate) type Digesting<'a> = Pin<Box<dyn Future<Output = Result<Digests>> + Send + 'a>>;

/// What one statement read, for an audit.
pub(crate) struct Digests {
    /// One per key, in the order of the keys.
    pub(crate) rows: Vec<Digest>,
    pub(crate) stamp: Stamp,
}

/// What a statement says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// The server that answered; `None` when it has lost its canary, that is, after a crash or a promotion.
    pub(crate) incarnation: Option<Incarnation>,
    /// The statement may have seen its own transaction's uncommitted changes (X14), or a snapshot from before it was sent (X31).
    pub(crate) dirty: bool,
    /// The commits that it saw were logged before this position.
    pub(crate) lsn: u64,
    /// What it saw, if somebody wants to know, and it was on a primary.
    pub(crate) saw: Option<Sight>,
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_lay_there_is_late() {
        let deadline = Instant::now() + Duration::from_secs(2);
        let after = |seconds| async move {
            tokio::time::advance(Duration::from_secs(seconds)).await;
            "an answer"
        };
        assert_eq!(in_time(deadline, after(2)).await, Some("an answer"));
        // As if the process had been stopped: when it goes on, both the answer and the end of the time are there.
        assert_eq!(in_time(deadline, after(1)).await, None);
    }
}
