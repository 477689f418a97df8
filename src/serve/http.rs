//! The routes, what all of them go through, and the sockets.

use std::{
    any::Any,
    io::{self, Write as _},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Router, ServiceExt,
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::get,
};
use axum_server::{
    Handle,
    accept::{Accept, NoDelayAcceptor},
    tls_rustls::{RustlsAcceptor, RustlsConfig},
};
use hyper_util::rt::TokioTimer;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tower::ServiceBuilder;
use tower_http::{
    catch_panic::CatchPanicLayer,
    compression::{
        CompressionLayer,
        predicate::{NotForContentType, Predicate as _, SizeAbove},
    },
    request_id::{MakeRequestId, PropagateRequestIdLayer, RequestId, SetRequestIdLayer},
};
use tracing::Instrument as _;
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};

use super::{app::App, events, operate, page, problem::Problem, rows, shortcut::Shortcut, telemetry};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "rowcache",
        description = "Postgres rows from the memory of a cache that is never silently stale. Each read says by `Cache-Control` how fresh it must be, and each answer by `Cache-Status` how it came about.",
    ),
    components(schemas(Problem, rows::RowList)),
    modifiers(&Bearer),
    tags(
        (name = "rows", description = "Rows, by their keys"),
        (name = "node", description = "This node, and the others of its database"),
        (name = "administration", description = "What needs the token for administration"),
    ),
)]
struct Document;

/// Says how tokens are sent.
struct Bearer;

impl utoipa::Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
        document.security =
            Some(vec![SecurityRequirement::new::<_, [&str; 0], &str>("token", []), SecurityRequirement::default()]);
    }
}

/// The routes, each of which the document has, and the document.
fn routes() -> (Router<Arc<App>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(rows::row, rows::change))
        .routes(routes!(rows::rows))
        .routes(routes!(events::events))
        .routes(routes!(operate::explain))
        .routes(routes!(operate::nodes))
        .routes(routes!(operate::invalidate))
        .routes(routes!(operate::clear))
        .routes(routes!(operate::status))
        .routes(routes!(operate::alive))
        .routes(routes!(operate::ready))
        .routes(routes!(operate::metrics))
        .routes(routes!(page::page))
        .split_for_parts()
}

pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Bodies below that are not worth the time that compressing them takes.
pub(crate) const COMPRESSED_ABOVE: u64 = 1024;

/// What answers requests.
pub(crate) fn service(app: &Arc<App>) -> Shortcut {
    let numbers = Numbers::of(app);
    Shortcut::new(app, numbers.clone(), router(app, numbers))
}

fn router(app: &Arc<App>, numbers: Numbers) -> Router {
    let (router, document) = routes();
    let document: bytes::Bytes = document.to_json().unwrap_or_default().into();
    let document = get(move || {
        let body = document.clone();
        async move { ([(header::CONTENT_TYPE, "application/json")], body) }
    });
    let worth = SizeAbove::new(COMPRESSED_ABOVE).and(NotForContentType::new("text/event-stream"));
    router
        .route("/openapi.json", document)
        .fallback(|| async {
            Problem::not_found("no_such_path", "there is nothing here; /openapi.json says what there is")
        })
        .method_not_allowed_fallback(|| async {
            Problem::new(StatusCode::METHOD_NOT_ALLOWED, "no_such_method", "this path has other methods; see `Allow`")
        })
        .layer(
            // One layer to the router, which boxes each.
            ServiceBuilder::new()
                .layer(SetRequestIdLayer::new(REQUEST_ID, numbers))
                .layer(PropagateRequestIdLayer::new(REQUEST_ID))
                .layer(CatchPanicLayer::custom(panicked))
                .layer(CompressionLayer::new().compress_when(worth))
                .layer(from_fn_with_state(Arc::clone(app), around)),
        )
        .with_state(Arc::clone(app))
}

/// What each request goes through: who asks, how long it may take, what it counts as.
async fn around(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    app.http.in_flight.fetch_add(1, Ordering::Relaxed);
    let in_flight = InFlight(&app);
    let route = request.extensions().get::<MatchedPath>().cloned();
    let route = route.as_ref().map_or("(none)", MatchedPath::as_str);
    let id = request.headers().get(&REQUEST_ID).cloned();
    let allowed = app.guard.check(request.method(), request.uri(), request.headers());
    let span = tracing::info_span!(
        "request",
        otel.name = %format_args!("{} {route}", request.method()),
        otel.kind = "server",
        http.request.method = %request.method(),
        http.route = route,
        http.response.status_code = tracing::field::Empty,
        request_id = id.as_ref().and_then(|id| id.to_str().ok()),
    );
    if !span.is_disabled() {
        telemetry::follow(&span, request.headers());
    }
    let response = if let Err(problem) = allowed {
        problem.into_response()
    } else {
        let answering = next.run(request).instrument(span.clone());
        timeout(app.request_timeout, answering).await.unwrap_or_else(|_| {
            let detail = format!("it took longer than {:?} (--request-timeout)", app.request_timeout);
            Problem::unavailable("timeout", detail).into_response()
        })
    };
    drop(in_flight);
    let status = response.status().as_u16();
    span.record("http.response.status_code", status);
    app.http.count(route, status, began.elapsed());
    // Not what is no news: that the node starts, stops, or is not coherent.
    if status >= 500 && app.try_running().is_some() && route != "/readyz" {
        tracing::debug!(route, status, request_id = id.as_ref().and_then(|id| id.to_str().ok()), "a request failed");
    }
    response
}

/// Whether somebody collects what is told of requests.
pub(crate) fn is_traced() -> bool {
    tracing::span_enabled!(tracing::Level::INFO)
}

/// Names requests that have no name yet: the run of the service, and a number.
#[derive(Clone)]
pub(crate) struct Numbers {
    run: Arc<str>,
    next: Arc<AtomicU64>,
}

impl Numbers {
    fn of(app: &App) -> Self {
        Self { run: app.id.simple().to_string()[..8].into(), next: Arc::default() }
    }

    pub(crate) fn next(&self) -> Option<HeaderValue> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // Room for any number, without a string.
        let mut text = [0; 32];
        let mut rest = &mut text[..];
        write!(rest, "{}-{number}", self.run).ok()?;
        let left = rest.len();
        HeaderValue::from_bytes(&text[..text.len() - left]).ok()
    }
}

impl MakeRequestId for Numbers {
    fn make_request_id<B>(&mut self, _request: &axum::http::Request<B>) -> Option<RequestId> {
        self.next().map(RequestId::new)
    }
}

/// A request that is being answered, also if whoever asked goes away.
struct InFlight<'a>(&'a App);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.http.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as it is called")]
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    tracing::error!("a request panicked: {}", crate::postgres::rows::panic_message(&*panic));
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "a mistake of the service; its log says more")
        .into_response()
}

/// How sockets are served.
pub(crate) struct Sockets {
    pub(crate) max_connections: usize,
    pub(crate) tls: Option<RustlsConfig>,
}

/// A connection that sends no whole request head within this time is closed.
const HEAD_WITHIN: Duration = Duration::from_secs(10);

/// Bytes of a request's head.
const HEAD_MAX: u16 = 32 << 10;

/// Requests at the same time on one connection of HTTP/2.
const STREAMS_MAX: u32 = 250;

impl Sockets {
    /// Serves what arrives at a socket, until the handle is told to stop.
    pub(crate) async fn serve(
        &self,
        listener: TcpListener,
        service: Shortcut,
        handle: Handle<SocketAddr>,
    ) -> io::Result<()> {
        listener.set_nonblocking(true)?;
        let limit =
            Limited { inner: NoDelayAcceptor::new(), connections: Arc::new(Semaphore::new(self.max_connections)) };
        let service = ServiceExt::<Request>::into_make_service(service);
        let plain = axum_server::from_tcp(listener)?.handle(handle);
        match &self.tls {
            None => {
                let mut server = plain.acceptor(limit);
                bound(server.http_builder());
                server.serve(service).await
            }
            Some(tls) => {
                let mut server = plain.acceptor(RustlsAcceptor::new(tls.clone()).acceptor(limit));
                bound(server.http_builder());
                server.serve(service).await
            }
        }
    }
}

fn bound<E>(builder: &mut hyper_util::server::conn::auto::Builder<E>) {
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(HEAD_MAX.into());
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_MAX.into())
        .keep_alive_interval(HEAD_WITHIN);
}

/// The certificate and its key.
pub(crate) async fn tls((cert, key): &(PathBuf, PathBuf)) -> anyhow::Result<RustlsConfig> {
    use anyhow::Context as _;
    let read = RustlsConfig::from_pem_file(cert, key).await;
    read.with_context(|| format!("cannot use the certificate {} with the key {}", cert.display(), key.display()))
}

/// Bounds how many connections there are: further ones wait to be accepted.
#[derive(Clone)]
struct Limited<A> {
    inner: A,
    connections: Arc<Semaphore>,
}

impl<I, S, A> Accept<I, S> for Limited<A>
where
    A: Accept<I, S> + Clone + Send + 'static,
    A::Future: Send,
    I: Send + 'static,
    S: Send + 'static,
{
    type Stream = Counted<A::Stream>;
    type Service = A::Service;
    type Future = Pin<Box<dyn Future<Output = io::Result<(Self::Stream, Self::Service)>> + Send>>;

    fn accept(&self, stream: I, service: S) -> Self::Future {
        let Self { inner, connections } = self.clone();
        Box::pin(async move {
            let permit = connections.acquire_owned().await.map_err(io::Error::other)?;
            let (stream, service) = inner.accept(stream, service).await?;
            Ok((Counted { stream, _permit: permit }, service))
        })
    }
}

/// A connection that counts for as long as it is open.
struct Counted<S> {
    stream: S,
    _permit: OwnedSemaphorePermit,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::metrics::ROUTES;

    #[test]
    fn each_route_is_in_the_document_and_counted_by_its_name() {
        let (_, document) = routes();
        let mut paths: Vec<&str> = document.paths.paths.keys().map(String::as_str).collect();
        paths.push("/openapi.json");
        paths.push("(none)");
        paths.sort_unstable();
        let mut counted = ROUTES.to_vec();
        counted.sort_unstable();
        assert_eq!(counted, paths);
    }
}
