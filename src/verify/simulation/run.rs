//! One run: a world, its nodes, and what came of it; all from one number.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{sleep, timeout};

use super::{
    dice::Dice,
    executor::{Executor, Tasks},
    faults::{self, Fault},
    node::{self, LEASE, LOAD_MAX, Setup},
    quiet, readers,
    transaction::{self, Plan},
    world::{Inner, World},
};
use crate::{
    config::TICK,
    freshness::Fallback,
    tables::Via,
    verify::{
        checker::{self, Promises, Report, Violation},
        history::{Mode, NodeId, Noted, Time},
    },
};

/// How large a run is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) nodes: u32,
    /// Polls of tasks, after which the faults end.
    pub(super) steps: u64,
    /// All events are to be told.
    pub(super) traced: bool,
}

/// What came of a run.
pub(super) struct Outcome {
    pub(super) steps: u64,
    /// Of everything that happened, in its order.
    pub(super) fingerprint: u64,
    pub(super) report: Report,
    pub(super) counts: BTreeMap<&'static str, u64>,
    pub(super) reads: BTreeMap<&'static str, u64>,
    /// All events, a line each, if they were asked for.
    pub(super) trace: Vec<String>,
    /// Each with the last events of its node and key.
    pub(super) violations: Vec<String>,
}

/// Events of a node and a key that are told of a violation.
const TOLD: usize = 60;

/// Runs a seed.
pub(super) fn run(seed: u64, size: Size) -> Outcome {
    let run = AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without input and output can always be made");
        runtime.block_on(tokio::task::unconstrained(simulate(seed, size)))
    });
    catch_unwind(run).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        Outcome {
            steps: 0,
            fingerprint: 0,
            report: Report::default(),
            counts: BTreeMap::new(),
            reads: BTreeMap::new(),
            trace: Vec::new(),
            violations: vec![format!("panic: {}", text.unwrap_or("(no text)"))],
        }
    })
}

async fn simulate(seed: u64, size: Size) -> Outcome {
    let mut dice = Dice::new(seed ^ 0xd1ce);
    let tasks = Arc::new(Tasks::default());
    let keys = dice.pick(&[3, 8, 24]);
    let via = if dice.once_in(3) { Via::Log } else { Via::Notify };
    let world = World::new(seed, keys, via, Arc::clone(&tasks));
    let mut executor = Executor::new(Arc::clone(&tasks), seed);
    let all = dice.once_in(4);
    let kinds: Vec<_> = Fault::ALL.into_iter().filter(|_| all || dice.once_in(3)).collect();
    // Not the dice: what other runs do is as it was before there were tiers.
    let tiered = seed % 3 == 1;
    let setup = Setup {
        capacity: dice.pick(&[1, 4, 10, 1000]),
        hashed: dice.once_in(3) && !tiered,
        tiered,
        redundant: dice.once_in(3),
        deaf: false,
        inbox_bytes_max: dice.pick(&[2000, 6000, 1 << 20]),
        fallback: Fallback::Bypass,
        refill: dice.pick(&[0, 1000]),
        ttl: dice.pick(&[None, None, Some(Duration::from_millis(200))]),
        reload_after: dice.pick(&[None, None, Some(0.5)]),
        loads_max: dice.pick(&[1, 2, 4]),
        load_keys_max: dice.pick(&[1, 3, 512]),
    };
    let slow = dice.pick(&[u64::MAX, 400, 60]);
    executor.run(&world, story(Arc::clone(&world), size, setup, kinds, slow)).await;
    drop(executor);
    judge(&world, tasks.steps.load(Ordering::Relaxed), size)
}

async fn story(world: Arc<World>, size: Size, setup: Setup, kinds: Vec<Fault>, slow: u64) {
    for id in 0..size.nodes {
        let fallback = world.roll(|dice| match dice.below(6) {
            0 => Fallback::ServeStale { max: Duration::from_millis(300) },
            1 => Fallback::Fail,
            _ => Fallback::Bypass,
        });
        let deaf = world.via() == Via::Log && world.roll(|dice| dice.once_in(2));
        if deaf {
            world.count("node that does not listen");
        }
        let ready = node::start(&world, id, Setup { deaf, fallback, ..setup });
        if !matches!(timeout(quiet::RECOVERY, ready).await, Ok(Ok(Ok(())))) {
            world.found(id, 0, "did not start, and nothing was in the way");
        }
    }
    world.tasks.slow_once_in.store(slow, Ordering::Relaxed);
    for id in 0..size.nodes {
        for _ in 0..3 {
            let node = Arc::clone(&world.lock().nodes[&id]);
            world.lock().readers += 1;
            let it = Arc::clone(&world);
            world.spawn(Some(id), async move {
                readers::read(Arc::clone(&it), node).await;
                it.lock().readers -= 1;
            });
        }
    }
    for n in 0..3 {
        world.lock().writers += 1;
        let it = Arc::clone(&world);
        world.spawn(None, async move {
            write(&it, n).await;
            it.lock().writers -= 1;
        });
    }
    world.spawn(None, flush(Arc::clone(&world)));
    world.spawn(None, faults::storm(Arc::clone(&world), kinds));
    while world.tasks.steps.load(Ordering::Relaxed) < size.steps {
        sleep(Duration::from_millis(5)).await;
    }
    world.tasks.slow_once_in.store(u64::MAX, Ordering::Relaxed);
    quiet::settle(&world).await;
}

/// A writer. The last one follows the address late: while a replaced server answers, it writes there.
async fn write(world: &Arc<World>, n: u64) {
    while world.lock().writing {
        let millis = world.roll(|dice| dice.between(1, 40));
        sleep(Duration::from_millis(millis)).await;
        let (server, plan) = {
            let mut inner = world.lock();
            let inner = &mut *inner;
            let plan = match inner.dice.below(40) {
                0..22 => Plan::Rows(1),
                22..30 => Plan::Rows(3),
                30..32 => Plan::Savepoint(4),
                32..34 => Plan::Rollback(2),
                34..38 => Plan::Move,
                38 => Plan::Bulk,
                _ => Plan::Truncate,
            };
            let replaced = inner.servers.iter().position(|server| server.alive);
            let server = if n == 2 { replaced.unwrap_or(inner.primary) } else { inner.primary };
            (server, plan)
        };
        transaction::run(Arc::clone(world), server, plan).await;
    }
}

/// What the log has is flushed now and then.
async fn flush(world: Arc<World>) {
    while world.lock().writing {
        let millis = world.roll(|dice| dice.between(20, 200));
        sleep(Duration::from_millis(millis)).await;
        let mut inner = world.lock();
        let primary = inner.primary;
        inner.servers[primary].flush();
    }
}

/// What is told by way of the log may be served again after a gap: what happened meanwhile was read.
fn forgive_resumed(inner: &mut Inner) {
    let gaps: Vec<(NodeId, Time)> = inner
        .history
        .notes
        .iter()
        .filter_map(|(node, at, noted)| matches!(noted, Noted::Gap { .. }).then_some((*node, *at)))
        .collect();
    for read in inner.history.reads.iter_mut().filter(|read| read.mode != Mode::Any) {
        let loaded = read.loaded.take();
        let is_between = |(node, at): &(NodeId, Time)| {
            *node == read.node && loaded.is_some_and(|loaded| loaded < *at) && *at < read.start
        };
        if gaps.iter().any(is_between) {
            *inner.counts.entry("row served again after a gap").or_default() += 1;
        }
    }
}

fn judge(world: &World, steps: u64, size: Size) -> Outcome {
    let mut inner = world.lock();
    let inner = &mut *inner;
    // Nodes and lines hold the world, and it holds them.
    let nodes = std::mem::take(&mut inner.nodes);
    inner.events.clear();
    // The lease and the look at it; or a load that was joined while not coherent, and the one after it.
    let bound = (LEASE + TICK).max(2 * LOAD_MAX) + Duration::from_millis(2);
    let promises = Promises { staleness_bound: Time::try_from(bound.as_nanos()).expect("short") };
    if inner.via == Via::Log {
        forgive_resumed(inner);
    }
    let report = checker::check(&inner.history, promises);
    let trace = |node: NodeId, key| inner.trace.of(node, key, TOLD).join("\n");
    let told = |violation: &Violation| format!("{violation}\n{}", trace(violation.node, violation.key));
    let mut violations: Vec<String> = report.violations.iter().map(told).collect();
    for found in &inner.violations {
        let (node, key) = (found.node, found.key);
        violations.push(format!("key {key}, node {node}: {}\n{}", found.what, trace(node, key)));
    }
    let fingerprint = inner.trace.fingerprint();
    let trace = if size.traced { inner.trace.all() } else { Vec::new() };
    let (counts, reads) = (std::mem::take(&mut inner.counts), std::mem::take(&mut inner.reads));
    drop(nodes);
    Outcome { steps, fingerprint, report, counts, reads, trace, violations }
}
