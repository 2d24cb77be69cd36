//! What a processor counts, and the warning about messages without ids.

use std::collections::BTreeSet;

use parking_lot::Mutex;

use super::message::KeyOrigin;
use super::settled::Settled;
use crate::future::Store;
use crate::stats::DeliveryCounters;

/// Consumers that were warned about and are remembered. Further ones are warned about each time.
const WARNED_MOST: usize = 1_000;

/// What a [`Processor`](super::Processor) and its clones have done with deliveries since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ProcessorStats {
    /// Deliveries whose work was done and is stored.
    pub done: u64,
    /// Duplicates of a delivery with the same id.
    pub duplicates_by_id: u64,
    /// Duplicates of a delivery from the same position in its queue.
    pub duplicates_by_position: u64,
    /// Duplicates of a delivery with the same content, where neither has an id. **Two equal events that are two are among
    /// these**: the second payment of the same amount is dropped if nothing in the message tells it from the first.
    pub duplicates_by_digest: u64,
    /// Deliveries that go by a digest of their content because they have no id, whatever their outcome.
    /// [`require_ids`](super::Processor::require_ids) rejects them.
    pub without_id: u64,
    /// Deliveries whose key was in progress, and that come back.
    pub in_progress: u64,
    /// Attempts that failed, and whose delivery comes back.
    pub failed: u64,
    /// Rejected deliveries, for whatever reason.
    pub rejected: u64,
    /// Of those, deliveries that came back for too long without their work having run: see
    /// [`give_up_after`](super::Processor::give_up_after).
    pub given_up: u64,
    /// Attempts whose lease was taken over.
    pub superseded: u64,
    /// Deliveries that come back because the store failed, was at its limit, or found their timestamp too far ahead.
    pub store_failed: u64,
    /// Deliveries whose work ran without the store: see [`OnStoreFailure::FailOpen`](super::OnStoreFailure).
    pub unguarded: u64,
    /// Answers that the queue did not take. Each also counts as what it was.
    pub unsettled: u64,
}

#[derive(Debug, Default)]
pub(super) struct Figures {
    counters: DeliveryCounters,
    warned: Mutex<BTreeSet<String>>,
}

impl Figures {
    /// Counts an answer, here and among the figures of the store.
    pub(super) fn count(&self, store: &Store, settled: &Settled, origin: KeyOrigin, is_taken: bool) {
        for counters in [&self.counters, store.delivery_counters()] {
            let counter = match (settled, origin) {
                (Settled::Done, _) => &counters.done,
                (Settled::Duplicate(_), KeyOrigin::Id) => &counters.duplicates_by_id,
                (Settled::Duplicate(_), KeyOrigin::Position) => &counters.duplicates_by_position,
                (Settled::Duplicate(_), KeyOrigin::Digest) => &counters.duplicates_by_digest,
                (Settled::InProgress { .. }, _) => &counters.in_progress,
                (Settled::Failed { .. }, _) => &counters.failed,
                (Settled::Rejected { .. }, _) => &counters.rejected,
                (Settled::Superseded { .. }, _) => &counters.superseded,
                (Settled::StoreFailed { .. }, _) => &counters.store_failed,
                (Settled::Unguarded { .. }, _) => &counters.unguarded,
            };
            counter.add(1);
            counters.without_id.add(u64::from(origin == KeyOrigin::Digest));
            counters.given_up.add(u64::from(settled.is_given_up()));
            counters.unsettled.add(u64::from(!is_taken));
        }
    }

    /// Whether this is the first message without an id from there.
    pub(super) fn is_first_without_id(&self, place: &str) -> bool {
        let mut warned = self.warned.lock();
        if warned.len() >= WARNED_MOST { !warned.contains(place) } else { warned.insert(place.to_owned()) }
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
            given_up: given_up.get(),
            superseded: superseded.get(),
            store_failed: store_failed.get(),
            unguarded: unguarded.get(),
            unsettled: unsettled.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_is_warned_about_once() {
        let figures = Figures::default();
        let warned = ["header `id` of topic `a`", "header `id` of topic `b`", "header `id` of topic `a`"];
        assert_eq!(warned.map(|place| figures.is_first_without_id(place)), [true, true, false]);
    }
}
