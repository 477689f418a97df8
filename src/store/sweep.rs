//! Hashes in place of keys: what a message with hashes does to a store, and how the index of hashes is kept small.
//!
//! The race that must not be lost (I1), and the line that closes it:
//!
//! 1. a key has neither flight nor entry; the sweep finds that out;
//! 2. a reader asks for the key: it is in the index already, a flight is made, its load reads the old row;
//! 3. the sweep takes the key out of the index;
//! 4. somebody commits a new row; its message has a hash that is not in the index, and does nothing;
//! 5. the load publishes the old row, for ever.
//!
//! Steps 1 and 3 happen under the key's stripe lock, and so does 2: it comes before 1, which then finds a flight, or after
//! 3, and then notes the key again.
//!
//! A message that finds no key has nothing to do. Had a load of the key started before the look into the index, the key
//! would have been in it. A load that starts afterwards starts after the message was delivered, and sees the change (A7).

use super::{Cause, Change, Hashed, Key, KeyHash, Runner, Store};

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// Rows were changed whose keys have these hashes. `false`: they are not ours to understand.
    pub(super) fn forget_hashed(&self, secret: &str, hashes: &[KeyHash], by: &Change) -> bool {
        let Some(hashed) = self.hashed().filter(|hashed| hashed.is_made_by(secret)) else { return false };
        let by = Cause::of(Some(by));
        for hash in hashes {
            if let Some(key) = hashed.find(hash) {
                self.forget(&key, &by);
            }
        }
        true
    }

    /// Takes keys out of the index that are neither held nor being loaded.
    pub(crate) fn sweep(&self) {
        let Some(hashed) = self.hashed() else { return };
        let Some(mut sweep) = hashed.sweep() else { return };
        loop {
            let batch = sweep.next();
            if batch.is_empty() {
                return;
            }
            for (hash, key) in batch {
                let flights = self.flights(&key);
                // An entry that a gap has put out of service counts as well: who asks for old data may have it.
                let used = flights.contains_key(&key) || self.entries.peek(&key).is_some();
                let removed = if used { None } else { hashed.remove(&hash) };
                if removed.is_some() {
                    // No message would find it any more.
                    self.take_ticket_away(&key);
                }
                drop(flights);
                drop(removed);
            }
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> Runner<K, V> {
    /// The work of making the index small again, if it has grown; for a thread that may be kept busy.
    pub(crate) fn sweep(&self) -> Option<impl FnOnce() + Send + use<K, V>> {
        let (keys, tags) = (self.store.hashed().is_some_and(Hashed::sweep_is_due), self.store.sweep_of_tags_is_due());
        let store = (keys || tags).then(|| std::sync::Arc::clone(&self.store))?;
        Some(move || {
            store.sweep();
            if tags {
                store.sweep_tags();
            }
        })
    }
}
