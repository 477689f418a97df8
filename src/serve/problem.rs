//! Errors, as `application/problem+json` (RFC 9457), each with a code that does not change.

use axum::{
    body::Body,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::error::{Error, with_causes};

/// What went wrong.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Problem {
    /// `urn:rowcache:problem:` and the code.
    #[serde(rename = "type")]
    #[schema(example = "urn:rowcache:problem:no_such_row")]
    kind: String,
    /// The meaning of the status.
    title: &'static str,
    /// The status of the response.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// Stable: what programs may look at.
    code: &'static str,
    /// What happened, and the cure.
    detail: String,
    /// Seconds after which another try may succeed.
    #[serde(skip)]
    retry_after: Option<u32>,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("urn:rowcache:problem:{code}"),
            title: status.canonical_reason().unwrap_or("Error"),
            status: status.as_u16(),
            code,
            detail: detail.into(),
            retry_after: None,
        }
    }

    pub(crate) fn bad_request(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, detail)
    }

    pub(crate) fn not_found(code: &'static str, detail: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, detail)
    }

    /// It cannot be answered now; later perhaps.
    pub(crate) fn unavailable(code: &'static str, detail: impl Into<String>) -> Self {
        Self { retry_after: Some(RETRY_AFTER), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, code, detail) }
    }

    /// What the library could not do.
    pub(crate) fn of(error: &Error) -> Self {
        let detail = error.to_string();
        if error.is_throttled() {
            let status = StatusCode::TOO_MANY_REQUESTS;
            return Self { retry_after: Some(RETRY_AFTER), ..Self::new(status, "too_many_unknown_keys", detail) };
        }
        if error.is_token() {
            return Self::bad_request("bad_token", detail);
        }
        if error.is_other_incarnation() {
            return Self::new(StatusCode::CONFLICT, "other_incarnation", detail);
        }
        if error.is_timeout() {
            return Self::unavailable("timeout", detail);
        }
        if error.is_unavailable()
            || error.is_closed()
            || error.is_pooler()
            || error.is_refused()
            || error.is_not_tracked()
        {
            return Self::unavailable("unavailable", detail);
        }
        // A row or a table that is not as it was: for whoever runs this, not for who asks.
        tracing::warn!("a request failed: {}", with_causes(error));
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", detail)
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    #[cfg(test)]
    pub(crate) fn status(&self) -> u16 {
        self.status
    }
}

/// Long enough that a crowd does not come back at once, short enough for a gap, which takes a second or two.
const RETRY_AFTER: u32 = 1;

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"rowcache\""));
        }
        response
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::of(&error)
    }
}
