//! The processor and its settings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{Engine, OnStoreFailure};

use crate::redeliveries::Redeliveries;
use crate::stats::{Counters, ProcessorStats};

const ATTEMPTS: u32 = 5;
const MIN_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(300);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
const REDELIVERY_TIMEOUT: Duration = Duration::from_secs(3_600);

/// Processes deliveries with deduplication: see [the crate](crate). Clones share one engine and their counters.
///
/// Run many calls of [`process`](Self::process) concurrently: they share syncs of a local store.
#[derive(Clone)]
pub struct Processor {
    pub(crate) engine: Arc<dyn Engine>,
    pub(crate) attempts: u32,
    pub(crate) min_backoff: Duration,
    pub(crate) max_backoff: Duration,
    pub(crate) max_retry_after: Duration,
    pub(crate) wait_limit: Duration,
    pub(crate) redelivery_timeout: Duration,
    pub(crate) require_ids: bool,
    pub(crate) on_store_failure: OnStoreFailure,
    pub(crate) redeliveries: Arc<Redeliveries>,
    pub(crate) counters: Arc<Counters>,
}

impl Processor {
    /// Defaults: 5 attempts, a backoff of 1 second to 5 minutes, a `max_retry_after` of 1 minute, no wait for concurrent
    /// holders, a redelivery timeout of 1 hour, ids not required, and [`OnStoreFailure::FailClosed`].
    #[must_use]
    pub fn new(engine: impl Into<Arc<dyn Engine>>) -> Self {
        Self {
            engine: engine.into(),
            attempts: ATTEMPTS,
            min_backoff: MIN_BACKOFF,
            max_backoff: MAX_BACKOFF,
            max_retry_after: MAX_RETRY_AFTER,
            wait_limit: Duration::ZERO,
            redelivery_timeout: REDELIVERY_TIMEOUT,
            require_ids: false,
            on_store_failure: OnStoreFailure::FailClosed,
            redeliveries: Arc::default(),
            counters: Arc::new(Counters::new()),
        }
    }

    /// The number of attempts before a delivery is rejected, at least 1. Every run of the work counts, including one that
    /// crashed the process or lost its lease.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// The backoff after the first failed attempt, and its maximum; each further failure doubles it. A store may shorten it
    /// to half of its window, so that it still counts the attempts.
    #[must_use]
    pub fn backoff(mut self, first: Duration, max: Duration) -> Self {
        (self.min_backoff, self.max_backoff) = (first, max);
        self
    }

    /// The longest redelivery delay for a key in progress, and the delay where no end is known: the key is held, or the
    /// store fails. Set it no longer than the queue can delay a message.
    #[must_use]
    pub fn max_retry_after(mut self, delay: Duration) -> Self {
        self.max_retry_after = delay;
        self
    }

    /// How long a delivery waits for a holder of its key in this process before it requests redelivery. With a wait, a
    /// concurrent duplicate is acknowledged as soon as the first delivery completes. The waiting delivery occupies its
    /// task.
    #[must_use]
    pub fn wait_limit(mut self, limit: Duration) -> Self {
        self.wait_limit = limit;
        self
    }

    /// How long a delivery may be redelivered without its work running: 1 hour by default. After that time, and after at
    /// least as many redeliveries as there are [`attempts`](Self::attempts), it is rejected with a
    /// [`RedeliveryTimeout`](crate::RedeliveryTimeout). Applies to keys in progress or held, to timestamps too far ahead,
    /// and to work that fails without the store (under [`OnStoreFailure::FailOpen`]), whose attempts the store does not
    /// count. [`Duration::MAX`] disables it. Set it longer than the work can take; otherwise duplicates of long work become
    /// dead letters.
    ///
    /// All clones count together, in memory: a restart resets the counts. At most 65,536 keys are counted at a time. A
    /// store that fails or is at its `in_flight_limit` does not count, because the fault is not the delivery's.
    #[must_use]
    pub fn redelivery_timeout(mut self, timeout: Duration) -> Self {
        self.redelivery_timeout = timeout;
        self
    }

    /// Rejects deliveries without an id, with a [`MissingId`](crate::MissingId) as the reason. By default such a delivery
    /// is keyed by a digest of its content ([`KeyOrigin::Digest`](crate::KeyOrigin::Digest)), so that two equal events
    /// count as one; the first one of each queue is logged as a warning.
    #[must_use]
    pub fn require_ids(mut self) -> Self {
        self.require_ids = true;
        self
    }

    /// The policy for a failing store.
    #[must_use]
    pub fn on_store_failure(mut self, policy: OnStoreFailure) -> Self {
        self.on_store_failure = policy;
        self
    }

    /// How many times this processor and its clones ran work or acknowledged without the store. Alert on it under
    /// [`OnStoreFailure::FailOpen`].
    #[must_use]
    pub fn fail_open_count(&self) -> u64 {
        self.counters.fail_open()
    }

    /// The counters of this processor and its clones. The feature `metrics` exports them to the `metrics` facade, summed
    /// over all processors of the process.
    #[must_use]
    pub fn stats(&self) -> ProcessorStats {
        self.counters.stats()
    }

    /// The engine of this processor.
    #[must_use]
    pub fn engine(&self) -> &Arc<dyn Engine> {
        &self.engine
    }

    /// The backoff after the attempt with this number.
    pub(crate) fn backoff_after(&self, attempt: u32) -> Duration {
        let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        self.min_backoff.saturating_mul(factor).min(self.max_backoff)
    }
}

impl fmt::Debug for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Processor")
            .field("attempts", &self.attempts)
            .field("on_store_failure", &self.on_store_failure)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use onlyonce_core::testing::MemoryStore;

    use super::*;

    #[test]
    fn the_backoff_doubles_up_to_its_maximum_for_any_number_of_attempts() {
        let processor = Processor::new(MemoryStore::new());
        let seconds = [1, 2, 3, 9, 10, 32, 33, u32::MAX].map(|attempt| processor.backoff_after(attempt).as_secs());
        assert_eq!(seconds, [1, 2, 4, 256, 300, 300, 300, 300]);
        let short = processor.backoff(Duration::from_nanos(1), Duration::MAX);
        assert!(short.backoff_after(40) > short.backoff_after(31));
    }
}
