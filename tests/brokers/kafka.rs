//! Kafka topics, against a broker that implements the Kafka protocol.

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{Broker, Source, TestStore, address};
use onlyonce::Store;
use onlyonce::delivery::kafka::rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use onlyonce::delivery::kafka::rdkafka::client::DefaultClientContext;
use onlyonce::delivery::kafka::rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
use onlyonce::delivery::kafka::rdkafka::message::{Header, Headers, Message as _, OwnedHeaders, OwnedMessage};
use onlyonce::delivery::kafka::rdkafka::producer::{FutureProducer, FutureRecord, Producer};
use onlyonce::delivery::kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use onlyonce::delivery::kafka::{
    Builder, Consumer, Error, IdSource, Message, OMITTED_HEADER, REASON_HEADER, SOURCE_HEADER, TIMESTAMP_HEADER,
};
use onlyonce::delivery::{Attempt, Delivery, Failure, Outcome, Processor};
use parking_lot::Mutex;
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
    /// The uncommitted range of each partition: its first offset, and the one after its last.
    fn uncommitted(consumer: &BaseConsumer, topic: &str) -> BTreeMap<i32, (i64, i64)> {
        let committed = consumer.committed_offsets(all(topic, Offset::Invalid), WAIT).unwrap();
        let range = |partition| {
            let (low, high) = consumer.fetch_watermarks(topic, partition, WAIT).unwrap();
            let from = committed.find_partition(topic, partition).unwrap().offset().to_raw().filter(|raw| *raw >= 0);
            (partition, (from.unwrap_or(low), high))
        };
        (0..PARTITIONS).map(range).collect()
    }

    /// The dead letters that are not redriven, with a consumer and the offsets to commit after a redrive.
    fn all_letters(&self) -> (Vec<OwnedMessage>, BaseConsumer, TopicPartitionList) {
        let consumer: BaseConsumer = reader("redrive").set("enable.auto.commit", "false").create().unwrap();
        let (mut from, mut to, mut left) = (TopicPartitionList::new(), TopicPartitionList::new(), 0);
        for (partition, (low, high)) in Self::uncommitted(&consumer, &self.dead) {
            from.add_partition_offset(&self.dead, partition, Offset::Offset(low)).unwrap();
            to.add_partition_offset(&self.dead, partition, Offset::Offset(high)).unwrap();
            left += high - low;
        }
        consumer.assign(&from).unwrap();
        let letter = |_| consumer.poll(WAIT).expect("a letter").unwrap().detach();
        ((0..left).map(letter).collect(), consumer, to)
    }

    /// As [`all_letters`](Self::all_letters), one for each source. A record whose consumer crashes between the rejection and
    /// the next commit is rejected twice.
    fn letters(&self) -> (Vec<OwnedMessage>, BaseConsumer, TopicPartitionList) {
        let (letters, consumer, to) = self.all_letters();
        let by_record: BTreeMap<_, _> =
            letters.into_iter().map(|letter| (header(&letter, SOURCE_HEADER), letter)).collect();
        (by_record.into_values().collect(), consumer, to)
    }

    async fn put(&self, key: &[u8], body: &[u8], headers: OwnedHeaders) {
        let record = FutureRecord::to(&self.topic).key(key).payload(body).headers(headers);
        self.producer.send(record, WAIT).await.unwrap();
    }

    fn member(&self, group: &str) -> Builder {
        Consumer::subscribe(&reader(group), &[&self.topic])
    }

    /// Not a group member: a group waits for a killed member until its session times out.
    fn reader(&self) -> Builder {
        let consumer = Consumer::assign(&reader(&self.group()), &all(&self.topic, Offset::Stored));
        consumer.dead_letters(self.producer.clone(), &self.dead)
    }

    /// A group for this topic only: a non-member cannot commit for a group that has members.
    fn group(&self) -> String {
        format!("{}.workers", self.topic)
    }
}

fn value(record: &OwnedMessage, name: &str) -> Option<String> {
    let found = record.headers()?.iter().find(|header| header.key == name);
    Some(String::from_utf8(found?.value?.to_vec()).unwrap())
}

fn header(record: &OwnedMessage, name: &str) -> String {
    value(record, name).unwrap()
}

impl Broker for Kafka {
    type Source = Consumer;

    const ID_EXPIRY: Duration = Duration::ZERO;

    async fn open(queue: &str) -> Self {
        let (topic, dead) = (queue.to_owned(), format!("{queue}.dead"));
        let producer: FutureProducer = config().set("linger.ms", "0").create().unwrap();
        let partitions = |queried: Option<&str>, topic: &str| {
            let metadata = producer.client().fetch_metadata(queried, WAIT).unwrap();
            metadata.topics().iter().find(|found| found.name() == topic).map(|found| found.partitions().len())
        };
        for topic in [&topic, &dead] {
            if partitions(None, topic) == Some(PARTITIONS as usize) {
                continue;
            }
            // The mock cluster does not answer this request, and creates topics on a metadata request.
            let admin: AdminClient<DefaultClientContext> = config().create().unwrap();
            let short = AdminOptions::new().request_timeout(Some(Duration::from_secs(1)));
            drop(admin.create_topics(&[NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1))], &short).await);
            let start = Instant::now();
            while partitions(Some(topic), topic) != Some(PARTITIONS as usize) {
                assert!(start.elapsed() < WAIT, "{topic} does not have {PARTITIONS} partitions");
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

    async fn source(&self) -> Consumer {
        self.reader().build().unwrap()
    }

    async fn pending(&self) -> u64 {
        let consumer: BaseConsumer = reader(&self.group()).create().unwrap();
        Self::uncommitted(&consumer, &self.topic).values().map(|(from, to)| (to - from) as u64).sum()
    }

    async fn dead_letters(&self) -> Vec<String> {
        let (letters, ..) = self.letters();
        letters.iter().map(|letter| String::from_utf8(letter.payload().unwrap().to_vec()).unwrap()).collect()
    }

    async fn redrive(&self) {
        let (letters, consumer, to) = self.letters();
        for letter in letters {
            assert!(header(&letter, REASON_HEADER).starts_with("attempt "));
            let headers = letter.headers().unwrap();
            self.put(letter.key().unwrap(), letter.payload().unwrap(), headers.clone()).await;
        }
        consumer.commit(&to, CommitMode::Sync).unwrap();
    }
}

impl Source for Consumer {
    type Delivery = Message;

    async fn next(&mut self) -> Message {
        Consumer::next(self).await.unwrap()
    }
}

tests_of!(
    Kafka: every_effect_happens_once_while_consumers_are_killed,
    without_a_store_effects_happen_twice,
    poison_messages_are_dead_lettered_and_can_be_redriven,
    keys_delays_and_counters_are_right,
    work_in_progress_is_not_started_again,
);

fn name(test: &str) -> String {
    format!("{test}-{}", std::process::id())
}

/// The effects and outcomes of all members of a group.
#[derive(Default)]
struct Log {
    effects: Mutex<BTreeMap<String, u32>>,
    outcomes: Mutex<BTreeMap<String, usize>>,
}

/// Processes records until none arrives for `quiet`. Work on records that start with `long` waits for a permit.
async fn work(mut consumer: Consumer, processor: Processor, log: Arc<Log>, may_end: Arc<Semaphore>, quiet: Duration) {
    let mut tasks = JoinSet::new();
    while let Ok(message) = timeout(quiet, consumer.next()).await {
        let (message, processor) = (message.unwrap(), processor.clone());
        let body = String::from_utf8(message.payload().to_vec()).unwrap();
        let (log, may_end) = (Arc::clone(&log), Arc::clone(&may_end));
        tasks.spawn(async move {
            let effect = async |message: &Message, _: &mut Attempt| {
                let body = std::str::from_utf8(message.payload())?;
                tokio::time::sleep(Duration::from_millis(5)).await;
                if body.starts_with("long") {
                    may_end.acquire().await?.forget();
                }
                *log.effects.lock().entry(body.to_owned()).or_default() += 1;
                Ok::<_, Failure>(body.to_owned())
            };
            let outcome = match processor.process(message, effect).await {
                Ok(Outcome::Done) => "done",
                Ok(Outcome::Duplicate(_)) => "duplicate",
                Ok(Outcome::InProgress { .. }) => "in progress",
                Ok(other) => panic!("{other:?}"),
                Err(error) => match error.error {
                    Error::Revoked => "revoked",
                    error => panic!("{error}"),
                },
            };
            let outcome = if body.starts_with("long") { format!("{body} {outcome}") } else { outcome.to_owned() };
            *log.outcomes.lock().entry(outcome).or_default() += 1;
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
async fn work_whose_partition_is_revoked_runs_once_and_its_answer_is_refused() {
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
    let store = TestStore::new();
    let processor = Processor::new(store.clone()).max_retry_after(Duration::from_millis(300));
    let (log, may_end) = (Arc::new(Log::default()), Arc::new(Semaphore::new(0)));
    let member = || {
        let consumer = broker.member(&broker.group()).build().unwrap();
        tokio::spawn(work(consumer, processor.clone(), Arc::clone(&log), Arc::clone(&may_end), QUIET))
    };
    let count = |outcome: &str| log.outcomes.lock().get(outcome).copied().unwrap_or_default();
    let eventually = async |outcome: &str, least: usize| {
        let start = Instant::now();
        while count(outcome) < least {
            assert!(start.elapsed() < Duration::from_secs(60), "{outcome}: {:?}", log.outcomes.lock());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let first = member();
    eventually("done", 200).await;
    eventually("duplicate", 200).await;
    // A second member joins: the group revokes and reassigns all partitions during the long work. Their new owners find it
    // in progress.
    let second = member();
    for partition in 0..PARTITIONS {
        eventually(&format!("long {partition} in progress"), 1).await;
    }
    may_end.add_permits(PARTITIONS as usize);
    first.await.unwrap();
    second.await.unwrap();
    println!("rebalance: {:?}", log.outcomes.lock());
    let effects = log.effects.lock().clone();
    assert_eq!(effects.len(), 200 + PARTITIONS as usize);
    assert!(effects.values().all(|times| *times == 1), "{effects:?}");
    for partition in 0..PARTITIONS {
        let count = |outcome| count(&format!("long {partition} {outcome}"));
        assert_eq!((count("revoked"), count("done")), (1, 0), "the answer of the old owner is refused");
        assert!(count("duplicate") >= 1, "the new owner finds the key completed");
    }
    assert_eq!(broker.pending().await, 0);
    let stats = store.stats();
    assert_eq!((stats.completed, stats.in_flight), (effects.len() as u64, 0), "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_one_uncommitted_record_a_partition_waits_for_its_delayed_record() {
    let broker = Kafka::open(&name("order")).await;
    for message in 0..150 {
        let body = format!("{message:03}");
        let record = FutureRecord::<[u8], str>::to(&broker.topic).partition(1).payload(&body);
        broker.producer.send(record, WAIT).await.unwrap();
    }
    let store = TestStore::new();
    let processor = Processor::new(store.clone()).backoff(Duration::from_millis(50), Duration::from_millis(50));
    let mut consumer = broker.reader().max_uncommitted(1).build().unwrap();
    let mut done = Vec::new();
    while done.len() < 150 {
        let message = timeout(WAIT, consumer.next()).await.expect("a record").unwrap();
        assert!(timeout(Duration::from_millis(1), consumer.next()).await.is_err(), "two at the same time");
        let body = String::from_utf8(message.payload().to_vec()).unwrap();
        if done.len() == 70 && !done.contains(&body) && store.stats().released == 7 {
            // A record that is dropped without an answer delays the others as well.
            drop(message);
            assert!(timeout(Duration::from_millis(300), consumer.next()).await.is_err());
            let again = timeout(WAIT, consumer.next()).await.unwrap().unwrap();
            assert_eq!(again.payload(), body.as_bytes());
            again.ack().await.unwrap();
            done.push(body);
            continue;
        }
        let work = async |_: &Message, attempt: &mut Attempt| {
            if body.ends_with('3') && attempt.number() == 1 {
                Err(Failure::from("the first attempt fails"))
            } else {
                Ok("")
            }
        };
        match processor.process(message, work).await.unwrap() {
            Outcome::Done => done.push(body),
            Outcome::Failed { .. } | Outcome::InProgress { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(done.is_sorted(), "{done:?}");
    drop(consumer);
    assert_eq!(broker.pending().await, 0);
}

/// Each group has no committed offsets: the store has the position, from the same write as the results.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_resumes_at_the_offsets_in_its_store() {
    let broker = Kafka::open(&name("offsets")).await;
    for message in 0..100 {
        broker.send(None, &format!("charge {message}")).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut effects = Vec::new();
    for (group, records) in [("one", 37), ("two", 63)] {
        let store = Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
        let offsets = store.clone();
        let start = move |topic: &str, partition: i32| offsets.offset(topic, partition.unsigned_abs()).wait().unwrap();
        let mut consumer =
            broker.member(group).max_uncommitted(1).id_source(IdSource::Position).start_from(start).build().unwrap();
        let processor = Processor::new(store.clone());
        for _ in 0..records {
            let message = timeout(Duration::from_secs(30), consumer.next()).await.expect("a record").unwrap();
            let work = async |message: &Message, attempt: &mut Attempt| {
                let record = message.record();
                let next = record.offset().unsigned_abs() + 1;
                attempt.side_writes().offset(record.topic(), record.partition().unsigned_abs(), next);
                Ok(message.payload().to_vec())
            };
            let payload = message.payload().to_vec();
            let outcome = processor.process(message, work).await.unwrap();
            assert!(matches!(outcome, Outcome::Done), "no record is delivered twice: {outcome:?}");
            effects.push(payload);
        }
        assert!(group == "one" || timeout(Duration::from_secs(1), consumer.next()).await.is_err());
        drop(consumer);
        store.close().await.unwrap();
    }
    effects.sort();
    effects.dedup();
    assert_eq!(effects.len(), 100);
}

/// A record in microseconds is always too far ahead. Without a rejection it would stop its partition.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_with_a_timestamp_in_a_wrong_unit_does_not_stop_its_partition() {
    let broker = Kafka::open(&name("units")).await;
    const NOW_MS: i64 = 1_700_000_000_000;
    for message in 0..10 {
        let at_ms = if message == 2 { NOW_MS * 1_000 } else { NOW_MS + message };
        let body = message.to_string();
        let record = FutureRecord::<[u8], str>::to(&broker.topic).partition(1).payload(&body).timestamp(at_ms);
        broker.producer.send(record, WAIT).await.unwrap();
    }
    let store = TestStore::with(|builder| builder.stream_time(Duration::from_secs(3_600)));
    let processor = Processor::new(store.clone());
    let mut consumer = broker.reader().max_uncommitted(1).build().unwrap();
    let mut rejected = 0;
    for _ in 0..10 {
        let message =
            timeout(Duration::from_secs(30), consumer.next()).await.expect("the partition has stopped").unwrap();
        match processor.process(message, async |_, _| Ok("")).await.unwrap() {
            Outcome::Done => {}
            Outcome::Rejected { attempts: 0, .. } => rejected += 1,
            other => panic!("{other:?}"),
        }
    }
    drop(consumer);
    assert_eq!((rejected, broker.pending().await), (1, 0));
    let (letters, ..) = broker.letters();
    assert_eq!(letters[0].payload(), Some(&b"2"[..]));
    assert!(header(&letters[0], REASON_HEADER).contains("looks like microseconds"));
    assert_eq!(header(&letters[0], TIMESTAMP_HEADER), (NOW_MS * 1_000).to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_tombstones_of_one_key_are_both_processed() {
    let broker = Kafka::open(&name("tombstones")).await;
    for payload in [Some("v"), None, Some("w"), None] {
        let mut record = FutureRecord::<str, str>::to(&broker.topic).partition(0).key("k");
        record.payload = payload;
        broker.producer.send(record, WAIT).await.unwrap();
    }
    let store = TestStore::new();
    let processor = Processor::new(store.clone());
    let mut consumer = broker.reader().max_uncommitted(1).build().unwrap();
    for _ in 0..4 {
        let message = timeout(WAIT, consumer.next()).await.expect("a record").unwrap();
        let outcome = processor.process(message, async |_, _| Ok("")).await.unwrap();
        assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
    }
    assert_eq!(processor.stats().without_id, 2, "the values");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_that_is_too_large_omits_headers_and_at_last_its_value() {
    let broker = Kafka::open(&name("large")).await;
    let narrow: FutureProducer = config().set("linger.ms", "0").set("message.max.bytes", "2000").create().unwrap();
    let mut consumer = broker.reader().dead_letters(narrow, &broker.dead).build().unwrap();
    for (bytes, omitted) in [(1_400, None), (5_000, Some("5000"))] {
        broker.send(Some("order-1"), &"x".repeat(bytes)).await;
        let message = timeout(WAIT, consumer.next()).await.expect("a record").unwrap();
        message.reject(&"why ".repeat(250)).await.unwrap();
        let (letters, reader, to) = broker.all_letters();
        let letter = &letters[0];
        assert_eq!(letter.payload().unwrap().len(), if omitted.is_some() { 0 } else { bytes });
        assert_eq!(value(letter, "id").is_some(), omitted.is_none(), "headers of the record");
        assert_eq!(value(letter, REASON_HEADER).is_some(), omitted.is_some());
        assert_eq!(value(letter, OMITTED_HEADER).as_deref(), omitted);
        reader.commit(&to, CommitMode::Sync).unwrap();
    }
    drop(consumer);
    assert_eq!(broker.pending().await, 0);
}

/// A record batch (format 2) of one record with a header of this name.
fn raw_batch(name: &[u8], payload: &[u8]) -> Vec<u8> {
    // All lengths are below 64, so that a zigzag varint has one byte.
    let prefixed = |bytes: &[u8]| [&[bytes.len() as u8 * 2], bytes].concat();
    let none = [1];
    let body = [&[0, 0, 0][..], &none, &prefixed(payload), &[2], &prefixed(name), &prefixed(b"value")].concat();
    let record = prefixed(&body);
    let now_ms = 1_700_000_000_000_i64.to_be_bytes();
    let (attributes, last, producer) = ([0; 2], [0; 4], [0xff; 14]);
    let count = 1_i32.to_be_bytes();
    let checked = [&attributes[..], &last, &now_ms, &now_ms, &producer, &count, &record].concat();
    let checksum = crc32c::crc32c(&checked).to_be_bytes();
    let length = (4 + 1 + 4 + checked.len() as i32).to_be_bytes();
    [&[0; 8][..], &length, &[0xff; 4], &[2], &checksum, &checked].concat()
}

/// Produces a batch over a plain socket: the client cannot send a header name that is not UTF-8.
async fn produce_raw(topic: &str, partition: i32, batch: &[u8]) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let text = |text: &str| [&(text.len() as i16).to_be_bytes()[..], text.as_bytes()].concat();
    let (one, timeout_ms, size) = (1_i32.to_be_bytes(), 5_000_i32.to_be_bytes(), (batch.len() as i32).to_be_bytes());
    let head = [&[0, 0, 0, 3][..], &one, &text("raw"), &[0xff, 0xff], &[0, 1], &timeout_ms].concat();
    let request = [&head[..], &one, &text(topic), &one, &partition.to_be_bytes(), &size, batch].concat();
    let mut broker = tokio::net::TcpStream::connect(address("ONLYONCE_KAFKA")).await.unwrap();
    broker.write_all(&[&(request.len() as i32).to_be_bytes()[..], &request].concat()).await.unwrap();
    let mut answer = vec![0; broker.read_i32().await.unwrap() as usize];
    broker.read_exact(&mut answer).await.unwrap();
    // The error code follows the correlation id, the topic and the partition.
    let at = 4 + 4 + 2 + topic.len() + 4 + 4;
    assert_eq!(answer[at..at + 2], [0, 0], "the broker refused the batch: {answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_with_an_unreadable_header_is_rejected_and_the_next_one_is_delivered() {
    let broker = Kafka::open(&name("headers")).await;
    let send = async |body: &str| {
        let record = FutureRecord::<[u8], str>::to(&broker.topic).partition(1).payload(body);
        broker.producer.send(record, WAIT).await.unwrap();
    };
    send("first").await;
    produce_raw(&broker.topic, 1, &raw_batch(b"\xff\xfe", b"unreadable")).await;
    produce_raw(&broker.topic, 1, &raw_batch(b"tenant", b"second")).await;
    let mut consumer = broker.reader().max_uncommitted(1).build().unwrap();
    for body in ["first", "second"] {
        let message = timeout(WAIT, consumer.next()).await.expect("a record").unwrap();
        assert_eq!(message.payload(), body.as_bytes());
        message.ack().await.unwrap();
    }
    drop(consumer);
    assert_eq!(broker.pending().await, 0);
    let (letters, ..) = broker.letters();
    assert_eq!(letters[0].payload(), Some(&b"unreadable"[..]));
    assert!(header(&letters[0], REASON_HEADER).contains("not UTF-8"));
}
