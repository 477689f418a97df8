//! The line to Postgres that coherence hangs on: the LISTEN connection, and a second one that sends fences and polls the change
//! log. A node that does not listen has the second one alone, perhaps to a standby, perhaps through a transaction pooler, where
//! nothing is set and nothing prepared.
//!
//! The LISTEN connection is never used for anything else once it listens. While a backend executes a statement
//! it forwards no notifications, and a fence can wait for a lock behind a stuck writer (X11). Its task decodes
//! and hands over, and waits for nothing but the socket: a client that does not read makes Postgres keep every
//! session's messages.
//!
//! tokio-postgres, and not sqlx's `PgListener`, because that one reconnects on its own without telling: a gap
//! would be invisible (`tests/upstream.rs`).

use std::{
    collections::BTreeSet,
    future::poll_fn,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use futures_util::TryStreamExt as _;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinHandle,
    time::timeout,
};
use tokio_postgres::{
    AsyncMessage, Client, Connection, Row, RowStream, Statement,
    error::SqlState,
    types::{ToSql, Type},
};
use uuid::Uuid;

use crate::{
    change::CHANNEL,
    change_log::{Polled, Position},
    coherence::{Fence, Incarnation},
    config::Config,
    error::{Error, Kind, Result, with_causes},
    fleet,
    postgres::{
        catalog::{DESCRIBE, Description},
        hosts, is_missing, is_shutdown, schema_too_old,
    },
    server::{Answer, Hear, Line, Received},
    tables::Trust,
};

/// The oldest and the newest version of the schema that this library works with.
pub(crate) const SCHEMA_VERSIONS: std::ops::RangeInclusive<i32> = 2..=2;

/// Settings of both sessions. Nothing may time out an idle listener, nor the control session between two beats; a dead
/// peer must not hold the server's notification queue for hours; a fence must not wait for ever. Older servers lack some.
const SETTINGS: &str = "set statement_timeout = 0; set idle_in_transaction_session_timeout = 0; \
     set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3; \
     set default_transaction_isolation = 'read committed'; \
     select set_config(name, '0', false) from pg_settings where name in ('idle_session_timeout', 'transaction_timeout')";

const FINGERPRINTS: &str = "select name, fingerprint from rowcache.fingerprints($1)";

const POLL: &str = "select canary, started, standby, snapshot, lsn, horizon, xid, message from \
     rowcache.poll($1::text::xid8, $2::text[]::xid8[], $3::text[]::xid8[])";

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
    /// What nodes that listen refuse.
    pub(crate) standby: bool,
    control: Client,
    listener: Option<Listener>,
    phase: Arc<Phase>,
    fence: Option<Statement>,
    fingerprints: Ask,
    describe: Ask,
    poll: Ask,
    sending: JoinHandle<()>,
}

/// A statement of the control session.
enum Ask {
    Prepared(Statement),
    /// Sent anew each time: behind a transaction pooler the next one may meet another backend.
    Typed(&'static str, &'static [Type]),
}

impl Ask {
    async fn new(
        control: &Client,
        prepared: bool,
        sql: &'static str,
        types: &'static [Type],
        what: &str,
    ) -> Result<Self> {
        if !prepared {
            return Ok(Self::Typed(sql, types));
        }
        let statement = control.prepare_typed(sql, types).await;
        statement.map(Self::Prepared).map_err(|error| setup_error(&format!("preparing {what} failed"), error))
    }

    async fn rows(
        &self,
        control: &Client,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<RowStream, tokio_postgres::Error> {
        match self {
            Self::Prepared(statement) => control.query_raw(statement, parameters.iter().copied()).await,
            Self::Typed(sql, types) => {
                control.query_typed_raw(sql, parameters.iter().copied().zip(types.iter().cloned())).await
            }
        }
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.phase.end();
        self.sending.abort();
        if let Some(listener) = &self.listener {
            listener.task.abort();
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
    // Both connect at once, which is most of the work. Statements come one after the other: behind a pooler in transaction mode they
    // meet the same backend then, if nobody else is there, so that what is found out is that fences do not arrive.
    let received = move |message| hear.received(message);
    let (listener, control) = tokio::join!(
        async {
            if config.listen { connect(config, "listener", received, lost.clone()).await.map(Some) } else { Ok(None) }
        },
        connect(config, "control", |_| {}, lost.clone()),
    );
    let listener = match listener? {
        Some((client, task)) => Some(listen(config, own_channel, client, task).await?),
        None => None,
    };
    let (control, sending) = control?;
    if !config.pooler {
        let set = format!("{SETTINGS}; set lock_timeout = {}", lock_timeout(config));
        let failed = |error| setup_error("setting up the control session failed", error);
        control.batch_execute(&set).await.map_err(failed)?;
    }
    let (fence, (fingerprints, describe, poll)) =
        tokio::try_join!(prepare_fence(config, &control), prepare_asks(config, &control))?;
    let (incarnation, standby) = match &listener {
        Some(listener) => (listener.incarnation, false),
        None => look_around(&control).await?,
    };
    if !phase.begin() {
        return Err(Error::new(Kind::Unavailable, "a connection ended while the line was being opened"));
    }
    Ok(Sessions { incarnation, standby, control, listener, phase, fence, fingerprints, describe, poll, sending })
}

/// A session that listens.
struct Listener {
    /// Says nothing any more, but dropping it would end its connection.
    _client: Client,
    /// The server's end of it.
    pid: i32,
    incarnation: Incarnation,
    task: JoinHandle<()>,
}

async fn listen(config: &Config, own_channel: &str, client: Client, task: JoinHandle<()>) -> Result<Listener> {
    let (pid, incarnation) = prepare(&client).await?;
    let asked = if config.answers { format!("; listen {}", fleet::CHANNEL) } else { String::new() };
    let listen = format!("listen {CHANNEL}; listen \"{own_channel}\"{asked}");
    client.batch_execute(&listen).await.map_err(|error| setup_error("LISTEN failed", error))?;
    Ok(Listener { _client: client, pid, incarnation, task })
}

async fn prepare_fence(config: &Config, control: &Client) -> Result<Option<Statement>> {
    if !config.listen {
        return Ok(None);
    }
    let failed = |error| setup_error("preparing the fence failed", error);
    control.prepare_typed(FENCE, &[Type::TEXT, Type::TEXT]).await.map(Some).map_err(failed)
}

/// What is asked about triggers, twice, and of the change log.
async fn prepare_asks(config: &Config, control: &Client) -> Result<(Ask, Ask, Ask)> {
    let (prepared, checks) = (!config.pooler, "the check of triggers");
    tokio::try_join!(
        Ask::new(control, prepared, FINGERPRINTS, &[Type::TEXT_ARRAY], checks),
        Ask::new(control, prepared, DESCRIBE, &[Type::TEXT], checks),
        Ask::new(
            control,
            prepared,
            POLL,
            &[Type::TEXT, Type::TEXT_ARRAY, Type::TEXT_ARRAY],
            "the poll of the change log"
        ),
    )
}

/// For a node that does not listen: which server it is on, and whether that is a standby. Changes nothing of the session, which may
/// be others' too.
async fn look_around(control: &Client) -> Result<(Incarnation, bool)> {
    let setup = |error| setup_error("setting up the session that polls failed", error);
    check_version(control.query_typed_one("select rowcache.schema_version()", &[]).await.map_err(setup)?.get(0))?;
    let standby: bool = control.query_typed_one("select pg_is_in_recovery()", &[]).await.map_err(setup)?.get(0);
    if !standby {
        control.query_typed_one("select rowcache.incarnation()", &[]).await.map_err(setup)?;
    }
    let stamp = format!("select canary, started from {}", stamp_view(standby));
    Ok((read_incarnation(&control.query_typed_one(&stamp, &[]).await.map_err(setup)?)?, standby))
}

/// Where the stamp of a statement comes from. The primary's cannot be read on a standby, and the standby's is empty on a primary.
pub(crate) fn stamp_view(standby: bool) -> &'static str {
    if standby { "rowcache.standby_stamp" } else { "rowcache.stamp" }
}

fn read_incarnation(row: &Row) -> Result<Incarnation> {
    let canary: Option<Uuid> = row.get("canary");
    let canary = canary.ok_or_else(|| {
        Error::new(
            Kind::Unavailable,
            "the canary of schema `rowcache` disappeared while it was read, or a standby was promoted",
        )
    })?;
    Ok(Incarnation { canary, started: row.get("started") })
}

fn check_version(version: i32) -> Result<()> {
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
    Ok(())
}

/// One session; its task calls `received` and `lost`.
pub(crate) async fn connect(
    config: &Config,
    role: &str,
    received: impl Fn(Received) + Send + Sync + 'static,
    lost: impl FnOnce(String) + Send + 'static,
) -> Result<(Client, JoinHandle<()>)> {
    let mut settings = config.listener.clone();
    settings.application_name(session_name(config.called(), role));
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

/// Bytes of an `application_name` that the server keeps.
pub(crate) const NAME_MAX: usize = 63;

/// What a session calls itself. Cut, so that what it is for is kept: by that nodes find each other. What is not printable ASCII
/// becomes longer on newer servers.
fn session_name(name: &str, role: &str) -> String {
    let role = format!(" ({role})");
    printable(name, NAME_MAX - role.len()) + &role
}

pub(crate) fn printable(name: &str, max: usize) -> String {
    let shown = |char: char| if char == ' ' || char.is_ascii_graphic() { char } else { '?' };
    name.chars().take(max).map(shown).collect()
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
                received(match message.channel() {
                    CHANNEL => Received::Change(payload),
                    fleet::CHANNEL => Received::Question(payload),
                    _ => Received::Own(payload),
                });
            }
            Some(Ok(AsyncMessage::Notice(notice))) => tracing::debug!(%notice, "notice from Postgres"),
            Some(Ok(_)) => {}
            Some(Err(error)) => return with_causes(&error),
            None => return "closed".to_owned(),
        }
    }
}

/// Checks that this session can be a listener, and learns its process id, and which server it is on. All before LISTEN.
async fn prepare(listener: &Client) -> Result<(i32, Incarnation)> {
    let setup = |error| setup_error("setting up the LISTEN session failed", error);
    let row = listener.query_typed_one("select pg_is_in_recovery(), pg_backend_pid()", &[]).await.map_err(setup)?;
    if row.get(0) {
        return Err(Error::new(
            Kind::Standby,
            "the listener reached a standby, where Postgres does not allow LISTEN; connect it to the primary",
        ));
    }
    listener.batch_execute(SETTINGS).await.map_err(setup)?;
    check_version(listener.query_typed_one("select rowcache.schema_version()", &[]).await.map_err(setup)?.get(0))?;
    // A notification queue that was full stays so until somebody looks at it (`tests/faults/queue.rs`): whoever fails to send
    // makes no room. Our fences fail then, too, which ends the line and leads here.
    listener.batch_execute("select pg_notification_queue_usage(), rowcache.incarnation()").await.map_err(setup)?;
    let stamp = listener.query_typed_one("select canary, started from rowcache.stamp", &[]).await.map_err(setup)?;
    Ok((row.get(1), read_incarnation(&stamp)?))
}

impl Line for Sessions {
    fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    fn listener(&self) -> Option<i32> {
        self.listener.as_ref().map(|listener| listener.pid)
    }

    fn is_open(&self) -> bool {
        self.phase.is_open()
    }

    fn send<'a>(&'a self, own_channel: &'a str, fence: Fence) -> Answer<'a, bool> {
        Box::pin(async move {
            let statement = self.fence.as_ref().expect("only nodes that listen send fences");
            match self.control.execute(statement, &[&own_channel, &fence.nonce.to_string()]).await {
                Ok(_) => Ok(true),
                Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(false),
                Err(error) => Err(setup_error("sending a fence failed", error)),
            }
        })
    }

    fn fingerprints<'a>(&'a self, names: &'a [String]) -> Answer<'a, Vec<(String, Option<String>)>> {
        Box::pin(async move {
            let failed = |error| setup_error("checking triggers failed", error);
            let rows = self.fingerprints.rows(&self.control, &[&names]).await.map_err(failed)?;
            rows.map_ok(|row| (row.get(0), row.get(1))).try_collect().await.map_err(failed)
        })
    }

    fn verify<'a>(&'a self, name: &'a str) -> Answer<'a, Result<Trust, String>> {
        Box::pin(async move { Ok(self.describe(name).await?.whole()) })
    }

    fn poll<'a>(&'a self, since: Option<&'a Position>, read: &'a (dyn Fn(String) + Send + Sync)) -> Answer<'a, Polled> {
        Box::pin(async move {
            let failed = |error| setup_error("polling the change log failed", error);
            let texts = |xids: &mut dyn Iterator<Item = u64>| xids.map(|xid| xid.to_string()).collect::<Vec<_>>();
            let from = since.map(|since| since.since().to_string());
            let pending = since.map(|since| texts(&mut since.pending().iter().copied())).unwrap_or_default();
            let skip = since.map(|since| texts(&mut since.skip())).unwrap_or_default();
            let rows = self.poll.rows(&self.control, &[&from, &pending, &skip]).await.map_err(failed)?;
            let mut rows = pin!(rows);
            let (mut first, mut last) = (None, None);
            let (mut xids, mut messages) = (BTreeSet::new(), 0);
            while let Some(row) = rows.try_next().await.map_err(failed)? {
                if let Some(message) = row.get("message") {
                    read(message);
                    messages += 1;
                    xids.insert(row.get::<_, i64>("xid").cast_unsigned());
                } else if first.is_none() {
                    first = Some(row);
                } else {
                    last = Some(row);
                }
            }
            let (Some(first), Some(last)) = (first, last) else {
                return Err(Error::new(Kind::Refused, "polling the change log failed: its answer is not whole"));
            };
            let snapshot: String = first.get("snapshot");
            Ok(Polled {
                incarnation: read_incarnation(&first)?,
                standby: first.get("standby"),
                snapshot: snapshot.parse().map_err(|error: String| Error::new(Kind::Refused, error))?,
                // 0 covers nothing.
                lsn: first.get::<_, Option<i64>>("lsn").unwrap_or_default().cast_unsigned(),
                horizon: first.get::<_, i64>("horizon").cast_unsigned(),
                horizon_after: last.get::<_, i64>("horizon").cast_unsigned(),
                read: xids,
                messages,
            })
        })
    }

    fn trim(&self, before: Option<u64>) -> Answer<'_, bool> {
        Box::pin(async move {
            let failed = |error| setup_error("trimming the change log failed", error);
            let before = before.map(|xid| xid.to_string());
            let parameters: [(&(dyn ToSql + Sync), Type); 1] = [(&before, Type::TEXT)];
            let trim = "select rowcache.trim_log($1::text::xid8)";
            let row = self.control.query_typed_one(trim, &parameters).await.map_err(failed)?;
            Ok(row.get(0))
        })
    }
}

impl Sessions {
    /// A table as it is now.
    async fn describe(&self, name: &str) -> Result<Description> {
        let failed = |error| setup_error("verifying a table failed", error);
        let mut rows = pin!(self.describe.rows(&self.control, &[&name]).await.map_err(failed)?);
        let row = rows.try_next().await.map_err(failed)?;
        let row = row.ok_or_else(|| Error::new(Kind::Refused, "verifying a table failed: nothing was returned"))?;
        // To its end: what is left unread is in the way of the next statement.
        while rows.try_next().await.map_err(failed)?.is_some() {}
        Ok(Description {
            relation: row.get("relation"),
            relkind: row.get("relkind"),
            key_columns: row.get("key_columns"),
            key_types: row.get("key_types"),
            key_enums: row.get("key_enums"),
            columns: row.get("columns"),
            tracked: row.get("tracked"),
            problems: row.get("problems"),
            fingerprint: row.get("fingerprint"),
            secret: row.get("secret"),
            via: row.get("via"),
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

pub(crate) fn setup_error(what: &str, error: tokio_postgres::Error) -> Error {
    match error.code() {
        Some(code) if is_missing(code.code()) => schema_too_old(),
        Some(code) if !is_shutdown(code.code()) => Error::with(Kind::Refused, what, error),
        _ => Error::with(Kind::Unavailable, what, error),
    }
}
