//! A payments API whose clients retry: each charge is made once.
//!
//! ```text
//! cargo run --release --features http --example http_payments -- 127.0.0.1:3000 payments.store
//!
//! curl -i 127.0.0.1:3000/charges -H 'authorization: Bearer sk_alice' -H 'idempotency-key: "order-4711"' \
//!      -H 'content-type: application/json' -d '{"cents": 1200, "currency": "eur"}'
//! ```
//!
//! Sent again, the last command gets the same answer with `idempotent-replayed: true`, and nobody is charged again: not when
//! the two come at the same time, not when the first client has hung up, and not when the server was killed in between.
//!
//! [`charge`] is the handler one would really write. The bank is a stage: a file beside the store, which notes a charge as
//! often as it is told to, some milliseconds away.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

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

/// Who has sent a request.
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

/// Charges an order. Runs once for each key, unless an attempt was interrupted.
async fn charge(
    State(bank): State<Bank>,
    Extension(Account(account)): Extension<Account>,
    Extension(attempt): Extension<Attempt>,
    Json(order): Json<Order>,
) -> Result<Response, Unavailable> {
    if order.cents == 0 {
        // Stored as well: a retry with the same key is told the same.
        return Ok((StatusCode::UNPROCESSABLE_ENTITY, "nothing to charge").into_response());
    }
    // What the bank knows the charge by. Two accounts may choose the same key.
    let reference = format!("{account}/{}", attempt.key());
    // The attempt before was interrupted, by a crash or an error: it may have charged.
    let made = if attempt.may_have_happened() { bank.charge_of(&reference, attempt.token()).await? } else { None };
    let charge = match made {
        Some(charge) => charge,
        None => bank.charge(&reference, &order, attempt.token()).await?,
    };
    Ok((StatusCode::CREATED, [(LOCATION, format!("/charges/{}", charge.id))], Json(charge)).into_response())
}

/// The bank did not answer: the charge may have been made. A 5xx leaves that open, and the retry asks.
struct Unavailable;

impl IntoResponse for Unavailable {
    fn into_response(self) -> Response {
        (StatusCode::BAD_GATEWAY, "the bank did not answer: send it again with the same key").into_response()
    }
}

impl From<io::Error> for Unavailable {
    fn from(error: io::Error) -> Self {
        eprintln!("the bank: {error}");
        Self
    }
}

/// A charge, for whoever has made it.
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

/// Finds out who sends a request.
async fn authenticate(headers: HeaderMap, mut request: Request, next: Next) -> Response {
    let secret = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.strip_prefix("Bearer sk_"));
    let Some(account @ ("alice" | "bob")) = secret else { return StatusCode::UNAUTHORIZED.into_response() };
    request.extensions_mut().insert(Account(account.to_owned()));
    next.run(request).await
}

/// A bank in a file. It knows nothing of keys; all it does is to refuse a token that is older than one it has seen.
#[derive(Clone)]
struct Bank {
    ledger: PathBuf,
}

/// A line of the ledger: a charge, or a question whether there was one.
#[derive(Serialize, Deserialize)]
struct Line {
    reference: String,
    token: u64,
    charge: Option<Charge>,
}

impl Bank {
    /// How long a message takes to the bank, and back.
    const WAY: Duration = Duration::from_millis(5);

    async fn charge(&self, reference: &str, order: &Order, token: u64) -> io::Result<Charge> {
        let charge = Charge { id: format!("ch_{token:x}"), cents: order.cents, currency: order.currency.clone() };
        self.tell(Line { reference: reference.to_owned(), token, charge: Some(charge.clone()) }).await?;
        Ok(charge)
    }

    /// The charge that was made under a reference. If there is none, the question's token bars any that is still on its way.
    async fn charge_of(&self, reference: &str, token: u64) -> io::Result<Option<Charge>> {
        let before = self.tell(Line { reference: reference.to_owned(), token, charge: None }).await?;
        Ok(before.into_iter().find_map(|line| line.charge))
    }

    /// Notes a line, and gives those that were there of its reference.
    async fn tell(&self, line: Line) -> io::Result<Vec<Line>> {
        tokio::time::sleep(Self::WAY).await;
        let bank = self.clone();
        let before = tokio::task::spawn_blocking(move || {
            let mut file = File::options().create(true).append(true).open(&bank.ledger)?;
            file.lock()?;
            let mut before = bank.lines()?;
            before.retain(|earlier| earlier.reference == line.reference);
            if before.iter().any(|earlier| earlier.token > line.token) {
                return Err(io::Error::other("a newer token has been seen"));
            }
            let mut bytes = serde_json::to_vec(&line)?;
            bytes.push(b'\n');
            // One call: a process that is killed has written all of it, or nothing.
            file.write_all(&bytes)?;
            Ok(before)
        });
        let before = before.await??;
        tokio::time::sleep(Self::WAY).await;
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

/// How long open connections, and then work without a client, may take after the signal to stop.
const LAST: Duration = Duration::from_secs(10);

/// Serves until it is told to stop, then ends what it has begun.
pub async fn serve(address: &str, directory: &Path) -> Result<(), Failure> {
    // Reading the journal back blocks, and nothing else runs yet. Clients may retry for a day, the store's own window.
    let store = onlyonce::future::Store::new(onlyonce::Store::open(directory)?)?;
    let mut ledger = directory.as_os_str().to_owned();
    ledger.push(".bank");
    let layer = IdempotencyLayer::builder(store.clone())
        .scope(|request| request.extensions.get::<Account>().map(|account| account.0.clone()))
        .body_limit(16 << 10);
    let app = Router::new()
        .route("/charges", post(charge))
        .route_layer(layer.clone())
        .route("/charges/{id}", get(look_up))
        // The outermost comes last: it runs first, so that the scope can be asked for.
        .layer(middleware::from_fn(authenticate))
        .with_state(Bank { ledger: ledger.into() });

    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (stop, stopped) = oneshot::channel();
    let told = async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        let _ = stop.send(());
    };
    let listener = TcpListener::bind(address).await?;
    println!("listening on http://{}", listener.local_addr()?);
    tokio::select! {
        served = axum::serve(listener, app).with_graceful_shutdown(told) => served?,
        // A client that stays, with an answer that does not end, must not keep the server.
        () = async { if stopped.await.is_ok() { tokio::time::sleep(LAST).await } } => {}
    }
    // Work goes on when its client has hung up, and its answer is to be stored.
    let left = layer.idle(LAST).await;
    if left > 0 {
        eprintln!("{left} requests did not end in time: their outcome is unknown");
    }
    store.close().await?;
    let figures = layer.figures();
    println!("{} charged, {} answered again", figures.executed, figures.replayed);
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [address, directory] = &arguments[..] else { return Err("usage: http_payments ADDR STORE_DIR".into()) };
    serve(address.to_str().ok_or("the address is no text")?, Path::new(directory)).await
}
