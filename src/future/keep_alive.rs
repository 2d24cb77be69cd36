//! Renewing a lease while its work runs.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use super::Lease;
use crate::engine::renewal::Renewal;
use crate::error::{Error, Result};

impl Lease {
    /// Renews the lease at once, and then three times in its length until the guard is dropped, as
    /// [`Lease::keep_alive`](crate::Lease::keep_alive): a thread renews, one for all stores of the process, also while the
    /// work blocks its own thread, and where all threads of the runtime are busy.
    ///
    /// Work that never ends keeps its key as long as its process lives, or as long as
    /// [`Builder::renew_for`](crate::Builder::renew_for) allows: give the work a time limit of its own.
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
    pub fn keep_alive(&mut self) -> KeepAlive<'_> {
        KeepAlive { renewal: self.lease.renewal(), lease: self }
    }
}

/// Renews a [`Lease`] until it is dropped. Made by [`Lease::keep_alive`].
#[must_use = "renewal ends when this is dropped"]
pub struct KeepAlive<'a> {
    // Before the lease: it ends first.
    renewal: Renewal,
    lease: &'a mut Lease,
}

impl KeepAlive<'_> {
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
    /// the work runs again, with [`Error::Poisoned`] or [`Error::Closed`] where the store has ended, with [`Error::Io`]
    /// where the system gives no thread to renew. Stop working.
    ///
    /// May be dropped and called again.
    pub async fn lost(&mut self) -> Error {
        poll_fn(|context| self.renewal.poll_lost(context)).await
    }
}

impl std::fmt::Debug for KeepAlive<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeepAlive").field("lease", &self.lease).finish_non_exhaustive()
    }
}
