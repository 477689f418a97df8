//! Connects to the database that the user named.

use std::time::Duration;

use anyhow::{Context as _, Result};
use sqlx::{
    Connection as _, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::timeout;

use crate::Config;

/// A server that does not answer for this long is not there.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);

/// A small pool for commands. Fails at once where a pool alone would try again until its own time limit.
pub(crate) async fn connect(url: &str) -> Result<PgPool> {
    let options = Config::from_url(url)?.pool_connect;
    probe(&options).await?;
    Ok(PgPoolOptions::new().max_connections(4).acquire_timeout(CONNECT_WITHIN).connect_lazy_with(options))
}

async fn probe(options: &PgConnectOptions) -> Result<()> {
    let failed = || format!("cannot connect to {}", shown(options));
    let connection = timeout(CONNECT_WITHIN, PgConnection::connect_with(options)).await;
    let connection = connection.with_context(failed)?.with_context(failed)?;
    connection.close().await.with_context(failed)
}

/// The address without the password.
pub(crate) fn shown(options: &PgConnectOptions) -> String {
    let database = options.get_database().unwrap_or(options.get_username());
    format!("{}@{}:{}/{database}", options.get_username(), options.get_host(), options.get_port())
}
