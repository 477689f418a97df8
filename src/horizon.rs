//! How far this node is, for readers: three numbers that are read without a lock, and written by the applier.
//!
//! Written in one order and read in the other, so that what a reader sees is never newer than what holds.

use std::time::Duration;

use crate::{
    coherence::Boot,
    sync::{AtomicU64, Ordering},
};

#[derive(Default)]
pub(crate) struct Horizon {
    /// Nanoseconds since boot: everything visible before this moment has been applied, or had been when the node was last
    /// coherent. 0: it has not been.
    as_of: AtomicU64,
    /// Every commit logged before this position has been applied. 0 in a gap.
    lsn: AtomicU64,
    /// Grows before each message is applied.
    applied: AtomicU64,
}

/// What a reader of several entries notes before the first, and compares after the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sight {
    applied: u64,
    lsn: u64,
}

impl Sight {
    /// Whether all commits that a load saw, which says this of itself, have been applied.
    pub(crate) fn covers(self, lsn: u64) -> bool {
        lsn <= self.lsn
    }
}

impl Horizon {
    /// A fence was applied.
    pub(crate) fn advance(&self, as_of: Boot, lsn: u64) {
        let nanos = u64::try_from(as_of.as_nanos()).expect("a machine that has been up for less than 584 years");
        self.as_of.store(nanos, Ordering::SeqCst);
        self.lsn.store(lsn, Ordering::SeqCst);
    }

    /// What is applied may not be all that was committed any more.
    pub(crate) fn gap(&self) {
        self.lsn.store(0, Ordering::SeqCst);
    }

    /// A message is about to be applied.
    pub(crate) fn applying(&self) {
        self.applied.fetch_add(1, Ordering::SeqCst);
    }

    /// The time since everything visible was last known to have been applied.
    pub(crate) fn age(&self, now: Boot) -> Duration {
        match self.as_of.load(Ordering::SeqCst) {
            0 => Duration::MAX,
            nanos => now.saturating_sub(Duration::from_nanos(nanos)),
        }
    }

    /// Notes where the applier is.
    pub(crate) fn sight(&self) -> Sight {
        let applied = self.applied.load(Ordering::SeqCst);
        Sight { applied, lsn: self.lsn.load(Ordering::SeqCst) }
    }

    /// Whether nothing has been applied since.
    pub(crate) fn is_unchanged_since(&self, sight: Sight) -> bool {
        self.applied.load(Ordering::SeqCst) == sight.applied
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_covered_before_the_first_fence_and_in_a_gap() {
        let horizon = Horizon::default();
        let seconds = Duration::from_secs;
        assert_eq!(horizon.age(seconds(10)), Duration::MAX);
        assert!(!horizon.sight().covers(1));
        horizon.advance(seconds(8), 100);
        assert_eq!(horizon.age(seconds(10)), seconds(2));
        let sight = horizon.sight();
        assert!(sight.covers(100) && !sight.covers(101));
        assert!(horizon.is_unchanged_since(sight));
        horizon.applying();
        assert!(!horizon.is_unchanged_since(sight));
        horizon.gap();
        assert!(!horizon.sight().covers(1));
        assert_eq!(horizon.age(seconds(10)), seconds(2), "what was held is so old");
    }
}
