//! How the work of a delivery fails.

use std::any::Any;
use std::fmt;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A failed attempt. `?` and `into` convert any error into a failure without effect, which may be retried.
///
/// Not an [`Error`](std::error::Error) itself; [`Failure::error`] is.
pub struct Failure {
    kind: Kind,
    error: BoxError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Retryable,
    Unknown,
    Permanent,
}

impl Failure {
    /// The attempt may have had its effect, or part of it: the work sent a charge and got no answer. The next attempt
    /// reports `may_have_happened`.
    #[must_use]
    pub fn unknown(error: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Unknown, error: error.into() }
    }

    /// The attempt had no effect, and no retry can succeed: the delivery is rejected at once.
    #[must_use]
    pub fn permanent(error: impl Into<BoxError>) -> Self {
        Self { kind: Kind::Permanent, error: error.into() }
    }

    pub(crate) fn panicked(payload: &(dyn Any + Send)) -> Self {
        let message = payload.downcast_ref::<&str>().copied();
        let message = message.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        Self::unknown(format!("the work panicked: {}", message.unwrap_or("no message")))
    }

    /// The error of the work.
    #[must_use]
    pub fn error(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.error
    }

    /// The reason of a rejection: the error with its sources.
    pub(crate) fn reason(&self) -> String {
        onlyonce_core::chain(self.error())
    }

    /// Whether the attempt may have had its effect. True for a panic.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.kind == Kind::Unknown
    }

    /// Whether a retry is useless.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        self.kind == Kind::Permanent
    }
}

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { kind: Kind::Retryable, error: error.into() }
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
