//! What the handler is told, and what it may say.

use std::sync::Arc;

use crate::concurrency::Mutex;
use crate::entry::Prior;
use crate::tx::Tx;

/// The attempt at a request that a handler makes. It is among the request's extensions.
///
/// It is not there where nothing is guarded: other methods, requests without a key where none is required, and requests
/// that pass while the store fails ([`OnStoreFailure::FailOpen`](super::OnStoreFailure)). A handler that may get such requests
/// takes it as an `Option`.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub(super) key: Arc<str>,
    pub(super) token: u64,
    pub(super) number: u32,
    pub(super) prior: Option<Prior>,
    /// What the answer takes along into the store.
    pub(super) tx: Arc<Mutex<Tx>>,
}

impl Attempt {
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

    /// What became of the attempts before, as [`Lease::prior`](crate::Lease::prior).
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.prior
    }

    /// Adds to the write that stores the answer: messages for the outbox, offsets, as
    /// [`Lease::complete_with`](crate::Lease::complete_with) does. Nothing of it is stored where the answer is not: by its
    /// [`Fate`], because somebody has taken over, or because the store fails, also where requests pass then.
    ///
    /// `fill` is called at once. Do not call this again inside of it.
    pub fn with_tx(&self, fill: impl FnOnce(&mut Tx)) {
        fill(&mut self.tx.lock());
    }

    /// What was added.
    pub(super) fn take_tx(&self) -> Tx {
        std::mem::take(&mut *self.tx.lock())
    }

    /// Whether an earlier attempt may have had its effect, as [`Lease::may_have_happened`](crate::Lease::may_have_happened):
    /// ask for it before you repeat it.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.prior.is_some_and(Prior::may_have_happened)
    }
}

/// What becomes of a request's key when the handler has answered.
///
/// [`IdempotencyLayer::fate`](super::IdempotencyLayer::fate) decides by the response. A handler that knows better says so
/// itself: it puts a `Fate` among the response's extensions, and that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The work is done, whether it went well or not: the answer is stored, and every retry gets it.
    Store,
    /// Nothing has happened: a retry runs as if it were the first.
    Release,
    /// It is open whether anything has happened. Under [`OnInterrupt::Rerun`](crate::OnInterrupt::Rerun) a retry runs, and
    /// [`Attempt::prior`] tells it; under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold) the key is held.
    Interrupted,
}
