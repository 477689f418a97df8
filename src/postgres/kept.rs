//! Connections between two loads.
//!
//! sqlx tries a connection before it takes it back: one more round trip, during which the next load needs another connection. That is
//! as much work as a load of one row. So one that has just answered is kept for the next load; it goes back when none has come for a
//! while, when it has served often, or when the pool has no other one left for whoever waits.

use std::{sync::Arc, time::Duration};

use sqlx::PgPool;
use tokio::{
    runtime::Handle,
    time::{Instant, sleep},
};

use crate::{
    postgres::lent::Lent,
    sync::{Mutex, lock},
};

/// How long one is kept that no load wants, at least; at most twice as long.
const KEPT: Duration = Duration::from_millis(10);
/// So that the pool sees each from time to time, to end those that are too old.
const LOADS_MAX: u32 = 100;

/// What loads have lent from a pool, and have not given back.
pub(crate) struct Kept {
    pool: PgPool,
    /// The node's: that of a load may end before it.
    runtime: Handle,
    /// No other lock is taken under it.
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// The last one has been idle for the shortest time.
    connections: Vec<(Lent, Instant)>,
    /// Somebody will give back what stays idle.
    is_watched: bool,
}

impl Kept {
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub(crate) fn new(pool: PgPool) -> Arc<Self> {
        Arc::new(Self { pool, runtime: Handle::current(), idle: Mutex::default() })
    }

    /// One that was kept, or one of the pool.
    pub(crate) async fn acquire(&self) -> sqlx::Result<Lent> {
        let kept = lock(&self.idle).connections.pop();
        match kept {
            Some((connection, _)) => Ok(connection),
            None => Lent::acquire(&self.pool).await,
        }
    }

    /// Takes back a connection that has just answered.
    pub(crate) fn give_back(self: &Arc<Self>, mut connection: Lent) {
        connection.loads += 1;
        let pool = &self.pool;
        let has_others = pool.size() < pool.options().get_max_connections() || pool.num_idle() > 0;
        if !has_others || connection.loads >= LOADS_MAX || pool.is_closed() {
            return connection.give_back();
        }
        let mut idle = lock(&self.idle);
        idle.connections.push((connection, Instant::now()));
        if !std::mem::replace(&mut idle.is_watched, true) {
            self.runtime.spawn(Arc::clone(self).watch());
        }
    }

    /// Gives back what has been idle for [`KEPT`], until nothing is kept.
    async fn watch(self: Arc<Self>) {
        loop {
            sleep(KEPT).await;
            let mut idle = lock(&self.idle);
            let still = idle.connections.iter().take_while(|(_, since)| since.elapsed() >= KEPT).count();
            let rest: Vec<_> = idle.connections.drain(..still).collect();
            let is_watched = !idle.connections.is_empty();
            idle.is_watched = is_watched;
            drop(idle);
            for (connection, _) in rest {
                connection.give_back();
            }
            if !is_watched {
                return;
            }
        }
    }

    /// Gives back all that are idle.
    pub(crate) fn clear(&self) {
        let all = std::mem::take(&mut lock(&self.idle).connections);
        for (connection, _) in all {
            connection.give_back();
        }
    }
}
