//! Runs suites, one after the other, and says what has become worse since they were run last.

use std::{
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use clap::Parser;
use rowcache::cli::report;
use rowcache_bench::suite::{self, SUITES};

/// Measures rowcache beside its alternatives, on throw-away servers, and writes docs/benchmarks.md.
#[derive(Parser)]
#[command(after_help = "\
Suites: hit miss change writers storm gap fence memory ratio service http tier scale.

Everything runs on this machine, and what else runs there shows: leave it alone meanwhile. The exit status is 1 if a ratio is worse than
in the last report of a like machine by more than 15 %, and 2 if a suite could not be run.")]
struct Cli {
    /// Only these suites
    suites: Vec<String>,
    /// Measures little, to see that everything runs, and writes nothing
    #[arg(long)]
    short: bool,
    /// The directory of Postgres' programs. Default: what is found on this machine
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
    /// Public traces of cache accesses, for the suite `ratio`
    #[arg(long, value_name = "DIR")]
    traces: Option<PathBuf>,
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let unknown = cli.suites.iter().find(|name| !SUITES.contains(&name.as_str()));
    if let Some(name) = unknown {
        anyhow::bail!("there is no suite {name}; there are {}", SUITES.join(", "));
    }
    let reports = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/benchmarks"));
    let before = suite::reports(&reports)?;
    let mut failed = Vec::new();
    for name in SUITES.iter().filter(|name| cli.suites.is_empty() || cli.suites.iter().any(|it| it == *name)) {
        let mut command = Command::new(env!("CARGO"));
        command.args(["bench", "--quiet", "--manifest-path", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]);
        command.args(["--bench", name, "--"]);
        if cli.short {
            command.arg("--short");
        }
        for (option, directory) in [("--bin", &cli.bin), ("--traces", &cli.traces)] {
            if let Some(directory) = directory {
                command.arg(option).arg(std::path::absolute(directory)?);
            }
        }
        println!();
        if !command.status().context("cargo does not start")?.success() {
            failed.push(*name);
        }
    }
    let (compared, worse) = suite::worse(&before, &suite::reports(&reports)?);
    println!();
    if !cli.short {
        println!("{compared} ratios compared with the last reports of a machine like this one, {} worse", worse.len());
    }
    for line in &worse {
        println!("WORSE {line}");
    }
    if !failed.is_empty() {
        println!("these suites failed, see above: {}", failed.join(", "));
        return Ok(ExitCode::from(2));
    }
    Ok(if worse.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn main() -> ExitCode {
    run(&Cli::parse()).unwrap_or_else(|error| report(&error))
}
