//! The usual request: a row that is held, by GET, with nothing special asked for. It is answered before the router, whose layers would
//! cost several times what the row does. Whatever is not as usual takes the long way, which knows all there is.
//!
//! The answer is the same either way, and so is what is counted.

use std::{
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{Router, http::Request, response::Response, routing::future::RouteFuture};
use futures_util::future::{Either, Ready, ready};
use tower::Service;

use super::{
    app::App,
    http::{self, Numbers, REQUEST_ID},
    rows,
};

/// The router, and what comes before it.
#[derive(Clone)]
pub(crate) struct Shortcut {
    app: Arc<App>,
    numbers: Numbers,
    router: Router,
}

impl Shortcut {
    pub(crate) fn new(app: &Arc<App>, numbers: Numbers, router: Router) -> Self {
        Self { app: Arc::clone(app), numbers, router }
    }

    /// The answer to a usual request.
    fn answer<B>(&self, request: &Request<B>) -> Option<Response> {
        let began = Instant::now();
        // Traced ones are told from begin to end.
        if http::is_traced() {
            return None;
        }
        let mut response = rows::held(&self.app, request)?;
        let id = request.headers().get(&REQUEST_ID).cloned().or_else(|| self.numbers.next())?;
        response.headers_mut().insert(REQUEST_ID, id);
        self.app.http.count(rows::ROUTE, response.status().as_u16(), began.elapsed());
        Some(response)
    }
}

impl<B> Service<Request<B>> for Shortcut
where
    Router: Service<Request<B>, Response = Response, Error = Infallible, Future = RouteFuture<Infallible>>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Either<Ready<Result<Response, Infallible>>, RouteFuture<Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.router.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // What panics here panics once more on the long way, which answers for it.
        match catch_unwind(AssertUnwindSafe(|| self.answer(&request))) {
            Ok(Some(response)) => Either::Left(ready(Ok(response))),
            _ => Either::Right(self.router.call(request)),
        }
    }
}
