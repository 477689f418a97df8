//! Which entries have which tags, and how a change of what a tag stands for reaches loads that do not know yet that they depend on it.
//!
//! A key is known before its load, so that a change of it finds the flight. A tag is known when the load ends. So changes leave a trace:
//! they are numbered, and each tag has a *slot* among a fixed number, with the number of the last change of a tag in it.
//!
//! The race that must not be lost (X15), and the lines that close it:
//!
//! 1. the load of key 7 begins: [`Tags::now`] is noted. It reads row 3 of another table;
//! 2. somebody changes row 3; the message arrives. [`Tags::changed`] writes the slot, *then* looks up who has the tag: nobody;
//! 3. the load ends. [`Tags::register`] enters it in the index, *then* looks at the slot: it was written since 1, so that
//!    nothing is published.
//!
//! Were it entered before the look-up of 2, that would find it, and take the entry away under the key's stripe, where 3 happens.
//!
//! And the race of readers, which keys do not have (I2): after 2, somebody asks for key 7, and joins the load, because nothing has voided
//! it. He must not be given what it has read. So each caller notes the number when he asks, and if the load turns out to be overtaken, those who
//! asked when it was not what it had been when the load began wait for another one ([`Flight::defer`](crate::fill::Flight::defer)). To compare it with
//! the slot would not do: that has the last change, which may have come after the question, and another one before it. Nobody
//! waits for more than two loads: the second one begins after he asked, so whatever overtakes it came later than his question.

use std::{
    collections::{HashMap, HashSet},
    hash::BuildHasher,
};

use quick_cache::DefaultHashBuilder;

use super::{Cause, Change, Key, Store};
use crate::{
    sync::{AtomicU64, Mutex, Ordering, lock},
    tags::Tag,
};

/// More of them: fewer loads are repeated because of a tag that is not theirs. 8 kB.
#[cfg(not(shuttle))]
const SLOTS: usize = 1024;
#[cfg(shuttle)]
const SLOTS: usize = 2;

/// A sweep is worth its while with more keys than this.
const SWEEP_MIN: usize = 1024;

pub(super) struct Tags<K> {
    /// How many changes of tags there were.
    changes: AtomicU64,
    /// The number of the last one that hit a tag of this slot.
    slots: Box<[AtomicU64]>,
    hasher: DefaultHashBuilder,
    /// Protects who has which tags. Lock order: a key's stripe, then this. Only the key's `Hash`, `Eq` and `Clone` run under it.
    index: Mutex<Index<K>>,
}

struct Index<K> {
    keys: HashMap<Tag, HashSet<K>>,
    tags: HashMap<K, Vec<Tag>>,
    sweep_above: usize,
}

impl<K: Key> Tags<K> {
    pub(super) fn new() -> Self {
        Self {
            changes: AtomicU64::new(0),
            slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            hasher: DefaultHashBuilder::default(),
            index: Mutex::new(Index { keys: HashMap::new(), tags: HashMap::new(), sweep_above: SWEEP_MIN }),
        }
    }

    /// The number of the last change. To be noted by who asks, and before a load reads.
    pub(super) fn now(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    fn slot(&self, tag: &Tag) -> &AtomicU64 {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let slot = self.hasher.hash_one(tag) as usize % SLOTS;
        &self.slots[slot]
    }

    /// What this tag stands for has changed. Returns whose entries have it.
    fn changed(&self, tag: &Tag) -> Vec<K> {
        let number = self.changes.fetch_add(1, Ordering::SeqCst) + 1;
        self.slot(tag).fetch_max(number, Ordering::SeqCst);
        lock(&self.index).keys.get(tag).into_iter().flatten().cloned().collect()
    }

    /// An entry of this key is about to be published, with these tags; those of the entry before it stay as well. Under the key's stripe.
    pub(super) fn register(&self, key: &K, tags: &[Tag]) {
        lock(&self.index).add(key, tags);
    }

    /// Whether what one of these tags stands for may have changed after `begun`.
    pub(super) fn has_changed(&self, tags: &[Tag], begun: u64) -> bool {
        tags.iter().any(|tag| self.slot(tag).load(Ordering::SeqCst) > begun)
    }

    /// The entry of this key has these tags, and no others; or there is none. Under the key's stripe, once that is so.
    pub(super) fn settle(&self, key: &K, tags: &[Tag]) {
        let mut index = lock(&self.index);
        index.forget(key, tags);
    }

    #[cfg(any(all(test, shuttle), fuzzing))]
    pub(super) fn keys(&self) -> Vec<K> {
        lock(&self.index).tags.keys().cloned().collect()
    }

    fn sweep_is_due(&self) -> bool {
        let index = lock(&self.index);
        index.tags.len() > index.sweep_above
    }
}

impl<K: Key> Index<K> {
    fn add(&mut self, key: &K, tags: &[Tag]) {
        if tags.is_empty() {
            return;
        }
        let of_key = self.tags.entry(key.clone()).or_default();
        for tag in tags {
            if !of_key.contains(tag) {
                of_key.push(tag.clone());
                self.keys.entry(tag.clone()).or_default().insert(key.clone());
            }
        }
    }

    /// All tags of this key but these.
    fn forget(&mut self, key: &K, but: &[Tag]) {
        let Some(tags) = self.tags.get_mut(key) else { return };
        let keys = &mut self.keys;
        tags.retain(|tag| {
            let stays = but.contains(tag);
            if !stays && let Some(of_tag) = keys.get_mut(tag) {
                of_tag.remove(key);
                if of_tag.is_empty() {
                    keys.remove(tag);
                }
            }
            stays
        });
        if tags.is_empty() {
            self.tags.remove(key);
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// What these tags stand for has changed.
    pub(super) fn forget_tagged(&self, tagged: &[Tag], by: &Change) {
        let Some(tags) = self.tags() else { return };
        let by = Cause::of(Some(by));
        for tag in tagged {
            for key in tags.changed(tag) {
                self.forget(&key, &by);
            }
        }
    }

    /// What the entry of this key depends on beside it.
    pub(crate) fn tags_of(&self, key: &K) -> Vec<Tag> {
        self.tags().and_then(|tags| lock(&tags.index).tags.get(key).cloned()).unwrap_or_default()
    }

    pub(super) fn sweep_of_tags_is_due(&self) -> bool {
        self.tags().is_some_and(Tags::sweep_is_due)
    }

    /// Takes keys out of the index that are not held any more.
    pub(super) fn sweep_tags(&self) {
        let Some(tags) = self.tags() else { return };
        let keys: Vec<K> = lock(&tags.index).tags.keys().cloned().collect();
        for key in keys {
            // Who publishes does that under this lock too: either it is held now, or it is entered again later.
            let flights = self.flights(&key);
            if self.entries.peek(&key).is_none() {
                tags.settle(&key, &[]);
            }
            drop(flights);
        }
        let mut index = lock(&tags.index);
        index.sweep_above = (2 * index.tags.len()).max(SWEEP_MIN);
    }
}
