//! A queue of RabbitMQ, against a RabbitMQ server.

mod harness;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Broker, Intake, address};
use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use onlyonce::Store;
use onlyonce::delivery::rabbitmq::{Consumer, DEAD_WHY, Message, Retries};
use onlyonce::delivery::{Failure, Processor, Settled};

struct Rabbit {
    connection: Connection,
    channel: Channel,
    queue: String,
}

async fn connect() -> Connection {
    Connection::connect(&address("ONLYONCE_RABBITMQ"), ConnectionProperties::default()).await.unwrap()
}

impl Rabbit {
    /// Messages that are ready in a queue, if it is there.
    async fn ready(&self, queue: &str) -> u64 {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        // A question for a queue that is not there closes its channel.
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

    /// Takes the dead letters; those that are not acknowledged are there again when the channel is closed.
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
    type Intake = Reader;

    const BETWEEN_TWINS: Duration = Duration::ZERO;

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

    async fn intake(&self) -> Reader {
        let connection = connect().await;
        let channel = connection.create_channel().await.unwrap();
        let consumer = Consumer::builder(channel, &self.queue).prefetch(16).build().await.unwrap();
        Reader { consumer, _connection: connection }
    }

    async fn unsettled(&self) -> u64 {
        // What a connection that has just ended had not acknowledged becomes ready.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut unsettled = self.ready(&self.queue).await;
        for stay in [64, 128, 256, 512, 1_024] {
            unsettled += self.ready(&format!("{}.retry.{stay}", self.queue)).await;
        }
        unsettled
    }

    async fn dead(&self) -> Vec<String> {
        let channel = self.connection.create_channel().await.unwrap();
        let letters = self.letters(&channel).await;
        let bodies = letters.iter().map(|letter| String::from_utf8(letter.delivery.data.clone()).unwrap()).collect();
        channel.close(200, "looked at them".into()).await.unwrap();
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

impl Intake for Reader {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        self.consumer.next().await.unwrap().unwrap()
    }
}

tests_of!(
    Rabbit: every_effect_happens_once_however_often_its_consumer_is_killed,
    without_a_store_effects_happen_twice,
    poison_ends_among_the_dead_letters_and_can_come_back,
    what_is_at_work_is_not_begun_again,
    keys_waits_and_figures_are_right,
);

#[tokio::test]
async fn a_consumer_that_may_not_declare_queues_keeps_a_delivery_back_in_its_process() {
    let broker = Rabbit::open(&format!("in-process-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let channel = broker.connection.create_channel().await.unwrap();
    let most = Duration::from_millis(300);
    let mut consumer =
        Consumer::builder(channel, &broker.queue).prefetch(1).retries(Retries::InProcess(most)).build().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
    let processor = Processor::new(onlyonce::future::Store::new(store).unwrap()).backoff(most * 2, most * 2);
    let begun = std::time::Instant::now();
    let mut settled = Vec::new();
    while !matches!(settled.last(), Some(Settled::Done)) {
        let message = consumer.next().await.unwrap().unwrap();
        assert_eq!(message.delivery().redelivered, !settled.is_empty());
        let work = async |_: &Message, job: &mut onlyonce::delivery::Job| {
            if job.attempt() == 1 { Err(Failure::from("it fails at first")) } else { Ok("charged") }
        };
        settled.push(processor.process(message, work).await.unwrap());
    }
    assert!(begun.elapsed() >= most * 2, "the store's backoff is kept, however often the broker delivers meanwhile");
    assert!(
        matches!(settled[..], [Settled::Failed { .. }, Settled::InProgress { .. }, .., Settled::Done]),
        "{settled:?}"
    );
    assert_eq!(broker.ready(&format!("{}.retry.1024", broker.queue)).await, 0);
}

#[tokio::test]
async fn an_acknowledgement_on_a_closed_channel_is_reported_and_the_redelivery_is_a_duplicate() {
    let broker = Rabbit::open(&format!("closed-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
    let processor = Processor::new(onlyonce::future::Store::new(store).unwrap());
    let channel = broker.connection.create_channel().await.unwrap();
    let mut consumer = Consumer::builder(channel.clone(), &broker.queue).prefetch(1).build().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let work = async |_: &Message, _: &mut onlyonce::delivery::Job| {
        channel.close(200, "in the middle of the work".into()).await?;
        Ok("charged")
    };
    let unsettled = processor.process(message, work).await.unwrap_err();
    assert!(matches!(unsettled.settled, Settled::Done), "{unsettled:?}");

    let channel = broker.connection.create_channel().await.unwrap();
    let mut consumer = Consumer::builder(channel, &broker.queue).prefetch(1).build().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let work = async |_: &Message, _: &mut onlyonce::delivery::Job| -> Result<&str, Failure> { panic!("it was done") };
    let settled = processor.process(message, work).await.unwrap();
    assert!(matches!(settled, Settled::Duplicate(_)), "{settled:?}");
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

/// Fails twice, and then goes to the dead letters, each time after its backoff. The letter.
async fn fails_three_times(broker: &Rabbit, properties: BasicProperties) -> BasicGetMessage {
    let channel = broker.connection.create_channel().await.unwrap();
    let dead = format!("{}.dead", broker.queue);
    let mut consumer = Consumer::builder(channel, &broker.queue).prefetch(1).dead_letters(&dead).build().await.unwrap();
    broker.publish(properties, b"charge").await;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
    let backoff = Duration::from_millis(900);
    let processor = Processor::new(onlyonce::future::Store::new(store).unwrap()).attempts(3).backoff(backoff, backoff);
    let mut settled = Vec::new();
    while !matches!(settled.last(), Some(Settled::Rejected { .. })) {
        let next = tokio::time::timeout(Duration::from_secs(20), consumer.next());
        let message = next.await.expect("the broker has dropped the copy").unwrap().unwrap();
        let work = async |_: &Message, _: &mut onlyonce::delivery::Job| Err::<&str, _>(Failure::from("no such order"));
        settled.push(processor.process(message, work).await.unwrap());
    }
    assert!(
        matches!(settled[..], [Settled::Failed { .. }, Settled::Failed { .. }, Settled::Rejected { attempts: 3, .. }]),
        "none came back before its time: {settled:?}"
    );
    let channel = broker.connection.create_channel().await.unwrap();
    let mut letters = broker.letters(&channel).await;
    assert_eq!(letters.len(), 1);
    let letter = letters.remove(0);
    letter.delivery.ack(BasicAckOptions::default()).await.unwrap();
    letter
}

/// Copied as they are, these would send each retry copy to another queue, and have the broker take its way back for a cycle,
/// and drop it.
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
    assert_eq!(broker.ready(&audit).await, 1, "what the producer has sent there");
    let headers = letter.delivery.properties.headers().clone().unwrap();
    assert_eq!(headers.inner().get(DEAD_WHY), Some(&text("attempt 3: no such order")));
    assert_eq!(headers.inner().get("tenant"), Some(&text("a")));
    assert_eq!(headers.inner().get("onlyonce-user-id"), Some(&text("guest")));
    assert_eq!(letter.delivery.properties.user_id(), &None);
}

#[tokio::test]
async fn a_message_that_expires_waits_as_long_as_any_other() {
    let broker = Rabbit::open(&format!("expires-{}", std::process::id())).await;
    let properties = BasicProperties::default().with_message_id("order-1".into()).with_expiration("200".into());
    let letter = fails_three_times(&broker, properties).await;
    assert_eq!(letter.delivery.properties.expiration(), &None);
}

#[tokio::test]
async fn a_dead_letter_that_is_not_confirmed_keeps_its_message() {
    let broker = Rabbit::open(&format!("unconfirmed-{}", std::process::id())).await;
    broker.send(Some("order-1"), "charge").await;
    let channel = broker.connection.create_channel().await.unwrap();
    let builder = Consumer::builder(channel, &broker.queue).prefetch(1).dead_letters("nowhere");
    let mut consumer = builder.build().await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let refused = onlyonce::delivery::Delivery::reject(message, "no such order").await.unwrap_err().to_string();
    assert!(refused.contains("queue nowhere"), "{refused}");
    assert!(consumer.next().await.unwrap().unwrap().delivery().redelivered);
}
