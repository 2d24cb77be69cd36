use std::fmt;

/// A number that orders the holders of all keys of a store: each lease has a higher one than every lease before it.
///
/// Pass it along with effects outside of the store, where the receiver can reject a lower token than it has seen. That
/// stops a holder whose lease was taken over from doing harm. Tokens of two stores cannot be compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FencingToken(u64);

impl FencingToken {
    /// The token with this number.
    #[must_use]
    pub const fn new(token: u64) -> Self {
        Self(token)
    }

    /// Its number, from 1. Stays below 2^53 for the first 28 years at ten million leases a second.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl From<FencingToken> for u64 {
    fn from(token: FencingToken) -> Self {
        token.0
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FencingToken({})", self.0)
    }
}

/// How the last attempt at a key ended, if not by completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PriorAttempt {
    /// Its holder released the lease, and so did every holder before it: no attempt had an effect.
    Released,
    /// Its lease expired while the holder's process was running. The holder may still be working.
    LeaseExpired,
    /// Its lease was dropped, for example by a panic. The outcome is unknown.
    Dropped,
    /// Its process crashed or closed the store. The outcome is unknown.
    Crashed,
}

impl PriorAttempt {
    /// True unless the attempt was [`Released`](Self::Released): its effect may have happened.
    #[must_use]
    pub fn may_have_happened(self) -> bool {
        self != Self::Released
    }
}

/// The facts of an attempt at a key. Leases, HTTP requests and deliveries have one each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttemptInfo {
    token: FencingToken,
    number: u32,
    prior: Option<PriorAttempt>,
}

impl AttemptInfo {
    /// The facts, as an engine knows them.
    #[must_use]
    pub fn new(token: FencingToken, number: u32, prior: Option<PriorAttempt>) -> Self {
        Self { token, number, prior }
    }

    /// The fencing token.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.token
    }

    /// The number of this attempt at the key, from 1.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// How the last attempt ended. `None` on the first attempt.
    #[must_use]
    pub fn prior(&self) -> Option<PriorAttempt> {
        self.prior
    }

    /// True if an earlier attempt may have had its effect: check for the effect before you repeat it. False on the first
    /// attempt, and if every earlier attempt was released.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.prior.is_some_and(PriorAttempt::may_have_happened)
    }
}
