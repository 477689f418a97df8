//! Entries that are made of several rows: each change evicts exactly the entries that it is part of.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use rowcache::{BoxError, Config, Freshness, Lookup, Node, Status, Table, TableOptions};
use sqlx::PgConnection;
use tokio::sync::Semaphore;

use crate::{
    fixture::{User, hasty, migrated, node},
    support::{TestDb, Version, eventually},
};

/// Five users, with two orders each; orders say whose they are, and the tenant.
const SHOP: &str = "
    create table public.users (id bigint primary key, name text not null, email text unique);
    create table public.orders (id bigint primary key, user_id bigint, tenant int not null default 1, total bigint not null);
    create index on public.orders (user_id);
    create table public.plans (id int primary key, price bigint not null);
    insert into public.users select n, 'user ' || n, 'u' || n || '@example.org' from generate_series(1, 5) n;
    insert into public.orders select 10 * n + m, n, 1, 100 * m from generate_series(1, 5) n, generate_series(1, 2) m;
    insert into public.plans values (1, 5);
    select rowcache.track('public.users', columns => '{email}');
    select rowcache.track('public.orders', columns => '{user_id,tenant}');
    select rowcache.track('public.plans')";

async fn shop(version: Version) -> TestDb {
    let db = migrated(version).await;
    db.execute(SHOP).await;
    db
}

/// A user with his orders.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Account {
    name: String,
    orders: Vec<(i64, i64)>,
}

type Accounts = Table<i64, Account>;

/// A row of `orders`.
type Order = (i64, Option<i64>, i32, i64);

async fn load_accounts(ids: &[i64], db: &mut PgConnection) -> Result<HashMap<i64, Account>, BoxError> {
    let users: Vec<(i64, String)> =
        sqlx::query_as("select id, name from users where id = any($1)").bind(ids).fetch_all(&mut *db).await?;
    let mut accounts: HashMap<_, _> =
        users.into_iter().map(|(id, name)| (id, Account { name, orders: Vec::new() })).collect();
    let orders: Vec<(i64, i64, i64)> =
        sqlx::query_as("select user_id, id, total from orders where user_id = any($1) order by id")
            .bind(ids)
            .fetch_all(db)
            .await?;
    for (user, id, total) in orders {
        if let Some(account) = accounts.get_mut(&user) {
            account.orders.push((id, total));
        }
    }
    Ok(accounts)
}

async fn accounts(node: &Node) -> Accounts {
    node.view("accounts")
        .on("public.users", ["id"])
        .on("public.orders", ["user_id"])
        .on_any("public.plans")
        .open(|ids, db| Box::pin(load_accounts(ids, db)))
        .await
        .expect("opens")
}

/// Holds all five, lets this be executed, and returns who was forgotten.
async fn forgotten(db: &TestDb, node: &Node, accounts: &Accounts, sql: &str) -> Vec<i64> {
    let ids: Vec<i64> = (1..=5).collect();
    accounts.get_many(&ids).await.expect("loads");
    assert!(ids.iter().all(|id| accounts.peek(id).is_known()), "all are held before: {sql}");
    db.execute(sql).await;
    node.barrier().await.expect("coherent");
    ids.into_iter().filter(|id| !accounts.peek(id).is_known()).collect()
}

/// A loader that stops after its first statement, until it is let go.
#[derive(Clone)]
struct Paused {
    arrived: Arc<Semaphore>,
    go: Arc<Semaphore>,
}

impl Paused {
    fn new() -> Self {
        Self { arrived: Arc::new(Semaphore::new(0)), go: Arc::new(Semaphore::new(0)) }
    }

    async fn here(&self) {
        self.arrived.add_permits(1);
        self.go.acquire().await.expect("open").forget();
    }

    async fn arrived(&self) {
        self.arrived.acquire().await.expect("open").forget();
    }

    /// A view of the name of a user and the number of his orders, by two statements.
    async fn view(&self, node: &Node) -> Table<i64, (String, i64)> {
        let pause = self.clone();
        let view = node.view("paused").on("public.users", ["id"]).on("public.orders", ["user_id"]);
        view.open(move |ids, db| {
            let pause = pause.clone();
            Box::pin(async move {
                let [id] = ids else { return Err("one at a time".into()) };
                let name: String =
                    sqlx::query_scalar("select name from users where id = $1").bind(id).fetch_one(&mut *db).await?;
                pause.here().await;
                let orders: i64 =
                    sqlx::query_scalar("select count(*) from orders where user_id = $1").bind(id).fetch_one(db).await?;
                Ok(HashMap::from([(*id, (name, orders))]))
            })
        })
        .await
        .expect("opens")
    }
}

pg_test! {
    // The worked example.
    async fn each_change_evicts_exactly_the_entries_that_it_is_part_of(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let accounts = accounts(&node).await;
        for (sql, who) in [
            ("insert into orders values (100, 1, 1, 7)", vec![1]),
            ("update orders set user_id = 3 where id = 21", vec![2, 3]),
            ("update orders set total = 8 where id = 41", vec![4]),
            ("delete from orders where id = 51", vec![5]),
            ("update users set name = 'ada' where id = 2", vec![2]),
            ("update orders set user_id = 5 where user_id in (1, 2)", vec![1, 2, 5]),
            // Nobody's order is in nobody's account.
            ("insert into orders values (101, null, 1, 7)", vec![]),
            ("update orders set user_id = 4 where id = 101", vec![4]),
            ("update orders set user_id = null where id = 101", vec![4]),
            ("insert into orders values (102, 77, 1, 7)", vec![]),
            ("delete from users where id = 5", vec![5]),
            ("update plans set price = 6", vec![1, 2, 3, 4, 5]),
            ("truncate orders", vec![1, 2, 3, 4, 5]),
        ] {
            assert_eq!(forgotten(&db, &node, &accounts, sql).await, who, "{sql}");
        }
        assert!(accounts.get(&5).await.expect("loads").is_none(), "he was deleted");
        let ada = accounts.get(&2).await.expect("loads").expect("is there");
        assert_eq!(*ada, Account { name: "ada".into(), orders: vec![] });
        assert_eq!(accounts.name(), "view:accounts");
    }

    // With columns that do not matter left out, the old values must still be told.
    async fn moves_are_told_where_columns_are_ignored(test: Test) {
        let db = shop(test.version).await;
        db.execute("select rowcache.track('public.orders', columns => '{user_id}', ignore => '{tenant}')").await;
        let node = node(&db).await;
        let accounts = accounts(&node).await;
        for (sql, who) in [
            ("update orders set user_id = 3 where id = 21", vec![2, 3]),
            ("update orders set tenant = 9", vec![]),
            ("update orders set tenant = 10, total = 0 where id = 11", vec![1]),
        ] {
            assert_eq!(forgotten(&db, &node, &accounts, sql).await, who, "{sql}");
        }
    }

    // X1, for an entry of several rows: the loader has read the user when somebody changes an order.
    async fn a_load_that_a_change_overtakes_is_not_kept(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let paused = Paused::new();
        let view = paused.view(&node).await;
        for (sql, counted) in [
            ("insert into orders values (200, 1, 1, 7)", 3),
            ("update users set name = 'eve' where id = 1", 3),
        ] {
            let load = tokio::spawn({ let view = view.clone(); async move { view.get(&1).await } });
            paused.arrived().await;
            db.execute(sql).await;
            node.barrier().await.expect("coherent");
            paused.go.add_permits(1);
            load.await.expect("no panic").expect("loads").expect("is there");
            assert!(!view.peek(&1).is_known(), "{sql}");
            paused.go.add_permits(1);
            let after = view.get(&1).await.expect("loads").expect("is there");
            paused.arrived().await;
            assert_eq!(after.1, counted);
            view.invalidate(&1).await.expect("told");
        }
        assert_eq!(view.stats().voided, 2);
    }

    async fn what_a_loader_reads_is_of_one_moment(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let paused = Paused::new();
        let view = paused.view(&node).await;
        let load = tokio::spawn({ let view = view.clone(); async move { view.get(&1).await } });
        paused.arrived().await;
        db.execute("delete from orders where user_id = 1").await;
        paused.go.add_permits(1);
        let (name, orders) = (*load.await.expect("no panic").expect("loads").expect("is there")).clone();
        assert_eq!((name.as_str(), orders), ("user 1", 2), "the orders that were there when the name was read");
    }

    async fn a_loader_cannot_write(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let view: Table<i64, i64> = node
            .view("writer")
            .on("public.users", ["id"])
            .open(|ids, db| Box::pin(async move {
                sqlx::query("update users set name = 'mallory'").execute(db).await?;
                Ok(ids.iter().map(|id| (*id, *id)).collect())
            }))
            .await
            .expect("opens");
        let error = view.get(&1).await.expect_err("refused");
        assert!(error.is_refused(), "{error:?}");
    }

    // X31: a connection whose hook has begun a transaction, with a snapshot from before.
    async fn what_may_be_from_an_old_snapshot_is_refused(test: Test) {
        let db = shop(test.version).await;
        let begins = Arc::new(Mutex::new(None::<&'static str>));
        let mut config = Config::from_url(&db.url).expect("a good URL");
        let switch = Arc::clone(&begins);
        config.pool = config.pool.max_connections(1).before_acquire(move |connection, _| {
            let begins = *switch.lock().expect("not poisoned");
            Box::pin(async move {
                if let Some(begin) = begins {
                    sqlx::raw_sql(begin).execute(connection).await?;
                }
                Ok(true)
            })
        });
        let node = Node::start(config).await.expect("starts");
        let accounts = accounts(&node).await;
        for (other, begin) in [
            (2, "begin; select 1"),
            (3, "begin isolation level repeatable read; select 1"),
            (4, "begin isolation level serializable; select 1"),
            (5, "begin; update users set name = 'dirty' where id = 1"),
        ] {
            // A connection that goes back into the pool.
            *begins.lock().expect("not poisoned") = None;
            accounts.get(&other).await.expect("loads");
            *begins.lock().expect("not poisoned") = Some(begin);
            let error = accounts.get(&1).await.expect_err(begin);
            assert!(error.is_refused() && error.to_string().contains("left a transaction open"), "{error:?}");
        }
        // Without a snapshot it sees what is there now.
        *begins.lock().expect("not poisoned") = None;
        accounts.get(&77).await.expect("loads");
        *begins.lock().expect("not poisoned") = Some("begin isolation level serializable");
        assert_eq!(accounts.get(&1).await.expect("loads").expect("is there").name, "user 1");
        assert!(accounts.peek(&1).is_known());
    }

    async fn a_view_is_in_doubt_with_each_table_that_it_is_made_of(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = shop(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let accounts = accounts(&node).await;
        accounts.get(&1).await.expect("loads");
        db.execute("alter table orders disable trigger all").await;
        eventually("the view is in doubt", async || matches!(accounts.status(), Status::Bypassed { .. })).await;
        assert!(accounts.status().to_string().contains("public.orders"), "{}", accounts.status());
        // What is well says nothing of what is not.
        db.execute("truncate plans").await;
        node.barrier().await.expect("the node is coherent");
        db.execute("update orders set total = 4711 where id = 11").await;
        for _ in 0..2 {
            let account = accounts.get(&1).await.expect("loads").expect("is there");
            assert_eq!(account.orders[0], (11, 4711));
            assert!(!accounts.peek(&1).is_known(), "nothing is kept");
            db.execute("update orders set total = 4711 where id = 11").await;
        }
        db.execute("select rowcache.track('public.orders', columns => '{user_id,tenant}')").await;
        eventually("it is trusted again", async || matches!(accounts.status(), Status::Coherent { .. })).await;
        accounts.get(&1).await.expect("loads");
        assert!(accounts.peek(&1).is_known());
    }

    async fn rows_by_another_column(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let by_email: Table<String, User> =
            node.table_by("public.users", ["email"], TableOptions::default()).await.expect("opens");
        let by = async |email: &str| by_email.get(&email.to_owned()).await.expect("loads").map(|user| user.id);
        assert_eq!(by("u1@example.org").await, Some(1));
        assert_eq!(by("new@example.org").await, None);
        assert_eq!(by("u2@example.org").await, Some(2));
        db.execute("update users set email = 'new@example.org' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert!(by_email.peek(&"u2@example.org".to_owned()).is_known(), "not touched");
        assert_eq!((by("u1@example.org").await, by("new@example.org").await), (None, Some(1)));
        db.execute("update users set name = 'ada' where id = 1").await;
        node.barrier().await.expect("coherent");
        let ada = by_email.get(&"new@example.org".to_owned()).await.expect("loads").expect("is there");
        assert_eq!(ada.name, "ada");
        // A column that is not unique.
        db.execute("alter table users drop constraint users_email_key; update users set email = 'new@example.org' where id = 2").await;
        let read = async || by_email.get_with(&"new@example.org".to_owned(), Freshness::Fenced).await;
        let error = read().await.expect_err("two rows");
        assert!(error.is_table() && error.to_string().contains("more than one row"), "{error}");
        // Its own rows are another cache's.
        let users: Table<i64, User> = node.table("public.users").await.expect("opens");
        assert_eq!(users.get(&1).await.expect("loads").map(|user| user.name.clone()).as_deref(), Some("ada"));
        assert_eq!(by_email.name(), "public.users(email)");
    }

    async fn lists_of_rows(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let orders: Table<i64, Vec<Order>> =
            node.list_by("public.orders", ["user_id"], TableOptions::default().bytes(1 << 20)).await.expect("opens");
        let of = async |user: i64| -> Vec<i64> {
            let rows = orders.get(&user).await.expect("loads");
            rows.map(|rows| rows.iter().map(|row| row.0).collect()).unwrap_or_default()
        };
        assert_eq!((of(1).await, of(2).await, of(77).await), (vec![11, 12], vec![21, 22], vec![]));
        let many = orders.get_many(&[3, 77, 4]).await.expect("loads");
        let lengths: Vec<_> = many.iter().map(|rows| rows.as_ref().map(|rows| rows.len())).collect();
        assert_eq!(lengths, [Some(2), None, Some(2)]);
        assert!(orders.stats().bytes > 0);
        db.execute("update orders set user_id = 77 where id = 12; insert into orders values (1, 2, 1, 1)").await;
        node.barrier().await.expect("coherent");
        assert!(orders.peek(&3).is_known());
        assert_eq!((of(1).await, of(2).await, of(77).await), (vec![11], vec![1, 21, 22], vec![12]));
        db.execute("delete from orders where id = 11").await;
        node.barrier().await.expect("coherent");
        assert_eq!(of(1).await, Vec::<i64>::new());
        assert!(matches!(orders.peek(&1), Lookup::Absent));
    }

    async fn keys_of_several_columns(test: Test) {
        let db = shop(test.version).await;
        db.execute("update orders set tenant = 2 where user_id = 2").await;
        let node = node(&db).await;
        let by: Table<(i32, i64), Vec<(i64, i64)>> = node
            .view("tenants")
            .on("public.orders", ["tenant", "user_id"])
            .open(|keys: &[(i32, i64)], db| Box::pin(async move {
                let (tenants, users): (Vec<i32>, Vec<i64>) = keys.iter().copied().unzip();
                let sql = "select o.tenant, o.user_id, o.id, o.total from orders o \
                     join unnest($1::int[], $2::bigint[]) k(tenant, user_id) using (tenant, user_id) order by o.id";
                let rows: Vec<(i32, i64, i64, i64)> = sqlx::query_as(sql).bind(tenants).bind(users).fetch_all(db).await?;
                let mut lists: HashMap<_, Vec<_>> = HashMap::new();
                for (tenant, user, id, total) in rows {
                    lists.entry((tenant, user)).or_default().push((id, total));
                }
                Ok(lists)
            }))
            .await
            .expect("opens");
        let keys = [(1, 1), (2, 2), (1, 3), (1, 2)];
        let held = async |sql: &str| {
            by.get_many(&keys).await.expect("loads");
            db.execute(sql).await;
            node.barrier().await.expect("coherent");
            keys.iter().map(|key| by.peek(key).is_known()).collect::<Vec<_>>()
        };
        assert_eq!(held("update orders set total = 0 where id = 11").await, [false, true, true, true]);
        // From (1, 3) to (2, 3): all combinations of what was and what is.
        assert_eq!(held("update orders set tenant = 2 where id = 31").await, [true, true, false, true]);
        // Two rows: (1, 1) and (2, 2); which values belong together is not told.
        assert_eq!(held("update orders set total = 1 where id in (11, 21)").await, [false, false, true, false]);
        let list = by.get(&(2, 3)).await.expect("loads").expect("there is one");
        assert_eq!(*list, [(31, 100)]);
    }

    async fn what_cannot_be_watched_is_refused_with_the_cure(test: Test) {
        let db = shop(test.version).await;
        db.execute("create table public.loose (id bigint primary key, user_id int); select rowcache.track('public.loose', columns => '{id}');
             create table public.secret (id text primary key); select rowcache.track('public.secret', hash_keys => true)").await;
        let node = node(&db).await;
        let open = async |table: &str, columns: &[&str]| {
            let view = node.view("v").on(table, columns.iter().copied());
            view.open(|_: &[i64], _| Box::pin(async { Ok(HashMap::<i64, i64>::new()) })).await
        };
        for (table, columns, kind, says) in [
            ("public.loose", &["user_id"][..], "not tracked", "rowcache track public.loose --columns id,user_id"),
            ("public.loose", &["nothing"], "table", "no column nothing"),
            ("public.users", &["name"], "table", "(name text) of public.users does not fit a key of type i64; use Table<String, _>"),
            ("public.orders", &["tenant", "user_id"], "table", "use Table<(i32, i64), _>"),
            ("public.secret", &["id"], "table", "`on_any`"),
            ("public.none", &["id"], "table", "public.none"),
        ] {
            let error = open(table, columns).await.expect_err("refused");
            assert!(error.to_string().contains(says), "{error}");
            assert_eq!((error.is_not_tracked(), error.is_table()), (kind == "not tracked", kind == "table"), "{error}");
        }
        // An integer of another width is the same number.
        open("public.orders", &["tenant"]).await.expect("opens");
        let error = open("public.orders", &["user_id"]).await.expect_err("another view by this name");
        assert!(error.is_config() && error.to_string().contains("view:v was opened before"), "{error}");
        let nothing = node.view("w").open(|_: &[i64], _| Box::pin(async { Ok(HashMap::<i64, i64>::new()) })).await;
        assert!(nothing.expect_err("refused").to_string().contains("depends on no table"));
        for options in [TableOptions::default().audit(1), TableOptions::default().bytes(1 << 20)] {
            let view = node.view("w").on("public.users", ["id"]).options(options);
            let error = view.open(|_: &[i64], _| Box::pin(async { Ok(HashMap::<i64, i64>::new()) })).await.expect_err("refused");
            assert!(error.is_config(), "{error}");
        }
        let exact = node.table_by::<i64, User>("public.orders", ["tenant"], TableOptions::default()).await;
        assert!(exact.expect_err("rows are read with the key's types").to_string().contains("use Table<i32, _>"));
    }

    async fn a_loader_that_fails_harms_nobody_else(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let view: Table<i64, i64> = node
            .view("moody")
            .on("public.users", ["id"])
            .open(|ids, _| Box::pin(async move {
                if ids.contains(&2) {
                    return Err("I do not like 2".into());
                }
                assert!(!ids.contains(&3), "no threes");
                Ok(ids.iter().map(|id| (*id, id * 10)).collect())
            }))
            .await
            .expect("opens");
        let all = tokio::join!(view.get(&1), view.get(&2), view.get(&3), view.get(&4));
        assert_eq!((all.0.expect("loads").as_deref(), all.3.expect("loads").as_deref()), (Some(&10), Some(&40)));
        let (failed, panicked) = (all.1.expect_err("fails"), all.2.expect_err("panics"));
        assert!(failed.is_loader() && panicked.is_loader(), "{failed:?} {panicked:?}");
        assert!(failed.to_string().contains("view:moody 2"), "{failed}");
        assert!(std::error::Error::source(&failed).is_some_and(|source| source.to_string() == "I do not like 2"));
        assert!(panicked.to_string().contains("no threes"), "{panicked}");
        // The connections are good for more.
        assert_eq!(view.get(&5).await.expect("loads").as_deref(), Some(&50));
    }

    async fn one_node_asks_all_to_forget_an_entry(test: Test) {
        let db = shop(test.version).await;
        let [here, there] = [node(&db).await, node(&db).await];
        let [ours, theirs] = [accounts(&here).await, accounts(&there).await];
        theirs.get_many(&[1, 2]).await.expect("loads");
        ours.invalidate(&1).await.expect("told");
        there.barrier().await.expect("coherent");
        assert!(!theirs.peek(&1).is_known() && theirs.peek(&2).is_known());
        ours.clear().await.expect("told");
        there.barrier().await.expect("coherent");
        assert!(!theirs.peek(&2).is_known());
        // Of a row of a table it is not known whose entries it is in: all are forgotten.
        theirs.get_many(&[1, 2]).await.expect("loads");
        let orders: Table<i64, Order> = here.table("public.orders").await.expect("opens");
        orders.invalidate(&11).await.expect("told");
        there.barrier().await.expect("coherent");
        assert!(!theirs.peek(&1).is_known() && !theirs.peek(&2).is_known());
        // The writer's own commit, on his node.
        ours.get_many(&[1, 2]).await.expect("loads");
        let mut transaction = here.begin().await.expect("begins");
        sqlx::query("update orders set total = 1 where id = 11").execute(&mut *transaction).await.expect("updates");
        transaction.invalidates(&ours, &1);
        transaction.commit().await.expect("commits");
        assert!(!ours.peek(&1).is_known());
    }

    async fn many_entries_from_one_snapshot(test: Test) {
        let db = shop(test.version).await;
        let node = node(&db).await;
        let accounts = accounts(&node).await;
        let both = accounts.snapshot(&[1, 2]).await.expect("loads");
        assert!(both.iter().all(Option::is_some));
        let held = accounts.snapshot(&[1, 2]).await.expect("held");
        assert_eq!(held, both);
        let stats = accounts.stats();
        assert_eq!((stats.loads, stats.hits >= 2), (2, true), "{stats:?}");
    }

    // By the change log, and by both.
    async fn views_of_tables_that_are_told_by_the_log(test: Test) {
        let db = shop(test.version).await;
        db.execute("select rowcache.track('public.orders', columns => '{user_id}', via => 'log')").await;
        let node = node(&db).await;
        let accounts = accounts(&node).await;
        for (sql, who) in [
            ("update orders set user_id = 3 where id = 21", vec![2, 3]),
            ("update users set name = 'ada' where id = 2", vec![2]),
        ] {
            assert_eq!(forgotten(&db, &node, &accounts, sql).await, who, "{sql}");
        }
        accounts.get_many(&[1, 2]).await.expect("loads");
        accounts.invalidate(&1).await.expect("told");
        assert!(!accounts.peek(&1).is_known() && accounts.peek(&2).is_known());
    }
}
