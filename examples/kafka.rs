//! Charges orders of a Kafka topic, each once.
//!
//! ```text
//! KAFKA_BROKERS=127.0.0.1:9092 cargo run --release --features kafka --example kafka [store-directory]
//! ```
//!
//! [`consume`] is the consumer of an application. The rest is a producer that sends each order twice.

#![allow(clippy::print_stdout, reason = "an example prints its outcomes")]

mod shop;

use std::sync::Arc;
use std::time::Duration;

use onlyonce::delivery::kafka::rdkafka::ClientConfig;
use onlyonce::delivery::kafka::rdkafka::message::{Header, OwnedHeaders};
use onlyonce::delivery::kafka::rdkafka::producer::{FutureProducer, FutureRecord};
use onlyonce::delivery::kafka::{Consumer, Message};
use onlyonce::delivery::{Attempt, Delivery, Processor};
use shop::{Backend, BoxError, Shop};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The example ends after this time without a message. An application keeps waiting. A broker waits 3 seconds before
/// it assigns the partitions of a new group.
const QUIET: Duration = Duration::from_secs(8);

async fn consume(mut orders: Consumer, processor: Processor, shop: Arc<Shop>) -> Result<(), BoxError> {
    let mut tasks = JoinSet::new();
    while let Ok(order) = timeout(QUIET, orders.next()).await {
        let order = order?;
        let (processor, shop) = (processor.clone(), Arc::clone(&shop));
        tasks.spawn(async move {
            let charge =
                async |order: &Message, attempt: &mut Attempt| shop.charge_once(order.payload(), attempt).await;
            shop::log(processor.process(order, charge).await);
        });
        if tasks.len() >= shop::CONCURRENCY {
            tasks.join_next().await;
        }
    }
    tasks.join_all().await;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", std::env::var("KAFKA_BROKERS")?);
    let topic = format!("orders-{}", std::process::id());
    let producer: FutureProducer = config.create()?;
    for order in shop::sent_twice() {
        let (key, payload) = (format!("customer-{}", order % 7), format!("charge {order}"));
        // Only the header identifies both records as one order.
        let headers = OwnedHeaders::new().insert(Header { key: "id", value: Some(&format!("order-{order}")) });
        let record = FutureRecord::to(&topic).key(&key).payload(&payload).headers(headers);
        producer.send(record, Duration::from_secs(5)).await.map_err(|(error, _)| error)?;
    }

    // A day longer than the default retention of a topic.
    let backend = Backend::open(Duration::from_secs(8 * 24 * 60 * 60))?;
    let shop = Arc::new(Shop::default());
    config.set("group.id", "shop").set("auto.offset.reset", "earliest");
    let orders = Consumer::subscribe(&config, &[&topic]).dead_letters(producer, &format!("{topic}.dead")).build()?;
    consume(orders, backend.processor, Arc::clone(&shop)).await?;
    backend.store.close().await?;
    shop.check()
}
