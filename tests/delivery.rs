//! Deliveries are settled: each row of the table in `src/delivery/mod.rs`, with a queue in memory that sees what it is
//! told.

mod common;

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use common::{Bench, START_MS};
use onlyonce::delivery::{
    Delivery, Failure, GivenUp, Job, KeyOrigin, NoId, OnStoreFailure, Processor, Settled, Unsettled,
};
use onlyonce::future::Store;
use onlyonce::{Check, Claim, Key, OnInterrupt, Prior, Resolution};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SECOND: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(40);

/// A queue that delivers until it is told that the work is done.
#[derive(Clone, Default)]
struct Queue(Arc<Mutex<Inside>>);

#[derive(Default)]
struct Inside {
    ready: VecDeque<Message>,
    /// Sent away, for so long.
    away: Vec<(Message, Duration)>,
    acknowledged: Vec<Message>,
    dead: Vec<(Message, String)>,
    /// How many answers it will not take.
    deaf: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Message {
    id: String,
    body: String,
}

struct Delivered {
    queue: Queue,
    /// Gone when it was answered.
    message: Option<Message>,
    key: Key<'static>,
    body: String,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the connection is gone")]
struct Deaf;

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }

    fn send(&self, id: &str) {
        self.lock().ready.push_back(Message { id: id.to_owned(), body: format!("body of {id}") });
    }

    fn take(&self) -> Option<Delivered> {
        let message = self.lock().ready.pop_front()?;
        let (key, body) = (Key::from(message.id.as_str()).into_owned(), message.body.clone());
        Some(Delivered { queue: self.clone(), key, body, message: Some(message) })
    }

    fn next(&self) -> Delivered {
        self.take().expect("the queue should have something")
    }

    /// Delivers again what was sent away.
    fn come_back(&self) -> Vec<Duration> {
        let mut inside = self.lock();
        let away = std::mem::take(&mut inside.away);
        away.into_iter()
            .map(|(message, wait)| {
                inside.ready.push_back(message);
                wait
            })
            .collect()
    }

    /// Delivers the dead letters again.
    fn redrive(&self) -> Vec<String> {
        let mut inside = self.lock();
        let dead = std::mem::take(&mut inside.dead);
        dead.into_iter()
            .map(|(message, why)| {
                inside.ready.push_back(message);
                why
            })
            .collect()
    }

    fn acknowledged(&self) -> usize {
        self.lock().acknowledged.len()
    }

    fn is_deaf_for(&self, answers: u32) {
        self.lock().deaf = answers;
    }
}

impl Delivered {
    fn answer(mut self, heard: impl FnOnce(&mut Inside, Message)) -> Result<(), Deaf> {
        let queue = self.queue.clone();
        let mut inside = queue.lock();
        if inside.deaf > 0 {
            inside.deaf -= 1;
            drop(inside);
            return Err(Deaf);
        }
        heard(&mut inside, self.message.take().unwrap());
        Ok(())
    }
}

impl Drop for Delivered {
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            self.queue.lock().ready.push_back(message);
        }
    }
}

impl Delivery for Delivered {
    type Error = Deaf;

    fn key(&self) -> Key<'_> {
        self.key.clone()
    }

    fn payload(&self) -> &[u8] {
        self.body.as_bytes()
    }

    async fn ack(self) -> Result<(), Deaf> {
        self.answer(|inside, message| inside.acknowledged.push(message))
    }

    async fn retry_after(self, wait: Duration) -> Result<(), Deaf> {
        self.answer(|inside, message| inside.away.push((message, wait)))
    }

    async fn reject(self, why: &str) -> Result<(), Deaf> {
        self.answer(|inside, message| inside.dead.push((message, why.to_owned())))
    }
}

/// One with a timestamp, or without.
struct Stamped(Delivered, Option<u64>);

impl Delivery for Stamped {
    type Error = Deaf;

    fn key(&self) -> Key<'_> {
        self.0.key()
    }

    fn timestamp_ms(&self) -> Option<u64> {
        self.1
    }

    fn payload(&self) -> &[u8] {
        self.0.payload()
    }

    async fn ack(self) -> Result<(), Deaf> {
        self.0.ack().await
    }

    async fn retry_after(self, wait: Duration) -> Result<(), Deaf> {
        self.0.retry_after(wait).await
    }

    async fn reject(self, why: &str) -> Result<(), Deaf> {
        self.0.reject(why).await
    }
}

/// One without an id, whose key is its body's digest or its position in the queue.
struct Nameless(Delivered, KeyOrigin);

impl Delivery for Nameless {
    type Error = Deaf;

    fn key(&self) -> Key<'_> {
        match self.1 {
            KeyOrigin::Digest => Key::content(&self.0.body),
            _ => self.0.key(),
        }
    }

    fn key_origin(&self) -> KeyOrigin {
        self.1
    }

    fn id_place(&self) -> String {
        "header `id` of topic `orders`".to_owned()
    }

    fn payload(&self) -> &[u8] {
        self.0.payload()
    }

    async fn ack(self) -> Result<(), Deaf> {
        self.0.ack().await
    }

    async fn retry_after(self, wait: Duration) -> Result<(), Deaf> {
        self.0.retry_after(wait).await
    }

    async fn reject(self, why: &str) -> Result<(), Deaf> {
        self.0.reject(why).await
    }
}

/// A queue, a store whose clock stands still, and what settles by it: three attempts, backoffs of one second to three.
struct Desk {
    queue: Queue,
    bench: Bench,
    processor: Processor,
}

impl Desk {
    fn new() -> Self {
        Self::with(|builder| builder)
    }

    fn with(configure: fn(onlyonce::Builder) -> onlyonce::Builder) -> Self {
        let bench = Bench::with(configure);
        let queue = Queue::default();
        let processor = processor(&bench);
        Self { queue, bench, processor }
    }

    fn fail_open(mut self) -> Self {
        self.processor = self.processor.on_store_failure(OnStoreFailure::FailOpen);
        self
    }

    /// Takes the key over from a holder that is at work: all of its renewals come too late.
    fn overtake(&self) -> onlyonce::Lease {
        loop {
            self.bench.advance_ms(1_000);
            // A renewal may come between the two, every third of a second.
            if let Claim::Acquired(lease) = self.bench.store().claim("a").unwrap() {
                return lease;
            }
        }
    }

    /// The process ends and begins again.
    fn restart(&mut self) {
        self.bench.reopen();
        self.processor = processor(&self.bench);
    }

    async fn process(
        &self,
        work: impl AsyncFnOnce(&Delivered, &mut Job) -> Result<&'static str, Failure>,
    ) -> Result<Settled, Unsettled<Deaf>> {
        self.processor.process(self.queue.next(), work).await
    }

    async fn settle(&self, work: impl AsyncFnOnce(&mut Job) -> Result<&'static str, Failure>) -> Settled {
        self.process(async |_, job| work(job).await).await.unwrap()
    }

    /// Delivers the next message with this timestamp.
    async fn settle_at(&self, at_ms: u64) -> Settled {
        let delivery = Stamped(self.queue.next(), Some(at_ms));
        self.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap()
    }

    /// Delivers the next message without an id.
    async fn settle_nameless(&self, origin: KeyOrigin) -> Settled {
        let delivery = Nameless(self.queue.next(), origin);
        self.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap()
    }

    async fn is_done_before(&self) {
        let settled = self.settle(async |_| panic!("its work was done before")).await;
        assert!(matches!(settled, Settled::Duplicate(_)), "{settled:?}");
    }
}

fn processor(bench: &Bench) -> Processor {
    let store = Store::new(bench.store().clone()).unwrap();
    Processor::new(store).attempts(3).backoff(SECOND, 3 * SECOND).longest_wait(LONGEST)
}

async fn refused(_: &mut Job) -> Result<&'static str, Failure> {
    Err("the card was refused".into())
}

async fn charged(_: &mut Job) -> Result<&'static str, Failure> {
    Ok("receipt")
}

#[tokio::test]
async fn a_delivery_is_acknowledged_when_its_result_is_stored_and_its_duplicate_with_that_result() {
    /// Asks the store at the moment of its acknowledgement.
    struct Watched(Store, Arc<Mutex<Option<Check>>>);

    impl Delivery for Watched {
        type Error = Infallible;

        fn key(&self) -> Key<'_> {
            Key::from("a")
        }

        fn payload(&self) -> &[u8] {
            b"12 EUR"
        }

        async fn ack(self) -> Result<(), Infallible> {
            let found = self.0.check("a").await.unwrap();
            *self.1.lock().unwrap() = Some(found);
            Ok(())
        }

        async fn retry_after(self, _: Duration) -> Result<(), Infallible> {
            panic!("its work was done")
        }

        async fn reject(self, _: &str) -> Result<(), Infallible> {
            panic!("its work was done")
        }
    }

    let desk = Desk::new();
    let seen = Arc::new(Mutex::new(None));
    let watched = Watched(desk.processor.store().clone(), Arc::clone(&seen));
    let done = desk
        .processor
        .process(watched, async |delivery, job| {
            assert_eq!((delivery.payload(), delivery.timestamp_ms()), (&b"12 EUR"[..], None));
            assert!(job.is_guarded() && !job.may_have_happened() && job.token() > 0);
            assert_eq!((job.attempt(), job.prior()), (1, None));
            Ok("receipt")
        })
        .await;
    assert!(matches!(done, Ok(Settled::Done)), "{done:?}");
    let found = seen.lock().unwrap().take();
    assert!(matches!(&found, Some(Check::Completed(done)) if done.result() == Some(b"receipt")), "{found:?}");

    desk.queue.send("a");
    let settled = desk.settle(async |_| panic!("its work was done before")).await;
    assert!(settled.is_acknowledged());
    assert!(matches!(settled, Settled::Duplicate(first) if first.result() == Some(b"receipt")));
    assert_eq!(desk.queue.acknowledged(), 1);
    assert_eq!(desk.bench.store().stats().duplicates, 1);
}

#[tokio::test]
async fn what_somebody_is_at_comes_back_when_the_lease_is_over_and_not_later_than_the_longest_wait() {
    // A backoff is at most a window long.
    let desk = Desk::with(|builder| builder.window(Duration::from_secs(200)).bucket(Duration::from_secs(10)));
    desk.queue.send("a");
    let lease = desk.bench.acquire("a");
    desk.bench.advance_ms(400);
    let settled = desk.settle(async |_| panic!("somebody is at it")).await;
    let rest = Duration::from_millis(600);
    assert!(matches!(settled, Settled::InProgress { retry_after } if retry_after == rest), "{settled:?}");
    assert_eq!(desk.queue.come_back(), [rest]);
    lease.release_after(2 * LONGEST).unwrap();
    desk.settle(async |_| panic!("its backoff is not over")).await;
    assert_eq!(desk.queue.come_back(), [LONGEST]);
    desk.bench.advance_ms(80_000);
    assert!(desk.settle(charged).await.is_acknowledged());
}

#[tokio::test]
async fn what_is_held_comes_back_after_the_longest_wait_until_it_is_resolved() {
    let desk = Desk::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    desk.queue.send("a");
    drop(desk.bench.acquire("a"));
    desk.settle(async |_| panic!("it is held")).await;
    assert_eq!(desk.queue.come_back(), [LONGEST]);
    desk.bench.store().resolve("a", Resolution::Completed(b"by hand".to_vec())).unwrap();
    desk.is_done_before().await;
}

#[tokio::test]
async fn a_duplicate_that_has_patience_is_acknowledged_when_the_first_one_is_done() {
    let desk = Desk::new();
    let patient = desk.processor.clone().patience(Duration::from_secs(60));
    desk.queue.send("a");
    desk.queue.send("a");
    let (first, second) = (desk.queue.next(), desk.queue.next());
    let (begin, begun) = tokio::sync::oneshot::channel();
    let one = {
        let patient = patient.clone();
        tokio::spawn(async move {
            patient
                .process(first, async |_, _| {
                    begin.send(()).unwrap();
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    Ok("receipt")
                })
                .await
        })
    };
    begun.await.unwrap();
    let two = patient.process(second, async |_, _| -> Result<&str, Failure> { panic!("the first one works") }).await;
    assert!(matches!(two, Ok(Settled::Duplicate(_))), "{two:?}");
    assert!(matches!(one.await.unwrap(), Ok(Settled::Done)));
}

#[tokio::test]
async fn a_failure_comes_back_after_a_backoff_that_doubles_up_to_its_most() {
    let mut desk = Desk::new();
    desk.processor = desk.processor.attempts(u32::MAX);
    desk.queue.send("a");
    for (attempt, wait_s) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
        let settled = desk
            .settle(async |job| {
                assert_eq!(job.attempt(), attempt);
                assert!(!job.may_have_happened(), "what failed did nothing");
                refused(job).await
            })
            .await;
        let Settled::Failed { failure, attempt: counted, retry_after } = settled else { panic!("{settled:?}") };
        assert_eq!((counted, retry_after), (attempt, wait_s * SECOND));
        assert_eq!(failure.error().to_string(), "the card was refused");
        assert_eq!(desk.queue.come_back(), [wait_s * SECOND]);
        desk.queue.send("a");
        let twin = desk.queue.next();
        let early = desk.process(async |_, _| panic!("its backoff is not over")).await.unwrap();
        assert!(matches!(early, Settled::InProgress { retry_after } if retry_after == wait_s * SECOND), "{early:?}");
        desk.bench.advance_ms(u64::from(wait_s) * 1_000);
        desk.queue.come_back();
        drop(desk.queue.next());
        twin.ack().await.unwrap();
    }
    assert!(desk.settle(charged).await.is_acknowledged());
}

#[tokio::test]
async fn the_last_failed_attempt_is_rejected_and_a_redrive_begins_anew() {
    let desk = Desk::new();
    desk.queue.send("a");
    for round in 0..2 {
        for attempt in 1..=3 {
            let settled = desk
                .settle(async |job| {
                    assert_eq!(job.attempt(), attempt);
                    assert!(!job.may_have_happened());
                    assert_eq!(job.prior().is_some(), round > 0 || attempt > 1);
                    refused(job).await
                })
                .await;
            assert_eq!(matches!(settled, Settled::Rejected { attempts: 3, failure: Some(_) }), attempt == 3);
            desk.bench.advance_ms(3_000);
            desk.queue.come_back();
        }
        assert_eq!(desk.queue.redrive(), ["attempt 3: the card was refused"]);
    }
    assert!(matches!(desk.settle(charged).await, Settled::Done));
    assert_eq!(desk.queue.acknowledged(), 1);
}

#[tokio::test]
async fn attempts_that_died_with_their_process_count_and_their_doubt_outlasts_the_dead_letters() {
    let mut desk = Desk::new();
    desk.queue.send("a");
    for attempt in 1..=3 {
        let begun = tokio::sync::Notify::new();
        tokio::select! {
            settled = desk.process(async |_, job| {
                assert_eq!((job.attempt(), job.may_have_happened()), (attempt, attempt > 1));
                begun.notify_one();
                std::future::pending().await
            }) => panic!("it hangs until it dies: {settled:?}"),
            () = begun.notified() => {}
        }
        desk.restart();
    }
    let settled = desk.settle(async |_| panic!("it has killed three processes")).await;
    assert!(matches!(settled, Settled::Rejected { attempts: 3, failure: None }), "{settled:?}");
    desk.restart();
    assert_eq!(desk.queue.redrive(), ["attempt 3 did not come to an end"]);
    let settled = desk
        .settle(async |job| {
            assert_eq!(job.attempt(), 1);
            assert!(matches!(job.prior(), Some(Prior::Crashed | Prior::Dropped)), "{:?}", job.prior());
            assert!(job.may_have_happened());
            Ok("receipt")
        })
        .await;
    assert!(matches!(settled, Settled::Done));
}

#[tokio::test]
async fn a_panic_comes_back_is_told_and_is_rejected_in_the_end() {
    let desk = Desk::new();
    desk.queue.send("a");
    for attempt in 1..=3 {
        let settled = desk
            .settle(async |job| {
                assert_eq!((job.attempt(), job.may_have_happened()), (attempt, attempt > 1));
                panic!("no {attempt}")
            })
            .await;
        let (Settled::Failed { failure, .. } | Settled::Rejected { failure: Some(failure), .. }) = settled else {
            panic!("{settled:?}")
        };
        assert_eq!(failure.to_string(), format!("the work panicked: no {attempt}"));
        assert!(failure.is_unknown());
        desk.bench.advance_ms(3_000);
        desk.queue.come_back();
    }
    assert_eq!(desk.queue.redrive(), ["attempt 3: the work panicked: no 3"]);
    let settled = desk
        .settle(async |job| {
            assert_eq!((job.attempt(), job.prior()), (1, Some(Prior::Dropped)));
            Ok("receipt")
        })
        .await;
    assert!(matches!(settled, Settled::Done));
}

#[tokio::test]
async fn a_failure_of_unknown_outcome_is_told_after_its_backoff() {
    let mut desk = Desk::new();
    desk.queue.send("a");
    desk.settle(async |_| Err(Failure::unknown("no answer"))).await;
    assert_eq!(desk.queue.come_back(), [SECOND]);
    desk.settle(async |_| panic!("its backoff is not over")).await;
    desk.restart();
    desk.bench.advance_ms(1_000);
    desk.queue.come_back();
    desk.settle(async |job| {
        assert_eq!(job.prior(), Some(Prior::Dropped));
        refused(job).await
    })
    .await;
    desk.bench.advance_ms(2_000);
    desk.queue.come_back();
    let settled = desk
        .settle(async |job| {
            assert!(job.may_have_happened(), "a failure that did nothing does not clear up the one before");
            Ok("receipt")
        })
        .await;
    assert!(matches!(settled, Settled::Done));
}

#[tokio::test]
async fn a_failure_of_unknown_outcome_is_held_where_interrupted_work_is() {
    let desk = Desk::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    desk.queue.send("a");
    desk.settle(async |_| Err(Failure::unknown("no answer"))).await;
    assert_eq!(desk.bench.store().held().unwrap().len(), 1);
    desk.bench.store().resolve("a", Resolution::Rerun).unwrap();
    desk.queue.come_back();
    assert!(matches!(desk.settle(charged).await, Settled::Done));
}

#[tokio::test]
async fn the_doubt_of_the_only_attempt_goes_to_the_dead_letters_and_back() {
    for hold in [false, true] {
        let mut desk = if hold { Desk::with(|builder| builder.on_interrupt(OnInterrupt::Hold)) } else { Desk::new() };
        desk.processor = desk.processor.attempts(1);
        desk.queue.send("a");
        let settled = desk.settle(async |_| Err(Failure::unknown("no answer"))).await;
        assert!(matches!(settled, Settled::Rejected { attempts: 1, .. }), "{settled:?}");
        assert_eq!(desk.queue.redrive(), ["attempt 1: no answer"]);
        if hold {
            desk.settle(async |_| panic!("it is held")).await;
            desk.bench.store().resolve("a", Resolution::Completed(b"by hand".to_vec())).unwrap();
            desk.queue.come_back();
            desk.is_done_before().await;
        } else {
            let settled = desk
                .settle(async |job| {
                    assert_eq!((job.attempt(), job.prior()), (1, Some(Prior::Dropped)));
                    Ok("receipt")
                })
                .await;
            assert!(matches!(settled, Settled::Done), "{settled:?}");
        }
    }
}

#[tokio::test]
async fn a_permanent_failure_is_rejected_at_once() {
    let desk = Desk::new();
    desk.queue.send("a");
    let settled = desk.settle(async |_| Err(Failure::permanent("no such account"))).await;
    assert!(
        matches!(&settled, Settled::Rejected { attempts: 1, failure: Some(failure) } if failure.is_permanent()),
        "{settled:?}"
    );
    assert_eq!(desk.queue.redrive(), ["attempt 1: no such account"]);
    assert!(matches!(desk.settle(charged).await, Settled::Done));
}

#[tokio::test]
async fn a_delivery_that_was_overtaken_is_not_acknowledged() {
    let desk = Desk::new();
    desk.queue.send("a");
    let settled = desk
        .settle(async |_| {
            desk.overtake().complete("theirs").unwrap();
            Ok("mine, too late")
        })
        .await;
    assert!(matches!(settled, Settled::Superseded { retry_after: LONGEST }), "{settled:?}");
    assert_eq!((desk.queue.acknowledged(), desk.queue.come_back()), (0, vec![LONGEST]));
    assert_eq!(desk.bench.completed("a").unwrap(), b"theirs");
    desk.is_done_before().await;
}

#[tokio::test]
async fn work_whose_lease_is_lost_is_dropped_at_its_await() {
    let desk = Desk::new();
    desk.queue.send("a");
    let mut theirs = None;
    let settled = desk
        .settle(async |_| {
            theirs = Some(desk.overtake());
            std::future::pending().await
        })
        .await;
    assert!(matches!(settled, Settled::Superseded { .. }), "{settled:?}");
    assert_eq!(desk.queue.acknowledged(), 0);
    theirs.unwrap().complete("theirs").unwrap();
    desk.queue.come_back();
    desk.is_done_before().await;
}

#[tokio::test]
async fn work_that_is_longer_than_its_lease_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let builder = onlyonce::Store::builder().lease(Duration::from_millis(300)).memory_budget(32 << 20);
    let processor = Processor::new(Store::new(builder.open(dir.path().join("store")).unwrap()).unwrap());
    let queue = Queue::default();
    queue.send("a");
    let settled = processor
        .process(queue.next(), async |_, _| {
            for _ in 0..9 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let other = processor.store().claim("a").await?;
                assert!(matches!(other, Claim::InProgress(_)), "{other:?}");
            }
            Ok("receipt")
        })
        .await;
    assert!(matches!(settled, Ok(Settled::Done)), "{settled:?}");
}

#[test]
fn a_delivery_whose_work_blocks_the_only_thread_keeps_its_key() {
    const LEASE: Duration = Duration::from_millis(300);
    let dir = tempfile::tempdir().unwrap();
    let builder = onlyonce::Store::builder().lease(LEASE).memory_budget(32 << 20);
    let store = builder.open(dir.path().join("store")).unwrap();
    let queue = Queue::default();
    for id in ["a", "a"] {
        queue.send(id);
    }
    let (first, second) = (queue.next(), queue.next());
    let processor = Processor::new(Store::new(store.clone()).unwrap());
    let (begun, has_begun) = std::sync::mpsc::channel();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let work = async |_: &Delivered, _: &mut Job| {
                begun.send(()).unwrap();
                std::thread::sleep(LEASE * 5);
                Ok("receipt")
            };
            runtime().block_on(processor.process(first, work)).unwrap()
        });
        has_begun.recv().unwrap();
        std::thread::sleep(LEASE * 5 / 2);
        let twice = async |_: &Delivered, _: &mut Job| -> Result<&str, Failure> { panic!("it is worked on twice") };
        let settled = runtime().block_on(processor.process(second, twice)).unwrap();
        assert!(matches!(settled, Settled::InProgress { .. }), "{settled:?}");
        assert!(matches!(working.join().unwrap(), Settled::Done));
    });
    assert_eq!((queue.acknowledged(), queue.come_back().len(), store.stats().superseded), (1, 1, 0));
    store.close().unwrap();
}

#[tokio::test]
async fn a_rejection_that_takes_longer_than_a_lease_keeps_its_key() {
    /// Its dead letters are slow.
    struct Slow(Store);
    impl Delivery for Slow {
        type Error = Infallible;
        fn key(&self) -> Key<'_> {
            Key::from("a")
        }
        fn payload(&self) -> &[u8] {
            b"a"
        }
        async fn ack(self) -> Result<(), Infallible> {
            Ok(())
        }
        async fn retry_after(self, _: Duration) -> Result<(), Infallible> {
            Ok(())
        }
        async fn reject(self, _: &str) -> Result<(), Infallible> {
            for _ in 0..25 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                let other = self.0.claim("a").await.unwrap();
                assert!(matches!(other, onlyonce::future::Claim::InProgress(_)), "{other:?}");
            }
            Ok(())
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let builder = onlyonce::Store::builder().lease(Duration::from_millis(150)).memory_budget(32 << 20);
    let store = Store::new(builder.open(dir.path().join("store")).unwrap()).unwrap();
    let refused = async |_: &Slow, _: &mut Job| Err::<&str, _>(Failure::permanent("no such account"));
    let settled = Processor::new(store.clone()).process(Slow(store.clone()), refused).await.unwrap();
    assert!(matches!(settled, Settled::Rejected { .. }), "{settled:?}");
    store.close().await.unwrap();
}

#[tokio::test]
async fn an_acknowledgement_that_is_not_taken_is_reported_and_the_next_delivery_is_a_duplicate() {
    let desk = Desk::new();
    desk.queue.send("a");
    desk.queue.is_deaf_for(1);
    let unsettled = desk.process(async |_, _| Ok("receipt")).await.unwrap_err();
    assert!(matches!(unsettled.settled, Settled::Done));
    assert_eq!((unsettled.error, desk.queue.acknowledged()), (Deaf, 0));
    desk.is_done_before().await;
    assert_eq!(desk.queue.acknowledged(), 1);
}

#[tokio::test]
async fn an_error_contains_the_error_of_the_queue_once() {
    let desk = Desk::new();
    desk.queue.send("a");
    desk.queue.is_deaf_for(1);
    let unsettled = desk.process(async |_, _| Ok("receipt")).await.unwrap_err();
    // As programs print an error with its causes.
    let mut said = unsettled.to_string();
    let mut cause = std::error::Error::source(&unsettled);
    while let Some(error) = cause {
        said = format!("{said}: {error}");
        cause = error.source();
    }
    assert_eq!(said, "the queue did not take the answer: the connection is gone");
}

#[tokio::test]
async fn a_rejection_that_is_not_taken_is_made_again_without_the_work() {
    let mut desk = Desk::new();
    desk.processor = desk.processor.attempts(1);
    desk.queue.send("a");
    desk.queue.is_deaf_for(2);
    let first = desk.process(async |_, job| refused(job).await).await.unwrap_err();
    assert!(matches!(first.settled, Settled::Rejected { attempts: 1, failure: Some(_) }), "{first:?}");
    let second = desk.process(async |_, _| panic!("it was the last attempt")).await.unwrap_err();
    assert!(matches!(second.settled, Settled::Rejected { failure: None, .. }), "{second:?}");
    let third = desk.settle(async |_| panic!("it was the last attempt")).await;
    assert!(matches!(third, Settled::Rejected { failure: None, .. }), "{third:?}");
    desk.queue.redrive();
    assert!(matches!(desk.settle(charged).await, Settled::Done));
}

#[tokio::test]
async fn a_closed_store_fails_closed() {
    let desk = Desk::new();
    desk.queue.send("a");
    desk.bench.store().close().unwrap();
    let settled = desk.settle(async |_| panic!("nothing would remember it")).await;
    assert!(
        matches!(settled, Settled::StoreFailed { error: onlyonce::Error::Closed, retry_after: LONGEST }),
        "{settled:?}"
    );
    assert_eq!(desk.queue.come_back(), [LONGEST]);
    assert_eq!(desk.processor.unguarded(), 0);
}

#[tokio::test]
async fn a_closed_store_fails_open_where_it_was_chosen_and_each_pass_is_counted() {
    let desk = Desk::new().fail_open();
    desk.bench.store().close().unwrap();
    for passes in 1..=2 {
        desk.queue.send("a");
        let settled = desk
            .settle(async |job| {
                assert!(!job.is_guarded() && job.may_have_happened());
                assert_eq!((job.token(), job.attempt(), job.prior()), (0, 1, None));
                Ok("receipt")
            })
            .await;
        assert!(matches!(settled, Settled::Unguarded { error: onlyonce::Error::Closed }), "{settled:?}");
        assert_eq!((desk.queue.acknowledged() as u64, desk.processor.clone().unguarded()), (passes, passes));
    }
    desk.queue.send("b");
    let settled = desk.settle(refused).await;
    assert!(matches!(settled, Settled::Failed { retry_after: SECOND, .. }), "{settled:?}");
    desk.queue.come_back();
    let settled = desk.settle(async |_| panic!("no")).await;
    assert!(matches!(settled, Settled::Failed { .. }), "{settled:?}");
    desk.queue.come_back();
    let settled = desk
        .settle(async |job| {
            job.tx().enqueue("charges", "b", "12 EUR");
            Ok("receipt")
        })
        .await;
    assert!(matches!(settled, Settled::StoreFailed { .. }), "a message would be lost: {settled:?}");
    desk.queue.come_back();
    let settled = desk.settle(async |_| Err(Failure::permanent("no such account"))).await;
    assert!(matches!(settled, Settled::Rejected { .. }), "{settled:?}");
    assert_eq!(desk.queue.redrive(), ["no such account"]);
}

#[tokio::test]
async fn a_store_that_fails_after_the_work_is_handled_by_the_same_policy() {
    for open in [false, true] {
        let mut desk = Desk::new();
        if open {
            desk = desk.fail_open();
        }
        desk.queue.send("a");
        let settled = desk
            .settle(async |_| {
                desk.bench.store().close().unwrap();
                Ok("receipt")
            })
            .await;
        assert_eq!(settled.is_acknowledged(), open, "{settled:?}");
        assert_eq!(desk.processor.unguarded(), u64::from(open));
        assert_eq!(desk.processor.store().blocking().stats().fail_open, u64::from(open));
        if !open {
            assert!(matches!(settled, Settled::StoreFailed { retry_after: LONGEST, .. }), "{settled:?}");
            desk.restart();
            desk.queue.come_back();
            let settled = desk
                .settle(async |job| {
                    assert_eq!((job.attempt(), job.prior()), (2, Some(Prior::Crashed)));
                    Ok("receipt")
                })
                .await;
            assert!(matches!(settled, Settled::Done), "{settled:?}");
        }
    }
}

#[tokio::test]
async fn a_store_at_its_limit_is_waited_for_under_either_policy() {
    let desk = Desk::with(|builder| builder.in_flight_limit(1)).fail_open();
    let other = desk.bench.acquire("other");
    desk.queue.send("a");
    let settled = desk.settle(async |_| panic!("the store is full")).await;
    assert!(matches!(settled, Settled::StoreFailed { .. }), "{settled:?}");
    other.complete("").unwrap();
    desk.queue.come_back();
    assert!(matches!(desk.settle(charged).await, Settled::Done));
}

#[tokio::test]
async fn a_delivery_whose_key_is_refused_is_rejected() {
    let desk = Desk::new().fail_open();
    let guarded = |payload: &str| Key::from("a").fingerprint(payload);
    drop(desk.bench.store().claim(guarded("12 EUR")).unwrap());
    let long = "k".repeat(2_000);
    let mut said = Vec::new();
    for key in [Key::from(""), Key::from(long.as_str()).into_owned(), guarded("13 EUR")] {
        desk.queue.send("a");
        let delivery = desk.queue.next().with_key(key);
        let settled = desk.processor.process(delivery, async |_, _| -> Result<&str, Failure> { panic!("no") }).await;
        assert!(matches!(settled, Ok(Settled::Rejected { attempts: 0, .. })), "{settled:?}");
        said.extend(desk.queue.redrive());
        assert!(desk.queue.next().ack().await.is_ok());
    }
    assert!(said[0].contains("empty") && said[1].contains("2000 bytes") && said[2].contains("another payload"));
    assert_eq!(desk.processor.unguarded(), 0);
}

#[tokio::test]
async fn on_stream_time_deliveries_go_by_their_timestamps() {
    let desk = Desk::with(|builder| builder.stream_time(10 * SECOND)).fail_open();
    let settle = async |id: &str, at_ms: Option<u64>| {
        desk.queue.send(id);
        let delivery = Stamped(desk.queue.next(), at_ms);
        desk.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap()
    };
    // A replay of what was long ago.
    let then_ms = START_MS - 1_000_000;
    assert!(matches!(settle("a", Some(then_ms)).await, Settled::Done));
    assert!(matches!(settle("b", Some(then_ms + 9_000)).await, Settled::Done));
    assert!(matches!(settle("a", Some(then_ms)).await, Settled::Duplicate(_)));
    let ahead = settle("c", Some(then_ms + 900_000)).await;
    assert!(matches!(ahead, Settled::StoreFailed { retry_after: LONGEST, .. }), "{ahead:?}");
    let old = settle("d", Some(then_ms - 9_000)).await;
    assert!(matches!(old, Settled::Rejected { attempts: 0, .. }), "{old:?}");
    let timeless = settle("e", None).await;
    assert!(matches!(timeless, Settled::Rejected { attempts: 0, .. }), "{timeless:?}");
    assert_eq!((desk.queue.acknowledged(), desk.processor.unguarded()), (3, 0));
}

#[tokio::test]
async fn a_timestamp_in_another_unit_is_rejected_at_once_and_named() {
    let desk = Desk::with(|builder| builder.stream_time(10 * SECOND)).fail_open();
    // Before anything has set stream time, and after.
    for (round, at_ms) in [START_MS - 5_000, START_MS].into_iter().enumerate() {
        for (unit, wrong) in
            [("seconds", at_ms / 1_000), ("microseconds", at_ms * 1_000), ("nanoseconds", at_ms * 1_000_000)]
        {
            desk.queue.send("wrong");
            let settled = desk.settle_at(wrong).await;
            assert!(matches!(settled, Settled::Rejected { attempts: 0, .. }), "{settled:?}");
            let why = desk.queue.redrive().remove(0);
            assert!(why.contains(&format!("looks like {unit}")) && why.contains(&wrong.to_string()), "{why}");
            drop(desk.queue.lock().ready.pop_front());
        }
        desk.queue.send(&format!("right {round}"));
        assert!(matches!(desk.settle_at(at_ms).await, Settled::Done));
    }
    assert_eq!((desk.processor.unguarded(), desk.bench.store().stats().now_ms), (0, START_MS));
}

#[tokio::test]
async fn a_timestamp_that_stays_too_far_ahead_is_given_up_with_the_reason() {
    let mut desk = Desk::with(|builder| builder.stream_time(10 * SECOND)).fail_open();
    desk.processor = desk.processor.give_up_after(Duration::ZERO);
    desk.queue.send("first");
    assert!(matches!(desk.settle_at(START_MS).await, Settled::Done));
    // A redrive begins anew.
    for _ in 0..2 {
        desk.queue.send("ahead");
        for _ in 0..3 {
            let settled = desk.settle_at(START_MS + 900_000).await;
            assert!(matches!(settled, Settled::StoreFailed { retry_after: LONGEST, .. }), "{settled:?}");
            desk.queue.come_back();
        }
        let settled = desk.settle_at(START_MS + 900_000).await;
        let Settled::Rejected { failure: Some(failure), attempts: 0 } = settled else { panic!("{settled:?}") };
        let given_up = failure.error().downcast_ref::<GivenUp>().unwrap();
        assert!(given_up.returns == 3 && given_up.reason.contains("ahead of stream time"), "{given_up:?}");
        let why = desk.queue.lock().dead.remove(0).1;
        assert!(why.starts_with("given up after 3 returns") && why.contains("ahead of stream time"), "{why}");
    }
    let stats = desk.processor.stats();
    assert_eq!((stats.done, stats.store_failed, stats.rejected, stats.given_up), (1, 6, 2, 2), "{stats:?}");
}

#[tokio::test]
async fn a_key_that_stays_in_progress_or_held_is_given_up_with_the_reason() {
    for on_interrupt in [OnInterrupt::Rerun, OnInterrupt::Hold] {
        let is_held = on_interrupt == OnInterrupt::Hold;
        let mut desk = Desk::new();
        if is_held {
            desk = Desk::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
        }
        desk.processor = desk.processor.give_up_after(Duration::ZERO);
        let mut lease = Some(desk.bench.acquire("a"));
        if is_held {
            drop(lease.take());
        }
        desk.queue.send("a");
        for _ in 0..3 {
            let settled = desk.settle(async |_| panic!("it is in progress")).await;
            assert!(matches!(settled, Settled::InProgress { .. }), "{settled:?}");
            desk.queue.come_back();
        }
        let settled = desk.settle(async |_| panic!("it is in progress")).await;
        assert!(matches!(settled, Settled::Rejected { attempts: 0, .. }), "{settled:?}");
        let said = if is_held { "\"a\" is held: resolve it" } else { "\"a\" is still in progress (attempt 1)" };
        let why = desk.queue.redrive().remove(0);
        assert!(why.contains(said), "{why}");
        // What was decided meanwhile is what the letter finds when it is delivered again.
        match lease {
            Some(lease) => lease.complete("receipt").unwrap(),
            None => desk.bench.store().resolve("a", Resolution::Completed(b"by hand".to_vec())).unwrap(),
        }
        desk.is_done_before().await;
    }
}

#[tokio::test]
async fn returns_are_counted_until_the_work_runs_and_the_time_must_be_over_too() {
    let mut desk = Desk::new();
    desk.queue.send("a");
    for _ in 0..20 {
        let lease = desk.bench.acquire("a");
        let settled = desk.settle(async |_| panic!("it is in progress")).await;
        assert!(matches!(settled, Settled::InProgress { .. }), "an hour is not over: {settled:?}");
        lease.release().unwrap();
        desk.queue.come_back();
    }
    desk.processor = desk.processor.give_up_after(Duration::ZERO).attempts(100);
    for _ in 0..20 {
        assert!(matches!(desk.settle(refused).await, Settled::Failed { .. }));
        desk.bench.advance_ms(3_000);
        desk.queue.come_back();
    }
    desk.processor = desk.processor.attempts(21);
    let lease = desk.bench.acquire("a");
    let settled = desk.settle(async |_| panic!("it is in progress")).await;
    assert!(matches!(settled, Settled::InProgress { .. }), "its work has run since: {settled:?}");
    drop(lease);
}

#[tokio::test]
async fn a_store_that_fails_gives_no_delivery_up() {
    let mut desk = Desk::with(|builder| builder.in_flight_limit(1));
    desk.processor = desk.processor.give_up_after(Duration::ZERO).attempts(1);
    desk.queue.send("a");
    let other = desk.bench.acquire("other");
    for full in [true, false] {
        for _ in 0..10 {
            let settled = desk.settle(async |_| panic!("nothing would remember it")).await;
            assert!(matches!(settled, Settled::StoreFailed { .. }), "{settled:?}");
            desk.queue.come_back();
        }
        if full {
            desk.bench.store().close().unwrap();
        }
    }
    drop(other);
    assert_eq!(desk.processor.stats().store_failed, 20);
}

#[tokio::test]
async fn work_that_fails_without_a_store_is_given_up_too() {
    let mut desk = Desk::new().fail_open();
    desk.processor = desk.processor.give_up_after(Duration::ZERO);
    desk.bench.store().close().unwrap();
    desk.queue.send("a");
    for _ in 0..3 {
        assert!(matches!(desk.settle(refused).await, Settled::Failed { .. }));
        desk.queue.come_back();
    }
    assert!(matches!(desk.settle(refused).await, Settled::Rejected { .. }));
    assert!(desk.queue.redrive()[0].ends_with("the card was refused"));
}

#[tokio::test]
async fn duplicates_by_digest_are_told_from_duplicates_by_id_and_by_position() {
    let desk = Desk::new();
    for (origin, count) in [(KeyOrigin::Digest, 3), (KeyOrigin::Position, 2)] {
        for _ in 0..=count {
            desk.queue.send(&format!("{origin:?}"));
            assert!(desk.settle_nameless(origin).await.is_acknowledged());
        }
    }
    for _ in 0..=4 {
        desk.queue.send("a");
        assert!(desk.settle(charged).await.is_acknowledged());
    }
    // A key of the caller's choice is an id.
    desk.queue.send("Digest");
    let delivery = Nameless(desk.queue.next(), KeyOrigin::Digest).with_key("a");
    let settled = desk.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap();
    assert!(matches!(settled, Settled::Duplicate(_)), "{settled:?}");
    desk.queue.send("a");
    desk.queue.is_deaf_for(1);
    desk.process(async |_, _| Ok("receipt")).await.unwrap_err();
    let stats = desk.processor.clone().stats();
    let duplicates = [stats.duplicates_by_digest, stats.duplicates_by_position, stats.duplicates_by_id];
    assert_eq!((duplicates, stats.without_id, stats.done, stats.unsettled), ([3, 2, 6], 4, 3, 1), "{stats:?}");
}

#[tokio::test]
async fn a_processor_that_requires_ids_rejects_what_has_none() {
    let mut desk = Desk::new();
    desk.processor = desk.processor.require_ids();
    for _ in 0..2 {
        desk.queue.send("a");
        let delivery = Nameless(desk.queue.next(), KeyOrigin::Digest);
        let work = async |_: &Nameless, _: &mut Job| -> Result<&str, Failure> { panic!("it has no id") };
        let settled = desk.processor.process(delivery, work).await.unwrap();
        let Settled::Rejected { failure: Some(failure), attempts: 0 } = settled else { panic!("{settled:?}") };
        assert_eq!(failure.error().downcast_ref::<NoId>().unwrap().place, "header `id` of topic `orders`");
    }
    let why = desk.queue.redrive();
    assert_eq!(why[0], "the message has no id (header `id` of topic `orders`), and ids are required");
    // With an id, or a place in its queue, it passes.
    assert!(matches!(desk.settle(charged).await, Settled::Done));
    assert!(matches!(desk.settle_nameless(KeyOrigin::Position).await, Settled::Duplicate(_)));
    assert_eq!((desk.processor.stats().without_id, desk.processor.stats().rejected), (2, 2));
}

/// Counts warnings of deliveries that name what was expected.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::Id {
        tracing::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::Id, _: &tracing::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Expected(Option<String>);

        impl tracing::field::Visit for Expected {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "expected" {
                    self.0 = Some(format!("{value:?}"));
                }
            }
        }

        let mut expected = Expected(None);
        event.record(&mut expected);
        self.0.lock().unwrap().extend(expected.0);
    }

    fn enter(&self, _: &tracing::Id) {}

    fn exit(&self, _: &tracing::Id) {}
}

#[tokio::test]
async fn the_first_message_without_an_id_is_warned_about_and_no_further_one() {
    let warnings = Warnings::default();
    let _listens = tracing::subscriber::set_default(warnings.clone());
    let desk = Desk::new();
    for message in 0..3 {
        desk.queue.send(&format!("{message}"));
        assert!(desk.settle_nameless(KeyOrigin::Digest).await.is_acknowledged());
        desk.queue.send(&format!("{message}"));
        assert!(desk.settle_nameless(KeyOrigin::Position).await.is_acknowledged());
    }
    assert_eq!(*warnings.0.lock().unwrap(), ["\"header `id` of topic `orders`\""]);
}

#[tokio::test]
async fn a_key_of_the_callers_choice_takes_the_place_of_the_queues() {
    let desk = Desk::new();
    for (id, first) in [("delivery-1", true), ("delivery-2", false)] {
        desk.queue.send(id);
        let delivery = desk.queue.next().with_key(Key::from("order-4711").scope("orders"));
        assert_eq!(delivery.inner().key(), Key::from(id));
        let settled = desk.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap();
        assert_eq!(matches!(settled, Settled::Done), first, "{settled:?}");
    }
    assert_eq!(desk.queue.acknowledged(), 2);
}

#[tokio::test]
async fn offsets_and_messages_of_the_work_are_stored_with_its_result_or_not_at_all() {
    let desk = Desk::new();
    desk.queue.send("a");
    for works in [false, true] {
        let settled = desk
            .settle(async |job| {
                job.tx().set_offset("orders", 0, 4711);
                job.tx().enqueue("charges", "a", "12 EUR");
                if works { Ok("receipt") } else { Err("the card was refused".into()) }
            })
            .await;
        assert_eq!(settled.is_acknowledged(), works);
        desk.bench.advance_ms(3_000);
        desk.queue.come_back();
        let store = desk.bench.store();
        assert_eq!(store.offset("orders", 0).unwrap(), works.then_some(4711));
        assert_eq!(store.outbox(10).unwrap().len(), usize::from(works));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_duplicates_is_worked_on_once_and_all_of_it_is_acknowledged() {
    const KEYS: usize = 20;
    const TWINS: usize = 25;
    for patience in [Duration::ZERO, Duration::from_secs(60)] {
        let dir = tempfile::tempdir().unwrap();
        let builder = onlyonce::Store::builder().memory_budget(32 << 20);
        let processor =
            Processor::new(Store::new(builder.open(dir.path().join("store")).unwrap()).unwrap()).patience(patience);
        let queue = Queue::default();
        for _ in 0..TWINS {
            (0..KEYS).for_each(|key| queue.send(&format!("order-{key}")));
        }
        let effects = Arc::new(Mutex::new(HashMap::<Vec<u8>, u32>::new()));
        while queue.acknowledged() < KEYS * TWINS {
            let mut tasks = tokio::task::JoinSet::new();
            while let Some(delivery) = queue.take() {
                let (processor, effects) = (processor.clone(), Arc::clone(&effects));
                tasks.spawn(async move {
                    processor
                        .process(delivery, async |delivery, _| {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                            *effects.lock().unwrap().entry(delivery.payload().to_vec()).or_default() += 1;
                            Ok("receipt")
                        })
                        .await
                });
            }
            while let Some(settled) = tasks.join_next().await {
                let settled = settled.unwrap().unwrap();
                assert!(settled.is_acknowledged() || patience.is_zero(), "{settled:?}");
            }
            queue.come_back();
        }
        let effects = effects.lock().unwrap();
        assert!(effects.len() == KEYS && effects.values().all(|count| *count == 1), "{effects:?}");
        assert_eq!(processor.store().blocking().stats().duplicates, (KEYS * (TWINS - 1)) as u64);
    }
}

/// Whatever goes wrong, in whatever order: each effect happens once, and no message is lost.
#[tokio::test]
async fn every_effect_happens_once_whatever_goes_wrong() {
    const MESSAGES: usize = 60;
    let seed = std::env::var("ONLYONCE_SEED").ok().map_or_else(rand::random, |seed| seed.parse().unwrap());
    println!("ONLYONCE_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut desk = Desk::with(|builder| builder.window(100_000 * SECOND).bucket(10_000 * SECOND));
    for message in 0..MESSAGES {
        (0..random.random_range(1..4)).for_each(|_| desk.queue.send(&format!("order-{message}")));
    }
    let sent = desk.queue.lock().ready.len();
    let ledger = Mutex::new(HashMap::<Vec<u8>, u32>::new());
    let (mut steps, mut redriven) = (0, 0);
    while desk.queue.acknowledged() < sent {
        steps += 1;
        assert!(steps < 20_000, "it does not come to an end");
        let what = random.random_range(0..100);
        if what < 3 {
            desk.restart();
        }
        if desk.queue.lock().ready.is_empty() {
            desk.bench.advance_ms(40_000);
            desk.queue.come_back();
            redriven += desk.queue.redrive().len();
            continue;
        }
        desk.queue.is_deaf_for(u32::from(what % 5 == 0));
        let how = random.random_range(0..8);
        let cut = random.random_bool(0.1);
        let charge =
            |delivery: &Delivered| *ledger.lock().unwrap().entry(delivery.payload().to_vec()).or_default() += 1;
        let process = desk.process(async |delivery, job| {
            let charged = job.may_have_happened() && ledger.lock().unwrap().contains_key(delivery.payload());
            match how {
                _ if charged => {}
                0 | 1 => return Err("refused".into()),
                2 => return Err(Failure::unknown("nothing sent, or so")),
                3 => {
                    charge(delivery);
                    return Err(Failure::unknown("sent, and no answer"));
                }
                4 => {
                    charge(delivery);
                    panic!("after the charge");
                }
                5 => return Err(Failure::permanent("no such account")),
                _ => charge(delivery),
            }
            if cut {
                std::future::pending::<()>().await;
            }
            Ok("receipt")
        });
        // A cut future leaves its delivery to the queue, its lease to the next.
        let _ = tokio::time::timeout(Duration::from_millis(if cut { 5 } else { 10_000 }), process).await;
    }
    desk.queue.is_deaf_for(0);
    let ledger = ledger.into_inner().unwrap();
    assert_eq!(ledger.len(), MESSAGES);
    assert!(ledger.values().all(|charges| *charges == 1), "{ledger:?}");
    let inside = desk.queue.lock();
    assert!(inside.ready.is_empty() && inside.away.is_empty() && inside.dead.is_empty());
    assert!(redriven > 0 && desk.bench.store().stats().now_ms > START_MS);
    println!("{steps} deliveries of {sent} messages, {redriven} redriven");
}
