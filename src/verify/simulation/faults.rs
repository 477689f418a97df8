//! What goes wrong. Each run has some kinds of fault and not others, so that none hides what another one would show.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    channel::Wire,
    node::SimNode,
    trace::What,
    transaction::{self, any_key},
    world::{Inner, Weather, World},
};
use crate::{
    change::{CHANNEL, Change, RowKey, Rows},
    key::KeyPart,
    verify::history::Outcome,
};

/// A kind of fault. Those that befall single loads, commits and callers are counted where they do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    SlowChannel,
    Stall,
    Cut,
    StopNode,
    Crash,
    Failover,
    TriggersOff,
    Refuse,
    FailingConnects,
    FailingLoads,
    SlowLoads,
    StuckCommits,
    Forgery,
    Flood,
    Trim,
}

impl Fault {
    pub(super) const ALL: [Self; 15] = [
        Self::SlowChannel,
        Self::Stall,
        Self::Cut,
        Self::StopNode,
        Self::Crash,
        Self::Failover,
        Self::TriggersOff,
        Self::Refuse,
        Self::FailingConnects,
        Self::FailingLoads,
        Self::SlowLoads,
        Self::StuckCommits,
        Self::Forgery,
        Self::Flood,
        Self::Trim,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SlowChannel => "slow channel",
            Self::Stall => "stalled line",
            Self::Cut => "cut line",
            Self::StopNode => "stopped node",
            Self::Crash => "crash",
            Self::Failover => "failover",
            Self::TriggersOff => "triggers off and on",
            Self::Refuse => "server refuses connections",
            Self::FailingConnects => "connections fail at times",
            Self::FailingLoads => "loads fail at times",
            Self::SlowLoads => "loads are slow at times",
            Self::StuckCommits => "commits are stuck at times",
            Self::Forgery => "forged message",
            Self::Flood => "flood",
            Self::Trim => "change log trimmed",
        }
    }
}

/// Lets faults happen until there is an end to it.
pub(super) async fn storm(world: Arc<World>, kinds: Vec<Fault>) {
    while world.lock().stormy && !kinds.is_empty() {
        let millis = world.roll(|dice| dice.between(5, 250));
        sleep(Duration::from_millis(millis)).await;
        if !world.lock().stormy {
            return;
        }
        let fault = world.roll(|dice| dice.pick(&kinds));
        world.note(None, What::Fault(fault.name()));
        world.count(fault.name());
        strike(&world, fault);
    }
}

fn strike(world: &Arc<World>, fault: Fault) {
    let millis = world.roll(|dice| dice.between(20, 600));
    let lasts = Duration::from_millis(millis);
    let fine = Weather::FINE;
    match fault {
        Fault::SlowChannel => weather(world, lasts, |it| it.delay = 120, move |it| it.delay = fine.delay),
        Fault::FailingConnects => {
            weather(world, lasts, |it| it.connect_fails = 2, move |it| it.connect_fails = fine.connect_fails);
        }
        Fault::FailingLoads => weather(world, lasts, |it| it.load_fails = 3, move |it| it.load_fails = fine.load_fails),
        Fault::SlowLoads => weather(world, lasts, |it| it.load_slow = 3, move |it| it.load_slow = fine.load_slow),
        Fault::StuckCommits => weather(world, lasts, |it| it.stuck = 4, move |it| it.stuck = fine.stuck),
        Fault::Stall => {
            let until = u64::try_from((world.now() + lasts).as_millis()).expect("a run is short");
            if let Some(wire) = any_line(world) {
                wire.hold(until);
            }
        }
        Fault::Cut => {
            if let Some(wire) = any_line(world) {
                wire.cut();
            }
        }
        Fault::StopNode => {
            let nodes: Vec<Arc<SimNode>> = world.lock().nodes.values().cloned().collect();
            let n = world.roll(|dice| dice.below(nodes.len()));
            world.spawn(None, stop(Arc::clone(world), Arc::clone(&nodes[n]), 3 * lasts));
        }
        Fault::Crash => crash(world, lasts),
        Fault::Failover => failover(world),
        Fault::TriggersOff => world.spawn(None, triggers_off(Arc::clone(world), lasts / 3)),
        Fault::Refuse => {
            let at = {
                let mut inner = world.lock();
                let at = inner.primary;
                inner.servers[at].refuses = true;
                at
            };
            later(world, lasts, move |inner| inner.servers[at].refuses = false);
        }
        Fault::Forgery => forge(world),
        Fault::Trim => trim(world, lasts),
        Fault::Flood => {
            for _ in 0..40 {
                let key = any_key(&mut world.lock());
                let payload = requested(key, "flood").to_payload();
                send(world, None, payload);
            }
        }
    }
}

fn weather(
    world: &Arc<World>,
    lasts: Duration,
    begin: impl FnOnce(&mut Weather),
    end: impl FnOnce(&mut Weather) + Send + 'static,
) {
    begin(&mut world.lock().weather);
    later(world, lasts, move |inner| end(&mut inner.weather));
}

fn later(world: &Arc<World>, after: Duration, what: impl FnOnce(&mut Inner) + Send + 'static) {
    let it = Arc::clone(world);
    world.spawn(None, async move {
        sleep(after).await;
        what(&mut it.lock());
    });
}

/// The log is trimmed, while a node is away as like as not.
fn trim(world: &Arc<World>, lasts: Duration) {
    let at = {
        let mut inner = world.lock();
        let at = inner.primary;
        if inner.dice.once_in(2) {
            trim_now(&mut inner, at);
            return;
        }
        inner.servers[at].refuses = true;
        at
    };
    if let Some(wire) = any_line(world) {
        wire.cut();
    }
    later(world, lasts, move |inner| {
        trim_now(inner, at);
        inner.servers[at].refuses = false;
    });
}

/// For age, with all that has ended below the oldest; or what wrote late to a bin that is empty otherwise; or a whole bin, and
/// transactions run that are older.
fn trim_now(inner: &mut Inner, at: usize) {
    let kind = inner.dice.below(3);
    let server = &mut inner.servers[at];
    let at_least = match kind {
        0 => server.xmin(),
        1 => 0,
        _ => u64::MAX,
    };
    server.trim(at_least);
}

/// One of the lines that are open, or were.
fn any_line(world: &World) -> Option<Arc<Wire>> {
    let mut inner = world.lock();
    inner.lines.retain(|(_, wire)| wire.strong_count() > 0);
    let n = inner.lines.len();
    if n == 0 {
        return None;
    }
    let at = inner.dice.below(n);
    inner.lines[at].1.upgrade()
}

/// Stops a whole process. When it goes on, its clock thread comes first: what happens otherwise is outside of the promise.
async fn stop(world: Arc<World>, node: Arc<SimNode>, lasts: Duration) {
    world.tasks.stop(node.id);
    sleep(lasts).await;
    node.shared.tick();
    world.tasks.resume(node.id);
}

fn crash(world: &Arc<World>, lasts: Duration) {
    let at = {
        let mut inner = world.lock();
        let canary = inner.dice.roll();
        let old = inner.primary;
        let (mut new, lost) = inner.servers[old].crash(canary);
        new.refuses = true;
        follow(&mut inner, new, lost);
        (inner.pool_at, inner.listener_at) = (inner.primary, inner.primary);
        inner.primary
    };
    later(world, lasts, move |inner| inner.servers[at].refuses = false);
}

/// A standby is promoted. The old primary goes on for a while, for those who do not know; addresses lead to the new one at
/// different times.
fn failover(world: &Arc<World>) {
    let [pool, listener, end] = {
        let mut inner = world.lock();
        if inner.is_split() {
            return;
        }
        let (canary, lag) = (inner.dice.roll(), inner.dice.below(4));
        let old = inner.primary;
        let (new, lost) = inner.servers[old].promote(canary, lag);
        follow(&mut inner, new, lost);
        let mut after = |low, high| Duration::from_millis(inner.dice.between(low, high));
        let times = [after(0, 400), after(0, 400), after(200, 1500)];
        later(world, times[2], move |inner| inner.servers[old].end());
        times
    };
    later(world, pool.min(end), |inner| inner.pool_at = inner.primary);
    later(world, listener.min(end), |inner| inner.listener_at = inner.primary);
}

fn follow(inner: &mut Inner, new: super::database::Server, lost: Vec<u64>) {
    let with = inner.servers[inner.primary].era;
    inner.servers.push(new);
    inner.primary = inner.servers.len() - 1;
    if !lost.is_empty() {
        *inner.counts.entry("lost commit").or_default() += 1;
    }
    for number in lost {
        inner.outcome(number, Outcome::Lost { with });
    }
}

/// Somebody switches the triggers off, and on again. That takes a lock that waits for writers.
async fn triggers_off(world: Arc<World>, lasts: Duration) {
    for on in [false, true] {
        loop {
            let (at, table) = {
                let inner = world.lock();
                (inner.primary, Arc::clone(&inner.servers[inner.primary].locks.table))
            };
            let _alone = table.write_owned().await;
            let mut inner = world.lock();
            // Another server may have become the primary meanwhile.
            if inner.primary == at {
                set_triggers(&mut inner, at, on);
                break;
            }
        }
        sleep(lasts).await;
    }
}

fn set_triggers(inner: &mut Inner, at: usize, on: bool) {
    let server = &mut inner.servers[at];
    if server.triggers_on != on {
        server.triggers_on = on;
        server.catalogue = server.catalogue.wrapping_add(1);
    }
}

fn requested(key: i64, text: &str) -> Change {
    let mut change = Change::requested(super::node::TABLE, Rows::Keys(vec![RowKey::new(&[KeyPart::Int(key)])]));
    change.columns.insert("forged".into(), vec![KeyPart::Text(text.repeat(20).into())]);
    change
}

fn send(world: &Arc<World>, channel: Option<String>, payload: String) {
    let it = Arc::clone(world);
    let at = world.lock().primary;
    world.spawn(None, async move {
        let _ = transaction::notify(it, at, channel, move |_| payload, None).await;
    });
}

/// Anybody who may connect can send anything, to any channel that he knows (I5).
fn forge(world: &Arc<World>) {
    let (kind, key, own, token, fence) = {
        let mut inner = world.lock();
        let (kind, key) = (inner.dice.below(6), any_key(&mut inner));
        let nodes = inner.nodes.len();
        let n = inner.dice.below(nodes);
        let own = inner.nodes.values().nth(n).map(|node| node.shared.own_channel.clone());
        let fence = inner.servers[inner.primary].queue.iter().rev().find(|it| it.channel == own).cloned();
        (kind, key, own, inner.tokens.last().copied(), fence)
    };
    let wild = |nonce: &str| format!(r#"{{"v":1,"f":"{nonce}","s":"99999999:99999999:","l":99999999}}"#);
    let nobody = "00000000-0000-4000-8000-000000000000";
    match kind {
        0 => send(world, None, "garbage".into()),
        1 => send(world, None, wild(nobody)),
        2 => send(world, own, wild(nobody)),
        3 => {
            // A fence of the node's, once more, with a position of the stranger's.
            let nonce = fence.as_ref().and_then(|fence| fence.payload.split('"').nth(5)).unwrap_or(nobody);
            send(world, own, wild(nonce));
        }
        // In the name of a transaction that exists, about another row.
        4 => {
            let change = Change { xid: token.map(|(token, _)| token.xid), ..requested(key, "x") };
            send(world, None, change.to_payload());
        }
        _ => send(world, None, format!(r#"{{"v":1,"t":"public.items","{CHANNEL}":[{key}]}}"#)),
    }
}

/// All is well again.
pub(super) fn heal(world: &World) {
    let stopped: Vec<_> = {
        let mut inner = world.lock();
        let inner = &mut *inner;
        inner.stormy = false;
        inner.weather = Weather::FINE;
        let primary = inner.primary;
        for at in 0..inner.servers.len() {
            inner.servers[at].refuses = false;
            if at != primary {
                inner.servers[at].end();
            }
        }
        // Triggers that are off come on again by themselves: whoever switches them on waits for those who wrote without.
        (inner.pool_at, inner.listener_at) = (primary, primary);
        inner.nodes.values().cloned().collect()
    };
    for node in stopped.into_iter().filter(|node| world.tasks.is_stopped(node.id)) {
        node.shared.tick();
        world.tasks.resume(node.id);
    }
}
