//! Where a demo takes place: a server, the schema `rowcache_demo` in a database, and who cleans up afterwards.
//!
//! Without `--database-url` the server is a throw-away one, and goes with everything in it. In a database that the user
//! named, several demos can run at once; two advisory locks, held by a connection of each, keep them apart:
//!
//! * `BUILDING`, alone: to make the schema, or to drop it;
//! * `PRESENT`, shared: as long as a demo runs. Whoever gets it alone at the end was the last, and drops the schema,
//!   unless a demo was told to `--keep` it. The migrations stay.

use anyhow::{Context as _, Result};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool, postgres::PgConnectOptions};

use crate::{
    Config,
    cli::{
        connect::{connect, shown},
        temp_server::{Stop, TempServer},
        text,
    },
    install::{self, TrackOptions},
    migrate,
};

const BUILDING: i64 = i64::from_be_bytes(*b"rc-demo0");
const PRESENT: i64 = i64::from_be_bytes(*b"rc-demo1");

/// The table of the demo, as messages name it.
pub(super) const TABLE: &str = "rowcache_demo.users";

/// Rows with ids 1 to this are for who joins in.
pub(super) const YOURS: u64 = 100;

/// The first key is the most popular one: with this exponent, of 100,000 keys it gets some 13 % of all gets, and the first
/// 1,000 get three quarters.
pub(super) const EXPONENT: f64 = 1.1;

/// Zipf gives whole numbers from 1.
#[expect(clippy::cast_possible_truncation, reason = "a whole number, at most the number of rows")]
pub(super) fn key(sample: f64) -> i64 {
    sample as i64
}

/// One row of it.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct User {
    pub(super) version: i64,
    #[expect(dead_code, reason = "a row of realistic size")]
    name: String,
    #[expect(dead_code, reason = "a row of realistic size")]
    plan: String,
}

pub(super) struct World {
    server: Option<TempServer>,
    /// Holds the shared lock.
    present: PgConnection,
    pub(super) url: String,
    pub(super) pool: PgPool,
    /// The rows it was made with: their ids are 1 to this.
    pub(super) rows: u64,
    /// The table's shortest name in somebody's `psql`.
    pub(super) table_in_psql: &'static str,
}

impl World {
    /// Starts or joins one, and says on stderr what it does, as it can take a while.
    pub(super) async fn enter(database_url: Option<&str>, rows: u64, keep: bool) -> Result<Self> {
        let server = if database_url.is_none() { Some(start_server().await?) } else { None };
        let own_url = || server.as_ref().map(|server| server.url("demo"));
        let url = database_url.map(str::to_owned).or_else(own_url).expect("one of the two");
        let pool = connect(&url).await?;
        let options = Config::from_url(&url)?.pool_connect;
        if server.is_none() {
            eprintln!("using {}, schema rowcache_demo", shown(&options));
        }
        migrate::up(&pool).await?;
        let (present, rows) =
            join(&options, &pool, rows, keep).await.context("cannot make the schema rowcache_demo")?;
        let table_in_psql = if server.is_some() { "users" } else { TABLE };
        Ok(Self { server, present, url, pool, rows, table_in_psql })
    }

    /// The `psql` that comes with the server, or another one; `None`: there is none here.
    pub(super) fn psql(&self) -> Option<std::path::PathBuf> {
        match &self.server {
            Some(server) => server.bin("psql").ok(),
            None => which::which("psql").ok(),
        }
    }

    /// Leaves nothing behind that was not to be kept.
    pub(super) async fn leave(mut self) -> Result<()> {
        self.pool.close().await;
        if let Some(mut server) = self.server {
            drop(self.present);
            server.stop(Stop::Fast).await?;
            // Removing the files takes a moment.
            return Ok(tokio::task::spawn_blocking(|| drop(server)).await?);
        }
        // The server may have been restarted while we ran.
        if self.present.ping().await.is_err() {
            self.present = PgConnection::connect_with(&Config::from_url(&self.url)?.pool_connect).await?;
        }
        let left = leave_schema(&mut self.present).await.context("cannot drop the schema rowcache_demo")?;
        eprintln!("schema rowcache_demo {left}");
        Ok(self.present.close().await?)
    }
}

async fn start_server() -> Result<TempServer> {
    eprintln!("starting a throw-away PostgreSQL");
    let options = TempServer::options().download_if_missing().setting("track_commit_timestamp", "on");
    let server = options.start().await?;
    let mut admin = PgConnection::connect(&server.admin_url()).await?;
    sqlx::raw_sql("create database demo").execute(&mut admin).await?;
    // So that who joins in by psql can say `users`.
    sqlx::raw_sql("alter database demo set search_path = rowcache_demo, public").execute(&mut admin).await?;
    admin.close().await?;
    Ok(server)
}

/// Makes the schema unless it is there, and takes part. Returns how many rows it was made with.
async fn join(options: &PgConnectOptions, pool: &PgPool, rows: u64, keep: bool) -> Result<(PgConnection, u64)> {
    let mut connection = PgConnection::connect_with(options).await?;
    lock(&mut connection, "pg_advisory_lock", BUILDING).await?;
    let there = sqlx::query_scalar("select to_regclass('rowcache_demo.world') is not null");
    if !there.fetch_one(&mut connection).await? {
        eprintln!("making {} rows", text::number(rows));
        let sql = include_str!("world.sql").replace("$ROWS", &rows.to_string());
        let mut transaction = connection.begin().await?;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *transaction).await?;
        let world = sqlx::query("insert into rowcache_demo.world values ($1, false)");
        world.bind(i64::try_from(rows)?).execute(&mut *transaction).await?;
        transaction.commit().await?;
        sqlx::raw_sql("analyze rowcache_demo.users").execute(&mut connection).await?;
    }
    if keep {
        sqlx::raw_sql("update rowcache_demo.world set keep = true").execute(&mut connection).await?;
    }
    let made_with: i64 =
        sqlx::query_scalar("select row_count from rowcache_demo.world").fetch_one(&mut connection).await?;
    let made_with = u64::try_from(made_with)?;
    if made_with != rows {
        eprintln!("the schema is there already, made with {} rows", text::number(made_with));
    }
    install::track(pool, TABLE, &TrackOptions::default()).await?;
    lock(&mut connection, "pg_advisory_lock_shared", PRESENT).await?;
    lock(&mut connection, "pg_advisory_unlock", BUILDING).await?;
    Ok((connection, made_with))
}

/// Drops the schema, if we are the last and it is not to be kept. Returns what became of it.
async fn leave_schema(connection: &mut PgConnection) -> Result<&'static str> {
    lock(connection, "pg_advisory_lock", BUILDING).await?;
    // Not held, if this connection is a new one: a warning to nobody.
    lock(connection, "pg_advisory_unlock_shared", PRESENT).await?;
    let last = sqlx::query_scalar("select pg_try_advisory_lock($1)").bind(PRESENT);
    if !last.fetch_one(&mut *connection).await? {
        return Ok("stays: another demo is using it");
    }
    let there = sqlx::query_scalar("select to_regclass('rowcache_demo.world') is not null");
    if !there.fetch_one(&mut *connection).await? {
        return Ok("is gone already");
    }
    if sqlx::query_scalar("select keep from rowcache_demo.world").fetch_one(&mut *connection).await? {
        return Ok("stays, as it was asked for with --keep");
    }
    if sqlx::query_scalar("select to_regclass($1) is not null").bind(TABLE).fetch_one(&mut *connection).await? {
        install::untrack(&mut *connection, TABLE).await?;
    }
    sqlx::raw_sql("set client_min_messages = warning; drop schema rowcache_demo cascade").execute(connection).await?;
    Ok("is dropped; the migrations stay (`rowcache migrate down --steps 99` takes them back)")
}

async fn lock(connection: &mut PgConnection, function: &'static str, key: i64) -> Result<()> {
    sqlx::query(AssertSqlSafe(format!("select {function}($1)"))).bind(key).execute(connection).await?;
    Ok(())
}
