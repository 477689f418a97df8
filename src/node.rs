//! A node as its users see it: start, open tables, wait, ask, stop. What goes on inside is in `shared.rs`.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::timeout};

use crate::{
    audit::{self, Auditor},
    config::Config,
    error::{Error, Kind, Result},
    hashed::Hashed,
    host::Process,
    keeper,
    key::Key,
    options::{OnChange, TableOptions},
    postgres::{
        access::Access,
        catalog::{self, TrackedTable, Widths},
        rows::{Keeps, List, Rows},
        server::Postgres,
    },
    refill, refresh,
    server::Server,
    shared::{Handle, Reached, Shared},
    source::Source,
    stats::NodeStats,
    status::{Events, Status},
    store::{Limits, Reload, Store},
    table::{FromRow, Table},
    tables::{By, Member, On},
    throttle::Throttle,
    token::Token,
    transaction::Transaction,
    view::View,
};

/// One process's cache: connections, tables, and the tasks that keep them coherent. Cheap to clone.
///
/// It lives until [`shutdown`](Self::shutdown), or until it and all its tables are dropped.
#[derive(Clone)]
pub struct Node {
    handle: Arc<Handle>,
    postgres: Arc<Postgres>,
}

impl Node {
    /// Connects to `url` with the defaults of [`Config::from_url`]. See [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// As of [`start`](Self::start).
    ///
    /// # Cancel safety
    ///
    /// Cancelling closes whatever was opened.
    pub async fn connect(url: &str) -> Result<Self> {
        Self::start(Config::from_url(url)?).await
    }

    /// Starts a node. When this returns it listens, and a fence has travelled from the pool through Postgres to
    /// the listener and through the applier: the node is coherent. Later failures are dealt with in the
    /// background; those of the first attempt are returned.
    ///
    /// # Errors
    ///
    /// * [`is_config`](Error::is_config): a setting cannot be used, or the pool and the listener reach different
    ///   servers;
    /// * [`is_unavailable`](Error::is_unavailable), [`is_timeout`](Error::is_timeout): Postgres cannot be
    ///   reached;
    /// * [`is_schema_too_old`](Error::is_schema_too_old), [`is_schema_too_new`](Error::is_schema_too_new): the migrations
    ///   have not been run, or those of a later release;
    /// * [`is_pooler`](Error::is_pooler): notifications do not reach the listener;
    /// * [`is_standby`](Error::is_standby): the listener or the pool is on a standby.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// Cancelling closes whatever was opened.
    pub async fn start(config: Config) -> Result<Self> {
        config.check()?;
        let postgres = Arc::new(Postgres::new(config.clone()));
        let shared = Shared::new(config, Arc::clone(&postgres) as Arc<dyn Server>, Arc::new(Process::current()));
        if !shared.config.caching {
            shared.tables.switch_off(Some(shared.host.now()));
        }
        let (ready, first_attempt) = oneshot::channel();
        let keeper = tokio::spawn(keeper::keep(Arc::clone(&shared), ready));
        let node = Self { handle: Arc::new(Handle::start(shared, keeper)), postgres };
        match first_attempt.await {
            Ok(Ok(())) => Ok(node),
            Ok(Err(error)) => {
                node.shutdown().await;
                Err(error)
            }
            Err(_) => Err(Error::new(Kind::Closed, "the runtime was shut down while the node was starting")),
        }
    }

    /// A cache of the rows of a tracked table, by its key, with default options. Asking for the same table with
    /// the same types again returns the same cache.
    ///
    /// # Errors
    ///
    /// * [`is_not_tracked`](Error::is_not_tracked): the table's triggers are missing or damaged;
    /// * [`is_table`](Error::is_table): there is no such table, it has no primary key, or `K` does not fit it;
    /// * [`is_refused`](Error::is_refused): its keys are sent as hashes, and the pool's role may not read the secret that makes
    ///   them (`rowcache.key_secret()`);
    /// * those of a statement, as of [`Table::get`].
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn table<K: Key, V: FromRow>(&self, name: &str) -> Result<Table<K, V>> {
        self.table_with(name, TableOptions::default()).await
    }

    /// As [`table`](Self::table), with options. They count when the table is opened for the first time.
    ///
    /// # Errors
    ///
    /// As of [`table`](Self::table), and [`is_config`](Error::is_config) for an option that cannot be used.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn table_with<K: Key, V: FromRow>(&self, name: &str, options: TableOptions) -> Result<Table<K, V>> {
        let tracked = catalog::open::<K>(&self.postgres.pool, self.handle.shared.config.pooler, name).await?;
        let on = On { table: tracked.name.clone(), trust: tracked.trust.clone(), by: By::Key };
        let hashed = tracked.secret.clone().map(Hashed::new);
        self.cache(&tracked.name, vec![on], hashed, &options, |keeps| {
            Arc::new(Rows::<K, V>::new(self.access(&options), &tracked, &[], keeps))
        })
    }

    /// A view: a cache whose entries are made of several rows, by a loader of yours. Its name is your choice; by it nodes tell each
    /// other what to forget ([`Table::invalidate`]), so that it must mean the same on all of them.
    ///
    /// ```no_run
    /// # use std::collections::HashMap;
    /// # use rowcache::Table;
    /// # #[derive(sqlx::FromRow)] struct Order { user_id: i64, total: i64 }
    /// # async fn example(node: rowcache::Node) -> rowcache::Result<()> {
    /// // Once: `rowcache track public.orders --columns user_id`.
    /// let totals: Table<i64, i64> = node
    ///     .view("totals")
    ///     .on("public.orders", ["user_id"])
    ///     .open(|users, db| {
    ///         Box::pin(async move {
    ///             let sums = "select user_id, sum(total)::bigint from orders where user_id = any($1) group by 1";
    ///             let sums: Vec<(i64, i64)> = sqlx::query_as(sums).bind(users).fetch_all(db).await?;
    ///             Ok(sums.into_iter().collect())
    ///         })
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn view(&self, name: &str) -> View<'_> {
        View::new(self, name)
    }

    /// The rows of a tracked table by other columns than its key: `["email"]`. At most one row may have the same values there. The
    /// columns must be sent along: `rowcache track public.users --columns email`; and should have an index.
    ///
    /// A row is found under the values that it has, and no longer under those that it had: an UPDATE evicts both.
    ///
    /// # Errors
    ///
    /// As of [`table_with`](Self::table_with); [`is_not_tracked`](Error::is_not_tracked) also if a column is not sent. Reads
    /// fail with [`is_table`](Error::is_table) where several rows have the same values.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn table_by<K: Key, V: FromRow>(
        &self,
        name: &str,
        columns: impl IntoIterator<Item: Into<String>>,
        options: TableOptions,
    ) -> Result<Table<K, V>> {
        let (tracked, on, _) = self.by_columns::<K>(name, columns).await?;
        let cache = format!("{}({})", tracked.name, tracked.key_columns.join(","));
        self.cache(&cache, vec![on], None, &options, |keeps| {
            Arc::new(Rows::<K, V>::new(self.access(&options), &tracked, &[], keeps))
        })
    }

    /// The rows of a tracked table that have certain values in other columns than its key, as lists: the orders of a user, by `["user_id"]`.
    /// In the order of the table's key. Where there are none, reads return `None`. The columns must be sent along:
    /// `rowcache track public.orders --columns user_id`; and should have an index.
    ///
    /// A row that is inserted, changed or deleted evicts the list that it is in; one that moves, both.
    ///
    /// # Errors
    ///
    /// As of [`table_by`](Self::table_by); and [`is_config`](Error::is_config) with
    /// [`audit`](TableOptions::audit), which compares single rows.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn list_by<K: Key, V: FromRow>(
        &self,
        name: &str,
        columns: impl IntoIterator<Item: Into<String>>,
        options: TableOptions,
    ) -> Result<Table<K, Vec<V>>> {
        options.check_unaudited()?;
        let (tracked, on, order) = self.by_columns::<K>(name, columns).await?;
        let cache = format!("{}({})[]", tracked.name, tracked.key_columns.join(","));
        self.cache(&cache, vec![on], None, &options, |keeps| {
            Arc::new(Rows::<K, Vec<V>, List>::new(self.access(&options), &tracked, &order, keeps))
        })
    }

    /// A table as one whose key is these columns, how its cache depends on it, and its real key.
    async fn by_columns<K: Key>(
        &self,
        name: &str,
        columns: impl IntoIterator<Item: Into<String>>,
    ) -> Result<(TrackedTable, On, Vec<String>)> {
        let key_columns: Vec<String> = columns.into_iter().map(Into::into).collect();
        let (on, order) = self.depend::<K>(name, Some(&key_columns), Widths::Exact).await?;
        let (name, trust) = (on.table.clone(), on.trust.clone());
        Ok((TrackedTable { name, key_columns, is_keyed: false, trust, secret: None }, on, order))
    }

    /// How a cache under `K` depends on a table, and the columns of the table's key.
    pub(crate) async fn depend<K: Key>(
        &self,
        name: &str,
        columns: Option<&[String]>,
        widths: Widths,
    ) -> Result<(On, Vec<String>)> {
        catalog::depend::<K>(&self.postgres.pool, self.handle.shared.config.pooler, name, columns, widths).await
    }

    /// How loads ask the pool.
    pub(crate) fn access(&self, options: &TableOptions) -> Access {
        let config = &self.handle.shared.config;
        let judge = Arc::clone(&self.handle.shared);
        Access {
            pool: self.postgres.pool.clone(),
            pooler: config.pooler,
            timeout: options.load_timeout.unwrap_or(config.load_timeout),
            standby: Arc::clone(&self.postgres.standby),
            // Without a line nobody knows which server is the right one.
            ours: Box::new(move |incarnation| judge.look(|it| !it.has_line() || it.incarnation() == incarnation)),
        }
    }

    /// The cache of this name, and what keeps it going, made if there is none yet for these types.
    pub(crate) fn cache<K: Key, V: Send + Sync + 'static>(
        &self,
        name: &str,
        on: Vec<On>,
        hashed: Option<Hashed<K>>,
        options: &TableOptions,
        source: impl FnOnce(Keeps) -> Arc<dyn Source<K, V>>,
    ) -> Result<Table<K, V>> {
        options.check()?;
        let shared = &self.handle.shared;
        let heard = |on: On| {
            let trust = keeper::heard(&shared.config, &on.table, on.trust);
            let trust = trust
                .map_err(|problem| Error::new(Kind::NotTracked, format!("{} cannot be cached: {problem}", on.table)))?;
            Ok(On { trust, ..on })
        };
        let on: Vec<On> = on.into_iter().map(heard).collect::<Result<_>>()?;
        let weigh = options.weigh()?;
        let expiry = options.expiry()?;
        let (reload, due) = Reload::new(options.refresh_ahead, options.on_change == OnChange::Refresh).unzip();
        let mut is_new = false;
        let wanted: Vec<_> = on.iter().map(|on| (on.table.clone(), on.by.clone())).collect();
        let store = self.handle.open::<K, V, _>(name, || {
            is_new = true;
            let config = &shared.config;
            let limits = Limits { runners_max: config.loads_max, batch_max: config.load_keys_max };
            let store = Store::<K, V>::new(options.bounds(), limits, hashed);
            let store = store.audited(options.audit > 0).weighed(weigh).not_found_max(options.not_found_max);
            let store = Arc::new(store.expiring(expiry).reloading(reload).breaking(options.breaker));
            shared.tables.add_on(name, on, &(Arc::clone(&store) as Arc<dyn Member>));
            // It may be the first one for which the log is polled between fences.
            shared.wake.notify_one();
            store
        });
        if !is_new && shared.tables.dependencies(&(Arc::clone(&store) as Arc<dyn Member>)) != wanted {
            let message = format!("{name} was opened before, with other tables or columns: use another name");
            return Err(Error::new(Kind::Config, message));
        }
        // Of the store, whatever the options of this call: whoever loads, its entries must have what it asks them for.
        let keeps = Keeps { digests: store.is_audited, lengths: store.weighs_received() };
        let table = Table::new(Arc::clone(&self.handle), store, source(keeps), name, options.fallback);
        let table = table.writing(self.postgres.writes.clone());
        if is_new && options.refill > 0 {
            let store = Arc::downgrade(&table.store);
            let refill = refill::after_gaps(store, Arc::clone(&table.source), Arc::clone(shared), options.refill);
            tokio::spawn(refill);
        }
        if let Some(due) = due.filter(|_| is_new) {
            let (store, source) = (Arc::downgrade(&table.store), Arc::clone(&table.source));
            tokio::spawn(refresh::run(due, store, source, Arc::clone(shared)));
        }
        if is_new && options.audit > 0 {
            let (source, shared) = (Arc::clone(&table.source), Arc::clone(shared));
            let auditor = Auditor { source, shared, name: name.into(), alarms: Throttle::default() };
            tokio::spawn(audit::watch(Arc::downgrade(&table.store), auditor, options.audit));
        }
        Ok(table)
    }

    /// Returns when everything that was committed before this call has been applied on this node.
    ///
    /// Callers who wait at the same time share a fence. What it costs the server: one transaction without a
    /// disk flush. It takes at most two [`Config::beat_timeout`]s: for a fence that is under way, and for its own.
    ///
    /// # Errors
    ///
    /// [`is_unavailable`](Error::is_unavailable) while the node is not coherent, or when it ceases to be;
    /// [`is_closed`](Error::is_closed) after a shutdown.
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody.
    pub async fn barrier(&self) -> Result<()> {
        self.handle.shared.barrier().await
    }

    /// Begins a transaction on a connection of [`Config::write_pool`](crate::Config::write_pool): its commit forgets, on this node and
    /// before it returns, the rows that are named to it, and returns a [`Token`] for other nodes.
    ///
    /// # Errors
    ///
    /// [`is_unavailable`](Error::is_unavailable), [`is_timeout`](Error::is_timeout) (no connection came free),
    /// [`is_closed`](Error::is_closed).
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn begin(&self) -> Result<Transaction> {
        Transaction::begin(&self.handle, &self.postgres.writes).await
    }

    /// Returns when the transaction that the token names has been applied on this node, and everything that was visible
    /// with it. A read with [`Freshness::AtLeast`](crate::Freshness::AtLeast) does that by itself.
    ///
    /// # Errors
    ///
    /// * [`is_timeout`](Error::is_timeout): not within `limit`;
    /// * [`is_other_incarnation`](Error::is_other_incarnation): the token is of another incarnation of the server;
    /// * [`is_token`](Error::is_token): the transaction has not ended;
    /// * [`is_unavailable`](Error::is_unavailable): the node is not coherent; [`is_closed`](Error::is_closed): nor will be.
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody.
    pub async fn wait_for(&self, token: Token, limit: Duration) -> Result<()> {
        let shared = &self.handle.shared;
        match timeout(limit, shared.reach(token)).await {
            Ok(Ok(Reached::Applied)) => Ok(()),
            Ok(Ok(Reached::InDoubt)) => Err(shared.no_fence()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::new(Kind::Timeout, format!("token {token} was not applied here within {limit:?}"))),
        }
    }

    /// Switches caching off, on this node and at once: everything held is forgotten, every read goes to Postgres (loads are shared as
    /// ever), and nothing is kept; whatever [`Fallback`](crate::Fallback) a table has. Or on again. [`Config::caching`] is how it begins.
    pub fn set_caching(&self, on: bool) {
        let shared = &self.handle.shared;
        let off = (!on).then(|| shared.host.now());
        shared.reclaim(shared.tables.switch_off(off));
        tracing::info!(on, "caching was switched");
    }

    /// Whether entries are served, and if not, since when and why.
    #[must_use]
    pub fn status(&self) -> Status {
        self.handle.shared.status()
    }

    /// Counters since the node started.
    #[must_use]
    pub fn stats(&self) -> NodeStats {
        self.handle.shared.counters.snapshot()
    }

    /// Whether the node is coherent and would remain so if its line were lost now: always `false` without
    /// [`Config::redundant_listener`].
    #[must_use]
    pub fn is_covered(&self) -> bool {
        self.handle.shared.is_covered()
    }

    /// Follows what is applied on this node, from now on. A subscriber who is more than
    /// [`Config::events_max`] behind is told how much was lost.
    #[must_use]
    pub fn subscribe(&self) -> Events {
        self.handle.shared.subscribe()
    }

    /// Stops every task, closes every connection, and returns when that is done: at the latest after the loads that are
    /// under way. Reads of its
    /// tables fail from then on.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves the rest of the work to the background.
    pub async fn shutdown(&self) {
        self.handle.stop().await;
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("status", &self.status()).finish_non_exhaustive()
    }
}
