//! A server that hangs, in part or as a whole, that crashes, and that forgets.

use std::time::{Duration, Instant};

use rowcache::{Reason, Status, cli::temp_server::Stop};

use crate::{
    Stopped, Subject, allow_gaps, backends,
    fixture::{hasty, name, users_server},
    support::{TestDb, eventually, proxy::Proxy},
};

pg_test! {
    async fn a_backend_of_the_line_hangs(test: Test) {
        allow_gaps(&test.logs);
        // Of its own: a process that hangs may hold up others.
        let (_server, db) = users_server(test.version, &[]).await;
        let mut subject = Subject::new(&db, hasty(&db.url)).await;
        for which in ["(listener", "(control"] {
            subject.warm().await;
            let before = Instant::now();
            let stopped = Stopped::new(backends(&db, which).await);
            subject.write(2).await;
            let why = subject.gap().await;
            let late = matches!(why, Reason::BeatLate | Reason::LeaseExpired);
            let unanswered = matches!(&why, Reason::ConnectionLost(how) if how.contains("took too long"));
            assert!(late || which == "(control" && unanswered, "{which}: {why}");
            if let Status::Bypassed { since, .. } = subject.node.status() {
                assert!(since >= before, "{which}");
            }
            // The processes that hang are left behind: the node is back before they go on.
            subject.is_back().await;
            drop(stopped);
            subject.is_well().await;
        }
    }

    async fn the_whole_server_hangs(test: Test) {
        allow_gaps(&test.logs);
        let (server, db) = users_server(test.version, &[]).await;
        let mut config = hasty(&db.url);
        config.load_timeout = Duration::from_secs(1);
        let mut subject = Subject::new(&db, config).await;
        let before = Instant::now();
        let frozen = server.freeze().await.expect("freezes");
        let why = subject.gap().await;
        let unanswered = matches!(&why, Reason::ConnectionLost(how) if how.contains("took too long"));
        assert!(matches!(why, Reason::BeatLate | Reason::LeaseExpired) || unanswered, "{why}");
        subject.is_bypassed(before).await;
        let error = subject.users.get(&1).await.expect_err("nobody answers");
        assert!(error.is_timeout() || error.is_unavailable(), "{error:?}");
        eventually("the node says that it cannot come back", async || match subject.node.status() {
            Status::Bypassed { why: Reason::ConnectionLost(how), since } => how.contains("took too long") && since >= before,
            _ => false,
        })
        .await;
        drop(frozen);
        subject.is_back().await;
    }

    // Postgres then ends all sessions and recovers, without a new start time.
    async fn one_backend_is_killed(test: Test) {
        allow_gaps(&test.logs);
        let (server, db) = users_server(test.version, &[]).await;
        let mut subject = Subject::new(&db, hasty(&db.url)).await;
        for part in ["(listener", ""] {
            subject.warm().await;
            let victim = backends(&db, part).await[0];
            server.kill_backend(victim).expect("killed");
            let why = subject.gap().await;
            assert!(matches!(why, Reason::ConnectionLost(_)), "{why}");
            subject.is_back().await;
        }
    }

    // X5, made certain: the commit that was seen is lost, and its transaction id and its place in the table are given to
    // another one. Whoever compares versions takes the two for the same.
    async fn x5_a_lost_commit_whose_version_comes_again(test: Test) {
        allow_gaps(&test.logs);
        let (mut server, db) = users_server(
            test.version,
            &[
                ("fsync", "on"),
                ("synchronous_commit", "off"),
                // Nobody writes the log down unasked.
                ("wal_writer_delay", "10s"),
                ("bgwriter_lru_maxpages", "0"),
                ("full_page_writes", "off"),
            ],
        )
        .await;
        let proxy = Proxy::start(db.port).await;
        let mut config = hasty(&proxy.url(&db.url));
        config.load_timeout = Duration::from_secs(1);
        let mut subject = Subject::new(&db, config).await;
        let mut proxy = proxy;
        let version = async |db: &TestDb| {
            let sql = "select xmin::text, ctid::text, name from public.users where id = 1";
            let row = db.client().await.query_one(sql, &[]).await.expect("reads");
            (row.get::<_, String>(0), row.get::<_, String>(1), row.get::<_, String>(2))
        };
        // A page of the log that happens to be full is written down, and with it the commit. Then once more.
        for attempt in 1.. {
            assert!(attempt <= 10, "the commit is never lost");
            db.execute("vacuum public.users").await;
            db.execute("checkpoint").await;
            db.execute("update public.users set name = 'lost' where id = 1").await;
            eventually("the node holds what will be lost", async || {
                subject.node.barrier().await.is_ok() && name(&subject.users, 1).await.as_deref() == Some("lost") && subject.held(1)
            })
            .await;
            let seen = version(&db).await;
            proxy.refuse().await;
            let before = Instant::now();
            server.stop(Stop::Immediate).await.expect("crashes");
            let why = subject.gap().await;
            assert!(matches!(why, Reason::ConnectionLost(_)), "{why}");
            subject.is_bypassed(before).await;
            subject.users.get(&1).await.expect_err("nobody can answer");
            server.start().await.expect("recovers");
            let lost = version(&db).await.2 != "lost";
            if lost {
                let client = db.client().await;
                let xid: i64 = seen.0.parse().expect("a number");
                loop {
                    client.batch_execute("begin").await.expect("begins");
                    let next = client.query_one("select pg_current_xact_id()::text::bigint", &[]).await.expect("an id");
                    let next: i64 = next.get(0);
                    assert!(next <= xid, "the id was lost with its commit");
                    if next == xid {
                        client.batch_execute("update public.users set name = 'new' where id = 1").await.expect("writes");
                    }
                    client.batch_execute("commit").await.expect("commits");
                    if next == xid {
                        break;
                    }
                }
                let again = version(&db).await;
                assert_eq!((&again.0, &again.1), (&seen.0, &seen.1), "the same version of the row");
                assert_eq!(again.2, "new", "with other contents");
            }
            assert!(!subject.held(1), "what was read before the crash is gone");
            proxy.accept().await;
            subject.is_back().await;
            if lost {
                return;
            }
        }
    }
}
