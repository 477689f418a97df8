//! From what was noted to what is checked.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use super::{
    super::history::{History, Key, Mode, NodeId, Noted, Outcome, Read, Time, Version, Write},
    nodes::Notes,
    table::{PLACES, Place},
    timeline::Timeline,
    wire::{Asked, Attempt, Quiet, RawNote, RawRead},
    world::Survivors,
};

/// A stopped node may serve from memory for this long after it went on, if it has no gap sooner.
const CLOCK_THREAD_LATE: Time = 200_000_000;

/// Between the decoding of a row and the answer to the last who joined the load.
const ANSWERED_LATE: Time = 500_000_000;

/// The last version of each key, from one episode to the next.
pub(super) type Base = BTreeMap<Key, Write>;

/// What there was at first.
pub(super) fn base(timeline: &Timeline, port: u16, survivors: &Survivors) -> Base {
    let write = |(key, number, deletes, xid): &(Key, u64, bool, u64)| {
        let version = timeline.version(port, *number);
        (
            *key,
            Write { key: *key, version, deletes: *deletes, xid: *xid, sent: 0, ended: 0, outcome: Outcome::Committed },
        )
    };
    survivors.history.iter().map(write).collect()
}

/// Makes a history of the notes, and moves `base` on to what the database has now. Also returns what is wrong with the notes
/// themselves.
pub(super) fn history(
    mut notes: Notes,
    quiet: &[(NodeId, Quiet)],
    timeline: &Timeline,
    survivors: &Survivors,
    base: &mut Base,
    log_only: bool,
) -> (History, Vec<String>) {
    let mut wrong = std::mem::take(&mut notes.wrong);
    let mut history = History { writes: base.values().cloned().collect(), ..History::default() };
    let survived: HashSet<(Key, u64)> = survivors.history.iter().map(|(key, number, ..)| (*key, *number)).collect();
    let attempts = notes.attempts.iter().chain(&timeline.incidents.wrote);
    for attempt in attempts {
        history.writes.extend(writes(attempt, timeline, &survived, &mut wrong));
    }
    // Of a number, the transaction, and whether it has survived.
    let by_number: HashMap<u64, (u64, bool)> = history
        .writes
        .iter()
        .map(|write| (write.version.number, (write.xid, write.outcome == Outcome::Committed)))
        .collect();
    let versions: HashMap<(Key, u64), Version> =
        history.writes.iter().map(|write| ((write.key, write.version.number), write.version)).collect();
    // What nobody wrote remains that.
    let version =
        |key: Key, number: u64| versions.get(&(key, number)).copied().unwrap_or(Version { era: u32::MAX, number });
    let excused = Excuses::of(&notes, timeline);
    for (node, read) in &notes.reads {
        let doubtful = excused.covers(*node, read);
        history.reads.push(Read {
            node: *node,
            key: read.key,
            mode: if doubtful { Mode::Any } else { mode(read.asked, &by_number) },
            start: read.start,
            end: read.end,
            seen: read.seen.map(|number| version(read.key, number)),
            // What is told by way of the log may be served again after a gap: what happened meanwhile was read.
            loaded: read.loaded.filter(|_| !PLACES[Place::of(read.key)].is_logged(log_only)),
            snapshot: (read.asked == Asked::Snapshot && !doubtful).then_some(u64::from(*node) << 40 | read.call),
        });
    }
    let kept = notes.reads.iter().filter(|(node, read)| excused.is_kept_of_new(*node, read, timeline, &versions));
    wrong.extend(kept.take(1).map(|(node, read)| {
        format!("node {node} listened to the former primary, and served from memory what it had loaded from the new one: {read:?}")
    }));
    for (node, at, note) in &notes.notes {
        history.notes.extend(noted(*node, *at, note, timeline, &excused).map(|noted| (*node, *at, noted)));
    }
    for (node, quiet) in quiet {
        for (key, seen) in &quiet.holds {
            let seen = seen.map(|number| version(*key, number));
            history.notes.push((*node, quiet.at, Noted::Holds { key: *key, seen }));
        }
    }
    advance(&history, survivors, base, &mut wrong);
    (history, wrong)
}

fn writes<'a>(
    attempt: &'a Attempt,
    timeline: &'a Timeline,
    survived: &'a HashSet<(Key, u64)>,
    wrong: &mut Vec<String>,
) -> impl Iterator<Item = Write> + use<'a> {
    let acknowledged = attempt.ended.is_some();
    // Of the era that the database is in, nothing can be lost.
    let may_be_lost = |number| timeline.version(attempt.port, number).era < timeline.era();
    let is_gone = |row: &super::wire::Written| {
        !row.undone && !survived.contains(&(row.key, row.number)) && !may_be_lost(row.number)
    };
    if acknowledged && !attempt.rolled_back && attempt.rows.iter().any(is_gone) {
        wrong.push(format!("transaction {} was committed, and is gone, and nothing has crashed", attempt.xid));
    }
    // What the new primary has was not for nodes that had not been told of it.
    let late = timeline.incidents.split.filter(|(.., port)| *port == attempt.port).map(|(_, until, _)| until);
    let ended = attempt.ended.map_or(Time::MAX, |ended| late.map_or(ended, |late| ended.max(late)));
    attempt.rows.iter().map(move |row| {
        let version = timeline.version(attempt.port, row.number);
        let outcome = if row.undone || attempt.rolled_back {
            Outcome::RolledBack
        } else if survived.contains(&(row.key, row.number)) {
            Outcome::Committed
        } else if may_be_lost(row.number) {
            Outcome::Lost { with: version.era }
        } else {
            Outcome::RolledBack
        };
        Write { key: row.key, version, deletes: row.deletes, xid: attempt.xid, sent: attempt.sent, ended, outcome }
    })
}

fn mode(asked: Asked, by_number: &HashMap<u64, (u64, bool)>) -> Mode {
    match asked {
        Asked::Get | Asked::GetMany | Asked::TryGet | Asked::Snapshot => Mode::Coherent,
        Asked::Within(millis) => Mode::Within(Duration::from_millis(millis)),
        Asked::Fenced | Asked::Barrier => Mode::Fenced,
        Asked::AtLeast(number) | Asked::Own(number) => match by_number.get(&number) {
            Some((xid, true)) => Mode::AtLeast(*xid),
            // It was lost since.
            _ => Mode::Coherent,
        },
        Asked::Any | Asked::Stale => Mode::Any,
    }
}

/// Reads that promise nothing, and messages of the wrong server.
struct Excuses {
    split: Option<(Time, Time)>,
    /// When a node was coherent on the new server.
    moved: HashMap<NodeId, Time>,
    stopped: Vec<(NodeId, Time, Time)>,
}

impl Excuses {
    fn of(notes: &Notes, timeline: &Timeline) -> Self {
        let incidents = &timeline.incidents;
        let split = incidents.split.map(|(from, until, _)| (from, until));
        let mut moved = HashMap::new();
        for (node, at, note) in &notes.notes {
            if let RawNote::Coherent { incarnation } = note
                && timeline.era_of(*incarnation) == Some(timeline.era())
            {
                moved.entry(*node).or_insert(*at);
            }
        }
        let until_gap = |(node, from, went_on): &(NodeId, Time, Time)| {
            let late = went_on + CLOCK_THREAD_LATE;
            let gaps = notes.notes.iter().filter(|(of, at, note)| {
                of == node && at >= went_on && *at < late && matches!(note, RawNote::Gap { .. })
            });
            (*node, *from, gaps.map(|(_, at, _)| *at).min().unwrap_or(late))
        };
        Self { split, moved, stopped: incidents.stopped.iter().map(until_gap).collect() }
    }

    fn covers(&self, node: NodeId, read: &RawRead) -> bool {
        let split = self.split.is_some_and(|(from, until)| read.end >= from && read.start <= until);
        // All others hold to the instant.
        let by_the_clock_thread = matches!(read.asked, Asked::Get | Asked::GetMany | Asked::TryGet | Asked::Snapshot);
        let stopped =
            |(of, from, until): &(NodeId, Time, Time)| *of == node && read.start >= *from && read.start <= *until;
        split || by_the_clock_thread && self.stopped.iter().any(stopped)
    }

    /// Whether the row was loaded from the new server, and kept, by a node that could not hear of its changes (X6).
    fn is_kept_of_new(
        &self,
        node: NodeId,
        read: &RawRead,
        timeline: &Timeline,
        versions: &HashMap<(Key, u64), Version>,
    ) -> bool {
        let is_new = read.seen.is_some_and(|number| {
            versions.get(&(read.key, number)).is_some_and(|version| version.era == timeline.era())
        });
        let from_memory = read.loaded.is_some_and(|loaded| loaded + ANSWERED_LATE < read.start);
        let hears = self.moved.get(&node).is_some_and(|moved| *moved < read.end);
        self.split.is_some() && is_new && from_memory && !hears
    }

    /// Whether what the node applied may be a transaction of the former primary, whose id another one has on the new one.
    fn is_of_former(&self, node: NodeId, at: Time) -> bool {
        self.split.is_some_and(|(from, _)| at >= from && self.moved.get(&node).is_none_or(|moved| *moved > at))
    }
}

fn noted(node: NodeId, at: Time, note: &RawNote, timeline: &Timeline, excused: &Excuses) -> Option<Noted> {
    match note {
        RawNote::Applied { .. } if excused.is_of_former(node, at) => None,
        RawNote::Applied { xid, keys } => Some(Noted::Applied { xid: *xid, keys: keys.clone() }),
        RawNote::Gap { since, .. } => Some(Noted::Gap { since: *since }),
        RawNote::Coherent { incarnation } => timeline.era_of(*incarnation).map(|era| Noted::Coherent { era }),
        RawNote::LineLost | RawNote::Unreadable => None,
    }
}

/// The last committed version of each key, which must be what the table has.
fn advance(history: &History, survivors: &Survivors, base: &mut Base, wrong: &mut Vec<String>) {
    for write in history.writes.iter().filter(|write| write.outcome == Outcome::Committed) {
        let last = base.entry(write.key).or_insert_with(|| write.clone());
        if write.version >= last.version {
            *last = Write { sent: 0, ended: 0, ..write.clone() };
        }
    }
    for (key, last) in &*base {
        let there = (!last.deletes).then_some(last.version.number);
        if survivors.rows.get(key) != there.as_ref() {
            wrong.push(format!("key {key}: the table has {:?}, and the notes have {there:?}", survivors.rows.get(key)));
        }
    }
}

#[cfg(test)]
#[path = "notes_tests.rs"]
mod tests;
