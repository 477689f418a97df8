//! Puts the database objects in place and takes them away: the numbered files of `migrations/`, which this crate carries,
//! run by sqlx's migrator.
//!
//! What has been run is recorded in `rowcache.migrations`. The files can as well be run by hand (`psql -f`), before or
//! after: each may be run twice. Only [`up`] and [`down`] change anything; nothing in this crate calls them by itself.
//!
//! One migration at a time: an advisory lock on a connection that leaves the pool and is closed afterwards, so that an
//! error cannot leave the lock behind. (sqlx's own lock would stay on the pooled connection, and ends before [`down`] has
//! cleared up.) The work itself is done on another connection of the pool.

use std::{collections::HashMap, future::Future};

use sqlx::{
    Connection as _, PgConnection, PgPool, Row as _,
    migrate::{MigrateError, Migration, Migrator},
};

use crate::{
    error::{Error, Kind, Result},
    postgres::refusal,
};

/// Key of the advisory lock.
const LOCK: i64 = i64::from_be_bytes(*b"rowcache");

/// One migration, seen from a database.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Status {
    /// Its number, from 1.
    pub version: i64,
    /// What its files are called after the number.
    pub name: String,
    /// When it was run here, as Postgres prints it; `None`: not by [`up`].
    pub applied: Option<String>,
    /// It was run from a file with other contents.
    pub altered: bool,
}

/// One migration file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct File {
    /// As in `migrations/`.
    pub name: String,
    /// Its contents.
    pub sql: String,
}

/// Runs the migrations that have not been run, and returns their numbers. Any number of nodes may do so at once.
///
/// Locks nothing that belongs to others.
///
/// # Errors
///
/// If the database refuses, or was migrated by other files than these. What was not recorded has not happened: each file is one transaction.
///
/// # Cancel safety
///
/// Cancelling leaves whole files applied and the rest not.
pub async fn up(pool: &PgPool) -> Result<Vec<i64>> {
    named("migrating up", async {
        let mut connection = lock(pool).await?;
        let before = applied(&mut connection).await?;
        migrator().run(pool).await?;
        let mut versions: Vec<i64> = applied(&mut connection).await?.into_keys().collect();
        connection.close().await?;
        versions.retain(|version| !before.contains_key(version));
        versions.sort_unstable();
        Ok(versions)
    })
    .await
}

/// Takes back the last `steps` migrations that were run, and returns their numbers, last first.
///
/// Taking back the one that made `track` untracks every table: that locks each against readers and writers for a moment.
/// Taking back all of them removes the schema too, unless somebody else has put something into it.
///
/// # Errors
///
/// As [`up`].
///
/// # Cancel safety
///
/// As [`up`].
pub async fn down(pool: &PgPool, steps: usize) -> Result<Vec<i64>> {
    named("migrating down", async {
        let mut connection = lock(pool).await?;
        let mut versions: Vec<i64> = applied(&mut connection).await?.into_keys().collect();
        versions.sort_unstable_by(|a, b| b.cmp(a));
        // The migrator keeps what is not above the target.
        let target = versions.get(steps).copied().unwrap_or(0);
        versions.truncate(steps);
        if !versions.is_empty() {
            migrator().undo(pool, target).await?;
            if target == 0 {
                sqlx::query("drop table rowcache.migrations").execute(&mut connection).await?;
                drop_schema(&mut connection).await?;
            }
        }
        connection.close().await?;
        Ok(versions)
    })
    .await
}

/// What has been run and what has not. Changes nothing.
///
/// # Errors
///
/// If the database cannot be asked.
///
/// # Cancel safety
///
/// Cancel safe.
pub async fn status(pool: &PgPool) -> Result<Vec<Status>> {
    named("reading which migrations have been run", async {
        let applied = applied(&mut *pool.acquire().await?).await?;
        let status = |migration: &Migration| {
            let record = applied.get(&migration.version);
            Status {
                version: migration.version,
                name: name(migration),
                applied: record.map(|record| record.at.clone()),
                altered: record.is_some_and(|record| record.checksum != *migration.checksum),
            }
        };
        Ok(migrator().iter().filter(|m| m.migration_type.is_up_migration()).map(status).collect())
    })
    .await
}

/// The files, in the order in which [`up`] runs them, each with the one that takes it back.
#[must_use]
pub fn print() -> Vec<File> {
    let file = |migration: &Migration| File {
        name: format!("{:04}_{}{}", migration.version, name(migration), migration.migration_type.suffix()),
        sql: migration.sql.as_str().to_owned(),
    };
    migrator().iter().map(file).collect()
}

/// Number, name and checksum (in hex) of every migration that this crate carries.
#[cfg(feature = "cli")]
pub(crate) fn known() -> Vec<(i64, String, String)> {
    let known = |migration: &Migration| {
        let checksum = migration.checksum.iter().map(|byte| format!("{byte:02x}")).collect();
        (migration.version, name(migration), checksum)
    };
    migrator().iter().filter(|m| m.migration_type.is_up_migration()).map(known).collect()
}

async fn named<T>(doing: &str, work: impl Future<Output = Result<T, MigrateError>>) -> Result<T> {
    work.await.map_err(|error| match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => refusal(doing, error),
        MigrateError::VersionMismatch(version) => Error::new(
            Kind::Migrate,
            format!(
                "migration {version} of schema rowcache was run from a file with other contents than this release has; \
                 take it back with the release that ran it, then: rowcache migrate up"
            ),
        ),
        MigrateError::VersionMissing(version) => Error::new(
            Kind::SchemaTooNew,
            format!("this database has migration {version} of schema rowcache, which this release does not know; use a newer one"),
        ),
        error => Error::with(Kind::Migrate, format!("{doing} failed"), error),
    })
}

fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("./migrations");
    migrator.dangerous_set_table_name("rowcache.migrations");
    migrator.create_schema("rowcache");
    migrator.set_locking(false);
    migrator
}

/// sqlx turns the underscores of a file's name into spaces.
fn name(migration: &Migration) -> String {
    migration.description.replace(' ', "_")
}

/// A connection that holds the lock until it is closed. It no longer counts in the pool: those who wait here keep nobody
/// from a connection.
async fn lock(pool: &PgPool) -> Result<PgConnection, sqlx::Error> {
    let mut connection = pool.acquire().await?.detach();
    sqlx::query("select pg_advisory_lock($1)").bind(LOCK).execute(&mut connection).await?;
    Ok(connection)
}

struct Record {
    at: String,
    checksum: Vec<u8>,
}

/// What was recorded, by number.
async fn applied(connection: &mut PgConnection) -> Result<HashMap<i64, Record>, sqlx::Error> {
    let recorded = sqlx::query_scalar("select to_regclass('rowcache.migrations') is not null");
    if !recorded.fetch_one(&mut *connection).await? {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query("select version, installed_on::text, checksum from rowcache.migrations");
    let record =
        |row: sqlx::postgres::PgRow| Ok((row.try_get(0)?, Record { at: row.try_get(1)?, checksum: row.try_get(2)? }));
    rows.fetch_all(connection).await?.into_iter().map(record).collect()
}

async fn drop_schema(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    match sqlx::query("drop schema rowcache").execute(connection).await {
        // 2BP01: other objects are in it.
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("2BP01") => Ok(()),
        result => result.map(drop),
    }
}
