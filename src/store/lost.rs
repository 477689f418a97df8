//! What a gap costs: the keys of entries that were taken away in it, for who reads them again when it is over (`refill.rs`).
//!
//! Most of what a gap puts out of service stays where it is, and is found there. Not so what was loaded in the gap, which is what is
//! used most, since a load that is not published takes away what was held (I2); nor what a clear has left when its memory is
//! reclaimed, which is everything after a restart of the server.

use std::{cmp::Reverse, collections::HashSet};

use quick_cache::DefaultHashBuilder;

use super::{Entry, Key, Store};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// Keys with their heat, no more than twice as many as are read again.
pub(super) struct Lost<K> {
    max: usize,
    /// 1 from the beginning of a gap until its keys were taken.
    notes: AtomicU64,
    /// No other lock is taken under it.
    keys: Mutex<Vec<(u32, K)>>,
}

impl<K: Key> Lost<K> {
    pub(super) fn new(max: usize) -> Self {
        Self { max, notes: AtomicU64::new(0), keys: Mutex::default() }
    }

    /// A gap begins.
    pub(super) fn begin(&self) {
        if self.max > 0 {
            lock(&self.keys).clear();
            self.notes.store(1, Ordering::Release);
        }
    }

    pub(super) fn is_noting(&self) -> bool {
        self.notes.load(Ordering::Acquire) > 0
    }

    /// To be called before the entry is taken away, so that who looks at what is held, and then here, misses none.
    pub(super) fn note(&self, keys: impl IntoIterator<Item = (u32, K)>) {
        if !self.is_noting() {
            return;
        }
        let mut kept = lock(&self.keys);
        kept.extend(keys);
        if kept.len() > 2 * self.max {
            hottest(&mut kept, self.max);
        }
    }

    fn take(&self) -> Vec<(u32, K)> {
        let mut keys = lock(&self.keys);
        self.notes.store(0, Ordering::Release);
        std::mem::take(&mut keys)
    }
}

/// Leaves the `max` hottest, in any order.
fn hottest<K>(keys: &mut Vec<(u32, K)>, max: usize) {
    if keys.len() > max {
        keys.select_nth_unstable_by_key(max, |(heat, _)| Reverse(*heat));
        keys.truncate(max);
    }
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// The store of a table of which so many rows are read again after a gap.
    pub(crate) fn refilling(mut self, rows: usize) -> Self {
        self.lost = Lost::new(rows);
        self
    }

    /// The keys that a gap has cost, of up to so many entries, with their heat: those used most come first. To be asked once, when it is over.
    pub(crate) fn used_before(&self, max: usize) -> Vec<(u32, K)> {
        let word = self.gate.word();
        let mut keys = self.by_use(|entry| entry.word != word);
        // Of what is held, no more can be among them; and a million keys are not looked for twice.
        hottest(&mut keys, max);
        // After the look at what is held: see `Lost::note`. What was taken away in between is in both.
        let lost = self.lost.take();
        if !lost.is_empty() {
            keys.extend(lost);
            let mut seen = HashSet::with_capacity_and_hasher(keys.len(), DefaultHashBuilder::default());
            keys.retain(|(_, key)| seen.insert(key.clone()));
        }
        hottest(&mut keys, max);
        keys.sort_unstable_by_key(|(heat, _)| Reverse(*heat));
        keys
    }

    /// These were to be read again, when another gap came.
    pub(crate) fn lost_again(&self, keys: &[(u32, K)]) {
        self.lost.note(keys.iter().filter(|(_, key)| self.entries.peek(key).is_none()).cloned());
    }

    /// What is held of `key` is about to be taken away.
    pub(super) fn note_loss(&self, key: &K) {
        if self.lost.is_noting()
            && let Some(entry) = self.entries.peek(key)
        {
            self.lost.note([(heat(&entry), key.clone())]);
        }
    }
}

pub(super) fn heat<V>(entry: &Entry<V>) -> u32 {
    entry.heat.load(std::sync::atomic::Ordering::Relaxed)
}
