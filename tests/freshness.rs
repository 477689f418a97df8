//! Reads that ask for more, or for less, than a coherent entry; tokens; and what reads do while the node is not coherent.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rowcache::cli::temp_server::Stop;
use rowcache::{Config, Event, Fallback, Freshness, Lookup, Node, Table, TableOptions, Token};

use crate::{
    fixture::{User, Users, event, hasty, name, node, users, users_db, users_server, waits_for_users},
    support::{
        self, TestDb, eventually,
        proxy::{Close, Direction, Flow, Proxy},
    },
};

const LOST: &str = "LISTEN connection was lost";
const AGAIN: &str = "cannot open the LISTEN connection";
const HOUR: Duration = Duration::from_hours(1);

/// A node whose line goes through a proxy, and that is in no hurry to call silence a gap.
async fn patient(db: &TestDb) -> (Proxy, Node) {
    let proxy = Proxy::start(db.port).await;
    let mut config = Config::from_url(&db.url).expect("a good URL");
    config.listener = hasty(&proxy.url(&db.url)).listener;
    (config.beat_timeout, config.lease) = (Duration::from_mins(1), Duration::from_mins(2));
    (proxy, Node::start(config).await.expect("starts"))
}

/// A node that has lost its line for good, with the rows 1 to 5 held from before.
async fn without_line(db: &TestDb, options: TableOptions) -> (Node, Users, Proxy) {
    let mut proxy = Proxy::start(db.port).await;
    let mut config = hasty(&db.url);
    config.listener = hasty(&proxy.url(&db.url)).listener;
    let node = Node::start(config).await.expect("starts");
    let users: Users = node.table_with("public.users", options).await.expect("opens");
    for id in 1..=5 {
        name(&users, id).await;
    }
    let mut events = node.subscribe();
    proxy.refuse().await;
    proxy.close_all(Close::Rst).await;
    event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
    db.execute("update public.users set name = 'new'").await;
    (node, users, proxy)
}

async fn name_with(users: &Users, id: i64, freshness: Freshness) -> String {
    users.get_with(&id, freshness).await.expect("the load succeeds").expect("exists").name.clone()
}

/// Commits a change in a transaction of its own and returns its token.
async fn token_of(db: &TestDb, change: &str) -> Token {
    let client = db.client().await;
    client.batch_execute("begin").await.expect("begins");
    client.batch_execute(change).await.expect("changes");
    let token: String = client.query_one("select rowcache.token()", &[]).await.expect("a token").get(0);
    client.batch_execute("commit").await.expect("commits");
    token.parse().expect("is one")
}

pg_test! {
    // The message of a commit is on its way and does not arrive: who asks for less gets the old row at once, who asks
    // for more waits for it.
    async fn a_message_that_is_late_is_waited_for_by_those_who_need_it(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = patient(&db).await;
        let users = users(&node).await;
        let ids = [1, 2, 3];
        for (n, freshness) in [Freshness::Fenced, Freshness::Within(Duration::ZERO), Freshness::Coherent].into_iter().enumerate() {
            users.get_many(&ids).await.expect("loads");
            node.barrier().await.expect("coherent");
            let before = name(&users, 1).await.expect("exists");
            proxy.set(Direction::Down, Flow::Stall);
            let change = format!("update public.users set name = 'n{n}'");
            let token = token_of(&db, &change).await;
            for old in [Freshness::Coherent, Freshness::Within(HOUR), Freshness::Any] {
                assert_eq!(name_with(&users, 1, old).await, before, "{old:?} does not wait");
            }
            let freshness = if freshness == Freshness::Coherent { Freshness::AtLeast(token) } else { freshness };
            let one = { let users = users.clone(); tokio::spawn(async move { name_with(&users, 1, freshness).await }) };
            let many = { let users = users.clone(); tokio::spawn(async move { users.get_many_with(&ids, freshness).await }) };
            proxy.set(Direction::Down, Flow::Pass);
            assert_eq!(one.await.expect("ends"), format!("n{n}"), "{freshness:?}");
            let many = many.await.expect("ends").expect("loads");
            assert!(many.iter().flatten().all(|user| user.name == format!("n{n}")) && many.len() == 3, "{freshness:?}");
        }
    }

    // Linearizable across nodes: a value that one node has returned is not newer than what another one returns to a
    // fenced read that starts later.
    async fn fenced_reads_of_many_nodes_never_go_back(test: Test) {
        let db = users_db(test.version).await;
        // The second one hears nothing while the first one is read, and must wait for what that has returned.
        let (proxy, deaf) = patient(&db).await;
        let nodes = [node(&db).await, deaf, node(&db).await];
        let mut tables = Vec::new();
        for node in &nodes {
            tables.push(users(node).await);
        }
        let done = Arc::new(AtomicBool::new(false));
        let writer = {
            let (client, done) = (db.client().await, Arc::clone(&done));
            tokio::spawn(async move {
                let mut n = 0;
                while !done.load(Ordering::Relaxed) {
                    n += 1;
                    client.batch_execute(&format!("update public.users set name = '{n}' where id = 1")).await.expect("writes");
                }
                n
            })
        };
        let mut last = 0;
        let version = |name: String| name.trim_start_matches("user ").parse::<i64>().expect("a number");
        db.execute("update public.users set name = '0' where id = 1").await;
        // The writer may be anywhere; what has been returned is the floor.
        for turn in 0..150 {
            if turn % 3 == 0 {
                proxy.set(Direction::Down, Flow::Stall);
                name(&tables[1], 1).await.expect("held from here on");
            }
            let read = name_with(&tables[turn % 3], 1, Freshness::Fenced);
            let hear = async {
                if turn % 3 == 1 {
                    proxy.set(Direction::Down, Flow::Pass);
                }
            };
            let (seen, ()) = tokio::join!(biased; read, hear);
            let seen = version(seen);
            assert!(seen >= last, "turn {turn}: {seen} after {last}");
            last = seen;
        }
        done.store(true, Ordering::Relaxed);
        let written: i64 = writer.await.expect("ends");
        assert!(last > 1 && last <= written);
        assert_eq!(version(name_with(&tables[0], 1, Freshness::Fenced).await), written);
    }

    // Triggers that somebody has switched off tell nothing. The fence looks at them too.
    async fn a_fenced_read_sees_what_no_trigger_told(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        // No beat comes to help.
        (config.beat, config.beat_timeout, config.lease) = (HOUR, 2 * HOUR, 3 * HOUR);
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        for (n, damage) in ["drop trigger zz_rowcache_update on public.users", "select rowcache.untrack('public.users')"]
            .into_iter()
            .enumerate()
        {
            name(&users, 1).await;
            assert!(users.peek(&1).is_known());
            db.execute(&format!("{damage}; update public.users set name = 'untold {n}'")).await;
            assert!(users.peek(&1).is_known(), "nobody has told");
            assert_eq!(name_with(&users, 1, Freshness::Fenced).await, format!("untold {n}"));
            db.execute("select rowcache.track('public.users')").await;
            node.barrier().await.expect("coherent");
        }
    }

    async fn a_transaction_forgets_its_rows_before_commit_returns(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = patient(&db).await;
        let users = users(&node).await;
        users.get_many(&[1, 2, 3]).await.expect("loads");
        proxy.set(Direction::Down, Flow::Stall);
        let mut transaction = node.begin().await.expect("begins");
        sqlx::query("update public.users set name = 'mine' where id in (1, 2)").execute(&mut *transaction).await.expect("writes");
        transaction.invalidates(&users, &1);
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"), "not committed");
        let token = transaction.commit().await.expect("commits");
        assert!(token.xid() > 0);
        assert_eq!(name(&users, 1).await.as_deref(), Some("mine"), "without its message");
        assert_eq!(name(&users, 2).await.as_deref(), Some("user 2"), "was not named");
        let second = { let users = users.clone(); tokio::spawn(async move { name_with(&users, 2, Freshness::AtLeast(token)).await }) };
        let mut transaction = node.begin().await.expect("begins");
        sqlx::query("update public.users set name = 'all of them'").execute(&mut *transaction).await.expect("writes");
        transaction.clears(&users);
        transaction.commit().await.expect("commits");
        assert_eq!(name(&users, 3).await.as_deref(), Some("all of them"));
        proxy.set(Direction::Down, Flow::Pass);
        assert!(["mine", "all of them"].contains(&second.await.expect("ends").as_str()));
    }

    async fn transactions_that_do_not_commit(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        // Rolled back, dropped, failed before, failed at COMMIT.
        let mut transaction = node.begin().await.expect("begins");
        transaction.invalidates(&users, &1);
        sqlx::query("update public.users set name = 'never'").execute(&mut *transaction).await.expect("writes");
        transaction.rollback().await.expect("rolls back");
        let mut transaction = node.begin().await.expect("begins");
        sqlx::query("update public.users set name = 'never'").execute(&mut *transaction).await.expect("writes");
        drop(transaction);
        let mut transaction = node.begin().await.expect("begins");
        sqlx::query("update public.users set name = 1 / 0").execute(&mut *transaction).await.expect_err("divides");
        let error = transaction.commit().await.expect_err("cannot be committed");
        assert!(error.is_refused(), "{error:?}");
        db.execute("create table child (id bigint references public.users deferrable initially deferred)").await;
        let mut transaction = node.begin().await.expect("begins");
        sqlx::query("insert into child values (77)").execute(&mut *transaction).await.expect("writes");
        let error = transaction.commit().await.expect_err("there is no user 77");
        assert!(error.is_refused(), "{error:?}");
        assert!(users.peek(&1).is_known(), "nothing was forgotten");
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        // One that wrote nothing has a token that is reached at once.
        let token = node.begin().await.expect("begins").commit().await.expect("commits");
        assert_eq!(token.xid(), 0);
        node.wait_for(token, support::PATIENCE).await.expect("nothing to wait for");
    }

    // X31: what a user does to his connection harms no load.
    async fn x31_a_transaction_leaves_no_trace_in_loads(test: Test) {
        let db = users_db(test.version).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.pool = config.pool.max_connections(1);
        config.write_pool = config.write_pool.max_connections(1);
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let mut transaction = node.begin().await.expect("begins");
        let dirt = "set default_transaction_isolation = 'repeatable read'; set role pg_monitor; commit; \
             begin isolation level repeatable read; select 1";
        sqlx::raw_sql(dirt).execute(&mut *transaction).await.expect("runs");
        drop(transaction);
        for n in 0..5 {
            db.execute(&format!("update public.users set name = 'n{n}' where id = 1")).await;
            node.barrier().await.expect("coherent");
            assert_eq!(name(&users, 1).await, Some(format!("n{n}")));
        }
    }

    // X13: a larger transaction id says nothing about a smaller one. X29 and forgery: nor does a message with that id.
    async fn x13_x29_a_token_is_reached_when_its_transaction_is_and_not_before(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        let client = db.client().await;
        client.batch_execute("begin; update public.users set name = 'slow' where id = 1").await.expect("writes");
        let token: String = client.query_one("select rowcache.token()", &[]).await.expect("a token").get(0);
        let token: Token = token.parse().expect("is one");
        db.execute("update public.users set name = 'later id' where id = 2").await;
        let forged = format!(r#"{{"v":1,"t":"public.users","x":{},"k":[9]}}"#, token.xid());
        db.execute(&format!("notify rowcache, '{forged}'; notify rowcache, '{{\"v\":1,\"t\":\"a.b\",\"x\":9,\"k\":[9]}}'")).await;
        node.barrier().await.expect("coherent");
        let error = node.wait_for(token, support::PATIENCE).await.expect_err("has not ended");
        assert!(error.is_token() && error.to_string().contains("COMMIT"), "{error:?}");
        assert!(users.get_with(&1, Freshness::AtLeast(token)).await.is_err_and(|error| error.is_token()));
        client.batch_execute("commit").await.expect("commits");
        assert_eq!(name_with(&users, 1, Freshness::AtLeast(token)).await, "slow");
        node.wait_for(token, support::PATIENCE).await.expect("was applied");
    }

    async fn a_token_is_waited_for_within_a_limit(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = patient(&db).await;
        proxy.set(Direction::Down, Flow::Stall);
        let token = token_of(&db, "update public.users set name = 'told late'").await;
        let error = node.wait_for(token, Duration::from_millis(50)).await.expect_err("no message comes through");
        assert!(error.is_timeout() && error.to_string().contains(&token.to_string()), "{error:?}");
        proxy.set(Direction::Down, Flow::Pass);
        node.wait_for(token, support::PATIENCE).await.expect("it came");
    }

    // X5: what a token names may have been lost, and its id given to another transaction.
    async fn x5_a_token_of_another_incarnation_is_told_apart(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let (mut server, db) = users_server(test.version, &[("fsync", "on"), ("synchronous_commit", "off")]).await;
        db.execute("checkpoint").await;
        let mut proxy = Proxy::start(server.port()).await;
        let mut config = hasty(&db.url);
        config.listener = hasty(&proxy.url(&db.url)).listener;
        let node = Node::start(config).await.expect("starts");
        let users = users(&node).await;
        let token = token_of(&db, "update public.users set name = 'perhaps lost'").await;
        assert_eq!(name_with(&users, 1, Freshness::AtLeast(token)).await, "perhaps lost");
        let mut events = node.subscribe();
        server.stop(Stop::Immediate).await.expect("crashes");
        proxy.refuse().await;
        server.start().await.expect("recovers");
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        // Nobody has told the node, which has no line: the answer of the load tells.
        eventually("loads go through again", async || users.get(&1).await.is_ok()).await;
        let error = users.get_with(&1, Freshness::AtLeast(token)).await.expect_err("lost");
        assert!(error.is_other_incarnation() && error.to_string().contains("may have been lost"), "{error:?}");
        assert!(node.wait_for(token, support::PATIENCE).await.is_err_and(|error| error.is_unavailable()));
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        for _ in 0..2 {
            let error = users.get_with(&1, Freshness::AtLeast(token)).await.expect_err("lost");
            assert!(error.is_other_incarnation(), "{error:?}");
            name(&users, 1).await;
        }
        assert!(node.wait_for(token, support::PATIENCE).await.is_err_and(|error| error.is_other_incarnation()));
    }

    async fn without_a_line_reads_go_to_postgres(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let (_node, users, _proxy) = without_line(&db, TableOptions::default()).await;
        let token = token_of(&db, "update public.users set name = 'newer'").await;
        assert_eq!(name_with(&users, 1, Freshness::Any).await, "user 1", "held before the gap");
        assert_eq!(name_with(&users, 2, Freshness::Within(HOUR)).await, "user 2", "and less than an hour old");
        assert!(matches!(users.peek(&1), Lookup::Unknown));
        for freshness in [
            Freshness::Coherent,
            Freshness::Within(Duration::ZERO),
            Freshness::Fenced,
            Freshness::AtLeast(token),
        ] {
            assert_eq!(name_with(&users, 3, freshness).await, "newer", "{freshness:?}");
        }
        // X4: who has seen the present does not go back.
        for freshness in [Freshness::Any, Freshness::Within(HOUR)] {
            assert_eq!(name_with(&users, 3, freshness).await, "newer", "{freshness:?}");
        }
        let rows = users.snapshot(&[4, 5]).await.expect("one statement");
        assert!(rows.iter().flatten().all(|user| user.name == "newer") && rows.len() == 2);
        assert_eq!(name_with(&users, 4, Freshness::Any).await, "newer", "the snapshot was newer");
        let strange: Token = "1.7.7".parse().expect("a token");
        let error = users.get_with(&1, Freshness::AtLeast(strange)).await.expect_err("is not of this server");
        assert!(error.is_other_incarnation(), "{error:?}");
    }

    async fn old_rows_are_served_as_long_as_the_table_allows_and_no_longer(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let (node, users, mut proxy) =
            without_line(&db, TableOptions::default().fallback(Fallback::ServeStale { max: HOUR })).await;
        let brief = TableOptions::default().fallback(Fallback::ServeStale { max: Duration::from_secs(2) });
        let brief: Users = node.table_with("public.users", brief).await.expect("opens");
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        assert_eq!(name(&users, 6).await.as_deref(), Some("new"), "was not held");
        assert_eq!(users.stats().stale, 1);
        // Two seconds after the last fence the other handle goes to Postgres; what it is told, all are told.
        eventually("too old for two seconds", async || name(&brief, 2).await.as_deref() == Some("new")).await;
        assert_eq!(name(&users, 2).await.as_deref(), Some("new"), "the past is over");
        assert_eq!(name(&users, 3).await.as_deref(), Some("user 3"), "of this one nobody has asked");
        assert_eq!(name_with(&users, 3, Freshness::Fenced).await, "new", "whoever must not get old rows does not");
        users.clear().await.expect("tells");
        assert_eq!(name(&users, 4).await.as_deref(), Some("new"), "a clear drops old rows too");
        let mut events = node.subscribe();
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!(name_with(&users, 5, Freshness::Any).await, "new", "with the gap, its past ends");
    }

    async fn reads_fail_if_the_table_says_so(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let (node, users, mut proxy) = without_line(&db, TableOptions::default().fallback(Fallback::Fail)).await;
        let queries = users.stats().queries;
        for freshness in [Freshness::Coherent, Freshness::Within(HOUR), Freshness::Fenced, Freshness::AtLeast("1.7.7".parse().expect("a token"))] {
            let error = users.get_with(&1, freshness).await.expect_err("fails");
            let text = error.to_string();
            assert!(error.is_unavailable() && text.contains("public.users") && text.contains("not coherent for"), "{text}");
        }
        assert!(users.get(&1).await.is_err_and(|error| error.is_unavailable()));
        assert!(users.get_many(&[1, 2]).await.is_err_and(|error| error.is_unavailable()));
        assert!(users.snapshot(&[1, 2]).await.is_err_and(|error| error.is_unavailable()));
        assert_eq!(name_with(&users, 1, Freshness::Any).await, "user 1");
        let error = users.get_with(&9, Freshness::Any).await.expect_err("is not held");
        assert!(error.is_unavailable(), "{error:?}");
        assert_eq!(users.stats().queries, queries, "Postgres was left alone");
        let stats = users.stats();
        assert_eq!(stats.gets, stats.hits + stats.stale + stats.misses);
        let mut events = node.subscribe();
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        assert_eq!(name_with(&users, 2, Freshness::Any).await, "new", "with the gap, its past ends");
        assert_eq!(name(&users, 1).await.as_deref(), Some("new"));
    }

    async fn what_was_used_most_is_read_again_after_a_gap(test: Test) {
        test.logs.allow(LOST);
        let db = users_db(test.version).await;
        db.execute("insert into public.users select n, 'user ' || n from generate_series(11, 2000) n").await;
        let node = node(&db).await;
        let users: Users = node.table_with("public.users", TableOptions::default().refill(600)).await.expect("opens");
        let all: Vec<i64> = (1..=2000).collect();
        users.get_many(&all).await.expect("loads");
        let used = |id: i64| id % 4 == 0;
        for _ in 0..100 {
            for id in all.iter().filter(|id| used(**id)) {
                assert!(users.try_get(id).is_known());
            }
        }
        let before = users.stats();
        db.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and application_name like '%(listener)'").await;
        eventually("the rows are back", async || users.stats().refilled == 600).await;
        let (after, of_node) = (users.stats(), node.stats());
        assert_eq!((of_node.gaps, of_node.recoveries), (1, 2));
        assert!(of_node.fences >= 2 && of_node.messages >= of_node.fences && !of_node.fence_took.is_zero());
        assert_eq!(after.gets, before.gets, "nobody has asked for them");
        assert!(all.iter().filter(|id| used(**id)).all(|id| users.peek(id).is_known()));
        assert_eq!(all.iter().filter(|id| users.peek(id).is_known()).count(), 600, "500 that were used, and 100 others");
        assert_eq!(after.queries - before.queries, 2, "in batches");
        db.execute("update public.users set name = 'seen' where id = 4").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 4).await.as_deref(), Some("seen"));
    }

    async fn what_was_read_in_a_gap_is_read_again_after_it_or_after_the_next_one(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let (node, users, mut proxy) = without_line(&db, TableOptions::default().refill(5)).await;
        let ids: Vec<i64> = (1..=5).collect();
        let held = || ids.iter().filter(|id| users.peek(id).is_known()).count();
        let mut events = node.subscribe();
        for _ in 0..2 {
            assert_eq!(users.get_many(&ids).await.expect("loads").len(), 5);
            assert_eq!(held(), 0, "in a gap");
            proxy.accept().await;
            event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
            eventually("the rows are back", async || held() == 5).await;
            proxy.refuse().await;
            proxy.close_all(Close::Rst).await;
            event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        }
        // They are being read when the next gap comes.
        users.get_many(&ids).await.expect("loads");
        let locker = db.client().await;
        locker.batch_execute("begin; lock table public.users in access exclusive mode").await.expect("locks");
        proxy.accept().await;
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        waits_for_users(&db).await;
        proxy.close_all(Close::Rst).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        locker.batch_execute("rollback").await.expect("unlocks");
        event(&mut events, "coherent again", |event| matches!(event, Event::Coherent)).await;
        eventually("the rows are back", async || held() == 5).await;
    }

    async fn reads_of_a_table_in_doubt_fail_if_the_table_says_so(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().fallback(Fallback::Fail);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        let token = token_of(&db, "update public.users set name = 'told'").await;
        db.execute("drop trigger zz_rowcache_update on public.users").await;
        for freshness in
            [Freshness::Fenced, Freshness::Within(Duration::ZERO), Freshness::AtLeast(token), Freshness::Any]
        {
            let error = users.get_with(&1, freshness).await.expect_err("nobody knows");
            assert!(error.is_unavailable(), "{freshness:?}: {error:?}");
            assert!(users.get_many_with(&[1, 2], freshness).await.is_err(), "{freshness:?}");
        }
        assert!(matches!(node.status(), rowcache::Status::Coherent { .. }), "the node is not concerned");
    }

    // A transaction that wrote nothing may have seen what has not arrived here.
    async fn the_token_of_a_reader_is_reached_by_a_fence_too(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = patient(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        proxy.set(Direction::Down, Flow::Stall);
        db.execute("update public.users set name = 'seen elsewhere' where id = 1").await;
        let token = token_of(&db, "select * from public.users").await;
        assert_eq!((token.xid(), name(&users, 1).await.as_deref()), (0, Some("user 1")));
        let read = { let users = users.clone(); tokio::spawn(async move { name_with(&users, 1, Freshness::AtLeast(token)).await }) };
        proxy.set(Direction::Down, Flow::Pass);
        assert_eq!(read.await.expect("ends"), "seen elsewhere");
    }

    async fn after_a_shutdown_nothing_is_served_and_nobody_is_waited_for(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().fallback(Fallback::ServeStale { max: HOUR });
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        let transaction = node.begin().await.expect("begins");
        node.shutdown().await;
        for freshness in [Freshness::Coherent, Freshness::Any, Freshness::Within(HOUR), Freshness::Fenced] {
            assert!(users.get_with(&1, freshness).await.is_err_and(|error| error.is_closed()), "{freshness:?}");
        }
        assert!(node.begin().await.is_err_and(|error| error.is_closed()));
        drop(transaction);
    }

    // A table in doubt has no old rows: nobody knows since when changes were not told.
    async fn a_table_in_doubt_serves_no_old_rows(test: Test) {
        test.logs.allow("the triggers or the definition of this table changed");
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let options = TableOptions::default().fallback(Fallback::ServeStale { max: HOUR });
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        name(&users, 1).await;
        db.execute("drop trigger zz_rowcache_update on public.users; update public.users set name = 'untold'").await;
        node.barrier().await.expect("coherent");
        assert_eq!(name(&users, 1).await.as_deref(), Some("untold"));
        assert_eq!(name_with(&users, 1, Freshness::Any).await, "untold");
    }

    // X24: a transaction moves an amount from one row to another; no snapshot may show half of it.
    async fn x24_a_snapshot_never_shows_half_of_a_transaction(test: Test) {
        let db = users_db(test.version).await;
        db.execute(
            "create table accounts (id bigint primary key, amount bigint not null);
             insert into accounts select n, 100 from generate_series(1, 4) n; select rowcache.track('accounts')",
        )
        .await;
        let node = node(&db).await;
        let accounts: Table<i64, (i64, i64)> = node.table("accounts").await.expect("opens");
        let ids = [1, 2, 3, 4];
        let done = Arc::new(AtomicBool::new(false));
        let mut writers = Vec::new();
        for writer in 0..2 {
            let (client, done) = (db.client().await, Arc::clone(&done));
            writers.push(tokio::spawn(async move {
                let (from, to) = (1 + writer * 2, 2 + writer * 2);
                let mut turns = 0;
                while !done.load(Ordering::Relaxed) {
                    // Statement by statement, so that each transaction has two messages.
                    let moved = format!(
                        "begin; update accounts set amount = amount - 1 where id = {from};
                         update accounts set amount = amount + 1 where id = {to}; commit"
                    );
                    client.batch_execute(&moved).await.expect("writes");
                    turns += 1;
                }
                turns
            }));
        }
        for turn in 0..400 {
            let rows = accounts.snapshot(&ids).await.expect("loads");
            let amounts: Vec<_> = rows.iter().map(|row| row.as_ref().expect("exists").1).collect();
            assert_eq!(amounts.iter().sum::<i64>(), 400, "turn {turn}: {amounts:?}");
            assert_eq!(amounts[0] + amounts[1], 200, "turn {turn}: {amounts:?}");
            // Between them some single rows, so that entries of different ages are held.
            accounts.get(&ids[turn % 4]).await.expect("loads");
        }
        done.store(true, Ordering::Relaxed);
        for writer in writers {
            assert!(writer.await.expect("ends") > 0);
        }
        // In quiet times a snapshot comes from memory.
        node.barrier().await.expect("coherent");
        accounts.snapshot(&ids).await.expect("loads");
        let before = accounts.stats();
        let rows = accounts.snapshot(&[4, 1, 4, 2]).await.expect("loads");
        assert_eq!(accounts.stats().queries, before.queries);
        assert_eq!(accounts.stats().hits, before.hits + 4);
        assert_eq!(rows.iter().map(|row| row.as_ref().expect("exists").0).collect::<Vec<_>>(), [4, 1, 4, 2]);
    }

    // The same, step by step: one row is held from before the transaction, the other one was loaded after it, and its
    // messages are still on their way.
    async fn x24_rows_from_before_and_after_a_transaction_make_no_snapshot(test: Test) {
        let db = users_db(test.version).await;
        let (proxy, node) = patient(&db).await;
        let users = users(&node).await;
        name(&users, 1).await;
        node.barrier().await.expect("coherent");
        proxy.set(Direction::Down, Flow::Stall);
        db.execute("update public.users set name = 'both' where id in (1, 2)").await;
        assert_eq!(name(&users, 2).await.as_deref(), Some("both"));
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"), "its message has not come");
        let snapshot = { let users = users.clone(); tokio::spawn(async move { users.snapshot(&[1, 2]).await }) };
        eventually("it has looked", async || snapshot.is_finished() || users.stats().gets == 5).await;
        proxy.set(Direction::Down, Flow::Pass);
        let rows = snapshot.await.expect("ends").expect("loads");
        let names: Vec<_> = rows.iter().flatten().map(|user| user.name.as_str()).collect();
        assert_eq!(names, ["both", "both"]);
    }

    async fn a_snapshot_with_absent_rows_and_duplicates(test: Test) {
        test.logs.allow(LOST);
        test.logs.allow(AGAIN);
        let db = users_db(test.version).await;
        let (_node, users, _proxy) = without_line(&db, TableOptions::default()).await;
        for _ in 0..2 {
            let rows = users.snapshot(&[2, 77, 2, 1]).await.expect("one statement");
            let rows: Vec<_> = rows.into_iter().map(|row| row.map(|user| user.id)).collect();
            assert_eq!(rows, [Some(2), None, Some(2), Some(1)]);
        }
        assert!(users.snapshot(&[]).await.expect("nothing").is_empty());
    }

    async fn the_status_states_the_bound(test: Test) {
        let db = users_db(test.version).await;
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.lease = Duration::from_secs(7);
        let bound = config.staleness_bound();
        assert_eq!(bound, Duration::from_millis(7010));
        let node = Node::start(config).await.expect("starts");
        let text = node.status().to_string();
        assert!(text.starts_with("coherent as of 0.") && text.ends_with("reads miss no change older than 7.01 s"), "{text}");
        let table: Table<i64, User> = node.table("public.users").await.expect("opens");
        assert!(table.status().to_string().contains("7.01 s"));
        node.shutdown().await;
        let text = node.status().to_string();
        assert!(text.starts_with("not coherent for 0.") && text.ends_with("shut down"), "{text}");
    }
}
