//! A node with two lines: losing one is no gap, losing both is one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rowcache::{Config, Event, Events, Node, RowKey, Rows, cli::temp_server::Stop};

use crate::{
    fixture::{self, Users, event, name, users, users_db, users_server},
    support::{
        self, PATIENCE, TestDb, eventually,
        proxy::{Close, Connection, Direction, Flow, Proxy},
    },
};

/// Ends a connection of the line that is heard, or of its spare, which is the younger one.
async fn kill(db: &TestDb, which: &str, of_spare: bool) {
    let client = db.client().await;
    let pids = async || {
        let sessions = "select pid from pg_stat_activity where datname = current_database() \
            and application_name like '%(' || $1 || ')' order by backend_start";
        let rows = client.query(sessions, &[&which]).await.expect("reads");
        rows.iter().map(|row| row.get::<_, i32>(0)).collect::<Vec<_>>()
    };
    // Those of a line that was given up may take a moment to go.
    eventually("there are two lines", async || pids().await.len() == 2).await;
    let pid = pids().await[usize::from(of_spare)];
    client.execute("select pg_terminate_backend($1)", &[&pid]).await.expect("killed");
}

const LOST: &str = "LISTEN connection was lost; reads go to Postgres";
const AGAIN: &str = "cannot open the LISTEN connection";
const NO_SPARE: &str = "cannot open the spare line";
const UNVERIFIED: &str = "cannot verify the triggers";

/// A node with two lines that beats often, and is in no hurry to call anything late.
fn redundant(url: &str) -> Config {
    let mut config = Config::from_url(url).expect("a good URL");
    config.redundant_listener = true;
    config.beat = Duration::from_millis(20);
    (config.beat_timeout, config.lease) = (PATIENCE, 2 * PATIENCE);
    config.events_max = 1_000_000;
    config
}

/// The same, with its lines through the proxy: the listener, then the control connection, then those of the spare.
fn through(proxy: &Proxy, db: &TestDb) -> Config {
    let mut config = redundant(&db.url);
    config.listener = redundant(&proxy.url(&db.url)).listener;
    config
}

/// The listener and the control connection of the line that is heard, then those of its spare.
async fn connections(proxy: &Proxy) -> Vec<Arc<Connection>> {
    // Those of a line that was given up may take a moment to go.
    eventually("there are two lines", async || proxy.connections().len() == 4).await;
    proxy.connections()
}

/// Starts a node and waits until losing a line is no gap.
async fn covered(config: Config) -> (Node, Users, Events) {
    let node = Node::start(config).await.expect("starts");
    let users = users(&node).await;
    eventually("the spare covers", async || node.is_covered()).await;
    let events = node.subscribe();
    (node, users, events)
}

/// Waits for an event, while nothing was missed.
async fn without_gap(events: &mut Events, what: &str, wanted: impl Fn(&Event) -> bool) {
    event(events, what, |event| {
        assert!(!matches!(event, Event::Gap(_) | Event::Lagged(_)), "{event:?} before {what}");
        wanted(event)
    })
    .await;
}

async fn handoff_and_covered(events: &mut Events) {
    without_gap(events, "a handoff", |event| matches!(event, Event::Handoff(_))).await;
    without_gap(events, "covered again", |event| matches!(event, Event::Covered)).await;
}

async fn rename(db: &TestDb, id: i64, name: &str) {
    db.execute(&format!("update public.users set name = '{name}' where id = {id}")).await;
}

fn is_change_of(event: &Event, id: i64) -> bool {
    let is_it = |key: &RowKey| key.to_string() == id.to_string();
    matches!(event, Event::Change(change) if matches!(&change.rows, Rows::Keys(keys) if keys.iter().any(is_it)))
}

pg_test! {
    async fn no_gap_when_one_line_is_lost_while_others_write(test: Test) {
        let db = users_db(test.version).await;
        let (node, users, mut events) = covered(redundant(&db.url)).await;
        name(&users, 10).await;
        let clears = users.stats().clears;
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let (stop, db, users) = (Arc::clone(&stop), db.clone(), users.clone());
                tokio::spawn(async move {
                    let client = db.client().await;
                    for n in 0.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        let id = 2 + (2 * n + writer) % 8;
                        let sql = format!("update public.users set name = 'by {writer}: {n}' where id = {id}");
                        client.batch_execute(&sql).await.expect("writes");
                        name(&users, id).await;
                    }
                })
            })
            .collect();
        for round in 0..20 {
            name(&users, 1).await;
            assert!(users.peek(&1).is_known());
            let which = if round % 2 == 0 { "listener" } else { "control" };
            rename(&db, 1, &format!("before {round}")).await;
            kill(&db, which, false).await;
            let new = format!("after {round}");
            rename(&db, 1, &new).await;
            node.barrier().await.expect("no gap");
            assert_eq!(name(&users, 1).await, Some(new), "round {round}, {which}");
            handoff_and_covered(&mut events).await;
            assert!(users.peek(&10).is_known(), "nothing is forgotten");
        }
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.await.expect("writes to the end");
        }
        node.barrier().await.expect("no gap");
        let client = db.client().await;
        for row in client.query("select id, name from public.users", &[]).await.expect("reads") {
            assert_eq!(name(&users, row.get(0)).await.as_deref(), row.get(1));
        }
        assert_eq!(users.stats().clears, clears);
    }

    // What the primary had not received when it was lost is applied, fence or no fence.
    async fn what_only_the_spare_received_is_applied(test: Test) {
        let db = users_db(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let (node, users, mut events) = covered(through(&proxy, &db)).await;
        name(&users, 1).await;
        name(&users, 2).await;
        let [listener, _, spare, _] = &connections(&proxy).await[..] else { panic!("two lines of two connections") };
        listener.set(Direction::Down, Flow::Stall);
        let before = spare.bytes(Direction::Down);
        rename(&db, 1, "new").await;
        for n in 0..10 {
            rename(&db, 3, &format!("later {n}")).await;
        }
        // A fence may be among it, and not a second one before the first is applied.
        eventually("the spare has received them", async || spare.bytes(Direction::Down) > before + 500).await;
        assert!(users.peek(&1).is_known(), "nothing has reached the line that is heard");
        listener.close(Close::Rst).await;
        without_gap(&mut events, "a handoff", |event| matches!(event, Event::Handoff(_))).await;
        without_gap(&mut events, "the change", |event| is_change_of(event, 1)).await;
        node.barrier().await.expect("no gap");
        assert!(!users.peek(&1).is_known() && users.peek(&2).is_known());
        assert_eq!(name(&users, 1).await.as_deref(), Some("new"));
    }

    // notify.md's half-open link: alive, and deaf. Its spare tells.
    async fn a_deaf_line_gives_way(test: Test) {
        let db = users_db(test.version).await;
        // The listener alone; then both of its connections, so that no fence can be sent through them either.
        for deaf in [1, 2] {
            let proxy = Proxy::start(db.port).await;
            let mut config = through(&proxy, &db);
            // The lease bounds how long it may take: half of the timeout, and not all of it.
            (config.beat_timeout, config.lease) = (Duration::from_secs(10), Duration::from_secs(9));
            let (node, users, mut events) = covered(config).await;
            name(&users, 1).await;
            name(&users, 2).await;
            for connection in &connections(&proxy).await[..deaf] {
                connection.set(Direction::Up, Flow::Swallow);
                connection.set(Direction::Down, Flow::Swallow);
            }
            let new = format!("unheard {deaf}");
            rename(&db, 1, &new).await;
            handoff_and_covered(&mut events).await;
            node.barrier().await.expect("no gap");
            assert_eq!(name(&users, 1).await, Some(new));
            assert!(users.peek(&2).is_known());
            node.shutdown().await;
        }
    }

    async fn a_spare_that_is_lost_or_deaf_is_replaced(test: Test) {
        let db = users_db(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let mut config = through(&proxy, &db);
        config.beat_timeout = Duration::from_secs(4);
        let (node, users, mut events) = covered(config).await;
        name(&users, 1).await;
        for how in ["listener", "control", "deaf"] {
            match how {
                "deaf" => connections(&proxy).await[2].set(Direction::Down, Flow::Swallow),
                which => kill(&db, which, true).await,
            }
            without_gap(&mut events, "the spare is lost", |event| matches!(event, Event::SpareLost(_))).await;
            without_gap(&mut events, "covered again", |event| matches!(event, Event::Covered)).await;
            assert!(users.peek(&1).is_known());
        }
        rename(&db, 1, "new").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("new"));
    }

    async fn the_loss_of_both_lines_is_a_gap(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow(NO_SPARE);
        test.logs.allow(UNVERIFIED);
        let db = users_db(test.version).await;
        let mut proxy = Proxy::start(db.port).await;
        let (node, users, mut events) = covered(through(&proxy, &db)).await;
        name(&users, 1).await;
        // No new spare can come in between.
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        assert!(!node.is_covered());
        rename(&db, 1, "new").await;
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!users.peek(&1).is_known(), "nothing from before is served");
        assert_eq!(name(&users, 1).await.as_deref(), Some("new"));
        event(&mut events, "covered again", |event| matches!(event, Event::Covered)).await;
        kill(&db, "listener", false).await;
        handoff_and_covered(&mut events).await;
        assert!(users.peek(&1).is_known());
        node.barrier().await.expect("coherent");
    }

    async fn a_server_that_is_started_again_is_a_gap(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow(NO_SPARE);
        test.logs.allow(UNVERIFIED);
        let (mut server, db) = users_server(test.version, &[]).await;
        let (_node, users, mut events) = covered(redundant(&db.url)).await;
        name(&users, 1).await;
        server.stop(Stop::Fast).await.expect("stops");
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        server.start().await.expect("starts again");
        rename(&db, 1, "after the restart").await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("after the restart"));
        event(&mut events, "covered again", |event| matches!(event, Event::Covered)).await;
        kill(&db, "listener", false).await;
        handoff_and_covered(&mut events).await;
        assert!(users.peek(&1).is_known());
    }

    // X6 for lines: two addresses, two servers. A spare there would hand over a stream of another database.
    async fn x6_a_spare_on_another_server_is_refused(test: Test) {
        test.logs.allow(NO_SPARE);
        let other = support::server(test.version, &[]).await;
        let db = users_db(test.version).await;
        let create = format!("create database {}", db.name);
        support::connect(&other.admin_url()).await.batch_execute(&create).await.expect("created");
        fixture::migrate(&TestDb { url: other.url(&db.name), port: other.port(), ..db.clone() }).await;
        let proxy = Proxy::start(db.port).await;
        let (node, users, mut events) = covered(through(&proxy, &db)).await;
        name(&users, 1).await;
        proxy.retarget(other.port());
        connections(&proxy).await[2].close(Close::Rst).await;
        eventually("the node says why it has no spare", async || {
            !test.logs.containing("it reached another server").is_empty()
        })
        .await;
        assert!(!node.is_covered() && users.peek(&1).is_known(), "the node is as well as before");
        proxy.retarget(db.port);
        without_gap(&mut events, "covered again", |event| matches!(event, Event::Covered)).await;
    }

    // The bound itself is a unit test's (`relay_tests.rs`); this is what is left of the messages beyond it.
    async fn a_spare_that_keeps_too_much_forgets_everything_at_the_handoff(test: Test) {
        test.logs.allow("more changes came in");
        let db = users_db(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let mut config = through(&proxy, &db);
        config.inbox_bytes_max = 2000;
        let (node, users, mut events) = covered(config).await;
        for id in 1..=10 {
            name(&users, id).await;
        }
        let [listener, _, spare, _] = &connections(&proxy).await[..] else { panic!("two lines of two connections") };
        listener.set(Direction::Down, Flow::Stall);
        let before = spare.bytes(Direction::Down);
        let client = db.client().await;
        for n in 0..100 {
            let sql = format!("update public.users set name = 'n{n}' where id = {}", 1 + n % 9);
            client.batch_execute(&sql).await.expect("writes");
        }
        eventually("the spare has received it", async || spare.bytes(Direction::Down) > before + 5000).await;
        listener.close(Close::Rst).await;
        handoff_and_covered(&mut events).await;
        node.barrier().await.expect("no gap");
        assert!(!test.logs.containing("more changes came in").is_empty());
        assert!(!users.peek(&10).is_known(), "forgotten with all others");
        for row in client.query("select id, name from public.users", &[]).await.expect("reads") {
            assert_eq!(name(&users, row.get(0)).await.as_deref(), row.get(1));
        }
    }

    // Handing over from line to line must not put off the doubt about triggers for ever.
    async fn triggers_that_no_line_can_verify_are_a_gap(test: Test) {
        test.logs.allow(UNVERIFIED);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let mut config = redundant(&db.url);
        config.beat_timeout = Duration::from_secs(6);
        let (_node, users, mut events) = covered(config).await;
        name(&users, 1).await;
        db.execute(
            "create or replace function rowcache.fingerprints(names text[]) returns table (name text, fingerprint text) \
             language plpgsql as $$ begin perform pg_sleep(60); end $$",
        )
        .await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        assert!(!users.peek(&1).is_known());
    }

    async fn without_the_option_there_is_one_line(test: Test) {
        let db = users_db(test.version).await;
        let count = "select count(*) from pg_stat_activity \
            where datname = current_database() and application_name ~ '\\((listener|control)\\)$'";
        let client = db.client().await;
        for (redundant_listener, expected) in [(false, 2), (true, 4)] {
            let mut config = redundant(&db.url);
            config.redundant_listener = redundant_listener;
            // It does not take a beat until the spare covers.
            (config.beat, config.beat_timeout, config.lease) = (2 * PATIENCE, 3 * PATIENCE, 4 * PATIENCE);
            let node = Node::start(config).await.expect("starts");
            eventually("the lines are open", async || {
                client.query_one(count, &[]).await.expect("counts").get::<_, i64>(0) == expected
            })
            .await;
            node.barrier().await.expect("coherent");
            if redundant_listener {
                eventually("it covers", async || node.is_covered()).await;
            }
            assert_eq!(node.is_covered(), redundant_listener);
            node.shutdown().await;
            assert!(!node.is_covered());
            eventually("the lines are closed", async || {
                client.query_one(count, &[]).await.expect("counts").get::<_, i64>(0) == 0
            })
            .await;
        }
    }
}
