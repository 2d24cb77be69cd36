//! The counters of a layer, and the number of its running requests.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::event::Event;

/// Counters of a layer and its clones since the layer was created. Returned by
/// [`IdempotencyLayer::stats`](crate::IdempotencyLayer::stats).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LayerStats {
    /// Requests whose handler ran under a lease.
    pub executed: u64,
    /// Executed requests whose response was stored.
    pub stored: u64,
    /// Stored responses without their body, because the body was too large.
    pub bodies_not_stored: u64,
    /// Executed requests whose response was forwarded as a stream.
    pub streamed: u64,
    /// Executed requests whose key was released, because of their [`Disposition`](crate::Disposition) or because they
    /// failed before their work began.
    pub released: u64,
    /// Executed requests with an unknown outcome: by their disposition, a panic, a handler error, a response body that
    /// failed, or a lost lease.
    pub interrupted: u64,
    /// Requests that got the stored response of an earlier request.
    pub replayed: u64,
    /// Requests that got 409, because a request with their key was in progress or held.
    pub in_progress: u64,
    /// Requests that got 422, because their key was used with another payload.
    pub payload_mismatches: u64,
    /// Requests with a missing, malformed or too large key, scope or body: 400, 403, 413.
    pub rejected: u64,
    /// Requests that got 503, because the store failed before or after the handler.
    pub fail_closed: u64,
    /// Requests that ran without deduplication while the store failed, or whose response was sent although it could not be
    /// stored. Each may run twice, so alert on this counter. It stays zero under
    /// [`OnStoreFailure::FailClosed`](onlyonce_core::OnStoreFailure::FailClosed). The engine counts them, too.
    pub fail_open: u64,
}

impl LayerStats {
    fn add(&mut self, event: Event) {
        *match event {
            Event::Executed => &mut self.executed,
            Event::Stored => &mut self.stored,
            Event::BodyNotStored => &mut self.bodies_not_stored,
            Event::Streamed => &mut self.streamed,
            Event::Released => &mut self.released,
            Event::Interrupted => &mut self.interrupted,
            Event::Replayed => &mut self.replayed,
            Event::InProgress => &mut self.in_progress,
            Event::PayloadMismatch => &mut self.payload_mismatches,
            Event::Rejected => &mut self.rejected,
            Event::FailClosed => &mut self.fail_closed,
            Event::FailOpen => &mut self.fail_open,
        } += 1;
    }
}

#[derive(Default)]
pub(crate) struct Counters(Mutex<LayerStats>);

impl Counters {
    pub(crate) fn new() -> Self {
        #[cfg(feature = "metrics")]
        crate::metrics::describe();
        Self::default()
    }

    pub(crate) fn count(&self, event: Event) {
        self.0.lock().add(event);
        #[cfg(feature = "metrics")]
        crate::metrics::count(event);
    }

    pub(crate) fn stats(&self) -> LayerStats {
        *self.0.lock()
    }
}

/// The number of running requests, including those whose client has disconnected.
#[derive(Clone)]
pub(crate) struct RunningRequests(Arc<watch::Sender<usize>>);

impl RunningRequests {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Counts one more request until the returned guard is dropped.
    pub(crate) fn enter(&self) -> RunningGuard {
        self.0.send_modify(|running| *running = running.saturating_add(1));
        RunningGuard(Arc::clone(&self.0))
    }

    /// Waits until no request runs, for at most `limit`. Returns the number that still run.
    pub(crate) async fn wait_for_none(&self, limit: Duration) -> usize {
        let mut running = self.0.subscribe();
        // An error means that the time is over: `self` keeps the sender alive.
        let _ = tokio::time::timeout(limit, running.wait_for(|running| *running == 0)).await;
        *self.0.borrow()
    }
}

pub(crate) struct RunningGuard(Arc<watch::Sender<usize>>);

impl Drop for RunningGuard {
    fn drop(&mut self) {
        self.0.send_modify(|running| *running = running.saturating_sub(1));
    }
}
