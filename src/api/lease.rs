use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{AttemptInfo, Completion, Error, FencingToken, Key, Outcome, PriorAttempt, Result};

use super::call::{Call, Operation, sealed};
use super::shared::Shared;
use crate::codec::RecordKind;
use crate::engine::renewal::Renewal;
use crate::engine::response::{FinishKind, FinishedBy, Grant};
use crate::invariant::Invariant;
use onlyonce_core::StoredResult;
use onlyonce_core::machine::Backoff;

/// The right to work on a key, until [`Lease::remaining`] is zero, or longer if no other caller claims the key.
///
/// Dropping a lease means that the outcome is unknown. Under [`OnInterrupt::Rerun`](crate::OnInterrupt) the next claim
/// acquires the key at once and reports [`PriorAttempt::Dropped`]. A drop costs no write and does not block.
#[must_use = "dropping a lease marks its work as interrupted"]
pub struct Lease {
    grant: Grant,
    shared: Arc<Shared>,
    /// True once it is completed, released or taken back: dropping it then means nothing.
    finished: bool,
}

impl Lease {
    pub(crate) fn new(grant: Grant, shared: Arc<Shared>) -> Self {
        Self { grant, shared, finished: false }
    }

    /// The key, with its scope.
    #[must_use]
    pub fn key(&self) -> Key<'static> {
        self.grant.decoded_key()
    }

    /// The facts of the attempt: token, number, and what is known of the attempts before.
    ///
    /// Under [`OnInterrupt::Rerun`](crate::OnInterrupt) claims are not synced, so that a power cut can lose a claim: after one,
    /// `prior() == None` does not prove that no effect happened. Open the store with
    /// [`OnInterrupt::Hold`](crate::OnInterrupt) and [`Durability::Disk`](crate::Durability) if that matters.
    #[must_use]
    pub fn attempt(&self) -> AttemptInfo {
        AttemptInfo::new(self.token(), self.grant.attempt, self.grant.prior)
    }

    /// The fencing token, as in [`Lease::attempt`].
    #[must_use]
    pub fn token(&self) -> FencingToken {
        FencingToken::new(self.grant.token)
    }

    /// How long no other caller can acquire the key. Zero after the lease expired; completing it still succeeds then, unless
    /// another caller has acquired the key. Reads memory only.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        Duration::from_millis(self.shared.engine().remaining_ms(&self.grant))
    }

    /// Restarts the lease's time. Costs no write and does not block.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if another caller acquired the key: stop the work.
    pub fn renew(&mut self) -> Result<()> {
        if self.shared.engine().renew(&self.grant)? { Ok(()) } else { Err(self.grant.superseded()) }
    }

    /// Renews the lease now, and then three times in its length until the guard is dropped. One thread renews the leases of all
    /// stores of the process, also while the work blocks its own thread or the runtime. Costs no write.
    ///
    /// Work that never ends keeps its key until its process exits, or for
    /// [`Builder::renew_for`](crate::Builder::renew_for): give the work a time limit of its own.
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # fn charge() -> &'static str { "charged" }
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// if let Claim::Acquired(mut lease) = store.claim("order-4711").wait()? {
    ///     let keep_alive = lease.keep_alive();
    ///     let receipt = charge(); // however long it takes
    ///     drop(keep_alive);
    ///     lease.complete(receipt).wait()?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn keep_alive(&mut self) -> KeepAlive<'_> {
        KeepAlive { renewal: self.renewal(), lease: self }
    }

    pub(crate) fn renewal(&self) -> Renewal {
        Renewal::start(self.shared.engine(), &self.grant)
    }

    /// Completes the work: stores its result, and the completion's offsets and messages, in one write.
    ///
    /// Returns when the write is as durable as the store's [`Durability`](crate::Durability): under `Disk` one fdatasync, shared
    /// with the calls of other threads. Of a result over `result_limit` only the completion is stored.
    ///
    /// A consumer that stores its offset here and publishes from the outbox is effectively-once up to publishing: a
    /// published message can be repeated, with the same [`Message::id`](crate::Message).
    ///
    /// # Errors
    ///
    /// A [`CompleteError`], which returns the completion, and the lease if it is still good. [`Error::Superseded`] if another
    /// caller acquired the key; [`Error::BatchTooLarge`] for more than 1 GiB.
    ///
    /// ```
    /// use onlyonce::{Claim, Completion, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let next = store.offset("orders", 0).wait()?.unwrap_or(0);
    /// if let Claim::Acquired(lease) = store.claim("order-4711").wait()? {
    ///     let completion = Completion::new("charged")
    ///         .offset("orders", 0, next + 1)
    ///         .message("charges", "order-4711", "12 EUR");
    ///     lease.complete(completion).wait()?;
    /// }
    /// assert_eq!(store.offset("orders", 0).wait()?, Some(1));
    /// for message in store.outbox(100).wait()? {
    ///     // Publish the message here.
    ///     store.remove_messages([message.id]).wait()?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn complete(self, completion: impl Into<Completion>) -> Call<Complete> {
        Call(Complete { lease: self, completion: completion.into() })
    }

    /// Ends the attempt without an effect. The next claim acquires the key at once, or after
    /// [`after`](Call::after), with the next attempt number and prior [`Released`](PriorAttempt::Released), or the prior of an
    /// earlier attempt whose outcome is unknown. If the effect may have happened, drop the lease instead.
    ///
    /// The payload's fingerprint is forgotten, so that a corrected retry can have a different payload, unless an earlier
    /// attempt's outcome is unknown. The attempt is remembered on disk for a window; the key does not count as in progress.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if another caller acquired the key.
    pub fn release(self) -> Call<Release> {
        Call(Release { lease: self, backoff: Duration::ZERO })
    }

    /// Completes the lease on this thread, and returns the completion.
    pub(crate) fn complete_blocking(self, completion: Completion) -> Result<Completion, CompleteError> {
        let shared = Arc::clone(&self.shared);
        let answer = complete_all(vec![(self, completion)]).pop();
        answer.unwrap_or_else(|| Err(CompleteError::lost(unanswered(&shared))))
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn grant(&self) -> &Grant {
        &self.grant
    }

    /// The next claim reports that this attempt may have had its effect, although it is released.
    #[cfg(feature = "tokio")]
    pub(crate) fn set_may_have_happened(&mut self) {
        self.grant.prior =
            self.grant.prior.filter(|prior| *prior != PriorAttempt::Released).or(Some(PriorAttempt::Dropped));
    }

    /// The attempts count from 1 again after the release.
    #[cfg(feature = "tokio")]
    pub(crate) fn reset_attempts(&mut self) {
        self.grant.attempt = 0;
    }

    /// Leaves the state of the key as it is when this is dropped.
    #[cfg(feature = "tokio")]
    pub(crate) fn disarm(mut self) {
        self.finished = true;
    }

    /// The error of a completion that failed, with this lease if it is still good.
    fn not_completed(mut self, error: Error, completion: Completion) -> CompleteError {
        self.finished = error.outcome() == Outcome::Unknown;
        let lease = (!self.finished).then_some(self);
        CompleteError::new(error, completion, lease)
    }

    pub(crate) fn belongs_to(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    pub(crate) fn foreign(&self) -> Error {
        Error::ForeignLease { key: self.key().to_string() }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.finished {
            self.shared.engine().abandon(&self.grant);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("key", &self.key()).field("attempt", &self.attempt()).finish_non_exhaustive()
    }
}

/// The operation of [`Lease::complete`].
pub struct Complete {
    lease: Lease,
    completion: Completion,
}

impl sealed::Sealed for Complete {}

impl Operation for Complete {
    type Output = Result<(), CompleteError>;

    fn run(self) -> Self::Output {
        self.lease.complete_blocking(self.completion).map(drop)
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        Box::pin(async move { self.lease.complete_async(self.completion).await.map(drop) })
    }
}

/// The operation of [`Lease::release`].
pub struct Release {
    lease: Lease,
    backoff: Duration,
}

impl Call<Release> {
    /// Releases the key for claims after `backoff` only. It is at most half the store's window, and runs on the monotonic
    /// clock in whole milliseconds. After a restart the rest of it runs on the store's time; on stream time it ends with the
    /// process.
    pub fn after(mut self, backoff: Duration) -> Self {
        self.0.backoff = backoff;
        self
    }
}

impl sealed::Sealed for Release {}

impl Operation for Release {
    type Output = Result<()>;

    fn run(self) -> Self::Output {
        let shared = Arc::clone(&self.lease.shared);
        release_all(vec![(self.lease, self.backoff)]).pop().unwrap_or_else(|| Err(unanswered(&shared)))
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        Box::pin(async move { self.lease.release_async(self.backoff).await })
    }
}

#[cfg(feature = "tokio")]
impl Lease {
    /// Completes the lease on the committer's thread, and returns the completion.
    pub(crate) async fn complete_async(self, completion: Completion) -> Result<Completion, CompleteError> {
        let shared = Arc::clone(&self.shared);
        let committer = match shared.committer() {
            Ok(committer) => committer,
            Err(error) => return Err(CompleteError::new(error, completion, Some(self))),
        };
        let answer = committer.complete(vec![(self, completion)]).await.pop();
        answer.unwrap_or_else(|| Err(CompleteError::lost(unanswered(&shared))))
    }

    pub(crate) async fn release_async(self, backoff: Duration) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let answer = shared.committer()?.release(vec![(self, backoff)]).await.pop();
        answer.unwrap_or_else(|| Err(unanswered(&shared)))
    }
}

/// Renews a [`Lease`] until it is dropped. Made by [`Lease::keep_alive`].
#[must_use = "renewal ends when this is dropped"]
pub struct KeepAlive<'a> {
    // Before the lease, so that it ends first.
    renewal: Renewal,
    lease: &'a mut Lease,
}

impl KeepAlive<'_> {
    /// The fencing token of the renewed lease.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.lease.token()
    }

    /// Why the lease is no longer renewed: [`Error::Superseded`] if another caller acquired the key or it was resolved to run
    /// again, [`Error::Poisoned`] or [`Error::Closed`] if the store has ended, [`Error::Io`] if the system gives no thread. Stop
    /// the work then. `None` while the lease is renewed; a loss shows at the next renewal.
    #[must_use]
    pub fn error(&self) -> Option<Error> {
        self.renewal.lost()
    }

    /// Waits until the lease is no longer renewed, and returns the error of [`KeepAlive::error`]. Can be dropped and called again.
    #[cfg(feature = "tokio")]
    pub async fn lost(&mut self) -> Error {
        std::future::poll_fn(|context| self.renewal.poll_lost(context)).await
    }

    /// Runs `work` while the lease is renewed. If the lease is lost first, `work` is dropped at its current await.
    ///
    /// # Errors
    ///
    /// As [`KeepAlive::error`].
    ///
    /// ```
    /// # use onlyonce::{Claim, Store};
    /// # async fn charge() -> &'static str { "charged" }
    /// # async fn work(store: &Store) -> Result<(), Box<dyn std::error::Error>> {
    /// if let Claim::Acquired(mut lease) = store.claim("order-4711").await? {
    ///     let receipt = lease.keep_alive().during(charge()).await?;
    ///     lease.complete(receipt).await?;
    /// }
    /// # Ok(())
    /// # }
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::open(dir.path().join("store"))?;
    /// # tokio::runtime::Runtime::new()?.block_on(work(&store))?;
    /// # store.close().wait()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[cfg(feature = "tokio")]
    pub async fn during<F: Future>(mut self, work: F) -> Result<F::Output> {
        let mut work = std::pin::pin!(work);
        let mut lost = std::pin::pin!(self.lost());
        std::future::poll_fn(|context| {
            // The work first: if both are ready, its outcome counts.
            if let std::task::Poll::Ready(output) = work.as_mut().poll(context) {
                return std::task::Poll::Ready(Ok(output));
            }
            lost.as_mut().poll(context).map(Err)
        })
        .await
    }
}

impl fmt::Debug for KeepAlive<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeepAlive").field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// Why a completion failed. Returns the completion, and the lease if it is still good.
// On the heap, because batches move many results that could be one of these.
#[derive(Debug)]
pub struct CompleteError(Box<Unfinished>);

#[derive(Debug)]
struct Unfinished {
    error: Error,
    completion: Completion,
    lease: Option<Lease>,
}

impl fmt::Display for CompleteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the completion failed")
    }
}

impl std::error::Error for CompleteError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0.error)
    }
}

impl CompleteError {
    /// Neither the completion nor the lease is left.
    pub(crate) fn lost(error: Error) -> Self {
        Self::new(error, Completion::default(), None)
    }

    pub(crate) fn new(error: Error, completion: Completion, lease: Option<Lease>) -> Self {
        Self(Box::new(Unfinished { error, completion, lease }))
    }

    /// The error.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.0.error
    }

    /// Whether the completion may have been stored nevertheless.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.0.error.outcome()
    }

    /// The completion that was to be stored.
    #[must_use]
    pub fn completion(&self) -> &Completion {
        &self.0.completion
    }

    /// The error, the completion, and the lease if it is still good: retry with it, or drop it.
    #[must_use]
    pub fn into_parts(self) -> (Error, Completion, Option<Lease>) {
        let Unfinished { error, completion, lease } = *self.0;
        (error, completion, lease)
    }
}

/// Completes leases of one store in one write; an answer for each, with its completion.
///
/// The order counts: after a lease that is rejected, the offsets of the following completions are not stored.
pub(crate) fn complete_all(leases: Vec<(Lease, Completion)>) -> Vec<Result<Completion, CompleteError>> {
    let calls = [leases.len()];
    complete_calls(leases, &calls)
}

/// As [`complete_all`], for several calls with these numbers of leases: the order counts within a call.
pub(crate) fn complete_calls(
    leases: Vec<(Lease, Completion)>,
    calls: &[usize],
) -> Vec<Result<Completion, CompleteError>> {
    let Some(shared) = leases.first().map(|(lease, _)| Arc::clone(&lease.shared)) else { return Vec::new() };
    let limit = shared.engine().config().result_limit;
    let follows = calls.iter().flat_map(|leases| (0..*leases).map(|index| index > 0));
    let finish = leases.iter().zip(follows).map(|((lease, completion), follows)| {
        let result = StoredResult::within(completion.result(), limit);
        (&lease.grant, FinishKind::Complete { result, side_writes: completion.side_writes(), follows })
    });
    // Its length is known, and the iterator does not know it.
    let mut kinds = Vec::with_capacity(leases.len());
    kinds.extend(finish);
    let answer = shared.engine().finish(RecordKind::Completed, FinishedBy::Holder, kinds);
    let leases = leases.into_iter();
    match answer {
        Ok(accepted) => leases
            .zip(accepted)
            .map(|((mut lease, completion), accepted)| {
                lease.finished = accepted.is_ok();
                match accepted {
                    Ok(true) => Ok(completion),
                    Ok(false) => Err(CompleteError::new(lease.grant.superseded(), completion, None)),
                    Err(error) => Err(lease.not_completed(error, completion)),
                }
            })
            .collect(),
        Err(error) => leases.map(|(lease, completion)| Err(lease.not_completed(error.clone(), completion))).collect(),
    }
}

/// Releases leases of one store in one write; an answer for each.
pub(crate) fn release_all(leases: Vec<(Lease, Duration)>) -> Vec<Result<()>> {
    let Some(shared) = leases.first().map(|(lease, _)| Arc::clone(&lease.shared)) else { return Vec::new() };
    let engine = shared.engine();
    let (now, window_ms) = (engine.now(), engine.config().span.window_ms);
    // This attempt had no effect. An earlier one whose outcome is unknown stays so.
    let release = |lease: &Lease, backoff| FinishKind::Release {
        prior: lease.grant.prior.unwrap_or(PriorAttempt::Released),
        backoff: Backoff::from(now, backoff, window_ms),
    };
    let finish = leases.iter().map(|(lease, backoff)| (&lease.grant, release(lease, *backoff))).collect();
    match engine.finish(RecordKind::Released, FinishedBy::Holder, finish) {
        Ok(accepted) => leases
            .into_iter()
            .zip(accepted)
            .map(|((mut lease, _), accepted)| {
                lease.finished = accepted.is_ok();
                if accepted? { Ok(()) } else { Err(lease.grant.superseded()) }
            })
            .collect(),
        Err(error) => leases.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// Merges the answers of a batch in the caller's order: those that are known already, and for the others those of `ours`. A
/// missing answer is an error, and poisons the store.
pub(crate) fn in_order<E>(
    answers: Vec<Option<Result<(), E>>>,
    ours: impl IntoIterator<Item = Result<(), E>>,
    shared: &Shared,
    failed: impl Fn(Error) -> E,
) -> Vec<Result<(), E>> {
    let mut ours = ours.into_iter();
    let mut next = || ours.next().unwrap_or_else(|| Err(failed(unanswered(shared))));
    answers.into_iter().map(|answer| answer.unwrap_or_else(&mut next)).collect()
}

/// The error of a lease that has no answer, although each must have one.
#[cold]
pub(crate) fn unanswered(shared: &Shared) -> Error {
    shared.engine().health.broken(Invariant::AnswerForEachKey, format_args!("a lease has none"))
}

#[cfg(test)]
mod tests;
