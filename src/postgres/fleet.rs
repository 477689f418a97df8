//! Asks the nodes that listen on a database how they are, over a session of its own that listens for the answers.

use std::time::Duration;

use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, timeout, timeout_at},
};
use tokio_postgres::{
    Client,
    error::SqlState,
    types::{ToSql, Type},
};
use uuid::Uuid;

use crate::{
    config::Config,
    error::{Error, Kind, Result},
    fleet::{CHANNEL, Census, Fleet, FleetNode, Reply, answer_channel, question},
    postgres::line::{self, setup_error},
    server::Received,
};

/// A notification that does not wait for ever for the lock that orders commits: as that of a fence, its limit is its own.
pub(crate) const NOTIFY: &str = "select pg_catalog.pg_notify($1, $2), pg_catalog.set_config('lock_timeout', $3, true)";

/// The sessions that listen. Of others' sessions every role sees process id and name, and nothing else.
const SESSIONS: &str = "select pid, application_name, pg_catalog.host(client_addr), \
     extract(epoch from pg_catalog.clock_timestamp() - backend_start)::float8 \
     from pg_catalog.pg_stat_activity where datname = pg_catalog.current_database() \
     and application_name like '% (listener)' order by pid";

/// Answers that have arrived and were not looked at yet. Each takes some kilobytes, and anybody can send them.
const ANSWERS_MAX: usize = 1024;

/// A session that asks; ends when it is dropped.
struct Asking {
    client: Client,
    task: JoinHandle<()>,
    answers: mpsc::Receiver<String>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fleet {
    /// The nodes that listen on this database, and how they are: as [`Node::fleet`](crate::Node::fleet), for programs that are no
    /// node. Connects to where [`Config::listener`] says; of the settings, those of connections count, and
    /// [`beat_timeout`](Config::beat_timeout), which bounds how long connecting may take, and as long again until the question is sent.
    ///
    /// # Errors
    ///
    /// * [`is_unavailable`](Error::is_unavailable), [`is_timeout`](Error::is_timeout): the database cannot be asked now;
    /// * [`is_standby`](Error::is_standby), [`is_pooler`](Error::is_pooler): nor from here, where there is no NOTIFY. A pooler in
    ///   transaction mode that [`Config::pooler`] does not tell of is not noticed: all nodes seem to be silent;
    /// * [`is_refused`](Error::is_refused): Postgres refuses to tell who is connected.
    ///
    /// # Cancel safety
    ///
    /// Cancelling closes what was opened.
    pub async fn ask(config: &Config, deadline: Duration) -> Result<Self> {
        Ok(Self { deadline, nodes: ask(config, deadline).await? })
    }
}

/// Asks everybody, and waits for answers until all have come or so much time has passed.
pub(crate) async fn ask(config: &Config, deadline: Duration) -> Result<Vec<FleetNode>> {
    if config.pooler {
        return Err(Error::new(
            Kind::Pooler,
            "nodes cannot be asked through a pooler in transaction mode, which swallows their answers; ask over a direct connection",
        ));
    }
    let limit = config.beat_timeout.max(Duration::from_secs(1));
    let late = |_| Err(Error::new(Kind::Timeout, format!("Postgres did not answer within {limit:?}")));
    let (sender, answers) = mpsc::channel(ANSWERS_MAX);
    let received = move |received| {
        if let Received::Own(payload) = received {
            // Full only if somebody makes them up.
            let _ = sender.try_send(payload);
        }
    };
    let (client, task) = line::connect(config, "asking", received, |_| {}).await?;
    let mut session = Asking { client, task, answers };
    let mut census = timeout(limit, session.put_the_question(config)).await.unwrap_or_else(late)?;

    let until = Instant::now().checked_add(deadline);
    while !census.is_complete() {
        let answer = match until {
            Some(until) => timeout_at(until, session.answers.recv()).await,
            None => Ok(session.answers.recv().await),
        };
        match answer {
            Ok(Some(answer)) => Reply::parse(&answer).into_iter().for_each(|reply| census.answered(reply)),
            Ok(None) => {
                return Err(Error::new(Kind::Unavailable, "the connection was lost while nodes were answering"));
            }
            Err(_) => break,
        }
    }
    Ok(census.nodes())
}

impl Asking {
    /// Listens for answers, *then* looks who there is, *then* asks. So whoever is on the list can be heard; and who comes later is
    /// heard too, if it answers.
    async fn put_the_question(&mut self, config: &Config) -> Result<Census> {
        let nonce = Uuid::new_v4();
        let failed = |error| setup_error("asking the nodes failed", error);
        if self.client.query_typed_one("select pg_catalog.pg_is_in_recovery()", &[]).await.map_err(failed)?.get(0) {
            return Err(Error::new(
                Kind::Standby,
                "nodes cannot be asked on a standby, where Postgres does not allow LISTEN; connect to the primary",
            ));
        }
        self.client.batch_execute(&format!("listen {}", answer_channel(nonce))).await.map_err(failed)?;
        let sessions = self.client.query_typed(SESSIONS, &[]).await.map_err(failed)?;
        let listed = sessions.iter().map(|row| {
            let session: String = row.get(1);
            FleetNode {
                name: session.strip_suffix(" (listener)").unwrap_or(&session).to_owned(),
                listener_pid: row.get(0),
                client: row.get(2),
                connected: row.get::<_, Option<f64>>(3).and_then(|since| Duration::try_from_secs_f64(since).ok()),
                is_this: false,
                report: None,
            }
        });
        let census = Census::new(listed.collect());
        let (question, limit) = (question(nonce), line::lock_timeout(config).to_string());
        let parameters: [(&(dyn ToSql + Sync), Type); 3] =
            [(&CHANNEL, Type::TEXT), (&question, Type::TEXT), (&limit, Type::TEXT)];
        match self.client.query_typed(NOTIFY, &parameters).await {
            Ok(_) => Ok(census),
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                let stuck = "the question waited too long for the lock that orders commits; is a commit stuck?";
                Err(Error::with(Kind::Timeout, stuck, error))
            }
            Err(error) => Err(failed(error)),
        }
    }
}
