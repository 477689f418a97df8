//! What `src/store.rs` and `src/store/` rely on in `quick_cache`. Placeholders and `clear`, `retain`, `drain`, `replace` and
//! `set_capacity` are not used, so that what they do to loads under way is nothing to us.

use std::sync::{
    Arc, Mutex, Weak,
    atomic::{AtomicUsize, Ordering},
};

use quick_cache::sync::Cache;

fn full(capacity: usize) -> Cache<u64, Arc<u64>> {
    let cache = Cache::new(capacity);
    for key in 0..1000 {
        cache.insert(key, Arc::new(key));
    }
    cache
}

/// `Store::finish` publishes by `insert_with_lifecycle`: what is inserted is there for whoever looks next, also over a key
/// that is held, and the old value is in nobody's way.
#[test]
fn what_is_inserted_is_what_is_got() {
    let cache = Cache::new(10);
    for value in 0..3 {
        let mut replaced = Default::default();
        cache.insert_with_lifecycle(1, Arc::new(value), &mut replaced);
        assert_eq!(cache.get(&1).as_deref(), Some(&value));
        assert_eq!(cache.peek(&1).as_deref(), Some(&value));
        assert_eq!(cache.len(), 1);
    }
}

/// `Store::invalidate` and `Store::finish` forget a key by `remove`, held or not: it is gone when the call returns, and given
/// back, so that it is dropped under no lock of ours (nor of the shard's).
#[test]
fn what_is_removed_is_gone_and_given_back() {
    let cache = Cache::new(10);
    assert_eq!(cache.remove(&1), None);
    cache.insert(1, Arc::new(7));
    assert_eq!(cache.remove(&1), Some((1, Arc::new(7))));
    assert!(cache.get(&1).is_none() && cache.peek(&1).is_none() && cache.iter().next().is_none());
    cache.insert(1, Arc::new(8));
    assert_eq!(cache.get(&1).as_deref(), Some(&8), "and it can come back");
}

/// `Store::remove_dead` takes away by `remove_if` what a clear has left: only what the predicate still says, at that moment.
#[test]
fn what_a_predicate_spares_stays() {
    let cache = Cache::new(10);
    cache.insert(1, Arc::new(7));
    assert_eq!(cache.remove_if(&1, |value| **value == 8), None);
    assert!(cache.get(&1).is_some());
    assert_eq!(cache.remove_if(&1, |value| **value == 7), Some((1, Arc::new(7))));
    assert_eq!(cache.remove_if(&1, |_| true), None, "and not when there is nothing");
}

/// `Store::remove_dead` and `Store::used_before` look at all entries by `iter`, while others come and go: what stays the whole
/// time is seen. Code of ours runs between two of them under no lock of the cache.
#[test]
fn iteration_sees_what_stays_and_holds_no_lock() {
    let cache = Cache::new(10_000);
    for key in 0..1000 {
        cache.insert(key, Arc::new(key));
    }
    let mut seen = Vec::new();
    for (key, value) in cache.iter() {
        assert_eq!(key, *value);
        seen.push(key);
        cache.remove(&(1000 + key));
        cache.insert(2000 + key, Arc::new(2000 + key));
    }
    seen.retain(|key| *key < 1000);
    seen.sort_unstable();
    assert_eq!(seen, (0..1000).collect::<Vec<_>>());
}

/// The capacity of a table (`TableOptions::capacity`) bounds its entries, each of which weighs 1.
#[test]
fn no_more_is_held_than_the_capacity() {
    for capacity in [1, 2, 10, 100, 1000] {
        let cache = full(capacity);
        assert!(cache.len() <= capacity && cache.len() >= capacity / 2, "{} of {capacity}", cache.len());
        assert_eq!(cache.iter().count(), cache.len());
        assert_eq!(cache.weight(), cache.len() as u64);
    }
}

/// An eviction may take anything, also what was just inserted. It is never half there: `get`, `peek`, and `iter` agree, which
/// the sweep of the index of hashes relies on (`store/sweep.rs`).
#[test]
fn what_was_evicted_is_nowhere() {
    for capacity in [1, 2, 10, 100] {
        let cache = full(capacity);
        let held: Vec<u64> = cache.iter().map(|(key, _)| key).collect();
        for key in 0..1000 {
            assert_eq!(cache.peek(&key).is_some(), held.contains(&key));
            assert_eq!(cache.get(&key).is_some(), held.contains(&key));
        }
    }
}

/// A peek is no use: `Table::peek`, snapshots and sweeps do not keep an entry alive, a `get` does (`Store::lookup`).
#[test]
fn a_get_keeps_an_entry_and_a_peek_does_not() {
    let survives = |look: fn(&Cache<u64, Arc<u64>>) -> bool| {
        let cache = full(32);
        cache.insert(5000, Arc::new(1));
        for key in 1000..1100 {
            look(&cache);
            cache.insert(key, Arc::new(key));
        }
        look(&cache)
    };
    assert!(survives(|cache| cache.get(&5000).is_some()));
    assert!(!survives(|cache| cache.peek(&5000).is_some()));
}

/// A value that looks into its cache while it is dropped, as the `Drop` of a user's row may.
struct Nosy {
    cache: Weak<Cache<u64, Arc<Nosy>>>,
    dropped: Arc<AtomicUsize>,
}

impl Drop for Nosy {
    fn drop(&mut self) {
        if let Some(cache) = self.cache.upgrade() {
            cache.len();
            cache.peek(&0);
            cache.remove(&u64::MAX);
        }
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }
}

/// "No code of the user runs under any of them" (`store.rs`): values that are replaced, removed, taken by a predicate, or
/// evicted for one that is inserted, are dropped when the shard's lock is free. A deadlock here is the failure.
#[test]
fn values_are_dropped_under_no_lock() {
    let dropped = Arc::new(AtomicUsize::new(0));
    let cache: Arc<Cache<u64, Arc<Nosy>>> = Arc::new(Cache::new(8));
    let nosy = || Arc::new(Nosy { cache: Arc::downgrade(&cache), dropped: Arc::clone(&dropped) });
    for key in 0..500 {
        let mut evicted = Default::default();
        cache.insert_with_lifecycle(key % 50, nosy(), &mut evicted);
        assert!(evicted.iter().flatten().count() <= 1, "entries of one weight make room one by one");
        drop(evicted);
        if key % 3 == 0 {
            drop(cache.remove(&(key % 50)));
        }
        if key % 5 == 0 {
            drop(cache.remove_if(&(key % 50), |_| true));
        }
    }
    assert_eq!(dropped.load(Ordering::Relaxed) + cache.len(), 500, "each is dropped once, or held");
}

/// `Store::finish` holds the state of the insertion until the stripe is free again: what was evicted lives until then.
#[test]
fn what_an_insertion_evicts_is_handed_over() {
    let cache = Cache::new(1);
    let told = Mutex::new(Vec::new());
    for key in 0..10_u64 {
        let mut evicted = Default::default();
        cache.insert_with_lifecycle(key, Arc::new(key), &mut evicted);
        told.lock().unwrap().extend(evicted.into_iter().flatten().map(|(key, _)| key));
    }
    let mut all = told.into_inner().unwrap();
    all.extend(cache.iter().map(|(key, _)| key));
    all.sort_unstable();
    assert_eq!(all, (0..10).collect::<Vec<_>>());
}
