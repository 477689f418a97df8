//! Everything that is done to the servers, the network, the nodes and the tables while they are used. Each fault heals what it broke.

mod catalogue;
mod network;
mod process;
mod queue;
mod server;
mod tier;

use std::{fmt, str::FromStr, time::Duration};

use anyhow::{Context as _, Result, bail};
use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::time::sleep;

use super::{nodes::Nodes, wire::Counts, world::World};

/// Something that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Fault {
    /// None: for comparison.
    Calm,
    /// Connections of nodes are ended by the server.
    Terminate,
    /// A backend is killed, and the server recovers.
    KillBackend,
    /// The backend of a node's listener hangs.
    FreezeListener,
    /// The backend of a writer hangs, perhaps in its commit.
    FreezeWriter,
    /// A node's process is stopped, for longer than its lease.
    FreezeNode,
    /// A node's process is killed, and another one started.
    KillNode,
    /// A node's connections stall, lose all, are late, are reset, or are refused.
    Network,
    /// The server is ended as in a crash, and loses commits.
    Crash,
    /// A standby that lacks commits is promoted, and the old primary runs on.
    Promote,
    /// Commits wait for a standby that does not come, and are cancelled.
    Sync,
    /// Messages by the thousand, and a listener that holds up the queue.
    Flood,
    /// Messages that are forged, or cannot be read.
    Forged,
    /// Triggers, columns and types change while the table is written.
    Ddl,
    /// Readers are cancelled by the hundred.
    Storm,
    /// Rows panic when they are decoded.
    Panic,
    /// The tier is flushed, killed, stopped, or restored from an old dump.
    Tier,
}

/// In this order they are listed.
pub(super) const ALL: [Fault; 17] = [
    Fault::Calm,
    Fault::Terminate,
    Fault::KillBackend,
    Fault::FreezeListener,
    Fault::FreezeWriter,
    Fault::FreezeNode,
    Fault::KillNode,
    Fault::Network,
    Fault::Crash,
    Fault::Promote,
    Fault::Sync,
    Fault::Flood,
    Fault::Forged,
    Fault::Ddl,
    Fault::Storm,
    Fault::Panic,
    Fault::Tier,
];

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Calm => "calm",
            Self::Terminate => "terminate",
            Self::KillBackend => "kill-backend",
            Self::FreezeListener => "freeze-listener",
            Self::FreezeWriter => "freeze-writer",
            Self::FreezeNode => "freeze-node",
            Self::KillNode => "kill-node",
            Self::Network => "network",
            Self::Crash => "crash",
            Self::Promote => "promote",
            Self::Sync => "sync",
            Self::Flood => "flood",
            Self::Forged => "forged",
            Self::Ddl => "ddl",
            Self::Storm => "storm",
            Self::Panic => "panic",
            Self::Tier => "tier",
        };
        f.pad(name)
    }
}

impl FromStr for Fault {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        match ALL.into_iter().find(|fault| fault.to_string() == name) {
            Some(fault) => Ok(fault),
            None => bail!("there is no fault `{name}`; there are {}", ALL.map(|fault| fault.to_string()).join(", ")),
        }
    }
}

/// What was done, and what shows it.
pub(super) struct Done {
    /// In a few words.
    pub(super) what: String,
    pub(super) shows: Shows,
}

/// Where a fault leaves its mark.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shows {
    /// A line was lost, or a gap noted.
    Line,
    /// A message could not be read.
    Unreadable,
    /// More came than may wait.
    Overflow,
    /// A table was forgotten.
    Cleared,
    /// Loads failed, and rows panicked.
    Panicked,
    Cancelled,
    /// The tier did not answer.
    Tier,
    /// Who did it saw it done.
    Itself(bool),
}

impl Done {
    fn new(what: impl Into<String>, shows: Shows) -> Self {
        Self { what: what.into(), shows }
    }

    /// Whether it can be seen in what the nodes counted and noted meanwhile.
    pub(super) fn is_visible(&self, counts: &Counts, lines_lost: bool) -> bool {
        match self.shows {
            Shows::Line => counts.gaps > 0 || lines_lost,
            Shows::Unreadable => counts.unreadable > 0,
            Shows::Overflow => counts.overflows > 0,
            Shows::Cleared => counts.clears > 0,
            Shows::Panicked => counts.panics > 0 && counts.failed > 0,
            Shows::Cancelled => counts.cancelled > 0,
            Shows::Tier => counts.tier_failed > 0,
            Shows::Itself(seen) => seen,
        }
    }
}

impl Fault {
    /// Rows panic, one in so many.
    pub(super) fn panics(self) -> Option<u32> {
        (self == Self::Panic).then_some(7)
    }

    /// Does it, and heals it.
    pub(super) async fn strike(self, world: &mut World, nodes: &mut Nodes, rng: &mut StdRng) -> Result<Done> {
        match self {
            Self::Calm => Ok(Done::new("nothing", Shows::Itself(true))),
            Self::Storm => {
                hold(rng, 500..1500).await;
                Ok(Done::new("readers cancelled", Shows::Cancelled))
            }
            Self::Panic => {
                hold(rng, 500..1500).await;
                Ok(Done::new("one row in seven", Shows::Panicked))
            }
            Self::Terminate => server::terminate(world, nodes, rng).await,
            Self::KillBackend => server::kill_backend(world, rng).await,
            Self::Crash => server::crash(world).await,
            Self::Sync => server::wait_for_standby(world, rng).await,
            Self::Promote => server::promote(world, nodes, rng).await,
            Self::FreezeListener => process::freeze_listener(world, nodes, rng).await,
            Self::FreezeWriter => process::freeze_writer(world, rng).await,
            Self::FreezeNode => process::freeze_node(world, nodes, rng).await,
            Self::KillNode => {
                let n = rng.random_range(0..nodes.all.len());
                nodes.replace(n, world).await?;
                nodes.all[n].order(super::wire::Order::Go { panics: None, storm: false }).await?;
                Ok(Done::new(format!("node {}", nodes.all[n].id), Shows::Itself(true)))
            }
            Self::Network => network::disturb(nodes, rng).await,
            Self::Flood => queue::flood(world, rng).await,
            Self::Forged => queue::forge(world, rng).await,
            Self::Tier => tier::disturb(world, rng).await,
            Self::Ddl => catalogue::change(world, rng).await,
        }
        .with_context(|| format!("the fault `{self}` could not be produced"))
    }
}

/// Lets a fault last for some milliseconds.
async fn hold(rng: &mut StdRng, millis: std::ops::Range<u64>) {
    sleep(Duration::from_millis(rng.random_range(millis))).await;
}

fn choose<'a, T>(from: &'a [T], rng: &mut StdRng) -> Option<&'a T> {
    from.choose(rng)
}
