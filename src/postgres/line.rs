//! The line to Postgres that coherence hangs on: the LISTEN connection, and a second one that sends fences.
//!
//! The LISTEN connection is never used for anything else once it listens. While a backend executes a statement
//! it forwards no notifications, and a fence can wait for a lock behind a stuck writer (X11). Its task decodes
//! and hands over, and waits for nothing but the socket: a client that does not read makes Postgres keep every
//! session's messages.
//!
//! tokio-postgres, and not sqlx's `PgListener`, because that one reconnects on its own without telling: a gap
//! would be invisible (`tests/upstream.rs`).

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinHandle,
    time::timeout,
};
use tokio_postgres::{AsyncMessage, Client, Connection, Statement, error::SqlState, types::Type};
use uuid::Uuid;

use crate::{
    change::CHANNEL,
    coherence::{Fence, Incarnation},
    config::Config,
    error::{Error, Kind, Result, with_causes},
    postgres::{
        catalog::{DESCRIBE, Description},
        hosts, is_missing, is_shutdown, schema_too_old,
    },
    server::{Answer, Hear, Line, Received},
    tables::Trust,
};

/// The oldest and the newest version of the schema that this library works with.
pub(crate) const SCHEMA_VERSIONS: std::ops::RangeInclusive<i32> = 1..=1;

/// Settings of both sessions. Nothing may time out an idle listener, nor the control session between two beats; a dead
/// peer must not hold the server's notification queue for hours; a fence must not wait for ever. Older servers lack some.
const SETTINGS: &str = "set statement_timeout = 0; set idle_in_transaction_session_timeout = 0; \
     set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
     select set_config(name, '0', false) from pg_settings where name in ('idle_session_timeout', 'transaction_timeout')";

/// Sends a fence: to this channel, with this nonce. The grammar of the message is in `change.rs`. Very many running
/// transactions would not fit into a message: then none that began after the oldest of them counts as ended.
pub(crate) const FENCE: &str = "select pg_catalog.pg_notify($1, pg_catalog.json_build_object('v', 1, 'f', $2::text, \
     's', case when octet_length(s) < 6000 then s else split_part(s, ':', 1) || ':' || split_part(s, ':', 1) || ':' end, \
     'l', l)::text) \
     from (select pg_catalog.pg_current_snapshot()::text, \
         (pg_catalog.pg_current_wal_insert_lsn() - '0/0'::pg_catalog.pg_lsn)::bigint) as now(s, l)";

/// Both connections, listening.
pub(crate) struct Sessions {
    incarnation: Incarnation,
    control: Client,
    /// Says nothing any more, but dropping it would end its connection.
    _listener: Client,
    phase: Arc<Phase>,
    fence: Statement,
    fingerprints: Statement,
    describe: Statement,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.phase.end();
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Whether the end of a connection is news. While the line is being opened, whoever opens it gets an error; once
/// it is given up, nobody cares; and two connections that end are one loss.
#[derive(Default)]
struct Phase(AtomicU8);

impl Phase {
    const OPENING: u8 = 0;
    const OPEN: u8 = 1;
    const ENDED: u8 = 2;

    /// The line is open, unless it has ended already.
    fn begin(&self) -> bool {
        self.0.compare_exchange(Self::OPENING, Self::OPEN, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire) == Self::OPEN
    }

    /// The line has ended. Returns whether it was open until now.
    fn end(&self) -> bool {
        self.0.swap(Self::ENDED, Ordering::AcqRel) == Self::OPEN
    }
}

/// How long a fence may wait for the lock that orders commits, in milliseconds: a third of the time in which it has to be back, so that
/// one which cannot be sent is told apart from one that does not come back.
pub(crate) fn lock_timeout(config: &Config) -> u128 {
    (config.beat_timeout / 3).as_millis().clamp(1, 1_000_000)
}

/// Connects, listens, and returns once LISTEN has returned.
pub(crate) async fn open(config: &Config, own_channel: &str, hear: Arc<dyn Hear>) -> Result<Sessions> {
    let phase = Arc::new(Phase::default());
    let lost = {
        let (phase, hear) = (Arc::clone(&phase), Arc::clone(&hear));
        move |how| {
            if phase.end() {
                hear.lost(how);
            }
        }
    };
    let received = move |message| hear.received(message);
    let (listener, listening) = connect(config, "listener", received, lost.clone()).await?;
    let incarnation = prepare(&listener).await?;
    let listen = format!("listen {CHANNEL}; listen \"{own_channel}\"");
    listener.batch_execute(&listen).await.map_err(|error| setup_error("LISTEN failed", error))?;

    let (control, sending) = connect(config, "control", |_| {}, lost).await?;
    let lock_timeout = lock_timeout(config);
    let set = format!("{SETTINGS}; set lock_timeout = {lock_timeout}");
    control.batch_execute(&set).await.map_err(|error| setup_error("setting up the control session failed", error))?;
    let fence = control
        .prepare_typed(FENCE, &[Type::TEXT, Type::TEXT])
        .await
        .map_err(|error| setup_error("preparing the fence failed", error))?;
    let fingerprints = "select name, fingerprint from rowcache.fingerprints($1)";
    let fingerprints = control
        .prepare_typed(fingerprints, &[Type::TEXT_ARRAY])
        .await
        .map_err(|error| setup_error("preparing the check of triggers failed", error))?;
    let describe = control
        .prepare_typed(DESCRIBE, &[Type::TEXT])
        .await
        .map_err(|error| setup_error("preparing the check of triggers failed", error))?;
    if !phase.begin() {
        return Err(Error::new(Kind::Unavailable, "a connection ended while the line was being opened"));
    }
    Ok(Sessions {
        incarnation,
        control,
        _listener: listener,
        phase,
        fence,
        fingerprints,
        describe,
        tasks: [listening, sending],
    })
}

/// One session; its task calls `received` and `lost`.
pub(crate) async fn connect(
    config: &Config,
    role: &str,
    received: impl Fn(Received) + Send + Sync + 'static,
    lost: impl FnOnce(String) + Send + 'static,
) -> Result<(Client, JoinHandle<()>)> {
    let mut settings = config.listener.clone();
    let name = settings.get_application_name().map_or_else(|| "rowcache".to_owned(), ToOwned::to_owned);
    settings.application_name(format!("{name} ({role})"));
    let hosts = hosts::each(&settings);
    let limit = config.beat_timeout.max(Duration::from_secs(1)) / u32::try_from(hosts.len()).unwrap_or(u32::MAX);
    let mut outcome = Err(Error::new(Kind::Config, "the listener's address has no host"));
    for host in &hosts {
        let connecting = timeout(limit, host.connect(config.listener_tls.connector())).await;
        let late = |_| Err(Error::new(Kind::Unavailable, format!("connecting to {} took too long", address(host))));
        outcome = connecting.map_or_else(late, |connected| connected.map_err(|error| connect_error(config, error)));
        if outcome.is_ok() {
            break;
        }
    }
    let (client, connection) = outcome?;
    let task = tokio::spawn(async move {
        let how = pump(connection, received).await;
        lost(how);
    });
    Ok((client, task))
}

/// Drives a connection until it ends; returns how it ended.
async fn pump<S, T>(mut connection: Connection<S, T>, received: impl Fn(Received) + Sync) -> String
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        match poll_fn(|context| connection.poll_message(context)).await {
            Some(Ok(AsyncMessage::Notification(message))) => {
                let payload = message.payload().to_owned();
                received(if message.channel() == CHANNEL { Received::Change(payload) } else { Received::Own(payload) });
            }
            Some(Ok(AsyncMessage::Notice(notice))) => tracing::debug!(%notice, "notice from Postgres"),
            Some(Ok(_)) => {}
            Some(Err(error)) => return with_causes(&error),
            None => return "closed".to_owned(),
        }
    }
}

/// Checks that this session can be a listener, and learns which server it is on. All before LISTEN.
async fn prepare(listener: &Client) -> Result<Incarnation> {
    let row = listener
        .query_one("select pg_is_in_recovery()", &[])
        .await
        .map_err(|error| setup_error("setting up the LISTEN session failed", error))?;
    if row.get(0) {
        return Err(Error::new(
            Kind::Standby,
            "the listener reached a standby, where Postgres does not allow LISTEN; connect it to the primary",
        ));
    }
    let setup = |error| setup_error("setting up the LISTEN session failed", error);
    listener.batch_execute(SETTINGS).await.map_err(setup)?;
    let version: i32 = listener.query_one("select rowcache.schema_version()", &[]).await.map_err(setup)?.get(0);
    if version < *SCHEMA_VERSIONS.start() {
        return Err(schema_too_old());
    }
    if version > *SCHEMA_VERSIONS.end() {
        return Err(Error::new(
            Kind::SchemaTooNew,
            format!(
                "the schema `rowcache` of this database has version {version}, and this library knows it up to \
                 version {}; use a newer release of rowcache",
                SCHEMA_VERSIONS.end()
            ),
        ));
    }
    // A notification queue that was full stays so until somebody looks at it (`tests/faults/queue.rs`): whoever fails to send
    // makes no room. Our fences fail then, too, which ends the line and leads here.
    listener.batch_execute("select pg_notification_queue_usage(), rowcache.incarnation()").await.map_err(setup)?;
    let row = listener.query_one("select canary, started from rowcache.stamp", &[]).await.map_err(setup)?;
    let canary: Option<Uuid> = row.get(0);
    let canary = canary.ok_or_else(|| {
        Error::new(Kind::Unavailable, "the canary of schema `rowcache` disappeared while it was read")
    })?;
    Ok(Incarnation { canary, started: row.get(1) })
}

impl Line for Sessions {
    fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    fn is_open(&self) -> bool {
        self.phase.is_open()
    }

    fn send<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        Box::pin(async move {
            match self.control.execute(&self.fence, &[&own_channel, &fence.nonce.to_string()]).await {
                Ok(_) => Ok(true),
                Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(false),
                Err(error) => Err(setup_error("sending a fence failed", error)),
            }
        })
    }

    fn fingerprints<'a>(&'a self, names: &'a [String]) -> Answer<'a, Vec<(String, Option<String>)>> {
        Box::pin(async move {
            let rows = self.control.query(&self.fingerprints, &[&names]).await;
            let rows = rows.map_err(|error| setup_error("checking triggers failed", error))?;
            Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
        })
    }

    fn verify<'a>(&'a self, name: &'a str) -> Answer<'a, Result<Trust, String>> {
        Box::pin(async move { Ok(self.describe(name).await?.whole()) })
    }
}

impl Sessions {
    /// A table as it is now.
    async fn describe(&self, name: &str) -> Result<Description> {
        let row = self.control.query_one(&self.describe, &[&name]).await;
        let row = row.map_err(|error| setup_error("verifying a table failed", error))?;
        Ok(Description {
            relation: row.get("relation"),
            relkind: row.get("relkind"),
            key_columns: row.get("key_columns"),
            key_types: row.get("key_types"),
            tracked: row.get("tracked"),
            problems: row.get("problems"),
            fingerprint: row.get("fingerprint"),
            secret: row.get("secret"),
        })
    }
}

/// Where a connection goes to, without its secrets.
fn address(config: &tokio_postgres::Config) -> String {
    use tokio_postgres::config::Host;
    let hosts: Vec<_> = config
        .get_hosts()
        .iter()
        .map(|host| match host {
            Host::Tcp(name) => name.clone(),
            #[cfg(unix)]
            Host::Unix(path) => path.display().to_string(),
        })
        .collect();
    let ports: Vec<_> = config.get_ports().iter().map(ToString::to_string).collect();
    format!("{} port {}", hosts.join(","), if ports.is_empty() { "5432".to_owned() } else { ports.join(",") })
}

fn connect_error(config: &Config, error: tokio_postgres::Error) -> Error {
    let user = config.listener.get_user().unwrap_or("(none)");
    let what = match error.code() {
        Some(&SqlState::INVALID_PASSWORD | &SqlState::INVALID_AUTHORIZATION_SPECIFICATION) => {
            format!("{} refused to let user {user} in", address(&config.listener))
        }
        Some(&SqlState::INVALID_CATALOG_NAME) => {
            let database = config.listener.get_dbname().unwrap_or(user);
            format!("{} has no database {database}", address(&config.listener))
        }
        _ => format!("cannot connect to {} as user {user}", address(&config.listener)),
    };
    Error::with(Kind::Unavailable, what, error)
}

fn setup_error(what: &str, error: tokio_postgres::Error) -> Error {
    match error.code() {
        Some(code) if is_missing(code.code()) => schema_too_old(),
        Some(code) if !is_shutdown(code.code()) => Error::with(Kind::Refused, what, error),
        _ => Error::with(Kind::Unavailable, what, error),
    }
}
