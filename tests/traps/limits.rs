//! Too much, too long, and counting it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rowcache::{Config, Event, Fallback, Freshness, Node, Stats, Status, Table, TableOptions, cli::temp_server::Stop};
use sqlx::{FromRow, postgres::PgRow};

use super::{
    AGAIN, LOST,
    slow::{setup, slow_name, spawn_get, stop_at},
};
use crate::{
    fixture::{KILL_LISTENERS, Users, event, gap_and_recovery, hasty, name, node, users, users_db, users_server},
    support::{Test, eventually},
};

/// What holds in each snapshot of the counters.
fn assert_adds_up(stats: &Stats) {
    assert_eq!(stats.gets, stats.hits + stats.stale + stats.misses, "{stats:?}");
    assert_eq!(stats.misses, stats.led + stats.joined + stats.declined, "{stats:?}");
    assert!(stats.hits <= stats.gets, "{stats:?}");
}

/// All counters; `entries` is none.
fn counters(stats: &Stats) -> [u64; 16] {
    let Stats { gets, hits, stale, misses, led, joined, declined, loads, published, .. } = *stats;
    let Stats { voided, uncached, failed, queries, invalidations, clears, refilled, .. } = *stats;
    [
        gets,
        hits,
        stale,
        misses,
        led,
        joined,
        declined,
        loads,
        published,
        voided,
        uncached,
        failed,
        queries,
        invalidations,
        clears,
        refilled,
    ]
}

/// A row whose decoder panics.
#[derive(Debug)]
struct Grumpy;

impl<'r> FromRow<'r, PgRow> for Grumpy {
    fn from_row(row: &'r PgRow) -> sqlx::Result<Self> {
        let name: String = sqlx::Row::try_get(row, "name")?;
        assert!(name != "user 3", "not three!");
        Ok(Self)
    }
}

/// A load that hangs times out, and frees its key and its connection.
async fn a_load_that_hangs(test: &Test) {
    let db = users_db(test.version).await;
    db.execute("create table other (id bigint primary key); select rowcache.track('other')").await;
    let mut config = Config::from_url(&db.url).expect("a good URL");
    config.pool = config.pool.max_connections(1);
    config.load_timeout = Duration::from_millis(300);
    let node = Node::start(config).await.expect("starts");
    let users = users(&node).await;
    let other: Table<i64, (i64,)> = node.table("other").await.expect("opens");
    let client = db.client().await;
    client.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
    let (first, second) = tokio::join!(users.get(&1), users.get(&1));
    for outcome in [first, second] {
        let error = outcome.expect_err("nobody can read");
        assert!(error.is_timeout() && error.to_string().contains("load_timeout"), "{error:?}");
    }
    // The statement that was given up still waits for the lock, on the one connection that the pool may have.
    assert!(other.get(&7).await.expect("another connection took its place").is_none());
    client.batch_execute("rollback").await.expect("unlocks");
    assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"), "the key is free again");
    let rows = users.get_many(&[2, 3, 4]).await.expect("loads");
    let names: Vec<_> = rows.iter().flatten().map(|user| user.name.as_str()).collect();
    assert_eq!(names, ["user 2", "user 3", "user 4"], "no answer of the load that was given up turns up elsewhere");
}

/// A decoder that panics harms only its row, and that only for as long as it does.
async fn a_load_that_panics(test: &Test) {
    let db = users_db(test.version).await;
    let node = node(&db).await;
    let users: Table<i64, Grumpy> = node.table("users").await.expect("opens");
    for _ in 0..2 {
        let error = users.get_many(&[1, 2, 3]).await.expect_err("one of them cannot be decoded");
        let text = format!("{error:?}");
        assert!(error.is_decode() && text.contains("public.users 3") && text.contains("not three!"), "{text}");
    }
    assert!(users.peek(&1).is_known() && users.peek(&2).is_known() && !users.peek(&3).is_known());
    assert!(users.get(&2).await.expect("hits").is_some());
    db.execute("update public.users set name = 'better' where id = 3").await;
    assert!(users.get(&3).await.expect("the key is free").is_some());
}

/// A caller who is cancelled in mid-load harms nobody.
async fn a_load_that_is_cancelled(test: &Test) {
    let (_db, _node, users, old) = setup(test).await;
    let mut load = stop_at(&old);
    let cancelled = spawn_get(&users, 1);
    load.reached().await;
    let joined = spawn_get(&users, 1);
    eventually("the second caller has joined", async || users.stats().joined == 1).await;
    cancelled.abort();
    assert!(cancelled.await.is_err_and(|error| error.is_cancelled()));
    load.go_on();
    assert_eq!(joined.await.expect("ends"), Some(old));
    let stats = users.stats();
    assert_eq!((stats.loads, stats.published), (1, 1), "the load went on, and was worth it: {stats:?}");
}

pg_test! {
    /// The queue of a consumer that was too slow grew until the memory was full: Logflare #1816, sqlx's unbounded buffer.
    async fn trap_16_the_slow_consumer(test: Test) {
        test.logs.allow("more changes came in than could be applied");
        let db = users_db(test.version).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.inbox_bytes_max = 4_000;
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        let mut events = node.subscribe();
        // One transaction, so that the messages arrive in one piece. The one about the row is among those that do not fit.
        db.execute(
            "do $$ begin for n in 1..20000 loop
                 perform pg_notify('rowcache', '{\"v\":1,\"t\":\"public.other\",\"k\":[' || n || ']}');
                 if n = 10000 then update public.users set name = 'new' where id = 1; end if;
             end loop; end $$",
        )
        .await;
        node.barrier().await.expect("a fence survives the flood");
        event(&mut events, "a flush", |event| matches!(event, Event::Change(change) if change.table.is_none())).await;
        assert!(node.stats().overflows > 0);
        assert!(!users.peek(&1).is_known());
        assert!(matches!(node.status(), Status::Coherent { .. }));
        assert_eq!(name(&users, 1).await.as_deref(), Some("new"));
    }

    /// Counters said more hits than gets, or began again after a reconnect: Hazelcast #10532, redis-rs #1567.
    async fn trap_20_the_statistics_that_lie(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().refill(5).fallback(Fallback::ServeStale { max: Duration::from_hours(1) });
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        let (done, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let readers: Vec<_> = (0..8)
            .map(|reader| {
                let (users, done, asked) = (users.clone(), Arc::clone(&done), Arc::clone(&asked));
                tokio::spawn(async move {
                    for n in reader.. {
                        if done.load(Ordering::Relaxed) {
                            return;
                        }
                        let id = n % 12 + 1;
                        let keys = match n % 5 {
                            0 => users.get(&id).await.map(|_| 1),
                            1 => users.get_many(&[id, id + 1, 77]).await.map(|_| 3),
                            2 => users.get_with(&id, Freshness::Any).await.map(|_| 1),
                            3 => users.snapshot(&[id]).await.map(|_| 1),
                            _ => {
                                let _ = users.try_get(&id);
                                Ok(1)
                            }
                        };
                        // A read that failed was asked for all the same.
                        asked.fetch_add(keys.unwrap_or(if n % 5 == 1 { 3 } else { 1 }), Ordering::Relaxed);
                        tokio::task::yield_now().await;
                    }
                })
            })
            .collect();
        let mut last = counters(&users.stats());
        let look = |last: &mut [u64; 16]| {
            let stats = users.stats();
            assert_adds_up(&stats);
            let now = counters(&stats);
            assert!(last.iter().zip(&now).all(|(before, now)| before <= now), "{last:?} {now:?}");
            *last = now;
        };
        for round in 0..3 {
            let mut events = node.subscribe();
            for n in 0..20 {
                db.execute(&format!("update public.users set name = '{round} {n}' where id = {}", n % 10 + 1)).await;
                look(&mut last);
            }
            users.clear().await.expect("tells");
            db.execute(KILL_LISTENERS).await;
            gap_and_recovery(&mut events).await;
            look(&mut last);
        }
        done.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.await.expect("no reader fails");
        }
        let ended = |stats: &Stats| stats.loads == stats.published + stats.voided + stats.uncached + stats.failed;
        eventually("each load has ended in one way", async || ended(&users.stats())).await;
        look(&mut last);
        let stats = users.stats();
        assert_eq!(stats.gets, asked.load(Ordering::Relaxed), "each key that was asked for counts once: {stats:?}");
        assert!(stats.queries <= stats.loads && stats.clears >= 6 && stats.invalidations >= 60, "{stats:?}");
        let of_node = node.stats();
        assert!(of_node.gaps >= 3 && of_node.recoveries >= of_node.gaps && of_node.messages >= of_node.fences, "{of_node:?}");
    }

    /// Each message about a row that everybody reads made a load: FusionCache #442 and #290.
    async fn trap_21_the_refresh_storm(test: Test) {
        const STORM: &str = "do $$ begin for n in 1..10000 loop
             perform pg_notify('rowcache', '{\"v\":1,\"t\":\"public.users\",\"x\":' || n || ',\"k\":[1]}');
         end loop; end $$";
        let (db, node, users, old) = setup(&test).await;
        let mut load = stop_at(&old);
        let early = spawn_get(&users, 1);
        load.reached().await;
        let invalidations = users.stats().invalidations;
        db.execute(&format!("update public.users set name = 'new' where id = 1; {STORM}")).await;
        node.barrier().await.expect("coherent");
        assert!(users.stats().invalidations >= invalidations + 10_000, "all of them were applied");
        let asked = users.stats().gets;
        let crowd: Vec<_> = (0..100).map(|_| spawn_get(&users, 1)).collect();
        eventually("everybody waits", async || users.stats().gets == asked + 100).await;
        db.execute(STORM).await;
        node.barrier().await.expect("coherent");
        load.go_on();
        for reader in crowd {
            assert_eq!(reader.await.expect("ends").as_deref(), Some("new"));
        }
        assert_eq!(early.await.expect("ends"), Some(old));
        let stats = users.stats();
        assert_eq!((stats.loads, stats.queries), (2, 2), "one for each side of the storm: {stats:?}");
        // Nobody reads: nobody loads.
        db.execute(STORM).await;
        node.barrier().await.expect("coherent");
        assert_eq!(users.stats().loads, 2);
        assert_eq!(slow_name(&users, 1).await.as_deref(), Some("new"));
        assert_eq!(users.stats().loads, 3);
    }

    /// While the database was away, old rows were served for as long as that lasted: Metabase #78571.
    async fn trap_22_the_old_row_served_for_ever(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let (mut server, db) = users_server(test.version, &[]).await;
        let mut config = hasty(&db.url);
        config.load_timeout = Duration::from_millis(200);
        let node = Node::start(config).await.expect("starts");
        let stale = |max| TableOptions::default().fallback(Fallback::ServeStale { max });
        let long: Users = node.table_with("public.users", stale(Duration::from_hours(1))).await.expect("opens");
        let brief: Users = node.table_with("public.users", stale(Duration::from_millis(1500))).await.expect("opens");
        let none = users(&node).await;
        name(&long, 1).await;
        let mut events = node.subscribe();
        server.stop(Stop::Immediate).await.expect("stops");
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        let refused = |users: Users| async move {
            users.get(&1).await.is_err_and(|error| error.is_unavailable() || error.is_timeout())
        };
        assert!(refused(none).await, "without the option there are no old rows");
        assert_eq!(name(&long, 1).await.as_deref(), Some("user 1"), "within the bound");
        let bounded = |within| { let brief = brief.clone(); async move { brief.get_with(&1, Freshness::Within(within)).await } };
        eventually("the bound is reached", || refused(brief.clone())).await;
        for _ in 0..3 {
            assert!(refused(brief.clone()).await, "and stays so");
        }
        assert!(bounded(Duration::from_millis(1500)).await.is_err(), "a read that names the bound has it as well");
        assert_eq!(name(&long, 1).await.as_deref(), Some("user 1"), "the row is still there, for others");
        assert!(long.get(&2).await.is_err(), "and no other");
        server.start().await.expect("starts again");
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!(name(&brief, 1).await.as_deref(), Some("user 1"));
    }

    /// A load that hung, panicked or was cancelled blocked its key for ever: Caffeine #175 and #1478.
    async fn trap_23_the_load_that_is_stuck(test: Test) {
        a_load_that_hangs(&test).await;
        a_load_that_panics(&test).await;
        a_load_that_is_cancelled(&test).await;
    }
}
