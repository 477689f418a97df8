//! Fingerprints: they change with whatever could have let a write pass unseen, and with nothing that happens every day.

use rowcache::cli::temp_server::Stop;

use super::Db;
use crate::support;

pg_test! {
    async fn everyday_work_leaves_it_alone(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        db.run("create table p (id int primary key) partition by range (id); create table p1 partition of p default").await;
        db.run("select rowcache.track('p')").await;
        for table in ["public.t", "public.p"] {
            let before = db.fingerprint(table).await;
            assert!(before.is_some());
            for sql in [
                format!("insert into {table} (id) values (100)"),
                format!("update {table} set id = 101 where id = 100"),
                format!("delete from {table} where id = 101"),
                format!("analyze {table}"),
                format!("create index on {table} (id)"),
                format!("comment on table {table} is 'a table'"),
                "select rowcache.track('t')".to_owned(),
                "select rowcache.track('p')".to_owned(),
                "create table bystander (id int primary key); select rowcache.track('bystander')".to_owned(),
                "drop table bystander".to_owned(),
            ] {
                db.run(&sql).await;
                assert_eq!(db.fingerprint(table).await, before, "{table}: {sql}");
            }
            db.run(&format!("vacuum {table}")).await;
            db.run(&format!("vacuum (analyze, freeze) {table}")).await;
            assert_eq!(db.fingerprint(table).await, before, "{table}: vacuum");
            db.run("reindex table t").await;
            assert_eq!(db.fingerprint(table).await, before, "{table}: reindex");
        }
    }

    async fn whatever_could_hide_a_write_changes_it(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        db.run("create table p (id int primary key, v int) partition by range (id);
                create table p1 partition of p for values from (0) to (100) partition by range (id);
                create table p2 partition of p for values from (100) to (200);
                create table p1a partition of p1 default; create table loose (like p including all);
                create table i (id int primary key, v int); create table ia () inherits (i); create table ib () inherits (ia);
                select rowcache.track('p'), rowcache.track('i')").await;
        db.run("create type mood as enum ('sad', 'glad'); create domain temper as mood; create type inner_life as (now temper[]);
                create table m (id int primary key, lives inner_life[]); select rowcache.track('m')").await;
        let function = "do $$ begin execute (select pg_get_functiondef(tgfoid) from pg_trigger
            where tgrelid = 't'::regclass and tgname = 'zz_rowcache_insert'); end $$";
        let cases = [
            // Disabled, written to, enabled again, all between two looks (the writing leaves no trace).
            ("public.t", "alter table t disable trigger all; alter table t enable trigger all"),
            ("public.t", "alter table t disable trigger zz_rowcache_update; alter table t enable always trigger zz_rowcache_update"),
            ("public.t", "alter table t enable replica trigger zz_rowcache_rekey"),
            ("public.t", "truncate t"),
            ("public.t", "alter table t add x int"),
            ("public.t", "alter table t rename x to y"),
            ("public.t", "alter table t alter y type text"),
            ("public.t", "alter table t drop y"),
            ("public.t", "alter table t alter w set default 7"),
            ("public.t", "vacuum full t"),
            ("public.t", function),
            ("public.t", "drop trigger zz_rowcache_delete on t"),
            ("public.t", "select rowcache.track('t')"),
            ("public.t", "select rowcache.track('t', columns => '{v}')"),
            ("public.t", "create trigger zz_rowcache_other after insert on t execute function suppress_redundant_updates_trigger()"),
            ("public.t", "alter table t rename to t2; alter table t2 rename to t"),
            ("public.t", "begin; alter table t rename to t2; create table t (like t2); commit"),
            ("public.t", "drop table t; create table t (id int primary key)"),
            ("public.t", "select rowcache.track('t')"),
            ("public.t", "select rowcache.untrack('t')"),
            ("public.p", "truncate p1a"),
            ("public.p", "truncate p"),
            ("public.p", "alter table p attach partition loose for values from (200) to (300)"),
            ("public.p", "alter table p detach partition loose"),
            ("public.p", "alter table p1a disable trigger zz_rowcache_update; alter table p1a enable always trigger zz_rowcache_update"),
            ("public.p", "alter table p1a disable trigger zz_rowcache_truncate"),
            ("public.p", "drop table p2"),
            ("public.p", "create table p2 partition of p for values from (100) to (200)"),
            ("public.p", "create table p1b partition of p1 for values from (5) to (6)"),
            ("public.i", "truncate ib"),
            ("public.i", "alter table ib no inherit ia"),
            ("public.i", "alter table ib inherit ia"),
            ("public.i", "create table ic () inherits (ib)"),
            ("public.i", "drop trigger zz_rowcache_insert on ib"),
            ("public.m", "alter type mood rename value 'glad' to 'happy'"),
            ("public.m", "alter table m enable row level security"),
            ("public.m", "create policy few on m using (id < 5)"),
            ("public.m", "alter policy few on m using (id < 7)"),
            ("public.m", "drop policy few on m"),
        ];
        for (table, sql) in cases {
            let before = db.fingerprint(table).await;
            assert!(before.is_some(), "{table} before: {sql}");
            // One by one, for what no transaction may contain.
            for statement in if sql.starts_with("do") { vec![sql] } else { sql.split("; ").collect() } {
                db.run(statement).await;
            }
            assert_ne!(db.fingerprint(table).await, before, "{table}: {sql}");
        }
        let before = db.fingerprint("public.i").await;
        db.run("drop table ib cascade").await;
        assert_ne!(db.fingerprint("public.i").await, before);
    }

    async fn one_row_for_each_name(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        let rows = db.client.query(
            "select name, fingerprint from rowcache.fingerprints(array['public.t', 'public.nothing', 'no.schema', 'public.t']) order by 1",
            &[],
        ).await.expect("fingerprints");
        let found: Vec<(String, bool)> = rows.iter().map(|row| (row.get(0), row.get::<_, Option<&str>>(1).is_some())).collect();
        assert_eq!(found, [("no.schema".to_owned(), false), ("public.nothing".to_owned(), false), ("public.t".to_owned(), true)]);
        let none = db.client.query("select * from rowcache.fingerprints('{}')", &[]).await.expect("fingerprints");
        assert!(none.is_empty());
    }

    async fn everybody_may_ask(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        db.run("set role pg_read_all_stats").await;
        assert!(db.fingerprint("public.t").await.is_some());
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        for sql in [
            "select * from rowcache.describe('t')", "select * from rowcache.tracked", "select * from rowcache.stamp",
            "select rowcache.incarnation()", "select rowcache.schema_version()",
        ] {
            db.run(sql).await;
        }
        for sql in [
            "select rowcache.track('t')", "select rowcache.untrack('t')", "select * from rowcache.canary", "delete from rowcache.canary",
            "select * from rowcache.tracked_table", "insert into rowcache.canary values (gen_random_uuid())",
            "create table rowcache.x ()",
        ] {
            assert_eq!(db.refuses(sql).await.code, "42501", "{sql}");
        }
    }

    async fn describe_is_always_one_row(test: Test) {
        let db = Db::new(&test).await;
        db.run(
            "create schema app; create type app.mood as enum ('a'); create domain app.short as varchar(9);
             create table app.t (m app.mood, s app.short, n numeric(9, 2), w int not null, at timestamptz(3), primary key (s, m, at), unique (w));
             create table app.bare (id int); create view app.v as select 1 as id",
        ).await;
        let columns = "relation, relkind::text, primary_key::text, key_columns::text, key_types::text, columns::text, tracked::text,
            problems::text, (fingerprint is not null)::text";
        let describe = async |name: &str| -> Vec<Option<String>> {
            let rows = db.client.query(&format!("select {columns} from rowcache.describe($1)"), &[&name]).await;
            let rows = rows.unwrap_or_else(|error| panic!("{name}: {error:?}"));
            assert_eq!(rows.len(), 1, "{name}");
            (0..9).map(|i| rows[0].get(i)).collect()
        };
        let row = |values: [&str; 9]| values.map(|value| (value != "-").then(|| value.to_owned())).to_vec();
        let untracked = r#"{"app.t is not tracked: select rowcache.track('app.t')"}"#;
        let types = r#"{"character varying",app.mood,"timestamp with time zone"}"#;
        let expected = row(["app.t", "r", "{s,m,at}", "{s,m,at}", types, "{}", "false", untracked, "true"]);
        assert_eq!(describe("app.t").await, expected);
        // By the caller's search_path, however it quotes.
        db.run("set search_path = app; set quote_all_identifiers = on").await;
        assert_eq!(describe("t").await, expected);
        db.run("reset all; select rowcache.track('app.t', key => '{w}', columns => '{n,m}')").await;
        let tracked = row(["app.t", "r", "{s,m,at}", "{w}", "{integer}", "{n,m}", "true", "{}", "true"]);
        assert_eq!(describe("app.t").await, tracked);
        let bare = r#"{"app.bare is not tracked: select rowcache.track('app.bare')"}"#;
        assert_eq!(describe("app.bare").await, row(["app.bare", "r", "-", "-", "-", "{}", "false", bare, "true"]));
        assert_eq!(describe("app.v").await[..2], row(["app.v", "v", "", "", "", "", "", "", ""])[..2]);
        for name in ["app.nothing", "nothing", "\"", "", "a.b.c.d", "no.schema"] {
            let described = describe(name).await;
            assert_eq!(described[0], None, "{name}");
            assert_eq!(described[6].as_deref(), Some("false"), "{name}");
            assert!(described[7].as_deref().is_some_and(|problems| problems.contains("there is no table")), "{name}");
        }
    }

    async fn twenty_first_callers_agree_on_the_incarnation(test: Test) {
        let db = Db::new(&test).await;
        for _ in 0..5 {
            db.run("truncate rowcache.canary").await;
            let mut callers = Vec::new();
            for _ in 0..20 {
                callers.push(db.db.client().await);
            }
            let asked: Vec<_> = callers.into_iter().map(|client| tokio::spawn(async move {
                client.query_one("select rowcache.incarnation()", &[]).await.expect("incarnation").get::<_, String>(0)
            })).collect();
            let mut answers = std::collections::BTreeSet::new();
            for answer in asked {
                answers.insert(answer.await.expect("no panic"));
            }
            assert_eq!(answers.len(), 1, "{answers:?}");
            let stamp = db.text("select canary from rowcache.stamp").await.expect("a canary");
            assert!(answers.iter().all(|answer| answer.ends_with(&format!("/{stamp}"))), "{answers:?} {stamp}");
        }
    }

    async fn the_incarnation_survives_a_restart_and_ends_with_a_crash(test: Test) {
        let mut server = support::server(test.version, &[]).await;
        let db = support::database_on(&server, test.version).await;
        let first = Db::on(db.clone()).await.text("rowcache.incarnation()").await;
        server.restart(Stop::Fast).await.expect("restart");
        let client = db.client().await;
        let ask = "select rowcache.incarnation()";
        assert_eq!(client.query_one(ask, &[]).await.expect(ask).get::<_, Option<String>>(0), first);
        server.restart(Stop::Immediate).await.expect("crash");
        let client = db.client().await;
        let canary = client.query_one("select canary::text from rowcache.stamp", &[]).await.expect("stamp");
        assert_eq!(canary.get::<_, Option<String>>(0), None);
        let second = client.query_one(ask, &[]).await.expect(ask).get::<_, Option<String>>(0);
        assert_ne!(second, first);
        assert_eq!(client.query_one(ask, &[]).await.expect(ask).get::<_, Option<String>>(0), second);
    }

    async fn the_stamp_says_when_the_server_started_and_who_is_dirty(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        let started = db.text("select started from rowcache.stamp").await.expect("started");
        let expected = db.text("select round(extract(epoch from pg_postmaster_start_time()) * 1000000)::bigint").await;
        assert_eq!(Some(started), expected);
        assert_eq!(db.text("select dirty from rowcache.stamp").await.as_deref(), Some("false"));
        db.run("begin; update t set v = 1").await;
        assert_eq!(db.text("select dirty from rowcache.stamp").await.as_deref(), Some("true"));
        db.run("rollback").await;
        let dirty = async || db.text("select dirty from rowcache.stamp").await;
        // A snapshot that may be old: only a transaction that somebody began has an isolation that is not the session's.
        db.run("begin isolation level repeatable read").await;
        assert_eq!(dirty().await.as_deref(), Some("true"));
        db.run("rollback").await;
        db.run("set default_transaction_isolation = 'repeatable read'").await;
        assert_eq!(dirty().await.as_deref(), Some("false"));
        db.run("begin isolation level serializable").await;
        assert_eq!(dirty().await.as_deref(), Some("true"));
        db.run("rollback").await;
        db.run("reset default_transaction_isolation").await;
        db.run("begin").await;
        assert_eq!(dirty().await.as_deref(), Some("false"), "each statement has a snapshot of its own");
        db.run("rollback").await;
    }
}
