//! Reads again a sample of the rows that were just served from memory, and tells for certain whether one of them should not
//! have been.
//!
//! A cache that differs from Postgres for an instant is no error: a change is on its way. What tells the two apart is a fence:
//!
//! 1. a hit serves entry *e*, under the word that the gate shows; *e* is held on to from here on;
//! 2. the row is read by a statement of its own: shared with no caller, never kept, in its turn among the node's loads;
//! 3. if it has the digest of *e*, all is well. Else:
//! 4. a fence counts that was sent after the statement had returned;
//! 5. if a hit would still serve *e*, the same pointer under the word that the gate shows now, *e* is **incoherent**. Else it was
//!    a change on its way.
//!
//! **No false alarm** (design, *Audit*). Say that 5 finds *e*, and that the promise holds; then *e* has the digest that was read:
//!
//! * A commit W that is in the statement of 2, and not in *e*: W was visible when the fence of 4 was sent, so before it counted W was
//!   applied, or the table was in doubt (I4). In doubt, or a clear, or a gap: the gate shows another word, though *e* is still in the
//!   map. Applied after the load of *e* had started: *e* is gone, and what was loaded since is not the same pointer. Applied before: W is
//!   in *e* (A7).
//! * A W that is in *e*, and not in the statement: *e* was there at 1, so its load had ended before the statement was sent, and
//!   snapshots of one run of one server only grow (A13). It was one run: the word has not changed since the load of *e* started, so
//!   there was no gap, and the stamp of 2 names the server that is listened to. Another server, none, or a transaction of its own
//!   (X14): nothing is concluded.
//! * The same commits, and other bytes: the row depends on more than itself (A3), and what callers get is not what Postgres says.
//!
//! Without 4, every commit between 1 and 5 is an alarm. Without the pointer, what was loaded after a second change is. Without the
//! word, what a TRUNCATE has put out of service is. `audit_tests.rs` plays all three.
//!
//! The fence is one that is sent anyhow, so that an audit costs one reading of a row by its key and no transaction id.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use crate::{
    change::RowKey,
    coherence::Boot,
    digest::Digest,
    key::{self, Key},
    shared::{Shared, Whose},
    source::Source,
    status::Event,
    store::{Served, Store},
    throttle::Throttle,
};

/// More audits of a table in a second are refused. Each is a row read by its key.
pub(crate) const RATE_MAX: u32 = 1000;

/// How many hits are taken, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pace {
    seats: u32,
    period: Duration,
}

impl Pace {
    /// At most `rate` a second, and no more than one statement per beat if one holds them all.
    fn new(rate: u32, beat: Duration) -> Self {
        const SECOND: Duration = Duration::from_secs(1);
        let period = beat.min(SECOND).max(SECOND / rate);
        let seats = u128::from(rate) * period.as_nanos() / SECOND.as_nanos();
        Self { seats: u32::try_from(seats).unwrap_or(rate).max(1), period }
    }
}

/// What the rounds of one cache share.
pub(crate) struct Auditor<K, V> {
    pub(crate) source: Arc<dyn Source<K, V>>,
    pub(crate) shared: Arc<Shared>,
    /// Of the table.
    pub(crate) name: Arc<str>,
    pub(crate) alarms: Throttle,
}

/// Audits at most `rate` hits a second, until the node stops or the cache is gone.
pub(crate) async fn watch<K: Key, V: Send + Sync + 'static>(
    store: Weak<Store<K, V>>,
    auditor: Auditor<K, V>,
    rate: u32,
) {
    let pace = Pace::new(rate, auditor.shared.config.beat);
    let auditor = Arc::new(auditor);
    let mut stopping = auditor.shared.stopping();
    loop {
        match store.upgrade() {
            Some(store) => store.open_seats(pace.seats),
            None => return,
        }
        tokio::select! {
            () = tokio::time::sleep(pace.period) => {}
            _ = stopping.wait_for(|stopping| *stopping) => return,
        }
        let Some(store) = store.upgrade() else { return };
        let (name, auditor) = (Arc::clone(&auditor.name), Arc::clone(&auditor));
        // In a task of its own: keys and values bring code of the user's along, which may panic.
        if tokio::spawn(async move { auditor.round(&store).await }).await.is_err_and(|end| end.is_panic()) {
            tracing::error!(table = &*name, "a key or a value panicked while it was audited");
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> Auditor<K, V> {
    /// Audits the hits that have been taken.
    async fn round(&self, store: &Store<K, V>) {
        let mut sample = store.take_sample();
        while !sample.is_empty() {
            let rest = sample.split_off(sample.len().min(self.shared.config.load_keys_max));
            self.examine(store, sample).await;
            sample = rest;
        }
    }

    /// Steps 2 to 5, of hits that one statement can read again.
    async fn examine(&self, store: &Store<K, V>, sample: Vec<Served<K, V>>) {
        let audits = &store.counters.audits;
        let total = sample.len();
        let Some((digests, at)) = self.read_again(&sample).await else {
            return audits.skipped.add(total as u64);
        };
        debug_assert!(sample.iter().all(|served| served.entry.digest() != Digest::UNKNOWN), "loads take digests");
        let mut differ: Vec<_> = sample
            .into_iter()
            .zip(digests)
            .filter_map(|(served, digest)| (served.entry.digest() != digest).then_some(served))
            .collect();
        audits.equal.add((total - differ.len()) as u64);
        if differ.is_empty() {
            return;
        }
        if self.shared.next_beat().await.is_err() {
            return audits.skipped.add(differ.len() as u64);
        }
        let before = differ.len();
        differ.retain(|served| store.still_serves(served));
        audits.changed.add((before - differ.len()) as u64);
        for served in differ {
            self.alarm(store, &served, served.entry.age(at));
        }
    }

    /// What Postgres has now in place of these, and when that was. `None`: nothing can be concluded.
    async fn read_again(&self, sample: &[Served<K, V>]) -> Option<(Vec<Digest>, Boot)> {
        let keys: Vec<K> = sample.iter().map(|served| served.key.clone()).collect();
        let shared = &self.shared;
        let _turn = shared.loads.acquire().await;
        let began = shared.load_begins();
        let at = self.shared.host.now();
        match self.source.digests(&keys).await {
            Ok(read) if shared.whose(read.stamp.incarnation, began) == Whose::Ours && !read.stamp.dirty => {
                Some((read.rows, at))
            }
            Ok(_) => None,
            Err(error) => {
                tracing::debug!(table = &*self.name, %error, "rows could not be audited");
                None
            }
        }
    }

    /// Forgets an incoherent row, and says so.
    fn alarm(&self, store: &Store<K, V>, served: &Served<K, V>, age: Duration) {
        store.invalidate(&served.key);
        store.counters.audits.incoherent(age);
        let key = store.hashed().is_none().then(|| served.key.to_parts());
        if let Some(held_back) = self.alarms.pass(self.shared.host.now()) {
            let lsn = served.entry.lsn();
            tracing::error!(
                table = &*self.name,
                key = key.as_deref().map_or_else(|| "(hashed)".to_owned(), key::display),
                age = ?age,
                loaded_at = format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff),
                held_back,
                "a row was served that is not what Postgres has, and no change of it is on its way; forgot this row, others may be \
                 wrong as well: find what changed it without firing its triggers (`rowcache doctor`), or on what else than \
                 itself it depends, then call `Table::clear`"
            );
        }
        self.shared.tell(Event::Incoherent {
            table: self.name.to_string(),
            key: key.map(|parts| RowKey::new(&parts)),
            age,
        });
    }
}

#[cfg(all(test, not(shuttle)))]
#[path = "audit_tests.rs"]
mod tests;
