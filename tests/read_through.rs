//! Reading through the cache, and what an UPDATE elsewhere does to it: one node and several, on real Postgres.

use rowcache::{Lookup, Node, Status, Table, TableOptions};
use sqlx::FromRow;
use uuid::Uuid;

use crate::{
    fixture::{self, User, Users, migrated, name, node, users, users_db},
    support,
};

/// How often the loads' statements were planned for any keys, and for the given ones.
const PLANS: &str = "select statement, generic_plans, custom_plans from pg_prepared_statements \
     where statement like '%rowcache.stamp%' and statement ~ 'any|unnest' and not statement ~ 'generic_plans'";

pg_test! {
    async fn caching_can_be_switched_off_and_on_again(test: Test) {
        let db = users_db(test.version).await;
        let mut config = rowcache::Config::from_url(&db.url).expect("a good URL");
        config.caching = false;
        let node = Node::start(config).await.expect("starts");
        let options = TableOptions::default().fallback(rowcache::Fallback::Fail);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        let passes = async || {
            for text in ["one", "two"] {
                db.execute(&format!("update users set name = '{text}' where id = 1")).await;
                assert_eq!(name(&users, 1).await.as_deref(), Some(text), "at once, without a message");
                assert!(!users.peek(&1).is_known());
            }
            let status = node.status().to_string();
            assert!(status.contains("caching is switched off"), "{status}");
            node.barrier().await.expect("the line is well");
        };
        passes().await;
        node.set_caching(true);
        name(&users, 1).await;
        assert!(users.peek(&1).is_known() && matches!(users.status(), Status::Coherent { .. }));
        let load = users.ticket(&2);
        node.set_caching(false);
        assert!(!users.peek(&1).is_known() && !load.put(None));
        passes().await;
        // What changed meanwhile was not missed.
        node.set_caching(true);
        assert_eq!(name(&users, 1).await.as_deref(), Some("two"));
        db.execute("update users set name = 'three' where id = 1").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("three"));
    }

    async fn a_statement_for_a_few_rows_is_not_planned_for_each_execution(test: Test) {
        let db = migrated(test.version).await;
        db.execute(
            "create table ones (id bigint primary key); create table texts (id text primary key); \
             create table twos (a bigint, b text, primary key (a, b)); \
             insert into ones select generate_series(1, 10000); insert into texts select id::text from ones; \
             insert into twos select id, id::text from ones; analyze ones; analyze texts; analyze twos; \
             select rowcache.track(t::regclass) from unnest('{ones,texts,twos}'::text[]) t",
        )
        .await;
        let mut config = rowcache::Config::from_url(&db.url).expect("a good URL");
        let (sender, mut plans) = tokio::sync::watch::channel(Vec::<(String, i64, i64)>::new());
        // What the connection of the loads has planned before each of them.
        config.pool = config.pool.max_connections(1).before_acquire(move |connection, _| {
            let sender = sender.clone();
            Box::pin(async move {
                sender.send_replace(sqlx::query_as(PLANS).fetch_all(connection).await?);
                Ok(true)
            })
        });
        let node = Node::start(config).await.expect("starts");
        let ones: Table<i64, (i64,)> = node.table("ones").await.expect("opens");
        let texts: Table<String, (String,)> = node.table("texts").await.expect("opens");
        let twos: Table<(i64, String), (i64, String)> = node.table("twos").await.expect("opens");
        for first in (1..60).step_by(3) {
            let ids = [first, first + 1, first + 2];
            let rows = ones.get_many(&ids).await.expect("loads");
            assert!(rows.iter().all(Option::is_some));
            let rows = texts.get_many(&ids.map(|id| id.to_string())).await.expect("loads");
            assert!(rows.iter().all(Option::is_some));
            let rows = twos.get_many(&ids.map(|id| (id, id.to_string()))).await.expect("loads");
            assert!(rows.iter().all(Option::is_some));
        }
        let _ = ones.get(&100).await.expect("loads");
        let plans = plans.borrow_and_update().clone();
        assert_eq!(plans.len(), 3, "{plans:?}");
        for (statement, generic, custom) in plans {
            assert_eq!((generic, custom), (15, 5), "{statement}");
        }
    }

    async fn a_row_is_loaded_once_and_then_served_from_memory(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        assert!(matches!(node.status(), Status::Coherent { .. }));
        let users = users(&node).await;
        let mut nothing = rowcache::Stats::default();
        nothing.capacity = 100_000;
        assert_eq!(users.stats(), nothing);
        assert!(matches!(users.try_get(&1), Lookup::Unknown));
        let first = users.get(&1).await.expect("loads").expect("exists");
        assert_eq!(*first, User { id: 1, name: "user 1".into() });
        let second = users.get(&1).await.expect("hits").expect("exists");
        assert_eq!(first, second);
        assert!(std::ptr::eq(&raw const *first, &raw const *second), "shared, not copied");
        assert!(users.try_get(&1).is_known() && users.peek(&1).row().is_some());
        let stats = users.stats();
        assert_eq!((stats.gets, stats.hits, stats.misses), (4, 2, 2));
        assert_eq!((stats.led, stats.joined, stats.declined), (1, 0, 1));
        assert_eq!((stats.loads, stats.published, stats.queries, stats.entries), (1, 1, 1, 1));
    }

    async fn a_change_by_anybody_is_seen_on_every_node(test: Test) {
        let db = users_db(test.version).await;
        let (a, b, c) = (node(&db).await, node(&db).await, node(&db).await);
        let tables = [users(&a).await, users(&b).await, users(&c).await];
        for users in &tables {
            assert_eq!(name(users, 1).await.as_deref(), Some("user 1"));
            assert_eq!(name(users, 2).await.as_deref(), Some("user 2"));
        }
        db.execute("update public.users set name = 'Ada' where id = 1").await;
        for (node, users) in [&a, &b, &c].into_iter().zip(&tables) {
            node.barrier().await.expect("coherent");
            assert!(matches!(users.peek(&1), Lookup::Unknown), "forgotten");
            assert!(users.peek(&2).is_known(), "and nothing else");
            assert_eq!(name(users, 1).await.as_deref(), Some("Ada"));
        }
    }

    async fn what_an_update_delete_truncate_and_key_change_do(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        for (sql, id, expected) in [
            ("update public.users set name = 'Ada' where id = 1", 1, Some("Ada")),
            ("update public.users set name = 'all'", 7, Some("all")),
            ("delete from public.users where id = 2", 2, None),
            ("insert into public.users values (2, 'again')", 2, Some("again")),
            ("update public.users set id = 100 where id = 3", 3, None),
            ("update public.users set id = 3 where id = 100", 100, None),
            ("insert into public.users values (4, 'x') on conflict (id) do update set name = 'upsert'", 4, Some("upsert")),
            ("truncate public.users", 5, None),
            ("insert into public.users values (5, 'after')", 5, Some("after")),
        ] {
            name(&users, id).await;
            assert!(users.peek(&id).is_known(), "held before: {sql}");
            db.execute(sql).await;
            node.barrier().await.expect("coherent");
            assert!(!users.peek(&id).is_known(), "forgotten after: {sql}");
            assert_eq!(name(&users, id).await.as_deref(), expected, "{sql}");
        }
    }

    async fn an_absent_row_is_cached_and_an_insert_undoes_it(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        assert_eq!(name(&users, 77).await, None);
        assert!(matches!(users.try_get(&77), Lookup::Absent));
        assert_eq!(name(&users, 77).await, None);
        assert_eq!(users.stats().loads, 1);
        db.execute("insert into public.users values (77, 'new')").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 77).await.as_deref(), Some("new"));
    }

    async fn a_rolled_back_change_is_no_change(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        db.execute("begin; update public.users set name = 'never'; rollback").await;
        node.barrier().await.expect("coherent");
        assert!(users.peek(&1).is_known());
    }

    async fn many_keys_are_read_in_one_statement_in_the_order_asked(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 2).await;
        let rows = users.get_many(&[3, 99, 2, 3, 1]).await.expect("loads");
        let names: Vec<_> = rows.iter().map(|row| row.as_ref().map(|user| user.name.as_str())).collect();
        assert_eq!(names, [Some("user 3"), None, Some("user 2"), Some("user 3"), Some("user 1")]);
        let stats = users.stats();
        assert_eq!((stats.queries, stats.loads), (2, 4), "the three misses went out together");
        assert_eq!((stats.gets, stats.hits, stats.led, stats.joined), (6, 1, 4, 1));
        assert!(users.get_many(&[]).await.expect("nothing to do").is_empty());
    }

    async fn callers_who_miss_at_the_same_time_share_loads(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        let mut callers = tokio::task::JoinSet::new();
        for n in 0..200_i64 {
            let users = users.clone();
            callers.spawn(async move { name(&users, n % 10 + 1).await.expect("exists") });
        }
        assert_eq!(callers.join_all().await.len(), 200);
        let stats = users.stats();
        assert_eq!(stats.loads, 10, "one load per key: {stats:?}");
        assert_eq!(stats.gets, 200);
        assert_eq!(stats.misses, stats.led + stats.joined);
        assert_eq!(stats.loads, stats.published + stats.voided + stats.uncached + stats.failed);
    }

    async fn keys_of_every_type_and_of_several_columns(test: Test) {
        let db = migrated(test.version).await;
        db.execute(
            "create table small (k smallint primary key, v text);
             create table medium (k integer primary key, v text);
             create table texts (k text primary key, v text);
             create table codes (k varchar(20) primary key, v text);
             create table uuids (k uuid primary key, v text);
             create table pairs (tenant integer, code text, v text, primary key (tenant, code));
             create table \"Odd Schema Table\" (\"the \"\"key\" bigint primary key, v text);
             select rowcache.track(t::regclass) from unnest('{small,medium,texts,codes,uuids,pairs}'::text[]) t;
             select rowcache.track('\"Odd Schema Table\"');
             insert into small values (-3, 'a'); insert into medium values (70000, 'a');
             insert into texts values ('Ünï \"quoted\" \\ {x}', 'a'); insert into codes values ('c', 'a');
             insert into uuids values ('00000000-0000-0000-0000-00000000002a', 'a');
             insert into pairs values (7, 'x', 'a'), (7, 'y', 'b'), (8, 'x', 'c');
             insert into \"Odd Schema Table\" values (1, 'a')",
        )
        .await;
        let node = node(&db).await;
        check(&node, &db, "small", -3_i16, 4).await;
        check(&node, &db, "medium", 70_000_i32, 4).await;
        check(&node, &db, "texts", String::from("Ünï \"quoted\" \\ {x}"), String::from("none")).await;
        check(&node, &db, "codes", String::from("c"), String::from("none")).await;
        check(&node, &db, "uuids", Uuid::from_u128(42), Uuid::nil()).await;
        check(&node, &db, "\"Odd Schema Table\"", 1_i64, 2).await;

        let pairs: Table<(i32, String), Value> = node.table("pairs").await.expect("opens");
        let keys = [(8, "x"), (7, "y"), (7, "z")].map(|(tenant, code)| (tenant, code.to_owned()));
        let rows = pairs.get_many(&keys).await.expect("loads");
        let values: Vec<_> = rows.iter().map(|row| row.as_ref().map(|it| it.v.as_str())).collect();
        assert_eq!(values, [Some("c"), Some("b"), None]);
        check(&node, &db, "pairs", (7_i32, String::from("x")), (9, String::new())).await;
    }

    async fn the_same_table_opened_twice_is_one_cache(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let one = users(&node).await;
        let two: fixture::Users = node.table("users").await.expect("opens by its short name");
        name(&one, 1).await;
        assert!(two.peek(&1).is_known());
        let other: Table<i64, (i64, String)> = node.table("users").await.expect("opens with another value type");
        assert!(!other.peek(&1).is_known());
        assert_eq!(other.get(&1).await.expect("loads").expect("exists").1, "user 1");
        db.execute("update public.users set name = 'x'").await;
        node.barrier().await.expect("coherent");
        assert!(!one.peek(&1).is_known() && !other.peek(&1).is_known());
    }

    async fn invalidate_and_clear_reach_every_node(test: Test) {
        let db = users_db(test.version).await;
        let (a, b) = (node(&db).await, node(&db).await);
        let (here, there) = (users(&a).await, users(&b).await);
        for id in [1, 2] {
            name(&here, id).await;
            name(&there, id).await;
        }
        let otherwise: Table<i64, (i64, String)> = a.table("users").await.expect("opens with another value type");
        otherwise.get(&1).await.expect("loads");
        here.invalidate(&1).await.expect("sent");
        assert!(!here.peek(&1).is_known() && !otherwise.peek(&1).is_known());
        b.barrier().await.expect("coherent");
        assert!(!there.peek(&1).is_known() && there.peek(&2).is_known());
        here.clear().await.expect("sent");
        assert!(!here.peek(&2).is_known());
        b.barrier().await.expect("coherent");
        assert!(!there.peek(&2).is_known());
    }

    async fn barriers_do_not_wait_for_the_beat(test: Test) {
        let db = users_db(test.version).await;
        let mut config = rowcache::Config::from_url(&db.url).expect("a good URL");
        // With beats an hour apart, nothing but the barriers themselves can move them along.
        let hour = std::time::Duration::from_hours(1);
        (config.beat, config.beat_timeout, config.lease) = (hour, 2 * hour, 2 * hour);
        let node = Node::start(config).await.expect("starts");
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let node = node.clone();
            callers.spawn(async move {
                for _ in 0..5 {
                    node.barrier().await.expect("coherent");
                }
            });
        }
        assert_eq!(callers.join_all().await.len(), 50);
    }

    async fn capacity_is_a_bound(test: Test) {
        let db = users_db(test.version).await;
        db.execute("insert into public.users select n, 'x' from generate_series(11, 2000) n").await;
        let node = node(&db).await;
        let users: fixture::Users =
            node.table_with("public.users", TableOptions::default().capacity(100)).await.expect("opens");
        let keys: Vec<i64> = (1..=2000).collect();
        assert_eq!(users.get_many(&keys).await.expect("loads").iter().flatten().count(), 2000);
        assert!(users.stats().entries <= 100, "{:?}", users.stats());
    }

    async fn a_writer_needs_no_right_on_our_schema(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        let role = format!("writer_{}", db.name);
        let role = &role[..role.len().min(63)];
        db.execute(&format!(
            "create role {role}; grant select, update on public.users to {role};
             revoke usage on schema rowcache from public;
             set role {role}; update public.users set name = 'by an ordinary role' where id = 1; reset role;
             grant usage on schema rowcache to public; drop owned by {role}; drop role {role}"
        ))
        .await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("by an ordinary role"));
    }

    async fn a_shutdown_ends_every_connection_and_reads_fail_from_then_on(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        node.shutdown().await;
        assert!(users.get(&1).await.is_err_and(|error| error.is_closed()));
        assert!(node.barrier().await.is_err_and(|error| error.is_closed()));
        let client = db.client().await;
        support::eventually("the server has no session of ours left", async || {
            let mine = "select count(*) from pg_stat_activity where datname = current_database() \
                        and pid <> pg_backend_pid() and backend_type = 'client backend'";
            client.query_one(mine, &[]).await.expect("counts").get::<_, i64>(0) == 0
        })
        .await;
        node.shutdown().await;
    }

    async fn what_is_held_can_be_gone_through(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        let held = || {
            let mut held: Vec<_> = users.entries().map(|(id, user)| (id, user.name.clone())).collect();
            held.sort();
            held
        };
        assert_eq!(held(), []);
        users.get_many(&[1, 2, 3, 99]).await.expect("loads");
        assert_eq!(held(), [(1, "user 1".into()), (2, "user 2".into()), (3, "user 3".into())], "and no absent ones");
        db.execute("update users set name = 'changed' where id = 2").await;
        node.barrier().await.expect("coherent");
        assert_eq!(held(), [(1, "user 1".into()), (3, "user 3".into())]);
        node.set_caching(false);
        assert_eq!(held(), [], "nothing is served");
    }
}

/// A row whose key's type does not matter.
#[derive(Debug, FromRow)]
struct Value {
    v: String,
}

/// Present, absent, changed and changed back, for one table.
async fn check<K: rowcache::Key>(node: &Node, db: &support::TestDb, table: &str, present: K, absent: K) {
    let rows: Table<K, Value> = node.table(table).await.unwrap_or_else(|error| panic!("{table}: {error}"));
    assert_eq!(rows.get(&present).await.expect("loads").expect("exists").v, "a", "{table}");
    assert!(rows.get(&absent).await.expect("loads").is_none(), "{table}");
    let both = rows.get_many(&[absent.clone(), present.clone()]).await.expect("loads");
    assert!(both[0].is_none() && both[1].is_some(), "{table}");
    db.execute(&format!("update {table} set v = 'b'")).await;
    node.barrier().await.expect("coherent");
    assert!(!rows.peek(&present).is_known(), "{table}: the key of the message is the key of the node");
    assert!(rows.peek(&absent).is_known(), "{table}");
    let both = rows.get_many(&[present.clone(), absent]).await.expect("loads");
    assert_eq!(both[0].as_ref().map(|it| it.v.as_str()), Some("b"), "{table}");
    db.execute(&format!("update {table} set v = 'a'")).await;
    node.barrier().await.expect("coherent");
}
