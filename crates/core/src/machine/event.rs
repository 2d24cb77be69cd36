//! The events of a journal, and their order.

use std::sync::Arc;

use super::entry::{CompletedEntry, Entry, Processing};

/// One item of a journal record: a change of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<B = Arc<[u8]>> {
    /// A claim acquired the key.
    Claimed(Processing),
    /// A holder released the key, or an operator resolved it to run again.
    Released(Processing),
    /// The key was completed or recorded.
    Completed(CompletedEntry<B>),
    /// The holder of the lease with this token completed the key while nothing had ended the lease. The key, its payload and its
    /// own window are those of the claim: a journal that has the claim need not store them again.
    ClaimCompleted(CompletedEntry<B>),
    /// The key was forgotten.
    Forgotten {
        /// The token of the `forget`. Entries with a lower one are removed.
        token: u64,
    },
}

impl<B> Event<B> {
    /// The time of its key.
    #[must_use]
    pub fn time_ms(&self) -> u64 {
        match self {
            Self::Claimed(processing) | Self::Released(processing) => processing.since_ms,
            Self::Completed(done) | Self::ClaimCompleted(done) => done.completed_ms,
            Self::Forgotten { .. } => 0,
        }
    }

    /// The token of the attempt, or of the `forget`.
    #[must_use]
    pub fn token(&self) -> u64 {
        match self {
            Self::Claimed(processing) | Self::Released(processing) => processing.token,
            Self::Completed(done) | Self::ClaimCompleted(done) => done.token,
            Self::Forgotten { token } => *token,
        }
    }

    /// The entry that it leaves. `None`: it removes the entry.
    #[inline(always)]
    #[must_use]
    pub fn into_entry(self) -> Option<Entry<B>> {
        match self {
            Self::Claimed(processing) | Self::Released(processing) => Some(Entry::Processing(processing)),
            Self::Completed(done) | Self::ClaimCompleted(done) => Some(Entry::Completed(done)),
            Self::Forgotten { .. } => None,
        }
    }

    /// Whether it is later than the stored entry.
    ///
    /// The records of a key are in the order of its attempts, and a record may be replayed again. Only a `forget` of a key that
    /// is in no memory may be written after a later claim: then the tokens decide.
    #[inline]
    pub(super) fn follows(&self, stored: Option<&Entry>) -> bool {
        let Some(entry) = stored else { return !matches!(self, Self::Forgotten { .. }) };
        match self {
            Self::Claimed(processing) => entry.token() < processing.token,
            Self::Released(processing) => match entry {
                Entry::Processing(before) => before.token <= processing.token,
                Entry::Completed(done) => done.token < processing.token,
            },
            Self::Completed(done) | Self::ClaimCompleted(done) => entry.token() <= done.token,
            Self::Forgotten { token } => entry.token() < *token,
        }
    }
}

impl Event<&[u8]> {
    /// A copy that owns its result.
    #[must_use]
    pub fn shared(&self) -> Event {
        match self {
            Self::Claimed(processing) => Event::Claimed(processing.clone()),
            Self::Released(processing) => Event::Released(processing.clone()),
            Self::Completed(done) => Event::Completed(done.shared()),
            Self::ClaimCompleted(done) => Event::ClaimCompleted(done.shared()),
            Self::Forgotten { token } => Event::Forgotten { token: *token },
        }
    }
}
