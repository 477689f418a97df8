//! What everything in a simulation shares: the servers and how they are reached, chance, the clock, and what has happened.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, Weak},
    time::Duration,
};

use tokio::{sync::broadcast, time::Instant};

use super::{
    channel::Wire,
    database::{self, Number, Rows, Server},
    dice::Dice,
    executor::{Owner, Tasks},
    node::SimNode,
    shelf::Put,
    trace::{Trace, What},
};
use crate::{
    change::Rows as ChangedRows,
    coherence::Boot,
    hashed::KeyHash,
    key::KeyPart,
    status::Event,
    sync::lock,
    tables::Via,
    token::Token,
    verify::history::{History, Key, NodeId, Noted, Outcome, Time},
};

/// The world outside of the nodes, and the notes about them.
pub(super) struct World {
    pub(super) tasks: Arc<Tasks>,
    /// When the run began, on tokio's clock.
    base: Instant,
    inner: Mutex<Inner>,
}

pub(super) struct Inner {
    pub(super) dice: Dice,
    pub(super) servers: Vec<Server>,
    /// The server that is the primary, in truth.
    pub(super) primary: usize,
    /// Where the addresses of pool, listener and writers lead.
    pub(super) pool_at: usize,
    pub(super) listener_at: usize,
    pub(super) keys: usize,
    /// How nodes are told of changes of the table.
    pub(super) via: Via,
    pub(super) next_number: Number,
    pub(super) versions: BTreeMap<Key, u64>,
    /// The keys of a table whose keys are sent as hashes.
    pub(super) hashes: BTreeMap<KeyHash, Key>,
    pub(super) history: History,
    /// Where the writes of a transaction stand in the history.
    pub(super) writes_of: BTreeMap<Number, Vec<usize>>,
    pub(super) trace: Trace,
    pub(super) counts: BTreeMap<&'static str, u64>,
    pub(super) reads: BTreeMap<&'static str, u64>,
    pub(super) tokens: Vec<(Token, Number)>,
    pub(super) weather: Weather,
    /// What lies in the tier.
    pub(super) shelf: Put,
    pub(super) lines: Vec<(NodeId, Weak<Wire>)>,
    pub(super) nodes: BTreeMap<NodeId, Arc<SimNode>>,
    pub(super) events: BTreeMap<NodeId, broadcast::Receiver<Event>>,
    pub(super) violations: Vec<Found>,
    /// What ends the run when all is quiet.
    pub(super) writing: bool,
    pub(super) reading: bool,
    pub(super) stormy: bool,
    split_at: Option<Boot>,
    pub(super) writers: u64,
    pub(super) readers: u64,
    last: Time,
    step_began: Time,
}

/// Something that only a simulation can see.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) node: NodeId,
    pub(super) key: Key,
    pub(super) what: String,
}

/// A lease, and the time after which an end is noticed.
const SPLIT_ECHO: Duration = Duration::from_secs(3);

/// How well things go at the moment.
#[derive(Clone, Debug)]
pub(super) struct Weather {
    /// The longest a message takes to a node, in milliseconds.
    pub(super) delay: u64,
    /// The longest a statement takes.
    pub(super) statement: u64,
    /// One in so many loads fails; and one in so many is slow.
    pub(super) load_fails: u64,
    pub(super) load_slow: u64,
    /// One in so many commits that notify is stuck.
    pub(super) stuck: u64,
    pub(super) asynchronous: u64,
    pub(super) connect_fails: u64,
}

impl Weather {
    pub(super) const FINE: Self = Self {
        delay: 2,
        statement: 3,
        load_fails: u64::MAX,
        load_slow: u64::MAX,
        stuck: u64::MAX,
        asynchronous: 2,
        connect_fails: u64::MAX,
    };
}

impl World {
    pub(super) fn new(seed: u64, keys: usize, via: Via, tasks: Arc<Tasks>) -> Arc<Self> {
        let (rows, writes): (Rows, _) = database::first_rows(keys);
        let versions = rows.keys().map(|key| (*key, 1)).collect();
        let mut dice = Dice::new(seed);
        let first = Server::new(dice.roll(), 0, rows, Vec::new(), keys);
        let inner = Inner {
            dice,
            servers: vec![first],
            primary: 0,
            pool_at: 0,
            listener_at: 0,
            keys,
            via,
            next_number: 1,
            versions,
            hashes: BTreeMap::new(),
            history: History { writes, ..History::default() },
            writes_of: BTreeMap::new(),
            trace: Trace::default(),
            counts: BTreeMap::new(),
            reads: BTreeMap::new(),
            tokens: Vec::new(),
            weather: Weather::FINE,
            shelf: Put::new(),
            lines: Vec::new(),
            nodes: BTreeMap::new(),
            events: BTreeMap::new(),
            violations: Vec::new(),
            writing: true,
            reading: true,
            stormy: true,
            split_at: None,
            writers: 0,
            readers: 0,
            last: 0,
            step_began: 0,
        };
        Arc::new(Self { tasks, base: Instant::now(), inner: Mutex::new(inner) })
    }

    pub(super) fn via(&self) -> Via {
        self.lock().via
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// The machine's clock, which all nodes share: it has been up for a while.
    pub(super) fn now(&self) -> Boot {
        Duration::from_secs(1000) + self.base.elapsed()
    }

    /// A moment, later than each before it.
    pub(super) fn stamp(&self) -> Time {
        self.lock().stamp(self.base)
    }

    pub(super) fn note(&self, node: Option<NodeId>, what: What) {
        let mut inner = self.lock();
        let at = inner.stamp(self.base);
        inner.trace.note(at, node, what);
    }

    pub(super) fn count(&self, what: &'static str) {
        *self.lock().counts.entry(what).or_default() += 1;
    }

    pub(super) fn found(&self, node: NodeId, key: Key, what: impl Into<String>) {
        self.lock().violations.push(Found { node, key, what: what.into() });
    }

    pub(super) fn roll<T>(&self, roll: impl FnOnce(&mut Dice) -> T) -> T {
        roll(&mut self.lock().dice)
    }

    pub(super) fn spawn(&self, owner: Owner, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(owner, Box::pin(task));
    }

    /// Lets up to this many milliseconds pass.
    pub(super) async fn pause(&self, most: u64) {
        let millis = self.roll(|dice| dice.between(0, most));
        if millis > 0 {
            tokio::time::sleep(Duration::from_millis(millis)).await;
        } else {
            tokio::task::yield_now().await;
        }
    }

    /// How long a statement, or half of it, takes.
    pub(super) async fn statement(&self) {
        let most = self.lock().weather.statement;
        self.pause(most).await;
    }

    pub(super) fn before_step(&self, owner: Owner, task: usize) {
        let mut inner = self.lock();
        let at = inner.stamp(self.base);
        inner.step_began = at;
        if owner.is_some() {
            inner.trace.step(task, at);
        }
    }

    /// Notes what a step did to its node.
    pub(super) fn after_step(&self, owner: Owner) {
        let Some(node) = owner else { return };
        let mut inner = self.lock();
        let inner = &mut *inner;
        let Some(events) = inner.events.get_mut(&node) else { return };
        let mut happened = Vec::new();
        while let Ok(event) = events.try_recv() {
            happened.push(event);
        }
        for event in happened {
            inner.happened(node, event, self.base);
        }
    }
}

impl Inner {
    pub(super) fn stamp(&mut self, base: Instant) -> Time {
        let now = Time::try_from(base.elapsed().as_nanos()).expect("a run is short");
        self.last = now.max(self.last + 1);
        self.last
    }

    fn happened(&mut self, node: NodeId, event: Event, base: Instant) {
        let at = self.stamp(base);
        let (what, noted) = match event {
            Event::Change(change) => {
                let keys = match &change.rows {
                    ChangedRows::All => None,
                    ChangedRows::Keys(keys) => Some(
                        keys.iter()
                            .filter_map(|key| match key.parts() {
                                [KeyPart::Int(key)] => Some(*key),
                                _ => None,
                            })
                            .collect(),
                    ),
                    ChangedRows::Hashed { hashes, .. } => {
                        Some(hashes.iter().filter_map(|hash| self.hashes.get(hash).copied()).collect::<Vec<_>>())
                    }
                };
                // Our triggers say which transaction it was, whatever its id: ids are used again. A stranger's do not.
                let transaction = match change.columns.get(NUMBER).map(Vec::as_slice) {
                    Some([KeyPart::Int(number)]) => number.cast_unsigned().into(),
                    _ => None,
                };
                let noted = transaction.map(|xid| Noted::Applied { xid, keys: keys.clone() });
                (What::Applied { transaction, keys }, noted)
            }
            Event::Unreadable { .. } => (What::Applied { transaction: None, keys: None }, None),
            Event::Gap(why) => {
                *self.counts.entry("gap").or_default() += 1;
                (What::Gap(why.to_string()), Some(Noted::Gap { since: self.step_began }))
            }
            Event::Coherent => (What::Coherent, Some(Noted::Coherent { era: self.era_of(node) })),
            Event::Covered => (What::Lines("the spare covers"), None),
            Event::Handoff(_) => {
                *self.counts.entry("handoff").or_default() += 1;
                (What::Lines("handoff"), None)
            }
            Event::SpareLost(_) => (What::Lines("the spare is lost"), None),
            Event::Incoherent { .. } => unreachable!("no table of the simulation is audited"),
            Event::Lagged(_) => unreachable!("events are taken after each step"),
        };
        self.trace.note(at, Some(node), what);
        self.history.notes.extend(noted.map(|noted| (node, at, noted)));
    }

    /// The era of the server that a node listens to.
    fn era_of(&self, node: NodeId) -> u32 {
        let listening = self.nodes.get(&node).and_then(|node| node.shared.look(|it| it.incarnation()));
        let server = self.servers.iter().find(|server| Some(server.incarnation) == listening);
        server.map_or(0, |server| server.era)
    }

    /// Whether a node listens to the primary, and takes itself for coherent.
    pub(super) fn follows_primary(&self, node: &SimNode) -> bool {
        let primary = self.servers[self.primary].incarnation;
        node.shared.look(|it| it.bypassed().is_none() && it.incarnation() == Some(primary))
    }

    /// Whether there is a server that was replaced, and still answers.
    pub(super) fn is_split(&self) -> bool {
        self.servers.iter().enumerate().any(|(n, server)| server.alive && n != self.primary)
    }

    /// Whether there was one lately: what it said may be served for as long as a lease.
    pub(super) fn was_split(&mut self, now: Boot) -> bool {
        if self.is_split() {
            self.split_at = Some(now);
        }
        self.split_at.is_some_and(|at| now < at + SPLIT_ECHO)
    }

    /// A number for a transaction.
    pub(super) fn number(&mut self) -> Number {
        self.next_number += 1;
        self.next_number
    }

    /// What became of the writes of a transaction.
    pub(super) fn outcome(&mut self, number: Number, outcome: Outcome) {
        for write in self.writes_of.get(&number).into_iter().flatten() {
            self.history.writes[*write].outcome = outcome;
        }
    }
}

/// The column in which messages of our triggers carry the number of their transaction.
pub(super) const NUMBER: &str = "number";
