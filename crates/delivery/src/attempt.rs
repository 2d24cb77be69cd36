//! The facts of an attempt, as the work sees them.

use onlyonce_core::{AttemptInfo, FencingToken, PriorAttempt, SideWrites};

/// One attempt at the work of a delivery: its facts, and the writes to store with its result.
#[derive(Debug)]
pub struct Attempt {
    info: AttemptInfo,
    has_lease: bool,
    side_writes: SideWrites,
}

impl Attempt {
    pub(crate) fn new(info: AttemptInfo) -> Self {
        Self { info, has_lease: true, side_writes: SideWrites::default() }
    }

    pub(crate) fn without_lease() -> Self {
        let info = AttemptInfo::new(FencingToken::new(0), 1, None);
        Self { info, has_lease: false, side_writes: SideWrites::default() }
    }

    /// The facts that every attempt has. Without a lease the store did not answer, and they are those of a first attempt
    /// with token 0.
    #[must_use]
    pub fn info(&self) -> AttemptInfo {
        self.info
    }

    /// The fencing token of the lease, for the system that the work changes. Without a lease it is 0, lower than every token
    /// of a lease.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.info.token()
    }

    /// The number of this attempt, from 1. A rejection resets the count.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.info.number()
    }

    /// How the last attempt ended. `None` on the first attempt, and without a lease.
    #[must_use]
    pub fn prior(&self) -> Option<PriorAttempt> {
        self.info.prior()
    }

    /// False if the store failed and [`OnStoreFailure::FailOpen`](crate::OnStoreFailure::FailOpen) runs the work without
    /// deduplication.
    #[must_use]
    pub fn has_lease(&self) -> bool {
        self.has_lease
    }

    /// True if an earlier attempt may have had its effect: check for the effect before you repeat it. False on the first
    /// attempt, and if every earlier attempt was released. Always true without a lease.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        !self.has_lease || self.info.may_have_happened()
    }

    /// Offsets and outbox messages to store in the same write as the result. Without a lease nothing can be stored: the
    /// delivery is redelivered. Set an offset only if the deliveries of its partition are processed one after the other.
    pub fn side_writes(&mut self) -> &mut SideWrites {
        &mut self.side_writes
    }

    pub(crate) fn into_side_writes(self) -> SideWrites {
        self.side_writes
    }
}
