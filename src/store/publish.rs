//! How the result of a load gets into the store, if it may, and who gets it.

use std::{hash::BuildHasher, time::Duration};

use super::{Entry, Key, Life, Origin, Removed, Store, Weigh, entry::Weight, held};
use crate::{
    digest::Tenths, error::Result, fill::Verdict, journal::TableEvent, source::Received, store::Answer, sync::Arc,
};

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    pub(super) fn start(&self, key: &K) {
        let mut flights = self.flights(key);
        let flight = flights.get_mut(key).expect("a queued key has a flight");
        flight.start(self.gate.word());
    }

    /// Ends the running load of `key`: publishes its result if that is still allowed, and answers all who
    /// waited for it. Returns whether the key must be loaded again. `begun`: the number of the last change of a tag before
    /// the load started.
    pub(super) fn finish(
        &self,
        key: &K,
        (result, received): (Result<Option<V>>, Received),
        origin: Origin,
        begun: u64,
    ) -> bool {
        let counters = &self.counters;
        if matches!(result, Ok(None)) {
            self.found_nothing(1, origin.ended);
        }
        // The user's code may be asked, so under no lock.
        let (at, lsn) = received.earlier.map_or((origin.at, origin.stamp.lsn), |earlier| (earlier.at, earlier.lsn));
        let took = origin.took();
        let made = result.map(|value| {
            let weight = self.weight(key, value.as_ref(), received.bytes);
            (weight, self.life(key, value.as_ref(), at, took), value)
        });
        let mut flights = self.flights(key);
        let flight = flights.get_mut(key).expect("a running load has a flight");
        if let (Some(admission), Ok(_)) = (&self.admission, &made) {
            // Whether it is kept or not: somebody gets it, and nobody may get an older one after that (X33).
            let saw = received.earlier.map(|earlier| earlier.saw).or(origin.stamp.saw);
            admission.given(key, saw.filter(|_| origin.ours));
        }
        self.take_ticket_away(key);
        let word = self.gate.word();
        let (mut removed, mut published) = (Removed::default(), false);
        let overtaken = self.tags().is_some_and(|tags| {
            tags.register(key, &received.tags);
            tags.has_changed(&received.tags, begun)
        });
        if overtaken {
            // Those who asked after that must not get it (I2).
            flight.defer(|waiter| waiter.asked > begun);
        }
        let outcome = made.map(|(weight, life, value)| {
            let entry = Entry { digest: received.digest, at, weight, life, ..Entry::new(word, lsn, value) };
            let entry = Arc::new(entry);
            let verdict = match flight.verdict(word) {
                Verdict::Publish if overtaken => Verdict::Voided,
                verdict => verdict,
            };
            published = verdict == Verdict::Publish && origin.ours;
            if published {
                removed = self.entries.insert(key, &entry);
                counters.published.add(1);
                self.tell(|| TableEvent::Loaded { key: key.clone(), found: entry.is_row() });
            } else if verdict == Verdict::Voided {
                counters.voided.add(1);
                self.tell(|| TableEvent::Voided { key: key.clone() });
            } else {
                counters.uncached.add(1);
                self.tell(|| TableEvent::Uncached { key: key.clone() });
            }
            if !published {
                // What a gap put out of service is older than what is returned here, and must not be served after it.
                self.note_loss(key);
                removed = self.entries.remove(key);
            }
            Answer { entry, read: origin.stamp.incarnation }
        });
        match &outcome {
            Ok(Answer { entry, .. }) => self.count_space(key, &removed, entry),
            Err(error) => {
                counters.failed.add(1);
                self.tell(|| TableEvent::Failed { key: key.clone(), error: error.clone() });
            }
        }
        // A load that failed has left what is held as it was.
        if let (Some(tags), Ok(_)) = (self.tags(), &outcome) {
            tags.settle(key, if published { &received.tags } else { &[] });
        }
        let landing = flight.finish();
        if !landing.again {
            flights.remove(key);
        }
        drop(flights);
        for waiter in landing.waiting {
            // A caller who was cancelled no longer listens, which harms nobody.
            let _ = waiter.caller.send(outcome.clone());
        }
        drop(removed);
        landing.again
    }

    /// Counts what had to go when this entry of `key` came.
    pub(super) fn count_space(&self, key: &K, removed: &Removed<K, V>, came: &Arc<Entry<V>>) {
        let (evicted, oversized) = removed.for_space(key, came);
        self.counters.evicted.add(evicted);
        self.counters.oversized.add(u64::from(oversized));
        for gone in removed.evicted_keys().filter(|gone| *gone != key || oversized) {
            self.note(|| TableEvent::Evicted { key: gone.clone() });
        }
    }

    /// The life of an entry of this key that has been true `from` then, and whose load took so long.
    pub(super) fn life(&self, key: &K, value: Option<&V>, from: Tenths, took: Duration) -> Life {
        // Any number will do that others do not have.
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let draw = f64::from(self.hasher.hash_one((key, from.get())) as u32) / f64::from(u32::MAX);
        self.expiry.life(self.reload.as_ref(), value, (from, took), draw)
    }

    /// What an entry weighs, in the unit of the bound that it counts against.
    pub(super) fn weight(&self, key: &K, value: Option<&V>, received: u32) -> Weight {
        let heap = match (value, &self.weigh) {
            (None, _) => 0,
            (Some(_), Weigh::One) => return Weight::new(1, value),
            (Some(_), Weigh::Received) => received as usize,
            (Some(value), Weigh::With(heap)) => heap(value),
        };
        let bytes = heap.saturating_add(held::heap_of(key) + held::overhead::<K, V>());
        Weight::new(bytes, value)
    }
}
