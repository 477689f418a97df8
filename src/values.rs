//! Shared values: what services compute, kept for all nodes, and computed once.
//!
//! They live in a table of schema `rowcache` that is tracked like any other, so that everything that holds for rows holds for them: a
//! node reads them from memory, a change by anybody reaches all nodes, and `docs/correctness.md` has no case of its own for them. What
//! is added here is who computes a value that is missing (`run.rs`), and when values end.

mod codec;
mod keeper;
mod memo;
mod run;
mod share;
mod stored;

use std::{fmt, future::Future, sync::Arc, time::Duration};

use sqlx::{PgConnection, PgPool};
use tokio::sync::mpsc;

pub use self::{
    codec::{Codec, Json, Raw},
    memo::SharedMemo,
    share::Share,
    stored::SharedValue,
};
use self::{
    keeper::sweep,
    run::{Ended, Runs, outcome},
    stored::Stored,
};
use crate::{
    error::{Error, Kind, Result},
    explain::Explanation,
    freshness::Freshness,
    key::Key,
    postgres::{
        built::BoxError,
        values::{Lives, Statements},
    },
    stats::{Counter, Stats},
    store::Cached,
    table::Table,
    token::Token,
};

/// Values that are shared by all nodes of a database, by key: made by [`Node::shared`](crate::Node::shared). Cheap to clone.
///
/// Reads are those of a [`Table`], with the same promise: from memory, and once this node has applied the notification of a
/// change, nothing from before it.
pub struct SharedValues<K: Key, V: Send + Sync + 'static, C: 'static = Json> {
    core: Arc<Core<K, V, C>>,
    lives: Lives,
}

struct Core<K: Key, V: Send + Sync + 'static, C: 'static> {
    table: Table<K, Stored<V, C>>,
    statements: Arc<Statements<K>>,
    writes: PgPool,
    common: Arc<Common<K, V, C>>,
    lease: Duration,
    timeout: Duration,
    bytes_max: usize,
}

/// What all handles of a node share. It keeps no node alive.
struct Common<K, V, C> {
    runs: Arc<Runs<K, V, C>>,
    counters: Counters,
    touches: mpsc::UnboundedSender<K>,
}

#[derive(Default)]
struct Counters {
    produced: Counter,
    failed: Counter,
    unkept: Counter,
    unreadable: Counter,
    swept: Counter,
}

/// Counters of shared values, of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedStats {
    /// Values that were computed here and stored.
    pub produced: u64,
    /// Producers that failed, panicked, or took too long.
    pub failed: u64,
    /// Values that were computed here and not stored: the value was deleted or written meanwhile, or Postgres could not be reached.
    pub unkept: u64,
    /// Reads that met a value that could not be decoded, and took it for missing.
    pub unreadable: u64,
    /// Values that had expired and were removed by this node.
    pub swept: u64,
}

impl<K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> SharedValues<K, V, C> {
    /// The value of this key, if there is one.
    ///
    /// # Errors
    ///
    /// As of [`Table::get`].
    ///
    /// # Cancel safety
    ///
    /// As of [`Table::get`].
    #[inline]
    pub async fn get(&self, key: &K) -> Result<Option<SharedValue<V, C>>> {
        Ok(self.look(key).await?.ok())
    }

    /// What this node holds of this key; never asks Postgres.
    #[inline]
    #[must_use]
    pub fn try_get(&self, key: &K) -> Option<SharedValue<V, C>> {
        self.readable(key, self.core.table.try_get(key).row()?).ok()
    }

    /// Whether there is a value.
    ///
    /// # Errors
    ///
    /// As of [`get`](Self::get).
    ///
    /// # Cancel safety
    ///
    /// As of [`get`](Self::get).
    pub async fn exists(&self, key: &K) -> Result<bool> {
        Ok(self.get(key).await?.is_some())
    }

    /// The value of this key. If there is none, `producer` computes one, which is stored: as [`fetch_or_store`](Self::fetch_or_store), for what cannot
    /// fail.
    ///
    /// # Errors
    ///
    /// As of [`fetch_or_store`](Self::fetch_or_store).
    ///
    /// # Cancel safety
    ///
    /// As of [`fetch_or_store`](Self::fetch_or_store).
    pub async fn get_or_store<F, R>(&self, key: &K, producer: F) -> Result<SharedValue<V, C>>
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = V> + Send + 'static,
    {
        self.fetch_or_store(key, || async move { Ok::<_, std::convert::Infallible>(producer().await) }).await
    }

    /// The value of this key. If there is none, a producer computes one, which is stored: one producer for all who ask, on all nodes. Whoever is first takes
    /// a lease, which it renews while its producer runs, and holds no connection or lock; the others wait until there is a value, and take over
    /// if it fails or its node dies.
    ///
    /// If the value is deleted, written, or cleared away while the producer runs, by anybody and in any way, what it returns is not stored. Only
    /// the caller whose producer it is gets it; the others ask again.
    ///
    /// # Errors
    ///
    /// * [`is_loader`](Error::is_loader): the producer failed (the source says how) or panicked; [`is_timeout`](Error::is_timeout): it took longer than
    ///   [`Share::produce_timeout`]. That goes to everybody on this node who waited for it, and is not kept; a node that
    ///   waited calls its own;
    /// * [`is_value`](Error::is_value): what it has returned cannot be encoded, or has more than
    ///   [`Share::value_bytes_max`] bytes;
    /// * those of [`get`](Self::get).
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody: the producer goes on, and its value is stored.
    #[inline]
    pub async fn fetch_or_store<F, R, E>(&self, key: &K, producer: F) -> Result<SharedValue<V, C>>
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = Result<V, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        match self.try_get(key) {
            Some(value) => Ok(value),
            // Boxed, so that the future of a hit stays small.
            None => Box::pin(self.produced(key, producer)).await,
        }
    }

    async fn produced<F, R, E>(&self, key: &K, producer: F) -> Result<SharedValue<V, C>>
    where
        F: FnOnce() -> R + Send + 'static,
        R: Future<Output = Result<V, E>> + Send + 'static,
        E: Into<BoxError> + 'static,
    {
        let Core { common, .. } = &*self.core;
        let mut producer = Some(producer);
        loop {
            let unreadable = match self.look(key).await? {
                Ok(value) => return Ok(value),
                Err(unreadable) => unreadable,
            };
            let ended = match common.runs.join(key) {
                Ok(joined) => outcome(joined).await,
                Err(run) => {
                    let mine = producer.take().expect("it comes back, or this returns");
                    let running = tokio::spawn(Arc::clone(&self.core).run(run, mine, self.lives, unreadable));
                    match running.await {
                        Ok((Ended::Unkept(value), _)) => {
                            common.counters.unkept.add(1);
                            return Ok(value);
                        }
                        Ok((ended, unused)) => {
                            common.counters.count(&ended);
                            producer = unused;
                            Some(ended)
                        }
                        Err(_) => None,
                    }
                }
            };
            match ended {
                Some(Ended::Kept(value)) => return Ok(value),
                Some(Ended::Failed(error)) => return Err(error),
                Some(Ended::Unkept(_) | Ended::Look) => {}
                None => return Err(Error::new(Kind::Closed, "the node was shut down, or its runtime")),
            }
        }
    }

    /// Stores a value, whatever there was. This node returns it from now on; others once they have been told, or with the token
    /// ([`Freshness::AtLeast`](crate::Freshness::AtLeast)).
    ///
    /// # Errors
    ///
    /// [`is_value`](Error::is_value): it cannot be encoded, or is too large; and those of [`Table::update`].
    ///
    /// # Cancel safety
    ///
    /// As of [`Table::update`].
    pub async fn put(&self, key: &K, value: &V) -> Result<Token> {
        let bytes = self.core.encode(key, value)?;
        let (of, lives) = (key.clone(), self.lives);
        let ((), token) =
            self.write(key, async move |statements, on| statements.put(on, &of, bytes, lives).await).await?;
        Ok(token)
    }

    /// Removes a value, so that it is computed anew by whoever asks next. A producer that is computing it now has its value not stored. Returns whether
    /// there was anything to remove.
    ///
    /// # Errors
    ///
    /// Those of [`Table::update`].
    ///
    /// # Cancel safety
    ///
    /// As of [`Table::update`].
    pub async fn delete(&self, key: &K) -> Result<bool> {
        let of = key.clone();
        Ok(self.write(key, async move |statements, on| statements.delete(on, &of).await).await?.0)
    }

    /// Removes all values. Returns how many there were.
    ///
    /// # Errors
    ///
    /// Those of [`Node::begin`](crate::Node::begin) and [`Transaction::commit`](crate::Transaction::commit).
    ///
    /// # Cancel safety
    ///
    /// As of [`Table::update`].
    pub async fn clear(&self) -> Result<u64> {
        let Core { table, statements, .. } = &*self.core;
        let mut transaction = table.begin().await?;
        let count = statements.clear(&mut transaction).await?;
        transaction.clears(table);
        transaction.commit().await?;
        Ok(count)
    }

    /// The same values, and what this handle stores lives for so long: after it was written, and unused. `None`: for as long as it likes.
    #[must_use]
    pub fn living(&self, ttl: Option<Duration>, idle: Option<Duration>) -> Self {
        Self { core: Arc::clone(&self.core), lives: Lives { ttl, idle } }
    }

    /// Removes values that have expired, in small batches. Nodes do so by themselves, about once a minute. Returns how many.
    ///
    /// # Errors
    ///
    /// Those of a statement.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves those that are left for the next time.
    pub async fn sweep(&self) -> Result<u64> {
        let Core { statements, writes, common, .. } = &*self.core;
        sweep(statements, writes, &common.counters).await
    }

    /// The name of their table: `rowcache.shared_` and the name that they were given.
    #[must_use]
    pub fn name(&self) -> &str {
        self.core.table.name()
    }

    /// Counters of this node.
    #[must_use]
    pub fn stats(&self) -> SharedStats {
        let Counters { produced, failed, unkept, unreadable, swept } = &self.core.common.counters;
        SharedStats {
            produced: produced.get(),
            failed: failed.get(),
            unkept: unkept.get(),
            unreadable: unreadable.get(),
            swept: swept.get(),
        }
    }

    /// Counters of the entries that this node holds.
    #[must_use]
    pub fn cache_stats(&self) -> Stats {
        self.core.table.stats()
    }

    /// As [`Table::explain`].
    #[must_use]
    pub fn explain(&self, key: &K) -> Explanation<K> {
        self.core.table.explain(key)
    }

    /// As [`get`](Self::get), as fresh as it has to be.
    ///
    /// # Errors
    ///
    /// As of [`Table::get_with`].
    ///
    /// # Cancel safety
    ///
    /// As of [`Table::get_with`].
    pub async fn get_with(&self, key: &K, freshness: Freshness) -> Result<Option<SharedValue<V, C>>> {
        let stored = self.core.table.get_with(key, freshness).await?;
        Ok(stored.and_then(|stored| self.readable(key, stored).ok()))
    }

    /// The value; or none, and when one was written that this node cannot read.
    async fn look(&self, key: &K) -> Result<Result<SharedValue<V, C>, Option<i64>>> {
        Ok(match self.core.table.get(key).await? {
            Some(stored) => self.readable(key, stored).map_err(Some),
            None => Err(None),
        })
    }

    #[inline]
    fn readable(&self, key: &K, stored: Cached<Stored<V, C>>) -> Result<SharedValue<V, C>, i64> {
        if stored.wants_touch(|| self.core.table.store.age_of(&stored)) {
            // Nobody receives it once the node has stopped.
            let _ = self.core.common.touches.send(key.clone());
        }
        if let Some(written) = stored.unreadable() {
            self.core.common.counters.unreadable.add(1);
            return Err(written);
        }
        Ok(SharedValue::of(stored).expect("it can be read"))
    }

    /// Does this in a transaction, and forgets the key here when that has committed.
    async fn write<T, W>(&self, key: &K, work: W) -> Result<(T, Token)>
    where
        W: AsyncFnOnce(&Statements<K>, &mut PgConnection) -> Result<T>,
    {
        let Core { table, statements, .. } = &*self.core;
        let mut transaction = table.begin().await?;
        let done = work(statements, &mut transaction).await?;
        Ok((done, table.commit(key, transaction).await?))
    }
}

impl<K: Key> SharedValues<K, i64> {
    /// Adds to the number of this key, or to 0 if there is none, and returns the sum. Calls on all nodes come one after the other. A number that is there
    /// keeps its end.
    ///
    /// # Errors
    ///
    /// [`is_refused`](Error::is_refused): the sum is no `bigint`, or what is there no number; and those of [`Table::update`].
    ///
    /// # Cancel safety
    ///
    /// As of [`Table::update`].
    pub async fn increment(&self, key: &K, by: i64) -> Result<i64> {
        let (of, lives) = (key.clone(), self.lives);
        Ok(self.write(key, async move |statements, on| statements.add(on, &of, by, lives).await).await?.0)
    }
}

impl Counters {
    fn count<V, C>(&self, ended: &Ended<V, C>) {
        match ended {
            Ended::Kept(_) => self.produced.add(1),
            Ended::Failed(_) => self.failed.add(1),
            Ended::Unkept(_) => self.unkept.add(1),
            Ended::Look => {}
        }
    }
}

impl<K: Key, V: Send + Sync + 'static, C: 'static> Clone for SharedValues<K, V, C> {
    fn clone(&self) -> Self {
        Self { core: Arc::clone(&self.core), lives: self.lives }
    }
}

impl<K: Key, V: Send + Sync + 'static, C: 'static> fmt::Debug for SharedValues<K, V, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedValues").field("table", &self.core.table.name()).finish_non_exhaustive()
    }
}
