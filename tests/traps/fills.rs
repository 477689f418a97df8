//! Loads that read what is not current to begin with.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rowcache::{Config, Error, Node};

use crate::{
    fixture::{hasty, name, node, users, users_db, users_server},
    support::{
        TestDb, connect, eventually,
        proxy::{Close, Proxy},
    },
};

/// A node whose pool runs this before each load, once it is switched on.
async fn with_hook(db: &TestDb, sql: &'static str) -> (Node, Arc<AtomicBool>) {
    let on = Arc::new(AtomicBool::new(false));
    let switch = Arc::clone(&on);
    let mut config = Config::from_url(&db.url).expect("a good URL");
    config.pool = config.pool.max_connections(1).before_acquire(move |connection, _| {
        let on = switch.load(Ordering::Relaxed);
        Box::pin(async move {
            if on {
                sqlx::raw_sql(sql).execute(connection).await?;
            }
            Ok(true)
        })
    });
    (Node::start(config).await.expect("starts"), on)
}

pg_test! {
    /// A row was read from a replica that had not yet applied the change, and was kept: Logflare #3883, cachalot #37.
    async fn trap_06_the_fill_from_a_replica(test: Test) {
        for line in ["cannot open the LISTEN connection", "another server than the LISTEN connection"] {
            test.logs.allow(line);
        }
        let (mut primary, db) = users_server(test.version, &[]).await;
        let replica = primary.standby().await.expect("makes a standby");
        let to_pool = Proxy::start(primary.port()).await;
        let mut config = hasty(&to_pool.url(&db.url));
        config.listener = hasty(&db.url).listener;
        let node = Node::start(config.clone()).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        let on_replica = connect(&replica.url(&db.name)).await;
        let old = async |what: &str| {
            let row = on_replica.query_opt("select name from public.users where id = 1", &[]).await.expect(what);
            row.map(|row| row.get::<_, String>(0))
        };
        eventually("the replica has the table", async || {
            on_replica.query("select from public.users", &[]).await.is_ok_and(|rows| rows.len() == 10)
        })
        .await;
        on_replica.batch_execute("select pg_wal_replay_pause()").await.expect("pauses");
        eventually("the replica stands still", async || {
            let state = on_replica.query_one("select pg_get_wal_replay_pause_state()", &[]).await.expect("asks");
            state.get::<_, String>(0) == "paused"
        })
        .await;
        db.execute("update public.users set name = 'new' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert_eq!(old("lags behind").await.as_deref(), Some("user 1"));
        // The pool's address moves to it while the node runs.
        to_pool.retarget(replica.port());
        to_pool.close_all(Close::Rst).await;
        let refused = |error: Error| assert!(error.is_refused() || error.is_standby(), "{error:?}");
        refused(users.get(&1).await.expect_err("rows of a replica are not to be had"));
        assert!(!users.peek(&1).is_known());
        // And a node that starts there is told so.
        let error = Node::start(config).await.expect_err("its rows lag behind");
        assert!(error.is_standby() && error.to_string().contains("pool"), "{error:?}");
        to_pool.retarget(db.port);
        to_pool.close_all(Close::Rst).await;
        eventually("the row is read from the primary", async || {
            users.get(&1).await.is_ok_and(|user| user.is_some_and(|user| user.name == "new"))
        })
        .await;
    }

    /// A row was read in a transaction whose snapshot was from before the change: cacheops #22, a rule of identity_cache.
    async fn trap_07_the_fill_from_an_old_snapshot(test: Test) {
        // Sessions that default to it: each load is a transaction of its own.
        let db = users_db(test.version).await;
        db.execute(&format!("alter database {} set default_transaction_isolation = 'repeatable read'", db.name)).await;
        let in_sessions = node(&db).await;
        let users_here = users(&in_sessions).await;
        for n in 0..5 {
            db.execute(&format!("update public.users set name = 'n{n}' where id = 1")).await;
            in_sessions.barrier().await.expect("coherent");
            assert_eq!(name(&users_here, 1).await, Some(format!("n{n}")));
            assert!(users_here.peek(&1).is_known());
        }
        // A hook of the pool that leaves a transaction open: each load but the first has the snapshot of the first.
        for isolation in ["repeatable read", "serializable", "read committed"] {
            let db = users_db(test.version).await;
            let begin = match isolation {
                "repeatable read" => "begin isolation level repeatable read",
                "serializable" => "begin isolation level serializable",
                _ => "begin",
            };
            let (node, on) = with_hook(&db, begin).await;
            let users = users(&node).await;
            on.store(true, Ordering::Relaxed);
            assert_eq!(name(&users, 2).await.as_deref(), Some("user 2"), "takes the snapshot");
            db.execute("update public.users set name = 'new' where id = 1").await;
            node.barrier().await.expect("coherent");
            name(&users, 1).await;
            if isolation == "read committed" {
                assert_eq!(users.peek(&1).row().expect("each statement has a snapshot of its own").name, "new");
            } else {
                assert!(!users.peek(&1).is_known(), "{isolation}: what an old snapshot shows is not kept");
            }
        }
    }
}
