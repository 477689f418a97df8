//! Faults of tracked tables, of the schema, and of who may change them.

use super::{doctor, migrated, prepare, prepared};
use crate::{
    program::{psql, run},
    support::{self, database, database_on},
};

pg_test! {
    async fn nothing_is_wrong(test: Test) {
        let db = prepared(test.version).await;
        let found = doctor(&db.url).await;
        assert_eq!(found.bad(), [""; 0], "{found}");
        for code in ["server.version", "schema.version", "migrations", "tables.whole", "listen.arrives", "queue.usage", "notify.rate"] {
            found.has("ok", code, &[]);
        }
        let text = run(&db.url, &["doctor", "--seconds", "1"]).await;
        assert_eq!(text.err, "", "{text:#?}");
        assert!(!text.out.contains('\u{1b}'), "colours, and no terminal: {text:#?}");
        assert!(text.out.contains("1 of 1 tracked tables have whole triggers  [tables.whole]"), "{text:#?}");
        assert!(text.out.contains("\n\n0 errors, 0 warnings") || !found.bad().is_empty() || text.code != Some(0), "{text:#?}");
    }

    async fn faults_of_triggers_and_their_cures(test: Test) {
        let db = migrated(test.version).await;
        let tables = ["off", "gone", "other", "origin", "drifted", "old", "dropped", "untrackable"];
        for table in tables {
            psql(&db, &[&format!("create table {table} (id int primary key, v int)")]).await;
            run(&db.url, &["track", table, "--columns", "v"]).await.ok();
        }
        psql(&db, &[
            "create table parted (id int primary key) partition by range (id)",
            "create table part1 partition of parted for values from (0) to (10)",
            "create table parent (id int primary key)",
            "create table child (primary key (id)) inherits (parent)",
        ]).await;
        run(&db.url, &["track", "parted", "parent"]).await.ok();
        assert_eq!(doctor(&db.url).await.bad(), [""; 0]);

        psql(&db, &[
            "alter table off disable trigger zz_rowcache_insert",
            "drop trigger zz_rowcache_update on gone",
            "create function nothing() returns trigger language plpgsql as 'begin return null; end'",
            "create or replace trigger zz_rowcache_insert after insert on other for each statement execute function nothing()",
            "alter table origin enable trigger zz_rowcache_delete",
            "do $$ begin execute format('alter function rowcache.%I() reset all', 'changed_' || 'drifted'::regclass::oid); end $$",
            "alter table old rename to new",
            "drop table dropped",
            "alter table untrackable rename v to w",
            "create table part2 partition of parted for values from (10) to (20)",
            "create table child2 (primary key (id)) inherits (parent)",
        ]).await;
        let found = doctor(&db.url).await;
        found.has("error", "trigger.disabled", &["zz_rowcache_insert on public.off is disabled", "select rowcache.track('public.off'"]);
        found.has("error", "trigger.replaced", &["public.other", "calls another function"]);
        found.has("error", "trigger.not_always", &["public.origin", "zz_rowcache_delete"]);
        found.has("error", "function.drifted", &["public.drifted"]);
        found.has("error", "table.renamed", &["public.old", "public.new was tracked as"]);
        found.has("error", "table.gone", &["public.dropped", "select rowcache.untrack("]);
        found.has("error", "table.untrackable", &["public.untrackable", "has no column v"]);
        let missing: Vec<_> = found.all("trigger.missing");
        let about = |table: &str| missing.iter().find(|it| it["about"] == table).unwrap_or_else(|| panic!("{table}: {found}"));
        assert!(about("public.gone")["what"].as_str().unwrap().contains("zz_rowcache_update on public.gone"));
        assert!(about("public.parted")["what"].as_str().unwrap().contains("zz_rowcache_truncate on public.part2"));
        assert!(about("public.parent")["what"].as_str().unwrap().contains("(and 3 more like it)"), "{found}");
        found.has_not("tables.whole");
        found.has_not("trigger.leftover");

        // The cures cure.
        psql(&db, &["alter table untrackable rename w to v"]).await;
        for finding in found.findings.iter().filter(|it| it["severity"] == "error") {
            psql(&db, &[finding["cure"].as_str().expect("a cure")]).await;
        }
        assert_eq!(doctor(&db.url).await.bad(), [""; 0]);
    }

    async fn a_table_that_a_subscription_fills_needs_row_triggers(test: Test) {
        let server = support::server(test.version, &[("wal_level", "logical")]).await;
        let source = database_on(&server, test.version).await;
        psql(&source, &["create table users (id bigint primary key, name text)", "create publication p for table users",
            "select pg_create_logical_replication_slot('s', 'pgoutput')"]).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        doctor(&db.url).await.has_not("table.needs_row_triggers");
        psql(&db, &[&format!("create subscription s connection '{}' publication p with (create_slot = false, slot_name = s, enabled = false)",
            source.url)]).await;
        let found = doctor(&db.url).await;
        found.has("error", "table.needs_row_triggers", &["public.users", "subscription", "select rowcache.track('public.users')"]);
        run(&db.url, &["track", "users"]).await.ok();
        doctor(&db.url).await.has_not("table.needs_row_triggers");
        psql(&db, &["alter subscription s disable", "alter subscription s set (slot_name = none)", "drop subscription s"]).await;
    }

    async fn unwise_tables(test: Test) {
        let db = prepared(test.version).await;
        psql(&db, &[
            "create table logins (\"Token\" text primary key, user_id bigint)",
            "create table people (id bigint primary key, email varchar(80), email_id int)",
            "create unlogged table volatile (id int primary key)",
            "create table hidden (id int primary key)",
            "create table keyless (\"A\" int, b text)",
        ]).await;
        run(&db.url, &["track", "logins", "volatile", "hidden"]).await.ok();
        run(&db.url, &["track", "people", "--columns", "email,email_id"]).await.ok();
        run(&db.url, &["track", "keyless", "--key", "A,b"]).await.ok();
        psql(&db, &["alter table hidden enable row level security"]).await;
        let found = doctor(&db.url).await;
        let secrets: Vec<_> = found.all("key.secret").into_iter().map(|it| it["what"].as_str().unwrap()).collect();
        assert_eq!(secrets.len(), 2, "{found}");
        assert!(secrets[0].contains("public.logins: column Token (text)"), "{found}");
        assert!(secrets[1].contains("public.people: column email (character varying(80))"), "{found}");
        assert!(found.all("key.secret")[0]["cure"].as_str().unwrap().starts_with("rowcache track public.logins --key Token --hash-keys --max-keys 10000"));
        let people = found.all("key.secret")[1]["cure"].as_str().unwrap();
        assert_eq!(people, "rowcache track public.people --key id --max-keys 10000", "columns are never hashed: they go");
        found.has("note", "table.unlogged", &["public.volatile", "incarnation"]);
        found.has("warning", "table.row_security", &["public.hidden", "every caller"]);
        found.has("warning", "table.key_not_unique", &["public.keyless", "(\"A\", b)"]);
        assert_eq!(found.code, Some(1), "{found}");

        psql(&db, &["alter table hidden disable row level security", "alter table volatile set logged",
            "create unique index on keyless (\"A\")"]).await;
        for cure in found.all("key.secret") {
            let words: Vec<_> = cure["cure"].as_str().unwrap().split(' ').skip(1).collect();
            run(&db.url, &words).await.ok();
        }
        let found = doctor(&db.url).await;
        for code in ["key.secret", "table.unlogged", "table.row_security", "table.key_not_unique"] {
            found.has_not(code);
        }
    }

    async fn triggers_that_were_left_behind(test: Test) {
        let db = migrated(test.version).await;
        psql(&db, &["create table p (id int primary key) partition by range (id)",
            "create table p1 partition of p for values from (0) to (10)"]).await;
        run(&db.url, &["track", "p"]).await.ok();
        doctor(&db.url).await.has_not("trigger.leftover");
        psql(&db, &["alter table p detach partition p1"]).await;
        let found = doctor(&db.url).await;
        found.has("note", "trigger.leftover", &["public.p1", "rowcache untrack public.p1"]);
        assert_eq!(found.bad(), [""; 0], "{found}");
        run(&db.url, &["untrack", "public.p1"]).await.ok();
        doctor(&db.url).await.has_not("trigger.leftover");
    }

    async fn the_schema(test: Test) {
        let db = database(test.version).await;
        let found = doctor(&db.url).await;
        found.has("error", "schema.missing", &["rowcache migrate up"]);
        // What does not depend on the schema is looked at all the same.
        found.has("ok", "listen.arrives", &[]);
        run(&db.url, &["migrate", "up"]).await.ok();
        let found = doctor(&db.url).await;
        assert_eq!(found.bad(), [""; 0], "{found}");
        found.has("note", "tables.none", &["rowcache track"]);

        run(&db.url, &["migrate", "down", "--steps", "2"]).await.ok();
        let found = doctor(&db.url).await;
        found.has("error", "schema.version", &["version 1", "rowcache migrate up"]);
        run(&db.url, &["migrate", "down"]).await.ok();
        let found = doctor(&db.url).await;
        found.has("error", "schema.incomplete", &["rowcache migrate up"]);
        for missing in ["0003_inspection", "0004_change_log", "0005_shared_values"] {
            let said = format!("\"migration.missing\" error migration {missing} has not been run");
            assert!(found.to_string().contains(&said), "{found}");
        }
        run(&db.url, &["migrate", "up"]).await.ok();

        psql(&db, &["update rowcache.migrations set checksum = '\\x00' where version = 2"]).await;
        doctor(&db.url).await.has("warning", "migration.altered", &["0002_tracking"]);
        psql(&db, &["insert into rowcache.migrations (version, description, success, checksum, execution_time) values (99, 'x', true, '\\x00', 0)"]).await;
        doctor(&db.url).await.has("warning", "migration.unknown", &["99"]);
        psql(&db, &["create or replace function rowcache.schema_version() returns int language sql as 'select 99'"]).await;
        doctor(&db.url).await.has("error", "schema.version", &["version 99", "newer release"]);
        psql(&db, &["create or replace function rowcache.schema_version() returns int language sql as 'select 0'"]).await;
        doctor(&db.url).await.has("error", "schema.version", &["version 0", "rowcache migrate up"]);
    }

    async fn who_may_lead_nodes_astray(test: Test) {
        let db = prepared(test.version).await;
        let [app, other, group] = ["app", "other", "team"].map(|name| format!("{}_{name}", &db.name[..db.name.len().min(30)]));
        psql(&db, &[&format!("create role {app} login"), &format!("create role {other} login"), &format!("create role {group}")]).await;
        let found = doctor(&db.url).await;
        found.has("note", "roles.may_notify", &["may connect", "never"]);
        assert_eq!(found.bad(), [""; 0], "{found}");

        let faults: [(&str, &str, &[String], &[String]); 6] = [
            ("warning", "roles.create_in_schema", &[format!("grant create on schema rowcache to {app}")],
                &[format!("revoke create on schema rowcache from {app}")]),
            ("error", "roles.write_canary", &[format!("grant insert on rowcache.canary to {app}")],
                &[format!("revoke all on rowcache.canary from {app}")]),
            ("error", "roles.write_schema", &[format!("grant delete on rowcache.tracked_table to {app}")],
                &[format!("revoke all on rowcache.tracked_table from {app}")]),
            ("error", "roles.own_function", &[format!("grant create on schema rowcache to {app}"),
                format!("alter function rowcache.problems(regclass) owner to {app}"), format!("revoke create on schema rowcache from {app}")],
                &["alter function rowcache.problems(regclass) owner to postgres".to_owned()]),
            ("warning", "roles.replace_triggers", &[format!("grant trigger on users to {app}")],
                &[format!("revoke trigger on public.users from {app}")]),
            ("warning", "roles.alter_table", &[format!("alter table users owner to {group}"), format!("grant {group} to {app}")],
                &[format!("revoke {group} from {app}"), "alter table users owner to postgres".to_owned()]),
        ];
        for (severity, code, make, cure) in faults {
            psql(&db, &make.iter().map(String::as_str).collect::<Vec<_>>()).await;
            let found = doctor(&db.url).await;
            found.has(severity, code, &[&app]);
            assert_eq!(found.bad(), [code], "{found}");
            assert!(!found.one(code).contains(&other), "{found}");
            psql(&db, &cure.iter().map(String::as_str).collect::<Vec<_>>()).await;
            doctor(&db.url).await.has_not(code);
        }

        // Who owns tables and tracks them needs both.
        psql(&db, &[&format!("alter table users owner to {app}"), &format!("grant create on schema rowcache to {app}"),
            &format!("grant insert, delete on rowcache.tracked_table to {app}")]).await;
        let found = doctor(&db.url).await;
        assert_eq!(found.all("roles.track").len(), 2, "{found}");
        assert_eq!(found.bad(), [""; 0], "{found}");
    }
}
