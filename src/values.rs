//! Shared values: what services compute, kept for all nodes, and computed once.
//!
//! They live in a table of schema `rowcache` that is tracked like any other, so that everything that holds for rows holds for them: a
//! node reads them from memory, a change by anybody reaches all nodes, and `docs/correctness.md` has no case of its own for them. What
//! is added here is who computes a value that is missing (`run.rs`), and when values end.

mod codec;
mod run;
mod stored;

use std::{
    fmt,
    future::Future,
    marker::PhantomData,
    sync::{Arc, Weak},
    time::Duration,
};

use sqlx::{PgConnection, PgPool};
use tokio::{sync::mpsc, time::sleep};

pub use self::{
    codec::{Codec, Json, Raw},
    stored::SharedValue,
};
use self::{
    run::{Ended, Producing, Runs, outcome},
    stored::Stored,
};
use crate::{
    depends::By,
    error::{Error, Kind, Result, with_causes},
    explain::Explanation,
    freshness::Freshness,
    key::Key,
    load,
    node::Node,
    open::{Found, MakeSource},
    options::{OnChange, TableOptions},
    postgres::{
        built::BoxError,
        rows::Rows,
        values::{self, Lives, Statements},
    },
    shared::Shared,
    source::Source,
    stats::{Counter, Stats},
    store::{Cached, Due, Store},
    table::Table,
    tables::On,
    throttle::Complaint,
    token::Token,
};

/// Values that are shared by all nodes of a database, by key: made by [`Node::shared`]. Cheap to clone.
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

/// Shared values that are about to be opened: made by [`Node::shared`].
#[must_use = "nothing is shared until it is opened"]
#[derive(Debug)]
pub struct Share<'n, K, V, C = Json> {
    node: &'n Node,
    name: String,
    options: TableOptions,
    lives: Lives,
    lease: Duration,
    timeout: Duration,
    bytes_max: usize,
    logged: bool,
    types: PhantomData<fn(K) -> (V, C)>,
}

impl Node {
    /// Values that are no rows, shared by all nodes: permissions that take half a second to compute, answers of another service, sessions. They
    /// are kept in a table `rowcache.shared_<name>`, and held in the memory of each node that reads them.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # #[derive(serde::Serialize, serde::Deserialize)] struct Permissions(Vec<String>);
    /// # async fn compute(user: i64) -> std::io::Result<Permissions> { Ok(Permissions(Vec::new())) }
    /// # async fn example(node: rowcache::Node) -> rowcache::Result<()> {
    /// let permissions = node.shared::<i64, Permissions>("permissions").ttl(Duration::from_secs(3600)).open().await?;
    ///
    /// // From memory; or what another node has computed; or computed now, by one node, for all who ask.
    /// let mine = permissions.fetch_or_store(&42, || compute(42)).await?;
    ///
    /// // Computed anew by whoever asks next, on whichever node.
    /// permissions.delete(&42).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A name has up to 40 lower-case letters, digits and underscores.
    pub fn shared<K: Key, V: Send + Sync + Unpin + 'static>(&self, name: &str) -> Share<'_, K, V> {
        Share {
            node: self,
            name: name.to_owned(),
            options: TableOptions::default(),
            lives: Lives::default(),
            lease: Duration::from_secs(5),
            timeout: Duration::from_secs(30),
            bytes_max: 8 << 20,
            logged: false,
            types: PhantomData,
        }
    }
}

impl<'n, K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> Share<'n, K, V, C> {
    /// Values are there for so long after they were written, unless they are written with another life
    /// ([`SharedValues::living`]). Default: until they are deleted.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.lives.ttl = Some(ttl);
        self
    }

    /// Values that no node has used for so long are gone; at least a second. A value that is in use is touched in its table five times in that time, by
    /// each node that uses it. Default: none.
    pub fn idle(mut self, idle: Duration) -> Self {
        self.lives.idle = Some(idle);
        self
    }

    /// A value that changes is read again by nodes that hold it and have used it ([`OnChange::Refresh`]), so that probably nobody
    /// waits for it. Default: it is read by the next one who asks.
    pub fn eager(mut self) -> Self {
        self.options.on_change = OnChange::Refresh;
        self
    }

    /// The table is logged: values survive a crash of the server, and are there on standbys. Writing costs more. Of values that are
    /// shared already, it must be what they are. Default: not; after a crash all values are gone, and are computed anew.
    pub fn logged(mut self) -> Self {
        self.logged = true;
        self
    }

    /// A node that computes a value tells the others every third of this time that it lives; when it has not for so long, another one takes over. At
    /// least a second. Default 5 s.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self
    }

    /// Producers that take longer have failed. Default 30 s.
    pub fn produce_timeout(mut self, limit: Duration) -> Self {
        self.timeout = limit;
        self
    }

    /// Larger values, as bytes, are refused. Default 8 MiB.
    pub fn value_bytes_max(mut self, bytes: usize) -> Self {
        self.bytes_max = bytes;
        self
    }

    /// How they are held in this node's memory. [`lifetime`](TableOptions::lifetime), [`weigher`](TableOptions::weigher),
    /// [`idle`](TableOptions::idle) and [`audit`](TableOptions::audit) are not for values.
    pub fn options(mut self, options: TableOptions) -> Self {
        let on_change = self.options.on_change;
        self.options = options;
        if on_change == OnChange::Refresh {
            self.options.on_change = on_change;
        }
        self
    }

    /// Written and read in this way. Default: [`Json`].
    pub fn codec<D: Codec<V>>(self) -> Share<'n, K, V, D> {
        let Self { node, name, options, lives, lease, timeout, bytes_max, logged, types: _ } = self;
        Share { node, name, options, lives, lease, timeout, bytes_max, logged, types: PhantomData }
    }

    /// Opens them. The table is made if it is not there, which takes the rights of the owner of schema `rowcache`; others have it made once:
    /// `select rowcache.share('permissions', '{bigint}')`, with one type for each part of the key, and
    /// `grant select, insert, update, delete on rowcache.shared_permissions to` the role of the service.
    ///
    /// # Errors
    ///
    /// * [`is_config`](Error::is_config): an option cannot be used, or the name;
    /// * [`is_refused`](Error::is_refused): the table is not there, and this role may not make it;
    /// * [`is_table`](Error::is_table): it has a key of another type, or is logged, or is not;
    /// * those of a statement, as of [`Table::get`].
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind but perhaps the table.
    pub async fn open(self) -> Result<SharedValues<K, V, C>> {
        let lives = self.lives;
        let options = self.checked()?;
        let Self { node, name, lease, timeout, bytes_max, logged, .. } = self;
        let shared = &node.handle.shared;
        let pooler = shared.config.pooler;
        let (asked, keeps_by) = (name.clone(), options.clone());
        let writes = node.postgres.writes.clone();
        let table = node
            .open::<K, Stored<V, C>>(values::table_of(&name), options, move |opener| {
                let (name, options, writes) = (asked.clone(), keeps_by.clone(), writes.clone());
                Box::pin(async move {
                    values::make::<K>(&writes, pooler, &name, logged).await?;
                    let tracked = opener.tracked::<K>(&values::table_of(&name)).await?;
                    let on = On { table: tracked.name.clone(), trust: tracked.trust.clone(), by: By::Key };
                    let name = tracked.name.clone();
                    let from = values::readable::<K>(&name);
                    let source: MakeSource<K, Stored<V, C>> = Box::new(move |keeps| {
                        Arc::new(Rows::<K, Stored<V, C>>::new(opener.access(&options), &tracked, &from, &[], keeps))
                    });
                    Ok(Found { name, on: vec![on], hashed: None, is_tagged: false, source })
                })
            })
            .await?;
        let statements = Arc::new(Statements::new(&name, pooler));
        let writes = node.postgres.writes.clone();
        let common = node.handle.open::<K, SharedValue<V, C>, _>(table.name(), || {
            let (touches, touched) = mpsc::unbounded_channel();
            let common = Arc::new(Common { runs: Arc::default(), counters: Counters::default(), touches });
            let keeper = Keeper {
                statements: Arc::clone(&statements),
                store: Arc::downgrade(&table.store),
                source: Arc::clone(&table.source),
                writes: writes.clone(),
                shared: Arc::clone(shared),
                common: Arc::downgrade(&common),
            };
            tokio::spawn(keeper.keep(touched));
            common
        });
        let core = Core { table, statements, writes, common, lease, timeout, bytes_max };
        Ok(SharedValues { core: Arc::new(core), lives })
    }

    /// The options of its table, if all can be used.
    fn checked(&self) -> Result<TableOptions> {
        let wrong = |message: String| Err(Error::new(Kind::Config, message));
        let Self { name, options, lives, lease, .. } = self;
        let first = name.bytes().next().is_some_and(|first| first.is_ascii_lowercase());
        let others = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if !first || name.len() > 40 || !name.bytes().all(others) {
            return wrong(format!(
                "{name:?} cannot be the name of shared values: up to 40 lower-case letters, digits and underscores, a letter first"
            ));
        }
        let second = Duration::from_secs(1);
        for (what, time) in [("ttl", lives.ttl), ("idle", lives.idle), ("lease", Some(*lease))] {
            if time.is_some_and(|time| time < second) {
                return wrong(format!("`{what}` of shared values is at least a second"));
            }
        }
        options.check_shared()?;
        let ttl = options.ttl;
        let options = options.clone().lifetime(move |stored: &Stored<V, C>| {
            // What ends later than it would be read again anyhow is as all others.
            stored.lives.filter(|lives| ttl.is_none_or(|ttl| *lives < ttl))
        });
        Ok(options)
    }
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
                    let running = tokio::spawn(self.producing().run(run, mine, self.lives, unreadable));
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

    fn producing(&self) -> Producing<K, V, C> {
        let Core { table, statements, writes, lease, timeout, bytes_max, .. } = &*self.core;
        Producing {
            table: table.clone(),
            statements: Arc::clone(statements),
            pool: writes.clone(),
            lease: *lease,
            timeout: *timeout,
            bytes_max: *bytes_max,
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
        let Core { statements, bytes_max, .. } = &*self.core;
        let bytes = run::encode::<K, V, C>(statements, key, value, *bytes_max)?;
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
    /// Those of [`Node::begin`] and [`Transaction::commit`](crate::Transaction::commit).
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

    /// The table that holds them: for [`get_with`](Table::get_with), [`explain`](Table::explain), and statistics of its entries.
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

/// Keeps the table in order: tells which values are in use, and removes those that have expired.
struct Keeper<K: Key, V: Send + Sync + 'static, C: 'static> {
    statements: Arc<Statements<K>>,
    store: Weak<Store<K, Stored<V, C>>>,
    source: Arc<dyn Source<K, Stored<V, C>>>,
    writes: PgPool,
    shared: Arc<Shared>,
    common: Weak<Common<K, V, C>>,
}

const SWEEP_PAUSE: Duration = Duration::from_mins(1);

impl<K: Key, V: Send + Sync + Unpin + 'static, C: Codec<V>> Keeper<K, V, C> {
    async fn keep(self, touched: mpsc::UnboundedReceiver<K>) {
        let mut stopping = self.shared.stopping();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stopping| *stopping) => {}
            () = self.tell_use(touched) => {}
            () = self.remove_dead() => {}
        }
    }

    /// Each was used here when a fifth of the time had passed that it may be unused.
    async fn tell_use(&self, mut touched: mpsc::UnboundedReceiver<K>) {
        let mut complaint = Complaint::default();
        while let Some(key) = touched.recv().await {
            if let Err(error) = self.statements.touch(&self.writes, &key).await {
                self.tell(&mut complaint, &error, "cannot tell that a shared value is in use");
            }
            let Some(store) = self.store.upgrade() else { return };
            // For its new end.
            let mut wanted = Vec::new();
            drop(store.reload(&Due::Early(key), &mut wanted));
            load::start(&store, &self.source, &self.shared, wanted);
        }
    }

    async fn remove_dead(&self) {
        let mut complaint = Complaint::default();
        loop {
            // Not all nodes at once.
            #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
            let draw = f64::from(self.shared.host.random() as u32) / f64::from(u32::MAX);
            sleep(SWEEP_PAUSE.mul_f64(0.5 + draw)).await;
            let Some(common) = self.common.upgrade() else { return };
            if let Err(error) = sweep(&self.statements, &self.writes, &common.counters).await {
                self.tell(&mut complaint, &error, "cannot remove shared values that have expired; will try again");
            }
        }
    }

    fn tell(&self, complaint: &mut Complaint, error: &Error, what: &'static str) {
        let error = with_causes(error);
        if complaint.is_news(&error, self.shared.host.now()) {
            tracing::warn!(table = values::table_of(self.statements.name()), error, "{what}");
        }
    }
}

const SWEPT_AT_ONCE: u64 = 500;

async fn sweep<K: Key>(statements: &Statements<K>, writes: &PgPool, counters: &Counters) -> Result<u64> {
    let mut all = 0;
    loop {
        let swept = statements.sweep(writes, SWEPT_AT_ONCE.cast_signed()).await?;
        counters.swept.add(swept);
        all += swept;
        if swept < SWEPT_AT_ONCE {
            return Ok(all);
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
