//! A connection of the pool that takes its place along when it is not known to be good.
//!
//! sqlx tries a connection before it takes it back, and waits for the answer without a limit. On a link that fell silent
//! that is a place less in the pool, for as long as the kernel hopes: a quarter of an hour, and five such are the pool.

use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

use sqlx::{PgPool, Postgres, pool::PoolConnection};
use tokio::time::timeout;

/// A connection that has just answered needs no longer to answer once more; if it does, the next one is new.
const ANSWER: Duration = Duration::from_secs(1);

/// A connection of the pool. Closed when it is dropped, also by a future that is cancelled, unless it was given back.
pub(crate) struct Lent {
    connection: Option<PoolConnection<Postgres>>,
    /// How many loads it has served since it was taken from the pool.
    pub(crate) loads: u32,
}

impl Lent {
    pub(crate) async fn acquire(pool: &PgPool) -> sqlx::Result<Self> {
        Ok(Self { connection: Some(pool.acquire().await?), loads: 0 })
    }

    /// Takes the connection back into the pool, unless it does not answer soon.
    pub(crate) fn give_back(mut self) {
        if let Some(mut connection) = self.connection.take() {
            tokio::spawn(timeout(ANSWER, connection.return_to_pool()));
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            drop(connection.detach());
        }
    }
}

impl Deref for Lent {
    type Target = PoolConnection<Postgres>;

    fn deref(&self) -> &Self::Target {
        self.connection.as_ref().expect("taken by nothing but `give_back` and `drop`")
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.connection.as_mut().expect("taken by nothing but `give_back` and `drop`")
    }
}
