//! Leases during the work: renewal, and loss to another holder.

use std::convert::Infallible;
use std::time::Duration;

use onlyonce::delivery::{Attempt, Delivery, Failure, Outcome, Processor};
use onlyonce::{Claim, Key, Store};

use crate::fixture::{Fixture, MAX_RETRY_AFTER};
use crate::queue::{Queue, QueueDelivery};

#[tokio::test]
async fn a_delivery_whose_lease_was_taken_over_is_not_acknowledged() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    let outcome = fixture
        .process(async |_| {
            fixture.take_over().complete("theirs").wait().unwrap();
            Ok("mine, too late")
        })
        .await;
    assert!(matches!(outcome, Outcome::Superseded { retry_after: MAX_RETRY_AFTER }), "{outcome:?}");
    assert_eq!((fixture.queue.acknowledged(), fixture.queue.redeliver()), (0, vec![MAX_RETRY_AFTER]));
    assert_eq!(fixture.bench.completed("a").unwrap(), b"theirs");
    fixture.assert_next_is_duplicate().await;
}

#[tokio::test]
async fn work_whose_lease_is_lost_is_dropped_at_its_await() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    let mut theirs = None;
    let outcome = fixture
        .process(async |_| {
            theirs = Some(fixture.take_over());
            std::future::pending().await
        })
        .await;
    assert!(matches!(outcome, Outcome::Superseded { .. }), "{outcome:?}");
    assert_eq!(fixture.queue.acknowledged(), 0);
    theirs.unwrap().complete("theirs").wait().unwrap();
    fixture.queue.redeliver();
    fixture.assert_next_is_duplicate().await;
}

fn open(dir: &tempfile::TempDir, lease: Duration) -> Store {
    Store::builder().lease(lease).memory_budget(32 << 20).open(dir.path().join("store")).unwrap()
}

#[tokio::test]
async fn work_that_takes_longer_than_its_lease_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Duration::from_millis(300));
    let queue = Queue::default();
    queue.send("a");
    let outcome = Processor::new(store.clone())
        .process(queue.next(), async |_, _| {
            for _ in 0..9 {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let other = store.claim("a").await?;
                assert!(matches!(other, Claim::InProgress(_)), "{other:?}");
            }
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Ok(Outcome::Done)), "{outcome:?}");
    store.close().await.unwrap();
}

#[test]
fn work_that_blocks_the_only_thread_keeps_its_lease() {
    const LEASE: Duration = Duration::from_millis(300);
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, LEASE);
    let queue = Queue::default();
    for id in ["a", "a"] {
        queue.send(id);
    }
    let (first, second) = (queue.next(), queue.next());
    let processor = Processor::new(store.clone());
    let (start, started) = std::sync::mpsc::channel();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let work = async |_: &QueueDelivery, _: &mut Attempt| {
                start.send(()).unwrap();
                std::thread::sleep(LEASE * 5);
                Ok("receipt")
            };
            runtime().block_on(processor.process(first, work)).unwrap()
        });
        started.recv().unwrap();
        std::thread::sleep(LEASE * 5 / 2);
        let again = async |_: &QueueDelivery, _: &mut Attempt| -> Result<&str, Failure> { panic!("runs twice") };
        let outcome = runtime().block_on(processor.process(second, again)).unwrap();
        assert!(matches!(outcome, Outcome::InProgress { .. }), "{outcome:?}");
        assert!(matches!(first.join().unwrap(), Outcome::Done));
    });
    assert_eq!((queue.acknowledged(), queue.redeliver().len(), store.stats().superseded), (1, 1, 0));
    store.close().wait().unwrap();
}

/// A delivery of a queue with slow dead letters.
struct SlowReject(Store);

impl Delivery for SlowReject {
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
            assert!(matches!(other, Claim::InProgress(_)), "{other:?}");
        }
        Ok(())
    }
}

#[tokio::test]
async fn a_rejection_that_takes_longer_than_the_lease_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Duration::from_millis(150));
    let decline = async |_: &SlowReject, _: &mut Attempt| Err::<&str, _>(Failure::permanent("no such account"));
    let outcome = Processor::new(store.clone()).process(SlowReject(store.clone()), decline).await.unwrap();
    assert!(matches!(outcome, Outcome::Rejected { .. }), "{outcome:?}");
    store.close().await.unwrap();
}
