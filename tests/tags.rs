//! What an entry depends on that only its loader knows: a change of it evicts just the entries that have it.

#![cfg(feature = "verify")]

#[macro_use]
mod support;
mod fixture;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use fixture::{migrated, node};
use rowcache::{BoxError, Node, Table, TableOptions, Tag, Tagged};
use sqlx::PgConnection;
use support::{TestDb, Version, eventually};
use tokio::sync::Semaphore;

/// Users have a plan each: 1 and 2 the first, 3 the second, 4 one that there is not, 5 none.
const SHOP: &str = "
    create table public.plans (id int primary key, price bigint not null);
    create table public.users (id bigint primary key, plan_id int);
    insert into public.plans values (1, 10), (2, 20);
    insert into public.users values (1, 1), (2, 1), (3, 2), (4, 3), (5, null);
    select rowcache.track('public.users');
    select rowcache.track('public.plans')";

async fn shop(version: Version) -> TestDb {
    let db = migrated(version).await;
    db.execute(SHOP).await;
    db
}

type Prices = Table<i64, Option<i64>>;
type Loaded = HashMap<i64, Tagged<Option<i64>>>;

/// What a user pays: tagged with his plan, and with "prices".
async fn load(users: &[i64], db: &mut PgConnection) -> Result<Loaded, BoxError> {
    let query =
        "select u.id, u.plan_id, p.price from users u left join plans p on p.id = u.plan_id where u.id = any($1)";
    let rows: Vec<(i64, Option<i32>, Option<i64>)> = sqlx::query_as(query).bind(users).fetch_all(db).await?;
    let tag = |(user, plan, price): (i64, Option<i32>, Option<i64>)| {
        let value = Tagged::new(price).tag(Tag::named("prices"));
        (
            user,
            match plan {
                Some(plan) => value.tag(Tag::row("public.plans", &plan)),
                None => value,
            },
        )
    };
    Ok(rows.into_iter().map(tag).collect())
}

async fn prices(node: &Node, options: TableOptions) -> Prices {
    let view = node.view("prices").on("public.users", ["id"]).on_tagged("public.plans").options(options);
    view.open_tagged(|users, db| Box::pin(load(users, db))).await.expect("opens")
}

async fn price(prices: &Prices, user: i64) -> Option<i64> {
    *prices.get(&user).await.expect("loads").expect("there is such a user")
}

const ALL: [i64; 5] = [1, 2, 3, 4, 5];

async fn forgotten(db: &TestDb, node: &Node, prices: &Prices, sql: &str) -> Vec<i64> {
    prices.get_many(&ALL).await.expect("loads");
    db.execute(sql).await;
    node.barrier().await.expect("coherent");
    ALL.into_iter().filter(|user| !prices.peek(user).is_known()).collect()
}

/// A loader that waits, after it has read, until the door is opened.
async fn slow_prices(node: &Node) -> (Prices, Arc<AtomicUsize>, Arc<Semaphore>) {
    let (loads, door) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let (counted, held) = (Arc::clone(&loads), Arc::clone(&door));
    let view = node.view("slow").on("public.users", ["id"]).on_tagged("public.plans");
    let view = view.open_tagged(move |users: &[i64], db| {
        let (counted, held) = (Arc::clone(&counted), Arc::clone(&held));
        Box::pin(async move {
            let loaded = load(users, db).await;
            counted.fetch_add(1, SeqCst);
            held.acquire().await.expect("it stays").forget();
            loaded
        })
    });
    (view.await.expect("opens"), loads, door)
}

pg_test! {
    async fn a_change_evicts_just_what_is_tagged_with_it(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let prices = prices(&node, TableOptions::default()).await;
        for (sql, who) in [
            ("update plans set price = 11 where id = 1", vec![1, 2]),
            ("update plans set price = 21 where id = 2", vec![3]),
            // It was looked for in vain.
            ("insert into plans values (3, 30)", vec![4]),
            ("delete from plans where id = 3", vec![4]),
            // He has another plan now, which counts from here on.
            ("update users set plan_id = 2 where id = 1", vec![1]),
            ("update plans set price = 12 where id = 1", vec![2]),
            ("update plans set price = 22 where id = 2", vec![1, 3]),
            ("update plans set id = 4 where id = 2", vec![1, 3]),
            ("insert into plans select n, n from generate_series(100, 200) n", vec![]),
            ("update users set plan_id = null", vec![1, 2, 3, 4, 5]),
            ("update plans set price = 0", vec![]),
        ] {
            assert_eq!(forgotten(&db, &node, &prices, sql).await, who, "{sql}");
        }
        assert_eq!(prices.stats().clears, 0);
        let all = forgotten(&db, &node, &prices, "truncate plans").await;
        assert_eq!(all, ALL, "a change of everything");
    }

    async fn a_name_is_invalidated_on_all_nodes(test: Test) {
        let db = shop(test.version).await;
        let (here, there) = (node(&db).await, node(&db).await);
        let (ours, theirs) = (prices(&here, TableOptions::default()).await, prices(&there, TableOptions::default()).await);
        for prices in [&ours, &theirs] {
            prices.get_many(&ALL).await.expect("loads");
        }
        ours.invalidate_tag("else").await.expect("told");
        there.barrier().await.expect("coherent");
        assert!(ALL.iter().all(|user| ours.peek(user).is_known() && theirs.peek(user).is_known()));
        let text = ours.explain(&1).to_string();
        assert!(text.ends_with("; tagged with prices, public.plans 1"), "{text}");
        ours.invalidate_tag("prices").await.expect("told");
        assert!(ALL.iter().all(|user| !ours.peek(user).is_known()), "here at once");
        there.barrier().await.expect("coherent");
        assert!(ALL.iter().all(|user| !theirs.peek(user).is_known()));
        assert_eq!(price(&theirs, 3).await, Some(20));
    }

    // A load has read the old plan when it is changed; nothing tells yet whose load that is.
    async fn x15_a_load_that_is_overtaken_is_not_kept(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let (prices, loads, door) = slow_prices(&node).await;
        let ask = || tokio::spawn({
            let prices = prices.clone();
            async move { price(&prices, 1).await }
        });
        let before = ask();
        eventually("it has read", async || loads.load(SeqCst) == 1).await;
        db.execute("update plans set price = 11 where id = 1").await;
        node.barrier().await.expect("coherent");
        let between = ask();
        eventually("he waits", async || prices.stats().gets == 2).await;
        // Another change of the same plan: the slot has that one's number.
        db.execute("update plans set price = 12 where id = 1").await;
        node.barrier().await.expect("coherent");
        door.add_permits(2);
        assert_eq!(before.await.expect("no panic"), Some(10), "he asked before");
        assert_eq!(between.await.expect("no panic"), Some(12), "I2: he asked after");
        assert_eq!(prices.peek(&1).row().and_then(|price| *price), Some(12));
        assert_eq!((prices.stats().voided, prices.stats().published), (1, 1));
    }

    // What is held stays held when a load of it fails, and keeps its tags.
    async fn what_could_not_be_read_again_is_still_evicted(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let fails = Arc::new(AtomicUsize::new(0));
        let failing = Arc::clone(&fails);
        let options = TableOptions::default().ttl(Duration::from_secs(100)).jitter(0.0).refresh_ahead(0.001);
        let view = node.view("failing").on("public.users", ["id"]).on_tagged("public.plans").options(options);
        let prices: Prices = view
            .open_tagged(move |users: &[i64], db| {
                let failing = Arc::clone(&failing);
                Box::pin(async move {
                    // The first one succeeds.
                    if failing.fetch_add(1, SeqCst) > 0 { Err("not now".into()) } else { load(users, db).await }
                })
            })
            .await
            .expect("opens");
        assert_eq!(price(&prices, 1).await, Some(10));
        eventually("it could not be read again", async || {
            assert_eq!(price(&prices, 1).await, Some(10));
            prices.stats().failed > 0
        })
        .await;
        db.execute("update plans set price = 11 where id = 1").await;
        node.barrier().await.expect("coherent");
        assert!(!prices.peek(&1).is_known());
    }

    async fn what_is_not_named_is_refused(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let unnamed = node.view("unnamed").on("public.users", ["id"]);
        let unnamed: Prices = unnamed.open_tagged(|users, db| Box::pin(load(users, db))).await.expect("opens");
        let error = unnamed.get(&1).await.expect_err("plans are not named");
        assert!(error.is_loader() && error.to_string().contains("`on_tagged`"), "{error}");
        assert_eq!(price(&unnamed, 5).await, None, "he has no plan");
        let error = node
            .view("untagged")
            .on_tagged("public.plans")
            .open(|_: &[i64], _| Box::pin(async { Ok(HashMap::<i64, i64>::new()) }))
            .await
            .expect_err("who would tag it?");
        assert!(error.is_config() && error.to_string().contains("`open_tagged`"), "{error}");
        let short = node.view("short").on_tagged("plans");
        let error = short.open_tagged(|users, db| Box::pin(load(users, db))).await.expect_err("not its whole name");
        assert!(error.is_config() && error.to_string().contains("public.plans"), "{error}");
        let prices = prices(&node, TableOptions::default()).await;
        assert!(!prices.ticket(&1).put(Some(10)), "nobody knows its tags");
    }

    async fn tags_come_by_way_of_the_log_and_survive_a_gap(test: Test) {
        test.logs.allow("LISTEN connection was lost");
        let db = shop(test.version).await;
        db.execute("select rowcache.track('public.users', via => 'log'); select rowcache.track('public.plans', via => 'log')").await;
        let node = node(&db).await;
        let prices = prices(&node, TableOptions::default()).await;
        assert_eq!(forgotten(&db, &node, &prices, "update plans set price = 11 where id = 1").await, [1, 2]);
        prices.get_many(&ALL).await.expect("loads");
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity
                where datname = current_database() and application_name like 'rowcache (%';
             update plans set price = 12 where id = 1",
        )
        .await;
        eventually("the gap is noticed", async || node.stats().gaps > 0).await;
        node.until_coherent().await.expect("it comes back");
        node.barrier().await.expect("coherent");
        let held: Vec<i64> = ALL.into_iter().filter(|user| prices.peek(user).is_known()).collect();
        assert_eq!(held, [3, 4, 5], "the others are as good as before");
        assert_eq!(price(&prices, 1).await, Some(12));
    }
}
