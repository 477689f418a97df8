//! What came of asking a tier.

use super::Counter;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What came of asking the [`Tier`](crate::Tier) for rows of one table. All 0 if it has none.
        ///
        /// Identity, when no load is running: `asked = hits + misses + refused + unreadable + failed + awaited_in_vain`.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct TierStats { $($(#[$doc])* pub $name: u64,)* }

        impl TierStats {
            pub(super) fn since(&self, earlier: &Self) -> Self {
                Self { $($name: self.$name.saturating_sub(earlier.$name),)* }
            }
        }

        /// The live counters behind [`TierStats`].
        #[derive(Default)]
        pub(crate) struct TierCounters { $(pub(crate) $name: Counter,)* }

        impl TierCounters {
            pub(crate) fn snapshot(&self) -> TierStats {
                TierStats { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Keys that it was asked for.
    asked,
    /// Rows that it had, and that were taken.
    hits,
    /// Keys of which it had nothing, or only what is too old.
    misses,
    /// Of the rows that it gave all the same: those that were too old.
    refused,
    /// What was no row: damaged, forged, of another key; or its bytes make no value any more, or one that would be written differently.
    unreadable,
    /// Keys whose answer did not come in time, or was an error.
    failed,
    /// Keys that another node was loading, and that had not come when [`Tier::patience`](crate::Tier::patience) was over.
    awaited_in_vain,
    /// Keys that another node was loading when it was asked, whatever came of it.
    awaited,
    /// Keys that it was not asked for, because it had failed a moment before.
    skipped,
    /// Keys that it was not asked for, because nothing would have been admitted: the node is not coherent, or has been cleared since
    /// the last two fences.
    unready,
    /// Rows that were put into it.
    written,
    /// Rows that were not: too large, changed by being encoded, or it failed or was busy.
    unwritten,
}
