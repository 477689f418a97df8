//! What has been in the log for long enough is removed, which loses nothing to anybody who was there.

use rowcache::Event;

use super::{away::*, *};
use crate::{fixture::event, support::proxy::Close};

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
        let db = log_db(&test).await;
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

    // The horizon is what tells a node that it has missed something: it never goes back.
    async fn who_trims_waits_for_nobody_and_takes_nothing_back(test: Test) {
        let db = log_db(&test).await;
        let (other, horizon) = (db.client().await, async || {
            let last = "select last_value from rowcache.log_horizon";
            db.client().await.query_one(last, &[]).await.expect("reads").get::<_, i64>(0)
        });
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
}
