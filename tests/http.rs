//! The layer over a socket, with a real client: what each request is answered, and how often its handler runs.

#[path = "common/child.rs"]
mod child;
mod common;

// The very program, in a process of its own that is killed.
#[path = "../examples/http_payments.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program of its own")]
mod http_payments;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::process::Child;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{self, DefaultBodyLimit, State};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use http::header::{
    ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE, DATE, ETAG, HeaderName, LINK, LOCATION, RETRY_AFTER, SERVER,
    SET_COOKIE,
};
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use onlyonce::future::{Claim, Store};
use onlyonce::http::{Attempt, Fate, Figures, IdempotencyLayer, OnStoreFailure, RequestFingerprint, StoredResponse};
use onlyonce::{Builder, Durability, Key, ManualClock, OnInterrupt, Resolution};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower_http::timeout::TimeoutLayer;
use tower_layer::Layer;
use tower_service::Service;

static KEY: HeaderName = HeaderName::from_static("idempotency-key");
static REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
static TENANT: HeaderName = HeaderName::from_static("x-tenant");

/// What the handlers have done, and when they may go on.
#[derive(Default)]
struct Stage {
    runs: AtomicUsize,
    started: Semaphore0,
    gate: Semaphore0,
    /// What the next answers of `/events` consist of, piece by piece.
    feeds: Mutex<VecDeque<UnboundedReceiver<&'static str>>>,
}

/// A semaphore that begins at zero.
struct Semaphore0(Semaphore);

impl Default for Semaphore0 {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

impl Semaphore0 {
    fn add(&self) {
        self.0.add_permits(1);
    }

    async fn take(&self) {
        in_time(self.0.acquire()).await.unwrap().forget();
    }
}

/// What takes longer has been lost.
const LONG: Duration = Duration::from_secs(30);

async fn in_time<F: Future>(work: F) -> F::Output {
    tokio::time::timeout(LONG, work).await.expect("it hangs")
}

impl Stage {
    fn runs(&self) -> usize {
        self.runs.load(Ordering::SeqCst)
    }

    /// The way to say what the next answer of `/events` consists of. It ends when this is dropped.
    fn feed(&self) -> UnboundedSender<&'static str> {
        let (feed, pieces) = unbounded_channel();
        self.feeds.lock().unwrap().push_back(pieces);
        feed
    }

    /// Notes a run, and says which it is.
    fn run(&self, attempt: Option<&Attempt>) -> String {
        let run = self.runs.fetch_add(1, Ordering::SeqCst) + 1;
        match attempt {
            Some(attempt) => format!("run {run}, attempt {}, prior {:?}", attempt.number(), attempt.prior()),
            None => format!("run {run}, not guarded"),
        }
    }
}

type Attempted = Option<axum::Extension<Attempt>>;

fn of(attempt: &Attempted) -> Option<&Attempt> {
    attempt.as_ref().map(|extension| &extension.0)
}

async fn charge(State(stage): State<Arc<Stage>>, attempt: Attempted, body: Bytes) -> Response {
    let run = stage.run(of(&attempt));
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

async fn slow(State(stage): State<Arc<Stage>>, attempt: Attempted) -> String {
    let run = stage.run(of(&attempt));
    stage.started.add();
    stage.gate.take().await;
    run
}

async fn status(
    State(stage): State<Arc<Stage>>,
    extract::Path(status): extract::Path<u16>,
    attempt: Attempted,
    body: String,
) -> Response {
    let answer = (StatusCode::from_u16(status).unwrap(), stage.run(of(&attempt)));
    match body.as_str() {
        "later" => ([(RETRY_AFTER, "1")], answer).into_response(),
        "store" => (axum::Extension(Fate::Store), answer).into_response(),
        "release" => (axum::Extension(Fate::Release), answer).into_response(),
        "interrupted" => (axum::Extension(Fate::Interrupted), answer).into_response(),
        _ => answer.into_response(),
    }
}

/// Sends a message with its answer.
async fn order(
    State(stage): State<Arc<Stage>>,
    extract::Path(status): extract::Path<u16>,
    attempt: Attempted,
) -> Response {
    let run = stage.run(of(&attempt));
    of(&attempt).unwrap().with_tx(|tx| tx.enqueue("orders", status.to_string(), &run));
    (StatusCode::from_u16(status).unwrap(), run).into_response()
}

async fn panic_first(State(stage): State<Arc<Stage>>, attempt: Attempted) -> String {
    let run = stage.run(of(&attempt));
    assert!(!run.starts_with("run 1,"), "a panic that the test wants");
    run
}

/// An answer that breaks off the first time.
async fn broken(State(stage): State<Arc<Stage>>, attempt: Attempted) -> Response {
    let run = stage.run(of(&attempt));
    let end =
        if run.starts_with("run 1,") { Err(std::io::Error::other("a failure that the test wants")) } else { Ok(run) };
    Body::from_stream(tokio_stream::iter([Ok("so far, ".to_owned()), end])).into_response()
}

async fn large(State(stage): State<Arc<Stage>>, extract::Path(bytes): extract::Path<usize>) -> Response {
    stage.run(None);
    let headers = [(CONTENT_TYPE, "text/plain"), (LOCATION, "/large/1"), (ETAG, "\"1\"")];
    (StatusCode::CREATED, headers, "x".repeat(bytes)).into_response()
}

/// An answer that comes piece by piece, the first of which says which run it is.
async fn events(
    State(stage): State<Arc<Stage>>,
    extract::Path(kind): extract::Path<String>,
    attempt: Attempted,
) -> Response {
    let run = stage.run(of(&attempt));
    if kind == "busy" && run.starts_with("run 1,") {
        let busy = std::iter::once(run).chain(std::iter::repeat_with(|| "more".to_owned()));
        let busy = Body::from_stream(tokio_stream::iter(busy.map(Ok::<_, std::io::Error>)));
        return ([(CONTENT_TYPE, "text/event-stream")], busy).into_response();
    }
    let pieces = stage.feeds.lock().unwrap().pop_front().unwrap();
    let pieces = UnboundedReceiverStream::new(pieces).map(|piece| match piece {
        "break" => Err(std::io::Error::other("a failure that the test wants")),
        "panic" => panic!("a panic that the test wants"),
        piece => Ok(piece.to_owned()),
    });
    let kind = if kind == "declared" { "text/event-stream; charset=utf-8" } else { "text/plain" };
    ([(CONTENT_TYPE, kind)], Body::from_stream(tokio_stream::once(Ok(run)).chain(pieces))).into_response()
}

/// What the handler of `/limited` may take.
const LIMIT: Duration = Duration::from_millis(200);

/// Authentication inside of the layer.
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

/// Takes an order, and refuses some for what their headers say.
async fn take_order(
    State(stage): State<Arc<Stage>>,
    headers: HeaderMap,
    attempt: Attempted,
    axum::Json(order): axum::Json<Order>,
) -> Response {
    let run = stage.run(of(&attempt));
    if headers.get(ACCEPT).is_some_and(|accept| accept == "image/png") {
        return (StatusCode::NOT_ACCEPTABLE, run).into_response();
    }
    (StatusCode::CREATED, format!("{run}, {} cents", order.cents)).into_response()
}

/// Answers with a status, and says before whether its work has begun.
async fn begin(
    State(stage): State<Arc<Stage>>,
    extract::Path((when, status)): extract::Path<(String, u16)>,
    axum::Extension(attempt): axum::Extension<Attempt>,
    axum::Json(order): axum::Json<Order>,
) -> Response {
    if when == "begun" {
        attempt.begin();
    }
    let run = format!("{}, {} cents", stage.run(Some(&attempt)), order.cents);
    (StatusCode::from_u16(status).unwrap(), run).into_response()
}

/// A call of JSON-RPC, which says which run it was.
async fn rpc(
    State(stage): State<Arc<Stage>>,
    attempt: Attempted,
    axum::Json(call): axum::Json<Value>,
) -> axum::Json<Value> {
    axum::Json(serde_json::json!({ "jsonrpc": "2.0", "id": call["id"], "result": stage.run(of(&attempt)) }))
}

/// A server on a socket, with a store of its own.
struct Bench {
    // Dropped before its directory is.
    store: Store,
    layer: IdempotencyLayer,
    stage: Arc<Stage>,
    address: SocketAddr,
    client: Client<HttpConnector, Full<Bytes>>,
    _dir: tempfile::TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn is_replayed(&self) -> bool {
        self.headers.get(&REPLAYED).is_some_and(|value| value == "true")
    }

    /// The code of a problem, whose form is checked.
    fn code(&self) -> String {
        assert_eq!(self.headers[CONTENT_TYPE], "application/problem+json");
        let problem: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        assert_eq!(problem["status"].as_u64(), Some(u64::from(self.status.as_u16())));
        for member in ["type", "title", "detail"] {
            assert!(!problem[member].as_str().unwrap().is_empty(), "{problem}");
        }
        problem["code"].as_str().unwrap().to_owned()
    }

    fn problem(&self) -> (u16, String) {
        (self.status.as_u16(), self.code())
    }

    fn text(&self) -> (u16, &str) {
        (self.status.as_u16(), &self.body)
    }
}

impl Bench {
    async fn new() -> Self {
        Self::with(|builder| builder, |layer| layer).await
    }

    async fn with(
        store: impl FnOnce(Builder) -> Builder,
        layer: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let builder = onlyonce::Store::builder().durability(Durability::Process).memory_budget(32 << 20);
        let store = Store::new(store(builder).open(dir.path().join("store")).unwrap()).unwrap();
        let layer = layer(
            IdempotencyLayer::builder(store.clone())
                .scope(|request| request.headers.get(&TENANT).map(|tenant| tenant.as_bytes().to_vec())),
        );
        let stage = Arc::<Stage>::default();
        let app = Router::new()
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
            .route("/", get(async || "untouched"))
            .layer(layer.clone())
            .with_state(Arc::clone(&stage));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let client = Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http();
        Self { store, layer, stage, address, client, _dir: dir }
    }

    fn request(&self, path: &str, key: Option<&str>) -> http::request::Builder {
        let uri = format!("http://{}{path}", self.address);
        let request = Request::builder().method(Method::POST).uri(uri).header(&TENANT, "a");
        match key {
            Some(key) => request.header(&KEY, key),
            None => request,
        }
    }

    async fn send(&self, request: http::request::Builder, body: impl Into<Bytes>) -> Answer {
        sent(&self.client, request.body(Full::new(body.into())).unwrap()).await.unwrap()
    }

    async fn post(&self, path: &str, key: &str) -> Answer {
        self.send(self.request(path, Some(key)), "").await
    }
}

async fn sent(
    client: &Client<HttpConnector, Full<Bytes>>,
    request: Request<Full<Bytes>>,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let (parts, body) = in_time(client.request(request)).await?.into_parts();
    let body = String::from_utf8(in_time(body.collect()).await?.to_bytes().to_vec())?;
    Ok(Answer { status: parts.status, headers: parts.headers, body })
}

#[tokio::test]
async fn what_the_handler_adds_is_stored_with_its_answer_or_not_at_all() {
    let bench = Bench::new().await;
    for _ in 0..3 {
        assert_eq!(bench.post("/order/201", "done").await.status, 201);
    }
    assert_eq!(bench.post("/order/500", "failed").await.status, 500);
    assert_eq!(bench.post("/order/429", "limited").await.status, 429);
    assert_eq!(bench.post("/order/402", "declined").await.status, 402);
    let messages = bench.store.outbox(10).await.unwrap();
    let said: Vec<_> = messages.iter().map(|message| (&message.topic[..], &message.key[..])).collect();
    assert_eq!(said, [(&b"orders"[..], &b"201"[..]), (b"orders", b"402")], "of answers that are stored, once each");
    assert!(messages[0].bytes.starts_with(b"run 1,"));
}

#[tokio::test]
async fn a_first_request_runs_and_a_retry_gets_its_answer() {
    let bench = Bench::with(|builder| builder, |layer| layer.keep_headers([SERVER, SET_COOKIE, DATE])).await;
    let order = || bench.request("/charges?for=books", Some("\"order-1\""));
    let first = bench.send(order(), "12 EUR").await;
    assert_eq!(first.text(), (201, "run 1, attempt 1, prior None, body of 6"));
    assert!(!first.is_replayed());
    assert_eq!(first.headers[SET_COOKIE], "session=secret");
    let second = bench.send(order(), "12 EUR").await;
    assert!(second.is_replayed());
    assert_eq!(second.text(), first.text());
    for name in [LOCATION, ETAG, CONTENT_TYPE, CACHE_CONTROL, SERVER] {
        assert_eq!(second.headers.get(&name), first.headers.get(&name), "{name}");
    }
    assert!(second.headers.get(SET_COOKIE).is_none(), "not even when it was asked for");
    assert_ne!(second.headers.get(DATE), first.headers.get(DATE), "the date is that of the retry");
    // Stripe's clients send no quotes, and it is the same key.
    let bare = bench.send(bench.request("/charges?for=books", Some("order-1")), "12 EUR").await;
    assert_eq!(bare.text(), first.text());
    let upper = bench.send(bench.request("/charges?for=books", Some("Order-1")), "12 EUR").await;
    assert_eq!(upper.text(), (201, "run 2, attempt 1, prior None, body of 6"), "letters are compared as they are");
    let figures = bench.layer.figures();
    assert_eq!((figures.executed, figures.stored, figures.replayed), (2, 2, 2), "{figures:?}");

    let few = Bench::with(|builder| builder, |layer| layer.keep_only_headers([ETAG])).await;
    few.post("/charges", "k").await;
    let replayed = few.post("/charges", "k").await;
    assert!(replayed.headers.contains_key(ETAG) && !replayed.headers.contains_key(LOCATION));
}

#[tokio::test]
async fn a_request_whose_key_is_missing_malformed_or_too_long_is_refused() {
    let documented = |layer: IdempotencyLayer| layer.documentation(Uri::from_static("https://dev.example.com/keys"));
    let bench = Bench::with(|builder| builder, documented).await;
    let missing = bench.send(bench.request("/charges", None), "").await;
    assert_eq!(missing.problem(), (400, "key-missing".to_owned()));
    assert!(missing.body.contains("\"https://dev.example.com/keys#key-missing\""), "{}", missing.body);
    assert_eq!(missing.headers[LINK], "<https://dev.example.com/keys>; rel=\"describedby\"; type=\"text/html\"");
    for malformed in ["", "\"", "\"a", "a b", "a,b", "\"\"", "\"a\" b", "caf\u{e9}"] {
        let answer = bench.post("/charges", malformed).await;
        assert_eq!(answer.problem(), (400, "key-malformed".to_owned()), "{malformed}");
    }
    let two = bench.request("/charges", Some("a")).header(&KEY, "b");
    assert_eq!(bench.send(two, "").await.problem(), (400, "key-malformed".to_owned()));
    let longest = "k".repeat(255);
    assert_eq!(bench.post("/charges", &longest).await.status, 201);
    for long in [format!("{longest}k"), format!("\"{longest}k\"")] {
        assert_eq!(bench.post("/charges", &long).await.problem(), (400, "key-too-long".to_owned()));
    }
    assert_eq!(bench.stage.runs(), 1);
    assert_eq!(bench.layer.figures().refused, 12);

    let form = |layer: IdempotencyLayer| layer.key_form(|key| key.starts_with("order-"));
    let formal = Bench::with(|builder| builder, form).await;
    for (key, status) in [("order-1", 201), ("\"order-2\"", 201), ("1", 400), ("\"orde\"", 400)] {
        assert_eq!(formal.post("/charges", key).await.status, status, "{key}");
    }

    // The store's own limit is for the key with its scope.
    let small = Bench::with(|builder| builder.key_limit(20), |layer| layer).await;
    assert_eq!(small.post("/charges", &"k".repeat(19)).await.status, 201);
    let long = small.post("/charges", &"k".repeat(20)).await;
    assert_eq!(long.problem(), (400, "key-too-long".to_owned()));
    assert!(long.body.contains("at most 19"), "{}", long.body);
}

#[tokio::test]
async fn a_key_that_is_used_for_another_request_is_422() {
    let bench = Bench::new().await;
    let first = bench.send(bench.request("/charges?a=1", Some("k")), "12 EUR").await;
    assert_eq!(first.status, 201);
    let patch = bench.request("/charges?a=1", Some("k")).method(Method::PATCH);
    for (request, body) in [
        (bench.request("/charges?a=1", Some("k")), "13 EUR"),
        (bench.request("/charges?a=1", Some("k")), ""),
        (bench.request("/charges?a=2", Some("k")), "12 EUR"),
        (bench.request("/charges", Some("k")), "12 EUR"),
        (bench.request("/charges/1?a=1", Some("k")), "12 EUR"),
        (patch, "12 EUR"),
    ] {
        assert_eq!(bench.send(request, body).await.problem(), (422, "key-reused".to_owned()));
    }
    assert_eq!((bench.stage.runs(), bench.layer.figures().mismatched), (1, 6));
    let again = bench.send(bench.request("/charges?a=1", Some("k")), "12 EUR").await;
    assert!(again.is_replayed(), "and the first one's answer is still there");
}

#[tokio::test]
async fn a_retry_while_the_first_is_at_work_is_told_when_to_come_back() {
    let bench = Bench::new().await;
    let first = tokio::spawn({
        let (client, request) = (bench.client.clone(), bench.request("/slow", Some("k")));
        async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() }
    });
    bench.stage.started.take().await;
    let outstanding = bench.post("/slow", "k").await;
    assert_eq!(outstanding.problem(), (409, "outstanding".to_owned()));
    assert_eq!(outstanding.headers[RETRY_AFTER], "5");
    let other = bench.send(bench.request("/slow", Some("k")), "another body").await;
    assert_eq!(other.problem(), (422, "key-reused".to_owned()), "a mistake is told even now");
    bench.stage.gate.add();
    let first = first.await.unwrap();
    assert!(!first.is_replayed());
    let retry = bench.post("/slow", "k").await;
    assert!(retry.is_replayed());
    assert_eq!(retry.text(), first.text());
    assert_eq!((bench.stage.runs(), bench.layer.figures().outstanding), (1, 1));
}

#[tokio::test]
async fn methods_that_are_not_guarded_pass_untouched() {
    let bench = Bench::new().await;
    for _ in 0..2 {
        let put = bench.request("/charges", Some("k")).method(Method::PUT);
        let answer = bench.send(put, "x").await;
        assert!(answer.body.ends_with("not guarded, body of 1") && !answer.is_replayed(), "{}", answer.body);
    }
    assert_eq!(bench.send(bench.request("/", None).method(Method::GET), "").await.text(), (200, "untouched"));
    assert_eq!(bench.stage.runs(), 2);

    let put = Bench::with(|builder| builder, |layer| layer.methods([Method::PUT]).key_optional()).await;
    for replayed in [false, true] {
        let answer = put.send(put.request("/charges", Some("k")).method(Method::PUT), "x").await;
        assert_eq!(answer.is_replayed(), replayed);
    }
    let none = put.send(put.request("/charges", None).method(Method::PUT), "x").await;
    assert!(none.body.contains("not guarded"), "a key that is optional may be missing");
    assert!(put.post("/charges", "k").await.body.contains("not guarded"), "POST is not guarded there");
    assert_eq!(put.layer.figures().executed, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_clients_with_one_key_one_is_served_and_the_others_get_its_answer() {
    const CLIENTS: usize = 100;
    for wait in [Duration::ZERO, Duration::from_secs(60)] {
        let bench = Bench::with(|builder| builder, |layer| layer.wait(wait)).await;
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                let (client, request) = (bench.client.clone(), bench.request("/slow", Some("k")));
                tokio::spawn(async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() })
            })
            .collect();
        bench.stage.started.take().await;
        if wait.is_zero() {
            // All the others are told to come back before the one is done.
            while bench.layer.figures().outstanding < CLIENTS as u64 - 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        bench.stage.gate.add();
        assert_eq!(bench.layer.idle(LONG).await, 0);
        let (mut first, mut replayed, mut outstanding) = (0, 0, 0);
        for client in clients {
            let answer = client.await.unwrap();
            if answer.status == StatusCode::CONFLICT {
                outstanding += 1;
                assert!(answer.headers.contains_key(RETRY_AFTER));
                let retry = bench.post("/slow", "k").await;
                assert!(retry.is_replayed());
                assert_eq!(retry.text(), (200, "run 1, attempt 1, prior None"));
            } else {
                assert_eq!(answer.text(), (200, "run 1, attempt 1, prior None"));
                if answer.is_replayed() { replayed += 1 } else { first += 1 }
            }
        }
        let expected = if wait.is_zero() { (1, 0, CLIENTS - 1) } else { (1, CLIENTS - 1, 0) };
        assert_eq!((first, replayed, outstanding), expected);
        assert_eq!(bench.stage.runs(), 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_whose_client_hangs_up_is_finished_and_the_retry_gets_the_answer() {
    let bench = Bench::new().await;
    for key in ["a", "b", "c"] {
        let before = bench.stage.runs();
        let mut client = TcpStream::connect(bench.address).await.unwrap();
        let head = format!("POST /slow HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\nidempotency-key: {key}\r\n");
        client.write_all(format!("{head}content-length: 0\r\n\r\n").as_bytes()).await.unwrap();
        bench.stage.started.take().await;
        drop(client);
        // Time enough for the server to see it. Nobody waits for the work any more.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(bench.layer.idle(Duration::from_millis(50)).await, 1, "it is at work");
        bench.stage.gate.add();
        assert_eq!(bench.layer.idle(LONG).await, 0);
        let retry = bench.post("/slow", key).await;
        assert!(retry.is_replayed());
        assert_eq!(retry.body, format!("run {}, attempt 1, prior None", before + 1));
        assert_eq!(bench.stage.runs(), before + 1);
    }
}

#[tokio::test]
async fn a_client_that_hangs_up_before_its_body_is_there_has_asked_for_nothing() {
    let bench = Bench::new().await;
    let mut client = TcpStream::connect(bench.address).await.unwrap();
    let head = "POST /charges HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\nidempotency-key: k\r\ncontent-length: 6\r\n\r\n";
    client.write_all(format!("{head}12").as_bytes()).await.unwrap();
    drop(client);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let whole = bench.send(bench.request("/charges", Some("k")), "12 EUR").await;
    assert_eq!(whole.text(), (201, "run 1, attempt 1, prior None, body of 6"));
}

#[tokio::test]
async fn a_body_at_the_limit_passes_and_one_byte_more_is_413() {
    let bench = Bench::with(|builder| builder, |layer| layer.body_limit(1_000)).await;
    let of = |bytes| Bytes::from("x".repeat(bytes));
    let at = bench.send(bench.request("/charges", Some("at")), of(1_000)).await;
    assert_eq!(at.text(), (201, "run 1, attempt 1, prior None, body of 1000"));
    let over = bench.send(bench.request("/charges", Some("over")), of(1_001)).await;
    assert_eq!(over.problem(), (413, "body-too-large".to_owned()));
    // Without a length, piece by piece.
    for (bytes, status) in [(1_000, 201), (1_001, 413)] {
        let mut pieces = vec![Bytes::from("x".repeat(999)), Bytes::from("x")];
        pieces.resize(1 + bytes - 999, Bytes::from("x"));
        let mut raw = format!(
            "POST /charges HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\nidempotency-key: chunked-{bytes}\r\n\
             connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        .into_bytes();
        for piece in pieces {
            raw.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
            raw.extend_from_slice(&piece);
            raw.extend_from_slice(b"\r\n");
        }
        raw.extend_from_slice(b"0\r\n\r\n");
        let mut socket = TcpStream::connect(bench.address).await.unwrap();
        socket.write_all(&raw).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes}: {answer}");
    }
    assert_eq!(bench.stage.runs(), 2);
    // What was refused can be sent again with the same key, smaller.
    assert_eq!(bench.send(bench.request("/charges", Some("over")), of(1)).await.status, 201);
}

#[tokio::test]
async fn one_tenant_never_sees_the_answer_of_another() {
    let bench = Bench::new().await;
    let by = |tenant: &str| {
        let uri = format!("http://{}/charges", bench.address);
        Request::builder().method(Method::POST).uri(uri).header(&TENANT, tenant).header(&KEY, "k")
    };
    let longest = "t".repeat(255);
    for (run, tenant) in ["a", "b", longest.as_str()].into_iter().enumerate() {
        let answer = bench.send(by(tenant), "same").await;
        assert_eq!(answer.body, format!("run {}, attempt 1, prior None, body of 4", run + 1), "{tenant}");
    }
    assert_eq!(bench.send(by("b"), "same").await.body, "run 2, attempt 1, prior None, body of 4");
    // Who is nobody, or cannot be told from others, is refused.
    let too_long = "t".repeat(256);
    for nobody in ["", too_long.as_str()] {
        assert_eq!(bench.send(by(nobody), "same").await.problem(), (403, "scope-missing".to_owned()));
    }
    assert_eq!(bench.stage.runs(), 3);

    let mut shared = IdempotencyLayer::builder(bench.store.clone()).one_scope_for_all_callers().layer(Plain::default());
    let by = |tenant| Request::post("/charges").header(&TENANT, tenant).header(&KEY, "k").body(whole("same")).unwrap();
    let first = shared.call(by("a")).await.unwrap();
    assert!(first.headers().get(&REPLAYED).is_none(), "no scope is none of the tenants'");
    assert!(shared.call(by("b")).await.unwrap().headers().contains_key(&REPLAYED));
}

fn whole(text: &'static str) -> Full<Bytes> {
    Full::new(Bytes::from(text))
}

/// A service of tower's that knows nothing of axum.
#[derive(Clone, Default)]
struct Plain {
    runs: Arc<AtomicUsize>,
    /// How many runs fail, of the first ones.
    fails: usize,
}

impl<B> Service<Request<onlyonce::http::Body<B>>> for Plain {
    type Response = http::Response<Full<Bytes>>;
    type Error = std::io::Error;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<onlyonce::http::Body<B>>) -> Self::Future {
        let run = self.runs.fetch_add(1, Ordering::SeqCst);
        if run < self.fails {
            return std::future::ready(Err(std::io::Error::other("a failure that the test wants")));
        }
        let attempt = request.extensions().get::<Attempt>().unwrap();
        let body = format!("run {run}, prior {:?}", attempt.prior());
        std::future::ready(Ok(http::Response::new(Full::new(Bytes::from(body)))))
    }
}

#[tokio::test]
async fn what_is_not_stored_runs_again_and_is_told_what_came_before() {
    let bench = Bench::new().await;
    for (path, said, again) in [
        ("/status/200", "", None),
        ("/status/402", "", None),
        ("/status/429", "", Some("prior Some(Released)")),
        ("/status/500", "", Some("prior Some(Dropped)")),
        ("/status/503", "", Some("prior Some(Dropped)")),
        // The handler knows better.
        ("/status/502", "release", Some("prior Some(Released)")),
        ("/status/502", "store", None),
        ("/status/201", "interrupted", Some("prior Some(Dropped)")),
        // As a service behind this one answers while it works.
        ("/status/409", "later", Some("prior Some(Dropped)")),
        ("/status/202", "later", None),
        ("/status/429", "store", None),
    ] {
        let request = || bench.request(path, Some(&format!("{path} {said}").replace(' ', "-"))).header("x", "y");
        let first = bench.send(request(), said).await;
        assert!(first.body.ends_with("attempt 1, prior None"), "{}", first.body);
        let second = bench.send(request(), said).await;
        assert_eq!(second.status, first.status);
        match again {
            None => assert!(second.is_replayed() && second.body == first.body, "{path} {said}: {}", second.body),
            Some(prior) => assert!(second.body.ends_with(&format!("attempt 2, {prior}")), "{path}: {}", second.body),
        }
    }
    let figures = bench.layer.figures();
    assert_eq!((figures.stored, figures.released, figures.interrupted), (5, 4, 8), "{figures:?}");

    let all = Bench::with(|builder| builder, |layer| layer.fate(|_| Fate::Store)).await;
    all.post("/status/500", "k").await;
    assert!(all.post("/status/500", "k").await.is_replayed(), "as Stripe does");
}

#[tokio::test]
async fn a_time_limit_around_the_handler_is_not_replayed_and_the_next_attempt_is_told() {
    let bench = Bench::new().await;
    assert_eq!(bench.post("/limited", "k").await.status, 408);
    assert_eq!(bench.layer.figures().interrupted, 1);
    bench.stage.gate.add();
    let retry = bench.post("/limited", "k").await;
    assert_eq!(retry.text(), (200, "run 2, attempt 2, prior Some(Dropped)"));
    assert!(bench.post("/limited", "k").await.is_replayed());

    // Whether it happened is unknown: under `Hold` somebody decides.
    let held = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold), |layer| layer).await;
    assert_eq!(held.post("/limited", "k").await.status, 408);
    assert_eq!(held.post("/limited", "k").await.problem(), (409, "held".to_owned()));
}

#[tokio::test]
async fn a_client_reads_in_plain_words_what_is_wrong_and_what_to_do() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold), |layer| layer).await;
    let detail = |answer: &Answer| -> (String, String) {
        let problem: Value = serde_json::from_str(&answer.body).unwrap();
        (problem["title"].as_str().unwrap().to_owned(), problem["detail"].as_str().unwrap().to_owned())
    };
    let uri = format!("http://{}/charges", bench.address);
    let nobody = bench.send(Request::post(uri).header(&KEY, "k"), "").await;
    let (title, says) = detail(&nobody);
    assert_eq!((nobody.status.as_u16(), &title[..]), (403, "Request has no idempotency scope"));
    assert!(says.contains("Check the credentials"), "{says}");
    bench.post("/status/500", "k").await;
    let (_, says) = detail(&bench.post("/status/500", "k").await);
    assert_eq!(says, "The outcome is unknown and requires manual resolution. Do not retry with a different key.");
}

#[tokio::test]
async fn a_status_that_says_nothing_about_the_request_is_not_replayed() {
    let bench = Bench::new().await;
    let not_processed = [307, 308, 401, 405, 407, 411, 412, 413, 414, 415, 417, 421, 423, 426, 428, 429, 431];
    let unknown = [406, 408, 424, 425, 460, 499, 500, 502, 503, 504, 599];
    let of_the_work = [200, 201, 202, 301, 302, 303, 400, 402, 403, 404, 409, 410, 416, 418, 422, 451];
    let all = [(&not_processed[..], "Some(Released)"), (&unknown, "Some(Dropped)"), (&of_the_work, "")];
    for (status, prior) in all.into_iter().flat_map(|(all, prior)| all.iter().map(move |status| (*status, prior))) {
        let path = format!("/status/{status}");
        assert_eq!(bench.post(&path, &path).await.status.as_u16(), status);
        let retry = bench.post(&path, &path).await;
        assert_eq!(retry.status.as_u16(), status);
        assert_eq!(retry.is_replayed(), prior.is_empty(), "{status}");
        assert!(
            prior.is_empty() || retry.body.ends_with(&format!("attempt 2, prior {prior}")),
            "{status}: {}",
            retry.body
        );
    }
}

#[tokio::test]
async fn a_request_that_is_corrected_in_its_headers_runs() {
    let bench = Bench::new().await;
    let order = |key: &'static str| bench.request("/orders", Some(key));
    let json = "application/json";
    // 415 of an extractor.
    for kind in [None, Some("text/plain")] {
        let request = kind.into_iter().fold(order("kind"), |request, kind| request.header(CONTENT_TYPE, kind));
        assert_eq!(bench.send(request, "{\"cents\":12}").await.status, 415);
    }
    let corrected = bench.send(order("kind").header(CONTENT_TYPE, json), "{\"cents\":12}").await;
    assert_eq!(corrected.text(), (201, "run 1, attempt 3, prior Some(Released), 12 cents"));
    assert!(bench.send(order("kind").header(CONTENT_TYPE, json), "{\"cents\":12}").await.is_replayed());
    // 401 of a layer inside.
    assert_eq!(bench.post("/members", "member").await.status, 401);
    let member = || bench.request("/members", Some("member")).header(AUTHORIZATION, "Bearer sk_alice");
    assert_eq!(bench.send(member(), "").await.text(), (201, "run 2, attempt 2, prior Some(Released), body of 0"));
    assert!(bench.send(member(), "").await.is_replayed());
    // 406 may come when the work is done, and the next attempt is told.
    let accept = |kind| order("accept").header(CONTENT_TYPE, json).header(ACCEPT, kind);
    assert_eq!(bench.send(accept("image/png"), "{\"cents\":1}").await.status, 406);
    let corrected = bench.send(accept(json), "{\"cents\":1}").await;
    assert_eq!(corrected.text(), (201, "run 4, attempt 2, prior Some(Dropped), 1 cents"));
}

#[tokio::test]
async fn a_handler_that_says_when_it_begins_has_done_nothing_before() {
    let bench = Bench::with(|builder| builder, |layer| layer.explicit_begin()).await;
    let send = async |path: String| {
        let request = bench.request(&path, Some(&path)).header(CONTENT_TYPE, "application/json");
        bench.send(request, "{\"cents\":1}").await
    };
    for (status, before, after) in [
        (200, None, None),
        (303, None, None),
        (400, Some("Released"), None),
        (403, Some("Released"), None),
        (404, Some("Released"), None),
        (422, Some("Released"), None),
        (503, Some("Released"), Some("Dropped")),
        (504, Some("Released"), Some("Dropped")),
        // What is released for its status is not when the work had begun.
        (401, Some("Released"), Some("Dropped")),
        (429, Some("Released"), Some("Dropped")),
    ] {
        for (when, prior) in [("before", before), ("begun", after)] {
            let path = format!("/begin/{when}/{status}");
            assert_eq!(send(path.clone()).await.status.as_u16(), status, "{path}");
            let retry = send(path.clone()).await;
            assert_eq!(retry.is_replayed(), prior.is_none(), "{path}");
            let told = prior.map_or("prior None".to_owned(), |prior| format!("attempt 2, prior Some({prior})"));
            assert!(retry.body.contains(&told), "{path}: {}", retry.body);
        }
    }
    // An extractor that refuses the body comes before the handler.
    let wrong = || bench.request("/begin/begun/200", Some("wrong")).header(CONTENT_TYPE, "application/json");
    for _ in 0..2 {
        let refused = bench.send(wrong(), "{").await;
        assert!(refused.status == 400 && !refused.is_replayed());
    }

    // `begin` counts without the option as well, and nothing else does.
    let bench = Bench::new().await;
    for (when, status, prior) in [
        ("before", 401, Some("Released")),
        ("begun", 401, Some("Dropped")),
        ("before", 404, None),
        ("before", 503, Some("Dropped")),
    ] {
        let path = format!("/begin/{when}/{status}");
        let request = || bench.request(&path, Some(&path)).header(CONTENT_TYPE, "application/json");
        bench.send(request(), "{\"cents\":1}").await;
        let retry = bench.send(request(), "{\"cents\":1}").await;
        assert_eq!(retry.is_replayed(), prior.is_none(), "{path}");
        let told = prior.map_or("prior None".to_owned(), |prior| format!("attempt 2, prior Some({prior})"));
        assert!(retry.body.contains(&told), "{path}: {}", retry.body);
    }
}

#[tokio::test]
async fn an_error_of_the_service_before_its_work_began_releases_the_key() {
    let bench = Bench::new().await;
    let layer = IdempotencyLayer::builder(bench.store.clone()).one_scope_for_all_callers().explicit_begin();
    let mut service = layer.layer(Plain { fails: 1, ..Plain::default() });
    let request = || Request::post("/charges").header(&KEY, "k").body(whole("same")).unwrap();
    service.call(request()).await.unwrap_err();
    assert_eq!((layer.figures().interrupted, layer.figures().released), (0, 1));
    let retry = service.call(request()).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(retry, "run 1, prior Some(Released)");
}

#[tokio::test]
async fn a_request_that_is_corrected_in_its_body_runs() {
    let bench = Bench::with(|builder| builder, |layer| layer.explicit_begin()).await;
    let order = |path| bench.request(path, Some(path)).header(CONTENT_TYPE, "application/json");
    // 400, 422 and 413 of extractors.
    for wrong in ["{", "{}", &format!("{{\"cents\":{:>1000}}}", 1)] {
        assert!(bench.send(order("/orders"), wrong.to_owned()).await.status.is_client_error());
    }
    let corrected = bench.send(order("/orders"), "{\"cents\":12}").await;
    assert_eq!(corrected.status, 201);
    assert!(corrected.body.starts_with("run 1,") && corrected.body.ends_with(" 12 cents"), "{}", corrected.body);
    assert_eq!(bench.send(order("/orders"), "{\"cents\":13}").await.problem(), (422, "key-reused".to_owned()));
    // What may have been done is not another request's.
    assert_eq!(bench.send(order("/begin/begun/503"), "{\"cents\":1}").await.status, 503);
    assert_eq!(bench.send(order("/begin/begun/503"), "{\"cents\":2}").await.problem(), (422, "key-reused".to_owned()));
    // Without the option 413 is released for its status.
    let bench = Bench::new().await;
    let order = || bench.request("/orders", Some("k")).header(CONTENT_TYPE, "application/json");
    assert_eq!(bench.send(order(), format!("{{\"cents\":{:>1000}}}", 1)).await.status, 413);
    assert_eq!(bench.send(order(), "{\"cents\":1}").await.status, 201);
}

#[tokio::test]
async fn an_empty_query_is_no_query() {
    let bench = Bench::new().await;
    assert_eq!(bench.post("/charges", "k").await.status, 201);
    assert!(bench.post("/charges?", "k").await.is_replayed());
    assert_eq!(bench.post("/charges?a", "k").await.problem(), (422, "key-reused".to_owned()));
}

#[tokio::test]
async fn json_in_another_order_is_the_same_request_where_that_was_chosen() {
    let canonical = |layer: IdempotencyLayer| {
        let rule = RequestFingerprint::canonical_json().with_headers([ACCEPT]);
        layer.fingerprint(move |request, body| rule.of(request, body))
    };
    let bench = Bench::with(|builder| builder, canonical).await;
    let order =
        |key, kind, accept| bench.request("/charges", Some(key)).header(CONTENT_TYPE, kind).header(ACCEPT, accept);
    let json = "application/json; charset=utf-8";
    let first = bench.send(order("k", json, "a"), r#"{"cents":1200,"to":{"name":"A","city":"B"}}"#).await;
    assert_eq!(first.status, 201);
    let other = r#" { "to": {"city": "\u0042", "name": "A"}, "cents": 1.2e3 } "#;
    assert!(bench.send(order("k", json, "a"), other).await.is_replayed());
    for (kind, accept, body) in [
        (json, "a", r#"{"cents":1201,"to":{"name":"A","city":"B"}}"#),
        (json, "a", r#"{"cents":"1200","to":{"name":"A","city":"B"}}"#),
        (json, "b", other),
        ("text/plain", "a", other),
    ] {
        assert_eq!(
            bench.send(order("k", kind, accept), body).await.problem(),
            (422, "key-reused".to_owned()),
            "{body}"
        );
    }
    // Where canonical forms could be equal and the requests not, the bytes decide.
    for (key, one, other) in [
        ("number", r#"{"to": 9007199254740993}"#, r#"{"to": 9007199254740992}"#),
        ("digits", r#"{"cents": 0.1}"#, r#"{"cents": 0.10000000000000000555}"#),
        ("twice", r#"{"cents":1,"cents":2}"#, r#"{"cents":2}"#),
        ("broken", r#"{"cents":1"#, r#"{"cents": 1"#),
    ] {
        assert_eq!(bench.send(order(key, json, "a"), one).await.status, 201);
        assert!(bench.send(order(key, json, "a"), one).await.is_replayed(), "{key}");
        assert_eq!(bench.send(order(key, json, "a"), other).await.problem(), (422, "key-reused".to_owned()), "{key}");
    }

    // By default it is the bytes.
    let bytes = Bench::new().await;
    let order = || bytes.request("/charges", Some("k")).header(CONTENT_TYPE, json);
    assert_eq!(bytes.send(order(), r#"{"a":1}"#).await.status, 201);
    assert_eq!(bytes.send(order(), r#"{"a": 1}"#).await.problem(), (422, "key-reused".to_owned()));
}

#[tokio::test]
async fn a_fingerprint_of_ones_own_decides_alone() {
    // A client whose multipart boundary is a new one each time says what it has sent.
    let own =
        |layer: IdempotencyLayer| layer.fingerprint(|request, _| request.headers["content-digest"].as_bytes().to_vec());
    let bench = Bench::with(|builder| builder, own).await;
    let upload = |digest| bench.request("/charges", Some("k")).header("content-digest", digest);
    assert_eq!(bench.send(upload("sha-256=:a:"), "--x1\r\n").await.status, 201);
    assert!(bench.send(upload("sha-256=:a:"), "--x2\r\n").await.is_replayed());
    assert_eq!(bench.send(upload("sha-256=:b:"), "--x1\r\n").await.problem(), (422, "key-reused".to_owned()));
}

#[tokio::test]
async fn a_json_rpc_client_has_its_key_in_the_body_and_numbers_its_retries() {
    let json_rpc = |layer: IdempotencyLayer| {
        let rule = RequestFingerprint::canonical_json_without(["/id", "/params/_meta"]);
        layer
            .key_optional()
            .key_limit(40)
            .key(|_, body| {
                let call: Value = serde_json::from_slice(body).ok()?;
                Some(call.pointer("/params/idempotencyKey")?.as_str()?.to_owned())
            })
            .fingerprint(move |request, body| rule.of(request, body))
            .adapt_replay(|_, body, answer| {
                let call: Value = serde_json::from_slice(body).unwrap();
                let mut result: Value = serde_json::from_slice(answer.body()).unwrap();
                result["id"] = call["id"].clone();
                answer.map(|_| result.to_string().into())
            })
    };
    let bench = Bench::with(|builder| builder, json_rpc).await;
    let call = async |id: u32, params: Value| {
        let call = serde_json::json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params });
        let request = bench.request("/rpc", None).header(CONTENT_TYPE, "application/json");
        bench.send(request, call.to_string()).await
    };
    let result = |answer: &Answer| -> (Value, Value) {
        let answer: Value = serde_json::from_str(&answer.body).unwrap();
        (answer["id"].clone(), answer["result"].clone())
    };
    let charge = |cents: u32, token: u32| serde_json::json!({ "idempotencyKey": "a key of any text: é", "cents": cents, "_meta": { "progressToken": token } });
    let first = call(1, charge(12, 1)).await;
    assert_eq!(result(&first), (1.into(), "run 1, attempt 1, prior None".into()));
    let retry = call(2, charge(12, 2)).await;
    assert!(retry.is_replayed());
    assert_eq!(
        result(&retry),
        (2.into(), "run 1, attempt 1, prior None".into()),
        "its own number, and the first result"
    );
    assert_eq!(call(3, charge(13, 3)).await.problem(), (422, "key-reused".to_owned()));
    // Calls without a key pass, and those whose key is none are refused.
    for run in [2, 3] {
        let listed = call(4, serde_json::json!({})).await;
        assert_eq!(result(&listed).1, format!("run {run}, not guarded"));
    }
    let empty = call(5, serde_json::json!({ "idempotencyKey": "" })).await;
    assert_eq!(empty.problem(), (400, "key-malformed".to_owned()));
    let long = call(6, serde_json::json!({ "idempotencyKey": "k".repeat(41) })).await;
    assert_eq!(long.problem(), (400, "key-too-long".to_owned()));

    let required = Bench::with(|builder| builder, |layer| layer.body_limit(10).key(|_, _| None)).await;
    assert_eq!(required.post("/charges", "k").await.problem(), (400, "key-missing".to_owned()));
    let large = required.send(required.request("/charges", None), "12345678901").await;
    assert_eq!(large.problem(), (413, "body-too-large".to_owned()));
}

/// The head of an answer, when it is there, and the body that follows.
async fn opened(
    bench: &Bench,
    path: &str,
    key: &str,
) -> http::Response<impl http_body::Body<Data = Bytes> + Unpin + use<>> {
    let request = bench.request(path, Some(key)).body(Full::default()).unwrap();
    in_time(bench.client.request(request)).await.unwrap()
}

/// The next piece of a body, `end` at its end, and `broken off` where it is not whole.
async fn piece(body: &mut (impl http_body::Body<Data = Bytes> + Unpin)) -> String {
    match in_time(body.frame()).await {
        Some(Ok(frame)) => String::from_utf8(frame.into_data().unwrap_or_default().to_vec()).unwrap(),
        Some(Err(_)) => "broken off".to_owned(),
        None => "end".to_owned(),
    }
}

/// Waits until a number of the layer's figures is reached.
async fn reached(bench: &Bench, figure: impl Fn(Figures) -> u64, number: u64) {
    let reached = async {
        while figure(bench.layer.figures()) < number {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    in_time(reached).await;
}

#[tokio::test]
async fn a_stream_goes_through_as_it_comes_and_its_retry_gets_all_of_it() {
    // Declared, or found out.
    for kind in ["declared", "slow"] {
        let (path, lease) = (format!("/events/{kind}"), Duration::from_secs(1));
        let options = |layer: IdempotencyLayer| layer.stream_after(Duration::from_millis(50));
        let bench = Bench::with(|builder| builder.lease(lease), options).await;
        let feed = bench.stage.feed();
        let (head, mut body) = opened(&bench, &path, "k").await.into_parts();
        assert_eq!(head.status, 200, "before the end");
        assert_eq!(piece(&mut body).await, "run 1, attempt 1, prior None");
        for message in ["one", "two"] {
            feed.send(message).unwrap();
            assert_eq!(piece(&mut body).await, message);
            // The key is held meanwhile, in all for longer than a lease.
            tokio::time::sleep(lease * 2 / 3).await;
            assert_eq!(bench.post(&path, "k").await.problem(), (409, "outstanding".to_owned()));
        }
        assert_eq!(bench.layer.figures().stored, 0);
        drop(feed);
        assert_eq!(piece(&mut body).await, "end");
        let figures = bench.layer.figures();
        assert_eq!(
            (figures.streamed, figures.stored, figures.interrupted),
            (1, 1, 0),
            "stored before its end is given"
        );
        let retry = bench.post(&path, "k").await;
        assert!(retry.is_replayed());
        assert_eq!(retry.text(), (200, "run 1, attempt 1, prior Noneonetwo"));
        assert_eq!(retry.headers[CONTENT_TYPE], head.headers[CONTENT_TYPE]);
        assert_eq!(bench.layer.idle(LONG).await, 0);
    }
}

#[tokio::test]
async fn a_stream_that_is_too_large_to_keep_goes_through_and_its_work_is_not_repeated() {
    let bench = Bench::with(|builder| builder.result_limit(100), |layer| layer).await;
    let feed = bench.stage.feed();
    let mut body = opened(&bench, "/events/declared", "k").await.into_body();
    piece(&mut body).await;
    for _ in 0..20 {
        feed.send("ten bytes.").unwrap();
        assert_eq!(piece(&mut body).await, "ten bytes.");
    }
    drop(feed);
    assert_eq!(piece(&mut body).await, "end");
    assert_eq!(bench.post("/events/declared", "k").await.problem(), (200, "answer-not-kept".to_owned()));
    assert_eq!((bench.stage.runs(), bench.layer.figures().bodies_not_kept), (1, 1));
}

#[tokio::test]
async fn a_stream_that_breaks_off_has_no_end_and_the_next_attempt_is_told() {
    let bench = Bench::new().await;
    for (attempt, end) in ["break", "panic"].into_iter().enumerate() {
        let feed = bench.stage.feed();
        let mut body = opened(&bench, "/events/declared", "k").await.into_body();
        piece(&mut body).await;
        feed.send(end).unwrap();
        assert_eq!(piece(&mut body).await, "broken off");
        reached(&bench, |figures| figures.interrupted, attempt as u64 + 1).await;
        assert_eq!(bench.layer.idle(LONG).await, 0);
    }
    drop(bench.stage.feed());
    let retry = bench.post("/events/declared", "k").await;
    assert_eq!(retry.text(), (200, "run 3, attempt 3, prior Some(Dropped)"));
    assert!(bench.post("/events/declared", "k").await.is_replayed());
    assert_eq!((bench.layer.figures().interrupted, bench.layer.figures().stored), (2, 1));
}

#[tokio::test]
async fn a_stream_whose_client_hangs_up_is_read_on_for_a_while() {
    let read_on = |limit| move |layer: IdempotencyLayer| layer.after_hang_up(limit);
    // It ends in time.
    let bench = Bench::with(|builder| builder, read_on(LONG)).await;
    let feed = bench.stage.feed();
    let mut body = opened(&bench, "/events/declared", "k").await.into_body();
    piece(&mut body).await;
    drop(body);
    feed.send("after it").unwrap();
    assert_eq!(bench.layer.idle(Duration::from_millis(100)).await, 1);
    assert_eq!(bench.post("/events/declared", "k").await.problem(), (409, "outstanding".to_owned()));
    drop(feed);
    assert_eq!(bench.layer.idle(LONG).await, 0);
    let retry = bench.post("/events/declared", "k").await;
    assert!(retry.is_replayed());
    assert_eq!(retry.body, "run 1, attempt 1, prior Noneafter it");

    // It does not: neither where nothing comes, nor where something always does.
    for path in ["/events/declared", "/events/busy"] {
        let bench = Bench::with(|builder| builder, read_on(Duration::from_millis(100))).await;
        let _endless = bench.stage.feed();
        let mut body = opened(&bench, path, "k").await.into_body();
        piece(&mut body).await;
        drop(body);
        assert_eq!(bench.layer.idle(LONG).await, 0);
        assert_eq!(bench.layer.figures().interrupted, 1);
        bench.stage.feeds.lock().unwrap().clear();
        drop(bench.stage.feed());
        let retry = bench.post(path, "k").await;
        assert_eq!(retry.text(), (200, "run 2, attempt 2, prior Some(Dropped)"));
    }
}

#[tokio::test]
async fn a_stream_whose_answer_cannot_be_stored_or_whose_key_was_overtaken_has_no_end() {
    // The store fails before the end: the end is given only where that was said aloud.
    for (policy, end) in [(OnStoreFailure::FailClosed, "broken off"), (OnStoreFailure::FailOpen, "end")] {
        let bench = Bench::with(|builder| builder, |layer| layer.on_store_failure(policy)).await;
        let feed = bench.stage.feed();
        let mut body = opened(&bench, "/events/declared", "k").await.into_body();
        piece(&mut body).await;
        bench.store.close().await.unwrap();
        drop(feed);
        assert_eq!(piece(&mut body).await, end);
        let figures = bench.layer.figures();
        let failed = (figures.failed_closed, figures.failed_open);
        assert_eq!(failed, if policy == OnStoreFailure::FailClosed { (1, 0) } else { (0, 1) });
    }

    let clock = ManualClock::at(common::START_MS);
    let by_hand = clock.clone();
    let bench = Bench::with(|builder| builder.clock(by_hand).lease(Duration::from_millis(300)), |layer| layer).await;
    let _endless = bench.stage.feed();
    let mut body = opened(&bench, "/events/declared", "k").await.into_body();
    piece(&mut body).await;
    let feed = bench.stage.feed();
    let mut other = in_time(async {
        loop {
            clock.advance(Duration::from_millis(301));
            let other = opened(&bench, "/events/declared", "k").await;
            // A renewal was faster.
            if other.status() == StatusCode::OK {
                return other.into_body();
            }
        }
    })
    .await;
    assert!(piece(&mut other).await.starts_with("run 2, attempt 2"));
    assert_eq!(piece(&mut body).await, "broken off");
    drop(feed);
    assert_eq!(piece(&mut other).await, "end");
}

/// A body of a known length, of pieces that come one after the other.
struct Sized {
    pieces: UnboundedReceiver<&'static str>,
    left: u64,
}

impl http_body::Body for Sized {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let piece = std::task::ready!(self.pieces.poll_recv(context));
        self.left -= piece.map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(http_body::Frame::data(Bytes::from(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

#[tokio::test]
async fn the_last_piece_of_a_known_length_is_given_when_the_answer_is_stored() {
    for closed in [false, true] {
        let bench = Bench::new().await;
        let feed = bench.stage.feed();
        let pieces = Arc::new(Mutex::new(bench.stage.feeds.lock().unwrap().pop_front()));
        let layer = IdempotencyLayer::builder(bench.store.clone())
            .one_scope_for_all_callers()
            .stream_after(Duration::from_millis(20));
        let mut service = layer.layer(tower_service_fn(move || {
            let pieces = pieces.lock().unwrap().take().unwrap();
            http::Response::new(Sized { pieces, left: 6 })
        }));
        let request = Request::post("/charges").header(&KEY, "k").body(whole("same")).unwrap();
        feed.send("one").unwrap();
        let mut body = in_time(service.call(request)).await.unwrap().into_body();
        assert_eq!(piece(&mut body).await, "one");
        if closed {
            bench.store.close().await.unwrap();
        }
        feed.send("two").unwrap();
        let expected = if closed { ["broken off", "end"] } else { ["two", "end"] };
        assert_eq!([piece(&mut body).await, piece(&mut body).await], expected);
        assert_eq!(layer.figures().stored, u64::from(!closed));
    }
}

/// A service that answers at once.
#[derive(Clone)]
struct Answers<F>(F);

fn tower_service_fn<F>(answer: F) -> Answers<F> {
    Answers(answer)
}

impl<F, R, B> Service<Request<onlyonce::http::Body<B>>> for Answers<F>
where
    F: Fn() -> http::Response<R>,
{
    type Response = http::Response<R>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<onlyonce::http::Body<B>>) -> Self::Future {
        std::future::ready(Ok((self.0)()))
    }
}

const ENDLESS: &str = "a_server_with_an_answer_that_does_not_end_ends_when_it_is_told_to";

/// Serves events without an end, as `docs/http.md` says how to stop.
async fn serve_endless(directory: &Path) {
    let limit = Duration::from_millis(500);
    let store = Store::new(onlyonce::Store::open(directory).unwrap()).unwrap();
    let layer = IdempotencyLayer::builder(store.clone()).one_scope_for_all_callers();
    let events = async || {
        let (ticks, ticking) = unbounded_channel();
        tokio::spawn(async move {
            while ticks.send(Ok::<_, std::io::Error>("data: tick\n\n")).is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(UnboundedReceiverStream::new(ticking)))
    };
    let app = Router::new().route("/events", post(events)).route_layer(layer.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
    println!("listening on http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let told = async move {
        terminate.recv().await;
        stop.send(()).unwrap();
    };
    tokio::select! {
        served = axum::serve(listener, app).with_graceful_shutdown(told) => served.unwrap(),
        () = async { stopped.await.unwrap(); tokio::time::sleep(limit).await } => {}
    }
    assert!(layer.idle(limit).await > 0);
    store.close().await.unwrap();
}

#[test]
fn a_server_with_an_answer_that_does_not_end_ends_when_it_is_told_to() {
    if child::is_child(ENDLESS) {
        let directory = std::env::var_os(DIRECTORY).unwrap();
        tokio::runtime::Runtime::new().unwrap().block_on(serve_endless(Path::new(&directory)));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for hangs_up in [true, false] {
        let mut server = Server::start(ENDLESS, &dir.path().join("store"));
        let mut client = std::net::TcpStream::connect(&server.address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let head = "POST /events HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\nidempotency-key: k";
        client.write_all(format!("{head}{hangs_up}\r\n\r\n").as_bytes()).unwrap();
        let mut answer = BufReader::new(client);
        let mut line = String::new();
        while !line.ends_with("data: tick\n") {
            assert!(answer.read_line(&mut line).unwrap() > 0, "{line}");
        }
        assert!(line.starts_with("HTTP/1.1 200 "), "{line}");
        let client = (!hangs_up).then_some(answer);
        server.terminate();
        let told = std::time::Instant::now();
        let ended = loop {
            if let Some(status) = server.process.try_wait().unwrap() {
                break status;
            }
            assert!(told.elapsed() < Duration::from_secs(8), "it does not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(ended.success());
        drop(client);
    }
}

#[tokio::test]
async fn an_answer_that_is_too_large_to_keep_is_given_once_and_its_work_is_not_repeated() {
    let bench = Bench::with(|builder| builder.result_limit(1_000), |layer| layer).await;
    for bytes in [1_000, 1_001, 100_000] {
        let (path, runs) = (format!("/large/{bytes}"), bench.stage.runs());
        let first = bench.post(&path, &path).await;
        assert_eq!((first.status.as_u16(), first.body.len()), (201, bytes), "the first one gets all of it");
        let retry = bench.post(&path, &path).await;
        assert_eq!(retry.problem(), (201, "answer-not-kept".to_owned()), "a retry is told how it went");
        assert!(retry.is_replayed());
        assert_eq!(retry.headers[LOCATION], "/large/1");
        assert!(retry.headers.get(ETAG).is_none(), "that was of the body");
        assert_eq!(bench.stage.runs(), runs + 1);
    }
    let fits = bench.post("/large/900", "fits").await;
    assert_eq!(bench.post("/large/900", "fits").await.body, fits.body);
    assert_eq!(bench.layer.figures().bodies_not_kept, 3);

    // Where there is no room for the headers, and for the status neither.
    for (limit, status) in [(8, 201), (0, 500)] {
        let bench = Bench::with(|builder| builder.result_limit(limit), |layer| layer).await;
        assert_eq!(bench.post("/large/100", "k").await.body.len(), 100);
        let retry = bench.post("/large/100", "k").await;
        assert_eq!(retry.problem(), (status, "answer-not-kept".to_owned()));
        assert!(retry.headers.get(LOCATION).is_none());
        assert_eq!(bench.stage.runs(), 1);
    }
}

#[tokio::test]
async fn a_panic_is_500_and_the_next_attempt_is_told() {
    let bench = Bench::new().await;
    assert_eq!(bench.post("/panic", "k").await.problem(), (500, "handler-failed".to_owned()));
    assert_eq!(bench.layer.figures().interrupted, 1);
    let retry = bench.post("/panic", "k").await;
    assert_eq!(retry.text(), (200, "run 2, attempt 2, prior Some(Dropped)"));
    assert!(bench.post("/panic", "k").await.is_replayed());
    assert_eq!(bench.layer.idle(LONG).await, 0);
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_stored_and_the_next_attempt_is_told() {
    let bench = Bench::new().await;
    assert_eq!(bench.post("/broken", "k").await.problem(), (500, "handler-failed".to_owned()));
    for replayed in [false, true] {
        let retry = bench.post("/broken", "k").await;
        assert_eq!(retry.text(), (200, "so far, run 2, attempt 2, prior Some(Dropped)"));
        assert_eq!(retry.is_replayed(), replayed);
    }
}

#[tokio::test]
async fn an_error_of_the_service_is_passed_on_and_the_next_attempt_is_told() {
    let bench = Bench::new().await;
    let layer = IdempotencyLayer::builder(bench.store.clone()).one_scope_for_all_callers();
    let mut service = layer.layer(Plain { fails: 1, ..Plain::default() });
    let request = || Request::post("/charges").header(&KEY, "k").body(whole("same")).unwrap();
    assert_eq!(service.call(request()).await.unwrap_err().to_string(), "a failure that the test wants");
    assert_eq!(layer.figures().interrupted, 1);
    let retry = service.call(request()).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(retry, "run 1, prior Some(Dropped)");
    assert!(service.call(request()).await.unwrap().headers().contains_key(&REPLAYED));
}

#[tokio::test]
async fn while_the_store_fails_nothing_runs_unless_that_was_said_aloud() {
    let closed = Bench::new().await;
    assert_eq!(closed.post("/charges", "k").await.status, 201);
    closed.store.close().await.unwrap();
    for key in ["k", "new"] {
        assert_eq!(closed.post("/charges", key).await.problem(), (503, "store-failed".to_owned()));
    }
    let figures = closed.layer.figures();
    assert_eq!((closed.stage.runs(), figures.failed_closed, figures.failed_open), (1, 2, 0));

    let open = |layer: IdempotencyLayer| layer.on_store_failure(OnStoreFailure::FailOpen);
    let open = Bench::with(|builder| builder, open).await;
    open.store.close().await.unwrap();
    for run in 1..=3 {
        let answer = open.send(open.request("/charges", Some("k")), "x").await;
        assert_eq!(answer.text(), (201, format!("run {run}, not guarded, body of 1").as_str()));
    }
    assert_eq!((open.layer.figures().failed_open, open.layer.figures().failed_closed), (3, 0));
    assert_eq!(open.store.blocking().stats().fail_open, 3, "and where the metrics see it");
}

#[tokio::test]
async fn an_answer_that_cannot_be_stored_is_given_only_where_that_was_said_aloud() {
    for (policy, status) in [(OnStoreFailure::FailClosed, 503), (OnStoreFailure::FailOpen, 200)] {
        let bench = Bench::with(|builder| builder, |layer| layer.on_store_failure(policy)).await;
        let client = tokio::spawn({
            let (client, request) = (bench.client.clone(), bench.request("/slow", Some("k")));
            async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() }
        });
        bench.stage.started.take().await;
        bench.store.close().await.unwrap();
        bench.stage.gate.add();
        let answer = client.await.unwrap();
        assert_eq!(answer.status.as_u16(), status);
        let figures = bench.layer.figures();
        if policy == OnStoreFailure::FailClosed {
            assert_eq!(answer.code(), "answer-not-stored");
            assert_eq!((figures.failed_closed, figures.failed_open), (1, 0));
        } else {
            assert_eq!(answer.body, "run 1, attempt 1, prior None");
            assert_eq!((figures.failed_closed, figures.failed_open), (0, 1));
        }
    }
}

#[tokio::test]
async fn under_hold_an_interrupted_key_has_no_retry_after_until_it_is_resolved() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold), |layer| layer).await;
    assert_eq!(bench.post("/status/500", "k").await.status, 500);
    let held = bench.post("/status/500", "k").await;
    assert_eq!(held.problem(), (409, "held".to_owned()));
    assert!(held.headers.get(RETRY_AFTER).is_none());
    assert_eq!(bench.post("/status/429", "free").await.status, 429);
    assert_eq!(bench.post("/status/429", "free").await.body, "run 3, attempt 2, prior Some(Released)");

    let store = bench.store.blocking();
    let keys: Vec<_> = store.held().unwrap().into_iter().map(|held| held.key).collect();
    assert_eq!(keys, [Key::from("k").scope("a")]);
    let answer = http::Response::builder().status(201).header(LOCATION, "/charges/7").body("found").unwrap();
    let done = Resolution::Completed(StoredResponse::new(answer).encode());
    store.resolve(&keys[0], done).unwrap();
    let retry = bench.post("/status/500", "k").await;
    assert!(retry.is_replayed());
    assert_eq!((retry.text(), &retry.headers[LOCATION]), ((201, "found"), &"/charges/7".parse().unwrap()));

    bench.post("/status/500", "again").await;
    store.resolve(Key::from("again").scope("a"), Resolution::Rerun).unwrap();
    assert_eq!(bench.post("/status/500", "again").await.body, "run 5, attempt 2, prior Some(Dropped)");
}

#[tokio::test]
async fn what_is_no_answer_in_the_store_is_an_error_and_no_reason_to_run() {
    let bench = Bench::new().await;
    for (key, result) in [("foreign", &b"charged"[..]), ("damaged", b"OHR\x01\x00\xc9\x05"), ("newer", b"OHR\x02")] {
        let claim = bench.store.claim(Key::from(key).scope("a")).await.unwrap();
        let Claim::Acquired(lease) = claim else { panic!("{key} is free") };
        lease.complete(result).await.unwrap();
        let answer = bench.post("/charges", key).await;
        assert_eq!(answer.problem(), (500, "answer-unreadable".to_owned()), "{key}");
    }
    bench.store.record(Key::from("recorded").scope("a")).await.unwrap();
    assert_eq!(bench.post("/charges", "recorded").await.problem(), (500, "answer-not-kept".to_owned()));
    assert_eq!(bench.stage.runs(), 0);
}

#[tokio::test]
async fn a_handler_that_takes_longer_than_a_lease_keeps_its_key() {
    let bench = Bench::with(|builder| builder.lease(Duration::from_millis(300)), |layer| layer).await;
    let first = tokio::spawn({
        let (client, request) = (bench.client.clone(), bench.request("/slow", Some("k")));
        async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() }
    });
    bench.stage.started.take().await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let other = bench.post("/slow", "k").await;
        assert_eq!(other.problem(), (409, "outstanding".to_owned()));
        assert_eq!(other.headers[RETRY_AFTER], "1");
    }
    bench.stage.gate.add();
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(bench.stage.runs(), 1);
}

/// Sleeps without giving its thread back, as a synchronous client does.
async fn blocks(State(stage): State<Arc<Stage>>, attempt: Attempted) -> String {
    let run = stage.run(of(&attempt));
    stage.started.add();
    std::thread::sleep(Duration::from_millis(1_500));
    run
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_handler_that_blocks_its_thread_keeps_its_key() {
    let bench = Bench::with(|builder| builder.lease(Duration::from_millis(300)), |layer| layer).await;
    let first = tokio::spawn({
        let (client, request) = (bench.client.clone(), bench.request("/blocks", Some("k")));
        async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() }
    });
    bench.stage.started.take().await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(bench.post("/blocks", "k").await.problem(), (409, "outstanding".to_owned()));
    }
    assert_eq!(first.await.unwrap().text(), (200, "run 1, attempt 1, prior None"));
    assert_eq!(bench.post("/blocks", "k").await.text(), (200, "run 1, attempt 1, prior None"));
    assert_eq!(bench.stage.runs(), 1);
    bench.store.close().await.unwrap();
}

#[test]
fn a_handler_that_blocks_the_only_thread_keeps_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let builder = onlyonce::Store::builder().lease(Duration::from_millis(300)).memory_budget(32 << 20);
    let store = Store::new(builder.open(dir.path().join("store")).unwrap()).unwrap();
    let layer = IdempotencyLayer::builder(store.clone()).one_scope_for_all_callers();
    let stage = Arc::<Stage>::default();
    let app = Router::new().route("/", post(blocks)).layer(layer).with_state(Arc::clone(&stage));
    // Each request in a runtime of its own, that has one thread.
    let answered = |mut app: Router| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let request = Request::post("/").header(&KEY, "k").body(Body::empty()).unwrap();
        runtime.block_on(app.call(request)).unwrap().status()
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| answered(app.clone()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(stage.started.take());
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(answered(app.clone()), StatusCode::CONFLICT);
        }
        assert_eq!(first.join().unwrap(), StatusCode::OK);
    });
    assert_eq!((answered(app), stage.runs()), (StatusCode::OK, 1));
    store.blocking().close().unwrap();
}

#[tokio::test]
async fn who_was_overtaken_is_not_believed_and_its_retry_gets_the_answer_of_the_other() {
    let clock = ManualClock::at(common::START_MS);
    let by_hand = clock.clone();
    let bench = Bench::with(|builder| builder.clock(by_hand).lease(Duration::from_secs(60)), |layer| layer).await;
    let post = || {
        let (client, request) = (bench.client.clone(), bench.request("/slow", Some("k")));
        tokio::spawn(async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() })
    };
    let first = post();
    bench.stage.started.take().await;
    // The lease is renewed at once, and then every 20 seconds.
    tokio::time::sleep(Duration::from_millis(50)).await;
    // A process that stood still for longer than its lease.
    clock.advance(Duration::from_secs(61));
    let second = post();
    bench.stage.started.take().await;
    bench.stage.gate.add();
    let first = first.await.unwrap();
    assert_eq!(first.problem(), (409, "overtaken".to_owned()));
    assert!(first.headers.contains_key(RETRY_AFTER));
    bench.stage.gate.add();
    assert_eq!(second.await.unwrap().body, "run 2, attempt 2, prior Some(LeaseExpired)");
    let retry = bench.post("/slow", "k").await;
    assert_eq!(retry.body, "run 2, attempt 2, prior Some(LeaseExpired)");
    assert_eq!((bench.layer.figures().interrupted, bench.layer.figures().stored), (1, 1));
}

#[tokio::test]
async fn who_is_overtaken_at_work_is_stopped() {
    let clock = ManualClock::at(common::START_MS);
    let by_hand = clock.clone();
    let bench = Bench::with(|builder| builder.clock(by_hand).lease(Duration::from_millis(300)), |layer| layer).await;
    let post = || {
        let (client, request) = (bench.client.clone(), bench.request("/slow", Some("k")));
        tokio::spawn(async move { sent(&client, request.body(Full::default()).unwrap()).await.unwrap() })
    };
    let first = post();
    bench.stage.started.take().await;
    let second = loop {
        clock.advance(Duration::from_millis(301));
        let mut second = post();
        tokio::select! {
            // A renewal was faster.
            other = &mut second => assert_eq!(other.unwrap().problem(), (409, "outstanding".to_owned())),
            () = bench.stage.started.take() => break second,
        }
    };
    // Nobody has opened its gate.
    assert_eq!(first.await.unwrap().problem(), (409, "overtaken".to_owned()));
    bench.stage.gate.add();
    assert_eq!(second.await.unwrap().body, "run 2, attempt 2, prior Some(LeaseExpired)");
}

const KILLED: &str = "a_server_killed_in_the_middle_charges_every_order_once_and_loses_none";
const DIRECTORY: &str = "ONLYONCE_HTTP_DIRECTORY";

/// The example's server in a process of its own, killed when this is dropped.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(test: &str, directory: &Path) -> Self {
        let mut process = child::command(test).env(DIRECTORY, directory).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        // The harness has begun the line.
        let address = lines.find_map(|line| Some(line.unwrap().split_once("listening on http://")?.1.to_owned()));
        // What it says later is not of interest, but it must not stand still for it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address: address.unwrap() }
    }

    fn terminate(&self) {
        let pid = self.process.id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the clients have sent, and what they were answered.
#[derive(Default)]
struct Orders {
    sent: usize,
    open: BTreeSet<usize>,
    answered: BTreeMap<usize, String>,
}

type Shared = Arc<Mutex<Orders>>;

/// Sends an order. `None` where the server is gone.
async fn send_order(
    client: &Client<HttpConnector, Full<Bytes>>,
    address: &str,
    orders: &Shared,
    order: usize,
) -> Option<()> {
    let request = Request::post(format!("http://{address}/charges"))
        .header("authorization", "Bearer sk_alice")
        .header(CONTENT_TYPE, "application/json")
        .header(&KEY, format!("\"order-{order}\""))
        .body(Full::new(Bytes::from(format!("{{\"cents\": {}, \"currency\": \"eur\"}}", order + 1))))
        .unwrap();
    let answer = sent(client, request).await.ok()?;
    let mut orders = orders.lock().unwrap();
    match answer.status.as_u16() {
        201 => {
            orders.open.remove(&order);
            let before = orders.answered.entry(order).or_insert_with(|| answer.body.clone());
            assert_eq!(*before, answer.body, "order {order} has two answers");
        }
        409 => assert!(answer.headers.contains_key(RETRY_AFTER), "{}", answer.body),
        other => panic!("order {order}: {other} {}", answer.body),
    }
    Some(())
}

#[test]
fn a_server_killed_in_the_middle_charges_every_order_once_and_loses_none() {
    const CLIENTS: usize = 16;
    if child::is_child(KILLED) {
        let directory = std::env::var_os(DIRECTORY).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(http_payments::serve("127.0.0.1:0", Path::new(&directory))).unwrap();
        return;
    }
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let rounds = number("ONLYONCE_HTTP_ROUNDS").unwrap_or(10);
    let seed = number("ONLYONCE_HTTP_SEED").unwrap_or_else(rand::random);
    eprintln!("ONLYONCE_HTTP_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("store");
    let orders = Shared::default();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for round in 0..rounds {
        let mut server = Server::start(KILLED, &directory);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let (address, orders) = (server.address.clone(), Arc::clone(&orders));
                let mut rng = StdRng::seed_from_u64(seed.wrapping_add(round * 1_000 + client as u64));
                runtime.spawn(async move {
                    let client = Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http();
                    loop {
                        let order = {
                            let mut orders = orders.lock().unwrap();
                            let open = orders.open.len();
                            match rng.random_range(0..10) {
                                // A retry of what has no answer yet, maybe at the same time as another client's.
                                0..4 if open > 0 => *orders.open.iter().nth(rng.random_range(0..open)).unwrap(),
                                // A retry of anything.
                                4..6 if orders.sent > 0 => rng.random_range(0..orders.sent),
                                _ => {
                                    let order = orders.sent;
                                    orders.sent += 1;
                                    orders.open.insert(order);
                                    order
                                }
                            }
                        };
                        if send_order(&client, &address, &orders, order).await.is_none() {
                            return;
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_millis(rng.random_range(20..250)));
        server.process.kill().unwrap();
        for client in clients {
            runtime.block_on(client).unwrap();
        }
    }

    let mut server = Server::start(KILLED, &directory);
    let left = orders.lock().unwrap().open.len();
    runtime.block_on(async {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let sent = orders.lock().unwrap().sent;
        for order in 0..sent {
            send_order(&client, &server.address, &orders, order).await.unwrap();
        }
    });
    // Told to end, it closes its store and says that all went well.
    server.terminate();
    assert!(server.process.wait().unwrap().success());

    let ledger = std::fs::read_to_string(directory.with_extension("bank")).unwrap();
    let (mut charges, mut asked, mut found) = (BTreeMap::<String, Vec<String>>::new(), 0, 0);
    for line in ledger.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let reference = line["reference"].as_str().unwrap().to_owned();
        match line["charge"]["id"].as_str() {
            Some(id) => charges.entry(reference).or_default().push(id.to_owned()),
            None => {
                asked += 1;
                found += usize::from(charges.contains_key(&reference));
            }
        }
    }
    let orders = orders.lock().unwrap();
    eprintln!(
        "{rounds} kills, {} orders, {left} without an answer before the last start; the bank was asked {asked} times, and \
         {found} times it had charged",
        orders.sent
    );
    assert!(orders.open.is_empty(), "lost: {:?}", orders.open);
    assert_eq!(charges.len(), orders.sent);
    for order in 0..orders.sent {
        let charged = &charges[&format!("alice/order-{order}")];
        assert_eq!(charged.len(), 1, "order {order}");
        assert!(orders.answered[&order].contains(&format!("\"{}\"", charged[0])), "order {order}");
    }
    assert!(found > 0, "no kill came between a charge and its answer: the test has seen nothing");
}
