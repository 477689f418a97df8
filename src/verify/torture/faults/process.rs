//! Processes that hang: they keep their connections, their locks and their places in queues, and do nothing.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rand::{Rng as _, rngs::StdRng};

use super::{Done, Shows, choose, hold};
use crate::verify::torture::{nodes::Nodes, world::World};

/// The server processes of connections whose name is like this.
pub(super) async fn backends(world: &World, like: &str, which: &str) -> Result<Vec<i32>> {
    let sql = format!("select pid from pg_stat_activity where application_name like $1 and {which}");
    let rows = world.client().await?.query(&sql, &[&like]).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// A process that was stopped; it goes on when this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn new(pid: i32) -> Result<Self> {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).context("it has ended")?;
        Ok(Self(Pid::from_raw(pid)))
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT); // it may have ended
    }
}

pub(super) async fn freeze_listener(world: &World, nodes: &Nodes, rng: &mut StdRng) -> Result<Done> {
    let id = choose(&nodes.all, rng).context("there are nodes")?.id;
    // Of a node that does not listen, the one that polls.
    let pids = match &backends(world, &format!("torture {id} (listener%"), "true").await?[..] {
        [] => backends(world, &format!("torture {id} (control%"), "true").await?,
        listeners => listeners.to_vec(),
    };
    let pid = *choose(&pids, rng).context("it has a listener")?;
    let stopped = Stopped::new(pid)?;
    // Longer than reads may be behind: the lease has to end it.
    hold(rng, 1500..9000).await;
    drop(stopped);
    Ok(Done::new(format!("of node {id}"), Shows::Line))
}

pub(super) async fn freeze_writer(world: &World, rng: &mut StdRng) -> Result<Done> {
    // In its commit, if one can be met there: it then holds the lock that orders notifications.
    let mut met = Vec::new();
    for _ in 0..50 {
        met = backends(world, "torture writer", "state = 'active' and query = 'commit'").await?;
        if !met.is_empty() {
            break;
        }
    }
    if met.is_empty() {
        met = backends(world, "torture writer", "true").await?;
    }
    let Some(pid) = choose(&met, rng) else { return Ok(Done::new("there was none", Shows::Itself(false))) };
    let Ok(stopped) = Stopped::new(*pid) else { return Ok(Done::new("it had ended", Shows::Itself(false))) };
    hold(rng, 500..3000).await;
    drop(stopped);
    Ok(Done::new("", Shows::Itself(true)))
}

pub(super) async fn freeze_node(world: &mut World, nodes: &Nodes, rng: &mut StdRng) -> Result<Done> {
    let node = choose(&nodes.all, rng).context("there are nodes")?;
    let from = world.now();
    node.freeze(Duration::from_millis(rng.random_range(200..4000))).await?;
    let went_on = world.now();
    world.timeline.incidents.stopped.push((node.id, from, went_on));
    // A short stop is none.
    let shows = if went_on - from > 2_000_000_000 { Shows::Line } else { Shows::Itself(true) };
    Ok(Done::new(format!("node {} for {} ms", node.id, (went_on - from) / 1_000_000), shows))
}
