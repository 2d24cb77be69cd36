//! One call that settles every case.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use super::figures::{Figures, ProcessorStats};
use super::message::{Delivery, KeyOrigin};
use super::returning::{Returned, Returning};
use super::settled::{GivenUp, NoId, Settled, Unsettled};
use super::work::{Failure, Job};
use crate::claim::{Claim, InProgress};
use crate::error::Error;
use crate::future::{Again, Lease, Store};
use crate::tx::Tx;

const ATTEMPTS: u32 = 5;
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MOST: Duration = Duration::from_secs(300);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
const GIVE_UP_AFTER: Duration = Duration::from_secs(3_600);

/// What becomes of a delivery when the store cannot answer for its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStoreFailure {
    /// It comes back after the longest wait. Nothing is done twice; nothing is done at all before the store is mended.
    #[default]
    FailClosed,
    /// Its work runs without a lease, and it is acknowledged. Nothing stops; **what is delivered twice is done twice**,
    /// at the same time even. Each such pass is logged as a warning and counted by [`Processor::unguarded`], and
    /// [`Job::is_guarded`] tells the work.
    ///
    /// Not where the store is only at its `in_flight_limit`, or the message too far ahead of stream time, which pass by
    /// themselves; and not where it fails while the work runs, which is cut off then. They come back.
    FailOpen,
}

/// Settles deliveries by what a store knows of their keys: see [the module](super). Clones share everything.
///
/// As many calls of [`process`](Self::process) as there are tasks share the store's syncs: run many.
#[derive(Debug, Clone)]
pub struct Processor {
    store: Store,
    attempts: u32,
    backoff_first: Duration,
    backoff_most: Duration,
    longest_wait: Duration,
    patience: Duration,
    give_up_after: Duration,
    require_ids: bool,
    on_store_failure: OnStoreFailure,
    unguarded: Arc<AtomicU64>,
    returning: Arc<Returning>,
    figures: Arc<Figures>,
}

impl Processor {
    /// Five attempts, a backoff of one second to five minutes, one minute as the longest wait, no patience, one hour until
    /// a delivery that only comes back is given up, no ids required, and [`OnStoreFailure::FailClosed`].
    #[must_use]
    pub fn new(store: Store) -> Self {
        Self {
            store,
            attempts: ATTEMPTS,
            backoff_first: BACKOFF_FIRST,
            backoff_most: BACKOFF_MOST,
            longest_wait: LONGEST_WAIT,
            patience: Duration::ZERO,
            give_up_after: GIVE_UP_AFTER,
            require_ids: false,
            on_store_failure: OnStoreFailure::FailClosed,
            unguarded: Arc::default(),
            returning: Arc::default(),
            figures: Arc::default(),
        }
    }

    /// After how many attempts a delivery is rejected, from 1. Every run of the work counts, also one that has died
    /// with its process or whose lease was lost.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// How long a delivery stays away after its first failed attempt, which is doubled with each further one, and the
    /// most that it comes to. It is at most half the store's window
    /// ([`Lease::release_after`](crate::Lease::release_after)), so that attempts are counted across it.
    #[must_use]
    pub fn backoff(mut self, first: Duration, most: Duration) -> Self {
        (self.backoff_first, self.backoff_most) = (first, most);
        self
    }

    /// The longest time for which a delivery is sent away when its key is in progress. So long, too, when nobody can
    /// say: the key is held, or the store fails. Not longer than the queue can keep a delivery back.
    #[must_use]
    pub fn longest_wait(mut self, wait: Duration) -> Self {
        self.longest_wait = wait;
        self
    }

    /// How long a delivery waits for a holder of its key in this process to be done, before it is sent away. Then a
    /// duplicate that comes at the same time is acknowledged as soon as the first one is done. It occupies its task
    /// meanwhile.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How long a delivery may come back without its work having run, one hour by default. Then, and when it was sent away
    /// at least as often as there are [`attempts`](Self::attempts), it is rejected with [`GivenUp`] as the reason. It applies
    /// to a key that is in progress or held, to a timestamp that is too far ahead, and to work that fails without the store
    /// (under [`OnStoreFailure::FailOpen`]), whose attempts the store does not count. [`Duration::MAX`] waits for ever. Work
    /// that may take longer needs a longer time, or its duplicates become dead letters.
    ///
    /// Counted in memory for each key, by all clones: a process that begins again counts again, and so does a key beyond
    /// 65,536 others. A store that fails, or is at its `in_flight_limit`, is not counted: its deliveries would all be
    /// rejected for one fault that is not theirs.
    #[must_use]
    pub fn give_up_after(mut self, time: Duration) -> Self {
        self.give_up_after = time;
        self
    }

    /// Rejects a delivery that has no id, with [`NoId`] as the reason. Without this it goes by a digest of its content
    /// ([`KeyOrigin::Digest`]), so that two equal events are taken for one; the first such delivery of a consumer is logged
    /// as a warning.
    #[must_use]
    pub fn require_ids(mut self) -> Self {
        self.require_ids = true;
        self
    }

    /// What to do when the store fails.
    #[must_use]
    pub fn on_store_failure(mut self, policy: OnStoreFailure) -> Self {
        self.on_store_failure = policy;
        self
    }

    /// How many times the store has failed and its answer was done without, by all clones: what to watch under
    /// [`OnStoreFailure::FailOpen`].
    #[must_use]
    pub fn unguarded(&self) -> u64 {
        self.unguarded.load(Ordering::Relaxed)
    }

    /// The figures of this processor and its clones. With the feature `metrics` the `metrics` facade has them as well, summed
    /// over all processors of a store.
    #[must_use]
    pub fn stats(&self) -> ProcessorStats {
        self.figures.stats()
    }

    /// The store it asks.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Does the work of a delivery unless it was done, and tells the queue what became of it: see [the table](super).
    ///
    /// The work gets the delivery, and a [`Job`] with the facts of its attempt. It has as long as it needs: its lease
    /// is renewed, also while it blocks its thread. Give it a time limit of its own, and make a timeout a
    /// [`Failure::unknown`]; [`Builder::renew_for`](crate::Builder::renew_for) bounds how long the key of work that never
    /// ends is in progress. Where the lease is lost, the work is dropped at its await.
    ///
    /// # Errors
    ///
    /// [`Unsettled`] if the queue did not take the answer. A failure of the work or of the store is no error here, but
    /// a kind of [`Settled`].
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime, or in one without time. A panic of the work is caught, and counts as a
    /// [`Failure::unknown`].
    pub async fn process<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Job) -> Result<R, Failure>,
    ) -> Result<Settled, Unsettled<D::Error>> {
        let origin = delivery.key_origin();
        let answer = self.answer(delivery, origin, work).await;
        let (settled, is_taken) = match &answer {
            Ok(settled) => (settled, true),
            Err(unsettled) => (&unsettled.settled, false),
        };
        self.figures.count(&self.store, settled, origin, is_taken);
        answer
    }

    async fn answer<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        origin: KeyOrigin,
        work: impl AsyncFnOnce(&D, &mut Job) -> Result<R, Failure>,
    ) -> Result<Settled, Unsettled<D::Error>> {
        if origin == KeyOrigin::Digest {
            let place = delivery.id_place();
            if self.require_ids {
                return self.refuse(delivery, NoId { place }).await;
            }
            self.warn_without_id(&place);
        }
        let claim = self.store.claim_delivered(delivery.key(), delivery.timestamp_ms(), self.patience).await;
        let lease = match claim {
            Ok(Claim::Acquired(lease)) => lease,
            Ok(Claim::Completed(first)) => {
                self.returning.forget(&delivery.key());
                return told(delivery.ack().await, Settled::Duplicate(first));
            }
            Ok(Claim::InProgress(other)) => return self.send_away(delivery, other).await,
            Err(error) => return self.unclaimed(delivery, work, error).await,
        };
        self.returning.forget(&delivery.key());
        if lease.attempt() > self.attempts {
            let attempts = lease.attempt().saturating_sub(1);
            return self.reject(delivery, lease, attempts, None).await;
        }
        self.work(delivery, lease, work).await
    }

    fn warn_without_id(&self, place: &str) {
        if self.figures.is_first_without_id(place) {
            tracing::warn!(
                expected = place,
                "a message has no id and goes by a digest of its content: two equal messages count as one. Further \
                 messages without an id are only counted"
            );
        }
    }

    /// The key is in progress, or held.
    async fn send_away<D: Delivery>(&self, delivery: D, other: InProgress) -> Result<Settled, Unsettled<D::Error>> {
        if let Some(Returned { returns, over }) = self.is_enough(&delivery) {
            let reason = match other.retry_after {
                Some(_) => format!("its key {} is still in progress (attempt {})", delivery.key(), other.attempt),
                None => format!("its key {} is held: resolve it, then deliver the message again", delivery.key()),
            };
            return self.refuse(delivery, GivenUp { returns, over, reason }).await;
        }
        let retry_after = other.retry_after.map_or(self.longest_wait, |rest| rest.min(self.longest_wait));
        told(delivery.retry_after(retry_after).await, Settled::InProgress { retry_after })
    }

    /// The timestamp is further ahead than one message may push stream time.
    async fn wait_for_time<D: Delivery>(&self, delivery: D, error: Error) -> Result<Settled, Unsettled<D::Error>> {
        match self.is_enough(&delivery) {
            Some(Returned { returns, over }) => {
                let reason = error.to_string();
                self.refuse(delivery, GivenUp { returns, over, reason }).await
            }
            None => self.lost(delivery, error).await,
        }
    }

    fn is_enough<D: Delivery>(&self, delivery: &D) -> Option<Returned> {
        self.returning.is_enough(&delivery.key(), self.attempts, self.give_up_after, Instant::now())
    }

    /// Rejects a delivery without an attempt.
    async fn refuse<D: Delivery>(
        &self,
        delivery: D,
        error: impl std::error::Error + Send + Sync + 'static,
    ) -> Result<Settled, Unsettled<D::Error>> {
        let why = error.to_string();
        tracing::warn!(why, "a delivery was rejected without an attempt");
        let rejected = delivery.reject(&why).await;
        told(rejected, Settled::Rejected { failure: Some(Failure::permanent(error)), attempts: 0 })
    }

    async fn work<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        mut lease: Lease,
        work: impl AsyncFnOnce(&D, &mut Job) -> Result<R, Failure>,
    ) -> Result<Settled, Unsettled<D::Error>> {
        let mut job = Job::of(&lease);
        let outcome = match lease.keep_alive().during(caught(async { work(&delivery, &mut job).await })).await {
            Ok(outcome) => outcome,
            Err(error) => return self.lost(delivery, error).await,
        };
        let failure = match outcome {
            Ok(result) => return self.complete(delivery, lease, result.into(), job.into_tx()).await,
            Err(failure) => failure,
        };
        let attempt = lease.attempt();
        if failure.is_permanent() || attempt >= self.attempts {
            return self.reject(delivery, lease, attempt, Some(failure)).await;
        }
        let retry_after = self.backoff_after(attempt);
        report(lease.fail(failure.is_unknown(), Again::Counted, retry_after).await);
        told(delivery.retry_after(retry_after).await, Settled::Failed { failure, attempt, retry_after })
    }

    async fn complete<D: Delivery>(
        &self,
        delivery: D,
        lease: Lease,
        result: Vec<u8>,
        tx: Tx,
    ) -> Result<Settled, Unsettled<D::Error>> {
        let takes_along = tx.len() > 0;
        let completed = if takes_along {
            lease.complete_with(result, |with| *with = tx).await
        } else {
            lease.complete(result).await
        };
        // A lease that is given back is dropped: the next attempt is told.
        let error = match completed {
            Ok(()) => return told(delivery.ack().await, Settled::Done),
            Err(failed) => failed.error().clone(),
        };
        let overtaken = matches!(error, Error::Superseded { .. });
        if self.on_store_failure == OnStoreFailure::FailOpen && !overtaken && !takes_along {
            self.count_unguarded(&error);
            return told(delivery.ack().await, Settled::Unguarded { error });
        }
        self.lost(delivery, error).await
    }

    /// The queue first: as long as it has not taken the rejection, the key remembers its attempts.
    async fn reject<D: Delivery>(
        &self,
        delivery: D,
        mut lease: Lease,
        attempts: u32,
        failure: Option<Failure>,
    ) -> Result<Settled, Unsettled<D::Error>> {
        let why = match &failure {
            Some(failure) => format!("attempt {attempts}: {failure}"),
            None => format!("attempt {attempts} did not come to an end"),
        };
        let in_doubt = failure.as_ref().is_some_and(Failure::is_unknown);
        // A queue may take its time over dead letters, and what the work has left of the lease may be little.
        let alive = lease.keep_alive();
        let rejected = delivery.reject(&why).await;
        drop(alive);
        let again = if rejected.is_ok() { Again::Anew } else { Again::Counted };
        report(lease.fail(in_doubt, again, Duration::ZERO).await);
        tracing::warn!(attempts, why, "a delivery was given up");
        told(rejected, Settled::Rejected { failure, attempts })
    }

    /// The lease is lost, or the result could not be stored under it.
    async fn lost<D: Delivery>(&self, delivery: D, error: Error) -> Result<Settled, Unsettled<D::Error>> {
        let retry_after = self.longest_wait;
        let settled = match error {
            Error::Superseded { .. } => Settled::Superseded { retry_after },
            error => Settled::StoreFailed { error, retry_after },
        };
        told(delivery.retry_after(retry_after).await, settled)
    }

    /// The key could not be claimed.
    async fn unclaimed<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Job) -> Result<R, Failure>,
        error: Error,
    ) -> Result<Settled, Unsettled<D::Error>> {
        match (&error, self.on_store_failure) {
            // It is the delivery that is at fault, and stays so.
            (
                Error::KeyEmpty { .. }
                | Error::KeyTooLong { .. }
                | Error::ScopeTooLong { .. }
                | Error::PayloadMismatch { .. }
                | Error::TimestampMissing
                | Error::TimestampUnit { .. }
                | Error::TooOld { .. },
                _,
            ) => self.refuse(delivery, error).await,
            (Error::TooFarAhead { .. }, _) => self.wait_for_time(delivery, error).await,
            (Error::TooManyInFlight { .. }, _) | (_, OnStoreFailure::FailClosed) => self.lost(delivery, error).await,
            (_, OnStoreFailure::FailOpen) => self.work_unguarded(delivery, work, error).await,
        }
    }

    async fn work_unguarded<D: Delivery, R: Into<Vec<u8>>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Job) -> Result<R, Failure>,
        error: Error,
    ) -> Result<Settled, Unsettled<D::Error>> {
        self.count_unguarded(&error);
        let mut job = Job::unguarded();
        match caught(async { work(&delivery, &mut job).await }).await {
            Ok(_) if job.into_tx().len() > 0 => self.lost(delivery, error).await,
            Ok(_) => told(delivery.ack().await, Settled::Unguarded { error }),
            Err(failure) if failure.is_permanent() => {
                let rejected = delivery.reject(&failure.to_string()).await;
                told(rejected, Settled::Rejected { failure: Some(failure), attempts: 1 })
            }
            // The store counts no attempts now.
            Err(failure) => match self.is_enough(&delivery) {
                Some(Returned { returns, over }) => {
                    let reason = failure.to_string();
                    self.refuse(delivery, GivenUp { returns, over, reason }).await
                }
                None => {
                    let retry_after = self.backoff_first;
                    let failed = Settled::Failed { failure, attempt: 1, retry_after };
                    told(delivery.retry_after(retry_after).await, failed)
                }
            },
        }
    }

    fn count_unguarded(&self, error: &Error) {
        self.unguarded.fetch_add(1, Ordering::Relaxed);
        self.store.count_fail_open();
        tracing::warn!(%error, "the store failed, and work goes on without it: what is delivered twice is done twice");
    }

    fn backoff_after(&self, attempt: u32) -> Duration {
        let factor = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        self.backoff_first.saturating_mul(factor).min(self.backoff_most)
    }
}

fn told<E>(answer: Result<(), E>, settled: Settled) -> Result<Settled, Unsettled<E>> {
    match answer {
        Ok(()) => Ok(settled),
        Err(error) => Err(Unsettled { settled, error }),
    }
}

/// Nothing is lost when a key is not let go: its lease is dropped, or was taken over.
fn report(let_go: crate::error::Result<()>) {
    if let Err(error) = let_go {
        tracing::warn!(%error, "the key of a failed delivery could not be let go");
    }
}

/// The work, with its panics as failures. What it shares with others it may leave half done, as with any panic of a
/// task.
async fn caught<R>(work: impl Future<Output = Result<R, Failure>>) -> Result<R, Failure> {
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
    fn a_backoff_doubles_up_to_its_most_however_many_attempts_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::Store::builder().memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
        let processor = Processor::new(Store::new(store).unwrap());
        let seconds = [1, 2, 3, 9, 10, 32, 33, u32::MAX].map(|attempt| processor.backoff_after(attempt).as_secs());
        assert_eq!(seconds, [1, 2, 4, 256, 300, 300, 300, 300]);
        let short = processor.backoff(Duration::from_nanos(1), Duration::MAX);
        assert!(short.backoff_after(40) > short.backoff_after(31));
    }
}
