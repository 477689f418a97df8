//! `rowcache watch`, followed line by line while `psql` writes.

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    program::{Running, psql, rowcache_on, run},
    support::{TestDb, Version, database, database_on, server},
};

/// A database with two tracked tables.
async fn prepare(db: &TestDb) {
    psql(
        db,
        &[
            "create table users (id bigint primary key, name text)",
            "create table orders (id bigint primary key)",
            "insert into users select n, 'x' from generate_series(1, 200) n",
        ],
    )
    .await;
    run(&db.url, &["migrate", "up"]).await.ok();
    run(&db.url, &["track", "users", "orders"]).await.ok();
}

async fn prepared(version: Version) -> TestDb {
    let db = database(version).await;
    prepare(&db).await;
    db
}

/// Ends every other connection of this database; watch has to notice.
const TERMINATE: &str = "select count(pg_terminate_backend(pid)) > 1 from pg_stat_activity \
     where datname = current_database() and pid <> pg_backend_pid()";

pg_test! {
    async fn it_shows_what_psql_does(test: Test) {
        let db = prepared(test.version).await;
        let mut watch = Running::start(rowcache_on(&db.url, &["watch"]));
        watch.line_with(&["watching public.orders, public.users"]).await;
        psql(&db, &["update users set name = 'Ada' where id = 42"]).await;
        let line = watch.line_with(&["public.users", "  42  "]).await;
        // 12:34:56.789; the transaction; no commit time, as this server keeps none.
        assert_eq!((line.find(':'), line.find('.'), line.find(' ')), (Some(2), Some(8), Some(12)), "{line}");
        assert!(line.contains("xid ") && line.ends_with("  -"), "{line}");
        psql(&db, &["update users set name = 'all' where id <= 150", "truncate users", "insert into orders values (7)"]).await;
        watch.line_with(&["public.users", "1, 2, 3", "… (150 keys)"]).await;
        watch.line_with(&["public.users", "  all  "]).await;
        watch.line_with(&["public.orders", "  7  "]).await;
        let ended = watch.interrupt().await;
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:#?}");
        assert!(!ended.out.contains('\u{1b}'), "colours, and no terminal: {ended:#?}");
    }

    async fn it_knows_how_long_after_the_commit(test: Test) {
        let server = server(test.version, &[("track_commit_timestamp", "on")]).await;
        let db = database_on(&server, test.version).await;
        prepare(&db).await;
        let mut watch = Running::start(rowcache_on(&db.url, &["watch"]));
        watch.line_with(&["watching"]).await;
        psql(&db, &["update users set name = 'Ada' where id = 42"]).await;
        let line = watch.line_with(&["public.users"]).await;
        let ms: f64 = line.strip_suffix(" ms").and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect(&line);
        assert!((0.0..10_000.0).contains(&ms), "{line}");
        assert_eq!(watch.interrupt().await.code, Some(0));
    }

    async fn it_shows_only_the_tables_that_were_named(test: Test) {
        let db = prepared(test.version).await;
        let mut watch = Running::start(rowcache_on(&db.url, &["watch", "orders"]));
        watch.line_with(&["watching public.orders"]).await;
        psql(&db, &["update users set name = 'x' where id = 1", "insert into orders values (8)"]).await;
        watch.line_with(&["public.orders", "8"]).await;
        watch.signal(Signal::SIGTERM);
        let ended = watch.end().await;
        assert_eq!(ended.code, Some(0), "{ended:#?}");
        assert!(!ended.out.contains("users"), "{ended:#?}");
    }

    async fn it_says_that_the_connection_is_lost_and_back(test: Test) {
        let db = prepared(test.version).await;
        let mut watch = Running::start(rowcache_on(&db.url, &["watch"]));
        watch.line_with(&["watching"]).await;
        assert_eq!(psql(&db, &[TERMINATE]).await, "t\n");
        watch.line_with(&["gap", "connection was lost"]).await;
        watch.line_with(&["back"]).await;
        psql(&db, &["update users set name = 'y' where id = 2"]).await;
        watch.line_with(&["public.users", "  2  "]).await;
        let ended = watch.interrupt().await;
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "said twice? {ended:#?}");
        assert_eq!(ended.out.matches("lost").count(), 1, "{ended:#?}");
    }

    async fn json_is_an_object_per_line(test: Test) {
        let db = prepared(test.version).await;
        let mut watch = Running::start(rowcache_on(&db.url, &["watch", "--json"]));
        let mut next = async || serde_json::from_str::<Value>(&watch.line().await.expect("a line")).expect("JSON");
        let watching = next().await;
        assert_eq!((&watching["event"], &watching["tables"][1]), (&"watching".into(), &"public.users".into()));
        psql(&db, &["update users set name = 'z' where id in (3, 4)", "truncate users"]).await;
        let change = next().await;
        assert_eq!((&change["event"], &change["table"]), (&"change".into(), &"public.users".into()), "{change}");
        assert_eq!((&change["keys"], &change["all"]), (&serde_json::json!([3, 4]), &false.into()), "{change}");
        assert!(change["xid"].is_u64() && change["latency_ms"].is_null(), "{change}");
        assert!(change["at"].as_str().is_some_and(|at| at.ends_with('Z')), "{change}");
        let all = next().await;
        assert_eq!((&all["all"], &all["keys"]), (&true.into(), &Value::Null), "{all}");
        psql(&db, &[TERMINATE]).await;
        let lost = next().await;
        assert!(lost["event"] == "lost" && lost["why"].is_string(), "{lost}");
        assert_eq!(next().await["event"], "back");
        assert_eq!(watch.interrupt().await.code, Some(0));
    }

    async fn a_reader_that_goes_away_ends_it(test: Test) {
        let db = prepared(test.version).await;
        let mut command = rowcache_on(&db.url, &["watch"]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        // It writes its first line into nothing.
        let status = tokio::time::timeout(crate::support::PATIENCE, child.wait()).await.expect("it ends").unwrap();
        assert_eq!(status.code(), Some(0));
    }
}
