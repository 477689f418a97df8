//! A Redis server that is thrown away, for tests of a tier: started, stopped, flushed, restored from an old dump.

use std::{fs, net::TcpListener, path::PathBuf, process::Stdio, time::Duration};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use redis::aio::MultiplexedConnection;
use tempfile::TempDir;
use tokio::{
    process::{Child, Command},
    time::{Instant, sleep},
};

/// A server of its own, on a port of its own. Dropping it kills it.
#[derive(Debug)]
pub struct RedisServer {
    port: u16,
    directory: TempDir,
    settings: Vec<String>,
    process: Option<Child>,
}

/// How long a server may take to start or to end.
const PATIENCE: Duration = Duration::from_secs(30);

impl Drop for RedisServer {
    /// Nothing of it is left when this returns.
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        if process.start_kill().is_ok() {
            let deadline = std::time::Instant::now() + Duration::from_secs(1);
            while matches!(process.try_wait(), Ok(None)) && std::time::Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl RedisServer {
    /// Whether there is a program to start.
    #[must_use]
    pub fn is_installed() -> bool {
        which::which("redis-server").is_ok()
    }

    /// Starts a server.
    ///
    /// # Errors
    ///
    /// If there is no program `redis-server`, or it does not answer.
    pub async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    /// As [`start`](Self::start), with further settings, as on its command line.
    ///
    /// # Errors
    ///
    /// As `start`.
    pub async fn start_with(settings: &[&str]) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        let mut server = Self { port, directory: tempfile::tempdir()?, settings, process: None };
        server.run().await?;
        Ok(server)
    }

    /// The port that it listens to, on this machine.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its address.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }

    /// Starts it again, with what was saved last.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub async fn run(&mut self) -> Result<()> {
        let mut command = Command::new("redis-server");
        command.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
        command.arg("--dir").arg(self.directory.path()).args(&self.settings);
        let process = command.stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn();
        self.process = Some(process.context("`redis-server` could not be started; Debian's package is redis-server")?);
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.ask::<String>(&["PING"]).await {
            if Instant::now() > deadline {
                bail!("redis-server does not answer: {error}");
            }
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Kills it. What was not saved is lost.
    ///
    /// # Errors
    ///
    /// If it cannot be killed.
    pub async fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill().await?;
        }
        Ok(())
    }

    /// Stops its process, as it is, or lets it go on.
    ///
    /// # Errors
    ///
    /// If it does not run.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let id = self.process.as_ref().and_then(Child::id).context("it does not run")?;
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        Ok(kill(Pid::from_raw(i32::try_from(id)?), signal)?)
    }

    fn dump(&self) -> PathBuf {
        self.directory.path().join("dump.rdb")
    }

    /// What is in it now, as the bytes of a dump.
    ///
    /// # Errors
    ///
    /// If it does not answer, or the file cannot be read.
    pub async fn save(&self) -> Result<Vec<u8>> {
        self.ask::<String>(&["SAVE"]).await?;
        Ok(fs::read(self.dump())?)
    }

    /// Kills it, and starts it with this dump.
    ///
    /// # Errors
    ///
    /// If it does not answer, or the file cannot be written.
    pub async fn restore(&mut self, dump: &[u8]) -> Result<()> {
        self.kill().await?;
        fs::write(self.dump(), dump)?;
        self.run().await
    }

    /// The answer to a command.
    ///
    /// # Errors
    ///
    /// If there is none, or one of another type.
    pub async fn ask<T: redis::FromRedisValue>(&self, command: &[&str]) -> Result<T> {
        let mut connection = self.connect().await?;
        let mut asked = redis::cmd(command[0]);
        asked.arg(&command[1..]);
        Ok(asked.query_async(&mut connection).await?)
    }

    /// A connection for whatever else is to be done to it.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub async fn connect(&self) -> Result<MultiplexedConnection> {
        Ok(redis::Client::open(self.url())?.get_multiplexed_async_connection().await?)
    }
}
