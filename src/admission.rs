//! Which rows that somebody else has read may be taken for a load of this node's own.
//!
//! A shared tier keeps rows with what their load *saw*. Nothing else about the tier is believed: it may have lost changes, be slow,
//! or have come back from an old dump. A row is *admitted* if all of this holds, of numbers that this node has from Postgres alone:
//!
//! * its load saw every change of the key that this node has applied: the *slot* of the key has the newest transaction id that a
//!   message told, and it is below the load's `xmin`, so that the transaction had ended (I1);
//! * its load came after the *floor*: after a fence that was sent when the gate already showed the word that it shows now. So it saw
//!   whatever was committed in a gap, before the node began to listen, or while triggers were off (I1, X32);
//! * its load saw no less than any that this node has handed out for the key (I2, X33): the slot has, of those, the largest number of
//!   transactions that had ended. Once a fence counts in whose snapshot as many had ended, all that those loads saw has been applied,
//!   and the first two see to it.
//!
//! That number orders what loads saw. On one primary, of two snapshots one shows all that the other shows, so that the one with more
//! ended transactions is the later one, and the same number is the same snapshot (`Snapshot::sight`).
//!
//! The rule is asked about *after* a flight has started. What is applied before that is in the slot; what is applied later makes the
//! flight void, as for any load. Keys that share a slot share what they have to fear: it refuses more, never less.

use std::{collections::VecDeque, hash::BuildHasher};

use quick_cache::DefaultHashBuilder;

use crate::{
    change::Mark,
    coherence::Boot,
    gate::Word,
    key::Key,
    snapshot::Sight,
    sync::{AtomicU64, Mutex, Ordering, lock},
};

/// More of them: fewer rows are refused because of another key. 256 kB for each cache that has a tier.
#[cfg(not(shuttle))]
const SLOTS: usize = 16_384;
#[cfg(shuttle)]
const SLOTS: usize = 1;

/// How many fences are remembered, for the age of what is admitted.
const FENCES_MAX: usize = 128;

/// What a cache knows of the keys of a tier.
pub(crate) struct Admission {
    slots: Box<[Slot]>,
    hasher: DefaultHashBuilder,
    /// Taken last, and with no other but the stripe of a key.
    floor: Mutex<Floor>,
}

/// Of the keys that share it.
struct Slot {
    /// The newest transaction that a message was about.
    told: AtomicU64,
    /// Of the loads that were handed out: the most transactions that had ended.
    given: AtomicU64,
}

/// From when on the slots tell of every change.
#[derive(Clone, Debug)]
enum Floor {
    Unknown,
    /// A fence counts, but may have been sent before the gate showed this.
    Soon(Word),
    /// A fence counts that was sent when it did.
    At(Since),
}

#[derive(Clone, Debug)]
struct Since {
    word: Word,
    /// What ended before that fence was sent has an id below this.
    xmax: u64,
    /// How many transactions had ended when the last fence that counts was sent: what they did has been applied.
    covered: u64,
    /// That fence, and later ones: when each was sent, and the position in the log. There is at least one.
    fences: VecDeque<(Boot, u64)>,
}

/// What the load of a row must have seen for the row to be admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Its `xmin` must not be smaller.
    pub(crate) xmin: u64,
    /// Nor the number of transactions that had ended.
    pub(crate) ended: u64,
}

impl Admission {
    pub(crate) fn new() -> Self {
        Self::with_slots(SLOTS)
    }

    /// With other bounds: for the model, which has one slot.
    pub(crate) fn with_slots(slots: usize) -> Self {
        let slot = || Slot { told: AtomicU64::new(0), given: AtomicU64::new(0) };
        Self {
            slots: (0..slots).map(|_| slot()).collect(),
            hasher: DefaultHashBuilder::default(),
            floor: Mutex::new(Floor::Unknown),
        }
    }

    fn slot<K: Key>(&self, key: &K) -> &Slot {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let slot = self.hasher.hash_one(key) as usize % self.slots.len();
        &self.slots[slot]
    }

    /// This key was changed by this transaction. `None`: nobody knows by which, so that nothing is admitted before the next
    /// fences say from when on all is known again. To be called under the key's stripe, with what else an invalidation does.
    pub(crate) fn told<K: Key>(&self, key: &K, by: Option<u64>) {
        match by {
            Some(xid) => drop(self.slot(key).told.fetch_max(xid, Ordering::AcqRel)),
            None => self.doubt(),
        }
    }

    /// A load of this key was handed out, kept or not. `None`: nobody knows what it saw.
    pub(crate) fn given<K: Key>(&self, key: &K, saw: Option<Sight>) {
        match saw {
            Some(saw) => drop(self.slot(key).given.fetch_max(saw.ended, Ordering::AcqRel)),
            None => self.doubt(),
        }
    }

    /// Something has happened that the slots do not tell of.
    pub(crate) fn doubt(&self) {
        *lock(&self.floor) = Floor::Unknown;
    }

    /// A fence counts. To be called with what the gate shows, and while nobody moves it.
    ///
    /// The first one that counts after the gate was moved, or after a doubt, may have been sent before that: at most one is under way. So
    /// the floor is that of the second one:
    ///
    /// 1. a fence is sent; its snapshot is taken; a TRUNCATE commits, and its message is queued before the fence's;
    /// 2. the TRUNCATE is applied, which moves the gate; the fence is applied, and counts. The transaction may be above its `xmax`,
    ///    and is in no slot.
    pub(crate) fn advance(&self, word: Word, sent: Boot, mark: &Mark) {
        let mut floor = lock(&self.floor);
        match &mut *floor {
            _ if !word.is_coherent() => *floor = Floor::Unknown,
            Floor::At(since) if since.word == word => since.push(sent, mark),
            Floor::Soon(soon) if *soon == word => {
                *floor = Floor::At(Since {
                    word,
                    xmax: mark.snapshot.xmax(),
                    covered: mark.snapshot.sight().ended,
                    fences: VecDeque::from([(sent, mark.lsn)]),
                });
            }
            _ => *floor = Floor::Soon(word),
        }
    }

    /// What the load of a row with this key must have seen; `None`: nothing is admitted now. `shown` is what the gate shows.
    pub(crate) fn needs<K: Key>(&self, key: &K, shown: Word) -> Option<Needs> {
        lock(&self.floor).under(shown).map(|since| self.above(since, key))
    }

    fn above<K: Key>(&self, since: &Since, key: &K) -> Needs {
        let slot = self.slot(key);
        let (told, given) = (slot.told.load(Ordering::Acquire), slot.given.load(Ordering::Acquire));
        let ended = if given <= since.covered { 0 } else { given };
        Needs { xmin: since.xmax.max(told.saturating_add(1)), ended }
    }

    /// Whether a row with this key may be taken whose load saw this, before this position of the log: if so, since when it has been true at
    /// the earliest. To be called after the flight of the key has started.
    pub(crate) fn admit<K: Key>(&self, key: &K, shown: Word, saw: Sight, lsn: u64) -> Option<Boot> {
        let floor = lock(&self.floor);
        let since = floor.under(shown)?;
        let needs = self.above(since, key);
        if saw.xmin < needs.xmin || saw.ended < needs.ended {
            return None;
        }
        since.fences.iter().rev().find(|(_, logged)| *logged < lsn).map(|(sent, _)| *sent)
    }
}

impl Floor {
    /// If it is known for the time since the gate began to show this.
    fn under(&self, shown: Word) -> Option<&Since> {
        match self {
            Self::At(since) if since.word == shown => Some(since),
            _ => None,
        }
    }
}

impl Since {
    /// Remembers this fence; of those from long ago, fewer and fewer: they lie apart by a quarter of their age at most, or are neighbours.
    fn push(&mut self, sent: Boot, mark: &Mark) {
        self.covered = self.covered.max(mark.snapshot.sight().ended);
        if self.fences.len() >= FENCES_MAX {
            let mut kept: VecDeque<(Boot, u64)> = VecDeque::with_capacity(FENCES_MAX);
            for (n, fence) in self.fences.iter().enumerate() {
                let is_needed = match (kept.back(), self.fences.get(n + 1)) {
                    (Some((before, _)), Some((after, _))) => {
                        after.saturating_sub(*before) > sent.saturating_sub(*after) / 4
                    }
                    _ => true,
                };
                if is_needed {
                    kept.push_back(*fence);
                }
            }
            self.fences = kept;
        }
        self.fences.push_back((sent, mark.lsn));
    }
}

/// The model of `src/verify/model/` keeps the states of a node, and tells them apart. It has no clock for ages.
#[cfg(feature = "verify")]
mod states {
    use std::{
        fmt,
        hash::{Hash, Hasher},
    };

    use super::{Admission, AtomicU64, Floor, Ordering, Slot, Word, lock};

    type Facts = (Vec<(u64, u64)>, Option<(Word, Option<(u64, u64, u64)>)>);

    impl Admission {
        fn facts(&self) -> Facts {
            let of = |number: &AtomicU64| number.load(Ordering::Acquire);
            let floor = match &*lock(&self.floor) {
                Floor::Unknown => None,
                Floor::Soon(word) => Some((*word, None)),
                Floor::At(since) => Some((since.word, Some((since.xmax, since.covered, since.fences[0].1)))),
            };
            (self.slots.iter().map(|slot| (of(&slot.told), of(&slot.given))).collect(), floor)
        }
    }

    impl Clone for Admission {
        fn clone(&self) -> Self {
            let slots = self.facts().0.into_iter();
            Self {
                slots: slots.map(|(told, given)| Slot { told: told.into(), given: given.into() }).collect(),
                hasher: self.hasher.clone(),
                floor: super::Mutex::new(lock(&self.floor).clone()),
            }
        }
    }

    impl PartialEq for Admission {
        fn eq(&self, other: &Self) -> bool {
            self.facts() == other.facts()
        }
    }

    impl Hash for Admission {
        fn hash<H: Hasher>(&self, state: &mut H) {
            self.facts().hash(state);
        }
    }

    impl fmt::Debug for Admission {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.facts().fmt(f)
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{gate::Words, snapshot::Snapshot};

    fn sight(snapshot: &str) -> Sight {
        snapshot.parse::<Snapshot>().expect("a snapshot").sight()
    }

    fn mark(snapshot: &str, lsn: u64) -> Mark {
        Mark { snapshot: snapshot.parse().expect("a snapshot"), lsn }
    }

    fn at(seconds: u64) -> Boot {
        Duration::from_secs(seconds)
    }

    /// Of a gate that shows a word since before two fences: the floor is 20, at position 100.
    fn settled() -> (Admission, Word, Words) {
        let (admission, mut words) = (Admission::new(), Words::default());
        let word = words.fresh(true);
        admission.advance(word, at(1), &mark("10:10:", 50));
        admission.advance(word, at(2), &mark("18:20:18", 100));
        (admission, word, words)
    }

    #[test]
    fn nothing_is_admitted_before_a_fence_that_was_sent_after_the_gate_had_moved() {
        let (admission, mut words) = (Admission::new(), Words::default());
        let word = words.fresh(true);
        let new = |lsn| (sight("90:90:"), lsn);
        let admits = |word, (saw, lsn)| admission.admit(&1, word, saw, lsn).is_some();
        assert!(!admits(word, new(900)));
        admission.advance(word, at(1), &mark("10:10:", 50));
        assert!(!admits(word, new(900)), "that one may have been sent before");
        admission.advance(word, at(2), &mark("18:20:18", 100));
        assert!(admits(word, new(900)));
        let next = words.fresh(true);
        assert!(!admits(next, new(900)), "the gate has moved: what moved it is in no slot");
        admission.advance(next, at(3), &mark("20:20:", 150));
        assert!(!admits(next, new(900)));
        admission.advance(next, at(4), &mark("20:20:", 200));
        assert!(admits(next, new(900)));
        admission.advance(words.fresh(false), at(5), &mark("20:20:", 300));
        assert!(!admits(next, new(900)));
    }

    #[test]
    fn x32_what_was_loaded_before_the_floor_is_not_admitted() {
        let (admission, word, _) = settled();
        assert_eq!(admission.admit(&1, word, sight("19:30:19"), 900), None, "19 may have ended before the fence");
        assert_eq!(admission.admit(&1, word, sight("20:20:"), 100), None, "at the position of the fence, or before it");
        assert_eq!(admission.admit(&1, word, sight("20:20:"), 101), Some(at(2)));
    }

    #[test]
    fn what_a_message_told_must_have_been_seen() {
        let (admission, word, _) = settled();
        admission.told(&1, Some(25));
        admission.told(&1, Some(23));
        assert_eq!(admission.admit(&1, word, sight("25:40:25"), 900), None);
        assert_eq!(admission.admit(&1, word, sight("26:40:26"), 900), Some(at(2)));
        assert_eq!(admission.needs(&1, word), Some(Needs { xmin: 26, ended: 0 }));
        admission.told(&2, None);
        assert_eq!(admission.needs(&1, word), None, "somebody changed something, nobody knows when");
        for n in 0..2 {
            admission.advance(word, at(3 + n), &mark("40:40:", 300));
        }
        assert_eq!(admission.needs(&1, word), Some(Needs { xmin: 40, ended: 0 }));
    }

    #[test]
    fn x33_what_was_handed_out_must_have_been_seen() {
        let (admission, word, _) = settled();
        admission.given(&1, Some(sight("21:30:21,22")));
        assert_eq!(admission.admit(&1, word, sight("21:30:21,22,25"), 900), None, "25 had not ended yet");
        assert!(admission.admit(&1, word, sight("21:30:21,22"), 900).is_some(), "the same snapshot");
        assert!(admission.admit(&1, word, sight("21:30:22"), 900).is_some());
        let before = admission.needs(&1, word).expect("a floor");
        admission.advance(word, at(3), &mark("21:29:21,22", 200));
        assert_eq!(admission.needs(&1, word), Some(before), "28 of 30 had ended then, and here 27 of 29");
        admission.advance(word, at(4), &mark("21:31:21,22,23", 300));
        assert_eq!(admission.needs(&1, word), Some(Needs { ended: 0, ..before }), "all that it saw has been applied");
        admission.given(&1, None);
        assert_eq!(admission.needs(&1, word), None);
    }

    #[test]
    fn the_age_is_that_of_the_last_fence_before_the_load() {
        let (admission, word, _) = settled();
        for n in 0..10_000 {
            admission.advance(word, at(3 + n), &mark("20:20:", 200 + 100 * n));
        }
        let age = |lsn| admission.admit(&1, word, sight("20:20:"), lsn).expect("admitted").as_secs();
        assert_eq!((age(101), age(1_000_101)), (2, 10_002));
        for fence in 0..10_000 {
            let (said, sent) = (age(200 + 100 * fence + 50), 3 + fence);
            assert!(said <= sent, "older than it is, never younger: {said} {sent}");
            assert!(sent - said <= 2 + (10_000 - fence) / 4, "by a quarter of it at most: {said} of {sent}");
        }
        let Floor::At(since) = &*lock(&admission.floor) else { panic!("a floor") };
        assert!(since.fences.len() <= FENCES_MAX);
    }
}
