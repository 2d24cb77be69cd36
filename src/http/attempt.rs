//! What the handler is told, and what it may say.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::entry::Prior;
use crate::future::Lease;
use crate::testing::sync_shim::Mutex;
use crate::tx::Tx;

/// The attempt at a request that a handler makes. It is among the request's extensions.
///
/// It is missing where nothing is guarded: other methods, requests without a key where none is required, and requests
/// that pass while the store fails ([`OnStoreFailure::FailOpen`](super::OnStoreFailure)). A handler that may get such requests
/// takes it as an `Option`.
#[derive(Debug, Clone)]
pub struct Attempt {
    key: Arc<str>,
    token: u64,
    number: u32,
    prior: Option<Prior>,
    /// What all clones of an attempt share.
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// What is stored in the same write as the answer.
    tx: Mutex<Tx>,
    begun: AtomicBool,
}

impl Attempt {
    pub(super) fn new(key: String, lease: &Lease) -> Self {
        let (token, number, prior) = (lease.token(), lease.attempt(), lease.prior());
        Self { key: key.into(), token, number, prior, shared: Arc::default() }
    }

    /// The idempotency key as the client meant it: without quotes and escapes, and without the scope. To pass it on,
    /// put the tenant before it: two tenants may choose the same key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The fencing token, as [`Lease::token`](crate::Lease::token): higher than that of every attempt before.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Which attempt it is, from 1.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// How the attempts before ended, as [`Lease::prior`](crate::Lease::prior).
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.prior
    }

    /// Declares that the work begins: from here on it may have an effect. Call it before the first effect. Further calls
    /// change nothing. Costs no write.
    ///
    /// After it, no status releases the key as if nothing had happened: an answer that would
    /// ([`Fate::Release`](super::Fate::Release)) counts as [`Fate::Interrupted`](super::Fate::Interrupted), unless the
    /// handler sets a `Fate` itself. With [`IdempotencyLayer::explicit_begin`](super::IdempotencyLayer::explicit_begin) the
    /// reverse holds as well: a 4xx or 5xx without this call releases the key.
    pub fn begin(&self) {
        // Read by the task that has run the handler, after the handler.
        self.shared.begun.store(true, Ordering::Release);
    }

    pub(super) fn has_begun(&self) -> bool {
        self.shared.begun.load(Ordering::Acquire)
    }

    /// Adds to the write that stores the answer: messages for the outbox, offsets, as
    /// [`Lease::complete_with`](crate::Lease::complete_with) does. Nothing of it is stored if the answer is not: because of
    /// its [`Fate`](super::Fate), because another request took over, or because the store fails, even under
    /// [`OnStoreFailure::FailOpen`](super::OnStoreFailure).
    ///
    /// `fill` is called at once. Do not call this again inside of it.
    pub fn with_tx(&self, fill: impl FnOnce(&mut Tx)) {
        fill(&mut self.shared.tx.lock());
    }

    /// What was added.
    pub(super) fn take_tx(&self) -> Tx {
        std::mem::take(&mut *self.shared.tx.lock())
    }

    /// Whether an earlier attempt may have had its effect, as [`Lease::may_have_happened`](crate::Lease::may_have_happened):
    /// ask for it before you repeat it.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.prior.is_some_and(Prior::may_have_happened)
    }
}
