//! The operations of a store's calls that are more than one function of the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use onlyonce_core::{Completion, Error, RecordOutcome, Result};

use super::call::{Call, Operation, sealed};
use super::lease::{CompleteError, Lease, complete_all, in_order, release_all};
use super::shared::Shared;
use super::{Claim, claimed};
use crate::engine::request::Request;

/// The operation of [`Store::claim`](crate::Store::claim).
pub struct ClaimKey<'s> {
    pub(super) shared: &'s Arc<Shared>,
    pub(super) request: Result<Arc<Request>>,
    pub(super) limit: Option<Duration>,
}

impl Call<ClaimKey<'_>> {
    /// If the key is in progress, waits up to `limit` until its holder in this process finishes or its lease or backoff ends, and
    /// claims again. Returns [`Claim::InProgress`] after the limit.
    ///
    /// The holder wakes the waiter; completing a key with no waiters costs one atomic load. A held key is waited for until it is
    /// resolved. The limit runs on the system's monotonic clock (Tokio's if awaited): advancing a
    /// [`ManualClock`](crate::ManualClock) wakes no waiter.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let Claim::Acquired(lease) = store.claim("order-4711").wait()? else { unreachable!() };
    /// std::thread::scope(|scope| {
    ///     scope.spawn(|| lease.complete("charged").wait());
    ///     let answer = store.claim("order-4711").wait_up_to(Duration::from_secs(10)).wait();
    ///     assert!(matches!(answer, Ok(Claim::Completed(first)) if first.result() == Some(b"charged")));
    /// });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn wait_up_to(mut self, limit: Duration) -> Self {
        self.0.limit = Some(limit);
        self
    }
}

impl sealed::Sealed for ClaimKey<'_> {}

impl Operation for ClaimKey<'_> {
    type Output = Result<Claim>;

    fn run(self) -> Self::Output {
        let request = self.request?;
        match self.limit {
            None => claim_one(self.shared, &request),
            Some(limit) => claim_waiting(self.shared, &request, limit),
        }
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let (shared, request, limit) = (Arc::clone(self.shared), self.request, self.limit);
        Box::pin(async move {
            let request = request?;
            match limit {
                None => super::awaited::claim_one(&shared, &request).await,
                Some(limit) => super::awaited::claim_waiting(&shared, &request, limit).await,
            }
        })
    }
}

fn claim_one(shared: &Arc<Shared>, request: &Arc<Request>) -> Result<Claim> {
    Ok(claimed(only(shared.engine().claim(request)?)??, shared))
}

fn claim_waiting(shared: &Arc<Shared>, request: &Arc<Request>, limit: Duration) -> Result<Claim> {
    let end = Instant::now().checked_add(limit);
    let mut waiter: Option<crate::engine::waiters::Waiter> = None;
    loop {
        let answer = claim_one(shared, request)?;
        let Claim::InProgress(other) = &answer else { return Ok(answer) };
        let now = Instant::now();
        if end.is_some_and(|end| end <= now) {
            return Ok(answer);
        }
        if let Some(waiter) = waiter.take() {
            waiter.block_until(next_claim(end, other.retry_after, now));
        }
        // Registered before the next claim: a holder that finishes from here on wakes this thread.
        waiter = request.digests().next().map(|digest| shared.engine().wait_for(digest));
    }
}

/// The latest moment at which to claim again.
pub(crate) fn next_claim(end: Option<Instant>, retry_after: Option<Duration>, now: Instant) -> Option<Instant> {
    let retry = retry_after.and_then(|after| now.checked_add(after));
    end.into_iter().chain(retry).min()
}

pub(crate) struct ClaimBatch<'s> {
    pub(super) shared: &'s Arc<Shared>,
    pub(super) request: Result<Arc<Request>>,
}

impl sealed::Sealed for ClaimBatch<'_> {}

impl Operation for ClaimBatch<'_> {
    type Output = Result<Vec<Result<Claim>>>;

    fn run(self) -> Self::Output {
        let answers = self.shared.engine().claim(&self.request?)?;
        Ok(answers.into_iter().map(|answer| Ok(claimed(answer?, self.shared))).collect())
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let (shared, request) = (Arc::clone(self.shared), self.request);
        Box::pin(async move {
            let answers = shared.committer()?.claim(request?).await?.take();
            Ok(answers.into_iter().map(|answer| Ok(claimed(answer?, &shared))).collect())
        })
    }
}

pub(crate) struct RecordKey<'s> {
    pub(super) shared: &'s Arc<Shared>,
    pub(super) request: Result<Arc<Request>>,
}

impl sealed::Sealed for RecordKey<'_> {}

impl Operation for RecordKey<'_> {
    type Output = Result<RecordOutcome>;

    fn run(self) -> Self::Output {
        only(self.shared.engine().record(&*self.request?)?)?
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let (shared, request) = (Arc::clone(self.shared), self.request);
        Box::pin(async move { only(shared.committer()?.record(request?).await?)? })
    }
}

pub(crate) struct RecordBatch<'s> {
    pub(super) shared: &'s Arc<Shared>,
    pub(super) request: Result<Arc<Request>>,
}

impl sealed::Sealed for RecordBatch<'_> {}

impl Operation for RecordBatch<'_> {
    type Output = Result<Vec<Result<RecordOutcome>>>;

    fn run(self) -> Self::Output {
        self.shared.engine().record(&*self.request?)
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let (shared, request) = (Arc::clone(self.shared), self.request);
        Box::pin(async move { shared.committer()?.record(request?).await })
    }
}

pub(crate) struct CompleteBatch<'s> {
    pub(super) shared: &'s Arc<Shared>,
    pub(super) leases: Vec<(Lease, Completion)>,
}

impl CompleteBatch<'_> {
    /// Separates the leases of this store, and answers for the others.
    #[expect(clippy::type_complexity, reason = "it is used twice, below")]
    fn separate(self) -> (Vec<(Lease, Completion)>, Vec<Option<Result<(), CompleteError>>>) {
        let (mut ours, mut answers) = (Vec::new(), Vec::new());
        let mut is_contiguous = true;
        for (lease, mut completion) in self.leases {
            if lease.belongs_to(self.shared) {
                if !is_contiguous && completion.side_writes().is_some() {
                    completion.side_writes_mut().offsets.clear();
                }
                ours.push((lease, completion));
                answers.push(None);
            } else {
                is_contiguous = false;
                answers.push(Some(Err(CompleteError::new(lease.foreign(), completion, Some(lease)))));
            }
        }
        (ours, answers)
    }
}

impl sealed::Sealed for CompleteBatch<'_> {}

impl Operation for CompleteBatch<'_> {
    type Output = Vec<Result<(), CompleteError>>;

    fn run(self) -> Self::Output {
        let shared = self.shared;
        let (ours, answers) = self.separate();
        let completed = complete_all(ours).into_iter().map(|completed| completed.map(drop));
        in_order(answers, completed, shared, CompleteError::lost)
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let shared = Arc::clone(self.shared);
        let (ours, answers) = self.separate();
        Box::pin(async move {
            let completed = match (ours.is_empty(), shared.committer()) {
                (true, _) => Vec::new(),
                (false, Ok(committer)) => committer.complete(ours).await,
                (false, Err(error)) => ours
                    .into_iter()
                    .map(|(lease, completion)| Err(CompleteError::new(error.clone(), completion, Some(lease))))
                    .collect(),
            };
            in_order(answers, completed.into_iter().map(|it| it.map(drop)), &shared, CompleteError::lost)
        })
    }
}

pub(crate) struct ReleaseBatch<'s> {
    pub(super) shared: &'s Arc<Shared>,
    pub(super) leases: Vec<(Lease, Duration)>,
}

impl sealed::Sealed for ReleaseBatch<'_> {}

impl Operation for ReleaseBatch<'_> {
    type Output = Vec<Result<()>>;

    fn run(self) -> Self::Output {
        let mut ours = Vec::new();
        let mut answers: Vec<Option<Result<()>>> = Vec::new();
        for (lease, backoff) in self.leases {
            if lease.belongs_to(self.shared) {
                ours.push((lease, backoff));
                answers.push(None);
            } else {
                answers.push(Some(lease.release().after(backoff).wait()));
            }
        }
        in_order(answers, release_all(ours), self.shared, |error| error)
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let (shared, leases) = (Arc::clone(self.shared), self.leases);
        Box::pin(async move {
            let mut ours = Vec::new();
            let mut answers: Vec<Option<Result<()>>> = Vec::new();
            for (lease, backoff) in leases {
                if lease.belongs_to(&shared) {
                    ours.push((lease, backoff));
                    answers.push(None);
                } else {
                    answers.push(Some(lease.release_async(backoff).await));
                }
            }
            let released = match (ours.is_empty(), shared.committer()) {
                (true, _) => Vec::new(),
                (false, Ok(committer)) => committer.release(ours).await,
                (false, Err(error)) => vec![Err(error); ours.len()],
            };
            in_order(answers, released, &shared, |error| error)
        })
    }
}

pub(crate) struct Close<'s> {
    pub(super) shared: &'s Arc<Shared>,
}

impl sealed::Sealed for Close<'_> {}

impl Operation for Close<'_> {
    type Output = Result<()>;

    fn run(self) -> Self::Output {
        self.shared.handle.close()
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> super::call::Submitted<Self::Output> {
        let shared = Arc::clone(self.shared);
        Box::pin(async move { shared.committer()?.close().await })
    }
}

/// The answer to a request of one key. The engine has counted the answers, and poisons the store if one is missing.
pub(crate) fn only<T>(mut answers: Vec<T>) -> Result<T> {
    let invariant = crate::invariant::Invariant::AnswerForEachKey.text();
    answers.pop().ok_or_else(|| Error::Broken { invariant, detail: "it has none".to_owned() })
}
