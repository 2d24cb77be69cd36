//! Orders of a Kafka topic, each charged once.
//!
//! ```text
//! KAFKA_BROKERS=127.0.0.1:9092 cargo run --release --features kafka --example kafka [store-directory]
//! ```
//!
//! [`consume`] is the consumer one would really write. The rest is a producer that sends each order twice, as one does
//! that missed an answer, and a shop that charges as often as it is asked.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce::delivery::kafka::{Consumer, Message};
use onlyonce::delivery::{Delivery, Job, Processor};
use onlyonce::future::Store;
use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio::task::JoinSet;
use tokio::time::timeout;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

const ORDERS: usize = 20;
/// Deliveries that are worked on at the same time.
const AT_ONCE: usize = 32;
/// The example ends when nothing has come for so long. A real consumer goes on. A broker waits for three seconds before
/// it shares out the partitions of a new group.
const QUIET: Duration = Duration::from_secs(8);

async fn consume(mut orders: Consumer, processor: Processor, shop: Arc<Shop>) -> Result<(), BoxError> {
    let mut tasks = JoinSet::new();
    while let Ok(order) = timeout(QUIET, orders.next()).await {
        let (order, processor, shop) = (order?, processor.clone(), Arc::clone(&shop));
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
                // The partition is another consumer's by now, which gets the order again.
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
struct Shop(Mutex<BTreeMap<Vec<u8>, u32>>);

#[derive(Debug, thiserror::Error)]
#[error("the card was refused")]
struct Refused;

impl Shop {
    fn receipt_of(&self, order: &[u8]) -> Option<String> {
        let charges = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        charges.contains_key(order).then(|| "receipt".to_owned())
    }

    async fn charge(&self, order: &[u8]) -> Result<String, Refused> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if rand::random_bool(0.1) {
            return Err(Refused);
        }
        let mut charges = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        *charges.entry(order.to_vec()).or_default() += 1;
        Ok("receipt".to_owned())
    }

    fn check(&self) -> Result<(), BoxError> {
        let charges = self.0.lock().map_err(|_| "a charge panicked")?;
        match charges.iter().find(|(_, times)| **times != 1) {
            Some((order, times)) => Err(format!("{} was charged {times} times", order.escape_ascii()).into()),
            None if charges.len() != ORDERS => Err(format!("{} of {ORDERS} orders were charged", charges.len()).into()),
            None => Ok(()),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", std::env::var("KAFKA_BROKERS")?);
    let topic = format!("orders-{}", std::process::id());
    let producer: FutureProducer = config.create()?;
    // The second time as one does that missed the answer. It has no way to say that it is the same order but its header.
    for order in (0..ORDERS).chain(0..ORDERS) {
        let (key, payload) = (format!("customer-{}", order % 7), format!("charge {order}"));
        let headers = OwnedHeaders::new().insert(Header { key: "id", value: Some(&format!("order-{order}")) });
        let record = FutureRecord::to(&topic).key(&key).payload(&payload).headers(headers);
        producer.send(record, Duration::from_secs(5)).await.map_err(|(error, _)| error)?;
    }

    let temporary = tempfile::tempdir()?;
    let directory = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("store"), Into::into);
    // Remembers for eight days: a day longer than the topic keeps a record by default.
    let store = onlyonce::Store::builder().window(Duration::from_secs(8 * 24 * 60 * 60)).open(directory)?;
    let processor = Processor::new(Store::new(store)?).backoff(Duration::from_millis(200), Duration::from_secs(60));
    let shop = Arc::new(Shop::default());
    config.set("group.id", "shop").set("auto.offset.reset", "earliest");
    let orders = Consumer::subscribe(&config, &[&topic]).dead_letters(producer, &format!("{topic}.dead")).build()?;
    consume(orders, processor.clone(), Arc::clone(&shop)).await?;
    processor.store().close().await?;
    shop.check()?;
    println!("{ORDERS} orders were sent twice, and charged once");
    Ok(())
}
