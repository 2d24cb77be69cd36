//! The service of the layer: claims the key of a request, then runs the handler, replays a response or rejects.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::request::Parts;
use http::{Request, Response};
use onlyonce_core::{Claim, Completed, EngineLease, Error, InProgress, Key, KeyError, MAX_SCOPE, OnStoreFailure};
use tokio::sync::oneshot;
use tower_service::Service;
use tracing::Instrument;

use crate::attempt::Attempt;
use crate::body::{Body, BoxError, Buffered, buffer};
use crate::context::{KeySource, LayerContext, Options};
use crate::event::Event;
use crate::execute::execute;
use crate::key::{key_in_header, validated};
use crate::problem::Problem;
use crate::stored::StoredResponse;

static REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// A service that runs each request with an idempotency key once. Created by
/// [`IdempotencyLayer`](crate::IdempotencyLayer).
#[derive(Clone)]
pub struct Idempotent<S> {
    inner: S,
    context: Arc<LayerContext>,
}

impl<S> Idempotent<S> {
    pub(crate) fn new(inner: S, context: LayerContext) -> Self {
        Self { inner, context: Arc::new(context) }
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
        // Only the instance that `poll_ready` was called on may be called; its clone may not be ready.
        let clone = self.inner.clone();
        let ready = std::mem::replace(&mut self.inner, clone);
        Box::pin(respond(Arc::clone(&self.context), ready, request))
    }
}

/// A request before its key is claimed.
enum Admission<B> {
    Unguarded(Request<Body<B>>),
    Guarded { parts: Parts, body: Bytes, key: String, scope: Vec<u8> },
}

async fn respond<S, B, R>(
    context: Arc<LayerContext>,
    mut service: S,
    request: Request<B>,
) -> Result<Response<Body<R>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    let (parts, body, key, scope) = match admit(&context, request).await {
        Ok(Admission::Guarded { parts, body, key, scope }) => (parts, body, key, scope),
        Ok(Admission::Unguarded(request)) => return Ok(service.call(request).await?.map(Body::unread)),
        Err(problem) => return Ok(context.reject(problem)),
    };
    let options = &context.options;
    let fingerprint = (options.fingerprint)(&parts, &body);
    let store_key = Key::from(&key).scope(&scope).fingerprint(fingerprint);
    match EngineLease::claim(&context.engine, store_key.into_owned(), options.wait).await {
        Ok(Claim::Acquired(lease)) => {
            let mut request = Request::from_parts(parts, Body::full(body));
            request.extensions_mut().insert(Attempt::new(key, lease.attempt()));
            execute_in_task(Arc::clone(&context), service, request, lease).await
        }
        Ok(Claim::Completed(first)) => Ok(replay(&context, &first, &parts, &body)),
        Ok(Claim::InProgress(other)) => Ok(context.reject(in_progress(&context, other))),
        Err(Error::PayloadMismatch { .. }) => Ok(context.reject(Problem::KeyReused)),
        // The store's limit applies to key and scope together.
        Err(Error::Key(KeyError::TooLong { limit, .. })) => {
            Ok(context.reject(Problem::KeyTooLong { limit: limit.saturating_sub(scope.len()) }))
        }
        Err(error) => match options.on_store_failure {
            OnStoreFailure::FailClosed => {
                tracing::error!(error = error.chain(), "claim failed, request rejected (fail-closed)");
                Ok(context.reject(Problem::StoreUnavailable { retryable: error.is_retryable() }))
            }
            OnStoreFailure::FailOpen => {
                tracing::error!(
                    error = error.chain(),
                    "claim failed, request served without deduplication (fail-open)"
                );
                context.count_fail_open();
                let response = service.call(Request::from_parts(parts, Body::full(body))).await?;
                Ok(response.map(Body::unread))
            }
        },
    }
}

/// Determines whether a request is guarded. Reads key, scope and body of a guarded one.
async fn admit<B>(context: &LayerContext, request: Request<B>) -> Result<Admission<B>, Problem>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let options = &context.options;
    if !options.methods.contains(request.method()) {
        return Ok(Admission::Unguarded(request.map(Body::unread)));
    }
    let (parts, body) = request.into_parts();
    let without_key = |request| match options.key_required {
        true => Err(Problem::KeyMissing),
        false => Ok(Admission::Unguarded(request)),
    };
    match &options.key_source {
        // Reads the body last: a request that its headers disqualify costs no memory.
        KeySource::Header(name) => {
            let Some(key) = key_in_header(&parts.headers, name)? else {
                return without_key(Request::from_parts(parts, Body::unread(body)));
            };
            let (key, scope) = (validated(key, options)?, scope_of(context, &parts)?);
            let body = buffered(options, body).await?;
            Ok(Admission::Guarded { parts, body, key, scope })
        }
        KeySource::Hook(hook) => {
            let body = buffered(options, body).await?;
            let Some(key) = hook(&parts, &body) else {
                return without_key(Request::from_parts(parts, Body::full(body)));
            };
            let (key, scope) = (validated(key, options)?, scope_of(context, &parts)?);
            Ok(Admission::Guarded { parts, body, key, scope })
        }
    }
}

fn scope_of(context: &LayerContext, parts: &Parts) -> Result<Vec<u8>, Problem> {
    match &context.scope {
        None => Ok(Vec::new()),
        // An empty scope would equal the shared scope.
        Some(scope) => scope(parts).filter(|scope| (1..=MAX_SCOPE).contains(&scope.len())).ok_or(Problem::ScopeMissing),
    }
}

async fn buffered<B>(options: &Options, body: B) -> Result<Bytes, Problem>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    match buffer(body, options.body_limit).await {
        Buffered::Complete(body) => Ok(body),
        Buffered::TooLarge(_) => Err(Problem::BodyTooLarge { limit: options.body_limit }),
        Buffered::Failed(_) => Err(Problem::BodyIncomplete),
    }
}

/// Runs the handler in a task that continues after the client has disconnected.
async fn execute_in_task<S, B, R>(
    context: Arc<LayerContext>,
    service: S,
    request: Request<Body<B>>,
    lease: EngineLease,
) -> Result<Response<Body<R>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>> + Send + 'static,
    S::Future: Send,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    context.counters.count(Event::Executed);
    let running = context.running.enter();
    let shared = Arc::clone(&context);
    let (head_sender, head) = oneshot::channel();
    let task = async move {
        let _running = running;
        execute(&shared, service, request, lease, head_sender).await
    };
    let task = tokio::spawn(task.in_current_span());
    if let Ok(response) = head.await {
        return Ok(response);
    }
    // The response is not streamed: the task returns it.
    match task.await {
        Ok(response) => Ok(response?.unwrap_or_else(|| context.reject(Problem::HandlerFailed))),
        Err(_panic) => {
            tracing::error!("handler panicked: outcome unknown");
            Ok(context.reject(Problem::HandlerFailed))
        }
    }
}

fn in_progress(context: &LayerContext, other: InProgress) -> Problem {
    match other.retry_after {
        // Most handlers finish long before the lease ends.
        Some(remaining) => Problem::InProgress { retry_after: remaining.min(context.options.retry_after) },
        None => Problem::Held,
    }
}

/// Builds the response to a retry from the stored result.
fn replay<R>(context: &LayerContext, first: &Completed, parts: &Parts, request_body: &Bytes) -> Response<Body<R>> {
    let stored = match first.result().map(StoredResponse::decode) {
        Some(Ok(stored)) => stored,
        Some(Err(error)) => {
            tracing::error!(%error, "failed to decode a stored response");
            return context.reject(Problem::ResponseUnreadable);
        }
        None => return context.reject(Problem::ResponseNotStored { status: None }),
    };
    let (status, headers, body) = stored.into_parts();
    let Some(body) = body else {
        let mut response = context.reject(Problem::ResponseNotStored { status: Some(status) });
        response.headers_mut().extend(headers);
        return mark_replayed(response);
    };
    context.counters.count(Event::Replayed);
    let mut response = Response::new(body);
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    if let Some(adapt) = &context.options.adapt_replay {
        response = adapt(parts, request_body, response);
    }
    mark_replayed(response.map(Body::full))
}

fn mark_replayed<R>(mut response: Response<Body<R>>) -> Response<Body<R>> {
    response.headers_mut().insert(&REPLAYED, HeaderValue::from_static("true"));
    response
}

impl<S: fmt::Debug> fmt::Debug for Idempotent<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotent").field("inner", &self.inner).finish_non_exhaustive()
    }
}
