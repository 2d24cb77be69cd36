use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{
    AttemptInfo, Claim, Completion, Engine, Error, FencingToken, Finish, Grant, KeepAlive, Key, Outcome, Release,
    Result,
};

use crate::acquire::{self, Acquired};
use crate::caller::CallerTransaction;
use crate::core::AbandonReason;
use crate::finish::{self, LeaseEnd};
use crate::store::PgStore;
use crate::writing::{Item, Verb, Via};

/// A lease of a [`PgStore`]. If it is dropped, the outcome of its work is unknown, and the next claim reports
/// [`Dropped`](onlyonce_core::PriorAttempt::Dropped).
#[must_use = "dropping a lease marks its work as interrupted"]
pub struct PgLease {
    store: PgStore,
    grant: Arc<Grant>,
    is_finished: bool,
    /// Whether a transaction of the caller may have locked its row.
    is_in_transaction: bool,
}

impl PgLease {
    pub(crate) fn new(store: PgStore, grant: Grant) -> Self {
        Self { store, grant: Arc::new(grant), is_finished: false, is_in_transaction: false }
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

    /// The fencing token.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.grant.token()
    }

    /// Renews the lease until the returned value is dropped. Keep it while the work may take longer than the lease. A lease of
    /// [`PgStore::claim_in`] is renewed from the commit of its transaction on: call this after the commit.
    #[must_use]
    pub fn keep_alive(&self) -> Box<dyn KeepAlive> {
        self.store.keep_alive(&self.grant)
    }

    /// Completes the lease.
    ///
    /// # Errors
    ///
    /// A [`CompleteError`], which returns the completion, and the lease unless another holder claimed the key ([`Error::Superseded`]).
    pub async fn complete(mut self, completion: impl Into<Completion>) -> Result<(), CompleteError> {
        let completion = completion.into();
        match self.finish(Finish::Complete(completion.clone())).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.not_completed(error, completion)),
        }
    }

    /// Releases the lease. After an error it is dropped.
    ///
    /// # Errors
    ///
    /// As [`Engine::finish`].
    pub async fn release(mut self, release: Release) -> Result<()> {
        self.finish(Finish::Release(release)).await
    }

    async fn finish(&mut self, finish: Finish) -> Result<()> {
        let may_have_happened = self.is_finished;
        // If this future is dropped, the call may be queued: the store abandons the lease if it does not happen.
        self.is_finished = true;
        let answer =
            self.store.finish(vec![(Arc::clone(&self.grant), finish)]).await.pop().unwrap_or(Err(Error::Closed));
        self.is_finished = match &answer {
            Ok(()) | Err(Error::Superseded { .. }) => true,
            // Nothing is left to abandon where an earlier write may have happened.
            Err(error) => may_have_happened || error.outcome() == Outcome::Unknown,
        };
        answer
    }

    /// The error of a completion that failed, with this lease if it is still good.
    fn not_completed(self, error: Error, completion: Completion) -> CompleteError {
        let lease = if matches!(error, Error::Superseded { .. }) { None } else { Some(self) };
        CompleteError(Box::new(Unfinished { error, completion, lease }))
    }

    /// Completes the lease in a transaction of the caller: its writes, the completion, and the completion's offsets and messages
    /// are committed together or not at all. The transaction is one of the store's database, on a connection of the caller, whose
    /// role can write the store's tables. It waits for a synchronous standby, whatever its session says. It is one of
    /// `tokio-postgres`, or of `sqlx` with the feature of this name ([`CallerTransaction`]).
    ///
    /// Commit the transaction, then call [`CompletedIn::committed`]. If this future is dropped before it returns, roll the transaction
    /// back: it may have completed the lease.
    ///
    /// # Errors
    ///
    /// A [`CompleteError`], which returns the completion, and the lease unless another holder claimed the key ([`Error::Superseded`]).
    /// Roll the transaction back before you use the lease again: after an error of the server it has failed.
    pub async fn complete_in<'t>(
        mut self,
        transaction: impl CallerTransaction<'t>,
        completion: impl Into<Completion>,
    ) -> Result<CompletedIn, CompleteError> {
        let executor = transaction.into_executor();
        let completion = completion.into();
        let core = Arc::clone(self.store.core());
        // Before the statement: a renewal that comes first does not wait for it. Also if this future is dropped.
        self.is_in_transaction = true;
        core.kept.pause(self.grant.token().get(), true);
        let answer = match LeaseEnd::complete(&core, Arc::clone(&self.grant), completion.clone()) {
            Ok(ended) => finish::complete_in(&core, &*executor.0, &ended).await,
            Err(error) => Err(error),
        };
        if let Err(error) = answer {
            core.kept.pause(self.grant.token().get(), false);
            return Err(self.not_completed(error, completion));
        }
        self.is_finished = true;
        Ok(CompletedIn { store: self.store.clone(), grant: Arc::clone(&self.grant), is_committed: false })
    }
}

impl Drop for PgLease {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        match self.is_in_transaction {
            true => self.store.core().abandon(Arc::clone(&self.grant), AbandonReason::InTransaction),
            false => self.store.abandon(Arc::clone(&self.grant)),
        }
    }
}

impl fmt::Debug for PgLease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PgLease").field("key", &self.grant.key).field("attempt", &self.grant.attempt).finish()
    }
}

/// A completion that failed. It returns the completion and the lease, so that the completion can be repeated.
#[derive(Debug)]
pub struct CompleteError(Box<Unfinished>);

#[derive(Debug)]
struct Unfinished {
    error: Error,
    completion: Completion,
    lease: Option<PgLease>,
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

    /// The error, the completion, and the lease if it is still good: repeat the completion with it, or drop it. A drop has no effect if
    /// the completion may have been stored.
    #[must_use]
    pub fn into_parts(self) -> (Error, Completion, Option<PgLease>) {
        let Unfinished { error, completion, lease } = *self.0;
        (error, completion, lease)
    }
}

/// A lease that a transaction completes. If it is dropped without [`committed`](Self::committed) and the transaction was rolled
/// back, the next claim reports [`Dropped`](onlyonce_core::PriorAttempt::Dropped).
#[must_use = "call `committed` after the commit"]
#[derive(Debug)]
pub struct CompletedIn {
    store: PgStore,
    grant: Arc<Grant>,
    is_committed: bool,
}

impl CompletedIn {
    /// The transaction was committed.
    pub fn committed(mut self) {
        self.is_committed = true;
        let core = self.store.core();
        core.in_flight.ended(self.grant.token().get());
        core.kept.end(self.grant.token().get(), &self.grant.superseded());
    }
}

impl Drop for CompletedIn {
    fn drop(&mut self) {
        if !self.is_committed {
            // It changes nothing if the transaction was committed after all.
            self.store.core().abandon(Arc::clone(&self.grant), AbandonReason::InTransaction);
        }
    }
}

impl PgStore {
    /// Claims one key, as [`Engine::claim_wait`], and returns a lease that is abandoned when it is dropped.
    ///
    /// # Errors
    ///
    /// As [`Engine::claim_wait`].
    pub async fn claim_lease(&self, key: impl Into<Key<'static>>, limit: Duration) -> Result<Claim<PgLease>> {
        Ok(match self.claim_wait(key.into(), limit).await? {
            Claim::Acquired(grant) => Claim::Acquired(PgLease::new(self.clone(), grant)),
            Claim::Completed(completed) => Claim::Completed(completed),
            Claim::InProgress(in_progress) => Claim::InProgress(in_progress),
        })
    }

    /// Claims a key in a transaction of the caller. Until the transaction ends, the key is in progress for other claims, the first of
    /// which waits for three seconds, with the calls of its process that share its statement. If the transaction is rolled back, the
    /// claim did not happen. If the transaction is committed and the lease was dropped before, the key is in progress until the lease
    /// expires.
    ///
    /// Use it where the whole work is one short transaction: claim, write, [`complete_in`](PgLease::complete_in), commit. Before it
    /// returns that the key is completed, a connection of the store waits until the standby has the completion.
    ///
    /// # Errors
    ///
    /// As [`Engine::claim`]. After an error of the server the transaction has failed: roll it back.
    pub async fn claim_in<'t>(
        &self,
        transaction: impl CallerTransaction<'t>,
        key: impl Into<Key<'static>>,
    ) -> Result<Claim<PgLease>> {
        let (core, key) = (self.core(), key.into());
        let encoded = core.encode_all(std::slice::from_ref(&key))?.pop().unwrap_or_default();
        if core.policy.is_stream {
            // It would lock the time of all claims until the transaction ends.
            let bounds = "left out where `claim_in` is used".to_owned();
            return Err(Error::Config { option: "stream_time", value: "set".to_owned(), bounds });
        }
        let executor = transaction.into_executor();
        let has_lock_limit = core.database.check_transaction(&*executor.0).await?;
        let item = Item { key, encoded, call: core.next_call() };
        let answer = acquire::acquire(core, Via::Transaction(&*executor.0), Verb::Claim, &[item]).await.pop();
        core.database.end_lock_limit(&*executor.0, has_lock_limit).await;
        Ok(match answer.unwrap_or(Err(Error::Closed))? {
            Acquired::Taken(grant) => Claim::Acquired(PgLease::new(self.clone(), grant)),
            Acquired::Completed(completed) => {
                // The wait for the standby may have been interrupted, and the caller's connection has not confirmed what it sees.
                core.database.confirm().await?;
                Claim::Completed(completed)
            }
            Acquired::InProgress { in_progress, .. } => Claim::InProgress(in_progress),
        })
    }
}
