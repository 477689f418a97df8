//! The story of `get`.
//!
//! ```text
//! get(key) ── the store holds it, and the gate of the table shows the entry's word ──→ the entry
//!    └ miss: ask the store ── somebody else's load of the key will do ──→ wait for it
//!               └ queue the key; a runner takes it with whatever else is waiting, and reads Postgres
//!                    └ the row goes to everybody who waits, and into the store, unless the key was
//!                      invalidated since the load began
//! ```

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use sqlx::{PgPool, postgres::PgRow};

use crate::{
    change::{Change, RowKey, Rows},
    error::{Error, Kind, Result},
    freshness::{Fallback, Freshness},
    key::{self, Key},
    load,
    open::Pending,
    shared::{Handle, Shared},
    source::Source,
    stats::Stats,
    status::Status,
    store::{Answer, Asked, Cached, Entry, Outcome, Store},
};

/// What [`Table::get`] returns. Written out, and not an `async fn`, so that a hit becomes a part of whoever awaits it: a call of the
/// compiler's function keeps the caller's state in memory, behind the locked instructions of a hit, and with rows that are in no processor's
/// cache that took 1.8 times as long as a bare `get`.
#[must_use = "a future does nothing until it is awaited"]
struct Get<'a, K: Key, V: Send + Sync + 'static> {
    table: &'a Table<K, V>,
    key: &'a K,
    /// Boxed, so that the future of a hit stays small.
    load: Option<Loading<'a, V>>,
}

type Loading<'a, V> = Pin<Box<dyn Future<Output = Result<Option<Cached<V>>>> + Send + 'a>>;

impl<K: Key, V: Send + Sync + 'static> Future for Get<'_, K, V> {
    type Output = Result<Option<Cached<V>>>;

    #[expect(clippy::inline_always, reason = "see above")]
    #[inline(always)]
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let load = self.load.take();
        if load.is_none()
            && let Some(entry) = self.table.store.lookup(self.key)
        {
            return Poll::Ready(Ok(Cached::new(entry)));
        }
        match self.table.poll_load(self.key, load, context) {
            Ok(answer) => Poll::Ready(answer),
            Err(load) => {
                self.load = Some(load);
                Poll::Pending
            }
        }
    }
}

/// A type that a row can be turned into: whatever implements [`sqlx::FromRow`] for Postgres and can be shared
/// between threads. Implemented for all such types.
pub trait FromRow: for<'r> sqlx::FromRow<'r, PgRow> + Send + Sync + Unpin + 'static {}

impl<V: for<'r> sqlx::FromRow<'r, PgRow> + Send + Sync + Unpin + 'static> FromRow for V {}

/// The cached rows of one table, by key; or lists of rows, or entries of a view. Cheap to clone.
///
/// Made by [`Node::table`](crate::Node::table), [`table_by`](crate::Node::table_by), [`list_by`](crate::Node::list_by) and
/// [`View::open`](crate::View::open). A row that does not exist is cached as well, until an INSERT. Values are shared, not copied.
pub struct Table<K: Key, V: Send + Sync + 'static> {
    /// Keeps the node alive.
    handle: Arc<Handle>,
    pub(crate) store: Arc<Store<K, V>>,
    pub(crate) source: Arc<dyn Source<K, V>>,
    pub(crate) fallback: Fallback,
    /// Where its transactions begin. None in a simulation.
    pub(crate) writes: Option<PgPool>,
    /// Of a cache that is opened late.
    pending: Option<Pending>,
    name: Arc<str>,
}

/// What is known about a key without asking Postgres.
#[derive(Debug)]
pub enum Lookup<V> {
    /// The row.
    Row(Cached<V>),
    /// There is no such row.
    Absent,
    /// Not known here: not held, or not to be trusted now.
    Unknown,
}

impl<V> Lookup<V> {
    /// The row, if there is one and it is known.
    #[must_use]
    pub fn row(self) -> Option<Cached<V>> {
        match self {
            Self::Row(row) => Some(row),
            Self::Absent | Self::Unknown => None,
        }
    }

    /// Whether anything is known about the key.
    #[must_use]
    pub fn is_known(&self) -> bool {
        !matches!(self, Self::Unknown)
    }

    fn of(entry: Option<Arc<Entry<V>>>) -> Self {
        match entry.map(Cached::new) {
            Some(Some(row)) => Self::Row(row),
            Some(None) => Self::Absent,
            None => Self::Unknown,
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> Table<K, V> {
    pub(crate) fn new(
        handle: Arc<Handle>,
        store: Arc<Store<K, V>>,
        source: Arc<dyn Source<K, V>>,
        name: &str,
        fallback: Fallback,
    ) -> Self {
        Self { handle, store, source, fallback, writes: None, pending: None, name: name.into() }
    }

    /// The row with this key: from memory if it is held, else from Postgres. `None`: there is no such row.
    ///
    /// # Coherence
    ///
    /// Once this node has applied the notification of a commit, a call that starts later does not return data
    /// from before it; nor does it return data older than an earlier call for this key returned. While the node
    /// is not coherent, every call reads Postgres, or waits for a load of the key that is under way, and nothing is kept;
    /// [`Fallback`] has other choices. [`get_with`](Self::get_with) asks for fresher data.
    ///
    /// # Errors
    ///
    /// Those of the load, which go to everybody who waited for it, and are not cached:
    /// [`is_timeout`](Error::is_timeout), [`is_unavailable`](Error::is_unavailable), [`is_decode`](Error::is_decode),
    /// [`is_refused`](Error::is_refused), [`is_table`](Error::is_table) (the table is gone),
    /// [`is_pooler`](Error::is_pooler), [`is_closed`](Error::is_closed), and [`is_throttled`](Error::is_throttled) if
    /// [`not_found_max`](crate::TableOptions::not_found_max) is set.
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody: the load goes on, and its result is cached.
    #[inline]
    pub fn get<'a>(&'a self, key: &'a K) -> impl Future<Output = Result<Option<Cached<V>>>> + Send + 'a {
        Get { table: self, key, load: None }
    }

    /// The rows with these keys, in the order of the keys; those not held are read with as few statements as
    /// the limits allow. Rows may come from different moments; those of
    /// [`snapshot`](Self::snapshot) do not.
    ///
    /// # Errors
    ///
    /// As [`get`](Self::get): the first error that any of the loads meets.
    ///
    /// # Cancel safety
    ///
    /// As [`get`](Self::get).
    pub async fn get_many(&self, keys: &[K]) -> Result<Vec<Option<Cached<V>>>> {
        self.get_many_with(keys, Freshness::Coherent).await
    }

    /// What is known about this key; never loads. Counts as a get.
    #[inline]
    #[must_use]
    pub fn try_get(&self, key: &K) -> Lookup<V> {
        let entry = self.store.lookup_unaudited(key);
        if entry.is_none() {
            self.store.counters.declined.add(1);
        }
        Lookup::of(entry)
    }

    /// What is known about this key; never loads. Leaves no trace: it does not count as a get, nor as a reason
    /// to keep the entry.
    #[must_use]
    pub fn peek(&self, key: &K) -> Lookup<V> {
        Lookup::of(self.store.peek(key))
    }

    /// The rows that this node holds, in no order: each as [`peek`](Self::peek) would have returned it when the iterator came to it. What is loaded
    /// or forgotten meanwhile may be there or not. Locks nothing for longer than a look, and leaves no trace.
    ///
    /// ```no_run
    /// # fn example(users: rowcache::Table<i64, (i64, String)>) {
    /// let longest = users.entries().map(|(_, user)| user.1.len()).max();
    /// # }
    /// ```
    pub fn entries(&self) -> impl Iterator<Item = (K, Cached<V>)> {
        self.store.served().filter_map(|(key, entry)| Some((key, Cached::new(entry)?)))
    }

    /// Forgets a row: on this node before the first await, on all nodes by notification. For changes that
    /// triggers cannot see; those that they see need no help. Views that depend on the table by other columns than its key forget
    /// everything: nobody knows which of their entries the row is in.
    ///
    /// # Errors
    ///
    /// When the notification could not be sent: [`is_unavailable`](Error::is_unavailable),
    /// [`is_timeout`](Error::is_timeout), [`is_closed`](Error::is_closed). This node has forgotten the row all the same.
    ///
    /// # Cancel safety
    ///
    /// Once polled, this node has forgotten the row. The others may not be told.
    pub async fn invalidate(&self, key: &K) -> Result<()> {
        self.opened().await?;
        let rows = Rows::Keys(vec![RowKey::new(&key.to_parts())]);
        let change = Change::requested(&self.name, rows);
        let shared = &self.handle.shared;
        shared.reclaim(shared.tables.apply(&change));
        let told = match self.store.hashed() {
            // The key is a secret.
            Some(hashed) => Change::requested(&self.name, hashed.rows(key)),
            None => change,
        };
        shared.broadcast(&told).await
    }

    /// Forgets all rows of the table: on this node before the first await, on all nodes by notification.
    ///
    /// # Errors
    ///
    /// When the notification could not be sent: [`is_unavailable`](Error::is_unavailable),
    /// [`is_timeout`](Error::is_timeout), [`is_closed`](Error::is_closed). This node has forgotten the rows all the same.
    ///
    /// # Cancel safety
    ///
    /// As [`invalidate`](Self::invalidate).
    pub async fn clear(&self) -> Result<()> {
        self.opened().await?;
        let shared = &self.handle.shared;
        let change = Change::requested(&self.name, Rows::All);
        shared.reclaim(shared.tables.apply(&change));
        shared.broadcast(&change).await
    }

    /// Forgets a row on this node alone, at once: as [`invalidate`](Self::invalidate), and tells nobody. For a row that is suspected here.
    /// Other nodes go on serving what they hold.
    pub fn forget(&self, key: &K) {
        self.forget_here(Rows::Keys(vec![RowKey::new(&key.to_parts())]));
    }

    /// Forgets all rows of the table on this node alone, at once: as [`clear`](Self::clear), and tells nobody. Other nodes go on serving
    /// what they hold.
    pub fn forget_all(&self) {
        self.forget_here(Rows::All);
    }

    /// Forgets what a message about these rows would make this node forget. Of a cache that is not open yet, nothing is held.
    fn forget_here(&self, rows: Rows) {
        let shared = &self.handle.shared;
        shared.reclaim(shared.tables.apply(&Change::requested(&self.name, rows)));
    }

    /// Keeps the entry of this key, once it is held, however little space there is. Changes invalidate it like any other, and
    /// what is loaded afterwards is kept again. Pinned entries count, so that those of others have less space; if all are pinned, more is
    /// held than the bound says. Each costs whoever looks for space a look: for dozens or hundreds of keys, not for most of a
    /// table. Returns whether the key was not pinned before.
    pub fn pin(&self, key: &K) -> bool {
        self.store.pin(key, true)
    }

    /// Undoes [`pin`](Self::pin). Returns whether the key was pinned.
    pub fn unpin(&self, key: &K) -> bool {
        self.store.pin(key, false)
    }

    /// Counters since the table was opened.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.store.stats()
    }

    /// Whether entries of this table are served: as [`Node::status`](crate::Node::status), unless the table's triggers are in doubt.
    #[must_use]
    pub fn status(&self) -> Status {
        self.handle.shared.status_of(&self.name)
    }

    /// The name of the table, as `schema.table`; of a view, as `view:accounts`; of rows by other columns than the key, as
    /// `public.users(email)`, and of lists as `public.orders(user_id)[]`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns when reads can be answered: at once, but for tables of a node that was [launched](crate::Node::launch).
    ///
    /// # Errors
    ///
    /// Those of [`Node::table`](crate::Node::table), [`table_by`](crate::Node::table_by) or [`View::open`](crate::View::open), but
    /// while Postgres does not answer; [`is_closed`](Error::is_closed) after a shutdown.
    ///
    /// # Cancel safety
    ///
    /// Cancelling harms nobody.
    pub async fn until_open(&self) -> Result<()> {
        match &self.pending {
            Some(pending) => pending.until_open().await,
            None => Ok(()),
        }
    }

    /// To be waited for before anything is asked of Postgres or of other nodes.
    pub(crate) async fn opened(&self) -> Result<()> {
        match &self.pending {
            Some(pending) => pending.opened().await,
            None => Ok(()),
        }
    }

    pub(crate) fn pending_open(&self) -> Option<Pending> {
        self.pending.clone()
    }

    pub(crate) fn pending(mut self, pending: Pending) -> Self {
        self.pending = Some(pending);
        self
    }

    /// Goes on with a load, or begins with it. It takes and returns what would otherwise be a reference to the state of whoever awaits, which
    /// would then have to be in memory.
    #[cold]
    #[inline(never)]
    fn poll_load<'a>(
        &'a self,
        key: &'a K,
        load: Option<Loading<'a, V>>,
        context: &mut Context<'_>,
    ) -> std::result::Result<Result<Option<Cached<V>>>, Loading<'a, V>> {
        let mut load = load.unwrap_or_else(|| Box::pin(self.load(key)));
        match load.as_mut().poll(context) {
            Poll::Ready(answer) => Ok(answer),
            Poll::Pending => Err(load),
        }
    }

    async fn load(&self, key: &K) -> Result<Option<Cached<V>>> {
        self.read(key, self.coherent_terms()).await
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    pub(crate) fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    pub(crate) fn start_loads(&self, wanted: Vec<K>) {
        load::start(&self.store, &self.source, &self.handle.shared, wanted);
    }

    pub(crate) async fn answer(&self, key: &K, asked: Asked<V>) -> Outcome<V> {
        match asked {
            Asked::Hit(entry) => Ok(Answer { entry, read: None }),
            Asked::Wait(answer) => answer.await.unwrap_or_else(|_| Err(self.given_up(key))),
        }
    }

    /// Nobody will answer.
    pub(crate) fn given_up(&self, key: &K) -> Error {
        let key = if self.store.hashed().is_some() { "…".into() } else { key::display(&key.to_parts()) };
        Error::new(Kind::Closed, format!("the load of {} {key} was given up", self.name))
    }
}

impl<K: Key, V: Send + Sync + 'static> Clone for Table<K, V> {
    fn clone(&self) -> Self {
        Self {
            handle: Arc::clone(&self.handle),
            store: Arc::clone(&self.store),
            source: Arc::clone(&self.source),
            fallback: self.fallback,
            writes: self.writes.clone(),
            pending: self.pending.clone(),
            name: Arc::clone(&self.name),
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> fmt::Debug for Table<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("name", &self.name).finish_non_exhaustive()
    }
}
