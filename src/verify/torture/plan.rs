//! What a transaction does, and how it numbers what it writes.
//!
//! 1. It locks its keys, in their order, with locks that are held until it has committed and is visible.
//! 2. Only then it takes a number: the time. So the numbers of a key are in the order in which they became visible, and are never
//!    used again, whatever is lost in a crash.
//! 3. With each row that it changes it writes a row of the history.

use rand::{Rng as _, rngs::StdRng, seq::IndexedRandom as _};

use super::{super::history::Key, table::Place};

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Upsert(Vec<Key>),
    Update(Vec<Key>),
    Delete(Vec<Key>),
    Rekey(Key, Key),
    Bulk,
    Truncate,
    /// Changes nothing, and sends so many messages about a table that nobody has open.
    Notify(u32),
}

/// One transaction.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) place: &'static Place,
    /// Each with whether it is undone, by a savepoint.
    pub(super) steps: Vec<(Step, bool)>,
    /// Whether it ends with ROLLBACK.
    pub(super) aborts: bool,
}

impl Plan {
    pub(super) fn draw(rng: &mut StdRng) -> Self {
        let place = Place::any(rng);
        let steps =
            (0..*[1, 1, 1, 2, 3].choose(rng).expect("some")).map(|_| (Step::draw(place, rng), rng.random_bool(0.12)));
        Self { place, steps: steps.collect(), aborts: rng.random_bool(0.06) }
    }

    pub(super) fn of(place: &'static Place, step: Step) -> Self {
        Self { place, steps: vec![(step, false)], aborts: false }
    }

    /// Locks all keys; returns the transaction's id, the server's port, and the number of keys.
    pub(super) fn lock(&self) -> String {
        let mut keys: Vec<Key> = self.steps.iter().flat_map(|(step, _)| step.keys(self.place)).collect();
        keys.sort_unstable();
        keys.dedup();
        lock(&keys)
    }
}

/// Locks these keys, which are in their order.
pub(super) fn lock(keys: &[Key]) -> String {
    format!(
        "select pg_current_xact_id()::text::bigint, inet_server_port()::bigint,
           (select count(pg_advisory_xact_lock(key)) from unnest({}) key)",
        array(keys)
    )
}

impl Step {
    fn draw(place: &'static Place, rng: &mut StdRng) -> Self {
        match rng.random_range(0..100_u32) {
            0..25 => Self::Upsert(place.draw_some(rng, 1)),
            25..35 => Self::Upsert(place.draw_some(rng, 8)),
            35..65 => Self::Update(place.draw_some(rng, 1)),
            65..75 => Self::Update(place.draw_some(rng, 12)),
            75..85 => Self::Delete(place.draw_some(rng, 2)),
            85..96 => Self::Rekey(place.draw(rng), place.draw(rng)),
            96..99 => Self::Bulk,
            _ => Self::Truncate,
        }
    }

    fn keys(&self, place: &Place) -> Vec<Key> {
        match self {
            Self::Upsert(keys) | Self::Update(keys) | Self::Delete(keys) => keys.clone(),
            Self::Rekey(from, to) => vec![*from, *to],
            Self::Bulk | Self::Truncate => place.all().collect(),
            Self::Notify(_) => Vec::new(),
        }
    }

    /// The statement. Returns the changed rows: key, and whether it is gone.
    pub(super) fn sql(&self, place: &Place, number: u64, xid: u64) -> String {
        let table = place.name;
        let written = |write: String, deletes: &str, from: &str| {
            format!(
                "with w as ({write} returning key)
                 insert into torture.history select key, {number}, {deletes}, {xid} from {from} returning key, deletes"
            )
        };
        match self {
            Self::Upsert(keys) => {
                let write = format!(
                    "insert into {table} (key, number) select key, {number} from unnest({}) key
                     on conflict (key) do update set number = excluded.number",
                    array(keys)
                );
                written(write, "false", "w")
            }
            Self::Update(keys) => {
                written(format!("update {table} set number = {number} where key = any ({})", array(keys)), "false", "w")
            }
            Self::Delete(keys) => {
                written(format!("delete from {table} where key = any ({})", array(keys)), "true", "w")
            }
            Self::Rekey(from, to) => {
                let write = format!(
                    "update {table} set key = {to}, number = {number}
                     where key = {from} and not exists (select from {table} where key = {to})"
                );
                let rows = format!(
                    "(select key from unnest({}) key where exists (select from w)) moved",
                    array(&[*from, *to])
                );
                written(write, &format!("key = {from}"), &rows)
            }
            Self::Bulk => written(format!("update {table} set number = {number}"), "false", "w"),
            Self::Truncate => format!(
                "insert into torture.history select key, {number}, true, {xid} from {table} returning key, deletes;
                 truncate {table}"
            ),
            Self::Notify(count) => format!(
                r#"do $$ begin for n in 1..{count} loop
                     perform pg_notify('rowcache', '{{"v":1,"t":"of.others","k":["' || repeat('x', 7900) || '",' || n || ']}}');
                   end loop; end $$"#
            ),
        }
    }
}

pub(super) fn array(keys: &[Key]) -> String {
    let keys: Vec<_> = keys.iter().map(Key::to_string).collect();
    format!("array[{}]::bigint[]", keys.join(","))
}
