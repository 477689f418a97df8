//! A node that has lost its line sends every read to Postgres. That must not take the database down: however many callers
//! there are, no more than `loads_max` statements run, and those who want the same row share one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Instant,
};

use rowcache::{Config, Event, Table};

use crate::{
    Subject, allow_gaps,
    fixture::{event, hasty, users_db},
    support::{
        TestClient, eventually,
        proxy::{Close, Proxy},
    },
};

const CALLERS: i64 = 1_000;
const HOT: i64 = 5;
const COLD: i64 = 20_000;

/// How many statements of the node's pool Postgres is executing.
async fn active(client: &TestClient) -> i64 {
    let sql = "select count(*) from pg_stat_activity where application_name = 'crowd' and state = 'active' \
        and datname = current_database()";
    client.query_one(sql, &[]).await.expect("counts").get(0)
}

pg_test! {
    async fn a_thousand_callers_without_a_line_share_a_few_loads(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        db.execute(&format!("insert into public.users select n, 'cold ' || n from generate_series(11, {COLD}) n")).await;
        let mut proxy = Proxy::start(db.port).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.pool_connect = config.pool_connect.application_name("crowd");
        config.listener = hasty(&proxy.url(&db.url)).listener;
        // More connections than loads, so that it is not the pool that holds them back.
        config.pool = config.pool.max_connections(50);
        config.load_timeout = crate::support::PATIENCE;
        let loads_max = i64::try_from(config.loads_max).expect("a small number");
        let mut subject = Subject::new(&db, config).await;
        // A second cache, which has runners of its own: the limit is the node's.
        let others: Table<i64, (i64, String)> = subject.node.table("public.users").await.expect("opens");
        let before = Instant::now();
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        subject.gap().await;
        let start = [subject.users.stats(), others.stats()];
        let gets = || {
            let now = [subject.users.stats(), others.stats()];
            now.iter().zip(&start).map(|(now, start)| now.gets - start.gets).sum::<u64>()
        };

        // First everybody waits behind a lock: so many statements run, and no more.
        let locker = db.client().await;
        locker.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        let crowd: Vec<_> = (0..CALLERS)
            .map(|n| {
                let (users, others) = (subject.users.clone(), others.clone());
                tokio::spawn(async move {
                    // Two of three reads are of a hot row.
                    for round in 0..10 {
                        let cold = 11 + (n * 7_919 + round * 104_729) % (COLD - 10);
                        for id in [1 + (n + round) % HOT, cold, 1 + (n + round + 1) % HOT] {
                            let found = if n % 2 == 0 {
                                users.get(&id).await.expect("is answered").map(|user| user.id)
                            } else {
                                others.get(&id).await.expect("is answered").map(|user| user.0)
                            };
                            assert_eq!(found, Some(id));
                        }
                    }
                })
            })
            .collect();
        let watcher = db.client().await;
        eventually("everybody has asked", async || {
            assert!(active(&watcher).await <= loads_max);
            gets() == u64::try_from(CALLERS).expect("positive")
        })
        .await;
        eventually("as many loads run as may", async || active(&watcher).await == loads_max).await;

        // Then they run for all they are worth, and somebody counts.
        let (over, most) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let count = {
            let (over, most) = (Arc::clone(&over), Arc::clone(&most));
            tokio::spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    most.fetch_max(active(&watcher).await, Ordering::Relaxed);
                }
            })
        };
        locker.batch_execute("rollback").await.expect("unlocks");
        for caller in crowd {
            caller.await.expect("no caller fails");
        }
        over.store(true, Ordering::Relaxed);
        count.await.expect("counts");
        let most = most.load(Ordering::Relaxed);
        assert!(most <= loads_max, "{most} statements at a time, where {loads_max} are allowed");

        let end = [subject.users.stats(), others.stats()];
        let queries: u64 = end.iter().zip(&start).map(|(end, start)| end.queries - start.queries).sum();
        let gets = gets();
        assert!(end.iter().zip(&start).all(|(end, start)| end.hits == start.hits), "nothing came from memory");
        assert!(queries * 10 < gets, "{queries} statements for {gets} reads");
        subject.is_bypassed(before).await;

        proxy.accept().await;
        event(&mut subject.events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        subject.is_well().await;
        for id in 1..=HOT {
            subject.users.get(&id).await.expect("loads");
        }
        eventually("hot rows are hits again", async || {
            let hits = subject.users.stats().hits;
            for id in 1..=HOT {
                subject.users.get(&id).await.expect("answers");
            }
            subject.users.stats().hits == hits + u64::try_from(HOT).expect("positive")
        })
        .await;
    }
}
