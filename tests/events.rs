//! What is told of the entries of a table, as it happens and afterwards.

use std::time::Duration;

use rowcache::{Cause, Config, Event, Freshness, Node, Table, TableEvent, TableEvents, TableOptions};

use crate::{
    fixture::{self, KILL_LISTENERS, SESSIONS, Users, event, hasty, migrated, name, node, users, users_db},
    support::{self, TestDb, eventually, proxy::Proxy},
};

async fn next(events: &mut TableEvents<i64>) -> TableEvent<i64> {
    tokio::time::timeout(support::PATIENCE, events.recv()).await.expect("it is told").expect("the node runs")
}

/// The transaction that did this.
async fn xid(db: &TestDb, sql: &str) -> u64 {
    let client = db.client().await;
    let script = format!("begin; {sql}; select pg_current_xact_id()::text as xid; commit");
    let answers = client.simple_query(&script).await.expect("runs");
    let xid = answers.iter().find_map(|answer| match answer {
        tokio_postgres::SimpleQueryMessage::Row(row) => row.get("xid").map(str::to_owned),
        _ => None,
    });
    xid.expect("it has one").parse().expect("a number")
}

macro_rules! told {
    ($events:expr, $pattern:pat $(if $guard:expr)?) => {{
        let event = next(&mut $events).await;
        assert!(matches!(&event, $pattern $(if $guard)?), "{event:?}");
    }};
}

pg_test! {
    async fn what_happens_to_entries_is_told_in_order(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().capacity(8).ttl(Duration::from_secs(1)).jitter(0.0);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 9).await;
        let mut events = users.subscribe();
        name(&users, 9).await;
        name(&users, 1).await;
        told!(events, TableEvent::Loaded { key: 1, found: true });
        name(&users, 99).await;
        told!(events, TableEvent::Loaded { key: 99, found: false });

        let writer = xid(&db, "update public.users set name = 'changed' where id = 1").await;
        node.barrier().await.expect("coherent");
        let by = Cause::Change { table: Some("public.users".into()), xid: Some(writer) };
        told!(events, TableEvent::Invalidated { key: 1, by: cause } if *cause == by);
        assert_eq!(by.to_string(), format!("a change of public.users by transaction {writer}"));
        let text = users.explain(&1).to_string();
        assert!(text.starts_with("public.users 1 is not held: forgotten because of a change of public.users by transaction"), "{text}");

        users.invalidate(&99).await.expect("all are told");
        told!(events, TableEvent::Invalidated { key: 99, by: Cause::Change { xid: None, .. } });
        node.barrier().await.expect("coherent");
        name(&users, 2).await;
        told!(events, TableEvent::Loaded { key: 2, .. });
        users.clear().await.expect("all are told");
        told!(events, TableEvent::Cleared { by: Cause::Change { xid: None, .. } });
        assert!(users.explain(&2).to_string().contains("with all others because of a call that named public.users"));

        db.execute("insert into public.users select n, 'new' from generate_series(101, 200) n").await;
        node.barrier().await.expect("coherent");
        let mut later = users.subscribe();
        for id in 101..=140 {
            name(&users, id).await;
        }
        let mut evicted = 0;
        while evicted == 0 {
            evicted += u32::from(matches!(next(&mut later).await, TableEvent::Evicted { .. }));
        }
        let held = (101..=140).find(|id| users.peek(id).is_known()).expect("some are");
        eventually("it has expired", async || !users.peek(&held).is_known()).await;
        name(&users, held).await;
        loop {
            if matches!(next(&mut later).await, TableEvent::Expired { key } if key == held) {
                break;
            }
        }
        node.shutdown().await;
        while later.recv().await.is_some() {}
    }

    async fn gaps_and_what_is_served_in_them(test: Test) {
        test.logs.allow("LISTEN connection was lost");
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        let (mut events, mut of_node) = (users.subscribe(), node.subscribe());
        db.execute(KILL_LISTENERS).await;
        event(&mut of_node, "a gap", |event| matches!(event, Event::Gap(_))).await;
        let stale = users.get_with(&1, Freshness::Any).await.expect("held, or read").is_some();
        assert!(stale);
        node.until_coherent().await.expect("it comes back");
        told!(events, TableEvent::Gap);
        let mut rest = Vec::new();
        loop {
            match next(&mut events).await {
                TableEvent::Coherent => break,
                other => rest.push(other),
            }
        }
        assert!(rest.iter().all(|event| matches!(event, TableEvent::HitStale { key: 1 } | TableEvent::Uncached { key: 1 })), "{rest:?}");
        let text = users.explain(&1).to_string();
        assert!(text.contains("because of a gap") || text.contains("is held"), "{text}");
        node.set_caching(false);
        told!(events, TableEvent::Gap);
        assert!(users.explain(&1).to_string().contains("caching"), "{}", users.explain(&1));
        node.set_caching(true);
        told!(events, TableEvent::Coherent);
    }

    async fn loads_that_a_change_overtakes_and_loads_that_fail(test: Test) {
        let db = users_db(test.version).await;
        let mut proxy = Proxy::start(db.port).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.pool_connect = Config::from_url(&proxy.url(&db.url)).expect("a good URL").pool_connect;
        config.load_timeout = Duration::from_secs(1);
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let mut events = users.subscribe();
        let lock = db.client().await;
        lock.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        let reader = tokio::spawn({
            let users = users.clone();
            async move { users.get(&1).await }
        });
        eventually("the load is under way", async || users.explain(&1).is_loading).await;
        assert!(users.explain(&1).to_string().ends_with("a load is under way"));
        users.invalidate(&1).await.expect("all are told");
        lock.batch_execute("commit").await.expect("unlocks");
        reader.await.expect("no panic").expect("loads");
        told!(events, TableEvent::Voided { key: 1 });
        proxy.refuse().await;
        proxy.close_all(support::proxy::Close::Rst).await;
        users.get(&2).await.expect_err("nobody answers");
        told!(events, TableEvent::Failed { key: 2, error } if error.is_unavailable());
    }

    async fn who_is_too_slow_is_told_how_much_he_missed(test: Test) {
        let db = users_db(test.version).await;
        let mut config = hasty(&db.url);
        config.events_max = 4;
        let node = Node::start(config).await.expect("starts");
        let options = TableOptions::default().history(2);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        let mut events = users.subscribe();
        for id in 1..=10 {
            name(&users, id).await;
        }
        told!(events, TableEvent::Lagged(6));
        told!(events, TableEvent::Loaded { key: 7, .. });
    }

    async fn a_key_is_explained(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        let unknown = users.explain(&1);
        assert!(unknown.held.is_none() && unknown.last.is_none(), "{unknown:?}");
        assert_eq!(unknown.to_string(), "public.users 1 is not held: nobody asked for it, or that is too long ago");
        // At once: the clock thread has not told the table the time yet.
        let views = node.list_by::<i64, fixture::User>("public.users", ["id"], TableOptions::default()).await.expect("opens");
        node.set_caching(false);
        node.set_caching(true);
        let (age, _) = views.explain(&1).last.expect("all was forgotten");
        assert!(age < Duration::from_mins(1), "{age:?} ago");
        node.until_coherent().await.expect("coherent");
        for id in [1, 99] {
            name(&users, id).await;
        }
        users.pin(&1);
        node.barrier().await.expect("coherent");
        let row = users.explain(&1);
        let held = row.held.expect("it is");
        assert!(held.is_row && held.is_served && held.is_fenced && held.seen_to.is_some() && row.is_pinned);
        assert!(held.expires_in.is_some_and(|left| left > Duration::from_mins(50)), "{held:?}");
        assert!(row.to_string().contains("and fenced since; it expires in"), "{row}");
        assert!(users.explain(&99).to_string().starts_with("public.users 99 is held as absent: loaded"));
        let ticket = users.ticket(&5);
        assert!(ticket.put(fixture::User { id: 5, name: "user 5".into() }));
        assert!(users.explain(&5).to_string().starts_with("public.users 5 is held: put in"));
        assert_eq!(users.stats().gets, 2, "it counts as nothing");
    }

    async fn a_secret_key_is_not_shown(test: Test) {
        let db = migrated(test.version).await;
        db.execute(SESSIONS).await;
        let sessions: Table<String, fixture::User> = node(&db).await.table("public.sessions").await.expect("opens");
        let token = String::from("tok");
        sessions.get(&token).await.expect("loads");
        let text = sessions.explain(&token).to_string();
        assert!(text.starts_with("public.sessions (a secret) is held as absent") && !text.contains("tok"), "{text}");
    }
}
