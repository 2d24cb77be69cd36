//! Orders of an SQS queue, each charged once.
//!
//! ```text
//! AWS_ENDPOINT_URL=http://127.0.0.1:5000 cargo run --release --features sqs-http --example sqs [store-directory]
//! ```
//!
//! [`consume`] is the consumer one would really write. The rest is a producer that sends each order twice, as one does
//! that missed an answer, and a shop that charges as often as it is asked.

#![allow(clippy::print_stdout, reason = "an example talks to its reader")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use aws_sdk_sqs::types::MessageAttributeValue;
use aws_sdk_sqs::{Client, Config};
use onlyonce::delivery::sqs::{Consumer, Message};
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
                // The queue delivers again, and is answered then.
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

/// For an endpoint on loopback. Against AWS: `Client::new(&aws_config::load_defaults(BehaviorVersion::latest()).await)`.
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
        urls.push(created.queue_url.ok_or("a queue without an address")?);
    }
    let [queue, dead] = &urls[..] else { return Err("two queues were made".into()) };
    for order in (0..ORDERS).chain(0..ORDERS) {
        let id = MessageAttributeValue::builder().data_type("String").string_value(format!("order-{order}")).build()?;
        let send = client.send_message().queue_url(queue).message_attributes("id", id);
        send.message_body(format!("charge {order}")).send().await?;
    }

    let temporary = tempfile::tempdir()?;
    let directory = std::env::args_os().nth(1).map_or_else(|| temporary.path().join("store"), Into::into);
    // Remembers for two weeks: as long as a queue keeps a message at most.
    let store = onlyonce::Store::builder().window(Duration::from_secs(14 * 24 * 60 * 60)).open(directory)?;
    let processor = Processor::new(Store::new(store)?).backoff(Duration::from_millis(200), Duration::from_secs(60));
    let shop = Arc::new(Shop::default());
    let orders = Consumer::builder(client.clone(), queue).dead_letters(dead).poll(Duration::from_secs(1)).build()?;
    consume(orders, processor.clone(), Arc::clone(&shop)).await?;
    processor.store().close().await?;
    shop.check()?;
    for url in &urls {
        client.delete_queue().queue_url(url).send().await?;
    }
    println!("{ORDERS} orders were sent twice, and charged once");
    Ok(())
}
