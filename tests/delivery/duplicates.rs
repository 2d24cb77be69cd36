//! Duplicates, keys in progress, and side writes.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use onlyonce::delivery::{Delivery, Failure, Outcome, Processor};
use onlyonce::{Key, KeyStatus, OnInterrupt, Resolution, Store};

use crate::fixture::{Fixture, MAX_RETRY_AFTER, SECOND, charge};
use crate::queue::Queue;

/// Checks the store during its acknowledgement.
struct CheckedOnAck(Store, Arc<Mutex<Option<KeyStatus>>>);

impl Delivery for CheckedOnAck {
    type Error = Infallible;

    fn key(&self) -> Key<'_> {
        Key::from("a")
    }

    fn payload(&self) -> &[u8] {
        b"12 EUR"
    }

    async fn ack(self) -> Result<(), Infallible> {
        let status = self.0.check("a").await.unwrap();
        *self.1.lock().unwrap() = Some(status);
        Ok(())
    }

    async fn retry_after(self, _: Duration) -> Result<(), Infallible> {
        panic!("its work is done")
    }

    async fn reject(self, _: &str) -> Result<(), Infallible> {
        panic!("its work is done")
    }
}

#[tokio::test]
async fn a_delivery_is_acknowledged_after_its_result_is_stored_and_its_duplicate_gets_that_result() {
    let fixture = Fixture::new();
    let status = Arc::new(Mutex::new(None));
    let delivery = CheckedOnAck(fixture.store().clone(), Arc::clone(&status));
    let outcome = fixture
        .processor
        .process(delivery, async |delivery, attempt| {
            assert_eq!((delivery.payload(), delivery.timestamp()), (&b"12 EUR"[..], None));
            assert!(attempt.has_lease() && !attempt.may_have_happened() && attempt.token().get() > 0);
            assert_eq!((attempt.number(), attempt.prior()), (1, None));
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Ok(Outcome::Done)), "{outcome:?}");
    let status = status.lock().unwrap().take();
    assert!(matches!(&status, Some(KeyStatus::Completed(done)) if done.result() == Some(b"receipt")), "{status:?}");

    fixture.queue.send("a");
    let outcome = fixture.process(async |_| panic!("the work runs twice")).await;
    assert!(outcome.is_acknowledged());
    assert!(matches!(outcome, Outcome::Duplicate(first) if first.result() == Some(b"receipt")));
    assert_eq!(fixture.queue.acknowledged(), 1);
    assert_eq!(fixture.store().stats().duplicates, 1);
}

#[tokio::test]
async fn a_key_in_progress_is_redelivered_after_its_lease_or_backoff_and_within_the_maximum() {
    // A backoff is at most half a window long.
    let fixture = Fixture::with(|builder| builder.window(Duration::from_secs(200)).bucket(Duration::from_secs(10)));
    fixture.queue.send("a");
    let lease = fixture.bench.acquire("a");
    fixture.bench.advance_ms(400);
    let outcome = fixture.process(async |_| panic!("the key is leased")).await;
    let rest = Duration::from_millis(600);
    assert!(matches!(outcome, Outcome::InProgress { retry_after } if retry_after == rest), "{outcome:?}");
    assert_eq!(fixture.queue.redeliver(), [rest]);
    lease.release().after(2 * MAX_RETRY_AFTER).wait().unwrap();
    fixture.process(async |_| panic!("the key is in backoff")).await;
    assert_eq!(fixture.queue.redeliver(), [MAX_RETRY_AFTER]);
    fixture.bench.advance_ms(80_000);
    assert!(fixture.process(charge).await.is_acknowledged());
}

#[tokio::test]
async fn a_held_key_is_redelivered_after_the_maximum_delay_until_it_is_resolved() {
    let fixture = Fixture::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    fixture.queue.send("a");
    drop(fixture.bench.acquire("a"));
    fixture.process(async |_| panic!("the key is held")).await;
    assert_eq!(fixture.queue.redeliver(), [MAX_RETRY_AFTER]);
    fixture.store().resolve("a", Resolution::Completed(b"receipt".to_vec())).wait().unwrap();
    fixture.assert_next_is_duplicate().await;
}

#[tokio::test]
async fn a_concurrent_duplicate_with_a_wait_limit_is_acknowledged_when_the_first_delivery_completes() {
    let fixture = Fixture::new();
    let processor = fixture.processor.clone().wait_limit(Duration::from_secs(60));
    fixture.queue.send("a");
    fixture.queue.send("a");
    let (first, second) = (fixture.queue.next(), fixture.queue.next());
    let (start, started) = tokio::sync::oneshot::channel();
    let first = {
        let processor = processor.clone();
        tokio::spawn(async move {
            processor
                .process(first, async |_, _| {
                    start.send(()).unwrap();
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    Ok("receipt")
                })
                .await
        })
    };
    started.await.unwrap();
    let second = processor.process(second, async |_, _| -> Result<&str, Failure> { panic!("the first works") }).await;
    assert!(matches!(second, Ok(Outcome::Duplicate(_))), "{second:?}");
    assert!(matches!(first.await.unwrap(), Ok(Outcome::Done)));
}

#[tokio::test]
async fn side_writes_of_the_work_are_stored_with_its_result_or_not_at_all() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    for succeeds in [false, true] {
        let outcome = fixture
            .process(async |attempt| {
                attempt.side_writes().offset("orders", 0, 4711).message("charges", "a", "12 EUR");
                if succeeds { Ok("receipt") } else { Err("the card was declined".into()) }
            })
            .await;
        assert_eq!(outcome.is_acknowledged(), succeeds);
        fixture.bench.advance_ms(3_000);
        fixture.queue.redeliver();
        assert_eq!(fixture.store().offset("orders", 0).wait().unwrap(), succeeds.then_some(4711));
        assert_eq!(fixture.store().outbox(10).wait().unwrap().len(), usize::from(succeeds));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_duplicates_run_once_and_are_all_acknowledged() {
    const KEYS: usize = 20;
    const COPIES: usize = 25;
    for wait_limit in [Duration::ZERO, 60 * SECOND] {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
        let processor = Processor::new(store.clone()).wait_limit(wait_limit);
        let queue = Queue::default();
        for _ in 0..COPIES {
            (0..KEYS).for_each(|key| queue.send(&format!("order-{key}")));
        }
        let effects = Arc::new(Mutex::new(HashMap::<Vec<u8>, u32>::new()));
        while queue.acknowledged() < KEYS * COPIES {
            let mut tasks = tokio::task::JoinSet::new();
            while let Some(delivery) = queue.try_next() {
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
            while let Some(outcome) = tasks.join_next().await {
                let outcome = outcome.unwrap().unwrap();
                assert!(outcome.is_acknowledged() || wait_limit.is_zero(), "{outcome:?}");
            }
            queue.redeliver();
        }
        let counts: Vec<_> = effects.lock().unwrap().values().copied().collect();
        assert_eq!(counts, [1; KEYS]);
        assert_eq!(store.stats().duplicates, (KEYS * (COPIES - 1)) as u64);
        store.close().await.unwrap();
    }
}
