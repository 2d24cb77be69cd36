//! The processor: deduplicates a delivery, runs its work and answers its queue.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::attempt::Attempt;
use super::failure::Failure;
use super::message::{Delivery, KeyOrigin};
use super::outcome::{AckError, MissingId, Outcome, RedeliveryTimeout};
use super::redeliveries::{Exceeded, Redeliveries};
use super::stats::{Counters, ProcessorStats};
use crate::claim::{Claim, InProgress};
use crate::error::Error;
use crate::future::{Again, Lease, Store};
use crate::tx::Tx;

const ATTEMPTS: u32 = 5;
const MIN_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_secs(300);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
const REDELIVERY_TIMEOUT: Duration = Duration::from_secs(3_600);

/// What happens to a delivery when the store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnStoreFailure {
    /// Redelivery after the [`max_retry_after`](Processor::max_retry_after). No work runs twice, and none runs before the
    /// store works again.
    #[default]
    FailClosed,
    /// The work runs without a lease, and the delivery is acknowledged. **Duplicates run again**, even concurrently. Each
    /// run is logged as a warning and counted by [`Processor::fail_open_count`]; [`Attempt::has_lease`] reports it to the
    /// work.
    ///
    /// Does not apply at the `in_flight_limit` and to timestamps too far ahead of stream time, which are temporary, and if
    /// the store fails during the work, which stops then. These are redelivered.
    FailOpen,
}

/// Processes deliveries with deduplication: see [the module](super). Clones share one store and its counters.
///
/// Concurrent calls of [`process`](Self::process) share syncs of the store: run many.
#[derive(Debug, Clone)]
pub struct Processor {
    store: Store,
    attempts: u32,
    min_backoff: Duration,
    max_backoff: Duration,
    max_retry_after: Duration,
    wait_limit: Duration,
    redelivery_timeout: Duration,
    require_ids: bool,
    on_store_failure: OnStoreFailure,
    fail_open_count: Arc<AtomicU64>,
    redeliveries: Arc<Redeliveries>,
    counters: Arc<Counters>,
}

impl Processor {
    /// Defaults: 5 attempts, a backoff of 1 second to 5 minutes, a `max_retry_after` of 1 minute, no wait for concurrent
    /// holders, a redelivery timeout of 1 hour, ids not required, and [`OnStoreFailure::FailClosed`].
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self {
            store,
            attempts: ATTEMPTS,
            min_backoff: MIN_BACKOFF,
            max_backoff: MAX_BACKOFF,
            max_retry_after: MAX_RETRY_AFTER,
            wait_limit: Duration::ZERO,
            redelivery_timeout: REDELIVERY_TIMEOUT,
            require_ids: false,
            on_store_failure: OnStoreFailure::FailClosed,
            fail_open_count: Arc::default(),
            redeliveries: Arc::default(),
            counters: Arc::default(),
        }
    }

    /// The number of attempts before a delivery is rejected, at least 1. Every run of the work counts, including one that
    /// crashed the process or lost its lease.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// The backoff after the first failed attempt, and its maximum; each further failure doubles it. The store limits it to
    /// half of its window ([`Lease::release_after`](crate::Lease::release_after)), so that it still counts the attempts.
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
    /// concurrent duplicate is acknowledged as soon as the first delivery completes. The waiting delivery occupies its task.
    #[must_use]
    pub fn wait_limit(mut self, limit: Duration) -> Self {
        self.wait_limit = limit;
        self
    }

    /// How long a delivery may be redelivered without its work running: 1 hour by default. After that time, and after at
    /// least as many redeliveries as there are [`attempts`](Self::attempts), it is rejected with a [`RedeliveryTimeout`]. Applies to keys
    /// in progress or held, to timestamps too far ahead, and to work that fails without the store (under
    /// [`OnStoreFailure::FailOpen`]), whose attempts the store does not count. [`Duration::MAX`] disables it. Set it longer
    /// than the work can take; otherwise duplicates of long work become dead letters.
    ///
    /// All clones count together, in memory: a restart resets the counts. At most 65,536 keys are counted at a time. A
    /// store that fails or is at its `in_flight_limit` does not count, because the fault is not the delivery's.
    #[must_use]
    pub fn redelivery_timeout(mut self, timeout: Duration) -> Self {
        self.redelivery_timeout = timeout;
        self
    }

    /// Rejects deliveries without an id, with a [`MissingId`] as the reason. By default such a delivery is keyed by a digest of
    /// its content ([`KeyOrigin::Digest`]), so that two equal events count as one; the first one of each queue is logged as
    /// a warning.
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
        self.fail_open_count.load(Ordering::Relaxed)
    }

    /// The counters of this processor and its clones. The feature `metrics` exports them to the `metrics` facade, summed over
    /// all processors of a store.
    #[must_use]
    pub fn stats(&self) -> ProcessorStats {
        self.counters.stats()
    }

    /// The store of this processor.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Runs the work of a delivery unless it is done already, and answers the queue: see [the table](super).
    ///
    /// The work gets the delivery and its [`Attempt`]. It has no time limit: its lease is renewed, even while the work blocks
    /// its thread. Add a timeout of your own and turn it into a [`Failure::unknown`].
    /// [`Builder::renew_for`](crate::Builder::renew_for) limits how long work that never ends keeps its key in progress. If
    /// the lease is lost, the work is dropped at its current await.
    ///
    /// # Errors
    ///
    /// [`AckError`] if the queue did not take the answer. Failures of the work and of the store are an [`Outcome`], not an
    /// error.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime, or in one without a timer. A panic of the work is caught and counts as a
    /// [`Failure::unknown`].
    pub async fn process<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
    ) -> Result<Outcome, AckError<D::Error>> {
        let origin = delivery.key_origin();
        let answered = self.process_uncounted(delivery, origin, work).await;
        let (outcome, is_answered) = match &answered {
            Ok(outcome) => (outcome, true),
            Err(error) => (&error.outcome, false),
        };
        self.counters.count(&self.store, outcome, origin, is_answered);
        answered
    }

    async fn process_uncounted<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        origin: KeyOrigin,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
    ) -> Result<Outcome, AckError<D::Error>> {
        if origin == KeyOrigin::Digest {
            let location = delivery.id_location();
            if self.require_ids {
                return self.reject_without_attempt(delivery, MissingId { location }).await;
            }
            self.warn_without_id(&location);
        }
        let claim = self.store.claim_delivered(delivery.key(), delivery.timestamp_ms(), self.wait_limit).await;
        let lease = match claim {
            Ok(Claim::Acquired(lease)) => lease,
            Ok(Claim::Completed(first)) => {
                self.redeliveries.reset(&delivery.key());
                return answered(delivery.ack().await, Outcome::Duplicate(first));
            }
            Ok(Claim::InProgress(other)) => return self.retry_in_progress(delivery, other).await,
            Err(error) => return self.claim_failed(delivery, work, error).await,
        };
        self.redeliveries.reset(&delivery.key());
        if lease.attempt() > self.attempts {
            let attempts = lease.attempt().saturating_sub(1);
            return self.reject(delivery, lease, attempts, None).await;
        }
        self.run(delivery, lease, work).await
    }

    fn warn_without_id(&self, location: &str) {
        if self.counters.is_first_without_id(location) {
            tracing::warn!(
                expected = location,
                "message without an id: keyed by a digest of its content, so equal messages count as one; further ones \
                 are counted in without_id and not logged"
            );
        }
    }

    /// The key is in progress or held.
    async fn retry_in_progress<D: Delivery>(
        &self,
        delivery: D,
        other: InProgress,
    ) -> Result<Outcome, AckError<D::Error>> {
        if let Some(Exceeded { redeliveries, elapsed }) = self.count_redelivery(&delivery) {
            let reason = match other.retry_after {
                Some(_) => format!("key {} is still in progress (attempt {})", delivery.key(), other.attempt),
                None => format!("key {} is held for resolution: resolve it, then redrive the message", delivery.key()),
            };
            let error = RedeliveryTimeout { redeliveries, elapsed, reason };
            return self.reject_without_attempt(delivery, error).await;
        }
        let retry_after = other.retry_after.map_or(self.max_retry_after, |rest| rest.min(self.max_retry_after));
        answered(delivery.retry_after(retry_after).await, Outcome::InProgress { retry_after })
    }

    /// The timestamp is further ahead than one message may advance stream time.
    async fn retry_too_far_ahead<D: Delivery>(&self, delivery: D, error: Error) -> Result<Outcome, AckError<D::Error>> {
        match self.count_redelivery(&delivery) {
            Some(Exceeded { redeliveries, elapsed }) => {
                let reason = error.to_string();
                self.reject_without_attempt(delivery, RedeliveryTimeout { redeliveries, elapsed, reason }).await
            }
            None => self.retry_after_error(delivery, error).await,
        }
    }

    fn count_redelivery<D: Delivery>(&self, delivery: &D) -> Option<Exceeded> {
        self.redeliveries.count(&delivery.key(), self.attempts, self.redelivery_timeout, Instant::now())
    }

    async fn reject_without_attempt<D: Delivery>(
        &self,
        delivery: D,
        error: impl std::error::Error + Send + Sync + 'static,
    ) -> Result<Outcome, AckError<D::Error>> {
        let reason = error.to_string();
        tracing::warn!(reason, "delivery rejected without an attempt");
        let rejected = delivery.reject(&reason).await;
        answered(rejected, Outcome::Rejected { failure: Some(Failure::permanent(error)), attempts: 0 })
    }

    async fn run<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        mut lease: Lease,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
    ) -> Result<Outcome, AckError<D::Error>> {
        let mut attempt = Attempt::of(&lease);
        let run = catch_panics(async { work(&delivery, &mut attempt).await });
        let result = match lease.keep_alive().during(run).await {
            Ok(result) => result,
            Err(error) => return self.retry_after_error(delivery, error).await,
        };
        let failure = match result {
            Ok(result) => return self.complete(delivery, lease, result.into(), attempt.into_side_writes()).await,
            Err(failure) => failure,
        };
        let number = lease.attempt();
        if failure.is_permanent() || number >= self.attempts {
            return self.reject(delivery, lease, number, Some(failure)).await;
        }
        let retry_after = self.backoff_after(number);
        log_release(lease.fail(failure.is_unknown(), Again::Counted, retry_after).await);
        answered(delivery.retry_after(retry_after).await, Outcome::Failed { failure, attempt: number, retry_after })
    }

    async fn complete<D: Delivery>(
        &self,
        delivery: D,
        lease: Lease,
        result: Vec<u8>,
        side_writes: Tx,
    ) -> Result<Outcome, AckError<D::Error>> {
        let has_side_writes = side_writes.len() > 0;
        let completed = if has_side_writes {
            lease.complete_with(result, |writes| *writes = side_writes).await
        } else {
            lease.complete(result).await
        };
        // Dropping the error drops its lease: the next attempt reports `may_have_happened`.
        let error = match completed {
            Ok(()) => return answered(delivery.ack().await, Outcome::Done),
            Err(failed) => failed.error().clone(),
        };
        let superseded = matches!(error, Error::Superseded { .. });
        if self.on_store_failure == OnStoreFailure::FailOpen && !superseded && !has_side_writes {
            self.count_fail_open(&error);
            return answered(delivery.ack().await, Outcome::FailedOpen { error });
        }
        self.retry_after_error(delivery, error).await
    }

    /// Rejects in the queue first: until the queue has taken the rejection, the key keeps its attempts.
    async fn reject<D: Delivery>(
        &self,
        delivery: D,
        mut lease: Lease,
        attempts: u32,
        failure: Option<Failure>,
    ) -> Result<Outcome, AckError<D::Error>> {
        let reason = match &failure {
            Some(failure) => format!("attempt {attempts}: {failure}"),
            None => format!("attempt {attempts} crashed or was interrupted"),
        };
        let is_unknown = failure.as_ref().is_some_and(Failure::is_unknown);
        // The rejection may take longer than the rest of the lease.
        let alive = lease.keep_alive();
        let rejected = delivery.reject(&reason).await;
        drop(alive);
        let again = if rejected.is_ok() { Again::Anew } else { Again::Counted };
        log_release(lease.fail(is_unknown, again, Duration::ZERO).await);
        tracing::warn!(attempts, reason, "delivery rejected after its last attempt");
        answered(rejected, Outcome::Rejected { failure, attempts })
    }

    /// Requests redelivery because the lease is lost or the store failed.
    async fn retry_after_error<D: Delivery>(&self, delivery: D, error: Error) -> Result<Outcome, AckError<D::Error>> {
        let retry_after = self.max_retry_after;
        let outcome = match error {
            Error::Superseded { .. } => Outcome::Superseded { retry_after },
            error => Outcome::StoreFailed { error, retry_after },
        };
        answered(delivery.retry_after(retry_after).await, outcome)
    }

    async fn claim_failed<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
        error: Error,
    ) -> Result<Outcome, AckError<D::Error>> {
        match (&error, self.on_store_failure) {
            // The delivery itself is invalid: a retry cannot succeed.
            (
                Error::KeyEmpty { .. }
                | Error::KeyTooLong { .. }
                | Error::ScopeTooLong { .. }
                | Error::PayloadMismatch { .. }
                | Error::TimestampMissing
                | Error::TimestampUnit { .. }
                | Error::TooOld { .. },
                _,
            ) => self.reject_without_attempt(delivery, error).await,
            (Error::TooFarAhead { .. }, _) => self.retry_too_far_ahead(delivery, error).await,
            (Error::TooManyInFlight { .. }, _) | (_, OnStoreFailure::FailClosed) => {
                self.retry_after_error(delivery, error).await
            }
            (_, OnStoreFailure::FailOpen) => self.run_without_lease(delivery, work, error).await,
        }
    }

    async fn run_without_lease<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
        error: Error,
    ) -> Result<Outcome, AckError<D::Error>> {
        self.count_fail_open(&error);
        let mut attempt = Attempt::without_lease();
        match catch_panics(async { work(&delivery, &mut attempt).await }).await {
            Ok(_) if attempt.into_side_writes().len() > 0 => self.retry_after_error(delivery, error).await,
            Ok(_) => answered(delivery.ack().await, Outcome::FailedOpen { error }),
            Err(failure) if failure.is_permanent() => {
                let rejected = delivery.reject(&failure.to_string()).await;
                answered(rejected, Outcome::Rejected { failure: Some(failure), attempts: 1 })
            }
            // The failed store counts no attempts; the redelivery timeout limits them.
            Err(failure) => match self.count_redelivery(&delivery) {
                Some(Exceeded { redeliveries, elapsed }) => {
                    let reason = failure.to_string();
                    self.reject_without_attempt(delivery, RedeliveryTimeout { redeliveries, elapsed, reason }).await
                }
                None => {
                    let retry_after = self.min_backoff;
                    let failed = Outcome::Failed { failure, attempt: 1, retry_after };
                    answered(delivery.retry_after(retry_after).await, failed)
                }
            },
        }
    }

    fn count_fail_open(&self, error: &Error) {
        self.fail_open_count.fetch_add(1, Ordering::Relaxed);
        self.store.count_fail_open();
        tracing::warn!(%error, "store unavailable, processing without deduplication (fail-open)");
    }

    fn backoff_after(&self, attempt: u32) -> Duration {
        let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        self.min_backoff.saturating_mul(factor).min(self.max_backoff)
    }
}

fn answered<E>(answer: Result<(), E>, outcome: Outcome) -> Result<Outcome, AckError<E>> {
    match answer {
        Ok(()) => Ok(outcome),
        Err(error) => Err(AckError { outcome, error }),
    }
}

/// A failed release loses nothing: the lease is dropped, or another holder took it over.
fn log_release(released: crate::error::Result<()>) {
    if let Err(error) = released {
        tracing::warn!(%error, "failed to release the lease of a failed delivery");
    }
}

/// Converts panics of the work to failures. As after any panic of a task, state that the work shares may be inconsistent.
async fn catch_panics<R>(work: impl Future<Output = Result<R, Failure>>) -> Result<R, Failure> {
    let mut work = pin!(work);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
        Ok(poll) => poll,
        Err(payload) => Poll::Ready(Err(Failure::panicked(&*payload))),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backoff_doubles_up_to_its_maximum_for_any_number_of_attempts() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
        let processor = Processor::new(Store::new(store).unwrap());
        let seconds = [1, 2, 3, 9, 10, 32, 33, u32::MAX].map(|attempt| processor.backoff_after(attempt).as_secs());
        assert_eq!(seconds, [1, 2, 4, 256, 300, 300, 300, 300]);
        let short = processor.backoff(Duration::from_nanos(1), Duration::MAX);
        assert!(short.backoff_after(40) > short.backoff_after(31));
    }
}
