//! A payments API with several replicas and one database: whichever replica a retry reaches, each order is charged once.
//!
//! ```sh
//! export DATABASE="postgres://postgres@localhost/postgres"
//! cargo run -p onlyonce-postgres --example http_replicas -- 127.0.0.1:3001 & cargo run -p onlyonce-postgres --example http_replicas -- 127.0.0.1:3002
//!
//! curl -i 127.0.0.1:3001/charges -H 'idempotency-key: "order-4711"' -d '1200'
//! curl -i 127.0.0.1:3002/charges -H 'idempotency-key: "order-4711"' -d '1200'
//! ```
//!
//! The second response is the first one, with `idempotent-replayed: true`. If a replica is killed while it charges, the retry at the
//! other one runs the handler again, and [`charge`] finds the charge.

use std::error::Error;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Extension, Router};
use onlyonce_http::{Attempt, IdempotencyLayer};
use onlyonce_postgres::{Durability, PgStore};
use tokio::net::TcpListener;
use tokio_postgres::{Client, Config, NoTls};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let database =
        std::env::var("DATABASE").map_err(|_| "set DATABASE, such as `postgres://postgres@localhost/postgres`")?;
    let address = std::env::args().nth(1).ok_or("pass an address, such as 127.0.0.1:3001")?;
    let config: Config = database.parse()?;
    // A server without a standby loses charges at a failover. Leave this option out in production.
    let options = PgStore::builder().schema("replicas_example").durability(Durability::SingleServer);
    options.migrate(&config, NoTls).await?;
    let store = options.connect(&config, NoTls).await?;

    let (bank, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    // One replica after the other: two that create a table at the same time can fail.
    let create = "BEGIN; SELECT pg_advisory_xact_lock(4712);
                  CREATE TABLE IF NOT EXISTS replicas_example.charges (id text PRIMARY KEY, cents bigint); COMMIT";
    bank.batch_execute(create).await?;

    // All clients share a scope here. A service has one for each account: `IdempotencyLayerBuilder::scope`.
    let layer = IdempotencyLayer::builder(store).shared_scope();
    let app = Router::new().route("/charges", post(charge)).route_layer(layer).with_state(Arc::new(bank));
    let listener = TcpListener::bind(&address).await?;
    println!("listening on {}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}

/// Charges an order. An earlier attempt may have charged it and have been killed before its response was stored: the charge has the key
/// of the request, by which it is made once.
async fn charge(
    State(bank): State<Arc<Client>>,
    Extension(attempt): Extension<Attempt>,
    cents: String,
) -> Result<String, StatusCode> {
    let cents: i64 = cents.trim().parse().map_err(|_| StatusCode::BAD_REQUEST)?;
    let charge = "INSERT INTO replicas_example.charges VALUES ($1, $2) ON CONFLICT DO NOTHING";
    bank.execute(charge, &[&attempt.key(), &cents]).await.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(format!("charged {cents} cents by replica {}\n", std::process::id()))
}
