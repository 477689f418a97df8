//! What happens, as it happens.

use reqwest::{Method, Response};
use serde_json::Value;
use tokio::time::timeout;

use super::{Answer, Service, prepared};
use crate::{program::psql, support::PATIENCE};

/// A reader of events.
struct Reader {
    response: Response,
    text: String,
}

impl Reader {
    /// Returns when it is connected.
    async fn open(service: &Service, last: Option<&str>) -> Self {
        let mut request = service.request(Method::GET, "/v1/events");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let response = request.send().await.expect("it answers");
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let mut reader = Self { response, text: String::new() };
        assert!(reader.part().await.is_some_and(|part| part.starts_with("id: ") && part.ends_with("retry: 1000")));
        reader
    }

    /// The next part; `None` at the end.
    async fn part(&mut self) -> Option<String> {
        loop {
            if let Some((part, rest)) = self.text.split_once("\n\n") {
                let (part, rest) = (part.to_owned(), rest.to_owned());
                self.text = rest;
                return Some(part);
            }
            let chunk =
                timeout(PATIENCE, self.response.chunk()).await.expect("something is sent").expect("it can be read")?;
            self.text.push_str(std::str::from_utf8(&chunk).expect("text"));
        }
    }

    /// The next event of this kind: its id and its data.
    async fn event(&mut self, kind: &str) -> (String, Value) {
        loop {
            let part = self.part().await.unwrap_or_else(|| panic!("ended without {kind}"));
            let field = |name: &str| part.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            if field("event") == Some(kind) {
                let data = serde_json::from_str(field("data").expect("data")).expect("JSON");
                return (field("id").expect("an id").to_owned(), data);
            }
        }
    }
}

pg_test! {
    async fn changes_arrive_and_a_reader_who_was_away_goes_on(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users", "--table", "members", "--table", "days"]).await;
        let mut reader = Reader::open(&service, None).await;
        psql(&db, &["update users set name = 'x' where id in (1, 2)"]).await;
        let (first, change) = reader.event("change").await;
        assert_eq!((&change["table"], &change["keys"]), (&"public.users".into(), &serde_json::json!(["1", "2"])));
        assert!(change["xid"].is_number() && change["at"].as_str().is_some_and(|at| at.ends_with('Z')), "{change}");
        // Keys as they stand in paths.
        psql(&db, &["update members set since = now() where who = 'a,b'", "update days set rate = 3", "truncate days"]).await;
        assert_eq!(reader.event("change").await.1["keys"], serde_json::json!(["7,a%2Cb"]));
        assert_eq!(reader.event("change").await.1["keys"], serde_json::json!(["2026-01-31"]));
        let (_, all) = reader.event("change").await;
        assert_eq!((&all["table"], &all["keys"]), (&"public.days".into(), &Value::Null));
        drop(reader);
        let mut again = Reader::open(&service, Some(&first)).await;
        assert_eq!(again.event("change").await.1["table"], "public.members");
        // Of another run.
        let mut stranger = Reader::open(&service, Some("deadbeef-7")).await;
        assert_eq!(stranger.event("lagged").await.1["missed"], Value::Null);
        psql(&db, &["select count(pg_terminate_backend(pid)) > 0 from pg_stat_activity where datname = current_database() and application_name like '%(listener)'"]).await;
        let (_, gap) = again.event("gap").await;
        assert!(gap["reason"].as_str().is_some_and(|why| why.contains("LISTEN")), "{gap}");
        again.event("coherent").await;
    }

    async fn readers_are_bounded_and_end_with_the_service(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users", "--max-event-readers", "2"]).await;
        let (mut one, two) = (Reader::open(&service, None).await, Reader::open(&service, None).await);
        let refused = service.get("/v1/events").await;
        refused.is_problem(503, "too_many_readers");
        drop(two);
        // It counts until the service has noticed that it is gone.
        let mut three = loop {
            let response = service.request(Method::GET, "/v1/events").send().await.expect("it answers");
            if response.status() == 200 {
                break Reader { response, text: String::new() };
            }
            Answer::of(response).await.is_problem(503, "too_many_readers");
            psql(&db, &["update users set name = name where id = 1"]).await;
        };
        let Service { running, .. } = service;
        let ended = running.interrupt().await;
        assert_eq!(ended.code, Some(0), "{ended:#?}");
        while one.part().await.is_some() {}
        while three.part().await.is_some() {}
    }
}
