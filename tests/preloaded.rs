//! Small tables, held in whole.

use rowcache::{Preloaded, TableOptions};

use crate::{
    fixture::{self, KILL_LISTENERS, User, gap_and_recovery, hasty, users_db},
    support::eventually,
};

type Users = Preloaded<i64, User>;

fn by_id(user: &User) -> i64 {
    user.id
}

async fn all_users(node: &rowcache::Node) -> Users {
    node.preloaded("public.users", by_id, TableOptions::default()).await.expect("opens")
}

async fn name(users: &Users, id: i64) -> Option<String> {
    users.get(&id).await.expect("held, or loads").map(|user| user.name.clone())
}

pg_test! {
    async fn a_small_table_is_in_memory_and_read_again_when_it_changes(test: Test) {
        let db = users_db(test.version).await;
        let node = fixture::node(&db).await;
        let users = all_users(&node).await;
        assert_eq!(users.stats().loads, 1, "before anybody asks");
        for id in 1..=10 {
            assert_eq!(name(&users, id).await, Some(format!("user {id}")));
        }
        assert_eq!(name(&users, 11).await, None);
        assert_eq!((users.all().await.expect("held").len(), users.stats().loads), (10, 1));
        for (change, id, wanted) in [
            ("update public.users set name = 'changed' where id = 1", 1, Some("changed")),
            ("insert into public.users values (11, 'new')", 11, Some("new")),
            ("delete from public.users where id = 11", 11, None),
            ("truncate public.users", 1, None),
        ] {
            let loads = users.stats().loads;
            db.execute(change).await;
            node.barrier().await.expect("a fence");
            assert_eq!(name(&users, id).await.as_deref(), wanted, "{change}");
            eventually("one is held, which nobody may have asked for", async || {
                let stats = users.stats();
                stats.loads > loads && stats.entries == 1 && stats.loads == stats.published + stats.voided
            }).await;
        }
        assert!(users.all().await.expect("held").is_empty());
    }

    async fn it_is_read_again_though_nobody_asks_for_it(test: Test) {
        let db = users_db(test.version).await;
        let node = fixture::node(&db).await;
        let users = all_users(&node).await;
        let gets = users.stats().gets;
        for n in 0..3 {
            let published = users.stats().published;
            db.execute(&format!("update public.users set name = 'round {n}' where id = 1")).await;
            node.barrier().await.expect("a fence");
            eventually("read again", async || users.stats().published > published).await;
        }
        assert_eq!(users.stats().gets, gets);
        assert_eq!(name(&users, 1).await.as_deref(), Some("round 2"));
    }

    async fn it_is_read_again_after_a_gap(test: Test) {
        let db = users_db(test.version).await;
        let node = rowcache::Node::start(hasty(&db.url)).await.expect("starts");
        let users = all_users(&node).await;
        let (mut events, published) = (node.subscribe(), users.stats().published);
        test.logs.allow("LISTEN connection was lost");
        db.execute(&format!("begin; {KILL_LISTENERS}; update public.users set name = 'unseen' where id = 1; commit")).await;
        gap_and_recovery(&mut events).await;
        eventually("read again", async || users.stats().published > published).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("unseen"));
    }

    async fn what_is_too_large_or_not_unique_is_refused(test: Test) {
        let db = users_db(test.version).await;
        let node = fixture::node(&db).await;
        let large = node.preloaded("public.users", by_id, TableOptions::default().capacity(9)).await.expect_err("10 rows");
        assert!(large.is_loader() && large.to_string().contains("public.users"), "{large}");
        let node = fixture::node(&db).await;
        let twice = node.preloaded("public.users", |_: &User| 1_i64, TableOptions::default()).await.expect_err("one key");
        assert!(twice.is_loader(), "{twice}");
        let mut causes = String::new();
        let mut cause: Option<&dyn std::error::Error> = Some(&twice);
        while let Some(error) = cause {
            causes += &format!("{error}; ");
            cause = error.source();
        }
        assert!(causes.contains("two rows of public.users have the key 1"), "{causes}");
    }
}
