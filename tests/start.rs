//! Starting without a database, and loading rows before anybody asks for them.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::PathBuf,
    time::Duration,
};

use rowcache::{Config, Event, Lookup, Node, Status, Table, TableOptions, WarmUp, cli::temp_server::Stop};

use crate::{
    fixture::{
        KILL_LISTENERS, SESSIONS, User, Users, event, hasty, migrated, name, node, users, users_db, users_server,
    },
    support::{TestDb, eventually},
};

type Paint = (rowcache::EnumLabel, rust_decimal::Decimal, chrono::NaiveDate);

const AGAIN: &str = "cannot open the LISTEN connection";
const NOT_YET: &str = "cannot be opened yet";
const NO_KEYS: &str = "cannot tell which rows";

fn launch(db: &TestDb) -> Node {
    let mut config = hasty(&db.url);
    config.load_timeout = Duration::from_secs(1);
    Node::launch(config).expect("needs no database")
}

fn held(users: &Users) -> Vec<i64> {
    (1..=10).filter(|id| users.peek(id).is_known()).collect()
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("there is space"))
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("users.keys")
    }
}

pg_test! {
    async fn a_service_starts_before_its_database(test: Test) {
        for what in [AGAIN, NOT_YET] {
            test.logs.allow(what);
        }
        let (mut server, db) = users_server(test.version, &[]).await;
        db.execute(SESSIONS).await;
        db.execute("insert into public.sessions values ('tok', 1, 'a');
                    select rowcache.track('public.users', columns => '{name}')").await;
        server.stop(Stop::Fast).await.expect("stops");

        let node = launch(&db);
        let users = users(&node).await;
        let sessions: Table<String, User> = node.table("public.sessions").await.expect("returns at once");
        let options = TableOptions::default;
        let named: Table<String, User> = node.table_by("public.users", ["name"], options()).await.expect("at once");
        let lists: Table<String, Vec<User>> = node.list_by("public.users", ["name"], options()).await.expect("at once");
        let view = node.view("names").on("public.users", ["id"]);
        let view: Table<i64, String> = view
            .open(|ids, db| {
                Box::pin(async move {
                    let names: Vec<(i64, String)> =
                        sqlx::query_as("select id, name from users where id = any($1)").bind(ids).fetch_all(db).await?;
                    Ok(names.into_iter().collect::<HashMap<_, _>>())
                })
            })
            .await
            .expect("at once");
        let mut warming = users.warm_up(WarmUp::query("select id from users where id <= 3"));
        for error in [
            users.get(&1).await.expect_err("there is no database"),
            users.get_many(&[1, 2]).await.expect_err("there is no database"),
            users.snapshot(&[1, 2]).await.expect_err("there is no database"),
            users.invalidate(&1).await.expect_err("nobody can be told"),
            users.update(&1, |_| Box::pin(async { Ok::<_, rowcache::Error>(()) })).await.expect_err("there is none"),
        ] {
            assert!(error.is_unavailable() || error.is_timeout(), "{error:?}");
        }
        assert!(matches!(users.try_get(&1), Lookup::Unknown));
        assert!(matches!(node.status(), Status::Bypassed { .. }));
        let early = users.ticket(&7);
        eventually("attempts fail", async || test.logs.containing(AGAIN).len() >= 4).await;
        let told = test.logs.alarms().into_iter().filter(|line| line.text.contains(AGAIN)).map(|line| line.text);
        let told: Vec<_> = told.collect();
        let different: HashSet<_> = told.iter().collect();
        assert_eq!(told.len(), different.len(), "the same is told once: {told:?}");

        server.start().await.expect("starts");
        node.until_coherent().await.expect("it is there now");
        for opened in [users.until_open().await, named.until_open().await, lists.until_open().await, view.until_open().await] {
            opened.expect("opens");
        }
        sessions.until_open().await.expect("opens");
        assert!(!early.put(User { id: 7, name: "of nobody knows when".into() }));
        let progress = warming.finished().await;
        assert_eq!((progress.keys, progress.loaded + progress.held, progress.failed), (Some(3), 3, 0), "{progress:?}");

        let token = String::from("tok");
        assert_eq!(name(&users, 1).await.as_deref(), Some("user 1"));
        assert_eq!(view.get(&1).await.expect("loads").as_deref().map(String::as_str), Some("user 1"));
        assert!(named.get(&"user 1".into()).await.expect("loads").is_some());
        assert_eq!(lists.get(&"user 1".into()).await.expect("loads").map(|users| users.len()), Some(1));
        assert!(sessions.get(&token).await.expect("loads").is_some());
        assert!(sessions.peek(&token).is_known() && named.peek(&"user 1".into()).is_known() && view.peek(&1).is_known());
        db.execute("update users set name = 'changed' where id = 1; update sessions set name = 'changed'").await;
        node.barrier().await.expect("coherent");
        assert!(!sessions.peek(&token).is_known() && !named.peek(&"user 1".into()).is_known() && !view.peek(&1).is_known());
        assert!(!lists.peek(&"user 1".into()).is_known());
        assert_eq!(name(&users, 1).await.as_deref(), Some("changed"));
        assert_eq!(held(&users), [1, 2, 3], "the others were not touched");
    }

    async fn what_cannot_be_opened_says_why_until_that_is_mended(test: Test) {
        test.logs.allow(NOT_YET);
        let db = migrated(test.version).await;
        db.execute("create table public.users (id bigint primary key, name text not null);
                    insert into public.users values (1, 'user 1')").await;
        let node = launch(&db);
        let users = users(&node).await;
        for error in [
            users.until_open().await.expect_err("it is not tracked"),
            users.get(&1).await.expect_err("it is not tracked"),
        ] {
            assert!(error.is_not_tracked() && error.to_string().contains("rowcache track"), "{error}");
        }
        db.execute("select rowcache.track('public.users')").await;
        eventually("it is open", async || users.get(&1).await.is_ok()).await;
        node.until_coherent().await.expect("coherent");
        name(&users, 1).await;
        assert!(users.peek(&1).is_known());
        let nickname: Users = node.table("users").await.expect("at once");
        let error = nickname.until_open().await.expect_err("not its whole name");
        assert!(error.is_config() && error.to_string().contains("public.users"), "{error}");
        node.shutdown().await;
        assert!(node.until_coherent().await.expect_err("it was shut down").is_closed());
    }

    async fn a_launched_node_that_is_shut_down_lets_nobody_wait(test: Test) {
        test.logs.allow(AGAIN);
        test.logs.allow(NOT_YET);
        let db = migrated(test.version).await;
        let mut config = Config::from_url(&db.url.replace(&format!(":{}/", db.port), ":1/")).expect("a good URL");
        config.load_timeout = Duration::from_secs(1);
        let node = Node::launch(config).expect("needs no database");
        let users = users(&node).await;
        let waits = tokio::spawn({
            let (node, users) = (node.clone(), users.clone());
            async move { (node.until_coherent().await, users.until_open().await) }
        });
        let mut warming = users.warm_up(WarmUp::keys([1]));
        node.shutdown().await;
        let (coherent, open) = waits.await.expect("no panic");
        assert!(coherent.expect_err("it never was").is_closed() && open.expect_err("nor open").is_closed());
        assert_eq!(warming.finished().await.rounds, 0);
    }

    async fn rows_are_loaded_before_anybody_asks(test: Test) {
        test.logs.allow(NO_KEYS);
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        name(&users, 2).await;
        let keys = users.warm_up(WarmUp::keys([3, 2, 3, 99])).finished().await;
        assert_eq!((keys.keys, keys.loaded, keys.held, keys.failed), (Some(3), 2, 1, 0), "{keys:?}");
        assert_eq!(held(&users), [2, 3]);
        assert!(matches!(users.peek(&99), Lookup::Absent));
        let query = WarmUp::query("select id from users order by id desc;").at_most(2);
        assert_eq!(users.warm_up(query).finished().await.loaded, 2);
        assert_eq!(held(&users), [2, 3, 9, 10]);
        let stats = users.stats();
        assert_eq!((stats.gets, stats.queries), (1, 3), "not gets, and one statement each time");
        node.set_caching(false);
        let mut later = users.warm_up(WarmUp::keys([5]));
        name(&users, 5).await;
        assert_eq!((later.progress().keys, later.progress().loaded), (None, 0), "nothing would be kept");
        node.set_caching(true);
        assert_eq!(later.finished().await.loaded, 1);
        assert_eq!(held(&users), [5], "switching forgets everything");
        for (wrong, says) in [
            ("select id, name from users", "must return (bigint)"),
            ("select name from users", "must return (bigint)"),
            ("selec", "syntax error"),
        ] {
            let progress = users.warm_up(WarmUp::query(wrong)).finished().await;
            assert_eq!((progress.keys, progress.loaded), (Some(0), 0));
            let error = progress.error.expect("it is told");
            assert!(error.contains(says), "{error}");
        }
    }

    async fn a_warm_up_ends_where_rows_would_have_to_go(test: Test) {
        let db = users_db(test.version).await;
        db.execute("insert into users select n, 'more' from generate_series(11, 2000) n").await;
        let mut config = hasty(&db.url);
        config.load_keys_max = 10;
        let node = Node::start(config).await.expect("starts");
        let options = TableOptions::default().capacity(100);
        let users: Users = node.table_with("public.users", options).await.expect("opens");
        let progress = users.warm_up(WarmUp::query("select id from users order by id")).finished().await;
        assert!(progress.keys == Some(100) && progress.loaded <= 100, "{progress:?}");
        let progress = users.warm_up(WarmUp::query("select id from users where id > 1000")).finished().await;
        assert!(progress.is_full && progress.loaded < 100, "{progress:?}");
    }

    async fn a_warm_up_is_repeated_and_goes_on_after_a_gap(test: Test) {
        let db = users_db(test.version).await;
        let node = node(&db).await;
        let users = users(&node).await;
        let all = WarmUp::query("select id from users").every(Duration::from_millis(20));
        let warming = users.warm_up(all);
        eventually("it has ended", async || warming.progress().rounds > 0 && held(&users).len() == 10).await;
        let mut events = node.subscribe();
        test.logs.allow("LISTEN connection was lost");
        db.execute(KILL_LISTENERS).await;
        event(&mut events, "a gap", |event| matches!(event, Event::Gap(_))).await;
        node.until_coherent().await.expect("it comes back");
        eventually("all are held again", async || held(&users).len() == 10).await;
        warming.stop();
    }

    async fn the_keys_of_the_last_run_are_those_of_the_next(test: Test) {
        test.logs.allow(NO_KEYS);
        let scratch = Scratch::new();
        let file = scratch.file();
        let db = users_db(test.version).await;
        let first = node(&db).await;
        let last_run = users(&first).await;
        let none = last_run.warm_up(WarmUp::dump(&file)).finished().await;
        assert_eq!((none.keys, none.error), (Some(0), None), "there is no file at the first start");
        for id in [2, 5, 99] {
            name(&last_run, id).await;
        }
        assert_eq!(last_run.dump(&file).await.expect("writes"), 2, "rows alone");
        first.shutdown().await;
        db.execute("update users set name = 'changed' where id = 2; delete from users where id = 5").await;

        let second = node(&db).await;
        let users = users(&second).await;
        let progress = users.warm_up(WarmUp::dump(&file)).finished().await;
        assert_eq!((progress.loaded, progress.failed), (2, 0), "{progress:?}");
        assert_eq!(users.peek(&2).row().map(|user| user.name.clone()).as_deref(), Some("changed"));
        assert!(matches!(users.peek(&5), Lookup::Absent), "what it was is not known");

        let by_name: Table<String, User> = {
            db.execute("select rowcache.track('public.users', columns => '{name}')").await;
            second.table_by("public.users", ["name"], TableOptions::default()).await.expect("opens")
        };
        let other = by_name.warm_up(WarmUp::dump(&file)).finished().await;
        assert!(other.error.expect("told").contains("it has keys of public.users, in format 1"));
        fs::write(&file, "not ours").expect("writes");
        let error = users.warm_up(WarmUp::dump(&file)).finished().await.error.expect("told");
        assert!(error.contains("it is not a file that"), "{error}");
        let nowhere = users.dump(scratch.0.path().join("no").join("where")).await.expect_err("there is no such directory");
        assert!(nowhere.is_config() && nowhere.to_string().contains("public.users"), "{nowhere}");
    }

    async fn keys_of_other_types_are_warmed_up_as_well(test: Test) {
        let db = migrated(test.version).await;
        db.execute(
            "create type public.color as enum ('red', 'green');
             create table public.paints (color public.color, number numeric, day date, id bigint, name text,
                 primary key (color, number, day));
             insert into public.paints values ('red', 1.50, '2024-02-29', 1, 'a'), ('green', 2, '2024-03-01', 2, 'b');
             select rowcache.track('public.paints')",
        )
        .await;
        let paints: Table<Paint, User> = node(&db).await.table("public.paints").await.expect("opens");
        let query = "select color, number, day from public.paints";
        let progress = paints.warm_up(WarmUp::query(query)).finished().await;
        assert_eq!((progress.keys, progress.loaded, progress.error), (Some(2), 2, None));
        let scratch = Scratch::new();
        assert_eq!(paints.dump(scratch.file()).await.expect("writes"), 2);
        let again = paints.warm_up(WarmUp::dump(scratch.file())).finished().await;
        assert_eq!((again.held, again.error), (2, None));
    }

    async fn keys_that_are_secrets_are_not_dumped(test: Test) {
        let db = migrated(test.version).await;
        db.execute(SESSIONS).await;
        let scratch = Scratch::new();
        let sessions: Table<String, User> = node(&db).await.table("public.sessions").await.expect("opens");
        assert!(sessions.dump(scratch.file()).await.expect_err("they are secrets").is_config());
        assert!(!scratch.file().exists());
    }
}
