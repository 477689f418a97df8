//! stub
use crate::{error::*, tls::TlsConfig};
pub(crate) struct Target {
    pub(crate) pool: sqlx::postgres::PgConnectOptions,
    pub(crate) listener: tokio_postgres::Config,
    pub(crate) tls: TlsConfig,
}
pub(crate) fn parse(url: &str) -> Result<Target> {
    Ok(Target {
        pool: url.parse().map_err(|e| Error::with(Kind::Config, "url", e))?,
        listener: url.parse().map_err(|e| Error::with(Kind::Config, "url", e))?,
        tls: TlsConfig,
    })
}
