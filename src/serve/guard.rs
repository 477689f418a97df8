//! Who may do what.

use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{options::Tokens, problem::Problem};

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Right {
    None,
    Read,
    Admin,
}

/// Knows the tokens by their hashes: comparing two takes the same time whatever they are, and however long.
pub(crate) struct Guard {
    read: Option<[u8; 32]>,
    admin: Option<[u8; 32]>,
    /// It was said that no tokens are needed, whoever reaches it.
    is_insecure: bool,
}

impl Guard {
    pub(crate) fn new(tokens: &Tokens, is_insecure: bool) -> Self {
        let hashed = |token: &Option<String>| token.as_deref().map(|token| hash(token.as_bytes()));
        Self { read: hashed(&tokens.read), admin: hashed(&tokens.admin), is_insecure }
    }

    /// Refuses a request that shows no token for what it wants. Without a token for it, anybody on this machine may, but not the pages of
    /// strangers that his browser shows.
    pub(crate) fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
        let needed = needed(method, uri.path());
        let is_free = match needed {
            Right::None => true,
            Right::Read => self.read.is_none(),
            Right::Admin => self.admin.is_none(),
        };
        if is_free {
            return if needed == Right::None { Ok(()) } else { self.check_origin(uri, headers) };
        }
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| {
            let value = value.as_bytes();
            let (scheme, token) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then(|| hash(token))
        });
        let Some(shown) = shown else {
            return Err(Problem::new(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "send a token: `Authorization: Bearer …`",
            ));
        };
        let is = |known: &Option<[u8; 32]>| known.is_some_and(|known| known.ct_eq(&shown).into());
        // Both are compared, whatever comes of the first.
        let (is_reader, is_admin) = (is(&self.read), is(&self.admin));
        match needed {
            _ if is_admin => Ok(()),
            Right::Read if is_reader => Ok(()),
            Right::Admin if is_reader => {
                Err(Problem::new(StatusCode::FORBIDDEN, "forbidden", "this needs the token for administration"))
            }
            _ => Err(Problem::new(StatusCode::UNAUTHORIZED, "unauthorized", "the token is not known here")),
        }
    }
}

impl Guard {
    /// Refuses what a browser sends because another site told it to: there the person has rights that the site has not.
    ///
    /// 1. A page of another site asks for us by our address: its `Origin` is not our `Host`.
    /// 2. A name of another site is made to lead to this machine (DNS rebinding): `Origin`, if there is one, is `Host` then, and
    ///    neither is a name of this machine.
    fn check_origin(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let refused = |what: &str| Err(Problem::new(StatusCode::FORBIDDEN, "cross_origin", what));
        // With HTTP/2 it is part of the URI.
        let host = text(header::HOST).or_else(|| uri.authority().map(axum::http::uri::Authority::as_str));
        if let Some(origin) = text(header::ORIGIN) {
            let origin = origin.split_once("://").map_or(origin, |(_, rest)| rest);
            if host != Some(origin) {
                return refused("a page of another site may not ask for this without a token");
            }
        }
        match host {
            Some(host) if !self.is_insecure && !is_here(host) => {
                refused("without tokens this service answers only to `localhost` and to addresses")
            }
            _ => Ok(()),
        }
    }
}

/// Whether this is an address, or the name that each machine has for itself.
fn is_here(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
}

fn hash(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

fn needed(method: &Method, path: &str) -> Right {
    match path {
        "/" | "/healthz" | "/readyz" | "/openapi.json" => Right::None,
        _ if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) => Right::Read,
        _ => Right::Admin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(guard: &Guard, method: &Method, path: &'static str, token: Option<&str>) -> u16 {
        let mut headers = HeaderMap::new();
        if let Some(token) = token {
            headers.insert(header::AUTHORIZATION, format!("Bearer {token}").parse().expect("a header"));
        }
        guard.check(method, &Uri::from_static(path), &headers).map_or_else(|problem| problem.status(), |()| 200)
    }

    #[test]
    fn each_token_opens_what_it_is_for() {
        let guard = Guard::new(&Tokens { read: Some("reader-1".into()), admin: Some("admin-22".into()) }, false);
        let row = "/v1/public.users/1";
        for (method, path, token, status) in [
            (Method::GET, "/healthz", None, 200),
            (Method::GET, "/", None, 200),
            (Method::GET, row, None, 401),
            (Method::GET, row, Some("reader-2"), 401),
            (Method::GET, row, Some("reader-"), 401),
            (Method::GET, row, Some(""), 401),
            (Method::GET, row, Some("reader-1"), 200),
            (Method::GET, row, Some("admin-22"), 200),
            (Method::PATCH, row, Some("reader-1"), 403),
            (Method::PATCH, row, Some("admin-22"), 200),
            (Method::POST, "/healthz/", None, 401),
            (Method::GET, "/metrics", None, 401),
        ] {
            assert_eq!(check(&guard, &method, path, token), status, "{method} {path} {token:?}");
        }
    }

    #[test]
    fn what_has_no_token_is_free() {
        let guard = Guard::new(&Tokens { read: None, admin: Some("admin-22".into()) }, false);
        assert_eq!(check(&guard, &Method::GET, "/v1/t/1", None), 200);
        assert_eq!(check(&guard, &Method::POST, "/v1/t/clear", None), 401);
        let open = Guard::new(&Tokens::default(), false);
        assert_eq!(check(&open, &Method::POST, "/v1/t/clear", None), 200);
    }

    #[test]
    fn what_is_free_is_not_free_for_pages_of_other_sites() {
        let status = |is_insecure, host: &str, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().expect("a header"));
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().expect("a header"));
            }
            let guard = Guard::new(&Tokens::default(), is_insecure);
            guard
                .check(&Method::POST, &Uri::from_static("/v1/t/clear"), &headers)
                .map_or_else(|problem| problem.status(), |()| 200)
        };
        for (host, origin, expected) in [
            ("localhost:8080", None, 200),
            ("127.0.0.1:8080", Some("http://127.0.0.1:8080"), 200),
            ("[::1]:8080", None, 200),
            ("localhost:8080", Some("http://localhost:8081"), 403),
            ("localhost:8080", Some("https://evil.example"), 403),
            ("localhost:8080", Some("null"), 403),
            ("evil.example:8080", Some("http://evil.example:8080"), 403),
            ("evil.example", None, 403),
        ] {
            assert_eq!(status(false, host, origin), expected, "{host} {origin:?}");
        }
        assert_eq!(status(true, "cache.internal", None), 200);
        assert_eq!(status(true, "cache.internal", Some("https://evil.example")), 403);
    }
}
