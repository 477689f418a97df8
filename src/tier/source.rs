//! How a load asks a tier first.
//!
//! 1. The keys' flights have started, so that what is applied from now on makes them void (`admission.rs`).
//! 2. The tier is asked for all of them at once, with what their loads must have seen.
//! 3. What it has, and is admitted, is the answer. What it does not have is read from Postgres, and put in.
//! 4. What another node is loading is asked for again, for as long as `patience` lasts; and is then read from Postgres.

use std::{borrow::Cow, sync::Arc, time::Duration};

use sqlx::PgConnection;
use tokio::time::sleep;

use super::{
    Asked, Found, Tier,
    form::Form,
    seal::{self, Sealed},
};
use crate::{
    change::key_text,
    coherence::Incarnation,
    digest::Tenths,
    error::Result,
    key::Key,
    shared::Shared,
    source::{Digesting, Earlier, Listing, Loaded, Loading, Locking, Received, Source, Stamp},
    store::Store,
    sync::{Mutex, lock},
    throttle::Complaint,
};

/// Asks a tier, and then the source behind it.
pub(crate) struct Tiered<K: Key, V: Send + Sync + 'static> {
    pub(crate) tier: Tier,
    pub(crate) form: Arc<Form<V>>,
    pub(crate) behind: Arc<dyn Source<K, V>>,
    pub(crate) store: Arc<Store<K, V>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) name: Arc<str>,
    pub(crate) complaints: Mutex<Complaint>,
}

/// The answer to a load, as it comes together.
struct Answer<V> {
    rows: Vec<Option<(Result<Option<V>>, Received)>>,
    /// What it saw stands with each row, since they are of several loads.
    stamp: Stamp,
}

impl<V> Answer<V> {
    fn left(&self) -> Vec<usize> {
        (0..self.rows.len()).filter(|n| self.rows[*n].is_none()).collect()
    }

    fn whole(self) -> Loaded<V> {
        let (rows, received) = self.rows.into_iter().map(|row| row.expect("each key has an answer")).unzip();
        Loaded { rows, received, stamp: self.stamp }
    }
}

impl<K: Key, V: Send + Sync + 'static> Tiered<K, V> {
    async fn load(&self, keys: &[K]) -> Result<Loaded<V>> {
        let Some(server) = self.shared.look(|coherence| coherence.incarnation()) else {
            return self.behind.load(keys).await;
        };
        let stamp = Stamp { incarnation: Some(server), ..Stamp::default() };
        let mut answer = Answer { rows: keys.iter().map(|_| None).collect(), stamp };
        let mut awaited = self.look(keys, answer.left(), server, &mut answer, false).await;
        self.read(keys, &awaited, server, &mut answer).await?;
        let counters = &self.store.counters.tier;
        counters.awaited.add(awaited.len() as u64);
        let (mut waited, mut pause) = (Duration::ZERO, PAUSE);
        while !awaited.is_empty() && waited < self.tier.settings.patience {
            sleep(pause).await;
            (waited, pause) = (waited + pause, pause * 2);
            awaited = self.look(keys, awaited, server, &mut answer, true).await;
            self.read(keys, &awaited, server, &mut answer).await?;
        }
        counters.awaited_in_vain.add(awaited.len() as u64);
        self.read(keys, &[], server, &mut answer).await?;
        Ok(answer.whole())
    }

    /// Asks the tier for these keys, by their places. Returns those that somebody else is loading.
    async fn look(
        &self,
        keys: &[K],
        places: Vec<usize>,
        server: Incarnation,
        answer: &mut Answer<V>,
        again: bool,
    ) -> Vec<usize> {
        let counters = &self.store.counters.tier;
        let admission = self.store.admission().expect("the store of a cache with a tier");
        let word = self.store.word();
        let count = places.len() as u64;
        let (mut asked, mut at) = (Vec::with_capacity(places.len()), Vec::with_capacity(places.len()));
        for place in places {
            if let Some(needs) = admission.needs(&keys[place], word) {
                asked.push(Asked { name: self.name_of(server, &keys[place]), needs });
                at.push(place);
            }
        }
        let unasked = if again { &counters.awaited_in_vain } else { &counters.unready };
        unasked.add(count - asked.len() as u64);
        if asked.is_empty() {
            return Vec::new();
        }
        if !self.tier.health.may_ask(self.shared.host.now()) {
            let unasked = if again { &counters.awaited_in_vain } else { &counters.skipped };
            unasked.add(asked.len() as u64);
            return Vec::new();
        }
        if !again {
            counters.asked.add(asked.len() as u64);
        }
        let found = match self.tier.shelf.take(&asked, &self.tier.settings).await {
            Ok(found) => found,
            Err(error) => {
                counters.failed.add(asked.len() as u64);
                self.failed(&error);
                return Vec::new();
            }
        };
        self.answered();
        let mut awaited = Vec::new();
        for ((place, asked), found) in at.into_iter().zip(&asked).zip(found) {
            match found {
                Found::Nothing => counters.misses.add(1),
                Found::Awaited => awaited.push(place),
                Found::Bytes(bytes) => answer.rows[place] = self.open(server, asked, &keys[place], &bytes),
            }
        }
        awaited
    }

    /// What was found under the name of a key, if it may be taken.
    fn open(&self, server: Incarnation, asked: &Asked, key: &K, bytes: &[u8]) -> Option<(Result<Option<V>>, Received)> {
        let counters = &self.store.counters.tier;
        let sealed = Sealed::open(server, &asked.name, bytes);
        let opened = sealed.ok_or_else(|| Cow::from("its seal is broken")).and_then(|sealed| {
            let row = sealed.row.as_deref().map(|row| self.form.decode(row)).transpose()?;
            Ok((row, sealed))
        });
        let (row, sealed) = match opened {
            Ok(opened) => opened,
            Err(why) => {
                counters.unreadable.add(1);
                tracing::debug!(name = asked.name, %why, "a row in the tier is none");
                return None;
            }
        };
        let admission = self.store.admission().expect("the store of a cache with a tier");
        // Asked for anew: the server's script is not believed either.
        let Some(at) = admission.admit(key, self.store.word(), sealed.saw, sealed.lsn) else {
            counters.refused.add(1);
            return None;
        };
        counters.hits.add(1);
        let earlier = Earlier { saw: sealed.saw, lsn: sealed.lsn, at: Tenths::at(at) };
        let received =
            Received { digest: sealed.digest, bytes: sealed.bytes, earlier: Some(earlier), tags: Vec::new() };
        Some((Ok(row), received))
    }

    /// Reads from Postgres what has no answer yet, but for these places.
    async fn read(&self, keys: &[K], but: &[usize], server: Incarnation, answer: &mut Answer<V>) -> Result<()> {
        let mut places = answer.left();
        places.retain(|place| !but.contains(place));
        if places.is_empty() {
            return Ok(());
        }
        let wanted: Vec<K> = places.iter().map(|place| keys[*place].clone()).collect();
        let at = Tenths::at(self.shared.host.now());
        let loaded = match self.behind.load(&wanted).await {
            Ok(loaded) => loaded,
            // Nothing else has an answer: a failure like any other.
            Err(error) if places.len() == keys.len() => return Err(error),
            Err(error) => {
                for place in places {
                    answer.rows[place] = Some((Err(error.clone()), Received::default()));
                }
                return Ok(());
            }
        };
        let stamp = loaded.stamp;
        if stamp.incarnation != answer.stamp.incarnation && (answer.stamp.incarnation == Some(server)) {
            // One that is not ours spoils all, as it does without a tier.
            answer.stamp.incarnation = stamp.incarnation;
        }
        answer.stamp.dirty |= stamp.dirty;
        answer.stamp.lsn = answer.stamp.lsn.max(stamp.lsn);
        let received = loaded.received.into_iter().chain(std::iter::repeat(Received::default()));
        let mut found: Vec<_> = loaded.rows.into_iter().zip(received).collect();
        for (_, received) in &mut found {
            received.earlier = received.earlier.or(stamp.saw.map(|saw| Earlier { saw, lsn: stamp.lsn, at }));
        }
        if stamp.incarnation == Some(server) && !stamp.dirty {
            self.put(&wanted, &found, server);
        }
        for (place, row) in places.into_iter().zip(found) {
            answer.rows[place] = Some(row);
        }
        Ok(())
    }

    /// Puts what was read into the tier, in the background.
    fn put(&self, keys: &[K], found: &[(Result<Option<V>>, Received)], server: Incarnation) {
        let counters = &self.store.counters.tier;
        let Tier { shelf, settings, health } = &self.tier;
        if !self.store.is_coherent() || !health.may_put() {
            return;
        }
        let mut sealed = Vec::with_capacity(keys.len());
        for (key, (row, received)) in keys.iter().zip(found) {
            let (Ok(row), Some(Earlier { saw, lsn, .. })) = (row, received.earlier) else { continue };
            let name = self.name_of(server, key);
            match row.as_ref().map(|row| self.form.encode(row)).transpose() {
                Ok(row) if row.as_ref().is_none_or(|row| row.len() <= settings.bytes_max) => {
                    let Received { digest, bytes, .. } = *received;
                    sealed.push((name, Sealed { saw, lsn, digest, bytes, row }));
                }
                Ok(_) => counters.unwritten.add(1),
                Err(why) => {
                    counters.unwritten.add(1);
                    if lock(&self.complaints).is_news(&why, self.shared.host.now()) {
                        tracing::warn!(cache = &*self.name, why, "a row cannot be put into the tier");
                    }
                }
            }
        }
        if sealed.is_empty() {
            return;
        }
        let Ok(turn) = Arc::clone(&health.writers).try_acquire_owned() else {
            counters.unwritten.add(sealed.len() as u64);
            return;
        };
        let (shelf, settings, store) = (Arc::clone(shelf), settings.clone(), Arc::clone(&self.store));
        self.shared.host.spawn(Box::pin(async move {
            let rows: Vec<(String, Vec<u8>)> = sealed
                .into_iter()
                .map(|(name, row)| {
                    let bytes = row.seal(server, &name);
                    (name, bytes)
                })
                .collect();
            let counters = &store.counters.tier;
            let outcome = shelf.put(&rows, &settings).await;
            let count = if outcome.is_ok() { &counters.written } else { &counters.unwritten };
            count.add(rows.len() as u64);
            drop(turn);
        }));
    }

    fn name_of(&self, server: Incarnation, key: &K) -> String {
        seal::name(&self.tier.settings.prefix, server, &self.name, &self.form.id, &key_text(&key.to_parts()))
    }

    fn failed(&self, error: &str) {
        if self.tier.health.failed(self.shared.host.now()) {
            tracing::warn!(tier = %self.tier.shelf, error, "the tier does not answer; loads go to Postgres");
        }
    }

    fn answered(&self) {
        if self.tier.health.answered() {
            tracing::info!(tier = %self.tier.shelf, "the tier answers again");
        }
    }
}

/// The first wait for another node. Each further one is twice as long.
const PAUSE: Duration = Duration::from_millis(1);

impl<K: Key, V: Send + Sync + 'static> Source<K, V> for Tiered<K, V> {
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(self.load(keys))
    }

    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        self.behind.load_at_once(keys)
    }

    fn digests<'a>(&'a self, keys: &'a [K]) -> Digesting<'a> {
        self.behind.digests(keys)
    }

    fn keys<'a>(&'a self, query: &'a str, max: usize, limit: Duration) -> Listing<'a, K> {
        self.behind.keys(query, max, limit)
    }

    fn lock<'a>(&'a self, key: &'a K, transaction: &'a mut PgConnection) -> Locking<'a, V> {
        self.behind.lock(key, transaction)
    }
}
