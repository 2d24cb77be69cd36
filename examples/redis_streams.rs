//! Orders of a Redis stream, each charged once.
//!
//! ```text
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --release --features redis-streams --example redis_streams [store-directory]
//! ```
//!
//! [`consume`] is the consumer one would really write. The rest is a producer that sends each order twice, as one does
//! that missed an answer, and a shop that charges as often as it is asked.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce::delivery::redis_streams::{Consumer, Entry};
use onlyonce::delivery::{Delivery, Job, Processor};
use onlyonce::future::Store;
use redis::{AsyncCommands, Client};
use tokio::task::JoinSet;
use tokio::time::timeout;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: usize = 20;
/// Deliveries that are worked on at the same time.
const AT_ONCE: usize = 32;
/// The example ends when nothing has come for so long. A real consumer goes on.
const QUIET: Duration = Duration::from_secs(3);

async fn consume(mut orders: Consumer, processor: Processor, shop: Arc<Shop>) -> Result<(), BoxError> {
    let mut tasks = JoinSet::new();
    while let Ok(order) = timeout(QUIET, orders.next()).await {
        let order = order?;
        let (processor, shop) = (processor.clone(), Arc::clone(&shop));
        tasks.spawn(async move {
            let charge = async |order: &Entry, job: &mut Job| {
                // An earlier attempt was cut off: the charge may have been made.
                if job.may_have_happened()
                    && let Some(receipt) = shop.receipt_of(order.payload())
                {
                    return Ok(receipt);
                }
                Ok(shop.charge(order.payload()).await?)
            };
            match processor.process(order, charge).await {
                Ok(settled) => println!("{settled:?}"),
                // The broker delivers again, and is answered then.
                Err(unsettled) => println!("{unsettled}"),
            }
        });
        if tasks.len() >= AT_ONCE {
            tasks.join_next().await;
        }
    }
    tasks.join_all().await;
    Ok(())
}

/// Charges whoever asks, as often as it is asked.
#[derive(Default)]
struct Shop {
    asked: AtomicU32,
    charges: Mutex<BTreeMap<Vec<u8>, u32>>,
}

#[derive(Debug, thiserror::Error)]
#[error("the card was refused")]
struct Refused;

impl Shop {
    fn receipt_of(&self, order: &[u8]) -> Option<String> {
        let charges = self.charges.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        charges.contains_key(order).then(|| "receipt".to_owned())
    }

    async fn charge(&self, order: &[u8]) -> Result<String, Refused> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if self.asked.fetch_add(1, Ordering::Relaxed) % 7 == 6 {
            return Err(Refused);
        }
        let mut charges = self.charges.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *charges.entry(order.to_vec()).or_default() += 1;
        Ok("receipt".to_owned())
    }

    fn check(&self) -> Result<(), BoxError> {
        let charges = self.charges.lock().map_err(|_| "a charge panicked")?;
        match charges.iter().find(|(_, times)| **times != 1) {
            Some((order, times)) => Err(format!("{} was charged {times} times", order.escape_ascii()).into()),
            None if charges.len() != ORDERS => Err(format!("{} of {ORDERS} orders were charged", charges.len()).into()),
            None => Ok(()),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let client = Client::open(std::env::var("REDIS_URL")?)?;
    let stream = format!("orders-{}", std::process::id());
    let mut producer = client.get_multiplexed_async_connection().await?;
    for order in (0..ORDERS).chain(0..ORDERS) {
        let fields = [("id", format!("order-{order}")), ("payload", format!("charge {order}"))];
        let _: String = producer.xadd(&stream, "*", &fields).await?;
    }

    let temporary = tempfile::tempdir()?;
    let directory = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("store"), Into::into);
    // Remembers for a day: longer than an entry may lie in the stream.
    let store = onlyonce::Store::builder().window(Duration::from_secs(24 * 60 * 60)).open(directory)?;
    let processor = Processor::new(Store::new(store)?).backoff(Duration::from_millis(200), Duration::from_secs(60));
    let shop = Arc::new(Shop::default());
    let orders = Consumer::builder(client, &stream, "shop", &format!("shop-{}", std::process::id())).build()?;
    consume(orders, processor.clone(), Arc::clone(&shop)).await?;
    processor.store().close().await?;
    shop.check()?;
    let _: () = producer.del(&[&stream]).await?;
    println!("{ORDERS} orders were sent twice, and charged once");
    Ok(())
}
