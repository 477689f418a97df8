//! Rows by HTTP: which, how fresh, and what is said about it.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Answer, Service, config, prepare, prepared};
use crate::{
    program::{psql, run},
    support::{database_on, server},
};

const TABLES: &str = "[[table]]\nname = 'users'\nexclude = ['secret']\nwritable = true\n\
                      [[table]]\nname = 'users'\nby = ['email']\ncolumns = ['id', 'name']\n\
                      [[table]]\nname = 'members'\n[[table]]\nname = 'days'\n";

pg_test! {
    async fn a_row_comes_from_postgres_once_and_then_from_memory(test: Test) {
        let db = prepared(test.version).await;
        let file = config(TABLES);
        let service = Service::start(&db, &["--config", file.path().to_str().expect("a path")]).await;
        let path = "/v1/public.users/42";
        let first = service.get(path).await;
        // The column that is excluded has never left the database.
        assert_eq!(first.row(), json!({ "id": 42, "name": "user 42", "email": "u42@x.org" }));
        assert_eq!((first.cache(), first.header("content-type")), ("fwd=uri-miss; stored", "application/json"));
        let second = service.get(path).await;
        assert_eq!(second.row(), first.row());
        assert!(second.cache().starts_with("hit; ttl="), "{second:#?}");
        assert_eq!(second.header("cache-control"), "private, no-cache");
        assert!(second.header("vary").contains("rowcache-token") && !second.header("x-request-id").is_empty());
        let etag = second.header("etag").to_owned();
        let known = service.get_with(path, "if-none-match", &format!("\"other\", {etag}")).await;
        assert_eq!((known.status, known.body.as_str(), known.header("etag")), (304, "", etag.as_str()));
        let head = service.send(service.request(Method::HEAD, path)).await;
        assert_eq!((head.status, head.body.as_str()), (200, ""));
        assert_eq!(head.header("content-length"), first.body.len().to_string());

        psql(&db, &["update users set name = 'Ada' where id = 42"]).await;
        let changed = service.fresh(path).await;
        assert_eq!(changed.row()["name"], "Ada");
        assert_ne!(changed.header("etag"), etag);
        let again = service.get_with(path, "if-none-match", &etag).await;
        assert_eq!(again.status, 200, "it has changed");

        // That there is none is held, too.
        let absent = service.get("/v1/public.users/999").await;
        absent.is_problem(404, "no_such_row");
        assert_eq!(absent.cache(), "fwd=uri-miss; stored");
        let absent = service.get("/v1/public.users/999").await;
        assert!(absent.cache().starts_with("hit; "), "{absent:#?}");
        psql(&db, &["insert into users values (999, 'new')"]).await;
        assert_eq!(service.fresh("/v1/public.users/999").await.row()["name"], "new");
    }

    /// What is held is answered before the router, if nothing special is asked for; a directive that nobody knows is special.
    async fn the_short_way_answers_as_the_long_one_does(test: Test) {
        let db = prepared(test.version).await;
        psql(&db, &["update users set name = repeat('x', 2000) where id = 2"]).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let asked = [("accept-encoding", "gzip"), ("accept-encoding", "identity"), ("if-none-match", "*"), ("x-request-id", "mine")];
        for path in ["/v1/public.users/1", "/v1/public.users/2", "/v1/public%2Eusers/1?a=b", "/v1/public.users/999"] {
            service.get(path).await;
            for (name, value) in asked {
                let ask = || service.request(Method::GET, path).header(name, value);
                let short = service.send(ask()).await;
                let long = service.send(ask().header("cache-control", "unknown")).await;
                let told = |answer: &Answer| {
                    let what = ["content-type", "content-encoding", "content-length", "etag", "vary", "cache-control"];
                    let mut names: Vec<_> = answer.headers.keys().map(ToString::to_string).collect();
                    names.sort();
                    let told = what.map(|name| answer.header(name).to_owned());
                    (answer.status, answer.body.clone(), names, told, answer.cache().starts_with("hit; ttl="))
                };
                assert_eq!(told(&short), told(&long), "{path} {name}: {value}");
                assert_eq!(short.header("x-request-id") == "mine", value == "mine");
            }
        }
        let status = service.get("/status").await.json();
        let hits = status["tables"][0]["hits"].as_u64();
        assert_eq!(hits, Some(4 * 8 + 1), "each is one hit, and of row 1 so is the first by another path: {status}");
    }

    async fn keys_of_all_kinds_are_text(test: Test) {
        let db = prepared(test.version).await;
        let file = config(TABLES);
        let service = Service::start(&db, &["--config", file.path().to_str().expect("a path")]).await;
        let by_email = service.get("/v1/public.users:email/u7%40x.org").await;
        assert_eq!(by_email.row(), json!({ "id": 7, "name": "user 7" }));
        psql(&db, &["update users set email = 'seven@x.org' where id = 7"]).await;
        service.fresh("/v1/public.users:email/u7%40x.org").await.is_problem(404, "no_such_row");
        assert_eq!(service.get("/v1/public.users:email/seven@x.org").await.row()["id"], 7);

        assert_eq!(service.get("/v1/public.members/7,ada").await.row()["since"], "2020-01-01T00:00:00+00:00");
        assert_eq!(service.get("/v1/public.members/7,a%2Cb").await.row()["who"], "a,b");
        assert_eq!(service.get("/v1/public.members/7,a%20b%2Fc").await.row()["who"], "a b/c");
        let day = service.get("/v1/public.days/2026-01-31").await;
        assert_eq!(day.body, "{\"day\": \"2026-01-31\", \"rate\": 1.50}", "as Postgres writes it");
        psql(&db, &["update days set rate = 2 where day = '2026-01-31'"]).await;
        assert_eq!(service.fresh("/v1/public.days/2026-01-31").await.row()["rate"], 2);

        let several = service.get("/v1/public.users?keys=1,2,999,1").await;
        let keys: Vec<_> = several.row()["rows"].as_array().expect("rows").iter().map(|it| it["key"].clone()).collect();
        assert_eq!(keys, ["1", "2", "999", "1"]);
        assert_eq!(several.row()["rows"][2]["row"], Value::Null);
        assert_eq!(several.cache(), "fwd=partial; detail=\"0 hits, 4 misses\"");
        assert_eq!(service.get("/v1/public.users?keys=1,2").await.cache(), "hit; detail=\"2 hits\"");
        let several = service.get("/v1/public.members?key=7,ada&key=7,a%2Cb&key=8,x").await.row();
        assert_eq!((&several["rows"][1]["row"]["who"], &several["rows"][2]["row"]), (&"a,b".into(), &Value::Null));

        for (path, code) in [
            ("/v1/public.users/abc", "bad_key"),
            ("/v1/public.users/1.5", "bad_key"),
            ("/v1/public.users/99999999999999999999", "bad_key"),
            ("/v1/public.users/%FF", "bad_key"),
            ("/v1/public.members/7", "bad_key"),
            ("/v1/public.members/7,a,b", "bad_key"),
            ("/v1/public.members?keys=7,ada", "bad_key"),
            ("/v1/public.days/yesterday", "bad_key"),
            ("/v1/public.users?keys=1,x", "bad_key"),
            ("/v1/public.users", "no_keys"),
        ] {
            service.get(path).await.is_problem(400, code);
        }
        let many = format!("/v1/public.users?keys={}", vec!["1"; 1001].join(","));
        service.get(&many).await.is_problem(400, "too_many_keys");
        service.get("/v1/public.orders/1").await.is_problem(404, "no_such_table");
        service.get("/v2/public.users/1").await.is_problem(404, "no_such_path");
        service.send(service.request(Method::PUT, "/v1/public.users/1")).await.is_problem(405, "no_such_method");
    }

    async fn each_type_of_key_is_found_and_evicted(test: Test) {
        let db = prepared(test.version).await;
        psql(&db, &["create type mood as enum ('sad', 'glad')"]).await;
        let kinds = [
            ("smallint", "-7", "-7"),
            ("uuid", "'6e1f8b5a-2c3d-4e5f-8a9b-0c1d2e3f4a5b'", "6E1F8B5A2C3D4E5F8A9B0C1D2E3F4A5B"),
            ("boolean", "true", "true"),
            ("bytea", "'\\xDEAD'", "%5CxdeAD"),
            ("mood", "'sad'", "sad"),
            ("date", "'infinity'", "infinity"),
            ("timestamp", "'2026-01-31 12:30:00.5'", "2026-01-31T12:30:00.500"),
            ("timestamptz", "'2026-01-31 12:30:00+01'", "2026-01-31T11:30:00Z"),
            ("numeric", "1.50", "01.5"),
            ("varchar(9)", "'a/b?c'", "a%2Fb%3Fc"),
        ];
        let mut args = Vec::new();
        for (n, (of, value, _)) in kinds.iter().enumerate() {
            let table = format!("kind_{n}");
            let make = [format!("create table {table} (k {of} primary key, v int)"), format!("insert into {table} values ({value}, 1)")];
            psql(&db, &make.each_ref().map(String::as_str)).await;
            run(&db.url, &["track", &table]).await.ok();
            args.extend(["--table".to_owned(), format!("public.{table}")]);
        }
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let service = Service::start(&db, &args).await;
        for (n, (of, _, key)) in kinds.iter().enumerate() {
            let path = format!("/v1/public.kind_{n}/{key}");
            assert_eq!(service.get(&path).await.row()["v"], 1, "{of}");
            assert!(service.get(&path).await.cache().starts_with("hit"), "{of}");
            psql(&db, &[&format!("update kind_{n} set v = 2")]).await;
            assert_eq!(service.fresh(&path).await.row()["v"], 2, "{of}");
            let several = service.get(&format!("/v1/public.kind_{n}?key={key}")).await;
            assert_eq!(several.row()["rows"][0]["row"]["v"], 2, "{of}");
        }
    }

    async fn what_is_large_is_compressed(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let keys = (1..=200).map(|n| n.to_string()).collect::<Vec<_>>().join(",");
        let path = format!("/v1/public.users?keys={keys}");
        let plain = service.get(&path).await;
        for coding in ["gzip", "zstd"] {
            let packed = service.request(Method::GET, &path).header("accept-encoding", coding).send().await.expect("it answers");
            assert_eq!(packed.headers()["content-encoding"], coding);
            let bytes = packed.bytes().await.expect("a body").len();
            assert!(bytes * 4 < plain.body.len(), "{bytes} of {}", plain.body.len());
        }
        let small = service.get_with("/v1/public.users/1", "accept-encoding", "gzip, zstd").await;
        assert_eq!((small.header("content-encoding"), &small.row()["id"]), ("", &1.into()));
    }

    async fn who_asks_says_how_fresh(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let path = "/v1/public.users/1";
        let not_held = service.get_with(path, "cache-control", "only-if-cached").await;
        not_held.is_problem(504, "not_cached");
        assert_eq!(not_held.cache(), "detail=only-if-cached");
        // Read around the cache: nothing is held afterwards.
        let around = service.get_with(path, "cache-control", "no-store").await;
        assert_eq!((&around.row()["name"], around.cache()), (&"user 1".into(), "fwd=request"));
        service.get_with(path, "cache-control", "only-if-cached").await.is_problem(504, "not_cached");
        service.get(path).await.row();
        assert!(service.get_with(path, "cache-control", "only-if-cached").await.cache().starts_with("hit"));
        for n in 0..20 {
            let name = format!("name {n}");
            psql(&db, &[&format!("update users set name = '{name}' where id = 1")]).await;
            let fence = ["no-cache", "max-age=0", "no-cache, max-age=60"][n % 3];
            let read = service.get_with(path, "cache-control", fence).await;
            assert_eq!(read.row()["name"], name.as_str(), "{fence}: what was committed before is there");
            // From memory or by a load, but never a second time from Postgres.
            assert!(service.get_with(path, "cache-control", "max-age=30").await.cache().starts_with("hit"));
        }
        service.get_with(path, "rowcache-token", "nonsense").await.is_problem(400, "bad_token");
        service.get_with(path, "rowcache-token", "1.1.1").await.is_problem(409, "other_incarnation");
    }

    async fn a_write_returns_a_token_that_any_node_understands(test: Test) {
        let db = prepared(test.version).await;
        let file = config(TABLES);
        let args = ["--config", file.path().to_str().expect("a path")];
        let (one, two) = (Service::start(&db, &args).await, Service::start(&db, &args).await);
        let path = "/v1/public.users/5";
        two.get(path).await.row();
        for n in 0..20 {
            let change = one.request(Method::PATCH, path).json(&json!({ "name": format!("name {n}") }));
            let written = one.send(change).await;
            assert_eq!(written.row()["name"], format!("name {n}"));
            let token = written.header("rowcache-token").to_owned();
            let read = two.get_with(path, "rowcache-token", &token).await;
            assert_eq!(read.row()["name"], format!("name {n}"), "read your writes, on another node");
        }
        let patch = |path: &str, body: Value| one.send(one.request(Method::PATCH, path).json(&body));
        patch("/v1/public.users/12345", json!({ "name": "x" })).await.is_problem(404, "no_such_row");
        let taken = patch(path, json!({ "email": "u6@x.org" })).await;
        taken.is_problem(422, "refused");
        assert!(taken.body.contains("duplicate key"), "{taken:#?}");
        patch(path, json!({ "nonsense": 1 })).await.is_problem(422, "refused");
        patch(path, json!({ "secret": "x" })).await.is_problem(400, "bad_body");
        patch(path, json!({})).await.is_problem(400, "bad_body");
        patch(path, json!([1])).await.is_problem(400, "bad_body");
        patch("/v1/public.days/2026-01-31", json!({ "rate": 1 })).await.is_problem(403, "read_only");
        let large = one.request(Method::PATCH, path).body(vec![b' '; 2 << 20]);
        one.send(large).await.is_problem(413, "too_large");
        // A column is a name, and nothing else.
        patch(path, json!({ "name\" = 'x', \"email": "x" })).await.is_problem(422, "refused");
        assert_eq!(one.fresh(path).await.row()["name"], "name 19");
        // A change of the key itself leaves no row to show.
        let moved = patch(path, json!({ "id": 5005 })).await;
        assert_eq!((moved.status, moved.body.as_str()), (204, ""), "{moved:#?}");
        let token = moved.header("rowcache-token").to_owned();
        assert_eq!(two.get_with("/v1/public.users/5005", "rowcache-token", &token).await.row()["name"], "name 19");
        two.get_with(path, "rowcache-token", &token).await.is_problem(404, "no_such_row");
    }

    async fn without_postgres_it_answers_only_what_is_allowed(test: Test) {
        let mut server = server(test.version, &[]).await;
        let db = database_on(&server, test.version).await;
        prepare(&db).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let path = "/v1/public.users/1";
        service.get(path).await.row();
        server.stop(rowcache::cli::temp_server::Stop::Fast).await.expect("stops");
        // Until the node knows, it serves: what it holds was true when the server was there.
        while service.get("/readyz").await.status == 200 {}
        let refused = service.get(path).await;
        refused.is_problem(503, "unavailable");
        assert_eq!(refused.header("retry-after"), "1");
        assert!(refused.cache().starts_with("fwd=bypass"), "{refused:#?}");
        let stale = service.get_with(path, "cache-control", "stale-if-error=600").await;
        assert_eq!(stale.row()["id"], 1);
        assert!(stale.cache().starts_with("hit; ttl=") && stale.cache().ends_with("detail=stale-if-error"), "{stale:#?}");
        let stale = service.get_with(path, "cache-control", "max-stale=600").await;
        assert!(stale.cache().ends_with("detail=stale"), "{stale:#?}");
        service.get_with(path, "cache-control", "no-cache, stale-if-error=0").await.is_problem(503, "unavailable");
        service.get_with("/v1/public.users/2", "cache-control", "stale-if-error=600").await.is_problem(503, "unavailable");
        assert_eq!(service.get("/healthz").await.status, 200);
        server.start().await.expect("starts");
        while service.get("/readyz").await.status != 200 {}
        assert_eq!(service.get(path).await.row()["id"], 1);
    }
}
