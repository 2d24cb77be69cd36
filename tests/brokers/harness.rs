//! What the tests of all brokers share: consumer processes that are killed at random, and a ledger of effects that survives
//! them.

#![allow(dead_code, unreachable_pub, reason = "each broker's file uses a part of it")]

#[path = "../common/child.rs"]
mod child;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use onlyonce::delivery::{Attempt, Delivery, Failure, Outcome, Processor};
use onlyonce::{Store, Timestamp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A broker under test, with one queue.
pub trait Broker: Sized {
    type Source: Source;

    /// Opens the queue with this name, and creates it if it is missing.
    fn open(queue: &str) -> impl Future<Output = Self>;
    /// Sends a message as a producer, with an id or without one.
    fn send(&self, id: Option<&str>, body: &str) -> impl Future<Output = ()>;
    /// Divides the number of messages, for a slow broker.
    const DIVISOR: u32 = 1;
    /// The pause after which the broker accepts a repeated id.
    const ID_EXPIRY: Duration;
    /// A consumer that checks for redeliveries at least every second.
    fn source(&self) -> impl Future<Output = Self::Source>;
    /// The number of messages that are neither acknowledged nor dead letters, delayed ones included.
    fn pending(&self) -> impl Future<Output = u64>;
    /// The bodies of the dead letters.
    fn dead_letters(&self) -> impl Future<Output = Vec<String>>;
    /// Moves the dead letters back to the queue.
    fn redrive(&self) -> impl Future<Output = ()>;
}

/// A consumer of a queue.
pub trait Source {
    type Delivery: Delivery + 'static;

    fn next(&mut self) -> impl Future<Output = Self::Delivery>;
}

/// A store in a temporary directory. It is closed when it is dropped, because a process must not exit while a store closes
/// in the background.
pub struct TestStore {
    store: Store,
    _dir: tempfile::TempDir,
}

impl TestStore {
    pub fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub fn with(configure: impl FnOnce(onlyonce::Builder) -> onlyonce::Builder) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let builder = configure(Store::builder().memory_budget(32 << 20));
        Self { store: builder.open(dir.path().join("store")).unwrap(), _dir: dir }
    }
}

impl Deref for TestStore {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        drop(self.store.close().wait());
    }
}

/// The address of a broker, from this environment variable.
pub fn address(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set; tests/brokers/run starts the broker"))
}

/// The queue counts as empty after this time without a message.
const QUIET: Duration = Duration::from_millis(4_000);
const CONSUMERS: usize = 8;
/// Half of the duration of slow work. It is longer than the brokers wait for an answer in these tests.
const SLOW: Duration = Duration::from_secs(1);

/// The directory of a test, which survives its consumers.
#[derive(Clone)]
struct TestDir {
    path: PathBuf,
}

impl TestDir {
    fn append(&self, file: &str, line: &str) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.path.join(file)).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// How often each line occurs in a file.
    fn count(&self, file: &str) -> BTreeMap<String, u32> {
        let mut count = BTreeMap::new();
        for line in fs::read_to_string(self.path.join(file)).unwrap_or_default().lines() {
            *count.entry(line.to_owned()).or_default() += 1;
        }
        count
    }

    fn has_happened(&self, body: &str) -> bool {
        self.count("ledger").contains_key(body)
    }

    fn open_store(&self) -> (Store, Processor) {
        let builder = onlyonce::Store::builder().durability(onlyonce::Durability::Process).memory_budget(32 << 20);
        let store = builder.open(self.path.join("store")).unwrap();
        let processor = Processor::new(store.clone())
            .backoff(Duration::from_millis(100), Duration::from_millis(300))
            .max_retry_after(Duration::from_millis(300))
            .attempts(if self.path.join("poisonous").exists() { 3 } else { 1_000 });
        (store, processor)
    }

    /// The work: an effect that must happen once, with pauses before and after it in which the process may be killed.
    async fn work(&self, payload: &[u8], attempt: &mut Attempt, pauses: [Duration; 2]) -> Result<Vec<u8>, Failure> {
        let body = std::str::from_utf8(payload)?;
        if attempt.may_have_happened() {
            self.append("events", &format!("may have happened before attempt {}", attempt.number()));
            if self.has_happened(body) {
                self.append("events", "happened before");
                return Ok(body.into());
            }
        }
        tokio::time::sleep(pauses[0]).await;
        let poisonous = self.path.join("poisonous").exists();
        match body {
            "killer" if poisonous => std::process::abort(),
            "hopeless" if poisonous => return Err("it fails each time".into()),
            "wrong" if poisonous => return Err(Failure::permanent("it is invalid")),
            // The first attempt at one message in ten fails.
            _ if body.ends_with('3') && attempt.prior().is_none() => return Err("the first attempt fails".into()),
            _ => {}
        }
        self.append("ledger", body);
        tokio::time::sleep(pauses[1]).await;
        Ok(body.into())
    }

    /// Consumes until the queue is empty. Without a processor each delivery is processed and acknowledged.
    async fn consume<S: Source>(&self, source: &mut S, processor: Option<&Processor>, consumers: usize) {
        let permits = Arc::new(Semaphore::new(consumers));
        let mut random = StdRng::seed_from_u64(rand::random());
        let mut tasks = JoinSet::new();
        while let Ok(delivery) = tokio::time::timeout(QUIET, source.next()).await {
            let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
            let (test_dir, processor) = (self.clone(), processor.cloned());
            let mut pause = || Duration::from_millis(random.random_range(0..15));
            let pauses = if self.path.join("slow").exists() { [SLOW; 2] } else { [(); 2].map(|()| pause()) };
            tasks.spawn(async move {
                let event = match processor {
                    Some(processor) => {
                        let work = async |delivery: &S::Delivery, attempt: &mut Attempt| {
                            test_dir.work(delivery.payload(), attempt, pauses).await
                        };
                        match processor.process(delivery, work).await {
                            Ok(Outcome::Done) => "done",
                            Ok(Outcome::Duplicate(_)) => "duplicate",
                            Ok(Outcome::InProgress { .. }) => "in progress",
                            Ok(Outcome::Failed { .. }) => "failed",
                            Ok(Outcome::Rejected { .. }) => "rejected",
                            Ok(other) => panic!("{other:?}"),
                            Err(error) => panic!("{error}"),
                        }
                    }
                    None => {
                        tokio::time::sleep(pauses[0]).await;
                        test_dir.append("ledger", std::str::from_utf8(delivery.payload()).unwrap());
                        tokio::time::sleep(pauses[1]).await;
                        delivery.ack().await.unwrap();
                        "acknowledged"
                    }
                };
                test_dir.append("events", event);
                drop(permit);
            });
            while let Some(ended) = tasks.try_join_next() {
                ended.unwrap();
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
    }
}

/// Passes the name of the queue to a child process.
const QUEUE: &str = "ONLYONCE_BROKERS_QUEUE";
/// Passes the directory of the test to a child process.
const TEST_DIR: &str = "ONLYONCE_BROKERS_DIR";

/// A test and its consumer processes.
struct TestRun {
    test: &'static str,
    queue: String,
    test_dir: TestDir,
    _dir: tempfile::TempDir,
}

impl TestRun {
    fn new(test: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let queue = format!("{}-{}", test.split("::").last().unwrap(), std::process::id());
        Self { test, queue, test_dir: TestDir { path: dir.path().to_owned() }, _dir: dir }
    }

    fn start_consumer(&self) -> Child {
        let mut command = child::command(self.test);
        command.stdout(Stdio::null()).env(QUEUE, &self.queue).env(TEST_DIR, &self.test_dir.path);
        command.spawn().unwrap()
    }

    fn effects(&self) -> u32 {
        self.test_dir.count("ledger").values().sum()
    }

    /// Kills this many consumers at random moments, and runs a last one until the queue is empty. Returns the time of all.
    fn kill_consumers(&self, kills: u32, messages: usize) -> Duration {
        let seed = rand::random();
        println!("seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        // About half of the messages are left when the last one is killed.
        let max_effects = (messages as u32 / kills).max(2);
        let start = Instant::now();
        for kill in 1..=kills {
            let mut consumer = self.start_consumer();
            // Every fourth consumer is killed early, perhaps before its first effect; the others after some effects.
            let (effects, pause_ms) = if kill % 4 == 0 { (0, 300) } else { (random.random_range(1..max_effects), 20) };
            let (target, deadline) = (self.effects() + effects, Instant::now() + Duration::from_secs(30));
            while self.effects() < target {
                assert!(consumer.try_wait().unwrap().is_none(), "consumer {kill} of {kills} ended by itself");
                assert!(Instant::now() < deadline, "consumer {kill} of {kills} has no effects");
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(random.random_range(0..pause_ms)));
            consumer.kill().unwrap();
            consumer.wait().unwrap();
        }
        assert!(self.start_consumer().wait().unwrap().success(), "the last consumer failed");
        start.elapsed()
    }
}

/// In a process that [`TestRun::start_consumer`] started for this test: consumes and exits.
fn consume_if_child<B: Broker>(test: &str) {
    if !child::is_child(test) {
        return;
    }
    let test_dir = TestDir { path: Path::new(&std::env::var(TEST_DIR).unwrap()).to_owned() };
    runtime().block_on(async {
        let broker = B::open(&std::env::var(QUEUE).unwrap()).await;
        let opened = (!test_dir.path.join("without a store").exists()).then(|| test_dir.open_store());
        let processor = opened.as_ref().map(|(_, processor)| processor);
        let consumers = if test_dir.path.join("poisonous").exists() { 1 } else { CONSUMERS };
        test_dir.consume(&mut broker.source().await, processor, consumers).await;
        if let Some((store, _)) = opened {
            store.close().await.unwrap();
        }
    });
    std::process::exit(0);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

async fn send<B: Broker>(broker: &B, messages: usize) {
    for message in 0..messages {
        broker.send(Some(&format!("order-{message}")), &format!("charge {message}")).await;
    }
}

/// Kills consumers of a queue whose producer sends some messages twice.
pub fn every_effect_happens_once_while_consumers_are_killed<B: Broker>(test: &'static str) {
    const KILLS: u32 = 25;
    let (messages, twins) = (2_000 / B::DIVISOR as usize, 500 / B::DIVISOR as usize);
    consume_if_child::<B>(test);
    let run = TestRun::new(test);
    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        send(&broker, messages).await;
        tokio::time::sleep(B::ID_EXPIRY).await;
        send(&broker, twins).await;
    });
    let elapsed = run.kill_consumers(KILLS, messages);
    let (ledger, events) = (run.test_dir.count("ledger"), run.test_dir.count("events"));
    println!("{messages} messages and {twins} twins, {KILLS} kills, {elapsed:?}: {events:?}");
    assert_eq!(ledger.len(), messages, "no message is lost");
    let repeated: Vec<_> = ledger.iter().filter(|(_, times)| **times > 1).collect();
    assert!(repeated.is_empty(), "effects that happened more than once: {repeated:?}");
    let count = |event: &str| events.get(event).copied().unwrap_or_default();
    // A kill loses the event of at most one answer of each concurrent consumer.
    assert!(count("duplicate") as usize + KILLS as usize * CONSUMERS >= twins, "each twin was acknowledged");
    assert!(count("happened before") > 0, "no kill hit between an effect and its completion");
    assert!(count("failed") > 0);

    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        assert_eq!(broker.pending().await, 0);
        assert_eq!(broker.dead_letters().await, Vec::<String>::new());
        // The producer sends all messages again.
        tokio::time::sleep(B::ID_EXPIRY).await;
        send(&broker, messages).await;
        let (store, processor) = run.test_dir.open_store();
        run.test_dir.consume(&mut broker.source().await, Some(&processor), CONSUMERS).await;
        let stats = store.stats();
        // On a slow machine a broker may deliver one of them twice.
        assert!(stats.duplicates >= messages as u64, "{stats:?}");
        assert_eq!((stats.acquired, stats.in_flight), (0, 0), "{stats:?}");
        assert_eq!(broker.pending().await, 0);
        store.close().await.unwrap();
    });
    assert_eq!(run.test_dir.count("ledger"), ledger);
}

/// The control: without a store, the same faults cause duplicate effects.
pub fn without_a_store_effects_happen_twice<B: Broker>(test: &'static str) {
    consume_if_child::<B>(test);
    // A kill hits between an effect and its acknowledgement by chance only.
    let is_seen = (0..5).any(|_| effects_happen_twice_without_a_store::<B>(test));
    assert!(is_seen, "the test cannot detect a duplicate effect");
}

fn effects_happen_twice_without_a_store<B: Broker>(test: &'static str) -> bool {
    let (messages, twins) = (1_000 / B::DIVISOR as usize, 100 / B::DIVISOR as usize);
    let run = TestRun::new(test);
    run.test_dir.append("without a store", "");
    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        send(&broker, messages).await;
        tokio::time::sleep(B::ID_EXPIRY).await;
        send(&broker, twins).await;
    });
    run.kill_consumers(8, messages);
    let ledger = run.test_dir.count("ledger");
    assert_eq!(ledger.len(), messages);
    let twice = |twin: bool| {
        let is_twin = |body: &str| body.trim_start_matches("charge ").parse::<usize>().unwrap() < twins;
        ledger.iter().filter(|(body, times)| **times > 1 && is_twin(body) == twin).count()
    };
    println!("twice: {} of those sent once, {} of {twins} sent twice", twice(false), twice(true));
    assert_eq!(twice(true), twins);
    twice(false) > 0
}

/// Messages that always fail or crash their consumer become dead letters, and a redrive processes them.
pub fn poison_messages_are_dead_lettered_and_can_be_redriven<B: Broker>(test: &'static str) {
    consume_if_child::<B>(test);
    let run = TestRun::new(test);
    run.test_dir.append("poisonous", "");
    // One of them has no id, and keeps the key of its payload through the redrive.
    let bodies = [("good", Some("1")), ("hopeless", None), ("wrong", Some("2")), ("killer", Some("3"))];
    let send = async |broker: &B| {
        for (body, id) in bodies {
            broker.send(id, body).await;
        }
    };
    runtime().block_on(async { send(&B::open(&run.queue).await).await });
    let mut crashes = 0;
    while !run.start_consumer().wait().unwrap().success() {
        crashes += 1;
        assert!(crashes <= 3, "crashed attempts were not counted");
    }
    assert_eq!(crashes, 3);
    assert_eq!(run.test_dir.count("ledger").into_keys().collect::<Vec<_>>(), ["good"]);
    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        let mut dead = broker.dead_letters().await;
        dead.sort();
        assert_eq!(dead, ["hopeless", "killer", "wrong"]);
        assert_eq!(broker.pending().await, 0);
        fs::remove_file(run.test_dir.path.join("poisonous")).unwrap();
        broker.redrive().await;
    });
    assert!(run.start_consumer().wait().unwrap().success());
    // They were completed under their original keys: further copies are duplicates.
    runtime().block_on(async { send(&B::open(&run.queue).await).await });
    assert!(run.start_consumer().wait().unwrap().success());
    let ledger = run.test_dir.count("ledger");
    assert!(ledger.len() == bodies.len() && ledger.values().all(|times| *times == 1), "{ledger:?}");
    let events = run.test_dir.count("events");
    let reported = events.get("may have happened before attempt 1");
    assert_eq!(reported, Some(&1), "the redrive reports the crashed attempts of the killer: {events:?}");
    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        assert_eq!((broker.pending().await, broker.dead_letters().await), (0, Vec::new()));
    });
}

/// Neither a twin nor a redelivery by a broker's timeout starts work that is in progress.
pub fn work_in_progress_is_not_started_again<B: Broker>(test: &'static str) {
    const MESSAGES: usize = CONSUMERS / 2;
    let run = TestRun::new(test);
    run.test_dir.append("slow", "");
    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        send(&broker, MESSAGES).await;
        tokio::time::sleep(B::ID_EXPIRY).await;
        send(&broker, MESSAGES).await;
        let (store, processor) = run.test_dir.open_store();
        run.test_dir.consume(&mut broker.source().await, Some(&processor), CONSUMERS).await;
        let (ledger, events) = (run.test_dir.count("ledger"), run.test_dir.count("events"));
        assert!(ledger.len() == MESSAGES && ledger.values().all(|times| *times == 1), "{ledger:?}");
        println!("slow work: {events:?}");
        let count = |event: &str| events.get(event).copied().unwrap_or_default() as usize;
        assert_eq!(count("done"), MESSAGES);
        assert!(count("in progress") >= MESSAGES && count("duplicate") >= MESSAGES);
        assert_eq!(broker.pending().await, 0);
        store.close().await.unwrap();
    });
}

/// Processes one delivery after the other.
pub fn keys_delays_and_counters_are_right<B: Broker>(test: &'static str) {
    let run = TestRun::new(test);
    runtime().block_on(async {
        let broker = B::open(&run.queue).await;
        for twin in 0..2 {
            if twin == 1 {
                tokio::time::sleep(B::ID_EXPIRY).await;
            }
            // The same id with another body is the same work, and so is the same body without an id.
            broker.send(Some("order-1"), &format!("charge {twin}")).await;
            broker.send(None, "refund 12").await;
            broker.send(None, &format!("refund 2{twin}")).await;
        }
        broker.send(Some("order-3"), "charge 3").await;
        let (store, processor) = run.test_dir.open_store();
        let processor = processor.backoff(Duration::from_millis(700), Duration::from_millis(700));
        let mut source = broker.source().await;
        let (mut outcomes, mut failed_at) = (Vec::new(), None);
        while let Ok(delivery) = tokio::time::timeout(QUIET, source.next()).await {
            if let Some(timestamp) = delivery.timestamp() {
                let now = Timestamp::from(std::time::SystemTime::now());
                assert!(now.as_unix_ms().abs_diff(timestamp.as_unix_ms()) < 60_000, "{timestamp} is not about {now}");
            }
            let body = String::from_utf8(delivery.payload().to_vec()).unwrap();
            let work = async |delivery: &<B::Source as Source>::Delivery, attempt: &mut Attempt| {
                run.test_dir.work(delivery.payload(), attempt, [Duration::ZERO; 2]).await
            };
            let outcome = processor.process(delivery, work).await.unwrap();
            match outcome {
                Outcome::Done => outcomes.push(format!("{body}: done")),
                Outcome::Duplicate(first) => {
                    let first = String::from_utf8(first.result().unwrap().to_vec()).unwrap();
                    outcomes.push(format!("{body}: as {first}"));
                }
                Outcome::Failed { .. } => failed_at = Some(Instant::now()),
                // The broker redelivers a little before the store's backoff ends.
                Outcome::InProgress { retry_after } => assert!(retry_after < Duration::from_millis(400), "{outcome:?}"),
                other => panic!("{other:?}"),
            }
            if let (Some(at), "charge 3: done") = (failed_at, outcomes.last().map_or("", String::as_str)) {
                let waited = at.elapsed();
                assert!(waited >= Duration::from_millis(690) && waited < Duration::from_secs(5), "{waited:?}");
            }
        }
        outcomes.sort();
        let expected = [
            "charge 0: done",
            "charge 1: as charge 0",
            "charge 3: done",
            "refund 12: as refund 12",
            "refund 12: done",
            "refund 20: done",
            "refund 21: done",
        ];
        assert_eq!(outcomes, expected);
        let stats = store.stats();
        let counters = (stats.acquired, stats.completed, stats.duplicates, stats.released, stats.in_flight);
        assert_eq!(counters, (6, 5, 2, 1, 0), "{stats:?}");
        drop(source);
        assert_eq!(broker.pending().await, 0);
        store.close().await.unwrap();
    });
}

/// Defines the tests of a broker.
#[macro_export]
macro_rules! tests_of {
    ($broker:ty: $($test:ident),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                // The name for the test runner, without the crate.
                let name = concat!(module_path!(), "::", stringify!($test));
                $crate::harness::$test::<$broker>(name.split_once("::").unwrap().1);
            }
        )+
    };
}
