//! The proof: what shows that the promise holds, and that what shows it can fail.
//!
//! | module | what it does |
//! | --- | --- |
//! | `simulation` | many real nodes in one thread, with a database, a network and a clock that are not real |
//! | `history`, `facts`, `checker`, `story` | what happened in a run, whether it was allowed, and why not |
//!
//! `docs/correctness.md` says what is proved by which of them, and within which bounds.

pub mod checker;
mod facts;
pub mod history;
pub mod simulation;
mod story;

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
            Command::Simulate(what) => Ok(tokio::task::spawn_blocking(move || simulation::simulate(&what)).await?),
        }
    }
}
