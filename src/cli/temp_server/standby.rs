//! A second server that follows the first, and takes over: what a failover is made of.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use tokio_postgres::NoTls;

use super::{Stop, TempServer};
use crate::cli::account::run;

impl TempServer {
    /// Makes a hot standby of this server, with the same options. This server is stopped while its files are copied, and
    /// then runs again.
    ///
    /// # Errors
    ///
    /// As for [`stop`](Self::stop) and [`start`](Self::start), of either server; the files cannot be copied.
    ///
    /// # Cancel safety
    ///
    /// This server may be stopped afterwards; the standby is gone.
    pub async fn standby(&mut self) -> Result<Self> {
        self.stop(Stop::Fast).await?;
        let mut options = self.options.clone();
        options.log_file = None;
        let mut standby = Self::prepare(options).await?;
        let mut copy = self.command(Path::new("cp"));
        copy.arg("-pR").arg(self.data_dir()).arg(standby.data_dir());
        run(copy).await?;
        let settings = standby.data_dir().join("postgresql.auto.conf");
        let text = fs::read_to_string(&settings).context("cannot read the settings of the copy")?;
        let primary = format!("primary_conninfo = 'host=127.0.0.1 port={} user=postgres'", self.port);
        standby.account.write_private(&settings, &format!("{text}{primary}\n"))?;
        standby.account.write_private(&standby.data_dir().join("standby.signal"), "")?;
        self.start().await?;
        standby.start_on_a_free_port().await?;
        Ok(standby)
    }

    /// Makes a primary of a standby; returns when it accepts writes. Its former primary is not told.
    ///
    /// # Errors
    ///
    /// It is no standby, or has not become a primary after a minute.
    ///
    /// # Cancel safety
    ///
    /// The promotion goes on.
    pub async fn promote(&self) -> Result<()> {
        let (client, connection) = tokio_postgres::connect(&self.admin_url(), NoTls).await?;
        let driver = tokio::spawn(connection);
        let promoted = client.query_one("select pg_promote()", &[]).await;
        driver.abort();
        ensure!(
            promoted.context("cannot promote the server")?.get::<_, bool>(0),
            "the server was not promoted in time"
        );
        Ok(())
    }
}
