//! Loads rows by key: one statement for one key, one statement for many.
//!
//! Each statement also returns its *stamp* (view `rowcache.stamp`, or `rowcache.standby_stamp`): the incarnation of the server that
//! answered, and whether the statement could see changes of its own that may yet be rolled back.

use std::{
    any::Any,
    collections::HashMap,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Connection, FromRow, PgConnection, PgPool, Row,
    postgres::{PgArguments, PgRow},
};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::{
    coherence::Incarnation,
    digest::Digest,
    error::{Error, Kind, Result},
    key::{self, Key, KeyPart, KeyType},
    postgres::{
        catalog::TrackedTable, database_error, has_code, is_connection_error, lent::Lent, line::stamp_view,
        server::fetch,
    },
    source::{Digesting, Digests, Loaded, Loading, Received, Source, Stamp},
};

/// Loads rows of one table into values of type `V`.
pub(crate) struct Rows<K, V> {
    pool: PgPool,
    table: String,
    /// On a primary.
    sql: Sql,
    sql_on_standby: Sql,
    /// Which of the two.
    standby: Arc<AtomicBool>,
    /// A pooler in transaction mode stands in between.
    pooler: bool,
    key_types: Vec<KeyType>,
    /// Its keys are secrets: errors, which are logged, do not show them.
    hides_keys: bool,
    keeps: Keeps,
    timeout: Duration,
    /// Whether rows with this stamp come from the server that the node listens to, as far as it knows.
    ours: Box<dyn Fn(Option<Incarnation>) -> bool + Send + Sync>,
    types: PhantomData<fn() -> (K, V)>,
}

/// What is kept of rows as they are received.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Keeps {
    /// For tables that are audited.
    pub(crate) digests: bool,
    /// For tables whose rows are weighed by that.
    pub(crate) lengths: bool,
}

/// The statements of a table.
struct Sql {
    one: String,
    many: String,
}

/// Canary, start of the server, dirty, position in the log.
const STAMP_COLUMNS: usize = 4;

impl<K: Key, V> Rows<K, V> {
    pub(crate) fn new(
        pool: PgPool,
        table: &TrackedTable,
        keeps: Keeps,
        timeout: Duration,
        standby: Arc<AtomicBool>,
        pooler: bool,
        ours: impl Fn(Option<Incarnation>) -> bool + Send + Sync + 'static,
    ) -> Self {
        Self {
            pool,
            table: table.name.clone(),
            sql: Sql::new::<K>(table, stamp_view(false)),
            sql_on_standby: Sql::new::<K>(table, stamp_view(true)),
            standby,
            pooler,
            key_types: K::types(),
            hides_keys: table.secret.is_some(),
            keeps,
            timeout,
            ours: Box::new(ours),
            types: PhantomData,
        }
    }
}

impl Sql {
    fn new<K: Key>(table: &TrackedTable, stamp: &str) -> Self {
        let columns: Vec<String> = table.key_columns.iter().map(|column| quote(column)).collect();
        let keys: String =
            columns.iter().enumerate().map(|(n, column)| format!(", t.{column} as \"rowcache.key.{n}\"")).collect();
        let select = format!(
            "select t.*{keys}, s.canary as \"rowcache.canary\", s.started as \"rowcache.started\", \
             s.dirty as \"rowcache.dirty\", s.lsn as \"rowcache.lsn\" from {stamp} s left join "
        );
        let name = &table.name;
        let equal: Vec<_> = columns.iter().enumerate().map(|(n, column)| format!("t.{column} = ${}", n + 1)).collect();
        let one = format!("{select}{name} t on {}", equal.join(" and "));
        let many = if let [column] = &columns[..] {
            format!("{select}{name} t on t.{column} = any($1)")
        } else {
            let arrays: Vec<_> =
                K::types().iter().enumerate().map(|(n, of)| format!("${}::{}[]", n + 1, of.postgres())).collect();
            let names: Vec<_> = (0..columns.len()).map(|n| format!("k{n}")).collect();
            let equal: Vec<_> = columns.iter().enumerate().map(|(n, column)| format!("t.{column} = k.k{n}")).collect();
            format!(
                "{select}(unnest({}) as k({}) join {name} t on {}) on true",
                arrays.join(", "),
                names.join(", "),
                equal.join(" and ")
            )
        };
        Self { one, many }
    }
}

impl<K, V> Source<K, V> for Rows<K, V>
where
    K: Key,
    V: for<'r> FromRow<'r, PgRow> + Send + Unpin + 'static,
{
    fn load<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(async move {
            let deadline = Instant::now() + self.timeout;
            match self.load_together(keys, deadline).await {
                // One key that Postgres cannot take must not harm those that happen to be loaded with it.
                Err(error) if error.is_refused() && keys.len() > 1 => self.load_one_by_one(keys, deadline).await,
                outcome => outcome,
            }
        })
    }

    fn load_at_once<'a>(&'a self, keys: &'a [K]) -> Loading<'a, V> {
        Box::pin(self.load_together(keys, Instant::now() + self.timeout))
    }

    fn digests<'a>(&'a self, keys: &'a [K]) -> Digesting<'a> {
        Box::pin(async move {
            let rows = self.fetch(keys, Instant::now() + self.timeout).await?;
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

impl<K: Key, V: for<'r> FromRow<'r, PgRow>> Rows<K, V> {
    async fn load_together(&self, keys: &[K], deadline: Instant) -> Result<Loaded<V>> {
        let rows = self.fetch(keys, deadline).await?;
        self.decode(keys, &rows)
    }

    async fn load_one_by_one(&self, keys: &[K], deadline: Instant) -> Result<Loaded<V>> {
        let mut all = Loaded { rows: Vec::with_capacity(keys.len()), received: Vec::new(), stamp: Stamp::default() };
        for key in keys {
            match self.load_together(std::slice::from_ref(key), deadline).await {
                Ok(one) => {
                    // One stamp stands for all: of the same server, or of none.
                    if all.rows.iter().all(Result::is_err) {
                        all.stamp.incarnation = one.stamp.incarnation;
                    } else if all.stamp.incarnation != one.stamp.incarnation {
                        all.stamp.incarnation = None;
                    }
                    all.stamp.dirty |= one.stamp.dirty;
                    all.stamp.lsn = all.stamp.lsn.max(one.stamp.lsn);
                    all.rows.extend(one.rows);
                    all.received.extend(one.received);
                }
                Err(error) => {
                    all.rows.push(Err(error));
                    all.received.push(Received::default());
                }
            }
        }
        Ok(all)
    }

    /// Runs the statement, on another connection when the first one turns out to be dead.
    async fn fetch(&self, keys: &[K], deadline: Instant) -> Result<Vec<PgRow>> {
        // What ends one connection may have ended all that the pool has. The next one is new.
        let mut tries_left = self.pool.options().get_max_connections();
        loop {
            let mut connection = match timeout_at(deadline, Lent::acquire(&self.pool)).await {
                Ok(Ok(connection)) => connection,
                Ok(Err(sqlx::Error::PoolTimedOut)) | Err(_) => return Err(self.no_connection(keys)),
                Ok(Err(error)) if is_connection_error(&error) && tries_left > 0 => {
                    tries_left -= 1;
                    continue;
                }
                Ok(Err(error)) => return Err(database_error(&format!("loading {}", self.of(keys)), error)),
            };
            match timeout_at(deadline, self.run(&mut connection, keys)).await {
                Ok(Ok(rows)) => {
                    if (self.ours)(rows.first().and_then(incarnation)) {
                        connection.give_back();
                        return Ok(rows);
                    }
                    // To a server that was replaced, perhaps, and dropped: another one may lead to the right one.
                    if tries_left == 0 {
                        return Ok(rows);
                    }
                    tries_left -= 1;
                }
                // Dropped, not given back: it is broken.
                Ok(Err(error)) if is_connection_error(&error) && tries_left > 0 => tries_left -= 1,
                Ok(Err(error)) => {
                    connection.give_back();
                    return Err(database_error(&format!("loading {}", self.of(keys)), error));
                }
                // Dropped too: the statement may still be running, and the next user would have to wait for it.
                Err(_) => {
                    return Err(Error::new(
                        Kind::Timeout,
                        format!("loading {} took longer than {:?} (`load_timeout`)", self.of(keys), self.timeout),
                    ));
                }
            }
        }
    }

    /// The pool tries to connect for as long as it may, so a timeout can mean that all connections are in use,
    /// or that Postgres accepts none.
    fn no_connection(&self, keys: &[K]) -> Error {
        let (what, options) = (self.of(keys), self.pool.options());
        let (limit, max) = (self.timeout.min(options.get_acquire_timeout()), options.get_max_connections());
        if self.pool.size() < max {
            Error::new(Kind::Unavailable, format!("cannot connect to Postgres for a load of {what} within {limit:?}"))
        } else {
            Error::new(
                Kind::Timeout,
                format!(
                    "no connection of the pool came free for a load of {what} within {limit:?}; the pool has {max}"
                ),
            )
        }
    }

    /// Runs the statement once more when its prepared form no longer fits the table, which was altered.
    async fn run(&self, connection: &mut PgConnection, keys: &[K]) -> sqlx::Result<Vec<PgRow>> {
        match fetch(connection, self.query(keys), self.pooler).await {
            Err(error) if is_stale_plan(&error) => {
                connection.clear_cached_statements().await?;
                fetch(connection, self.query(keys), self.pooler).await
            }
            result => result,
        }
    }

    fn query(&self, keys: &[K]) -> sqlx::query::Query<'static, sqlx::Postgres, PgArguments> {
        let sql = if self.standby.load(Ordering::Relaxed) { &self.sql_on_standby } else { &self.sql };
        if let [key] = keys {
            let query = sqlx::query(AssertSqlSafe(sql.one.clone()));
            return key.to_parts().into_iter().zip(&self.key_types).fold(query, |query, (part, of)| match (part, of) {
                (KeyPart::Int(value), KeyType::Int2) => query.bind(narrow::<i16>(value)),
                (KeyPart::Int(value), KeyType::Int4) => query.bind(narrow::<i32>(value)),
                (KeyPart::Int(value), _) => query.bind(value),
                (KeyPart::Text(value), _) => query.bind(value.into_owned()),
                (KeyPart::Uuid(value), _) => query.bind(value),
            });
        }
        let mut columns: Vec<Vec<KeyPart<'_>>> = self.key_types.iter().map(|_| Vec::new()).collect();
        for key in keys {
            for (column, part) in columns.iter_mut().zip(key.to_parts()) {
                column.push(part);
            }
        }
        let query = sqlx::query(AssertSqlSafe(sql.many.clone()));
        columns.into_iter().zip(&self.key_types).fold(query, |query, (column, of)| {
            let column = column.into_iter();
            match of {
                KeyType::Int2 => query.bind(column.map(int).map(narrow::<i16>).collect::<Vec<_>>()),
                KeyType::Int4 => query.bind(column.map(int).map(narrow::<i32>).collect::<Vec<_>>()),
                KeyType::Int8 => query.bind(column.map(int).collect::<Vec<_>>()),
                KeyType::Text => query.bind(column.map(|part| part.to_string()).collect::<Vec<_>>()),
                KeyType::Uuid => query.bind(column.map(uuid).collect::<Vec<_>>()),
            }
        })
    }

    /// The stamp of a statement, which each of its rows has.
    fn stamp(&self, rows: &[PgRow]) -> Result<Stamp> {
        let first = rows.first().ok_or_else(|| self.broken("the statement returned no row"))?;
        let failed = |error| database_error(&format!("reading the stamp of {}", self.table), error);
        let dirty = first.try_get("rowcache.dirty").map_err(failed)?;
        let lsn = first.try_get::<i64, _>("rowcache.lsn").map_err(failed)?.cast_unsigned();
        Ok(Stamp { incarnation: incarnation(first), dirty, lsn })
    }

    fn decode(&self, keys: &[K], rows: &[PgRow]) -> Result<Loaded<V>> {
        let stamp = self.stamp(rows)?;
        let Keeps { digests, lengths } = self.keeps;
        let keeps = digests || lengths;
        let mut received = HashMap::with_capacity(if keeps { rows.len() } else { 0 });
        let mut found = HashMap::with_capacity(rows.len());
        for row in rows {
            let Some(key) = self.key_of(row)? else { continue };
            if keeps {
                let digest = if digests { self.digest(row)? } else { Digest::UNKNOWN };
                let bytes = if lengths { self.length(row)? } else { 0 };
                received.insert(key.clone(), Received { digest, bytes });
            }
            let value = decode(row)
                .map_err(|error| Error::with(Kind::Decode, format!("{} could not be decoded", self.row(&key)), error));
            if let Some(_other) = found.insert(key.clone(), value) {
                let message = format!("more than one row has the key of {}", self.row(&key));
                found.insert(key, Err(Error::new(Kind::Table, message)));
            }
        }
        let kept = keys.iter().filter(|_| keeps);
        Ok(Loaded {
            received: kept.map(|key| received.get(key).copied().unwrap_or(Received::ABSENT)).collect(),
            rows: keys.iter().map(|key| found.remove(key).transpose()).collect(),
            stamp,
        })
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
        let types = &self.key_types;
        let first = self.columns_of(row);
        let mut parts = Vec::with_capacity(types.len());
        for (column, of) in (first..).zip(types) {
            let part = match of {
                KeyType::Int2 => row.try_get::<Option<i16>, _>(column).map_err(read)?.map(|it| KeyPart::Int(it.into())),
                KeyType::Int4 => row.try_get::<Option<i32>, _>(column).map_err(read)?.map(|it| KeyPart::Int(it.into())),
                KeyType::Int8 => row.try_get::<Option<i64>, _>(column).map_err(read)?.map(KeyPart::Int),
                KeyType::Text => {
                    row.try_get::<Option<String>, _>(column).map_err(read)?.map(|it| KeyPart::Text(it.into()))
                }
                KeyType::Uuid => row.try_get::<Option<Uuid>, _>(column).map_err(read)?.map(KeyPart::Uuid),
            };
            match part {
                Some(part) => parts.push(part),
                None => return Ok(None),
            }
        }
        K::from_parts(&parts).map(Some).ok_or_else(|| self.broken("the key column has another type than the key"))
    }

    fn broken(&self, what: &str) -> Error {
        Error::new(Kind::Table, format!("loading {}: {what}", self.table))
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

/// The server that a row comes from; `None` when it has lost its canary.
fn incarnation(row: &PgRow) -> Option<Incarnation> {
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

fn panic_message(panic: &(dyn Any + Send)) -> &str {
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

fn int(part: KeyPart<'_>) -> i64 {
    match part {
        KeyPart::Int(value) => value,
        other => unreachable!("an integer key has integer parts, not {other:?}"),
    }
}

fn uuid(part: KeyPart<'_>) -> Uuid {
    match part {
        KeyPart::Uuid(value) => value,
        other => unreachable!("a uuid key has uuid parts, not {other:?}"),
    }
}

fn narrow<T: TryFrom<i64>>(value: i64) -> T {
    T::try_from(value).ok().expect("a key's parts fit the types it declares")
}

/// An SQL identifier.
fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
