//! A consumer group of a Redis stream, against a Redis server.

mod harness;

use std::time::Duration;

use harness::{Broker, Source, address};
use onlyonce::delivery::Delivery;
use onlyonce::delivery::redis_streams::redis::aio::MultiplexedConnection;
use onlyonce::delivery::redis_streams::redis::streams::{StreamInfoGroupsReply, StreamRangeReply};
use onlyonce::delivery::redis_streams::redis::{AsyncCommands, Client, RedisResult};
use onlyonce::delivery::redis_streams::{Consumer, Entry, REASON_FIELD, SOURCE_FIELD};

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
    type Source = Consumer;

    const ID_EXPIRY: Duration = Duration::ZERO;

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

    async fn source(&self) -> Consumer {
        let name = format!("worker-{}", std::process::id());
        let builder = Consumer::builder(self.client.clone(), &self.stream, GROUP, &name);
        builder.idle(Duration::from_millis(800)).reads(20, Duration::from_millis(50)).build().unwrap()
    }

    async fn pending(&self) -> u64 {
        let groups: StreamInfoGroupsReply = self.connection.clone().xinfo_groups(&self.stream).await.unwrap();
        let group = &groups.groups[0];
        (group.pending + group.lag.unwrap()) as u64
    }

    async fn dead_letters(&self) -> Vec<String> {
        self.letters().await.ids.iter().map(|letter| letter.get("payload").unwrap()).collect()
    }

    async fn redrive(&self) {
        for letter in self.letters().await.ids {
            assert!(letter.get::<String>(REASON_FIELD).is_some_and(|reason| !reason.is_empty()));
            let fields: Vec<_> = letter.map.keys().map(|name| (name, letter.get::<String>(name).unwrap())).collect();
            let mut connection = self.connection.clone();
            let _: String = connection.xadd(&self.stream, "*", &fields).await.unwrap();
            let _: u64 = connection.xdel(format!("{}.dead", self.stream), &[&letter.id]).await.unwrap();
        }
    }
}

impl Source for Consumer {
    type Delivery = Entry;

    async fn next(&mut self) -> Entry {
        Consumer::next(self).await.unwrap()
    }
}

tests_of!(
    Redis: every_effect_happens_once_while_consumers_are_killed,
    without_a_store_effects_happen_twice,
    poison_messages_are_dead_lettered_and_can_be_redriven,
    work_in_progress_is_not_started_again,
    keys_delays_and_counters_are_right,
);

#[tokio::test]
async fn an_entry_with_fields_that_are_not_utf8_is_delivered_and_copied_byte_for_byte() {
    let broker = Redis::open(&format!("bytes-{}", std::process::id())).await;
    let mut connection = broker.connection.clone();
    broker.send(Some("order-1"), "first").await;
    let fields: [(&[u8], &[u8]); 4] = [(b"\xff\xfe", b"x"), (b"tag", b"1"), (b"tag", b"2"), (b"payload", b"second")];
    let _: String = connection.xadd(&broker.stream, "*", &fields).await.unwrap();
    broker.send(Some("order-3"), "third").await;
    let mut consumer = broker.source().await;
    let mut entries = Vec::new();
    for payload in ["first", "second", "third"] {
        let entry = consumer.next().await.unwrap();
        assert_eq!(entry.payload(), payload.as_bytes());
        entries.push(entry);
    }
    assert_eq!(entries[1].field(b"\xff\xfe"), Some(&b"x"[..]));
    let second = entries.remove(1);
    let source = second.id().to_owned();
    second.reject("no such order").await.unwrap();
    // The others become idle, and another consumer claims them: XAUTOCLAIM instead of XREADGROUP.
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
    let ours = [(REASON_FIELD.as_bytes(), &b"no such order"[..]), (SOURCE_FIELD.as_bytes(), source.as_bytes())];
    let expected = [&fields[..], &ours].concat();
    assert_eq!(letter.fields().collect::<Vec<_>>(), expected);
    assert_eq!(broker.pending().await, 0);
}

#[tokio::test]
async fn an_entry_whose_dead_letter_is_refused_stays_pending() {
    let broker = Redis::open(&format!("refused-{}", std::process::id())).await;
    let mut connection = broker.connection.clone();
    let () = connection.set(format!("{}.dead", broker.stream), "not a stream").await.unwrap();
    broker.send(Some("order-1"), "charge").await;
    let entry = broker.source().await.next().await.unwrap();
    let refused = entry.reject("no such order").await.unwrap_err();
    assert_eq!(broker.pending().await, 1, "no dead letter was stored");
    assert!(refused.to_string().contains("WRONGTYPE"), "{refused}");
}
