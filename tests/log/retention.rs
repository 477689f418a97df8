//! What has been in the log for long enough is removed, which loses nothing to anybody who was there.

use rowcache::{Event, cli::temp_server::TempServer};

use super::{away::*, *};
use crate::{fixture::event, support::proxy::Close};

/// [`log_db`] on a server of its own: what runs in any database of a server keeps the messages of all.
async fn log_server(test: &support::Test) -> (TempServer, TestDb) {
    let (server, db) = fixture::users_server(test.version, &[]).await;
    db.execute(VIA_LOG).await;
    (server, db)
}

/// The messages that the log has of this row.
async fn kept(db: &TestDb, id: i64) -> i64 {
    let count = "select count(*) from rowcache.change_log where message like '%[' || $1 || ']%'";
    db.client().await.query_one(count, &[&id.to_string()]).await.expect("counts").get(0)
}

/// Removes all but what still runs may need. Returns whether that is done.
async fn trim(db: &TestDb) -> bool {
    let trim = "select rowcache.trim_log(pg_snapshot_xmax(pg_current_snapshot()))";
    db.client().await.query_one(trim, &[]).await.expect("trims").get(0)
}

pg_test! {
    async fn what_is_older_than_the_retention_is_removed(test: Test) {
        let db = log_db(&test).await;
        let mut config = deaf(&db.url);
        config.log_retention = config.lease;
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        for id in 1..=3 {
            name(&users, id).await;
        }
        let early = db.client().await;
        early.batch_execute("begin; update public.users set name = 'early' where id = 1").await.expect("writes");
        db.execute("update public.users set name = 'late' where id = 2").await;
        node.barrier().await.expect("coherent");
        assert!(!is_held(&users, 2));
        early.batch_execute("commit").await.expect("commits");
        node.barrier().await.expect("coherent");
        assert!(!is_held(&users, 1));
        // From one retention to the next.
        while kept(&db, 1).await + kept(&db, 2).await > 0 {
            node.barrier().await.expect("coherent");
        }
        assert!(is_held(&users, 3), "who was there has missed nothing");
    }

    async fn what_still_runs_keeps_its_messages(test: Test) {
        let db = log_db(&test).await;
        let early = db.client().await;
        early.batch_execute("begin; update public.users set name = 'early' where id = 1").await.expect("writes");
        let nodes = both(&db).await;
        for (_, users) in &nodes {
            for id in 1..=3 {
                name(users, id).await;
            }
        }
        db.execute("update public.users set name = 'late' where id = 2").await;
        for (node, users) in &nodes {
            node.barrier().await.expect("coherent");
            assert!(!is_held(users, 2));
        }
        assert!(trim(&db).await);
        early.batch_execute("commit").await.expect("commits");
        assert_eq!(kept(&db, 1).await, 1);
        for (node, users) in &nodes {
            node.barrier().await.expect("coherent");
            assert!(!is_held(users, 1) && is_held(users, 3));
        }
    }

    async fn who_was_away_for_longer_than_the_retention_forgets_everything(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow(TRIMMED);
        let (_server, db) = log_server(&test).await;
        let (mut proxy, node, users) = by_proxy(&db, deaf).await;
        for id in 1..=2 {
            name(&users, id).await;
        }
        let mut events = node.subscribe();
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        db.execute("update public.users set name = 'long ago' where id = 1").await;
        assert!(trim(&db).await);
        assert_eq!(kept(&db, 1).await, 0);
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!is_held(&users, 1) && !is_held(&users, 2));
        assert_eq!(name(&users, 1).await.as_deref(), Some("long ago"));
    }

    // In one statement it would hold up whoever trims.
    async fn a_large_rest_is_removed_in_parts(test: Test) {
        let db = log_db(&test).await;
        let write = "do $$ begin for n in 1..45 loop insert into rowcache.change_log_0 (xid, message)
            select '5'::xid8, 'x' from generate_series(1, 1000); end loop; end $$";
        db.execute(write).await;
        let mut calls = 1;
        while !trim(&db).await {
            calls += 1;
        }
        let left: i64 = db.client().await.query_one("select count(*) from rowcache.change_log", &[]).await.expect("counts").get(0);
        assert_eq!((calls, left), (3, 0));
    }

    // A transaction from below the horizon, of which everybody knows that it runs: that it has ended, and its messages are gone, shows
    // in nothing but that the horizon moves.
    async fn who_ends_below_the_horizon_is_not_removed_unnoticed(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow(TRIMMED);
        let (_server, db) = log_server(&test).await;
        let early = db.client().await;
        early.batch_execute("begin; update public.users set name = 'early' where id = 1").await.expect("writes");
        // As if bins had been emptied since.
        db.execute("select setval('rowcache.log_horizon', pg_current_xact_id()::text::bigint)").await;
        let (mut proxy, node, users) = by_proxy(&db, deaf).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        let mut events = node.subscribe();
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        early.batch_execute("commit").await.expect("commits");
        db.execute("select rowcache.trim_log(last_value::text::xid8) from rowcache.log_horizon").await;
        assert_eq!(kept(&db, 1).await, 0);
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("early"));
    }

    // The horizon is what tells a node that it has missed something: it never goes back, and moves with all that is removed, and no
    // further than it must: who is there would take himself for one that was away.
    async fn who_trims_waits_for_nobody_and_takes_nothing_back(test: Test) {
        let (_server, db) = log_server(&test).await;
        let (other, horizon) = (db.client().await, async || {
            let last = "select last_value from rowcache.log_horizon";
            db.client().await.query_one(last, &[]).await.expect("reads").get::<_, i64>(0)
        });
        for emptied in 1..=2 {
            db.execute("insert into rowcache.change_log_1 (message) values ('late')").await;
            db.execute("select rowcache.trim_log()").await;
            assert_eq!(horizon().await, emptied);
        }
        db.execute("update public.users set name = 'x' where id = 2").await;
        other.batch_execute("begin; select rowcache.trim_log('3')").await.expect("trims");
        assert!(!trim(&db).await, "somebody trims already");
        other.batch_execute("commit").await.expect("commits");
        assert!(trim(&db).await);
        let high = horizon().await;
        assert!(high > 3);
        db.execute("select rowcache.trim_log('3'), rowcache.trim_log()").await;
        assert_eq!(horizon().await, high);
    }

    // Between the look that finds a bin due and the lock on it, another bin may have become the one that is written to next, and this one
    // the one that is written to.
    async fn only_the_bin_that_is_written_to_next_is_emptied(test: Test) {
        let (_server, db) = log_server(&test).await;
        db.execute("update public.users set name = 'x' where id = 1").await;
        let client = db.client().await;
        for (bin, is_next) in [(0, false), (1, true), (2, false)] {
            let empty = "select rowcache.empty_log_bin($1)";
            assert_eq!(client.query_one(empty, &[&bin]).await.expect("looks").get::<_, bool>(0), is_next);
        }
        assert_eq!(kept(&db, 1).await, 1);
    }

    async fn who_looks_from_before_the_locks_may_not_trim(test: Test) {
        let db = log_db(&test).await;
        let client = db.client().await;
        client.batch_execute("begin isolation level repeatable read").await.expect("begins");
        let error = client.batch_execute("select rowcache.trim_log()").await.expect_err("refused");
        let message = error.as_db_error().map(|error| error.message().to_owned());
        assert_eq!(message.as_deref(), Some("the change log is trimmed with isolation repeatable read, not read committed"));
    }
}
