//! What a layer counts, and the handlers that it has at work.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::stats::Counter;

/// What a layer has done so far, from [`IdempotencyLayer::figures`](super::IdempotencyLayer::figures). Counted from the
/// layer's making on, over all of its clones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Figures {
    /// Requests whose handler was run under a lease.
    pub executed: u64,
    /// Of those, requests whose answer was stored.
    pub stored: u64,
    /// Of those, requests whose answer was stored without its body, which was too large.
    pub bodies_not_kept: u64,
    /// Of the executed ones, requests whose answer went through as a stream.
    pub streamed: u64,
    /// Requests whose key was released, because of their answer's [`Fate`](super::Fate) or because they failed before their
    /// work began.
    pub released: u64,
    /// Requests whose outcome is unknown: by their answer's fate, a panic, an error of the handler, an answer that broke
    /// off, or a lost lease.
    pub interrupted: u64,
    /// Requests that were answered with what an earlier one had got.
    pub replayed: u64,
    /// Requests that were told to come back, because another one was at work or the key is held: 409.
    pub outstanding: u64,
    /// Requests whose key was used with another payload: 422.
    pub mismatched: u64,
    /// Requests whose key, scope or body was missing, malformed or too large: 400, 403, 413.
    pub refused: u64,
    /// Requests that were not served because the store failed, before the handler or after it: 503.
    pub failed_closed: u64,
    /// Requests that were served without protection while the store failed, or whose answer could not be stored and was
    /// given all the same. Each may be worked on again. Watch it: with
    /// [`OnStoreFailure::FailClosed`](super::OnStoreFailure::FailClosed) it stays zero. Also in
    /// [`Stats::fail_open`](crate::Stats::fail_open), with what else uses the store.
    pub failed_open: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) executed: Counter,
    pub(super) stored: Counter,
    pub(super) bodies_not_kept: Counter,
    pub(super) streamed: Counter,
    pub(super) released: Counter,
    pub(super) interrupted: Counter,
    pub(super) replayed: Counter,
    pub(super) outstanding: Counter,
    pub(super) mismatched: Counter,
    pub(super) refused: Counter,
    pub(super) failed_closed: Counter,
    pub(super) failed_open: Counter,
}

impl Counters {
    pub(super) fn figures(&self) -> Figures {
        Figures {
            executed: self.executed.get(),
            stored: self.stored.get(),
            bodies_not_kept: self.bodies_not_kept.get(),
            streamed: self.streamed.get(),
            released: self.released.get(),
            interrupted: self.interrupted.get(),
            replayed: self.replayed.get(),
            outstanding: self.outstanding.get(),
            mismatched: self.mismatched.get(),
            refused: self.refused.get(),
            failed_closed: self.failed_closed.get(),
            failed_open: self.failed_open.get(),
        }
    }
}

/// How many handlers are at work, with or without a client that waits for them.
#[derive(Clone)]
pub(super) struct AtWork(Arc<watch::Sender<usize>>);

impl AtWork {
    pub(super) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Counts one more, until what it gives is dropped.
    pub(super) fn begin(&self) -> Begun {
        self.0.send_modify(|handlers| *handlers = handlers.saturating_add(1));
        Begun(Arc::clone(&self.0))
    }

    /// Waits until there are none, for `limit` at most, and says how many there are then.
    pub(super) async fn none(&self, limit: Duration) -> usize {
        let mut handlers = self.0.subscribe();
        // It fails when the time is over. The sender is here, and is not dropped meanwhile.
        let _ = tokio::time::timeout(limit, handlers.wait_for(|handlers| *handlers == 0)).await;
        *self.0.borrow()
    }
}

pub(super) struct Begun(Arc<watch::Sender<usize>>);

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.send_modify(|handlers| *handlers = handlers.saturating_sub(1));
    }
}
