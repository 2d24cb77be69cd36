//! The lease of a future.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::committer::Committer;
use super::{Claim, CompleteError};
use crate::claim::{self, Claim as ClaimResponse, Work, unanswered};
use crate::config::OnInterrupt;
use crate::entry::Prior;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::tx::Tx;
use crate::typed_result;

/// How the attempts after a failed one are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    Counted,
    /// From 1, as if the key had not been seen. Only the doubt about its effect is kept.
    Anew,
}

/// The right to do a piece of work: a [`Lease`](crate::Lease) that is settled by futures.
///
/// Dropping it costs no write and does not block; the next claim is told [`Prior::Dropped`].
#[must_use = "dropping a lease marks its work as interrupted"]
pub struct Lease {
    // Before the committer: its share of the store must not be the last one.
    pub(super) lease: claim::Lease,
    pub(super) committer: Arc<Committer>,
}

impl Lease {
    /// The key it is about, with its scope.
    #[must_use]
    pub fn key(&self) -> Key<'static> {
        self.lease.key()
    }

    /// The fencing token: higher than that of every lease before, over the life of the store.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.lease.token()
    }

    /// Which attempt at this work it is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.lease.attempt()
    }

    /// What became of the attempts before, as [`Lease::prior`](crate::Lease::prior).
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.lease.prior()
    }

    /// Whether an earlier attempt may have had its effect, as
    /// [`Lease::may_have_happened`](crate::Lease::may_have_happened).
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.lease.may_have_happened()
    }

    /// How long nobody else can get the key, as [`Lease::remaining`](crate::Lease::remaining).
    #[must_use]
    pub fn remaining(&self) -> Duration {
        self.lease.remaining()
    }

    /// Starts the lease's time again. Costs no write and waits for nothing, so that it is no future.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if somebody has taken over: stop working.
    pub fn renew(&mut self) -> Result<()> {
        self.lease.renew()
    }

    /// Says that the work is done and keeps its result, as [`Lease::complete`](crate::Lease::complete): safe as the store's
    /// [`Durability`](crate::Durability) says when this is done. What completes at the same time shares one write and
    /// one sync.
    ///
    /// Dropped when it was polled once, it happens all the same, unless the queue was full; otherwise its lease is
    /// dropped.
    ///
    /// # Errors
    ///
    /// A [`CompleteError`], which gives the result back. [`Error::Superseded`] if somebody has taken over.
    pub async fn complete(self, result: impl Into<Vec<u8>>) -> Result<(), CompleteError> {
        self.finish(result.into().into()).await.map(drop)
    }

    /// As [`Lease::complete`], and gives the result back where that worked, too.
    pub(super) async fn finish(self, work: Work) -> Result<Vec<u8>, CompleteError> {
        let Self { lease, committer } = self;
        let mut answers = committer.complete(vec![(lease, work)]).await;
        let lost = || Err(claim::CompleteError::lost(unanswered(&committer.running)));
        answers.pop().unwrap_or_else(lost).map_err(|error| failed(error, &committer))
    }

    /// As [`Lease::complete`], with a result that is encoded by serde and bincode 2 and read back once before it is stored, as
    /// [`Lease::complete_as`](crate::Lease::complete_as).
    ///
    /// # Errors
    ///
    /// As [`Lease::complete`], and [`Error::Encode`] if the result would not come back as it is; the lease is given back
    /// then.
    pub async fn complete_as<T: Serialize + DeserializeOwned>(self, result: &T) -> Result<(), CompleteError> {
        match typed_result::encode(result, self.lease.result_limit()) {
            Ok(bytes) => self.complete(bytes).await,
            Err(detail) => Err(CompleteError::new(Error::Encode { detail }, Vec::new(), Some(self))),
        }
    }

    /// As [`Lease::complete`], with what `fill` adds to the same write: see
    /// [`Lease::complete_with`](crate::Lease::complete_with).
    ///
    /// # Errors
    ///
    /// As [`Lease::complete`]; nothing of `fill` is stored then, unless the outcome is unknown.
    pub async fn complete_with(
        self,
        result: impl Into<Vec<u8>>,
        fill: impl FnOnce(&mut Tx),
    ) -> Result<(), CompleteError> {
        self.finish(Work::with(result.into(), fill)).await.map(drop)
    }

    /// Says that this attempt failed and did nothing, as [`Lease::release`](crate::Lease::release).
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if somebody has taken over.
    pub async fn release(self) -> Result<()> {
        self.release_after(Duration::ZERO).await
    }

    /// As [`Lease::release`], but nobody gets the key before `backoff` is over.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if somebody has taken over.
    pub async fn release_after(self, backoff: Duration) -> Result<()> {
        let Self { lease, committer } = self;
        let mut released = committer.release(vec![(lease, backoff)]).await;
        released.pop().unwrap_or_else(|| Err(unanswered(&committer.running)))
    }

    /// Ends an attempt that failed, and may have had its effect where that is in doubt. Under `Hold` such a doubt holds the
    /// key, and nothing else is noted.
    pub(crate) async fn fail(mut self, in_doubt: bool, again: Again, backoff: Duration) -> Result<()> {
        if in_doubt && self.committer.running.engine.config().on_interrupt == OnInterrupt::Hold {
            return Ok(());
        }
        if in_doubt {
            self.lease.doubt();
        }
        if again == Again::Anew {
            self.lease.reset_attempts();
        }
        self.release_after(backoff).await
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lease.fmt(f)
    }
}

/// A claim whose lease is settled by futures.
pub(super) fn claim(claimed: ClaimResponse, committer: &Arc<Committer>) -> Claim {
    match claimed {
        ClaimResponse::Acquired(lease) => Claim::Acquired(Lease { lease, committer: Arc::clone(committer) }),
        ClaimResponse::Completed(first) => Claim::Completed(first),
        ClaimResponse::InProgress(other) => Claim::InProgress(other),
    }
}

/// A failed completion whose lease, where it is given back, is settled by futures.
pub(super) fn failed(error: claim::CompleteError, committer: &Arc<Committer>) -> CompleteError {
    let (error, result, lease) = error.into_parts();
    CompleteError::new(error, result, lease.map(|lease| Lease { lease, committer: Arc::clone(committer) }))
}
