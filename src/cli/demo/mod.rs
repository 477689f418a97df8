//! `rowcache demo`: a database, writers, nodes and readers, and a check that never sleeps.
//!
//! ```text
//! world     a Postgres, with the table and its history; who joins in by psql is part of it
//! writers   psql processes ──→ the table ──→ triggers ──→ NOTIFY
//! nodes     each a full `Node`; its follower notes what it has applied ──→ board, checker
//! readers   get rows ──→ checker: never older than a change that was applied before
//! board     what screen and plain show
//! compare   at the end: everything held is what the table holds
//! ```

mod board;
mod checker;
mod compare;
mod nodes;
#[cfg(feature = "serve")]
mod pages;
mod plain;
mod readers;
mod screen;
mod world;
mod writers;

use std::{
    io::{IsTerminal as _, stdin, stdout},
    process::ExitCode,
    sync::{Arc, PoisonError, atomic::Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};

use self::{
    board::{Board, latency_text},
    checker::WAITING_MAX,
    compare::{Comparison, compare},
    nodes::{DemoNode, UNTIMED_MAX, find_latencies},
    world::{World, YOURS},
    writers::{Means, WRITERS},
};
use super::{commit_time::CommitTimes, signals::Signals, text::number};

pub(crate) const HELP: &str = "\
Examples:
  rowcache demo
  rowcache demo --plain --seconds 10
  rowcache demo --database-url postgres://app@localhost/app

Without a database URL it starts a throw-away PostgreSQL (one that is installed, or a download) and
removes it at the end. In a database that you name it makes the schema rowcache_demo, runs the
migrations, and several demos can run at a time; the last one drops the schema again (not with
--keep). Exit status 0: no node returned a row older than a change it had applied, and at the end
every node held what the table held. 1: one did, or nothing could be checked.

Latencies, from the commit to the moment when the row is evicted, are known where the server has
`track_commit_timestamp = on`, as the throw-away one does.";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Rows of the table.
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(2 * YOURS..=10_000_000))]
    rows: u64,
    /// Nodes, each with its own cache and connections.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=16))]
    nodes: u16,
    /// Statements of the writers per second.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=2000))]
    writes_per_second: u16,
    /// Lines instead of a screen. Chosen by itself where the output is no terminal.
    #[arg(long)]
    plain: bool,
    /// Ends by itself after this long.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Each node has a page to look at: the first one on this port, the others on those that follow, or on others if these are taken.
    #[cfg(feature = "serve")]
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// Leaves the schema `rowcache_demo` in the database that was named.
    #[arg(long)]
    keep: bool,
}

/// How to join in, and what there is to see.
struct Invitation {
    psql: String,
    table: &'static str,
    rows: u64,
    writers: String,
    /// Where the nodes can be looked at.
    pages: Vec<String>,
}

impl Invitation {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![
            format!("join in:  {}", self.psql),
            format!("          update {} set name = 'Ada' where id = 42;", self.table),
            format!("rows 1 to {YOURS} are yours; the writers change others, and put back what is gone"),
        ];
        if !self.pages.is_empty() {
            lines.push(format!("look:     {}", self.pages.join("  ")));
        }
        lines
    }
}

/// Runs a demo. The first signal ends it in good order, a second one at once; either way nothing is left behind.
pub(crate) async fn demo(url: Option<&str>, options: &Options) -> Result<ExitCode> {
    let mut signals = Signals::new()?;
    let world = tokio::select! {
        world = World::enter(url, options.rows, options.keep) => world?,
        () = signals.next() => bail!("interrupted while starting"),
    };
    let outcome = run(&world, options, &mut signals).await;
    world.leave().await?;
    outcome
}

async fn run(world: &World, options: &Options, signals: &mut Signals) -> Result<ExitCode> {
    #[cfg(feature = "serve")]
    let sockets = pages::Sockets::bind(options.nodes, options.port)?;
    let mut nodes = Vec::new();
    for index in 0..options.nodes.into() {
        #[cfg(feature = "serve")]
        let address = Some(sockets.address(index));
        #[cfg(not(feature = "serve"))]
        let address = None;
        nodes.push(tokio::select! {
            node = DemoNode::start(index, &world.url, address) => node?,
            () = signals.next() => bail!("interrupted while starting"),
        });
    }
    let board = Board::new(nodes.len(), world.rows);
    let (stop, stopping) = watch::channel(false);
    // Aborted when they are dropped, whatever happens here.
    let mut followers = JoinSet::new();
    let mut workers = JoinSet::new();

    let (untimed, to_time) = mpsc::channel(UNTIMED_MAX);
    followers.spawn(find_latencies(CommitTimes::new(world.pool.clone()), to_time, Arc::clone(&board)));
    let (reads, to_check) = mpsc::channel(WAITING_MAX);
    for node in &nodes {
        let events = node.node.subscribe();
        followers.spawn(Arc::clone(node).follow(events, Arc::clone(&board), untimed.clone()));
        for _ in 0..readers::PER_NODE {
            workers.spawn(readers::read(Arc::clone(node), world.rows, reads.clone(), stopping.clone()));
        }
    }
    drop(reads);
    workers.spawn(checker::check(world.pool.clone(), to_check, Arc::clone(&board.findings)));
    let means = Means { url: world.url.clone(), psql: world.psql() };
    let every = Duration::from_secs(WRITERS).div_f64(options.writes_per_second.into());
    for _ in 0..WRITERS {
        workers.spawn(writers::write(means.clone(), world.rows, every, Arc::clone(&board), stopping.clone()));
    }

    #[cfg(feature = "serve")]
    let addresses = sockets.addresses();
    #[cfg(feature = "serve")]
    let pages = pages::Pages::open(&nodes, sockets, world.rows).await?;
    #[cfg(not(feature = "serve"))]
    let addresses = Vec::new();
    let invitation = invite(world, &means, options, addresses)?;
    let showing = async {
        if options.plain || !stdout().is_terminal() || !stdin().is_terminal() {
            plain::show(&board, &nodes, &invitation).await
        } else {
            screen::show(&board, &nodes, &invitation).await
        }
    };
    let shown = tokio::select! {
        shown = showing => shown,
        () = signals.next() => Ok(()),
        () = sleep(Duration::from_secs(options.seconds.unwrap_or(0))), if options.seconds.is_some() => Ok(()),
        // None of them ends by itself.
        ended = workers.join_next() => ended.context("nothing runs")?.context("a part of the demo failed"),
    };
    stop.send_replace(true);
    eprintln!("stopping, and comparing what the nodes hold with the table");
    let end = async {
        shown?;
        while let Some(ended) = workers.join_next().await {
            ended.context("a part of the demo failed")?;
        }
        compare(&nodes, &world.pool, world.rows).await
    };
    let compared = tokio::select! {
        compared = end => compared?,
        () = signals.next() => bail!("interrupted before the nodes had been compared with the table"),
    };
    let code = sum_up(&board, &nodes, &compared);
    followers.shutdown().await;
    #[cfg(feature = "serve")]
    pages.close().await;
    for node in nodes {
        node.node.shutdown().await;
    }
    code
}

fn invite(world: &World, means: &Means, options: &Options, pages: Vec<String>) -> Result<Invitation> {
    let (url, password) = writers::without_password(&world.url)?;
    // What the user has exported can be pasted without showing the password; otherwise psql asks for it.
    let exported = password.is_some() && std::env::var("DATABASE_URL").is_ok_and(|exported| exported == world.url);
    let psql = if exported { "psql \"$DATABASE_URL\"".to_owned() } else { format!("psql '{url}'") };
    let rate = options.writes_per_second;
    let writers = match &means.psql {
        Some(_) => format!("{WRITERS} psql processes, {rate} a second"),
        None => format!("{WRITERS} plain connections (there is no psql here), {rate} a second"),
    };
    Ok(Invitation { psql, table: world.table_in_psql, rows: world.rows, writers, pages })
}

/// One line, and how the process ends.
fn sum_up(board: &Board, nodes: &[Arc<DemoNode>], compared: &Comparison) -> Result<ExitCode> {
    let stats: Vec<_> = nodes.iter().map(|node| node.users.stats()).collect();
    let (gets, hits) = (stats.iter().map(|it| it.gets).sum::<u64>(), stats.iter().map(|it| it.hits).sum::<u64>());
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let ratio = hits as f64 / gets.max(1) as f64 * 100.0;
    let checked = board.findings.checked.load(Relaxed);
    println!(
        "{} nodes, {} s: {} gets, {ratio:.2} % hits; {} commits, {}; {}; {} entries compared with the table, {} differ",
        nodes.len(),
        board.started.elapsed().as_secs(),
        number(gets),
        number(board.commits.load(Relaxed)),
        latency_text(board.latency()),
        board.checks(),
        number(compared.entries),
        compared.differing.len(),
    );
    if let Some(stale) = &*board.findings.first_stale.lock().unwrap_or_else(PoisonError::into_inner) {
        bail!("{stale}");
    }
    if let Some(differs) = compared.differing.first() {
        bail!("{differs}");
    }
    if checked == 0 {
        let why = board.trouble().unwrap_or_else(|| "run it for longer".to_owned());
        bail!("nothing was checked, as no row was read after a change: {why}");
    }
    Ok(ExitCode::SUCCESS)
}
