//! `rowcache demo`: it comes to an end, it finds what is wrong, and it leaves nothing behind.

use std::{fs::Permissions, os::unix::fs::PermissionsExt as _, path::Path, time::Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::process::Command;

use crate::{
    program::{Ended, Running, psql, rowcache, rowcache_on},
    support::{PATIENCE, Version, database, shared_server},
};

/// A demo that brings its own server of this version, and everything that it may leave behind in one place.
struct Demo {
    home: TempDir,
    command: Command,
}

impl Demo {
    async fn new(version: Version, args: &[&str]) -> Self {
        // As /tmp is: as root the server runs as another user, who must come in, and clean up.
        let home = tempfile::Builder::new().prefix("demo-test-").tempdir().expect("a directory");
        std::fs::set_permissions(home.path(), Permissions::from_mode(0o1777)).expect("it is ours");
        let postgres = shared_server(version).await.bin("postgres").expect("there is a server");
        let programs = postgres.parent().expect("it is in a directory");
        let mut path = vec![programs.to_owned()];
        path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
        let mut command = rowcache(&[&["demo", "--plain", "--rows", "2000"], args].concat());
        command.env("TMPDIR", home.path()).env("PATH", std::env::join_paths(path).expect("a PATH"));
        Self { home, command }
    }

    fn start(self) -> (Running, Home) {
        (Running::start(self.command), Home(self.home))
    }
}

struct Home(TempDir);

impl Home {
    /// Every process of the demo has this directory, or the server's port, in its command line.
    fn assert_nothing_left(&self, port: Option<&str>) {
        let deadline = Instant::now() + PATIENCE;
        let mut marks = vec![self.0.path().to_str().expect("UTF-8").to_owned()];
        marks.extend(port.map(|port| format!("127.0.0.1:{port}/")));
        loop {
            let left: Vec<_> =
                processes().into_iter().filter(|it| marks.iter().any(|mark| it.contains(mark))).collect();
            let files: Vec<_> = self.0.path().read_dir().expect("it is there").collect();
            if left.is_empty() && files.is_empty() {
                return;
            }
            // A process that was killed takes a moment; there is no event for it.
            assert!(Instant::now() < deadline, "left behind: {left:#?} {files:#?}");
            std::thread::yield_now();
        }
    }
}

/// The command line of every process.
fn processes() -> Vec<String> {
    let pids = Path::new("/proc").read_dir().expect("there is /proc").flatten();
    let command_line = |pid: std::fs::DirEntry| std::fs::read(pid.path().join("cmdline")).ok();
    pids.filter_map(command_line).map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).collect()
}

async fn port(demo: &mut Running) -> String {
    let invitation = demo.line_with(&["psql 'postgres://postgres@127.0.0.1:"]).await;
    invitation.split("127.0.0.1:").nth(1).and_then(|rest| rest.split('/').next()).expect("a port").to_owned()
}

/// One line that sums up, with checks made and nothing wrong.
#[track_caller]
fn assert_summary(ended: &Ended) {
    assert_nothing_wrong(ended);
    assert!(!ended.out.contains("; 0 entries compared"), "{ended:#?}");
}

/// The same, but the nodes may just have forgotten everything.
#[track_caller]
fn assert_nothing_wrong(ended: &Ended) {
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    let summary = ended.out.lines().last().expect("a last line");
    assert!(summary.starts_with("3 nodes, "), "{ended:#?}");
    assert!(summary.contains(" reads checked, 0 stale") && summary.ends_with(", 0 differ"), "{ended:#?}");
    assert!(!summary.contains("; 0 reads checked"), "{ended:#?}");
    assert_eq!(ended.out.matches("compared with the table").count(), 1, "{ended:#?}");
    assert!(!ended.err.contains("error"), "{ended:#?}");
}

pg_test! {
    async fn it_ends_by_itself_and_leaves_nothing(test: Test) {
        let (mut demo, home) = Demo::new(test.version, &["--seconds", "5"]).await.start();
        let port = port(&mut demo).await;
        demo.line_with(&["update users set name = 'Ada' where id = 42;"]).await;
        demo.line_with(&["nodes 3/3", "xid ", " ms"]).await;
        demo.line_with(&["3/3 nodes coherent", "p50 "]).await;
        let ended = demo.end().await;
        assert_summary(&ended);
        home.assert_nothing_left(Some(&port));
    }

    async fn ctrl_c_leaves_nothing(test: Test) {
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            let (mut demo, home) = Demo::new(test.version, &[]).await.start();
            let port = port(&mut demo).await;
            while demo.line_with(&["nodes coherent"]).await.contains(" 0 reads checked") {}
            demo.signal(signal);
            let ended = demo.end().await;
            assert_summary(&ended);
            home.assert_nothing_left(Some(&port));
        }
    }

    async fn ctrl_c_while_it_starts_leaves_nothing(test: Test) {
        let (mut demo, home) = Demo::new(test.version, &[]).await.start();
        demo.error_line_with("starting a throw-away PostgreSQL").await;
        let ended = demo.interrupt().await;
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.err.contains("error: interrupted while starting"), "{ended:#?}");
        home.assert_nothing_left(None);
    }

    async fn even_kill_leaves_nothing(test: Test) {
        let (mut demo, home) = Demo::new(test.version, &[]).await.start();
        let port = port(&mut demo).await;
        demo.line_with(&["3/3 nodes coherent"]).await;
        demo.signal(Signal::SIGKILL);
        demo.end().await;
        home.assert_nothing_left(Some(&port));
    }

    async fn what_a_person_does_is_seen_on_every_node(test: Test) {
        let (mut demo, home) = Demo::new(test.version, &[]).await.start();
        let port = port(&mut demo).await;
        let url = format!("postgres://postgres@127.0.0.1:{port}/demo");
        let db = crate::support::TestDb { url, name: "demo".into(), version: test.version, port: port.parse().unwrap() };
        for (sql, seen) in [
            ("update users set name = 'Ada' where id = 42", "  42  "),
            ("update users set name = 'many' where id <= 100", "(100 keys)"),
            ("delete from users where id = 43", "  43  "),
            ("insert into users (id, name) values (43, 'again')", "  43  "),
            ("update users set id = 99000 where id = 44", "44, 99000"),
            ("update users set logins = 7", " keys)"),
            ("truncate users", "  all  "),
        ] {
            psql(&db, &[sql]).await;
            demo.line_with(&[seen, "nodes 3/3"]).await;
        }
        demo.line_with(&["3/3 nodes coherent"]).await;
        let ended = demo.interrupt().await;
        // After the TRUNCATE the table's file is another one: its triggers are verified, and entries forgotten again.
        assert_nothing_wrong(&ended);
        home.assert_nothing_left(Some(&port));
    }

    async fn the_check_can_fail(test: Test) {
        let db = database(test.version).await;
        let mut demo = Running::start(rowcache_on(&db.url, &["demo", "--plain", "--rows", "2000"]));
        demo.line_with(&["3/3 nodes coherent"]).await;
        // A history that claims a later version than the one that was written: so every node seems to be behind.
        psql(&db, &[
            "begin; update rowcache_demo.users set name = 'old' where id = 42; \
             insert into rowcache_demo.history (id, version) values (42, 9000000000); commit",
        ]).await;
        while demo.line_with(&["nodes coherent"]).await.contains(" 0 stale") {}
        let ended = demo.interrupt().await;
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        assert!(ended.err.contains("error: node ") && ended.err.contains("for id 42"), "{ended:#?}");
    }

    async fn several_in_one_database_and_the_last_one_cleans_up(test: Test) {
        let db = database(test.version).await;
        let start = |args: &[&str]| {
            Running::start(rowcache_on(&db.url, &[&["demo", "--plain", "--rows", "2000"], args].concat()))
        };
        let there = || psql(&db, &["select to_regnamespace('rowcache_demo') is not null"]);
        let (mut first, mut second) = (start(&[]), start(&[]));
        for demo in [&mut first, &mut second] {
            while demo.line_with(&["nodes coherent"]).await.contains(" 0 reads checked") {}
        }
        let ended = first.interrupt().await;
        assert_summary(&ended);
        assert!(ended.err.contains("stays: another demo"), "{ended:#?}");
        assert_eq!(there().await, "t\n");
        let ended = second.interrupt().await;
        assert_summary(&ended);
        assert!(ended.err.contains("is dropped"), "{ended:#?}");
        assert_eq!(there().await, "f\n");

        let mut kept = start(&["--keep"]);
        while kept.line_with(&["nodes coherent"]).await.contains(" 0 reads checked") {}
        assert_summary(&kept.interrupt().await);
        assert_eq!(there().await, "t\n");
    }

    async fn it_survives_a_server_that_drops_all_connections(test: Test) {
        let db = database(test.version).await;
        let mut demo = Running::start(rowcache_on(&db.url, &["demo", "--plain", "--rows", "2000"]));
        demo.line_with(&["3/3 nodes coherent"]).await;
        let all = "select count(pg_terminate_backend(pid)) > 5 from pg_stat_activity \
             where datname = current_database() and pid <> pg_backend_pid()";
        assert_eq!(psql(&db, &[all]).await, "t\n");
        demo.line_with(&["3/3 nodes coherent"]).await;
        while demo.line_with(&["nodes coherent"]).await.contains(" 0 reads checked") {}
        assert_nothing_wrong(&demo.interrupt().await);
    }
}
