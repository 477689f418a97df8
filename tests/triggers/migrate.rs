//! Putting the objects in place and taking them away.

use rowcache::migrate::{self, Status};
use sqlx::PgPool;

use super::Db;
use crate::support::database;

/// Everything of ours that the catalogs hold, with its definition.
const OBJECTS: &str = "
    select coalesce(string_agg(line, e'\\n' order by line), '') from (
        select pg_get_functiondef(p.oid) || coalesce(p.proacl::text, '') || coalesce(obj_description(p.oid), '')
        from pg_proc p where p.pronamespace = (select oid from pg_namespace where nspname = 'rowcache')
        union all
        select c.relname || c.relkind::text || c.relpersistence::text || coalesce(c.relacl::text, '') || coalesce(obj_description(c.oid), '')
        from pg_class c where c.relnamespace = (select oid from pg_namespace where nspname = 'rowcache') and c.relname !~ 'migrations'
        union all
        select nspname || coalesce(nspacl::text, '') from pg_namespace where nspname = 'rowcache'
        union all
        select tgname from pg_trigger where tgname like 'zz\\_rowcache%'
    ) as o(line)";

async fn objects(pool: &PgPool) -> String {
    sqlx::query_scalar(OBJECTS).fetch_one(pool).await.expect("the catalogs")
}

fn files(suffix: &str) -> Vec<migrate::File> {
    migrate::print().into_iter().filter(|file| file.name.ends_with(suffix)).collect()
}

pg_test! {
    async fn up_is_harmless_when_repeated_and_down_takes_everything_back(test: Test) {
        let pool = database(test.version).await.pool().await;
        let statuses = migrate::status(&pool).await.expect("status");
        assert!(!statuses.is_empty() && statuses.iter().all(|status| status.applied.is_none()));
        let versions: Vec<i64> = statuses.iter().map(|status| status.version).collect();
        assert_eq!(migrate::up(&pool).await.expect("up"), versions);
        let all = objects(&pool).await;
        assert_eq!(migrate::up(&pool).await.expect("up again"), Vec::<i64>::new());
        assert_eq!(objects(&pool).await, all);
        let applied = |status: &Status| status.applied.is_some() && !status.altered;
        assert!(migrate::status(&pool).await.expect("status").iter().all(applied));

        sqlx::raw_sql("create table t (id int primary key); create table p (id int primary key) partition by range (id);
            create table p1 partition of p default; create table i (id int primary key); create table i1 () inherits (i);
            select rowcache.track('t'), rowcache.track('p'), rowcache.track('i')").execute(&pool).await.expect("track");
        assert_eq!(migrate::down(&pool, 1).await.expect("down"), versions[versions.len() - 1..]);
        assert_eq!(migrate::up(&pool).await.expect("up"), versions[versions.len() - 1..]);
        sqlx::query("insert into t values (1)").execute(&pool).await.expect("a write");
        let mut all_down = versions.clone();
        all_down.reverse();
        assert_eq!(migrate::down(&pool, 100).await.expect("down"), all_down);
        assert_eq!(objects(&pool).await, "");
        assert_eq!(migrate::down(&pool, 1).await.expect("down when there is nothing"), Vec::<i64>::new());
        sqlx::raw_sql("insert into t values (2); insert into p values (1); truncate t, p, i").execute(&pool).await.expect("writes");
        assert_eq!(migrate::up(&pool).await.expect("up"), versions);
        assert_eq!(objects(&pool).await, all);
    }

    async fn twenty_at_once(test: Test) {
        let pool = database(test.version).await.pool().await;
        for _ in 0..3 {
            let at_once: Vec<_> = (0..20).map(|_| tokio::spawn({
                let pool = pool.clone();
                async move { migrate::up(&pool).await }
            })).collect();
            let mut ran = Vec::new();
            for done in at_once {
                ran.extend(done.await.expect("no panic").expect("up"));
            }
            assert_eq!(ran, (1..=i64::try_from(files(".up.sql").len()).expect("few")).collect::<Vec<_>>());
            migrate::down(&pool, 100).await.expect("down");
            assert_eq!(objects(&pool).await, "");
        }
    }

    async fn by_hand_each_file_twice_then_by_the_migrator(test: Test) {
        let db = database(test.version).await;
        let pool = db.pool().await;
        migrate::up(&pool).await.expect("up");
        let all = objects(&pool).await;
        migrate::down(&pool, 100).await.expect("down");
        for file in files(".up.sql") {
            db.execute(&file.sql).await;
            db.execute(&file.sql).await;
        }
        assert_eq!(objects(&pool).await, all);
        let version: i32 = sqlx::query_scalar("select rowcache.schema_version()").fetch_one(&pool).await.expect("a version");
        assert_eq!(version, 2);
        db.execute("create table t (id int primary key); select rowcache.track('t')").await;
        let tracked = objects(&pool).await;
        assert_eq!(migrate::up(&pool).await.expect("up").len(), files(".up.sql").len());
        assert_eq!(objects(&pool).await, tracked);
        db.execute("drop table rowcache.migrations").await;
        for file in files(".down.sql").into_iter().rev() {
            db.execute(&file.sql).await;
            db.execute(&file.sql).await;
        }
        assert_eq!(objects(&pool).await, "");
    }

    async fn the_lowest_down_file_alone_removes_everything(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("create table p (id int primary key) partition by range (id); create table p1 partition of p default;
                select rowcache.track('p')").await;
        let down = &files(".down.sql")[0];
        assert!(down.name.starts_with("0001_"));
        db.run(&down.sql).await;
        db.run(&down.sql).await;
        assert_eq!(objects(&db.db.pool().await).await, "");
        db.tells("insert into t values (6); insert into p values (1); truncate t, p", "").await;
    }

    async fn what_others_have_put_into_the_schema_stays(test: Test) {
        let db = Db::new(&test).await;
        let pool = db.db.pool().await;
        migrate::up(&pool).await.expect("up");
        db.run("create table rowcache.mine (id int)").await;
        migrate::down(&pool, 100).await.expect("down");
        db.run("insert into rowcache.mine values (1)").await;
        migrate::up(&pool).await.expect("up");
    }

    async fn an_altered_file_is_noticed_and_leaves_no_lock_behind(test: Test) {
        let pool = database(test.version).await.pool().await;
        migrate::up(&pool).await.expect("up");
        sqlx::query("update rowcache.migrations set checksum = '\\x00' where version = 1").execute(&pool).await.expect("update");
        assert!(migrate::status(&pool).await.expect("status")[0].altered);
        let error = migrate::up(&pool).await.expect_err("another checksum").to_string();
        assert!(error.contains("migration 1") && error.contains("other contents"), "{error}");
        migrate::up(&pool).await.expect_err("and it does not hang");
        migrate::down(&pool, 100).await.expect("down");
    }

    async fn the_files_say_what_they_lock(test: Test) {
        let _ = test.version;
        let files = migrate::print();
        assert_eq!(files.len() % 2, 0);
        for file in files {
            assert!(file.name.ends_with(".up.sql") || file.name.ends_with(".down.sql"), "{}", file.name);
            let header: Vec<_> = file.sql.lines().take_while(|line| line.starts_with("--")).collect();
            assert!(header.iter().any(|line| line.starts_with("-- Locks: ")), "{}", file.name);
        }
    }
}
