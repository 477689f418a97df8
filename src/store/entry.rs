//! What the cache knows about one key, and how it is handed out.

use std::{ops::Deref, sync::atomic::AtomicU32, time::Duration};

use super::expiry::Life;
use crate::{
    coherence::Boot,
    digest::{Digest, Tenths},
    gate::Word,
    sync::Arc,
};

/// A value held by the cache, or that has just been loaded: a shared pointer that derefs to the value.
///
/// It stays what it is however long it is held: a change makes the *cache* forget the row, not you.
pub struct Cached<V>(Arc<Entry<V>>);

/// What the cache knows about one key. What a hit looks at comes first, up to when its life is due, and so lies beside the count of the `Arc`s: where
/// the rows are in no processor's cache, each further line to wait for is a tenth of a hit.
#[repr(C)]
pub(crate) struct Entry<V> {
    /// What the gate showed when the load started, if the entry was published.
    pub(super) word: Word,
    /// Grows with use: one in [`SAMPLED`](crate::stats::SAMPLED) hits of this thread or another one is counted.
    pub(super) heat: AtomicU32,
    pub(super) weight: Weight,
    pub(super) life: Life,
    /// When the load started.
    pub(super) at: Tenths,
    /// The commits that the load saw were logged before this position.
    pub(super) lsn: u64,
    /// Of the row as it was received, if the table is audited.
    pub(super) digest: Digest,
    /// `None`: there is no such row.
    pub(super) value: Option<V>,
}

/// What an entry weighs, in the unit of the bound that it counts against, and whether it is of a row: so a hit need not look at the value itself to
/// know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weight(u32);

impl Weight {
    /// What is more than 2 GB is as much: the lowest bit is taken. Postgres sends no row of more than 1 GB.
    pub(super) fn new<V>(weight: usize, value: Option<&V>) -> Self {
        const MAX: u32 = u32::MAX >> 1;
        let weight = u32::try_from(weight).unwrap_or(MAX).min(MAX);
        Self(weight << 1 | u32::from(value.is_some()))
    }

    pub(super) fn get(self) -> u32 {
        self.0 >> 1
    }

    fn is_row(self) -> bool {
        self.0 & 1 == 1
    }
}

impl<V> Entry<V> {
    pub(super) fn new(word: Word, lsn: u64, value: Option<V>) -> Self {
        Self {
            word,
            heat: AtomicU32::new(0),
            weight: Weight::new(1, value.as_ref()),
            life: Life::unlimited(),
            at: Tenths::BOOT,
            lsn,
            digest: Digest::UNKNOWN,
            value,
        }
    }

    /// The row; `None` if there is none.
    #[cfg(fuzzing)]
    pub(crate) fn row(&self) -> Option<&V> {
        self.value.as_ref()
    }

    /// Whether the load saw only commits logged before this position, and its entry is of the time when the gate showed this.
    pub(crate) fn is_within(&self, word: Word, lsn: u64) -> bool {
        self.word == word && self.lsn <= lsn
    }

    pub(crate) fn digest(&self) -> Digest {
        self.digest
    }

    /// The commits that its load saw were logged before this position.
    pub(crate) fn lsn(&self) -> u64 {
        self.lsn
    }

    pub(crate) fn is_row(&self) -> bool {
        self.weight.is_row()
    }

    /// When its load started.
    pub(crate) fn loaded_at(&self) -> Tenths {
        self.at
    }

    /// `None`: never.
    pub(crate) fn expires_at(&self) -> Option<Tenths> {
        self.life.expires_at()
    }

    /// How long ago its load started.
    pub(crate) fn age(&self, now: Boot) -> Duration {
        self.at.age(now)
    }
}

impl<V> Cached<V> {
    /// The row, if the entry is not about an absent one.
    pub(crate) fn new(entry: Arc<Entry<V>>) -> Option<Self> {
        entry.is_row().then_some(Self(entry))
    }

    pub(super) fn entry(&self) -> &Entry<V> {
        &self.0
    }

    /// A row that no cache holds.
    pub(crate) fn loaded(value: Option<V>) -> Option<Self> {
        Self::new(Arc::new(Entry::new(Word::default(), 0, value)))
    }
}

impl<V> Deref for Cached<V> {
    type Target = V;

    fn deref(&self) -> &V {
        self.0.value.as_ref().expect("made only of entries that hold a row")
    }
}

impl<V> AsRef<V> for Cached<V> {
    fn as_ref(&self) -> &V {
        self
    }
}

impl<V> Clone for Cached<V> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<V: std::fmt::Debug> std::fmt::Debug for Cached<V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

impl<V: PartialEq> PartialEq for Cached<V> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<V: Eq> Eq for Cached<V> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Words;

    #[test]
    fn x24_what_was_loaded_later_or_in_another_epoch_is_not_within() {
        let mut words = Words::default();
        let [word, other] = [true, true].map(|coherent| words.fresh(coherent));
        let entry = Entry::new(word, 7, Some("ada"));
        assert_eq!([6, 7, 8].map(|lsn| entry.is_within(word, lsn)), [false, true, true]);
        assert!(!entry.is_within(other, 7));
    }

    #[test]
    fn a_row_is_handed_out_as_what_it_is() {
        let [ada, bob] = ["ada", "bob"].map(|name| Cached::loaded(Some(name)).expect("a row"));
        assert_eq!((*ada, ada.len(), format!("{ada:?}").as_str()), ("ada", 3, "\"ada\""));
        assert!(ada == ada.clone() && ada != bob);
        assert!(Cached::loaded(None::<&str>).is_none());
        let audited = Entry { digest: Digest::ABSENT, ..Entry::new(Word::default(), 7, None::<&str>) };
        assert_eq!((audited.digest(), audited.lsn()), (Digest::ABSENT, 7));
    }
}
