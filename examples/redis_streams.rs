//! Charges orders of a Redis stream, each once.
//!
//! ```text
//! REDIS_URL=redis://127.0.0.1:6379 cargo run --release --features redis-streams --example redis_streams [store-directory]
//! ```
//!
//! [`consume`] is the consumer of an application. The rest is a producer that sends each order twice.

#![allow(clippy::print_stdout, reason = "an example prints its outcomes")]

mod shop;

use std::sync::Arc;
use std::time::Duration;

use onlyonce::delivery::redis_streams::redis::{AsyncCommands, Client};
use onlyonce::delivery::redis_streams::{Consumer, Entry};
use onlyonce::delivery::{Attempt, Delivery, Processor};
use shop::{Backend, BoxError, Shop};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// The example ends after this time without a message. An application keeps waiting.
const QUIET: Duration = Duration::from_secs(3);

async fn consume(mut orders: Consumer, processor: Processor, shop: Arc<Shop>) -> Result<(), BoxError> {
    let mut tasks = JoinSet::new();
    while let Ok(order) = timeout(QUIET, orders.next()).await {
        let order = order?;
        let (processor, shop) = (processor.clone(), Arc::clone(&shop));
        tasks.spawn(async move {
            let charge = async |order: &Entry, attempt: &mut Attempt| shop.charge_once(order.payload(), attempt).await;
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
    let client = Client::open(std::env::var("REDIS_URL")?)?;
    let stream = format!("orders-{}", std::process::id());
    let mut producer = client.get_multiplexed_async_connection().await?;
    for order in shop::sent_twice() {
        let fields = [("id", format!("order-{order}")), ("payload", format!("charge {order}"))];
        let _: String = producer.xadd(&stream, "*", &fields).await?;
    }

    let backend = Backend::open(Duration::from_secs(24 * 60 * 60))?;
    let shop = Arc::new(Shop::default());
    let orders = Consumer::builder(client, &stream, "shop", &format!("shop-{}", std::process::id())).build()?;
    consume(orders, backend.processor, Arc::clone(&shop)).await?;
    backend.store.close().await?;
    let _: () = producer.del(&[&stream]).await?;
    shop.check()
}
