//! One node: the real one, with a simulated database, clock and runtime.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use super::{channel::SimServer, database::key, shelf, source::SimSource, world::World};
use crate::{
    config::{Config, TICK},
    error::Result,
    freshness::Fallback,
    hashed::{Hashed, Secret},
    host::{Host, Task},
    keeper, refill, refresh,
    shared::{Handle, Shared},
    store::{Bounds, Early, Expiry, Limits, Reload, Store},
    table::Table,
    tables::{Member, Trust},
    verify::history::{Key, NodeId, Time, Version},
};

/// The table that all nodes cache.
pub(super) const TABLE: &str = "public.items";

/// A row.
#[derive(Clone, Debug, PartialEq, sqlx::FromRow, serde::Serialize, serde::Deserialize)]
pub(super) struct Item {
    era: i64,
    number: i64,
    /// When its load started.
    loaded: i64,
    /// The server that it was read from.
    server: i64,
}

impl Item {
    pub(super) fn new(version: Version, loaded: Time, server: usize) -> Self {
        let small = |n: u64| i64::try_from(n).expect("a run is short");
        Self {
            era: i64::from(version.era),
            number: small(version.number),
            loaded: small(loaded),
            server: small(server as u64),
        }
    }

    pub(super) fn version(&self) -> Version {
        Version { era: u32::try_from(self.era).expect("made of one"), number: self.number.cast_unsigned() }
    }

    pub(super) fn loaded(&self) -> Time {
        self.loaded.cast_unsigned()
    }

    pub(super) fn server(&self) -> usize {
        usize::try_from(self.server).expect("made of one")
    }
}

/// How the nodes of a run are set up.
#[expect(clippy::struct_excessive_bools, reason = "they have nothing to do with each other")]
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) capacity: usize,
    pub(super) hashed: bool,
    /// Rows may come from a tier.
    pub(super) tiered: bool,
    pub(super) redundant: bool,
    /// It listens to no notifications.
    pub(super) deaf: bool,
    pub(super) inbox_bytes_max: usize,
    pub(super) fallback: Fallback,
    pub(super) refill: usize,
    pub(super) ttl: Option<Duration>,
    /// What is used is loaded again after this share of its life, and when it has changed.
    pub(super) reload_after: Option<f64>,
    pub(super) loads_max: usize,
    pub(super) load_keys_max: usize,
}

/// Real times would do as well; these make a run short.
pub(super) const LEASE: Duration = Duration::from_millis(500);
pub(super) const BEAT_TIMEOUT: Duration = Duration::from_millis(300);
/// No load takes longer.
pub(super) const LOAD_MAX: Duration = Duration::from_millis(400);

impl Setup {
    pub(super) fn config(self) -> Config {
        let mut config = Config::from_url("postgres://simulated@simulated/simulated").expect("a URL");
        config.beat = Duration::from_millis(100);
        config.beat_timeout = BEAT_TIMEOUT;
        config.lease = LEASE;
        config.fence_spacing = Duration::from_millis(5);
        config.listen = !self.deaf;
        config.redundant_listener = self.redundant && !self.deaf;
        config.loads_max = self.loads_max;
        config.load_keys_max = self.load_keys_max;
        config.load_timeout = LOAD_MAX;
        config.inbox_bytes_max = self.inbox_bytes_max;
        config.check().expect("settings that can be used");
        config
    }
}

pub(super) struct SimNode {
    pub(super) id: NodeId,
    pub(super) shared: Arc<Shared>,
    pub(super) table: Table<Key, Item>,
    pub(super) setup: Setup,
}

struct SimHost {
    id: NodeId,
    world: Arc<World>,
}

impl Host for SimHost {
    fn now(&self) -> Duration {
        self.world.now()
    }

    fn spawn(&self, task: Task) {
        self.world.tasks.spawn(Some(self.id), task);
    }

    fn spawn_blocking(&self, work: Box<dyn FnOnce() + Send>) {
        self.world.tasks.spawn(Some(self.id), Box::pin(async move { work() }));
    }

    fn random(&self) -> u64 {
        self.world.roll(super::dice::Dice::roll)
    }
}

pub(super) fn secret() -> Secret {
    Secret::new(b"simulated")
}

/// Starts a node; the second value tells when it is coherent.
pub(super) fn start(world: &Arc<World>, id: NodeId, setup: Setup) -> oneshot::Receiver<Result<()>> {
    let server = Arc::new(SimServer::new(world, id, !setup.deaf));
    let host = Arc::new(SimHost { id, world: Arc::clone(world) });
    let shared = Shared::new(setup.config(), server, host);
    let limits = Limits { runners_max: setup.loads_max, batch_max: setup.load_keys_max };
    let hashed = setup.hashed.then(|| Hashed::new(secret()));
    let store = Store::new(Bounds::rows::<Key, Item>(setup.capacity), limits, hashed);
    // Without jitter, which is different in each process.
    let expiry = Expiry { ttl: setup.ttl, ..Expiry::default() };
    let (reload, due) = Reload::new(setup.reload_after.map(Early::Share), setup.reload_after.is_some(), 0).unzip();
    let store = Arc::new(store.expiring(expiry).reloading(reload).refilling(setup.refill).admitting(setup.tiered));
    shared.tables.add(TABLE, trust(world), &(Arc::clone(&store) as Arc<dyn Member>));
    let handle = Arc::new(Handle::new(Arc::clone(&shared)));
    let source = SimSource::new(world, id, &shared, setup.tiered);
    let source = if setup.tiered { shelf::before(world, source, &store, &shared) } else { Arc::new(source) };
    let table = Table::new(handle, store, source, TABLE, setup.fallback);

    let mut inner = world.lock();
    inner.events.insert(id, shared.subscribe().events);
    if let Some(hashed) = table.store.hashed() {
        let hashes: Vec<_> = (0..inner.keys).map(|n| (hashed.hash(&key(n)), key(n))).collect();
        inner.hashes.extend(hashes);
    }
    let node = Arc::new(SimNode { id, shared: Arc::clone(&shared), table, setup });
    inner.nodes.insert(id, Arc::clone(&node));
    drop(inner);

    world.spawn(Some(id), Arc::clone(&shared).apply());
    let (ready, first_attempt) = oneshot::channel();
    world.spawn(Some(id), keeper::keep(Arc::clone(&shared), Some(ready)));
    world.spawn(Some(id), clock(Arc::clone(&shared)));
    let (store, source) = (Arc::downgrade(&node.table.store), Arc::clone(&node.table.source));
    if setup.refill > 0 {
        let refill = refill::after_gaps(store.clone(), Arc::clone(&source), Arc::clone(&shared), setup.refill);
        world.spawn(Some(id), refill);
    }
    if let Some(due) = due {
        world.spawn(Some(id), refresh::run(due, store, source, shared));
    }
    first_attempt
}

/// The clock thread.
async fn clock(shared: Arc<Shared>) {
    while !shared.is_stopping() {
        tokio::time::sleep(TICK).await;
        shared.tick();
    }
}

/// What the table looks like now: its triggers are whole when a node starts.
fn trust(world: &World) -> Trust {
    let inner = world.lock();
    let server = &inner.servers[inner.primary];
    Trust { fingerprint: fingerprint(server.catalogue), key: KEY.into(), via: inner.via }
}

pub(super) fn fingerprint(catalogue: u64) -> String {
    format!("catalogue {catalogue}")
}

/// The key of the table.
pub(super) const KEY: &str = "id bigint";
