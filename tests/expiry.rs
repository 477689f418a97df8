//! How long entries live while nothing changes: on a real node, with its own clock.

#![cfg(feature = "verify")]

#[macro_use]
mod support;
mod fixture;

use std::time::Duration;

use fixture::{Users, name, node, users_db};
use rowcache::TableOptions;
use support::eventually;

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
