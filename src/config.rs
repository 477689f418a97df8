//! Every knob of a node, with its unit, its default and the reason for it.

use std::{fmt, time::Duration};

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};

use crate::{
    coherence::Timing,
    error::{Error, Kind, Result},
    settings,
    tls::TlsConfig,
};

/// How a node reaches Postgres, and how it behaves. [`Config::from_url`] fills in everything; change the fields
/// you care about.
///
/// A node uses two kinds of connection, and they may go to different addresses. The **pool** loads rows; a
/// transaction pooler in between is fine. The **listener** must be a direct connection, or go through a pooler
/// in session mode: LISTEN does not survive transaction pooling.
///
/// ```
/// use std::time::Duration;
///
/// let mut config = rowcache::Config::from_url("postgres://app@db.internal/app")?;
/// config.load_timeout = Duration::from_secs(2);
/// # Ok::<(), rowcache::Error>(())
/// ```
#[derive(Clone)]
#[non_exhaustive]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct Config {
    /// Where the pool connects to.
    pub pool_connect: PgConnectOptions,
    /// The pool's size and time limits. The pool is the node's own, and nobody else's code runs on its connections:
    /// one that was left inside a transaction could load from an old snapshot. That is noticed, and nothing is kept then,
    /// unless the sessions' default isolation is above `read committed`: hooks must leave no transaction open, and are
    /// not called between two loads that follow each other within 10 ms. Default: at most 5 connections,
    /// [`loads_max`](Self::loads_max) and one for notifications, none of them held while idle for long.
    pub pool: PgPoolOptions,
    /// The connections of [`Node::begin`](crate::Node::begin), opened when they are wanted. They are apart from those that
    /// load, and go where [`pool_connect`](Self::pool_connect) says. Default: at most 5.
    pub write_pool: PgPoolOptions,
    /// Where the LISTEN connection, and a second one that sends fences, connect to. Two of each with
    /// [`redundant_listener`](Self::redundant_listener).
    pub listener: tokio_postgres::Config,
    /// TLS of the listener's connections. The pool's is part of [`pool_connect`](Self::pool_connect).
    pub listener_tls: TlsConfig,

    /// A fence is sent this long after the last one. Each takes one transaction id of the server and no disk
    /// flush. Default 1 s.
    pub beat: Duration,
    /// A fence that has not come back after this long is a gap: the connection is given up. Must be longer
    /// than `beat`. Default 3 s.
    pub beat_timeout: Duration,
    /// Entries are served for at most this long after the last fence that came back was *sent*: the bound on
    /// staleness when something between Postgres and this node is stuck. Must be longer than `beat`.
    /// Default 5 s.
    pub lease: Duration,
    /// Fences, which [`barrier`](crate::Node::barrier) shares among its callers, are at least this far apart.
    /// Default 5 ms, so that a busy node cannot use up more than 200 transaction ids a second.
    pub fence_spacing: Duration,

    /// What this node is called: on the list of nodes ([`Fleet`](crate::Fleet)), and, with what each is for, as the `application_name` of its
    /// connections (`web-7 (listener)`), where what is not printable ASCII becomes `?` and what does not fit into 63 bytes is cut. It need not be
    /// unique. Default `None`: the `application_name` of [`listener`](Self::listener), or `rowcache`.
    pub name: Option<String>,
    /// Where the service of this node can be reached, such as `http://10.0.0.7:8080`: shown to who asks for the list of nodes, and used for nothing
    /// else. Default `None`.
    pub address: Option<String>,
    /// Whether this node answers when somebody asks who there is ([`Node::fleet`](crate::Node::fleet), `rowcache nodes`): with its name, its host,
    /// its state, and the names and sizes of its tables. Anybody who may connect to the database can ask, and read the answer. An answer
    /// takes one notification, of at most 20 a second. Without, it is listed as silent. Default `true`.
    pub answers: bool,

    /// Keep two lines open, each a LISTEN connection and one that sends fences, so that losing one of them is no gap: the
    /// other one takes over, and nothing is forgotten. That covers a killed backend, a dropped or half-open connection
    /// and a restarted pooler; a restart of the server ends both lines. [`Event::Covered`](crate::Event::Covered) and
    /// [`Node::is_covered`](crate::Node::is_covered) tell when it holds. Default `false`: it takes two more connections
    /// of the server, decodes every message twice, and keeps up to [`inbox_bytes_max`](Self::inbox_bytes_max) more in
    /// memory, where a gap costs one reading of each row.
    pub redundant_listener: bool,

    /// Whether anything is cached. Without, every read goes to Postgres and nothing is kept: for tests of a service, and for emergencies; all
    /// else runs as it does with. [`Node::set_caching`](crate::Node::set_caching) changes it while the node runs. Default `true`.
    pub caching: bool,

    /// Whether this node hears NOTIFY. Without, it has no LISTEN connection, and caches only tables that are tracked by way of
    /// the change log (`rowcache track --via log`). Then a pooler in transaction mode may stand in between
    /// ([`pooler`](Self::pooler)), and all of it may be a hot standby: nothing is older than the standby itself was when it was
    /// last asked. Default `true`.
    pub listen: bool,
    /// A pooler in transaction mode stands between this node and its server, of any kind and version: nothing is prepared and
    /// nothing set in a session, and each load is a transaction, which takes two round trips more. Only without
    /// [`listen`](Self::listen). Not needed for a pool that goes through PgBouncer 1.21 or newer with
    /// `max_prepared_statements`. Default `false`.
    pub pooler: bool,
    /// While changes arrive by way of the change log, it is polled this long after the last poll. Default 10 ms:
    /// shorter costs the server more for each node, and brings less than a statement takes.
    pub poll_min: Duration,
    /// While none arrive, the pause between two polls grows up to this; a change may be noticed as late as that. Only nodes
    /// that have such tables open poll more often than once a [`beat`](Self::beat). Default 50 ms.
    pub poll_max: Duration,

    /// Polls as often as that without such a table, for whoever subscribes to events of tables that are not open.
    pub(crate) polls_always: bool,
    /// Messages stay in the change log for this long, and at most twice this; those of more than a million later transactions
    /// go earlier. A node that was away for longer forgets everything. Default 1 hour: it bounds for how long keys of changed rows
    /// can be read there, and costs one statement in that time. Never less than the [`lease`](Self::lease).
    pub log_retention: Duration,

    /// SQL statements that load rows at the same time, all tables together. At least 1. Default 4: each takes
    /// whatever has queued up meanwhile, so more statements mean smaller ones, not more rows.
    pub loads_max: usize,
    /// Keys in one statement. At least 1. Default 512: throughput hardly grows beyond.
    pub load_keys_max: usize,
    /// A load, with its wait for a connection of the pool, fails after this long. A call can take longer: it may wait for
    /// a turn among [`loads_max`](Self::loads_max) first, or for a load of its key that a change overtook. While Postgres
    /// refuses connections, the pool tries again for all of this time. Default 5 s.
    pub load_timeout: Duration,

    /// Messages received and not yet taken by the applier, in bytes; it takes all that there are at a time, so twice this
    /// can be in memory. Beyond it, everything is forgotten instead. Default 64 MiB.
    pub inbox_bytes_max: usize,
    /// Events that a slow [subscriber](crate::Node::subscribe) may be behind before it loses some.
    /// Default 4096.
    pub events_max: usize,
}

impl Config {
    /// Both kinds of connection to the address in `url`:
    ///
    /// ```text
    /// postgres://user:password@host:5432/database?sslmode=verify-full&sslrootcert=/etc/ca.pem
    /// ```
    ///
    /// Two drivers are at work, and they do not understand the same parameters. Only those that both can be
    /// given are accepted. No environment variable and no password file is read.
    ///
    /// # Errors
    ///
    /// [`is_config`](Error::is_config) for a parameter that cannot be honoured, which the message names.
    pub fn from_url(url: &str) -> Result<Self> {
        let target = settings::parse(url)?;
        Ok(Self::new(target.pool, target.listener, target.tls))
    }

    /// The two kinds of connection given apart, for instance a pool that goes through a transaction pooler and
    /// a listener that does not.
    #[must_use]
    pub fn new(pool_connect: PgConnectOptions, listener: tokio_postgres::Config, listener_tls: TlsConfig) -> Self {
        Self {
            pool_connect,
            pool: default_pool(),
            write_pool: PgPoolOptions::new().max_connections(5),
            listener,
            listener_tls,
            beat: Duration::from_secs(1),
            beat_timeout: Duration::from_secs(3),
            lease: Duration::from_secs(5),
            fence_spacing: Duration::from_millis(5),
            name: None,
            address: None,
            answers: true,
            redundant_listener: false,
            caching: true,
            listen: true,
            pooler: false,
            poll_min: Duration::from_millis(10),
            poll_max: Duration::from_millis(50),
            polls_always: false,
            log_retention: Duration::from_hours(1),
            loads_max: LOADS_MAX as usize,
            load_keys_max: 512,
            load_timeout: Duration::from_secs(5),
            inbox_bytes_max: 64 << 20,
            events_max: 4096,
        }
    }

    /// What [`Coherent`](crate::Freshness::Coherent) reads may miss at worst, whatever breaks: changes that became
    /// visible less than this long before the read began. It follows from [`lease`](Self::lease), which a thread holds against
    /// the clock every 10 ms. In between it is the time of a notification: a few milliseconds.
    ///
    /// ```
    /// let config = rowcache::Config::from_url("postgres://app@db.internal/app")?;
    /// assert_eq!(config.staleness_bound().as_millis(), 5010);
    /// # Ok::<(), rowcache::Error>(())
    /// ```
    #[must_use]
    pub fn staleness_bound(&self) -> Duration {
        self.lease.saturating_add(TICK)
    }

    /// What the node is called.
    pub(crate) fn called(&self) -> &str {
        self.name.as_deref().or(self.listener.get_application_name()).unwrap_or("rowcache")
    }

    pub(crate) fn timing(&self) -> Timing {
        Timing { beat: self.beat, beat_timeout: self.beat_timeout, lease: self.lease, spacing: self.fence_spacing }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |message| Err(Error::new(Kind::Config, message));
        if self.beat.is_zero() {
            return wrong("`beat` must be longer than zero");
        }
        if self.beat_timeout <= self.beat {
            return wrong("`beat_timeout` must be longer than `beat`, or every fence would be late");
        }
        if self.lease <= self.beat {
            return wrong("`lease` must be longer than `beat`, or it would run out between two fences");
        }
        if self.redundant_listener && !self.listen {
            return wrong("`redundant_listener` asks for two LISTEN connections, and without `listen` there is none");
        }
        if self.pooler && self.listen {
            return wrong("behind a `pooler` in transaction mode nothing can be heard: switch `listen` off");
        }
        if self.poll_min.is_zero() || self.poll_max < self.poll_min {
            return wrong("`poll_min` must be longer than zero, and `poll_max` not shorter than that");
        }
        if self.loads_max == 0 || self.load_keys_max == 0 {
            return wrong("`loads_max` and `load_keys_max` must be at least 1, or nothing could be loaded");
        }
        if self.events_max == 0 {
            return wrong("`events_max` must be at least 1");
        }
        if self.loads_max > COUNT_MAX || self.events_max > COUNT_MAX {
            return wrong("`loads_max` and `events_max` must be at most a million");
        }
        let times = [
            self.beat,
            self.beat_timeout,
            self.lease,
            self.fence_spacing,
            self.load_timeout,
            self.poll_max,
            self.log_retention,
        ];
        if times.iter().any(|it| *it > YEAR) {
            return wrong(
                "`beat`, `beat_timeout`, `lease`, `fence_spacing`, `load_timeout`, `poll_max` and `log_retention` must be at most \
                 a year",
            );
        }
        Ok(())
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without `pool_connect`, which would print its password.
        let Self {
            listener,
            beat,
            beat_timeout,
            lease,
            redundant_listener,
            name,
            listen,
            pooler,
            loads_max,
            load_keys_max,
            load_timeout,
            ..
        } = self;
        f.debug_struct("Config")
            .field("listener", listener)
            .field("beat", beat)
            .field("beat_timeout", beat_timeout)
            .field("lease", lease)
            .field("redundant_listener", redundant_listener)
            .field("name", name)
            .field("listen", listen)
            .field("pooler", pooler)
            .field("loads_max", loads_max)
            .field("load_keys_max", load_keys_max)
            .field("load_timeout", load_timeout)
            .finish_non_exhaustive()
    }
}

/// How often the clock thread looks at the lease. Entries may be served for this much longer than the lease.
pub(crate) const TICK: Duration = Duration::from_millis(10);

const COUNT_MAX: usize = 1_000_000;
const YEAR: Duration = Duration::from_hours(365 * 24);

const LOADS_MAX: u32 = 4;

/// Connections that were idle for longer than this are tried before they are used. Others are not: it would
/// double the time of a load, and a load that meets a dead connection takes another one.
const IDLE_UNTRIED: Duration = Duration::from_secs(1);

fn default_pool() -> PgPoolOptions {
    PgPoolOptions::new().max_connections(LOADS_MAX + 1).test_before_acquire(false).before_acquire(|connection, meta| {
        Box::pin(async move {
            if meta.idle_for > IDLE_UNTRIED {
                sqlx::Connection::ping(connection).await?;
            }
            Ok(true)
        })
    })
}
