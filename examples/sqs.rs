//! Charges orders of an SQS queue, each once.
//!
//! ```text
//! AWS_ENDPOINT_URL=http://127.0.0.1:5000 cargo run --release --features sqs-http --example sqs [store-directory]
//! ```
//!
//! [`consume`] is the consumer of an application. The rest is a producer that sends each order twice.

#![allow(clippy::print_stdout, reason = "an example prints its outcomes")]

mod shop;

use std::sync::Arc;
use std::time::Duration;

use onlyonce::delivery::sqs::aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use onlyonce::delivery::sqs::aws_sdk_sqs::types::MessageAttributeValue;
use onlyonce::delivery::sqs::aws_sdk_sqs::{Client, Config};
use onlyonce::delivery::sqs::{Consumer, Message, aws_smithy_http_client};
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

/// For an endpoint on loopback. For AWS: `Client::new(&aws_config::load_defaults(BehaviorVersion::latest()).await)`.
fn client() -> Result<Client, BoxError> {
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(std::env::var("AWS_ENDPOINT_URL")?)
        .region(Region::new("eu-central-1"))
        .credentials_provider(Credentials::new("key", "secret", None, None, "example"));
    Ok(Client::from_conf(config.build()))
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let client = client()?;
    let mut urls = Vec::new();
    for name in ["orders", "orders-dead"] {
        let created = client.create_queue().queue_name(format!("{name}-{}", std::process::id())).send().await?;
        urls.push(created.queue_url.ok_or("the service returned no queue URL")?);
    }
    let [queue, dead] = &urls[..] else { return Err("two queues were created".into()) };
    for order in shop::sent_twice() {
        let id = MessageAttributeValue::builder().data_type("String").string_value(format!("order-{order}")).build()?;
        let send = client.send_message().queue_url(queue).message_attributes("id", id);
        send.message_body(format!("charge {order}")).send().await?;
    }

    // The maximum retention of a queue.
    let backend = Backend::open(Duration::from_secs(14 * 24 * 60 * 60))?;
    let shop = Arc::new(Shop::default());
    let orders = Consumer::builder(client.clone(), queue).dead_letters(dead).poll(Duration::from_secs(1)).build()?;
    consume(orders, backend.processor, Arc::clone(&shop)).await?;
    backend.store.close().await?;
    for url in &urls {
        client.delete_queue().queue_url(url).send().await?;
    }
    shop.check()
}
