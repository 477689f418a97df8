//! The right to load: keys that wait are taken in batches, and each batch ends with results, whatever happens.

use std::{collections::VecDeque, time::Duration};

use super::{Key, Store, Tags};
use crate::{
    coherence::Boot,
    digest::Tenths,
    error::{Error, Kind, Result},
    source::{Received, Stamp},
    sync::{Arc, lock},
};

/// Where a batch of rows comes from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Origin {
    pub(crate) stamp: Stamp,
    /// They are from the server that the node listens to, and committed.
    pub(crate) ours: bool,
    /// When the loads started.
    pub(crate) at: Tenths,
    /// When they had ended.
    pub(crate) ended: Boot,
}

impl Origin {
    pub(super) fn took(&self) -> Duration {
        self.ended.saturating_sub(self.at.since(Tenths::BOOT))
    }
}

/// The right to load keys of one table: at most [`Limits::runners_max`] exist at a time.
///
/// Dropping it ends its loads: whoever waits for them is told that they failed. So an error, a panic and a
/// runtime that shuts down are one path, and nobody waits for ever (X17).
pub(crate) struct Runner<K: Key, V: Send + Sync + 'static> {
    pub(super) store: Arc<Store<K, V>>,
    batch: VecDeque<K>,
    /// The number of the last change of a tag before the batch was started.
    tags: u64,
    retired: bool,
}

impl<K: Key, V: Send + Sync + 'static> Runner<K, V> {
    pub(super) fn new(store: Arc<Store<K, V>>) -> Self {
        Self { store, batch: VecDeque::new(), tags: 0, retired: false }
    }

    /// Starts loads of all keys that wait, up to the limit. `None` when none waits: the runner has retired.
    pub(crate) fn take(&mut self) -> Option<&[K]> {
        if self.grab() == 0 {
            return None;
        }
        self.store.counters.queries.add(1);
        Some(self.batch.make_contiguous())
    }

    /// As [`take`](Self::take), without a statement. Returns how many.
    pub(super) fn grab(&mut self) -> usize {
        debug_assert!(self.batch.is_empty(), "a batch is finished before the next one is taken");
        let store = &self.store;
        let mut queue = lock(&store.queue);
        if queue.keys.is_empty() {
            queue.runners -= 1;
            self.retired = true;
            return 0;
        }
        let size = queue.keys.len().min(store.limits.batch_max);
        self.batch.extend(queue.keys.drain(..size));
        drop(queue);
        self.tags = store.tags().map_or(0, Tags::now);
        for key in &self.batch {
            store.start(key);
        }
        store.counters.loads.add(size as u64);
        size
    }

    /// Whether no key waited when it looked for some: it must not be used any more.
    pub(crate) fn has_retired(&self) -> bool {
        self.retired
    }

    /// Ends the loads of the batch, with one result per key in the order of the keys.
    pub(crate) fn finish(&mut self, results: impl IntoIterator<Item = Result<Option<V>>>, origin: Origin) {
        self.finish_received(results.into_iter().map(|result| (result, Received::default())), origin);
    }

    /// As [`finish`](Self::finish), with what is kept of the rows as they were received.
    pub(crate) fn finish_received(
        &mut self,
        results: impl IntoIterator<Item = (Result<Option<V>>, Received)>,
        origin: Origin,
    ) {
        for result in results {
            // Key by key: should the `Drop` of a value panic, the rest of the batch is ended by our own `Drop`.
            let key = self.batch.pop_front().expect("one result per key");
            if self.store.finish(&key, result, origin, self.tags) {
                lock(&self.store.queue).keys.push_back(key);
            }
        }
        debug_assert!(self.batch.is_empty(), "one result per key");
    }

    /// Ends the loads of the batch with one error for all.
    pub(crate) fn fail(&mut self, error: &Error) {
        let failures: Vec<_> = self.batch.iter().map(|_| Err(error.clone())).collect();
        self.finish(failures, Origin::default());
    }
}

impl<K: Key, V: Send + Sync + 'static> Drop for Runner<K, V> {
    fn drop(&mut self) {
        if self.retired {
            return;
        }
        let error = Error::new(Kind::Closed, "the task that loads rows ended before its load did");
        self.fail(&error);
        // The last runner takes along the keys that nobody would load any more.
        loop {
            let mut queue = lock(&self.store.queue);
            if queue.runners > 1 || queue.keys.is_empty() {
                queue.runners -= 1;
                return;
            }
            self.batch.extend(queue.keys.drain(..));
            drop(queue);
            for key in &self.batch {
                self.store.start(key);
            }
            self.store.counters.loads.add(self.batch.len() as u64);
            self.fail(&error);
        }
    }
}
