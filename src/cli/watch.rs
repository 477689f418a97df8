//! `rowcache watch`: changes as they reach a node, one line each.
//!
//! A node without tables listens; a task of its own takes the time of every event the moment it arrives, so that
//! neither a slow terminal nor asking for commit times makes a change look late.

use std::{
    io::Write as _,
    time::{Duration, SystemTime},
};

use anstyle::{AnsiColor, Style};
use anyhow::{Result, bail};
use serde_json::json;
use sqlx::PgPool;
use tokio::sync::mpsc;

use super::{
    commit_time::CommitTimes,
    connect::connect,
    database::{Found, look_up},
    signals::Signals,
    text,
};
use crate::{Change, Config, Event, Events, Node, Rows};

/// Events that wait to be printed. When this is full, the node's own buffer fills, and after that it says how many
/// were lost.
const WAITING_MAX: usize = 4096;

/// Lines whose commit times are asked for in one statement.
const LINES_MAX: usize = 256;

/// Room for keys in a line.
const KEYS_WIDTH: usize = 60;

type Received = (SystemTime, Event);

pub(crate) async fn watch(url: &str, tables: &[String], json: bool) -> Result<()> {
    let mut signals = Signals::new()?;
    tokio::select! {
        ended = follow(url, tables, json) => ended,
        () = signals.next() => Ok(()),
    }
}

async fn follow(url: &str, tables: &[String], json: bool) -> Result<()> {
    let pool = connect(url).await?;
    let tables = canonical(&pool, tables).await?;
    let tracked = crate::install::tracked(&pool).await?;
    let mut names: Vec<String> = tracked.into_iter().map(|table| table.relation).collect();
    names.retain(|name| tables.is_empty() || tables.contains(name));

    let mut config = Config::from_url(url)?;
    config.pool = config.pool.max_connections(2);
    config.polls_always = true;
    let node = Node::start(config).await?;
    let (sender, mut received) = mpsc::channel(WAITING_MAX);
    tokio::spawn(receive(node.subscribe(), sender));
    let mut commits = CommitTimes::new(pool);
    let mut printer = Printer { json, name_width: names.iter().map(|name| name.chars().count()).max().unwrap_or(0) };
    printer.watching(&names)?;

    let mut batch = Vec::new();
    let mut connected = true;
    while received.recv_many(&mut batch, LINES_MAX).await > 0 {
        batch.retain(|(_, event)| concerns(event, &tables));
        connected = batch.iter().fold(connected, |was, (_, event)| match event {
            Event::Gap(_) => false,
            Event::Coherent => true,
            _ => was,
        });
        let seen: Vec<_> = batch.iter().filter_map(|(at, event)| Some((xid(event)?, *at))).collect();
        let found = if connected && !seen.is_empty() { commits.latencies(&seen).await } else { Vec::new() };
        let mut found = found.into_iter();
        for (at, event) in batch.drain(..) {
            let latency = xid(&event).and_then(|_| found.next()).flatten();
            printer.print(at, &event, latency)?;
        }
    }
    Ok(())
}

async fn receive(mut events: Events, sender: mpsc::Sender<Received>) {
    while let Some(event) = events.recv().await {
        if sender.send((SystemTime::now(), event)).await.is_err() {
            return;
        }
    }
}

/// The tables as messages name them. Each must exist and be tracked, or nothing would ever be seen of it.
async fn canonical(pool: &PgPool, tables: &[String]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for table in tables {
        let Found { name, tracked, problems } = look_up(pool, table).await?;
        if !tracked {
            bail!("{name} is not tracked; run: rowcache track {name}");
        }
        for problem in problems {
            anstream::eprintln!("warning: {name}: {problem}");
        }
        names.push(name);
    }
    Ok(names)
}

fn concerns(event: &Event, tables: &[String]) -> bool {
    let table = match event {
        Event::Change(change) => &change.table,
        Event::Unreadable { table, .. } => table,
        _ => &None,
    };
    // An event without a table is about all of them.
    tables.is_empty() || table.as_ref().is_none_or(|table| tables.contains(table))
}

fn xid(event: &Event) -> Option<u64> {
    match event {
        Event::Change(change) => change.xid,
        _ => None,
    }
}

struct Printer {
    json: bool,
    name_width: usize,
}

const DIM: Style = Style::new().dimmed();
const TABLE: Style = AnsiColor::Cyan.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const GOOD: Style = AnsiColor::Green.on_default().bold();

impl Printer {
    fn watching(&mut self, names: &[String]) -> Result<()> {
        if self.json {
            return line(&json!({ "event": "watching", "at": utc(SystemTime::now()), "tables": names }).to_string());
        }
        let what = if names.is_empty() {
            "no table is tracked yet; `rowcache track TABLE` puts the triggers on one".to_owned()
        } else {
            names.join(", ")
        };
        line(&format!("{DIM}{}{DIM:#}  {GOOD}watching{GOOD:#} {what}", local(SystemTime::now())))
    }

    fn print(&mut self, at: SystemTime, event: &Event, latency: Option<Duration>) -> Result<()> {
        if self.json {
            return line(&as_json(at, event, latency).to_string());
        }
        let text = match event {
            Event::Change(change) => self.change(change, latency),
            Event::Gap(why) => format!("{BAD}gap{BAD:#} {why}; changes until it is back are not shown"),
            Event::Coherent => format!("{GOOD}back{GOOD:#} listening, and coherent"),
            Event::Covered => format!("{GOOD}covered{GOOD:#} a second line is open"),
            Event::Handoff(how) => {
                format!("{GOOD}handoff{GOOD:#} the second line took over, nothing was missed: {how}")
            }
            Event::SpareLost(how) => format!("{BAD}uncovered{BAD:#} the second line was lost: {how}"),
            Event::Incoherent { table, .. } => {
                format!("{BAD}incoherent{BAD:#} {table}: a row was not what Postgres has")
            }
            Event::Lagged(missed) => {
                format!("{BAD}lagged{BAD:#} this output was too slow: {missed} events are missing")
            }
            Event::Unreadable { table, error } => {
                format!("{BAD}unreadable{BAD:#} {}: {error}", table.as_deref().unwrap_or("every table"))
            }
        };
        line(&format!("{DIM}{}{DIM:#}  {text}", local(at)))
    }

    fn change(&mut self, change: &Change, latency: Option<Duration>) -> String {
        let table = change.table.as_deref().unwrap_or("every table");
        self.name_width = self.name_width.max(table.chars().count());
        let width = self.name_width;
        let keys = text::rows(&change.rows, KEYS_WIDTH);
        let xid = change.xid.map_or_else(|| "-".to_owned(), |xid| xid.to_string());
        let latency = latency.map_or_else(|| "-".to_owned(), |latency| format!("{} ms", text::millis(Some(latency))));
        format!("{TABLE}{table:width$}{TABLE:#}  {keys}  {DIM}xid {xid}  {latency}{DIM:#}")
    }
}

fn as_json(at: SystemTime, event: &Event, latency: Option<Duration>) -> serde_json::Value {
    let at = utc(at);
    match event {
        Event::Change(change) => {
            let (all, keys, hashes) = match &change.rows {
                Rows::All => (true, None, None),
                Rows::Keys(keys) => (false, Some(keys), None),
                Rows::Hashed { hashes, .. } => (false, None, Some(hashes)),
            };
            json!({
                "event": "change",
                "at": at,
                "table": change.table,
                "all": all,
                "keys": keys,
                "hashes": hashes,
                "columns": change.columns,
                "xid": change.xid,
                "latency_ms": latency.map(|latency| latency.as_secs_f64() * 1000.0),
            })
        }
        Event::Gap(why) => json!({ "event": "lost", "at": at, "why": why.to_string() }),
        Event::Coherent => json!({ "event": "back", "at": at }),
        Event::Covered => json!({ "event": "covered", "at": at }),
        Event::Handoff(how) => json!({ "event": "handoff", "at": at, "how": how }),
        Event::SpareLost(how) => json!({ "event": "uncovered", "at": at, "how": how }),
        Event::Incoherent { table, key, age } => {
            json!({ "event": "incoherent", "at": at, "table": table, "key": key, "age_s": age.as_secs_f64() })
        }
        Event::Lagged(missed) => json!({ "event": "lagged", "at": at, "missed": missed }),
        Event::Unreadable { table, error } => {
            json!({ "event": "unreadable", "at": at, "table": table, "error": error })
        }
    }
}

fn line(text: &str) -> Result<()> {
    writeln!(anstream::stdout(), "{text}")?;
    Ok(())
}

/// `12:34:56.789`, where the user is.
pub(crate) fn local(at: SystemTime) -> String {
    let zoned = jiff::Zoned::try_from(at);
    zoned.map_or_else(|_| "-".to_owned(), |zoned| zoned.strftime("%H:%M:%S%.3f").to_string())
}

/// `2026-01-31T12:34:56.789123Z`.
fn utc(at: SystemTime) -> String {
    jiff::Timestamp::try_from(at).map_or_else(|_| "-".to_owned(), |at| format!("{at:.6}"))
}
