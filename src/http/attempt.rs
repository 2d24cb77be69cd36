//! The request extension through which a handler and the layer communicate.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::entry::Prior;
use crate::future::Lease;
use crate::testing::sync_shim::Mutex;
use crate::tx::Tx;

/// The current attempt to process a request. The layer adds it to the extensions of each guarded request.
///
/// It is missing on unguarded requests: other methods, requests without a key if keys are optional, and requests that run
/// while the store fails ([`OnStoreFailure::FailOpen`](super::OnStoreFailure)). A handler that may get such requests extracts
/// an `Option`.
#[derive(Debug, Clone)]
pub struct Attempt {
    key: Arc<str>,
    token: u64,
    number: u32,
    prior: Option<Prior>,
    /// Shared by all clones.
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Writes that are stored together with the response.
    tx: Mutex<Tx>,
    begun: AtomicBool,
}

impl Attempt {
    pub(super) fn new(key: String, lease: &Lease) -> Self {
        let (token, number, prior) = (lease.token(), lease.attempt(), lease.prior());
        Self { key: key.into(), token, number, prior, shared: Arc::default() }
    }

    /// Returns the idempotency key without quotes and escapes, and without the scope. Two scopes may use the same key: add
    /// the scope before you pass the key to another system.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Returns the fencing token ([`Lease::token`](crate::Lease::token)). It is higher than that of every earlier attempt.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Returns the number of this attempt, from 1.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Returns how the earlier attempts ended ([`Lease::prior`](crate::Lease::prior)).
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.prior
    }

    /// Declares that the work begins: from now on it may have an effect. Call it before the first effect. It is idempotent
    /// and writes nothing to the store.
    ///
    /// Afterwards no status releases the key: a [`Disposition::Release`](super::Disposition::Release) that the layer derives
    /// from a status counts as [`Disposition::Interrupted`](super::Disposition::Interrupted). A `Disposition` that the
    /// handler sets itself is kept. With
    /// [`IdempotencyLayer::explicit_begin`](super::IdempotencyLayer::explicit_begin), a 4xx or 5xx without this call
    /// releases the key.
    pub fn begin(&self) {
        // Pairs with the load in `has_begun`, in the task that ran the handler.
        self.shared.begun.store(true, Ordering::Release);
    }

    pub(super) fn has_begun(&self) -> bool {
        self.shared.begun.load(Ordering::Acquire)
    }

    /// Adds outbox messages and offsets to the write that stores the response
    /// ([`Lease::complete_with`](crate::Lease::complete_with)). If the response is not stored, they are not stored either:
    /// because of its [`Disposition`](super::Disposition), because another request took over the key, or because the store
    /// fails, even under [`OnStoreFailure::FailOpen`](super::OnStoreFailure).
    ///
    /// `fill` runs immediately. It must not call this method.
    pub fn with_tx(&self, fill: impl FnOnce(&mut Tx)) {
        fill(&mut self.shared.tx.lock());
    }

    pub(super) fn take_tx(&self) -> Tx {
        std::mem::take(&mut *self.shared.tx.lock())
    }

    /// Returns whether an earlier attempt may have had its effect
    /// ([`Lease::may_have_happened`](crate::Lease::may_have_happened)). If so, query the other system before you repeat the
    /// effect.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.prior.is_some_and(Prior::may_have_happened)
    }
}
