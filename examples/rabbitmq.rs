//! Charges orders of a RabbitMQ queue, each once.
//!
//! ```text
//! RABBITMQ_URL=amqp://guest:guest@127.0.0.1:5672/%2f cargo run --release --features rabbitmq --example rabbitmq [store-directory]
//! ```
//!
//! [`consume`] is the consumer of an application. The rest is a producer that sends each order twice.

#![allow(clippy::print_stdout, reason = "an example prints its outcomes")]

mod shop;

use std::sync::Arc;
use std::time::Duration;

use onlyonce::delivery::rabbitmq::lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeleteOptions};
use onlyonce::delivery::rabbitmq::lapin::{BasicProperties, Connection, ConnectionProperties};
use onlyonce::delivery::rabbitmq::{Consumer, Message};
use onlyonce::delivery::{Attempt, Delivery, Processor};
use shop::{Backend, BoxError, Shop};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The example ends after this time without a message. An application keeps waiting.
const QUIET: Duration = Duration::from_secs(3);

async fn consume(mut orders: Consumer, processor: Processor, shop: Arc<Shop>) -> Result<(), BoxError> {
    let mut tasks = JoinSet::new();
    while let Ok(order) = timeout(QUIET, orders.next()).await {
        let Some(order) = order? else { break };
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
    let connection = Connection::connect(&std::env::var("RABBITMQ_URL")?, ConnectionProperties::default()).await?;
    let queue = format!("orders-{}", std::process::id());
    let producer = connection.create_channel().await?;
    producer.confirm_select(ConfirmSelectOptions::default()).await?;
    // The queue, and one for its dead letters.
    Consumer::declare(&producer, &queue).await?;
    for order in shop::sent_twice() {
        let id = BasicProperties::default().with_message_id(format!("order-{order}").into()).with_delivery_mode(2);
        let (options, body) = (BasicPublishOptions::default(), format!("charge {order}"));
        producer.basic_publish("".into(), queue.as_str().into(), options, body.as_bytes(), id).await?.await?;
    }

    let backend = Backend::open(Duration::from_secs(24 * 60 * 60))?;
    let shop = Arc::new(Shop::default());
    let dead = format!("{queue}.dead");
    let orders = Consumer::builder(connection.create_channel().await?, &queue).prefetch(64).dead_letters(&dead);
    consume(orders.build().await?, backend.processor, Arc::clone(&shop)).await?;
    backend.store.close().await?;
    for suffix in ["", ".dead", ".retry.256", ".retry.512", ".retry.1024"] {
        producer.queue_delete(format!("{queue}{suffix}").into(), QueueDeleteOptions::default()).await?;
    }
    shop.check()
}
