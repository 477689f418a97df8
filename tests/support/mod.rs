//! The test ground: real servers of the oldest and the newest supported Postgres, a fresh database for every test, a TCP
//! proxy that misbehaves on command ([`proxy`]), and a witness of everything that is logged ([`logs`]).
//!
//! ```text
//! use crate::support::{database, server};
//!
//! pg_test! {
//!     async fn a_fresh_database_is_empty(test: Test) {
//!         let db = database(test.version).await;          // on a server shared by all tests of this process
//!         let own = server(test.version, &[]).await;      // or a server that this test may stop and crash
//!     }
//! }
//! ```
//!
//! Each body becomes two tests, `…::on_15` and `…::on_18`. There is no sleep in a test: it waits for something that has a
//! name, by [`eventually`], [`Notifications::all_so_far`] or a deadline that says what it waited for.
//!
//! Postgres 15 is what this machine has installed, or `ROWCACHE_TEST_PG15_BIN`. Postgres 18 is
//! `ROWCACHE_TEST_PG18_BIN`, or what `tests/support/install-postgres-18.sh` has put under `target/`; without it its tests
//! say on stderr that they are skipped. With `ROWCACHE_TEST_REQUIRE_ALL` set they fail instead.
//!
//! The shared servers end with the process: `TempServer`'s watchdog sees to it, as a static is never dropped.

#![allow(dead_code)] // every test program compiles all of this and uses its part

pub mod logs;

use std::{
    cell::RefCell,
    env,
    future::Future,
    io::{self, Write as _},
    ops::Deref,
    panic,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use rowcache::cli::temp_server::{Options, TempServer};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::{
    sync::{OnceCell, mpsc},
    task::JoinHandle,
    time::timeout,
};
use tokio_postgres::{AsyncMessage, Client, NoTls, Notification};

pub use logs::Logs;
#[allow(unused_imports)] // every test program compiles all of this and uses its part
pub use rowcache::verify::proxy;

/// For everything a test waits for. Much longer than anything takes; what never comes is reported after it.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Writes the same test for every supported version of Postgres; see the module's example.
///
/// Each gets a runtime of two threads, a limit of four times [`PATIENCE`], and fails when this crate has logged a WARN or
/// an ERROR that the body did not announce with [`Logs::allow`].
macro_rules! pg_test {
    ($($(#[$meta:meta])* async fn $name:ident($test:ident: Test) $body:block)+) => {$(
        mod $name {
            #[allow(unused_imports)] // not every body needs one
            use super::*;
            async fn body($test: $crate::support::Test) $body
            $(#[$meta])* #[test]
            fn on_15() {
                $crate::support::run(concat!(module_path!(), "::on_15"), $crate::support::Version::V15, body);
            }
            $(#[$meta])* #[test]
            fn on_18() {
                $crate::support::run(concat!(module_path!(), "::on_18"), $crate::support::Version::V18, body);
            }
        }
    )+};
}

/// A supported version of Postgres.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Version {
    /// The oldest.
    V15,
    /// The newest.
    V18,
}

impl Version {
    pub const ALL: [Self; 2] = [Self::V15, Self::V18];

    pub fn major(self) -> u32 {
        match self {
            Self::V15 => 15,
            Self::V18 => 18,
        }
    }

    /// The directory of its programs; the inner `None` stands for what is installed on this machine.
    fn programs(self) -> Result<Option<PathBuf>, String> {
        let variable = format!("ROWCACHE_TEST_PG{}_BIN", self.major());
        if let Some(dir) = env::var_os(&variable) {
            return Ok(Some(dir.into()));
        }
        if self == Self::V15 {
            return Ok(None);
        }
        let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/postgres-18");
        let mut found: Vec<_> =
            installed.read_dir().into_iter().flatten().flatten().map(|e| e.path().join("bin")).collect();
        found.retain(|dir| dir.join("postgres").is_file());
        found.sort();
        found.pop().map(Some).ok_or(format!("run tests/support/install-postgres-18.sh, or set {variable}"))
    }
}

/// What the body of a [`pg_test!`] gets.
#[derive(Debug)]
pub struct Test {
    pub version: Version,
    pub logs: Logs,
}

/// Runs one test; called by [`pg_test!`].
pub fn run<F: Future<Output = ()>>(name: &str, version: Version, body: fn(Test) -> F) {
    if let Err(cure) = version.programs() {
        assert!(env::var_os("ROWCACHE_TEST_REQUIRE_ALL").is_none(), "no PostgreSQL {}: {cure}", version.major());
        // Not `eprintln!`: the test runner would swallow it, and a skipped test must be seen.
        writeln!(io::stderr(), "SKIPPED {name}: no PostgreSQL {}; {cure}", version.major()).expect("stderr is open");
        return;
    }
    let logs = Logs::default();
    let _here = logs.witness_this_thread();
    let on_threads = logs.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .on_thread_start(move || on_threads.witness_this_thread_for_good())
        .build()
        .expect("a runtime");
    let test = Test { version, logs: logs.clone() };
    let finished = runtime.block_on(async { timeout(4 * PATIENCE, body(test)).await });
    assert!(finished.is_ok(), "{name} still runs after {:?}; it logged:\n{logs}", 4 * PATIENCE);
    logs.assert_nothing_unexpected();
    // What all tests of a program would leave behind are gigabytes.
    runtime.block_on(async {
        for name in CREATED.take() {
            let admin = connect(&shared_server(version).await.admin_url()).await;
            // It goes with its server if something still needs it, such as a prepared transaction.
            let _ = admin.batch_execute(&format!("drop database {name} with (force)")).await;
        }
    });
}

thread_local! {
    /// The databases that the test of this thread has on the shared server.
    static CREATED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// The options of a server for tests: many small connections, no waiting for the disk. Later settings win.
pub fn server_options(version: Version) -> Options {
    let programs = version.programs().unwrap_or_else(|cure| panic!("no PostgreSQL {}: {cure}", version.major()));
    let options = TempServer::options()
        .setting("max_connections", "300")
        .setting("shared_buffers", "16MB")
        .setting("fsync", "off")
        .setting("max_prepared_transactions", "20")
        .setting("autovacuum_naptime", "1h");
    match programs {
        Some(dir) => options.bin_dir(dir),
        None => options,
    }
}

/// A server of its own, for a test that stops, crashes or freezes it. Ends when it is dropped.
pub async fn server(version: Version, settings: &[(&str, &str)]) -> TempServer {
    let options = settings.iter().fold(server_options(version), |options, (name, value)| options.setting(name, value));
    start(version, options).await
}

async fn start(version: Version, options: Options) -> TempServer {
    let server = options.start().await.unwrap_or_else(|error| panic!("{error:#}"));
    if !server.version().starts_with(&version.major().to_string()) {
        let line = format!("NOTE: in place of PostgreSQL {} these tests use {}", version.major(), server.version());
        writeln!(io::stderr(), "{line}").expect("stderr is open");
    }
    server
}

/// The server that all tests of this process share. Do not stop it, and change nothing that is not in your database.
pub async fn shared_server(version: Version) -> &'static TempServer {
    static SHARED: [OnceCell<TempServer>; 2] = [OnceCell::const_new(), OnceCell::const_new()];
    SHARED[version as usize].get_or_init(|| start(version, server_options(version))).await
}

/// A fresh, empty database on the shared server.
pub async fn database(version: Version) -> TestDb {
    let database = database_on(shared_server(version).await, version).await;
    CREATED.with_borrow_mut(|created| created.push(database.name.clone()));
    database
}

/// A fresh, empty database on this server.
pub async fn database_on(server: &TempServer, version: Version) -> TestDb {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    // The name says in the server's log and in pg_stat_activity whose it is; identifiers have at most 63 bytes, and roles are
    // named after it.
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("unnamed").replace(|c: char| !c.is_ascii_alphanumeric(), "_").to_lowercase();
    let name = format!("t{}_{}", NEXT.fetch_add(1, Ordering::Relaxed), &test[..test.len().min(40)]);
    let admin = connect(&server.admin_url()).await;
    admin.batch_execute(&format!("create database {name} template template0")).await.expect("create database");
    TestDb { url: server.url(&name), name, version, port: server.port() }
}

/// A database for one test. It goes when its test has ended well, or else with its server.
#[derive(Clone, Debug)]
pub struct TestDb {
    pub url: String,
    pub name: String,
    pub version: Version,
    pub port: u16,
}

impl TestDb {
    /// A pool as a service would have one.
    pub async fn pool(&self) -> PgPool {
        let options = PgPoolOptions::new().max_connections(20).acquire_timeout(PATIENCE);
        options.connect(&self.url).await.expect("connect the pool")
    }

    /// One connection.
    pub async fn client(&self) -> TestClient {
        connect(&self.url).await
    }

    /// Runs statements on a connection of their own, as another program would.
    pub async fn execute(&self, sql: &str) {
        self.client().await.batch_execute(sql).await.unwrap_or_else(|error| panic!("{error:?}\nin: {sql}"));
    }

    /// From when this returns, each commit on the server waits for a synchronous standby that does not exist; until it is cancelled.
    /// That the setting shows in a session is not enough: the checkpointer tells commits, in its own time.
    pub async fn make_commits_wait(&self) {
        self.execute("create table public.probe ()").await;
        self.execute("alter system set synchronous_standby_names = 'nobody'").await;
        self.execute("select pg_reload_conf()").await;
        let prober = self.client().await;
        let pid = prober.backend_pid().await;
        let done = Arc::new(AtomicBool::new(false));
        let probing = {
            let done = Arc::clone(&done);
            tokio::spawn(async move {
                while !done.load(Ordering::Relaxed) {
                    prober
                        .batch_execute("insert into public.probe default values")
                        .await
                        .expect("commits, late or not");
                }
            })
        };
        let observer = self.client().await;
        let waits = "select coalesce(wait_event = 'SyncRep', false) from pg_stat_activity where pid = $1";
        eventually("commits wait", async || observer.query_one(waits, &[&pid]).await.expect("asks").get(0)).await;
        done.store(true, Ordering::Relaxed);
        observer.execute("select pg_cancel_backend($1)", &[&pid]).await.expect("cancels");
        probing.await.expect("ends");
    }

    /// Listens on a channel; returns when the server has confirmed it.
    pub async fn listen(&self, channel: &str) -> Notifications {
        let (client, mut connection) = tokio_postgres::connect(&self.url, NoTls).await.expect("connect");
        let (sender, received) = mpsc::unbounded_channel();
        let driver = tokio::spawn(async move {
            while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
                if let AsyncMessage::Notification(notification) = message {
                    let _ = sender.send(notification); // the receiver may be gone: the test is over
                }
            }
        });
        let client = TestClient { client, driver };
        client.batch_execute(&format!("listen \"{channel}\"")).await.expect("listen");
        Notifications { client, channel: channel.to_owned(), received }
    }
}

/// Connects to a URL without TLS.
pub async fn connect(url: &str) -> TestClient {
    let (client, connection) =
        tokio_postgres::connect(url, NoTls).await.unwrap_or_else(|error| panic!("{url}: {error:?}"));
    let driver = tokio::spawn(async move {
        let _ = connection.await; // its error also reaches whoever uses the client
    });
    TestClient { client, driver }
}

/// A connection together with the task that drives it; both end when this is dropped.
#[derive(Debug)]
pub struct TestClient {
    client: Client,
    driver: JoinHandle<()>,
}

impl TestClient {
    /// The pid of the server process behind this connection.
    pub async fn backend_pid(&self) -> i32 {
        self.query_one("select pg_backend_pid()", &[]).await.expect("select pg_backend_pid()").get(0)
    }
}

impl Deref for TestClient {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for TestClient {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// What arrives on one channel.
#[derive(Debug)]
pub struct Notifications {
    client: TestClient,
    channel: String,
    received: mpsc::UnboundedReceiver<Notification>,
}

impl Notifications {
    /// The next one.
    pub async fn next(&mut self) -> Notification {
        let next = timeout(PATIENCE, self.received.recv()).await;
        let next = next.unwrap_or_else(|_| panic!("no notification on {} within {PATIENCE:?}", self.channel));
        next.unwrap_or_else(|| panic!("the connection that listens on {} is lost", self.channel))
    }

    /// The payloads that come before this one, which is read and left out.
    pub async fn until(&mut self, marker: &str) -> Vec<String> {
        let mut payloads = Vec::new();
        loop {
            let notification = self.next().await;
            if notification.payload() == marker {
                return payloads;
            }
            payloads.push(notification.payload().to_owned());
        }
    }

    /// The payloads of everything that was committed before this call and has not been read yet. Sends a marker and reads
    /// up to it: Postgres delivers in the order of commits.
    pub async fn all_so_far(&mut self) -> Vec<String> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let marker = format!("marker {}", NEXT.fetch_add(1, Ordering::Relaxed));
        self.client.execute("select pg_notify($1, $2)", &[&self.channel, &marker]).await.expect("send the marker");
        self.until(&marker).await
    }
}

/// Waits until `condition` holds; `what` stands in the message if it never does. For states that send no event.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "still not after {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
