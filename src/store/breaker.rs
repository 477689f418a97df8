//! Keeps loads from a database that does not answer.
//!
//! After so many loads of a table in a row that did not reach Postgres, further ones are refused at once, but for one a second, which
//! shows whether it is back. A load that succeeds ends that; so does the node when it becomes coherent, because then Postgres has answered
//! somebody.

use std::{num::NonZeroU32, time::Duration};

use super::Runner;
use crate::{
    coherence::Boot,
    error::{Error, Kind},
    key::Key,
    sync::{AtomicU64, Mutex, Ordering, lock},
};

/// Between two attempts.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Breaker {
    /// `None`: nothing is refused.
    pub(super) after: Option<NonZeroU32>,
    failures: AtomicU64,
    /// When one more is tried, in nanoseconds since boot.
    next: AtomicU64,
    /// Protects what the last one failed with.
    why: Mutex<Option<Error>>,
}

impl Breaker {
    fn is_broken(&self) -> bool {
        self.after.is_some_and(|after| self.failures.load(Ordering::Acquire) >= u64::from(after.get()))
    }

    /// Whether a load would be refused now.
    fn is_open(&self, now: Boot) -> bool {
        self.is_broken() && nanos(now) < self.next.load(Ordering::Acquire)
    }

    /// Whether a load may go on; if it is the one that shows whether Postgres is back, it is the only one for a while.
    fn admits(&self, now: Boot) -> bool {
        if !self.is_broken() {
            return true;
        }
        let later = |next: u64| (next <= nanos(now)).then(|| nanos(now + PAUSE));
        self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, later).is_ok()
    }

    fn failed(&self, now: Boot, error: &Error) {
        if self.after.is_none() {
            return;
        }
        *lock(&self.why) = Some(error.clone());
        self.next.store(nanos(now + PAUSE), Ordering::Release);
        // It stays where it is, once there.
        let _ = self.failures.fetch_update(Ordering::AcqRel, Ordering::Acquire, |failures| failures.checked_add(1));
    }

    /// Postgres has answered.
    pub(super) fn reset(&self) {
        self.failures.store(0, Ordering::Release);
    }

    fn error(&self) -> Error {
        let what = format!(
            "it was not tried: the last {} loads got no answer (`breaker`); one is tried each second",
            self.failures.load(Ordering::Acquire)
        );
        match &*lock(&self.why) {
            Some(why) => Error::with(Kind::Unavailable, what, why.clone()),
            None => Error::new(Kind::Unavailable, what),
        }
    }
}

fn nanos(at: Boot) -> u64 {
    u64::try_from(at.as_nanos()).unwrap_or(u64::MAX)
}

impl<K: Key, V: Send + Sync + 'static> Runner<K, V> {
    /// Whether it need not wait for its turn, because its loads would be refused.
    pub(crate) fn is_refused(&self, now: Boot) -> bool {
        self.store.breaker.is_open(now)
    }

    /// Ends the loads of all keys that wait, if they are refused now. Who is not must load.
    pub(crate) fn refuse(&mut self, now: Boot) -> bool {
        let breaker = &self.store.breaker;
        if breaker.admits(now) {
            return false;
        }
        let error = breaker.error();
        let keys = self.grab();
        self.store.counters.refused.add(keys as u64);
        self.fail(&error);
        true
    }

    /// How a statement ended that began then, as far as it tells whether Postgres can be reached.
    pub(crate) fn asked(&self, outcome: Result<(), &Error>, began: Boot, now: Boot) {
        self.store.counters.load_times.add(now.saturating_sub(began));
        match outcome {
            Err(error) if error.is_unavailable() || error.is_timeout() => self.store.breaker.failed(now, error),
            _ => self.store.breaker.reset(),
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn after_so_many_failures_one_a_second_is_let_through() {
        let breaker = Breaker { after: NonZeroU32::new(2), ..Breaker::default() };
        let at = Duration::from_millis;
        let down = Error::new(Kind::Unavailable, "down");
        breaker.failed(at(1000), &down);
        assert!(breaker.admits(at(1000)) && !breaker.is_open(at(1000)));
        breaker.failed(at(1000), &down);
        assert!(breaker.is_open(at(1999)) && !breaker.admits(at(1999)));
        assert!(!breaker.is_open(at(2000)));
        assert_eq!([2000, 2000, 2999].map(|now| breaker.admits(at(now))), [true, false, false]);
        // Its failure counts from when it ended.
        breaker.failed(at(5000), &down);
        assert_eq!([5999, 6000].map(|now| breaker.admits(at(now))), [false, true]);
        assert!(breaker.error().is_unavailable() && breaker.error().to_string().contains("last 3 loads"));
        breaker.reset();
        assert!(breaker.admits(at(6001)) && breaker.admits(at(6001)));
        let none = Breaker::default();
        none.failed(at(1000), &down);
        assert!(none.admits(at(1000)));
    }
}
