//! A pool that loads are asked of: on another connection if one turns out to be dead, or to lead somewhere else.

use std::{
    future::Future,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use sqlx::{PgConnection, PgPool};
use tokio::time::{Instant, timeout_at};

use crate::{
    coherence::Incarnation,
    error::{Error, Kind, Result},
    postgres::{database_error, is_connection_error, kept::Kept},
    source::in_time,
};

/// The pool, and how it is asked.
pub(crate) struct Access {
    pub(crate) pool: PgPool,
    pub(crate) kept: Arc<Kept>,
    /// A pooler in transaction mode stands in between.
    pub(crate) pooler: bool,
    pub(crate) timeout: Duration,
    /// It leads to a standby.
    pub(crate) standby: Arc<AtomicBool>,
    /// Whether what has this stamp comes from the server that the node listens to, as far as it knows.
    pub(crate) ours: Box<dyn Fn(Option<Incarnation>) -> bool + Send + Sync>,
}

/// Something that reads, on one connection.
pub(crate) trait Attempt: Sync {
    type Answer: Send;

    fn run(&self, connection: &mut PgConnection) -> impl Future<Output = Result<Self::Answer, Failed>> + Send;

    /// What is being read, for messages.
    fn of(&self) -> String;

    /// The server that answered; `None` when it has lost its canary.
    fn answered_by(answer: &Self::Answer) -> Option<Incarnation>;
}

/// How an attempt failed.
pub(crate) enum Failed {
    Postgres(sqlx::Error),
    Otherwise(Error),
    /// The connection is not to be used again.
    Unusable(Error),
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self::Postgres(error)
    }
}

impl Access {
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    pub(crate) async fn attempt<A: Attempt>(&self, attempt: &A, deadline: Instant) -> Result<A::Answer> {
        // What ends one connection may have ended all that the pool has. The next one is new.
        let mut tries_left = self.pool.options().get_max_connections();
        loop {
            let mut connection = match timeout_at(deadline, self.kept.acquire()).await {
                Ok(Ok(connection)) => connection,
                Ok(Err(sqlx::Error::PoolTimedOut)) | Err(_) => return Err(self.no_connection(&attempt.of())),
                Ok(Err(error)) if is_connection_error(&error) && tries_left > 0 => {
                    tries_left -= 1;
                    continue;
                }
                Ok(Err(error)) => return Err(database_error(&format!("loading {}", attempt.of()), error)),
            };
            match in_time(deadline, attempt.run(&mut connection)).await {
                Some(Ok(answer)) => {
                    if (self.ours)(A::answered_by(&answer)) {
                        self.kept.give_back(connection);
                        return Ok(answer);
                    }
                    // To a server that was replaced, perhaps, and dropped: another one may lead to the right one.
                    if tries_left == 0 {
                        return Ok(answer);
                    }
                    tries_left -= 1;
                }
                // Dropped, not given back: it is broken.
                Some(Err(Failed::Postgres(error))) if is_connection_error(&error) && tries_left > 0 => tries_left -= 1,
                // Dropped too.
                Some(Err(Failed::Unusable(error))) => return Err(error),
                Some(Err(Failed::Postgres(error))) => {
                    connection.give_back();
                    return Err(database_error(&format!("loading {}", attempt.of()), error));
                }
                Some(Err(Failed::Otherwise(error))) => {
                    connection.give_back();
                    return Err(error);
                }
                // Dropped too: the statement may still be running, and the next user would have to wait for it.
                None => {
                    return Err(Error::new(
                        Kind::Timeout,
                        format!("loading {} took longer than {:?} (`load_timeout`)", attempt.of(), self.timeout),
                    ));
                }
            }
        }
    }

    /// The pool tries to connect for as long as it may, so a timeout can mean that all connections are in use,
    /// or that Postgres accepts none.
    fn no_connection(&self, what: &str) -> Error {
        let options = self.pool.options();
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
}
