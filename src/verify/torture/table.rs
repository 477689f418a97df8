//! The tables of a run: which keys they have, and how rows of them say which version they are.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rand::{Rng as _, rngs::StdRng};
use sqlx::{Row as _, postgres::PgRow};

use super::{
    super::history::{Key, Time},
    wire::machine_time,
};

/// One of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) name: &'static str,
    pub(super) first: Key,
    pub(super) keys: Key,
    /// How it is tracked, as arguments of `rowcache.track`.
    pub(super) how: &'static str,
    /// By way of the change log, in every run.
    logged: bool,
    /// It has a tier, if there is one.
    pub(super) tiered: bool,
}

/// Statements that change more keys than this are told as a change of the whole table.
pub(super) const PLACES: [Place; 3] = [
    Place { name: "torture.item", first: 1, keys: 120, how: "max_keys => 40", logged: false, tiered: true },
    Place {
        name: "torture.secret",
        first: 1001,
        keys: 60,
        how: "max_keys => 20, hash_keys => true",
        logged: false,
        tiered: false,
    },
    Place { name: "torture.lone", first: 2001, keys: 40, how: "level => 'row'", logged: true, tiered: false },
];

impl Place {
    /// The statement that tracks it.
    pub(super) fn track(&self, log_only: bool) -> String {
        let via = if self.is_logged(log_only) { "log" } else { "notify" };
        format!("select rowcache.track('{}', {}, via => '{via}')", self.name, self.how)
    }

    /// Whether its changes are told by way of the change log.
    pub(super) fn is_logged(&self, log_only: bool) -> bool {
        log_only || self.logged
    }

    /// Whose row this is.
    pub(super) fn of(key: Key) -> usize {
        usize::try_from(key / 1000).unwrap_or_default().min(PLACES.len() - 1)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = Key> + use<> {
        self.first..self.first + self.keys
    }

    /// A key of this table: mostly one of the few that everybody wants.
    pub(super) fn draw(&self, rng: &mut StdRng) -> Key {
        let range = if rng.random_bool(0.6) { 8 } else { self.keys };
        self.first + rng.random_range(0..range)
    }

    /// Up to this many different keys, in their order.
    pub(super) fn draw_some(&self, rng: &mut StdRng, most: usize) -> Vec<Key> {
        let mut keys: Vec<_> = (0..rng.random_range(1..=most)).map(|_| self.draw(rng)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// One of the tables, mostly the first.
    pub(super) fn any(rng: &mut StdRng) -> &'static Self {
        let n = rng.random_range(0..6_usize);
        &PLACES[n.saturating_sub(3)]
    }
}

/// A row, as a node holds it.
#[derive(PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Row {
    pub(super) number: u64,
    /// When it was decoded, by the machine's clock, by the node that read it from Postgres.
    pub(super) decoded: Time,
}

/// Rows decoded by this process.
pub(super) static DECODED: AtomicU64 = AtomicU64::new(0);
/// One row in so many panics when it is decoded; 0: none.
pub(super) static PANIC_EVERY: AtomicU32 = AtomicU32::new(0);
/// How many did.
pub(super) static PANICS: AtomicU64 = AtomicU64::new(0);

/// What a row says that panics on purpose.
pub(super) const ON_PURPOSE: &str = "a row that panics on purpose";

impl<'r> sqlx::FromRow<'r, PgRow> for Row {
    fn from_row(row: &'r PgRow) -> sqlx::Result<Self> {
        let nth = DECODED.fetch_add(1, Ordering::Relaxed);
        let every = PANIC_EVERY.load(Ordering::Relaxed);
        if every > 0 && nth.is_multiple_of(u64::from(every)) {
            PANICS.fetch_add(1, Ordering::Relaxed);
            panic!("{ON_PURPOSE}");
        }
        let number: i64 = row.try_get("number")?;
        Ok(Self { number: number.cast_unsigned(), decoded: machine_time() })
    }
}
