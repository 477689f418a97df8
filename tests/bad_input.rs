//! Wrong URLs, wrong tables, wrong keys, wrong messages: what is said, and that nothing worse happens.

use rowcache::{Config, Error, Event, Node, Table};
use sqlx::FromRow;

use crate::{
    fixture::{self, User, migrated, name, node, users, users_db},
    support,
};

/// The error of something that must fail, with all its causes.
fn refused<T>(result: Result<T, Error>) -> (Error, String) {
    let error = result.err().expect("is refused");
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    (error, text)
}

pg_test! {
    async fn a_url_that_cannot_be_used(test: Test) {
        let db = users_db(test.version).await;
        for (url, says) in [
            ("nonsense".to_owned(), ""),
            ("mysql://localhost/x".to_owned(), ""),
            (format!("{}&target_session_attrs=read-write", with_query(&db.url)), "target_session_attrs"),
            (format!("{}&statement-cache-capacity=7", with_query(&db.url)), "statement-cache-capacity"),
        ] {
            let (error, text) = refused(Node::connect(&url).await);
            assert!(error.is_config(), "{url}: {text}");
            assert!(text.contains(says), "{url}: {text}");
        }
    }

    async fn a_server_a_user_or_a_database_that_is_not_there(test: Test) {
        let db = users_db(test.version).await;
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("binds").local_addr().expect("bound").port();
        let nobody = db.url.replace(&format!(":{}/", db.port), &format!(":{free}/"));
        let (error, text) = refused(Node::connect(&nobody).await);
        assert!(error.is_unavailable() && text.contains(&free.to_string()), "{text}");
        let (error, text) = refused(Node::connect(&db.url.replace(&db.name, "no_such_database")).await);
        assert!(error.is_unavailable() && text.contains("no_such_database"), "{text}");
    }

    async fn a_wrong_password(test: Test) {
        let server = support::server(test.version, &[]).await;
        let db = support::database_on(&server, test.version).await;
        fixture::migrate(&db).await;
        db.execute("create role careful login password 'right'").await;
        let hba = server.data_dir().join("pg_hba.conf");
        std::fs::write(&hba, "host all careful 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nlocal all all trust\n")
            .expect("writes");
        db.execute("select pg_reload_conf()").await;
        let url = |password: &str| format!("postgres://careful:{password}@127.0.0.1:{}/{}", db.port, db.name);
        support::eventually("the new rules are read", async || {
            tokio_postgres::connect(&url("wrong"), tokio_postgres::NoTls).await.is_err()
        })
        .await;
        let (error, text) = refused(Node::connect(&url("wrong")).await);
        assert!(error.is_unavailable() && text.contains("careful"), "{text}");
        assert!(!text.contains("wrong"), "a password is a secret: {text}");
        Node::connect(&url("right")).await.expect("the right one works").shutdown().await;
    }

    async fn a_database_without_our_schema(test: Test) {
        let db = support::database(test.version).await;
        let (error, text) = refused(Node::connect(&db.url).await);
        assert!(error.is_schema_too_old() && text.contains("rowcache migrate up"), "{text}");
    }

    async fn a_schema_from_the_future(test: Test) {
        let db = migrated(test.version).await;
        db.execute("create or replace function rowcache.schema_version() returns int language sql as 'select 9000'").await;
        let (error, text) = refused(Node::connect(&db.url).await);
        assert!(error.is_schema_too_new() && text.contains("9000"), "{text}");
    }

    async fn a_table_that_cannot_be_cached(test: Test) {
        let db = migrated(test.version).await;
        db.execute(
            "create table untracked (id bigint primary key); create table keyless (id bigint);
             create table odd (id numeric primary key); select rowcache.track('odd');
             create view seen as select 1 as id",
        )
        .await;
        let node = node(&db).await;
        let open = async |name: &str| refused(node.table::<i64, User>(name).await);
        let (error, text) = open("public.nothing").await;
        assert!(error.is_table() && text.contains("public.nothing"), "{text}");
        let (error, text) = open("not a name").await;
        assert!(error.is_table(), "{text}");
        let (error, text) = open("untracked").await;
        assert!(error.is_not_tracked() && text.contains("rowcache track public.untracked"), "{text}");
        let (error, text) = open("keyless").await;
        assert!(error.is_table() && text.contains("no primary key"), "{text}");
        let (error, text) = open("seen").await;
        assert!(error.is_table() && text.contains("not a table"), "{text}");
        let (error, text) = open("odd").await;
        assert!(error.is_table() && text.contains("numeric"), "{text}");
    }

    async fn a_key_of_another_type_than_the_column(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        for (error, text) in [
            refused(node.table::<String, User>("users").await),
            refused(node.table::<i32, User>("users").await),
            refused(node.table::<(i64, i64), User>("users").await),
        ] {
            assert!(error.is_table(), "{text}");
            assert!(text.contains("id bigint") && text.contains("Table<i64, _>"), "{text}");
        }
    }

    async fn a_value_type_that_does_not_fit_the_row(test: Test) {
        #[derive(Debug, FromRow)]
        #[allow(dead_code)] // only decoded
        struct Wrong {
            name: i32,
        }
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users: Table<i64, Wrong> = node.table("users").await.expect("opens");
        let (error, text) = refused(users.get(&1).await);
        assert!(error.is_decode() && text.contains("public.users 1") && text.contains("name"), "{text}");
        assert!(!users.peek(&1).is_known());
    }

    async fn a_value_that_panics_when_it_is_dropped_harms_nobody_else(test: Test) {
        #[derive(Debug, FromRow)]
        struct Bomb {
            id: i64,
        }
        impl Drop for Bomb {
            fn drop(&mut self) {
                assert!(self.id != 3, "dropped!");
            }
        }
        test.logs.allow("panicked while a change was applied");
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users: Table<i64, Bomb> = node.table("users").await.expect("opens");
        assert!(users.get(&3).await.expect("loads").is_some());
        assert!(users.get(&4).await.expect("loads").is_some());
        db.execute("update public.users set name = 'x' where id in (3, 4)").await;
        node.barrier().await.expect("coherent: the applier has survived");
        assert!(!users.peek(&3).is_known() && !users.peek(&4).is_known());
        assert!(users.get(&4).await.expect("loads").is_some());
        node.shutdown().await;
    }

    async fn a_key_that_postgres_cannot_take_harms_nobody_else(test: Test) {
        let server = support::shared_server(test.version).await;
        let mut db = support::database_on(server, test.version).await;
        db.name = format!("{}_latin", &db.name[..db.name.len().min(50)]);
        db.url = server.url(&db.name);
        let create = format!("create database {} template template0 encoding latin1 locale 'C'", db.name);
        support::connect(&server.admin_url()).await.batch_execute(&create).await.expect("created");
        fixture::migrate(&db).await;
        db.execute("create table texts (k text primary key); insert into texts values ('a'); select rowcache.track('texts')")
            .await;
        let node = node(&db).await;
        let texts: Table<String, (String,)> = node.table("texts").await.expect("opens");
        let (zero, foreign, good) = (String::from("\0"), String::from("\u{4e2d}"), String::from("a"));
        assert!(texts.get(&zero).await.expect("no row can have this key").is_none());
        // In this order, so that the good key's answer has come when the error is returned.
        let error = texts.get_many(&[good.clone(), foreign]).await.expect_err("the character is not to be had in this database");
        assert!(error.is_refused(), "{error:?}");
        assert!(texts.peek(&good).is_known(), "the key that was loaded with it is here");
        assert_eq!(texts.stats().queries, 1);
    }

    async fn a_message_that_is_garbage_or_forged_only_costs_loads(test: Test) {
        let db = users_db(test.version).await;
        test.logs.allow("could not be read");
        let node = node(&db).await;
        let mut events = node.subscribe();
        let users = users(&node).await;
        for (payload, forgotten, unreadable) in [
            ("", true, true),
            ("\\x00 \u{1F980} garbage", true, true),
            (r#"{"v":1,"t":"public.users","x":1,"k":["not a bigint"]}"#, true, false),
            (r#"{"v":1,"t":"public.users","x":1,"k":[[1,2]]}"#, true, false),
            (r#"{"v":99,"t":"public.users"}"#, true, true),
            (r#"{"v":99,"t":"public.other"}"#, false, true),
            (r#"{"v":1,"t":"public.users","x":1,"k":[1]}"#, true, false),
            (r#"{"v":1,"t":"public.users","x":1,"k":[2]}"#, false, false),
            (r#"{"v":1,"t":"public.users","x":1,"k":[]}"#, false, false),
            (r#"{"v":1,"x":1,"all":true}"#, true, false),
            (r#"{"v":1,"f":"00000000-0000-0000-0000-000000000000","s":"9:9:","l":9}"#, false, false),
        ] {
            name(&users, 1).await;
            let client = db.client().await;
            client.execute("select pg_notify('rowcache', $1)", &[&payload]).await.expect("sent");
            node.barrier().await.expect("coherent");
            assert_eq!(!users.peek(&1).is_known(), forgotten, "{payload}");
            assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"), "{payload}");
            if unreadable {
                fixture::event(&mut events, payload, |event| matches!(event, Event::Unreadable { .. })).await;
            }
        }
    }

    async fn settings_that_contradict_each_other(test: Test) {
        let db = users_db(test.version).await;
        let config = || Config::from_url(&db.url).expect("a good URL");
        let mut slow_beat = config();
        slow_beat.beat = slow_beat.lease;
        let mut no_loads = config();
        no_loads.loads_max = 0;
        let mut no_beat = config();
        no_beat.beat = std::time::Duration::ZERO;
        // Whoever means "no limit" must not find out by a panic.
        let (mut no_limit, mut no_lease, mut many) = (config(), config(), config());
        no_limit.load_timeout = std::time::Duration::MAX;
        no_lease.lease = std::time::Duration::MAX;
        many.loads_max = usize::MAX;
        assert_eq!(no_lease.staleness_bound(), std::time::Duration::MAX);
        let cases = [(slow_beat, "beat"), (no_loads, "loads_max"), (no_beat, "beat")];
        for (config, says) in cases.into_iter().chain([(no_limit, "a year"), (no_lease, "a year"), (many, "a million")]) {
            let (error, text) = refused(Node::start(config).await);
            assert!(error.is_config() && text.contains(says), "{text}");
        }
    }

    async fn the_pool_on_another_database_than_the_listener(test: Test) {
        let (one, other) = (users_db(test.version).await, users_db(test.version).await);
        let mut config = Config::from_url(&one.url).expect("a good URL");
        config.listener = other.url.parse().expect("a good URL");
        let (error, text) = refused(Node::start(config).await);
        assert!(error.is_config() && text.contains("different servers or databases"), "{text}");
    }
}

fn with_query(url: &str) -> String {
    if url.contains('?') { url.to_owned() } else { format!("{url}?sslmode=disable") }
}
