//! What became visible since the last poll is read, and nothing else is: transactions of every shape.

use rowcache::Freshness;

use super::*;
use crate::support::TestClient;

/// Gets rows 1 to 3 into both caches, runs `write`, and says which of them are still held after a barrier.
async fn held_after(nodes: &[(Node, Users); 2], write: impl AsyncFnOnce()) -> Vec<i64> {
    for (_, users) in nodes {
        for id in 1..=3 {
            name(users, id).await;
        }
    }
    write().await;
    held(nodes).await
}

async fn held(nodes: &[(Node, Users); 2]) -> Vec<i64> {
    let mut all = Vec::new();
    for (node, users) in nodes {
        node.barrier().await.expect("coherent");
        all.push((1..=3).filter(|id| is_held(users, *id)).collect::<Vec<_>>());
    }
    assert_eq!(all[0], all[1], "the one that listens, and the one that does not");
    all.remove(0)
}

async fn rename(client: &TestClient, id: i64) {
    client.batch_execute(&format!("update public.users set name = 'new' where id = {id}")).await.expect("updates");
}

pg_test! {
    async fn every_kind_of_write_reaches_the_nodes(test: Test) {
        let db = log_db(&test).await;
        let nodes = both(&db).await;
        assert_eq!(held_after(&nodes, async || db.execute("update public.users set name = 'x' where id = 2").await).await, [1, 3]);
        assert_eq!(held_after(&nodes, async || db.execute("delete from public.users where id = 1").await).await, [2, 3]);
        assert_eq!(held_after(&nodes, async || db.execute("insert into public.users values (1, 'again')").await).await, [2, 3]);
        assert_eq!(held_after(&nodes, async || db.execute("update public.users set id = 30 where id = 3").await).await, [1, 2]);
        assert_eq!(held_after(&nodes, async || db.execute("truncate public.users").await).await, Vec::<i64>::new());
        let many = "insert into public.users select n, 'many' from generate_series(1, 20000) n";
        assert_eq!(held_after(&nodes, async || db.execute(many).await).await, Vec::<i64>::new());
        // More keys than one message holds, fewer than are a change of the whole table.
        let chunks = "update public.users set name = 'chunk' where id between 3 and 6000";
        assert_eq!(held_after(&nodes, async || db.execute(chunks).await).await, [1, 2]);
        for (_, users) in &nodes {
            assert_eq!(name(users, 3).await.as_deref(), Some("chunk"));
        }
    }

    // 1. one takes its number, two takes its number; 2. two commits, and is read; 3. one commits.
    async fn who_commits_late_is_read_late(test: Test) {
        let db = log_db(&test).await;
        let nodes = both(&db).await;
        let (one, two) = (db.client().await, db.client().await);
        let after_two = held_after(&nodes, async || {
            one.batch_execute("begin").await.expect("begins");
            rename(&one, 1).await;
            two.batch_execute("begin").await.expect("begins");
            rename(&two, 2).await;
            two.batch_execute("commit").await.expect("commits");
        }).await;
        assert_eq!(after_two, [1, 3]);
        // Many more, and many polls.
        for _ in 0..5 {
            rename(&two, 3).await;
            assert_eq!(held(&nodes).await, [1]);
        }
        one.batch_execute("commit").await.expect("commits");
        assert_eq!(held(&nodes).await, Vec::<i64>::new());
    }

    async fn what_is_rolled_back_does_nothing(test: Test) {
        let db = log_db(&test).await;
        let nodes = both(&db).await;
        let client = db.client().await;
        let after = held_after(&nodes, async || {
            client.batch_execute("begin; update public.users set name = 'never' where id = 1; rollback").await.expect("rolls back");
        }).await;
        assert_eq!(after, [1, 2, 3]);
        let savepoints = "begin; savepoint a; update public.users set name = 'never' where id = 1; rollback to a; \
            savepoint b; update public.users set name = 'x' where id = 2; release b; savepoint c; \
            update public.users set name = 'x' where id = 3";
        client.batch_execute(savepoints).await.expect("writes");
        assert_eq!(held(&nodes).await, [1, 2, 3], "nothing is visible");
        client.batch_execute("commit").await.expect("commits");
        assert_eq!(held(&nodes).await, [1]);
    }

    async fn prepared_transactions_are_read_when_they_commit(test: Test) {
        let (_server, db) = fixture::users_server(test.version, &[("max_prepared_transactions", "5")]).await;
        db.execute(VIA_LOG).await;
        let nodes = both(&db).await;
        let client = db.client().await;
        let prepare = async |id: i64| {
            client.batch_execute("begin").await.expect("begins");
            rename(&client, id).await;
            client.batch_execute(&format!("prepare transaction 'p{id}'")).await.expect("prepares");
        };
        assert_eq!(held_after(&nodes, async || { prepare(1).await; prepare(2).await }).await, [1, 2, 3]);
        client.batch_execute("commit prepared 'p2'").await.expect("commits");
        assert_eq!(held(&nodes).await, [1, 3]);
        client.batch_execute("rollback prepared 'p1'").await.expect("rolls back");
        assert_eq!(held(&nodes).await, [1, 3]);
    }

    async fn row_triggers_count_the_rows_of_the_transaction(test: Test) {
        let db = users_db(test.version).await;
        db.execute("select rowcache.track('public.users', level => 'row', max_keys => 3, via => 'log')").await;
        let rows = async || db.client().await.query_one("select count(*) from rowcache.change_log", &[]).await.expect("counts").get::<_, i64>(0);
        db.execute("update public.users set name = 'x'").await;
        assert_eq!(rows().await, 4, "three keys, and once the whole table");
        // What is rolled back with a savepoint does not count.
        db.execute("begin; savepoint a; update public.users set name = 'y'; rollback to a; update public.users set name = 'y'; commit").await;
        assert_eq!(rows().await, 8);
        let nodes = both(&db).await;
        assert_eq!(held_after(&nodes, async || db.execute("update public.users set name = 'z'").await).await, Vec::<i64>::new());
    }

    async fn keys_that_are_secrets_stay_so(test: Test) {
        let db = users_db(test.version).await;
        db.execute("select rowcache.track('public.users', hash_keys => true, via => 'log')").await;
        let nodes = both(&db).await;
        assert_eq!(held_after(&nodes, async || db.execute("update public.users set name = 'x' where id = 2").await).await, [1, 3]);
        let message: String = db.client().await.query_one("select message from rowcache.change_log", &[]).await.expect("one").get(0);
        assert!(message.contains(r#""h":[""#) && !message.contains(r#""k""#), "{message}");
    }

    // Writers are ordinary roles, and can put nothing into the log but what they could notify.
    async fn ordinary_roles_write_and_poll(test: Test) {
        let db = log_db(&test).await;
        let role = format!("writer_{}", db.name);
        db.execute(&format!("create role {role} login; grant select, update on public.users to {role}")).await;
        let nodes = both(&db).await;
        let as_role = db.url.replace("postgres@", &format!("{role}@"));
        let writer = support::connect(&as_role).await;
        assert_eq!(held_after(&nodes, async || rename(&writer, 2).await).await, [1, 3]);
        for refused in ["delete from rowcache.change_log_0", "insert into rowcache.change_log_0 (xid, message) values ('1', '')",
            "truncate rowcache.change_log_0", "select setval('rowcache.log_horizon', 7)"] {
            writer.batch_execute(refused).await.expect_err(refused);
        }
        let node = Node::start(deaf(&as_role)).await.expect("starts");
        let users = users(&node).await;
        name(&users, 1).await;
        rename(&writer, 1).await;
        node.barrier().await.expect("coherent");
        assert!(!is_held(&users, 1));
        drop((node, users));
        db.execute(&format!("drop owned by {role}")).await;
    }

    // A poll is a fence, and takes no transaction id.
    async fn fences_and_tokens_burn_no_ids(test: Test) {
        let (_server, db) = fixture::users_server(test.version, &[("autovacuum", "off")]).await;
        db.execute(VIA_LOG).await;
        let (here, there) = (Node::start(deaf(&db.url)).await.expect("starts"), Node::start(deaf(&db.url)).await.expect("starts"));
        let (ours, theirs) = (users(&here).await, users(&there).await);
        name(&theirs, 1).await;
        let mut write = here.begin().await.expect("begins");
        sqlx::query("update public.users set name = 'mine' where id = 1").execute(&mut *write).await.expect("writes");
        write.invalidates(&ours, &1);
        let token = write.commit().await.expect("commits");
        there.wait_for(token, support::PATIENCE).await.expect("it is applied there");
        let row = theirs.get_with(&1, Freshness::AtLeast(token)).await.expect("reads").expect("there");
        assert_eq!(row.name, "mine");
        let client = db.client().await;
        let next = async || {
            let ask = "select pg_snapshot_xmax(pg_current_snapshot())::text";
            client.query_one(ask, &[]).await.expect("reads").get::<_, String>(0)
        };
        let before = next().await;
        for _ in 0..20 {
            there.barrier().await.expect("coherent");
            theirs.get_with(&1, Freshness::Fenced).await.expect("reads");
        }
        assert_eq!(next().await, before);
        let unended = db.client().await;
        unended.batch_execute("begin; update public.users set name = 'later' where id = 2").await.expect("writes");
        let token = unended.query_one("select rowcache.token()", &[]).await.expect("a token").get::<_, String>(0);
        let error = there.wait_for(token.parse().expect("a token"), support::PATIENCE).await.expect_err("it runs");
        assert!(error.is_token(), "{error:?}");
    }

    // Many rows of one snapshot: a transaction that changed two of them is in the answer, or is not.
    async fn x24_a_snapshot_shows_whole_transactions(test: Test) {
        let db = log_db(&test).await;
        let nodes = both(&db).await;
        let ended = std::sync::atomic::AtomicBool::new(false);
        let write = async {
            let client = db.client().await;
            for n in 0..300 {
                let both = format!("begin; update public.users set name = '{n}' where id = 1; update public.users set name = '{n}' where id = 2; commit");
                client.batch_execute(&both).await.expect("writes");
            }
            ended.store(true, std::sync::atomic::Ordering::Relaxed);
        };
        let read = async |users: &Users| {
            users.get_many(&[1, 2]).await.expect("reads");
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                let rows = users.snapshot(&[1, 2]).await.expect("reads");
                let names: Vec<_> = rows.iter().map(|row| row.as_ref().expect("there").name.clone()).collect();
                assert!(names[0] == names[1] || names[0].starts_with("user"), "{names:?}");
                // What memory answers never waits, and would not let the writer go on.
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(write, read(&nodes[0].1), read(&nodes[1].1));
        // Once something else has been logged, memory answers.
        db.execute("create table public.other (id int)").await;
        for (node, users) in &nodes {
            users.snapshot(&[1, 2]).await.expect("reads");
            users.get_many(&[1, 2]).await.expect("reads");
            db.execute("insert into public.other values (1)").await;
            node.barrier().await.expect("coherent");
            let before = users.stats();
            users.snapshot(&[1, 2]).await.expect("reads");
            assert_eq!(users.stats().hits - before.hits, 2);
        }
    }

    async fn what_all_nodes_are_told_goes_by_way_of_the_log_too(test: Test) {
        let db = log_db(&test).await;
        let nodes = both(&db).await;
        for (node, users) in &nodes {
            assert_eq!(held_after(&nodes, async || { users.invalidate(&2).await.expect("told"); }).await, [1, 3]);
            assert_eq!(held_after(&nodes, async || { users.clear().await.expect("told"); }).await, Vec::<i64>::new());
            node.barrier().await.expect("coherent");
        }
    }
}
