use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use onlyonce_core::{Completed, Error, InProgress, Key, Result};

use super::Claim;
use super::call::Submitted;
use super::lease::Lease;
use super::store::Store;

impl Store {
    /// Yields the items of a stream whose work is not done, each with a lease on its key: see [`DedupStream`]. If another holder in
    /// this process has the key, waits up to `limit` for it.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Key, Store};
    /// use tokio_stream::StreamExt;
    ///
    /// # async fn work(store: &Store) -> Result<(), Box<dyn std::error::Error>> {
    /// let messages = tokio_stream::iter(["a", "b", "a"]);
    /// let mut deduplicated = store.dedup_stream(messages, Duration::from_secs(60), |message| Key::from(*message));
    /// let mut seen = Vec::new();
    /// while let Some(next) = deduplicated.next().await {
    ///     let (message, lease) = next?;
    ///     seen.push(message);
    ///     lease.complete("").await?;
    /// }
    /// assert_eq!(seen, ["a", "b"]);
    /// # Ok(())
    /// # }
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::open(dir.path().join("store"))?;
    /// # tokio::runtime::Runtime::new()?.block_on(work(&store))?;
    /// # store.close().wait()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn dedup_stream<S: Stream, K: FnMut(&S::Item) -> Key<'_>>(
        &self,
        stream: S,
        limit: Duration,
        key: K,
    ) -> DedupStream<S, K> {
        DedupStream { stream: Box::pin(stream), store: self.clone(), limit, key, on_duplicate: None, pending: None }
    }
}

/// The items of a stream whose work is not done, each with the lease on its key. Made by [`Store::dedup_stream`].
///
/// An item is done when its lease is completed, not when it is yielded: if its consumer fails or crashes, a redelivery must be
/// yielded again. So:
///
/// - An item whose key is **completed** is not yielded. [`DedupStream::on_duplicate`] receives it, to acknowledge it.
/// - An item whose key is **in progress in this process** delays the stream until its holder finishes. Then it is a duplicate, or
///   it is yielded. After the limit it is returned in an error with [`UnclaimedReason::InProgress`]: let it be redelivered later.
/// - If the **claim fails**, the item is returned in an error with [`UnclaimedReason::Failed`], and the stream continues.
///
/// A duplicate waits for leases that were yielded before it. Complete them before you poll the next item, or concurrently (in
/// tasks, with `buffer_unordered`): collecting leases before completing them blocks until the limit.
///
/// Keys are claimed one by one, in order. For more than about ten thousand items a second, chunk the stream and use
/// [`Store::claim_batch`].
#[must_use = "streams do nothing unless polled"]
pub struct DedupStream<S: Stream, K> {
    stream: Pin<Box<S>>,
    store: Store,
    limit: Duration,
    key: K,
    on_duplicate: Option<OnDuplicate<S::Item>>,
    /// The item that is being claimed, and the answer to come.
    pending: Option<(S::Item, Submitted<Result<Claim>>)>,
}

type OnDuplicate<T> = Box<dyn FnMut(T, Completed) + Send>;

/// An item that was not yielded and may not be done. Let it be redelivered.
#[derive(Debug)]
pub struct Unclaimed<T> {
    /// The item.
    pub item: T,
    /// Why its key could not be claimed.
    pub reason: UnclaimedReason,
}

/// Why an item was not yielded.
#[derive(Debug)]
pub enum UnclaimedReason {
    /// Its key was in progress for longer than the limit.
    InProgress(InProgress),
    /// The claim failed.
    Failed(Error),
}

impl<S: Stream, K> DedupStream<S, K> {
    /// Calls `duplicate` with each item that was done before, for example to acknowledge it. It must not block. Without it
    /// duplicates are dropped.
    pub fn on_duplicate(mut self, duplicate: impl FnMut(S::Item, Completed) + Send + 'static) -> Self {
        self.on_duplicate = Some(Box::new(duplicate));
        self
    }
}

// Items are moved, never pinned.
impl<S: Stream, K> Unpin for DedupStream<S, K> {}

impl<S: Stream, K: FnMut(&S::Item) -> Key<'_>> Stream for DedupStream<S, K> {
    type Item = Result<(S::Item, Lease), Unclaimed<S::Item>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some((_, answer)) = &mut this.pending {
                let answer = ready!(answer.as_mut().poll(context));
                let Some((item, _)) = this.pending.take() else { continue };
                return Poll::Ready(Some(match answer {
                    Ok(Claim::Acquired(lease)) => Ok((item, lease)),
                    Ok(Claim::Completed(first)) => {
                        if let Some(on_duplicate) = &mut this.on_duplicate {
                            on_duplicate(item, first);
                        }
                        continue;
                    }
                    Ok(Claim::InProgress(other)) => Err(Unclaimed { item, reason: UnclaimedReason::InProgress(other) }),
                    Err(error) => Err(Unclaimed { item, reason: UnclaimedReason::Failed(error) }),
                }));
            }
            let Some(item) = ready!(this.stream.as_mut().poll_next(context)) else { return Poll::Ready(None) };
            let claim = this.store.claim((this.key)(&item)).wait_up_to(this.limit).into_future();
            this.pending = Some((item, claim));
        }
    }
}

impl<S: Stream, K> fmt::Debug for DedupStream<S, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DedupStream").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl<T> fmt::Display for Unclaimed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            UnclaimedReason::InProgress(_) => f.write_str("the key of an item is in progress: let it be redelivered"),
            UnclaimedReason::Failed(_) => f.write_str("the key of an item could not be claimed: let it be redelivered"),
        }
    }
}

impl<T: fmt::Debug> std::error::Error for Unclaimed<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.reason {
            UnclaimedReason::InProgress(_) => None,
            UnclaimedReason::Failed(error) => Some(error),
        }
    }
}
