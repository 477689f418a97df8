//! Time limits that an administrator sets for a role or a database, and addresses that do not belong together.

use rowcache::{Config, Node, Status};

use crate::{
    Subject, allow_gaps,
    fixture::{self, hasty, name, users_db, users_server},
    support::{self, TestDb, Version, eventually},
};

async fn set(db: &TestDb, setting: &str) {
    db.execute(&format!("alter database {} set {setting}", db.name)).await;
}

pg_test! {
    async fn idle_sessions_are_ended(test: Test) {
        let db = users_db(test.version).await;
        set(&db, "idle_session_timeout = '300ms'").await;
        // Beats are further apart than that.
        let config = Config::from_url(&db.url).expect("a good URL");
        let subject = Subject::new(&db, config).await;
        let pids = async || crate::backends(&db, "(").await;
        let line = pids().await;
        for _ in 0..3 {
            subject.fill_pool().await;
            let pooled = "select count(*) from pg_stat_activity where datname = current_database() and query like '%rowcache.stamp%' \
                and pid <> pg_backend_pid()";
            eventually("the pool's idle sessions are ended", async || {
                db.client().await.query_one(pooled, &[]).await.expect("counts").get::<_, i64>(0) == 0
            })
            .await;
            subject.users.clear().await.ok(); // with a connection that may be dead
            assert!(name(&subject.users, 7).await.is_some(), "no reader is told");
        }
        assert_eq!(pids().await, line, "the line was not touched");
        assert!(test.logs.containing("lost").is_empty(), "{}", test.logs);
        subject.is_well().await;
    }

    async fn transactions_are_limited(test: Test) {
        allow_gaps(&test.logs);
        let db = users_db(test.version).await;
        set(&db, "idle_in_transaction_session_timeout = '1ms'").await;
        if test.version == Version::V18 {
            set(&db, "transaction_timeout = '1s'").await;
        }
        let subject = Subject::new(&db, Config::from_url(&db.url).expect("a good URL")).await;
        subject.is_well().await;
    }

    async fn statements_are_limited(test: Test) {
        let db = users_db(test.version).await;
        set(&db, "statement_timeout = '1s'").await;
        let subject = Subject::new(&db, Config::from_url(&db.url).expect("a good URL")).await;
        let client = db.client().await;
        client.batch_execute("set statement_timeout = 0; begin; lock table public.users in access exclusive mode").await.expect("locks");
        let error = subject.users.get(&7).await.expect_err("it waits for too long");
        let cause = std::error::Error::source(&error).expect("a cause").to_string();
        assert!(error.is_timeout(), "{error:?}");
        assert!(error.to_string().contains("public.users 7") && cause.contains("statement timeout"), "{error:?}");
        assert!(matches!(subject.node.status(), Status::Coherent { .. }), "the node is well: {:?}", subject.node.status());
        assert!(subject.held(1), "what is held is current");
        client.batch_execute("rollback").await.expect("unlocks");
        assert_eq!(name(&subject.users, 7).await.as_deref(), Some("user 7"));
        subject.is_well().await;
    }

    // A database that was made from another one shares its canary, and its server.
    async fn pool_and_listener_in_two_databases_of_one_server(test: Test) {
        let (server, db) = users_server(test.version, &[]).await;
        db.execute("select rowcache.incarnation()").await;
        let admin = support::connect(&server.admin_url()).await;
        eventually("nobody is connected to the template", async || {
            let create = format!("create database twin template {}", db.name);
            admin.batch_execute(&create).await.is_ok()
        })
        .await;
        let canary = async |url: &str| {
            let row = support::connect(url).await.query_one("select canary::text, started from rowcache.stamp", &[]).await;
            let row = row.expect("reads");
            (row.get::<_, Option<String>>(0), row.get::<_, i64>(1))
        };
        assert_eq!(canary(&db.url).await, canary(&server.url("twin")).await, "the stamps cannot tell them apart");
        for (pool, listener) in [(&db.url, &server.url("twin")), (&server.url("twin"), &db.url)] {
            let mut config = hasty(pool);
            config.listener = hasty(listener).listener;
            let error = Node::start(config).await.expect_err("no notification gets from one to the other");
            assert!(error.is_pooler() || error.is_config(), "{error:?}");
            assert!(error.to_string().contains("database"), "{error:?}");
        }
    }

    async fn pool_and_listener_on_two_servers(test: Test) {
        let (one, other) = (users_db(test.version).await, support::server(test.version, &[]).await);
        let other = support::database_on(&other, test.version).await;
        fixture::migrate(&other).await;
        // A server without an identity, and then one that has been given one by a node of its own.
        for has_identity in [false, true] {
            if has_identity {
                Node::connect(&one.url).await.expect("starts").shutdown().await;
            }
            let mut config = hasty(&one.url);
            config.listener = hasty(&other.url).listener;
            let error = Node::start(config).await.expect_err("they do not belong together");
            assert!(error.is_config() && error.to_string().contains("different servers"), "{error:?}");
        }
    }
}
