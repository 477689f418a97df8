//! What a store holds: rows in one `quick_cache`, absent rows in another, each with a bound of its own. So who asks for keys that
//! do not exist, however many, evicts no row, and fills no more memory than absent rows may have.
//!
//! A key is in at most one of the two: who adds it to one takes it out of the other first, under the key's stripe lock. A reader, who
//! takes no such lock, may find it in neither for a moment, which is a miss; and then looks again under that lock.

use std::collections::HashSet;

use quick_cache::{DefaultHashBuilder, Lifecycle, Options, OptionsBuilder, Weighter, sync::Cache};
use smallvec::SmallVec;

use super::{Entry, Key};
use crate::{
    key::KeyPart,
    sync::{Arc, AtomicU64, Mutex, Ordering, lock},
};

/// How much one store may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Rows; with `bytes`, the number that is expected.
    pub(crate) rows: usize,
    /// What rows may weigh, in place of their number.
    pub(crate) bytes: Option<usize>,
    /// What absent rows may weigh.
    pub(crate) absent_bytes: usize,
}

impl Bounds {
    /// So many rows, and absent rows of so small a weight that there are about as many.
    #[cfg(any(test, fuzzing, feature = "verify"))]
    pub(crate) fn rows<K: Key, V>(rows: usize) -> Self {
        Self { rows, bytes: None, absent_bytes: (rows + 1) * overhead::<K, V>() }
    }
}

pub(super) struct Held<K, V> {
    rows: Shelf<K, V>,
    absent: Shelf<K, V>,
    /// How many rows can be held, at most.
    room: usize,
    pins: Arc<Pins<K>>,
}

type Shelf<K, V> = Cache<K, Arc<Entry<V>>, Weights, DefaultHashBuilder, Keeping<K>>;

impl<K: Key, V: Send + Sync + 'static> Held<K, V> {
    pub(super) fn new(bounds: Bounds) -> Self {
        let overhead = overhead::<K, V>();
        let pins = Arc::<Pins<K>>::default();
        let shelf = |weight: usize, expected: usize, shard_min: usize| {
            let options = options(weight, expected, shard_min);
            Cache::with_options(options, Weights, DefaultHashBuilder::default(), Keeping { pins: Arc::clone(&pins) })
        };
        let rows = match bounds.bytes {
            Some(bytes) => shelf(bytes, bounds.rows.min(bytes / overhead), SHARD_MIN),
            None => shelf(bounds.rows, bounds.rows, 1),
        };
        let absent = shelf(bounds.absent_bytes, bounds.absent_bytes / overhead, ABSENT_SHARD_MIN);
        let room = bounds.bytes.map_or(bounds.rows, |bytes| bytes / overhead);
        Self { rows, absent, room, pins }
    }

    #[expect(clippy::inline_always, reason = "a call costs a tenth of a hit: rowcache-budget")]
    #[inline(always)]
    pub(super) fn get(&self, key: &K) -> Option<Arc<Entry<V>>> {
        match self.rows.get(key) {
            None => self.get_absent(key),
            found => found,
        }
    }

    #[cold]
    #[inline(never)]
    fn get_absent(&self, key: &K) -> Option<Arc<Entry<V>>> {
        self.absent.get(key)
    }

    /// As [`get`](Self::get), and no reason to keep the entry.
    pub(super) fn peek(&self, key: &K) -> Option<Arc<Entry<V>>> {
        self.rows.peek(key).or_else(|| self.absent.peek(key))
    }

    /// Holds the entry, if it is not too large for that, in place of what there is. Under the key's stripe lock. What had to go is to be
    /// dropped, and asked about, after it.
    pub(super) fn insert(&self, key: &K, entry: &Arc<Entry<V>>) -> Removed<K, V> {
        let (shelf, other) = if entry.is_row() { (&self.rows, &self.absent) } else { (&self.absent, &self.rows) };
        let (known, other) = other.remove(key).unzip();
        let mut removed = Removed { key: known, other, ..Removed::default() };
        shelf.insert_with_lifecycle(key.clone(), Arc::clone(entry), &mut removed.evicted);
        removed
    }

    pub(super) fn remove(&self, key: &K) -> Removed<K, V> {
        let (key, other) = self.rows.remove(key).or_else(|| self.absent.remove(key)).unzip();
        Removed { key, other, ..Removed::default() }
    }

    /// Reclaims the entry of `key` if it is of that kind.
    pub(super) fn remove_if(&self, key: &K, is_dead: impl Fn(&Arc<Entry<V>>) -> bool) -> Option<Arc<Entry<V>>> {
        let removed = self.rows.remove_if(key, &is_dead).or_else(|| self.absent.remove_if(key, &is_dead));
        removed.map(|(_, entry)| entry)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, Arc<Entry<V>>)> + '_ {
        self.rows.iter().chain(self.absent.iter())
    }

    /// Rows held, and absent ones.
    pub(super) fn len(&self) -> [u64; 2] {
        [&self.rows, &self.absent].map(|shelf| shelf.len() as u64)
    }

    /// What rows weigh, and absent ones.
    pub(super) fn weight(&self) -> [u64; 2] {
        [&self.rows, &self.absent].map(Cache::weight)
    }

    /// What rows may weigh.
    pub(super) fn capacity(&self) -> u64 {
        self.rows.capacity()
    }

    pub(super) fn room(&self) -> usize {
        self.room
    }

    pub(super) fn is_pinned(&self, key: &K) -> bool {
        self.pins.has(key)
    }

    /// Whether `key` is kept however little space there is. Returns whether that is news.
    pub(super) fn pin(&self, key: &K, pinned: bool) -> bool {
        self.pins.set(key, pinned)
    }
}

/// Entries that are not held any more, to be dropped under no lock.
pub(super) struct Removed<K, V> {
    evicted: Evicted<K, V>,
    /// The key that was asked for, as it was held.
    key: Option<K>,
    other: Option<Arc<Entry<V>>>,
}

impl<K, V> Default for Removed<K, V> {
    fn default() -> Self {
        Self { evicted: Evicted::default(), key: None, other: None }
    }
}

impl<K: Key, V> Removed<K, V> {
    /// What was held of the key itself.
    pub(super) fn entry(&self) -> Option<&Entry<V>> {
        self.other.as_deref()
    }

    /// The key, if something was held of it; to be taken once.
    pub(super) fn take_key(&mut self) -> Option<K> {
        self.key.take()
    }

    /// Those that had to go, or were replaced.
    pub(super) fn evicted_keys(&self) -> impl Iterator<Item = &K> {
        self.evicted.0.iter().map(|(key, _)| key)
    }

    /// How many had to go for lack of space when this entry of `key` came, and whether that was one of them: too large.
    pub(super) fn for_space(&self, key: &K, came: &Arc<Entry<V>>) -> (u64, bool) {
        let oversized = self.evicted.0.iter().any(|(_, entry)| Arc::ptr_eq(entry, came));
        // What the key had before was replaced.
        let others = self.evicted.0.iter().filter(|(other, _)| other != key).count();
        (others as u64 + u64::from(oversized), oversized)
    }
}

/// What an entry weighs is counted when it is made.
#[derive(Clone)]
struct Weights;

impl<K, V> Weighter<K, Arc<Entry<V>>> for Weights {
    fn weight(&self, _: &K, entry: &Arc<Entry<V>>) -> u64 {
        u64::from(entry.weight.get())
    }
}

/// What is kept whatever the space, and what becomes of the rest.
struct Keeping<K> {
    pins: Arc<Pins<K>>,
}

impl<K> Clone for Keeping<K> {
    fn clone(&self) -> Self {
        Self { pins: Arc::clone(&self.pins) }
    }
}

/// Mostly none, or the one that was replaced.
struct Evicted<K, V>(SmallVec<[(K, Arc<Entry<V>>); 1]>);

impl<K, V> Default for Evicted<K, V> {
    fn default() -> Self {
        Self(SmallVec::new())
    }
}

impl<K: Key, V> Lifecycle<K, Arc<Entry<V>>> for Keeping<K> {
    type RequestState = Evicted<K, V>;

    fn is_pinned(&self, key: &K, _: &Arc<Entry<V>>) -> bool {
        self.pins.has(key)
    }

    fn on_evict(&self, evicted: &mut Evicted<K, V>, key: K, entry: Arc<Entry<V>>) {
        evicted.0.push((key, entry));
    }
}

/// Keys whose entries are not evicted.
struct Pins<K> {
    /// So that eviction need not ask while there are none.
    count: AtomicU64,
    keys: Mutex<HashSet<K>>,
}

impl<K> Default for Pins<K> {
    fn default() -> Self {
        Self { count: AtomicU64::new(0), keys: Mutex::default() }
    }
}

impl<K: Key> Pins<K> {
    fn has(&self, key: &K) -> bool {
        self.count.load(Ordering::Relaxed) > 0 && lock(&self.keys).contains(key)
    }

    fn set(&self, key: &K, pinned: bool) -> bool {
        let mut keys = lock(&self.keys);
        let is_news = if pinned { keys.insert(key.clone()) } else { keys.remove(key) };
        self.count.store(keys.len() as u64, Ordering::Relaxed);
        is_news
    }
}

/// So much must fit into a part of the cache that has a lock of its own, if the bound allows: the largest row is a little smaller.
const SHARD_MIN: usize = 1 << 20;
const ABSENT_SHARD_MIN: usize = 1 << 14;

fn options(weight: usize, expected: usize, shard_min: usize) -> Options {
    let mut options = OptionsBuilder::new();
    let parts = std::thread::available_parallelism().map_or(4, |cores| cores.get() * 4);
    // Rounded up to a power of two later on.
    options.shards(prev_power_of_two(parts.min(weight / shard_min.max(1))));
    options.weight_capacity(weight as u64).estimated_items_capacity(expected);
    options.build().expect("all that it needs")
}

fn prev_power_of_two(n: usize) -> usize {
    1 << n.max(1).ilog2()
}

/// Bytes that an entry takes beside what its key and its value own elsewhere: itself, its counts, its place in a full
/// `quick_cache` with the memory of keys that were evicted (96 bytes and the key, measured at a million entries), and what an allocator
/// rounds up.
pub(super) fn overhead<K, V>() -> usize {
    (size_of::<Entry<V>>() + 2 * size_of::<usize>()).next_multiple_of(16) + 96 + size_of::<K>()
}

/// Bytes that a key owns elsewhere: its texts, each with what an allocator rounds up. In the cache, and in the memory of evicted keys there
/// are only hashes.
pub(super) fn heap_of<K: Key>(key: &K) -> usize {
    let texts = key.to_parts().into_iter().filter_map(|part| match part {
        KeyPart::Text(text) => Some(text.len().next_multiple_of(16)),
        KeyPart::Int(_) | KeyPart::Uuid(_) => None,
    });
    texts.sum()
}
