//! Connections that end, and connections that fall silent, in one direction or both.

use std::time::{Duration, Instant};

use rowcache::{Config, Reason, Status};

use crate::{
    Subject, allow_gaps,
    fixture::{hasty, name, users_db},
    support::{
        TestDb, eventually,
        proxy::{Close, Connection, Direction, Flow, Proxy},
    },
};

/// The listener and the control connection go through a proxy of their own.
async fn line_through_proxy(db: &TestDb) -> (Proxy, Config) {
    let proxy = Proxy::start(db.port).await;
    let mut config = hasty(&db.url);
    config.listener = hasty(&proxy.url(&db.url)).listener;
    (proxy, config)
}

/// The pool goes through a proxy of its own.
async fn pool_through_proxy(db: &TestDb) -> (Proxy, Config) {
    let proxy = Proxy::start(db.port).await;
    let mut config = Config::from_url(&db.url).expect("a good URL");
    config.pool_connect = hasty(&proxy.url(&db.url)).pool_connect;
    // A load notices silence by its time limit alone.
    config.load_timeout = Duration::from_secs(2);
    (proxy, config)
}

/// The open connections whose application name contains this.
fn part(proxy: &Proxy, name: &str) -> Vec<std::sync::Arc<Connection>> {
    let found: Vec<_> = proxy.connections().into_iter().filter(|it| it.greeted_with(name)).collect();
    assert!(!found.is_empty(), "there is no {name} connection");
    found
}

const LINE: [&str; 2] = ["(listener", "(control"];

pg_test! {
    async fn either_connection_of_the_line_ends_and_does_not_come_back_for_a_while(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        let (mut proxy, config) = line_through_proxy(&db).await;
        let mut subject = Subject::new(&db, config).await;
        for which in LINE {
            for how in [Close::Fin, Close::Rst] {
                subject.warm().await;
                proxy.refuse().await;
                let before = Instant::now();
                for connection in part(&proxy, which) {
                    connection.close(how).await;
                }
                subject.write(2).await;
                let why = subject.gap().await;
                assert!(matches!(why, Reason::ConnectionLost(_)), "{which} {how:?}: {why}");
                let why = subject.is_bypassed(before).await;
                assert!(matches!(why, Reason::ConnectionLost(_)), "{which} {how:?}: {why}");
                subject.reads_postgres().await;
                proxy.accept().await;
                subject.is_back().await;
            }
        }
    }

    // PostgREST #4670, and one direction at a time: NAT tables and firewalls forget one, too.
    async fn either_connection_of_the_line_falls_silent(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        let (mut proxy, config) = line_through_proxy(&db).await;
        let mut subject = Subject::new(&db, config).await;
        for which in LINE {
            for directions in [&[Direction::Up][..], &[Direction::Down], &[Direction::Up, Direction::Down]] {
                if which == "(listener" && directions == [Direction::Up] {
                    continue; // Nothing goes up there: see the next test.
                }
                subject.warm().await;
                proxy.refuse().await;
                let before = Instant::now();
                for connection in part(&proxy, which) {
                    for direction in directions {
 connection.set(*direction, Flow::Swallow);
 }
                }
                subject.write(2).await;
                // Silence is no error: a fence does not come back, or the look at the triggers gets no answer.
                let why = subject.gap().await;
                let late = matches!(why, Reason::BeatLate | Reason::LeaseExpired);
                let unanswered = matches!(&why, Reason::ConnectionLost(how) if how.contains("took too long"));
                assert!(late || which == "(control" && unanswered, "{which} {directions:?}: {why}");
                subject.is_bypassed(before).await;
                subject.reads_postgres().await;
                proxy.accept().await;
                subject.is_back().await;
            }
        }
    }

    // Not a fault then: as long as fences come back, messages do.
    async fn a_listener_has_nothing_to_send(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, mut config) = line_through_proxy(&db).await;
        let patient = Config::from_url(&db.url).expect("a good URL");
        (config.beat_timeout, config.lease) = (patient.beat_timeout, patient.lease);
        let subject = Subject::new(&db, config).await;
        let listeners = part(&proxy, "(listener");
        for connection in &listeners {
            connection.set(Direction::Up, Flow::Swallow);
        }
        subject.is_well().await;
        assert!(listeners.iter().all(|connection| connection.is_open()), "and there was no gap");
    }

    async fn all_connections_of_the_pool_end_at_once(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        let (proxy, config) = pool_through_proxy(&db).await;
        let subject = Subject::new(&db, config).await;
        for how in [Close::Fin, Close::Rst] {
            subject.fill_pool().await;
            subject.warm().await;
            assert!(proxy.connections().len() >= 4, "the pool is full");
            proxy.close_all(how).await;
            assert_eq!(name(&subject.users, 7).await.as_deref(), Some("user 7"), "{how:?}: no reader is told");
            assert!(matches!(subject.node.status(), Status::Coherent { .. }), "{how:?}: the line does not depend on the pool");
            subject.is_well().await;
        }
    }

    async fn the_pool_falls_silent(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        let (proxy, config) = pool_through_proxy(&db).await;
        let subject = Subject::new(&db, config).await;
        for directions in [&[Direction::Up][..], &[Direction::Down], &[Direction::Up, Direction::Down]] {
            subject.fill_pool().await;
            subject.warm().await;
            for direction in directions {
 proxy.set(*direction, Flow::Swallow);
 }
            // The line is whole: what is held is current, and is served; what is not held cannot be had.
            let error = subject.users.get(&7).await.expect_err("nobody answers");
            let text = error.to_string();
            assert!((error.is_timeout() || error.is_unavailable()) && text.contains("public.users 7"), "{error:?}");
            assert!(subject.held(2), "{directions:?}");
            subject.write(1).await;
            eventually("the change arrives", async || !subject.held(1)).await;
            subject.users.get(&1).await.expect_err("nor is anything from before it served");
            proxy.set_both(Flow::Pass);
            assert_eq!(name(&subject.users, 7).await.as_deref(), Some("user 7"), "{directions:?}");
            subject.is_well().await;
        }
    }

    // sqlx tries a connection before it takes it back, and waits for the answer without a limit.
    async fn connections_that_fall_silent_on_their_way_back_free_their_places(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        let (proxy, mut config) = pool_through_proxy(&db).await;
        config.pool = config.pool.max_connections(4);
        let subject = Subject::new(&db, config).await;
        // Once for the statement to be prepared: what runs then goes up in one piece.
        subject.fill_pool().await;
        subject.fill_pool_and(|| proxy.set(Direction::Up, Flow::Swallow)).await;
        proxy.set(Direction::Up, Flow::Pass);
        subject.is_well().await;
    }
}
