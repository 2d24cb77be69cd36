//! A consumer group of a Redis stream, against a Redis server.

mod harness;

use std::time::Duration;

use harness::{Broker, Intake, address};
use onlyonce::delivery::Delivery;
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
        let name = format!("worker-{}", std::process::id());
        let builder = Consumer::builder(self.client.clone(), &self.stream, GROUP, &name);
        builder.idle(Duration::from_millis(800)).reads(20, Duration::from_millis(50)).build().unwrap()
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

#[tokio::test]
async fn an_entry_with_a_field_that_is_no_text_takes_no_other_along_and_is_copied_as_it_is() {
    let broker = Redis::open(&format!("bytes-{}", std::process::id())).await;
    let mut connection = broker.connection.clone();
    broker.send(Some("order-1"), "first").await;
    let unusual: [(&[u8], &[u8]); 4] = [(b"\xff\xfe", b"x"), (b"tag", b"1"), (b"tag", b"2"), (b"payload", b"second")];
    let _: String = connection.xadd(&broker.stream, "*", &unusual).await.unwrap();
    broker.send(Some("order-3"), "third").await;
    let mut consumer = broker.intake().await;
    let mut entries = Vec::new();
    for payload in ["first", "second", "third"] {
        let entry = consumer.next().await.unwrap();
        assert_eq!(entry.payload(), payload.as_bytes());
        entries.push(entry);
    }
    assert_eq!(entries[1].field(b"\xff\xfe"), Some(&b"x"[..]));
    let second = entries.remove(1);
    let from = second.id().to_owned();
    second.reject("no such order").await.unwrap();
    // Left to the idle time, and claimed by another one: the other command's reply.
    drop((entries, consumer));
    tokio::time::sleep(Duration::from_millis(900)).await;
    let mut other = Consumer::builder(broker.client.clone(), &broker.stream, GROUP, "other")
        .idle(Duration::from_millis(800))
        .build()
        .unwrap();
    for payload in ["first", "third"] {
        let entry = other.next().await.unwrap();
        assert_eq!(entry.payload(), payload.as_bytes());
        entry.ack().await.unwrap();
    }
    let dead = Consumer::builder(broker.client.clone(), &format!("{}.dead", broker.stream), GROUP, "reader");
    let letter = dead.build().unwrap().next().await.unwrap();
    let expected = [&unusual[..], &[(b"onlyonce.why", b"no such order"), (b"onlyonce.from", from.as_bytes())]].concat();
    assert_eq!(letter.fields().collect::<Vec<_>>(), expected);
    assert_eq!(broker.unsettled().await, 0);
}

#[tokio::test]
async fn an_entry_whose_dead_letter_is_refused_stays_pending() {
    let broker = Redis::open(&format!("refused-{}", std::process::id())).await;
    let mut connection = broker.connection.clone();
    let () = connection.set(format!("{}.dead", broker.stream), "no stream").await.unwrap();
    broker.send(Some("order-1"), "charge").await;
    let entry = broker.intake().await.next().await.unwrap();
    let refused = entry.reject("no such order").await.unwrap_err();
    assert_eq!(broker.unsettled().await, 1, "it is nowhere else");
    assert!(refused.to_string().contains("WRONGTYPE"), "{refused}");
}
