//! Orders of a NATS JetStream consumer, each charged once.
//!
//! ```text
//! NATS_URL=nats://127.0.0.1:4222 cargo run --release --features nats --example nats [store-directory]
//! ```
//!
//! [`consume`] is the consumer one would really write. The rest is a producer that sends each order twice, as one does
//! that missed an answer, and a shop that charges as often as it is asked.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{self, stream};
use onlyonce::delivery::nats::{Consumer, Message};
use onlyonce::delivery::{Delivery, Job, Processor};
use onlyonce::future::Store;
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
        let Some(order) = order? else { break };
        let (processor, shop) = (processor.clone(), Arc::clone(&shop));
        tasks.spawn(async move {
            let charge = async |order: &Message, job: &mut Job| {
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
    let context = jetstream::new(async_nats::connect(std::env::var("NATS_URL")?).await?);
    let name = format!("orders-{}", std::process::id());
    let subjects = vec![format!("{name}.new"), format!("{name}.dead")];
    // The server has a window of its own, in which it drops an id that it has seen. Here the producer comes
    // again after it.
    let duplicate_window = Duration::from_millis(100);
    let config = stream::Config { name: name.clone(), subjects, duplicate_window, ..stream::Config::default() };
    let stream = context.create_stream(config).await?;
    for twin in 0..2 {
        for order in 0..ORDERS {
            let message = jetstream::message::PublishMessage::build().message_id(format!("order-{order}"));
            let message = message.payload(format!("charge {order}").into());
            context.send_publish(format!("{name}.new"), message).await?.await?;
        }
        if twin == 0 {
            tokio::time::sleep(duplicate_window * 2).await;
        }
    }

    let temporary = tempfile::tempdir()?;
    let directory = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("store"), Into::into);
    // Remembers for a day: longer than the stream keeps a message.
    let store = onlyonce::Store::builder().window(Duration::from_secs(24 * 60 * 60)).open(directory)?;
    let processor = Processor::new(Store::new(store)?).backoff(Duration::from_millis(200), Duration::from_secs(60));
    let shop = Arc::new(Shop::default());
    let durable = pull::Config {
        durable_name: Some("shop".to_owned()),
        filter_subject: format!("{name}.new"),
        ..pull::Config::default()
    };
    let pull = stream.create_consumer(durable).await?;
    let orders = Consumer::builder(context.clone(), &pull).dead_letters(&format!("{name}.dead")).build().await?;
    consume(orders, processor.clone(), Arc::clone(&shop)).await?;
    processor.store().close().await?;
    shop.check()?;
    context.delete_stream(&name).await?;
    println!("{ORDERS} orders were sent twice, and charged once");
    Ok(())
}
