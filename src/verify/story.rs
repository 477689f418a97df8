//! The smallest story that explains a violation: the writes between what was read and what should have been, what made
//! the difference matter, and the read.

use super::{
    checker::Rule,
    history::{Outcome, Read, Time, Version, Write},
};

/// Writes told at most; of more, the first and the last ones.
const WRITES_MAX: usize = 6;

/// A time as text, in seconds.
#[must_use]
pub(super) fn clock(at: Time) -> String {
    format!("{}.{:09}", at / 1_000_000_000, at % 1_000_000_000)
}

/// A write in one line.
pub(super) fn write(write: &Write) -> String {
    let what = if write.deletes { "deleted" } else { "wrote" };
    let how = match write.outcome {
        Outcome::Committed if write.ended == Time::MAX => "; its commit was never confirmed",
        Outcome::Committed => "",
        Outcome::RolledBack => "; rolled back",
        Outcome::Lost { .. } => "; lost later",
    };
    format!("transaction {} {what} {}{how}", write.xid, write.version)
}

/// What led to this read. The floor: the version it should have had, since when, and by which rule.
pub(super) fn of(read: &Read, writes: &[&Write], floor: Option<(Version, Time, Rule)>) -> Vec<(Time, String)> {
    let mut story = Vec::new();
    let (from, to) = match (read.seen, floor) {
        (Some(seen), Some((floor, ..))) => (seen.min(floor), seen.max(floor)),
        (Some(seen), None) => (seen, seen),
        // Which deletion it saw is not known: those before the floor.
        (None, Some((floor, ..))) => (Version::default(), floor),
        (None, None) => (Version::default(), Version::default()),
    };
    let told: Vec<_> = writes.iter().filter(|write| (from..=to).contains(&write.version)).collect();
    let first = WRITES_MAX.saturating_sub(told.len().min(3)).max(1);
    for (n, it) in told.iter().enumerate() {
        if n < first || n + 3 >= told.len() {
            story.push((it.sent, format!("{}: sent", write(it))));
            if it.ended != Time::MAX {
                story.push((it.ended, format!("{} committed", it.version)));
            }
        }
    }
    if let Some((version, at, rule)) = floor {
        let node = read.node;
        let what = match rule {
            Rule::Fresh => {
                format!("{version} has been visible since then at the latest, long enough for {:?}", read.mode)
            }
            Rule::Applied => format!("node {node} had applied {version}"),
            Rule::Monotonic => format!("an earlier read on node {node} had returned {version}"),
            Rule::Linearizable => format!("an earlier fenced read had returned {version}"),
            Rule::Token => format!("its token stands for {version}"),
            Rule::Gap => format!("node {node} had a gap"),
            Rule::Lost => format!("node {node} had become coherent on the server after the crash"),
            Rule::Snapshot => "the other row of the snapshot was sent".into(),
            Rule::Written | Rule::NoFuture | Rule::Quiet => format!("{rule:?}"),
        };
        story.push((at, what));
    }
    let seen = read.seen.map_or_else(|| "no row".into(), |version| version.to_string());
    let loaded = read.loaded.map(|at| format!(", loaded at {}", clock(at))).unwrap_or_default();
    story.push((read.start, format!("node {}: a {:?} read of key {} begins", read.node, read.mode, read.key)));
    story.push((read.end, format!("it returns {seen}{loaded}")));
    story.sort_by_key(|(at, _)| *at);
    story
}
