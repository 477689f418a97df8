//! On a hot standby: log and rows are read from the same one, so what it has not replayed is neither told nor loaded.

use rowcache::{Event, Freshness, cli::temp_server::TempServer};

use super::*;
use crate::{
    fixture::event,
    support::{connect, eventually},
};

const LOST: &str = "LISTEN connection was lost";
const AGAIN: &str = "cannot open the LISTEN connection";

/// A primary, its standby, and the test's database on both.
async fn pair(test: &support::Test, settings: &[(&str, &str)]) -> ([TempServer; 2], TestDb, TestDb) {
    let (mut primary, db) = fixture::users_server(test.version, settings).await;
    db.execute(VIA_LOG).await;
    let standby = primary.standby().await.expect("makes a standby");
    let db = TestDb { url: primary.url(&db.name), port: primary.port(), ..db };
    let copy = TestDb { url: standby.url(&db.name), port: standby.port(), ..db.clone() };
    ([primary, standby], db, copy)
}

/// Returns when the standby has replayed all that the primary has logged.
async fn caught_up(primary: &TestDb, standby: &TestDb) {
    let (primary, standby) = (connect(&primary.url).await, connect(&standby.url).await);
    let at: String =
        primary.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.expect("a position").get(0);
    eventually("the standby has caught up", async || {
        standby.query_one("select pg_last_wal_replay_lsn() >= $1::text::pg_lsn", &[&at]).await.expect("compares").get(0)
    })
    .await;
}

async fn replay(standby: &TestDb, pause: bool) {
    let what = if pause { "select pg_wal_replay_pause()" } else { "select pg_wal_replay_resume()" };
    let client = connect(&standby.url).await;
    client.batch_execute(what).await.expect("a standby");
    if pause {
        eventually("replay is paused", async || {
            client.query_one("select pg_get_wal_replay_pause_state() = 'paused'", &[]).await.expect("tells").get(0)
        })
        .await;
    }
}

pg_test! {
    async fn a_standby_that_lags_is_behind_as_a_whole(test: Test) {
        let (_servers, db, copy) = pair(&test, &[]).await;
        let node = Node::start(deaf(&copy.url)).await.expect("starts");
        let users = users(&node).await;
        for id in 1..=3 {
            name(&users, id).await;
        }
        replay(&copy, true).await;
        db.execute("update public.users set name = 'new' where id <= 2").await;
        node.barrier().await.expect("coherent with its standby");
        assert!(is_held(&users, 1), "the standby has not heard of it");
        // What is loaded now is as old, and is kept: it is what the standby shows.
        users.invalidate(&2).await.expect_err("a standby takes no messages");
        assert_eq!(name(&users, 2).await.as_deref(), Some("user 2"));
        assert!(is_held(&users, 2));
        replay(&copy, false).await;
        caught_up(&db, &copy).await;
        node.barrier().await.expect("coherent");
        assert_eq!((is_held(&users, 1), is_held(&users, 2), is_held(&users, 3)), (false, false, true));
        for id in 1..=2 {
            assert_eq!(name(&users, id).await.as_deref(), Some("new"));
        }
    }

    // On a standby no snapshot names the transactions that run: only by which ones were read can late ones be told.
    async fn who_commits_late_is_read_late(test: Test) {
        let (_servers, db, copy) = pair(&test, &[]).await;
        let node = Node::start(deaf(&copy.url)).await.expect("starts");
        let users = users(&node).await;
        let (one, two) = (db.client().await, db.client().await);
        for id in 1..=3 {
            name(&users, id).await;
        }
        let held = async || {
            caught_up(&db, &copy).await;
            node.barrier().await.expect("coherent");
            (1..=3).filter(|id| is_held(&users, *id)).collect::<Vec<_>>()
        };
        one.batch_execute("begin; update public.users set name = 'new' where id = 1").await.expect("writes");
        two.batch_execute("update public.users set name = 'new' where id = 2").await.expect("writes");
        assert_eq!(held().await, [1, 3]);
        assert_eq!(name(&users, 2).await.as_deref(), Some("new"));
        for _ in 0..3 {
            two.batch_execute("update public.users set name = name where id = 3").await.expect("writes");
            assert_eq!(held().await, [1, 2], "what was read is not read again");
        }
        one.batch_execute("commit").await.expect("commits");
        assert_eq!(held().await, [2]);
        assert_eq!(name(&users, 1).await.as_deref(), Some("new"));
        let row = users.get_with(&1, Freshness::Fenced).await.expect("reads").expect("there");
        assert_eq!(row.name, "new", "of the standby");
    }

    async fn a_token_of_the_primary_is_not_the_standbys(test: Test) {
        let (_servers, db, copy) = pair(&test, &[]).await;
        let node = Node::start(deaf(&copy.url)).await.expect("starts");
        let writer = Node::start(deaf(&db.url)).await.expect("starts");
        let mut write = writer.begin().await.expect("begins");
        sqlx::query("update public.users set name = 'x' where id = 1").execute(&mut *write).await.expect("writes");
        let token = write.commit().await.expect("commits");
        let error = node.wait_for(token, support::PATIENCE).await.expect_err("nobody knows");
        assert!(error.is_other_incarnation(), "{error:?}");
    }

    // A promotion goes on where the standby was. But whoever was coherent with a standby must find out.
    async fn a_promotion_is_a_new_incarnation(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow("another server than the LISTEN connection");
        let (mut servers, db, copy) = pair(&test, &[]).await;
        let node = Node::start(deaf(&copy.url)).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        caught_up(&db, &copy).await;
        let mut events = node.subscribe();
        servers[0].stop(rowcache::cli::temp_server::Stop::Immediate).await.expect("stops");
        servers[1].promote().await.expect("promotes");
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(!is_held(&users, 1));
        copy.execute("update public.users set name = 'of the new primary' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("of the new primary"));
        assert!(is_held(&users, 1));
    }
}
