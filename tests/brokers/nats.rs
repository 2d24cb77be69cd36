//! A pull consumer of NATS JetStream, against a NATS server.

mod harness;

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{Config, Stream};
use async_nats::jetstream::{self, Context};
use harness::{Broker, Intake, address};
use onlyonce::delivery::nats::{Consumer, DEAD_SUBJECT, DEAD_WHY, Message};

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
        assert!(!sent.await.unwrap().duplicate, "the server has taken a message for a twin");
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
    type Intake = Consumer;

    /// The server drops an id that it has seen within its own window, which is made short here.
    const BETWEEN_TWINS: Duration = Duration::from_millis(250);

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

    async fn intake(&self) -> Consumer {
        let consumer = Consumer::new(self.context.clone(), &self.consumer).await.unwrap();
        consumer.dead_letters(&format!("{}-dead", self.queue))
    }

    async fn unsettled(&self) -> u64 {
        let info = self.consumer.get_info().await.unwrap();
        info.num_pending + info.num_ack_pending as u64
    }

    async fn dead(&self) -> Vec<String> {
        let body = |letter: StreamMessage| String::from_utf8(letter.payload.to_vec()).unwrap();
        self.letters().await.into_iter().map(body).collect()
    }

    async fn redrive(&self) {
        for letter in self.letters().await {
            assert_eq!(letter.headers.get(DEAD_SUBJECT).unwrap().as_str(), self.queue);
            assert!(!letter.headers.get(DEAD_WHY).unwrap().as_str().is_empty());
            self.publish(letter.headers, std::str::from_utf8(&letter.payload).unwrap()).await;
        }
        self.dead.purge().await.unwrap();
    }
}

impl Intake for Consumer {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        Consumer::next(self).await.unwrap().unwrap()
    }
}

tests_of!(
    Nats: every_effect_happens_once_however_often_its_consumer_is_killed,
    without_a_store_effects_happen_twice,
    poison_ends_among_the_dead_letters_and_can_come_back,
    what_is_at_work_is_not_begun_again,
    keys_waits_and_figures_are_right,
);
