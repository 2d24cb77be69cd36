//! SQS queues, standard and FIFO, against moto.

mod harness;

use std::time::{Duration, Instant};

use harness::{Broker, Source, TestStore, address};
use onlyonce::Store;
use onlyonce::delivery::sqs::aws_sdk_sqs::config::{BehaviorVersion, Credentials, Region};
use onlyonce::delivery::sqs::aws_sdk_sqs::types::{
    Message as SqsMessage, MessageAttributeValue, MessageSystemAttributeName, QueueAttributeName,
};
use onlyonce::delivery::sqs::aws_sdk_sqs::{Client, Config};
use onlyonce::delivery::sqs::{
    Builder, Consumer, Error, ID_ATTRIBUTE, Message, REASON_ATTRIBUTE, aws_smithy_http_client,
};
use onlyonce::delivery::{Attempt, Delivery, Failure, Outcome, Processor};
use tokio::time::timeout;

/// A queue with its dead letters.
struct Sqs<const FIFO: bool> {
    client: Client,
    url: String,
    dead: String,
}

type Standard = Sqs<false>;
type Fifo = Sqs<true>;

fn client() -> Client {
    let config = Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(address("ONLYONCE_SQS"))
        .region(Region::new("eu-central-1"))
        .credentials_provider(Credentials::new("key", "secret", None, None, "test"));
    Client::from_conf(config.build())
}

impl<const FIFO: bool> Sqs<FIFO> {
    /// Creates a queue if it is missing, and returns its URL.
    async fn create(client: &Client, name: &str) -> String {
        let suffix = if FIFO { ".fifo" } else { "" };
        let mut create = client.create_queue().queue_name(format!("{name}{suffix}"));
        if FIFO {
            create = create.attributes(QueueAttributeName::FifoQueue, "true");
            create = create.attributes(QueueAttributeName::ContentBasedDeduplication, "true");
        }
        create.send().await.unwrap().queue_url.unwrap()
    }

    fn builder(&self) -> Builder {
        Consumer::builder(self.client.clone(), &self.url)
            .dead_letters(&self.dead)
            .visibility(Duration::from_secs(2))
            .poll(Duration::from_secs(1))
    }

    fn consumer(&self) -> Consumer {
        self.builder().build().unwrap()
    }

    async fn letters(&self, visibility: i32) -> Vec<SqsMessage> {
        let receive = self.client.receive_message().queue_url(&self.dead).max_number_of_messages(10);
        let receive = receive.message_attribute_names("All").visibility_timeout(visibility);
        let receive = receive.message_system_attribute_names(MessageSystemAttributeName::MessageGroupId);
        receive.send().await.unwrap().messages.unwrap_or_default()
    }

    /// The numbers of visible and of invisible messages.
    async fn counts(&self) -> [u64; 2] {
        use QueueAttributeName::{ApproximateNumberOfMessages, ApproximateNumberOfMessagesNotVisible};
        let request = self.client.get_queue_attributes().queue_url(&self.url).attribute_names(QueueAttributeName::All);
        let attributes = request.send().await.unwrap().attributes.unwrap();
        [ApproximateNumberOfMessages, ApproximateNumberOfMessagesNotVisible]
            .map(|name| attributes[&name].parse().unwrap())
    }
}

impl<const FIFO: bool> Broker for Sqs<FIFO> {
    type Source = Consumer;

    // A poll of moto scans all messages, which takes a tenth of a second.
    const DIVISOR: u32 = 4;
    // A FIFO queue of AWS remembers a deduplication id for five minutes; `run` sets moto to a second.
    const ID_EXPIRY: Duration = Duration::from_millis(if FIFO { 1_200 } else { 0 });

    async fn open(queue: &str) -> Self {
        let client = client();
        let url = Self::create(&client, queue).await;
        let dead = Self::create(&client, &format!("{queue}-dead")).await;
        Self { client, url, dead }
    }

    async fn send(&self, id: Option<&str>, body: &str) {
        let mut send = self.client.send_message().queue_url(&self.url).message_body(body);
        if FIFO {
            // A hundred groups. Groups with messages of a killed consumer wait for their visibility timeout.
            send = send.message_group_id(body[body.len().saturating_sub(2)..].replace(' ', "-"));
            send = send.set_message_deduplication_id(id.map(str::to_owned));
        } else if let Some(id) = id {
            let id = MessageAttributeValue::builder().data_type("String").string_value(id).build().unwrap();
            send = send.message_attributes("id", id);
        }
        send.send().await.unwrap();
    }

    async fn source(&self) -> Consumer {
        self.consumer()
    }

    async fn pending(&self) -> u64 {
        self.counts().await.iter().sum()
    }

    async fn dead_letters(&self) -> Vec<String> {
        self.letters(0).await.into_iter().map(|letter| letter.body.unwrap()).collect()
    }

    async fn redrive(&self) {
        for letter in self.letters(30).await {
            let attributes = letter.message_attributes.unwrap();
            assert!(attributes[REASON_ATTRIBUTE].string_value().is_some_and(|reason| reason.starts_with("attempt ")));
            let mut send = self.client.send_message().queue_url(&self.url).message_body(letter.body.unwrap());
            send = send.set_message_attributes(Some(attributes));
            if FIFO {
                send = send.set_message_deduplication_id(letter.message_id);
                send = send.message_group_id(&letter.attributes.unwrap()[&MessageSystemAttributeName::MessageGroupId]);
            }
            send.send().await.unwrap();
            let delete = self.client.delete_message().queue_url(&self.dead);
            delete.receipt_handle(letter.receipt_handle.unwrap()).send().await.unwrap();
        }
    }
}

impl Source for Consumer {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        Consumer::next(self).await.unwrap()
    }
}

mod standard {
    crate::tests_of!(
        super::Standard: every_effect_happens_once_while_consumers_are_killed,
        without_a_store_effects_happen_twice,
        poison_messages_are_dead_lettered_and_can_be_redriven,
        keys_delays_and_counters_are_right,
        work_in_progress_is_not_started_again,
    );
}

mod fifo {
    crate::tests_of!(
        super::Fifo: every_effect_happens_once_while_consumers_are_killed,
        without_a_store_effects_happen_twice,
        poison_messages_are_dead_lettered_and_can_be_redriven,
        keys_delays_and_counters_are_right,
    );
}

fn processor(store: &Store) -> Processor {
    Processor::new(store.clone()).backoff(Duration::from_millis(10), Duration::MAX)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_stays_invisible_while_it_is_held_and_is_redelivered_after_it_is_dropped() {
    let broker = Standard::open(&format!("held-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let (mut first, mut second) = (broker.consumer(), broker.consumer());
    let held = first.next().await.unwrap();
    // Longer than two visibility timeouts.
    assert!(timeout(Duration::from_secs(5), second.next()).await.is_err(), "another consumer received it");
    drop(held);
    let start = Instant::now();
    let again = timeout(Duration::from_secs(10), second.next()).await.expect("no redelivery").unwrap();
    assert!(start.elapsed() < Duration::from_secs(5), "it stayed invisible for {:?}", start.elapsed());

    // A delay of 2.5 seconds, rounded up: the extension of the visibility does not change it.
    let start = Instant::now();
    again.retry_after(Duration::from_millis(2_500)).await.unwrap();
    let again = timeout(Duration::from_secs(10), second.next()).await.expect("no redelivery").unwrap();
    assert!(start.elapsed() >= Duration::from_millis(2_900), "it was redelivered after {:?}", start.elapsed());
    again.ack().await.unwrap();
    assert_eq!(broker.counts().await, [0, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_of_a_fifo_queue_waits_for_its_delayed_message() {
    let broker = Fifo::open(&format!("order-{}", std::process::id())).await;
    for body in ["first 77", "second 77", "third 77"] {
        broker.send(None, body).await;
    }
    let store = TestStore::new();
    let processor = processor(&store);
    let mut done = Vec::new();
    let mut consumer = broker.consumer();
    while done.len() < 3 {
        let message = consumer.next().await.unwrap();
        let body = String::from_utf8(message.payload().to_vec()).unwrap();
        let work = async |_: &Message, attempt: &mut Attempt| {
            if attempt.number() == 1 { Err(Failure::from("the first attempt fails")) } else { Ok("") }
        };
        if matches!(processor.process(message, work).await.unwrap(), Outcome::Done) {
            done.push(body);
        }
    }
    assert_eq!(done, ["first 77", "second 77", "third 77"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_message_ids_two_messages_with_equal_content_are_distinct() {
    let broker = Standard::open(&format!("ids-{}", std::process::id())).await;
    let store = TestStore::new();
    let processor = processor(&store);
    let mut by_id = broker.builder().fall_back_to_message_id().build().unwrap();
    let mut outcomes = Vec::new();
    for _ in 0..2 {
        broker.send(None, "refund 12").await;
        let message = by_id.next().await.unwrap();
        let work = async |_: &Message, _: &mut Attempt| Err::<Vec<u8>, _>(Failure::permanent("no such order"));
        outcomes.push(processor.clone().process(message, work).await.unwrap());
    }
    // After a redrive they are the same two messages, with other message ids.
    broker.redrive().await;
    for _ in 0..2 {
        let message = by_id.next().await.unwrap();
        outcomes.push(processor.process(message, async |_, _| Ok("refunded")).await.unwrap());
    }
    assert!(
        matches!(outcomes[..], [Outcome::Rejected { .. }, Outcome::Rejected { .. }, Outcome::Done, Outcome::Done]),
        "{outcomes:?}"
    );
    let stats = store.stats();
    assert_eq!((stats.acquired, stats.completed, stats.duplicates), (4, 2, 0), "{stats:?}");
    assert_eq!((broker.counts().await, broker.dead_letters().await), ([0, 0], Vec::new()));
}

/// The service refuses a message with more than ten attributes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_with_ten_attributes_keeps_all_of_them_in_its_dead_letter() {
    for attributes in [8, 9, 10] {
        let broker = Standard::open(&format!("attributes-{attributes}-{}", std::process::id())).await;
        let mut send = broker.client.send_message().queue_url(&broker.url).message_body("charge");
        for attribute in 0..attributes {
            let value = MessageAttributeValue::builder().data_type("String").string_value("v").build().unwrap();
            send = send.message_attributes(format!("tenant-{attribute}"), value);
        }
        send.send().await.unwrap();
        let message = broker.builder().fall_back_to_message_id().build().unwrap().next().await.unwrap();
        message.reject("no such order").await.unwrap();
        let letter = broker.letters(0).await.pop().unwrap().message_attributes.unwrap();
        let own = letter.keys().filter(|name| name.starts_with("tenant-")).count();
        let ours = [ID_ATTRIBUTE, REASON_ATTRIBUTE].map(|name| letter.contains_key(name));
        assert_eq!((own, ours), (attributes, [attributes < 10, attributes < 9]));
        assert_eq!(broker.counts().await, [0, 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_the_dead_letter_queue_refuses_is_neither_deleted_nor_retried_soon() {
    let broker = Standard::open(&format!("narrow-{}", std::process::id())).await;
    let narrow = broker.client.set_queue_attributes().queue_url(&broker.dead);
    narrow.attributes(QueueAttributeName::MaximumMessageSize, "1024").send().await.unwrap();
    let mut consumer = broker.consumer();
    broker.send(Some("order-1"), &"x".repeat(2_000)).await;
    let refused = consumer.next().await.unwrap().reject("no such order").await.unwrap_err();
    assert!(matches!(&refused, Error::DeadLetterRefused { queue, .. } if *queue == broker.dead), "{refused}");
    assert_eq!(broker.counts().await, [0, 1]);
    assert!(timeout(Duration::from_secs(3), consumer.next()).await.is_err(), "longer than the visibility timeout");
}
