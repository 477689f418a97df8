//! Commands that do something and end: help, `migrate`, `track`, `untrack`, `tracked`, and their errors.

use serde_json::Value;

use crate::{
    program::{Ended, Running, end, psql, rowcache, rowcache_on, run},
    support::{database, server, server_options},
};

const USERS: &str = "create table users (id bigint primary key, name text, seen int)";

#[tokio::test]
async fn help_teaches() {
    let help = end(rowcache(&["--help"])).await.ok();
    let at = |part: &str| help.find(part).unwrap_or_else(|| panic!("no {part:?} in {help}"));
    assert!(at("rowcache migrate up") < at("rowcache track public.users"));
    assert!(at("rowcache track public.users") < at("rowcache watch"));
    assert!(at("rowcache demo") > 0 && at("DATABASE_URL") > 0);
    for command in ["migrate", "track", "untrack", "tracked", "watch", "nodes", "doctor", "demo"] {
        let help = end(rowcache(&[command, "--help"])).await.ok();
        assert!(help.contains("Example") && help.contains(&format!("  rowcache {command}")), "{help}");
    }
}

#[tokio::test]
async fn help_does_not_show_the_password() {
    let mut command = rowcache(&["watch", "--help"]);
    command.env("DATABASE_URL", "postgres://app:hunter2@localhost/app");
    assert!(!end(command).await.ok().contains("hunter2"));
}

#[tokio::test]
async fn wrong_usage_ends_with_2() {
    for (args, said) in [
        (&["tracked"][..], "DATABASE_URL"),
        (&["track"], "<TABLE>"),
        (&["no-such-command"], "no-such-command"),
        (&["migrate", "down", "--steps", "0"], "--steps"),
        (&["demo", "--nodes", "0"], "--nodes"),
        (&["nodes", "--deadline", "0"], "--deadline"),
    ] {
        let Ended { code, out, err } = end(rowcache(args)).await;
        assert_eq!((code, out.as_str()), (Some(2), ""), "{args:?}: {err}");
        assert!(err.contains(said), "{args:?}: {err}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let url = format!("postgres://app:hunter2@127.0.0.1:{port}/app");
    for args in [&["tracked"][..], &["watch"], &["nodes"], &["demo", "--plain"]] {
        let ended = run(&url, args).await;
        ended.failed_with(&format!("app@127.0.0.1:{port}/app"), "--database-url");
        assert_eq!(ended.err.matches("refused").count(), 1, "{ended:?}");
        assert!(!ended.err.contains("hunter2"), "{ended:?}");
    }
}

#[tokio::test]
async fn a_url_that_cannot_be_read() {
    let ended = run("not a url", &["tracked"]).await;
    assert_eq!((ended.code, ended.err.matches("error:").count()), (Some(1), 1), "{ended:?}");
}

#[tokio::test]
async fn migrations_are_printed_without_a_database() {
    let up = end(rowcache(&["migrate", "print"])).await.ok();
    assert!(up.starts_with("-- 0001_incarnation.up.sql\n"), "{up}");
    let two = end(rowcache(&["migrate", "print", "--version", "2"])).await.ok();
    assert!(two.starts_with("-- 0002_tracking.up.sql\n") && !two.contains("0001_"), "{two}");
    let down = end(rowcache(&["migrate", "print", "--down"])).await.ok();
    assert!(down.starts_with("-- 0005_") && down.contains("\n-- 0001_incarnation.down.sql\n"), "{down}");
    end(rowcache(&["migrate", "print", "--version", "99"])).await.failed_with("no such migration", "migrate print");
}

pg_test! {
    async fn errors_of_the_database(test: Test) {
        let db = database(test.version).await;
        let nowhere = db.url.replace(&db.name, "nowhere");
        run(&nowhere, &["tracked"]).await.failed_with("database \"nowhere\" does not exist", "create the database");
        for args in [&["tracked"][..], &["watch"]] {
            run(&db.url, args).await.failed_with("has no schema `rowcache`", "run: rowcache migrate up");
        }
        for args in [&["track", "users"], &["untrack", "users"], &["watch", "users"]] {
            run(&db.url, args).await.failed_with("schema \"rowcache\" does not exist", "run: rowcache migrate up");
        }

        run(&db.url, &["migrate", "up"]).await.ok();
        run(&db.url, &["track", "users"]).await.failed_with("no table users", "schema.table");
        run(&db.url, &["watch", "users"]).await.failed_with("no table users", "schema.table");
        psql(&db, &[USERS, "create table keyless (a int)"]).await;
        run(&db.url, &["watch", "users"]).await.failed_with("users is not tracked", "rowcache track public.users");
        run(&db.url, &["track", "keyless"]).await.failed_with("has no primary key", "name the columns of a key");
        run(&db.url, &["track", "users", "--key", "nope"]).await.failed_with("no column nope", "columns of the table");
    }

    async fn a_wrong_password(test: Test) {
        let hba = "local all all trust\nhost all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        let server = server_options(test.version).data_file("pg_hba.conf", hba).start().await.unwrap();
        let admin = crate::support::connect(&server.admin_url()).await;
        admin.batch_execute("create role app login password 'right'").await.unwrap();
        let url = |password: &str| format!("postgres://app:{password}@127.0.0.1:{}/postgres", server.port());
        let ended = run(&url("wrong"), &["migrate", "status"]).await;
        ended.failed_with("password authentication failed", "check the user and the password");
        assert!(!ended.err.contains("wrong"), "{ended:?}");
        run(&url("right"), &["migrate", "status"]).await.ok();
        run(&url("right"), &["migrate", "up"]).await.failed_with("permission denied", "");
    }

    async fn migrate(test: Test) {
        let db = database(test.version).await;
        let status = run(&db.url, &["migrate", "status"]).await.ok();
        assert_eq!(status.lines().filter(|line| line.ends_with("  no")).count(), 5, "{status}");
        let up = run(&db.url, &["migrate", "up"]).await.ok();
        assert!(up.starts_with("applied 0001_incarnation\napplied 0002_tracking\n"), "{up}");
        assert!(run(&db.url, &["migrate", "up"]).await.ok().contains("nothing to do"));
        assert!(!run(&db.url, &["migrate", "status"]).await.ok().contains("  no\n"));

        let down = run(&db.url, &["migrate", "down"]).await.ok();
        assert!(down.starts_with("took back 0005_") && down.lines().count() == 1, "{down}");
        let down = run(&db.url, &["migrate", "down", "--steps", "99"]).await.ok();
        assert_eq!(down.lines().count(), 4, "{down}");
        assert!(run(&db.url, &["migrate", "down"]).await.ok().contains("nothing to do"));
        assert_eq!(psql(&db, &["select to_regnamespace('rowcache') is null"]).await, "t\n");
    }

    async fn what_print_prints_can_be_run_by_psql(test: Test) {
        let db = database(test.version).await;
        let sql = end(rowcache(&["migrate", "print"])).await.ok();
        psql(&db, &["set client_min_messages = warning", &sql, USERS]).await;
        run(&db.url, &["track", "users"]).await.ok();
    }

    async fn track_and_untrack(test: Test) {
        let db = database(test.version).await;
        psql(&db, &[USERS, "create table members (org int, name text, note text, unique (org, name))"]).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        assert!(run(&db.url, &["tracked"]).await.ok().contains("rowcache track TABLE"));
        assert_eq!(run(&db.url, &["tracked", "--json"]).await.ok().trim(), "[]");

        let tracking = run(&db.url, &["track", "users", "--ignore", "seen", "--max-keys", "7"]).await.ok();
        assert_eq!(tracking, "tracking public.users by (id), statement triggers\n");
        let tracking = run(&db.url, &["track", "members", "--key", "org,name", "--columns", "note", "--level", "row"]).await;
        assert_eq!(tracking.ok(), "tracking public.members by (org, name), row triggers\n");

        let tables: Value = serde_json::from_str(&run(&db.url, &["tracked", "--json"]).await.ok()).unwrap();
        assert_eq!(tables[0]["relation"], "public.members");
        assert_eq!(tables[0]["key"], serde_json::json!(["org", "name"]));
        assert_eq!(tables[0]["columns"], serde_json::json!(["note"]));
        assert_eq!((&tables[0]["level"], &tables[1]["level"]), (&"row".into(), &"statement".into()));
        assert_eq!((&tables[1]["ignored"][0], &tables[1]["max_keys"]), (&"seen".into(), &7.into()));
        assert_eq!(tables[1]["problems"], serde_json::json!([]));

        psql(&db, &["alter table users disable trigger zz_rowcache_update"]).await;
        let listed = run(&db.url, &["tracked"]).await.ok();
        assert!(listed.contains("see below") && listed.contains("\npublic.users: "), "{listed}");
        assert!(listed.contains("rowcache.track"), "the cure is missing: {listed}");

        assert_eq!(run(&db.url, &["untrack", "users", "public.members"]).await.ok(),
            "users is no longer tracked\npublic.members is no longer tracked\n");
        assert_eq!(run(&db.url, &["untrack", "users"]).await.ok(), "users was not tracked\n");
    }

    async fn hashed_keys(test: Test) {
        let db = database(test.version).await;
        psql(&db, &["create table sessions (token text primary key, v int)"]).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        let refused = run(&db.url, &["track", "sessions", "--hash-keys", "--columns", "v"]).await;
        assert!(refused.code == Some(2) && refused.err.contains("cannot be used with"), "{refused:?}");
        let tracking = run(&db.url, &["track", "sessions", "--hash-keys"]).await.ok();
        assert_eq!(tracking, "tracking public.sessions by (token), statement triggers, keys sent as hashes\n");
        assert!(run(&db.url, &["tracked"]).await.ok().contains("token (hashed)"));
        let tables: Value = serde_json::from_str(&run(&db.url, &["tracked", "--json"]).await.ok()).unwrap();
        assert_eq!((&tables[0]["hash_keys"], &tables[0]["problems"]), (&true.into(), &serde_json::json!([])));

        let mut watch = Running::start(rowcache_on(&db.url, &["watch"]));
        watch.line_with(&["watching public.sessions"]).await;
        psql(&db, &["insert into sessions values ('hunter2', 1)"]).await;
        let line = watch.line_with(&["public.sessions", "  #"]).await;
        let hash = line.split('#').nth(1).and_then(|rest| rest.split(' ').next()).expect(&line);
        assert!(hash.len() == 8 && hash.bytes().all(|digit| digit.is_ascii_hexdigit()), "{line}");
        let ended = watch.interrupt().await;
        assert!(ended.code == Some(0) && !ended.out.contains("hunter2"), "{ended:?}");

        let mut watch = Running::start(rowcache_on(&db.url, &["watch", "--json"]));
        watch.line_with(&["watching"]).await;
        psql(&db, &["delete from sessions"]).await;
        let change: Value = serde_json::from_str(&watch.line_with(&["change"]).await).unwrap();
        assert!(change["keys"].is_null() && change["all"] == false, "{change}");
        assert!(change["hashes"][0].as_str().is_some_and(|it| it.len() == 32 && it.starts_with(hash)), "{change}");
        assert_eq!(watch.interrupt().await.code, Some(0));

        let tracking = run(&db.url, &["track", "sessions"]).await.ok();
        assert_eq!(tracking, "tracking public.sessions by (token), statement triggers\n");
    }

    async fn a_database_that_is_shutting_down_is_an_error(test: Test) {
        let mut server = server(test.version, &[]).await;
        let url = server.admin_url();
        server.stop(rowcache::cli::temp_server::Stop::Fast).await.unwrap();
        run(&url, &["migrate", "up"]).await.failed_with("refused", "--database-url");
    }
}
