//! What the tests of all brokers share: a consumer that is a process of its own and is killed at random, a ledger of
//! effects that outlives it, and the questions that are asked afterwards.

#![allow(unreachable_pub, reason = "each broker's file uses it")]

#[path = "../common/child.rs"]
mod child;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use onlyonce::delivery::{Delivery, Failure, Job, Processor, Settled};
use onlyonce::future::Store;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// What a broker's file says of its broker.
pub trait Broker: Sized {
    type Intake: Intake;

    /// A queue of this name, made where it is missing.
    fn open(queue: &str) -> impl Future<Output = Self>;
    /// What a producer sends: with an id or without one.
    fn send(&self, id: Option<&str>, body: &str) -> impl Future<Output = ()>;
    /// One of so many messages is sent: for a broker that takes its time.
    const SHARE: u32 = 1;
    /// What the producer waits before it sends the same ids again, for the broker to let them pass.
    const BETWEEN_TWINS: Duration;
    /// A consumer that looks for redeliveries in less than a second.
    fn intake(&self) -> impl Future<Output = Self::Intake>;
    /// Messages that are not settled, on the queue and wherever they wait to come back.
    fn unsettled(&self) -> impl Future<Output = u64>;
    /// The bodies of the dead letters.
    fn dead(&self) -> impl Future<Output = Vec<String>>;
    /// Puts the dead letters back on the queue.
    fn redrive(&self) -> impl Future<Output = ()>;
}

/// A consumer of a queue.
pub trait Intake {
    type Delivery: Delivery + 'static;

    fn next(&mut self) -> impl Future<Output = Self::Delivery>;
}

/// The variable that holds a broker's address.
pub fn address(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: tests/brokers/run starts the broker"))
}

/// Nothing comes for so long: the queue is empty.
const QUIET: Duration = Duration::from_millis(4_000);
const CONSUMERS: usize = 8;
/// Half of the time that slow work takes: longer than a broker waits for an answer here.
const SLOW: Duration = Duration::from_secs(1);

/// What is there of a test when its consumer is killed.
#[derive(Clone)]
struct Site {
    dir: PathBuf,
}

impl Site {
    fn append(&self, file: &str, line: &str) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.dir.join(file)).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// How often each line stands in a file.
    fn count(&self, file: &str) -> BTreeMap<String, u32> {
        let mut count = BTreeMap::new();
        for line in fs::read_to_string(self.dir.join(file)).unwrap_or_default().lines() {
            *count.entry(line.to_owned()).or_default() += 1;
        }
        count
    }

    fn has_happened(&self, body: &str) -> bool {
        self.count("ledger").contains_key(body)
    }

    fn processor(&self) -> Processor {
        let builder = onlyonce::Store::builder().durability(onlyonce::Durability::Process).memory_budget(32 << 20);
        let store = Store::new(builder.open(self.dir.join("store")).unwrap()).unwrap();
        Processor::new(store)
            .backoff(Duration::from_millis(100), Duration::from_millis(300))
            .longest_wait(Duration::from_millis(300))
            .attempts(if self.dir.join("poisonous").exists() { 3 } else { 1_000 })
    }

    /// The work: an effect that must happen once, in a time in which the process may be killed before it and after it.
    async fn work(&self, payload: &[u8], job: &mut Job, pauses: [Duration; 2]) -> Result<Vec<u8>, Failure> {
        let body = std::str::from_utf8(payload)?;
        if job.may_have_happened() {
            self.append("events", &format!("told in attempt {}", job.attempt()));
            if self.has_happened(body) {
                self.append("events", "asked, and it had happened");
                return Ok(body.into());
            }
        }
        tokio::time::sleep(pauses[0]).await;
        let poisonous = self.dir.join("poisonous").exists();
        match body {
            "killer" if poisonous => std::process::abort(),
            "hopeless" if poisonous => return Err("it fails each time".into()),
            "wrong" if poisonous => return Err(Failure::permanent("it is wrong")),
            // One in ten fails at first.
            _ if body.ends_with('3') && job.prior().is_none() => return Err("it fails at first".into()),
            _ => {}
        }
        self.append("ledger", body);
        tokio::time::sleep(pauses[1]).await;
        Ok(body.into())
    }

    /// Consumes until nothing comes any more. Without a processor as those do who have not heard of one.
    async fn consume<I: Intake>(&self, intake: &mut I, processor: Option<&Processor>, consumers: usize) {
        let places = Arc::new(Semaphore::new(consumers));
        let mut random = StdRng::seed_from_u64(rand::random());
        let mut tasks = JoinSet::new();
        while let Ok(delivery) = tokio::time::timeout(QUIET, intake.next()).await {
            let place = Arc::clone(&places).acquire_owned().await.unwrap();
            let (site, processor) = (self.clone(), processor.cloned());
            let mut pause = || Duration::from_millis(random.random_range(0..15));
            let pauses = if self.dir.join("slow").exists() { [SLOW; 2] } else { [(); 2].map(|()| pause()) };
            tasks.spawn(async move {
                let event = match processor {
                    Some(processor) => {
                        let work = async |delivery: &I::Delivery, job: &mut Job| {
                            site.work(delivery.payload(), job, pauses).await
                        };
                        match processor.process(delivery, work).await {
                            Ok(Settled::Done) => "done",
                            Ok(Settled::Duplicate(_)) => "duplicate",
                            Ok(Settled::InProgress { .. }) => "in progress",
                            Ok(Settled::Failed { .. }) => "failed",
                            Ok(Settled::Rejected { .. }) => "rejected",
                            Ok(other) => panic!("{other:?}"),
                            Err(error) => panic!("{error}"),
                        }
                    }
                    None => {
                        tokio::time::sleep(pauses[0]).await;
                        site.append("ledger", std::str::from_utf8(delivery.payload()).unwrap());
                        tokio::time::sleep(pauses[1]).await;
                        delivery.ack().await.unwrap();
                        "acknowledged"
                    }
                };
                site.append("events", event);
                drop(place);
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

/// Names the queue to a child.
const QUEUE: &str = "ONLYONCE_BROKERS_QUEUE";
/// Names its directory to it.
const SITE: &str = "ONLYONCE_BROKERS_SITE";

/// A test and its consumers.
struct Stage {
    test: &'static str,
    queue: String,
    site: Site,
    _dir: tempfile::TempDir,
}

impl Stage {
    fn new(test: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let queue = format!("{}-{}", test.split("::").last().unwrap(), std::process::id());
        Self { test, queue, site: Site { dir: dir.path().to_owned() }, _dir: dir }
    }

    fn consumer(&self) -> Child {
        let mut command = child::command(self.test);
        command.stdout(Stdio::null()).env(QUEUE, &self.queue).env(SITE, &self.site.dir);
        command.spawn().unwrap()
    }

    fn effects(&self) -> u32 {
        self.site.count("ledger").values().sum()
    }

    /// Kills consumers so many times, at random, and lets a last one finish. How long that took.
    fn kill_consumers(&self, kills: u32, messages: usize) -> Duration {
        let seed = rand::random();
        println!("killed by seed {seed}");
        let mut random = StdRng::seed_from_u64(seed);
        // Half of the messages are left when the last one is killed, about.
        let most = (messages as u32 / kills).max(2);
        let begun = Instant::now();
        for kill in 1..=kills {
            let mut consumer = self.consumer();
            // A few die before their first effect, the others in the middle of the work: however slow the machine is.
            let (effects, pause_ms) = if kill % 4 == 0 { (0, 300) } else { (random.random_range(1..most), 20) };
            let (until, patience) = (self.effects() + effects, Instant::now() + Duration::from_secs(30));
            while self.effects() < until {
                assert!(consumer.try_wait().unwrap().is_none(), "consumer {kill} of {kills} has ended by itself");
                assert!(Instant::now() < patience, "consumer {kill} of {kills} does nothing");
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(random.random_range(0..pause_ms)));
            consumer.kill().unwrap();
            consumer.wait().unwrap();
        }
        assert!(self.consumer().wait().unwrap().success(), "the last consumer failed");
        begun.elapsed()
    }
}

/// In a process that [`Stage::consumer`] has made for the test: consumes, and does not come back.
fn consume_if_child<B: Broker>(test: &str) {
    if !child::is_child(test) {
        return;
    }
    let site = Site { dir: Path::new(&std::env::var(SITE).unwrap()).to_owned() };
    runtime().block_on(async {
        let broker = B::open(&std::env::var(QUEUE).unwrap()).await;
        let processor = (!site.dir.join("without a store").exists()).then(|| site.processor());
        let consumers = if site.dir.join("poisonous").exists() { 1 } else { CONSUMERS };
        site.consume(&mut broker.intake().await, processor.as_ref(), consumers).await;
        if let Some(processor) = processor {
            processor.store().close().await.unwrap();
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

/// Consumers are killed again and again, and every message was sent by a producer that sends some of them twice.
pub fn every_effect_happens_once_however_often_its_consumer_is_killed<B: Broker>(test: &'static str) {
    let (messages, twins) = (2_000 / B::SHARE as usize, 500 / B::SHARE as usize);
    const KILLS: u32 = 25;
    consume_if_child::<B>(test);
    let stage = Stage::new(test);
    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        send(&broker, messages).await;
        tokio::time::sleep(B::BETWEEN_TWINS).await;
        send(&broker, twins).await;
    });
    let took = stage.kill_consumers(KILLS, messages);
    let (ledger, events) = (stage.site.count("ledger"), stage.site.count("events"));
    println!("{messages} messages and {twins} twins, {KILLS} kills, {took:?}: {events:?}");
    assert_eq!(ledger.len(), messages, "no message is lost");
    let repeated: Vec<_> = ledger.iter().filter(|(_, times)| **times > 1).collect();
    assert!(repeated.is_empty(), "effects that happened more than once: {repeated:?}");
    let seen = |event: &str| events.get(event).copied().unwrap_or_default();
    // A kill takes the notes of what was settled a moment before, of each consumer one at most.
    assert!(seen("duplicate") as usize + KILLS as usize * CONSUMERS >= twins, "each twin was settled");
    assert!(seen("asked, and it had happened") > 0, "no kill fell between an effect and its completion");
    assert!(seen("failed") > 0);

    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        assert_eq!(broker.unsettled().await, 0);
        assert_eq!(broker.dead().await, Vec::<String>::new());
        // The producer sends all of it again, a while later.
        tokio::time::sleep(B::BETWEEN_TWINS).await;
        send(&broker, messages).await;
        let processor = stage.site.processor();
        stage.site.consume(&mut broker.intake().await, Some(&processor), CONSUMERS).await;
        let stats = processor.store().blocking().stats();
        // A broker may deliver one of them twice, where this machine is slow.
        assert!(stats.duplicates >= messages as u64, "{stats:?}");
        assert_eq!((stats.acquired, stats.in_flight), (0, 0), "{stats:?}");
        assert_eq!(broker.unsettled().await, 0);
    });
    assert_eq!(stage.site.count("ledger"), ledger);
}

/// The same without a store: the test sees the duplicates that the broker makes.
pub fn without_a_store_effects_happen_twice<B: Broker>(test: &'static str) {
    consume_if_child::<B>(test);
    // Whether a kill hits the moment between an effect and its acknowledgement is chance.
    let seen = (0..5).any(|_| effects_happen_twice_without_a_store::<B>(test));
    assert!(seen, "the test cannot see a duplicate");
}

fn effects_happen_twice_without_a_store<B: Broker>(test: &'static str) -> bool {
    let (messages, twins) = (1_000 / B::SHARE as usize, 100 / B::SHARE as usize);
    let stage = Stage::new(test);
    stage.site.append("without a store", "");
    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        send(&broker, messages).await;
        tokio::time::sleep(B::BETWEEN_TWINS).await;
        send(&broker, twins).await;
    });
    stage.kill_consumers(8, messages);
    let ledger = stage.site.count("ledger");
    assert_eq!(ledger.len(), messages);
    let twice = |twin: bool| {
        let is_twin = |body: &str| body.trim_start_matches("charge ").parse::<usize>().unwrap() < twins;
        ledger.iter().filter(|(body, times)| **times > 1 && is_twin(body) == twin).count()
    };
    println!("twice: {} of those sent once, {} of {twins} sent twice", twice(false), twice(true));
    assert_eq!(twice(true), twins);
    twice(false) > 0
}

/// What fails for good, and what takes its consumer with it, ends among the dead letters, and can come back from there.
pub fn poison_ends_among_the_dead_letters_and_can_come_back<B: Broker>(test: &'static str) {
    consume_if_child::<B>(test);
    let stage = Stage::new(test);
    stage.site.append("poisonous", "");
    // One of them has no id, and goes by its payload there and back.
    let bodies = [("good", Some("1")), ("hopeless", None), ("wrong", Some("2")), ("killer", Some("3"))];
    let send = async |broker: &B| {
        for (body, id) in bodies {
            broker.send(id, body).await;
        }
    };
    runtime().block_on(async { send(&B::open(&stage.queue).await).await });
    let mut deaths = 0;
    while !stage.consumer().wait().unwrap().success() {
        deaths += 1;
        assert!(deaths <= 3, "its attempts were not counted");
    }
    assert_eq!(deaths, 3);
    assert_eq!(stage.site.count("ledger").into_keys().collect::<Vec<_>>(), ["good"]);
    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        let mut dead = broker.dead().await;
        dead.sort();
        assert_eq!(dead, ["hopeless", "killer", "wrong"]);
        assert_eq!(broker.unsettled().await, 0);
        fs::remove_file(stage.site.dir.join("poisonous")).unwrap();
        broker.redrive().await;
    });
    assert!(stage.consumer().wait().unwrap().success());
    // They were settled under their own keys: their twins are duplicates.
    runtime().block_on(async { send(&B::open(&stage.queue).await).await });
    assert!(stage.consumer().wait().unwrap().success());
    let ledger = stage.site.count("ledger");
    assert!(ledger.len() == bodies.len() && ledger.values().all(|times| *times == 1), "{ledger:?}");
    let told = stage.site.count("events");
    assert_eq!(told.get("told in attempt 1"), Some(&1), "the killer's doubt came back with it: {told:?}");
    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        assert_eq!((broker.unsettled().await, broker.dead().await), (0, Vec::new()));
    });
}

/// A twin comes while the first is at work, and so does the first itself where the broker thinks that its consumer is
/// gone.
pub fn what_is_at_work_is_not_begun_again<B: Broker>(test: &'static str) {
    const MESSAGES: usize = CONSUMERS / 2;
    let stage = Stage::new(test);
    stage.site.append("slow", "");
    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        send(&broker, MESSAGES).await;
        tokio::time::sleep(B::BETWEEN_TWINS).await;
        send(&broker, MESSAGES).await;
        let processor = stage.site.processor();
        stage.site.consume(&mut broker.intake().await, Some(&processor), CONSUMERS).await;
        let (ledger, events) = (stage.site.count("ledger"), stage.site.count("events"));
        assert!(ledger.len() == MESSAGES && ledger.values().all(|times| *times == 1), "{ledger:?}");
        println!("slow work: {events:?}");
        let seen = |event: &str| events.get(event).copied().unwrap_or_default() as usize;
        assert_eq!(seen("done"), MESSAGES);
        assert!(seen("in progress") >= MESSAGES && seen("duplicate") >= MESSAGES);
        assert_eq!(broker.unsettled().await, 0);
    });
}

/// Keys, waits and figures, one delivery after the other.
pub fn keys_waits_and_figures_are_right<B: Broker>(test: &'static str) {
    let stage = Stage::new(test);
    runtime().block_on(async {
        let broker = B::open(&stage.queue).await;
        for twin in 0..2 {
            if twin == 1 {
                tokio::time::sleep(B::BETWEEN_TWINS).await;
            }
            // The same id under another body is the same work; so is the same body without an id.
            broker.send(Some("order-1"), &format!("charge {twin}")).await;
            broker.send(None, "refund 12").await;
            broker.send(None, &format!("refund 2{twin}")).await;
        }
        broker.send(Some("order-3"), "charge 3").await;
        let processor = stage.site.processor().backoff(Duration::from_millis(700), Duration::from_millis(700));
        let mut intake = broker.intake().await;
        let (mut settled, mut failed_at) = (Vec::new(), None);
        while let Ok(delivery) = tokio::time::timeout(QUIET, intake.next()).await {
            if let Some(ms) = delivery.timestamp_ms() {
                let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis();
                assert!(now.abs_diff(u128::from(ms)) < 60_000, "{ms} is not about now, {now}");
            }
            let body = String::from_utf8(delivery.payload().to_vec()).unwrap();
            let work = async |delivery: &<B::Intake as Intake>::Delivery, job: &mut Job| {
                stage.site.work(delivery.payload(), job, [Duration::ZERO; 2]).await
            };
            let what = processor.process(delivery, work).await.unwrap();
            match what {
                Settled::Done => settled.push(format!("{body}: done")),
                Settled::Duplicate(first) => {
                    let first = String::from_utf8(first.result().unwrap().to_vec()).unwrap();
                    settled.push(format!("{body}: as {first}"));
                }
                Settled::Failed { .. } => failed_at = Some(Instant::now()),
                // The broker's wait is over a little before the store's.
                Settled::InProgress { retry_after } => assert!(retry_after < Duration::from_millis(400), "{what:?}"),
                other => panic!("{other:?}"),
            }
            if let (Some(at), "charge 3: done") = (failed_at, settled.last().map_or("", String::as_str)) {
                let waited = at.elapsed();
                assert!(waited >= Duration::from_millis(690) && waited < Duration::from_secs(5), "{waited:?}");
            }
        }
        settled.sort();
        let expected = [
            "charge 0: done",
            "charge 1: as charge 0",
            "charge 3: done",
            "refund 12: as refund 12",
            "refund 12: done",
            "refund 20: done",
            "refund 21: done",
        ];
        assert_eq!(settled, expected);
        let stats = processor.store().blocking().stats();
        let figures = (stats.acquired, stats.completed, stats.duplicates, stats.released, stats.in_flight);
        assert_eq!(figures, (6, 5, 2, 1, 0), "{stats:?}");
        drop(intake);
        assert_eq!(broker.unsettled().await, 0);
    });
}

/// Writes the tests of a broker.
#[macro_export]
macro_rules! tests_of {
    ($broker:ty: $($test:ident),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                // As the test runner names it: without the crate.
                let name = concat!(module_path!(), "::", stringify!($test));
                $crate::harness::$test::<$broker>(name.split_once("::").unwrap().1);
            }
        )+
    };
}
