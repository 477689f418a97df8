//! A bound on loads that find nothing, for tables that strangers can ask for keys they made up.
//!
//! A key that does not exist cannot be told from one that is not held until Postgres has been asked. So nothing is refused until a
//! second's worth of loads has found nothing; from then on misses are, until time has paid for them. Hits never are.

use super::{Key, Store};
use crate::{
    coherence::Boot,
    sync::{AtomicU64, Ordering},
};

/// A leaky bucket that holds a second's worth (GCRA). Without a limit it lets everything through.
#[derive(Default)]
pub(super) struct Unknown {
    /// What each load that found nothing costs, in nanoseconds. 0: no limit.
    price: u64,
    /// When all of them are paid for, in nanoseconds since boot.
    paid_at: AtomicU64,
}

const BURST: u64 = 1_000_000_000;

impl Unknown {
    fn new(per_second: u32) -> Self {
        Self { price: BURST / u64::from(per_second), paid_at: AtomicU64::new(0) }
    }

    fn found_nothing(&self, times: u64, now: Boot) {
        if self.price == 0 || times == 0 {
            return;
        }
        let now = nanos(now);
        let later = |paid_at: u64| Some(paid_at.max(now).saturating_add(times.saturating_mul(self.price)));
        let _ = self.paid_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
    }

    fn is_spent(&self, now: Boot) -> bool {
        self.paid_at.load(Ordering::Relaxed) >= nanos(now).saturating_add(BURST)
    }
}

fn nanos(at: Boot) -> u64 {
    u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// With misses refused once so many loads a second have found nothing.
    pub(crate) fn not_found_max(mut self, per_second: Option<std::num::NonZeroU32>) -> Self {
        self.unknown = per_second.map_or_else(Unknown::default, |limit| Unknown::new(limit.get()));
        self
    }

    pub(crate) fn found_nothing(&self, times: usize, now: Boot) {
        self.counters.not_found.add(times as u64);
        self.unknown.found_nothing(times as u64, now);
    }

    /// Whether misses are refused now.
    pub(crate) fn refuses_unknown(&self, clock: impl FnOnce() -> Boot) -> bool {
        self.unknown.price > 0 && self.unknown.is_spent(clock())
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_second_s_worth_at_once_and_then_as_time_pays() {
        let unknown = Unknown::new(10);
        let at = Duration::from_millis;
        unknown.found_nothing(9, at(5000));
        assert!(!unknown.is_spent(at(5000)));
        unknown.found_nothing(1, at(5000));
        assert!(unknown.is_spent(at(5000)));
        assert!(!unknown.is_spent(at(5001)), "the next one may be the one that exists");
        unknown.found_nothing(512, at(5001));
        assert!(unknown.is_spent(at(50_000)), "a batch is paid for like all others");
        assert!(!unknown.is_spent(at(60_000)));
        assert!(!Unknown::default().is_spent(at(0)));
    }
}
