//! How long entries live while nothing changes: on a real node, with its own clock.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use rowcache::{OnChange, Table, TableOptions};

use crate::{
    fixture::{Users, name, node, users_db},
    support::eventually,
};

const SECOND: Duration = Duration::from_secs(1);

pg_test! {
    async fn a_row_is_read_again_when_it_is_too_old(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().ttl(SECOND).jitter(0.0);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        assert_eq!(users.stats().loads, 1);
        eventually("it is read again", async || {
            name(&users, 1).await;
            users.stats().loads > 1
        })
        .await;
        assert_eq!(users.stats().expired, 1);
    }

    async fn what_is_used_is_read_again_and_nobody_waits(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().ttl(3 * SECOND).jitter(0.0).refresh_ahead(0.1);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        let misses = users.stats().misses;
        eventually("it is read again", async || {
            assert!(users.try_get(&1).is_known());
            users.stats().refreshed >= 2
        })
        .await;
        assert_eq!((users.stats().misses, users.stats().expired), (misses, 0));
    }

    async fn what_was_used_and_has_changed_is_read_again(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().on_change(OnChange::Refresh);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        for id in [1, 2, 99] {
            let _ = users.get(&id).await.expect("loads");
        }
        for id in [1, 99] {
            assert!(users.try_get(&id).is_known(), "used");
        }
        db.execute("update public.users set name = 'new' where id in (1, 2); insert into public.users values (99, 'new')").await;
        node.barrier().await.expect("coherent");
        eventually("both are held again", async || users.stats().refreshed == 2).await;
        for id in [1, 99] {
            assert_eq!(users.peek(&id).row().expect("held").name, "new");
        }
        assert!(!users.peek(&2).is_known(), "nobody had used it");
    }

    // Whatever the number of changes.
    async fn what_changes_all_the_time_is_read_now_and_then(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().on_change(OnChange::Refresh);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        let began = Instant::now();
        let writes = db.execute("do $$ begin for n in 1..3000 loop update public.users set name = n::text where id = 1; commit; end loop; end $$");
        // Who waits for a row asks for a load himself; this one does not.
        let reads = async {
            loop {
                let _ = users.try_get(&1);
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = writes => {}
            () = reads => unreachable!("it never ends"),
        }
        node.barrier().await.expect("coherent");
        let rounds = began.elapsed().as_millis() / 10 + 1;
        let stats = users.stats();
        assert!(u128::from(stats.loads) <= 1 + rounds, "{} loads in {rounds} rounds", stats.loads);
        assert_eq!(stats.invalidations, 3000);
        assert_eq!(name(&users, 1).await.as_deref(), Some("3000"));
    }

    // The clock thread ends the lease: whatever values do when they are dropped must not keep it from that.
    async fn values_are_not_dropped_by_the_clock_thread(test: Test) {
        #[derive(sqlx::FromRow)]
        struct Witness {
            #[allow(dead_code)] // it is there, as in any table
            id: i64,
        }

        static DROPPED_BY: Mutex<Vec<Option<String>>> = Mutex::new(Vec::new());

        impl Drop for Witness {
            fn drop(&mut self) {
                let name = std::thread::current().name().map(str::to_owned);
                DROPPED_BY.lock().expect("no panic").push(name);
            }
        }

        let db = users_db(test.version).await;
        let node = node(&db).await;
        let witnesses: Table<i64, Witness> =
            node.table_with("public.users", TableOptions::default().ttl(SECOND)).await.expect("opens");
        drop(witnesses.get(&1).await.expect("loads"));
        eventually("it is removed", async || witnesses.stats().expired == 1).await;
        let dropped_by = DROPPED_BY.lock().expect("no panic").clone();
        assert!(!dropped_by.contains(&Some("rowcache-clock".to_owned())), "{dropped_by:?}");
    }

    async fn what_nobody_uses_is_removed(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().idle(SECOND);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        for id in [1, 2, 99] {
            let _ = users.get(&id).await.expect("loads");
        }
        eventually("only what is used is left", async || {
            assert!(users.try_get(&1).is_known());
            users.stats().entries == 1
        })
        .await;
        assert_eq!(users.stats().expired, 2);
    }
}
