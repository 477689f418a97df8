//! The demo without a screen: a line about the nodes every second, and some of the commits.

use std::{
    io::{Write as _, stdout},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime},
};

use anyhow::Result;
use tokio::time::interval;

use super::{
    Invitation,
    board::{Board, Commit, NodeLine, latency_text},
    nodes::DemoNode,
};
use crate::{
    Status,
    cli::{text, watch::local},
};

/// Commits printed per second; those that touch rows of who joins in come first.
const COMMITS_MAX: usize = 5;

/// A commit is printed when it is this old: by then every node has seen it.
const SETTLED: Duration = Duration::from_millis(200);

/// Prints until it is dropped, or until nobody reads it any more.
pub(super) async fn show(board: &Board, nodes: &[Arc<DemoNode>], invitation: &Invitation) -> Result<()> {
    for line in invitation.lines() {
        writeln!(stdout(), "{line}")?;
    }
    writeln!(stdout(), "writers: {}", invitation.writers)?;
    let mut ticks = interval(Duration::from_secs(1));
    let mut next = 0;
    ticks.tick().await;
    loop {
        ticks.tick().await;
        let mut commits = board.commits_from(next);
        let settled = |it: &Commit| SystemTime::now().duration_since(it.at).is_ok_and(|age| age > SETTLED);
        commits.retain(settled);
        next = commits.last().map_or(next, |commit| commit.number + 1);
        let mut out = stdout().lock();
        commits.sort_by_key(|commit| !commit.yours);
        let more = commits.len().saturating_sub(COMMITS_MAX);
        commits.truncate(COMMITS_MAX);
        commits.sort_by_key(|commit| commit.number);
        for commit in &commits {
            writeln!(out, "{}", commit_line(commit, nodes.len()))?;
        }
        if more > 0 {
            writeln!(out, "              … and {more} more commits")?;
        }
        if let Some(trouble) = board.trouble() {
            writeln!(out, "              {trouble}")?;
        }
        writeln!(out, "{}", status_line(board, &board.nodes(nodes.iter().map(|node| node.now()))))?;
    }
}

fn commit_line(commit: &Commit, nodes: usize) -> String {
    let xid = commit.xid.map_or_else(|| "-".to_owned(), |xid| xid.to_string());
    let latency = text::millis(commit.latency);
    format!("{}  {}  xid {xid}  nodes {}/{nodes}  {latency} ms", local(commit.at), commit.rows(40), commit.nodes())
}

fn status_line(board: &Board, nodes: &[NodeLine]) -> String {
    let sum = |value: fn(&NodeLine) -> u64| nodes.iter().map(value).sum::<u64>();
    let coherent = nodes.iter().filter(|node| matches!(node.status, Status::Coherent { .. })).count();
    let ratios: Vec<_> = nodes.iter().filter_map(|node| node.ratio).collect();
    #[expect(clippy::cast_precision_loss, reason = "a few nodes")]
    let ratio = if ratios.is_empty() { 0.0 } else { ratios.iter().sum::<f64>() / ratios.len() as f64 };
    format!(
        "{:>4} s  {coherent}/{} nodes coherent, {} entries, {} gets, {:.2} % hits, {} commits, {} invalidations, {}; {}",
        board.started.elapsed().as_secs(),
        nodes.len(),
        text::number(sum(|node| node.stats.entries)),
        text::number(sum(|node| node.stats.gets)),
        ratio * 100.0,
        text::number(board.commits.load(Relaxed)),
        text::number(sum(|node| node.stats.invalidations)),
        latency_text(board.latency()),
        board.checks(),
    )
}
