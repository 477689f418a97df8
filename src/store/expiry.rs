//! How long entries may live, whatever no message says.
//!
//! A hit compares two numbers: the time, which the clock thread writes beside the gate's word every tenth of a second, and when
//! the entry is *due*. Only then does anything else happen: it has expired; or its time without use begins anew; or it
//! is to be read again while it is still served. All of that can only take entries away, or load them as everybody does, so that
//! nothing here touches the promise.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use super::{Cached, Due, Entry, Key, Reload, Rescue, Store, TableEvent, discard};
use crate::{digest::Tenths, sync::Arc};

/// How long the entries of one table live.
pub(crate) struct Expiry<V> {
    /// Since the load started.
    pub(crate) ttl: Option<Duration>,
    /// By up to this share of `ttl` less, so that what was loaded together does not expire together.
    pub(crate) jitter: f64,
    /// Since the last use.
    pub(crate) idle: Option<Duration>,
    /// In place of `ttl`, for rows of which this knows better.
    pub(crate) of: Option<Lifetime<V>>,
    /// For how long what has expired is kept, for whom Postgres does not answer.
    pub(crate) rescue: Option<Rescue>,
}

pub(crate) type Lifetime<V> = std::sync::Arc<dyn Fn(&V) -> Option<Duration> + Send + Sync>;

impl<V> Default for Expiry<V> {
    fn default() -> Self {
        Self { ttl: None, jitter: 0.0, idle: None, of: None, rescue: None }
    }
}

impl<V> Expiry<V> {
    /// The life of an entry whose load started then, and took so long. `draw` is a number from 0 up to 1.
    pub(super) fn life<K>(
        &self,
        reload: Option<&Reload<K>>,
        value: Option<&V>,
        (from, took): (Tenths, Duration),
        draw: f64,
    ) -> Life {
        let given = value.zip(self.of.as_ref()).and_then(|(value, of)| of(value));
        let ttl = given.or_else(|| self.ttl.map(|ttl| ttl.mul_f64(1.0 - self.jitter * draw)));
        let until = match ttl {
            None => Tenths::NEVER,
            // Whatever the time.
            Some(Duration::ZERO) => Tenths::BOOT,
            Some(ttl) => from.plus(ttl),
        };
        let early = reload.and_then(Reload::early);
        let early = early.zip(ttl).map(|(early, ttl)| until.minus(early.window(ttl, took)));
        let early = early.unwrap_or(Tenths::NEVER);
        // What a row says of itself is no safety net: it has ended.
        let grace = self.rescue.filter(|_| given.is_none()).map(|rescue| rescue.max);
        let gone = grace.map_or(until, |grace| until.plus(grace));
        let watches_use = self.idle.is_some() || reload.is_some_and(Reload::watches_use);
        let due = if watches_use { Tenths::BOOT } else { until.min(early) };
        Life { due, until, gone, early: AtomicU32::new(early.get()), used: AtomicU32::new(0) }
    }

    /// How often it is worth while to look for what has expired. `None`: never.
    fn pause(&self) -> Option<Duration> {
        let lives = [self.ttl, self.idle, self.of.is_some().then_some(LOOK_MAX)];
        let shortest = lives.into_iter().flatten().min()?;
        Some((shortest / 10).clamp(Duration::from_secs(1), LOOK_MAX))
    }
}

const LOOK_MAX: Duration = Duration::from_secs(30);

/// When what happens to an entry.
#[repr(C)]
pub(super) struct Life {
    /// The first moment at which a hit has to look at the rest.
    pub(super) due: Tenths,
    until: Tenths,
    /// When it is of no use any more even for whom Postgres does not answer.
    gone: Tenths,
    /// When it is read again, if it is used.
    early: AtomicU32,
    /// When it was last used, if somebody wants to know. 0: not since its load.
    used: AtomicU32,
}

impl Life {
    /// Whether it has been used since its load, if somebody wants to know.
    pub(super) fn was_used(&self) -> bool {
        self.used.load(Relaxed) > 0
    }

    /// When it ends, but for lack of use. `None`: never.
    pub(super) fn expires_at(&self) -> Option<Tenths> {
        (self.until != Tenths::NEVER).then_some(self.until)
    }

    /// As long as there is space.
    pub(super) fn unlimited() -> Self {
        Self {
            due: Tenths::NEVER,
            until: Tenths::NEVER,
            gone: Tenths::NEVER,
            early: AtomicU32::new(Tenths::NEVER.get()),
            used: AtomicU32::new(0),
        }
    }
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// The store of a table whose entries live so long.
    pub(crate) fn expiring(mut self, expiry: Expiry<V>) -> Self {
        self.expiry = expiry;
        self
    }

    /// How long ago its load started.
    pub(crate) fn age_of(&self, cached: &Cached<V>) -> Duration {
        self.gate.now().since(cached.entry().at)
    }

    pub(super) fn has_expired(&self, entry: &Entry<V>) -> bool {
        let now = self.gate.now();
        if entry.life.due > now {
            return false;
        }
        let unused = || now.since(Tenths::new(entry.life.used.load(Relaxed)).max(entry.at));
        entry.life.until <= now || self.expiry.idle.is_some_and(|idle| unused() >= idle)
    }

    /// Whether it has expired, and will not be served to anybody.
    pub(super) fn is_gone(&self, entry: &Entry<V>) -> bool {
        self.has_expired(entry) && (entry.life.until > self.gate.now() || entry.life.gone <= self.gate.now())
    }

    /// Takes the entry of `key` away if it would be served but for its age. Under the key's stripe lock; to be dropped after it.
    pub(super) fn remove_expired(&self, key: &K) -> Option<Arc<Entry<V>>> {
        let is_expired = |entry: &Arc<Entry<V>>| entry.word == self.gate.word() && self.is_gone(entry);
        let removed = self.entries.remove_if(key, is_expired)?;
        self.counters.expired.add(1);
        self.note(|| TableEvent::Expired { key: key.clone() });
        Some(removed)
    }

    /// A hit of an entry that is due: the entry, if it may still be served.
    #[cold]
    #[inline(never)]
    pub(super) fn overdue(&self, key: &K, entry: Arc<Entry<V>>) -> Option<Arc<Entry<V>>> {
        if self.has_expired(&entry) {
            discard(entry);
            return None;
        }
        let (life, now) = (&entry.life, self.gate.now());
        // Not more often: threads that hit the same entry would write to one cache line.
        let used = now.get().max(1);
        if life.used.load(Relaxed) != used {
            life.used.store(used, Relaxed);
        }
        let early = life.early.load(Relaxed);
        // While there is a gap, a load would be kept by nobody, and take away what is held.
        let reload = self.reload.as_ref().filter(|_| early <= now.get() && entry.word == self.gate.word());
        let (window, left) = (life.until.since(Tenths::new(early)), life.until.since(now));
        if let Some(reload) = reload
            && reload.is_drawn(window, left)
        {
            // Should that load fail, another one is tried after half of the time that is left.
            let again = now.get() + (life.until.get().saturating_sub(now.get()) / 2).max(1);
            if life.early.compare_exchange(early, again, Relaxed, Relaxed).is_ok() {
                reload.send(Due::Early(key.clone()));
            }
        }
        Some(entry)
    }

    /// It is so late now. Returns whether somebody should look for what has expired.
    pub(super) fn look_at_clock(&self, now: Tenths) -> bool {
        self.gate.tick(now);
        let Some(pause) = self.expiry.pause() else { return false };
        let next = self.next_look.load(Relaxed);
        // Only the clock thread comes here.
        let is_due = next <= now.get();
        if is_due {
            self.next_look.store(now.plus(pause).get(), Relaxed);
        }
        is_due
    }
}
