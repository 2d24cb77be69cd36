//! Counters of a processor.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::delivery::KeyOrigin;
use crate::outcome::Outcome;

/// Maximum number of queues whose missing-id warning is remembered. For further queues each message logs one.
const MAX_WARNED: usize = 1_000;

/// Counters of a [`Processor`](crate::Processor) and its clones since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ProcessorStats {
    /// Deliveries whose work ran and whose result is stored.
    pub done: u64,
    /// Duplicates of a delivery with the same id.
    pub duplicates_by_id: u64,
    /// Duplicates of a delivery from the same position in its queue.
    pub duplicates_by_position: u64,
    /// Duplicates of a delivery with equal content, where neither has an id. **These may be distinct events**: the second
    /// payment of the same amount is dropped if the message does not distinguish it from the first.
    pub duplicates_by_digest: u64,
    /// Deliveries without an id, keyed by a digest of their content, whatever their outcome.
    /// [`require_ids`](crate::Processor::require_ids) rejects them.
    pub without_id: u64,
    /// Deliveries whose key was in progress.
    pub in_progress: u64,
    /// Failed attempts that are retried.
    pub failed: u64,
    /// Rejected deliveries, for any reason.
    pub rejected: u64,
    /// Deliveries rejected by the [`redelivery_timeout`](crate::Processor::redelivery_timeout). Part of `rejected`.
    pub redelivery_timeouts: u64,
    /// Attempts whose lease another holder took over.
    pub superseded: u64,
    /// Redeliveries because the store failed, was at its in-flight limit, or found the timestamp too far ahead.
    pub store_failed: u64,
    /// Deliveries processed without deduplication: see [`OnStoreFailure::FailOpen`](crate::OnStoreFailure).
    pub failed_open: u64,
    /// Answers that the queue did not take. Each also counts under its outcome.
    pub ack_failures: u64,
}

impl ProcessorStats {
    fn add(&mut self, outcome: &Outcome, origin: KeyOrigin, is_answered: bool) {
        let counter = match (outcome, origin) {
            (Outcome::Done, _) => &mut self.done,
            (Outcome::Duplicate(_), KeyOrigin::Id) => &mut self.duplicates_by_id,
            (Outcome::Duplicate(_), KeyOrigin::Position) => &mut self.duplicates_by_position,
            (Outcome::Duplicate(_), KeyOrigin::Digest) => &mut self.duplicates_by_digest,
            (Outcome::InProgress { .. }, _) => &mut self.in_progress,
            (Outcome::Failed { .. }, _) => &mut self.failed,
            (Outcome::Rejected { .. }, _) => &mut self.rejected,
            (Outcome::Superseded { .. }, _) => &mut self.superseded,
            (Outcome::StoreFailed { .. }, _) => &mut self.store_failed,
            (Outcome::FailedOpen { .. }, _) => &mut self.failed_open,
        };
        *counter += 1;
        self.without_id += u64::from(origin == KeyOrigin::Digest);
        self.redelivery_timeouts += u64::from(outcome.is_redelivery_timeout());
        self.ack_failures += u64::from(!is_answered);
    }
}

/// What the clones of a processor count together.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    stats: Mutex<ProcessorStats>,
    fail_open: AtomicU64,
    warned: Mutex<BTreeSet<String>>,
}

impl Counters {
    pub(crate) fn new() -> Self {
        #[cfg(feature = "metrics")]
        crate::metrics::describe();
        Self::default()
    }

    pub(crate) fn count(&self, outcome: &Outcome, origin: KeyOrigin, is_answered: bool) {
        self.stats.lock().add(outcome, origin, is_answered);
        #[cfg(feature = "metrics")]
        crate::metrics::count(outcome, origin, is_answered);
    }

    pub(crate) fn stats(&self) -> ProcessorStats {
        *self.stats.lock()
    }

    pub(crate) fn count_fail_open(&self) {
        self.fail_open.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn fail_open(&self) -> u64 {
        self.fail_open.load(Ordering::Relaxed)
    }

    /// Whether this is the first message without an id in `location`.
    pub(crate) fn is_first_without_id(&self, location: &str) -> bool {
        let mut warned = self.warned.lock();
        if warned.len() >= MAX_WARNED { !warned.contains(location) } else { warned.insert(location.to_owned()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_message_without_an_id_of_a_queue_is_warned_about() {
        let counters = Counters::default();
        let queues = ["header `id` of topic `a`", "header `id` of topic `b`", "header `id` of topic `a`"];
        assert_eq!(queues.map(|location| counters.is_first_without_id(location)), [true, true, false]);
    }
}
