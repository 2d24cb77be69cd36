//! An asynchronous consumer of a queue that delivers at least once: each order is charged once.
//!
//! ```text
//! cargo run --release --features tokio --example consumer_async [new-directory]
//! ```
//!
//! [`handle`] is the consumer; everything else simulates a queue. It delivers some messages twice at the same time, loses
//! acknowledgements, and delivers a message again until it is acknowledged.

#![allow(clippy::print_stdout, reason = "an example prints its result")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce::{Claim, Lease, Store};
use tokio::sync::{mpsc, oneshot};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: usize = 500;
/// How long a delivery waits for another one of the same message. At most the redelivery timeout of the queue.
const WAIT_LIMIT: Duration = Duration::from_secs(5);

/// Processes a delivery. True: acknowledge it. False: the queue delivers it again later.
async fn handle(store: &Store, shop: &Shop, order: &str) -> onlyonce::Result<bool> {
    let mut lease = match store.claim(order).wait_up_to(WAIT_LIMIT).await? {
        Claim::Acquired(lease) => lease,
        // A duplicate. Another task may have completed the message while this one waited.
        Claim::Completed(_receipt) => return Ok(true),
        Claim::InProgress(_) => return Ok(false),
    };
    // An earlier attempt was interrupted: the order may be charged already.
    if lease.attempt().may_have_happened()
        && let Some(receipt) = shop.charge_of(order)
    {
        return complete(lease, receipt).await;
    }
    // `during` fails if another holder has taken over the lease; then this task must not charge. A real shop would also check the
    // fencing token, and reject a lower one than it has seen.
    let charge = shop.charge(order);
    match lease.keep_alive().during(charge).await? {
        Ok(receipt) => complete(lease, receipt).await,
        // A refused charge has no effect, so release the lease. After a timeout, drop it instead: the order may be charged, and the
        // next attempt must ask.
        Err(Refused) => {
            lease.release().after(Duration::from_millis(20)).await?;
            Ok(false)
        }
    }
}

async fn complete(lease: Lease, receipt: String) -> onlyonce::Result<bool> {
    match lease.complete(receipt).await {
        Ok(()) => Ok(true),
        Err(failed) => Err(failed.into_parts().0),
    }
}

/// The shop that charges. It does not detect duplicates.
#[derive(Default)]
struct Shop {
    /// For each order, the number of refusals and of charges.
    ledger: Mutex<BTreeMap<String, (u32, u32)>>,
}

struct Refused;

impl Shop {
    /// The receipt of an order, if it is charged.
    fn charge_of(&self, order: &str) -> Option<String> {
        let ledger = self.ledger.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        ledger.get(order).filter(|(_, charged)| *charged > 0).map(|_| format!("receipt of {order}"))
    }

    async fn charge(&self, order: &str) -> Result<String, Refused> {
        tokio::time::sleep(Duration::from_millis(2)).await;
        let mut ledger = self.ledger.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (refused, charged) = ledger.entry(order.to_owned()).or_default();
        if *refused == 0 && order.ends_with('7') {
            *refused += 1;
            return Err(Refused);
        }
        *charged += 1;
        Ok(format!("receipt of {order}"))
    }
}

struct Delivery {
    order: String,
    acknowledge: oneshot::Sender<()>,
}

/// Delivers a message until it is acknowledged.
async fn deliver(order: String, lost_acknowledgements: u32, queue: mpsc::Sender<Delivery>) {
    let mut lost = 0;
    loop {
        let (acknowledge, acknowledged) = oneshot::channel();
        if queue.send(Delivery { order: order.clone(), acknowledge }).await.is_err() {
            return;
        }
        if acknowledged.await.is_ok() {
            if lost == lost_acknowledgements {
                return;
            }
            lost += 1;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn consume(directory: &Path) -> Result<Arc<Shop>, Failure> {
    // Opening blocks while it replays the journal. No other task runs yet.
    let store = Store::open(directory)?;
    let shop = Arc::new(Shop::default());
    let (queue, mut deliveries) = mpsc::channel(100);
    for i in 0..ORDERS {
        for _ in 0..1 + i % 2 {
            tokio::spawn(deliver(format!("order-{i}"), u32::from(i % 5 == 0), queue.clone()));
        }
    }
    drop(queue);
    let mut delivered = 0;
    while let Some(delivery) = deliveries.recv().await {
        delivered += 1;
        let (store, shop) = (store.clone(), Arc::clone(&shop));
        tokio::spawn(async move {
            match handle(&store, &shop, &delivery.order).await {
                // If the acknowledgement is lost, the next delivery is a duplicate.
                Ok(true) => drop(delivery.acknowledge.send(())),
                Ok(false) => {}
                // Fail closed: without the store, do not charge.
                Err(error) => println!("{}: {}", delivery.order, error.chain()),
            }
        });
    }
    // Counting visits all keys in memory, so it blocks.
    let stats = tokio::task::spawn_blocking({
        let store = store.clone();
        move || store.stats()
    })
    .await?;
    println!(
        "{delivered} deliveries of {ORDERS} orders: {} completed, {} duplicates, {} syncs",
        stats.completed, stats.duplicates, stats.journal_syncs
    );
    store.close().await?;
    Ok(shop)
}

/// Checks that each order is charged once.
fn check(shop: &Shop) -> Result<(), Failure> {
    let ledger = shop.ledger.lock().map_err(|_| "a charge panicked")?;
    match ledger.iter().find(|(_, (_, charged))| *charged != 1) {
        Some((order, (_, charged))) => Err(format!("{order} was charged {charged} times").into()),
        None if ledger.len() != ORDERS => Err(format!("{} of {ORDERS} orders were charged", ledger.len()).into()),
        None => Ok(()),
    }
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let temporary = tempfile::tempdir()?;
    let directory = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("store"), Into::into);
    check(&*consume(&directory).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_order_is_charged_once_however_often_it_is_delivered() {
        let dir = tempfile::tempdir().unwrap();
        let shop = consume(&dir.path().join("store")).await.unwrap();
        check(&shop).unwrap();
        // All messages again, after a restart.
        let again = consume(&dir.path().join("store")).await.unwrap();
        assert!(again.ledger.lock().unwrap().is_empty());
    }
}
