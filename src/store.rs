//! One table's entries and the loads under way for them: where reads and changes meet.
//!
//! ```text
//! reads    lookup ── hit ──→
//!             └ miss → ask → (queue) → Runner::take → the source → Runner::finish → publish
//! changes  invalidate / the gate moves
//! ```
//!
//! Only [`Runner::finish`] and [`Store::put`] add entries; only an invalidation, the gate, or lack of space takes them away.
//! `fill.rs` says when a result may be published; this file makes each of its steps atomic for the key.
//!
//! **Lock order**: a key's stripe, then `quick_cache`'s shard, then the pins (`held.rs`); or, after the stripe, the index of hashes
//! (`hashed.rs`), the tickets (`ticket.rs`), the index of tags (`tags.rs`), or the keys of a gap (`lost.rs`). The queue's lock is held with no other. No code of the user runs under any of them but the key's `Hash`, `Eq` and
//! `Clone`. Values are dropped after the locks are released.
//!
//! The race that a cache must not lose (X1), and the line that closes it:
//!
//! 1. a reader misses; `take` starts a load under the key's stripe lock, which queries the old row;
//! 2. somebody commits a new row; the message arrives; `invalidate` runs under the same lock. It finds nothing
//!    to remove, but it marks the running load void;
//! 3. the load returns with the old row; `finish`, under the same lock, sees the mark and does not publish.
//!
//! `quick_cache`'s own placeholders would do for this, but not for loads that must not overlap (X2) nor for
//! failures that go to everybody; one record per key for all three is the smaller machine
//! (`docs/decisions.md`).

use std::{
    collections::{HashMap, VecDeque},
    hash::BuildHasher,
    sync::OnceLock,
};

use crossbeam_utils::CachePadded;
use quick_cache::DefaultHashBuilder;
use tokio::sync::oneshot;

use crate::{
    admission::Admission,
    change::{Change, Mark, RowKey},
    coherence::{Boot, Incarnation},
    digest::Tenths,
    error::Result,
    fill::{Flight, Join},
    gate::{Before, Gate, Word},
    hashed::{Hashed, KeyHash},
    journal::{Cause, Journal, TableEvent},
    key::{Key, KeyPart},
    stats::{Counters, Stats},
    sync::{Arc, AtomicU64, Mutex, MutexGuard, Ordering, lock},
    tables::Member,
    tags::Tag,
};

/// What a caller who waits for a load receives.
pub(crate) type Outcome<V> = Result<Answer<V>>;

/// An entry, and whose it is.
pub(crate) struct Answer<V> {
    pub(crate) entry: Arc<Entry<V>>,
    /// The server that was read, with its rows held for true: `None` if it cannot be told.
    pub(crate) read: Option<Incarnation>,
}

impl<V> Clone for Answer<V> {
    fn clone(&self) -> Self {
        Self { entry: Arc::clone(&self.entry), read: self.read }
    }
}

/// A caller who waits for a load.
struct Waiter<V> {
    caller: oneshot::Sender<Outcome<V>>,
    /// The number of the last change of a tag when he asked.
    asked: u64,
}

/// The answer to [`Store::ask`].
pub(crate) enum Asked<V> {
    /// The entry was published in the meantime, or no row can have this key.
    Hit(Arc<Entry<V>>),
    /// A load will answer.
    Wait(oneshot::Receiver<Outcome<V>>),
}

pub(crate) struct Store<K, V> {
    gate: Gate,
    entries: Held<K, V>,
    pub(crate) counters: Counters,
    /// Protects, for its share of the keys: which loads run, who waits for them, and publishing.
    stripes: Box<[Stripe<K, V>]>,
    hasher: DefaultHashBuilder,
    /// Where messages have hashes in place of keys.
    hashed: OnceLock<Hashed<K>>,
    /// Protects the keys that wait for a runner, and the number of runners.
    queue: Mutex<Queue<K>>,
    limits: Limits,
    /// Calls for [`reclaim`](Member::reclaim) that have not been answered. Whole-table messages can come by the thousand,
    /// from anybody.
    reclaims: AtomicU64,
    /// Hits that wait to be audited.
    sample: Sample<K, V>,
    /// Whether entries have digests.
    pub(crate) is_audited: bool,
    weigh: Weigh<V>,
    unknown: Unknown,
    breaker: Breaker,
    /// Which rows that somebody reads by himself may be put in.
    tickets: Tickets<K>,
    /// What entries depend on beside their keys, if loaders say so.
    tags: OnceLock<Tags<K>>,
    /// What rows of a tier must have seen, if there is one.
    admission: Option<Admission>,
    expiry: Expiry<V>,
    reload: Option<Reload<K>>,
    /// What a refill will ask for beside what is held.
    lost: Lost<K>,
    /// What happened, for who wants to know.
    pub(crate) journal: Arc<Journal<K>>,
    /// When somebody should look for what has expired.
    next_look: std::sync::atomic::AtomicU32,
}

type Stripe<K, V> = CachePadded<Mutex<HashMap<K, Flight<Waiter<V>>, DefaultHashBuilder>>>;

struct Queue<K> {
    keys: VecDeque<K>,
    runners: usize,
}

/// Drops out of line, so that a hit does not prepare for it.
#[cold]
#[inline(never)]
fn discard<T>(_: T) {}

/// Bounds of one table's loads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Queries at the same time.
    pub(crate) runners_max: usize,
    /// Keys in one query.
    pub(crate) batch_max: usize,
}

#[cfg(not(shuttle))]
const STRIPES: usize = 64;
#[cfg(shuttle)]
const STRIPES: usize = 1;

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    pub(crate) fn new(bounds: Bounds, limits: Limits, hashed: Option<Hashed<K>>) -> Self {
        let hasher = DefaultHashBuilder::default();
        let stripe = || CachePadded::new(Mutex::new(HashMap::with_hasher(hasher.clone())));
        Self {
            gate: Gate::closed(),
            entries: Held::new(bounds),
            counters: Counters::default(),
            stripes: (0..STRIPES).map(|_| stripe()).collect(),
            hasher,
            hashed: hashed.map(Into::into).unwrap_or_default(),
            queue: Mutex::new(Queue { keys: VecDeque::new(), runners: 0 }),
            limits,
            reclaims: AtomicU64::new(0),
            sample: Sample::default(),
            unknown: Unknown::default(),
            breaker: Breaker::default(),
            tickets: Tickets::default(),
            tags: OnceLock::new(),
            admission: None,
            expiry: Expiry::default(),
            reload: None,
            lost: Lost::new(0),
            journal: Arc::new(Journal::new(0, 0)),
            next_look: std::sync::atomic::AtomicU32::new(0),
            is_audited: false,
            weigh: Weigh::One,
        }
    }

    /// Where messages have hashes in place of keys: what is needed to read them.
    pub(crate) fn hashed(&self) -> Option<&Hashed<K>> {
        self.hashed.get()
    }

    /// Messages have hashes in place of keys. To be called before anything is asked for, if it was not known when the store was made.
    pub(crate) fn hash_with(&self, hashed: Option<Hashed<K>>) {
        if let Some(hashed) = hashed {
            // There is none yet: a store is attached once.
            let _ = self.hashed.set(hashed);
        }
    }

    /// Loaders say what entries depend on beside their keys. To be called before anything is asked for.
    pub(crate) fn tag(&self) {
        self.tags.get_or_init(Tags::new);
    }

    fn tags(&self) -> Option<&Tags<K>> {
        self.tags.get()
    }

    /// The store of a table of which no more is asked after so many loads in a row that did not reach Postgres.
    pub(crate) fn breaking(mut self, after: Option<std::num::NonZeroU32>) -> Self {
        self.breaker.after = after;
        self
    }

    /// The store of a table of which so many events are kept for who asks, and so many for who looks on.
    pub(crate) fn journaling(mut self, kept: usize, ahead: usize) -> Self {
        self.journal = Arc::new(Journal::new(kept, ahead));
        self
    }

    /// The store of a table whose rows may come from a tier.
    pub(crate) fn admitting(mut self, admits: bool) -> Self {
        self.admission = admits.then(Admission::new);
        self
    }

    /// What rows of a tier must have seen, if there is one.
    pub(crate) fn admission(&self) -> Option<&Admission> {
        self.admission.as_ref()
    }

    /// Whether entries are weighed by the length of their rows as they were received.
    pub(crate) fn weighs_received(&self) -> bool {
        matches!(self.weigh, Weigh::Received)
    }

    /// The store of a table whose rows are weighed by this.
    pub(crate) fn weighed(mut self, weigh: Weigh<V>) -> Self {
        self.weigh = weigh;
        self
    }

    /// The entry of `key`, if it may be served. Counts a hit; a miss is counted by what the caller does next.
    #[expect(clippy::inline_always, reason = "a call costs a tenth of a hit: rowcache-budget")]
    #[inline(always)]
    pub(crate) fn lookup(&self, key: &K) -> Option<Arc<Entry<V>>> {
        self.find(key, true)
    }

    /// As [`lookup`](Self::lookup), and the hit is not audited: keeping the key at hand for that costs three instructions.
    #[expect(clippy::inline_always, reason = "as above")]
    #[inline(always)]
    pub(crate) fn lookup_unaudited(&self, key: &K) -> Option<Arc<Entry<V>>> {
        self.find(key, false)
    }

    #[expect(clippy::inline_always, reason = "as above")]
    #[inline(always)]
    fn find(&self, key: &K, audited: bool) -> Option<Arc<Entry<V>>> {
        let entry = self.entries.get(key)?;
        if entry.word != self.gate.word() {
            discard(entry);
            return None;
        }
        let entry = if entry.life.due > self.gate.now() { entry } else { self.overdue(key, entry)? };
        if self.counters.hit() {
            entry.heat.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if audited && self.sample.is_open() {
                self.take_seat(key, &entry);
            }
        }
        Some(entry)
    }

    /// As [`lookup`](Self::lookup), but does not count: for callers who count by themselves.
    pub(crate) fn peek_used(&self, key: &K) -> Option<Arc<Entry<V>>> {
        let entry = self.entries.get(key).filter(|entry| entry.word == self.gate.word())?;
        if entry.life.due > self.gate.now() { Some(entry) } else { self.overdue(key, entry) }
    }

    /// The entry of `key` if it may be served, or if a gap put it out of service. Counted as a hit in the first case, and as
    /// a stale one in the second.
    pub(crate) fn lookup_stale(&self, key: &K) -> Option<Arc<Entry<V>>> {
        let entry = self.entries.get(key)?;
        let entry = if entry.life.due > self.gate.now() { entry } else { self.overdue(key, entry)? };
        if entry.word == self.gate.word() {
            self.counters.hit();
        } else if self.gate.is_stale(entry.word) {
            self.counters.stale();
            self.tell(|| TableEvent::HitStale { key: key.clone() });
        } else {
            return None;
        }
        Some(entry)
    }

    /// Whether entries may be published and served.
    pub(crate) fn is_coherent(&self) -> bool {
        self.gate.word().is_coherent()
    }

    /// What the gate shows.
    pub(crate) fn word(&self) -> Word {
        self.gate.word()
    }

    /// As [`lookup`](Self::lookup), but leaves no trace: neither a count nor a reason to keep the entry.
    pub(crate) fn peek(&self, key: &K) -> Option<Arc<Entry<V>>> {
        self.entries.peek(key).filter(|entry| entry.word == self.gate.word() && !self.has_expired(entry))
    }

    /// All that [`peek`](Self::peek) would return.
    pub(crate) fn served(&self) -> impl Iterator<Item = (K, Arc<Entry<V>>)> {
        self.entries.iter().filter(|(_, entry)| entry.word == self.gate.word() && !self.has_expired(entry))
    }

    /// What is held of `key`, and whether it would be served. No trace.
    pub(crate) fn look(&self, key: &K) -> Option<(Arc<Entry<V>>, bool)> {
        let entry = self.entries.peek(key)?;
        let is_served = entry.word == self.gate.word() && entry.word.is_coherent() && !self.has_expired(&entry);
        // What neither is nor may be served is only waiting for its memory to be reclaimed.
        (is_served || self.gate.is_stale(entry.word) || !self.is_gone(&entry) && entry.word == self.gate.word())
            .then_some((entry, is_served))
    }

    /// Whether somebody waits for a load of `key`.
    pub(crate) fn is_loading(&self, key: &K) -> bool {
        self.flights(key).contains_key(key)
    }

    pub(crate) fn is_pinned(&self, key: &K) -> bool {
        self.entries.is_pinned(key)
    }

    /// Asks for the entry of a key that was missed. A key that now needs a load is added to `wanted`, which
    /// must be handed to [`enqueue`](Self::enqueue) before anybody waits.
    pub(crate) fn ask(&self, key: &K, join: Join, wanted: &mut Vec<K>) -> Asked<V> {
        if key.to_parts().iter().any(KeyPart::cannot_exist) {
            self.counters.declined.add(1);
            return Asked::Hit(Arc::new(Entry::new(self.gate.word(), 0, None)));
        }
        let (asked, joined) = self.ask_uncounted(key, join, wanted);
        match joined {
            Some(true) => self.counters.joined.add(1),
            Some(false) => self.counters.led.add(1),
            None => {
                self.counters.hit();
            }
        }
        asked
    }

    /// As [`ask`](Self::ask), for a key that was held before; not a caller's, so that it does not count as one.
    pub(crate) fn ask_again(&self, key: &K, join: Join, wanted: &mut Vec<K>) -> Asked<V> {
        self.ask_uncounted(key, join, wanted).0
    }

    /// Also returns whether the caller joined others; `None`: the entry is held.
    fn ask_uncounted(&self, key: &K, join: Join, wanted: &mut Vec<K>) -> (Asked<V>, Option<bool>) {
        let (caller, answer) = oneshot::channel();
        let hash = self.hashed().map(|hashed| (hashed, hashed.hash(key)));
        // Dropped after the lock.
        let _expired;
        let mut flights = self.flights(key);
        let joined = if let Some(flight) = flights.get_mut(key) {
            flight.ask(self.waiter(caller), self.gate.word(), join)
        } else {
            // A load may have published between the caller's miss and this lock. Without this second look, two
            // loads of one key could follow one invalidation.
            if let Some(entry) = self.peek_used(key) {
                return (Asked::Hit(entry), None);
            }
            _expired = self.remove_expired(key);
            if let Some((hashed, hash)) = hash {
                // Before the flight: a load that starts without would be overtaken unseen.
                hashed.note(hash, key);
            }
            flights.insert(key.clone(), Flight::new(self.waiter(caller)));
            wanted.push(key.clone());
            false
        };
        drop(flights);
        (Asked::Wait(answer), Some(joined))
    }

    fn waiter(&self, caller: oneshot::Sender<Outcome<V>>) -> Waiter<V> {
        Waiter { caller, asked: self.tags().map_or(0, Tags::now) }
    }

    /// The keys of the rows that are held, those used most first.
    pub(crate) fn used_most(&self) -> Vec<K> {
        let mut keys = self.by_use(|entry| entry.is_row() && !self.is_gone(entry));
        keys.sort_unstable_by_key(|(heat, _)| std::cmp::Reverse(*heat));
        keys.into_iter().map(|(_, key)| key).collect()
    }

    fn by_use(&self, which: impl Fn(&Arc<Entry<V>>) -> bool) -> Vec<(u32, K)> {
        self.entries.iter().filter(|(_, entry)| which(entry)).map(|(key, entry)| (lost::heat(&entry), key)).collect()
    }

    /// How many rows can be held, at most.
    pub(crate) fn room(&self) -> usize {
        self.entries.room()
    }

    /// Queues keys for loading. Returns how many more runners are needed; each must be given to a task.
    pub(crate) fn enqueue(self: &Arc<Self>, wanted: Vec<K>) -> Vec<Runner<K, V>> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let mut queue = lock(&self.queue);
        queue.keys.extend(wanted);
        let useful = queue.keys.len().div_ceil(self.limits.batch_max);
        let more = self.limits.runners_max.saturating_sub(queue.runners).min(useful);
        queue.runners += more;
        drop(queue);
        (0..more).map(|_| Runner::new(Arc::clone(self))).collect()
    }

    /// What this node found out of a row is not what is held: as [`forget`](Self::forget).
    pub(crate) fn invalidate(&self, key: &K) {
        self.forget(key, &Cause::Node);
    }

    /// A row was changed: nothing read before this call may be served after it.
    fn forget(&self, key: &K, by: &Cause) {
        let mut flights = self.flights(key);
        if let Some(flight) = flights.get_mut(key) {
            flight.void();
        }
        self.take_ticket_away(key);
        let mut removed = self.entries.remove(key);
        if let Some(admission) = &self.admission {
            admission.told(key, by.xid());
        }
        if let Some(key) = removed.take_key() {
            self.note(|| TableEvent::Invalidated { key, by: by.clone() });
        }
        drop(flights);
        self.note_change(key, &removed);
        drop(removed);
        self.counters.invalidations.add(1);
    }

    /// The counters, and what is held.
    pub(crate) fn stats(&self) -> Stats {
        let ([rows, absent], [weight, absent_weight]) = (self.entries.len(), self.entries.weight());
        let bytes = if matches!(self.weigh, Weigh::One) { absent_weight } else { weight + absent_weight };
        let (capacity, used) = (self.entries.capacity(), if matches!(self.weigh, Weigh::One) { rows } else { weight });
        Stats { entries: rows + absent, absent, bytes, capacity, used, ..self.counters.snapshot() }
    }

    /// Keeps the entry of `key` however little space there is, or no longer so. Returns whether that is news.
    pub(crate) fn pin(&self, key: &K, pinned: bool) -> bool {
        self.entries.pin(key, pinned)
    }

    fn flights(&self, key: &K) -> MutexGuard<'_, HashMap<K, Flight<Waiter<V>>, DefaultHashBuilder>> {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of the hash will do")]
        let stripe = self.hasher.hash_one(key) as usize % STRIPES;
        lock(&self.stripes[stripe])
    }
}

/// For who looks on from outside.
#[cfg(feature = "verify")]
impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// Whether nothing is being loaded, and nobody waits.
    pub(crate) fn is_idle(&self) -> bool {
        let queue = lock(&self.queue);
        let quiet = queue.keys.is_empty() && queue.runners == 0;
        drop(queue);
        quiet && self.stripes.iter().all(|stripe| lock(stripe).is_empty())
    }

    /// Keys that are held, and that no message with their hash would lead to: there must be none.
    pub(crate) fn unindexed(&self) -> Vec<K> {
        let Some(hashed) = self.hashed() else { return Vec::new() };
        let missing = |key: &K| hashed.find(&hashed.hash(key)).as_ref() != Some(key);
        self.entries.iter().map(|(key, _)| key).filter(missing).collect()
    }
}

impl<K: Key, V: Send + Sync + 'static> Member for Store<K, V> {
    fn invalidate(&self, keys: &[RowKey], by: &Change) -> bool {
        let by = Cause::of(Some(by));
        for key in keys {
            match K::from_parts(key.parts()) {
                Some(key) => self.forget(&key, &by),
                None => return false,
            }
        }
        true
    }

    fn invalidate_hashed(&self, secret: &str, hashes: &[KeyHash], by: &Change) -> bool {
        self.forget_hashed(secret, hashes, by)
    }

    fn invalidate_tags(&self, tags: &[Tag], by: &Change) {
        self.forget_tagged(tags, by);
    }

    fn shown(&self) -> Word {
        self.gate.word()
    }

    fn note_turn(&self, from: Word, by: Option<&Change>) {
        match (from.is_coherent(), self.gate.word().is_coherent()) {
            (true, true) => self.note(|| TableEvent::Cleared { by: Cause::of(by) }),
            (true, false) => self.note(|| TableEvent::Gap),
            (false, true) => self.note(|| TableEvent::Coherent),
            (false, false) => {}
        }
    }

    fn show(&self, word: Word, before: Before) {
        if self.gate.word().is_coherent() {
            self.counters.clears.add(1);
            if !word.is_coherent() {
                self.lost.begin();
            }
        } else if word.is_coherent() {
            self.breaker.reset();
        }
        self.gate.show(word, before);
    }

    fn resume(&self) -> bool {
        self.breaker.reset();
        self.gate.resume()
    }

    fn advance(&self, sent: Boot, mark: &Mark) {
        if let Some(admission) = &self.admission {
            admission.advance(self.gate.word(), sent, mark);
        }
    }

    fn figures(&self) -> Stats {
        self.stats()
    }

    fn tick(&self, now: Tenths) -> bool {
        self.look_at_clock(now)
    }

    fn wants_reclaim(&self) -> bool {
        self.reclaims.fetch_add(1, Ordering::AcqRel) == 0
    }

    fn reclaim(&self) {
        /// Should the `Drop` of a value panic, the next one who wants it must find the way free.
        struct Free<'a>(&'a AtomicU64);

        impl Drop for Free<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.store(0, Ordering::Release);
                }
            }
        }

        let _free = Free(&self.reclaims);
        loop {
            let wanted = self.reclaims.load(Ordering::Acquire);
            self.remove_dead();
            if self.reclaims.compare_exchange(wanted, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                return;
            }
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// Writes down what took something away.
    fn note(&self, event: impl FnOnce() -> TableEvent<K>) {
        self.journal.note(self.gate.now(), event);
    }

    /// Writes down what matters to who looks on.
    fn tell(&self, event: impl FnOnce() -> TableEvent<K>) {
        self.journal.tell(self.gate.now(), event);
    }

    fn remove_dead(&self) {
        // Not `clear`: what has been loaded since is alive. `remove_if` reclaims here, it does not invalidate: the gate
        // has done that. Key by key, so that no reader waits for long, and values are dropped under no lock.
        let is_dead = |entry: &Arc<Entry<V>>| {
            (entry.word != self.gate.word() && !self.gate.is_stale(entry.word)) || self.is_gone(entry)
        };
        let dead: Vec<K> = self.entries.iter().filter(|(_, entry)| is_dead(entry)).map(|(key, _)| key).collect();
        for key in dead {
            self.note_loss(&key);
            let removed = self.entries.remove_if(&key, is_dead);
            if removed.is_some_and(|entry| entry.word == self.gate.word()) {
                self.counters.expired.add(1);
                self.note(|| TableEvent::Expired { key });
            }
        }
        self.sweep();
    }
}

/// How rows are weighed. Absent rows always are by their bytes.
pub(crate) enum Weigh<V> {
    /// One is like another.
    One,
    /// By the bytes in which they were received, which stand for what they own outside of themselves.
    Received,
    /// By what this says that they own outside of themselves, in bytes.
    With(std::sync::Arc<dyn Fn(&V) -> usize + Send + Sync>),
}

mod breaker;
mod entry;
mod expiry;
mod held;
mod lost;
mod publish;
mod reload;
mod rescue;
mod runner;
mod sample;
mod sweep;
mod tags;
mod ticket;
mod unknown;
#[cfg(any(all(test, shuttle), fuzzing))]
mod whole;

use breaker::Breaker;
pub use entry::Cached;
pub(crate) use entry::Entry;
use expiry::Life;
pub(crate) use expiry::{Expiry, Lifetime};
pub(crate) use held::Bounds;
use held::{Held, Removed};
use lost::Lost;
pub(crate) use reload::{Due, Early, Reload};
pub(crate) use rescue::Rescue;
pub(crate) use runner::{Origin, Runner};
use sample::Sample;
pub(crate) use sample::Served;
use tags::Tags;
pub(crate) use ticket::Drawn;
use ticket::Tickets;
use unknown::Unknown;

#[cfg(test)]
#[cfg(not(shuttle))]
#[path = "store_tests.rs"]
mod tests;

#[cfg(all(test, shuttle))]
#[path = "store_shuttle.rs"]
mod shuttle_tests;
