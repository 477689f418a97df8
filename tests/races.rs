//! The races that caches lose, played slowly on real Postgres: a load is held between its read and its
//! publication, by a decoder that waits, while the world changes.

#![cfg(feature = "verify")]

#[macro_use]
mod support;
mod fixture;

use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, mpsc},
};

use fixture::{node, users_db};
use rowcache::{Lookup, Table};
use sqlx::{FromRow, Row, postgres::PgRow};
use tokio::sync::oneshot;

/// A user whose decoder stops at the name it was told to stop at.
#[derive(Debug)]
struct Slow {
    name: String,
}

/// Told when a decoder has stopped; tells it to go on.
type Stop = (oneshot::Sender<()>, mpsc::Receiver<()>);

/// Where decoders stop: by database and name.
static STOPS: LazyLock<Mutex<HashMap<String, Stop>>> = LazyLock::new(Mutex::default);

impl<'r> FromRow<'r, PgRow> for Slow {
    fn from_row(row: &'r PgRow) -> sqlx::Result<Self> {
        let name: String = row.try_get("name")?;
        let stop = STOPS.lock().unwrap().remove(&name);
        if let Some((reached, go_on)) = stop {
            reached.send(()).expect("the test waits for this");
            // Without an answer the test has failed, and this thread must not stay for ever.
            // In place, so that the runtime gives this worker's other tasks to somebody else.
            let _ = tokio::task::block_in_place(|| go_on.recv_timeout(support::PATIENCE));
        }
        Ok(Self { name })
    }
}

/// A load that was stopped after its read.
struct Stopped {
    reached: oneshot::Receiver<()>,
    go_on: mpsc::Sender<()>,
}

fn stop_at(name: &str) -> Stopped {
    let (reached, told) = oneshot::channel();
    let (go_on, wait) = mpsc::channel();
    STOPS.lock().unwrap().insert(name.to_owned(), (reached, wait));
    Stopped { reached: told, go_on }
}

type Slows = Table<i64, Slow>;

/// A table with one user of this database, whose name nobody else has.
async fn setup(test: &support::Test) -> (support::TestDb, rowcache::Node, Slows, String) {
    let db = users_db(test.version).await;
    let node = node(&db).await;
    let users = node.table("public.users").await.expect("opens");
    let old = format!("old in {} {:?}", db.name, test.version);
    db.execute(&format!("update public.users set name = '{old}' where id = 1")).await;
    node.barrier().await.expect("coherent");
    (db, node, users, old)
}

fn spawn_get(users: &Slows, id: i64) -> tokio::task::JoinHandle<Option<String>> {
    let users = users.clone();
    tokio::spawn(async move { users.get(&id).await.expect("loads").map(|user| user.name.clone()) })
}

pg_test! {
    // Guava #1881, Hazelcast #4671, FusionCache #535, Trino #10512, moka: the old row was stored after the
    // change had been handled, and stayed.
    async fn x1_a_change_during_a_load_wins(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let Stopped { reached, go_on } = stop_at(&old);
        let early = spawn_get(&users, 1);
        reached.await.expect("the old row was read");
        db.execute("update public.users set name = 'new' where id = 1").await;
        node.barrier().await.expect("coherent");
        // HydraCache ADR-0014: a reader joined the old load after the change.
        let late = spawn_get(&users, 1);
        support::eventually("the late reader waits", async || users.stats().led == 2).await;
        go_on.send(()).expect("the load waits");
        assert_eq!(early.await.expect("ends"), Some(old), "who asked before the change may have the old row");
        assert_eq!(late.await.expect("ends").as_deref(), Some("new"), "who asked after it may not");
        assert_eq!(users.peek(&1).row().expect("cached").name, "new");
        let stats = users.stats();
        assert_eq!((stats.voided, stats.published), (1, 1), "{stats:?}");
    }

    // Caffeine #251, FusionCache #628: the same through a flush of everything.
    async fn x1_a_truncate_during_a_load_wins(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let Stopped { reached, go_on } = stop_at(&old);
        let early = spawn_get(&users, 1);
        reached.await.expect("the old row was read");
        db.execute("truncate public.users").await;
        node.barrier().await.expect("coherent");
        go_on.send(()).expect("the load waits");
        assert_eq!(early.await.expect("ends"), Some(old));
        assert!(matches!(users.peek(&1), Lookup::Unknown));
        assert!(users.get(&1).await.expect("loads").is_none());
    }

    // Logflare, Uber: "no such row" was stored after the INSERT's message.
    async fn x1_an_insert_during_a_load_that_found_nothing_wins(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let Stopped { reached, go_on } = stop_at(&old);
        let both = {
            let users = users.clone();
            // One statement reads both; the row that exists holds up the one that does not.
            tokio::spawn(async move { users.get_many(&[77, 1]).await.expect("loads").len() })
        };
        reached.await.expect("nothing was read for 77");
        db.execute("insert into public.users values (77, 'born')").await;
        node.barrier().await.expect("coherent");
        go_on.send(()).expect("the load waits");
        assert_eq!(both.await.expect("ends"), 2);
        assert!(matches!(users.peek(&77), Lookup::Unknown), "absence was not cached");
        assert_eq!(users.get(&77).await.expect("loads").expect("exists").name, "born");
        assert!(users.peek(&1).is_known(), "the other row was not touched");
    }

    async fn x8_a_load_that_spans_a_gap_is_not_published(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        test.logs.allow("LISTEN connection was lost");
        let mut events = node.subscribe();
        let Stopped { reached, go_on } = stop_at(&old);
        let early = spawn_get(&users, 1);
        reached.await.expect("the old row was read");
        db.execute(KILL_LISTENERS).await;
        fixture::gap_and_recovery(&mut events).await;
        go_on.send(()).expect("the load waits");
        assert_eq!(early.await.expect("ends"), Some(old));
        assert!(matches!(users.peek(&1), Lookup::Unknown));
        assert_eq!(users.stats().voided, 1);
    }

    async fn x28_a_hot_key_under_constant_load_is_cached_again_after_a_change(test: Test) {
        let (db, node, users, old) = setup(&test).await;
        let Stopped { reached, go_on } = stop_at(&old);
        let early = spawn_get(&users, 1);
        reached.await.expect("the old row was read");
        db.execute("update public.users set name = 'new' where id = 1").await;
        node.barrier().await.expect("coherent");
        let crowd: Vec<_> = (0..50).map(|_| spawn_get(&users, 1)).collect();
        go_on.send(()).expect("the load waits");
        for reader in crowd {
            assert_eq!(reader.await.expect("ends").as_deref(), Some("new"));
        }
        early.await.expect("ends");
        assert!(users.peek(&1).is_known(), "cached");
        assert!(users.stats().loads <= 3, "one load for each side of the change: {:?}", users.stats());
    }

    async fn x17_a_caller_who_is_cancelled_in_mid_load_harms_nobody(test: Test) {
        let (_db, _node, users, old) = setup(&test).await;
        let Stopped { reached, go_on } = stop_at(&old);
        let cancelled = spawn_get(&users, 1);
        reached.await.expect("the row was read");
        let joined = spawn_get(&users, 1);
        support::eventually("the second caller has joined", async || users.stats().joined == 1).await;
        cancelled.abort();
        assert!(cancelled.await.is_err_and(|error| error.is_cancelled()));
        go_on.send(()).expect("the load waits");
        assert_eq!(joined.await.expect("ends"), Some(old));
        let stats = users.stats();
        assert_eq!((stats.loads, stats.published), (1, 1), "the load went on, and was worth it: {stats:?}");
    }

    // Redisson #3966: a node's own message undid, or was undone by, its own write.
    async fn own_writes_are_read_back_after_a_barrier(test: Test) {
        let (db, node, users, _old) = setup(&test).await;
        let pool = db.pool().await;
        for n in 0..50 {
            let name = format!("name {n}");
            sqlx::query("update public.users set name = $1 where id = 1")
                .bind(&name)
                .execute(&pool)
                .await
                .expect("updates");
            node.barrier().await.expect("coherent");
            assert_eq!(users.get(&1).await.expect("loads").expect("exists").name, name);
            assert_eq!(users.get(&1).await.expect("hits").expect("exists").name, name);
        }
    }
}

/// Ends every LISTEN session of this database, as an administrator or a failover would.
const KILL_LISTENERS: &str = "select pg_terminate_backend(pid) from pg_stat_activity \
    where datname = current_database() and application_name like '%(listener)'";
