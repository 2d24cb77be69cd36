//! The outcome of a delivery.

use std::time::Duration;

use onlyonce_core::{Completed, Error};

use crate::failure::Failure;

/// What [`process`](crate::Processor::process) did with a delivery.
#[derive(Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The work ran and its result is stored. Acknowledged.
    Done,
    /// An earlier delivery completed the work with this result. Acknowledged.
    Duplicate(Completed),
    /// The key is leased by another holder, in backoff, or held for resolution. Redelivery requested.
    InProgress {
        /// Delay of the redelivery.
        retry_after: Duration,
    },
    /// The work failed or panicked. Redelivery requested after the backoff.
    Failed {
        /// The error of the work.
        failure: Failure,
        /// The number of the attempt, from 1.
        attempt: u32,
        /// Delay of the redelivery.
        retry_after: Duration,
    },
    /// Moved to the dead letters.
    Rejected {
        /// The error of the last attempt, or the reason for a rejection without an attempt: the store's error,
        /// [`RedeliveryTimeout`] or [`MissingId`]. `None` if the last attempt ended without an error, such as by a crash.
        failure: Option<Failure>,
        /// The number of attempts. 0 if the delivery was rejected without one.
        attempts: u32,
    },
    /// Another holder took the lease over while the work ran. Not acknowledged; redelivery requested. The redelivery
    /// finds the other holder's outcome.
    Superseded {
        /// Delay of the redelivery.
        retry_after: Duration,
    },
    /// The store failed or is at its in-flight limit. Not acknowledged; redelivery requested. If the work had started, it was
    /// stopped or its result is not stored, and the next attempt reports `may_have_happened`.
    StoreFailed {
        /// The store's error.
        error: Error,
        /// Delay of the redelivery.
        retry_after: Duration,
    },
    /// The store failed, and the work ran without deduplication under
    /// [`OnStoreFailure::FailOpen`](crate::OnStoreFailure::FailOpen). Acknowledged. Nothing is stored: a duplicate runs
    /// again.
    FailedOpen {
        /// The store's error.
        error: Error,
    },
}

impl Outcome {
    /// Whether the delivery was acknowledged.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        matches!(self, Self::Done | Self::Duplicate(_) | Self::FailedOpen { .. })
    }

    pub(crate) fn is_redelivery_timeout(&self) -> bool {
        let Self::Rejected { failure: Some(failure), .. } = self else { return false };
        failure.error().is::<RedeliveryTimeout>()
    }
}

/// A delivery was rejected because it was redelivered for too long without its work running: see
/// [`Processor::redelivery_timeout`](crate::Processor::redelivery_timeout).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rejected after {redeliveries} redeliveries in {} s: {reason}", elapsed.as_secs())]
#[non_exhaustive]
pub struct RedeliveryTimeout {
    /// The number of redeliveries, counted in this process.
    pub redeliveries: u32,
    /// The time since the first of them was requested.
    pub elapsed: Duration,
    /// Why the work did not run.
    pub reason: String,
}

/// A delivery was rejected because it has no id, and [`Processor::require_ids`](crate::Processor::require_ids) is set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("message has no id in {location}, and ids are required; set one in the producer")]
#[non_exhaustive]
pub struct MissingId {
    /// Where the id should be.
    pub location: String,
}

/// The queue did not take the answer to a delivery. The queue redelivers, and the store knows the outcome.
#[derive(Debug, thiserror::Error)]
#[error("the queue did not take the answer to a delivery; it redelivers")]
#[non_exhaustive]
pub struct AckError<E: std::error::Error + 'static> {
    /// The outcome in the store.
    pub outcome: Outcome,
    /// The error of the queue.
    #[source]
    pub error: E,
}
