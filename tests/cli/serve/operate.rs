//! What operators ask.

use std::sync::{Arc, Mutex};

use axum::{Router, body::Bytes, http::Uri};
use rowcache::{Config, Node};
use serde_json::{Value, json};

use super::{Service, prepared};
use crate::program::psql;

/// What was sent to a collector: the path, and the bytes.
type Collected = Arc<Mutex<Vec<(String, Bytes)>>>;

/// Takes whatever it is sent.
async fn collector() -> (String, Collected) {
    let collected = Collected::default();
    let keep = Arc::clone(&collected);
    let take = async move |uri: Uri, body: Bytes| {
        keep.lock().expect("no panic").push((uri.path().to_owned(), body));
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move { axum::serve(listener, Router::new().fallback(take)).await });
    (url, collected)
}

pg_test! {
    async fn it_says_what_it_holds_and_why(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users", "--name", "web-1"]).await;
        let explain = async || service.get("/v1/explain/public.users/1").await.row();
        assert_eq!(explain().await["held"], Value::Null);
        service.get("/v1/public.users/1").await.row();
        let held = explain().await;
        assert_eq!((&held["held"]["is_row"], &held["coherent"]), (&true.into(), &true.into()), "{held}");
        assert!(held["text"].as_str().is_some_and(|text| text.starts_with("public.users 1 is held: loaded ")), "{held}");
        psql(&db, &["update users set name = 'x' where id = 1"]).await;
        service.fresh("/v1/public.users/2").await.row();
        let gone = explain().await;
        assert_eq!((&gone["held"], &gone["last"]["event"]), (&Value::Null, &"invalidated".into()));
        assert!(gone["last"]["by"].as_str().is_some_and(|by| by.contains("transaction")), "{gone}");

        let status = service.get("/status").await.row();
        assert_eq!((&status["node"]["name"], &status["status"]["coherent"]), (&"web-1".into(), &true.into()), "{status}");
        let table = &status["tables"][0];
        assert_eq!(table["key"], json!([{ "column": "id", "type": "bigint" }]));
        assert_eq!((&table["gets"], &table["misses"], &table["invalidations"]), (&2.into(), &2.into(), &1.into()), "{table}");
        let counts: u64 = table["load_durations"]["counts"].as_array().expect("counts").iter().filter_map(Value::as_u64).sum();
        assert_eq!(counts, 2);
        assert_eq!(service.get("/readyz").await.row(), json!({ "ready": true }));
    }

    async fn all_nodes_forget_or_only_this_one(test: Test) {
        let db = prepared(test.version).await;
        let one = Service::start(&db, &["--table", "users", "--name", "one"]).await;
        let two = Service::start(&db, &["--table", "users", "--name", "two"]).await;
        let nodes = [&one, &two];
        let held = async |key: u8| {
            let mut held = Vec::new();
            for node in nodes {
                held.push(node.get_with(&format!("/v1/public.users/{key}"), "cache-control", "only-if-cached").await.status == 200);
            }
            held
        };
        let load = async || {
            for node in nodes {
                for key in [1, 2] {
                    node.get(&format!("/v1/public.users/{key}")).await.row();
                }
            }
        };
        load().await;
        let local = one.post("/v1/public.users/1/invalidate?scope=local").await.row();
        assert_eq!(local, json!({ "scope": "local", "confirmed": ["one"], "unconfirmed": [] }));
        assert_eq!((held(1).await, held(2).await), (vec![false, true], vec![true, true]));
        load().await;
        // Who has confirmed it has done it.
        let both = json!({ "scope": "cluster", "confirmed": ["one", "two"], "unconfirmed": [] });
        assert_eq!(one.post("/v1/public.users/1/invalidate").await.row(), both);
        assert_eq!((held(1).await, held(2).await), (vec![false, false], vec![true, true]));
        load().await;
        assert_eq!(two.post("/v1/public.users/clear").await.row(), both);
        assert_eq!((held(1).await, held(2).await), (vec![false, false], vec![false, false]));
        load().await;
        two.post("/v1/public.users/clear?scope=local").await.row();
        assert_eq!(held(1).await, vec![true, false]);
        one.post("/v1/public.users/clear?scope=moon").await.is_problem(400, "bad_scope");
        // Who answers and is not coherent has not confirmed: he may serve old rows to those who allow that.
        let mut config = Config::from_url(&db.url).expect("a good URL");
        config.name = Some("doubtful".into());
        let doubtful = Node::start(config).await.expect("starts");
        doubtful.set_caching(false);
        let cleared = one.post("/v1/public.users/clear").await.row();
        assert_eq!((&cleared["confirmed"], &cleared["unconfirmed"]), (&json!(["one", "two"]), &json!(["doubtful"])));
        doubtful.shutdown().await;

        let list = two.get("/v1/nodes").await.row();
        assert_eq!((&list["answered"], &list["silent"]), (&2.into(), &0.into()), "{list}");
        assert_eq!((&list["nodes"][0]["name"], &list["nodes"][1]["is_this"]), (&"one".into(), &true.into()), "{list}");
        assert_eq!(list["nodes"][0]["report"]["address"], one.url.as_str());
    }

    async fn traces_and_metrics_are_sent(test: Test) {
        let db = prepared(test.version).await;
        let (url, collected) = collector().await;
        let service = Service::start(&db, &["--table", "users", "--otlp-endpoint", &url, "--name", "web-7"]).await;
        let parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        service.get_with("/v1/public.users/1", "traceparent", parent).await.row();
        let ended = service.running.interrupt().await;
        assert_eq!((ended.code, ended.err.as_str()), (Some(0), ""), "{ended:#?}");
        let collected = collected.lock().expect("no panic").clone();
        let sent = |path: &str, part: &[u8]| {
            collected.iter().any(|(to, body)| to == path && body.windows(part.len()).any(|it| it == part))
        };
        for part in [&b"GET /v1/{table}/{key}"[..], b"web-7", &0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes()] {
            assert!(sent("/v1/traces", part), "{:?} in {collected:?}", String::from_utf8_lossy(part));
        }
        for part in [&b"rowcache.gets"[..], b"public.users", b"rowcache.load_duration.total"] {
            assert!(sent("/v1/metrics", part), "{:?} in {collected:?}", String::from_utf8_lossy(part));
        }
    }

    async fn metrics_are_those_that_the_manual_lists(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        service.get("/v1/public.users/1").await.row();
        service.get("/v1/public.users/1").await.row();
        let answer = service.get("/metrics").await;
        assert!(answer.header("content-type").starts_with("application/openmetrics-text"), "{answer:#?}");
        for line in [
            "rowcache_coherent 1.0",
            "rowcache_gets_total{table=\"public.users\",result=\"hit\"} 1",
            "rowcache_gets_total{table=\"public.users\",result=\"miss\"} 1",
            "rowcache_loads_total{table=\"public.users\",outcome=\"published\"} 1",
            "rowcache_audits_total{table=\"public.users\",result=\"incoherent\"} 0",
            "rowcache_load_duration_seconds_count{table=\"public.users\"} 1",
            "rowcache_http_requests_total{route=\"/v1/{table}/{key}\",status=\"200\"} 2",
            "# EOF",
        ] {
            assert!(answer.body.lines().any(|it| it == line), "no {line} in {}", answer.body);
        }
        // All that there are are told, and all that are told are there.
        let manual = include_str!("../../../docs/operations.md");
        let mut told: Vec<String> = manual.lines().filter_map(|line| line.strip_prefix("| `rowcache_")?.split('`').next().map(str::to_owned)).collect();
        let mut there: Vec<String> = answer.body.lines().filter_map(|line| {
            let (name, kind) = line.strip_prefix("# TYPE rowcache_")?.split_once(' ')?;
            Some(if kind == "counter" { format!("{name}_total") } else { name.to_owned() })
        }).collect();
        // It is asked for once the node runs.
        there.retain(|name| name != "notification_queue_usage_ratio");
        told.retain(|name| name != "notification_queue_usage_ratio");
        told.sort();
        there.sort();
        assert_eq!(told, there);
    }
}
