//! The handlers of the test server.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{self, DefaultBodyLimit, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, DATE, ETAG, LOCATION, RETRY_AFTER};
use http::header::{SERVER, SET_COOKIE};
use http::{HeaderMap, StatusCode};
use onlyonce_http::{Attempt, Disposition};
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower_http::timeout::TimeoutLayer;

use crate::setup::with_timeout;

/// The time limit of the handler of `/limited`.
const LIMIT: Duration = Duration::from_millis(200);

type OptionalAttempt = Option<axum::Extension<Attempt>>;

/// State that the handlers share with the test.
#[derive(Default)]
pub(crate) struct HandlerState {
    runs: AtomicUsize,
    /// Signals that `/slow` or `/blocks` has started.
    pub(crate) started: Signal,
    /// Lets one `/slow` finish.
    pub(crate) finish: Signal,
    /// The bodies of the next responses of `/events`.
    pub(crate) streams: Mutex<VecDeque<UnboundedReceiver<&'static str>>>,
}

/// A semaphore that starts at zero.
pub(crate) struct Signal(Semaphore);

impl Default for Signal {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Signal {
    pub(crate) fn send(&self) {
        self.0.add_permits(1);
    }

    pub(crate) async fn receive(&self) {
        with_timeout(self.0.acquire()).await.unwrap().forget();
    }
}

impl HandlerState {
    pub(crate) fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }

    /// Returns the sender of the body of the next `/events` response. The body ends when the sender is dropped.
    pub(crate) fn next_stream(&self) -> UnboundedSender<&'static str> {
        let (sender, frames) = unbounded_channel();
        self.streams.lock().unwrap().push_back(frames);
        sender
    }

    /// Counts a run and describes it.
    fn run(&self, attempt: Option<&Attempt>) -> String {
        let run = self.runs.fetch_add(1, Ordering::SeqCst) + 1;
        match attempt {
            Some(attempt) => {
                format!("run {run}, attempt {}, prior {:?}", attempt.info().number(), attempt.info().prior())
            }
            None => format!("run {run}, not guarded"),
        }
    }
}

pub(crate) fn router() -> Router<Arc<HandlerState>> {
    Router::new()
        .route("/charges", post(charge).patch(charge).put(charge))
        .route("/charges/{id}", post(charge))
        .route("/slow", post(slow))
        .route("/blocks", post(blocks))
        .route("/status/{status}", post(status))
        .route("/order/{status}", post(order))
        .route("/panic", post(panic_first))
        .route("/broken", post(broken))
        .route("/large/{bytes}", post(large))
        .route("/events/{kind}", post(events))
        .route("/orders", post(take_order).layer(DefaultBodyLimit::max(1_000)))
        .route("/members", post(charge).layer(middleware::from_fn(only_members)))
        .route("/begin/{when}/{status}", post(begin))
        .route("/rpc", post(rpc))
        .route("/limited", post(slow).layer(TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, LIMIT)))
        .route("/", get(async || "unchanged"))
}

fn inner(attempt: &OptionalAttempt) -> Option<&Attempt> {
    attempt.as_ref().map(|extension| &extension.0)
}

async fn charge(State(state): State<Arc<HandlerState>>, attempt: OptionalAttempt, body: Bytes) -> Response {
    let run = state.run(inner(&attempt));
    let headers = [
        (LOCATION, "/charges/1"),
        (ETAG, "\"1\""),
        (CONTENT_TYPE, "text/plain"),
        (SET_COOKIE, "session=secret"),
        (DATE, "Sat, 21 Nov 2026 00:00:00 GMT"),
        (SERVER, "one"),
        (CACHE_CONTROL, "no-store"),
    ];
    (StatusCode::CREATED, headers, format!("{run}, body of {}", body.len())).into_response()
}

async fn slow(State(state): State<Arc<HandlerState>>, attempt: OptionalAttempt) -> String {
    let run = state.run(inner(&attempt));
    state.started.send();
    state.finish.receive().await;
    run
}

/// Blocks its thread, as a synchronous client does.
pub(crate) async fn blocks(State(state): State<Arc<HandlerState>>, attempt: OptionalAttempt) -> String {
    let run = state.run(inner(&attempt));
    state.started.send();
    std::thread::sleep(Duration::from_millis(1_500));
    run
}

/// Responds with the status of the path. The body of the request selects a `Disposition`, or a `Retry-After`.
async fn status(
    State(state): State<Arc<HandlerState>>,
    extract::Path(status): extract::Path<u16>,
    attempt: OptionalAttempt,
    body: String,
) -> Response {
    let response = (StatusCode::from_u16(status).unwrap(), state.run(inner(&attempt)));
    match body.as_str() {
        "later" => ([(RETRY_AFTER, "1")], response).into_response(),
        "store" => (axum::Extension(Disposition::Store), response).into_response(),
        "release" => (axum::Extension(Disposition::Release), response).into_response(),
        "interrupted" => (axum::Extension(Disposition::Interrupted), response).into_response(),
        _ => response.into_response(),
    }
}

/// Adds an outbox message to its response.
async fn order(
    State(state): State<Arc<HandlerState>>,
    extract::Path(status): extract::Path<u16>,
    attempt: OptionalAttempt,
) -> Response {
    let run = state.run(inner(&attempt));
    inner(&attempt).unwrap().side_writes(|writes| {
        writes.message("orders", status.to_string(), run.as_str());
    });
    (StatusCode::from_u16(status).unwrap(), run).into_response()
}

async fn panic_first(State(state): State<Arc<HandlerState>>, attempt: OptionalAttempt) -> String {
    let run = state.run(inner(&attempt));
    assert!(!run.starts_with("run 1,"), "a panic that the test wants");
    run
}

/// A response whose body fails in the first run.
async fn broken(State(state): State<Arc<HandlerState>>, attempt: OptionalAttempt) -> Response {
    let run = state.run(inner(&attempt));
    let end =
        if run.starts_with("run 1,") { Err(std::io::Error::other("a failure that the test wants")) } else { Ok(run) };
    Body::from_stream(tokio_stream::iter([Ok("so far, ".to_owned()), end])).into_response()
}

async fn large(State(state): State<Arc<HandlerState>>, extract::Path(bytes): extract::Path<usize>) -> Response {
    state.run(None);
    let headers = [(CONTENT_TYPE, "text/plain"), (LOCATION, "/large/1"), (ETAG, "\"1\"")];
    (StatusCode::CREATED, headers, "x".repeat(bytes)).into_response()
}

/// A streaming response. Its first frame describes the run.
async fn events(
    State(state): State<Arc<HandlerState>>,
    extract::Path(kind): extract::Path<String>,
    attempt: OptionalAttempt,
) -> Response {
    let run = state.run(inner(&attempt));
    if kind == "busy" && run.starts_with("run 1,") {
        let busy = std::iter::once(run).chain(std::iter::repeat_with(|| "more".to_owned()));
        let busy = Body::from_stream(tokio_stream::iter(busy.map(Ok::<_, std::io::Error>)));
        return ([(CONTENT_TYPE, "text/event-stream")], busy).into_response();
    }
    let frames = state.streams.lock().unwrap().pop_front().unwrap();
    let frames = UnboundedReceiverStream::new(frames).map(|frame| match frame {
        "fail" => Err(std::io::Error::other("a failure that the test wants")),
        "panic" => panic!("a panic that the test wants"),
        frame => Ok(frame.to_owned()),
    });
    let content_type = if kind == "declared" { "text/event-stream; charset=utf-8" } else { "text/plain" };
    ([(CONTENT_TYPE, content_type)], Body::from_stream(tokio_stream::once(Ok(run)).chain(frames))).into_response()
}

/// Authentication inside the layer.
async fn only_members(request: extract::Request, next: middleware::Next) -> Response {
    match request.headers().contains_key(AUTHORIZATION) {
        true => next.run(request).await,
        false => StatusCode::UNAUTHORIZED.into_response(),
    }
}

#[derive(serde::Deserialize)]
struct Order {
    cents: u32,
}

/// Takes an order, and responds with 406 to some `Accept` headers.
async fn take_order(
    State(state): State<Arc<HandlerState>>,
    headers: HeaderMap,
    attempt: OptionalAttempt,
    axum::Json(order): axum::Json<Order>,
) -> Response {
    let run = state.run(inner(&attempt));
    if headers.get(ACCEPT).is_some_and(|accept| accept == "image/png") {
        return (StatusCode::NOT_ACCEPTABLE, run).into_response();
    }
    (StatusCode::CREATED, format!("{run}, {} cents", order.cents)).into_response()
}

/// Responds with the status of the path, after `Attempt::begin` if the path says `begun`.
async fn begin(
    State(state): State<Arc<HandlerState>>,
    extract::Path((when, status)): extract::Path<(String, u16)>,
    axum::Extension(attempt): axum::Extension<Attempt>,
    axum::Json(order): axum::Json<Order>,
) -> Response {
    if when == "begun" {
        attempt.begin();
    }
    let run = format!("{}, {} cents", state.run(Some(&attempt)), order.cents);
    (StatusCode::from_u16(status).unwrap(), run).into_response()
}

/// A JSON-RPC method that returns the description of its run.
async fn rpc(
    State(state): State<Arc<HandlerState>>,
    attempt: OptionalAttempt,
    axum::Json(call): axum::Json<Value>,
) -> axum::Json<Value> {
    axum::Json(serde_json::json!({ "jsonrpc": "2.0", "id": call["id"], "result": state.run(inner(&attempt)) }))
}
