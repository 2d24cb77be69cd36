//! Answers that the queue does not take.

use onlyonce::delivery::Outcome;

use crate::fixture::{Fixture, charge, decline};
use crate::queue::ConnectionLost;

#[tokio::test]
async fn a_failed_acknowledgement_is_reported_and_the_redelivery_is_a_duplicate() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    fixture.queue.fail_answers(1);
    let error = fixture.try_process(async |_, _| Ok("receipt")).await.unwrap_err();
    assert!(matches!(error.outcome, Outcome::Done));
    assert_eq!((&error.error, fixture.queue.acknowledged()), (&ConnectionLost, 0));
    let source = std::error::Error::source(&error).unwrap();
    assert_eq!(source.downcast_ref(), Some(&ConnectionLost));
    assert!(!error.to_string().contains("connection lost"), "the source prints it: {error}");
    fixture.assert_next_is_duplicate().await;
    assert_eq!(fixture.queue.acknowledged(), 1);
}

#[tokio::test]
async fn a_failed_rejection_is_repeated_without_running_the_work() {
    let mut fixture = Fixture::new();
    fixture.set(|processor| processor.attempts(1));
    fixture.queue.send("a");
    fixture.queue.fail_answers(2);
    let first = fixture.try_process(async |_, attempt| decline(attempt).await).await.unwrap_err();
    assert!(matches!(first.outcome, Outcome::Rejected { attempts: 1, failure: Some(_) }), "{first:?}");
    let second = fixture.try_process(async |_, _| panic!("no attempt is left")).await.unwrap_err();
    assert!(matches!(second.outcome, Outcome::Rejected { failure: None, .. }), "{second:?}");
    let third = fixture.process(async |_| panic!("no attempt is left")).await;
    assert!(matches!(third, Outcome::Rejected { failure: None, .. }), "{third:?}");
    fixture.queue.redrive();
    assert!(matches!(fixture.process(charge).await, Outcome::Done));
}
