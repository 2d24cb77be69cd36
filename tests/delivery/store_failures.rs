//! A store that is closed or full, and keys that it rejects.

use onlyonce::delivery::{Delivery, Failure, Outcome};
use onlyonce::{Error, Key, PriorAttempt};

use crate::fixture::{Fixture, MAX_RETRY_AFTER, SECOND, charge, decline};

#[tokio::test]
async fn a_closed_store_fails_closed() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    fixture.store().close().wait().unwrap();
    let outcome = fixture.process(async |_| panic!("the store is closed")).await;
    assert!(
        matches!(outcome, Outcome::StoreFailed { error: Error::Closed, retry_after: MAX_RETRY_AFTER }),
        "{outcome:?}"
    );
    assert_eq!(fixture.queue.redeliver(), [MAX_RETRY_AFTER]);
    assert_eq!(fixture.processor.fail_open_count(), 0);
}

#[tokio::test]
async fn a_closed_store_fails_open_if_that_is_set_and_each_run_is_counted() {
    let fixture = Fixture::new().fail_open();
    fixture.store().close().wait().unwrap();
    for runs in 1..=2 {
        fixture.queue.send("a");
        let outcome = fixture
            .process(async |attempt| {
                assert!(!attempt.has_lease() && attempt.may_have_happened());
                assert_eq!((attempt.token().get(), attempt.number(), attempt.prior()), (0, 1, None));
                Ok("receipt")
            })
            .await;
        assert!(matches!(outcome, Outcome::FailedOpen { error: Error::Closed }), "{outcome:?}");
        let counted = (fixture.queue.acknowledged() as u64, fixture.processor.clone().fail_open_count());
        assert_eq!(counted, (runs, runs));
    }
    fixture.queue.send("b");
    let outcome = fixture.process(decline).await;
    assert!(matches!(outcome, Outcome::Failed { retry_after: SECOND, .. }), "{outcome:?}");
    fixture.queue.redeliver();
    let outcome = fixture.process(async |_| panic!("no")).await;
    assert!(matches!(outcome, Outcome::Failed { .. }), "{outcome:?}");
    fixture.queue.redeliver();
    let outcome = fixture
        .process(async |attempt| {
            attempt.side_writes().message("charges", "b", "12 EUR");
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Outcome::StoreFailed { .. }), "the message would be lost: {outcome:?}");
    fixture.queue.redeliver();
    let outcome = fixture.process(async |_| Err(Failure::permanent("no such account"))).await;
    assert!(matches!(outcome, Outcome::Rejected { .. }), "{outcome:?}");
    assert_eq!(fixture.queue.redrive(), ["no such account"]);
}

#[tokio::test]
async fn a_store_that_fails_after_the_work_follows_the_same_policy() {
    for is_open in [false, true] {
        let mut fixture = Fixture::new();
        if is_open {
            fixture = fixture.fail_open();
        }
        fixture.queue.send("a");
        let outcome = fixture
            .process(async |_| {
                fixture.store().close().wait().unwrap();
                Ok("receipt")
            })
            .await;
        assert_eq!(outcome.is_acknowledged(), is_open, "{outcome:?}");
        assert_eq!(fixture.processor.fail_open_count(), u64::from(is_open));
        assert_eq!(fixture.store().stats().fail_open, u64::from(is_open));
        if !is_open {
            assert!(matches!(outcome, Outcome::StoreFailed { retry_after: MAX_RETRY_AFTER, .. }), "{outcome:?}");
            fixture.restart();
            fixture.queue.redeliver();
            let outcome = fixture
                .process(async |attempt| {
                    assert_eq!((attempt.number(), attempt.prior()), (2, Some(PriorAttempt::Crashed)));
                    Ok("receipt")
                })
                .await;
            assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn a_full_store_delays_deliveries_under_either_policy() {
    let fixture = Fixture::with(|builder| builder.in_flight_limit(1)).fail_open();
    let other = fixture.bench.acquire("other");
    fixture.queue.send("a");
    let outcome = fixture.process(async |_| panic!("the store is full")).await;
    assert!(matches!(outcome, Outcome::StoreFailed { .. }), "{outcome:?}");
    other.complete("").wait().unwrap();
    fixture.queue.redeliver();
    assert!(matches!(fixture.process(charge).await, Outcome::Done));
}

#[tokio::test]
async fn a_delivery_with_an_invalid_key_is_rejected() {
    let fixture = Fixture::new().fail_open();
    let with_payload = |payload: &str| Key::from("a").fingerprint(payload);
    drop(fixture.store().claim(with_payload("12 EUR")).wait().unwrap());
    let long = "k".repeat(2_000);
    let mut reasons = Vec::new();
    for key in [Key::from(""), Key::from(long.as_str()).into_owned(), with_payload("13 EUR")] {
        fixture.queue.send("a");
        let delivery = fixture.queue.next().with_key(key);
        let work = async |_: &_, _: &mut _| -> Result<&str, Failure> { panic!("the key is invalid") };
        let outcome = fixture.processor.process(delivery, work).await;
        assert!(matches!(outcome, Ok(Outcome::Rejected { attempts: 0, .. })), "{outcome:?}");
        reasons.extend(fixture.queue.redrive());
        assert!(fixture.queue.next().ack().await.is_ok());
    }
    assert!(reasons[0].contains("empty"), "{reasons:?}");
    assert!(reasons[1].contains("2000 bytes"), "{reasons:?}");
    assert!(reasons[2].contains("different payload"), "{reasons:?}");
    assert_eq!(fixture.processor.fail_open_count(), 0);
}
