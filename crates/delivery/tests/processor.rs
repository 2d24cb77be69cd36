//! The processor on an engine in memory, without the local store. The behaviour is tested in the package `onlyonce`.

mod order;

use std::time::Duration;

use onlyonce_core::testing::MemoryStore;
use onlyonce_core::{Completion, Engine, Error, OnStoreFailure};
use onlyonce_delivery::{Attempt, Failure, Outcome, Processor};
use order::{Answer, Order};

async fn charge(_: &Order, _: &mut Attempt) -> Result<&'static str, Failure> {
    Ok("receipt")
}

#[tokio::test]
async fn a_completion_is_stored_with_the_side_writes_of_the_work() {
    let store = MemoryStore::new();
    let processor = Processor::new(store.clone());
    let order = Order::new("a");
    let answers = order.answers();
    let outcome = processor
        .process(order, async |_, attempt| {
            attempt.side_writes().message("receipts", "a", "second");
            Ok(Completion::new("receipt").offset("orders", 0, 12).message("charges", "a", "first"))
        })
        .await;
    assert!(matches!(outcome, Ok(Outcome::Done)), "{outcome:?}");
    assert_eq!(*answers.lock().unwrap(), [Answer::Ack]);
    assert_eq!(store.offset(b"orders", 0).await.unwrap(), Some(12));
    let payloads: Vec<_> = store.outbox(10).await.unwrap().into_iter().map(|message| message.payload).collect();
    assert_eq!(payloads, [&b"first"[..], b"second"]);
    let duplicate = processor.process(Order::new("a"), charge).await;
    assert!(matches!(duplicate, Ok(Outcome::Duplicate(first)) if first.result() == Some(b"receipt")));
}

#[tokio::test]
async fn a_rejection_is_completed_after_its_lease_was_lost() {
    let store = MemoryStore::new();
    let processor = Processor::new(store.clone());
    let order = Order::new("a").slow_to_reject(Duration::from_millis(50));
    let answers = order.answers();
    let decline = async |_: &Order, _: &mut Attempt| Err::<&str, _>(Failure::permanent("no such account"));
    let (outcome, ()) = tokio::join!(processor.process(order, decline), async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert!(store.expire_lease("a"));
    });
    assert!(matches!(outcome, Ok(Outcome::Rejected { attempts: 1, .. })), "{outcome:?}");
    assert_eq!(*answers.lock().unwrap(), [Answer::Reject("attempt 1: no such account".to_owned())]);
}

#[tokio::test]
async fn an_engine_that_fails_open_counts_each_run() {
    let store = MemoryStore::new();
    store.fail_with(Error::Closed);
    let processor = Processor::new(store.clone()).on_store_failure(OnStoreFailure::FailOpen);
    for runs in 1..=2 {
        let outcome = processor.process(Order::new("a"), charge).await;
        assert!(matches!(outcome, Ok(Outcome::FailedOpen { error: Error::Closed })), "{outcome:?}");
        let counts = (processor.fail_open_count(), store.fail_open_count(), processor.stats().failed_open);
        assert_eq!(counts, (runs, runs, runs));
    }
    store.recover();
    assert!(matches!(processor.process(Order::new("a"), charge).await, Ok(Outcome::Done)));
}

#[tokio::test]
async fn a_completion_with_unknown_outcome_is_redelivered_and_not_acknowledged() {
    let store = MemoryStore::new();
    let processor = Processor::new(store.clone());
    let order = Order::new("a");
    let answers = order.answers();
    let outcome = processor
        .process(order, async |_, _| {
            store.lose_answers_with(Error::WriteFailed { source: "connection lost".into() });
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Ok(Outcome::StoreFailed { .. })), "{outcome:?}");
    assert!(matches!(answers.lock().unwrap()[..], [Answer::RetryAfter(_)]));
    store.recover();
    let again =
        processor.process(Order::new("a"), async |_, _| -> Result<&str, Failure> { panic!("runs twice") }).await;
    assert!(matches!(again, Ok(Outcome::Duplicate(_))), "the write happened: {again:?}");
}
