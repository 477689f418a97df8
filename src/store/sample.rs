//! Hits that are to be audited: how they get from readers to the auditor (`audit.rs`), and what it asks the store.
//!
//! One hit in [`SAMPLED`](crate::stats::SAMPLED) is looked at here, and takes a seat if one is free. The auditor frees so
//! many at a time, so that the cost is bounded however many hits there are.

use std::sync::atomic::{AtomicU32, Ordering};

use super::{Entry, Key, Store};
use crate::sync::{Arc, Mutex, lock};

/// A hit: the entry that was served is what the auditor must find there again.
pub(crate) struct Served<K, V> {
    pub(crate) key: K,
    pub(crate) entry: Arc<Entry<V>>,
}

/// Seats for hits.
pub(super) struct Sample<K, V> {
    /// Free ones. 0, always, unless the table is audited.
    seats: AtomicU32,
    /// Alone, with no other lock, and no code of the user runs under it.
    taken: Mutex<Vec<Served<K, V>>>,
}

impl<K, V> Default for Sample<K, V> {
    fn default() -> Self {
        Self { seats: AtomicU32::new(0), taken: Mutex::default() }
    }
}

impl<K, V> Sample<K, V> {
    pub(super) fn is_open(&self) -> bool {
        self.seats.load(Ordering::Relaxed) > 0
    }
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// The store of a table that is audited.
    pub(crate) fn audited(mut self, is_audited: bool) -> Self {
        self.is_audited = is_audited;
        self
    }

    /// This hit, which took place just now, is audited if there is a seat left.
    #[cold]
    #[inline(never)]
    pub(super) fn take_seat(&self, key: &K, entry: &Arc<Entry<V>>) {
        let one_less = |free: u32| free.checked_sub(1);
        if self.sample.seats.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            let served = Served { key: key.clone(), entry: Arc::clone(entry) };
            lock(&self.sample.taken).push(served);
        }
    }

    /// Frees so many seats.
    pub(crate) fn open_seats(&self, seats: u32) {
        self.sample.seats.store(seats, Ordering::Relaxed);
    }

    /// The hits that have taken seats, each entry once. No seat is free afterwards.
    pub(crate) fn take_sample(&self) -> Vec<Served<K, V>> {
        self.sample.seats.store(0, Ordering::Relaxed);
        let mut taken = std::mem::take(&mut *lock(&self.sample.taken));
        taken.sort_unstable_by_key(|served| Arc::as_ptr(&served.entry).addr());
        taken.dedup_by(|one, other| Arc::ptr_eq(&one.entry, &other.entry));
        taken
    }

    #[cfg(all(test, not(shuttle)))]
    pub(crate) fn has_seats(&self) -> bool {
        self.sample.is_open()
    }

    /// Whether a hit that took place now would serve this very entry. The caller holds it, so that no other one can be at
    /// its address.
    pub(crate) fn still_serves(&self, served: &Served<K, V>) -> bool {
        self.peek(&served.key).is_some_and(|entry| Arc::ptr_eq(&entry, &served.entry))
    }
}
