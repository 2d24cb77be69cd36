//! Servers in processes of their own, which the tests kill or stop.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Child;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::routing::post;
use bytes::Bytes;
use http::Request;
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use onlyonce::Store;
use onlyonce::http::IdempotencyLayer;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::unbounded_channel;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::child;
use crate::setup::{HttpClient, KEY, send};

// The example, which the tests run in a child process.
#[path = "../../examples/http_payments.rs"]
#[allow(dead_code, unreachable_pub, reason = "it is a program of its own")]
mod http_payments;

const KILLED: &str = "processes::a_killed_server_charges_each_order_once_and_loses_none";
const ENDLESS: &str = "processes::a_server_with_an_endless_response_stops_on_sigterm";
const DIRECTORY: &str = "ONLYONCE_HTTP_DIRECTORY";
const CLIENTS: usize = 16;

/// A child process that runs a server. It is killed on drop.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(test: &str, directory: &Path) -> Self {
        let mut process = child::command(test).env(DIRECTORY, directory).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        // The test harness may have written to the same line before.
        let address = lines.find_map(|line| Some(line.unwrap().split_once("listening on http://")?.1.to_owned()));
        // Drains the pipe, so that the process never blocks on it.
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

/// Serves endless events, and stops as `docs/http.md` describes.
async fn serve_endless(directory: &Path) {
    let limit = Duration::from_millis(500);
    let store = Store::open(directory).unwrap();
    let layer = IdempotencyLayer::builder(store.clone()).shared_scope();
    let events = async || {
        let (ticks, frames) = unbounded_channel();
        tokio::spawn(async move {
            while ticks.send(Ok::<_, std::io::Error>("data: tick\n\n")).is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        ([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(UnboundedReceiverStream::new(frames)))
    };
    let app = Router::new().route("/events", post(events)).route_layer(layer.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    println!("listening on http://{}", listener.local_addr().unwrap());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let shutdown = async move {
        terminate.recv().await;
        stop.send(()).unwrap();
    };
    tokio::select! {
        served = axum::serve(listener, app).with_graceful_shutdown(shutdown) => served.unwrap(),
        () = async { stopped.await.unwrap(); tokio::time::sleep(limit).await } => {}
    }
    assert!(layer.wait_idle(limit).await > 0);
    store.close().await.unwrap();
}

#[test]
fn a_server_with_an_endless_response_stops_on_sigterm() {
    if child::is_child(ENDLESS) {
        let directory = std::env::var_os(DIRECTORY).unwrap();
        Runtime::new().unwrap().block_on(serve_endless(Path::new(&directory)));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for disconnects in [true, false] {
        let mut server = Server::start(ENDLESS, &dir.path().join("store"));
        let mut client = std::net::TcpStream::connect(&server.address).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let head = "POST /events HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\nidempotency-key: k";
        client.write_all(format!("{head}{disconnects}\r\n\r\n").as_bytes()).unwrap();
        let mut response = BufReader::new(client);
        let mut text = String::new();
        while !text.ends_with("data: tick\n") {
            assert!(response.read_line(&mut text).unwrap() > 0, "{text}");
        }
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        let client = (!disconnects).then_some(response);
        server.terminate();
        let terminated = Instant::now();
        let status = loop {
            if let Some(status) = server.process.try_wait().unwrap() {
                break status;
            }
            assert!(terminated.elapsed() < Duration::from_secs(8), "the server does not stop");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success());
        drop(client);
    }
}

/// The orders that the clients have sent, and their responses.
#[derive(Default)]
struct Orders {
    sent: usize,
    unanswered: BTreeSet<usize>,
    responses: BTreeMap<usize, String>,
}

impl Orders {
    /// Picks a new order, or one to retry.
    fn pick(&mut self, rng: &mut StdRng) -> usize {
        let unanswered = self.unanswered.len();
        match rng.random_range(0..10) {
            // Possibly at the same time as another client.
            0..4 if unanswered > 0 => *self.unanswered.iter().nth(rng.random_range(0..unanswered)).unwrap(),
            4..6 if self.sent > 0 => rng.random_range(0..self.sent),
            _ => {
                let order = self.sent;
                self.sent += 1;
                self.unanswered.insert(order);
                order
            }
        }
    }
}

type SharedOrders = Arc<Mutex<Orders>>;

/// Sends an order and checks its response. Returns `None` if the server was killed.
async fn send_order(client: &HttpClient, address: &str, orders: &SharedOrders, order: usize) -> Option<()> {
    let request = Request::post(format!("http://{address}/charges"))
        .header("authorization", "Bearer sk_alice")
        .header(CONTENT_TYPE, "application/json")
        .header(&KEY, format!("\"order-{order}\""))
        .body(Full::new(Bytes::from(format!("{{\"cents\": {}, \"currency\": \"eur\"}}", order + 1))))
        .unwrap();
    let response = send(client, request).await.ok()?;
    let mut orders = orders.lock().unwrap();
    match response.status.as_u16() {
        201 => {
            orders.unanswered.remove(&order);
            let first = orders.responses.entry(order).or_insert_with(|| response.body.clone());
            assert_eq!(*first, response.body, "order {order} has two responses");
        }
        409 => assert!(response.headers.contains_key(RETRY_AFTER), "{}", response.body),
        other => panic!("order {order}: {other} {}", response.body),
    }
    Some(())
}

/// Sends orders until the server is killed.
async fn send_orders(address: String, orders: SharedOrders, mut rng: StdRng) {
    let client = Client::builder(TokioExecutor::new()).retry_canceled_requests(false).build_http();
    loop {
        let order = orders.lock().unwrap().pick(&mut rng);
        if send_order(&client, &address, &orders, order).await.is_none() {
            return;
        }
    }
}

/// The bank's ledger.
#[derive(Default)]
struct Ledger {
    charges: BTreeMap<String, Vec<String>>,
    queries: usize,
    /// Queries that found a charge of an interrupted attempt.
    found: usize,
}

impl Ledger {
    fn read(path: &Path) -> Self {
        let mut ledger = Self::default();
        for line in std::fs::read_to_string(path).unwrap().lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let reference = line["reference"].as_str().unwrap().to_owned();
            match line["charge"]["id"].as_str() {
                Some(id) => ledger.charges.entry(reference).or_default().push(id.to_owned()),
                None => {
                    ledger.queries += 1;
                    ledger.found += usize::from(ledger.charges.contains_key(&reference));
                }
            }
        }
        ledger
    }
}

#[test]
fn a_killed_server_charges_each_order_once_and_loses_none() {
    if child::is_child(KILLED) {
        let directory = std::env::var_os(DIRECTORY).unwrap();
        Runtime::new().unwrap().block_on(http_payments::serve("127.0.0.1:0", Path::new(&directory))).unwrap();
        return;
    }
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    let rounds = number("ONLYONCE_HTTP_ROUNDS").unwrap_or(10);
    let seed = number("ONLYONCE_HTTP_SEED").unwrap_or_else(rand::random);
    eprintln!("ONLYONCE_HTTP_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let directory = dir.path().join("store");
    let orders = SharedOrders::default();
    let runtime = Runtime::new().unwrap();
    for round in 0..rounds {
        let mut server = Server::start(KILLED, &directory);
        let spawn = |client: usize| {
            let rng = StdRng::seed_from_u64(seed.wrapping_add(round * 1_000 + client as u64));
            runtime.spawn(send_orders(server.address.clone(), Arc::clone(&orders), rng))
        };
        let clients: Vec<_> = (0..CLIENTS).map(spawn).collect();
        std::thread::sleep(Duration::from_millis(rng.random_range(20..250)));
        server.process.kill().unwrap();
        for client in clients {
            runtime.block_on(client).unwrap();
        }
    }

    let mut server = Server::start(KILLED, &directory);
    let unanswered = orders.lock().unwrap().unanswered.len();
    runtime.block_on(async {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let sent = orders.lock().unwrap().sent;
        for order in 0..sent {
            send_order(&client, &server.address, &orders, order).await.unwrap();
        }
    });
    server.terminate();
    assert!(server.process.wait().unwrap().success());

    let ledger = Ledger::read(&directory.with_extension("bank"));
    let orders = orders.lock().unwrap();
    let Ledger { charges, queries, found } = ledger;
    eprintln!("{rounds} kills, {} orders, {unanswered} unanswered before the last start", orders.sent);
    eprintln!("{queries} queries to the bank, {found} of them found a charge");
    assert!(orders.unanswered.is_empty(), "lost: {:?}", orders.unanswered);
    assert_eq!(charges.len(), orders.sent);
    for order in 0..orders.sent {
        let charged = &charges[&format!("alice/order-{order}")];
        assert_eq!(charged.len(), 1, "order {order}");
        assert!(orders.responses[&order].contains(&format!("\"{}\"", charged[0])), "order {order}");
    }
    assert!(found > 0, "no kill came between a charge and its response: the test is not effective");
}
