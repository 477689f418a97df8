//! The examples do what their first lines say, as processes of their own, on real Postgres.

use std::{path::PathBuf, process::Stdio};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    net::TcpStream,
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::{
    fixture,
    support::{self, PATIENCE, TestDb, Version},
};

/// A running example. Killed when this is dropped.
struct Example {
    _child: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Example {
    fn start(name: &str, environment: &[(&str, &str)]) -> Self {
        // target/debug/deps/it-0123456789abcdef → target/debug/examples/NAME
        let own = std::env::current_exe().expect("this program has a path");
        let built: PathBuf = own.parent().and_then(|deps| deps.parent()).expect("deps").join("examples").join(name);
        assert!(built.is_file(), "{} was not built: run `cargo build --all-features --examples`", built.display());
        let mut command = Command::new(built);
        command.envs(environment.iter().copied()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("starts");
        let output = BufReader::new(child.stdout.take().expect("is piped")).lines();
        Self { _child: child, output }
    }

    async fn line(&mut self) -> String {
        let line = timeout(PATIENCE, self.output.next_line()).await.expect("the example prints a line");
        line.expect("can be read").expect("the example runs")
    }
}

async fn db(version: Version, table: &str) -> TestDb {
    let db = fixture::migrated(version).await;
    db.execute(table).await;
    db
}

/// Status and body of the answer to one request.
async fn http(address: &str, request: &str, headers: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.expect("connects");
    let length = body.len();
    let text = format!(
        "{request} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}"
    );
    stream.write_all(text.as_bytes()).await.expect("sends");
    let mut answer = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("is answered").expect("is text");
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let (_, body) = answer.split_once("\r\n\r\n").expect("a body");
    (status, body.to_owned())
}

pg_test! {
    async fn smallest_prints_every_change(test: Test) {
        let db = db(test.version, "create table members (id bigint primary key, name text not null);
             insert into members values (1, 'Ada'); select rowcache.track('public.members')").await;
        let mut smallest = Example::start("smallest", &[("DATABASE_URL", &db.url)]);
        assert_eq!(smallest.line().await, "member 1 is Ada");
        db.execute("update members set name = 'Grace' where id = 1").await;
        assert_eq!(smallest.line().await, "member 1 is Grace");
        db.execute("delete from members").await;
        assert_eq!(smallest.line().await, "there is no member 1");
    }

    async fn accounts_prints_whose_orders_change(test: Test) {
        let db = db(test.version, "create table members (id bigint primary key, name text not null);
             create table orders (id bigint primary key, member_id bigint not null, total bigint not null);
             insert into members values (1, 'Ada'), (2, 'Bob'); insert into orders values (7, 1, 120);
             select rowcache.track('public.members'), rowcache.track('public.orders', columns => '{member_id}')").await;
        let mut accounts = Example::start("accounts", &[("DATABASE_URL", &db.url)]);
        let mut both = async || [accounts.line().await, accounts.line().await];
        assert_eq!(both().await, ["Ada ordered [120]", "Bob ordered []"]);
        db.execute("update orders set member_id = 2 where id = 7").await;
        assert_eq!(both().await, ["Ada ordered []", "Bob ordered [120]"]);
        db.execute("update members set name = 'Grace' where id = 1").await;
        assert_eq!(both().await, ["Grace ordered []", "Bob ordered [120]"]);
    }

    async fn permissions_are_computed_by_one_process_and_printed_by_both(test: Test) {
        let db = fixture::migrated(test.version).await;
        let environment = [("DATABASE_URL", db.url.as_str())];
        let mut first = Example::start("permissions", &environment);
        assert_eq!(first.line().await, "computed the permissions of 42");
        let computed = first.line().await;
        assert!(computed.starts_with("42 may read and write, says "), "{computed}");
        let mut second = Example::start("permissions", &environment);
        assert_eq!(second.line().await, computed, "the other one's");
        db.execute("update rowcache.shared_permissions set value = '{\"may\": [\"nothing\"], \"computed_by\": 0}' where key = 42").await;
        for example in [&mut first, &mut second] {
            assert_eq!(example.line().await, "42 may nothing, says 0");
        }
    }

    async fn eight_nodes_and_a_thousand_callers_run_a_function_once(test: Test) {
        // It starts its own server.
        if test.version != Version::V15 {
            return;
        }
        let mut demo = Example::start("eight_nodes", &[]);
        let mut last = String::new();
        let mut runs = Vec::new();
        while !last.contains("as it should be") {
            last = demo.line().await;
            runs.extend(last.split_once(" run(s) in ").map(|(runs, _)| runs.trim().to_owned()));
        }
        assert_eq!((last.as_str(), runs), ("as it should be", ["1", "0", "2", "2"].map(String::from).to_vec()));
    }

    async fn authenticated_service_refuses_a_disabled_account(test: Test) {
        let db = db(test.version, "create table accounts (id bigint primary key, name text not null, active boolean not null);
             insert into accounts values (1, 'Ada', true); select rowcache.track('public.accounts')").await;
        let secret = "0123456789abcdef0123456789abcdef";
        let environment = [("DATABASE_URL", db.url.as_str()), ("JWT_SECRET", secret), ("LISTEN", "127.0.0.1:0")];
        let mut service = Example::start("authenticated_service", &environment);
        let line = service.line().await;
        let address = line.strip_prefix("listening on http://").expect("says where it listens");

        let login = async |body| http(address, "POST /login", "content-type: application/json\r\n", body).await;
        let (status, body) = login(r#"{"account":1}"#).await;
        assert_eq!(status, 200, "{body}");
        let token = body.split('"').nth(3).expect("a token");
        assert_eq!(login(r#"{"account":2}"#).await.0, 401, "there is no such account");

        let me = async |token: &str| http(address, "GET /me", &format!("authorization: Bearer {token}\r\n"), "").await;
        assert_eq!(me(token).await, (200, r#"{"id":1,"name":"Ada","active":true}"#.to_owned()));
        assert_eq!(http(address, "GET /me", "", "").await.0, 401);
        assert_eq!(me(&format!("{token}x")).await.0, 401, "a token of nobody");

        // The message of a commit can take an instant; what must not be is a token that goes on working.
        db.execute("update accounts set active = false where id = 1").await;
        support::eventually("the account is refused", async || me(token).await.0 == 403).await;
        assert_eq!(login(r#"{"account":1}"#).await.0, 401);
        db.execute("update accounts set active = true where id = 1").await;
        support::eventually("the account is let in", async || me(token).await.0 == 200).await;
        db.execute("delete from accounts").await;
        support::eventually("the account is gone", async || me(token).await.0 == 401).await;
    }
}
