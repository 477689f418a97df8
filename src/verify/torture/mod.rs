//! `rowcache-verify torture`: the promise, held against real Postgres while everything goes wrong.
//!
//! ```text
//! world    servers, eras                    faults   what is done to all of them
//! writer   transactions ──→ Postgres ──→ proxies ──→ node processes: readers, writers, events
//! notes    what all of them noted ──→ a history ──→ the checker
//! ```
//!
//! A run is a row of episodes: load, one fault and its end, rest, a comparison of all that is held, a check. Nothing is kept from
//! one to the next but the last version of each key.

mod episode;
mod faults;
mod node;
mod nodes;
mod notes;
mod plan;
mod quiet;
mod readers;
mod table;
mod tally;
mod timeline;
mod wire;
mod world;
mod writer;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

pub(super) use self::node::run as run_node;
use self::{episode::Run, faults::Fault};
use crate::cli::signals::Signals;

pub(super) const HELP: &str = "\
Examples:
  rowcache-verify torture --seconds 60
  rowcache-verify torture --minutes 240 --seed 7
  rowcache-verify torture --faults crash,promote --minutes 10 --postgres-bin /usr/lib/postgresql/18/bin

It starts a throw-away Postgres and several processes, each a node with its tables open, writes and
reads in every mode, and breaks things, one at a time. Every write and every read is noted, and the
notes of each episode are checked. Exit status 0: nothing was found, and nothing was left untried.
1: something was; the shortest story that shows it, where the notes are, and how to play the episode
again are printed. One of the tables has a tier in front of it if `redis-server` is installed. An episode played again has the same fault and the same plans, though not the
same timing.

Faults: calm, terminate, kill-backend, freeze-listener, freeze-writer, freeze-node, kill-node,
network, crash, promote, sync, flood, forged, ddl, storm, panic, tier. `docs/torture.md` says what they do.";

#[derive(clap::Args)]
pub(super) struct Options {
    /// Ends after this long, with the episode that is under way.
    #[arg(long, value_name = "N", default_value_t = 3)]
    minutes: u64,
    /// The same in seconds: for a short run.
    #[arg(long, value_name = "N", conflicts_with = "minutes")]
    seconds: Option<u64>,
    /// Ends after so many episodes.
    #[arg(long, value_name = "N", conflicts_with_all = ["minutes", "seconds"])]
    episodes: Option<u64>,
    /// What faults, plans and pauses are drawn from. Default: another one each time.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Node processes: in turn one with room for all, one that evicts, and one with two lines.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=12))]
    nodes: u32,
    /// All tables are told by way of the change log, and every second node does not listen. Default: one of three tables, and all
    /// nodes do.
    #[arg(long)]
    log: bool,
    /// Only these faults.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    faults: Vec<Fault>,
    /// The programs of the Postgres to use. Default: what is found on this machine.
    #[arg(long, value_name = "DIR")]
    postgres_bin: Option<PathBuf>,
    /// Where notes of a failed episode go. Default: the directory for temporary files.
    #[arg(long, value_name = "DIR")]
    notes: Option<PathBuf>,
}

/// Runs until the time is over, something is found, or a signal comes. Nothing is left behind but the notes of what was found.
pub(super) async fn torture(options: &Options) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    tokio::select! {
        code = run(options) => code,
        () = signals.next() => {
            eprintln!("interrupted");
            Ok(ExitCode::from(130))
        }
    }
}

async fn run(options: &Options) -> Result<ExitCode> {
    let first: u64 = options.seed.unwrap_or_else(|| rand::rng().random_range(1..1_000_000));
    let list = if options.faults.is_empty() { faults::ALL.to_vec() } else { options.faults.clone() };
    let length = options.seconds.map_or(Duration::from_secs(options.minutes * 60), Duration::from_secs);
    let began = Instant::now();
    let mut run = Run::start(options, first).await.context("cannot begin")?;
    // The first episode has the seed of the run, so that any episode can be played as the first.
    let (mut seed, mut seeds, mut deck) = (first, StdRng::seed_from_u64(first), Vec::new());
    let found = loop {
        let mut rng = StdRng::seed_from_u64(seed);
        let fault = draw(&list, &mut deck, &mut seeds);
        let played = run.episode(fault, seed, &mut rng).await;
        let played =
            played.with_context(|| format!("episode of {fault}, seed {seed}; the nodes said:\n{}", run.logs()))?;
        if let Some(found) = played {
            break Some((found, fault, seed));
        }
        let over = options.episodes.map_or(began.elapsed() >= length, |episodes| run.tally.episodes >= episodes);
        if over {
            break None;
        }
        seed = seeds.random_range(1..1_000_000_000);
    };
    eprint!("{}", run.tally.table());
    if let Some((found, fault, seed)) = found {
        println!("{found}");
        let bin =
            options.postgres_bin.as_ref().map(|dir| format!(" --postgres-bin {}", dir.display())).unwrap_or_default();
        println!(
            "again: rowcache-verify torture --seed {seed} --episodes 5 --nodes {} --faults {fault}{}{bin}",
            options.nodes,
            if options.log { " --log" } else { "" }
        );
        return Ok(ExitCode::FAILURE);
    }
    // One short episode need not have everything.
    let untried = run.tally.untried();
    if !untried.is_empty() && options.episodes.is_none() {
        println!("nothing was found, but {}: run it for longer", untried.join("; "));
        return Ok(ExitCode::FAILURE);
    }
    println!("nothing found in {} episodes, seed {first}", run.tally.episodes);
    Ok(ExitCode::SUCCESS)
}

/// Each fault once, in any order, before one comes again.
fn draw(list: &[Fault], deck: &mut Vec<Fault>, rng: &mut StdRng) -> Fault {
    if deck.is_empty() {
        deck.extend(list);
    }
    deck.swap_remove(rng.random_range(0..deck.len()))
}
