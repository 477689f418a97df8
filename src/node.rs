//! A node: the pool, the line to Postgres, the tables, and the tasks that hold them together.
//!
//! ```text
//! commit → trigger → NOTIFY → line ──→ inbox ──→ applier ──→ tables → store.invalidate
//!                              │                    └ fence ──→ coherence ──→ gates open
//!                              └ lost ──────────────────────→ coherence ──→ gates close, at once
//!          keeper: opens the line, sends fences, verifies triggers      clock: ends the lease
//! ```

use std::{
    any::{Any, TypeId},
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use sqlx::PgPool;
use tokio::{
    sync::{Notify, Semaphore, broadcast, oneshot, watch},
    task::JoinHandle,
};
use uuid::Uuid;

use crate::{
    change::{Change, Message, Rows},
    clock,
    coherence::{Action, Coherence, Incarnation, Reason},
    config::{Config, TableOptions},
    error::{Error, Kind, Result},
    inbox::{Inbox, Item},
    keeper,
    key::Key,
    postgres::{catalog, database_error},
    store::{Limits, Store},
    table::{FromRow, Table},
    tables::{Member, Tables},
};

/// One process's cache: connections, tables, and the tasks that keep them coherent. Cheap to clone.
///
/// It lives until [`shutdown`](Self::shutdown), or until it and all its tables are dropped.
#[derive(Clone)]
pub struct Node(Arc<Handle>);

/// What the node's tasks and handles share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) pool: PgPool,
    pub(crate) tables: Tables,
    pub(crate) inbox: Inbox,
    /// The channel on which this node sends to itself.
    pub(crate) own_channel: String,
    /// Turns of the loads: at most [`Config::loads_max`] at a time.
    pub(crate) loads: Semaphore,
    /// Wakes the keeper: a fence is wanted, or the line was given up.
    pub(crate) wake: Notify,
    /// Protects the state machine. Gates are moved while it is held, so that they show what it says.
    /// Lock order: this, then the lock of `Tables`.
    coherence: Mutex<Coherence>,
    progress: watch::Sender<Progress>,
    events: broadcast::Sender<Event>,
    stopping: watch::Sender<bool>,
}

/// How far fences have come.
#[derive(Clone, Copy, Default)]
struct Progress {
    /// The last fence that was applied.
    fence: u64,
    gaps: u64,
}

/// The last of these that goes stops the node.
struct Handle {
    shared: Arc<Shared>,
    /// Protects the tables that were opened, by name, key and value type.
    opened: Mutex<HashMap<Opened, Arc<dyn Any + Send + Sync>>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    clock: Mutex<Option<thread::JoinHandle<()>>>,
}

type Opened = (String, TypeId, TypeId);

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

/// Whether entries are served from memory.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Status {
    /// Yes. Every change that was visible in Postgres at `as_of` has been applied here.
    Coherent {
        /// When the last fence that came back was sent. At most one lease ago.
        as_of: Instant,
    },
    /// No: every read goes to Postgres, and nothing is cached.
    Bypassed {
        /// Since when.
        since: Instant,
        /// Why.
        why: Reason,
    },
}

/// Something that happened to a node, in the order in which it was applied.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// Rows changed, and have been forgotten.
    Change(Arc<Change>),
    /// A message could not be read. The table it named, or every table, has been forgotten.
    Unreadable {
        /// The table that the message named.
        table: Option<String>,
        /// What is wrong with the message.
        error: String,
    },
    /// Notifications may have been lost: everything was forgotten, and reads go to Postgres.
    Gap(Reason),
    /// Entries are served again.
    Coherent,
    /// The subscriber was too slow, and missed this many events.
    Lagged(u64),
}

/// A subscription to a node's [`Event`]s.
pub struct Events(broadcast::Receiver<Event>);

impl Events {
    /// The next event; `None` when the node has gone.
    ///
    /// # Cancel safety
    ///
    /// Cancelling loses no event.
    pub async fn recv(&mut self) -> Option<Event> {
        match self.0.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Event::Lagged(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
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
    /// * [`is_schema_too_old`](Error::is_schema_too_old): the migrations have not been run;
    /// * [`is_pooler`](Error::is_pooler): notifications do not reach the listener;
    /// * [`is_standby`](Error::is_standby): the listener is on a standby.
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
        let pool = config.pool.clone().connect_lazy_with(config.pool_connect.clone());
        let now = clock::now();
        let shared = Arc::new(Shared {
            tables: Tables::default(),
            inbox: Inbox::new(config.inbox_bytes_max),
            own_channel: format!("rowcache:{}", Uuid::new_v4().simple()),
            loads: Semaphore::new(config.loads_max),
            wake: Notify::new(),
            coherence: Mutex::new(Coherence::new(config.timing(), now)),
            progress: watch::Sender::default(),
            events: broadcast::Sender::new(config.events_max),
            stopping: watch::Sender::default(),
            pool,
            config,
        });
        let (ready, first_attempt) = oneshot::channel();
        let handle = Handle {
            tasks: Mutex::new(vec![
                tokio::spawn(Arc::clone(&shared).apply()),
                tokio::spawn(keeper::keep(Arc::clone(&shared), ready)),
            ]),
            clock: Mutex::new(Some(shared.start_clock())),
            opened: Mutex::default(),
            shared,
        };
        let node = Self(Arc::new(handle));
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
    /// * [`is_table`](Error::is_table): there is no such table, it has no primary key, or `K` does not fit it.
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
    /// As of [`table`](Self::table).
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves nothing behind.
    pub async fn table_with<K: Key, V: FromRow>(&self, name: &str, options: TableOptions) -> Result<Table<K, V>> {
        let shared = &self.0.shared;
        let tracked = catalog::open::<K>(&shared.pool, name).await?;
        let key = (tracked.name.clone(), TypeId::of::<K>(), TypeId::of::<V>());
        let mut opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let store = match opened.get(&key).and_then(|store| Arc::clone(store).downcast().ok()) {
            Some(store) => store,
            None => {
                let limits = Limits { runners_max: shared.config.loads_max, batch_max: shared.config.load_keys_max };
                let store = Arc::new(Store::<K, V>::new(options.capacity, limits));
                shared.tables.add(&tracked.name, tracked.trust.clone(), Arc::clone(&store) as Arc<dyn Member>);
                opened.insert(key, Arc::clone(&store) as Arc<dyn Any + Send + Sync>);
                store
            }
        };
        drop(opened);
        Ok(Table::new(self.clone(), store, &tracked))
    }

    /// Returns when everything that was committed before this call has been applied on this node.
    ///
    /// Callers who wait at the same time share a fence. What it costs the server: one transaction without a
    /// disk flush.
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
        self.0.shared.barrier().await
    }

    /// Whether entries are served, and if not, since when and why.
    #[must_use]
    pub fn status(&self) -> Status {
        self.0.shared.status()
    }

    /// Follows what is applied on this node, from now on. A subscriber who is more than
    /// [`Config::events_max`] behind is told how much was lost.
    #[must_use]
    pub fn subscribe(&self) -> Events {
        Events(self.0.shared.events.subscribe())
    }

    /// The pool that loads use. It is yours too.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.0.shared.pool
    }

    /// Stops every task, closes every connection (the pool's too), and returns when that is done. Reads of its
    /// tables fail from then on.
    ///
    /// # Cancel safety
    ///
    /// Cancelling leaves the rest of the work to the background.
    pub async fn shutdown(&self) {
        let handle = &self.0;
        handle.shared.stop();
        let tasks = std::mem::take(&mut *handle.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            if let Err(error) = task.await
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        let clock = handle.clock.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(clock) = clock {
            clock.thread().unpark();
            let _ = tokio::task::spawn_blocking(|| clock.join()).await;
        }
        handle.shared.pool.close().await;
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0.shared
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// How often the clock looks at the lease. Entries may be served for this much longer than the lease.
const TICK: Duration = Duration::from_millis(10);

impl Shared {
    /// Applies what was received, in the order of the channel.
    async fn apply(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            let items = tokio::select! {
                items = self.inbox.take() => items,
                _ = stopping.wait_for(|stopping| *stopping) => return,
            };
            for (n, item) in items.into_iter().enumerate() {
                self.apply_one(item);
                if n % 256 == 255 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    fn apply_one(&self, item: Item) {
        let cleared = match item {
            Item::Own(payload) => match Message::parse(&payload) {
                Message::Fence(nonce) => return self.step(|coherence| coherence.fence_applied(nonce)),
                other => self.apply_message(other),
            },
            Item::Message(payload) => self.apply_message(Message::parse(&payload)),
            Item::Overflow => {
                tracing::warn!(
                    bytes_max = self.config.inbox_bytes_max,
                    "more changes came in than could be applied; everything held was forgotten"
                );
                let everything = Change { rows: Rows::All, table: None, columns: Default::default(), xid: None };
                self.apply_message(Message::Change(everything))
            }
        };
        self.reclaim(cleared);
    }

    fn apply_message(&self, message: Message) -> Vec<Arc<dyn Member>> {
        match message {
            Message::Change(change) => {
                let cleared = self.tables.apply(&change);
                if self.events.receiver_count() > 0 {
                    self.tell(Event::Change(Arc::new(change)));
                }
                cleared
            }
            Message::Unreadable { table, error } => {
                let cleared = self.tables.clear(table.as_deref());
                let of = table.as_deref().unwrap_or("every table");
                tracing::warn!(%error, "a message on channel rowcache could not be read; forgot {of}");
                self.tell(Event::Unreadable { table, error });
                cleared
            }
            // A fence on the channel of all nodes is nobody's.
            Message::Fence(_) => Vec::new(),
        }
    }

    /// Frees the memory of what was cleared, off the applier's path.
    pub(crate) fn reclaim(&self, cleared: Vec<Arc<dyn Member>>) {
        if !cleared.is_empty() {
            tokio::task::spawn_blocking(move || cleared.iter().for_each(|member| member.reclaim()));
        }
    }

    /// Lets the state machine take a step, and does what it says before anybody else can.
    pub(crate) fn step(&self, step: impl FnOnce(&mut Coherence) -> Vec<Action>) {
        let mut coherence = lock_std(&self.coherence);
        let gaps = coherence.gaps();
        let actions = step(&mut coherence);
        for action in actions {
            match action {
                Action::Open => {
                    self.tables.set_coherent(true);
                    self.tell(Event::Coherent);
                }
                Action::Close => {
                    self.tables.set_coherent(false);
                    if let Some((_, why)) = coherence.bypassed() {
                        self.tell(Event::Gap(why.clone()));
                    }
                }
                Action::Release(fence) => self.progress.send_modify(|progress| progress.fence = fence),
            }
        }
        if coherence.gaps() != gaps {
            self.progress.send_modify(|progress| progress.gaps = coherence.gaps());
            self.wake.notify_one();
        }
    }

    /// Notifications may have been lost.
    pub(crate) fn gap(&self, why: Reason) {
        self.step(|coherence| coherence.gap(clock::now(), why));
    }

    pub(crate) fn status_reason(&self) -> Option<Reason> {
        self.look(|coherence| coherence.bypassed().map(|(_, why)| why.clone()))
    }

    pub(crate) fn look<T>(&self, look: impl FnOnce(&mut Coherence) -> T) -> T {
        look(&mut lock_std(&self.coherence))
    }

    /// Whether rows with this stamp come from the server that the node listens to. If not, while the node takes
    /// itself for coherent, that is a gap: one of the two is the wrong server (X6).
    pub(crate) fn is_ours(&self, incarnation: Option<Incarnation>) -> bool {
        let (listening, up) = self.look(|coherence| (coherence.incarnation(), coherence.bypassed().is_none()));
        if incarnation.is_some() && incarnation == listening {
            return true;
        }
        if up {
            tracing::error!(
                loaded = ?incarnation,
                ?listening,
                "a load reached another server than the LISTEN connection, or one that crashed: forgot everything"
            );
            self.gap(Reason::OtherServer);
        }
        false
    }

    async fn barrier(&self) -> Result<()> {
        let mut progress = self.progress.subscribe();
        let wanted = self.look(|coherence| coherence.want_fence().map(|fence| (fence, coherence.gaps())));
        let (fence, gaps) = wanted.map_err(|why| self.unavailable(&why))?;
        self.wake.notify_one();
        let done = |progress: &Progress| progress.fence >= fence || progress.gaps != gaps;
        let progress = *progress.wait_for(done).await.expect("the sender is part of self");
        if progress.gaps == gaps {
            return Ok(());
        }
        Err(self.unavailable(&self.status_reason().unwrap_or(Reason::BeatLate)))
    }

    fn unavailable(&self, why: &Reason) -> Error {
        let kind = if *why == Reason::ShutDown { Kind::Closed } else { Kind::Unavailable };
        Error::new(kind, format!("no fence can come back while the node is not coherent: {why}"))
    }

    pub(crate) fn status(&self) -> Status {
        self.look(|coherence| match (coherence.bypassed(), coherence.coherent_as_of()) {
            (None, as_of) => Status::Coherent { as_of: clock::instant(as_of.unwrap_or_default()) },
            (Some((since, why)), _) => Status::Bypassed { since: clock::instant(since), why: why.clone() },
        })
    }

    /// The status of one table: as the node's, unless its triggers are in doubt.
    pub(crate) fn status_of(&self, table: &str) -> Status {
        match (self.status(), self.tables.suspicion(table)) {
            (Status::Coherent { .. }, Some((since, why))) => {
                Status::Bypassed { since: clock::instant(since), why: Reason::Triggers(why) }
            }
            (status, _) => status,
        }
    }

    /// Tells all nodes, this one too, to forget rows.
    pub(crate) async fn broadcast(&self, change: &Change) -> Result<()> {
        /// NOTIFY refuses payloads of 8000 bytes or more.
        const PAYLOAD_MAX: usize = 7999;
        let mut payload = change.to_payload();
        if payload.len() > PAYLOAD_MAX {
            payload = Change { rows: Rows::All, ..change.clone() }.to_payload();
        }
        let notified = sqlx::query("select pg_notify($1, $2)").bind(crate::change::CHANNEL).bind(payload);
        notified
            .execute(&self.pool)
            .await
            .map_err(|error| database_error("notifying on channel", "rowcache", error))?;
        Ok(())
    }

    fn tell(&self, event: Event) {
        // An error means that nobody listens, which is nobody's loss.
        let _ = self.events.send(event);
    }

    /// The thread that ends the lease. A thread of its own, because tasks stand still when the runtime is
    /// blocked, which is when the lease matters.
    fn start_clock(self: &Arc<Self>) -> thread::JoinHandle<()> {
        let shared = Arc::clone(self);
        let clock = move || {
            while !*shared.stopping.borrow() {
                thread::park_timeout(TICK);
                let now = clock::now();
                shared.step(|coherence| coherence.tick(now));
            }
        };
        thread::Builder::new().name("rowcache-clock".into()).spawn(clock).expect("the system can start a thread")
    }

    fn stop(&self) {
        if !self.stopping.send_replace(true) {
            self.gap(Reason::ShutDown);
            self.wake.notify_one();
        }
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }
}

fn lock_std<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
