//! Who may do what, and what nobody is told.

use reqwest::{Client, Method};

use super::{Answer, Service, client, config, prepared};
use crate::program::run;

const READ: &str = "reader-token-1";
const ADMIN: &str = "admin-token-22";

pg_test! {
    async fn tokens_open_what_they_are_for(test: Test) {
        let db = prepared(test.version).await;
        let (read, admin) = (config(READ), config(&format!("{ADMIN}\n")));
        let [read, admin] = [&read, &admin].map(|file| file.path().to_str().expect("a path"));
        let args = ["--table", "users", "--read-token-file", read, "--admin-token-file", admin];
        let service = Service::start(&db, &args).await;
        let with = |method: Method, path: &str, token: &str| {
            service.send(service.request(method, path).header("authorization", format!("Bearer {token}")))
        };
        let path = "/v1/public.users/1";
        for closed in [path, "/v1/public.users?keys=1", "/v1/events", "/v1/nodes", "/status", "/metrics", "/v1/explain/public.users/1", "/nothing"] {
            let refused = service.get(closed).await;
            refused.is_problem(401, "unauthorized");
            assert_eq!(refused.header("www-authenticate"), "Bearer realm=\"rowcache\"");
            with(Method::GET, closed, "wrong-token-1").await.is_problem(401, "unauthorized");
        }
        for open in ["/", "/healthz", "/readyz", "/openapi.json"] {
            assert_eq!(service.get(open).await.status, 200, "{open}");
        }
        assert_eq!(with(Method::GET, path, READ).await.row()["id"], 1);
        assert_eq!(with(Method::GET, path, ADMIN).await.row()["id"], 1);
        with(Method::POST, "/v1/public.users/clear", READ).await.is_problem(403, "forbidden");
        service.post("/v1/public.users/clear").await.is_problem(401, "unauthorized");
        assert_eq!(with(Method::POST, "/v1/public.users/clear", ADMIN).await.status, 200);
        let ended = service.running.interrupt().await;
        for secret in [READ, ADMIN, "wrong-token-1"] {
            assert!(!ended.out.contains(secret) && !ended.err.contains(secret), "{ended:#?}");
        }
    }

    async fn pages_of_other_sites_may_do_nothing(test: Test) {
        let db = prepared(test.version).await;
        let service = Service::start(&db, &["--table", "users"]).await;
        let clear = |name: &str, value: &str| {
            service.send(service.request(Method::POST, "/v1/public.users/clear?scope=local").header(name, value))
        };
        clear("origin", "https://evil.example").await.is_problem(403, "cross_origin");
        clear("host", "evil.example").await.is_problem(403, "cross_origin");
        assert_eq!(clear("origin", &service.url).await.status, 200);
        let page = service.get("/").await;
        let policy = page.header("content-security-policy");
        let nonce = policy.split("'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
        assert!(policy.starts_with("default-src 'none'") && page.body.contains(&format!("<script type=\"module\" nonce=\"{nonce}\"")), "{policy}");
        assert!(!page.body.contains("{{nonce}}") && !service.get("/").await.body.contains(nonce), "another one each time");
    }

    async fn settings_are_checked_before_anything_starts(test: Test) {
        let db = prepared(test.version).await;
        let open = run(&db.url, &["serve", "--table", "users", "--listen", "0.0.0.0:0"]).await;
        open.failed_with("without tokens anybody could read", "--read-token-file");
        run(&db.url, &["serve"]).await.failed_with("no table to serve", "--table public.users");
        let file = config("listn = ['127.0.0.1:1']\n");
        run(&db.url, &["serve", "--config", file.path().to_str().expect("a path")]).await.failed_with("listn", "expected one of");
        let short = config("abc");
        let args = ["serve", "--table", "users", "--read-token-file", short.path().to_str().expect("a path")];
        run(&db.url, &args).await.failed_with("at least 8 characters", "token");
        let said = run(&db.url, &["serve", "--table", "public.users:email", "--print-config"]).await.ok();
        assert!(said.contains("by = [\"email\"]") && said.contains("max_keys = 1000"), "{said}");
        assert!(!said.contains("postgres://"), "no secrets: {said}");
    }

    async fn it_speaks_tls_and_http_2(test: Test) {
        let db = prepared(test.version).await;
        let certified = rcgen::generate_simple_self_signed(["localhost".to_owned(), "127.0.0.1".to_owned()]).expect("a certificate");
        let (cert, key) = (config(&certified.cert.pem()), config(&certified.signing_key.serialize_pem()));
        let [cert, key] = [&cert, &key].map(|file| file.path().to_str().expect("a path"));
        let service = Service::start(&db, &["--table", "users", "--tls-cert", cert, "--tls-key", key]).await;
        assert!(service.url.starts_with("https://"), "{}", service.url);
        let root = reqwest::Certificate::from_pem(certified.cert.pem().as_bytes()).expect("a certificate");
        let trusting = Client::builder().tls_certs_only([root]).no_proxy().build().expect("a client");
        let path = format!("{}/v1/public.users/1", service.url);
        let response = trusting.get(&path).send().await.expect("it answers");
        assert_eq!(response.version(), reqwest::Version::HTTP_2);
        assert_eq!(Answer::of(response).await.row()["id"], 1);
        assert!(client().get(&path).send().await.is_err(), "who does not know the certificate does not trust it");
        // The same without TLS, for who knows beforehand.
        let plain = Service::start(&db, &["--table", "users"]).await;
        let knows = Client::builder().http2_prior_knowledge().no_proxy().build().expect("a client");
        let response = knows.get(format!("{}/v1/public.users/1", plain.url)).send().await.expect("it answers");
        assert_eq!((response.version(), response.status().as_u16()), (reqwest::Version::HTTP_2, 200));
    }
}
