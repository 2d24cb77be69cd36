//! A service behind the layer: what becomes of each request.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::{Request, Response};
use tower_service::Service;
use tracing::Instrument;

use super::attempt::Attempt;
use super::body::{Body, BoxError, Read, read};
use super::fingerprint::fingerprint;
use super::guard::{Guard, OnStoreFailure};
use super::key::key_of;
use super::problem::Problem;
use super::stored::StoredResponse;
use super::work::work;
use crate::claim::{Claim, Completed, InProgress};
use crate::error::{Error, Result};
use crate::future::Lease;
use crate::key::Key;

static REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// The longest scope of a store.
const MAX_SCOPE: usize = 255;

/// A service that does each request under a key once. Made by [`IdempotencyLayer`](super::IdempotencyLayer).
#[derive(Clone)]
pub struct Idempotent<S> {
    inner: S,
    guard: Arc<Guard>,
}

impl<S> Idempotent<S> {
    pub(super) fn new(inner: S, guard: Guard) -> Self {
        Self { inner, guard: Arc::new(guard) }
    }
}

impl<S, B, R> Service<Request<B>> for Idempotent<S>
where
    S: Service<Request<Body<B>>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response<Body<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that was asked whether it is ready is the one to be called.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        Box::pin(answer(Arc::clone(&self.guard), ready, request))
    }
}

async fn answer<S, B, R>(guard: Arc<Guard>, mut service: S, request: Request<B>) -> Result<Response<Body<R>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    let options = &guard.options;
    let key = if options.methods.contains(request.method()) {
        match key_of(request.headers(), &options.key_header, options.key_limit) {
            Ok(None) if options.key_required => return Ok(guard.refuse(Problem::KeyMissing)),
            Ok(Some(key)) if !(options.key_form)(&key) => {
                return Ok(guard.refuse(Problem::KeyMalformed("It has not the form that this service asks for.")));
            }
            Ok(key) => key,
            Err(problem) => return Ok(guard.refuse(problem)),
        }
    } else {
        None
    };
    let Some(key) = key else {
        let response = service.call(request.map(Body::untouched)).await?;
        return Ok(response.map(Body::untouched));
    };
    let (parts, body) = request.into_parts();
    let scope = match &guard.scope {
        None => Vec::new(),
        Some(scope) => match scope(&parts) {
            // An empty one would be no scope, and shared.
            Some(scope) if (1..=MAX_SCOPE).contains(&scope.len()) => scope,
            _ => return Ok(guard.refuse(Problem::ScopeMissing)),
        },
    };
    let body = match read(body, options.body_limit).await {
        Read::Whole(body) => body,
        Read::TooLarge(_) => return Ok(guard.refuse(Problem::BodyTooLarge { limit: options.body_limit })),
        Read::Broken(_) => return Ok(guard.refuse(Problem::BodyBroken)),
    };
    let asked = Key::from(&key).scope(&scope).fingerprint(fingerprint(&parts, &body));
    let claim = guard.store.claim_wait(asked, options.wait).await;
    let mut request = Request::from_parts(parts, Body::whole(body));
    match claim {
        Ok(Claim::Acquired(lease)) => {
            request.extensions_mut().insert(attempt(key, &lease));
            in_its_own_task(Arc::clone(&guard), service, request, lease).await
        }
        Ok(Claim::Completed(first)) => Ok(replay(&guard, &first)),
        Ok(Claim::InProgress(other)) => Ok(guard.refuse(outstanding(&guard, other))),
        Err(Error::PayloadMismatch { .. }) => Ok(guard.refuse(Problem::KeyReused)),
        // The store's own limit is for key and scope together.
        Err(Error::KeyTooLong { limit, .. }) => {
            Ok(guard.refuse(Problem::KeyTooLong { limit: limit.saturating_sub(scope.len()) }))
        }
        Err(error) => match options.on_store_failure {
            OnStoreFailure::FailClosed => {
                tracing::error!(%error, "a request was not served: its key could not be claimed");
                Ok(guard.refuse(Problem::StoreFailed { retryable: error.retryable() }))
            }
            OnStoreFailure::FailOpen => {
                tracing::error!(%error, "a request is served without protection: its key could not be claimed");
                guard.count_fail_open();
                let response = service.call(request).await?;
                Ok(response.map(Body::untouched))
            }
        },
    }
}

fn attempt(key: String, lease: &Lease) -> Attempt {
    let (token, number, prior) = (lease.token(), lease.attempt(), lease.prior());
    Attempt { key: key.into(), token, number, prior, tx: Arc::default() }
}

/// Works in a task that goes on when the client hangs up.
async fn in_its_own_task<S, B, R>(
    guard: Arc<Guard>,
    service: S,
    request: Request<Body<B>>,
    lease: Lease,
) -> Result<Response<Body<R>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    guard.counters.executed.add(1);
    let begun = guard.at_work.begin();
    let shared = Arc::clone(&guard);
    let task = async move {
        let _begun = begun;
        work(&shared, service, request, lease).await
    };
    match tokio::spawn(task.in_current_span()).await {
        Ok(answer) => answer,
        Err(_panic) => {
            tracing::error!("a handler panicked: its request counts as interrupted work");
            Ok(guard.refuse(Problem::HandlerFailed))
        }
    }
}

fn outstanding(guard: &Guard, other: InProgress) -> Problem {
    match other.retry_after {
        // What is left of the lease is how long it may take at most, and most work is done much earlier.
        Some(remaining) => Problem::Outstanding { retry_after: remaining.min(guard.options.retry_after) },
        None => Problem::Held,
    }
}

/// What the first request was answered.
fn replay<R>(guard: &Guard, first: &Completed) -> Response<Body<R>> {
    let answer = match first.result().map(StoredResponse::decode) {
        Some(Ok(answer)) => answer,
        Some(Err(error)) => {
            tracing::error!(%error, "a stored answer cannot be read");
            return guard.refuse(Problem::AnswerUnreadable);
        }
        None => return guard.refuse(Problem::AnswerNotKept { status: None }),
    };
    let (status, headers, body) = answer.into_parts();
    let Some(body) = body else {
        let mut response = guard.refuse(Problem::AnswerNotKept { status: Some(status) });
        response.headers_mut().extend(headers);
        return replayed(response);
    };
    guard.counters.replayed.add(1);
    let mut response = Response::new(Body::whole(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    replayed(response)
}

fn replayed<R>(mut response: Response<Body<R>>) -> Response<Body<R>> {
    response.headers_mut().insert(&REPLAYED, HeaderValue::from_static("true"));
    response
}

impl<S: fmt::Debug> fmt::Debug for Idempotent<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotent").field("inner", &self.inner).finish_non_exhaustive()
    }
}
