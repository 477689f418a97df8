//! Counters of a table, and of a node. Exact under concurrency; the one on the hit path is striped, so that threads that
//! hit at the same time do not write to one cache line.

use std::time::Duration;

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicU64, Ordering};

mod audits;
mod stripe;
mod tier;
mod times;

pub(crate) use audits::AuditCounters;
pub use audits::Audits;
pub(crate) use tier::TierCounters;
pub use tier::TierStats;
pub use times::LoadTimes;
pub(crate) use times::TimeCounters;

/// Counters of one table on one node, since the table was opened. They never go back, and nobody can reset them: for what happened within some time,
/// take the difference of two ([`since`](Self::since)).
///
/// Identities, in every snapshot: `gets = hits + stale + misses` and `misses = led + joined + declined`. When no load
/// is running, also `loads = published + voided + uncached + failed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Keys asked for (`peek` does not count).
    pub gets: u64,
    /// Keys answered from memory, absent entries included.
    pub hits: u64,
    /// Keys answered from memory while the node was not coherent, for callers who allow that.
    pub stale: u64,
    /// Keys not answered from memory.
    pub misses: u64,
    /// Misses that asked for a load.
    pub led: u64,
    /// Misses that waited for a load somebody else had asked for.
    pub joined: u64,
    /// Misses that asked for no load: of [`try_get`](crate::Table::try_get), of keys that no row can have, of reads that
    /// [`Fallback::Fail`](crate::Fallback::Fail) or [`TableOptions::not_found_max`](crate::TableOptions::not_found_max) refused, and of [`snapshot`](crate::Table::snapshot)s, which have their own
    /// statement.
    pub declined: u64,
    /// Loads of a key that were started.
    pub loads: u64,
    /// Loads whose result is in the cache.
    pub published: u64,
    /// Loads that an invalidation overtook: returned to those who had asked before it, never cached.
    pub voided: u64,
    /// Loads not cached because the node was not coherent, or because the row came from another server than
    /// the one it listens to.
    pub uncached: u64,
    /// Loads that failed.
    pub failed: u64,
    /// Of the failed: those that were refused without a statement, because Postgres had not answered lately
    /// ([`TableOptions::breaker`](crate::TableOptions::breaker)).
    pub refused: u64,
    /// Misses that were answered by what was held, because the load failed or took too long
    /// ([`TableOptions::stale_if_error`](crate::TableOptions::stale_if_error)).
    pub rescued: u64,
    /// Rows that somebody has read or written by himself, and put in ([`Table::ticket`](crate::Table::ticket)).
    pub put: u64,
    /// Loads that found no row.
    pub not_found: u64,
    /// Batches that these loads were sent in: one SQL statement each, unless Postgres refused it, and its keys were then
    /// loaded one by one.
    pub queries: u64,
    /// Keys that a message or a call invalidated, whether they were held or not.
    pub invalidations: u64,
    /// Times that all entries were dropped at once: whole-table messages, `clear`, gaps.
    pub clears: u64,
    /// Rows that were read again after a gap because they had been used before it. Their loads are not gets.
    pub refilled: u64,
    /// Entries that expired: that were found to be too old when they were asked for, or by a look through all of them.
    pub expired: u64,
    /// Entries that were read again before they expired ([`TableOptions::refresh_ahead`](crate::TableOptions::refresh_ahead)). Their loads
    /// are not gets.
    pub refreshed: u64,
    /// Entries that were evicted for lack of space, before anything else ended them.
    pub evicted: u64,
    /// Of those: entries larger than any that can be held ([`TableOptions::bytes`](crate::TableOptions::bytes)), evicted when they came.
    pub oversized: u64,
    /// Entries held, absent ones and ones that are no longer valid included.
    pub entries: u64,
    /// Of those: absent ones.
    pub absent: u64,
    /// What entries take, in bytes: the absent ones; and rows, if they are bounded by
    /// [`TableOptions::bytes`](crate::TableOptions::bytes).
    pub bytes: u64,
    /// What can be held, in the unit of the bound: rows, or bytes with [`TableOptions::bytes`](crate::TableOptions::bytes).
    pub capacity: u64,
    /// Of that: what is held.
    pub used: u64,
    /// How long statements took.
    pub load_times: LoadTimes,
    /// Hits whose rows were read again.
    pub audits: Audits,
    /// What came of asking the [`Tier`](crate::Tier).
    pub tier: TierStats,
}

impl Stats {
    /// The share of keys that were answered from memory; `None` if none was asked for.
    ///
    /// ```
    /// # fn example(users: &rowcache::Table<i64, (i64, String)>, a_minute_ago: rowcache::Stats) {
    /// let now = users.stats();
    /// println!("{:?} of all, {:?} in the last minute", now.hit_ratio(), now.since(&a_minute_ago).hit_ratio());
    /// # }
    /// ```
    #[must_use]
    pub fn hit_ratio(&self) -> Option<f64> {
        share(self.hits + self.stale, self.gets)
    }

    /// The share of the space for rows that is in use.
    #[must_use]
    pub fn utilisation(&self) -> f64 {
        share(self.used, self.capacity).unwrap_or(1.0)
    }

    /// What was counted since `earlier`. What is held (`entries`, `absent`, `bytes`, `capacity`, `used`) is as it is now.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut now = *self;
        macro_rules! less {
            ($($field:ident),*) => { $(now.$field = now.$field.saturating_sub(earlier.$field);)* };
        }
        less!(
            gets, hits, stale, misses, led, joined, declined, loads, published, voided, uncached, failed, refused,
            rescued
        );
        less!(put, not_found, queries, invalidations, clears, refilled, expired, refreshed, evicted, oversized);
        now.load_times = self.load_times.since(&earlier.load_times);
        now.audits = self.audits.since(&earlier.audits);
        now.tier = self.tier.since(&earlier.tier);
        now
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share")]
fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// Counters of one node since it started. They never go back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeStats {
    /// Times that the node ceased to be coherent.
    pub gaps: u64,
    /// Times that it became coherent.
    pub recoveries: u64,
    /// Fences that came back.
    pub fences: u64,
    /// How long the last of them took, from before it was sent until it counted: the round trip, the wait behind commits, the look
    /// at the triggers, and whatever the applier had to do before it.
    pub fence_took: Duration,
    /// Messages applied, fences included.
    pub messages: u64,
    /// Messages that could not be read, each of which made a table, or all, be forgotten.
    pub unreadable: u64,
    /// Times that more came in than [`inbox_bytes_max`](crate::Config::inbox_bytes_max) holds.
    pub overflows: u64,
}

/// The live counters behind [`NodeStats`].
#[derive(Default)]
pub(crate) struct NodeCounters {
    pub(crate) gaps: Counter,
    pub(crate) recoveries: Counter,
    pub(crate) fences: Counter,
    fence_nanos: AtomicU64,
    pub(crate) messages: Counter,
    pub(crate) unreadable: Counter,
    pub(crate) overflows: Counter,
}

impl NodeCounters {
    /// A fence counts, so long after it was sent.
    pub(crate) fn fence(&self, took: Duration) {
        self.fences.add(1);
        self.fence_nanos.store(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> NodeStats {
        NodeStats {
            gaps: self.gaps.get(),
            recoveries: self.recoveries.get(),
            fences: self.fences.get(),
            fence_took: Duration::from_nanos(self.fence_nanos.load(Ordering::Relaxed)),
            messages: self.messages.get(),
            unreadable: self.unreadable.get(),
            overflows: self.overflows.get(),
        }
    }
}

/// One in so many hits leaves a trace in its entry. More would make threads that hit the same entry write to one cache line.
pub(crate) const SAMPLED: u32 = 16;

/// The live counters behind [`Stats`].
#[derive(Default)]
pub(crate) struct Counters {
    hits: Striped,
    stale: Striped,
    pub(crate) led: Counter,
    pub(crate) joined: Counter,
    pub(crate) declined: Counter,
    pub(crate) loads: Counter,
    pub(crate) published: Counter,
    pub(crate) voided: Counter,
    pub(crate) uncached: Counter,
    pub(crate) failed: Counter,
    pub(crate) refused: Counter,
    pub(crate) rescued: Counter,
    pub(crate) put: Counter,
    pub(crate) not_found: Counter,
    pub(crate) queries: Counter,
    pub(crate) invalidations: Counter,
    pub(crate) clears: Counter,
    pub(crate) refilled: Counter,
    pub(crate) expired: Counter,
    pub(crate) refreshed: Counter,
    pub(crate) evicted: Counter,
    pub(crate) oversized: Counter,
    pub(crate) load_times: TimeCounters,
    pub(crate) audits: AuditCounters,
    pub(crate) tier: TierCounters,
}

impl Counters {
    /// Returns whether this hit is one of the sample.
    #[inline]
    pub(crate) fn hit(&self) -> bool {
        // Spread by a multiplication, and not every sixteenth: a loop over 160 keys would always meet the same ten.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the low half counts as well, and fits into an instruction"
        )]
        let n = self.hits.add(1) as u32;
        n.wrapping_mul(0x9e37_79b9) < u32::MAX / SAMPLED
    }

    pub(crate) fn hits(&self, n: u64) {
        self.hits.add(n);
    }

    pub(crate) fn stale(&self) {
        self.stale.add(1);
    }

    /// What is held apart.
    pub(crate) fn snapshot(&self) -> Stats {
        // Sums are taken here, of counters that were read once: an identity cannot be seen half updated.
        let (hits, stale) = (self.hits.get(), self.stale.get());
        let (led, joined, declined) = (self.led.get(), self.joined.get(), self.declined.get());
        let misses = led + joined + declined;
        Stats {
            gets: hits + stale + misses,
            hits,
            stale,
            misses,
            led,
            joined,
            declined,
            loads: self.loads.get(),
            published: self.published.get(),
            voided: self.voided.get(),
            uncached: self.uncached.get(),
            failed: self.failed.get(),
            refused: self.refused.get(),
            rescued: self.rescued.get(),
            put: self.put.get(),
            not_found: self.not_found.get(),
            queries: self.queries.get(),
            invalidations: self.invalidations.get(),
            clears: self.clears.get(),
            refilled: self.refilled.get(),
            expired: self.expired.get(),
            refreshed: self.refreshed.get(),
            evicted: self.evicted.get(),
            oversized: self.oversized.get(),
            load_times: self.load_times.snapshot(),
            audits: self.audits.snapshot(),
            tier: self.tier.snapshot(),
            ..Stats::default()
        }
    }
}

/// A counter off the hit path.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

struct Striped([CachePadded<AtomicU64>; stripe::COUNT]);

impl Default for Striped {
    fn default() -> Self {
        Self(std::array::from_fn(|_| CachePadded::default()))
    }
}

impl Striped {
    /// Returns what the stripe showed before.
    #[inline]
    fn add(&self, n: u64) -> u64 {
        match stripe::current() {
            // Nobody else writes to it: the instruction that would keep others out takes as long as a tenth of a hit.
            stripe if stripe < stripe::OWNED => {
                let counter = &self.0[stripe];
                let before = counter.load(Ordering::Relaxed);
                counter.store(before.wrapping_add(n), Ordering::Relaxed);
                before
            }
            stripe => self.add_shared(stripe, n),
        }
    }

    #[cold]
    fn add_shared(&self, stripe: usize, n: u64) -> u64 {
        self.0[stripe::dealt(stripe)].fetch_add(n, Ordering::Relaxed)
    }

    fn get(&self) -> u64 {
        self.0.iter().map(|stripe| stripe.load(Ordering::Relaxed)).sum()
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn hits_are_exact_under_concurrency() {
        let counters = Counters::default();
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| (0..1000).filter(|_| counters.hit()).count());
            }
        });
        counters.declined.add(2);
        let stats = counters.snapshot();
        assert_eq!((stats.gets, stats.hits, stats.misses), (40_002, 40_000, 2));
    }

    #[test]
    fn what_happened_since_is_a_difference_of_what_never_goes_back() {
        let counters = Counters::default();
        let none = counters.snapshot();
        assert_eq!(none.hit_ratio(), None);
        counters.hit();
        counters.led.add(3);
        counters.load_times.add(Duration::from_millis(1));
        let earlier = Stats { capacity: 10, used: 2, ..counters.snapshot() };
        assert_eq!((earlier.hit_ratio(), earlier.utilisation()), (Some(0.25), 0.2));
        counters.hits(3);
        counters.joined.add(1);
        counters.audits.equal.add(1);
        let now = Stats { capacity: 10, used: 5, ..counters.snapshot() };
        let since = now.since(&earlier);
        assert_eq!((since.gets, since.hits, since.led, since.joined, since.used), (4, 3, 0, 1, 5));
        assert_eq!((since.hit_ratio(), since.audits.audited, since.load_times.count()), (Some(0.75), 1, 0));
        assert_eq!(now.since(&none), now);
        assert_eq!(now.since(&now), Stats { capacity: 10, used: 5, ..Stats::default() });
    }
}
