//! Rows that somebody has read by himself: the right to put one in, which whatever happens to its key takes away.
//!
//! A ticket is drawn before the row is read, and is good as long as a load of the key that had started then would be published, and could
//! not be older than what anybody has been given since:
//!
//! * an invalidation of the key takes it away, and so does the gate when it moves (I1, I3);
//! * so does a load of the key that ends, whatever it returns. Else (X2, I2):
//!
//! 1. a ticket is drawn, and the old row is read; somebody commits a new one, whose message has not come yet;
//! 2. a load reads the new row, and a reader gets it;
//! 3. the old row is put in, and the reader gets that one.
//!
//! * while a load of the key is under way, nothing is put in: it may have read an older row, and would replace it.

use super::{Entry, Key, Origin, Received, Store};
use crate::{
    gate::Word,
    sync::{Arc, lock},
};

/// A ticket for one key of this store.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drawn {
    number: u64,
    word: Word,
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// To be called before the row is read. The one that was drawn before for this key is good no more.
    pub(crate) fn draw(&self, key: &K) -> Drawn {
        let hash = self.hashed.as_ref().map(|hashed| (hashed, hashed.hash(key)));
        let flights = self.flights(key);
        if let Some((hashed, hash)) = hash {
            // As before a load: what messages cannot find could not be taken away.
            hashed.note(hash, key);
        }
        let mut tickets = lock(&self.tickets);
        tickets.last += 1;
        let number = tickets.last;
        tickets.drawn.insert(key.clone(), number);
        drop(tickets);
        let word = self.gate.word();
        drop(flights);
        Drawn { number, word }
    }

    /// Something has happened to this key. Under its stripe lock.
    pub(super) fn take_ticket_away(&self, key: &K) {
        let mut tickets = lock(&self.tickets);
        if !tickets.drawn.is_empty() {
            tickets.drawn.remove(key);
        }
    }

    /// The holder of a ticket has no use for it.
    pub(crate) fn give_ticket_back(&self, key: &K, drawn: Drawn) {
        let mut tickets = lock(&self.tickets);
        if tickets.drawn.get(key) == Some(&drawn.number) {
            tickets.drawn.remove(key);
        }
    }

    /// Puts in a row that was read after the ticket was drawn, if it is good. Returns whether it was.
    pub(crate) fn put(&self, key: &K, drawn: Drawn, value: Option<V>, origin: Origin) -> bool {
        // What these need is known of what was loaded here.
        if self.is_audited || self.weighs_received() {
            self.give_ticket_back(key, drawn);
            return false;
        }
        let received = Received::default();
        let (weight, life) = (self.weight(key, value.as_ref(), received), self.life(key, value.as_ref(), origin.at));
        let entry = Entry { at: origin.at, weight, life, ..Entry::new(drawn.word, origin.stamp.lsn, value) };
        let entry = Arc::new(entry);
        let flights = self.flights(key);
        let is_last = {
            let mut tickets = lock(&self.tickets);
            let is_last = tickets.drawn.get(key) == Some(&drawn.number);
            if is_last {
                tickets.drawn.remove(key);
            }
            is_last
        };
        let is_good =
            is_last && drawn.word.is_coherent() && drawn.word == self.gate.word() && !flights.contains_key(key);
        let removed = if is_good { self.entries.insert(key, &entry) } else { super::Removed::default() };
        drop(flights);
        if is_good {
            let (evicted, oversized) = removed.for_space(key, &entry);
            self.counters.evicted.add(evicted);
            self.counters.oversized.add(u64::from(oversized));
            self.counters.put.add(1);
        }
        drop(removed);
        is_good
    }
}

/// The tickets that are out.
pub(super) struct Tickets<K> {
    last: u64,
    drawn: std::collections::HashMap<K, u64>,
}

impl<K> Default for Tickets<K> {
    fn default() -> Self {
        Self { last: 0, drawn: std::collections::HashMap::new() }
    }
}
