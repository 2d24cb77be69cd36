//! Charges each order once, however many processes get it: the charge, the key and its receipt are committed together.
//!
//! Start it twice at the same time, with the same orders:
//!
//! ```sh
//! export DATABASE="host=/var/run/postgresql user=postgres dbname=postgres"
//! cargo run -p onlyonce-postgres --example charges -- order-1 order-2 & cargo run -p onlyonce-postgres --example charges -- order-2 order-1
//! ```

use std::error::Error;
use std::time::Duration;

use onlyonce_core::Claim;
use onlyonce_postgres::{Durability, PgLease, PgStore};
use tokio_postgres::{Client, Config, NoTls};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let database = std::env::var("DATABASE").map_err(|_| "set DATABASE, such as `host=localhost user=postgres`")?;
    let config: Config = database.parse()?;
    // A server without a standby loses charges at a failover. Leave this option out in production.
    let options = PgStore::builder().schema("charges_example").durability(Durability::SingleServer);
    options.migrate(&config, NoTls).await?;
    let store = options.connect(&config, NoTls).await?;

    let (mut client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    // One process after the other: two that create a table at the same time can fail.
    let create = "BEGIN; SELECT pg_advisory_xact_lock(4711);
                  CREATE TABLE IF NOT EXISTS charges_example.charges (id text, cents bigint); COMMIT";
    client.batch_execute(create).await?;

    for order in std::env::args().skip(1) {
        // Waits while another process charges the order.
        match store.claim_lease(order.clone(), Duration::from_secs(60)).await? {
            Claim::Acquired(lease) => println!("{order}: {}", charge(lease, &mut client, &order).await?),
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

/// The charge is a row of the same database, so that it happens if and only if the key is completed.
async fn charge(lease: PgLease, client: &mut Client, order: &str) -> Result<String, Box<dyn Error>> {
    let receipt = format!("receipt {}", lease.token());
    let transaction = client.transaction().await?;
    transaction.execute("INSERT INTO charges_example.charges VALUES ($1, 1200)", &[&order]).await?;
    let completed = lease.complete_in(&transaction, receipt.as_str()).await?;
    transaction.commit().await?;
    completed.committed();
    Ok(receipt)
}
