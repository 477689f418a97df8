//! Every way of writing to a plain table, at both trigger levels.

use super::Db;
use crate::support::database;

const LEVELS: [&str; 2] = ["statement", "row"];

pg_test! {
    async fn insert_update_delete_and_data_modifying_queries(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.tells("insert into t values (6), (7)", "6 7").await;
            db.tells("update t set v = 1 where id in (1, 6)", "1 6").await;
            db.tells("delete from t where id > 5", "6 7").await;
            db.tells("with gone as (delete from t where id = 5 returning id) update t set v = 2 where id = 4", "4 5").await;
            db.tells("with moved as (insert into t values (8) returning id) select * from moved", "8").await;
        }
    }

    async fn copy(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            let pool = db.db.pool().await;
            let mut connection = pool.acquire().await.expect("a connection");
            let mut copy = connection.copy_in_raw("copy t (id) from stdin").await.expect("copy");
            copy.send("6\n7\n".as_bytes()).await.expect("send");
            assert_eq!(copy.finish().await.expect("finish"), 2);
            assert_eq!(db.told_so_far().await.list(), "6 7");
        }
    }

    async fn a_change_of_key_tells_both_keys(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.tells("update t set id = 10 where id = 1", "1 10").await;
            db.tells("update t set id = id + 100 where id < 10", "2 3 4 5 102 103 104 105").await;
            db.tells("begin; update t set id = 0 where id = 10; update t set id = 10 where id = 0; commit", "0 10").await;
        }
    }

    async fn upsert_tells_inserted_and_updated_rows_and_not_the_others(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.tells("insert into t values (5), (6) on conflict (id) do update set v = 9", "5 6").await;
            db.tells("insert into t values (1), (2) on conflict do nothing", "").await;
            db.tells("insert into t values (1), (7) on conflict do nothing", "7").await;
            db.tells("insert into t values (1), (8) on conflict (id) do update set v = 3 where t.v = 99", "8").await;
        }
    }

    async fn merge_tells_every_kind_of_action(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.tells(
                "merge into t using (values (1, 'd'), (2, 'u'), (3, 'n'), (6, 'i')) as s (id, op) on s.id = t.id
                 when matched and op = 'd' then delete when matched and op = 'u' then update set v = 1
                 when matched then do nothing when not matched then insert values (s.id)",
                "1 2 6",
            ).await;
        }
    }

    async fn foreign_keys_that_cascade_tell_the_child_rows(test: Test) {
        for level in LEVELS {
            let mut db = Db::new(&test).await;
            db.run("create table parent (id int primary key); insert into parent select generate_series(1, 6)").await;
            db.run("create table t (id int primary key, a int references parent on delete cascade on update cascade,
                    b int references parent on delete set null)").await;
            db.run("insert into t values (1, 1, null), (2, 2, null), (3, null, 3), (4, 4, null), (5, 1, null)").await;
            db.run(&format!("select rowcache.track('t', columns => '{{a}}', level => '{level}')")).await;
            db.tells("delete from parent where id in (1, 2)", "1 2 5 a=1 a=2").await;
            db.tells("delete from parent where id = 3", "3").await;
            db.tells("update parent set id = 40 where id = 4", "4 a=4 a=40").await;
        }
    }

    async fn writes_through_an_updatable_view(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.run("create view shown as select id, v from t where id < 100").await;
            db.tells("insert into shown values (6, 1); update shown set v = 2 where id = 1; delete from shown where id = 2", "1 2 6")
                .await;
        }
    }

    async fn truncate_tells_the_whole_table_also_by_cascade(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.run("create table child (id int primary key, t int references t)").await;
            db.run(&format!("select rowcache.track('child', level => '{level}')")).await;
            db.tells("truncate t cascade", "* public.child:*").await;
            db.tells("truncate t, child", "* public.child:*").await;
        }
    }

    async fn statements_that_change_no_row_tell_nothing_and_take_no_transaction_id(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.run("begin").await;
            db.run("update t set v = 1 where id = 99; delete from t where id = 99; insert into t select 1 where false").await;
            assert_eq!(db.text("pg_current_xact_id_if_assigned()").await, None);
            db.tells("commit", "").await;
        }
    }

    async fn what_is_rolled_back_is_not_told(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.tells("begin; update t set v = 1 where id = 1; rollback", "").await;
            db.tells(
                "begin; update t set v = 1 where id = 1; savepoint s; update t set v = 1 where id = 2; rollback to s;
                 update t set v = 1 where id = 3; commit",
                "1 3",
            ).await;
        }
    }

    async fn the_replica_role_tells_too(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.run("set session_replication_role = replica").await;
            db.tells("insert into t values (6); update t set id = 7 where id = 6; delete from t where id = 1", "1 6 7").await;
            db.tells("truncate t", "*").await;
        }
    }

    async fn two_phase_commit_is_refused_by_postgres(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        db.run("begin; update t set v = 1 where id = 1").await;
        let refusal = db.refuses("prepare transaction 'x'").await;
        assert_eq!(refusal.code, "0A000");
        assert_eq!(refusal.message, "cannot PREPARE a transaction that has executed LISTEN, UNLISTEN, or NOTIFY");
        // Without a row there is nothing to tell.
        db.run("begin; update t set v = 1 where id = 99").await;
        db.run(&format!("prepare transaction '{}'", db.db.name)).await;
        db.run(&format!("rollback prepared '{}'", db.db.name)).await;
    }

    async fn a_writer_needs_no_right_on_the_schema(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            // A role that every server has.
            db.run("grant all on t to pg_read_all_stats; revoke all on schema rowcache from public").await;
            db.run("revoke execute on all functions in schema rowcache from public; set role pg_read_all_stats").await;
            assert_eq!(db.refuses("select rowcache.schema_version()").await.code, "42501");
            db.tells("insert into t values (6); update t set id = 7 where id = 6; delete from t where id = 1", "1 6 7").await;
            db.tells("truncate t", "*").await;
        }
    }

    async fn a_renamed_column_never_fails_the_writer(test: Test) {
        for level in LEVELS {
            let mut db = Db::with_table(&test, level).await;
            db.run("alter table t rename id to number").await;
            db.tells("insert into t values (6)", "*").await;
            db.tells("update t set v = 1 where number = 1", "*").await;
            db.tells("update t set number = 10 where number = 2", "*").await;
            db.tells("delete from t where number = 10", "*").await;
            db.tells("begin; update t set v = 1; savepoint s; update t set v = 2; rollback to s; commit", "*").await;
            assert!(!db.problems("t").await.is_empty());
        }
    }

    async fn database_maintenance_tells_nothing(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("create materialized view m as select * from t").await;
        for sql in [
            "alter table t alter w type bigint", "alter table t add x int default 7", "vacuum full t", "cluster t using t_pkey",
            "reindex table t", "analyze t", "refresh materialized view m",
        ] {
            if sql.contains("alter w") {
                db.run("drop materialized view m; alter table t alter w type bigint; create materialized view m as select * from t")
                    .await;
            } else {
                db.run(sql).await;
            }
            assert_eq!(db.told_so_far().await.list(), "", "{sql}");
        }
    }

    async fn triggers_of_one_database_are_not_heard_in_another(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        let mut other = database(test.version).await.listen("rowcache").await;
        db.run("update t set v = 1").await;
        assert_eq!(other.all_so_far().await, Vec::<String>::new());
    }
}
