//! The limit on redeliveries of deliveries whose work does not run.

use std::time::Duration;

use onlyonce::delivery::{Outcome, RedeliveryTimeout};
use onlyonce::{OnInterrupt, Resolution};

use crate::common::START_MS;
use crate::fixture::{Fixture, MAX_RETRY_AFTER, SECOND, decline};

fn without_timeout(fixture: &mut Fixture) {
    fixture.set(|processor| processor.redelivery_timeout(Duration::ZERO));
}

#[tokio::test]
async fn a_timestamp_that_stays_too_far_ahead_is_rejected_with_the_reason() {
    let mut fixture = Fixture::with(|builder| builder.stream_time(10 * SECOND)).fail_open();
    without_timeout(&mut fixture);
    fixture.queue.send("first");
    assert!(matches!(fixture.process_at(Some(START_MS)).await, Outcome::Done));
    // The count starts again after a rejection.
    for _ in 0..2 {
        fixture.queue.send("ahead");
        for _ in 0..3 {
            let outcome = fixture.process_at(Some(START_MS + 900_000)).await;
            assert!(matches!(outcome, Outcome::StoreFailed { retry_after: MAX_RETRY_AFTER, .. }), "{outcome:?}");
            fixture.queue.redeliver();
        }
        let outcome = fixture.process_at(Some(START_MS + 900_000)).await;
        let Outcome::Rejected { failure: Some(failure), attempts: 0 } = outcome else { panic!("{outcome:?}") };
        let timeout = failure.error().downcast_ref::<RedeliveryTimeout>().unwrap();
        assert!(timeout.redeliveries == 3 && timeout.reason.contains("ahead of stream time"), "{timeout:?}");
        let reason = fixture.queue.lock().dead.remove(0).1;
        assert!(reason.starts_with("rejected after 3 redeliveries"), "{reason}");
        assert!(reason.contains("ahead of stream time"), "{reason}");
    }
    let stats = fixture.processor.stats();
    let counted = (stats.done, stats.store_failed, stats.rejected, stats.redelivery_timeouts);
    assert_eq!(counted, (1, 6, 2, 2), "{stats:?}");
}

#[tokio::test]
async fn a_key_that_stays_in_progress_or_held_is_rejected_with_the_reason() {
    for is_held in [false, true] {
        let mut fixture =
            if is_held { Fixture::with(|builder| builder.on_interrupt(OnInterrupt::Hold)) } else { Fixture::new() };
        without_timeout(&mut fixture);
        let mut lease = Some(fixture.bench.acquire("a"));
        if is_held {
            drop(lease.take());
        }
        fixture.queue.send("a");
        for _ in 0..3 {
            let outcome = fixture.process(async |_| panic!("the key is in progress")).await;
            assert!(matches!(outcome, Outcome::InProgress { .. }), "{outcome:?}");
            fixture.queue.redeliver();
        }
        let outcome = fixture.process(async |_| panic!("the key is in progress")).await;
        assert!(matches!(outcome, Outcome::Rejected { attempts: 0, .. }), "{outcome:?}");
        let expected =
            if is_held { "\"a\" is held for resolution: resolve it" } else { "\"a\" is still in progress (attempt 1)" };
        let reason = fixture.queue.redrive().remove(0);
        assert!(reason.contains(expected), "{reason}");
        // A redriven delivery finds the outcome in the store.
        match lease {
            Some(lease) => lease.complete("receipt").wait().unwrap(),
            None => fixture.store().resolve("a", Resolution::Completed(b"receipt".to_vec())).wait().unwrap(),
        }
        fixture.assert_next_is_duplicate().await;
    }
}

#[tokio::test]
async fn redeliveries_count_until_the_work_runs_and_the_time_must_pass_too() {
    let mut fixture = Fixture::new();
    fixture.queue.send("a");
    for _ in 0..20 {
        let lease = fixture.bench.acquire("a");
        let outcome = fixture.process(async |_| panic!("the key is in progress")).await;
        assert!(matches!(outcome, Outcome::InProgress { .. }), "the hour has not passed: {outcome:?}");
        lease.release().wait().unwrap();
        fixture.queue.redeliver();
    }
    without_timeout(&mut fixture);
    fixture.set(|processor| processor.attempts(100));
    for _ in 0..20 {
        assert!(matches!(fixture.process(decline).await, Outcome::Failed { .. }));
        fixture.bench.advance_ms(3_000);
        fixture.queue.redeliver();
    }
    fixture.set(|processor| processor.attempts(21));
    let lease = fixture.bench.acquire("a");
    let outcome = fixture.process(async |_| panic!("the key is in progress")).await;
    assert!(matches!(outcome, Outcome::InProgress { .. }), "the work ran since: {outcome:?}");
    drop(lease);
}

#[tokio::test]
async fn a_failing_store_does_not_count_as_a_redelivery() {
    let mut fixture = Fixture::with(|builder| builder.in_flight_limit(1));
    without_timeout(&mut fixture);
    fixture.set(|processor| processor.attempts(1));
    fixture.queue.send("a");
    let other = fixture.bench.acquire("other");
    for is_full in [true, false] {
        for _ in 0..10 {
            let outcome = fixture.process(async |_| panic!("the store fails")).await;
            assert!(matches!(outcome, Outcome::StoreFailed { .. }), "{outcome:?}");
            fixture.queue.redeliver();
        }
        if is_full {
            fixture.store().close().wait().unwrap();
        }
    }
    drop(other);
    assert_eq!(fixture.processor.stats().store_failed, 20);
}

#[tokio::test]
async fn work_that_keeps_failing_without_the_store_is_rejected() {
    let mut fixture = Fixture::new().fail_open();
    without_timeout(&mut fixture);
    fixture.store().close().wait().unwrap();
    fixture.queue.send("a");
    for _ in 0..3 {
        assert!(matches!(fixture.process(decline).await, Outcome::Failed { .. }));
        fixture.queue.redeliver();
    }
    assert!(matches!(fixture.process(decline).await, Outcome::Rejected { .. }));
    assert!(fixture.queue.redrive()[0].ends_with("the card was declined"));
}
