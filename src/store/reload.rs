//! What is loaded without anybody asking for it: entries that are used and about to expire, and rows that were used and have changed.
//!
//! The store says which keys; `refresh.rs` asks for them like any caller, so that nothing here touches the promise.

use std::{
    hash::{DefaultHasher, Hasher},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::sync::{mpsc, oneshot};

use super::{Flight, Key, Outcome, Removed, Store};

/// Which entries of a table are loaded again by themselves.
pub(crate) struct Reload<K> {
    /// Those that are used and about to expire.
    early: Option<Early>,
    /// Those that were used, and were invalidated.
    changed: bool,
    due: mpsc::UnboundedSender<Due<K>>,
    /// What the next lot is drawn from.
    draws: AtomicU64,
}

/// When an entry that is used is about to expire.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Early {
    /// After this share of its life.
    Share(f64),
    /// `XFetch`: each use draws a lot, and the longer its load took, times this, and the nearer its end, the likelier it is
    /// (Vattani, Chierichetti, Lowenstein: *Optimal Probabilistic Cache Stampede Prevention*, 2015).
    Chance(f64),
}

/// The longest time that a lot can stand for, in units of the average: of 2^32 lots, one.
const LONGEST: f64 = 22.2;

impl Early {
    /// How long before its end an entry is first looked at whose load took so long.
    pub(super) fn window(self, life: Duration, took: Duration) -> Duration {
        match self {
            Self::Share(share) => life.saturating_sub(life.mul_f64(share)),
            Self::Chance(beta) => took.mul_f64((beta * LONGEST).min(1e6)).min(life),
        }
    }
}

/// A key that is to be loaded again.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due<K> {
    /// Its entry is about to expire.
    Early(K),
    /// Its entry was invalidated.
    Changed(K),
}

impl<K> Reload<K> {
    /// `None`: none are. Else keys come out of the second value. Of the same `seed` come the same lots.
    pub(crate) fn new(
        early: Option<Early>,
        changed: bool,
        seed: u64,
    ) -> Option<(Self, mpsc::UnboundedReceiver<Due<K>>)> {
        let (sender, due) = mpsc::unbounded_channel();
        let wanted = early.is_some() || changed;
        wanted.then_some((Self { early, changed, due: sender, draws: AtomicU64::new(seed) }, due))
    }

    pub(super) fn early(&self) -> Option<Early> {
        self.early
    }

    /// Whether an entry that is used now, in its window and so long before its end, is read again.
    pub(super) fn is_drawn(&self, window: Duration, left: Duration) -> bool {
        let Some(Early::Chance(_)) = self.early else { return true };
        let mut mixed = DefaultHasher::new();
        mixed.write_u64(self.draws.fetch_add(1, Relaxed));
        #[expect(clippy::cast_possible_truncation, reason = "any bits will do")]
        let lot = f64::from(mixed.finish() as u32) + 1.0;
        let before = window.mul_f64(-(lot / 2_f64.powi(32)).ln() / LONGEST);
        left <= before
    }

    /// Whether it matters that an entry is used.
    pub(super) fn watches_use(&self) -> bool {
        self.changed
    }

    pub(super) fn send(&self, due: Due<K>) {
        // Nobody receives it once the node has stopped. Each entry is sent a few times at most.
        let _ = self.due.send(due);
    }
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// The store of a table of which some entries are loaded again by themselves.
    pub(crate) fn reloading(mut self, reload: Option<Reload<K>>) -> Self {
        self.reload = reload;
        self
    }

    /// An invalidation has taken this away.
    pub(super) fn note_change(&self, key: &K, removed: &Removed<K, V>) {
        let Some(reload) = self.reload.as_ref().filter(|reload| reload.changed) else { return };
        let word = self.gate.word();
        // Not what a gap or a clear has left.
        if removed.entry().is_some_and(|entry| entry.word == word && entry.life.was_used()) {
            reload.send(Due::Changed(key.clone()));
        }
    }

    /// Asks for a load that nobody else has asked for. `None`: one is under way, and does as well; the row that had changed is held
    /// again; or there is a gap, in which a load would be kept by nobody, and take away what is held. The key is added to `wanted`, as by [`ask`](Self::ask).
    pub(crate) fn reload(&self, due: &Due<K>, wanted: &mut Vec<K>) -> Option<oneshot::Receiver<Outcome<V>>> {
        let (key, is_changed) = match due {
            Due::Early(key) => (key, false),
            Due::Changed(key) => (key, true),
        };
        let hash = self.hashed().map(|hashed| (hashed, hashed.hash(key)));
        let mut flights = self.flights(key);
        if flights.contains_key(key) || !self.is_coherent() || (is_changed && self.peek(key).is_some()) {
            return None;
        }
        let (caller, answer) = oneshot::channel();
        if let Some((hashed, hash)) = hash {
            hashed.note(hash, key);
        }
        flights.insert(key.clone(), Flight::new(self.waiter(caller)));
        wanted.push(key.clone());
        Some(answer)
    }
}
