//! A stream that passes each item once.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;

use super::{Claim, Lease, Store};
use crate::claim::{Completed, InProgress};
use crate::error::{Error, Result};
use crate::key::Key;

impl Store {
    /// Passes the items of a stream whose work is not done, each with the lease on its key: see [`Once`]. Waits up to
    /// `limit` where another holder in this process has the key.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Key, future};
    /// use tokio_stream::StreamExt;
    ///
    /// # async fn work(store: &future::Store) -> Result<(), Box<dyn std::error::Error>> {
    /// let messages = tokio_stream::iter(["a", "b", "a"]);
    /// let mut once = store.once(messages, Duration::from_secs(60), |message| Key::from(*message));
    /// let mut seen = Vec::new();
    /// while let Some(next) = once.next().await {
    ///     let (message, lease) = next?;
    ///     seen.push(message);
    ///     lease.complete("").await?;
    /// }
    /// assert_eq!(seen, ["a", "b"]);
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
    pub fn once<S: Stream, K: FnMut(&S::Item) -> Key<'_>>(&self, stream: S, limit: Duration, key: K) -> Once<S, K> {
        Once::new(self.clone(), stream, limit, key)
    }
}

/// The items of a stream whose work is not done yet, each with the lease on its key. Made by [`Store::once`].
///
/// An item counts as done when its lease is completed, not when it is passed: whoever gets it may fail or die, and then it
/// must pass again when it is delivered again. A stream that marked what it has passed would lose it. So:
///
/// - An item whose key is **completed** is not passed; [`Once::on_duplicate`] sees it, to acknowledge it.
/// - An item whose key **somebody in this process holds** waits until that holder is done, and the stream with it: then it
///   is a duplicate, or passes. After the limit it comes as an error that gives it back, [`Why::InProgress`]: have it
///   delivered again later. Nothing is dropped in silence.
/// - Where the **claim fails**, the item comes as an error that gives it back, [`Why::Failed`], and the stream goes on.
///
/// A duplicate waits for the leases that were passed before it. Complete them before you ask for the next item, or
/// meanwhile (in tasks, with `buffer_unordered`); whoever collects leases first and completes them afterwards waits for
/// himself until the limit.
///
/// The key is asked for item by item, in order: each costs one way to the committer. Where more than some ten thousand
/// a second come, take them in chunks and use [`Store::claim_batch`].
#[must_use = "streams do nothing unless polled"]
pub struct Once<S: Stream, K> {
    stream: Pin<Box<S>>,
    store: Store,
    limit: Duration,
    key: K,
    on_duplicate: Option<OnDuplicate<S::Item>>,
    /// The item that is being asked about, and the answer to come.
    asked: Option<(S::Item, Response)>,
}

type Response = Pin<Box<dyn Future<Output = Result<Claim>> + Send>>;
type OnDuplicate<T> = Box<dyn FnMut(T, Completed) + Send>;

/// An item that was not passed and is not known to be done. Have it delivered again.
#[derive(Debug)]
pub struct Unclaimed<T> {
    /// The item.
    pub item: T,
    /// Why its key could not be claimed.
    pub why: Why,
}

/// Why an item was not passed.
#[derive(Debug)]
pub enum Why {
    /// Somebody else is at it, for longer than the limit.
    InProgress(InProgress),
    /// The claim failed.
    Failed(Error),
}

impl<S: Stream, K: FnMut(&S::Item) -> Key<'_>> Once<S, K> {
    pub(super) fn new(store: Store, stream: S, limit: Duration, key: K) -> Self {
        Self { stream: Box::pin(stream), store, limit, key, on_duplicate: None, asked: None }
    }

    /// What to do with an item that was done before, such as acknowledging it. It must not block. By default it is
    /// dropped.
    pub fn on_duplicate(mut self, done: impl FnMut(S::Item, Completed) + Send + 'static) -> Self {
        self.on_duplicate = Some(Box::new(done));
        self
    }
}

// Items are moved, never pinned.
impl<S: Stream, K> Unpin for Once<S, K> {}

impl<S: Stream, K: FnMut(&S::Item) -> Key<'_>> Stream for Once<S, K> {
    type Item = Result<(S::Item, Lease), Unclaimed<S::Item>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        loop {
            if let Some((_, answer)) = &mut this.asked {
                let answer = ready!(answer.as_mut().poll(context));
                let Some((item, _)) = this.asked.take() else { continue };
                return Poll::Ready(Some(match answer {
                    Ok(Claim::Acquired(lease)) => Ok((item, lease)),
                    Ok(Claim::Completed(first)) => {
                        if let Some(on_duplicate) = &mut this.on_duplicate {
                            on_duplicate(item, first);
                        }
                        continue;
                    }
                    Ok(Claim::InProgress(other)) => Err(Unclaimed { item, why: Why::InProgress(other) }),
                    Err(error) => Err(Unclaimed { item, why: Why::Failed(error) }),
                }));
            }
            let Some(item) = ready!(this.stream.as_mut().poll_next(context)) else { return Poll::Ready(None) };
            let request = match this.store.one((this.key)(&item)) {
                Ok(request) => request,
                Err(error) => return Poll::Ready(Some(Err(Unclaimed { item, why: Why::Failed(error) }))),
            };
            let (store, limit) = (this.store.clone(), this.limit);
            this.asked = Some((item, Box::pin(async move { store.wait_for_one(&request, limit).await })));
        }
    }
}

impl<S: Stream, K> fmt::Debug for Once<S, K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Once").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl<T> fmt::Display for Unclaimed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.why {
            Why::InProgress(_) => f.write_str("an item was not passed: somebody else is at it"),
            Why::Failed(error) => write!(f, "an item was not passed: {error}"),
        }
    }
}

impl<T: fmt::Debug> std::error::Error for Unclaimed<T> {}
