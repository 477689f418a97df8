//! Tables of both kinds on one node, and tables that are moved from one to the other while they are read.

use std::sync::atomic::{AtomicBool, Ordering};

use rowcache::Event;

use super::*;
use crate::{fixture::event, support::eventually};

pg_test! {
    async fn both_kinds_on_one_node(test: Test) {
        let db = log_db(&test).await;
        db.execute("create table public.others (id bigint primary key, name text not null);
            insert into public.others values (1, 'other 1'); select rowcache.track('public.others')").await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = users(&node).await;
        let others: Users = node.table("public.others").await.expect("opens");
        for n in 0..10 {
            name(&users, 1).await;
            name(&others, 1).await;
            db.execute(&format!("begin; update public.users set name = '{n}' where id = 1; \
                update public.others set name = '{n}' where id = 1; commit")).await;
            node.barrier().await.expect("coherent");
            assert!(!is_held(&users, 1) && !is_held(&others, 1));
            assert_eq!((name(&users, 1).await, name(&others, 1).await), (Some(n.to_string()), Some(n.to_string())));
        }
    }

    async fn who_does_not_listen_refuses_what_only_listeners_hear(test: Test) {
        let db = users_db(test.version).await;
        let node = Node::start(deaf(&db.url)).await.expect("starts");
        let error = node.table::<i64, fixture::User>("public.users").await.expect_err("it is told with NOTIFY");
        assert!(error.is_not_tracked(), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("NOTIFY") && text.contains("rowcache track public.users --via log"), "{text}");
        db.execute(VIA_LOG).await;
        let users = users(&node).await;
        name(&users, 1).await;
        // And moved back, under its feet.
        test.logs.allow("the triggers or the definition of this table changed; its reads go to Postgres");
        db.execute("select rowcache.track('public.users', via => 'notify')").await;
        node.barrier().await.expect("coherent");
        let why = users.status().to_string();
        assert!(!is_held(&users, 1) && why.contains("--via log"), "{why}");
        name(&users, 1).await;
        assert!(!is_held(&users, 1));
        db.execute(VIA_LOG).await;
        node.barrier().await.expect("coherent");
        name(&users, 1).await;
        assert!(is_held(&users, 1));
    }

    // Writers go on, readers go on, and the table changes hands ten times. No fenced read is ever behind.
    async fn a_table_changes_hands_while_it_is_written_and_read(test: Test) {
        let db = users_db(test.version).await;
        // Often, so that it is soon over; and patient, since all others run beside it.
        let mut config = rowcache::Config::from_url(&db.url).expect("a good URL");
        config.beat = std::time::Duration::from_millis(100);
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let ended = AtomicBool::new(false);
        let write = async {
            let client = db.client().await;
            let mut n = 0;
            while !ended.load(Ordering::Relaxed) {
                n += 1;
                client.batch_execute(&format!("update public.users set name = '{n}' where id = 1")).await.expect("writes");
                let row = users.get_with(&1, rowcache::Freshness::Fenced).await.expect("reads").expect("there");
                assert_eq!(row.name, n.to_string(), "what was committed before the read began");
            }
            n
        };
        let switch = async {
            for n in 0..10 {
                let via = if n % 2 == 0 { "log" } else { "notify" };
                db.execute(&format!("select rowcache.track('public.users', via => '{via}')")).await;
                eventually("the row is held again", async || { name(&users, 1).await; is_held(&users, 1) }).await;
            }
            ended.store(true, Ordering::Relaxed);
        };
        let (written, ()) = tokio::join!(write, switch);
        assert!(written > 10);
    }

    // It is told within some milliseconds, without anybody asking for a fence.
    async fn changes_arrive_by_themselves(test: Test) {
        let db = log_db(&test).await;
        for (node, users) in both(&db).await {
            name(&users, 4).await;
            let mut events = node.subscribe();
            db.execute("update public.users set name = 'x' where id = 4").await;
            let of = |event: &Event| matches!(event, Event::Change(change) if change.table.as_deref() == Some("public.users"));
            event(&mut events, "the change", of).await;
            assert!(!is_held(&users, 4));
        }
    }
}
