//! Everything that can come between a commit and a node: what reads return meanwhile, and that nothing from
//! before is served after it.

use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rowcache::cli::temp_server::{Stop, TempServer};
use rowcache::{Config, Event, Lookup, Node, Reason, Status, Table};

use crate::{
    fixture::{self, event, gap_and_recovery, hasty, name, node, users, users_db, users_server, waits_for_users},
    support::{
        self, eventually,
        proxy::{Close, Proxy},
    },
};

const LOST: &str = "LISTEN connection was lost";
const AGAIN: &str = "cannot open the LISTEN connection";

/// Two servers with a database of the same name and the same users, as a failover would leave them.
async fn twins(version: support::Version) -> ([TempServer; 2], support::TestDb, support::TestDb) {
    let (one, other) = (support::server(version, &[]).await, support::server(version, &[]).await);
    let db = support::database_on(&one, version).await;
    let create = format!("create database {}", db.name);
    support::connect(&other.admin_url()).await.batch_execute(&create).await.expect("created");
    let twin = support::TestDb { url: other.url(&db.name), port: other.port(), ..db.clone() };
    for db in [&db, &twin] {
        fixture::migrate(db).await;
        db.execute(fixture::USERS).await;
    }
    ([one, other], db, twin)
}

pg_test! {
    // Tasks stand still when their threads are blocked, and with them fences, the applier and timers.
    async fn a_blocked_runtime_cannot_hold_on_to_the_lease(test: Test) {
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        let mut events = node.subscribe();
        // One task for each thread of the runtime, and one for this one.
        let (blocked, freed) = (Arc::new(Barrier::new(3)), Arc::new(Barrier::new(3)));
        for _ in 0..2 {
            let (blocked, freed) = (Arc::clone(&blocked), Arc::clone(&freed));
            tokio::spawn(async move {
                blocked.wait();
                freed.wait();
            });
        }
        blocked.wait();
        assert!(users.peek(&1).is_known(), "the lease still runs");
        let deadline = Instant::now() + support::PATIENCE;
        while users.peek(&1).is_known() && Instant::now() < deadline {
            std::thread::yield_now();
        }
        let served = users.peek(&1).is_known();
        freed.wait();
        assert!(!served, "the row is still served");
        gap_and_recovery(&mut events).await;
    }

    // X5: a crash may undo a commit that was seen, and hand out its transaction id again.
    async fn x5_after_a_crash_nothing_from_before_is_served(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let (mut server, db) = users_server(test.version, &[("fsync", "on"), ("synchronous_commit", "off")]).await;
        db.execute("checkpoint").await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = users(&node).await;
        db.execute("update public.users set name = 'perhaps lost' where id = 1").await;
        node.barrier().await.expect("coherent");
        name(&users, 1).await;
        let mut events = node.subscribe();
        server.stop(Stop::Immediate).await.expect("crashes");
        server.start().await.expect("recovers");
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        let now = sqlx::query_scalar::<_, String>("select name from public.users where id = 1")
            .fetch_one(&db.pool().await)
            .await
            .expect("reads");
        assert_eq!(name(&users, 1).await.as_deref(), Some(now.as_str()));
    }

    // X6: the pool has moved to another server, and the listener has not. Beats are still answered.
    async fn x6_rows_of_another_server_are_not_cached_and_raise_the_alarm(test: Test) {
        test.logs.allow("another server than the LISTEN connection");
        test.logs.allow(AGAIN);
        let (_servers, db, twin) = twins(test.version).await;
        twin.execute("update public.users set name = 'of the other server'").await;
        let proxy = Proxy::start(db.port).await;
        let mut config = hasty(&proxy.url(&db.url));
        config.listener = hasty(&db.url).listener;
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let mut events = node.subscribe();
        // A server that has no identity yet, and then one that has: a node has started there.
        for (has_identity, held, asked) in [(false, 1, 2), (true, 3, 4)] {
            if has_identity {
                Node::connect(&twin.url).await.expect("starts").shutdown().await;
            }
            name(&users, held).await;
            proxy.retarget(twin.port);
            proxy.close_all(Close::Rst).await;
            let error = users.get(&asked).await.expect_err("it may be older than what this node has seen");
            assert!(error.is_unavailable() && error.to_string().contains("another server"), "{error:?}");
            assert!(matches!(users.peek(&asked), Lookup::Unknown), "not cached");
            let Event::Gap(why) = event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await else {
                unreachable!()
            };
            assert_eq!(why, Reason::OtherServer);
            assert!(matches!(users.peek(&held), Lookup::Unknown), "whom to believe is not known");
            assert_eq!(name(&users, asked).await.as_deref(), Some("of the other server"), "in doubt there is nobody else to ask");
            eventually("the node says why it does not come back", async || match node.status() {
                Status::Bypassed { why, .. } => why.to_string().contains("different servers"),
                status => panic!("{status:?} across two servers"),
            })
            .await;
            proxy.retarget(db.port);
            proxy.close_all(Close::Rst).await;
            event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
            assert_eq!(name(&users, asked).await.as_deref(), Some(format!("user {asked}").as_str()));
        }
    }

    // A failover that leaves the old primary running: pooled connections to it are still good, and wrong.
    async fn a_failover_that_leaves_the_old_primary_running(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let (_servers, db, promoted) = twins(test.version).await;
        promoted.execute("update public.users set name = 'on the new primary'").await;
        let (to_pool, to_listener) = (Proxy::start(db.port).await, Proxy::start(db.port).await);
        let mut config = hasty(&to_pool.url(&db.url));
        config.listener = hasty(&to_listener.url(&db.url)).listener;
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        let mut events = node.subscribe();
        // One pooled connection is idle, and one is busy until after the failover.
        let client = db.client().await;
        client.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        let busy = { let users = users.clone(); tokio::spawn(async move { users.get(&7).await.map(drop) }) };
        waits_for_users(&db).await;
        to_pool.retarget(promoted.port);
        to_listener.retarget(promoted.port);
        to_listener.close_all(Close::Rst).await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        client.batch_execute("rollback").await.expect("unlocks");
        busy.await.expect("ends").expect("was answered by the old primary");
        for id in 1..=6 {
            assert_eq!(name(&users, id).await.as_deref(), Some("on the new primary"));
            assert!(users.peek(&id).is_known(), "and it is cached: no load meets the old primary any more");
        }
    }

    async fn x21_triggers_that_are_tampered_with_put_their_table_in_doubt(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        db.execute("create table other (id bigint primary key); insert into other values (1); select rowcache.track('other')")
            .await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = users(&node).await;
        let other: Table<i64, (i64,)> = node.table("other").await.expect("opens");
        other.get(&1).await.expect("loads");
        let coherent = async || matches!(users.status(), Status::Coherent { .. });
        for (damage, repair) in [
            ("drop trigger zz_rowcache_update on public.users", Some("select rowcache.track('public.users')")),
            ("alter table public.users disable trigger all", Some("select rowcache.track('public.users')")),
            ("select rowcache.untrack('public.users')", Some("select rowcache.track('public.users')")),
            // Nothing is wrong when the node looks again, and yet a change has passed unseen.
            (
                "begin; alter table public.users disable trigger zz_rowcache_update;
                 update public.users set name = 'unseen' where id = 1;
                 alter table public.users enable always trigger zz_rowcache_update; commit",
                None,
            ),
        ] {
            name(&users, 1).await;
            assert!(users.peek(&1).is_known(), "{damage}");
            db.execute(damage).await;
            eventually("the cached row is forgotten", async || !users.peek(&1).is_known()).await;
            if let Some(repair) = repair {
                eventually("the table is in doubt", async || !coherent().await).await;
                let Status::Bypassed { why: Reason::Triggers(why), .. } = users.status() else { panic!("{damage}") };
                assert!(!why.is_empty(), "{damage}");
                db.execute("update public.users set name = 'while in doubt' where id = 1").await;
                assert_eq!(name(&users, 1).await.as_deref(), Some("while in doubt"), "{damage}: reads go to Postgres");
                assert!(!users.peek(&1).is_known(), "{damage}: and nothing is kept");
                db.execute(repair).await;
            }
            eventually("the table is trusted again", coherent).await;
            db.execute("update public.users set name = 'seen' where id = 2").await;
            node.barrier().await.expect("coherent");
            assert_eq!(name(&users, 2).await.as_deref(), Some("seen"), "{damage}");
            assert!(other.peek(&1).is_known(), "the other table is not concerned");
        }
        assert_eq!(name(&users, 1).await.as_deref(), Some("unseen"));
    }

    // A name in a schema that may not be used any more cannot be looked up, and must not take the other tables along.
    async fn a_schema_that_may_not_be_used_any_more_is_the_doubt_of_its_tables(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let role = format!("{}_app", &db.name[..db.name.len().min(50)]);
        db.execute(&format!(
            "create role {role} login; create schema s; create table s.t (id bigint primary key);
             select rowcache.track('s.t'); grant usage on schema s to {role}; grant select on all tables in schema s, public to {role}"
        ))
        .await;
        let mut url = url::Url::parse(&db.url).expect("a URL");
        url.set_username(&role).expect("has a host");
        let node = Node::connect(url.as_str()).await.expect("starts");
        let users = users(&node).await;
        let other: Table<i64, (i64,)> = node.table("s.t").await.expect("opens");
        name(&users, 1).await;
        db.execute(&format!("revoke usage on schema s from {role}")).await;
        eventually("its table is in doubt", async || matches!(other.status(), Status::Bypassed { .. })).await;
        node.barrier().await.expect("the node is not");
        assert!(users.peek(&1).is_known());
        db.execute(&format!("grant usage on schema s to {role}")).await;
        eventually("it is trusted again", async || matches!(other.status(), Status::Coherent { .. })).await;
    }

    async fn triggers_lost_while_nobody_listened_are_missed_before_anything_is_trusted(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let mut proxy = Proxy::start(db.port).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.listener = hasty(&proxy.url(&db.url)).listener;
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let mut events = node.subscribe();
        proxy.refuse().await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        db.execute("drop trigger zz_rowcache_update on public.users").await;
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert!(matches!(users.status(), Status::Bypassed { why: Reason::Triggers(_), .. }), "{:?}", users.status());
        name(&users, 1).await;
        assert!(!users.peek(&1).is_known());
    }

    async fn a_column_whose_type_changes_while_rows_are_loaded(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = users(&node).await;
        // Every pooled connection has the statement prepared.
        let ids: Vec<i64> = (1..=10).collect();
        for id in &ids {
            name(&users, *id).await;
        }
        db.execute("alter table public.users alter column name type varchar(50), add column extra int default 7").await;
        eventually("what was cached is forgotten", async || !users.peek(&1).is_known()).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"), "prepared again");
        assert_eq!(users.get_many(&ids).await.expect("loads").iter().flatten().count(), 10);
        db.execute("alter table public.users alter column name type integer using 1").await;
        eventually("what was cached is forgotten", async || !users.peek(&1).is_known()).await;
        assert!(users.get(&1).await.is_err_and(|error| error.is_decode()));
    }

    async fn a_key_whose_type_changes_is_not_trusted_again(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let node = Node::start(hasty(&db.url)).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        // Postgres refuses to change the type of a column that a trigger's condition names.
        db.execute(
            "select rowcache.untrack('public.users'); alter table public.users alter column id type integer;
             select rowcache.track('public.users')",
        )
        .await;
        eventually("the table says why", async || match users.status() {
            Status::Bypassed { why, .. } => why.to_string().contains("id integer"),
            _ => false,
        })
        .await;
    }

    async fn an_exhausted_pool_is_a_timeout_that_says_so(test: Test) {
        let db = users_db(test.version).await;
        db.execute("create table other (id bigint primary key); select rowcache.track('other')").await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.pool = config.pool.max_connections(1);
        config.pool = config.pool.acquire_timeout(Duration::from_millis(300));
        config.load_timeout = Duration::from_secs(3);
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let other: Table<i64, (i64,)> = node.table("other").await.expect("opens");
        let client = db.client().await;
        client.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        let stuck = { let users = users.clone(); tokio::spawn(async move { users.get(&1).await.map(drop) }) };
        // A load counts before it has a connection.
        waits_for_users(&db).await;
        let errors = [other.get(&7).await.map(drop), stuck.await.expect("ends")];
        let errors = errors.map(|outcome| outcome.expect_err("nobody gets through"));
        assert!(errors.iter().all(rowcache::Error::is_timeout), "{errors:?}");
        let text = errors[0].to_string();
        assert!(text.contains("public.other 7") && text.contains("pool has 1"), "{text}");
        assert!(matches!(node.status(), Status::Coherent { .. }), "the line does not depend on the pool");
        node.barrier().await.expect("coherent");
        client.batch_execute("rollback").await.expect("unlocks");
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
    }

    async fn x11_a_stuck_commit_is_doubt_and_not_silence(test: Test) {
        test.logs.allow("a fence waited too long");
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let (server, db) = users_server(test.version, &[]).await;
        let mut config = hasty(&db.url);
        // A fence waits for a lock for a third of this, which leaves a busy machine time to say so.
        (config.beat_timeout, config.lease) = (Duration::from_secs(3), Duration::from_secs(4));
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        let mut events = node.subscribe();
        // A commit that waits for a standby which does not exist holds the lock that orders notifications.
        let admin = support::connect(&server.admin_url()).await;
        db.make_commits_wait().await;
        let writer = db.client().await;
        let pid = writer.backend_pid().await;
        let stuck = tokio::spawn(async move {
            writer.batch_execute("update public.users set name = 'stuck' where id = 1").await
        });
        // A fence that cannot be sent is no fence that does not come back: it is given up, tried again, and told apart.
        let Event::Gap(why) = event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await else {
            unreachable!()
        };
        assert_eq!(why, Reason::LeaseExpired);
        assert!(!test.logs.containing("a fence waited too long").is_empty());
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"), "reads go to Postgres, which does not show it yet");
        // Attempts to come back leave nothing behind on the server, where their statements would go on waiting.
        eventually("three attempts have failed", async || test.logs.containing(AGAIN).len() >= 3).await;
        let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'";
        let waiting: i64 = admin.query_one(waiting, &[]).await.expect("counts").get(0);
        assert!(waiting <= 2, "{waiting} backends wait");
        admin.batch_execute("alter system set synchronous_standby_names = ''").await.expect("set");
        admin.batch_execute("select pg_reload_conf()").await.expect("reloaded");
        admin.batch_execute(&format!("select pg_cancel_backend({pid})")).await.expect("cancelled");
        stuck.await.expect("ends").expect("it was committed here all along");
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!(name(&users, 1).await.as_deref(), Some("stuck"));
    }

    // X14: a load that sees changes of its own transaction, which may yet be rolled back: no message will come.
    async fn x14_uncommitted_rows_are_not_cached(test: Test) {
        let db = users_db(test.version).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.pool = config.pool.max_connections(1).after_connect(|connection, _| {
            Box::pin(async move {
                let dirt = "begin; update public.users set name = 'uncommitted' where id = 1";
                sqlx::raw_sql(dirt).execute(connection).await.map(drop)
            })
        });
        let error = Node::start(config).await.expect_err("the probe is never committed");
        assert!(error.is_pooler() || error.is_unavailable(), "{error:?}");
    }

    async fn x14_uncommitted_rows_of_a_later_transaction_are_not_cached_either(test: Test) {
        let db = users_db(test.version).await;
        let dirty = Arc::new(AtomicBool::new(false));
        let mut config = Config::from_url(&db.url).expect("a good URL");
        let switch = Arc::clone(&dirty);
        config.pool = config.pool.before_acquire(move |connection, _| {
            let dirty = switch.load(Ordering::Relaxed);
            Box::pin(async move {
                if dirty {
                    let dirt = "begin; update public.users set name = 'uncommitted' where id = 1";
                    sqlx::raw_sql(dirt).execute(connection).await?;
                }
                Ok(true)
            })
        });
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        dirty.store(true, Ordering::Relaxed);
        assert_eq!(name(&users, 1).await.as_deref(), Some("uncommitted"), "what its connection sees");
        assert!(!users.peek(&1).is_known(), "but it may be rolled back");
        assert_eq!(users.stats().uncached, 1);
    }

    async fn a_listener_on_a_standby_is_refused(test: Test) {
        let mut server = support::server(test.version, &[]).await;
        let db = support::database_on(&server, test.version).await;
        fixture::migrate(&db).await;
        server.stop(Stop::Fast).await.expect("stops");
        std::fs::write(server.data_dir().join("standby.signal"), "").expect("writes");
        server.start().await.expect("starts as a standby");
        let error = Node::connect(&db.url).await.expect_err("LISTEN is impossible there");
        assert!(error.is_standby() && error.to_string().contains("primary"), "{error:?}");
    }

    async fn the_events_end_with_the_node(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let mut events = node.subscribe();
        node.shutdown().await;
        assert!(matches!(events.recv().await, Some(Event::Gap(Reason::ShutDown))));
        assert!(events.recv().await.is_none());
        assert!(matches!(node.status(), Status::Bypassed { why: Reason::ShutDown, .. }));
    }
}
