//! What must hold when all faults are over: nodes recover, reads end, nothing is left over, and what is held is true.

use std::{sync::Arc, time::Duration};

use tokio::time::{sleep, timeout};

use super::{
    database::key,
    faults,
    node::{Item, SimNode},
    world::World,
};
use crate::{
    table::Lookup,
    verify::history::{Key, Noted},
};

/// A node is coherent again at the latest this long after all is well: an attempt that began before may have to be given up, and
/// the next ones come after a pause.
pub(super) const RECOVERY: Duration = Duration::from_secs(12);

/// A key is held again this long after one invalidation, under constant load: five loads, and some milliseconds of the scheduler.
const HELD_AGAIN: Duration = Duration::from_millis(60);

const STEP: Duration = Duration::from_millis(1);

/// Ends the faults, waits until all is quiet, and looks.
pub(super) async fn settle(world: &Arc<World>) {
    faults::heal(world);
    let nodes: Vec<_> = world.lock().nodes.values().cloned().collect();
    for node in &nodes {
        let coherent = || node.table.store.is_coherent();
        if !wait(RECOVERY, coherent).await {
            let why = node.shared.status_reason();
            world.found(node.id, 0, format!("not coherent {RECOVERY:?} after all faults are over: {why:?}"));
        }
    }
    // Some work without faults, too.
    sleep(Duration::from_millis(200)).await;
    world.lock().writing = false;
    if !wait(Duration::from_secs(10), || world.lock().writers == 0).await {
        world.found(0, 0, "writers do not end");
    }
    world.lock().reading = false;
    if !wait(Duration::from_secs(30), || world.lock().readers == 0).await {
        world.found(0, 0, "reads do not end");
    }
    for node in &nodes {
        // A load from before may yet show that it read another server, or a line that its server has gone.
        let well = async || wait(RECOVERY, || node.table.store.is_coherent()).await && held_again(world, node).await;
        let mut tries = 20;
        while !well().await {
            tries -= 1;
            if tries == 0 {
                world.found(node.id, 0, "no peace though all is well");
                break;
            }
        }
    }
    for node in &nodes {
        match timeout(Duration::from_secs(5), node.shared.barrier()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => world.found(node.id, 0, format!("a barrier failed when all was well: {error}")),
            Err(_) => world.found(node.id, 0, "a barrier did not end when all was well"),
        }
    }
    if !wait(Duration::from_secs(5), || nodes.iter().all(|node| node.table.store.is_idle())).await {
        world.found(0, 0, "there are flights, keys that wait or runners when nobody reads");
    }
    for node in &nodes {
        look(world, node);
    }
}

/// Lets time pass until something holds, or it is too late.
async fn wait(limit: Duration, holds: impl Fn() -> bool) -> bool {
    let mut left = limit;
    while !holds() {
        if left.is_zero() {
            return false;
        }
        sleep(STEP).await;
        left = left.saturating_sub(STEP);
    }
    true
}

/// After one invalidation, and under constant load, a key is held again soon (X28). `false`: there was a gap, and nothing is
/// concluded.
async fn held_again(world: &Arc<World>, node: &Arc<SimNode>) -> bool {
    let hot = key(0);
    let gaps = || node.shared.look(|it| it.gaps());
    let before = gaps();
    let readers: Vec<_> = (0..4)
        .map(|_| {
            let (tell, told) = tokio::sync::oneshot::channel::<()>();
            let (it, node) = (Arc::clone(world), Arc::clone(node));
            world.spawn(Some(node.id), async move {
                let mut told = told;
                while told.try_recv() == Err(tokio::sync::oneshot::error::TryRecvError::Empty) {
                    let _ = node.table.get(&hot).await;
                    it.pause(1).await;
                }
            });
            tell
        })
        .collect();
    sleep(Duration::from_millis(30)).await;
    node.table.store.invalidate(&hot);
    let held = wait(HELD_AGAIN, || node.table.peek(&hot).is_known()).await;
    let conclusive = gaps() == before;
    if conclusive && !held {
        world.found(node.id, hot, format!("not held {HELD_AGAIN:?} after one invalidation (X28)"));
    }
    drop(readers);
    sleep(Duration::from_millis(20)).await;
    conclusive
}

/// Looks at what is held, and at what must always add up.
fn look(world: &World, node: &SimNode) {
    let keys = world.lock().keys;
    let held: Vec<(Key, Lookup<Item>)> = (0..keys).map(|n| (key(n), node.table.peek(&key(n)))).collect();
    for (key, held) in held {
        let seen = match held {
            Lookup::Row(row) => Some(row.version()),
            Lookup::Absent => None,
            Lookup::Unknown => continue,
        };
        let at = world.stamp();
        world.lock().history.notes.push((node.id, at, Noted::Holds { key, seen }));
    }
    let stats = node.table.stats();
    if stats.gets != stats.hits + stats.stale + stats.misses
        || stats.misses != stats.led + stats.joined + stats.declined
    {
        world.found(node.id, 0, format!("gets do not add up: {stats:?}"));
    }
    if stats.loads != stats.published + stats.voided + stats.uncached + stats.failed {
        world.found(node.id, 0, format!("loads do not add up: {stats:?}"));
    }
    let it = stats.tier;
    if it.asked != it.hits + it.misses + it.refused + it.unreadable + it.failed + it.awaited_in_vain {
        world.found(node.id, 0, format!("what came of asking the tier does not add up: {it:?}"));
    }
    for key in node.table.store.unindexed() {
        world.found(node.id, key, "held, and not in the index of hashes");
    }
    let most = 2 * node.setup.capacity as u64 + 64;
    if stats.entries > most {
        world.found(node.id, 0, format!("{} entries in a cache of {}", stats.entries, node.setup.capacity));
    }
    let mut inner = world.lock();
    let (node, table) = (node.shared.counters.snapshot(), stats);
    for (what, n) in [
        ("overflow", node.overflows),
        ("unreadable message", node.unreadable),
        ("eviction", table.evicted),
        ("voided load", table.voided),
        ("uncached load", table.uncached),
        ("joined load", table.joined),
        ("stale hit", table.stale),
        ("refilled row", table.refilled),
        ("row read again", table.refreshed),
        ("expired entry", table.expired),
        ("clear", table.clears),
        ("row taken from the tier", table.tier.hits),
        ("row of the tier that was too old", table.tier.refused),
        ("row of the tier that was none", table.tier.unreadable),
        ("key that another node was loading", table.tier.awaited),
        ("tier that did not answer", table.tier.failed),
    ] {
        *inner.counts.entry(what).or_default() += n;
    }
}
