//! Faults of the server, of the way to it, and of the role that asks.

use rowcache::cli::temp_server::Stop;

use super::{doctor, doctor_with, prepare, prepared};
use crate::{
    program::{Running, end, psql, rowcache, rowcache_on, run},
    support::{self, database_on, server, server_options},
};

#[tokio::test]
async fn help_says_how_it_ends() {
    let help = end(rowcache(&["doctor", "--help"])).await.ok();
    for part in ["0 nothing worse than a note, 1 warnings, 2 errors", "--seconds <N>", "--json"] {
        assert!(help.contains(part), "no {part:?} in {help}");
    }
}

#[tokio::test]
async fn a_server_that_is_not_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let found = doctor(&format!("postgres://app:hunter2@127.0.0.1:{port}/app")).await;
    found.has("error", "connection.failed", &[&format!("127.0.0.1 port {port}"), "refused", "--database-url"]);
    assert!(!found.to_string().contains("hunter2"), "{found}");
}

#[tokio::test]
async fn a_url_that_cannot_be_read() {
    let ended = run("not a url", &["doctor"]).await;
    assert_eq!((ended.code, ended.err.matches("error:").count()), (Some(2), 1), "{ended:?}");
}

pg_test! {
    async fn a_database_that_is_not_there(test: Test) {
        let db = support::database(test.version).await;
        let found = doctor(&db.url.replace(&db.name, "nowhere")).await;
        found.has("error", "connection.failed", &["nowhere", "does not exist"]);
        assert_eq!(found.findings.len(), 1, "{found}");
    }

    async fn a_standby(test: Test) {
        let mut server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        doctor(&db.url).await.has("ok", "server.primary", &[]);
        server.stop(Stop::Fast).await.expect("stops");
        std::fs::write(server.data_dir().join("standby.signal"), "").expect("writes");
        server.start().await.expect("starts as a standby");
        let found = doctor(&db.url).await;
        found.has("error", "server.standby", &["primary"]);
        found.has("ok", "tables.whole", &[]);
        assert_eq!(found.bad(), ["server.standby"], "{found}");
    }

    async fn settings(test: Test) {
        let server = server(test.version, &[("max_prepared_transactions", "0"), ("fsync", "on")]).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        let codes = ["settings.max_prepared_transactions", "settings.fsync", "settings.synchronous_commit", "settings.session_replication_role"];
        let found = doctor(&db.url).await;
        for code in codes {
            found.has_not(code);
        }
        // The server of all other tests has these two.
        let shared = doctor(&prepared(test.version).await.url).await;
        shared.has("note", codes[0], &["PREPARE TRANSACTION"]);
        shared.has("note", codes[1], &["crash"]);

        psql(&db, &["create role careless login", "alter role careless set synchronous_commit = off",
            "alter role careless set session_replication_role = replica"]).await;
        let found = doctor(&db.url).await;
        found.has("note", codes[2], &["role careless", "incarnation"]);
        found.has("note", codes[3], &["role careless", "ENABLE ALWAYS"]);
        psql(&db, &["alter role careless reset all", "alter system set session_replication_role = replica", "select pg_reload_conf()"]).await;
        support::eventually("the new setting is in force", async || psql(&db, &["show session_replication_role"]).await == "replica\n").await;
        doctor(&db.url).await.has("note", codes[3], &["the whole server"]);
    }

    async fn a_role_without_rights(test: Test) {
        let hba = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
        let server = server_options(test.version).data_file("pg_hba.conf", hba).start().await.unwrap();
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        psql(&db, &["create role nobody_much login", "create schema closed", "create table closed.t (id int primary key)"]).await;
        run(&db.url, &["track", "closed.t"]).await.ok();
        // Somebody whose session is not to be seen.
        let other = db.client().await;
        let url = db.url.replace("postgres@", "nobody_much@").replace("postgres:@", "nobody_much@");
        assert_ne!(url, db.url);
        let found = doctor(&url).await;
        assert_eq!(found.bad(), [""; 0], "{found}");
        let missing: Vec<_> = found.all("rights.missing").iter().map(|it| it["cure"].to_string()).collect();
        assert!(missing.iter().any(|cure| cure.contains("select on table rowcache.migrations")), "{found}");
        assert!(missing.iter().any(|cure| cure.contains("grant pg_read_all_stats to nobody_much")), "{found}");
        assert_eq!(missing.len(), 2, "{found}");
        found.has("ok", "tables.whole", &["2 of 2"]);
        drop(other);

        psql(&db, &["grant pg_read_all_stats to nobody_much", "grant select on rowcache.migrations to nobody_much"]).await;
        doctor(&url).await.has_not("rights.missing");
        psql(&db, &["revoke usage on schema rowcache from public"]).await;
        let found = doctor(&url).await;
        found.has("note", "rights.missing", &["may not use schema rowcache"]);
        assert_eq!(found.bad(), [""; 0], "{found}");
    }

    async fn a_role_with_one_connection(test: Test) {
        let db = prepared(test.version).await;
        let role = format!("{}_one", &db.name[..db.name.len().min(30)]);
        psql(&db, &[&format!("create role {role} login connection limit 1")]).await;
        let found = doctor(&db.url.replace("postgres@", &format!("{role}@"))).await;
        found.has("error", "connection.second", &["too many connections", "connection limit"]);
    }

    async fn a_catalogue_that_is_locked(test: Test) {
        let db = prepared(test.version).await;
        let migration = db.client().await;
        migration.batch_execute("begin; lock table rowcache.migrations").await.expect("locked");
        let found = doctor(&db.url).await;
        found.has("warning", "check.locked", &["which migrations have been run"]);
        found.has("ok", "tables.whole", &[]);
        migration.batch_execute("rollback").await.expect("unlocked");
        doctor(&db.url).await.has_not("check.locked");
    }

    async fn a_connection_that_is_lost_meanwhile(test: Test) {
        let db = prepared(test.version).await;
        let migration = db.client().await;
        migration.batch_execute("begin; lock table rowcache.migrations").await.expect("locked");
        let doctor = tokio::spawn({
            let url = db.url.clone();
            async move { doctor(&url).await }
        });
        let terminate = "select count(pg_terminate_backend(pid)) from pg_locks where not granted and relation = 'rowcache.migrations'::regclass";
        support::eventually("it waits", async || psql(&db, &[terminate]).await == "1\n").await;
        let found = doctor.await.expect("no panic");
        found.has("error", "connection.lost", &["which migrations have been run", "the rest was not looked at"]);
        assert_eq!(found.bad(), ["connection.lost"], "{found}");
    }

    async fn ctrl_c_ends_it(test: Test) {
        let db = prepared(test.version).await;
        let doctor = Running::start(rowcache_on(&db.url, &["doctor", "--seconds", "3600"]));
        let client = db.client().await;
        support::eventually("it listens", async || {
            let listens = "select from pg_stat_activity where datname = current_database() and query = 'listen rowcache'";
            !client.query(listens, &[]).await.expect("asks").is_empty()
        }).await;
        let ended = doctor.interrupt().await;
        assert_eq!((ended.code, ended.out.as_str(), ended.err.as_str()), (Some(130), "", ""), "{ended:#?}");
    }

    async fn transactions_and_listeners(test: Test) {
        let server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        // Everything is long.
        let look = async || doctor_with(&db.url, &["--long-transaction", "0"]).await;
        let found = look().await;
        assert_eq!(found.bad(), [""; 0], "{found}");
        found.has_not("listeners.others");
        found.has("ok", "listeners.ours", &["0 sessions"]);

        let idle = db.client().await;
        idle.batch_execute("begin; lock table users in share row exclusive mode").await.expect("begins");
        let waiting = db.client().await;
        let (idle_pid, waiting_pid) = (idle.backend_pid().await, waiting.backend_pid().await);
        let waits = tokio::spawn(async move { waiting.batch_execute("delete from users").await });
        support::eventually("it waits", async || {
            let waits = format!("select count(*) from pg_locks where pid = {waiting_pid} and not granted");
            psql(&db, &[&waits]).await == "1\n"
        }).await;
        db.execute("create table plain (id int); begin; insert into plain values (1); prepare transaction 'left''over'").await;
        let other = db.listen("something else").await;
        let node = db.listen("rowcache").await;
        let found = look().await;
        found.has("warning", "transaction.idle", &[&format!("pid {idle_pid} "), &format!("pg_terminate_backend({idle_pid})")]);
        found.has("warning", "transaction.long", &[&format!("pid {waiting_pid} ")]);
        found.has("warning", "transaction.prepared", &["'left'over'", "rollback prepared 'left''over'"]);
        found.has("note", "listeners.others", &["1 listen on other channels"]);
        found.has("ok", "listeners.ours", &["1 session"]);
        // By default they are too young to matter.
        let found = doctor(&db.url).await;
        assert_eq!(found.bad(), [""; 0], "{found}");
        found.has("note", "transaction.prepared", &[]);

        idle.batch_execute("rollback").await.expect("ends");
        waits.await.expect("no panic").expect("deletes");
        db.execute("rollback prepared 'left''over'").await;
        drop((other, node));
        support::eventually("the listeners are gone", async || look().await.all("listeners.others").is_empty()).await;
        let found = look().await;
        for code in ["transaction.idle", "transaction.long", "transaction.prepared"] {
            found.has_not(code);
        }
    }
}
