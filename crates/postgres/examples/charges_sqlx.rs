//! Charges each order once, in transactions of sqlx: the charge, the key and its receipt are committed together. The whole work is one
//! transaction, so that it also claims the key.
//!
//! ```sh
//! export DATABASE="postgres://postgres@localhost/postgres"
//! cargo run -p onlyonce-postgres --features sqlx --example charges_sqlx -- order-1 order-2 order-1
//! ```

use std::error::Error;

use onlyonce_core::Claim;
use onlyonce_postgres::{Durability, PgStore};
use sqlx::{Connection, PgConnection};
use tokio_postgres::NoTls;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let database =
        std::env::var("DATABASE").map_err(|_| "set DATABASE, such as `postgres://postgres@localhost/postgres`")?;
    // A server without a standby loses charges at a failover. Leave this option out in production.
    let options = PgStore::builder().schema("charges_sqlx_example").durability(Durability::SingleServer);
    let config = database.parse()?;
    options.migrate(&config, NoTls).await?;
    let store = options.connect(&config, NoTls).await?;

    let mut connection = PgConnection::connect(&database).await?;
    let create = "CREATE TABLE IF NOT EXISTS charges_sqlx_example.charges (id text, cents bigint)";
    sqlx::query(create).execute(&mut connection).await?;

    for order in std::env::args().skip(1) {
        let mut transaction = connection.begin().await?;
        match store.claim_in(&mut transaction, order.clone()).await? {
            Claim::Acquired(lease) => {
                let charge = "INSERT INTO charges_sqlx_example.charges VALUES ($1, 1200)";
                sqlx::query(charge).bind(&order).execute(&mut *transaction).await?;
                let receipt = format!("receipt {}", lease.token());
                let completed = lease.complete_in(&mut transaction, receipt.as_str()).await?;
                transaction.commit().await?;
                completed.committed();
                println!("{order}: {receipt}");
            }
            Claim::Completed(first) => {
                let receipt = String::from_utf8_lossy(first.result().unwrap_or_default()).into_owned();
                println!("{order}: was charged before, {receipt}");
            }
            Claim::InProgress(other) => println!("{order}: in progress elsewhere, retry after {:?}", other.retry_after),
        }
    }
    store.close().await;
    Ok(())
}
