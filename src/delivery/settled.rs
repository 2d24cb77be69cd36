//! What was done with a delivery.

use std::time::Duration;

use super::work::Failure;
use crate::claim::Completed;
use crate::error::Error;

/// What [`process`](super::Processor::process) did with a delivery, and told its queue.
#[derive(Debug)]
#[non_exhaustive]
pub enum Settled {
    /// The work was done and its result is stored. Acknowledged.
    Done,
    /// The work was done before, with this result. Acknowledged.
    Duplicate(Completed),
    /// Somebody else is at it, or it is held for a decision, or waits for its backoff. Comes back after this time.
    InProgress {
        /// When the delivery is to come back.
        retry_after: Duration,
    },
    /// The work failed, or panicked. Comes back after the backoff.
    Failed {
        /// In the work's own words.
        failure: Failure,
        /// Which attempt it was, from 1.
        attempt: u32,
        /// When the delivery is to come back.
        retry_after: Duration,
    },
    /// Went to the dead letters.
    Rejected {
        /// The error of the last attempt, or why there was none: the store's error, [`GivenUp`] or [`NoId`]. `None` if the
        /// last attempt ended without one, as with its process.
        failure: Option<Failure>,
        /// How many attempts were made. 0 where the delivery was rejected without one.
        attempts: u32,
    },
    /// Somebody has taken over while the work ran. Not acknowledged; comes back after this time, and is then settled by
    /// what the other one did.
    Superseded {
        /// When the delivery is to come back.
        retry_after: Duration,
    },
    /// The store failed, or let no more in for now, and the delivery was not acknowledged: before the work ran, or, where the work was cut off or
    /// its result could not be stored, after it has begun. The next attempt is told then.
    StoreFailed {
        /// What went wrong.
        error: Error,
        /// When the delivery is to come back.
        retry_after: Duration,
    },
    /// The store failed, and the work was done all the same, because the caller has chosen
    /// [`OnStoreFailure::FailOpen`](super::OnStoreFailure::FailOpen). Acknowledged. Nothing remembers it: a duplicate
    /// is done again.
    Unguarded {
        /// What went wrong with the store.
        error: Error,
    },
}

/// A delivery was rejected because it came back for too long without its work having run: see
/// [`Processor::give_up_after`](super::Processor::give_up_after).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("given up after {returns} returns in {} s: {reason}", over.as_secs())]
#[non_exhaustive]
pub struct GivenUp {
    /// How often it was sent away, counted in this process.
    pub returns: u32,
    /// The time since it was first sent away.
    pub over: Duration,
    /// Why it was to be sent away once more.
    pub reason: String,
}

/// A delivery was rejected because it has no id, and
/// [`Processor::require_ids`](super::Processor::require_ids) wants one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the message has no id ({place}), and ids are required")]
#[non_exhaustive]
pub struct NoId {
    /// Where the id should be.
    pub place: String,
}

impl Settled {
    pub(super) fn is_given_up(&self) -> bool {
        let Self::Rejected { failure: Some(failure), .. } = self else { return false };
        failure.error().is::<GivenUp>()
    }

    /// Whether the queue was told that the work is done.
    #[must_use]
    pub fn is_acknowledged(&self) -> bool {
        matches!(self, Self::Done | Self::Duplicate(_) | Self::Unguarded { .. })
    }
}

/// The queue did not take the answer. The delivery comes back when the queue thinks so, and is settled by what is
/// stored.
#[derive(Debug, thiserror::Error)]
#[error("the queue did not take the answer: {error}")]
pub struct Unsettled<E> {
    /// What was to be told, and what the store holds already.
    pub settled: Settled,
    /// What the queue said. Its words are in this error's, so that it is no source of it.
    pub error: E,
}
