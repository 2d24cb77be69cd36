//! A payments API whose clients retry: each charge is made once.
//!
//! ```text
//! cargo run --release --features http --example http_payments -- 127.0.0.1:3000 payments.store
//!
//! curl -i 127.0.0.1:3000/charges -H 'authorization: Bearer sk_alice' -H 'idempotency-key: "order-4711"' \
//!      -H 'content-type: application/json' -d '{"cents": 1200, "currency": "eur"}'
//! ```
//!
//! Send the last command again: it gets the same response with `idempotent-replayed: true`, and the account is not charged
//! again. This also holds if both requests are concurrent, if the first client disconnects, or if the server is killed in
//! between.
//!
//! [`charge`] is a realistic handler. The bank is a simulation: a file next to the store, with a delay of some milliseconds.
//! It does not deduplicate charges.

#![allow(clippy::print_stdout, reason = "an example prints to its user")]

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::extract::{self, Request, State};
use axum::http::header::{AUTHORIZATION, LOCATION};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use onlyonce::http::{Attempt, IdempotencyLayer};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The authenticated account of a request.
#[derive(Clone)]
struct Account(String);

#[derive(Deserialize)]
struct Order {
    cents: u64,
    currency: String,
}

#[derive(Clone, Serialize, Deserialize)]
struct Charge {
    id: String,
    cents: u64,
    currency: String,
}

/// Charges an order. Runs once for each key, and again after an interrupted attempt.
async fn charge(
    State(bank): State<Bank>,
    Extension(Account(account)): Extension<Account>,
    Extension(attempt): Extension<Attempt>,
    Json(order): Json<Order>,
) -> Result<Response, Unavailable> {
    if order.cents == 0 {
        // Before `begin`, an error releases the key: the client may correct the order and send the same key.
        return Ok((StatusCode::UNPROCESSABLE_ENTITY, "nothing to charge").into_response());
    }
    // From now on there may be an effect: a 4xx is stored, and a 5xx leaves the outcome unknown.
    attempt.begin();
    // The bank's reference for the charge. It contains the account because two accounts may choose the same key.
    let reference = format!("{account}/{}", attempt.key());
    // An earlier attempt was interrupted by a crash or an error, and may have charged.
    let earlier =
        if attempt.may_have_happened() { bank.charge_of(&reference, attempt.token().get()).await? } else { None };
    let charge = match earlier {
        Some(charge) => charge,
        None => bank.charge(&reference, &order, attempt.token().get()).await?,
    };
    Ok((StatusCode::CREATED, [(LOCATION, format!("/charges/{}", charge.id))], Json(charge)).into_response())
}

/// The bank did not respond, and may have charged. After `begin`, a 5xx interrupts the attempt, so that the retry queries
/// the bank.
struct Unavailable;

impl IntoResponse for Unavailable {
    fn into_response(self) -> Response {
        (StatusCode::BAD_GATEWAY, "the bank did not respond; retry with the same key").into_response()
    }
}

impl From<io::Error> for Unavailable {
    fn from(error: io::Error) -> Self {
        eprintln!("bank request failed: {error}");
        Self
    }
}

/// Returns a charge of the account.
async fn look_up(
    State(bank): State<Bank>,
    Extension(Account(account)): Extension<Account>,
    extract::Path(id): extract::Path<String>,
) -> Result<Json<Charge>, Response> {
    let lines = bank.lines().map_err(|error| Unavailable::from(error).into_response())?;
    let own = lines.into_iter().filter(|line| line.reference.starts_with(&format!("{account}/")));
    let found = own.filter_map(|line| line.charge).find(|charge| charge.id == id);
    found.map(Json).ok_or(StatusCode::NOT_FOUND.into_response())
}

/// Adds the account to the request, or responds with 401.
async fn authenticate(headers: HeaderMap, mut request: Request, next: Next) -> Response {
    let secret = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer sk_"));
    let Some(account @ ("alice" | "bob")) = secret else { return StatusCode::UNAUTHORIZED.into_response() };
    request.extensions_mut().insert(Account(account.to_owned()));
    next.run(request).await
}

/// A bank in a file. It does not deduplicate. It only rejects a fencing token that is lower than one it has seen.
#[derive(Clone)]
struct Bank {
    ledger: PathBuf,
}

/// A line of the ledger: a charge, or a query for one.
#[derive(Serialize, Deserialize)]
struct Line {
    reference: String,
    token: u64,
    charge: Option<Charge>,
}

impl Bank {
    /// The network delay in each direction.
    const DELAY: Duration = Duration::from_millis(5);

    async fn charge(&self, reference: &str, order: &Order, token: u64) -> io::Result<Charge> {
        let charge = Charge { id: format!("ch_{token:x}"), cents: order.cents, currency: order.currency.clone() };
        self.append(Line { reference: reference.to_owned(), token, charge: Some(charge.clone()) }).await?;
        Ok(charge)
    }

    /// Returns the charge with a reference. If there is none, the token of this query makes the bank reject a charge of an
    /// earlier attempt that is still in flight.
    async fn charge_of(&self, reference: &str, token: u64) -> io::Result<Option<Charge>> {
        let before = self.append(Line { reference: reference.to_owned(), token, charge: None }).await?;
        Ok(before.into_iter().find_map(|line| line.charge))
    }

    /// Appends a line and returns the earlier lines with its reference.
    async fn append(&self, line: Line) -> io::Result<Vec<Line>> {
        tokio::time::sleep(Self::DELAY).await;
        let bank = self.clone();
        let before = tokio::task::spawn_blocking(move || {
            let mut file = File::options().create(true).append(true).open(&bank.ledger)?;
            file.lock()?;
            let mut before = bank.lines()?;
            before.retain(|earlier| earlier.reference == line.reference);
            if before.iter().any(|earlier| earlier.token > line.token) {
                return Err(io::Error::other("stale fencing token"));
            }
            let mut bytes = serde_json::to_vec(&line)?;
            bytes.push(b'\n');
            // A single write: a killed process has written the whole line or nothing.
            file.write_all(&bytes)?;
            Ok(before)
        });
        let before = before.await??;
        tokio::time::sleep(Self::DELAY).await;
        Ok(before)
    }

    fn lines(&self) -> io::Result<Vec<Line>> {
        match fs::read_to_string(&self.ledger) {
            Ok(text) => Ok(text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

/// The time limit for open connections after the stop signal, and then for running handlers.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// Serves until SIGINT or SIGTERM, then waits for running requests.
pub async fn serve(address: &str, directory: &Path) -> Result<(), Failure> {
    // Opening blocks this thread. The store's default window lets clients retry for 24 hours.
    let store = onlyonce::Store::open(directory)?;
    let mut ledger = directory.as_os_str().to_owned();
    ledger.push(".bank");
    let layer = IdempotencyLayer::builder(store.clone())
        .scope(|request| request.extensions.get::<Account>().map(|account| account.0.clone()))
        // `charge` calls `Attempt::begin`, so earlier errors (a malformed body, an empty order) release the key.
        .explicit_begin()
        .body_limit(16 << 10);
    let app = Router::new()
        .route("/charges", post(charge))
        .route_layer(layer.clone())
        .route("/charges/{id}", get(look_up))
        // The layer that is added last runs first: authentication sets the account that the scope needs.
        .layer(middleware::from_fn(authenticate))
        .with_state(Bank { ledger: ledger.into() });

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (stop, stopped) = oneshot::channel();
    let shutdown = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        let _ = stop.send(());
    };
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    tokio::select! {
        served = axum::serve(listener, app).with_graceful_shutdown(shutdown) => served?,
        // A client with an endless response must not keep the server running.
        () = async { if stopped.await.is_ok() { tokio::time::sleep(SHUTDOWN_LIMIT).await } } => {}
    }
    // A handler outlives its client, and its response still has to be stored.
    let running = layer.wait_idle(SHUTDOWN_LIMIT).await;
    if running > 0 {
        eprintln!("{running} requests did not finish in time: their outcome is unknown");
    }
    store.close().await?;
    let stats = layer.stats();
    println!("{} executed, {} replayed", stats.executed, stats.replayed);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [address, directory] = &arguments[..] else { return Err("usage: http_payments ADDR STORE_DIR".into()) };
    serve(address.to_str().ok_or("the address is not valid UTF-8")?, Path::new(directory)).await
}
