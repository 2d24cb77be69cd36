//! The facts of an attempt, as the work sees them.

use crate::entry::Prior;
use crate::future::Lease;
use crate::tx::Tx;

/// One attempt at the work of a delivery: its facts, and the writes to store with its result.
#[derive(Debug)]
pub struct Attempt {
    token: u64,
    number: u32,
    prior: Option<Prior>,
    has_lease: bool,
    side_writes: Tx,
}

impl Attempt {
    pub(super) fn of(lease: &Lease) -> Self {
        let (token, number, prior) = (lease.token(), lease.attempt(), lease.prior());
        Self { token, number, prior, has_lease: true, side_writes: Tx::default() }
    }

    pub(super) fn without_lease() -> Self {
        Self { token: 0, number: 1, prior: None, has_lease: false, side_writes: Tx::default() }
    }

    /// The fencing token of the lease, for the system that the work changes: see [`Lease::token`]. Without a lease it is 0,
    /// lower than every token of a lease.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// The number of this attempt, from 1. A rejection resets the count.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// How the earlier attempts ended: see [`Lease::prior`](crate::Lease::prior). `None` without a lease, because the
    /// store did not answer.
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.prior
    }

    /// False if the store failed and [`OnStoreFailure::FailOpen`](super::OnStoreFailure::FailOpen) runs the work without
    /// deduplication.
    #[must_use]
    pub fn has_lease(&self) -> bool {
        self.has_lease
    }

    /// True if an earlier attempt may have had its effect: check before you repeat it. True after every attempt that ended
    /// in anything but a failure without effect, and always without a lease.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        !self.has_lease || self.prior.is_some_and(Prior::may_have_happened)
    }

    /// Offsets and outbox messages to store in the same write as the result: see
    /// [`Lease::complete_with`](crate::Lease::complete_with). Without a lease nothing can be stored: the delivery is
    /// redelivered. Set an offset only if the deliveries of its partition are processed one after the other.
    pub fn side_writes(&mut self) -> &mut Tx {
        &mut self.side_writes
    }

    pub(super) fn into_side_writes(self) -> Tx {
        self.side_writes
    }
}
