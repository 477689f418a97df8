//! What holds of a store whenever no other thread is inside of it: for tests.

use std::collections::HashSet;

use super::{Flight, HashMap, Key, Store, lock};

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// The structure is whole: every key that waits has a flight, and a runner; what is held or under way is in the index
    /// of hashes; and each load that was started has ended in one way, or runs.
    ///
    /// # Panics
    ///
    /// If it is not.
    pub(crate) fn assert_whole(&self) {
        let mut running: HashMap<K, bool> = HashMap::new();
        for stripe in &self.stripes {
            running.extend(lock(stripe).iter().map(|(key, flight)| (key.clone(), Flight::is_running(flight))));
        }
        let queue = lock(&self.queue);
        let queued: HashSet<&K> = queue.keys.iter().collect();
        assert!(queued.iter().all(|key| running.get(*key) == Some(&false)), "{queued:?} wait, and {running:?}");
        let waiting = running.values().filter(|running| !**running).count();
        assert_eq!((queued.len(), queue.keys.len()), (waiting, waiting), "each key waits once");
        assert!(queue.runners <= self.limits.runners_max, "{} runners", queue.runners);
        assert!(queue.runners > 0 || running.is_empty(), "nobody loads {running:?}");
        drop(queue);
        let stats = self.counters.snapshot();
        let ended = stats.published + stats.voided + stats.uncached + stats.failed;
        assert_eq!(stats.loads, ended + running.values().filter(|running| **running).count() as u64, "{stats:?}");
        assert_eq!(stats.gets, stats.hits + stats.stale + stats.misses, "{stats:?}");
        assert_eq!(stats.misses, stats.led + stats.joined + stats.declined, "{stats:?}");
        if let Some(hashed) = self.hashed() {
            let held = self.entries.iter().map(|(key, _)| key);
            for key in held.chain(running.into_keys()) {
                assert_eq!(hashed.find(&hashed.hash(&key)), Some(key), "held or under way, and not in the index");
            }
        }
    }

    /// [`assert_whole`](Self::assert_whole), and nothing is under way; what a sweep leaves in the index is what is held.
    ///
    /// # Panics
    ///
    /// If it is not so.
    pub(crate) fn assert_at_rest(&self) {
        self.assert_whole();
        assert!(self.stripes.iter().all(|stripe| lock(stripe).is_empty()), "a flight that nobody ends");
        assert_eq!(lock(&self.queue).runners, 0, "a runner that is none");
        self.sweep();
        self.assert_whole();
        if let Some(tags) = self.tags() {
            self.sweep_tags();
            assert!(tags.keys().iter().all(|key| self.entries.peek(key).is_some()), "in the index, and not held");
        }
        if let Some(hashed) = self.hashed() {
            assert_eq!(hashed.len() as u64, self.stats().entries, "in the index, and held");
        }
    }
}
