//! The nodes of the demo: each a full [`Node`], with its own pool, its own LISTEN connection and its own cache, as if it
//! were a process of its own. A follower per node takes down what the node applies.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use tokio::sync::mpsc;

use super::{
    board::Board,
    checker::Applied,
    world::{TABLE, User},
};
use crate::{Change, Config, Event, Events, Key as _, Node, Rows, Stats, Status, Table, cli::commit_time::CommitTimes};

/// Connections of a node's pool.
const POOL_MAX: u32 = 5;

/// Events a follower may be behind: a change of many rows is many messages.
const EVENTS_MAX: usize = 65_536;

/// Messages whose commit times are asked for in one statement, and how many may wait for that; more have none.
const TIMED_MAX: usize = 256;
pub(super) const UNTIMED_MAX: usize = 8192;

pub(super) struct DemoNode {
    /// From 0.
    pub(super) index: usize,
    pub(super) node: Node,
    pub(super) users: Table<i64, User>,
    /// Protects what the follower has noted.
    applied: Mutex<Applied>,
}

impl DemoNode {
    /// Its counters and its status.
    pub(super) fn now(&self) -> (Stats, Status) {
        (self.users.stats(), self.users.status())
    }

    pub(super) async fn start(index: usize, url: &str, address: Option<String>) -> Result<Arc<Self>> {
        let mut config = Config::from_url(url)?;
        config.name = Some(name(index));
        config.address = address;
        config.pool = config.pool.max_connections(POOL_MAX);
        config.events_max = EVENTS_MAX;
        let node = Node::start(config).await.with_context(|| format!("cannot start node {}", index + 1))?;
        let users = node.table(TABLE).await?;
        Ok(Arc::new(Self { index, node, users, applied: Mutex::default() }))
    }

    pub(super) fn applied(&self) -> MutexGuard<'_, Applied> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down what this node applies, for the board and for the checker.
    pub(super) async fn follow(self: Arc<Self>, mut events: Events, board: Arc<Board>, untimed: mpsc::Sender<Untimed>) {
        while let Some(event) = events.recv().await {
            let at = SystemTime::now();
            match event {
                Event::Change(change) => {
                    self.note(&change);
                    board.add(self.index, at, &change);
                    if let Some(xid) = change.xid {
                        // A full queue means a number less on the board.
                        let _ = untimed.try_send(Untimed { node: self.index, xid, at });
                    }
                }
                Event::Unreadable { .. } => self.applied().clear(),
                // What was applied stays applied; what was missed is not checked.
                Event::Gap(_)
                | Event::Coherent
                | Event::Covered
                | Event::Handoff(_)
                | Event::SpareLost(_)
                | Event::Incoherent { .. }
                | Event::Lagged(_) => {}
            }
        }
    }

    fn note(&self, change: &Change) {
        if change.table.as_deref().is_some_and(|table| table != TABLE) {
            return;
        }
        let mut applied = self.applied();
        match &change.rows {
            Rows::All | Rows::Hashed { .. } => applied.clear(),
            Rows::Keys(keys) => {
                // Without a transaction somebody asked for it, and no row need have changed.
                let Some(xid) = change.xid else { return };
                let now = Instant::now();
                for key in keys.iter().filter_map(|key| i64::from_parts(key.parts())) {
                    applied.note(now, key, xid);
                }
            }
        }
    }
}

/// What a node is called, on the list of nodes and in `pg_stat_activity`.
pub(super) fn name(index: usize) -> String {
    format!("rowcache demo node {}", index + 1)
}

/// A message that a node has applied, and when.
pub(super) struct Untimed {
    node: usize,
    xid: u64,
    at: SystemTime,
}

/// Finds out how long after its commit each message was applied.
pub(super) async fn find_latencies(mut commits: CommitTimes, mut untimed: mpsc::Receiver<Untimed>, board: Arc<Board>) {
    let mut batch = Vec::new();
    while untimed.recv_many(&mut batch, TIMED_MAX).await > 0 {
        let seen: Vec<_> = batch.iter().map(|message| (message.xid, message.at)).collect();
        let latencies = commits.latencies(&seen).await;
        for (message, latency) in batch.drain(..).zip(latencies) {
            if let Some(latency) = latency {
                board.time(message.node, message.xid, latency);
            }
        }
    }
}

/// How long a node may take to be coherent again before the last comparison.
const COHERENT_WITHIN: Duration = Duration::from_secs(15);

/// Waits until everything that was committed before is applied on this node.
pub(super) async fn barrier(node: &DemoNode) -> Result<()> {
    let deadline = Instant::now() + COHERENT_WITHIN;
    loop {
        match node.node.barrier().await {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("node {} does not become coherent", node.index + 1));
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}
