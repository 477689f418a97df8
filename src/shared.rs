//! What the tasks and handles of a node share, and the steps that they take with it.
//!
//! ```text
//! commit → trigger → NOTIFY → line ──→ inbox ──→ applier ──→ tables → store.invalidate
//!                              │                    └ fence ──→ coherence ──→ gates open
//!                              └ lost ──────────────────────→ coherence ──→ gates close, at once
//!          keeper: opens the line, sends fences, verifies triggers      clock: ends the lease
//! ```

use std::{
    any::{Any, TypeId},
    collections::{BTreeMap, HashMap},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    thread,
};

use tokio::{
    sync::{Notify, Semaphore, broadcast, watch},
    task::{JoinError, JoinHandle},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    change::{Change, Message, Rows},
    coherence::{Action, Boot, Coherence, Incarnation, Reason},
    config::{Config, TICK},
    digest::Tenths,
    error::{Error, Kind, Result},
    fleet::Questions,
    horizon::Horizon,
    host::Host,
    inbox::{Inbox, Item},
    relay::Relay,
    server::{Line, Server},
    stats::NodeCounters,
    status::{Event, Events, Status},
    sync::{Mutex, lock},
    tables::{Member, Tables, Via},
    throttle::Throttle,
    token::{Token, incarnation_id},
};

/// What the node's tasks and handles share.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) server: Arc<dyn Server>,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) tables: Tables,
    pub(crate) inbox: Inbox,
    pub(crate) horizon: Horizon,
    pub(crate) counters: NodeCounters,
    /// Tells this node apart from others, and from itself before it was started again.
    pub(crate) id: Uuid,
    pub(crate) started: Boot,
    /// What other nodes have asked, and was not answered yet.
    pub(crate) questions: Questions,
    /// Protects which line is heard. What it passes on is in the inbox before the lock is released, and events of lines
    /// are sent while it is held. Lock order: this, then the inbox.
    pub(crate) relay: Mutex<Relay<Arc<dyn Line>>>,
    /// The channel on which this node sends to itself.
    pub(crate) own_channel: String,
    /// Turns of the loads: at most [`Config::loads_max`] at a time.
    pub(crate) loads: Semaphore,
    /// Wakes the keeper: a fence is wanted, or the line was given up.
    pub(crate) wake: Notify,
    /// Wakes who opens a second line: there may be none.
    pub(crate) spare_wanted: Notify,
    /// Protects the state machine. Gates are moved while it is held, so that they show what it says.
    /// Lock order: this, then the lock of `Tables`.
    coherence: Mutex<Coherence>,
    unreadable: Throttle,
    overflows: Throttle,
    progress: watch::Sender<Progress>,
    events: broadcast::Sender<Event>,
    stopping: watch::Sender<bool>,
}

/// How a wait for a token ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    /// The transaction has been applied.
    Applied,
    /// The node is not coherent: nobody knows.
    InDoubt,
}

/// How things stood when a load began.
#[derive(Clone, Copy)]
pub(crate) struct Began {
    /// The number of gaps: a load that spans one may well have read the server as it was before.
    gaps: u64,
    /// The server that the node listened to, if it was coherent.
    on: Option<Incarnation>,
}

/// Where loaded rows come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// From the server that the node listens to.
    Ours,
    /// From another one, or from one without a name; the node was not coherent, and whoever asked gets what there is.
    Unknown,
    /// From another one than the node listened to when the load began.
    Foreign,
}

/// How far fences have come.
#[derive(Clone, Copy, Default)]
pub(crate) struct Progress {
    /// The last fence that was applied.
    fence: u64,
    pub(crate) gaps: u64,
    /// How often the node became coherent.
    pub(crate) opened: u64,
}

/// What keeps a node alive: when the last node or table that holds one goes, the node stops.
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    /// Protects the stores of the tables that were opened, by name, key and value type.
    opened: Mutex<HashMap<Opened, Arc<dyn Any + Send + Sync>>>,
    tasks: Mutex<Vec<JoinHandle<()>>>,
    clock: Mutex<Option<thread::JoinHandle<()>>>,
}

type Opened = (String, TypeId, TypeId);

impl Handle {
    /// Of a node whose applier, keeper and clock are somebody else's to run.
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { opened: Mutex::default(), tasks: Mutex::default(), clock: Mutex::default(), shared }
    }

    /// Starts the applier, the clock, and who answers other nodes; `keeper` keeps the line.
    pub(crate) fn start(shared: Arc<Shared>, keeper: JoinHandle<()>) -> Self {
        let handle = Self::new(Arc::clone(&shared));
        *lock(&handle.clock) = Some(shared.start_clock());
        let answering = tokio::spawn(Arc::clone(&shared).answer_questions());
        let applier = tokio::spawn(shared.apply());
        lock(&handle.tasks).extend([applier, answering, keeper]);
        handle
    }

    /// As [`start`](Self::start), with a task for a clock: of a node whose time is tokio's, which can stand still, and which nobody
    /// else can ask.
    #[cfg(feature = "test-kit")]
    pub(crate) fn start_in_tokio_time(shared: Arc<Shared>, keeper: JoinHandle<()>) -> Self {
        let handle = Self::new(Arc::clone(&shared));
        let clock = tokio::spawn(Arc::clone(&shared).tick_in_tokio_time());
        let applier = tokio::spawn(shared.apply());
        lock(&handle.tasks).extend([applier, keeper, clock]);
        handle
    }

    /// The store of a table, made if there is none yet for these types.
    pub(crate) fn open<K: 'static, V: 'static, S: Any + Send + Sync>(
        &self,
        table: &str,
        make: impl FnOnce() -> Arc<S>,
    ) -> Arc<S> {
        let mut opened = lock(&self.opened);
        let key = (table.to_owned(), TypeId::of::<K>(), TypeId::of::<V>());
        if let Some(store) = opened.get(&key).and_then(|store| Arc::clone(store).downcast().ok()) {
            return store;
        }
        let store = make();
        opened.insert(key, Arc::clone(&store) as Arc<dyn Any + Send + Sync>);
        store
    }

    /// Stops every task and closes every connection.
    pub(crate) async fn stop(&self) {
        self.shared.stop();
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        let mut panic = None;
        for task in tasks {
            panic = task.await.err().filter(JoinError::is_panic).or(panic);
        }
        let clock = lock(&self.clock).take();
        if let Some(clock) = clock {
            clock.thread().unpark();
            let _ = tokio::task::spawn_blocking(|| clock.join()).await;
        }
        self.shared.server.close().await;
        if let Some(panic) = panic {
            resume_unwind(panic.into_panic());
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop();
    }
}

fn everything() -> Change {
    Change { rows: Rows::All, table: None, columns: BTreeMap::new(), xid: None }
}

impl Shared {
    pub(crate) fn new(config: Config, server: Arc<dyn Server>, host: Arc<dyn Host>) -> Arc<Self> {
        Arc::new(Self {
            tables: Tables::default(),
            inbox: Inbox::new(config.inbox_bytes_max),
            horizon: Horizon::default(),
            counters: NodeCounters::default(),
            id: Uuid::new_v4(),
            started: host.now(),
            questions: Questions::default(),
            relay: Mutex::new(Relay::new(config.inbox_bytes_max)),
            own_channel: format!("rowcache:{}", Uuid::new_v4().simple()),
            loads: Semaphore::new(config.loads_max),
            wake: Notify::new(),
            spare_wanted: Notify::new(),
            coherence: Mutex::new(Coherence::new(config.timing(), host.now())),
            unreadable: Throttle::default(),
            overflows: Throttle::default(),
            progress: watch::Sender::default(),
            events: broadcast::Sender::new(config.events_max),
            stopping: watch::Sender::default(),
            config,
            server,
            host,
        })
    }

    /// Applies what was received, in the order of the channel.
    pub(crate) async fn apply(self: Arc<Self>) {
        let mut stopping = self.stopping.subscribe();
        loop {
            let items = tokio::select! {
                biased;
                items = self.inbox.take() => items,
                _ = stopping.wait_for(|stopping| *stopping) => return,
            };
            for (n, item) in items.into_iter().enumerate() {
                // Keys and values bring code of the user's along (`Key::from_parts`, `Drop`), which may panic. Whatever
                // that left undone is covered by forgetting everything.
                if catch_unwind(AssertUnwindSafe(|| self.apply_one(item))).is_err() {
                    tracing::error!("a key or a value panicked while a change was applied; forgot everything");
                    self.tables.clear(None);
                }
                if n % 256 == 255 {
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    fn apply_one(&self, item: Item) {
        self.counters.messages.add(1);
        let cleared = match item {
            Item::Own(payload) => match Message::parse(&payload) {
                Message::Fence(nonce, mark) => {
                    return self.step(|coherence| coherence.fence_applied(nonce, mark));
                }
                other => self.apply_message(other),
            },
            Item::Message(payload) => self.apply_message(Message::parse(&payload)),
            // In its turn: whoever gets the answer knows that all that stands before the question has been applied.
            Item::Question(nonce) => return self.questions.ask(nonce),
            Item::Polled(of) => {
                let (fence, mark) = *of;
                if !self.config.listen {
                    // There is nothing else that could come back.
                    self.step(|coherence| coherence.fence_applied(fence.nonce, mark.clone()));
                }
                return self.step(|coherence| coherence.fence_polled(fence, mark));
            }
            Item::Missed => self.apply_message(Message::Change(everything())),
            Item::Overflow => {
                self.counters.overflows.add(1);
                if let Some(held_back) = self.overflows.pass(self.host.now()) {
                    tracing::warn!(
                        bytes_max = self.config.inbox_bytes_max,
                        held_back,
                        "more changes came in than could be applied; everything held was forgotten"
                    );
                }
                self.apply_message(Message::Change(everything()))
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
                self.counters.unreadable.add(1);
                let cleared = self.tables.clear(table.as_deref());
                // Anybody who may connect can send these.
                if let Some(held_back) = self.unreadable.pass(self.host.now()) {
                    let of = table.as_deref().unwrap_or("every table");
                    tracing::warn!(%error, held_back, "a message on channel rowcache could not be read; forgot {of}");
                }
                self.tell(Event::Unreadable { table, error });
                cleared
            }
            // A fence on the channel of all nodes is nobody's.
            Message::Fence(..) => Vec::new(),
        }
    }

    /// Frees the memory of what was cleared, off the applier's path.
    pub(crate) fn reclaim(&self, mut cleared: Vec<Arc<dyn Member>>) {
        cleared.retain(|member| member.wants_reclaim());
        if !cleared.is_empty() {
            self.host.spawn_blocking(Box::new(move || cleared.iter().for_each(|member| member.reclaim())));
        }
    }

    /// Lets the state machine take a step, and does what it says before anybody else can.
    pub(crate) fn step(&self, step: impl FnOnce(&mut Coherence) -> Vec<Action>) {
        let mut coherence = lock(&self.coherence);
        let gaps = coherence.gaps();
        let actions = step(&mut coherence);
        for action in actions {
            match action {
                Action::Advance => {
                    if let (Some(as_of), Some(mark)) = (coherence.coherent_as_of(), coherence.mark()) {
                        self.horizon.advance(as_of, mark.lsn);
                        self.tables.advance(as_of, mark);
                        self.counters.fence(self.host.now().saturating_sub(as_of));
                    }
                }
                Action::Open => {
                    self.tables.set_coherent(true);
                    self.progress.send_modify(|progress| progress.opened += 1);
                    self.counters.recoveries.add(1);
                    self.tell(Event::Coherent);
                }
                Action::Close => {
                    self.horizon.gap();
                    self.counters.gaps.add(1);
                    self.tables.set_coherent(false);
                    if let Some((_, why)) = coherence.bypassed() {
                        self.tell(Event::Gap(why.clone()));
                    }
                }
                Action::Release(fence) => {
                    self.progress.send_modify(|progress| progress.fence = fence);
                    // The next fence may be due, for those who came too late for this one.
                    self.wake.notify_one();
                }
            }
        }
        if coherence.gaps() != gaps {
            self.progress.send_modify(|progress| progress.gaps = coherence.gaps());
            self.wake.notify_one();
        }
    }

    /// Notifications may have been lost.
    pub(crate) fn gap(&self, why: Reason) {
        self.step(|coherence| coherence.gap(self.host.now(), why));
    }

    pub(crate) fn status_reason(&self) -> Option<Reason> {
        self.look(|coherence| coherence.bypassed().map(|(_, why)| why.clone()))
    }

    pub(crate) fn look<T>(&self, look: impl FnOnce(&mut Coherence) -> T) -> T {
        look(&mut lock(&self.coherence))
    }

    /// To be called before a statement is sent that loads.
    pub(crate) fn load_begins(&self) -> Began {
        self.look(|coherence| Began {
            gaps: coherence.gaps(),
            on: coherence.incarnation().filter(|_| coherence.bypassed().is_none()),
        })
    }

    /// From where rows with this stamp come. If it is not the server that the node listens to, while the node takes itself for
    /// coherent, that is a gap: one of the two is the wrong server (X6).
    ///
    /// A load that began while the node was coherent never answers with rows of another server:
    ///
    /// 1. A standby is promoted; the old primary runs on. The node listens to the new one, and applies what is committed there.
    /// 2. A pooled connection still leads to the old one. It answers a load, without what the node has applied.
    ///
    /// Not to keep these rows is not enough: whoever waits for them would go back in time (I2).
    pub(crate) fn whose(&self, incarnation: Option<Incarnation>, began: Began) -> Whose {
        let (listening, up) = self.look(|coherence| {
            (coherence.incarnation(), coherence.bypassed().is_none() && coherence.gaps() == began.gaps)
        });
        if incarnation.is_some() && incarnation == listening {
            return Whose::Ours;
        }
        if up {
            tracing::error!(
                loaded = ?incarnation,
                ?listening,
                "a load reached another server than the LISTEN connection, or one that crashed: forgot everything"
            );
            self.gap(Reason::OtherServer);
        }
        if began.on.is_some() && began.on != incarnation { Whose::Foreign } else { Whose::Unknown }
    }

    /// What those are told who would get foreign rows.
    pub(crate) fn foreign() -> Error {
        Error::new(
            Kind::Unavailable,
            "what was loaded came from another server than the one that the node listens to, or the server has crashed; it may \
             be older than what this node has seen. Read again",
        )
    }

    /// Waits for a fence that starts after this call: everything visible now has then been applied.
    pub(crate) async fn fence(&self) -> Result<(), Reason> {
        self.fence_counts(Coherence::want_fence).await
    }

    /// As [`fence`](Self::fence), and sends none: it waits for the next one that is sent anyhow, at the latest a beat later.
    pub(crate) async fn next_beat(&self) -> Result<(), Reason> {
        self.fence_counts(|coherence| coherence.next_number()).await
    }

    async fn fence_counts(&self, which: fn(&mut Coherence) -> Result<u64, Reason>) -> Result<(), Reason> {
        let mut progress = self.progress.subscribe();
        let (fence, gaps) = self.look(|coherence| which(coherence).map(|fence| (fence, coherence.gaps())))?;
        self.wake.notify_one();
        let done = |progress: &Progress| progress.fence >= fence || progress.gaps != gaps;
        let progress = *progress.wait_for(done).await.expect("the sender is part of self");
        if progress.gaps == gaps { Ok(()) } else { Err(self.status_reason().unwrap_or(Reason::BeatLate)) }
    }

    pub(crate) async fn barrier(&self) -> Result<()> {
        self.fence().await.map_err(|why| Self::unavailable(&why))
    }

    /// Waits until the transaction that the token names has been applied. What proves it is a fence, never a message
    /// with that transaction's id: there may be more of them to come (X29), and anybody can send one (I5).
    pub(crate) async fn reach(&self, token: Token) -> Result<Reached> {
        for fenced in [false, true] {
            let (incarnation, seen) = self.look(|coherence| {
                // One that wrote nothing may have seen what is not applied here yet: only a fence that starts now tells.
                let seen = coherence.mark().map(|mark| mark.snapshot.sees(token.xid) && (token.xid != 0 || fenced));
                (coherence.incarnation().filter(|_| coherence.has_line()), seen)
            });
            match (incarnation.map(incarnation_id), seen) {
                (Some(id), _) if id != token.incarnation => return Err(Self::other_incarnation(token)),
                (Some(_), Some(true)) => return Ok(Reached::Applied),
                (Some(_), Some(false)) if fenced => {
                    return Err(Error::new(
                        Kind::Token,
                        format!(
                            "token {token} names a transaction that has not ended (hand it out after COMMIT), or that cannot be told \
                             apart: more than some 500 others are writing"
                        ),
                    ));
                }
                (Some(_), Some(false)) if self.fence().await.is_ok() => {}
                _ => return Ok(Reached::InDoubt),
            }
        }
        Ok(Reached::InDoubt)
    }

    pub(crate) fn other_incarnation(token: Token) -> Error {
        Error::new(
            Kind::OtherIncarnation,
            format!(
                "token {token} is of another incarnation of the server than the one that answers: its transaction may \
                 have been lost; read again without the token"
            ),
        )
    }

    /// Returns when the node is coherent, or stops.
    pub(crate) async fn until_coherent(&self) -> Result<()> {
        let (mut progress, mut stopping) = (self.progress.subscribe(), self.stopping.subscribe());
        loop {
            progress.borrow_and_update();
            if self.is_stopping() {
                return Err(Self::unavailable(&Reason::ShutDown));
            }
            if self.status_reason().is_none() {
                return Ok(());
            }
            tokio::select! {
                // The end of a gap is told there.
                _ = progress.changed() => {}
                _ = stopping.changed() => {}
            }
        }
    }

    /// Why no fence comes back now.
    pub(crate) fn no_fence(&self) -> Error {
        Self::unavailable(&self.status_reason().unwrap_or(Reason::BeatLate))
    }

    fn unavailable(why: &Reason) -> Error {
        let kind = if *why == Reason::ShutDown { Kind::Closed } else { Kind::Unavailable };
        Error::new(kind, format!("no fence can come back while the node is not coherent: {why}"))
    }

    pub(crate) fn status(&self) -> Status {
        let status = self.status_of_line();
        match self.tables.off() {
            Some(since) if matches!(status, Status::Coherent { .. }) => {
                Status::Bypassed { since: self.host.instant(since), why: Reason::SwitchedOff }
            }
            _ => status,
        }
    }

    fn status_of_line(&self) -> Status {
        self.look(|coherence| match (coherence.bypassed(), coherence.coherent_as_of()) {
            (None, as_of) => Status::Coherent {
                as_of: self.host.instant(as_of.unwrap_or_default()),
                staleness_bound: self.config.staleness_bound(),
            },
            (Some((since, why)), _) => Status::Bypassed { since: self.host.instant(since), why: why.clone() },
        })
    }

    /// The status of one table: as the node's, unless its triggers are in doubt.
    pub(crate) fn status_of(&self, table: &str) -> Status {
        match (self.status(), self.tables.suspicion(table)) {
            (Status::Coherent { .. }, Some((since, why))) => {
                Status::Bypassed { since: self.host.instant(since), why: Reason::Triggers(why) }
            }
            (status, _) => status,
        }
    }

    /// Tells all nodes, this one too, to forget rows: as the table's triggers would.
    pub(crate) async fn broadcast(&self, change: &Change) -> Result<()> {
        let payload = change.to_message();
        let limit = self.config.load_timeout;
        let late = |_| {
            Err(Error::new(Kind::Timeout, format!("telling all nodes took longer than {limit:?} (`load_timeout`)")))
        };
        for via in [Via::Notify, Via::Log] {
            if self.tables.is_told(change.table.as_deref(), via) {
                timeout(limit, self.server.tell(payload.clone(), via)).await.unwrap_or_else(late)?;
            }
        }
        Ok(())
    }

    pub(crate) fn tell(&self, event: Event) {
        // An error means that nobody listens, which is nobody's loss.
        let _ = self.events.send(event);
    }

    /// The thread that ends the lease. A thread of its own, because tasks stand still when the runtime is
    /// blocked, which is when the lease matters.
    fn start_clock(self: &Arc<Self>) -> thread::JoinHandle<()> {
        let shared = Arc::clone(self);
        let clock = move || {
            while !shared.is_stopping() {
                thread::park_timeout(TICK);
                shared.tick();
            }
        };
        thread::Builder::new().name("rowcache-clock".into()).spawn(clock).expect("the system can start a thread")
    }

    /// What the clock thread does, as a task.
    #[cfg(feature = "test-kit")]
    async fn tick_in_tokio_time(self: Arc<Self>) {
        let mut stopping = self.stopping();
        while timeout(TICK, stopping.wait_for(|stopping| *stopping)).await.is_err() {
            self.tick();
        }
    }

    /// Looks at the clock: every [`TICK`].
    pub(crate) fn tick(&self) {
        let now = self.host.now();
        self.step(|coherence| coherence.tick(now));
        self.reclaim(self.tables.tick(Tenths::at(now)));
    }

    fn stop(&self) {
        if !self.stopping.send_replace(true) {
            self.gap(Reason::ShutDown);
            self.tables.shut();
            self.wake.notify_one();
        }
    }

    /// Events from now on.
    pub(crate) fn subscribe(&self) -> Events {
        Events { events: self.events.subscribe(), stopping: self.stopping.subscribe() }
    }

    pub(crate) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stopping.subscribe()
    }
}
