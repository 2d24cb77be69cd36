use std::fmt;

use onlyonce_core::{Completed, Error, InProgress};

use super::Claim;
use super::lease::{CompleteError, Lease};
use super::store::Store;

/// What [`Store::run`] did.
#[must_use]
pub enum RunOutcome {
    /// The work ran now, with this result.
    First(Vec<u8>),
    /// The work was done before, with this result.
    Replayed(Completed),
    /// The key is leased, in backoff, or held: the work did not run.
    InProgress(InProgress),
}

/// Results may be long, and may be secrets: `Debug` prints their lengths.
impl fmt::Debug for RunOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First(result) => write!(f, "First({} bytes)", result.len()),
            Self::Replayed(completed) => f.debug_tuple("Replayed").field(completed).finish(),
            Self::InProgress(in_progress) => f.debug_tuple("InProgress").field(in_progress).finish(),
        }
    }
}

/// Why [`Store::run`] failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E> {
    /// The key could not be claimed. The work did not start.
    #[error("the key could not be claimed")]
    Claim(#[source] Error),
    /// The work failed, and the key was released.
    #[error("the work failed")]
    Work(#[source] E),
    /// The work is done, and its result could not be stored.
    #[error(transparent)]
    Complete(CompleteError),
}

impl Store {
    /// Claims the key, runs the work and completes the key with its result. If the work was done before, returns the stored
    /// result. If the work fails, releases the key; if it panics, drops the lease. Blocks.
    ///
    /// The lease is renewed while the work runs, as by [`Lease::keep_alive`]. Of a result over `result_limit` only the completion is
    /// stored ([`Completed::is_result_too_large`]).
    ///
    /// An `Err` of the work means that it had no effect. If it may have had one (a timeout after the charge was sent), use
    /// [`Store::claim`] and drop the lease: the next claim reports it.
    ///
    /// # Errors
    ///
    /// [`RunError`] for the claim, the work and the completion.
    ///
    /// ```
    /// use onlyonce::{RunOutcome, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// for _ in 0..2 {
    ///     match store.run("order-4711", |_lease| Ok::<_, std::io::Error>(b"receipt 1".to_vec()))? {
    ///         RunOutcome::First(result) => assert_eq!(result, b"receipt 1"),
    ///         RunOutcome::Replayed(first) => assert_eq!(first.result(), Some(&b"receipt 1"[..])),
    ///         RunOutcome::InProgress(_) => unreachable!("no other caller"),
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn run<'k, E>(
        &self,
        key: impl Into<onlyonce_core::Key<'k>>,
        work: impl FnOnce(&mut Lease) -> Result<Vec<u8>, E>,
    ) -> Result<RunOutcome, RunError<E>> {
        let mut lease = match self.claim(key).wait().map_err(RunError::Claim)? {
            Claim::Acquired(lease) => lease,
            Claim::Completed(first) => return Ok(RunOutcome::Replayed(first)),
            Claim::InProgress(other) => return Ok(RunOutcome::InProgress(other)),
        };
        let renewal = lease.renewal();
        let outcome = work(&mut lease);
        drop(renewal);
        match outcome {
            Ok(result) => {
                let completed = lease.complete_blocking(result.into());
                completed.map(|completion| RunOutcome::First(completion.into_result())).map_err(RunError::Complete)
            }
            Err(error) => {
                report(lease.release().wait());
                Err(RunError::Work(error))
            }
        }
    }

    /// As [`Store::run`], for work that awaits. Dropping this future while the work runs drops the lease: the next claim reports
    /// [`Dropped`](crate::PriorAttempt::Dropped). If the lease is lost, the work runs to its end, and its completion fails
    /// with [`Error::Superseded`].
    ///
    /// # Errors
    ///
    /// As [`Store::run`].
    ///
    /// ```
    /// use onlyonce::{FencingToken, RunOutcome, Store};
    ///
    /// # async fn charge(_token: FencingToken) -> Result<Vec<u8>, std::io::Error> { Ok(b"receipt 1".to_vec()) }
    /// # async fn work(store: &Store) -> Result<(), Box<dyn std::error::Error>> {
    /// for _ in 0..2 {
    ///     match store.run_async("order-4711", async |lease| charge(lease.token()).await).await? {
    ///         RunOutcome::First(result) => assert_eq!(result, b"receipt 1"),
    ///         RunOutcome::Replayed(first) => assert_eq!(first.result(), Some(&b"receipt 1"[..])),
    ///         RunOutcome::InProgress(_) => unreachable!("no other caller"),
    ///     }
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
    #[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
    pub async fn run_async<'k, E>(
        &self,
        key: impl Into<onlyonce_core::Key<'k>>,
        work: impl AsyncFnOnce(&mut Lease) -> Result<Vec<u8>, E>,
    ) -> Result<RunOutcome, RunError<E>> {
        let mut lease = match self.claim(key).await.map_err(RunError::Claim)? {
            Claim::Acquired(lease) => lease,
            Claim::Completed(first) => return Ok(RunOutcome::Replayed(first)),
            Claim::InProgress(other) => return Ok(RunOutcome::InProgress(other)),
        };
        let renewal = lease.renewal();
        let outcome = work(&mut lease).await;
        drop(renewal);
        match outcome {
            Ok(result) => {
                let completed = lease.complete_async(result.into()).await;
                completed.map(|completion| RunOutcome::First(completion.into_result())).map_err(RunError::Complete)
            }
            Err(error) => {
                report(lease.release().await);
                Err(RunError::Work(error))
            }
        }
    }
}

/// Nothing is lost if a release fails: the lease is dropped, or another holder has the key.
fn report(released: onlyonce_core::Result<()>) {
    if let Err(error) = released {
        tracing::warn!(error = error.chain(), "failed to release the lease of failed work");
    }
}
