//! The request extension through which a handler and the layer communicate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(doc)]
use onlyonce_core::OnStoreFailure;
use onlyonce_core::{AttemptInfo, FencingToken, SideWrites};
use parking_lot::Mutex;

/// The current attempt to process a request. The layer adds it to the extensions of each guarded request.
///
/// It is missing on unguarded requests: other methods, requests without a key if keys are optional, and requests that run
/// while the store fails ([`OnStoreFailure::FailOpen`]). A handler that may get such requests extracts
/// an `Option`.
#[derive(Debug, Clone)]
pub struct Attempt {
    key: Arc<str>,
    info: AttemptInfo,
    /// Shared by all clones.
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Writes that are stored together with the response.
    side_writes: Mutex<SideWrites>,
    begun: AtomicBool,
}

impl Attempt {
    pub(crate) fn new(key: String, info: AttemptInfo) -> Self {
        Self { key: key.into(), info, shared: Arc::default() }
    }

    /// Returns the idempotency key without quotes and escapes, and without the scope. Two scopes may use the same key: add
    /// the scope before you pass the key to another system.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the facts of the attempt: its fencing token, its number, and how the earlier attempts ended.
    #[must_use]
    pub fn info(&self) -> AttemptInfo {
        self.info
    }

    /// Returns the fencing token, which is higher than that of every earlier attempt. Pass it to systems that can reject a
    /// lower token than they have seen.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.info.token()
    }

    /// Returns whether an earlier attempt may have had its effect. If so, query the other system before you repeat the
    /// effect.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.info.may_have_happened()
    }

    /// Declares that the work begins: from now on it may have an effect. Call it before the first effect. It is idempotent
    /// and writes nothing to the store.
    ///
    /// Afterwards no status releases the key: a [`Disposition::Release`](crate::Disposition::Release) that the layer derives
    /// from a status counts as [`Disposition::Interrupted`](crate::Disposition::Interrupted). A `Disposition` that the
    /// handler sets itself is kept. With
    /// [`IdempotencyLayer::explicit_begin`](crate::IdempotencyLayer::explicit_begin), a 4xx or 5xx without this call
    /// releases the key.
    pub fn begin(&self) {
        // Pairs with the load in `has_begun`, in the task that ran the handler.
        self.shared.begun.store(true, Ordering::Release);
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.shared.begun.load(Ordering::Acquire)
    }

    /// Adds outbox messages and offsets that are stored in the same write as the response. If the response is not stored,
    /// they are not stored either: because of its [`Disposition`](crate::Disposition), because another request took over the
    /// key, or because the store fails, even under [`OnStoreFailure::FailOpen`].
    ///
    /// `add` runs immediately. It must not call this method.
    ///
    /// ```
    /// # fn handler(attempt: onlyonce_http::Attempt) {
    /// attempt.side_writes(|writes| {
    ///     writes.message("charges", "order-4711", "12 EUR");
    /// });
    /// # }
    /// ```
    pub fn side_writes(&self, add: impl FnOnce(&mut SideWrites)) {
        add(&mut self.shared.side_writes.lock());
    }

    pub(crate) fn take_side_writes(&self) -> SideWrites {
        std::mem::take(&mut *self.shared.side_writes.lock())
    }
}
