//! The live page: one file, with whatever it needs.

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use uuid::Uuid;

const PAGE: &str = include_str!("page.html");

/// The page. What it runs is named by a number that is another one each time, and nothing else is run.
#[utoipa::path(get, path = "/", tag = "node", responses((status = 200, description = "The live page", content_type = "text/html", body = String)))]
pub(crate) async fn page() -> Response {
    let nonce = Uuid::new_v4().simple().to_string();
    let mut response = Response::new(Body::from(PAGE.replace("{{nonce}}", &nonce)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    let policy = format!(
        "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    if let Ok(policy) = HeaderValue::try_from(policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    response
}
