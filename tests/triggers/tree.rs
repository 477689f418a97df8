//! Partitions, inheritance and replication: where statement triggers would miss writes.

use super::{Db, sorted};
use crate::{support, support::Test};

async fn partitioned(test: &Test, options: &str) -> Db {
    let db = Db::new(test).await;
    db.run(
        "create table t (id int, region text, v int, primary key (id, region)) partition by list (region);
         create table t_a partition of t for values in ('a');
         -- Another order of columns, and one that is gone.
         create table t_b (gone int, v int, region text not null, id int not null, primary key (id, region)) partition by range (id);
         alter table t_b drop column gone;
         alter table t attach partition t_b for values in ('b');
         create table t_b1 partition of t_b for values from (0) to (100);
         create table t_b2 partition of t_b for values from (100) to (200)",
    )
    .await;
    db.run(&format!("select rowcache.track('t'{options})")).await;
    db.run("insert into t values (1, 'a'), (2, 'a'), (1, 'b'), (150, 'b')").await;
    db
}

/// A table, its child and its grandchild.
async fn inherited(test: &Test, options: &str) -> Db {
    let db = Db::new(test).await;
    db.run(
        "create table t (id int primary key, v int); create table t_a (extra int, primary key (id)) inherits (t);
         create table t_aa (more int) inherits (t_a)",
    )
    .await;
    db.run(&format!("select rowcache.track('t'{options})")).await;
    db.run("insert into t values (1); insert into t_a values (2), (3); insert into t_aa values (4)").await;
    db
}

pg_test! {
    async fn writes_through_the_partitioned_table(test: Test) {
        let mut db = partitioned(&test, "").await;
        assert_eq!(db.told_so_far().await.list(), sorted(r#"[1,"a"] [2,"a"] [1,"b"] [150,"b"]"#));
        db.tells("update t set v = 1 where id = 1", r#"[1,"a"] [1,"b"]"#).await;
        db.tells("update t set id = 3 where id = 2", r#"[2,"a"] [3,"a"]"#).await;
        db.tells("delete from t where id = 150", r#"[150,"b"]"#).await;
        db.tells("insert into t values (1, 'a') on conflict (id, region) do update set v = 7", r#"[1,"a"]"#).await;
        db.tells("truncate t", "*").await;
    }

    async fn rows_that_move_between_partitions_tell_both_keys(test: Test) {
        let mut db = partitioned(&test, "").await;
        db.told_so_far().await;
        db.tells("update t set region = 'b' where id = 2", r#"[2,"a"] [2,"b"]"#).await;
        db.tells("update t set id = 101 where id = 1 and region = 'b'", r#"[1,"b"] [101,"b"]"#).await;
    }

    async fn writes_to_a_leaf_directly(test: Test) {
        let mut db = partitioned(&test, "").await;
        db.told_so_far().await;
        db.tells("insert into t_a values (9, 'a'); update t_b1 set v = 2; delete from t_b2", r#"[9,"a"] [1,"b"] [150,"b"]"#).await;
        db.tells("update t_b1 set id = 5 where id = 1", r#"[1,"b"] [5,"b"]"#).await;
        for part in ["t_a", "t_b", "t_b1", "only t_b2"] {
            db.tells(&format!("truncate {part}"), "*").await;
        }
    }

    async fn partitions_ignore_columns_and_send_others(test: Test) {
        let mut db = partitioned(&test, ", key => '{id}', columns => '{region}', ignore => '{v}'").await;
        assert_eq!(db.told_so_far().await.list(), sorted(r#"1 2 150 region="a" region="b""#));
        db.tells("update t set v = 1; update t_b1 set v = 2; update t_b set v = 3", "").await;
        db.tells("update t_b1 set v = 5, id = 6", r#"1 6 region="b""#).await;
        db.tells("update t set region = 'b' where id = 2", r#"2 region="a" region="b""#).await;
    }

    async fn a_new_partition_tells_at_once_and_its_truncate_after_tracking_again(test: Test) {
        let mut db = partitioned(&test, "").await;
        db.told_so_far().await;
        let before = db.fingerprint("public.t").await;
        db.run("create table t_c partition of t for values in ('c')").await;
        assert_ne!(db.fingerprint("public.t").await, before);
        db.tells("insert into t values (1, 'c'); update t_c set v = 1", r#"[1,"c"]"#).await;
        assert_eq!(
            db.problems("t").await,
            ["trigger zz_rowcache_truncate on public.t_c is missing: select rowcache.track('public.t')"],
        );
        db.run("select rowcache.track('t')").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.tells("truncate t_c", "*").await;
        db.run("create table t_d (like t including all); insert into t_d values (1, 'd')").await;
        db.run("alter table t attach partition t_d for values in ('d')").await;
        assert_eq!(db.problems("t").await.len(), 1);
        db.tells("delete from t_d", r#"[1,"d"]"#).await;
    }

    async fn replicas_roles_write_to_partitions_too(test: Test) {
        let mut db = partitioned(&test, "").await;
        db.told_so_far().await;
        db.run("create table t_c partition of t for values in ('c'); set session_replication_role = replica").await;
        db.tells("insert into t values (1, 'c'), (5, 'a'); truncate t_b1", r#"* [1,"c"] [5,"a"]"#).await;
    }

    async fn a_partition_tracked_alone(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create table p (id int primary key, v int) partition by range (id);
                create table t partition of p for values from (0) to (100);
                create table u partition of p for values from (100) to (200);
                select rowcache.track('t')").await;
        db.tells("insert into p values (1), (100); insert into t values (2)", "1 2").await;
        db.tells("update p set v = 1; update p set id = 105 where id = 1", "1 2").await;
        db.tells("truncate p", "*").await;
        let refusal = db.refuses("select rowcache.track('p')").await;
        assert_eq!(refusal.message, "public.p and public.t, of which one is a part of the other, cannot both be tracked");
        assert_eq!(refusal.hint, "Track the whole only: select rowcache.untrack('public.t').");
    }

    async fn a_partitioned_table_tracked_before_it_has_partitions(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create table t (id int primary key, v int) partition by range (id); select rowcache.track('t')").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.run("create table t1 partition of t default").await;
        db.tells("insert into t1 values (1)", "1").await;
    }

    async fn a_plain_table_that_becomes_a_partition_has_problems(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        let before = db.fingerprint("public.t").await;
        db.run("create table p (id int not null, v int not null default 0, w int) partition by range (id)").await;
        db.run("alter table p attach partition t for values from (0) to (100)").await;
        assert_ne!(db.fingerprint("public.t").await, before);
        db.tells("update p set v = 1", "").await;
        assert!(db.problems("t").await[0].starts_with("public.t has partitions, children, a parent or a subscription by now"));
        db.run("select rowcache.track('t')").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.tells("update p set v = 1 where id = 1", "1").await;
        db.tells("update t set id = 50 where id = 1", "1 50").await;
    }

    async fn inheritance_by_parent_and_by_child(test: Test) {
        let mut db = inherited(&test, "").await;
        db.tells("", "1 2 3 4").await;
        db.tells("update t set v = 1", "1 2 3 4").await;
        db.tells("update only t set v = 2", "1").await;
        db.tells("update t_a set v = 1, extra = 5 where id <> 2; delete from t_aa", "3 4").await;
        db.tells("update t_a set id = 20 where id = 2", "2 20").await;
        for part in ["only t", "t_aa", "t"] {
            db.tells(&format!("truncate {part}"), "*").await;
        }
    }

    async fn inheritance_ignores_columns_that_the_parent_does_not_have(test: Test) {
        let mut db = inherited(&test, ", ignore => '{v}'").await;
        db.told_so_far().await;
        db.tells("update t set v = 1; update t_a set extra = 1, v = 2", "").await;
        db.tells("update t_a set id = 30 where id = 3", "3 30").await;
    }

    async fn a_new_child_has_problems_until_tracked(test: Test) {
        let mut db = inherited(&test, "").await;
        db.told_so_far().await;
        let before = db.fingerprint("public.t").await;
        db.run("create table t_b () inherits (t_a)").await;
        assert_ne!(db.fingerprint("public.t").await, before);
        db.tells("insert into t_b values (7)", "").await;
        assert_eq!(db.problems("t").await.len(), 4);
        db.run("select rowcache.track('t')").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.tells("insert into t_b values (8)", "8").await;
    }

    async fn a_plain_table_that_gets_a_child_has_problems(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        db.run("create table child () inherits (t)").await;
        assert!(db.problems("t").await[0].starts_with("public.t has partitions, children, a parent or a subscription by now"));
        db.run("select rowcache.track('t'); drop table child").await;
        // Row triggers see everything in a plain table too.
        assert_eq!(db.problems("t").await, Vec::<String>::new());
    }

    async fn rows_that_a_subscription_applies(test: Test) {
        let server = support::server(test.version, &[("wal_level", "logical")]).await;
        let source = support::database_on(&server, test.version).await;
        let source = source.client().await;
        source.batch_execute(
            "create table t (id int primary key, v int not null default 0, w int); insert into t values (1), (2);
             create publication p for table t",
        ).await.expect("publish");
        // Its own statement: a slot cannot be made in a transaction that has written.
        source.batch_execute("select pg_create_logical_replication_slot('s', 'pgoutput')").await.expect("a slot");
        let from = source.query_one("select current_database()", &[]).await.expect("its name").get::<_, String>(0);

        let mut db = Db::on(support::database_on(&server, test.version).await).await;
        db.run("create table t (id int primary key, v int not null default 0, w int); select rowcache.track('t')").await;
        let before = db.fingerprint("public.t").await;
        db.run(&format!(
            "create subscription s connection '{}' publication p with (create_slot = false, slot_name = s, enabled = false)",
            server.url(&from),
        )).await;
        assert_ne!(db.fingerprint("public.t").await, before);
        assert!(db.problems("t").await[0].starts_with("public.t has partitions, children, a parent or a subscription by now"));
        assert_eq!(db.refuses("select rowcache.track('t', level => 'statement')").await.hint, "Leave level out.");
        db.run("select rowcache.track('t')").await;

        db.run("alter subscription s enable").await;
        let mut copied = vec![db.listener.next().await, db.listener.next().await];
        copied.sort_by_key(|message| message.payload().to_owned());
        assert!(copied[0].payload().ends_with(r#""k":[1]}"#) && copied[1].payload().ends_with(r#""k":[2]}"#), "{copied:?}");

        let cases = [
            ("insert into t values (3)", vec![r#""k":[3]}"#]),
            ("update t set v = 1 where id = 1", vec![r#""k":[1]}"#]),
            ("update t set id = 20 where id = 2", vec![r#""k":[20,2]}"#]),
            ("delete from t where id = 3", vec![r#""k":[3]}"#]),
            ("truncate t", vec![r#""all":true}"#]),
        ];
        for (sql, endings) in cases {
            source.batch_execute(sql).await.expect(sql);
            for ending in endings {
                let message = db.listener.next().await;
                assert!(message.payload().ends_with(ending), "{sql}: {message:?}");
            }
        }
        db.run("alter subscription s disable; alter subscription s set (slot_name = none); drop subscription s").await;
        assert_eq!(db.told_so_far().await.list(), "");
    }
}
