//! A consumer group of a Redis stream, against a Redis server.

mod harness;

use std::time::Duration;

use harness::{Broker, Intake, address};
use onlyonce::delivery::redis_streams::{Consumer, Entry};
use redis::aio::MultiplexedConnection;
use redis::streams::{StreamInfoGroupsReply, StreamRangeReply};
use redis::{AsyncCommands, Client, RedisResult};

struct Redis {
    client: Client,
    connection: MultiplexedConnection,
    stream: String,
}

const GROUP: &str = "workers";

impl Redis {
    async fn letters(&self) -> StreamRangeReply {
        self.connection.clone().xrange_all(format!("{}.dead", self.stream)).await.unwrap()
    }
}

impl Broker for Redis {
    type Intake = Consumer;

    const BETWEEN_TWINS: Duration = Duration::ZERO;

    async fn open(queue: &str) -> Self {
        let client = Client::open(address("ONLYONCE_REDIS")).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        let _: RedisResult<()> = connection.xgroup_create_mkstream(queue, GROUP, "0").await;
        Self { client, connection, stream: queue.to_owned() }
    }

    async fn send(&self, id: Option<&str>, body: &str) {
        let mut fields = vec![("payload", body)];
        fields.extend(id.map(|id| ("id", id)));
        let _: String = self.connection.clone().xadd(&self.stream, "*", &fields).await.unwrap();
    }

    async fn intake(&self) -> Consumer {
        Consumer::new(self.client.clone(), &self.stream, GROUP, &format!("worker-{}", std::process::id()))
            .idle(Duration::from_millis(800))
            .reads(20, Duration::from_millis(50))
    }

    async fn unsettled(&self) -> u64 {
        let groups: StreamInfoGroupsReply = self.connection.clone().xinfo_groups(&self.stream).await.unwrap();
        let group = &groups.groups[0];
        (group.pending + group.lag.unwrap()) as u64
    }

    async fn dead(&self) -> Vec<String> {
        self.letters().await.ids.iter().map(|letter| letter.get("payload").unwrap()).collect()
    }

    async fn redrive(&self) {
        for letter in self.letters().await.ids {
            assert!(letter.get::<String>("onlyonce.why").is_some_and(|why| !why.is_empty()));
            let fields: Vec<_> = letter.map.keys().map(|name| (name, letter.get::<String>(name).unwrap())).collect();
            let mut connection = self.connection.clone();
            let _: String = connection.xadd(&self.stream, "*", &fields).await.unwrap();
            let _: u64 = connection.xdel(format!("{}.dead", self.stream), &[&letter.id]).await.unwrap();
        }
    }
}

impl Intake for Consumer {
    type Delivery = Entry;

    async fn next(&mut self) -> Entry {
        Consumer::next(self).await.unwrap()
    }
}

tests_of!(
    Redis: every_effect_happens_once_however_often_its_consumer_is_killed,
    without_a_store_effects_happen_twice,
    poison_ends_among_the_dead_letters_and_can_come_back,
    what_is_at_work_is_not_begun_again,
    keys_waits_and_figures_are_right,
);
