//! The processing of a delivery: claims its key, runs its work, stores the result and answers the queue.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;
use std::time::Instant;

use onlyonce_core::{
    Claim, Completion, EngineLease, Error, InProgress, OnStoreFailure, Release, TimestampError, likely_unit,
};

use crate::attempt::Attempt;
use crate::delivery::{Delivery, KeyOrigin};
use crate::failure::Failure;
use crate::outcome::{AckError, MissingId, Outcome, RedeliveryTimeout};
use crate::processor::Processor;
use crate::redeliveries::Exceeded;

impl Processor {
    /// Runs the work of a delivery unless it is done already, and answers the queue: see [the table](crate).
    ///
    /// The work gets the delivery and its [`Attempt`], and returns its result: bytes, text, or a [`Completion`]. It has no
    /// time limit: the engine renews its lease, up to a limit of its own. Add a timeout and turn it into a
    /// [`Failure::unknown`]. If the lease is lost, the work is dropped at its current await.
    ///
    /// # Errors
    ///
    /// [`AckError`] if the queue did not take the answer. Failures of the work and of the store are an [`Outcome`], not an
    /// error.
    ///
    /// # Panics
    ///
    /// Where the engine does, such as outside of a Tokio runtime. A panic of the work is caught and counts as a
    /// [`Failure::unknown`].
    pub async fn process<D: Delivery, R: Into<Completion>>(
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
        self.counters.count(outcome, origin, is_answered);
        answered
    }

    async fn process_uncounted<D: Delivery, R: Into<Completion>>(
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
        let lease = match self.claim(&delivery).await {
            Ok(Claim::Acquired(lease)) => lease,
            Ok(Claim::Completed(first)) => {
                self.redeliveries.reset(&delivery.key());
                return answered(delivery.ack().await, Outcome::Duplicate(first));
            }
            Ok(Claim::InProgress(other)) => return self.retry_in_progress(delivery, other).await,
            Err(error) => return self.claim_failed(delivery, work, error).await,
        };
        self.redeliveries.reset(&delivery.key());
        if lease.attempt().number() > self.attempts {
            let attempts = lease.attempt().number().saturating_sub(1);
            return self.reject(delivery, lease, attempts, None).await;
        }
        self.run(delivery, lease, work).await
    }

    async fn claim<D: Delivery>(&self, delivery: &D) -> Result<Claim<EngineLease>, Error> {
        let mut key = delivery.key().into_owned();
        if self.engine.limits().is_stream_time
            && let Some(at) = key.timestamp().or_else(|| delivery.timestamp())
        {
            if let Some(unit) = likely_unit(at) {
                return Err(TimestampError::WrongUnit { key: key.to_string(), at, unit }.into());
            }
            key = key.at(at);
        }
        EngineLease::claim(&self.engine, key, self.wait_limit).await
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

    async fn run<D: Delivery, R: Into<Completion>>(
        &self,
        delivery: D,
        mut lease: EngineLease,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
    ) -> Result<Outcome, AckError<D::Error>> {
        let mut attempt = Attempt::new(lease.attempt());
        let run = catch_panics(async { work(&delivery, &mut attempt).await });
        let result = match lease.during(run).await {
            Ok(result) => result,
            Err(error) => return self.retry_after_error(delivery, error).await,
        };
        let failure = match result {
            Ok(result) => return self.complete(delivery, lease, with_side_writes(result, attempt)).await,
            Err(failure) => failure,
        };
        let number = lease.attempt().number();
        if failure.is_permanent() || number >= self.attempts {
            return self.reject(delivery, lease, number, Some(failure)).await;
        }
        let retry_after = self.backoff_after(number);
        let mut release = Release::after(retry_after);
        release.may_have_happened = failure.is_unknown();
        log_release(lease.release(release).await);
        answered(delivery.retry_after(retry_after).await, Outcome::Failed { failure, attempt: number, retry_after })
    }

    async fn complete<D: Delivery>(
        &self,
        delivery: D,
        lease: EngineLease,
        completion: Completion,
    ) -> Result<Outcome, AckError<D::Error>> {
        let has_side_writes = has_side_writes(&completion);
        // After an error the lease is dropped: the next attempt reports `may_have_happened`.
        let error = match lease.complete(completion).await {
            Ok(()) => return answered(delivery.ack().await, Outcome::Done),
            Err(error) => error,
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
        mut lease: EngineLease,
        attempts: u32,
        failure: Option<Failure>,
    ) -> Result<Outcome, AckError<D::Error>> {
        let reason = match &failure {
            Some(failure) => format!("attempt {attempts}: {}", failure.reason()),
            None => format!("attempt {attempts} crashed or was interrupted"),
        };
        let is_unknown = failure.as_ref().is_some_and(Failure::is_unknown);
        // The rejection may take longer than the rest of the lease. A lost lease does not stop it.
        let mut rejection = pin!(delivery.reject(&reason));
        let rejected = match lease.during(rejection.as_mut()).await {
            Ok(rejected) => rejected,
            Err(_) => rejection.await,
        };
        let mut release = Release::default();
        release.may_have_happened = is_unknown;
        release.reset_attempts = rejected.is_ok();
        log_release(lease.release(release).await);
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

    async fn claim_failed<D: Delivery, R: Into<Completion>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
        error: Error,
    ) -> Result<Outcome, AckError<D::Error>> {
        match (&error, self.on_store_failure) {
            // The delivery itself is invalid: a retry cannot succeed.
            (
                Error::Key(_)
                | Error::PayloadMismatch { .. }
                | Error::Timestamp(
                    TimestampError::Missing | TimestampError::WrongUnit { .. } | TimestampError::TooOld { .. },
                ),
                _,
            ) => self.reject_without_attempt(delivery, error).await,
            (Error::Timestamp(TimestampError::TooFarAhead { .. }), _) => {
                self.retry_too_far_ahead(delivery, error).await
            }
            (Error::Timestamp(_) | Error::TooManyInFlight { .. }, _) | (_, OnStoreFailure::FailClosed) => {
                self.retry_after_error(delivery, error).await
            }
            (_, OnStoreFailure::FailOpen) => self.run_without_lease(delivery, work, error).await,
        }
    }

    async fn run_without_lease<D: Delivery, R: Into<Completion>>(
        &self,
        delivery: D,
        work: impl AsyncFnOnce(&D, &mut Attempt) -> Result<R, Failure>,
        error: Error,
    ) -> Result<Outcome, AckError<D::Error>> {
        self.count_fail_open(&error);
        let mut attempt = Attempt::without_lease();
        let result = catch_panics(async { work(&delivery, &mut attempt).await }).await;
        match result.map(|result| with_side_writes(result, attempt)) {
            // Dropping the side writes would lose messages.
            Ok(completion) if has_side_writes(&completion) => self.retry_after_error(delivery, error).await,
            Ok(_) => answered(delivery.ack().await, Outcome::FailedOpen { error }),
            Err(failure) if failure.is_permanent() => {
                let rejected = delivery.reject(&failure.reason()).await;
                answered(rejected, Outcome::Rejected { failure: Some(failure), attempts: 1 })
            }
            // The failed store counts no attempts; the redelivery timeout limits them.
            Err(failure) => match self.count_redelivery(&delivery) {
                Some(Exceeded { redeliveries, elapsed }) => {
                    let reason = failure.reason();
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
        self.counters.count_fail_open();
        self.engine.count_fail_open();
        tracing::warn!(error = error.chain(), "store unavailable, processing without deduplication (fail-open)");
    }
}

fn with_side_writes(result: impl Into<Completion>, attempt: Attempt) -> Completion {
    let (mut completion, writes) = (result.into(), attempt.into_side_writes());
    if !writes.is_empty() {
        let all = completion.side_writes_mut();
        all.offsets.extend(writes.offsets);
        all.messages.extend(writes.messages);
    }
    completion
}

fn has_side_writes(completion: &Completion) -> bool {
    completion.side_writes().is_some_and(|writes| !writes.is_empty())
}

fn answered<E: std::error::Error + 'static>(answer: Result<(), E>, outcome: Outcome) -> Result<Outcome, AckError<E>> {
    match answer {
        Ok(()) => Ok(outcome),
        Err(error) => Err(AckError { outcome, error }),
    }
}

/// A failed release loses nothing: the lease is dropped, or another holder took it over.
fn log_release(released: Result<(), Error>) {
    if let Err(error) = released {
        tracing::warn!(error = error.chain(), "failed to release the lease of a failed delivery");
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
