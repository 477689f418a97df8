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

use std::collections::HashMap;

use super::{Entry, Key, Origin, Store, TableEvent};
use crate::{
    gate::Word,
    sync::{Arc, AtomicU64, Mutex, MutexGuard, Ordering, lock},
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
        let hash = self.hashed().map(|hashed| (hashed, hashed.hash(key)));
        let flights = self.flights(key);
        if let Some((hashed, hash)) = hash {
            // As before a load: what messages cannot find could not be taken away.
            hashed.note(hash, key);
        }
        let number = self.tickets.lock().draw(key);
        let word = self.gate.word();
        drop(flights);
        Drawn { number, word }
    }

    /// Something has happened to this key. Under its stripe lock, which who draws one for it has held: it is counted.
    pub(super) fn take_ticket_away(&self, key: &K) {
        if self.tickets.count.load(Ordering::Relaxed) > 0 {
            self.tickets.lock().remove(key);
        }
    }

    /// The holder of a ticket has no use for it.
    pub(crate) fn give_ticket_back(&self, key: &K, drawn: Drawn) {
        self.tickets.lock().give_back(key, drawn.number);
    }

    /// Puts in a row that was read after the ticket was drawn, if it is good. Returns whether it was.
    pub(crate) fn put(&self, key: &K, drawn: Drawn, value: Option<V>, origin: Origin) -> bool {
        // What these need is known of what was loaded here.
        if self.is_audited || self.weighs_received() || self.tags().is_some() {
            self.give_ticket_back(key, drawn);
            return false;
        }
        let (weight, life) =
            (self.weight(key, value.as_ref(), 0), self.life(key, value.as_ref(), origin.at, origin.took()));
        let entry = Entry { at: origin.at, weight, life, ..Entry::new(drawn.word, origin.stamp.lsn, value) };
        let entry = Arc::new(entry);
        let flights = self.flights(key);
        let is_last = self.tickets.lock().give_back(key, drawn.number);
        let is_good =
            is_last && drawn.word.is_coherent() && drawn.word == self.gate.word() && !flights.contains_key(key);
        if let Some(admission) = self.admission().filter(|_| is_good) {
            // Nobody knows what its statement saw.
            admission.doubt();
        }
        let removed = if is_good { self.entries.insert(key, &entry) } else { super::Removed::default() };
        drop(flights);
        if is_good {
            self.count_space(key, &removed, &entry);
            self.counters.put.add(1);
            self.tell(|| TableEvent::Put { key: key.clone() });
        }
        drop(removed);
        is_good
    }
}

/// The tickets that are out.
pub(super) struct Tickets<K> {
    /// So that invalidations need not ask while there are none.
    count: AtomicU64,
    out: Mutex<Out<K>>,
}

struct Out<K> {
    last: u64,
    drawn: HashMap<K, u64>,
}

impl<K> Default for Tickets<K> {
    fn default() -> Self {
        Self { count: AtomicU64::new(0), out: Mutex::new(Out { last: 0, drawn: HashMap::new() }) }
    }
}

impl<K> Tickets<K> {
    fn lock(&self) -> Counted<'_, K> {
        Counted { out: lock(&self.out), count: &self.count }
    }
}

/// Those that are out, which are counted before the lock is released.
struct Counted<'a, K> {
    out: MutexGuard<'a, Out<K>>,
    count: &'a AtomicU64,
}

impl<K: Key> Counted<'_, K> {
    fn draw(&mut self, key: &K) -> u64 {
        self.out.last += 1;
        let number = self.out.last;
        self.out.drawn.insert(key.clone(), number);
        number
    }

    fn remove(&mut self, key: &K) {
        self.out.drawn.remove(key);
    }

    /// Whether this is the last one that was drawn for the key, and is still good. It is no more.
    fn give_back(&mut self, key: &K, number: u64) -> bool {
        let is_last = self.out.drawn.get(key) == Some(&number);
        if is_last {
            self.out.drawn.remove(key);
        }
        is_last
    }
}

impl<K> Drop for Counted<'_, K> {
    fn drop(&mut self) {
        self.count.store(self.out.drawn.len() as u64, Ordering::Relaxed);
    }
}
