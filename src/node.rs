//! A node as its users see it: start, open tables, wait, ask, stop. What goes on inside is in `shared.rs`.

use std::{sync::Arc, time::Duration};

use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::{
    config::Config,
    error::{Error, Kind, Result},
    fleet::Fleet,
    host::Process,
    keeper,
    key::Key,
    open::{Found, MakeSource},
    options::TableOptions,
    postgres::{
        access::Access,
        catalog::TrackedTable,
        rows::{Keeps, List, Rows},
        server::Postgres,
    },
    server::Server,
    shared::{Handle, Reached, Shared},
    source::Source,
    stats::NodeStats,
    status::{Events, Status},
    table::{FromRow, Table},
    token::Token,
    transaction::Transaction,
    view::View,
};

/// One process's cache: connections, tables, and the tasks that keep them coherent. Cheap to clone.
///
/// It lives until [`shutdown`](Self::shutdown), or until it and all its tables are dropped.
#[derive(Clone)]
pub struct Node {
    pub(crate) handle: Arc<Handle>,
    pub(crate) postgres: Arc<Postgres>,
    /// Its start was not waited for: caches are opened late.
    pub(crate) is_launched: bool,
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
        let (ready, first_attempt) = oneshot::channel();
        Self::run(config, Some(ready))?.started(first_attempt).await
    }

    pub(crate) async fn started(self, first_attempt: oneshot::Receiver<Result<()>>) -> Result<Self> {
        match first_attempt.await {
            Ok(Ok(())) => Ok(self),
            Ok(Err(error)) => {
                self.shutdown().await;
                Err(error)
            }
            Err(_) => Err(Error::new(Kind::Closed, "the runtime was shut down while the node was starting")),
        }
    }

    /// Starts a node without waiting for Postgres: for a service that must start also while its database is not there. The node
    /// connects in the background, and tries for as long as it takes; until then [`status`](Self::status) says
    /// what is in the way, and [`until_coherent`](Self::until_coherent) waits.
    ///
    /// Tables, lists and views are opened at once as well, and looked up in the background. What would be an error of
    /// [`table`](Self::table) is one of each read until it is mended: the triggers of a table can be installed later. A
    /// read waits for the first look at most. [`Table::until_open`] waits, too. Tables are named in whole: `public.users`, not `users`.
    ///
    /// ```no_run
    /// # use rowcache::{Config, Node, Table};
    /// # #[derive(sqlx::FromRow)] struct User { name: String }
    /// # async fn example() -> rowcache::Result<()> {
    /// let node = Node::launch(Config::from_url("postgres://app@db.internal/app")?)?;
    /// let users: Table<i64, User> = node.table("public.users").await?; // Returns at once.
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config): a setting cannot be used.
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn launch(config: Config) -> Result<Self> {
        Ok(Self { is_launched: true, ..Self::run(config, None)? })
    }

    fn run(config: Config, ready: Option<oneshot::Sender<Result<()>>>) -> Result<Self> {
        config.check()?;
        let postgres = Arc::new(Postgres::new(config.clone()));
        let shared = Shared::new(config, Arc::clone(&postgres) as Arc<dyn Server>, Arc::new(Process::current()));
        Ok(Self::of(shared, postgres, ready, Handle::start))
    }

    /// Of what its tasks and handles share, run in the way of `start`.
    pub(crate) fn of(
        shared: Arc<Shared>,
        postgres: Arc<Postgres>,
        ready: Option<oneshot::Sender<Result<()>>>,
        start: fn(Arc<Shared>, JoinHandle<()>) -> Handle,
    ) -> Self {
        if !shared.config.caching {
            shared.tables.switch_off(Some(shared.host.now()));
        }
        let keeper = tokio::spawn(keeper::keep(Arc::clone(&shared), ready));
        Self { handle: Arc::new(start(shared, keeper)), postgres, is_launched: false }
    }

    /// Returns when the node is coherent: at once, but after [`launch`](Self::launch) and while there is a gap.
    ///
    /// # Errors
    ///
    /// [`is_closed`](Error::is_closed): it was shut down.
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody.
    pub async fn until_coherent(&self) -> Result<()> {
        self.handle.shared.until_coherent().await
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
        let (asked, keeps_by) = (name.to_owned(), options.clone());
        self.open(name.to_owned(), options, move |opener| {
            let (name, options) = (asked.clone(), keeps_by.clone());
            Box::pin(async move { opener.rows(&name, None, options).await })
        })
        .await
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
        self.open_by(name, columns, "", options, |access, tracked, _, keeps| {
            Arc::new(Rows::<K, V>::new(access, tracked, &tracked.name, &[], keeps))
        })
        .await
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
        self.open_by(name, columns, "[]", options, |access, tracked, order, keeps| {
            Arc::new(Rows::<K, Vec<V>, List>::new(access, tracked, &tracked.name, order, keeps))
        })
        .await
    }

    /// A cache of a table under other columns than its key. What its name ends with says what its entries are.
    async fn open_by<K: Key, V: Send + Sync + 'static>(
        &self,
        name: &str,
        columns: impl IntoIterator<Item: Into<String>>,
        ending: &'static str,
        options: TableOptions,
        source: SourceBy<K, V>,
    ) -> Result<Table<K, V>> {
        let columns: Vec<String> = columns.into_iter().map(Into::into).collect();
        let named = move |table: &str, columns: &[String]| format!("{table}({}){ending}", columns.join(","));
        let (asked, keeps_by) = (name.to_owned(), options.clone());
        self.open(named(name, &columns), options, move |opener| {
            let (name, columns, options) = (asked.clone(), columns.clone(), keeps_by.clone());
            Box::pin(async move {
                let (tracked, on, order) = opener.by_columns::<K>(&name, columns).await?;
                let name = named(&tracked.name, &tracked.key_columns);
                let source: MakeSource<K, V> =
                    Box::new(move |keeps| source(opener.access(&options), &tracked, &order, keeps));
                Ok(Found { name, on: vec![on], hashed: None, is_tagged: false, source })
            })
        })
        .await
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

    /// The nodes that listen on this database, this one too, and how they are: asks all of them, and returns when the last one has answered, or
    /// after `deadline`; a second is long for nodes that are well. [`Fleet`] says who is seen, and what an answer means. It opens a connection for
    /// the time of the call, to where [`Config::listener`] says; opening it takes at most [`Config::beat_timeout`], and asking over it as long again.
    ///
    /// ```no_run
    /// # use std::time::Duration;
    /// # async fn example(node: rowcache::Node, users: rowcache::Table<i64, (i64, String)>) -> rowcache::Result<()> {
    /// users.clear().await?;
    /// let fleet = node.fleet(Duration::from_secs(1)).await?; // whoever answers has forgotten all users
    /// for node in fleet.silent() {
    ///     println!("nothing is known of {}", node.name);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// * [`is_unavailable`](Error::is_unavailable), [`is_timeout`](Error::is_timeout): the database cannot be asked now;
    /// * [`is_standby`](Error::is_standby), [`is_pooler`](Error::is_pooler): nor from here, where there is no NOTIFY;
    /// * [`is_refused`](Error::is_refused): Postgres refuses to tell who is connected;
    /// * [`is_closed`](Error::is_closed): the node was shut down.
    ///
    /// # Cancel safety
    ///
    /// Cancelling closes what was opened.
    pub async fn fleet(&self, deadline: Duration) -> Result<Fleet> {
        self.handle.shared.ask_all(deadline).await
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

/// Makes a source of the rows of a table, which these columns order, by other columns than its key.
type SourceBy<K, V> = fn(Access, &TrackedTable, &[String], Keeps) -> Arc<dyn Source<K, V>>;

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("status", &self.status()).finish_non_exhaustive()
    }
}
