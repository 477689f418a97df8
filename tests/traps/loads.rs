//! Loads that a change overtakes.

use rowcache::{Lookup, Node};

use super::{
    LOST,
    slow::{Slows, setup, slow_name, spawn_get, stop_at},
};
use crate::{
    fixture::{self, KILL_LISTENERS, gap_and_recovery},
    support::{TestDb, eventually},
};

/// Has changes of more rows than this told as the whole table; returns when the node trusts the table again.
async fn tell_all_above(max_keys: u32, db: &TestDb, node: &Node, users: &Slows) {
    db.execute(&format!("select rowcache.track('public.users', max_keys => {max_keys})")).await;
    node.barrier().await.expect("coherent: it has looked");
    slow_name(users, 2).await;
    assert!(users.peek(&2).is_known());
}

pg_test! {
    /// A load read the old row, the change was handled, and the load was kept: Guava #1881, Hazelcast #4671,
    /// FusionCache #535, Trino #10512, Ignite, moka, Logflare, mission-control.
    async fn trap_01_the_load_that_stores_the_old_row(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let mut load = stop_at(&old);
        let early = spawn_get(&users, 1);
        load.reached().await;
        db.execute("update public.users set name = 'new' where id = 1").await;
        node.barrier().await.expect("coherent");
        load.go_on();
        assert_eq!(early.await.expect("ends"), Some(old), "who asked before the change may have the old row");
        assert!(matches!(users.peek(&1), Lookup::Unknown), "but nobody else");
        assert_eq!(slow_name(&users, 1).await.as_deref(), Some("new"));
        let stats = users.stats();
        assert_eq!((stats.voided, stats.published), (1, 1), "{stats:?}");
    }

    /// The same, when not the key but everything was invalidated: Caffeine #251, FusionCache #628, quick_cache's `retain`.
    async fn trap_02_the_load_that_outlives_a_clear(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let other_node = fixture::node(&db).await;
        let elsewhere = fixture::users(&other_node).await;
        tell_all_above(5, &db, &node, &users).await;
        for (how, after) in [
            ("update public.users set name = name || '!'", Some(format!("{old}!"))),
            ("by hand", Some(format!("{old}!"))),
            ("truncate public.users", None),
        ] {
            let now = db.client().await.query_one("select name from public.users where id = 1", &[]).await.expect("reads");
            let now: String = now.get(0);
            let mut load = stop_at(&now);
            let (early, clears) = (spawn_get(&users, 1), users.stats().clears);
            load.reached().await;
            if how == "by hand" {
                elsewhere.clear().await.expect("tells");
            } else {
                db.execute(how).await;
            }
            node.barrier().await.expect("coherent");
            assert!(users.stats().clears > clears, "{how}: told as the whole table");
            load.go_on();
            assert_eq!(early.await.expect("ends"), Some(now), "{how}");
            assert!(matches!(users.peek(&1), Lookup::Unknown), "{how}: not kept");
            assert_eq!(slow_name(&users, 1).await, after, "{how}");
            elsewhere.invalidate(&1).await.expect("tells");
            node.barrier().await.expect("coherent");
        }
    }

    /// The same, when the load was a refresh that ran by itself: Caffeine #193, FusionCache #628.
    async fn trap_03_the_refresh_that_stores_the_old_row(test: Test) {
        test.logs.allow(LOST);
        let (db, node, users, old) = setup(&test).await;
        let change = format!("update public.users set name = '{old}' where id = 1");
        for (how, after) in [("update public.users set name = 'new' where id = 1", Some("new")), ("truncate public.users", None)] {
            db.execute(&change).await;
            node.barrier().await.expect("coherent");
            assert_eq!(slow_name(&users, 1).await.as_ref(), Some(&old));
            let mut events = node.subscribe();
            let mut refresh = stop_at(&old);
            db.execute(KILL_LISTENERS).await;
            gap_and_recovery(&mut events).await;
            refresh.reached().await;
            let gets = users.stats().gets;
            db.execute(how).await;
            node.barrier().await.expect("coherent");
            let refilled = users.stats().refilled;
            refresh.go_on();
            eventually("the refresh has ended", async || users.stats().refilled > refilled).await;
            assert_eq!(users.stats().gets, gets, "nobody had asked");
            assert!(matches!(users.peek(&1), Lookup::Unknown), "{how}: the refresh was overtaken");
            assert_eq!(slow_name(&users, 1).await.as_deref(), after, "{how}");
        }
    }

    /// "No such row" was kept after the message of the INSERT had been handled: Logflare, Uber.
    async fn trap_04_the_absence_that_outlives_the_insert(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let mut load = stop_at(&old);
        let both = {
            let users = users.clone();
            // One statement reads both; the row that exists holds up the one that does not.
            tokio::spawn(async move { users.get_many(&[77, 1]).await.expect("loads").len() })
        };
        load.reached().await;
        db.execute("insert into public.users values (77, 'born')").await;
        node.barrier().await.expect("coherent");
        load.go_on();
        assert_eq!(both.await.expect("ends"), 2);
        assert!(matches!(users.peek(&77), Lookup::Unknown), "absence was not cached");
        assert_eq!(slow_name(&users, 77).await.as_deref(), Some("born"));
        assert!(users.peek(&1).is_known(), "the other row was not touched");
    }

    /// A reader who came after the change was given the load from before it: HydraCache ADR-0014, waiters of quick_cache.
    async fn trap_05_the_reader_who_joins_an_overtaken_load(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        tell_all_above(1, &db, &node, &users).await;
        // Told as a key, and told as the whole table.
        for (changed, after) in [("id = 1", "new"), ("id in (1, 2)", "newer")] {
            // The test on the other server has names of its own: loads are stopped by them.
            let after = format!("{after}, not {old}");
            let before = slow_name(&users, 1).await.expect("exists");
            users.invalidate(&1).await.expect("tells");
            node.barrier().await.expect("coherent");
            let mut load = stop_at(&before);
            let early = spawn_get(&users, 1);
            load.reached().await;
            db.execute(&format!("update public.users set name = '{after}' where {changed}")).await;
            node.barrier().await.expect("coherent");
            let misses = users.stats().misses;
            let late = spawn_get(&users, 1);
            eventually("the late reader waits", async || users.stats().misses > misses).await;
            load.go_on();
            assert_eq!(early.await.expect("ends"), Some(before));
            assert_eq!(late.await.expect("ends").as_ref(), Some(&after), "who asked after the change has the new row");
            assert_eq!(users.peek(&1).row().expect("cached").name, after, "and so have all others");
        }
        assert_ne!(slow_name(&users, 1).await, Some(old));
    }

    async fn x8_a_load_that_spans_a_gap_is_not_published(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        test.logs.allow(LOST);
        let mut events = node.subscribe();
        let mut load = stop_at(&old);
        let early = spawn_get(&users, 1);
        load.reached().await;
        db.execute(KILL_LISTENERS).await;
        gap_and_recovery(&mut events).await;
        load.go_on();
        assert_eq!(early.await.expect("ends"), Some(old));
        assert!(matches!(users.peek(&1), Lookup::Unknown));
        assert_eq!(users.stats().voided, 1);
    }

    async fn x28_a_hot_key_under_constant_load_is_cached_again_after_a_change(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let mut load = stop_at(&old);
        let early = spawn_get(&users, 1);
        load.reached().await;
        db.execute("update public.users set name = 'new' where id = 1").await;
        node.barrier().await.expect("coherent");
        let crowd: Vec<_> = (0..50).map(|_| spawn_get(&users, 1)).collect();
        load.go_on();
        for reader in crowd {
            assert_eq!(reader.await.expect("ends").as_deref(), Some("new"));
        }
        early.await.expect("ends");
        assert!(users.peek(&1).is_known(), "cached");
        assert!(users.stats().loads <= 3, "one load for each side of the change: {:?}", users.stats());
    }
}
