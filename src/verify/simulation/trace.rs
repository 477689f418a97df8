//! What happens in a run, for its story and for its fingerprint.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::verify::history::{Key, NodeId, Time, Version};

/// One thing that happened.
#[derive(Clone, Debug, Hash)]
pub(super) enum What {
    LoadStarts(Key),
    LoadReads { key: Key, seen: Option<Version>, server: usize },
    LoadEnds { key: Key, failed: bool },
    Applied { transaction: Option<u64>, keys: Option<Vec<Key>> },
    Gap(String),
    Coherent,
    Lines(&'static str),
    ReadStarts { key: Key, mode: &'static str },
    ReadEnds { key: Key, mode: &'static str, seen: Option<Version>, failed: bool },
    Commits { transaction: u64, keys: Vec<Key>, server: usize },
    Fault(&'static str),
}

impl What {
    fn concerns(&self, of: Key) -> bool {
        match self {
            Self::LoadStarts(key)
            | Self::LoadReads { key, .. }
            | Self::LoadEnds { key, .. }
            | Self::ReadStarts { key, .. }
            | Self::ReadEnds { key, .. } => *key == of,
            Self::Applied { keys, .. } => keys.as_ref().is_none_or(|keys| keys.contains(&of)),
            Self::Commits { keys, .. } => keys.contains(&of),
            Self::Gap(_) | Self::Coherent | Self::Lines(_) | Self::Fault(_) => true,
        }
    }
}

/// All that happened, and its fingerprint.
#[derive(Default)]
pub(super) struct Trace {
    events: Vec<(Time, Option<NodeId>, What)>,
    hash: DefaultHasher,
}

impl Trace {
    pub(super) fn note(&mut self, at: Time, node: Option<NodeId>, what: What) {
        (at, node, &what).hash(&mut self.hash);
        self.events.push((at, node, what));
    }

    /// A step of the run, which is no event, but must be the same in each run.
    pub(super) fn step(&mut self, task: usize, at: Time) {
        (task, at).hash(&mut self.hash);
    }

    pub(super) fn fingerprint(&self) -> u64 {
        self.hash.finish()
    }

    /// All events, a line each.
    pub(super) fn all(&self) -> Vec<String> {
        self.events.iter().map(line).collect()
    }

    /// The last events that concern a key on a node.
    pub(super) fn of(&self, node: NodeId, key: Key, last: usize) -> Vec<String> {
        let ours = |it: &&(Time, Option<NodeId>, What)| it.1.is_none_or(|of| of == node) && it.2.concerns(key);
        let mut lines: Vec<_> = self.events.iter().rev().filter(ours).take(last).map(line).collect();
        lines.reverse();
        lines
    }
}

fn line((at, node, what): &(Time, Option<NodeId>, What)) -> String {
    let who = node.map_or_else(|| "database".into(), |node| format!("node {node}"));
    format!("{:>5}.{:09}  {who:<9} {what:?}", at / 1_000_000_000, at % 1_000_000_000)
}
