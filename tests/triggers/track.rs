//! Tracking and untracking: what is refused, what goes wrong later and how it is noticed.

use rowcache::install::{self, Level, TrackOptions};
use std::fmt::Write as _;

use super::Db;
use crate::support::Version;

pg_test! {
    async fn what_cannot_be_tracked_is_refused_with_a_cure(test: Test) {
        let db = Db::new(&test).await;
        db.run(
            "create table t (id int primary key, v text, seen timestamptz);
             create view v as select * from t; create materialized view m as select * from t; create sequence s;
             create temporary table temporary (id int primary key);
             create foreign data wrapper nowhere; create server nowhere foreign data wrapper nowhere;
             create foreign table f (id int) server nowhere;
             create table far (id int) partition by range (id); create foreign table far1 partition of far default server nowhere;
             create table bare (id int); create type pair as (a int, b int); create domain weight as float8;
             create collation any_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
             create table odd (c char(3), f float8, j json, a int[], p pair, w weight, i interval, n inet, o oid, \"C\" int,
                               x text collate any_case, d name)",
        ).await;
        let cases = [
            ("track('v')", "42809", "public.v is a view, which cannot be tracked", "Track the tables it reads"),
            ("track('m')", "42809", "public.m is a materialized view, which cannot be tracked", "Track the tables it reads"),
            ("track('f')", "42809", "public.f is a foreign table, which cannot be tracked", "Track the tables it reads"),
            ("track('s')", "42809", "public.s is a sequence, which cannot be tracked", "Track the tables it reads"),
            ("track('t_pkey')", "42809", "public.t_pkey is an index, which cannot be tracked", "Track the tables it reads"),
            ("track('far')", "42809", "public.far cannot be tracked: its part public.far1 is a foreign table", "Track the local parts"),
            ("track('temporary')", "42809", "temporary is a temporary table, which cannot be tracked", "Use a permanent table"),
            ("track('pg_class')", "42809", "pg_class is a system table, which cannot be tracked", "of your own"),
            ("track('rowcache.canary')", "42809", "rowcache.canary is a system table, which cannot be tracked", "of your own"),
            ("track('nothing')", "42P01", "relation \"nothing\" does not exist", ""),
            ("track(4000000000::oid)", "42P01", "there is no table with oid 4000000000", ""),
            ("track('bare')", "42P16", "table public.bare has no primary key", "rowcache.track('public.bare', key => "),
            ("track('t', key => '{}')", "22023", "the key of table public.t has no columns", "Leave key out"),
            ("track('t', key => '{ID}')", "42703", "table public.t has no column \"ID\"", "in the case in which they were created"),
            ("track('t', key => '{id,null}')", "42703", "table public.t has no column null", "Name columns"),
            ("track('t', columns => '{ctid}')", "42703", "table public.t has no column ctid", "Name columns"),
            ("track('t', ignore => '{no}')", "42703", "table public.t has no column no", "Name columns"),
            ("track('t', ignore => '{id}')", "22023", "column id of table public.t is to be both sent and ignored", "Take it out"),
            ("track('t', columns => '{v}', ignore => '{v}')", "22023", "column v of table public.t is to be both", "Take it out"),
            ("track('t', key => '{id,id}')", "42701", "a column of table public.t is named twice", "once"),
            ("track('t', max_keys => 0)", "22023", "max_keys is 0, not between 1 and 1000000", "10000"),
            ("track('t', max_keys => null)", "22023", "max_keys is null, not between 1 and 1000000", "10000"),
            ("track('t', level => 'table')", "22023", "level is 'table', not auto, statement or row", "Leave it out"),
            ("track('t', level => null)", "22023", "level is null, not auto, statement or row", "Leave it out"),
            ("track('odd', key => '{c}')", "0A000", "column c of table public.odd has type character(3), of", "Usable types"),
            ("track('odd', key => '{f}')", "0A000", "column f of table public.odd has type double precision, of", "Usable types"),
            ("track('odd', key => '{j}')", "0A000", "column j of table public.odd has type json, of", "Usable types"),
            ("track('odd', key => '{a}')", "0A000", "column a of table public.odd has type integer[], of", "Usable types"),
            ("track('odd', key => '{p}')", "0A000", "column p of table public.odd has type public.pair, of", "Usable types"),
            ("track('odd', key => '{w}')", "0A000", "column w of table public.odd has type public.weight, of", "Usable types"),
            ("track('odd', key => '{i}')", "0A000", "column i of table public.odd has type interval, of", "Usable types"),
            ("track('odd', key => '{n}')", "0A000", "column n of table public.odd has type inet, of", "Usable types"),
            ("track('odd', key => '{o}')", "0A000", "column o of table public.odd has type oid, of", "Usable types"),
            ("track('odd', key => '{d}')", "0A000", "column d of table public.odd has type name, of", "Usable types"),
            ("track('odd', key => '{C}', columns => '{f}')", "0A000", "column f of table public.odd has type double", "Usable types"),
            ("track('odd', key => '{x}')", "0A000", "column x of table public.odd (text) has a nondeterministic collation", "lower()"),
        ];
        for (call, code, message, hint) in cases {
            let refusal = db.refuses(&format!("select rowcache.{call}")).await;
            assert_eq!(refusal.code, code, "{call}: {}", refusal.message);
            assert!(refusal.message.starts_with(message), "{call}: {}", refusal.message);
            assert!(refusal.hint.contains(hint), "{call}: {}", refusal.hint);
        }
        assert_eq!(db.text("select count(*) from pg_trigger where tgname like 'zz%'").await.as_deref(), Some("0"));
        assert_eq!(db.text("select count(*) from rowcache.tracked").await.as_deref(), Some("0"));
    }

    async fn virtual_generated_columns(test: Test) {
        if test.version != Version::V18 {
            return; // they are new in 18
        }
        let mut db = Db::new(&test).await;
        db.run("create table t (id int primary key, a int, b int, v int generated always as (a + 1) virtual,
                                s int generated always as (a + 2) stored)").await;
        let refusal = db.refuses("select rowcache.track('t', key => '{v}')").await;
        assert_eq!(refusal.message, "column v of table public.t (integer) is a virtual generated column, which triggers cannot read");
        let refusal = db.refuses("select rowcache.track('t', ignore => '{a}')").await;
        assert_eq!(refusal.message, "column a of table public.t cannot be ignored: the virtual generated column v shows it");
        assert_eq!(refusal.hint, "Ignore v as well.");
        for level in ["statement", "row"] {
            db.run(&format!("select rowcache.track('t', columns => '{{s}}', ignore => '{{b}}', level => '{level}')")).await;
            db.tells("insert into t (id, a) values (1, 1)", "1 s=3").await;
            db.tells("update t set b = 1", "").await;
            db.tells("update t set a = 2", "1 s=3 s=4").await;
            db.tells("delete from t", "1 s=4").await;
        }
        db.run("select rowcache.track('t', ignore => '{a,v}')").await;
    }

    async fn too_many_column_names_for_a_message_are_refused(test: Test) {
        let mut db = Db::new(&test).await;
        let name = |i: u32| format!("{i}_{}", "é".repeat(28));
        let columns: Vec<_> = (0..150).map(|i| format!("\"{}\" text", name(i))).collect();
        db.run(&format!("create table t (id int primary key, {})", columns.join(","))).await;
        let columns = |count: u32| (0..count).map(name).collect::<Vec<_>>().join(",");
        let refusal = db.refuses(&format!("select rowcache.track('t', columns => '{{{}}}')", columns(150))).await;
        assert_eq!(refusal.message, "the names of 150 columns of table public.t do not fit into a message");
        assert_eq!(refusal.hint, "Send fewer columns.");
        for level in ["statement", "row"] {
            db.run(&format!("select rowcache.track('t', columns => '{{{}}}', level => '{level}')", columns(85))).await;
            for length in (700..2500).step_by(50) {
                let told = db.told(&format!(
                    "insert into t (id, \"{}\") select i, repeat('x', {length}) || i from generate_series(1, 7) i; delete from t", name(3),
                )).await;
                assert!(told.words.contains("7") || told.words.contains("*"), "{length}");
            }
        }
    }

    async fn tracking_again_changes_nothing_or_everything(test: Test) {
        let mut db = Db::with_table(&test, "auto").await;
        let before = db.text("select string_agg(t.oid || ' ' || t.xmin, ',') from pg_trigger t").await;
        // Nobody waits, not even for the lock that tracking takes.
        let writer = db.db.client().await;
        writer.batch_execute("begin; update t set v = 1 where id = 1").await.expect("write");
        db.run("set lock_timeout = '1s'; select rowcache.track('t'); select rowcache.track('public.t', key => '{id}')").await;
        assert_eq!(db.refuses("select rowcache.track('t', max_keys => 5)").await.code, "55P03");
        writer.batch_execute("rollback").await.expect("rollback");
        assert_eq!(db.text("select string_agg(t.oid || ' ' || t.xmin, ',') from pg_trigger t").await, before);

        let options = ["", ", columns => '{v}'", ", level => 'row'", ", ignore => '{w}'", ", ignore => '{w}', level => 'row'", ""];
        for option in options {
            db.run(&format!("select rowcache.track('t'{option})")).await;
            assert_eq!(db.problems("t").await, Vec::<String>::new(), "{option}");
            assert!(db.told("update t set v = v + 1 where id = 2").await.words.contains("2"), "{option}");
            assert_eq!(db.told("update t set w = 1 where id = 2").await.words.is_empty(), option.contains("ignore"), "{option}");
        }
        assert_eq!(db.text("select count(*) from pg_trigger where tgname like 'zz_rowcache%'").await.as_deref(), Some("5"));
        assert_eq!(db.text("select count(*) from rowcache.tracked").await.as_deref(), Some("1"));
    }

    async fn twenty_at_once_track_twice(test: Test) {
        let db = Db::new(&test).await;
        db.run("create table t (id int primary key, v int); create table u (id int primary key)").await;
        let mut at_once = Vec::new();
        for i in 0..20 {
            let client = db.db.client().await;
            let sql = format!("select rowcache.track('{}', max_keys => {})", if i % 2 == 0 { "t" } else { "u" }, i / 4 + 1);
            at_once.push(tokio::spawn(async move { client.batch_execute(&sql).await }));
        }
        for done in at_once {
            done.await.expect("no panic").expect("track");
        }
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        assert_eq!(db.problems("u").await, Vec::<String>::new());
    }

    async fn every_way_of_breaking_it_is_a_problem_and_tracking_again_the_cure(test: Test) {
        for (level, ignore) in [("statement", ""), ("row", ""), ("statement", "{w}"), ("row", "{w}")] {
            let db = Db::with_table(&test, level).await;
            let mut options = String::from("'public.t'");
            if !ignore.is_empty() {
                write!(options, ", ignore => '{ignore}'").expect("a string takes all");
            }
            if level == "row" {
                options += ", level => 'row'";
            }
            let call = format!("select rowcache.track({options})");
            db.run(&call).await;
            let mut cases = vec![
                ("drop trigger zz_rowcache_insert on t", "trigger zz_rowcache_insert on public.t is missing"),
                ("drop trigger zz_rowcache_update on t", "trigger zz_rowcache_update on public.t is missing"),
                ("drop trigger zz_rowcache_delete on t", "trigger zz_rowcache_delete on public.t is missing"),
                ("drop trigger zz_rowcache_truncate on t", "trigger zz_rowcache_truncate on public.t is missing"),
                ("alter table t disable trigger zz_rowcache_insert", "trigger zz_rowcache_insert on public.t is disabled"),
                ("alter table t enable trigger zz_rowcache_delete", "trigger zz_rowcache_delete on public.t is not enabled ALWAYS"),
                ("alter table t enable replica trigger zz_rowcache_update", "trigger zz_rowcache_update on public.t is not enabled ALWAYS"),
                ("create or replace trigger zz_rowcache_insert after insert on t for each statement execute function nothing()",
                 "trigger zz_rowcache_insert on public.t calls another function"),
                ("do $$ begin execute format('create or replace trigger zz_rowcache_truncate after truncate on t for each statement
                  execute function rowcache.%I()', 'changed_' || 't'::regclass::oid); end $$",
                 "trigger zz_rowcache_truncate on public.t is not enabled ALWAYS"),
                ("do $$ begin execute format('create or replace trigger zz_rowcache_delete before delete on t for each row
                  execute function rowcache.%I()', 'changed_' || 't'::regclass::oid); end $$",
                 "trigger zz_rowcache_delete on public.t is not as track() makes it"),
                ("do $$ begin execute format('create or replace function rowcache.%I() returns trigger language plpgsql as
                  ''begin return null; end''', 'changed_' || 't'::regclass::oid); end $$", "is not what track() makes of public.t today"),
                ("do $$ begin execute format('alter function rowcache.%I() reset all', 'changed_' || 't'::regclass::oid); end $$",
                 "is not what track() makes of public.t today"),
                ("do $$ begin execute format('alter function rowcache.%I() security definer', 'changed_' || 't'::regclass::oid); end $$",
                 "is not what track() makes of public.t today"),
            ];
            if level == "statement" {
                cases.push(("drop trigger zz_rowcache_rekey on t", "trigger zz_rowcache_rekey on public.t is missing"));
                cases.push(("do $$ begin execute format('create or replace trigger zz_rowcache_rekey after update on t for each row
                  when (false) execute function rowcache.%I()', 'changed_' || 't'::regclass::oid); end $$",
                  "trigger zz_rowcache_rekey on public.t is not as track() makes it"));
                cases.push(("do $$ begin execute format('create or replace trigger zz_rowcache_update after update on t
                  referencing new table as other for each statement execute function rowcache.%I()', 'changed_' || 't'::regclass::oid); end $$",
                  "trigger zz_rowcache_update on public.t is not as track() makes it"));
            } else if !ignore.is_empty() {
                cases.push(("do $$ begin execute format('create or replace trigger zz_rowcache_update after update on t for each row
                  when (old.v < new.v) execute function rowcache.%I()', 'changed_' || 't'::regclass::oid); end $$",
                  "trigger zz_rowcache_update on public.t is not as track() makes it"));
            }
            db.run("create function nothing() returns trigger language plpgsql as 'begin return null; end'").await;
            for (sql, problem) in cases {
                assert_eq!(db.problems("t").await, Vec::<String>::new(), "before {sql}");
                db.run(sql).await;
                let problems = db.problems("t").await;
                assert_eq!(problems.len(), 1, "{sql}: {problems:?}");
                assert!(problems.iter().all(|line| line.contains(problem)), "{sql}: {problems:?}");
                assert!(problems.iter().all(|line| line.ends_with(&format!(": {call}"))), "{problems:?}\n{call}");
                // A trigger that was replaced is not enabled ALWAYS; that must not be all that is noticed.
                if let Some((_, replaced)) = sql.split_once("create or replace trigger ") {
                    let name = replaced.split(' ').next().expect("a name");
                    db.run(&format!("alter table t enable always trigger {name}")).await;
                    let problems = db.problems("t").await;
                    assert_eq!(problems.is_empty(), problem.ends_with("ALWAYS"), "{sql}: {problems:?}");
                }
                db.run(&call).await;
            }
        }
    }

    async fn changes_of_the_table_are_problems(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        db.run("select rowcache.track('t', columns => '{v}', ignore => '{w}', max_keys => 7)").await;
        let cure = "', columns => '{v}', ignore => '{w}', max_keys => 7)";
        let cases = [
            ("alter table t rename to people", "public.people was tracked as public.t", "people"),
            ("create schema app; alter table people set schema app", "app.people was tracked as public.people", "app.people"),
            ("alter schema app rename to app2", "app2.people was tracked as app.people", "app2.people"),
            // Which columns an update must compare has changed.
            ("alter table app2.people add x int", "is not what track() makes of app2.people today", "app2.people"),
        ];
        for (sql, problem, name) in cases {
            db.run(sql).await;
            let problems = db.problems(name).await;
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert!(problems[0].contains(problem) && problems[0].ends_with(cure), "{problems:?}");
            let (_, call) = problems[0].split_once(": select").expect("a cure");
            db.run(&format!("select{call}")).await;
            assert_eq!(db.problems(name).await, Vec::<String>::new());
        }
        db.run("alter table app2.people rename v to v2").await;
        let problems = db.problems("app2.people").await;
        assert!(problems[0].contains("can no longer be tracked like this (table app2.people has no column v)"), "{problems:?}");
        // Two columns change names: the trigger still watches the column that was called id.
        db.run("alter table app2.people rename v2 to v").await;
        assert_eq!(db.problems("app2.people").await, Vec::<String>::new());
        db.run("begin; alter table app2.people rename id to other; alter table app2.people rename x to id; commit").await;
        let problems = db.problems("app2.people").await;
        assert!(problems.iter().any(|line| line.starts_with("trigger zz_rowcache_rekey on app2.people is not as")), "{problems:?}");
    }

    async fn postgres_itself_refuses_to_change_the_type_of_a_key(test: Test) {
        let db = Db::with_table(&test, "statement").await;
        let refusal = db.refuses("alter table t alter id type bigint").await;
        assert_eq!(refusal.message, "cannot alter type of a column used in a trigger definition");
        db.run("begin; select rowcache.untrack('t'); alter table t alter id type bigint; select rowcache.track('t'); commit").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
    }

    async fn tables_that_are_dropped(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("create table u (id int primary key); select rowcache.track('u'); drop table t").await;
        let problem = db.text("select problems[1] from rowcache.tracked where relation = 'public.t'").await.expect("a problem");
        let (gone, cure) = problem.split_once(": ").expect("a cure");
        assert_eq!(gone, "public.t is gone");
        assert!(db.problems("u").await.is_empty());
        db.run("create table t (id int primary key)").await;
        assert_eq!(db.problems("t").await, ["public.t is not tracked: select rowcache.track('public.t')"]);
        db.run("select rowcache.track('t')").await;
        db.tells("insert into t values (1)", "1").await;
        assert_eq!(db.text("select count(*) from rowcache.tracked").await.as_deref(), Some("2"));
        let functions = "select count(*) from pg_proc where proname like 'changed\\_%'";
        assert_eq!(db.text(functions).await.as_deref(), Some("2"));
        db.run("drop table t").await;
        assert_eq!(db.text(cure.trim_start_matches("select ")).await.as_deref(), Some("false"), "it was cleared up before");
        let problem = db.text("select problems[1] from rowcache.tracked where relation = 'public.t'").await.expect("a problem");
        assert_eq!(db.text(problem.split_once(": select ").expect("a cure").1).await.as_deref(), Some("true"));
        assert_eq!(db.text(functions).await.as_deref(), Some("1"));
    }

    async fn untrack_takes_everything_away_even_half_of_it(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("create table p (id int primary key) partition by range (id); create table p1 partition of p default;
                create table u (id int primary key); select rowcache.track('u'), rowcache.track('p')").await;
        assert_eq!(db.text("rowcache.untrack('t')").await.as_deref(), Some("true"));
        assert_eq!(db.text("rowcache.untrack('t')").await.as_deref(), Some("false"));
        db.tells("update t set v = 1; truncate t", "").await;
        db.run("drop trigger zz_rowcache_insert on u; delete from rowcache.tracked_table where relation = 'u'::regclass").await;
        assert_eq!(db.text("rowcache.untrack('u')").await.as_deref(), Some("true"));
        db.run("drop trigger zz_rowcache_insert on p").await;
        assert_eq!(db.text("rowcache.untrack('p')").await.as_deref(), Some("true"));
        assert_eq!(db.text("select count(*) from pg_trigger where tgname like 'zz%'").await.as_deref(), Some("0"));
        assert_eq!(db.text("select count(*) from pg_proc where proname like 'changed%'").await.as_deref(), Some("0"));
    }

    async fn names_do_not_depend_on_how_the_session_quotes(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        db.run("set quote_all_identifiers = on").await;
        assert_eq!(db.text("rowcache.track('t', columns => '{v}')").await.as_deref(), Some("public.t"));
        db.run("reset all").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.run("set quote_all_identifiers = on").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.tells("delete from t where id = 1", "1 v=0").await;
    }

    async fn a_restored_table_is_still_tracked(test: Test) {
        let mut db = Db::with_table(&test, "statement").await;
        // What pg_dump and pg_restore do, told in short: the table has another oid, its function the old name.
        db.run("create table u (id int primary key, v int, w int)").await;
        db.run("do $$ declare f text; begin
            select function into f from rowcache.tracked_table;
            drop table t; alter table u rename to t; update rowcache.tracked_table set relation = 't';
            execute format('create trigger zz_rowcache_insert after insert on t referencing new table as changed_rows
                            for each statement execute function rowcache.%I()', f);
        end $$").await;
        db.run("select rowcache.track('t', columns => '{w}')").await;
        assert_eq!(db.problems("t").await, Vec::<String>::new());
        db.tells("insert into t values (1); update t set id = 2", "1 2").await;
        assert_eq!(db.text("select count(*) from pg_proc where proname like 'changed%'").await.as_deref(), Some("1"));
        // Another table gets the oid that stands in the name.
        db.run("create table x (id int primary key)").await;
        db.run("do $$ begin execute format('alter function rowcache.%I() rename to %I',
            (select function from rowcache.tracked_table), 'changed_' || 'x'::regclass::oid); end $$").await;
        db.run("update rowcache.tracked_table set function = 'changed_' || 'x'::regclass::oid; select rowcache.track('x')").await;
        assert_eq!(db.problems("x").await, Vec::<String>::new());
        db.tells("insert into t values (7); insert into x values (8)", "7 public.x:8").await;
    }

    async fn from_rust(test: Test) {
        let mut db = Db::new(&test).await;
        db.run("create table t (id int primary key, v int, w int)").await;
        let pool = db.db.pool().await;
        assert_eq!(install::track(&pool, "t", &TrackOptions::default()).await.expect("track"), "public.t");
        let options = TrackOptions {
            key: Some(vec!["v".into(), "id".into()]),
            columns: vec!["v".into()],
            ignore: vec!["w".into()],
            max_keys: 12,
            level: Level::Row,
            ..TrackOptions::default()
        };
        assert_eq!(install::track(&pool, "public.t", &options).await.expect("track"), "public.t");
        let tracked = install::tracked(&pool).await.expect("tracked");
        assert_eq!(tracked.len(), 1);
        assert_eq!((tracked[0].relation.as_str(), tracked[0].max_keys, tracked[0].level.as_str()), ("public.t", 12, "row"));
        assert_eq!((&tracked[0].key, &tracked[0].columns, &tracked[0].ignore), (&options.key.unwrap(), &options.columns, &options.ignore));
        assert!(tracked[0].problems.is_empty());
        db.tells("insert into t values (1, 2, 3)", "[2,1] v=2").await;
        assert!(install::untrack(&pool, "t").await.expect("untrack"));
        assert!(!install::untrack(&pool, "t").await.expect("untrack"));
        install::track(&pool, "nothing", &TrackOptions::default()).await.expect_err("no such table");
    }
}
