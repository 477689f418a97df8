//! Loads rows by key: one statement for one key, one statement for many.
//!
//! Each statement also returns its *stamp* (view `rowcache.stamp`, or `rowcache.standby_stamp`): the incarnation of the server that
//! answered, and whether the statement could see changes of its own that may yet be rolled back.

use std::{
    any::Any,
    collections::{HashMap, hash_map::Entry},
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering,
    time::Duration,
};

use quick_cache::DefaultHashBuilder;
use sqlx::{
    AssertSqlSafe, Connection, FromRow, PgConnection, Row,
    postgres::{PgArguments, PgRow},
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    change::key_text,
    coherence::Incarnation,
    digest::Digest,
    error::{Error, Kind, Result},
    key::{self, Key, KeyPart, KeyType},
    postgres::{
        access::{Access, Attempt, Failed},
        catalog::TrackedTable,
        columns::{self, KeyColumn},
        database_error, has_code, keys,
        line::stamp_view,
        server::fetch,
    },
    snapshot::Snapshot,
    source::{Digesting, Digests, Listing, Loaded, Loading, Locking, Received, Source, Stamp},
};

/// Loads rows of one table, by columns that need not be its key, into values of type `V`.
pub(crate) struct Rows<K, V, S = One> {
    access: Access,
    table: String,
    /// On a primary.
    sql: Sql,
    sql_on_standby: Sql,
    key_types: Vec<KeyType>,
    /// Its keys are secrets: errors, which are logged, do not show them.
    hides_keys: bool,
    keeps: Keeps,
    /// By the key of the table.
    is_keyed: bool,
    types: PhantomData<fn(K, S) -> V>,
}

/// What is kept of rows as they are received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keeps {
    /// For tables that are audited.
    pub(crate) digests: bool,
    /// For tables whose rows are weighed by that.
    pub(crate) lengths: bool,
    /// For tables that have a tier: what each load saw.
    pub(crate) snapshots: bool,
}

/// The statements of a table.
struct Sql {
    one: String,
    many: String,
    /// The row, locked.
    locked: String,
}

/// Canary, start of the server, dirty, position in the log, snapshot.
const STAMP_COLUMNS: usize = 5;

/// What the statement sees.
const SNAPSHOT: &str = "pg_catalog.pg_current_snapshot()::text";

impl<K: Key, V, S> Rows<K, V, S> {
    /// What is read is `from`: the name of the table, or a query of it. With `order`, columns by which the rows of a key are ordered.
    pub(crate) fn new(access: Access, table: &TrackedTable, from: &str, order: &[String], keeps: Keeps) -> Self {
        Self {
            table: table.name.clone(),
            sql: Sql::new(table, from, order, stamp_view(false), keeps.snapshots),
            // What a snapshot of a standby prints says less than it seems to: `snapshot.rs`.
            sql_on_standby: Sql::new(table, from, order, stamp_view(true), false),
            key_types: table.key_types.clone(),
            hides_keys: table.secret.is_some(),
            keeps,
            is_keyed: table.is_keyed,
            types: PhantomData,
            access,
        }
    }

    /// Runs the statement once more when its prepared form no longer fits the table, which was altered.
    async fn run(&self, connection: &mut PgConnection, keys: &[K]) -> sqlx::Result<Vec<PgRow>> {
        match fetch(connection, self.query(keys), self.access.pooler).await {
            Err(error) if is_stale_plan(&error) => {
                connection.clear_cached_statements().await?;
                fetch(connection, self.query(keys), self.access.pooler).await
            }
            result => result,
        }
    }

    /// A statement with the parts of one key.
    fn by_key(&self, sql: &str, key: &K) -> sqlx::query::Query<'static, sqlx::Postgres, PgArguments> {
        let query = sqlx::query(AssertSqlSafe(sql.to_owned()));
        let parts = key.to_parts().into_iter().zip(&self.key_types);
        parts.fold(query, |query, (part, of)| columns::bind(query, *of, part))
    }

    fn query(&self, keys: &[K]) -> sqlx::query::Query<'static, sqlx::Postgres, PgArguments> {
        let sql = if self.access.standby.load(Ordering::Relaxed) { &self.sql_on_standby } else { &self.sql };
        if let [key] = keys {
            return self.by_key(&sql.one, key);
        }
        let mut columns: Vec<Vec<KeyPart<'_>>> = self.key_types.iter().map(|_| Vec::new()).collect();
        for key in keys {
            for (column, part) in columns.iter_mut().zip(key.to_parts()) {
                column.push(part);
            }
        }
        let query = sqlx::query(AssertSqlSafe(sql.many.clone()));
        columns.iter().zip(&self.key_types).fold(query, |query, (parts, of)| columns::bind_all(query, *of, parts))
    }

    /// What is being loaded, for messages.
    fn of(&self, keys: &[K]) -> String {
        match keys {
            [key] => self.row(key),
            keys => format!("{} rows of {}", keys.len(), self.table),
        }
    }

    fn row(&self, key: &K) -> String {
        if self.hides_keys {
            return format!("a row of {}", self.table);
        }
        format!("{} {}", self.table, key::display(&key.to_parts()))
    }
}

/// The statement for these keys.
struct Statement<'a, K, V, S> {
    of: &'a Rows<K, V, S>,
    keys: &'a [K],
}

impl<K: Key, V, S> Attempt for Statement<'_, K, V, S> {
    type Answer = Vec<PgRow>;

    async fn run(&self, connection: &mut PgConnection) -> Result<Vec<PgRow>, Failed> {
        Ok(self.of.run(connection, self.keys).await?)
    }

    fn of(&self) -> String {
        self.of.of(self.keys)
    }

    fn answered_by(answer: &Vec<PgRow>) -> Option<Incarnation> {
        answer.first().and_then(incarnation)
    }
}

/// What the rows with one key make.
pub(crate) trait Shape<V> {
    type Row;

    /// Adds a row. `None`: there must be no more than those before.
    fn join(before: Option<V>, row: Self::Row) -> Option<V>;
}

/// A row: the key is unique.
pub(crate) enum One {}

impl<V> Shape<V> for One {
    type Row = V;

    fn join(before: Option<V>, row: V) -> Option<V> {
        before.is_none().then_some(row)
    }
}

/// A list of them, in the order of the table's own key.
pub(crate) enum List {}

impl<T> Shape<Vec<T>> for List {
    type Row = T;

    fn join(before: Option<Vec<T>>, row: T) -> Option<Vec<T>> {
        let mut rows = before.unwrap_or_default();
        rows.push(row);
        Some(rows)
    }
}

impl Sql {
    fn new(table: &TrackedTable, from: &str, order: &[String], stamp: &str, snapshots: bool) -> Self {
        let names: Vec<String> = table.key_columns.iter().map(|column| quote(column)).collect();
        let columns: Vec<KeyColumn<'_>> = names
            .iter()
            .zip(&table.key_types)
            .map(|(name, of)| KeyColumn { of: *of, table: &table.name, name })
            .collect();
        let keys: String = columns
            .iter()
            .enumerate()
            .map(|(n, column)| format!(", {} as \"rowcache.key.{n}\"", column.value()))
            .collect();
        let snapshot = if snapshots { SNAPSHOT } else { "null::text" };
        let select = format!(
            "select t.*{keys}, s.canary as \"rowcache.canary\", s.started as \"rowcache.started\", \
             s.dirty as \"rowcache.dirty\", s.lsn as \"rowcache.lsn\", {snapshot} as \"rowcache.snapshot\" \
             from {stamp} s left join "
        );
        let equal: Vec<_> = columns.iter().enumerate().map(|(n, column)| column.is(n + 1)).collect();
        let order: Vec<String> = order.iter().map(|column| format!("t.{}", quote(column))).collect();
        let order = if order.is_empty() { String::new() } else { format!(" order by {}", order.join(", ")) };
        let one = format!("{select}{from} t on {}{order}", equal.join(" and "));
        let many = if let [column] = &columns[..] {
            format!("{select}{from} t on {}{order}", column.is_one_of(1))
        } else {
            let arrays: Vec<_> = columns.iter().enumerate().map(|(n, column)| column.elements(n + 1)).collect();
            let names: Vec<_> = (0..columns.len()).map(|n| format!("k{n}")).collect();
            let equal: Vec<_> =
                columns.iter().enumerate().map(|(n, column)| column.is_element(&format!("k.k{n}"))).collect();
            format!(
                "{select}(unnest({}) as k({}) join {from} t on {}) on true{order}",
                arrays.join(", "),
                names.join(", "),
                equal.join(" and ")
            )
        };
        let locked = format!("select t.*{keys} from {from} t where {} for update", equal.join(" and "));
        Self { one, many, locked }
    }
}

impl<K, V, S> Source<K, V> for Rows<K, V, S>
where
    K: Key,
    V: Send + 'static,
    S: Shape<V, Row: for<'r> FromRow<'r, PgRow> + Send + Unpin> + 'static,
{
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(async move {
            let deadline = self.access.deadline();
            match self.load_together(keys, deadline).await {
                // One key that Postgres cannot take must not harm those that happen to be loaded with it.
                Err(error) if error.is_refused() && keys.len() > 1 => self.load_one_by_one(keys, deadline).await,
                outcome => outcome,
            }
        })
    }

    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(self.load_together(keys, self.access.deadline()))
    }

    fn keys<'a>(&'a self, query: &'a str, max: usize, limit: Duration) -> Listing<'a, K> {
        Box::pin(keys::read(&self.access, &self.table, &self.key_types, query, max, limit))
    }

    fn lock<'a>(&'a self, key: &'a K, transaction: &'a mut PgConnection) -> Locking<'a, V> {
        Box::pin(async move {
            if !self.is_keyed {
                let message = format!("only rows of {} by its own key can be modified", self.table);
                return Err(Error::new(Kind::Config, message));
            }
            self.lock_row(key, transaction).await
        })
    }

    fn digests<'a>(&'a self, keys: &'a [K]) -> Digesting<'a> {
        Box::pin(async move {
            let rows = self.fetch(keys, self.access.deadline()).await?;
            let stamp = self.stamp(&rows)?;
            let mut found = HashMap::with_capacity(rows.len());
            for row in &rows {
                let Some(key) = self.key_of(row)? else { continue };
                if found.insert(key, self.digest(row)?).is_some() {
                    return Err(self.broken("more than one row has the same key"));
                }
            }
            let rows = keys.iter().map(|key| found.get(key).copied().unwrap_or(Digest::ABSENT)).collect();
            Ok(Digests { rows, stamp })
        })
    }
}

/// Orders those who modify rows with one key, also where there is none that could be locked.
const TAKE_TURNS: &str = "select pg_advisory_xact_lock(hashtextextended($1, 0))";

impl<K: Key, V, S: Shape<V, Row: for<'r> FromRow<'r, PgRow>>> Rows<K, V, S> {
    async fn lock_row(&self, key: &K, transaction: &mut PgConnection) -> Result<Option<V>> {
        let failed = |error| database_error(&format!("locking {}", self.row(key)), error);
        let name = format!("rowcache {} {}", self.table, key_text(&key.to_parts()));
        let persistent = !self.access.pooler;
        sqlx::query(TAKE_TURNS).bind(name).persistent(persistent).execute(&mut *transaction).await.map_err(failed)?;
        let query = self.by_key(&self.sql.locked, key).persistent(persistent);
        let rows = query.fetch_all(transaction).await.map_err(failed)?;
        let [row] = &rows[..] else { return Ok(None) };
        let value = decode::<S::Row>(row)
            .map_err(|error| Error::with(Kind::Decode, format!("{} could not be decoded", self.row(key)), error))?;
        Ok(S::join(None, value))
    }

    async fn load_together(&self, keys: &[K], deadline: Instant) -> Result<Loaded<V>> {
        let rows = self.fetch(keys, deadline).await?;
        self.decode(keys, &rows)
    }

    async fn load_one_by_one(&self, keys: &[K], deadline: Instant) -> Result<Loaded<V>> {
        let mut all = Loaded::none();
        for key in keys {
            all.push(self.load_together(std::slice::from_ref(key), deadline).await);
        }
        Ok(all)
    }

    async fn fetch(&self, keys: &[K], deadline: Instant) -> Result<Vec<PgRow>> {
        self.access.attempt(&Statement { of: self, keys }, deadline).await
    }

    /// The stamp of a statement, which each of its rows has.
    fn stamp(&self, rows: &[PgRow]) -> Result<Stamp> {
        let first = rows.first().ok_or_else(|| self.broken("the statement returned no row"))?;
        let failed = |error| database_error(&format!("reading the stamp of {}", self.table), error);
        let dirty = first.try_get("rowcache.dirty").map_err(failed)?;
        let lsn = first.try_get::<i64, _>("rowcache.lsn").map_err(failed)?.cast_unsigned();
        let snapshot: Option<String> = first.try_get("rowcache.snapshot").map_err(failed)?;
        let saw = snapshot.and_then(|text| Some(text.parse::<Snapshot>().ok()?.sight()));
        Ok(Stamp { incarnation: incarnation(first), dirty, lsn, saw })
    }

    fn decode(&self, keys: &[K], rows: &[PgRow]) -> Result<Loaded<V>> {
        let stamp = self.stamp(rows)?;
        let Keeps { digests, lengths, .. } = self.keeps;
        let keeps = digests || lengths;
        let mut received = HashMap::with_capacity(if keeps { rows.len() } else { 0 });
        let mut found: HashMap<K, Result<V>, DefaultHashBuilder> =
            HashMap::with_capacity_and_hasher(rows.len(), DefaultHashBuilder::default());
        for row in rows {
            let Some(key) = self.key_of(row)? else { continue };
            if keeps {
                let digest = if digests { self.digest(row)? } else { Digest::UNKNOWN };
                let bytes = if lengths { self.length(row)? } else { 0 };
                let kept = received.entry(key.clone()).or_insert(Received { digest, ..Received::default() });
                kept.bytes = kept.bytes.saturating_add(bytes);
            }
            let value = decode::<S::Row>(row)
                .map_err(|error| Error::with(Kind::Decode, format!("{} could not be decoded", self.row(&key)), error));
            match found.entry(key) {
                Entry::Vacant(seat) => {
                    let made = self.join(seat.key(), None, value);
                    seat.insert(made);
                }
                Entry::Occupied(seat) => {
                    let (key, before) = seat.remove_entry();
                    let made = self.join(&key, Some(before), value);
                    found.insert(key, made);
                }
            }
        }
        let kept = keys.iter().filter(|_| keeps);
        Ok(Loaded {
            received: kept.map(|key| received.remove(key).unwrap_or(Received::ABSENT)).collect(),
            rows: keys.iter().map(|key| found.remove(key).transpose()).collect(),
            stamp,
        })
    }

    /// What the rows with this key have made so far, and one more.
    fn join(&self, key: &K, before: Option<Result<V>>, row: Result<S::Row>) -> Result<V> {
        let too_many = || Error::new(Kind::Table, format!("more than one row has the key of {}", self.row(key)));
        S::join(before.transpose()?, row?).ok_or_else(too_many)
    }

    /// Of the columns of the table, as they were received.
    fn digest(&self, row: &PgRow) -> Result<Digest> {
        let read = |error| database_error(&format!("reading a row of {}", self.table), error);
        let raw: Vec<_> =
            (0..self.columns_of(row)).map(|n| row.try_get_raw(n)).collect::<sqlx::Result<_>>().map_err(read)?;
        // Only null has no bytes.
        Ok(Digest::of(raw.iter().map(|value| value.as_bytes().ok())))
    }

    /// Of the columns of the table, in bytes as they were received: fixed-width ones are part of the value itself as well.
    fn length(&self, row: &PgRow) -> Result<u32> {
        let read = |error| database_error(&format!("reading a row of {}", self.table), error);
        let mut bytes = 0_usize;
        for column in 0..self.columns_of(row) {
            let value = row.try_get_raw(column).map_err(read)?;
            bytes += value.as_bytes().map_or(0, <[u8]>::len);
        }
        Ok(u32::try_from(bytes).unwrap_or(u32::MAX))
    }

    /// How many columns the table has: the statement ends with those of the key and of the stamp.
    fn columns_of(&self, row: &PgRow) -> usize {
        row.len() - self.key_types.len() - STAMP_COLUMNS
    }

    /// The key of a row; `None` for the one row that stands for "none found" and carries but the stamp.
    fn key_of(&self, row: &PgRow) -> Result<Option<K>> {
        let read = |error| database_error(&format!("reading the key of {}", self.table), error);
        let first = self.columns_of(row);
        let Some(parts) = keys::parts(row, first, &self.key_types).map_err(read)? else { return Ok(None) };
        K::from_parts(&parts).map(Some).ok_or_else(|| self.broken("the key column has another type than the key"))
    }

    fn broken(&self, what: &str) -> Error {
        Error::new(Kind::Table, format!("loading {}: {what}", self.table))
    }
}

/// The server that a row comes from; `None` when it has lost its canary.
pub(super) fn incarnation(row: &PgRow) -> Option<Incarnation> {
    let canary = row.try_get::<Option<Uuid>, _>("rowcache.canary").ok()??;
    Some(Incarnation { canary, started: row.try_get("rowcache.started").ok()? })
}

/// Decodes a row with the user's code, which may panic: that must reach those who asked for this row, and
/// nobody else.
fn decode<V: for<'r> FromRow<'r, PgRow>>(row: &PgRow) -> Result<V, Box<dyn std::error::Error + Send + Sync>> {
    match catch_unwind(AssertUnwindSafe(|| V::from_row(row))) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into()),
        Err(panic) => Err(format!("the decoder panicked: {}", panic_message(&*panic)).into()),
    }
}

pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}

/// `ALTER TABLE` changed the columns under a prepared `select t.*`.
fn is_stale_plan(error: &sqlx::Error) -> bool {
    has_code(error, "0A000")
}

/// An SQL identifier.
pub(super) fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
