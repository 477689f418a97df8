//! `rowcache nodes`: who listens on a database, and how everybody is.

use std::{
    io::{Write as _, stdout},
    time::Duration,
};

use anyhow::Result;
use serde_json::{Value, json};

use super::{connect::connect, signals::Signals, text};
use crate::{Config, Fleet, FleetNode, NodeReport};

pub(crate) const HELP: &str = "\
Examples:
  rowcache nodes
  rowcache nodes --deadline 5
  rowcache nodes --json | jq -r '.nodes[] | select(.report.coherent | not) | .name'

A node is asked by a notification, and answers when it has applied all that was committed before. One that does
not answer stands still, is cut off, or has been told not to (`Config::answers`). Nodes that do not listen
(`Config::listen`) are not seen. Its name is `Config::name`.";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// As one JSON object.
    #[arg(long)]
    json: bool,
    /// How long to wait for answers, if some do not come.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    deadline: Duration,
}

/// Longer than anybody waits.
const DEADLINE_MAX: f64 = 3600.0;

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if seconds > 0.0 && seconds <= DEADLINE_MAX {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(format!("must be more than 0, and at most {DEADLINE_MAX}"))
}

pub(crate) async fn nodes(url: &str, options: &Options) -> Result<()> {
    let mut signals = Signals::new()?;
    tokio::select! {
        asked = ask(url, options) => asked,
        () = signals.next() => Ok(()),
    }
}

async fn ask(url: &str, options: &Options) -> Result<()> {
    // Says better than anything else what is wrong with an address.
    connect(url).await?.close().await;
    let fleet = Fleet::ask(&Config::from_url(url)?, options.deadline).await?;
    let text = if options.json { format!("{:#}\n", as_json(&fleet)) } else { as_text(&fleet) };
    write!(stdout(), "{text}")?;
    Ok(())
}

fn as_text(fleet: &Fleet) -> String {
    if fleet.nodes.is_empty() {
        return "no node listens on this database\n".to_owned();
    }
    let head = ["name", "status", "as of", "hits", "entries", "version", "up", "address", "client"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(fleet.nodes.iter().map(|node| row(fleet, node)));
    let mut text = text::table(&rows);
    for node in &fleet.nodes {
        let why = node.report.as_ref().and_then(|report| report.reason.as_ref());
        if let Some(why) = why {
            text.push_str(&format!("\n{}: {why}\n", node.name));
        }
    }
    text
}

fn row(fleet: &Fleet, node: &FleetNode) -> Vec<String> {
    let unknown = || "-".to_owned();
    let client = node.client.clone().unwrap_or_else(unknown);
    let Some(report) = &node.report else {
        let silent = format!("did not answer within {} s", fleet.deadline.as_secs_f64());
        let mut row = vec![node.name.clone(), silent];
        row.extend(std::iter::repeat_with(unknown).take(6));
        row.push(client);
        return row;
    };
    let sum = |count: fn(&crate::TableReport) -> u64| report.tables.iter().map(count).fold(0, u64::saturating_add);
    // Of those that did not fit into the answer, nobody knows.
    let at_least = if report.tables_left_out > 0 { "≥ " } else { "" };
    vec![
        node.name.clone(),
        status(report),
        report.as_of.map_or_else(unknown, |as_of| format!("{:.1} s ago", as_of.as_secs_f64())),
        share(sum(|table| table.hits), sum(|table| table.gets)),
        format!("{at_least}{}", text::number(sum(|table| table.entries))),
        report.version.clone(),
        time(report.uptime),
        report.address.clone().unwrap_or_else(unknown),
        client,
    ]
}

fn status(report: &NodeReport) -> String {
    if !report.is_coherent {
        return "not coherent, see below".to_owned();
    }
    match report.tables.iter().filter(|table| !table.is_coherent).count() {
        0 => "coherent".to_owned(),
        n => format!("coherent, but {n} of {} tables", report.tables.len()),
    }
}

/// `97.3 %`; `-` of nothing.
#[expect(clippy::cast_precision_loss, reason = "a share")]
fn share(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", part as f64 * 100.0 / whole as f64) }
}

/// `42 s`, `17 min`, `5.1 h`, `3.0 days`.
fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match time.as_secs() {
        0..100 => format!("{seconds:.0} s"),
        100..6000 => format!("{:.0} min", seconds / 60.0),
        6000..360_000 => format!("{:.1} h", seconds / 3600.0),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

/// As `--json` prints it, and the service answers.
pub(crate) fn as_json(fleet: &Fleet) -> Value {
    let silent = fleet.silent().count();
    json!({
        "deadline_seconds": fleet.deadline.as_secs_f64(),
        "answered": fleet.nodes.len() - silent,
        "silent": silent,
        "nodes": fleet.nodes.iter().map(node_as_json).collect::<Vec<_>>(),
    })
}

fn node_as_json(node: &FleetNode) -> Value {
    json!({
        "name": node.name,
        "listener_pid": node.listener_pid,
        "client": node.client,
        "connected_seconds": node.connected.map(|connected| connected.as_secs_f64()),
        "is_this": node.is_this,
        "answered": node.report.is_some(),
        "report": node.report.as_ref().map(report_as_json),
    })
}

fn report_as_json(report: &NodeReport) -> Value {
    let tables = report.tables.iter().map(|table| {
        json!({
            "name": table.name,
            "coherent": table.is_coherent,
            "entries": table.entries,
            "used": table.used,
            "capacity": table.capacity,
            "gets": table.gets,
            "hits": table.hits,
        })
    });
    json!({
        "id": report.id,
        "version": report.version,
        "host": report.host,
        "process": report.process,
        "address": report.address,
        "uptime_seconds": report.uptime.as_secs_f64(),
        "coherent": report.is_coherent,
        "as_of_seconds": report.as_of.map(|as_of| as_of.as_secs_f64()),
        "staleness_bound_seconds": report.staleness_bound.as_secs_f64(),
        "reason": report.reason,
        "gaps": report.gaps,
        "tables": tables.collect::<Vec<_>>(),
        "tables_left_out": report.tables_left_out,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        for (seconds, text) in [(0, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2.0 h"), (864_000, "10.0 days")] {
            assert_eq!(time(Duration::from_secs(seconds)), text);
        }
        assert_eq!((share(0, 0), share(2, 3)), ("-".to_owned(), "66.7 %".to_owned()));
    }

    #[test]
    fn deadlines_make_sense() {
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for text in ["0", "-1", "x", "NaN", "inf", "3601"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn nobody_is_there() {
        let fleet = Fleet { deadline: Duration::from_secs(1), nodes: Vec::new() };
        assert_eq!(as_text(&fleet), "no node listens on this database\n");
        assert_eq!(as_json(&fleet)["nodes"], json!([]));
    }
}
