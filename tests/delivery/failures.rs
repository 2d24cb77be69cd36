//! Work that fails, panics or crashes: backoffs, attempts and rejections.

use onlyonce::delivery::{Failure, Outcome};
use onlyonce::{OnInterrupt, PriorAttempt, Resolution};

use crate::fixture::{Fixture, SECOND, charge, decline};

#[tokio::test]
async fn a_failure_is_redelivered_after_a_backoff_that_doubles_up_to_its_maximum() {
    let mut fixture = Fixture::new();
    fixture.set(|processor| processor.attempts(u32::MAX));
    fixture.queue.send("a");
    for (number, wait_s) in [(1, 1), (2, 2), (3, 3), (4, 3)] {
        let outcome = fixture
            .process(async |attempt| {
                assert_eq!(attempt.number(), number);
                assert!(!attempt.may_have_happened(), "the failure had no effect");
                decline(attempt).await
            })
            .await;
        let Outcome::Failed { failure, attempt, retry_after } = outcome else { panic!("{outcome:?}") };
        assert_eq!((attempt, retry_after), (number, wait_s * SECOND));
        assert_eq!(failure.error().to_string(), "the card was declined");
        assert_eq!(fixture.queue.redeliver(), [wait_s * SECOND]);
        fixture.queue.send("a");
        let copy = fixture.queue.next();
        let early = fixture.process(async |_| panic!("the key is in backoff")).await;
        assert!(matches!(early, Outcome::InProgress { retry_after } if retry_after == wait_s * SECOND), "{early:?}");
        fixture.bench.advance_ms(u64::from(wait_s) * 1_000);
        fixture.queue.redeliver();
        drop(fixture.queue.next());
        onlyonce::delivery::Delivery::ack(copy).await.unwrap();
    }
    assert!(fixture.process(charge).await.is_acknowledged());
}

#[tokio::test]
async fn the_last_failed_attempt_is_rejected_and_a_redrive_resets_the_attempts() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    for round in 0..2 {
        for number in 1..=3 {
            let outcome = fixture
                .process(async |attempt| {
                    assert_eq!(attempt.number(), number);
                    assert!(!attempt.may_have_happened());
                    assert_eq!(attempt.prior().is_some(), round > 0 || number > 1);
                    decline(attempt).await
                })
                .await;
            assert_eq!(matches!(outcome, Outcome::Rejected { attempts: 3, failure: Some(_) }), number == 3);
            fixture.bench.advance_ms(3_000);
            fixture.queue.redeliver();
        }
        assert_eq!(fixture.queue.redrive(), ["attempt 3: the card was declined"]);
    }
    assert!(matches!(fixture.process(charge).await, Outcome::Done));
    assert_eq!(fixture.queue.acknowledged(), 1);
}

#[tokio::test]
async fn crashed_attempts_count_and_the_unknown_effect_is_reported_after_a_redrive() {
    let mut fixture = Fixture::new();
    fixture.queue.send("a");
    for number in 1..=3 {
        let started = tokio::sync::Notify::new();
        tokio::select! {
            outcome = fixture.try_process(async |_, attempt| {
                assert_eq!((attempt.number(), attempt.may_have_happened()), (number, number > 1));
                started.notify_one();
                std::future::pending().await
            }) => panic!("the work never ends: {outcome:?}"),
            () = started.notified() => {}
        }
        fixture.restart();
    }
    let outcome = fixture.process(async |_| panic!("three attempts crashed")).await;
    assert!(matches!(outcome, Outcome::Rejected { attempts: 3, failure: None }), "{outcome:?}");
    fixture.restart();
    assert_eq!(fixture.queue.redrive(), ["attempt 3 crashed or was interrupted"]);
    let outcome = fixture
        .process(async |attempt| {
            assert_eq!(attempt.number(), 1);
            let prior = attempt.prior();
            assert!(matches!(prior, Some(PriorAttempt::Crashed | PriorAttempt::Dropped)), "{prior:?}");
            assert!(attempt.may_have_happened());
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Outcome::Done));
}

#[tokio::test]
async fn a_panic_is_retried_as_an_unknown_effect_and_rejected_after_the_last_attempt() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    for number in 1..=3 {
        let outcome = fixture
            .process(async |attempt| {
                assert_eq!((attempt.number(), attempt.may_have_happened()), (number, number > 1));
                panic!("no {number}")
            })
            .await;
        let (Outcome::Failed { failure, .. } | Outcome::Rejected { failure: Some(failure), .. }) = outcome else {
            panic!("{outcome:?}")
        };
        assert_eq!(failure.to_string(), format!("the work panicked: no {number}"));
        assert!(failure.is_unknown());
        fixture.bench.advance_ms(3_000);
        fixture.queue.redeliver();
    }
    assert_eq!(fixture.queue.redrive(), ["attempt 3: the work panicked: no 3"]);
    let outcome = fixture
        .process(async |attempt| {
            assert_eq!((attempt.number(), attempt.prior()), (1, Some(PriorAttempt::Dropped)));
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Outcome::Done));
}

#[tokio::test]
async fn a_failure_with_unknown_effect_is_reported_after_its_backoff_until_completion() {
    let mut fixture = Fixture::new();
    fixture.queue.send("a");
    fixture.process(async |_| Err(Failure::unknown("no answer"))).await;
    assert_eq!(fixture.queue.redeliver(), [SECOND]);
    fixture.process(async |_| panic!("the key is in backoff")).await;
    fixture.restart();
    fixture.bench.advance_ms(1_000);
    fixture.queue.redeliver();
    fixture
        .process(async |attempt| {
            assert_eq!(attempt.prior(), Some(PriorAttempt::Dropped));
            decline(attempt).await
        })
        .await;
    fixture.bench.advance_ms(2_000);
    fixture.queue.redeliver();
    let outcome = fixture
        .process(async |attempt| {
            assert!(attempt.may_have_happened(), "a failure without effect does not clear the earlier unknown one");
            Ok("receipt")
        })
        .await;
    assert!(matches!(outcome, Outcome::Done));
}

#[tokio::test]
async fn a_failure_with_unknown_effect_is_held_if_interrupted_work_is_held() {
    let fixture = Fixture::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
    fixture.queue.send("a");
    fixture.process(async |_| Err(Failure::unknown("no answer"))).await;
    assert_eq!(fixture.store().held().wait().unwrap().len(), 1);
    fixture.store().resolve("a", Resolution::Rerun).wait().unwrap();
    fixture.queue.redeliver();
    assert!(matches!(fixture.process(charge).await, Outcome::Done));
}

#[tokio::test]
async fn the_unknown_effect_of_the_only_attempt_is_reported_after_a_redrive() {
    for is_held in [false, true] {
        let mut fixture =
            if is_held { Fixture::with(|builder| builder.on_interrupt(OnInterrupt::Hold)) } else { Fixture::new() };
        fixture.set(|processor| processor.attempts(1));
        fixture.queue.send("a");
        let outcome = fixture.process(async |_| Err(Failure::unknown("no answer"))).await;
        assert!(matches!(outcome, Outcome::Rejected { attempts: 1, .. }), "{outcome:?}");
        assert_eq!(fixture.queue.redrive(), ["attempt 1: no answer"]);
        if is_held {
            fixture.process(async |_| panic!("the key is held")).await;
            fixture.store().resolve("a", Resolution::Completed(b"receipt".to_vec())).wait().unwrap();
            fixture.queue.redeliver();
            fixture.assert_next_is_duplicate().await;
        } else {
            let outcome = fixture
                .process(async |attempt| {
                    assert_eq!((attempt.number(), attempt.prior()), (1, Some(PriorAttempt::Dropped)));
                    Ok("receipt")
                })
                .await;
            assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn a_permanent_failure_is_rejected_at_once() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    let outcome = fixture.process(async |_| Err(Failure::permanent("no such account"))).await;
    assert!(
        matches!(&outcome, Outcome::Rejected { attempts: 1, failure: Some(failure) } if failure.is_permanent()),
        "{outcome:?}"
    );
    assert_eq!(fixture.queue.redrive(), ["attempt 1: no such account"]);
    assert!(matches!(fixture.process(charge).await, Outcome::Done));
}
