//! What is served when Postgres does not answer, to tables that allow it.
//!
//! Nothing that is known to have changed: an invalidation takes the entry away, and what is not held cannot be served. So this is what
//! has expired, while the node is coherent, when the promise does not depend on it; or what a gap has put out of service, of which it is
//! known since when it may be wrong.

use std::time::Duration;

use super::{Entry, Key, Store, TableEvent};
use crate::sync::Arc;

/// When that is, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rescue {
    /// Since it has expired; since the last fence was sent.
    pub(crate) max: Duration,
    /// How long callers wait for a load before they are given that.
    pub(crate) after: Option<Duration>,
}

impl<K: Key, V: Send + Sync + 'static> Store<K, V> {
    /// Whether and when this table serves what it has when Postgres does not answer.
    pub(crate) fn rescue(&self) -> Option<Rescue> {
        self.expiry.rescue
    }

    /// What may be served in place of a load that failed, or takes too long. `in_gap`: also what a gap has put out of service.
    pub(crate) fn rescued(&self, key: &K, in_gap: bool) -> Option<Arc<Entry<V>>> {
        let entry = self.entries.get(key)?;
        let fits = entry.word == self.gate.word() || in_gap && self.gate.is_stale(entry.word);
        if !fits || self.is_gone(&entry) {
            return None;
        }
        self.counters.rescued.add(1);
        self.tell(|| TableEvent::HitStale { key: key.clone() });
        Some(entry)
    }
}
