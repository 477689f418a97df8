//! Where a node is in the change log, and what the answer of a poll means: no I/O, no clock.
//!
//! A poll reads, with one snapshot, the messages of transactions that the last poll's snapshot did not see. What this one sees
//! is then the new position. So a transaction is read by the first poll that sees it, whatever its number, however long it
//! ran, and never if it is rolled back (design, *The change log*):
//!
//! ```text
//! 1. 7 takes its number, 8 takes its number, 8 commits;
//! 2. a poll reads 8. Its snapshot is `7:9:7`: below 9, without 7;
//! 3. 7 commits;
//! 4. the next poll reads 7, and not 8 again. By number, "after 8", it would never have read 7.
//! ```
//!
//! On a standby nobody knows which transactions were running, only the oldest one that was (see `snapshot.rs`). There the
//! position carries which ids from that one on have been read.

use std::collections::BTreeSet;

use crate::{change::Mark, coherence::Incarnation, snapshot::Snapshot};

/// Up to where the log has been read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Position {
    incarnation: Incarnation,
    standby: bool,
    snapshot: Snapshot,
    /// The log's horizon before the snapshot was taken.
    horizon: u64,
    /// On a standby: of the ids from `snapshot.xmin()` on, those that have been read.
    read: BTreeSet<u64>,
}

/// What one poll has found, its messages apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Polled {
    pub(crate) incarnation: Incarnation,
    pub(crate) standby: bool,
    pub(crate) snapshot: Snapshot,
    /// How far the database was before the snapshot was taken.
    pub(crate) lsn: u64,
    /// Below which ids messages might have been removed, before the snapshot was taken.
    pub(crate) horizon: u64,
    /// The same after the last message had been read.
    pub(crate) horizon_after: u64,
    /// The transactions whose messages were read.
    pub(crate) read: BTreeSet<u64>,
    /// How many messages.
    pub(crate) messages: usize,
}

impl Polled {
    /// For a fence that this poll is part of. All that is logged before the position was visible to the snapshot: what a load saw
    /// whose own position is a smaller one, it saw before this one was read. At the same position it may have been later.
    pub(crate) fn mark(&self) -> Mark {
        Mark { snapshot: self.snapshot.clone(), lsn: self.lsn.saturating_sub(1) }
    }

    /// Below this all had ended.
    pub(crate) fn xmin(&self) -> u64 {
        self.snapshot.xmin()
    }

    /// In which of the log's ranges of ids the server is.
    pub(crate) fn range(&self) -> u64 {
        self.snapshot.xmax() >> RANGE_BITS
    }
}

/// So many ids share a bin of the log: 2 to this. As in `migrations/0004_change_log.up.sql`.
const RANGE_BITS: u32 = 19;

impl Position {
    /// From which id on everything is to be read.
    pub(crate) fn since(&self) -> u64 {
        if self.standby { self.snapshot.xmin() } else { self.snapshot.xmax() }
    }

    /// The transactions below that which are to be read as well.
    pub(crate) fn pending(&self) -> &[u64] {
        if self.standby { &[] } else { self.snapshot.running() }
    }

    /// The transactions from there on which have been read.
    pub(crate) fn skip(&self) -> impl Iterator<Item = u64> {
        self.read.iter().copied()
    }

    /// The position after a poll from `last`, and whether nothing was missed in between.
    pub(crate) fn after(last: Option<&Self>, polled: Polled) -> (Self, Continuity) {
        let is_other = |last: &Self| last.incarnation != polled.incarnation || last.standby != polled.standby;
        let continuity = match last {
            Some(last) if is_other(last) => Continuity::OtherServer,
            Some(last) if last.may_have_missed(&polled) => Continuity::Trimmed,
            Some(_) | None => Continuity::Kept,
        };
        let mut read = BTreeSet::new();
        if polled.standby {
            read = polled.read;
            read.extend(last.filter(|_| continuity == Continuity::Kept).into_iter().flat_map(Self::skip));
            read = read.split_off(&polled.snapshot.xmin());
        }
        let Polled { incarnation, standby, snapshot, horizon, .. } = polled;
        (Self { incarnation, standby, snapshot, horizon, read }, continuity)
    }

    /// Whether a transaction may have been removed that this position does not see and the poll's snapshot does.
    ///
    /// Whoever removes moves the horizon first, while nobody can write to what he removes. So as long as the horizon is what it
    /// was before this position's snapshot was taken, whatever has been removed had ended by then, and is seen.
    fn may_have_missed(&self, polled: &Polled) -> bool {
        let removed_below = polled.horizon_after;
        if removed_below == self.horizon {
            return false;
        }
        self.since() < removed_below.min(polled.snapshot.xmax())
            || self.pending().iter().any(|xid| *xid < removed_below && polled.snapshot.sees(*xid))
    }
}

/// Whether all has been read that became visible between two positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Continuity {
    Kept,
    /// Messages may have been removed before they were read. Nothing that is held can be trusted.
    Trimmed,
    /// What was read before is the past of another server, or of one that has lost commits. Nothing that is held can be trusted.
    OtherServer,
}

#[cfg(all(test, not(shuttle)))]
#[path = "change_log_tests.rs"]
mod tests;
