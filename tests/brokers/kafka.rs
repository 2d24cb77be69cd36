//! Kafka topics, against a broker that speaks its protocol.

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{Broker, Intake, address};
use onlyonce::delivery::kafka::{Consumer, DEAD_FROM, DEAD_WHY, Error, Id, Message};
use onlyonce::delivery::{Delivery, Failure, Job, Processor, Settled};
use parking_lot::Mutex;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use rdkafka::message::{Header, Headers, Message as _, OwnedHeaders, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

const PARTITIONS: i32 = 4;
const WAIT: Duration = Duration::from_secs(10);

struct Kafka {
    topic: String,
    dead: String,
    producer: FutureProducer,
}

fn config() -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", address("ONLYONCE_KAFKA"));
    config
}

fn reader(group: &str) -> ClientConfig {
    let mut config = config();
    config.set("group.id", group).set("auto.offset.reset", "earliest").set("auto.commit.interval.ms", "50");
    config.set("fetch.wait.max.ms", "50").set("topic.metadata.refresh.fast.interval.ms", "50");
    config.set("session.timeout.ms", "6000").set("heartbeat.interval.ms", "200");
    config
}

fn all(topic: &str, offset: Offset) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for partition in 0..PARTITIONS {
        list.add_partition_offset(topic, partition, offset).unwrap();
    }
    list
}

impl Kafka {
    /// What the group has not committed: the first offset of each partition, and the one after its last.
    fn rest(consumer: &BaseConsumer, topic: &str) -> BTreeMap<i32, (i64, i64)> {
        let committed = consumer.committed_offsets(all(topic, Offset::Invalid), WAIT).unwrap();
        let rest = |partition| {
            let (low, high) = consumer.fetch_watermarks(topic, partition, WAIT).unwrap();
            let from = committed.find_partition(topic, partition).unwrap().offset().to_raw().filter(|raw| *raw >= 0);
            (partition, (from.unwrap_or(low), high))
        };
        (0..PARTITIONS).map(rest).collect()
    }

    /// The dead letters that nobody has put back, and a consumer that may commit that somebody has.
    fn letters(&self) -> (Vec<OwnedMessage>, BaseConsumer, TopicPartitionList) {
        let consumer: BaseConsumer = reader("redrive").set("enable.auto.commit", "false").create().unwrap();
        let (mut from, mut to, mut left) = (TopicPartitionList::new(), TopicPartitionList::new(), 0);
        for (partition, (low, high)) in Self::rest(&consumer, &self.dead) {
            from.add_partition_offset(&self.dead, partition, Offset::Offset(low)).unwrap();
            to.add_partition_offset(&self.dead, partition, Offset::Offset(high)).unwrap();
            left += high - low;
        }
        consumer.assign(&from).unwrap();
        // A record that is rejected, and delivered again because its consumer has died before the next commit, is
        // rejected once more. Its letters say that they are of one record.
        let mut letters = BTreeMap::new();
        for _ in 0..left {
            let letter = consumer.poll(WAIT).expect("a letter").unwrap().detach();
            letters.insert(header(&letter, DEAD_FROM), letter);
        }
        (letters.into_values().collect(), consumer, to)
    }

    async fn put(&self, key: &[u8], body: &[u8], headers: OwnedHeaders) {
        let record = FutureRecord::to(&self.topic).key(key).payload(body).headers(headers);
        self.producer.send(record, WAIT).await.unwrap();
    }

    fn member(&self, group: &str) -> Consumer {
        Consumer::subscribe(&reader(group), &[&self.topic]).unwrap()
    }

    /// Of this topic alone: who is no member may not commit for a group that has members.
    fn group(&self) -> String {
        format!("{}.workers", self.topic)
    }
}

fn header(record: &OwnedMessage, name: &str) -> String {
    let found = record.headers().unwrap().iter().find(|header| header.key == name);
    String::from_utf8(found.unwrap().value.unwrap().to_vec()).unwrap()
}

impl Broker for Kafka {
    type Intake = Consumer;

    const BETWEEN_TWINS: Duration = Duration::ZERO;

    async fn open(queue: &str) -> Self {
        let (topic, dead) = (queue.to_owned(), format!("{queue}.dead"));
        let producer: FutureProducer = config().set("linger.ms", "0").create().unwrap();
        let partitions = |asked: Option<&str>, topic: &str| {
            let known = producer.client().fetch_metadata(asked, WAIT).unwrap();
            known.topics().iter().find(|known| known.name() == topic).map(|known| known.partitions().len())
        };
        for topic in [&topic, &dead] {
            if partitions(None, topic) == Some(PARTITIONS as usize) {
                continue;
            }
            // The mock cluster does not answer this, and makes a topic when it is asked for it by name.
            let admin: AdminClient<DefaultClientContext> = config().create().unwrap();
            let soon = AdminOptions::new().request_timeout(Some(Duration::from_secs(1)));
            drop(admin.create_topics(&[NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1))], &soon).await);
            let begun = Instant::now();
            while partitions(Some(topic), topic) != Some(PARTITIONS as usize) {
                assert!(begun.elapsed() < WAIT, "{topic} has not {PARTITIONS} partitions");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Self { topic, dead, producer }
    }

    async fn send(&self, id: Option<&str>, body: &str) {
        let headers = OwnedHeaders::new();
        let headers = match id {
            Some(id) => headers.insert(Header { key: "id", value: Some(id) }),
            None => headers,
        };
        self.put(id.unwrap_or(body).as_bytes(), body.as_bytes(), headers).await;
    }

    /// Not as a member, for a group waits for a dead one until its session is over.
    async fn intake(&self) -> Consumer {
        let consumer = Consumer::assign(&reader(&self.group()), &all(&self.topic, Offset::Stored)).unwrap();
        consumer.dead_letters(self.producer.clone(), &self.dead)
    }

    async fn unsettled(&self) -> u64 {
        let consumer: BaseConsumer = reader(&self.group()).create().unwrap();
        Self::rest(&consumer, &self.topic).values().map(|(from, to)| (to - from) as u64).sum()
    }

    async fn dead(&self) -> Vec<String> {
        let (letters, ..) = self.letters();
        letters.iter().map(|letter| String::from_utf8(letter.payload().unwrap().to_vec()).unwrap()).collect()
    }

    async fn redrive(&self) {
        let (letters, consumer, to) = self.letters();
        for letter in letters {
            assert!(header(&letter, DEAD_WHY).starts_with("attempt "));
            let headers = letter.headers().unwrap();
            self.put(letter.key().unwrap(), letter.payload().unwrap(), headers.clone()).await;
        }
        consumer.commit(&to, CommitMode::Sync).unwrap();
    }
}

impl Intake for Consumer {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        Consumer::next(self).await.unwrap()
    }
}

tests_of!(
    Kafka: every_effect_happens_once_however_often_its_consumer_is_killed,
    without_a_store_effects_happen_twice,
    poison_ends_among_the_dead_letters_and_can_come_back,
    keys_waits_and_figures_are_right,
    what_is_at_work_is_not_begun_again,
);

fn store(dir: &std::path::Path) -> onlyonce::future::Store {
    let store = onlyonce::Store::builder().memory_budget(32 << 20).open(dir.join("store")).unwrap();
    onlyonce::future::Store::new(store).unwrap()
}

fn name(test: &str) -> String {
    format!("{test}-{}", std::process::id())
}

/// What members of a group have done between them.
#[derive(Default)]
struct Day {
    effects: Mutex<BTreeMap<String, u32>>,
    settled: Mutex<BTreeMap<String, usize>>,
}

/// Works on whatever comes, until nothing has come for so long. The work that is called `long` ends when it may.
async fn work(mut consumer: Consumer, processor: Processor, day: Arc<Day>, may_end: Arc<Semaphore>, quiet: Duration) {
    let mut tasks = JoinSet::new();
    while let Ok(message) = timeout(quiet, consumer.next()).await {
        let (message, processor) = (message.unwrap(), processor.clone());
        let body = String::from_utf8(message.payload().to_vec()).unwrap();
        let (day, may_end) = (Arc::clone(&day), Arc::clone(&may_end));
        tasks.spawn(async move {
            let effect = async |message: &Message, _: &mut Job| {
                let body = std::str::from_utf8(message.payload())?;
                tokio::time::sleep(Duration::from_millis(5)).await;
                if body.starts_with("long") {
                    may_end.acquire().await?.forget();
                }
                *day.effects.lock().entry(body.to_owned()).or_default() += 1;
                Ok::<_, Failure>(body.to_owned())
            };
            let what = match processor.process(message, effect).await {
                Ok(Settled::Done) => "done",
                Ok(Settled::Duplicate(_)) => "duplicate",
                Ok(Settled::InProgress { .. }) => "in progress",
                Ok(other) => panic!("{other:?}"),
                Err(unsettled) => match unsettled.error {
                    Error::Revoked => "revoked",
                    error => panic!("{error}"),
                },
            };
            let what = if body.starts_with("long") { format!("{body} {what}") } else { what.to_owned() };
            *day.settled.lock().entry(what).or_default() += 1;
        });
        while let Some(ended) = tasks.try_join_next() {
            ended.unwrap();
        }
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_at_work_when_its_partition_is_taken_away_is_done_once_and_comes_back_to_nobody() {
    const QUIET: Duration = Duration::from_secs(12);
    let broker = Kafka::open(&name("rebalance")).await;
    for partition in 0..PARTITIONS {
        let body = format!("long {partition}");
        let record = FutureRecord::<[u8], str>::to(&broker.topic).partition(partition).payload(&body);
        broker.producer.send(record, WAIT).await.unwrap();
    }
    for message in (0..200).chain(0..200) {
        broker.send(Some(&format!("order-{message}")), &format!("charge {message}")).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let processor = Processor::new(store(dir.path())).longest_wait(Duration::from_millis(300));
    let (day, may_end) = (Arc::new(Day::default()), Arc::new(Semaphore::new(0)));
    let member = || {
        let consumer = broker.member(&broker.group());
        tokio::spawn(work(consumer, processor.clone(), Arc::clone(&day), Arc::clone(&may_end), QUIET))
    };
    let seen = |what: &str| day.settled.lock().get(what).copied().unwrap_or_default();
    let eventually = async |what: &str, least: usize| {
        let begun = Instant::now();
        while seen(what) < least {
            assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {:?}", day.settled.lock());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let first = member();
    eventually("done", 200).await;
    eventually("duplicate", 200).await;
    // A second member comes: all partitions are taken away and shared out anew, with the long work in hand. It is
    // delivered to whoever has its partition then, and found in progress.
    let second = member();
    for partition in 0..PARTITIONS {
        eventually(&format!("long {partition} in progress"), 1).await;
    }
    may_end.add_permits(PARTITIONS as usize);
    first.await.unwrap();
    second.await.unwrap();
    println!("rebalance: {:?}", day.settled.lock());
    let effects = day.effects.lock().clone();
    assert_eq!(effects.len(), 200 + PARTITIONS as usize);
    assert!(effects.values().all(|times| *times == 1), "{effects:?}");
    for partition in 0..PARTITIONS {
        let seen = |what| seen(&format!("long {partition} {what}"));
        assert_eq!((seen("revoked"), seen("done")), (1, 0), "its answer was for nobody");
        assert!(seen("duplicate") >= 1, "and whoever had the partition by then was told");
    }
    assert_eq!(broker.unsettled().await, 0);
    let stats = processor.store().blocking().stats();
    assert_eq!((stats.completed, stats.in_flight), (effects.len() as u64, 0), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_ahead_a_partition_waits_for_what_is_to_come_back() {
    let broker = Kafka::open(&name("order")).await;
    for message in 0..150 {
        let body = format!("{message:03}");
        let record = FutureRecord::<[u8], str>::to(&broker.topic).partition(1).payload(&body);
        broker.producer.send(record, WAIT).await.unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let processor = Processor::new(store(dir.path())).backoff(Duration::from_millis(50), Duration::from_millis(50));
    let mut consumer = broker.intake().await.ahead(1);
    let mut done = Vec::new();
    while done.len() < 150 {
        let message = timeout(WAIT, consumer.next()).await.expect("a record").unwrap();
        assert!(timeout(Duration::from_millis(1), consumer.next()).await.is_err(), "two at the same time");
        let body = String::from_utf8(message.payload().to_vec()).unwrap();
        if done.len() == 70 && !done.contains(&body) && processor.store().blocking().stats().released == 7 {
            // One that is dropped without an answer holds up the others as well.
            drop(message);
            assert!(timeout(Duration::from_millis(300), consumer.next()).await.is_err());
            let again = timeout(WAIT, consumer.next()).await.unwrap().unwrap();
            assert_eq!(again.payload(), body.as_bytes());
            again.ack().await.unwrap();
            done.push(body);
            continue;
        }
        let work = async |_: &Message, job: &mut Job| {
            if body.ends_with('3') && job.attempt() == 1 { Err(Failure::from("at first")) } else { Ok("") }
        };
        match processor.process(message, work).await.unwrap() {
            Settled::Done => done.push(body),
            Settled::Failed { .. } | Settled::InProgress { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(done.is_sorted(), "{done:?}");
    drop(consumer);
    assert_eq!(broker.unsettled().await, 0);
}

/// A group that never committed anything would begin anew: the store knows how far it was, in the same write as what
/// was done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_goes_on_at_the_offsets_in_its_store() {
    let broker = Kafka::open(&name("offsets")).await;
    for message in 0..100 {
        broker.send(None, &format!("charge {message}")).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut effects = Vec::new();
    for (group, records) in [("one", 37), ("two", 63)] {
        let store = store(dir.path());
        let offsets = store.blocking().clone();
        let start = move |topic: &str, partition: i32| offsets.offset(topic, partition.unsigned_abs()).unwrap();
        let mut consumer = broker.member(group).ahead(1).id(Id::Position).start_from(start);
        let processor = Processor::new(store);
        for _ in 0..records {
            let message = timeout(Duration::from_secs(30), consumer.next()).await.expect("a record").unwrap();
            let work = async |message: &Message, job: &mut Job| {
                let record = message.record();
                let next = record.offset().unsigned_abs() + 1;
                job.tx().set_offset(record.topic(), record.partition().unsigned_abs(), next);
                Ok(message.payload().to_vec())
            };
            let payload = message.payload().to_vec();
            let settled = processor.process(message, work).await.unwrap();
            assert!(matches!(settled, Settled::Done), "nothing is delivered again: {settled:?}");
            effects.push(payload);
        }
        assert!(group == "one" || timeout(Duration::from_secs(1), consumer.next()).await.is_err());
        drop(consumer);
        processor.store().close().await.unwrap();
    }
    effects.sort();
    effects.dedup();
    assert_eq!(effects.len(), 100);
}
