//! How far this node is, for readers: two numbers that are read without a lock, and written when a fence counts, after the
//! gates have moved. So who reads one of them, and then an entry, never takes the entry for fresher than it is. For that, Release
//! and Acquire are enough (`loom_tests.rs`).

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
}

impl Horizon {
    /// A fence was applied.
    pub(crate) fn advance(&self, as_of: Boot, lsn: u64) {
        let nanos = u64::try_from(as_of.as_nanos()).expect("a machine that has been up for less than 584 years");
        self.as_of.store(nanos, Ordering::Release);
        self.lsn.store(lsn, Ordering::Release);
    }

    /// What is applied may not be all that was committed any more.
    pub(crate) fn gap(&self) {
        // Relaxed: 0 makes nobody believe anything.
        self.lsn.store(0, Ordering::Relaxed);
    }

    /// The time since everything visible was last known to have been applied.
    pub(crate) fn age(&self, now: Boot) -> Duration {
        match self.as_of.load(Ordering::Acquire) {
            0 => Duration::MAX,
            nanos => now.saturating_sub(Duration::from_nanos(nanos)),
        }
    }

    /// Every commit logged up to this position has been applied. 0 in a gap.
    pub(crate) fn covered(&self) -> u64 {
        self.lsn.load(Ordering::Acquire)
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
        assert_eq!(horizon.covered(), 0);
        horizon.advance(seconds(8), 100);
        assert_eq!((horizon.age(seconds(10)), horizon.covered()), (seconds(2), 100));
        horizon.gap();
        assert_eq!(horizon.covered(), 0);
        assert_eq!(horizon.age(seconds(10)), seconds(2), "what was held is so old");
    }
}
