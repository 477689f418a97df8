//! Writing through the cache: rows that callers have read or changed themselves.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use rowcache::{Error, Freshness, Node, Table, TableOptions};
use tokio::sync::Semaphore;

use crate::{
    fixture::{User, Users, name, node, users, users_db},
    support::{TestDb, eventually},
};

/// What a caller would read himself.
async fn read(db: &TestDb, id: i64) -> Option<User> {
    let pool = db.pool().await;
    let user = sqlx::query_as("select id, name from users where id = $1").bind(id).fetch_optional(&pool).await;
    pool.close().await;
    user.expect("reads")
}

/// Why a call failed.
#[derive(Debug)]
enum Failure {
    Cache(Error),
    Postgres,
    Mine,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Cache(error)
    }
}

impl From<sqlx::Error> for Failure {
    fn from(_: sqlx::Error) -> Self {
        Self::Postgres
    }
}

pg_test! {
    async fn a_row_that_a_caller_has_read_is_kept(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        for id in [1, 99] {
            let ticket = users.ticket(&id);
            assert!(ticket.put(read(&db, id).await));
        }
        assert_eq!((name(&users, 1).await.as_deref(), name(&users, 99).await), (Some("user 1"), None));
        let stats = users.stats();
        assert_eq!((stats.put, stats.loads, stats.hits), (2, 0, 2));
        // From then on it is like any other.
        db.execute("update users set name = 'changed' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("changed"));
    }

    // X1 and X2, with a load that is the caller's.
    async fn a_row_is_not_kept_if_anything_happened_since_the_ticket(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        let old = || User { id: 1, name: "old".into() };

        let ticket = users.ticket(&1);
        db.execute("update users set name = 'changed' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert!(!ticket.put(old()), "it was changed");

        let ticket = users.ticket(&1);
        name(&users, 1).await;
        assert!(!ticket.put(old()), "somebody may have been given a newer one");

        let ticket = users.ticket(&1);
        let later = users.ticket(&1);
        assert!(!ticket.put(old()), "there is a later ticket");
        drop(later);

        let ticket = users.ticket(&1);
        users.clear().await.expect("told");
        assert!(!ticket.put(old()), "all was forgotten");
        // Its message comes back, and clears once more.
        node.barrier().await.expect("coherent");

        let ticket = users.ticket(&1);
        let other = users.ticket(&2);
        users.invalidate(&1).await.expect("told");
        assert!(!ticket.put(old()));
        assert!(other.put(read(&db, 2).await), "another key is not concerned");

        // Somebody's load is under way: it may have read an older row, and would replace this one.
        let locker = db.client().await;
        locker.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        let load = tokio::spawn({ let users = users.clone(); async move { users.get(&1).await } });
        eventually("the load is under way", async || users.stats().loads > 1).await;
        let ticket = users.ticket(&1);
        assert!(!ticket.put(old()));
        locker.batch_execute("commit").await.expect("unlocks");
        load.await.expect("no panic").expect("loads");
        assert_eq!(users.stats().put, 1);
        assert_eq!(name(&users, 1).await.as_deref(), Some("changed"));
    }

    async fn a_row_is_not_kept_where_more_must_be_known_of_it(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let audited: Users =
            node.table_with("public.users", TableOptions::default().audit(10)).await.expect("opens");
        assert!(!audited.ticket(&1).put(read(&db, 1).await));
        // A snapshot is not made with it: at which position it was read is not known.
        let users: Table<i64, (i64, String)> = node.table("public.users").await.expect("opens");
        assert!(users.ticket(&1).put((1, "user 1".to_owned())));
        users.get(&2).await.expect("loads");
        let both = users.snapshot(&[1, 2]).await.expect("loads");
        assert!(both.iter().all(Option::is_some));
        assert!(users.stats().declined >= 2, "by a statement of its own");
    }

    async fn an_update_is_seen_here_at_once_and_read_again(test: Test) {
        let db = users_db(test.version).await;
        let [here, there] = [node(&db).await, node(&db).await];
        let [ours, theirs] = [users(&here).await, users(&there).await];
        name(&ours, 1).await;
        name(&theirs, 1).await;
        let (rows, token) = ours
            .update(&1, |transaction| Box::pin(async move {
                let update = sqlx::query("update users set name = 'ada' where id = 1").execute(&mut **transaction).await?;
                Ok::<_, Failure>(update.rows_affected())
            }))
            .await
            .expect("commits");
        assert_eq!((rows, name(&ours, 1).await.as_deref()), (1, Some("ada")));
        let there = theirs.get_with(&1, Freshness::AtLeast(token)).await.expect("reads").expect("is there");
        assert_eq!(there.name, "ada");
        // Nobody asks for this one.
        ours.update(&2, |transaction| Box::pin(async move {
            sqlx::query("update users set name = 'bob' where id = 2").execute(&mut **transaction).await?;
            Ok::<_, Failure>(())
        }))
        .await
        .expect("commits");
        eventually("it is read again", async || ours.peek(&2).row().is_some_and(|user| user.name == "bob")).await;
    }

    async fn an_update_that_fails_changes_nothing(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        let mine = users
            .update(&1, |transaction| Box::pin(async move {
                sqlx::query("update users set name = 'ada' where id = 1").execute(&mut **transaction).await?;
                Err::<(), _>(Failure::Mine)
            }))
            .await;
        assert!(matches!(mine, Err(Failure::Mine)));
        let postgres = users
            .update(&1, |transaction| Box::pin(async move {
                sqlx::query("update users set name = null where id = 1").execute(&mut **transaction).await?;
                Ok::<_, Failure>(())
            }))
            .await;
        assert!(matches!(postgres, Err(Failure::Postgres)));
        assert_eq!(read(&db, 1).await.map(|user| user.name).as_deref(), Some("user 1"));
        assert!(users.peek(&1).is_known(), "nothing was forgotten either");
    }

    // On two nodes; first there is no row.
    async fn modifications_of_a_row_come_one_after_the_other(test: Test) {
        let db = users_db(test.version).await;
        db.execute("create table carts (id text primary key, items int not null); select rowcache.track('carts')").await;
        let nodes = [node(&db).await, node(&db).await];
        let add = async |node: &Node| {
            let carts: Table<String, (String, i32)> = node.table("carts").await.expect("opens");
            carts
                .modify(&"ada".to_owned(), |cart, transaction| Box::pin(async move {
                    let upsert = "insert into carts values ('ada', $1) on conflict (id) do update set items = $1";
                    let items = cart.map_or(0, |(_, items)| items) + 1;
                    sqlx::query(upsert).bind(items).execute(&mut **transaction).await?;
                    Ok::<_, Failure>(items)
                }))
                .await
                .expect("commits")
                .0
        };
        let mut seen = Vec::new();
        for _ in 0..5 {
            let (a, b, c) = tokio::join!(add(&nodes[0]), add(&nodes[1]), add(&nodes[0]));
            seen.extend([a, b, c]);
        }
        seen.sort_unstable();
        assert_eq!(seen, (1..=15).collect::<Vec<_>>());
    }

    // There is nothing to lock but the key itself.
    async fn modifications_of_a_row_that_does_not_exist_come_one_after_the_other(test: Test) {
        let db = users_db(test.version).await;
        let nodes = [node(&db).await, node(&db).await];
        let [ours, theirs] = [users(&nodes[0]).await, users(&nodes[1]).await];
        let (looked, other_is_done) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicBool::new(false)));
        let client = db.client().await;
        let first = ours.modify(&99, |user, transaction| {
            let (looked, other_is_done) = (Arc::clone(&looked), Arc::clone(&other_is_done));
            Box::pin(async move {
                assert!(user.is_none());
                looked.add_permits(1);
                let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted and database = \
                     (select oid from pg_database where datname = current_database())";
                eventually("the other one waits, or has not waited", async || {
                    other_is_done.load(Ordering::Relaxed)
                        || client.query_one(waiting, &[]).await.expect("counts").get::<_, i64>(0) > 0
                })
                .await;
                sqlx::query("insert into users values (99, 'first')").execute(&mut **transaction).await?;
                Ok::<_, Failure>(())
            })
        });
        let second = async {
            looked.acquire().await.expect("open").forget();
            let modified = theirs.modify(&99, |user, _| Box::pin(async move { Ok::<_, Failure>(user.map(|user| user.name)) }));
            let (name, _) = modified.await.expect("commits");
            other_is_done.store(true, Ordering::Relaxed);
            name
        };
        let (first, name) = tokio::join!(first, second);
        first.expect("commits");
        assert_eq!(name.as_deref(), Some("first"));
    }

    async fn what_is_made_of_several_rows_is_not_modified(test: Test) {
        let db = users_db(test.version).await;
        db.execute("select rowcache.track('public.users', columns => '{name}')").await;
        let node = node(&db).await;
        let by_name: Table<String, User> =
            node.table_by("public.users", ["name"], TableOptions::default()).await.expect("opens");
        let outcome = by_name.modify(&"user 1".to_owned(), |_, _| Box::pin(async { Ok::<_, Failure>(()) })).await;
        let Err(Failure::Cache(error)) = outcome else { panic!("refused") };
        assert!(error.is_config() && error.to_string().contains("public.users"), "{error}");
    }
}
