//! The `rowcache-budget` program: what a hit and an entry cost beside a bare `quick_cache`, by counts that come out the same each time.
//! It is a gate: what is above its budget fails.
//!
//! A program of its own, as the code that is counted has to be a part of another crate, as it is at the users', and as an allocator
//! that counts is a part of the whole program.

#![forbid(unsafe_code)]

mod entry;
mod hit;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use entry::{Person, Point};
use peak_alloc::PeakAlloc;
use rowcache::{
    Node,
    cli::{logs, report, temp_server::TempServer},
};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// What an entry may take whose row is two numbers. It has 64 bytes more than the bare one, however small its row is.
const SMALL_ENTRY: f64 = 1.85;

/// Counts the instructions of a hit and the bytes of an entry, beside those of the bare store, and fails when they exceed a budget.
///
/// It starts a throw-away Postgres, and needs valgrind. The numbers are those of a release build.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// What is run under callgrind, and the database of it
    #[arg(hide = true, num_args = 2)]
    one: Vec<String>,
}

async fn run(cli: Cli) -> Result<ExitCode> {
    if let [variant, url] = &cli.one[..] {
        hit::run(variant, url).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let server = TempServer::options().setting("fsync", "off").start().await?;
    let url = server.url("postgres");
    let pool = sqlx::PgPool::connect(&url).await?;
    rowcache::migrate::up(&pool).await?;
    for table in [hit::TABLE, Point::TABLE, Person::TABLE] {
        sqlx::raw_sql(table).execute(&pool).await?;
    }
    pool.close().await;
    let mut exceeded = false;
    let mut line = |what: &str, count: f64, unit: &str, bare: f64, budget: Option<f64>| {
        let ratio = count / bare;
        let verdict = match budget {
            Some(budget) if ratio > budget => format!(", budget {budget}x, EXCEEDED"),
            Some(budget) => format!(", budget {budget}x, ok"),
            None => String::new(),
        };
        exceeded |= budget.is_some_and(|budget| ratio > budget);
        println!("{what:<28} {count:>6.1} {unit}: {ratio:.2}x{verdict}");
    };
    let mut bare = None;
    for (variant, budget) in hit::VARIANTS {
        let count = hit::instructions(&[variant, &url])?;
        let bare = *bare.get_or_insert(count);
        line(&format!("a hit, {variant}"), count, "instructions", bare, budget);
    }
    let node = Node::connect(&url).await?;
    let allocated = || ALLOCATOR.current_usage();
    let (bare, ours) = entry::bytes(&node, "persons", Person::nth, allocated).await?;
    line("an entry, bare", bare, "bytes", bare, None);
    line("an entry", ours, "bytes", bare, Some(entry::BUDGET));
    let (bare, ours) = entry::bytes(&node, "points", Point::nth, allocated).await?;
    line("a small entry, bare", bare, "bytes", bare, None);
    line("a small entry", ours, "bytes", bare, Some(SMALL_ENTRY));
    node.shutdown().await;
    Ok(if exceeded { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    logs::start("off");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    match runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run(cli))) {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}
