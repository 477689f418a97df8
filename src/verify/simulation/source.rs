//! Loads: the moment at which a statement takes its snapshot, and all that can happen before and after.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use tokio::time::{Instant, sleep};

use super::{
    node::{Item, LOAD_MAX},
    trace::What,
    world::World,
};
use crate::{
    error::{Error, Kind, Result},
    shared::Shared,
    snapshot::Snapshot,
    source::{Digesting, Loaded, Loading, Source, Stamp, in_time},
    sync::lock,
    verify::history::{Key, NodeId},
};

/// A node's pool.
pub(super) struct SimSource {
    world: Arc<World>,
    node: NodeId,
    shared: Weak<Shared>,
    /// The servers that idle connections lead to.
    idle: Mutex<Vec<usize>>,
    /// Keys that are being loaded: each but once at a time.
    running: Mutex<BTreeSet<Key>>,
    /// There is a tier before it.
    is_tiered: bool,
}

impl SimSource {
    pub(super) fn new(world: &Arc<World>, node: NodeId, shared: &Arc<Shared>, is_tiered: bool) -> Self {
        let (idle, running) = (Mutex::default(), Mutex::default());
        Self { world: Arc::clone(world), node, shared: Arc::downgrade(shared), idle, running, is_tiered }
    }

    async fn fetch(&self, keys: &[Key]) -> Result<Loaded<Item>> {
        let world = &self.world;
        let started = world.stamp();
        let (fails, slow, reused) = {
            let mut inner = world.lock();
            let (fails, slow) = (inner.weather.load_fails, inner.weather.load_slow);
            let fails = fails != u64::MAX && inner.dice.once_in(fails);
            let slow = slow != u64::MAX && inner.dice.once_in(slow);
            (fails, slow, inner.dice.once_in(2))
        };
        let slowly = Duration::from_millis(world.roll(|dice| dice.between(20, 150)));
        world.statement().await;
        if slow {
            world.count("slow load");
            sleep(slowly).await;
        }
        let idle = lock(&self.idle).pop().filter(|_| reused);
        // What other nodes take from the tier counts from when it was read.
        let started = if self.is_tiered { world.stamp() } else { started };
        let (server, rows, stamp) = {
            let mut inner = world.lock();
            let at = idle.filter(|at| inner.servers[*at].alive).unwrap_or(inner.pool_at);
            if !inner.servers[at].alive || (idle.is_none() && inner.servers[at].refuses) {
                return Err(Error::new(Kind::Unavailable, "cannot connect for a load"));
            }
            let server = &inner.servers[at];
            let rows: Vec<_> = keys.iter().map(|key| server.rows.get(key).copied()).collect();
            let saw = server.snapshot().parse().map(|it: Snapshot| it.sight()).ok();
            let stamp = Stamp { incarnation: Some(server.incarnation), dirty: false, lsn: server.lsn(), saw };
            let current = at == inner.primary;
            if !current {
                *inner.counts.entry("load of a replaced server").or_default() += 1;
            }
            (at, rows, stamp)
        };
        for (key, seen) in keys.iter().zip(&rows) {
            world.note(Some(self.node), What::LoadReads { key: *key, seen: *seen, server });
        }
        world.statement().await;
        if slow {
            sleep(slowly).await;
        }
        if fails {
            world.count("failed load");
            return Err(Error::new(Kind::Unavailable, "the simulation lets this load fail"));
        }
        // As `postgres/rows.rs`: a connection to another server than the line's is not used again.
        let ours = |it: &Shared| it.look(|it| !it.has_line() || it.incarnation() == stamp.incarnation);
        if self.shared.upgrade().is_some_and(|shared| ours(&shared)) {
            lock(&self.idle).push(server);
        }
        let rows = rows.into_iter().map(|seen| Ok(seen.map(|version| Item::new(version, started, server)))).collect();
        Ok(Loaded { rows, received: Vec::new(), stamp })
    }
}

impl Source<Key, Item> for SimSource {
    fn load<'a>(&'a self, keys: &'a [Key]) -> Loading<'a, Item> {
        Box::pin(async move {
            for key in keys {
                self.world.note(Some(self.node), What::LoadStarts(*key));
                if !lock(&self.running).insert(*key) {
                    self.world.found(self.node, *key, "two loads of one key run at the same time");
                }
            }
            let loaded = in_time(Instant::now() + LOAD_MAX, self.fetch(keys)).await;
            let loaded = loaded.unwrap_or_else(|| Err(Error::new(Kind::Timeout, "a load took too long")));
            for key in keys {
                lock(&self.running).remove(key);
                self.world.note(Some(self.node), What::LoadEnds { key: *key, failed: loaded.is_err() });
            }
            loaded
        })
    }

    fn load_at_once<'a>(&'a self, keys: &'a [Key]) -> Loading<'a, Item> {
        Box::pin(self.fetch(keys))
    }
    fn digests<'a>(&'a self, _: &'a [Key]) -> Digesting<'a> {
        unreachable!("no table of the simulation is audited")
    }
}
