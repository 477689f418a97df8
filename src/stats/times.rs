//! How long loads take.

use std::time::Duration;

use super::Counter;

/// How long the statements took that load rows, with their wait for a connection: counted in buckets, each of which reaches twice as far as the one
/// before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadTimes {
    buckets: [u64; BUCKETS],
    /// In nanoseconds.
    total: u64,
}

/// From 64 µs to more than a minute; the last one has no end.
const BUCKETS: usize = 22;
const FIRST: Duration = Duration::from_micros(64);

impl LoadTimes {
    /// Each bucket: up to which time it reaches, and how many it has. Not those of the buckets before. The last one has no end.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> {
        self.buckets.iter().enumerate().map(|(n, count)| (reaches(n), *count))
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// All of them together.
    #[must_use]
    pub fn total(&self) -> Duration {
        Duration::from_nanos(self.total)
    }

    /// A time that this share of them did not exceed, from 0 to 1: the end of a bucket, so at most twice the true one. `None`: there were
    /// none.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        #[expect(clippy::cast_precision_loss, reason = "a share of the count")]
        let wanted = (self.count() as f64 * share.clamp(0.0, 1.0)).max(f64::MIN_POSITIVE);
        let mut seen = 0;
        self.buckets().find_map(|(reaches, count)| {
            seen += count;
            #[expect(clippy::cast_precision_loss, reason = "as above")]
            (count > 0 && seen as f64 >= wanted).then_some(reaches)
        })
    }

    pub(super) fn since(&self, earlier: &Self) -> Self {
        let mut buckets = self.buckets;
        for (bucket, before) in buckets.iter_mut().zip(earlier.buckets) {
            *bucket = bucket.saturating_sub(before);
        }
        Self { buckets, total: self.total.saturating_sub(earlier.total) }
    }
}

fn reaches(bucket: usize) -> Duration {
    FIRST * (1 << bucket)
}

/// The live counters behind [`LoadTimes`].
#[derive(Default)]
pub(crate) struct TimeCounters {
    buckets: [Counter; BUCKETS],
    /// In nanoseconds.
    total: Counter,
}

impl TimeCounters {
    pub(crate) fn add(&self, took: Duration) {
        let bucket = (0..BUCKETS - 1).find(|bucket| took <= reaches(*bucket)).unwrap_or(BUCKETS - 1);
        self.buckets[bucket].add(1);
        self.total.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn snapshot(&self) -> LoadTimes {
        let mut buckets = [0; BUCKETS];
        for (bucket, counter) in buckets.iter_mut().zip(&self.buckets) {
            *bucket = counter.get();
        }
        LoadTimes { buckets, total: self.total.get() }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn times_fall_into_buckets_that_double() {
        let counters = TimeCounters::default();
        assert_eq!(counters.snapshot().quantile(0.5), None);
        for micros in [0, 64, 65, 128, 129, 1000] {
            counters.add(Duration::from_micros(micros));
        }
        let before = counters.snapshot();
        counters.add(Duration::from_hours(1));
        let times = counters.snapshot();
        let full: Vec<_> =
            times.buckets().filter(|(_, count)| *count > 0).map(|(end, n)| (end.as_micros(), n)).collect();
        assert_eq!(full, [(64, 2), (128, 2), (256, 1), (1024, 1), (134_217_728, 1)]);
        let at = |share| before.quantile(share).map(|time| time.as_micros());
        assert_eq!([0.0, 0.3, 0.5, 0.7, 1.0].map(at), [64, 64, 128, 256, 1024].map(Some));
        assert_eq!((times.count(), times.since(&before).count()), (7, 1));
        assert_eq!(times.since(&before).total(), Duration::from_hours(1));
    }
}
