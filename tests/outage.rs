//! What callers get when Postgres does not answer loads: an error soon, or what is held if it is not known to be wrong.

use std::{num::NonZeroU32, time::Duration};

use rowcache::{Config, Event, Freshness, Lookup, Node, Status, Table, TableOptions};

use crate::{
    fixture::{Users, event, gap_and_recovery, hasty, name, users_db},
    support::{
        TestDb, eventually,
        proxy::{Close, Direction, Flow, Proxy},
    },
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);
const LOST: &str = "LISTEN connection was lost";
const AGAIN: &str = "cannot open the LISTEN connection";

/// A node whose loads go by way of a proxy; its line does not.
async fn loads_by_proxy(db: &TestDb) -> (Proxy, Node) {
    let proxy = Proxy::start(db.port).await;
    let mut config = Config::from_url(&db.url).expect("a good URL");
    config.pool_connect = Config::from_url(&proxy.url(&db.url)).expect("a good URL").pool_connect;
    (proxy, Node::start(config).await.expect("starts"))
}

/// Entries expire after a second, and loads do not take long.
fn short() -> TableOptions {
    TableOptions::default().ttl(SECOND).jitter(0.0).load_timeout(SECOND / 2)
}

async fn open(node: &Node, options: TableOptions) -> Users {
    node.table_with("public.users", options).await.expect("opens")
}

async fn expired(users: &Users, ids: &[i64]) {
    eventually("they have expired", async || ids.iter().all(|id| !users.peek(id).is_known())).await;
}

async fn unplug(proxy: &mut Proxy) {
    proxy.refuse().await;
    proxy.close_all(Close::Rst).await;
}

/// How many connections have been used by whatever this does.
async fn used(proxy: &Proxy, what: impl AsyncFnOnce()) -> usize {
    let sent = || proxy.connections().iter().map(|connection| connection.bytes(Direction::Up)).collect::<Vec<_>>();
    let before = sent();
    what().await;
    sent().iter().enumerate().filter(|(n, sent)| before.get(*n) != Some(sent)).count()
}

pg_test! {
    async fn what_has_expired_answers_when_a_load_fails(test: Test) {
        let db = users_db(test.version).await;
        let (mut proxy, node) = loads_by_proxy(&db).await;
        let users = open(&node, short().stale_if_error(HOUR).breaker(None)).await;
        for id in [1, 2, 3, 99] {
            let _ = users.get(&id).await.expect("loads");
        }
        unplug(&mut proxy).await;
        db.execute("update users set name = 'changed' where id = 2").await;
        node.barrier().await.expect("the line is well");
        expired(&users, &[1, 3, 99]).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        assert_eq!(name(&users, 99).await, None);
        let many = users.get_many(&[3, 1]).await.expect("both are held");
        assert_eq!(many.iter().flatten().map(|user| user.id).collect::<Vec<_>>(), [3, 1]);
        assert_eq!(users.stats().rescued, 4);
        // Never what is known to have changed; nor more than was held.
        for id in [2, 4] {
            let error = users.get(&id).await.expect_err("nothing is known of it");
            assert!(error.is_unavailable() || error.is_timeout(), "{error:?}");
        }
        assert!(users.get_many(&[1, 2]).await.is_err());
        // Who asks for more than the promise gets it, or an error.
        assert!(users.get_with(&1, Freshness::Fenced).await.is_err());
        assert_eq!(users.get_with(&1, Freshness::Any).await.expect("held").map(|user| user.id), Some(1));
        // Nor what was forgotten by a request, though it may still be in memory.
        users.clear().await.expect_err("nobody can be told");
        assert!(users.get(&1).await.is_err() && users.get(&3).await.is_err());
        proxy.accept().await;
        eventually("loads succeed", async || users.get(&1).await.is_ok()).await;
        assert!(matches!(users.status(), Status::Coherent { .. }), "nobody noticed but those who asked");
    }

    async fn not_for_ever_and_not_what_has_ended(test: Test) {
        let db = users_db(test.version).await;
        let (mut proxy, node) = loads_by_proxy(&db).await;
        let users = open(&node, short().stale_if_error(SECOND)).await;
        // Sessions that say themselves how long they are good for.
        let options = short().lifetime(|_: &(i64, String)| Some(SECOND)).stale_if_error(HOUR);
        let sessions: Table<i64, (i64, String)> = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        assert!(sessions.get(&1).await.expect("loads").is_some());
        unplug(&mut proxy).await;
        eventually("its time is over", async || !sessions.peek(&1).is_known()).await;
        assert!(sessions.get(&1).await.is_err(), "the session has ended");
        eventually("nobody may have it any more", async || users.get(&1).await.is_err()).await;
    }

    async fn callers_wait_no_longer_than_they_are_to(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = loads_by_proxy(&db).await;
        let options = short().load_timeout(HOUR).stale_if_error(HOUR).soft_timeout(SECOND / 10);
        let users = open(&node, options).await;
        name(&users, 1).await;
        expired(&users, &[1]).await;
        proxy.set(Direction::Down, Flow::Stall);
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        assert_eq!(users.get_many(&[1, 1, 1]).await.expect("held").len(), 3);
        let stats = users.stats();
        assert_eq!((stats.rescued, stats.loads, stats.published), (4, 2, 1), "the load goes on: {stats:?}");
        proxy.set(Direction::Down, Flow::Pass);
        eventually("its row is kept", async || matches!(users.peek(&1), Lookup::Row(_))).await;
        assert_eq!(users.stats().failed, 0);
    }

    // While the node is not coherent: Postgres first, and what was held if that fails.
    async fn in_a_gap_what_was_held_answers_if_postgres_does_not(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let mut proxy = Proxy::start(db.port).await;
        let config = hasty(&proxy.url(&db.url));
        let (node, strict) = (Node::start(config.clone()).await.expect("starts"), Node::start(config).await.expect("starts"));
        let users = open(&node, TableOptions::default().load_timeout(SECOND / 2).stale_if_error(HOUR)).await;
        let short_lived = open(&strict, TableOptions::default().load_timeout(SECOND / 2).stale_if_error(SECOND / 1000)).await;
        for users in [&users, &short_lived] {
            name(users, 1).await;
        }
        let mut events = node.subscribe();
        let mut others = strict.subscribe();
        unplug(&mut proxy).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        event(&mut others, "a gap", |event| matches!(event, Event::Gap(_))).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        assert!(short_lived.get(&1).await.is_err(), "too long ago");
        assert!(users.get_with(&1, Freshness::Fenced).await.is_err());
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        db.execute("update users set name = 'later' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("later"));
    }

    async fn loads_are_refused_after_a_few_that_did_not_reach_postgres(test: Test) {
        let db = users_db(test.version).await;
        let (mut proxy, node) = loads_by_proxy(&db).await;
        let users = open(&node, short().breaker(NonZeroU32::new(2))).await;
        unplug(&mut proxy).await;
        eventually("loads are refused", async || {
            let error = users.get(&1).await.expect_err("it does not answer");
            assert!(error.is_unavailable() || error.is_timeout(), "{error:?}");
            users.stats().refused > 0
        })
        .await;
        let refused = users.get(&2).await.expect_err("refused");
        assert!(refused.to_string().contains("`breaker`"), "{refused}");
        let why = std::error::Error::source(&refused).expect("says why").to_string();
        assert!(why.contains("public.users"), "{why}");
        let stats = users.stats();
        assert_eq!(stats.loads, stats.failed, "{stats:?}");
        assert_eq!(stats.queries + stats.refused, stats.loads, "{stats:?}");
        proxy.accept().await;
        eventually("one is tried, and then all are", async || users.get(&1).await.is_ok()).await;
        for id in 2..=9 {
            name(&users, id).await;
        }
    }

    // Postgres has answered the node; it answers loads too.
    async fn whoever_is_coherent_asks_again(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let mut proxy = Proxy::start(db.port).await;
        let node = Node::start(hasty(&proxy.url(&db.url))).await.expect("starts");
        let users = open(&node, TableOptions::default().load_timeout(SECOND / 2).breaker(NonZeroU32::new(1))).await;
        let mut events = node.subscribe();
        unplug(&mut proxy).await;
        assert!(users.get(&1).await.is_err());
        assert!(users.get(&1).await.expect_err("refused").to_string().contains("`breaker`"));
        proxy.accept().await;
        gap_and_recovery(&mut events).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
    }

    // sqlx tries each connection that is given back to it, and another one would have to be used meanwhile.
    async fn loads_that_follow_each_other_take_one_connection(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = loads_by_proxy(&db).await;
        let users = open(&node, TableOptions::default()).await;
        name(&users, 1).await;
        proxy.set(Direction::Down, Flow::Delay(Duration::from_millis(20)));
        // Unless this thread was held up for so long that the connection was given back.
        eventually("one connection was enough", async || {
            users.forget_all();
            let three = async || {
                for id in 1..=3 {
                    name(&users, id).await;
                }
            };
            used(&proxy, three).await == 1
        })
        .await;
    }

    async fn a_connection_is_not_kept_from_who_waits_for_one(test: Test) {
        let db = users_db(test.version).await;
        let proxy = Proxy::start(db.port).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.pool_connect = Config::from_url(&proxy.url(&db.url)).expect("a good URL").pool_connect;
        config.pool = config.pool.max_connections(1).acquire_timeout(SECOND);
        let node = Node::start(config).await.expect("starts");
        let users = open(&node, TableOptions::default()).await;
        proxy.set(Direction::Down, Flow::Delay(Duration::from_millis(20)));
        let loaders: Vec<_> = (1..=2)
            .map(|id| {
                let users = users.clone();
                tokio::spawn(async move {
                    loop {
                        users.forget(&id);
                        let _ = users.get(&id).await;
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            users.invalidate(&7).await.expect("gets the connection");
        }
        loaders.iter().for_each(tokio::task::JoinHandle::abort);
        node.shutdown().await;
    }
}
