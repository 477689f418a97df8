//! The gate of a table: one number that says whether entries may be served, and which ones.
//!
//! An entry carries the [`Word`] that the gate showed when its load *started*, and is valid only while the gate
//! still shows it. So one store into the gate drops every entry of the table, and voids every load of it that
//! is under way (I3). Each word is dealt once within a node: odd ones mean coherent.
//!
//! When a gap closes a gate, it remembers the word that it showed: entries under it are out of date, but it is known
//! since when, and who asks for old data may have them ([`Fallback::ServeStale`](crate::Fallback)). If what happened meanwhile can
//! be made up for, the gate shows that word again ([`Gate::resume`]).

use crossbeam_utils::CachePadded;

use crate::{
    digest::Tenths,
    sync::{AtomicU64, Ordering},
};

/// What a gate shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Word(u64);

impl Word {
    /// Entries may be published under this word, and served while the gate shows it.
    pub(crate) fn is_coherent(self) -> bool {
        self.0 & 1 == 1
    }
}

/// Deals out words that have never been shown before. One per node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Words(u64);

impl Words {
    pub(crate) fn fresh(&mut self, coherent: bool) -> Word {
        self.0 += 1;
        Word(self.0 << 1 | u64::from(coherent))
    }
}

/// One table's gate, alone on its cache line: read by every hit, written when doubt begins or ends.
pub(crate) struct Gate(CachePadded<Shown>);

struct Shown {
    word: AtomicU64,
    /// The word under which entries are held that a gap has put out of service; 0, an even one, if there are none.
    stale: AtomicU64,
    /// Tenths of a second since boot, as of the clock thread's last look. It is no part of the gate, but each hit reads it as well.
    now: AtomicU64,
}

impl Shown {
    fn of(word: u64, stale: u64) -> Self {
        Self { word: AtomicU64::new(word), stale: AtomicU64::new(stale), now: AtomicU64::new(0) }
    }
}

/// What becomes of the entries under the word that a gate showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// They were true when the gap began, as far as is known.
    Stale,
    /// They are wrong, or not known to be right at any time.
    Forgotten,
}

impl Gate {
    /// A gate that serves nothing yet.
    pub(crate) fn closed() -> Self {
        Self(CachePadded::new(Shown::of(0, 0)))
    }

    #[inline]
    pub(crate) fn word(&self) -> Word {
        Word(self.0.word.load(Ordering::Acquire))
    }

    /// What time it is, as far as entries are concerned.
    #[inline]
    pub(crate) fn now(&self) -> Tenths {
        #[expect(clippy::cast_possible_truncation, reason = "it was one before")]
        Tenths::new(self.0.now.load(Ordering::Relaxed) as u32)
    }

    pub(crate) fn tick(&self, now: Tenths) {
        self.0.now.store(now.get().into(), Ordering::Relaxed);
    }

    /// Whether an entry under `word` was put out of service by a gap, and by nothing else.
    pub(crate) fn is_stale(&self, word: Word) -> bool {
        // Asked after the word was read, which alone would order the two; so it holds whatever was read before.
        word.is_coherent() && self.0.stale.load(Ordering::Acquire) == word.0
    }

    /// Only `Tables` calls this, under its lock, so that words are shown in the order they were dealt.
    pub(crate) fn show(&self, word: Word, before: Before) {
        match before {
            Before::Stale => {
                let shown = self.word();
                // Otherwise a gap goes on, and what it left stays what it was.
                if shown.is_coherent() {
                    // Told by the store of the word, below.
                    self.0.stale.store(shown.0, Ordering::Relaxed);
                }
            }
            Before::Forgotten => self.0.stale.store(0, Ordering::Release),
        }
        self.0.word.store(word.0, Ordering::Release);
    }

    /// Shows the word again that the gap found, if nothing has ended it since. To be called as [`show`](Self::show), once all that
    /// happened during the gap has been applied to the entries under that word.
    pub(crate) fn resume(&self) -> bool {
        let word = self.0.stale.load(Ordering::Acquire);
        if word == 0 {
            return false;
        }
        self.0.stale.store(0, Ordering::Release);
        self.0.word.store(word, Ordering::Release);
        true
    }
}

/// The model of `src/verify/model/` keeps the states of a node, and tells them apart.
#[cfg(feature = "verify")]
mod states {
    use std::{
        fmt,
        hash::{Hash, Hasher},
    };

    use super::{CachePadded, Gate, Ordering, Shown};

    impl Gate {
        fn shows(&self) -> (u64, u64) {
            (self.0.word.load(Ordering::Acquire), self.0.stale.load(Ordering::Acquire))
        }
    }

    impl Clone for Gate {
        fn clone(&self) -> Self {
            let (word, stale) = self.shows();
            Self(CachePadded::new(Shown::of(word, stale)))
        }
    }

    impl PartialEq for Gate {
        fn eq(&self, other: &Self) -> bool {
            self.shows() == other.shows()
        }
    }

    impl Hash for Gate {
        fn hash<H: Hasher>(&self, state: &mut H) {
            self.shows().hash(state);
        }
    }

    impl fmt::Debug for Gate {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            self.shows().fmt(f)
        }
    }
}
