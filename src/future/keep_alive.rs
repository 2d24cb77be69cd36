//! Renewing a lease while its work runs.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::Lease;
use crate::error::{Error, Result};

/// Renewals in the length of a lease: two may come late, or be missed by a runtime that is busy.
const RENEWALS: u64 = 3;

impl Lease {
    /// Renews the lease while the work runs, three times in its length, until the guard is dropped.
    ///
    /// A holder that hangs keeps its key as long as the guard lives: give the work a time limit of its own.
    ///
    /// ```
    /// # use onlyonce::{Claim, future};
    /// # async fn charge() -> &'static str { "charged" }
    /// # async fn work(store: &future::Store) -> Result<(), Box<dyn std::error::Error>> {
    /// if let Claim::Acquired(mut lease) = store.claim("order-4711").await? {
    ///     // An error says that somebody else has the key: the work was dropped where it was.
    ///     let receipt = lease.keep_alive().during(charge()).await?;
    ///     lease.complete(receipt).await?;
    /// }
    /// # Ok(())
    /// # }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let store = future::Store::new(onlyonce::Store::open(dir.path().join("store"))?)?;
    /// # let runtime = tokio::runtime::Runtime::new()?;
    /// # runtime.block_on(work(&store))?;
    /// # Ok(runtime.block_on(store.close())?)
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime, or in one without time: it spawns a task.
    pub fn keep_alive(&mut self) -> KeepAlive<'_> {
        KeepAlive::start(self)
    }
}

/// Renews a [`Lease`] until it is dropped. Made by [`Lease::keep_alive`].
#[must_use = "renewal ends when this is dropped"]
pub struct KeepAlive<'a> {
    lease: &'a mut Lease,
    shared: Arc<Mutex<Shared>>,
    task: AbortHandle,
    told: oneshot::Receiver<Error>,
    lost: Option<Error>,
}

#[derive(Default)]
struct Shared {
    /// Looked at under the lock by each renewal, so that none comes after the end.
    stopped: bool,
    until_monotonic_ms: Option<u64>,
}

impl<'a> KeepAlive<'a> {
    pub(super) fn start(lease: &'a mut Lease) -> Self {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (tell, told) = oneshot::channel();
        let (grant, committer) = (lease.lease.grant().clone(), Arc::clone(&lease.committer));
        let lease_ms = committer.running.engine.config().lease_ms;
        let mut ticks = interval(Duration::from_millis((lease_ms / RENEWALS).max(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let renewals = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            loop {
                ticks.tick().await;
                let mut shared = renewals.lock();
                if shared.stopped {
                    return;
                }
                let error = match committer.running.engine.renew(&grant) {
                    Ok(Some(until_monotonic_ms)) => {
                        shared.until_monotonic_ms = Some(until_monotonic_ms);
                        continue;
                    }
                    Ok(None) => grant.superseded(),
                    Err(error) => error,
                };
                let _ = tell.send(error);
                return;
            }
        });
        Self { lease, shared, task: task.abort_handle(), told, lost: None }
    }

    /// The fencing token of the lease that is renewed.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.lease.token()
    }

    /// Does the work as long as the lease is ours. The work is dropped, at its await, when the lease is lost.
    ///
    /// # Errors
    ///
    /// As [`KeepAlive::lost`]. The lease can still be asked for what it knows, or dropped.
    pub async fn during<F: Future>(mut self, work: F) -> Result<F::Output> {
        let mut work = pin!(work);
        let mut lost = pin!(self.lost());
        poll_fn(|context| {
            // The work first: what is done is done.
            if let Poll::Ready(output) = work.as_mut().poll(context) {
                return Poll::Ready(Ok(output));
            }
            lost.as_mut().poll(context).map(Err)
        })
        .await
    }

    /// Done when the lease could not be renewed: with [`Error::Superseded`] where somebody has taken over or decided that
    /// the work runs again, with [`Error::Poisoned`] or [`Error::Closed`] where the store has ended. Stop working.
    ///
    /// May be dropped and called again.
    pub async fn lost(&mut self) -> Error {
        if let Some(error) = &self.lost {
            return error.clone();
        }
        // The task ends without a word only with its runtime.
        let error = (&mut self.told).await.unwrap_or(Error::Closed);
        self.lost.insert(error).clone()
    }
}

impl Drop for KeepAlive<'_> {
    fn drop(&mut self) {
        let mut shared = self.shared.lock();
        shared.stopped = true;
        if let Some(until_monotonic_ms) = shared.until_monotonic_ms {
            self.lease.lease.renewed(until_monotonic_ms);
        }
        drop(shared);
        self.task.abort();
    }
}

impl std::fmt::Debug for KeepAlive<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeepAlive").field("lease", &self.lease).finish_non_exhaustive()
    }
}
