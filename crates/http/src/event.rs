//! The events that a layer counts.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// A handler starts under a lease. One of the outcomes follows.
    Executed,
    Streamed,
    BodyNotStored,
    Stored,
    Released,
    Interrupted,
    Replayed,
    InProgress,
    PayloadMismatch,
    Rejected,
    FailClosed,
    FailOpen,
}
