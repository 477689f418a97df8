//! The database: what each row was, and when.

use super::KEYS;

/// Moments are numbers of commits.
pub type Moment = u64;

#[derive(Default)]
pub struct Database {
    pub now: Moment,
    rows: [Vec<(Moment, Option<u64>)>; KEYS],
}

impl Database {
    /// One commit. Each present row has a value of its own.
    pub fn commit(&mut self, keys: impl IntoIterator<Item = usize>, absent: bool) {
        self.now += 1;
        for key in keys {
            let value = (!absent).then_some(self.now * 16 + key as u64);
            self.rows[key].push((self.now, value));
        }
    }

    /// What a row was at a moment; before its first commit there is none.
    pub fn at(&self, key: usize, moment: Moment) -> Option<u64> {
        self.rows[key].iter().rev().find(|(from, _)| *from <= moment).and_then(|(_, value)| *value)
    }

    pub fn row(&self, key: usize) -> Option<u64> {
        self.at(key, self.now)
    }

    /// The first moment, not before `floor`, at which a row was this; `None` if it was older, or never so.
    pub fn since(&self, key: usize, value: Option<u64>, floor: Moment) -> Option<Moment> {
        let changes = self.rows[key].iter().map(|(from, _)| *from).filter(|from| *from > floor);
        std::iter::once(floor).chain(changes).find(|moment| self.at(key, *moment) == value)
    }
}
