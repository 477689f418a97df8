//! The statements of a table of shared values (`migrations/0005_shared_values.up.sql`).
//!
//! The database's clock alone says what has expired, and who holds a lease.

use std::{marker::PhantomData, time::Duration};

use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Row, postgres::PgArguments, query::Query};
use uuid::Uuid;

use crate::{
    error::{Error, Kind, Result},
    key::{self, Key, KeyType},
    postgres::{
        columns::{self, KeyColumn},
        database_error, has_code, refusal,
    },
};

/// How long a value is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Lives {
    pub(crate) ttl: Option<Duration>,
    pub(crate) idle: Option<Duration>,
}

/// What became of an attempt to get the lease of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Taken {
    /// It is ours.
    Ours,
    /// There is a value.
    HasValue,
    /// Somebody has it, for so long at least unless he is done before.
    By(Duration),
}

/// The name of a table of shared values.
pub(crate) fn table_of(name: &str) -> String {
    format!("rowcache.shared_{name}")
}

/// What loads read of it, in place of the table: the values that there are.
pub(crate) fn readable<K: Key>(table: &str) -> String {
    let keys: Vec<_> = key_columns::<K>().into_iter().map(|name| format!("v.{name}")).collect();
    format!(
        "(select {}, v.value, (extract(epoch from v.written_at) * 1000000)::bigint as written, \
         extract(epoch from v.dies_at - statement_timestamp())::float8 as lives, extract(epoch from v.idle)::float8 as idle \
         from {table} v where v.value is not null and (v.dies_at is null or v.dies_at > statement_timestamp()))",
        keys.join(", ")
    )
}

/// The columns of its key.
pub(crate) fn key_columns<K: Key>() -> Vec<String> {
    match K::types().len() {
        1 => vec!["key".to_owned()],
        parts => (1..=parts).map(|n| format!("key_{n}")).collect(),
    }
}

/// Makes the table, if it is not there.
pub(crate) async fn make<K: Key>(pool: &PgPool, pooler: bool, name: &str, logged: bool) -> Result<()> {
    let types: Vec<_> = K::types().into_iter().map(KeyType::postgres).collect();
    let share = sqlx::query("select rowcache.share($1, $2, $3)").bind(name).bind(&types).bind(logged);
    let Err(error) = share.persistent(!pooler).execute(pool).await else { return Ok(()) };
    let made = format!("making the table of the shared values {name}");
    if has_code(&error, INSUFFICIENT_PRIVILEGE) {
        let is_there = sqlx::query_scalar("select to_regclass($1) is not null").bind(table_of(name));
        // Whether it is tracked is looked at next, as of all tables.
        if is_there.persistent(!pooler).fetch_one(pool).await.unwrap_or(false) {
            return Ok(());
        }
        let message = format!(
            "{} is not there, and this role may not make it; as the owner of schema rowcache, run: select rowcache.share('{name}', \
             '{{{}}}'{}); and grant select, insert, update, delete on it",
            table_of(name),
            types.join(","),
            if logged { ", logged => true" } else { "" }
        );
        return Err(Error::with(Kind::Refused, message, error));
    }
    Err(refusal(&made, error))
}

const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// A row that has a value which is not to be replaced. `$2` of [`Statements::take`] is when a value was written that cannot be read.
const ALIVE: &str = "v.value is not null and (v.dies_at is null or v.dies_at > clock_timestamp())";

/// The statements of one table.
pub(crate) struct Statements<K> {
    name: String,
    /// A pooler in transaction mode stands in between.
    pooler: bool,
    types: Vec<KeyType>,
    take: String,
    look: String,
    renew: String,
    store: String,
    release: String,
    put: String,
    delete: String,
    clear: String,
    add: String,
    touch: String,
    sweep: String,
    key: PhantomData<fn(K)>,
}

type Statement = Query<'static, Postgres, PgArguments>;

impl<K: Key> Statements<K> {
    pub(crate) fn new(name: &str, pooler: bool) -> Self {
        let table = table_of(name);
        let names = key_columns::<K>();
        let types = K::types();
        let columns: Vec<KeyColumn<'_>> =
            names.iter().zip(&types).map(|(name, of)| KeyColumn { of: *of, table: &table, name }).collect();
        // The key's parameters come last.
        let key_is = |after: usize| {
            let equal: Vec<_> = columns.iter().enumerate().map(|(n, column)| column.is(after + n + 1)).collect();
            equal.join(" and ").replace("t.key", "v.key")
        };
        let values = |after: usize| {
            let values: Vec<_> =
                types.iter().enumerate().map(|(n, of)| format!("${}::{}", after + n + 1, of.postgres())).collect();
            values.join(", ")
        };
        let keys = names.join(", ");
        let ends = "clock_timestamp() + $2::float8 * interval '1 second', $3::float8 * interval '1 second', \
             least(clock_timestamp() + $2 * interval '1 second', clock_timestamp() + $3 * interval '1 second')";
        let set = "value = excluded.value, written_at = excluded.written_at, expires_at = excluded.expires_at, \
             idle = excluded.idle, dies_at = excluded.dies_at, lease = null, lease_until = null";
        let until = "clock_timestamp() + $2::float8 * interval '1 second'";
        Self {
            // $1 holder, $2 seconds, $3 when what cannot be read was written. No value is left: should there be one later, somebody has
            // written it meanwhile.
            take: format!(
                "insert into {table} as v ({keys}, lease, lease_until, dies_at) values ({}, $1::uuid, {until}, {until}) \
                 on conflict ({keys}) do update set value = null, expires_at = null, idle = null, dies_at = excluded.dies_at, \
                 lease = excluded.lease, lease_until = excluded.lease_until \
                 where (v.lease_until is null or v.lease_until < clock_timestamp()) \
                 and (not ({ALIVE}) or (extract(epoch from v.written_at) * 1000000)::bigint = $3::bigint)",
                values(3)
            ),
            look: format!(
                "select {ALIVE} and (extract(epoch from v.written_at) * 1000000)::bigint is distinct from $1::bigint as alive, \
                 greatest(extract(epoch from v.lease_until - clock_timestamp()), 0)::float8 as remaining from {table} v where {}",
                key_is(1)
            ),
            renew: format!(
                "update {table} v set lease_until = {until}, dies_at = {until} \
                 where v.lease = $1::uuid and v.value is null and {}",
                key_is(2)
            ),
            // $1 holder, $2 ttl, $3 idle, $4 value.
            store: format!(
                "update {table} v set (value, written_at, expires_at, idle, dies_at, lease, lease_until) \
                 = ($4::bytea, clock_timestamp(), {ends}, null, null) where v.lease = $1::uuid and v.value is null and {}",
                key_is(4)
            ),
            // Whoever waits is told by that.
            release: format!("delete from {table} v where v.lease = $1::uuid and v.value is null and {}", key_is(1)),
            // $1 value, $2 ttl, $3 idle.
            put: format!(
                "insert into {table} as v ({keys}, value, expires_at, idle, dies_at) values ({}, $1::bytea, {ends}) \
                 on conflict ({keys}) do update set {set}",
                values(3)
            ),
            delete: format!("delete from {table} v where {}", key_is(0)),
            clear: format!("delete from {table}"),
            // $1 how many, $2 ttl, $3 idle. A number that is there keeps its end.
            add: format!(
                "insert into {table} as v ({keys}, value, expires_at, idle, dies_at) \
                 values ({}, convert_to($1::bigint::text, 'UTF8'), {ends}) \
                 on conflict ({keys}) do update set (value, written_at, expires_at, idle, dies_at, lease, lease_until) = (select \
                 convert_to((case when a.alive then convert_from(v.value, 'UTF8')::bigint else 0 end + $1)::text, 'UTF8'), \
                 clock_timestamp(), case when a.alive then v.expires_at else excluded.expires_at end, \
                 case when a.alive then v.idle else excluded.idle end, \
                 case when a.alive then least(v.expires_at, clock_timestamp() + v.idle) else excluded.dies_at end, null::uuid, null::timestamptz \
                 from (select {ALIVE} as alive) a) returning convert_from(v.value, 'UTF8')::bigint",
                values(3)
            ),
            touch: format!(
                "update {table} v set dies_at = least(v.expires_at, clock_timestamp() + v.idle) \
                 where v.idle is not null and {ALIVE} and {}",
                key_is(0)
            ),
            // Nobody waits for a row that somebody else is at.
            sweep: format!(
                "delete from {table} v where v.ctid = any(array(select d.ctid from {table} d where d.dies_at < clock_timestamp() \
                 and (d.lease_until is null or d.lease_until < clock_timestamp()) limit $1 for update skip locked))"
            ),
            name: name.to_owned(),
            pooler,
            types,
            key: PhantomData,
        }
    }

    /// That of the values.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn statement(&self, sql: &str) -> Statement {
        sqlx::query(AssertSqlSafe(sql.to_owned())).persistent(!self.pooler)
    }

    fn with_key(&self, statement: Statement, key: &K) -> Statement {
        let parts = key.to_parts().into_iter().zip(&self.types);
        parts.fold(statement, |statement, (part, of)| columns::bind(statement, *of, part))
    }

    fn failed(&self, doing: &str, key: &K) -> impl FnOnce(sqlx::Error) -> Error {
        let doing = format!("{doing} {}", self.of(key));
        move |error| database_error(&doing, error)
    }

    /// For messages.
    pub(crate) fn of(&self, key: &K) -> String {
        format!("shared:{} {}", self.name, key::display(&key.to_parts()))
    }

    /// Takes the lease of this key, unless it has a value, or somebody else the lease.
    pub(crate) async fn take(
        &self,
        pool: &PgPool,
        key: &K,
        holder: Uuid,
        lease: Duration,
        unreadable: Option<i64>,
    ) -> Result<Taken> {
        loop {
            let take = self.statement(&self.take).bind(holder).bind(lease.as_secs_f64()).bind(unreadable);
            let failed = self.failed("taking the lease of", key);
            let took = self.with_key(take, key).execute(pool).await.map_err(failed)?;
            if took.rows_affected() > 0 {
                return Ok(Taken::Ours);
            }
            let look = self.statement(&self.look).bind(unreadable);
            let failed = self.failed("looking at the lease of", key);
            let row = self.with_key(look, key).fetch_optional(pool).await.map_err(failed)?;
            // It has gone meanwhile, or the lease has run out: nobody has it.
            let Some(row) = row else { continue };
            let read = |error| database_error(&format!("reading the lease of {}", self.of(key)), error);
            if row.try_get::<bool, _>("alive").map_err(read)? {
                return Ok(Taken::HasValue);
            }
            let remaining: Option<f64> = row.try_get("remaining").map_err(read)?;
            match remaining.map(Duration::try_from_secs_f64) {
                Some(Ok(remaining)) if remaining > Duration::ZERO => return Ok(Taken::By(remaining)),
                _ => {}
            }
        }
    }

    /// Whether the lease is still this holder's, from now on for so long.
    pub(crate) async fn renew(&self, pool: &PgPool, key: &K, holder: Uuid, lease: Duration) -> Result<bool> {
        let renew = self.statement(&self.renew).bind(holder).bind(lease.as_secs_f64());
        let failed = self.failed("renewing the lease of", key);
        Ok(self.with_key(renew, key).execute(pool).await.map_err(failed)?.rows_affected() > 0)
    }

    /// Stores a value, and gives the lease back; if it is still this holder's.
    pub(crate) async fn store(
        &self,
        pool: &PgPool,
        key: &K,
        holder: Uuid,
        value: Vec<u8>,
        lives: Lives,
    ) -> Result<bool> {
        let store = lives.bind(self.statement(&self.store).bind(holder)).bind(value);
        let failed = self.failed("storing", key);
        Ok(self.with_key(store, key).execute(pool).await.map_err(failed)?.rows_affected() > 0)
    }

    /// Gives the lease back, if it is still this holder's.
    pub(crate) async fn release(&self, pool: &PgPool, key: &K, holder: Uuid) -> Result<()> {
        let release = self.with_key(self.statement(&self.release).bind(holder), key);
        release.execute(pool).await.map_err(self.failed("giving back the lease of", key))?;
        Ok(())
    }

    pub(crate) async fn put(&self, on: &mut PgConnection, key: &K, value: Vec<u8>, lives: Lives) -> Result<()> {
        let put = lives.bind(self.statement(&self.put).bind(value));
        self.with_key(put, key).execute(on).await.map_err(self.failed("storing", key))?;
        Ok(())
    }

    /// Returns whether there was anything to delete, if only a lease.
    pub(crate) async fn delete(&self, on: &mut PgConnection, key: &K) -> Result<bool> {
        let delete = self.with_key(self.statement(&self.delete), key);
        Ok(delete.execute(on).await.map_err(self.failed("deleting", key))?.rows_affected() > 0)
    }

    pub(crate) async fn clear(&self, on: &mut PgConnection) -> Result<u64> {
        let failed = |error| database_error(&format!("clearing shared:{}", self.name), error);
        Ok(self.statement(&self.clear).execute(on).await.map_err(failed)?.rows_affected())
    }

    /// Adds to the number that is there, or to 0.
    pub(crate) async fn add(&self, on: &mut PgConnection, key: &K, by: i64, lives: Lives) -> Result<i64> {
        let add = self.with_key(lives.bind(self.statement(&self.add).bind(by)), key);
        let row = add.fetch_one(on).await.map_err(self.failed("adding to", key))?;
        row.try_get(0).map_err(self.failed("adding to", key))
    }

    /// It is in use.
    pub(crate) async fn touch(&self, pool: &PgPool, key: &K) -> Result<()> {
        let touch = self.with_key(self.statement(&self.touch), key);
        touch.execute(pool).await.map_err(self.failed("touching", key))?;
        Ok(())
    }

    /// Removes up to so many rows that have expired. Returns how many.
    pub(crate) async fn sweep(&self, pool: &PgPool, max: i64) -> Result<u64> {
        let failed = |error| database_error(&format!("sweeping shared:{}", self.name), error);
        Ok(self.statement(&self.sweep).bind(max).execute(pool).await.map_err(failed)?.rows_affected())
    }
}

impl Lives {
    fn bind(self, statement: Statement) -> Statement {
        let seconds = |of: Option<Duration>| of.map(|of| of.as_secs_f64());
        statement.bind(seconds(self.ttl)).bind(seconds(self.idle))
    }
}
