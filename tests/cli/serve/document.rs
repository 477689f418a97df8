//! The `OpenAPI` document, held against what the service does.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Answer, Service, config, prepared};

/// What somebody may put into a path, a query, a header.
const TEXTS: [&str; 16] = [
    "public.users",
    "1",
    "",
    "0",
    "-1",
    "abc",
    "%00",
    "%2F..%2F",
    "'; drop table users; --",
    "9223372036854775808",
    "%F0%9F%98%80",
    "%",
    "a,b,c",
    "null",
    "*",
    "\"",
];

fn encoded(text: &str) -> String {
    let forbidden = |it: char| !(it.is_ascii_alphanumeric() || "%.-_,*".contains(it));
    text.chars().map(|it| if forbidden(it) { format!("%{:02X}", it as u32) } else { it.to_string() }).collect()
}

/// The values to try for a parameter: what the document gives as an example among them.
fn values(parameter: &Value) -> Vec<String> {
    let example = parameter["example"].as_str();
    example.into_iter().map(str::to_owned).chain(TEXTS.iter().map(|text| encoded(text))).collect()
}

/// Fails unless the document says that this can be answered.
fn check(operation: &Value, what: &str, answer: &Answer) {
    // What any server of HTTP may answer.
    if answer.status == 404 && answer.body.contains("no_such_path")
        || matches!(answer.status, 400 if answer.body.is_empty())
    {
        return;
    }
    let documented = &operation["responses"][answer.status.to_string()];
    assert!(documented.is_object(), "{what}: {answer:#?}");
    assert_ne!(answer.status, 500, "{what}: {answer:#?}");
    if let Some(content) = documented["content"].as_object() {
        let kind = answer.header("content-type").split(';').next().expect("a part");
        assert!(content.contains_key(kind), "{what}: {answer:#?}");
        if kind.ends_with("json") && !answer.body.is_empty() {
            answer.json();
        }
        if kind == "application/problem+json" && !answer.body.is_empty() {
            assert!(answer.json()["code"].is_string(), "{what}: {answer:#?}");
        }
    }
}

pg_test! {
    async fn nothing_is_answered_that_is_not_documented(test: Test) {
        let db = prepared(test.version).await;
        let file = config("[[table]]\nname = 'users'\nwritable = true\n[[table]]\nname = 'members'\n");
        let service = Service::start(&db, &["--config", file.path().to_str().expect("a path")]).await;
        let document = service.get("/openapi.json").await.row();
        assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{document}");
        let mut tried = 0;
        for (path, item) in document["paths"].as_object().expect("paths") {
            if path == "/v1/events" {
                continue; // it does not end; `events.rs`
            }
            for (method, operation) in item.as_object().expect("operations") {
                let method: Method = method.to_uppercase().parse().expect("a method");
                let none = Vec::new();
                let parameters = operation["parameters"].as_array().unwrap_or(&none);
                let send = async |place: usize, value: &str| {
                    let mut path = path.clone();
                    let mut query = Vec::new();
                    let mut headers = Vec::new();
                    for (n, parameter) in parameters.iter().enumerate() {
                        let name = parameter["name"].as_str().expect("a name");
                        let example = parameter["example"].as_str().unwrap_or_default();
                        let value = if n == place { value } else { example };
                        match parameter["in"].as_str() {
                            Some("path") => path = path.replace(&format!("{{{name}}}"), value),
                            Some("query") if n == place || !example.is_empty() => query.push(format!("{name}={value}")),
                            Some("header") if n == place => headers.push((name.to_owned(), value.to_owned())),
                            _ => {}
                        }
                    }
                    let url = if query.is_empty() { path } else { format!("{path}?{}", query.join("&")) };
                    let mut request = service.request(method.clone(), &url);
                    for (name, value) in headers {
                        request = request.header(name, value);
                    }
                    if method == Method::PATCH {
                        request = request.json(&json!({ "name": "x" }));
                    }
                    let answer = service.send(request).await;
                    check(operation, &format!("{method} {url} ({place}: {value})"), &answer);
                };
                send(usize::MAX, "").await;
                tried += 1;
                for (n, parameter) in parameters.iter().enumerate() {
                    for value in values(parameter) {
                        send(n, &value).await;
                        tried += 1;
                    }
                }
            }
        }
        for body in ["", "{", "[]", "null", "{}", "{\"name\": {\"a\": [1]}}", "{\"id\": null}", "{\"\": 1}", "{\"name\": \"\\u0000\"}", "{\"id\": 1e400}"] {
            let request = service.request(Method::PATCH, "/v1/public.users/1").body(body);
            let answer = service.send(request).await;
            check(&document["paths"]["/v1/{table}/{key}"]["patch"], body, &answer);
            tried += 1;
        }
        assert!(tried > 200, "{tried}");
        assert_eq!(service.get("/v1/public.users/2").await.row()["id"], 2, "the table is still there");
    }
}
