//! A queue of RabbitMQ, against a RabbitMQ server.

mod harness;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::{Broker, Intake, address};
use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use onlyonce::Store;
use onlyonce::delivery::rabbitmq::{Consumer, Message, Retries};
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
        let consumer = Consumer::new(channel, &self.queue, 16).await.unwrap();
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
    let mut consumer = Consumer::new(channel, &broker.queue, 1).await.unwrap().retries(Retries::InProcess(most));
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
    let mut consumer = Consumer::new(channel.clone(), &broker.queue, 1).await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let work = async |_: &Message, _: &mut onlyonce::delivery::Job| {
        channel.close(200, "in the middle of the work".into()).await?;
        Ok("charged")
    };
    let unsettled = processor.process(message, work).await.unwrap_err();
    assert!(matches!(unsettled.settled, Settled::Done), "{unsettled:?}");

    let mut consumer =
        Consumer::new(broker.connection.create_channel().await.unwrap(), &broker.queue, 1).await.unwrap();
    let message = consumer.next().await.unwrap().unwrap();
    let work = async |_: &Message, _: &mut onlyonce::delivery::Job| -> Result<&str, Failure> { panic!("it was done") };
    let settled = processor.process(message, work).await.unwrap();
    assert!(matches!(settled, Settled::Duplicate(_)), "{settled:?}");
}
