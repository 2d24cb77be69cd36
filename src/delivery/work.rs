//! What the work is told, and how it says that it failed.

use std::any::Any;
use std::fmt;

use crate::entry::Prior;
use crate::future::Lease;
use crate::tx::Tx;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a piece of work is told of itself, and what it stores with its result.
#[derive(Debug)]
pub struct Job {
    token: u64,
    attempt: u32,
    prior: Option<Prior>,
    guarded: bool,
    tx: Tx,
}

impl Job {
    pub(super) fn of(lease: &Lease) -> Self {
        let (token, attempt, prior) = (lease.token(), lease.attempt(), lease.prior());
        Self { token, attempt, prior, guarded: true, tx: Tx::default() }
    }

    pub(super) fn unguarded() -> Self {
        Self { token: 0, attempt: 1, prior: None, guarded: false, tx: Tx::default() }
    }

    /// The fencing token of its lease, for the other side to compare: see [`Lease::token`]. 0, which is lower than any,
    /// where the work is not guarded.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.token
    }

    /// Which attempt it is, from 1. Begins anew when the delivery was rejected.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// What became of the attempts before, as [`Lease::prior`](crate::Lease::prior). `None` where the work is not
    /// guarded, for then nobody knows.
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.prior
    }

    /// Whether a lease guards the work. If not, the store has failed and the caller has chosen
    /// [`OnStoreFailure::FailOpen`](super::OnStoreFailure::FailOpen).
    #[must_use]
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// Whether the effect may have happened before: ask the other side, before you repeat it. True when an earlier
    /// attempt ended in anything but a failure that did nothing, and when the work is not guarded.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        !self.guarded || self.prior.is_some_and(Prior::may_have_happened)
    }

    /// What is stored in the same write as the result: see [`Lease::complete_with`](crate::Lease::complete_with). Work
    /// that is not guarded has nowhere to put it: its delivery comes back. An offset is right only where a partition's
    /// deliveries are worked on one after the other.
    pub fn tx(&mut self) -> &mut Tx {
        &mut self.tx
    }

    pub(super) fn into_tx(self) -> Tx {
        self.tx
    }
}

/// How a piece of work failed. Any error becomes one, by `?` or `into`: the attempt did nothing and may be made again.
///
/// It is no [`Error`](std::error::Error) itself; [`Failure::error`] is.
pub struct Failure {
    kind: Kind,
    error: BoxError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nothing,
    Unknown,
    Permanent,
}

impl Failure {
    /// The attempt may have had its effect, or a part of it: a charge was sent, and its answer did not come. The next
    /// attempt is told.
    #[must_use]
    pub fn unknown(error: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unknown, error: error.into() }
    }

    /// The attempt did nothing, and no other will: the delivery is rejected at once.
    #[must_use]
    pub fn permanent(error: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Permanent, error: error.into() }
    }

    pub(super) fn panicked(payload: &(dyn Any + Send)) -> Self {
        let said = payload.downcast_ref::<&str>().copied();
        let said = said.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a word");
        Self::unknown(format!("the work panicked: {said}"))
    }

    /// What went wrong, in the work's own words.
    #[must_use]
    pub fn error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.error
    }

    /// Whether the attempt may have had its effect. True for a panic.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.kind == Kind::Unknown
    }

    /// Whether no other attempt is worth it.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.kind == Kind::Permanent
    }
}

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { kind: Kind::Nothing, error: error.into() }
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failure").field("kind", &self.kind).field("error", &self.error).finish()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}
