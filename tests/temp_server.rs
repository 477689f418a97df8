//! The throw-away server itself: it starts, stops, crashes and, whatever happens to its owner, ends.

use std::{
    env,
    io::{BufRead as _, BufReader},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, getpgid},
};
use rowcache::cli::temp_server::{Stop, TempServer};
use tokio::time::timeout;

use crate::support::{PATIENCE, Version, connect, database, eventually, server, server_options, shared_server};

async fn text(client: &tokio_postgres::Client, sql: &str) -> String {
    client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
}

fn answers(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}

pg_test! {
    async fn it_is_the_version_that_was_asked_for(test: Test) {
        let server = shared_server(test.version).await;
        let version = text(&*connect(&server.admin_url()).await, "show server_version").await;
        assert!(version.starts_with(server.version()), "{version:?} is not {:?}", server.version());
    }

    async fn it_has_the_settings_and_files_that_were_asked_for(test: Test) {
        let options = server_options(test.version).setting("track_commit_timestamp", "on").data_file("hello", "world");
        let server = options.start().await.unwrap();
        let client = connect(&server.admin_url()).await;
        assert_eq!(text(&client, "show track_commit_timestamp").await, "on");
        assert_eq!(text(&client, "select pg_read_file('hello')").await, "world");
        assert_eq!(text(&client, "show server_encoding").await, "UTF8");
    }

    async fn data_and_port_survive_a_stop_and_a_crash(test: Test) {
        let mut server = server(test.version, &[]).await;
        let port = server.port();
        connect(&server.admin_url()).await.batch_execute("create table t as select 'kept' as x").await.unwrap();

        server.stop(Stop::Fast).await.unwrap();
        assert!(!answers(port), "a stopped server accepts a connection");
        server.stop(Stop::Fast).await.unwrap();
        server.start().await.unwrap();
        assert_eq!(text(&*connect(&server.admin_url()).await, "select x from t").await, "kept");

        server.restart(Stop::Immediate).await.unwrap();
        assert_eq!(server.port(), port);
        assert_eq!(text(&*connect(&server.admin_url()).await, "select x from t").await, "kept");
        assert!(server.start().await.unwrap_err().to_string().contains("already runs"));
    }

    async fn a_standby_follows_and_takes_over(test: Test) {
        let mut primary = server(test.version, &[]).await;
        connect(&primary.admin_url()).await.batch_execute("create table t as select 'first' as x").await.unwrap();
        let standby = primary.standby().await.unwrap();
        let (old, new) = (connect(&primary.admin_url()).await, connect(&standby.admin_url()).await);
        old.batch_execute("update t set x = 'second'").await.unwrap();
        eventually("the standby follows", async || text(&new, "select x from t").await == "second").await;
        new.batch_execute("update t set x = 'third'").await.unwrap_err();
        standby.promote().await.unwrap();
        new.batch_execute("update t set x = 'third'").await.unwrap();
        assert_eq!(text(&old, "select x from t").await, "second", "the old primary runs on");
        assert!(primary.promote().await.is_err(), "it is no standby");
    }

    async fn a_killed_backend_takes_the_others_down_and_the_server_recovers(test: Test) {
        let server = server(test.version, &[]).await;
        let (victim, bystander) = (connect(&server.admin_url()).await, connect(&server.admin_url()).await);
        server.kill_backend(victim.backend_pid().await).unwrap();
        eventually("both connections are lost", async || victim.is_closed() && bystander.is_closed()).await;
        eventually("the server is back", async || {
            tokio_postgres::connect(&server.admin_url(), tokio_postgres::NoTls).await.is_ok()
        })
        .await;
    }

    async fn a_frozen_server_keeps_its_connections_and_answers_when_it_thaws(test: Test) {
        let server = server(test.version, &[]).await;
        let client = connect(&server.admin_url()).await;
        let frozen = server.freeze().await.unwrap();
        let question = client.simple_query("select 1");
        tokio::pin!(question);
        let silence = timeout(std::time::Duration::from_millis(300), &mut question).await;
        assert!(silence.is_err(), "a frozen server answered");
        assert!(answers(server.port()), "the kernel still accepts connections for it");
        drop(frozen);
        timeout(PATIENCE, question).await.unwrap().unwrap();
    }

    async fn notifications_arrive_in_order_and_up_to_now(test: Test) {
        let db = database(test.version).await;
        let mut heard = db.listen("c").await;
        assert_eq!(heard.all_so_far().await, [""; 0]);
        db.execute("notify c, 'one'; notify c, 'two'; notify d, 'elsewhere'").await;
        assert_eq!(heard.all_so_far().await, ["one", "two"]);
    }

    async fn every_database_is_fresh(test: Test) {
        let (a, b) = (database(test.version).await, database(test.version).await);
        a.execute("create table t (x int)").await;
        b.execute("create table t (x int)").await;
        sqlx::query("insert into t values (1)").execute(&a.pool().await).await.unwrap();
        assert_eq!(text(&*b.client().await, "select count(*)::text from t").await, "0");
    }

    async fn it_is_not_in_our_process_group(test: Test) {
        // Ctrl-C on a terminal goes to the whole group; the demo must be able to use its server while it stops.
        let server = shared_server(test.version).await;
        let pid_file = std::fs::read_to_string(server.data_dir().join("postmaster.pid")).unwrap();
        let pid = Pid::from_raw(pid_file.lines().next().unwrap().parse().unwrap());
        assert_ne!(getpgid(Some(pid)).unwrap(), getpgid(None).unwrap());
    }

    async fn a_panic_ends_the_server(test: Test) {
        let version = test.version;
        let owner = tokio::spawn(async move {
            let server = server(version, &[]).await;
            std::panic::panic_any((server.port(), server.data_dir()));
        });
        let panic = owner.await.unwrap_err().into_panic();
        let (port, data_dir) = panic.downcast_ref::<(u16, PathBuf)>().unwrap();
        assert!(!answers(*port));
        assert!(!data_dir.parent().unwrap().exists(), "its directory is still there");
    }

    async fn a_server_that_cannot_start_says_why(test: Test) {
        let error = server_options(test.version).setting("shared_buffers", "nonsense").start().await.unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("invalid value for parameter \"shared_buffers\""), "{error}");
    }

    async fn an_owner_that_is_killed_leaves_nothing(test: Test) {
        let mut owner = Owner::start(test.version, "wait");
        assert!(answers(owner.port));
        kill(Pid::from_raw(i32::try_from(owner.process.id()).unwrap()), Signal::SIGKILL).unwrap();
        assert!(!owner.process.wait().unwrap().success());
        eventually("the server is gone", async || !answers(owner.port)).await;
        eventually("its directory is gone", async || !owner.home.exists()).await;
    }

    async fn an_owner_that_exits_without_dropping_leaves_nothing(test: Test) {
        let mut owner = Owner::start(test.version, "exit");
        assert!(owner.process.wait().unwrap().success());
        eventually("the server is gone", async || !answers(owner.port)).await;
        eventually("its directory is gone", async || !owner.home.exists()).await;
    }
}

#[tokio::test]
async fn without_programs_the_error_names_the_directory_and_the_way_out() {
    let empty = tempfile::tempdir().unwrap();
    let error = TempServer::options().bin_dir(empty.path()).start().await.unwrap_err().to_string();
    for part in ["no `postgres` in", empty.path().to_str().unwrap(), "docker compose up -d --wait", "--database-url"] {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[tokio::test]
async fn as_root_a_closed_directory_is_named_with_its_user() {
    if !nix::unistd::Uid::effective().is_root() {
        return; // there is no second user then
    }
    let closed = tempfile::tempdir().unwrap();
    std::fs::set_permissions(closed.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let programs = closed.path().join("bin");
    let original = TempServer::options().start().await.unwrap().bin("postgres").unwrap();
    std::os::unix::fs::symlink(original.parent().unwrap(), &programs).unwrap();
    let error = format!("{:#}", TempServer::options().bin_dir(&programs).start().await.unwrap_err());
    assert!(error.contains("which cannot enter") && error.contains(programs.to_str().unwrap()), "{error}");
}

/// Set in a process that [`Owner::start`] has started: `15 wait`.
const OWNER: &str = "ROWCACHE_TEST_OWNER";

/// The name of [`the_owner_process`] in this program.
const OWNER_PROCESS: &str = "temp_server::the_owner_process";

/// Another process that owns a server.
struct Owner {
    process: Child,
    port: u16,
    home: PathBuf,
}

impl Owner {
    /// `then`: what it does when the server runs, `wait` or `exit`.
    fn start(version: Version, then: &str) -> Self {
        let mut process = Command::new(env::current_exe().unwrap())
            .args(["--exact", OWNER_PROCESS, "--nocapture"])
            .env(OWNER, format!("{} {then}", version.major()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut lines = output.lines().map(Result::unwrap);
        let line =
            lines.find_map(|line| line.strip_prefix("OWNS ").map(str::to_owned)).expect("its server did not start");
        let (port, home) = line.split_once(' ').unwrap();
        Self { process, port: port.parse().unwrap(), home: Path::new(home).to_owned() }
    }
}

/// Not a test: what the process of an [`Owner`] runs. In the test run itself it does nothing.
#[tokio::test]
async fn the_owner_process() {
    let Ok(order) = env::var(OWNER) else { return };
    let (major, then) = order.split_once(' ').unwrap();
    let version = Version::ALL.into_iter().find(|version| version.major().to_string() == major).unwrap();
    let server = server(version, &[]).await;
    println!("\nOWNS {} {}", server.port(), server.data_dir().parent().unwrap().display());
    if then == "exit" {
        std::process::exit(0);
    }
    std::io::stdin().lines().next(); // until we are killed, or until whoever started us is gone
}
