//! The proof: what shows that the promise holds, and that what shows it can fail.
//!
//! | module | what it does |
//! | --- | --- |
//! | `model` | every state that the protocol can reach, within bounds |
//! | `simulation` | many real nodes in one thread, with a database, a network and a clock that are not real |
//! | `torture`, `proxy` | real Postgres, real processes, real faults |
//! | `history`, `facts`, `checker`, `story` | what happened in a run, whether it was allowed, and why not |
//! | `mutants` | takes out one protection after another, and sees that something notices |
//!
//! `docs/correctness.md` says what is proved by which of them, and within which bounds.

pub mod checker;
mod facts;
pub mod history;
mod model;
mod mutants;
#[expect(clippy::missing_panics_doc, reason = "a test ground: what the machine refuses ends the run")]
pub mod proxy;
pub mod redis;
pub mod simulation;
mod story;
mod torture;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use simulation::Simulate;

/// Shows that what rowcache promises holds, and that what shows it can fail.
#[derive(Parser)]
#[command(name = "rowcache-verify", version, disable_help_subcommand = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Model(model::Model),
    /// Takes out one protection after another, and sees that something notices.
    #[command(after_help = mutants::HELP)]
    Mutants(mutants::Options),
    /// Runs nodes, writers and readers against a real Postgres, breaks everything, and checks all that was read.
    #[command(after_help = torture::HELP)]
    Torture(torture::Options),
    /// A node of `torture`: a process that it starts, and talks to.
    #[command(hide = true)]
    TortureNode,
    /// Runs many nodes in one thread, with a simulated database, network and clock, from a seed.
    Simulate(Simulate),
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    ///
    /// What kept it from finding out; a violation is no error, but an exit code.
    ///
    /// # Cancel safety
    ///
    /// Not to be cancelled: processes that it started may go on.
    pub async fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Model(model) => tokio::task::spawn_blocking(move || model.run()).await?,
            Command::Mutants(options) => tokio::task::spawn_blocking(move || mutants::run(&options)).await?,
            Command::Torture(options) => torture::torture(&options).await,
            Command::TortureNode => torture::run_node().await,
            Command::Simulate(what) => Ok(tokio::task::spawn_blocking(move || simulation::simulate(&what)).await?),
        }
    }
}
