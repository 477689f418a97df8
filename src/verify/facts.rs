//! What is known of a run apart from its reads, arranged for looking it up.

use std::collections::HashMap;

use super::history::{History, Key, NodeId, Noted, Outcome, Read, Time, Version, Write};

/// Grows with time: what had been reached by when.
#[derive(Default)]
pub(super) struct Steps(Vec<(Time, Version)>);

impl Steps {
    pub(super) fn of(mut steps: Vec<(Time, Version)>) -> Self {
        steps.sort_unstable();
        let mut reached: Vec<(Time, Version)> = Vec::new();
        for (at, version) in steps {
            if reached.last().is_none_or(|(_, last)| version > *last) {
                reached.push((at, version));
            }
        }
        Self(reached)
    }

    /// What had been reached before `now`.
    pub(super) fn before(&self, now: Time) -> Option<(Time, Version)> {
        let n = self.0.partition_point(|(at, _)| *at < now);
        n.checked_sub(1).map(|last| self.0[last])
    }
}

/// What is known of one key, apart from its reads.
#[derive(Default)]
pub(super) struct KeyFacts<'a> {
    /// In their order.
    pub(super) writes: Vec<&'a Write>,
    /// Which version had been committed by when.
    pub(super) ended: Steps,
}

impl KeyFacts<'_> {
    pub(super) fn write(&self, version: Version) -> Option<&Write> {
        self.writes.binary_search_by_key(&version, |write| write.version).ok().map(|n| self.writes[n])
    }

    /// Deletions that a read may have seen, in their order, and whether they count for those after it. The first: that
    /// there never was such a row.
    fn absent(&self, read: &Read) -> impl Iterator<Item = (Version, bool)> {
        let end = read.end;
        let born_absent = self.writes.first().is_none_or(|write| write.ended > 0 || write.deletes);
        let deletions = self
            .writes
            .iter()
            .filter(move |write| write.deletes && write.sent <= end && write.outcome != Outcome::RolledBack);
        let deletions = deletions.map(|write| (write.version, write.outcome == Outcome::Committed));
        born_absent.then_some((Version::default(), true)).into_iter().chain(deletions)
    }

    /// Whether what was read is not older than `floor`.
    pub(super) fn allows(&self, read: &Read, floor: Version) -> bool {
        match read.seen {
            Some(version) => version >= floor,
            None => self.absent(read).any(|(version, _)| version >= floor),
        }
    }

    /// The version that the read stands for, to those after it; `None` if it was lost.
    pub(super) fn counts_as(&self, read: &Read, least: Version) -> Option<Version> {
        match read.seen {
            Some(version) => self.write(version).filter(|write| write.outcome == Outcome::Committed).map(|_| version),
            None => {
                self.absent(read).find(|(version, counts)| *counts && *version >= least).map(|(version, _)| version)
            }
        }
    }

    /// The interval in which a row that was read was there for certain: sent, and when the next one had ended.
    pub(super) fn there(&self, version: Version) -> Option<(Time, Time)> {
        let write = self.write(version)?;
        let mut later = self.writes.iter().filter(|it| it.version > version && it.outcome == Outcome::Committed);
        Some((write.sent, later.next().map_or(Time::MAX, |next| next.ended)))
    }

    pub(super) fn last(&self) -> Option<&Write> {
        self.writes.iter().rev().find(|write| write.outcome == Outcome::Committed).copied()
    }
}

/// What is known of a run, apart from its reads.
pub(super) struct Facts<'a> {
    keys: HashMap<Key, KeyFacts<'a>>,
    unknown: KeyFacts<'a>,
    /// What committed transactions wrote. Lost ones may have had the same number.
    by_xid: HashMap<u64, Vec<&'a Write>>,
    pub(super) applied: HashMap<(NodeId, Key), Steps>,
    /// When they were noted, and since when they were; in order.
    gaps: HashMap<NodeId, Vec<(Time, Time)>>,
    recovered: HashMap<NodeId, Vec<(Time, u32)>>,
}

impl<'a> Facts<'a> {
    pub(super) fn of(history: &'a History) -> Self {
        let mut keys: HashMap<Key, KeyFacts<'a>> = HashMap::new();
        let mut by_xid: HashMap<u64, Vec<&Write>> = HashMap::new();
        for write in &history.writes {
            keys.entry(write.key).or_default().writes.push(write);
            if write.outcome == Outcome::Committed {
                by_xid.entry(write.xid).or_default().push(write);
            }
        }
        for key in keys.values_mut() {
            key.writes.sort_by_key(|write| write.version);
            let committed = key.writes.iter().filter(|write| write.outcome == Outcome::Committed);
            key.ended = Steps::of(committed.map(|write| (write.ended, write.version)).collect());
        }
        let mut applied: HashMap<_, Vec<_>> = HashMap::new();
        let mut gaps: HashMap<_, Vec<_>> = HashMap::new();
        let mut recovered: HashMap<_, Vec<_>> = HashMap::new();
        for (node, at, noted) in &history.notes {
            match noted {
                Noted::Applied { xid, keys: named } => {
                    let is_named = |key: Key| named.as_ref().is_none_or(|keys| keys.contains(&key));
                    for write in by_xid.get(xid).into_iter().flatten() {
                        if write.sent < *at && is_named(write.key) {
                            applied.entry((*node, write.key)).or_default().push((*at, write.version));
                        }
                    }
                }
                Noted::Gap { since } => gaps.entry(*node).or_default().push((*at, *since)),
                Noted::Coherent { era } => recovered.entry(*node).or_default().push((*at, *era)),
                Noted::Holds { .. } => {}
            }
        }
        for gaps in gaps.values_mut() {
            gaps.sort_unstable();
        }
        for recovered in recovered.values_mut() {
            recovered.sort_unstable();
        }
        let applied = applied.into_iter().map(|(of, steps)| (of, Steps::of(steps))).collect();
        Self { keys, unknown: KeyFacts::default(), by_xid, applied, gaps, recovered }
    }

    pub(super) fn key(&self, key: Key) -> &KeyFacts<'a> {
        self.keys.get(&key).unwrap_or(&self.unknown)
    }

    /// The last version of the key that this transaction wrote, if it had been sent by then.
    pub(super) fn wrote(&self, xid: u64, key: Key, by: Time) -> Option<Version> {
        let writes = self.by_xid.get(&xid)?.iter();
        writes.filter(|write| write.key == key && write.sent <= by).map(|write| write.version).max()
    }

    /// Since when there was the last gap that had been noted before `now`.
    pub(super) fn last_gap(&self, node: NodeId, now: Time) -> Option<Time> {
        let gaps = self.gaps.get(&node)?;
        gaps[..gaps.partition_point(|(at, _)| *at < now)].iter().map(|(_, since)| *since).max()
    }

    /// When the node had first become coherent on a server of a later era.
    pub(super) fn recovered(&self, node: NodeId, era: u32) -> Option<Time> {
        self.recovered.get(&node)?.iter().find(|(_, on)| *on > era).map(|(at, _)| *at)
    }
}
