//! Faults that only show over time: a full queue, slow fences, too many notifications, strangers on the channel.

use tokio::task::JoinHandle;

use super::{doctor, prepare, prepared};
use crate::{
    program::{psql, run},
    support::{
        self, TestDb, Version, database_on,
        proxy::{Direction, Flow, Proxy},
        server,
    },
};

/// Runs a transaction over and over, at the server, until [`stop`](Self::stop).
struct Again(JoinHandle<()>);

impl Again {
    async fn start(db: &TestDb, statement: &str) -> Self {
        db.execute("create table if not exists stop ()").await;
        let client = db.client().await;
        let again =
            format!("do $$ begin loop {statement}; commit; exit when exists (select from stop); end loop; end $$");
        Self(tokio::spawn(async move { client.batch_execute(&again).await.expect("runs until it is told to stop") }))
    }

    async fn stop(self, db: &TestDb) {
        db.execute("insert into stop default values").await;
        self.0.await.expect("ends");
        db.execute("truncate stop").await;
    }
}

pg_test! {
    async fn too_many_transactions_that_notify(test: Test) {
        let db = prepared(test.version).await;
        doctor(&db.url).await.has("ok", "notify.rate", &["0.0 transactions a second"]);
        let writer = Again::start(&db, "update users set name = name || 'x' where id = 1").await;
        let found = doctor(&db.url).await;
        writer.stop(&db).await;
        found.has("warning", "notify.rate", &["public.users ", "wait for each other", "rowcache track public.users --key id --via log", "--ignore"]);
        found.has_not("notify.whole_table");
        let rate = found.all("notify.rate")[0]["figures"]["per_second"].as_f64().expect("a figure");
        assert!(rate > 300.0, "{found}");
    }

    async fn tables_that_are_told_by_way_of_the_log(test: Test) {
        let db = prepared(test.version).await;
        doctor(&db.url).await.has_not("log.rate");
        run(&db.url, &["track", "users", "--via", "log"]).await.ok();
        doctor(&db.url).await.has("ok", "log.rate", &["0.0 transactions a second", "public.users 0.0"]);
        let writer = Again::start(&db, "perform pg_sleep(0.2); update users set name = name || 'x' where id = 1").await;
        let found = doctor(&db.url).await;
        writer.stop(&db).await;
        found.has("note", "log.rate", &["by NOTIFY", "rowcache track public.users --key id"]);
        found.has("ok", "notify.rate", &["0.0 transactions a second"]);
        let cure = found.all("log.rate")[0]["cure"].as_str().expect("a cure");
        assert!(!cure.contains("--via"), "{found}");
        let writer = Again::start(&db, "update users set name = name || 'x' where id = 1").await;
        let found = doctor(&db.url).await;
        writer.stop(&db).await;
        found.has("ok", "log.rate", &["public.users"]);
    }

    async fn whole_tables_again_and_again(test: Test) {
        let db = prepared(test.version).await;
        run(&db.url, &["track", "users", "--max-keys", "2"]).await.ok();
        let writer = Again::start(&db, "update users set name = 'y'").await;
        let found = doctor(&db.url).await;
        writer.stop(&db).await;
        found.has("warning", "notify.whole_table", &["public.users", "rowcache track public.users --key id --max-keys"]);
        run(&db.url, &["track", "users"]).await.ok();
        let writer = Again::start(&db, "update users set name = 'y'").await;
        let found = doctor(&db.url).await;
        writer.stop(&db).await;
        found.has_not("notify.whole_table");
    }

    async fn strangers_on_the_channel(test: Test) {
        let db = prepared(test.version).await;
        doctor(&db.url).await.has_not("notify.unreadable");
        // It takes its time between two: more than this program can read is another fault.
        let stranger = Again::start(&db, "perform count(*) from generate_series(1, 20000); notify rowcache, 'hello'").await;
        let found = doctor(&db.url).await;
        stranger.stop(&db).await;
        found.has("warning", "notify.unreadable", &["channel rowcache", "cannot be read"]);
    }

    async fn a_commit_that_does_not_end(test: Test) {
        let server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        doctor(&db.url).await.has_not("fence.blocked");
        // It waits for a standby which does not exist, and holds the lock that orders notifications.
        db.make_commits_wait().await;
        let writer = db.client().await;
        let pid = writer.backend_pid().await;
        let stuck = tokio::spawn(async move { writer.batch_execute("update users set name = 'stuck' where id = 1").await });
        support::eventually("it waits for the standby", async || {
            psql(&db, &[&format!("select wait_event from pg_stat_activity where pid = {pid}")]).await == "SyncRep\n"
        })
        .await;
        let found = doctor(&db.url).await;
        found.has("error", "fence.blocked", &[&format!("pid {pid}, which waits for SyncRep"), "synchronous_standby_names"]);
        psql(&db, &["set synchronous_commit = local", "alter system set synchronous_standby_names = ''", "select pg_reload_conf()"]).await;
        stuck.await.expect("no panic").expect("is committed");
        doctor(&db.url).await.has_not("fence.blocked");
    }

    async fn fences_behind_slow_commits(test: Test) {
        // Each commit takes a tenth of a second, as on a slow disk; those that notify do it one after another.
        let settings = [("fsync", "on"), ("commit_delay", "100000"), ("commit_siblings", "0")];
        let server = server(test.version, &settings).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        prepare(&db).await;
        let mut writers = Vec::new();
        for id in 1..=4 {
            writers.push(Again::start(&db, &format!("update users set name = 'z' where id = {id}")).await);
        }
        let found = doctor(&db.url).await;
        db.execute("insert into stop default values").await;
        for writer in writers {
            writer.0.await.expect("ends");
        }
        found.has("warning", "fence.latency", &["waits behind commits"]);
        let figures = &found.all("fence.latency")[0]["figures"];
        assert!(figures["p50_ms"].as_f64() > Some(100.0) && figures["max_ms"].as_f64() >= figures["p50_ms"].as_f64(), "{found}");
        doctor(&db.url).await.has_not("fence.blocked");
    }

    async fn a_queue_that_is_held_back(test: Test) {
        // Before 17 the queue is 8 GB: this fills a little more than a hundredth of it. Later ones can have a small one.
        let (settings, messages): (&[_], _) = match test.version {
            Version::V15 => (&[], 12_000),
            Version::V18 => (&[("max_notify_queue_pages", "64")], 40),
        };
        let server = server(test.version, settings).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        doctor(&db.url).await.has("ok", "queue.usage", &["0.0 %"]);
        let idle = db.client().await;
        let pid = idle.backend_pid().await;
        idle.batch_execute("listen other").await.expect("listens");
        idle.batch_execute("begin; select 1").await.expect("begins");
        let send = |from: i32, to: i32| format!(
            "select count(pg_notify('noise', rpad(n::text, 7900))) from generate_series({from}, {to}) n"
        );
        psql(&db, &[&send(1, messages)]).await;
        let found = doctor(&db.url).await;
        let severity = if test.version == Version::V15 { "note" } else { "error" };
        found.has(severity, "queue.usage", &[&format!("pid {pid} "), "idle in a transaction", &format!("pg_terminate_backend({pid})")]);
        if test.version == Version::V18 {
            // Full: no fence can be sent either. Once the session is gone, asking for the usage is the repair.
            support::eventually("the queue is full", async || db.client().await.batch_execute(&send(1, 4)).await.is_err()).await;
            doctor(&db.url).await.has("error", "fence.failed", &["too many notifications in the NOTIFY queue"]);
        }
        idle.batch_execute("rollback").await.expect("ends");
        let found = doctor(&db.url).await;
        found.has("ok", "queue.usage", &["0.0 %"]);
        found.has("ok", "listen.arrives", &[]);
    }

    async fn a_listener_that_does_not_read(test: Test) {
        if test.version == Version::V15 {
            // Its queue cannot be made small enough.
            return;
        }
        let server = server(test.version, &[("max_notify_queue_pages", "64")]).await;
        let db = database_on(&server, test.version).await;
        run(&db.url, &["migrate", "up"]).await.ok();
        let proxy = Proxy::start(db.port).await;
        let through = TestDb { url: proxy.url(&db.url), ..db.clone() };
        let stuck = through.client().await;
        let pid = stuck.backend_pid().await;
        stuck.batch_execute("listen noise").await.expect("listens");
        doctor(&db.url).await.has("ok", "queue.usage", &[]);
        proxy.set(Direction::Down, Flow::Stall);
        // First the buffers of its socket fill, then the queue, which also grows while that session has not had its turn.
        let writer = db.client().await;
        support::eventually("the session cannot write, and the queue is two fifths full", async || {
            let look = "select pg_notification_queue_usage() > 0.4, wait_event is not distinct from 'ClientWrite'
                from pg_stat_activity where pid = $1";
            let row = writer.query_one(look, &[&pid]).await.expect("asks");
            let (is_filled, is_stuck): (bool, bool) = (row.get(0), row.get(1));
            if !is_filled {
                let send = "select count(pg_notify('noise', rpad(n || random()::text, 7900))) from generate_series(1, 5) n";
                writer.query_one(send, &[]).await.expect("sends");
            }
            is_filled && is_stuck
        })
        .await;
        let found = doctor(&db.url).await;
        let held_back = [&*format!("pid {pid} "), "does not read", &format!("pg_terminate_backend({pid})")];
        found.has("warning", "queue.usage", &held_back);
        proxy.set(Direction::Down, Flow::Pass);
        stuck.query_one("select 1", &[]).await.expect("reads on");
        doctor(&db.url).await.has("ok", "queue.usage", &[]);
    }
}
