//! What audits found.

use std::time::Duration;

use super::Counter;

/// What became of the hits of one table whose rows were read again ([`TableOptions::audit`](crate::TableOptions::audit)).
///
/// Identities, in every snapshot: `audited = equal + changed + skipped + incoherent`, and `incoherent = within_second +
/// within_minute + within_hour + older`. The number for a wall is `incoherent`: it is 0 for as long as the promise holds, and
/// `incoherent / (equal + changed + incoherent)` is the share of hits that were wrong, as far as the sample tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Audits {
    /// Hits that were audited.
    pub audited: u64,
    /// The row was what had been served.
    pub equal: u64,
    /// The row was another one, and when everything visible by then had been applied, the entry was gone: a change was on its
    /// way.
    pub changed: u64,
    /// Nothing could be concluded: Postgres did not answer, another server did, or the node ceased to be coherent.
    pub skipped: u64,
    /// The row was another one, and everything visible by then had been applied, and the entry was still served. Each is
    /// an error; none is a change on its way.
    pub incoherent: u64,
    /// Of the incoherent: those whose entry was held for less than a second.
    pub within_second: u64,
    /// Of the incoherent: those whose entry was held for a second to a minute.
    pub within_minute: u64,
    /// Of the incoherent: those whose entry was held for a minute to an hour.
    pub within_hour: u64,
    /// Of the incoherent: those whose entry was held for an hour or more.
    pub older: u64,
}

impl Audits {
    pub(super) fn since(&self, earlier: &Self) -> Self {
        Self {
            audited: self.audited.saturating_sub(earlier.audited),
            equal: self.equal.saturating_sub(earlier.equal),
            changed: self.changed.saturating_sub(earlier.changed),
            skipped: self.skipped.saturating_sub(earlier.skipped),
            incoherent: self.incoherent.saturating_sub(earlier.incoherent),
            within_second: self.within_second.saturating_sub(earlier.within_second),
            within_minute: self.within_minute.saturating_sub(earlier.within_minute),
            within_hour: self.within_hour.saturating_sub(earlier.within_hour),
            older: self.older.saturating_sub(earlier.older),
        }
    }
}

/// The live counters behind [`Audits`].
#[derive(Default)]
pub(crate) struct AuditCounters {
    pub(crate) equal: Counter,
    pub(crate) changed: Counter,
    pub(crate) skipped: Counter,
    /// By age.
    incoherent: [Counter; 4],
}

impl AuditCounters {
    /// An entry of this age was incoherent.
    pub(crate) fn incoherent(&self, age: Duration) {
        let window = match age.as_secs() {
            0 => 0,
            1..60 => 1,
            60..3600 => 2,
            _ => 3,
        };
        self.incoherent[window].add(1);
    }

    pub(super) fn snapshot(&self) -> Audits {
        let (equal, changed, skipped) = (self.equal.get(), self.changed.get(), self.skipped.get());
        let [within_second, within_minute, within_hour, older] = [0, 1, 2, 3].map(|n| self.incoherent[n].get());
        let incoherent = within_second + within_minute + within_hour + older;
        let audited = equal + changed + skipped + incoherent;
        Audits { audited, equal, changed, skipped, incoherent, within_second, within_minute, within_hour, older }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn ages_fall_into_windows_and_sums_agree() {
        let counters = AuditCounters::default();
        for millis in [0, 999, 1000, 59_999, 60_000, 3_599_999, 3_600_000] {
            counters.incoherent(Duration::from_millis(millis));
        }
        counters.equal.add(10);
        counters.changed.add(2);
        counters.skipped.add(1);
        let audits = counters.snapshot();
        assert_eq!((audits.within_second, audits.within_minute, audits.within_hour, audits.older), (2, 2, 2, 1));
        assert_eq!((audits.incoherent, audits.audited), (7, 20));
    }
}
