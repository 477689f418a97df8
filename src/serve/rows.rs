//! The story of a request for a row.
//!
//! ```text
//! GET /v1/public.users/42 ── the table, the key, what `Cache-Control` asks for
//!    └ held, and nothing more is asked for ──→ its bytes, as they are
//!    └ else as the library reads it ──→ the row | 404 | 503
//! Cache-Status says which of these it was.
//! ```

use std::{fmt::Write as _, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header},
    response::{IntoResponse as _, Response},
};
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde_json::{Map, Value};

use super::{
    app::App,
    directives::{Directives, TOKEN},
    http::COMPRESSED_ABOVE,
    problem::Problem,
    table::Served,
};
use crate::{
    Cached, Freshness,
    coherence::Boot,
    freshness::{Traced, Way},
    key::AnyKey,
    postgres::json_rows::{JsonRow, Sent},
};

/// How an answer came about.
struct Answer {
    row: Option<Cached<JsonRow>>,
    /// `None`: around the cache, as was asked.
    way: Option<Way>,
    /// Everything that was visible then is in it.
    as_of: Boot,
}

impl From<Traced<JsonRow>> for Answer {
    fn from(Traced { row, way, as_of }: Traced<JsonRow>) -> Self {
        Self { row, way: Some(way), as_of }
    }
}

/// One row, by its key, as JSON.
#[utoipa::path(
    get,
    path = "/v1/{table}/{key}",
    tag = "rows",
    params(
        ("table" = String, Path, description = "As it was named to the service: `public.users`, or `public.sessions:token`", example = "public.users"),
        ("key" = String, Path, description = "Percent-encoded; the parts of a key of several columns apart by commas", example = "42"),
        ("Cache-Control" = Option<String>, Header, description = "`no-cache`, `max-age=N`, `max-stale[=N]`, `only-if-cached`, `no-store`, `stale-if-error=N`"),
        ("Rowcache-Token" = Option<String>, Header, pattern = r"^1\.[0-9a-f]{1,16}\.[0-9]{1,19}$", description = "The answer includes the transaction that it names"),
        ("If-None-Match" = Option<String>, Header, description = "304 if the row still has one of these entity tags"),
    ),
    responses(
        (status = 200, description = "The row", content_type = "application/json", body = Object, headers(
            ("Cache-Status" = String, description = "How it was answered (RFC 9211)"),
            ("Age" = u64, description = "Seconds: it may miss changes of this time, and none that are older"),
            ("ETag" = String, description = "Weak"),
        )),
        (status = 304, description = "As before"),
        (status = 400, description = "The key or the token cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such row, or no such table", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The token is of another incarnation of the server", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many unknown keys were asked for", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "The row cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "It cannot be answered now as fresh as asked", body = Problem, content_type = "application/problem+json"),
        (status = 504, description = "`only-if-cached`, and it is not held", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn row(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Result<Response, Problem> {
    let (table, key) = row_of(&app, &uri)?;
    // A hit, and nothing special was asked for.
    if !is_special(&headers)
        && let Some(held) = table.table().held(&key)
    {
        return Ok(respond(table, &key, &held.into(), &headers));
    }
    let wishes = Directives::read(&headers, bound(table))?;
    match read(table, &key, wishes).await {
        Ok(answer) => Ok(respond(table, &key, &answer, &headers)),
        Err((problem, status)) => Ok(with_status(problem.into_response(), &status)),
    }
}

/// The route of [`row`].
pub(crate) const ROUTE: &str = "/v1/{table}/{key}";

/// What [`row`] answers to who may ask for it, if the row is held and nothing special is asked for. `None` in all other cases.
pub(crate) fn held<B>(app: &App, request: &axum::http::Request<B>) -> Option<Response> {
    let (method, uri, headers) = (request.method(), request.uri(), request.headers());
    let mut names = uri.path().strip_prefix("/v1/")?.split('/');
    let (_, key) = (names.next()?, names.next()?);
    if method != Method::GET || key.is_empty() || names.next().is_some() || is_special(headers) {
        return None;
    }
    app.guard.check(method, uri, headers).ok()?;
    let (table, key) = row_of(app, uri).ok()?;
    let cache = table.table();
    // What is worth compressing is compressed elsewhere. The hit counts only once.
    if headers.contains_key(header::ACCEPT_ENCODING) {
        cache.peek(&key).row().filter(|row| (row.json.len() as u64) < COMPRESSED_ABOVE)?;
    }
    Some(respond(table, &key, &cache.held(&key)?.into(), headers))
}

/// Whether a request wants anything but what is held.
fn is_special(headers: &HeaderMap) -> bool {
    headers.contains_key(header::CACHE_CONTROL) || headers.contains_key(&TOKEN) || headers.contains_key(header::PRAGMA)
}

/// Several rows, by their keys: those that are not held by one statement.
#[utoipa::path(
    get,
    path = "/v1/{table}",
    tag = "rows",
    params(
        ("table" = String, Path, description = "As it was named to the service", example = "public.users"),
        ("keys" = Option<String>, Query, description = "Keys of one column, apart by commas", example = "1,2,3"),
        ("key" = Option<Vec<String>>, Query, description = "A key each; for keys of several columns, whose parts are apart by commas"),
        ("Cache-Control" = Option<String>, Header, description = "As of one row, but for `only-if-cached`, `no-store` and `stale-if-error`"),
        ("Rowcache-Token" = Option<String>, Header, pattern = r"^1\.[0-9a-f]{1,16}\.[0-9]{1,19}$", description = "The answer includes the transaction that it names"),
    ),
    responses(
        (status = 200, description = "The rows, in the order of the keys", content_type = "application/json", body = RowList),
        (status = 400, description = "A key or the token cannot be read, or there are none or too many", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such table", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "The token is of another incarnation of the server", body = Problem, content_type = "application/problem+json"),
        (status = 429, description = "Too many unknown keys were asked for", body = Problem, content_type = "application/problem+json"),
        (status = 500, description = "A row cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "It cannot be answered now as fresh as asked", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn rows(State(app): State<Arc<App>>, uri: Uri, headers: HeaderMap) -> Result<Response, Problem> {
    let table = app.table(segments(&uri).next().unwrap_or_default())?;
    let raw = raw_keys(table, uri.query().unwrap_or_default(), app.max_keys)?;
    let keys =
        raw.iter().map(|raw| table.read_key(raw).map_err(|why| bad_key(table, &why))).collect::<Result<Vec<_>, _>>()?;
    let wishes = Directives::read(&headers, bound(table))?;
    let cache = table.table();
    let held = keys.iter().filter(|key| cache.peek(key).is_known()).count();
    let mut found = match wishes.token {
        Some(token) => Some(cache.get_many_with(&keys, Freshness::AtLeast(token)).await?),
        None => None,
    };
    if found.is_none() || wishes.freshness != Freshness::Coherent {
        found = Some(cache.get_many_with(&keys, wishes.freshness).await?);
    }
    let found = found.unwrap_or_default();
    let size: usize = found.iter().flatten().map(|row| row.json.len() + 64).sum();
    let mut body = BytesMut::with_capacity(size + 64);
    body.put_slice(b"{\"rows\":[");
    for (n, (key, row)) in keys.iter().zip(&found).enumerate() {
        body.put_slice(if n == 0 { b"{\"key\":" } else { b",{\"key\":" });
        body.put_slice(Value::from(table.show_key(key)).to_string().as_bytes());
        body.put_slice(b",\"row\":");
        body.put_slice(row.as_ref().map_or(b"null", |row| &row.json));
        body.put_slice(b"}");
    }
    body.put_slice(b"]}");
    let misses = keys.len() - held;
    let status = match misses {
        0 => format!("rowcache; hit; detail=\"{held} hits\""),
        _ => format!("rowcache; fwd=partial; detail=\"{held} hits, {misses} misses\""),
    };
    Ok(with_status(json(body.freeze()), &status))
}

/// Sets columns of a row, of a table that is served as writable.
#[utoipa::path(
    patch,
    path = "/v1/{table}/{key}",
    tag = "rows",
    params(
        ("table" = String, Path, description = "As it was named to the service", example = "public.users"),
        ("key" = String, Path, description = "As for reading", example = "42"),
    ),
    request_body(content = Object, content_type = "application/json", description = "Columns and their new values"),
    responses(
        (status = 200, description = "The row as it is now", content_type = "application/json", body = Object, headers(
            ("Rowcache-Token" = String, description = "Names the transaction: reads that send it, on any node, include it"),
        )),
        (status = 204, description = "Done; there is no row with this key any more, as the change was one of the key"),
        (status = 400, description = "The key or the body cannot be read", body = Problem, content_type = "application/problem+json"),
        (status = 401, description = "No token, or a wrong one", body = Problem, content_type = "application/problem+json"),
        (status = 403, description = "The table is not served as writable, or the token is for reading", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "There is no such row, or no such table", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Postgres refuses it", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "It cannot be done now", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(State(app): State<Arc<App>>, uri: Uri, request: Request) -> Result<Response, Problem> {
    let (table, key) = row_of(&app, &uri)?;
    if !table.is_writable() {
        let detail = format!("{} is not served as writable (`writable = true` in its `[[table]]`)", table.path());
        return Err(Problem::new(StatusCode::FORBIDDEN, "read_only", detail));
    }
    let headers = request.headers().clone();
    let body = read_body(request.into_body()).await?;
    let columns: Map<String, Value> = serde_json::from_slice(&body).map_err(|error| {
        Problem::bad_request("bad_body", format!("the body must be a JSON object of columns: {error}"))
    })?;
    if columns.is_empty() {
        return Err(Problem::bad_request("bad_body", "the body names no column"));
    }
    let unsent = |name: &&String| match table.sent() {
        Sent::All => false,
        Sent::Only(names) => !names.contains(name),
        Sent::AllBut(names) => names.contains(name),
    };
    if let Some(name) = columns.keys().find(unsent) {
        return Err(Problem::bad_request("bad_body", format!("column {name} is not served")));
    }
    let token = match table.update(&key, &columns).await {
        Ok(Some(token)) => token,
        Ok(None) => return Err(no_such_row(table, &key)),
        Err(error) if error.is_refused() || error.is_table() => {
            let detail = crate::cli::with_causes(&error.into());
            return Err(Problem::new(StatusCode::UNPROCESSABLE_ENTITY, "refused", detail));
        }
        Err(error) => return Err(error.into()),
    };
    let read = table.table().trace(&key, Freshness::AtLeast(token)).await?;
    let answer = Answer { way: None, ..read.into() };
    let mut response = if answer.row.is_some() {
        respond(table, &key, &answer, &without_conditions(headers))
    } else {
        // It has another key now, or somebody has deleted it since.
        StatusCode::NO_CONTENT.into_response()
    };
    if let Ok(value) = HeaderValue::try_from(token.to_string()) {
        response.headers_mut().insert(TOKEN, value);
    }
    Ok(response)
}

/// Bytes of a body, and of one that is read to its end all the same: whoever is still sending hears no answer.
const BODY_MAX: usize = 1 << 20;
const BODY_DRAINED: usize = 16 << 20;

async fn read_body(body: Body) -> Result<BytesMut, Problem> {
    let mut chunks = body.into_data_stream();
    let (mut read, mut seen) = (BytesMut::new(), 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| Problem::bad_request("bad_body", "the body did not arrive in whole"))?;
        seen += chunk.len();
        if seen <= BODY_MAX {
            read.put_slice(&chunk);
        } else if seen > BODY_DRAINED {
            break;
        }
    }
    if seen > BODY_MAX {
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", "the body may have a megabyte"));
    }
    Ok(read)
}

/// The shape of [`rows`].
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "for the document")]
pub(crate) struct RowList {
    rows: Vec<RowOfList>,
}

/// A key, and its row.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "for the document")]
struct RowOfList {
    key: String,
    /// `null`: there is none.
    #[schema(value_type = Option<Object>)]
    row: Value,
}

async fn read(table: &Served, key: &AnyKey, wishes: Directives) -> Result<Answer, (Problem, String)> {
    let cache = table.table();
    let around = |problem: Problem| (problem, "rowcache; fwd=request".to_owned());
    if wishes.only_if_cached {
        let limit = match wishes.freshness {
            Freshness::Within(limit) => limit,
            Freshness::Any => Duration::MAX,
            Freshness::Fenced => Duration::ZERO,
            _ => bound(table),
        };
        let held = if wishes.token.is_none() { cache.held_within(key, limit) } else { None };
        let Some(held) = held else {
            let detail =
                format!("{} {} is not held, and `only-if-cached` was asked for", table.path(), table.show_key(key));
            let problem = Problem::new(StatusCode::GATEWAY_TIMEOUT, "not_cached", detail);
            return Err((problem, "rowcache; detail=only-if-cached".to_owned()));
        };
        return Ok(held.into());
    }
    if wishes.no_store {
        let as_of = table.now();
        let rows = cache.load_together(std::slice::from_ref(key)).await.map_err(|error| around(error.into()))?;
        return Ok(Answer { row: rows.into_iter().next().flatten(), way: None, as_of });
    }
    let mut read = match wishes.token {
        Some(token) => cache.trace(key, Freshness::AtLeast(token)).await,
        None => cache.trace(key, wishes.freshness).await,
    };
    if read.is_ok() && wishes.token.is_some() && wishes.freshness != Freshness::Coherent {
        read = cache.trace(key, wishes.freshness).await;
    }
    match read {
        Ok(read) => Ok(read.into()),
        Err(error) => {
            let is_outage = error.is_unavailable() || error.is_timeout() || error.is_refused() || error.is_pooler();
            if let Some(held) = wishes.stale_if_error.filter(|_| is_outage).and_then(|max| cache.held_within(key, max))
            {
                return Ok(Answer { way: Some(Way::Rescued), ..held.into() });
            }
            let status = format!("rowcache; fwd={}; detail=failed", forwarded(table));
            Err((error.into(), status))
        }
    }
}

/// Why Postgres was asked.
fn forwarded(table: &Served) -> &'static str {
    if table.table().store.is_coherent() { "uri-miss" } else { "bypass" }
}

fn respond(table: &Served, key: &AnyKey, answer: &Answer, headers: &HeaderMap) -> Response {
    let age = table.now().saturating_sub(answer.as_of);
    let mut response = match &answer.row {
        None => no_such_row(table, key).into_response(),
        Some(row) => {
            let etag = HeaderValue::from_maybe_shared(row.etag.clone());
            let is_known = headers.get_all(header::IF_NONE_MATCH).iter().any(|tags| names(tags.as_bytes(), &row.etag));
            let mut response = if is_known {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::NOT_MODIFIED;
                response
            } else {
                json(row.json.clone())
            };
            if let Ok(etag) = etag {
                response.headers_mut().insert(header::ETAG, etag);
            }
            response
        }
    };
    let headers = response.headers_mut();
    // Whoever stands in between may keep it, and must ask again each time: here, where that costs a look.
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    headers.insert(header::VARY, HeaderValue::from_static("rowcache-token, accept-encoding"));
    headers.insert(header::AGE, age.as_secs().into());
    let ttl = || {
        let left = bound(table).as_secs_f64() - age.as_secs_f64();
        #[expect(clippy::cast_possible_truncation, reason = "seconds")]
        let left = left.clamp(-1e12, 1e12).floor() as i64;
        left
    };
    match answer.way {
        Some(Way::Held) => {
            // The usual one, without a format.
            match HELD.get(usize::try_from(ttl()).unwrap_or(usize::MAX)) {
                Some(status) => {
                    headers.insert(CACHE_STATUS, HeaderValue::from_static(status));
                    response
                }
                None => with_status(response, &format!("rowcache; hit; ttl={}", ttl())),
            }
        }
        Some(Way::Stale) => with_status(response, &format!("rowcache; hit; ttl={}; detail=stale", ttl())),
        Some(Way::Rescued) => with_status(response, &format!("rowcache; hit; ttl={}; detail=stale-if-error", ttl())),
        Some(Way::Joined) => with_status(response, &format!("rowcache; fwd={}; collapsed", forwarded(table))),
        Some(Way::Loaded) => {
            let stored = if table.table().peek(key).is_known() { "; stored" } else { "" };
            with_status(response, &format!("rowcache; fwd={}{stored}", forwarded(table)))
        }
        None => with_status(response, "rowcache; fwd=request"),
    }
}

/// By how many seconds are left.
const HELD: [&str; 7] = [
    "rowcache; hit; ttl=0",
    "rowcache; hit; ttl=1",
    "rowcache; hit; ttl=2",
    "rowcache; hit; ttl=3",
    "rowcache; hit; ttl=4",
    "rowcache; hit; ttl=5",
    "rowcache; hit; ttl=6",
];

const CACHE_STATUS: header::HeaderName = header::HeaderName::from_static("cache-status");

fn with_status(mut response: Response, status: &str) -> Response {
    if let Ok(status) = HeaderValue::try_from(status) {
        response.headers_mut().insert(CACHE_STATUS, status);
    }
    response
}

fn json(body: Bytes) -> Response {
    let mut response = Response::new(Body::from(body));
    // For all that follow: growing means to insert them anew.
    response.headers_mut().reserve(10);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn without_conditions(mut headers: HeaderMap) -> HeaderMap {
    headers.remove(header::IF_NONE_MATCH);
    headers
}

/// Whether this is one of the tags of `If-None-Match`. Weak comparison: what is before the quotes does not count.
fn names(tags: &[u8], etag: &[u8]) -> bool {
    let opaque = |tag: &[u8]| tag.strip_prefix(b"W/").unwrap_or(tag).to_vec();
    let wanted = opaque(etag);
    tags.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).any(|tag| tag == b"*" || opaque(tag) == wanted)
}

/// What reads miss at worst while the node is coherent.
fn bound(table: &Served) -> Duration {
    table.table().shared().config.staleness_bound()
}

fn no_such_row(table: &Served, key: &AnyKey) -> Problem {
    Problem::not_found("no_such_row", format!("{} has no row {}", table.path(), table.show_key(key)))
}

/// What comes after `/v1/`, not decoded.
fn segments(uri: &Uri) -> impl Iterator<Item = &str> {
    uri.path().split('/').skip(2)
}

/// The table and the key that a path names.
pub(crate) fn row_of<'a>(app: &'a App, uri: &Uri) -> Result<(&'a Served, AnyKey), Problem> {
    row_in(app, segments(uri))
}

/// The table and the key that segments of a path begin with.
pub(crate) fn row_in<'a, 's>(
    app: &'a App,
    mut segments: impl Iterator<Item = &'s str>,
) -> Result<(&'a Served, AnyKey), Problem> {
    let table = app.table(segments.next().unwrap_or_default())?;
    let key = table.read_key(segments.next().unwrap_or_default()).map_err(|why| bad_key(table, &why))?;
    Ok((table, key))
}

pub(crate) fn bad_key(table: &Served, why: &str) -> Problem {
    let mut columns = String::new();
    for (n, (name, of)) in table.key().iter().enumerate() {
        let _ = write!(columns, "{}{name} {}", if n == 0 { "" } else { ", " }, of.postgres());
    }
    Problem::bad_request("bad_key", format!("the key of {} is ({columns}): {why}", table.path()))
}

/// The keys that a query names, not decoded but for `+`, which stands for a space there.
fn raw_keys(table: &Served, query: &str, max: usize) -> Result<Vec<String>, Problem> {
    let mut keys = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = value.replace('+', "%20");
        match name {
            "key" => keys.push(value),
            "keys" if table.key().len() > 1 => {
                let detail = format!(
                    "the key of {} has several columns: name each by itself, `?key=7,ada&key=8,bob`",
                    table.path()
                );
                return Err(Problem::bad_request("bad_key", detail));
            }
            // A comma that belongs to a key comes encoded, unless the client encodes all of them.
            "keys" => keys.extend(value.replace("%2C", ",").replace("%2c", ",").split(',').map(str::to_owned)),
            _ => {}
        }
        if keys.len() > max {
            return Err(Problem::bad_request(
                "too_many_keys",
                format!("at most {max} keys may be asked for at a time (--max-keys)"),
            ));
        }
    }
    if keys.is_empty() {
        return Err(Problem::bad_request("no_keys", "name the keys: `?keys=1,2,3`, or `?key=…&key=…`"));
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entity_tags_are_compared_weakly() {
        let etag = b"W/\"abc\"";
        for (tags, known) in [
            ("W/\"abc\"", true),
            ("\"abc\"", true),
            ("\"x\", W/\"abc\"", true),
            ("*", true),
            ("\"ab\"", false),
            ("", false),
            ("abc", false),
        ] {
            assert_eq!(names(tags.as_bytes(), etag), known, "{tags}");
        }
    }
}
