//! What an entry remembers of its row so that it can be held against the row later: eight bytes, whatever the value type.

use std::{
    hash::{DefaultHasher, Hasher},
    time::Duration,
};

use crate::coherence::Boot;

/// A hash of a row as Postgres sent it. Rows that were sent alike have the same one; others too, once in 2⁶⁴.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Digest(u64);

impl From<u64> for Digest {
    fn from(digest: u64) -> Self {
        Self(digest)
    }
}

impl Digest {
    pub(crate) fn get(self) -> u64 {
        self.0
    }

    /// Not taken.
    pub(crate) const UNKNOWN: Self = Self(0);
    /// There is no such row.
    pub(crate) const ABSENT: Self = Self(1);

    /// Of a row with these columns; `None` is SQL's null.
    pub(crate) fn of<'a>(columns: impl IntoIterator<Item = Option<&'a [u8]>>) -> Self {
        let mut hasher = DefaultHasher::new();
        for column in columns {
            // With its length, so that a value does not run into the next one; null has one that no value has.
            hasher.write_usize(column.map_or(usize::MAX, <[u8]>::len));
            hasher.write(column.unwrap_or_default());
        }
        Self(hasher.finish().max(2))
    }
}

/// A moment, in tenths of a second since boot: half as large as a pointer, and good for 13 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Tenths(u32);

impl Tenths {
    pub(crate) const BOOT: Self = Self(0);
    pub(crate) const NEVER: Self = Self(u32::MAX);

    pub(crate) const fn new(tenths: u32) -> Self {
        Self(tenths)
    }

    pub(crate) const fn get(self) -> u32 {
        self.0
    }

    /// So much later.
    pub(crate) fn plus(self, time: Duration) -> Self {
        Self(self.0.saturating_add(u32::try_from(time.as_millis() / 100).unwrap_or(u32::MAX)))
    }

    /// So much earlier.
    pub(crate) fn minus(self, time: Duration) -> Self {
        Self(self.0.saturating_sub(u32::try_from(time.as_millis() / 100).unwrap_or(u32::MAX)))
    }

    pub(crate) fn since(self, before: Self) -> Duration {
        Duration::from_millis(100 * u64::from(self.0.saturating_sub(before.0)))
    }

    pub(crate) fn at(at: Boot) -> Self {
        Self(u32::try_from(at.as_millis() / 100).unwrap_or(u32::MAX))
    }

    /// How long ago it was, to a tenth of a second.
    pub(crate) fn age(self, now: Boot) -> Duration {
        Self::at(now).since(self)
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use super::*;

    #[test]
    fn rows_that_differ_in_anything_have_other_digests() {
        let rows: [&[Option<&[u8]>]; 8] = [
            &[],
            &[None],
            &[Some(b"")],
            &[Some(b"a"), Some(b"b")],
            &[Some(b"ab"), Some(b"")],
            &[Some(b""), Some(b"ab")],
            &[Some(b"a"), None],
            &[None, Some(b"a")],
        ];
        let digests: Vec<_> = rows.iter().map(|row| Digest::of(row.iter().copied())).collect();
        for (n, digest) in digests.iter().enumerate() {
            assert_eq!(digests.iter().position(|other| other == digest), Some(n), "{:?}", rows[n]);
            assert!(![Digest::UNKNOWN, Digest::ABSENT].contains(digest));
        }
        assert_eq!(Digest::of([Some(&b"a"[..]), None]), digests[6], "alike");
    }

    #[test]
    fn ages_are_told_in_tenths_of_a_second() {
        let at = Duration::from_millis;
        assert_eq!(Tenths::at(at(60_040)).age(at(61_299)), at(1_200));
        assert_eq!(Tenths::at(at(60_000)).age(at(59_000)), Duration::ZERO);
    }
}
