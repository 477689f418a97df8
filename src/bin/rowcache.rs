//! The `rowcache` program: reads the command line, sets up logging, and leaves the rest to `rowcache::cli`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use rowcache::cli::{Cli, logs, report};

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(level) = cli.log_level() {
        logs::start(level);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(cli.run())) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}
