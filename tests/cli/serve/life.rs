//! How it starts and how it ends.

use reqwest::Method;
use rowcache::cli::temp_server::Stop;

use super::{Answer, Service, prepare, prepared};
use crate::{
    program::{psql, run},
    support::{database_on, eventually, server},
};

pg_test! {
    async fn it_may_be_started_before_its_database(test: Test) {
        let mut server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        prepare(&db).await;
        server.stop(Stop::Fast).await.expect("stops");
        let mut service = Service::launch(&db.url, &["--table", "users"]).await;
        assert_eq!(service.get("/healthz").await.status, 200);
        assert_eq!(service.get("/readyz").await.status, 503);
        let early = service.get("/v1/public.users/1").await;
        early.is_problem(503, "starting");
        assert_eq!(early.header("retry-after"), "1");
        assert_eq!(service.get("/status").await.row()["status"]["coherent"], false);
        assert!(service.get("/metrics").await.body.contains("rowcache_coherent 0.0"));
        server.start().await.expect("starts");
        service.running.line_with(&["serving public.users"]).await;
        assert_eq!(service.get("/v1/public.users/1").await.row()["id"], 1);
        service.running.interrupt().await;
    }

    async fn what_can_never_work_ends_it(test: Test) {
        let db = prepared(test.version).await;
        psql(&db, &["create table orders (id bigint primary key)"]).await;
        for (table, wrong, cure) in [
            ("orders", "public.orders is not tracked", "rowcache track public.orders"),
            ("nothing", "there is no table nothing", "schema.table"),
            ("users:nothing", "has no column nothing", "nothing"),
            ("users:name", "messages about public.users do not have its column name", "--columns email,name"),
        ] {
            let ended = run(&db.url, &["serve", "--listen", "127.0.0.1:0", "--table", table]).await;
            assert_eq!(ended.code, Some(1), "{ended:#?}");
            assert!(ended.err.contains(wrong) && ended.err.contains(cure), "{ended:#?}");
        }
        let service = Service::start(&db, &["--table", "users"]).await;
        let address = service.url.strip_prefix("http://").expect("an address").to_owned();
        let taken = run(&db.url, &["serve", "--table", "users", "--listen", &address]).await;
        taken.failed_with("cannot listen on", "Address already in use");
    }

    async fn what_is_under_way_is_answered_before_it_ends(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let lock = db.client().await;
        lock.batch_execute("begin; lock table users").await.expect("locks");
        let request = service.request(Method::GET, "/v1/public.users/1");
        let answer = tokio::spawn(async move { Answer::of(request.send().await.expect("it answers")).await });
        let pool = db.pool().await;
        eventually("the request waits for the lock", async || {
            let waits = "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock' and application_name not like '%(%')";
            sqlx::query_scalar(waits).fetch_one(&pool).await.expect("it can be asked")
        })
        .await;
        service.running.signal(nix::sys::signal::Signal::SIGTERM);
        // It takes no more.
        eventually("it does not accept", async || service.request(Method::GET, "/healthz").send().await.is_err()).await;
        lock.batch_execute("rollback").await.expect("rolls back");
        assert_eq!(answer.await.expect("no panic").row()["id"], 1);
        let ended = service.running.end().await;
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:#?}");
    }
}
