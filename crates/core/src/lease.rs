use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use crate::answer::Claim;
use crate::attempt::AttemptInfo;
use crate::completion::Completion;
use crate::engine::{Engine, Finish, Grant, Release};
use crate::error::{Error, Outcome, Result};
use crate::key::Key;

/// A lease of any engine, for adapters: finishes its grant, and abandons it if it is dropped.
#[must_use = "dropping a lease marks its work as interrupted"]
pub struct EngineLease {
    engine: Arc<dyn Engine>,
    grant: Arc<Grant>,
    finished: bool,
}

impl EngineLease {
    /// A lease on a grant of this engine.
    pub fn new(engine: Arc<dyn Engine>, grant: Grant) -> Self {
        Self { engine, grant: Arc::new(grant), finished: false }
    }

    /// Claims one key, as [`Engine::claim_wait`].
    ///
    /// # Errors
    ///
    /// As [`Engine::claim_wait`].
    pub async fn claim(engine: &Arc<dyn Engine>, key: Key<'static>, limit: Duration) -> Result<Claim<Self>> {
        Ok(match engine.claim_wait(key, limit).await? {
            Claim::Acquired(grant) => Claim::Acquired(Self::new(Arc::clone(engine), grant)),
            Claim::Completed(completed) => Claim::Completed(completed),
            Claim::InProgress(in_progress) => Claim::InProgress(in_progress),
        })
    }

    /// The key, with its scope.
    #[must_use]
    pub fn key(&self) -> &Key<'static> {
        &self.grant.key
    }

    /// The facts of the attempt.
    #[must_use]
    pub fn attempt(&self) -> AttemptInfo {
        self.grant.attempt
    }

    /// Completes the lease. After an error the lease is dropped, so that the next claim reports the attempt. If it is unknown
    /// whether the write happened, the key stays in progress until the lease ends or the engine finds the write.
    ///
    /// # Errors
    ///
    /// As [`Engine::finish`].
    pub async fn complete(self, completion: impl Into<Completion>) -> Result<()> {
        self.finish(Finish::Complete(completion.into())).await
    }

    /// Releases the lease. After an error it is dropped.
    ///
    /// # Errors
    ///
    /// As [`Engine::finish`].
    pub async fn release(self, release: Release) -> Result<()> {
        self.finish(Finish::Release(release)).await
    }

    async fn finish(mut self, finish: Finish) -> Result<()> {
        // If this future is dropped, the call may be queued. To abandon the lease would let another claim come before it. The
        // engine abandons the lease itself if the call does not happen.
        self.finished = true;
        let answer = self.engine.finish(vec![(Arc::clone(&self.grant), finish)]).await.pop();
        let answer =
            answer.unwrap_or_else(|| Err(Error::WriteFailed { source: "the engine returned no answer".into() }));
        // Nothing is left to abandon where the write happened, or may have.
        self.finished = answer
            .as_ref()
            .err()
            .is_none_or(|error| matches!(error, Error::Superseded { .. }) || error.outcome() == Outcome::Unknown);
        answer
    }

    /// Runs `work` and renews the lease meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if the lease is lost first: `work` is dropped at its current await. No other failure to renew
    /// stops the work.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> Result<T> {
        let mut keep_alive = self.engine.keep_alive(&self.grant);
        let mut lost = keep_alive.lost();
        let mut work = pin!(work);
        let mut renewed = true;
        poll_fn(|context| {
            // The work first: if both are ready, its outcome counts.
            if let Poll::Ready(output) = work.as_mut().poll(context) {
                return Poll::Ready(Ok(output));
            }
            if renewed && let Poll::Ready(error) = lost.as_mut().poll(context) {
                if matches!(error, Error::Superseded { .. }) {
                    return Poll::Ready(Err(error));
                }
                renewed = false;
            }
            Poll::Pending
        })
        .await
    }
}

impl Drop for EngineLease {
    fn drop(&mut self) {
        if !self.finished {
            self.engine.abandon(Arc::clone(&self.grant));
        }
    }
}

impl fmt::Debug for EngineLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineLease").field("key", &self.grant.key).field("attempt", &self.grant.attempt).finish()
    }
}
