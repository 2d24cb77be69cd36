//! Four HTTP servers over one database, which are killed at random, and clients that retry at random servers: each order is charged
//! once, and every response about it is the first one.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Extension, Router};
use common::{builder, client, database, drop_schema, new_schema, start};
use onlyonce_http::{Attempt, IdempotencyLayer};
use onlyonce_postgres::PgStoreBuilder;
use rand::RngExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::{Client, Config, NoTls};

const SERVERS: usize = 4;
const CLIENTS: usize = 8;

/// A lease whose claim was written while its server was killed lasts until it expires.
fn options(schema: &str) -> PgStoreBuilder {
    builder(schema).connections(4).lease(Duration::from_secs(5))
}

struct Bank {
    client: Client,
    schema: String,
}

/// Charges an order. An attempt that is not in doubt must not find a charge.
async fn charge(
    State(bank): State<Arc<Bank>>,
    Extension(attempt): Extension<Attempt>,
    order: String,
) -> Result<String, StatusCode> {
    let charge = format!("INSERT INTO \"{}\".charges VALUES ($1) ON CONFLICT DO NOTHING", bank.schema);
    let charged = bank.client.execute(&charge, &[&order]).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    if charged == 0 && !attempt.may_have_happened() {
        let twice = format!("INSERT INTO \"{}\".charged_twice VALUES ($1)", bank.schema);
        bank.client.execute(&twice, &[&order]).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    }
    let pause = rand::rng().random_range(0..40);
    tokio::time::sleep(Duration::from_millis(pause)).await;
    Ok(format!("{order} charged by {}, lease {}", std::process::id(), attempt.token()))
}

/// One server. Does nothing in the process of the tests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_process() {
    let Ok(path) = std::env::var("ONLYONCE_SERVER") else { return };
    let schema = std::env::var("ONLYONCE_SERVER_SCHEMA").unwrap();
    let config = Config::from_str(&std::env::var("ONLYONCE_POSTGRES").unwrap()).unwrap();
    let store = options(&schema).connect(&config, NoTls).await.unwrap();
    let bank = Arc::new(Bank { client: client(&config).await, schema });
    let layer = IdempotencyLayer::builder(store).shared_scope();
    let app = Router::new().route("/charges", post(charge)).route_layer(layer).with_state(bank);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    // The parent sees the whole port or none.
    let port = listener.local_addr().unwrap().port();
    std::fs::write(format!("{path}.new"), port.to_string()).unwrap();
    std::fs::rename(format!("{path}.new"), path).unwrap();
    axum::serve(listener, app).await.unwrap();
}

struct Server {
    process: Child,
    port: PathBuf,
}

impl Server {
    fn start(dir: &Path, number: usize, schema: &str) -> Self {
        let port = dir.join(format!("port-{number}"));
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "server_process", "--nocapture"])
            .env("ONLYONCE_SERVER", &port)
            .env("ONLYONCE_SERVER_SCHEMA", schema)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, port }
    }
}

/// Also after a failed assertion.
impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Sends an order. `None` if no whole response came back.
async fn send(port: u16, order: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    let request = format!(
        "POST /charges HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: \"{order}\"\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{order}",
        order.len()
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut response = String::new();
    stream.read_to_string(&mut response).await.ok()?;
    let (head, body) = response.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let length =
        head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok())?;
    (body.len() == length).then(|| (status, body.to_owned()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_order_is_charged_once_although_servers_are_killed_and_clients_retry_elsewhere() {
    let Some(config) = database() else { return };
    let seconds = std::env::var("ONLYONCE_POSTGRES_SECONDS").map_or(8, |seconds| seconds.parse().unwrap());
    let (schema, dir) = (new_schema(), tempfile::tempdir().unwrap());
    drop(start(&config, &options(&schema)).await);
    let database = client(&config).await;
    let tables = format!(
        "CREATE TABLE \"{schema}\".charges (id text PRIMARY KEY); CREATE TABLE \"{schema}\".charged_twice (id text)"
    );
    database.batch_execute(&tables).await.unwrap();
    let mut servers: Vec<Server> = (0..SERVERS).map(|number| Server::start(dir.path(), number, &schema)).collect();
    let ports = Arc::new(Mutex::new(Vec::new()));
    let (orders, requests, retries) =
        (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (begun, is_over) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let (ports, orders, is_over) = (Arc::clone(&ports), Arc::clone(&orders), Arc::clone(&is_over));
            let (requests, retries) = (Arc::clone(&requests), Arc::clone(&retries));
            tokio::spawn(async move {
                let mut responses = HashMap::new();
                while !is_over.load(Ordering::Relaxed) {
                    let (begun, order) = (Instant::now(), format!("order-{}", orders.fetch_add(1, Ordering::Relaxed)));
                    // Until three servers have answered.
                    let mut answered = 0;
                    while answered < 3 {
                        assert!(begun.elapsed() < Duration::from_secs(60), "{order} is not answered");
                        requests.fetch_add(1, Ordering::Relaxed);
                        let port = random_port(&ports);
                        match send(port, &order).await {
                            Some((200, receipt)) => {
                                let first = responses.entry(order.clone()).or_insert_with(|| receipt.clone());
                                assert_eq!(*first, receipt, "another response about {order}");
                                answered += 1;
                            }
                            _ => {
                                retries.fetch_add(1, Ordering::Relaxed);
                                tokio::time::sleep(Duration::from_millis(10)).await;
                            }
                        }
                    }
                }
                responses.len()
            })
        })
        .collect();
    let mut kills = 0;
    while !clients.iter().all(tokio::task::JoinHandle::is_finished) {
        assert!(begun.elapsed() < Duration::from_secs(seconds * 8 + 120), "the clients do not end");
        *ports.lock().unwrap() =
            servers.iter().filter_map(|server| std::fs::read_to_string(&server.port).ok()?.parse().ok()).collect();
        let pause = rand::rng().random_range(50..200);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        // On a slow machine it takes longer until enough has happened.
        let has_enough = kills > 20 && orders.load(Ordering::Relaxed) > 100;
        if begun.elapsed() > Duration::from_secs(if has_enough { seconds } else { seconds * 8 }) {
            is_over.store(true, Ordering::Relaxed);
        } else if ports.lock().unwrap().len() >= SERVERS - 1 {
            // Two servers answer at any time.
            drop(servers.swap_remove(rand::rng().random_range(0..SERVERS)));
            kills += 1;
            servers.push(Server::start(dir.path(), SERVERS + kills, &schema));
        }
    }
    let mut answered = 0;
    for client in clients {
        answered += client.await.unwrap();
    }
    drop(servers);
    let counts = format!(
        "SELECT (SELECT count(*) FROM \"{schema}\".charges), (SELECT count(*) FROM \"{schema}\".charged_twice)"
    );
    let row = database.query_one(&counts, &[]).await.unwrap();
    let (charges, twice): (i64, i64) = (row.get(0), row.get(1));
    println!(
        "{kills} kills, {} requests, {} of them retried, {charges} charges",
        requests.load(Ordering::Relaxed),
        retries.load(Ordering::Relaxed)
    );
    assert_eq!(
        (usize::try_from(charges).unwrap(), twice),
        (answered, 0),
        "charges, and orders that were charged twice"
    );
    assert!(kills > 10 && answered > 50, "the test did not reach what it tests");
    drop_schema(&config, &schema).await;
}

/// The port of a server. It may have been killed meanwhile.
fn random_port(ports: &Mutex<Vec<u16>>) -> u16 {
    let ports = ports.lock().unwrap();
    if ports.is_empty() { 1 } else { ports[rand::rng().random_range(0..ports.len())] }
}
