//! `rowcache nodes`: who is there, who does not answer, and nobody.

use rowcache::{Config, Node, Table};
use serde_json::Value;

use crate::{
    program::{psql, run},
    support::{TestDb, connect, database},
};

async fn node(db: &TestDb, name: &str) -> Node {
    let mut config = Config::from_url(&db.url).expect("a good URL");
    (config.name, config.address) = (Some(name.into()), Some(format!("http://{name}:8080")));
    Node::start(config).await.expect("starts")
}

/// The cells of the line that begins with this.
fn cells<'a>(out: &'a str, name: &str) -> Vec<&'a str> {
    let line = out.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {out}"));
    line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

pg_test! {
    async fn it_lists_who_is_there(test: Test) {
        let db = database(test.version).await;
        // Not even the schema is needed to see that nobody is there.
        assert_eq!(run(&db.url, &["nodes"]).await.ok(), "no node listens on this database\n");
        let none: Value = serde_json::from_str(&run(&db.url, &["nodes", "--json"]).await.ok()).expect("JSON");
        assert_eq!((&none["answered"], &none["silent"], &none["nodes"]), (&0.into(), &0.into(), &Value::Array(Vec::new())));

        run(&db.url, &["migrate", "up"]).await.ok();
        psql(&db, &["create table users (id bigint primary key)", "insert into users values (1), (2)"]).await;
        run(&db.url, &["track", "users"]).await.ok();
        let (web, batch) = (node(&db, "web-1").await, node(&db, "batch").await);
        let users: Table<i64, (i64,)> = web.table("public.users").await.expect("opens");
        for id in [1, 1, 1, 2] {
            users.get(&id).await.expect("loads");
        }
        batch.set_caching(false);
        let _ghost = connect(&format!("{}?application_name=ghost%20%28listener%29", db.url)).await;

        let out = run(&db.url, &["nodes", "--deadline", "3"]).await.ok();
        assert_eq!(cells(&out, "name"), ["name", "status", "as of", "hits", "entries", "version", "up", "address", "client"], "{out}");
        let first: Vec<_> = out.lines().take(4).map(|line| line.split("  ").next().unwrap()).collect();
        assert_eq!(first, ["name", "batch", "ghost", "web-1"], "{out}");
        let row = cells(&out, "web-1");
        assert_eq!((row[1], &row[3..6]), ("coherent", &["50.0 %", "2", env!("CARGO_PKG_VERSION")][..]), "{out}");
        assert!(row[2].ends_with(" s ago") && row[6].ends_with(" s"), "{out}");
        assert_eq!(row[7..], ["http://web-1:8080", "127.0.0.1"], "{out}");
        assert_eq!(cells(&out, "ghost")[1..], ["did not answer within 3 s", "-", "-", "-", "-", "-", "-", "127.0.0.1"], "{out}");
        assert_eq!(cells(&out, "batch ")[1], "not coherent, see below", "{out}");
        assert!(out.lines().any(|line| line.starts_with("batch: ") && line.contains("caching")), "{out}");

        let json: Value = serde_json::from_str(&run(&db.url, &["nodes", "--json", "--deadline", "3"]).await.ok()).expect("JSON");
        assert_eq!((&json["answered"], &json["silent"], &json["deadline_seconds"]), (&2.into(), &1.into(), &3.0.into()));
        let [batch, ghost, web] = json["nodes"].as_array().expect("a list").as_slice() else { panic!("{json}") };
        assert_eq!((&batch["report"]["coherent"], &batch["answered"]), (&false.into(), &true.into()), "{json}");
        assert_eq!((&ghost["name"], &ghost["report"]), (&"ghost".into(), &Value::Null), "{json}");
        let table = &web["report"]["tables"][0];
        assert_eq!((&table["name"], &table["gets"], &table["hits"]), (&"public.users".into(), &4.into(), &2.into()), "{json}");
        assert!(web["report"]["id"].is_string() && web["listener_pid"].is_i64() && web["connected_seconds"].is_f64(), "{json}");
        assert_eq!(web["is_this"], false, "{json}");
    }
}
