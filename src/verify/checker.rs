//! Whether what happened in a run was allowed: one checker, for the simulation and for real Postgres.
//!
//! The versions of a key are in a known order, so nothing has to be searched. For each read there is a *floor*, the oldest
//! version that it may return, from each of several rules; and a version that it returns must exist, and must have been sent
//! before the read ended. A read of an absent row is given the benefit of the doubt: any deletion will do that is late
//! enough, and the earliest such counts for the reads after it.
//!
//! What is not here: that reads end, and that nodes recover. Who runs the nodes sees to that.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap},
    fmt,
};

use super::{
    facts::{Facts, KeyFacts},
    history::{History, Key, Mode, NodeId, Noted, Outcome, Read, Time, Version, Write},
    story,
};

/// What a checked promise is called. `docs/design.md` has the argument for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// What is read was written, and not rolled back.
    Written,
    /// What is read was sent before the read ended.
    NoFuture,
    /// A read misses nothing that became visible longer before it than its freshness allows.
    Fresh,
    /// A read misses nothing that its node had applied (I2).
    Applied,
    /// A read is not older than an earlier one of the same cache (I2).
    Monotonic,
    /// A read has what its token stands for.
    Token,
    /// A fenced read is not older than an earlier one of any node.
    Linearizable,
    /// Rows of one snapshot were there at one moment, and show each transaction wholly or not at all.
    Snapshot,
    /// What was lost in a crash is not read once the node has become coherent on the server that came after.
    Lost,
    /// What was loaded before a gap is not served after it (I3).
    Gap,
    /// When all is quiet, what is held equals the table (I1).
    Quiet,
}

/// What the nodes of a run promised.
#[derive(Clone, Copy, Debug)]
pub struct Promises {
    /// What a coherent read may miss: the lease and what comes with it, or the longest load while not coherent.
    pub staleness_bound: Time,
}

/// Something that was not allowed.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The promise that was broken.
    pub rule: Rule,
    /// On this node.
    pub node: NodeId,
    /// About this key.
    pub key: Key,
    /// What is wrong, in one sentence.
    pub what: String,
    /// What led to it, in order: the events that explain it, and no others.
    pub story: Vec<(Time, String)>,
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Reads checked.
    pub reads: u64,
    /// How often each rule had something to say, that is, could have been broken.
    pub tried: BTreeMap<Rule, u64>,
    /// The first of them, [`VIOLATIONS_MAX`] at most.
    pub violations: Vec<Violation>,
    /// All of them.
    pub violated: u64,
}

/// Violations that are kept with their stories.
pub const VIOLATIONS_MAX: usize = 20;

impl Report {
    /// Adds what another check found.
    pub fn absorb(&mut self, other: Self) {
        self.reads += other.reads;
        for (rule, n) in other.tried {
            *self.tried.entry(rule).or_default() += n;
        }
        self.violated += other.violated;
        let room = VIOLATIONS_MAX.saturating_sub(self.violations.len());
        self.violations.extend(other.violations.into_iter().take(room));
    }

    fn tried(&mut self, rule: Rule) {
        *self.tried.entry(rule).or_default() += 1;
    }

    fn found(&mut self, violation: impl FnOnce() -> Violation) {
        self.violated += 1;
        if self.violations.len() < VIOLATIONS_MAX {
            self.violations.push(violation());
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?}: key {}, node {}: {}", self.rule, self.key, self.node, self.what)?;
        for (at, what) in &self.story {
            writeln!(f, "{:>14}  {what}", story::clock(*at))?;
        }
        Ok(())
    }
}

/// Checks all that is in `history`.
#[must_use]
pub fn check(history: &History, promises: Promises) -> Report {
    let mut report = Report::default();
    let facts = Facts::of(history);
    let mut by_key: HashMap<Key, Vec<&Read>> = HashMap::new();
    for read in &history.reads {
        by_key.entry(read.key).or_default().push(read);
    }
    for (key, mut reads) in by_key {
        reads.sort_by_key(|read| (read.start, read.end));
        let mut past = Past::default();
        for read in reads {
            report.reads += 1;
            check_read(read, facts.key(key), &facts, promises, &mut past, &mut report);
        }
    }
    check_snapshots(history, &facts, &mut report);
    check_quiet(history, &facts, &mut report);
    report
}

/// The least version that a read may return, by one rule.
#[derive(Clone, Copy)]
struct Floor {
    rule: Rule,
    version: Version,
    /// Since when.
    at: Time,
}

fn check_read(
    read: &Read,
    key: &KeyFacts<'_>,
    facts: &Facts<'_>,
    promises: Promises,
    past: &mut Past,
    report: &mut Report,
) {
    let mut broken = |rule, what: String, floor: Option<Floor>| {
        report.found(|| Violation {
            rule,
            node: read.node,
            key: read.key,
            what,
            story: story::of(read, &key.writes, floor.map(|floor| (floor.version, floor.at, rule))),
        });
    };
    let write = read.seen.map(|version| (version, key.write(version)));
    if let Some((version, write)) = write {
        match write {
            None => return broken(Rule::Written, format!("read {version}, which nobody wrote"), None),
            Some(write) if write.outcome == Outcome::RolledBack => {
                return broken(Rule::Written, format!("read {version}, which was rolled back"), None);
            }
            Some(write) if write.deletes => {
                return broken(Rule::Written, format!("read a row of {version}, which is a deletion"), None);
            }
            Some(write) if write.sent > read.end => {
                return broken(Rule::NoFuture, format!("read {version} before it was sent"), None);
            }
            Some(Write { outcome: Outcome::Lost { with }, .. }) => {
                if let Some(since) = facts.recovered(read.node, *with).filter(|since| *since < read.start) {
                    let what = format!("read {version}, which was lost before this node became coherent again");
                    broken(Rule::Lost, what, Some(Floor { rule: Rule::Lost, version, at: since }));
                }
            }
            Some(_) => {}
        }
    }
    if let (Some(loaded), Mode::Coherent | Mode::Fenced | Mode::AtLeast(_)) = (read.loaded, read.mode)
        && let Some(since) = facts.last_gap(read.node, read.start)
        && loaded < since
    {
        let floor = Floor { rule: Rule::Gap, version: Version::default(), at: since };
        broken(Rule::Gap, format!("served what was loaded at {}, before a gap", story::clock(loaded)), Some(floor));
    }
    let floors = floors(read, key, facts, promises, past);
    for floor in &floors {
        if !key.allows(read, floor.version) {
            let what = format!("returned {} where {} is the least", seen(read), floor.version);
            broken(floor.rule, what, Some(*floor));
        }
    }
    for floor in &floors {
        report.tried(floor.rule);
    }
    let least = floors.iter().map(|floor| floor.version).max().unwrap_or_default();
    if let Some(version) = key.counts_as(read, least) {
        past.note(read, version);
    }
}

fn seen(read: &Read) -> String {
    read.seen.map_or_else(|| "no row".into(), |version| version.to_string())
}

/// The floors that have something to say.
fn floors(read: &Read, key: &KeyFacts<'_>, facts: &Facts<'_>, promises: Promises, past: &mut Past) -> Vec<Floor> {
    let mut floors = Vec::new();
    let mut add = |rule, floor: Option<(Time, Version)>| {
        floors.extend(floor.map(|(at, version)| Floor { rule, version, at }));
    };
    let bound = match read.mode {
        Mode::Coherent | Mode::AtLeast(_) => Some(promises.staleness_bound),
        Mode::Within(bound) => Some(Time::try_from(bound.as_nanos()).unwrap_or(Time::MAX)),
        Mode::Fenced => Some(0),
        Mode::Any => None,
    };
    if let Some(since) = bound.and_then(|bound| read.start.checked_sub(bound)) {
        add(Rule::Fresh, key.ended.before(since));
    }
    if read.mode != Mode::Any {
        add(Rule::Applied, facts.applied.get(&(read.node, read.key)).and_then(|applied| applied.before(read.start)));
    }
    if let Mode::AtLeast(xid) = read.mode {
        add(Rule::Token, facts.wrote(xid, read.key, read.start).map(|version| (read.start, version)));
    }
    past.advance(read.start);
    if is_ordered(read.mode) {
        add(Rule::Monotonic, past.of_node.get(&read.node).copied());
    }
    if read.mode == Mode::Fenced {
        add(Rule::Linearizable, past.fenced);
    }
    floors
}

/// Whether reads like this never go back in time.
fn is_ordered(mode: Mode) -> bool {
    matches!(mode, Mode::Coherent | Mode::Fenced | Mode::AtLeast(_))
}

/// The reads of one key so far.
#[derive(Default)]
struct Past {
    /// Reads that ended later than the last look: end, node, fenced, version.
    running: BinaryHeap<Reverse<(Time, NodeId, bool, Version)>>,
    /// The newest version that a read returned which has ended, and when.
    of_node: HashMap<NodeId, (Time, Version)>,
    fenced: Option<(Time, Version)>,
}

impl Past {
    fn note(&mut self, read: &Read, version: Version) {
        if is_ordered(read.mode) {
            self.running.push(Reverse((read.end, read.node, read.mode == Mode::Fenced, version)));
        }
    }

    /// Moves on to a read that starts now.
    fn advance(&mut self, now: Time) {
        let raise = |floor: &mut (Time, Version), end, version| {
            if version > floor.1 {
                *floor = (end, version);
            }
        };
        while let Some(Reverse((end, node, fenced, version))) = self.running.peek().copied().filter(|it| it.0.0 < now) {
            self.running.pop();
            raise(self.of_node.entry(node).or_default(), end, version);
            if fenced {
                raise(self.fenced.get_or_insert_default(), end, version);
            }
        }
    }
}

fn check_snapshots(history: &History, facts: &Facts<'_>, report: &mut Report) {
    let mut snapshots: HashMap<u64, Vec<&Read>> = HashMap::new();
    for read in &history.reads {
        if let Some(snapshot) = read.snapshot {
            snapshots.entry(snapshot).or_default().push(read);
        }
    }
    for reads in snapshots.values() {
        report.tried(Rule::Snapshot);
        let rows = || reads.iter().filter_map(|read| read.seen.map(|version| (*read, facts.key(read.key), version)));
        // One moment at which all of them were there.
        let began = rows().filter_map(|(read, key, version)| Some((key.there(version)?.0, read))).max_by_key(|it| it.0);
        let ended = rows().filter_map(|(read, key, version)| Some((key.there(version)?.1, read))).min_by_key(|it| it.0);
        if let (Some((began, new)), Some((ended, old))) = (began, ended)
            && began > ended
        {
            let what =
                format!("one snapshot has {} of key {}, and {}, which was gone by then", seen(new), new.key, seen(old));
            report.found(|| torn(old, facts, what, began));
        }
        // All that one transaction wrote, or none of it.
        for (read, key, version) in rows() {
            let Some(write) = key.write(version).filter(|write| write.outcome == Outcome::Committed) else { continue };
            for other in reads {
                if let Some(least) = facts.wrote(write.xid, other.key, Time::MAX)
                    && !facts.key(other.key).allows(other, least)
                {
                    let what = format!(
                        "one snapshot has {version} of key {}, and {} where the same transaction wrote {least}",
                        read.key,
                        seen(other)
                    );
                    report.found(|| torn(other, facts, what, write.sent));
                }
            }
        }
    }
}

fn torn(read: &Read, facts: &Facts<'_>, what: String, at: Time) -> Violation {
    let floor = read.seen.map(|version| (version, at, Rule::Snapshot));
    let story = story::of(read, &facts.key(read.key).writes, floor);
    Violation { rule: Rule::Snapshot, node: read.node, key: read.key, what, story }
}

fn check_quiet(history: &History, facts: &Facts<'_>, report: &mut Report) {
    for (node, at, noted) in &history.notes {
        let Noted::Holds { key, seen } = noted else { continue };
        report.tried(Rule::Quiet);
        let last = facts.key(*key).last();
        let there = last.filter(|write| !write.deletes).map(|write| write.version);
        if *seen != there {
            let text =
                |version: Option<Version>| version.map_or_else(|| "no row".into(), |version| version.to_string());
            let story = last.map(|write| (write.ended, story::write(write))).into_iter();
            report.found(|| Violation {
                rule: Rule::Quiet,
                node: *node,
                key: *key,
                what: format!("holds {} where the table has {}", text(*seen), text(there)),
                story: story.chain([(*at, format!("node {node}, after a barrier, holds {}", text(*seen)))]).collect(),
            });
        }
    }
}

#[cfg(test)]
#[path = "checker_tests.rs"]
mod tests;
