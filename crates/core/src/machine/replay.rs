//! The replay of a journal: which events change the entry that earlier records left.
//!
//! A record is numbered before it takes effect, so the records of one holder are in order. The records of two holders whose
//! calls overlapped may be in the other order; then their tokens decide.

use super::entry::{CompletedEntry, Entry, Holder, Processing};
use super::finish::interrupted;
use super::moment::Moment;
use super::transition::Policy;
use crate::attempt::PriorAttempt;

/// One item of a journal record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A claim acquired the key.
    Claimed(Processing),
    /// A holder released the key, or an operator resolved it to run again.
    Released(Processing),
    /// The key was completed or recorded.
    Completed(CompletedEntry),
    /// The key was forgotten.
    Forgotten {
        /// The token of the `forget`. Entries with a lower one are removed.
        token: u64,
    },
}

impl Event {
    /// The time of its key.
    #[must_use]
    pub fn time_ms(&self) -> u64 {
        match self {
            Self::Claimed(processing) | Self::Released(processing) => processing.since_ms,
            Self::Completed(done) => done.completed_ms,
            Self::Forgotten { .. } => 0,
        }
    }
}

/// The effect of an event on the stored entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Replayed {
    /// A later event is applied already.
    Unchanged,
    /// The entry is replaced by this one.
    Stored(Entry),
    /// The entry is removed.
    Removed,
}

/// Applies an event of the journal to the entry that the events before it left.
#[inline]
#[must_use]
pub fn replay(stored: Option<&Entry>, event: Event) -> Replayed {
    match event {
        Event::Claimed(processing) if replay_claimed(stored, processing.token) => {
            Replayed::Stored(Entry::Processing(processing))
        }
        Event::Released(processing) if replay_released(stored, processing.token) => {
            Replayed::Stored(Entry::Processing(processing))
        }
        Event::Completed(done) if replay_completed(stored, done.token) => Replayed::Stored(Entry::Completed(done)),
        Event::Forgotten { token } if replay_forgotten(stored, token) => Replayed::Removed,
        _ => Replayed::Unchanged,
    }
}

fn replay_claimed(stored: Option<&Entry>, token: u64) -> bool {
    stored.is_none_or(|entry| entry.token() < token)
}

fn replay_released(stored: Option<&Entry>, token: u64) -> bool {
    match stored {
        None => true,
        Some(Entry::Processing(processing)) => processing.token <= token,
        Some(Entry::Completed(done)) => done.token < token,
    }
}

fn replay_completed(stored: Option<&Entry>, token: u64) -> bool {
    stored.is_none_or(|entry| entry.token() <= token)
}

fn replay_forgotten(stored: Option<&Entry>, token: u64) -> bool {
    stored.is_some_and(|entry| entry.token() < token)
}

/// The entry, after an open, of a key that was in progress when the journal was written: the process of a leased key has
/// crashed, and a held key becomes free under [`OnInterrupt::Rerun`](crate::OnInterrupt::Rerun). `None` if it is unchanged.
#[must_use]
pub fn crashed(processing: Processing, now: impl Moment, policy: Policy) -> Option<Processing> {
    let (prior, since_ms) = match processing.holder {
        Holder::Leased { .. } => (PriorAttempt::Crashed, policy.next_time_ms(processing.since_ms, now)),
        Holder::Interrupted(prior) => (prior, processing.since_ms),
        _ => return None,
    };
    let holder = interrupted(prior, policy.on_interrupt);
    Some(Processing { since_ms, holder, ..processing })
}
