//! The database of a node, with SQL and sockets: its pools, and its lines.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, PgPool, Row as _,
    postgres::{PgArguments, PgRow},
};
use uuid::Uuid;

use crate::{
    coherence::{Fence, Incarnation},
    config::Config,
    error::{Error, Kind, Result},
    fleet::{FleetNode, answer_channel},
    postgres::{
        database_error, fleet, has_code, is_connection_error,
        kept::Kept,
        lent::Lent,
        line::{self, FENCE},
    },
    server::{Answer, Hear, Line, Server},
    tables::Via,
};

/// A node's way to Postgres.
pub(crate) struct Postgres {
    config: Config,
    /// Connections that load, and nothing else (X31).
    pub(crate) pool: PgPool,
    /// Those of them that wait for the next load.
    pub(crate) kept: Arc<Kept>,
    /// Connections of [`Transaction`](crate::Transaction)s, on which code of the user runs.
    pub(crate) writes: PgPool,
    /// Whether the last line is on a standby.
    pub(crate) standby: Arc<AtomicBool>,
}

impl Postgres {
    /// Of the notification queue, which all databases of the server share, as a share of one.
    #[cfg(feature = "serve")]
    pub(crate) async fn notification_queue_usage(&self) -> Result<f64> {
        let ask = sqlx::query_scalar("select pg_notification_queue_usage()").persistent(!self.config.pooler);
        let share = ask.fetch_one(&self.pool).await;
        share.map_err(|error| database_error("asking for the use of the notification queue", error))
    }

    pub(crate) fn new(config: Config) -> Self {
        let mut connect = config.pool_connect.clone();
        if let Some(name) = &config.name {
            connect = connect.application_name(&line::printable(name, line::NAME_MAX));
        }
        let pool = config.pool.clone().connect_lazy_with(connect.clone());
        let writes = config.write_pool.clone().connect_lazy_with(connect);
        Self { kept: Kept::new(pool.clone()), config, pool, writes, standby: Arc::default() }
    }
}

impl Server for Postgres {
    fn open<'a>(&'a self, own_channel: &'a str, hear: Arc<dyn Hear>) -> Answer<'a, Arc<dyn Line>> {
        Box::pin(async move {
            let line = line::open(&self.config, own_channel, hear).await?;
            self.standby.store(line.standby, Ordering::Relaxed);
            Ok(Arc::new(line) as Arc<dyn Line>)
        })
    }

    fn reaches(&self, listening: Incarnation) -> Answer<'_, ()> {
        let stamp = line::stamp_view(self.standby.load(Ordering::Relaxed));
        Box::pin(reach_same_server(&self.pool, listening, stamp, self.config.pooler))
    }

    fn probe<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        Box::pin(async move {
            let failed = |error| database_error("sending a fence through the pool", error);
            let mut connection = Lent::acquire(&self.pool).await.map_err(failed)?;
            let sent = probe(&mut connection, &self.config, own_channel, fence).await.map_err(failed)?;
            if sent {
                connection.give_back();
            }
            Ok(sent)
        })
    }

    fn tell(&self, payload: String, via: Via) -> Answer<'_, ()> {
        Box::pin(async move {
            let (doing, tell) = match via {
                Via::Notify => ("notifying on channel rowcache", "select pg_notify('rowcache', $1)"),
                Via::Log => ("writing to the change log", "select rowcache.log_change($1)"),
            };
            let failed = |error| database_error(doing, error);
            let mut connection = Lent::acquire(&self.pool).await.map_err(failed)?;
            let tell = sqlx::query(tell).bind(payload);
            fetch(&mut connection, tell, self.config.pooler).await.map_err(failed)?;
            connection.give_back();
            Ok(())
        })
    }

    fn ask_all(&self, deadline: Duration) -> Answer<'_, Option<Vec<FleetNode>>> {
        Box::pin(async move { fleet::ask(&self.config, deadline).await.map(Some) })
    }

    fn answer(&self, question: Uuid, payload: String) -> Answer<'_, ()> {
        Box::pin(async move {
            let failed = |error| database_error("answering a question about this node", error);
            let mut connection = Lent::acquire(&self.pool).await.map_err(failed)?;
            let limit = line::lock_timeout(&self.config).to_string();
            let answer = sqlx::query(fleet::NOTIFY).bind(answer_channel(question)).bind(payload).bind(limit);
            fetch(&mut connection, answer, self.config.pooler).await.map_err(failed)?;
            connection.give_back();
            Ok(())
        })
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        // No transaction begins any more. Those that are open may end; nobody waits for them.
        drop(self.writes.close());
        let writes = self.writes.clone();
        tokio::spawn(async move { writes.close().await });
        Box::pin(async {
            let closed = self.pool.close();
            self.kept.clear();
            closed.await;
        })
    }
}

/// A statement by itself. Behind a pooler in transaction mode, what prepares it and what executes it meet the same backend
/// only within a transaction, and its name may mean something else to that backend.
pub(crate) async fn fetch(
    connection: &mut PgConnection,
    query: sqlx::query::Query<'_, sqlx::Postgres, PgArguments>,
    pooler: bool,
) -> sqlx::Result<Vec<PgRow>> {
    if !pooler {
        return query.fetch_all(connection).await;
    }
    let mut transaction = connection.begin().await?;
    let rows = query.persistent(false).fetch_all(&mut *transaction).await?;
    transaction.commit().await?;
    Ok(rows)
}

/// What Postgres says on a standby when it is asked for the canary, which is unlogged.
const UNLOGGED_ON_STANDBY: &str = "0A000";

/// Makes sure that the pool reaches the server that the listener is on. Whatever ended the last line may have ended
/// pooled connections too, or they may still be open to a server that was replaced: each gives way to a new one.
async fn reach_same_server(pool: &PgPool, listening: Incarnation, stamp: &'static str, pooler: bool) -> Result<()> {
    let failed = |error| database_error("connecting the pool", error);
    let mut outcome = Err(Error::new(
        Kind::Config,
        "the pool and the listener reach different servers or databases: both must reach the same primary",
    ));
    for _ in 0..=pool.size() {
        let mut connection = Lent::acquire(pool).await.map_err(failed)?;
        let ask = sqlx::query(AssertSqlSafe(format!("select canary, started from {stamp}")));
        let answer = fetch(&mut connection, ask, pooler).await;
        match answer.and_then(|mut rows| rows.pop().ok_or(sqlx::Error::RowNotFound)) {
            Err(error) if is_connection_error(&error) => outcome = Err(failed(error)),
            Err(error) if has_code(&error, UNLOGGED_ON_STANDBY) => {
                let what = "the pool reached a standby, whose rows lag behind; connect it to the primary";
                outcome = Err(Error::with(Kind::Standby, what, error));
            }
            Err(error) => return Err(failed(error)),
            Ok(row) => {
                let canary: Option<Uuid> = row.try_get(0).map_err(failed)?;
                let started = row.try_get(1).map_err(failed)?;
                if canary.map(|canary| Incarnation { canary, started }) == Some(listening) {
                    connection.give_back();
                    return Ok(());
                }
            }
        }
    }
    outcome
}

/// Sends a fence through the pool. `false`: it waited too long for the lock that orders commits. With a limit of its own: a
/// statement that is merely given up goes on waiting in its backend, and there would be one more with each attempt. The limit
/// is set by the statement itself. A transaction for it would end one that the application has left open (X14).
async fn probe(connection: &mut PgConnection, config: &Config, own_channel: &str, fence: Fence) -> sqlx::Result<bool> {
    let limited = AssertSqlSafe(format!("{FENCE}, pg_catalog.set_config('lock_timeout', $3, true)"));
    let limit = line::lock_timeout(config).to_string();
    let fence = sqlx::query(limited).bind(own_channel).bind(fence.nonce.to_string()).bind(limit);
    match fence.execute(connection).await {
        Err(error) if has_code(&error, LOCK_NOT_AVAILABLE) => Ok(false),
        outcome => outcome.map(|_| true),
    }
}

const LOCK_NOT_AVAILABLE: &str = "55P03";
