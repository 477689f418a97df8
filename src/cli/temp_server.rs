//! A throw-away Postgres in a temporary directory, for `rowcache demo` and for this crate's tests.
//!
//! ```text
//! <home>/            mode 0700, owned by the user the server runs as
//!   data/            the database cluster, trust authentication, 127.0.0.1 only
//!   socket/          the unix socket
//!   server.log       stdout and stderr of the server, unless another file was asked for
//! ```
//!
//! **How it ends.** Dropping a [`TempServer`] stops the server and removes `<home>`, also while a panic unwinds. A process
//! that is killed drops nothing, and one that leaves by `exit` drops no statics; for these there is a *watchdog*: a shell
//! that reads from a pipe whose only other end we hold. The kernel closes our end however we die; the shell then sees
//! the end of its input, stops the server and removes `<home>`. If even the watchdog is killed, `<home>` stays, and so
//! does the server, until somebody removes the directory (Postgres looks every minute whether its lock file is there).
//!
//! Server and watchdog have process groups of their own, so that Ctrl-C on the terminal reaches us first and we can
//! still use the database while we stop.
//!
//! **Who can connect**: everybody on this machine, as a superuser, without a password, as long as it runs.
//!
//! **As root** everything runs as the user `postgres`, else `nobody`, since Postgres refuses to run as root.

mod standby;

use std::{
    fmt::Write as _,
    fs::{self, File, OpenOptions, Permissions},
    marker::PhantomData,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio_postgres::NoTls;

use super::{
    account::{Account, run},
    programs::{Programs, download, download_home},
};

/// How long a server may take to accept connections or to stop. A start takes a second; the rest is for crash recovery
/// on a loaded machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// Between two looks at something that gives no event (a starting server, an ending process).
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// `$0` is `<home>`. The pid is read only now: a pid remembered from the start could long be somebody else's.
/// `kill -0` also succeeds for a dead process that nobody has reaped, hence the limit.
const WATCHDOG: &str = r#"
    cat >/dev/null
    if read -r pid 2>/dev/null <"$0/data/postmaster.pid"; then
        kill -QUIT "$pid" && kill -CONT "$pid"
        tries=0
        while kill -0 "$pid" && [ $tries -lt 100 ]; do tries=$((tries + 1)); sleep 0.1; done
    fi 2>/dev/null
    rm -rf "$0"
"#;

/// How [`TempServer::stop`] stops.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stop {
    /// Ends all connections, writes everything down, exits (SIGINT).
    Fast,
    /// Exits at once, as in a crash; the next start recovers (SIGQUIT).
    Immediate,
}

/// How a [`TempServer`] is to be. Made by [`TempServer::options`].
#[derive(Clone, Debug, Default)]
pub struct Options {
    bin_dir: Option<PathBuf>,
    download: bool,
    settings: Vec<(String, String)>,
    files: Vec<(String, String)>,
    log_file: Option<PathBuf>,
}

impl Options {
    /// Uses the programs in this directory and no others. Default: what is found on this machine.
    #[must_use]
    pub fn bin_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.bin_dir = Some(dir.into());
        self
    }

    /// Downloads Postgres when there is none on this machine. Default: that is an error.
    #[must_use]
    pub fn download_if_missing(mut self) -> Self {
        self.download = true;
        self
    }

    /// Sets a server setting, as in `postgres -c name=value`. The last one of a name wins.
    #[must_use]
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Writes a file into the data directory before the first start, readable by the server alone: a certificate and
    /// its key, a `pg_hba.conf`.
    #[must_use]
    pub fn data_file(mut self, name: &str, contents: &str) -> Self {
        self.files.push((name.to_owned(), contents.to_owned()));
        self
    }

    /// Where the server's log goes. Default: a file in the temporary directory, gone with it.
    #[must_use]
    pub fn log_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.log_file = Some(path.into());
        self
    }

    /// Makes the cluster, starts the server, and returns when it accepts connections.
    ///
    /// # Errors
    ///
    /// No usable Postgres on this machine; a directory the server's user cannot enter; a server that does not start (with
    /// the end of its log).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops what was started and removes the directory.
    pub async fn start(self) -> Result<TempServer> {
        let mut server = TempServer::prepare(self).await?;
        let mut initdb = server.command(&server.programs.dir.join("initdb"));
        initdb.args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]);
        initdb.arg("--pgdata").arg(server.data_dir());
        run(initdb).await?;
        for (name, contents) in &server.options.files {
            server.account.write_private(&server.data_dir().join(name), contents)?;
        }
        server.start_on_a_free_port().await?;
        Ok(server)
    }
}

/// A running (or stopped) throw-away Postgres; see the module's documentation for how it ends.
#[derive(Debug)]
pub struct TempServer {
    options: Options,
    programs: Programs,
    account: Account,
    home: TempDir,
    watchdog: Option<Child>,
    /// 0 until the first start.
    port: u16,
    postmaster: Option<Child>,
}

impl TempServer {
    /// The default options: the Postgres that is found on this machine, nothing set.
    #[must_use]
    pub fn options() -> Options {
        Options::default()
    }

    /// All that comes before the cluster: programs, directory, watchdog.
    async fn prepare(options: Options) -> Result<Self> {
        let account = Account::choose()?;
        let home = tempfile::Builder::new()
            .prefix("rowcache-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .context("cannot make a temporary directory")?;
        let socket_dir = home.path().join("socket");
        fs::create_dir(&socket_dir)?;
        account.own(home.path())?;
        account.own(&socket_dir)?;
        account.check_can_enter(home.path(), "set TMPDIR to a directory that everybody can enter").await?;

        let programs = match &options.bin_dir {
            Some(dir) => Programs::in_dir(dir)?,
            None => match Programs::find() {
                // Another user could not enter our own cache directory.
                Err(_) if options.download => match download_home().filter(|_| !account.is_other()) {
                    Some(dir) => download(&dir).await?,
                    None => download(home.path()).await?,
                },
                found => found?,
            },
        };
        account.check_can_enter(&programs.dir, "put PostgreSQL into a directory that everybody can enter").await?;

        let mut server = Self { options, programs, account, home, watchdog: None, port: 0, postmaster: None };
        let mut watchdog = server.command(Path::new("/bin/sh"));
        watchdog.args(["-c", WATCHDOG]).arg(server.home.path()).stdin(Stdio::piped());
        server.watchdog = Some(watchdog.spawn().context("cannot start /bin/sh")?);
        Ok(server)
    }

    fn command(&self, program: &Path) -> Command {
        self.account.command(program, self.home.path())
    }

    /// Nobody can reserve a port for a program that binds it itself: take one that was free a moment ago, and another
    /// one if somebody was faster.
    async fn start_on_a_free_port(&mut self) -> Result<()> {
        let mut attempts_left = 5;
        loop {
            self.port = TcpListener::bind(("127.0.0.1", 0)).context("no free port on 127.0.0.1")?.local_addr()?.port();
            attempts_left -= 1;
            match self.start().await {
                Err(error) if attempts_left > 0 && format!("{error:#}").contains("could not bind") => {}
                result => return result,
            }
        }
    }

    /// Starts a stopped server again: same data, same port.
    ///
    /// # Errors
    ///
    /// It already runs; or it does not come up (the error has the end of its log).
    ///
    /// # Cancel safety
    ///
    /// The server may be running afterwards; [`stop`](Self::stop) or dropping it ends it.
    pub async fn start(&mut self) -> Result<()> {
        ensure!(self.postmaster.is_none(), "the server on port {} already runs", self.port);
        let log = OpenOptions::new().create(true).append(true).open(self.log_file());
        let log: File = log.with_context(|| format!("cannot write {}", self.log_file().display()))?;
        let log_from = log.metadata()?.len();
        let mut postgres = self.command(&self.programs.dir.join("postgres"));
        postgres.arg("-D").arg(self.data_dir()).arg("-p").arg(self.port.to_string());
        postgres.arg("-k").arg(self.socket_dir());
        postgres.args(["-c", "listen_addresses=127.0.0.1"]);
        for (name, value) in &self.options.settings {
            postgres.arg("-c").arg(format!("{name}={value}"));
        }
        postgres.stdout(log.try_clone()?).stderr(log);
        self.postmaster = Some(postgres.spawn().context("cannot start postgres")?);
        self.wait_until_ready(log_from).await
    }

    async fn wait_until_ready(&mut self, log_from: u64) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let failure = match self.probe().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let exited = match &mut self.postmaster {
                Some(postmaster) => postmaster.try_wait()?,
                None => bail!("the server was stopped while it started"),
            };
            if let Some(status) = exited {
                self.postmaster = None;
                bail!("the server did not start ({status}); its log ends with:\n{}", self.log_tail(log_from));
            }
            ensure!(
                Instant::now() < deadline,
                "no connection to the server after {PATIENCE:?} ({failure:#}); its log ends with:\n{}",
                self.log_tail(log_from)
            );
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// One real connection; also shows that the server on this port is ours and not one that was faster.
    async fn probe(&self) -> Result<()> {
        let (client, connection) = tokio_postgres::connect(&self.admin_url(), NoTls).await?;
        let driver = tokio::spawn(connection);
        let answer = client.query_one("select current_setting('data_directory')", &[]).await;
        driver.abort();
        let directory: String = answer?.get(0);
        ensure!(
            Path::new(&directory) == self.data_dir(),
            "another server, of {directory}, has taken port {}",
            self.port
        );
        Ok(())
    }

    /// Stops the server; [`start`](Self::start) continues with the same data. Does nothing when it is stopped already.
    ///
    /// # Errors
    ///
    /// The server is still there after a minute.
    ///
    /// # Cancel safety
    ///
    /// The server stops all the same; call it again to wait for it.
    pub async fn stop(&mut self, how: Stop) -> Result<()> {
        let signal = match how {
            Stop::Fast => Signal::SIGINT,
            Stop::Immediate => Signal::SIGQUIT,
        };
        self.signal_postmaster(signal)?;
        let deadline = Instant::now() + PATIENCE;
        while !self.has_exited()? {
            ensure!(Instant::now() < deadline, "the server did not stop within {PATIENCE:?}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    /// [`stop`](Self::stop), then [`start`](Self::start).
    ///
    /// # Errors
    ///
    /// As for these two.
    ///
    /// # Cancel safety
    ///
    /// As for these two: running or stopped.
    pub async fn restart(&mut self, how: Stop) -> Result<()> {
        self.stop(how).await?;
        self.start().await
    }

    fn has_exited(&mut self) -> Result<bool> {
        let exited = match &mut self.postmaster {
            Some(postmaster) => postmaster.try_wait().context("cannot ask for the server's state")?.is_some(),
            None => true,
        };
        if exited {
            self.postmaster = None;
        }
        Ok(exited)
    }

    fn signal_postmaster(&self, signal: Signal) -> Result<()> {
        if let Some(postmaster) = &self.postmaster {
            let pid = pid_of(postmaster.id());
            kill(pid, signal).with_context(|| format!("cannot send {signal} to the server"))?;
            // A server that was frozen would see the signal only when it thaws.
            kill(pid, Signal::SIGCONT).with_context(|| format!("cannot send SIGCONT to process {pid}"))?;
        }
        Ok(())
    }

    /// Kills one server process by its pid (`pg_backend_pid()`) with SIGKILL. The others then end too, and the server
    /// recovers by itself, as after a crash.
    ///
    /// # Errors
    ///
    /// There is no such process.
    pub fn kill_backend(&self, pid: i32) -> Result<()> {
        kill(Pid::from_raw(pid), Signal::SIGKILL).with_context(|| format!("cannot kill process {pid}"))
    }

    /// Freezes every process of the server (SIGSTOP): connections stay open and nothing answers, as when a machine hangs.
    /// Dropping what it returns lets them run again.
    ///
    /// # Errors
    ///
    /// The server cannot be asked for its processes.
    ///
    /// # Cancel safety
    ///
    /// Nothing stays frozen.
    pub async fn freeze(&self) -> Result<Frozen<'_>> {
        let (client, connection) = tokio_postgres::connect(&self.admin_url(), NoTls).await?;
        let driver = tokio::spawn(connection);
        let mut frozen = Frozen { pids: Vec::new(), server: PhantomData };
        // The parent first: it cannot start further processes then, and the list below is complete.
        let postmaster = self.postmaster.as_ref().context("the server is stopped")?;
        frozen.stop(pid_of(postmaster.id()))?;
        let rows = client.query("select pid from pg_stat_activity", &[]).await?;
        for row in rows {
            frozen.stop(Pid::from_raw(row.get(0)))?;
        }
        driver.abort();
        Ok(frozen)
    }

    /// The connection URL of a database, for the superuser `postgres`; trust authentication, so without a password.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// [`url`](Self::url) of the database `postgres`.
    #[must_use]
    pub fn admin_url(&self) -> String {
        self.url("postgres")
    }

    /// The TCP port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The directory of the unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> PathBuf {
        self.home.path().join("socket")
    }

    /// The cluster's data directory.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.home.path().join("data")
    }

    /// The server's log.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.options.log_file.clone().unwrap_or_else(|| self.home.path().join("server.log"))
    }

    /// The server's version as its programs print it: `15.18`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.programs.version
    }

    /// The path of a program that fits this server: `psql`, `pg_basebackup`, …
    ///
    /// # Errors
    ///
    /// There is none, neither in the server's directory nor on `PATH`.
    pub fn bin(&self, name: &str) -> Result<PathBuf> {
        self.programs.path(name)
    }

    /// The last lines the server has logged since the byte `from`.
    fn log_tail(&self, from: u64) -> String {
        let bytes = fs::read(self.log_file()).unwrap_or_default();
        let new = usize::try_from(from).ok().and_then(|from| bytes.get(from..)).unwrap_or(&bytes);
        let text = String::from_utf8_lossy(new);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].iter().fold(String::new(), |mut tail, line| {
            let _ = writeln!(tail, "  {line}"); // writing to a String cannot fail
            tail
        })
    }
}

impl Drop for TempServer {
    fn drop(&mut self) {
        // Nothing is worth saving, and nobody is there to read an error.
        let _ = self.signal_postmaster(Signal::SIGQUIT);
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.has_exited(), Ok(false)) && Instant::now() < deadline {
            thread::sleep(LOOK_EVERY);
        }
        let _ = fs::remove_dir_all(self.home.path());
        if let Some(mut watchdog) = self.watchdog.take() {
            // Closing its input ends it; there is nothing left for it to do.
            drop(watchdog.stdin.take());
            let _ = watchdog.wait();
        }
    }
}

/// Frozen server processes; they run again when this is dropped.
#[derive(Debug)]
#[must_use = "the server thaws when this is dropped"]
pub struct Frozen<'a> {
    pids: Vec<Pid>,
    /// The server cannot be stopped or dropped meanwhile: it would wait in vain for its processes.
    server: PhantomData<&'a TempServer>,
}

impl Frozen<'_> {
    fn stop(&mut self, pid: Pid) -> Result<()> {
        kill(pid, Signal::SIGSTOP).with_context(|| format!("cannot stop process {pid}"))?;
        self.pids.push(pid);
        Ok(())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        for pid in &self.pids {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

fn pid_of(id: u32) -> Pid {
    Pid::from_raw(i32::try_from(id).expect("the kernel's pids fit an i32"))
}
