//! A real PgBouncer in transaction mode: LISTEN succeeds, and nothing ever arrives.

use std::{collections::HashMap, fs, io::Write as _, os::unix::fs::PermissionsExt as _, process::Stdio};

use rowcache::{Node, Table};
use tokio::process::{Child, Command};

use crate::{
    fixture::{self, hasty, users_db},
    program, support,
};

/// A pooler in transaction mode in front of the test's server, on a free port.
struct Pooler {
    port: u16,
    _process: Child,
    _directory: tempfile::TempDir,
}

impl Pooler {
    /// `None`, said on stderr, where PgBouncer is not installed.
    async fn start(db: &support::TestDb) -> Option<Self> {
        Self::start_with(db, "").await
    }

    /// With further lines in its settings.
    async fn start_with(db: &support::TestDb, further: &str) -> Option<Self> {
        if which::which("pgbouncer").is_err() {
            assert!(std::env::var_os("ROWCACHE_TEST_REQUIRE_ALL").is_none(), "pgbouncer is not installed");
            writeln!(std::io::stderr(), "SKIPPED: pgbouncer is not installed").expect("stderr is open");
            return None;
        }
        let directory = tempfile::tempdir().expect("a directory");
        // PgBouncer refuses to run as root, and must read this as somebody else.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("set");
        let port = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr().expect("bound").port();
        let settings = format!(
            "[databases]\n* = user=postgres host=127.0.0.1 port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             auth_type = any\npool_mode = transaction\nunix_socket_dir =\nignore_startup_parameters = extra_float_digits\n{further}",
            db.port,
        );
        let file = directory.path().join("pgbouncer.ini");
        fs::write(&file, settings).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).expect("set");
        let mut command = Command::new("pgbouncer");
        if nix::unistd::geteuid().is_root() {
            command.args(["-u", "nobody"]);
        }
        let process =
            command.arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn().expect("starts");
        support::eventually("the pooler accepts connections", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Some(Self { port, _process: process, _directory: directory })
    }

    fn url(&self, db: &support::TestDb) -> String {
        db.url.replace(&format!(":{}/", db.port), &format!(":{}/", self.port))
    }
}

pg_test! {
    async fn x23_a_listener_behind_a_transaction_pooler_is_refused_with_the_cure(test: Test) {
        let db = users_db(test.version).await;
        let Some(pooler) = Pooler::start(&db).await else { return };
        let mut config = hasty(&db.url);
        config.listener = hasty(&pooler.url(&db)).listener;
        let error = Node::start(config).await.expect_err("nothing arrives");
        assert!(error.is_pooler(), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("transaction mode") && text.contains("direct connection"), "{text}");
    }

    // This PgBouncer is older than 1.21, and does not keep track of prepared statements.
    async fn a_pool_behind_a_pooler_that_mixes_up_statements_is_told_so(test: Test) {
        let db = users_db(test.version).await;
        let Some(pooler) = Pooler::start(&db).await else { return };
        let mut config = hasty(&db.url);
        config.pool_connect = hasty(&pooler.url(&db)).pool_connect;
        // Both are given the same connection by turns, and name their statements alike.
        let mut outcomes = Vec::new();
        for _ in 0..2 {
            outcomes.push(match Node::start(config.clone()).await {
                Ok(node) => async { users_of(&node).await?.get(&1).await.map(drop) }.await,
                Err(error) => Err(error),
            });
        }
        let errors: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
        assert!(!errors.is_empty());
        for error in errors {
            let text = error.to_string();
            assert!(text.contains("prepared statements") && text.contains("PgBouncer 1.21"), "{error:?}");
        }
    }
}

pg_test! {
    // Not one connection that belongs to this node: loads, polls, transactions, all by turns with another node's.
    async fn nodes_that_do_not_listen_need_nothing_but_the_pooler(test: Test) {
        let db = users_db(test.version).await;
        db.execute("select rowcache.track('public.users', via => 'log')").await;
        let Some(pooler) = Pooler::start_with(&db, "server_round_robin = 1\ndefault_pool_size = 3\n").await else { return };
        let mut config = hasty(&pooler.url(&db));
        (config.listen, config.pooler) = (false, true);
        let mut nodes = Vec::new();
        for _ in 0..2 {
            let node = Node::start(config.clone()).await.expect("starts");
            let users = users_of(&node).await.expect("opens");
            nodes.push((node, users));
        }
        for n in 0..20 {
            for (node, users) in &nodes {
                users.get_many(&[1, 2, 3]).await.expect("loads");
                let mut write = node.begin().await.expect("begins");
                let change = format!("update public.users set name = 'round {n}' where id = 2");
                sqlx::raw_sql(sqlx::AssertSqlSafe(change)).execute(&mut *write).await.expect("writes");
                write.invalidates(users, &2);
                let token = write.commit().await.expect("commits");
                for (other, theirs) in &nodes {
                    other.wait_for(token, support::PATIENCE).await.expect("applied");
                    assert!(theirs.peek(&1).is_known() || n == 0);
                    assert_eq!(theirs.get(&2).await.expect("loads").expect("there").name, format!("round {n}"));
                }
            }
        }
        nodes[0].1.invalidate(&3).await.expect("tells all");
        nodes[1].0.barrier().await.expect("coherent");
        assert!(!nodes[1].1.peek(&3).is_known());
    }

    // Statements of several round trips meet one backend, because they are transactions.
    async fn views_and_modifications_need_nothing_but_the_pooler(test: Test) {
        let db = users_db(test.version).await;
        db.execute("select rowcache.track('public.users', via => 'log')").await;
        let Some(pooler) = Pooler::start_with(&db, "server_round_robin = 1\ndefault_pool_size = 3\n").await else { return };
        let mut config = hasty(&pooler.url(&db));
        (config.listen, config.pooler) = (false, true);
        let node = Node::start(config).await.expect("starts");
        let users = users_of(&node).await.expect("opens");
        let names: Table<i64, String> = node
            .view("names")
            .on("public.users", ["id"])
            .open(|ids, db| Box::pin(async move {
                let ask = sqlx::query_as("select id, name from users where id = any($1)").bind(ids).persistent(false);
                let names: Vec<(i64, String)> = ask.fetch_all(db).await?;
                Ok(names.into_iter().collect())
            }))
            .await
            .expect("opens");
        for n in 0..10 {
            names.get_many(&[1, 2, 3]).await.expect("loads");
            let (before, token) = users
                .modify(&2, |user, transaction| Box::pin(async move {
                    let change = sqlx::query("update public.users set name = $1 where id = 2").bind(format!("round {n}"));
                    change.persistent(false).execute(&mut **transaction).await.expect("writes");
                    Ok::<_, rowcache::Error>(user.expect("is there").name)
                }))
                .await
                .expect("commits");
            assert!(n == 0 || before == format!("round {}", n - 1));
            node.wait_for(token, support::PATIENCE).await.expect("applied");
            assert_eq!(names.get(&2).await.expect("loads").as_deref(), Some(&format!("round {n}")));
        }
    }

    async fn who_listens_has_no_pooler_in_between(test: Test) {
        let db = users_db(test.version).await;
        let mut config = hasty(&db.url);
        config.pooler = true;
        let error = Node::start(config).await.expect_err("nothing would arrive");
        assert!(error.is_config() && error.to_string().contains("`listen`"), "{error:?}");
    }
}

pg_test! {
    async fn doctor_sees_that_two_sessions_share_a_connection(test: Test) {
        let db = users_db(test.version).await;
        let Some(pooler) = Pooler::start(&db).await else { return };
        let found = doctor(&pooler.url(&db)).await;
        let pooler = &found["pooler.transaction_mode"];
        assert!(pooler.starts_with("error ") && pooler.contains("took turns on one connection"), "{found:#?}");
        assert!(!found.contains_key("listen.arrives"), "{found:#?}");
        // Everything else is looked at all the same, and nothing is left behind.
        assert!(found["tables.whole"].starts_with("ok "), "{found:#?}");
        let listens = "select count(*) from pg_stat_activity where datname = current_database() and query ilike '%listen%' \
             and pid <> pg_backend_pid()";
        assert_eq!(program::psql(&db, &[listens]).await, "0\n");
        assert!(doctor(&db.url).await["listen.arrives"].starts_with("ok "));
    }

    async fn doctor_sees_that_nothing_arrives(test: Test) {
        let db = users_db(test.version).await;
        // By turns, and there are two: each session meets the same connection again.
        let Some(pooler) = Pooler::start_with(&db, "server_round_robin = 1\n").await else { return };
        let url = pooler.url(&db);
        let (one, two) = (support::connect(&url).await, support::connect(&url).await);
        one.batch_execute("begin").await.expect("takes a connection");
        two.batch_execute("begin").await.expect("takes another one");
        one.batch_execute("commit").await.expect("gives it back");
        two.batch_execute("commit").await.expect("gives it back");
        let found = doctor(&url).await;
        let pooler = &found["pooler.transaction_mode"];
        assert!(pooler.starts_with("error ") && pooler.contains("did not reach the session that listens"), "{found:#?}");
        assert!(!found.contains_key("listen.arrives"), "{found:#?}");
    }
}

/// What `rowcache doctor` finds, as `severity what`, by code.
async fn doctor(url: &str) -> HashMap<String, String> {
    let ended = program::run(url, &["doctor", "--json", "--seconds", "1"]).await;
    let findings: Vec<serde_json::Value> =
        serde_json::from_str(&ended.out).unwrap_or_else(|error| panic!("{error}: {ended:#?}"));
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    findings.iter().map(|it| (text(&it["code"]), format!("{} {}", text(&it["severity"]), text(&it["what"])))).collect()
}

async fn users_of(node: &Node) -> rowcache::Result<fixture::Users> {
    node.table("public.users").await
}
