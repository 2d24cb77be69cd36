//! A service behind the layer: what becomes of each request.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::request::Parts;
use http::{Request, Response};
use tokio::sync::oneshot;
use tower_service::Service;
use tracing::Instrument;

use super::attempt::Attempt;
use super::body::{Body, BoxError, Read, read};
use super::guard::{Guard, KeyFrom, OnStoreFailure, Options};
use super::key::{checked, key_of};
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

/// A request, as the layer sees it before it asks the store.
enum Asked<B> {
    /// It passes as it is.
    Unguarded(Request<Body<B>>),
    Guarded {
        parts: Parts,
        body: Bytes,
        key: String,
        scope: Vec<u8>,
    },
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
    let (parts, body, key, scope) = match asked(&guard, request).await {
        Ok(Asked::Guarded { parts, body, key, scope }) => (parts, body, key, scope),
        Ok(Asked::Unguarded(request)) => return Ok(service.call(request).await?.map(Body::untouched)),
        Err(problem) => return Ok(guard.refuse(problem)),
    };
    let options = &guard.options;
    let fingerprint = (options.fingerprint)(&parts, &body);
    let asked = Key::from(&key).scope(&scope).fingerprint(fingerprint);
    match guard.store.claim_wait(asked, options.wait).await {
        Ok(Claim::Acquired(lease)) => {
            let mut request = Request::from_parts(parts, Body::whole(body));
            request.extensions_mut().insert(Attempt::new(key, &lease));
            in_its_own_task(Arc::clone(&guard), service, request, lease).await
        }
        Ok(Claim::Completed(first)) => Ok(replay(&guard, &first, &parts, &body)),
        Ok(Claim::InProgress(other)) => Ok(guard.refuse(outstanding(&guard, other))),
        Err(Error::PayloadMismatch { .. }) => Ok(guard.refuse(Problem::KeyReused)),
        // The store's own limit is for key and scope together.
        Err(Error::KeyTooLong { limit, .. }) => {
            Ok(guard.refuse(Problem::KeyTooLong { limit: limit.saturating_sub(scope.len()) }))
        }
        Err(error) => match options.on_store_failure {
            OnStoreFailure::FailClosed => {
                tracing::error!(%error, "claim failed, request refused (fail-closed)");
                Ok(guard.refuse(Problem::StoreFailed { retryable: error.retryable() }))
            }
            OnStoreFailure::FailOpen => {
                tracing::error!(%error, "claim failed, request served without deduplication (fail-open)");
                guard.count_fail_open();
                let response = service.call(Request::from_parts(parts, Body::whole(body))).await?;
                Ok(response.map(Body::untouched))
            }
        },
    }
}

/// Finds out whether a request is guarded, under which key, and reads the body of one that is.
async fn asked<B>(guard: &Guard, request: Request<B>) -> Result<Asked<B>, Problem>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let options = &guard.options;
    if !options.methods.contains(request.method()) {
        return Ok(Asked::Unguarded(request.map(Body::untouched)));
    }
    let (parts, body) = request.into_parts();
    let without_key = |request| match options.key_required {
        true => Err(Problem::KeyMissing),
        false => Ok(Asked::Unguarded(request)),
    };
    match &options.key_from {
        // Nothing is read of a request that is refused for its headers.
        KeyFrom::Header(name) => {
            let Some(key) = key_of(&parts.headers, name)? else {
                return without_key(Request::from_parts(parts, Body::untouched(body)));
            };
            let (key, scope) = (checked(key, options)?, scope_of(guard, &parts)?);
            let body = whole(options, body).await?;
            Ok(Asked::Guarded { parts, body, key, scope })
        }
        KeyFrom::Request(hook) => {
            let body = whole(options, body).await?;
            let Some(key) = hook(&parts, &body) else {
                return without_key(Request::from_parts(parts, Body::whole(body)));
            };
            let (key, scope) = (checked(key, options)?, scope_of(guard, &parts)?);
            Ok(Asked::Guarded { parts, body, key, scope })
        }
    }
}

fn scope_of(guard: &Guard, parts: &Parts) -> Result<Vec<u8>, Problem> {
    match &guard.scope {
        None => Ok(Vec::new()),
        // An empty one would be no scope, and shared.
        Some(scope) => scope(parts).filter(|scope| (1..=MAX_SCOPE).contains(&scope.len())).ok_or(Problem::ScopeMissing),
    }
}

async fn whole<B>(options: &Options, body: B) -> Result<Bytes, Problem>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    match read(body, options.body_limit).await {
        Read::Whole(body) => Ok(body),
        Read::TooLarge(_) => Err(Problem::BodyTooLarge { limit: options.body_limit }),
        Read::Broken(_) => Err(Problem::BodyBroken),
    }
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
    let (head, early) = oneshot::channel();
    let task = async move {
        let _begun = begun;
        work(&shared, service, request, lease, head).await
    };
    let task = tokio::spawn(task.in_current_span());
    if let Ok(response) = early.await {
        return Ok(response);
    }
    // No head came early, and the task gives the answer.
    match task.await {
        Ok(answer) => Ok(answer?.unwrap_or_else(|| guard.refuse(Problem::HandlerFailed))),
        Err(_panic) => {
            tracing::error!("the handler panicked: outcome unknown");
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
fn replay<R>(guard: &Guard, first: &Completed, parts: &Parts, request_body: &Bytes) -> Response<Body<R>> {
    let answer = match first.result().map(StoredResponse::decode) {
        Some(Ok(answer)) => answer,
        Some(Err(error)) => {
            tracing::error!(%error, "failed to decode a stored answer");
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
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    if let Some(adapt) = &guard.options.replay {
        response = adapt(parts, request_body, response);
    }
    replayed(response.map(Body::whole))
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
