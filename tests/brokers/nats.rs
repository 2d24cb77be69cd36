//! A pull consumer of NATS JetStream, against a NATS server.

mod harness;

use std::time::Duration;

use harness::{Broker, Source, TestStore, address};
use onlyonce::delivery::nats::async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use onlyonce::delivery::nats::async_nats::jetstream::message::StreamMessage;
use onlyonce::delivery::nats::async_nats::jetstream::stream::{Config, Stream};
use onlyonce::delivery::nats::async_nats::jetstream::{self, Context};
use onlyonce::delivery::nats::async_nats::{self, HeaderMap};
use onlyonce::delivery::nats::{Consumer, Error, ID_HEADER, Message, OMITTED_HEADER, REASON_HEADER, SUBJECT_HEADER};
use onlyonce::delivery::{Attempt, Delivery, Failure, Outcome, Processor};

struct Nats {
    context: Context,
    queue: String,
    consumer: PullConsumer,
    dead: Stream,
}

impl Nats {
    async fn publish(&self, headers: HeaderMap, body: &str) {
        let sent =
            self.context.publish_with_headers(self.queue.clone(), headers, body.to_owned().into()).await.unwrap();
        assert!(!sent.await.unwrap().duplicate, "the server took the message for a duplicate");
    }

    async fn letters(&self) -> Vec<StreamMessage> {
        let state = self.dead.get_info().await.unwrap().state;
        let mut letters = Vec::new();
        for sequence in state.first_sequence..=state.last_sequence {
            letters.extend(self.dead.get_raw_message(sequence).await);
        }
        letters
    }
}

impl Broker for Nats {
    type Source = Consumer;

    /// The duplicate window of the server, which is short here.
    const ID_EXPIRY: Duration = Duration::from_millis(250);

    async fn open(queue: &str) -> Self {
        let context = jetstream::new(async_nats::connect(address("ONLYONCE_NATS")).await.unwrap());
        let stream = |name: String| Config {
            subjects: vec![name.clone()],
            name,
            duplicate_window: Duration::from_millis(100),
            ..Config::default()
        };
        let orders = context.get_or_create_stream(stream(queue.to_owned())).await.unwrap();
        let dead = context.get_or_create_stream(stream(format!("{queue}-dead"))).await.unwrap();
        let workers = pull::Config {
            durable_name: Some("workers".to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: Duration::from_millis(800),
            ..pull::Config::default()
        };
        let consumer = orders.get_or_create_consumer("workers", workers).await.unwrap();
        Self { context, queue: queue.to_owned(), consumer, dead }
    }

    async fn send(&self, id: Option<&str>, body: &str) {
        let mut headers = HeaderMap::new();
        if let Some(id) = id {
            headers.insert("Nats-Msg-Id", id);
        }
        self.publish(headers, body).await;
    }

    async fn source(&self) -> Consumer {
        let builder = Consumer::builder(self.context.clone(), &self.consumer);
        builder.dead_letters(&format!("{}-dead", self.queue)).build().await.unwrap()
    }

    async fn pending(&self) -> u64 {
        let info = self.consumer.get_info().await.unwrap();
        info.num_pending + info.num_ack_pending as u64
    }

    async fn dead_letters(&self) -> Vec<String> {
        let body = |letter: StreamMessage| String::from_utf8(letter.payload.to_vec()).unwrap();
        self.letters().await.into_iter().map(body).collect()
    }

    async fn redrive(&self) {
        for letter in self.letters().await {
            assert_eq!(letter.headers.get(SUBJECT_HEADER).unwrap().as_str(), self.queue);
            assert!(!letter.headers.get(REASON_HEADER).unwrap().as_str().is_empty());
            self.publish(letter.headers, std::str::from_utf8(&letter.payload).unwrap()).await;
        }
        self.dead.purge().await.unwrap();
    }
}

impl Source for Consumer {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        Consumer::next(self).await.unwrap().unwrap()
    }
}

tests_of!(
    Nats: every_effect_happens_once_while_consumers_are_killed,
    without_a_store_effects_happen_twice,
    poison_messages_are_dead_lettered_and_can_be_redriven,
    work_in_progress_is_not_started_again,
    keys_delays_and_counters_are_right,
);

async fn reject(message: Message) -> Outcome {
    let store = TestStore::new();
    let processor = Processor::new(store.clone());
    let work = async |_: &Message, _: &mut Attempt| Err::<Vec<u8>, _>(Failure::permanent("no such order"));
    processor.process(message, work).await.unwrap()
}

/// The server would refuse a copy with any of these headers.
#[tokio::test]
async fn a_message_with_server_directives_reaches_the_dead_letters() {
    let broker = Nats::open(&format!("directives-{}", std::process::id())).await;
    let mut headers = HeaderMap::new();
    headers.insert("Nats-Msg-Id", "order-1");
    headers.insert("Nats-Expected-Stream", broker.queue.as_str());
    headers.insert("Nats-Expected-Last-Sequence", "0");
    headers.insert("Tenant", "a");
    broker.publish(headers, "charge").await;
    // The dead letter stream has another last sequence.
    let other = broker.context.publish(format!("{}-dead", broker.queue), "another".into());
    other.await.unwrap().await.unwrap();
    let message = broker.source().await.next().await.unwrap().unwrap();
    assert!(matches!(reject(message).await, Outcome::Rejected { .. }));
    let letter = broker.letters().await.pop().unwrap();
    let header = |name: &str| letter.headers.get(name).map(|value| value.as_str().to_owned());
    assert_eq!(header(ID_HEADER).as_deref(), Some("order-1"));
    assert_eq!(header("Tenant").as_deref(), Some("a"));
    assert_eq!(header("Onlyonce-Nats-Expected-Stream").as_deref(), Some(broker.queue.as_str()));
    assert_eq!(header("Nats-Expected-Stream"), None);
    assert_eq!(broker.pending().await, 0);
}

/// A stream with a smaller message limit than the queue.
async fn narrow(broker: &Nats) -> (Stream, String) {
    let name = format!("{}-narrow", broker.queue);
    let config =
        Config { name: name.clone(), subjects: vec![name.clone()], max_message_size: 1_000, ..Config::default() };
    (broker.context.get_or_create_stream(config).await.unwrap(), name)
}

#[tokio::test]
async fn a_dead_letter_that_is_too_large_omits_its_payload_if_the_stream_retains_it() {
    let broker = Nats::open(&format!("large-{}", std::process::id())).await;
    let (dead, subject) = narrow(&broker).await;
    let mut consumer =
        Consumer::builder(broker.context.clone(), &broker.consumer).dead_letters(&subject).build().await.unwrap();
    broker.send(Some("order-1"), &"x".repeat(5_000)).await;
    let message = consumer.next().await.unwrap().unwrap();
    assert!(matches!(reject(message).await, Outcome::Rejected { .. }));
    let letter = dead.get_raw_message(1).await.unwrap();
    assert!(letter.payload.is_empty());
    let omitted = letter.headers.get(OMITTED_HEADER).unwrap().as_str();
    assert_eq!(omitted, format!("{}/1, 5000 bytes", broker.queue));
    assert!(letter.headers.get(REASON_HEADER).unwrap().as_str().contains("no such order"));
    assert_eq!(broker.pending().await, 0);
    // A smaller payload fits, but not with all our headers.
    broker.send(Some("order-2"), &"x".repeat(850)).await;
    let message = consumer.next().await.unwrap().unwrap();
    message.reject(&"why ".repeat(200)).await.unwrap();
    let letter = dead.get_raw_message(2).await.unwrap();
    assert_eq!((letter.payload.len(), letter.headers.get(ID_HEADER).unwrap().as_str()), (850, "order-2"));
    assert!(letter.headers.get(REASON_HEADER).is_none());
}

#[tokio::test]
async fn a_dead_letter_that_is_too_large_leaves_its_message_on_a_work_queue() {
    let broker = Nats::open(&format!("base-{}", std::process::id())).await;
    let (_, subject) = narrow(&broker).await;
    let name = format!("work-{}", std::process::id());
    let config = Config {
        name: name.clone(),
        subjects: vec![name.clone()],
        retention: jetstream::stream::RetentionPolicy::WorkQueue,
        ..Config::default()
    };
    let stream = broker.context.get_or_create_stream(config).await.unwrap();
    let durable = pull::Config { durable_name: Some("workers".to_owned()), ..pull::Config::default() };
    let workers: PullConsumer = stream.get_or_create_consumer("workers", durable).await.unwrap();
    let mut consumer =
        Consumer::builder(broker.context.clone(), &workers).dead_letters(&subject).build().await.unwrap();
    broker.context.publish(name.clone(), "x".repeat(5_000).into()).await.unwrap().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let refused = message.reject("no such order").await.unwrap_err();
    assert!(matches!(refused, Error::DeadLetterTooLarge { sequence: 1, .. }), "{refused}");
    assert_eq!(stream.get_info().await.unwrap().state.messages, 1, "no other copy of the payload exists");
}

#[tokio::test]
async fn a_server_consumer_with_wrong_settings_is_an_error() {
    let broker = Nats::open(&format!("settings-{}", std::process::id())).await;
    let stream = broker.context.get_stream(&broker.queue).await.unwrap();
    for (name, ack_policy, headers_only) in [("none", AckPolicy::None, false), ("heads", AckPolicy::Explicit, true)] {
        let durable = Some(name.to_owned());
        let config = pull::Config { durable_name: durable, ack_policy, headers_only, ..pull::Config::default() };
        let consumer: PullConsumer = stream.create_consumer(config).await.unwrap();
        let refused = Consumer::builder(broker.context.clone(), &consumer).build().await.unwrap_err().to_string();
        let setting = if headers_only { "`headers_only`" } else { "`ack_policy`" };
        assert!(refused.contains(setting), "{refused}");
    }
    let refused = Consumer::builder(broker.context.clone(), &broker.consumer).dead_letters("a.*").build().await;
    assert!(refused.unwrap_err().to_string().contains("`dead_letters`"));
}
