//! Counters of a processor.

use std::collections::BTreeSet;

use parking_lot::Mutex;

use super::message::KeyOrigin;
use super::outcome::Outcome;
use crate::future::Store;
use crate::stats::DeliveryCounters;

/// Maximum number of queues whose missing-id warning is remembered. For further queues each message logs one.
const MAX_WARNED: usize = 1_000;

/// Counters of a [`Processor`](super::Processor) and its clones since it was made.
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
    /// [`require_ids`](super::Processor::require_ids) rejects them.
    pub without_id: u64,
    /// Deliveries whose key was in progress.
    pub in_progress: u64,
    /// Failed attempts that are retried.
    pub failed: u64,
    /// Rejected deliveries, for any reason.
    pub rejected: u64,
    /// Deliveries rejected by the [`redelivery_timeout`](super::Processor::redelivery_timeout). Part of `rejected`.
    pub redelivery_timeouts: u64,
    /// Attempts whose lease another holder took over.
    pub superseded: u64,
    /// Redeliveries because the store failed, was at its in-flight limit, or found the timestamp too far ahead.
    pub store_failed: u64,
    /// Deliveries processed without deduplication: see [`OnStoreFailure::FailOpen`](super::OnStoreFailure).
    pub failed_open: u64,
    /// Answers that the queue did not take. Each also counts under its outcome.
    pub ack_errors: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    counters: DeliveryCounters,
    warned: Mutex<BTreeSet<String>>,
}

impl Counters {
    /// Counts an outcome here and in the counters of the store.
    pub(super) fn count(&self, store: &Store, outcome: &Outcome, origin: KeyOrigin, is_answered: bool) {
        for counters in [&self.counters, store.delivery_counters()] {
            let counter = match (outcome, origin) {
                (Outcome::Done, _) => &counters.done,
                (Outcome::Duplicate(_), KeyOrigin::Id) => &counters.duplicates_by_id,
                (Outcome::Duplicate(_), KeyOrigin::Position) => &counters.duplicates_by_position,
                (Outcome::Duplicate(_), KeyOrigin::Digest) => &counters.duplicates_by_digest,
                (Outcome::InProgress { .. }, _) => &counters.in_progress,
                (Outcome::Failed { .. }, _) => &counters.failed,
                (Outcome::Rejected { .. }, _) => &counters.rejected,
                (Outcome::Superseded { .. }, _) => &counters.superseded,
                (Outcome::StoreFailed { .. }, _) => &counters.store_failed,
                (Outcome::FailedOpen { .. }, _) => &counters.unguarded,
            };
            counter.add(1);
            counters.without_id.add(u64::from(origin == KeyOrigin::Digest));
            counters.given_up.add(u64::from(outcome.is_redelivery_timeout()));
            counters.unsettled.add(u64::from(!is_answered));
        }
    }

    /// Whether this is the first message without an id in `location`.
    pub(super) fn is_first_without_id(&self, location: &str) -> bool {
        let mut warned = self.warned.lock();
        if warned.len() >= MAX_WARNED { !warned.contains(location) } else { warned.insert(location.to_owned()) }
    }

    pub(super) fn stats(&self) -> ProcessorStats {
        let DeliveryCounters {
            done,
            duplicates_by_id,
            duplicates_by_position,
            duplicates_by_digest,
            without_id,
            in_progress,
            failed,
            rejected,
            given_up,
            superseded,
            store_failed,
            unguarded,
            unsettled,
        } = &self.counters;
        ProcessorStats {
            done: done.get(),
            duplicates_by_id: duplicates_by_id.get(),
            duplicates_by_position: duplicates_by_position.get(),
            duplicates_by_digest: duplicates_by_digest.get(),
            without_id: without_id.get(),
            in_progress: in_progress.get(),
            failed: failed.get(),
            rejected: rejected.get(),
            redelivery_timeouts: given_up.get(),
            superseded: superseded.get(),
            store_failed: store_failed.get(),
            failed_open: unguarded.get(),
            ack_errors: unsettled.get(),
        }
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
