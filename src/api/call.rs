use std::fmt;

use crate::api::shared::Shared;

/// A call of a [`Store`](crate::Store) or [`Lease`](crate::Lease) that has not run yet.
///
/// - [`wait`](Call::wait) runs it on this thread, which blocks for as long as the disk needs.
/// - `.await` (feature `tokio`) submits it to two threads of the store's own and does not block. Calls that are submitted at
///   the same time share one journal record and one sync. The threads start with the first `.await`.
///
/// A call that is dropped before either does nothing; a lease in it is dropped.
///
/// # Dropped futures
///
/// A future can be dropped at any await, by a timeout or a `select!`, and leaves no key stuck:
///
/// - A **claim** whose answer was not taken leaves the key unclaimed, or takes the lease back: the next claim acquires the key at
///   once, with a higher attempt number and prior [`Released`](crate::PriorAttempt::Released). Only a crash before the next
///   flush can turn that into [`Crashed`](crate::PriorAttempt::Crashed).
/// - A **completion** or **release** happens once it is in the queue. Before that (not polled, or the queue is full) its lease
///   is dropped: the next claim reports [`Dropped`](crate::PriorAttempt::Dropped). Claim again to find out.
/// - Under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold) a dropped lease holds its key until it is resolved, as any
///   interrupted work does.
/// - Any **other call** happens or does not.
#[must_use = "a call does nothing before `.wait()` or `.await`"]
pub struct Call<O>(pub(crate) O);

impl<O: Operation> Call<O> {
    /// Runs the call on this thread and returns its answer.
    ///
    /// Do not use it in async code: it blocks the runtime's thread.
    #[inline]
    pub fn wait(self) -> O::Output {
        self.0.run()
    }
}

#[cfg(feature = "tokio")]
impl<O: Operation> IntoFuture for Call<O> {
    type Output = O::Output;
    type IntoFuture = Submitted<O::Output>;

    /// Submits the call when the future is polled.
    ///
    /// # Panics
    ///
    /// The future of a claim that waits for a holder panics outside of a Tokio runtime with time.
    fn into_future(self) -> Submitted<O::Output> {
        self.0.submit()
    }
}

/// The future of a [`Call`].
#[cfg(feature = "tokio")]
pub type Submitted<T> = onlyonce_core::BoxFuture<'static, T>;

impl<O> fmt::Debug for Call<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").finish_non_exhaustive()
    }
}

/// What a [`Call`] does, and what it returns. Implemented by this crate only.
pub trait Operation: sealed::Sealed {
    /// The answer.
    type Output;

    #[doc(hidden)]
    fn run(self) -> Self::Output;

    #[cfg(feature = "tokio")]
    #[doc(hidden)]
    fn submit(self) -> Submitted<Self::Output>;
}

pub(crate) mod sealed {
    pub trait Sealed: Sized {}
}

/// The thread that runs a call that is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    /// Claims, checks and reads, which need no sync.
    Ask,
    /// Completions, releases, records and whatever else waits for the disk.
    Commit,
}

/// A call that needs nothing of the calls submitted at the same time.
pub(crate) struct Task<'s, D, T> {
    pub(crate) shared: &'s std::sync::Arc<Shared>,
    #[cfg_attr(not(feature = "tokio"), expect(dead_code, reason = "only submitted calls have a queue"))]
    pub(crate) queue: Queue,
    /// The arguments.
    pub(crate) data: D,
    pub(crate) run: fn(&crate::engine::workers::StoreHandle, D) -> crate::Result<T>,
}

impl<D, T> sealed::Sealed for Task<'_, D, T> {}

impl<D: Send + 'static, T: Send + 'static> Operation for Task<'_, D, T> {
    type Output = crate::Result<T>;

    fn run(self) -> Self::Output {
        (self.run)(&self.shared.handle, self.data)
    }

    #[cfg(feature = "tokio")]
    fn submit(self) -> Submitted<Self::Output> {
        let Self { shared, queue, data, run } = self;
        let shared = std::sync::Arc::clone(shared);
        Box::pin(async move { shared.committer()?.call(queue, move |handle| run(handle, data)).await? })
    }
}
