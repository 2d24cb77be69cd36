//! A queue of RabbitMQ, against a RabbitMQ server.

mod harness;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Broker, Source, TestStore, address};
use onlyonce::delivery::rabbitmq::lapin::message::BasicGetMessage;
use onlyonce::delivery::rabbitmq::lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use onlyonce::delivery::rabbitmq::lapin::types::{AMQPValue, FieldTable};
use onlyonce::delivery::rabbitmq::lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use onlyonce::delivery::rabbitmq::{Consumer, Message, REASON_HEADER, Retries};
use onlyonce::delivery::{Attempt, Delivery, Failure, Outcome, Processor};

struct Rabbit {
    connection: Connection,
    channel: Channel,
    queue: String,
}

async fn connect() -> Connection {
    Connection::connect(&address("ONLYONCE_RABBITMQ"), ConnectionProperties::default()).await.unwrap()
}

impl Rabbit {
    /// The number of ready messages in a queue. 0 if the queue does not exist.
    async fn ready(&self, queue: &str) -> u64 {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        // A passive declaration of a missing queue closes its channel.
        let channel = self.connection.create_channel().await.unwrap();
        match channel.queue_declare(queue.into(), passive, FieldTable::default()).await {
            Ok(queue) => u64::from(queue.message_count()),
            Err(_) => 0,
        }
    }

    async fn publish(&self, properties: BasicProperties, body: &[u8]) {
        let queue = self.queue.as_str().into();
        let confirmed = self.channel.basic_publish("".into(), queue, BasicPublishOptions::default(), body, properties);
        assert!(confirmed.await.unwrap().await.unwrap().is_ack());
    }

    /// Gets the dead letters. Closing the channel returns those that are not acknowledged.
    async fn letters(&self, channel: &Channel) -> Vec<BasicGetMessage> {
        let mut letters = Vec::new();
        let dead = format!("{}.dead", self.queue);
        while let Some(letter) = channel.basic_get(dead.as_str().into(), BasicGetOptions::default()).await.unwrap() {
            letters.push(letter);
        }
        letters
    }
}

impl Broker for Rabbit {
    type Source = Reader;

    const ID_EXPIRY: Duration = Duration::ZERO;

    async fn open(queue: &str) -> Self {
        let connection = connect().await;
        let channel = connection.create_channel().await.unwrap();
        Consumer::declare(&channel, queue).await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { connection, channel, queue: queue.to_owned() }
    }

    async fn send(&self, id: Option<&str>, body: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut properties = BasicProperties::default().with_timestamp(now);
        if let Some(id) = id {
            properties = properties.with_message_id(id.into());
        }
        self.publish(properties, body.as_bytes()).await;
    }

    async fn source(&self) -> Reader {
        let connection = connect().await;
        let channel = connection.create_channel().await.unwrap();
        let consumer = Consumer::builder(channel, &self.queue).prefetch(16).build().await.unwrap();
        Reader { consumer, _connection: connection }
    }

    async fn pending(&self) -> u64 {
        // Unacknowledged messages of a connection that has just ended become ready.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut pending = self.ready(&self.queue).await;
        for ttl_ms in [64, 128, 256, 512, 1_024] {
            pending += self.ready(&format!("{}.retry.{ttl_ms}", self.queue)).await;
        }
        pending
    }

    async fn dead_letters(&self) -> Vec<String> {
        let channel = self.connection.create_channel().await.unwrap();
        let letters = self.letters(&channel).await;
        let bodies = letters.iter().map(|letter| String::from_utf8(letter.delivery.data.clone()).unwrap()).collect();
        channel.close(200, "done".into()).await.unwrap();
        bodies
    }

    async fn redrive(&self) {
        let channel = self.connection.create_channel().await.unwrap();
        for letter in self.letters(&channel).await {
            self.publish(letter.delivery.properties.clone(), &letter.delivery.data).await;
            letter.delivery.ack(BasicAckOptions::default()).await.unwrap();
        }
        channel.close(200, "done".into()).await.unwrap();
    }
}

struct Reader {
    consumer: Consumer,
    _connection: Connection,
}

impl Source for Reader {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        self.consumer.next().await.unwrap().unwrap()
    }
}

tests_of!(
    Rabbit: every_effect_happens_once_while_consumers_are_killed,
    without_a_store_effects_happen_twice,
    poison_messages_are_dead_lettered_and_can_be_redriven,
    work_in_progress_is_not_started_again,
    keys_delays_and_counters_are_right,
);

#[tokio::test]
async fn a_consumer_without_retry_queues_delays_deliveries_in_its_process() {
    let broker = Rabbit::open(&format!("in-process-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let channel = broker.connection.create_channel().await.unwrap();
    let max = Duration::from_millis(300);
    let mut consumer =
        Consumer::builder(channel, &broker.queue).prefetch(1).retries(Retries::InProcess(max)).build().await.unwrap();
    let store = TestStore::new();
    let processor = Processor::new(store.clone()).backoff(max * 2, max * 2);
    let start = std::time::Instant::now();
    let mut outcomes = Vec::new();
    while !matches!(outcomes.last(), Some(Outcome::Done)) {
        let message = consumer.next().await.unwrap().unwrap();
        assert_eq!(message.delivery().redelivered, !outcomes.is_empty());
        let work = async |_: &Message, attempt: &mut Attempt| {
            if attempt.number() == 1 { Err(Failure::from("the first attempt fails")) } else { Ok("charged") }
        };
        outcomes.push(processor.process(message, work).await.unwrap());
    }
    assert!(start.elapsed() >= max * 2, "redeliveries do not shorten the backoff of the store");
    assert!(
        matches!(outcomes[..], [Outcome::Failed { .. }, Outcome::InProgress { .. }, .., Outcome::Done]),
        "{outcomes:?}"
    );
    assert_eq!(broker.ready(&format!("{}.retry.1024", broker.queue)).await, 0);
}

#[tokio::test]
async fn an_acknowledgement_on_a_closed_channel_is_an_error_and_the_redelivery_is_a_duplicate() {
    let broker = Rabbit::open(&format!("closed-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let store = TestStore::new();
    let processor = Processor::new(store.clone());
    let channel = broker.connection.create_channel().await.unwrap();
    let mut consumer = Consumer::builder(channel.clone(), &broker.queue).prefetch(1).build().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let work = async |_: &Message, _: &mut Attempt| {
        channel.close(200, "during the work".into()).await?;
        Ok("charged")
    };
    let error = processor.process(message, work).await.unwrap_err();
    assert!(matches!(error.outcome, Outcome::Done), "{error:?}");

    let channel = broker.connection.create_channel().await.unwrap();
    let mut consumer = Consumer::builder(channel, &broker.queue).prefetch(1).build().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let work = async |_: &Message, _: &mut Attempt| -> Result<&str, Failure> { panic!("the work runs twice") };
    let outcome = processor.process(message, work).await.unwrap();
    assert!(matches!(outcome, Outcome::Duplicate(_)), "{outcome:?}");
}

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert((*name).into(), value.clone());
    }
    table
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

/// Fails a message three times, with backoffs, and returns its dead letter.
async fn fails_three_times(broker: &Rabbit, properties: BasicProperties) -> BasicGetMessage {
    let channel = broker.connection.create_channel().await.unwrap();
    let dead = format!("{}.dead", broker.queue);
    let mut consumer = Consumer::builder(channel, &broker.queue).prefetch(1).dead_letters(&dead).build().await.unwrap();
    broker.publish(properties, b"charge").await;
    let store = TestStore::new();
    let backoff = Duration::from_millis(900);
    let processor = Processor::new(store.clone()).attempts(3).backoff(backoff, backoff);
    let mut outcomes = Vec::new();
    while !matches!(outcomes.last(), Some(Outcome::Rejected { .. })) {
        let next = tokio::time::timeout(Duration::from_secs(20), consumer.next());
        let message = next.await.expect("the broker dropped the copy").unwrap().unwrap();
        let work = async |_: &Message, _: &mut Attempt| Err::<&str, _>(Failure::from("no such order"));
        outcomes.push(processor.process(message, work).await.unwrap());
    }
    assert!(
        matches!(outcomes[..], [Outcome::Failed { .. }, Outcome::Failed { .. }, Outcome::Rejected { attempts: 3, .. }]),
        "no redelivery came early: {outcomes:?}"
    );
    let channel = broker.connection.create_channel().await.unwrap();
    let mut letters = broker.letters(&channel).await;
    assert_eq!(letters.len(), 1);
    let letter = letters.remove(0);
    letter.delivery.ack(BasicAckOptions::default()).await.unwrap();
    letter
}

/// Unchanged copies of these headers would be routed to another queue, and the broker would drop them as a dead letter cycle.
#[tokio::test]
async fn a_retry_copy_does_not_repeat_directives_to_the_broker() {
    let broker = Rabbit::open(&format!("directives-{}", std::process::id())).await;
    let audit = format!("{}.audit", broker.queue);
    let (name, options) = (audit.as_str().into(), QueueDeclareOptions::durable());
    broker.channel.queue_declare(name, options, FieldTable::default()).await.unwrap();
    let death = table(&[
        ("queue", text(&broker.queue)),
        ("reason", text("expired")),
        ("count", AMQPValue::LongLongInt(1)),
        ("exchange", text("")),
        ("routing-keys", AMQPValue::FieldArray(vec![text(&broker.queue)].into())),
        ("time", AMQPValue::Timestamp(1_700_000_000)),
    ]);
    let headers = table(&[
        ("CC", AMQPValue::FieldArray(vec![text(&audit)].into())),
        ("x-death", AMQPValue::FieldArray(vec![AMQPValue::FieldTable(death)].into())),
        ("tenant", text("a")),
    ]);
    let properties = BasicProperties::default().with_message_id("order-1".into()).with_headers(headers);
    let letter = fails_three_times(&broker, properties.with_user_id("guest".into())).await;
    assert_eq!(broker.ready(&audit).await, 1, "the copy that the producer sent there");
    let headers = letter.delivery.properties.headers().clone().unwrap();
    assert_eq!(headers.inner().get(REASON_HEADER), Some(&text("attempt 3: no such order")));
    assert_eq!(headers.inner().get("tenant"), Some(&text("a")));
    assert_eq!(headers.inner().get("onlyonce-user-id"), Some(&text("guest")));
    assert_eq!(letter.delivery.properties.user_id(), &None);
}

#[tokio::test]
async fn a_message_with_an_expiration_is_delayed_like_any_other() {
    let broker = Rabbit::open(&format!("expires-{}", std::process::id())).await;
    let properties = BasicProperties::default().with_message_id("order-1".into()).with_expiration("200".into());
    let letter = fails_three_times(&broker, properties).await;
    assert_eq!(letter.delivery.properties.expiration(), &None);
}

#[tokio::test]
async fn a_message_whose_dead_letter_is_not_confirmed_is_redelivered() {
    let broker = Rabbit::open(&format!("unconfirmed-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let channel = broker.connection.create_channel().await.unwrap();
    let builder = Consumer::builder(channel, &broker.queue).prefetch(1).dead_letters("missing");
    let mut consumer = builder.build().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let refused = message.reject("no such order").await.unwrap_err().to_string();
    assert!(refused.contains("queue missing"), "{refused}");
    assert!(consumer.next().await.unwrap().unwrap().delivery().redelivered);
}
