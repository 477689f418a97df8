//! What tracking a table costs its writers and the server, and how soon nodes know: NOTIFY, the change log, the trigger that most
//! articles show, and no trigger, by turns on one real server.

mod cost;
mod growth;
mod load;
mod setup;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::Result;

use load::{Outcome, Run};
use setup::{Flush, Ground, Variant};

pub(super) const HELP: &str = "\
Examples:
  rowcache-verify transports                            all parts, some minutes
  rowcache-verify transports --rounds 5 --seconds 5     longer
  rowcache-verify transports --only bulk

Everything runs on this machine: a throw-away server, the writers, and the nodes in one process. Compare within one run.";

#[derive(clap::Args)]
pub(super) struct Options {
    /// How often each variant has its turn.
    #[arg(long, default_value_t = 3, value_name = "N")]
    rounds: u32,
    /// How long a turn takes.
    #[arg(long, default_value_t = 3, value_name = "SECONDS")]
    seconds: u64,
    /// Writers, each with a connection of its own.
    #[arg(long, default_value_t = 16, value_name = "N")]
    writers: usize,
    /// Nodes that have the table open.
    #[arg(long, default_value_t = 8, value_name = "N")]
    nodes: usize,
    /// Rows of the table that is written row by row.
    #[arg(long, default_value_t = 200_000, value_name = "N")]
    rows: i64,
    /// Rows of the statement that changes all rows of a table.
    #[arg(long, default_value_t = 1_000_000, value_name = "N")]
    bulk_rows: i64,
    /// Transactions that write to the change log, to see how large that becomes.
    #[arg(long, default_value_t = 3_000_000, value_name = "N")]
    log_messages: u32,
    /// Only this part.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// The directory of Postgres' programs. Default: what is found on this machine.
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Throughput of writers, and how soon nodes know.
    Writers,
    /// One statement that changes every row.
    Bulk,
    /// What nodes that poll cost the server.
    Polls,
    /// What the change log holds after millions of transactions.
    Growth,
}

pub(super) async fn measure(options: &Options) -> Result<ExitCode> {
    let wants = |part| options.only.is_none_or(|only| only == part);
    let mut ground = Ground::new(options.bin.clone()).await?;
    println!("PostgreSQL {}\n", ground.version().await?);
    if wants(Part::Writers) {
        ground.fill(options.rows).await?;
        for flush in [Flush::Fast, Flush::Slow] {
            writers(options, &ground, flush).await?;
        }
    }
    if wants(Part::Polls) {
        ground.fill(1000).await?;
        polls(options, &ground).await?;
    }
    if wants(Part::Growth) {
        ground.fill(1000).await?;
        growth::print(&ground, options.log_messages).await?;
    }
    if wants(Part::Bulk) {
        ground.fill(options.bulk_rows).await?;
        bulk(options, &ground).await?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn writers(options: &Options, ground: &Ground, flush: Flush) -> Result<()> {
    println!(
        "{} writers, one row a commit, {}; {} nodes\n\n| | commits/s | of no trigger | server CPU µs a commit | known after ms: p50 | p99 |",
        options.writers,
        flush.text(),
        options.nodes,
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    let mut outcomes: Vec<Vec<Outcome>> = Variant::ALL.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.rounds {
        for (variant, outcomes) in Variant::ALL.into_iter().zip(&mut outcomes) {
            let run = Run { variant, flush, writers: options.writers, nodes: options.nodes, rows: options.rows };
            outcomes.push(run.measure(ground, Duration::from_secs(options.seconds)).await?);
        }
    }
    let bare: Vec<f64> = outcomes[0].iter().map(|it| it.commits_a_second).collect();
    for (variant, outcomes) in Variant::ALL.into_iter().zip(outcomes) {
        let of_bare = median(outcomes.iter().zip(&bare).map(|(it, bare)| it.commits_a_second / bare));
        let known = |percent: usize| {
            let mut all: Vec<f64> = outcomes.iter().flat_map(|it| it.known_after_ms.iter().copied()).collect();
            all.sort_by(f64::total_cmp);
            all.get(all.len() * percent / 100).map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"))
        };
        println!(
            "| {} | {:.0} | {of_bare:.2} | {:.0} | {} | {} |",
            variant.text(),
            median(outcomes.iter().map(|it| it.commits_a_second)),
            median(outcomes.iter().map(|it| it.cpu_a_commit)),
            known(50),
            known(99),
        );
    }
    println!();
    Ok(())
}

async fn bulk(options: &Options, ground: &Ground) -> Result<()> {
    println!("One statement that changes {} rows, no node\n\n| | seconds | of no trigger |", options.bulk_rows);
    println!("| --- | ---: | ---: |");
    let mut taken: Vec<Vec<f64>> = Variant::ALL.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.rounds {
        for (variant, taken) in Variant::ALL.into_iter().zip(&mut taken) {
            taken.push(ground.bulk(variant).await?);
        }
    }
    let bare = taken[0].clone();
    for (variant, taken) in Variant::ALL.into_iter().zip(taken) {
        let of_bare = median(taken.iter().zip(&bare).map(|(it, bare)| it / bare));
        println!("| {} | {:.2} | {of_bare:.2} |", variant.text(), median(taken.iter().copied()));
    }
    println!();
    Ok(())
}

async fn polls(options: &Options, ground: &Ground) -> Result<()> {
    println!("What nodes that poll cost the server: CPU in percent of one core\n");
    println!("| nodes | no changes | 100 changes a second | 100 changes a second with NOTIFY |");
    println!("| ---: | ---: | ---: | ---: |");
    let seconds = Duration::from_secs(options.seconds);
    let nothing = load::cost_of_nodes(ground, Variant::Log, 0, true, seconds).await?;
    for nodes in [1, 8, 32] {
        let idle = load::cost_of_nodes(ground, Variant::Log, nodes, false, seconds).await?;
        let busy = load::cost_of_nodes(ground, Variant::Log, nodes, true, seconds).await?;
        let notify = load::cost_of_nodes(ground, Variant::Notify, nodes, true, seconds).await?;
        println!("| {nodes} | {idle:.1} | {:.1} | {:.1} |", busy - nothing, notify - nothing);
    }
    println!("\nWriting 100 rows a second without any node takes {nothing:.1}; the last two columns are without it.\n");
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
