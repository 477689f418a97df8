//! The `rowcache-verify` program, for who works on rowcache: reads the command line, and leaves the rest to `rowcache::verify`; but for
//! what has to be compiled as a part of another crate, as it is at the users'.

#![forbid(unsafe_code)]

mod instructions;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Args as _, CommandFactory as _, FromArgMatches as _};
use rowcache::{
    cli::{logs, report},
    verify::Cli,
};

async fn run() -> Result<ExitCode> {
    let matches = Cli::command().subcommand(instructions::Options::augment_args(instructions::command())).get_matches();
    match matches.subcommand() {
        Some((instructions::NAME, options)) => {
            Ok(instructions::count(&instructions::Options::from_arg_matches(options)?).await)
        }
        _ => Cli::from_arg_matches(&matches)?.run().await,
    }
}

fn main() -> ExitCode {
    logs::start("off");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run())) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}
