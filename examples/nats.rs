//! Charges orders of a NATS JetStream consumer, each once.
//!
//! ```text
//! NATS_URL=nats://127.0.0.1:4222 cargo run --release --features nats --example nats [store-directory]
//! ```
//!
//! [`consume`] is the consumer of an application. The rest is a producer that sends each order twice.

#![allow(clippy::print_stdout, reason = "an example prints its outcomes")]

mod shop;

use std::sync::Arc;
use std::time::Duration;

use onlyonce::delivery::nats::async_nats::jetstream::consumer::pull;
use onlyonce::delivery::nats::async_nats::jetstream::message::PublishMessage;
use onlyonce::delivery::nats::async_nats::{self, jetstream};
use onlyonce::delivery::nats::{Consumer, Message};
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
    let context = jetstream::new(async_nats::connect(std::env::var("NATS_URL")?).await?);
    let name = format!("orders-{}", std::process::id());
    let subjects = vec![format!("{name}.new"), format!("{name}.dead")];
    // The server drops repeated ids within its own window, which is short here.
    let duplicate_window = Duration::from_millis(100);
    let config = jetstream::stream::Config { name: name.clone(), subjects, duplicate_window, ..Default::default() };
    let stream = context.create_stream(config).await?;
    for (index, order) in shop::sent_twice().enumerate() {
        if index == shop::ORDERS {
            tokio::time::sleep(duplicate_window * 2).await;
        }
        let message = PublishMessage::build().message_id(format!("order-{order}"));
        let message = message.payload(format!("charge {order}").into());
        context.send_publish(format!("{name}.new"), message).await?.await?;
    }

    let backend = Backend::open(Duration::from_secs(24 * 60 * 60))?;
    let shop = Arc::new(Shop::default());
    let (durable_name, filter_subject) = (Some("shop".to_owned()), format!("{name}.new"));
    let pull = stream.create_consumer(pull::Config { durable_name, filter_subject, ..Default::default() }).await?;
    let orders = Consumer::builder(context.clone(), &pull).dead_letters(&format!("{name}.dead")).build().await?;
    consume(orders, backend.processor, Arc::clone(&shop)).await?;
    backend.store.close().await?;
    context.delete_stream(&name).await?;
    shop.check()
}
