//! The live page, in a real browser: Chromium, driven by `WebDriver`.

use std::{path::PathBuf, process::Stdio};

use reqwest::{Client, Method};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use rowcache::cli::temp_server::Stop;

use super::{Service, client, config, prepare, prepared};
use crate::{
    program::psql,
    support::{PATIENCE, database_on, eventually, server},
};

/// The program that drives Chromium, if there is one here. Where it must be there, tests fail without.
fn driver() -> Option<PathBuf> {
    let found = which::which("chromedriver").ok();
    assert!(found.is_some() || std::env::var_os("ROWCACHE_TEST_REQUIRE_ALL").is_none(), "there is no chromedriver");
    if found.is_none() {
        eprintln!("SKIPPED: no chromedriver here (Debian: apt-get install chromium-driver)");
    }
    found
}

/// A window of a browser.
struct Browser {
    _driver: Child,
    client: Client,
    session: String,
}

impl Browser {
    async fn open(driver: PathBuf, width: u16) -> Self {
        let mut command = Command::new(driver);
        command.arg("--port=0").stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().expect("it starts");
        let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let port: u16 = loop {
            let line = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("it can be read");
            let line = line.expect("it says its port");
            if let Some((_, port)) = line.split_once("successfully on port ") {
                break port.trim_end_matches('.').parse().expect("a port");
            }
        };
        let client = client();
        let size = format!("--window-size={width},900");
        let args = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", &size];
        let wanted = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": { "args": args },
            "goog:loggingPrefs": { "browser": "ALL" },
        } } });
        let url = format!("http://127.0.0.1:{port}/session");
        let answer: Value =
            client.post(&url).json(&wanted).send().await.expect("it answers").json().await.expect("JSON");
        let id = answer["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("no session: {answer}"));
        Self { _driver: child, session: format!("{url}/{id}"), client }
    }

    async fn ask(&self, method: Method, path: &str, body: &Value) -> Value {
        let mut request = self.client.request(method.clone(), format!("{}{path}", self.session));
        if method == Method::POST {
            request = request.json(body);
        }
        let answer: Value = request.send().await.expect("it answers").json().await.expect("JSON");
        assert!(answer["value"]["error"].is_null(), "{path}: {answer}");
        answer["value"].clone()
    }

    async fn visit(&self, url: &str) {
        self.ask(Method::POST, "/url", &json!({ "url": url })).await;
    }

    /// What a function of JavaScript returns.
    async fn run(&self, script: &str) -> Value {
        self.ask(Method::POST, "/execute/sync", &json!({ "script": script, "args": [] })).await
    }

    async fn until(&self, what: &str, script: &str) {
        eventually(what, async || self.run(script).await == true).await;
    }

    /// The path of an element that can be told by this.
    async fn element(&self, id: &str) -> String {
        let of = json!({ "using": "css selector", "value": format!("[data-testid={id}]") });
        let element = self.ask(Method::POST, "/element", &of).await;
        let element = element.as_object().and_then(|it| it.values().next()).and_then(Value::as_str);
        format!("/element/{}", element.expect("an element"))
    }

    async fn type_into(&self, id: &str, text: &str) {
        let path = self.element(id).await + "/value";
        self.ask(Method::POST, &path, &json!({ "text": text })).await;
    }

    async fn click(&self, id: &str) {
        let path = self.element(id).await + "/click";
        self.ask(Method::POST, &path, &json!({})).await;
    }

    /// What its console has been told that is worse than information.
    async fn complaints(&self) -> Vec<String> {
        let log = self.ask(Method::POST, "/se/log", &json!({ "type": "browser" })).await;
        let entries = log.as_array().cloned().unwrap_or_default();
        let is_bad = |entry: &&Value| matches!(entry["level"].as_str(), Some("SEVERE" | "WARNING"));
        entries.iter().filter(is_bad).map(|entry| entry["message"].to_string()).collect()
    }

    async fn close(self) {
        self.ask(Method::DELETE, "", &Value::Null).await;
    }
}

/// The changes of this key that the stream of events shows.
fn changes(key: &str) -> String {
    format!(
        "[...document.querySelectorAll('[data-testid=event]')].filter(e => e.dataset.kind === 'change' \
         && e.dataset.table === 'public.users' && e.dataset.keys === '{key}')"
    )
}

fn shows(key: &str) -> String {
    format!("return {}.length > 0", changes(key))
}

const COHERENT: &str = "return document.querySelectorAll('[data-testid=node-card][data-coherent=true]').length === 2";

pg_test! {
    async fn a_change_by_psql_shows_on_the_page_of_every_node(test: Test) {
        let Some(driver) = driver() else { return };
        let db = prepared(test.version).await;
        let file = config("[[table]]\nname = 'users'\nwritable = true\n");
        let config = file.path().to_str().expect("a path");
        let one = Service::start(&db, &["--config", config, "--name", "one"]).await;
        let two = Service::start(&db, &["--config", config, "--name", "two"]).await;
        // One as wide as a desk, one as a phone.
        let (wide, narrow) = (Browser::open(driver.clone(), 1280).await, Browser::open(driver, 360).await);
        wide.visit(&one.url).await;
        narrow.visit(&two.url).await;
        for page in [&wide, &narrow] {
            page.until("both nodes are coherent", COHERENT).await;
            let fits = page.run("return document.documentElement.scrollWidth <= window.innerWidth").await;
            assert_eq!(fits, true, "nothing is wider than the window");
        }
        psql(&db, &["update users set name = 'by psql' where id = 42"]).await;
        for page in [&wide, &narrow] {
            page.until("the change arrives", &shows("42")).await;
        }
        // A key is looked up, and its row is edited; the other node drops it.
        wide.type_into("search-key", "42\u{e007}").await;
        wide.until("it is explained", "return document.querySelector('[data-testid=explanation]').textContent.includes('public.users 42')").await;
        wide.click("read").await;
        wide.until("the row is there to be edited", "return !!document.querySelector('[data-testid=editor-column-name]')").await;
        wide.type_into("editor-column-name", " and by hand").await;
        wide.click("editor-save").await;
        narrow.until("the change arrives at the other node", &format!("return {}.length === 2", changes("42"))).await;
        assert_eq!(psql(&db, &["select name from users where id = 42"]).await.trim(), "by psql and by hand");
        for page in [wide, narrow] {
            assert_eq!(page.complaints().await, [""; 0], "the console is empty");
            page.close().await;
        }
    }

    async fn it_tells_the_truth_while_things_break(test: Test) {
        let Some(driver) = driver() else { return };
        let mut server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        prepare(&db).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let page = Browser::open(driver, 800).await;
        page.visit(&service.url).await;
        let coherent = |is: bool| {
            format!("return document.querySelectorAll('[data-testid=node-card][data-coherent=true]').length === {}", u8::from(is))
        };
        let event = |kind: &str| format!("return !!document.querySelector('[data-testid=event][data-kind={kind}]')");
        page.until("it is coherent", &coherent(true)).await;
        psql(&db, &["select count(pg_terminate_backend(pid)) > 0 from pg_stat_activity where datname = current_database() and application_name like '%(listener)'"]).await;
        page.until("the gap shows", &event("gap")).await;
        page.until("and its end", &event("coherent")).await;
        server.stop(Stop::Immediate).await.expect("stops");
        page.until("nothing is said to be coherent", &coherent(false)).await;
        server.start().await.expect("starts");
        page.until("it is coherent again", &coherent(true)).await;
        // The service itself ends: the page says that it has lost it.
        service.running.interrupt().await;
        page.until("it is lost", "return document.querySelector('[data-testid=page-state]').dataset.state !== 'live'").await;
        page.close().await;
    }
}
