//! Exports the outcomes of deliveries to the `metrics` facade.

use metrics::{Unit, counter, describe_counter};

use crate::delivery::KeyOrigin;
use crate::outcome::Outcome;

const DELIVERIES: &str = "onlyonce.deliveries";
const DUPLICATES: &str = "onlyonce.deliveries.duplicates";
const WITHOUT_ID: &str = "onlyonce.deliveries.without_id";
const REDELIVERY_TIMEOUTS: &str = "onlyonce.deliveries.redelivery_timeouts";
const ACK_FAILURES: &str = "onlyonce.deliveries.ack_failures";

pub(crate) fn describe() {
    describe_counter!(DELIVERIES, Unit::Count, "Deliveries, by outcome");
    describe_counter!(DUPLICATES, Unit::Count, "Duplicate deliveries, by the origin of their key");
    describe_counter!(WITHOUT_ID, Unit::Count, "Deliveries without an id, keyed by a digest of their content");
    describe_counter!(
        REDELIVERY_TIMEOUTS,
        Unit::Count,
        "Deliveries rejected because they were redelivered for too long without their work running"
    );
    describe_counter!(ACK_FAILURES, Unit::Count, "Answers that the queue did not take");
}

pub(crate) fn count(outcome: &Outcome, origin: KeyOrigin, is_answered: bool) {
    let label = match outcome {
        Outcome::Done => "done",
        Outcome::Duplicate(_) => "duplicate",
        Outcome::InProgress { .. } => "in_progress",
        Outcome::Failed { .. } => "failed",
        Outcome::Rejected { .. } => "rejected",
        Outcome::Superseded { .. } => "superseded",
        Outcome::StoreFailed { .. } => "store_failed",
        Outcome::FailedOpen { .. } => "failed_open",
    };
    counter!(DELIVERIES, "outcome" => label).increment(1);
    if matches!(outcome, Outcome::Duplicate(_)) {
        let key = match origin {
            KeyOrigin::Id => "id",
            KeyOrigin::Position => "position",
            KeyOrigin::Digest => "digest",
        };
        counter!(DUPLICATES, "key" => key).increment(1);
    }
    if origin == KeyOrigin::Digest {
        counter!(WITHOUT_ID).increment(1);
    }
    if outcome.is_redelivery_timeout() {
        counter!(REDELIVERY_TIMEOUTS).increment(1);
    }
    if !is_answered {
        counter!(ACK_FAILURES).increment(1);
    }
}
