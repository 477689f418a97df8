//! `rowcache serve`, by HTTP as its users meet it.

mod access;
mod document;
mod events;
mod life;
mod operate;
mod page;
mod rows;

use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, Response, header::HeaderMap};
use serde_json::Value;

use crate::{
    program::{Running, psql, rowcache_on, run},
    support::{TestDb, Version, database},
};

/// The program, serving.
pub struct Service {
    pub running: Running,
    pub url: String,
    pub client: Client,
}

/// What was answered, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: String,
}

impl Answer {
    pub async fn of(response: Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, body: response.text().await.expect("a body of text") }
    }

    /// A header; empty if it is not there.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }

    /// The row, of an answer that must have one.
    #[track_caller]
    pub fn row(&self) -> Value {
        assert_eq!(self.status, 200, "{self:#?}");
        self.json()
    }

    /// Fails unless this is a problem of this kind.
    #[track_caller]
    pub fn is_problem(&self, status: u16, code: &str) {
        assert_eq!((self.status, self.header("content-type")), (status, "application/problem+json"), "{self:#?}");
        let problem = self.json();
        assert_eq!((&problem["code"], &problem["status"]), (&code.into(), &status.into()), "{self:#?}");
    }

    /// How it came about.
    pub fn cache(&self) -> &str {
        self.header("cache-status").strip_prefix("rowcache; ").unwrap_or_default()
    }
}

/// A client that trusts nobody, as nothing here has a certificate of a known authority.
pub fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().timeout(Duration::from_mins(1)).no_proxy().build().expect("a client")
}

impl Service {
    /// Starts it on a free port, and waits until it serves.
    pub async fn start(db: &TestDb, args: &[&str]) -> Self {
        let mut service = Self::launch(&db.url, args).await;
        service.running.line_with(&["serving "]).await;
        service
    }

    /// Starts it on a free port, and waits until it listens.
    pub async fn launch(url: &str, args: &[&str]) -> Self {
        let mut all = vec!["serve", "--listen", "127.0.0.1:0"];
        all.extend(args);
        let mut running = Running::start(rowcache_on(url, &all));
        let line = running.line_with(&["listening on "]).await;
        let url = line.rsplit(' ').next().expect("an address").to_owned();
        Self { running, url, client: client() }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    pub async fn send(&self, request: RequestBuilder) -> Answer {
        Answer::of(request.send().await.expect("it answers")).await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// With this header.
    pub async fn get_with(&self, path: &str, name: &str, value: &str) -> Answer {
        self.send(self.request(Method::GET, path).header(name, value)).await
    }

    /// With every change that was committed before.
    pub async fn fresh(&self, path: &str) -> Answer {
        self.get_with(path, "cache-control", "no-cache").await
    }

    pub async fn post(&self, path: &str) -> Answer {
        self.send(self.request(Method::POST, path)).await
    }
}

/// A database with tracked tables.
pub async fn prepared(version: Version) -> TestDb {
    let db = database(version).await;
    prepare(&db).await;
    db
}

pub async fn prepare(db: &TestDb) {
    psql(
        db,
        &[
            "create table users (id bigint primary key, name text, email text unique, secret text)",
            "create table members (org int, who text, since timestamptz, primary key (org, who))",
            "create table days (day date primary key, rate numeric)",
            "insert into users select n, 'user ' || n, 'u' || n || '@x.org', 'hidden' from generate_series(1, 200) n",
            "insert into members values (7, 'ada', '2020-01-01'), (7, 'a,b', '2020-01-02'), (7, 'a b/c', '2020-01-03')",
            "insert into days values ('2026-01-31', 1.50)",
        ],
    )
    .await;
    run(&db.url, &["migrate", "up"]).await.ok();
    run(&db.url, &["track", "users", "--columns", "email"]).await.ok();
    run(&db.url, &["track", "members", "days"]).await.ok();
}

/// A file with these settings, for as long as it lives.
pub fn config(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), text).expect("it can be written");
    file
}
