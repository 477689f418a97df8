//! The gate of a table: one number that says whether entries may be served, and which ones.
//!
//! An entry carries the [`Word`] that the gate showed when its load *started*, and is valid only while the gate
//! still shows it. So one store into the gate drops every entry of the table, and voids every load of it that
//! is under way (I3). Words are never reused within a node: odd ones mean coherent.

use crossbeam_utils::CachePadded;

use crate::sync::{AtomicU64, Ordering};

/// What a gate shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    /// Entries may be published under this word, and served while the gate shows it.
    pub(crate) fn is_coherent(self) -> bool {
        self.0 & 1 == 1
    }
}

/// Deals out words that have never been shown before. One per node.
#[derive(Default)]
pub(crate) struct Words(u64);

impl Words {
    pub(crate) fn fresh(&mut self, coherent: bool) -> Word {
        self.0 += 1;
        Word(self.0 << 1 | u64::from(coherent))
    }
}

/// One table's gate, alone on its cache line: read by every hit, written when doubt begins or ends.
pub(crate) struct Gate(CachePadded<AtomicU64>);

impl Gate {
    /// A gate that serves nothing yet.
    pub(crate) fn closed() -> Self {
        Self(CachePadded::new(AtomicU64::new(0)))
    }

    pub(crate) fn word(&self) -> Word {
        Word(self.0.load(Ordering::Acquire))
    }

    /// Only `Tables` calls this, under its lock, so that words are shown in the order they were dealt.
    pub(crate) fn show(&self, word: Word) {
        self.0.store(word.0, Ordering::Release);
    }
}
