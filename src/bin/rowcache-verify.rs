//! The `rowcache-verify` program, for who works on rowcache: reads the command line, and leaves the rest to `rowcache::verify`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser as _;
use rowcache::{
    cli::{logs, report},
    verify::Cli,
};

fn main() -> ExitCode {
    let cli = Cli::parse();
    logs::start("off");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(cli.run())) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}
