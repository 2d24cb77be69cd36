//! The types that the engine takes and returns.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{
    Completed, Error, FencingToken, Fingerprint, InProgress, Key, PriorAttempt, SideWrites, StoredResult, Timestamp,
    TimestampError,
};

use super::request::{KeyRef, Request};
use crate::clock::{Leap, Now};
pub(crate) use onlyonce_core::machine::FinishedBy;
use onlyonce_core::machine::{Attempt, Backoff, CompletedEntry};

/// The right to work on a key.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    /// The request of the claim, shared by all its grants.
    pub(crate) request: Arc<Request>,
    pub(crate) index: usize,
    pub(crate) token: u64,
    pub(crate) attempt: u32,
    pub(crate) prior: Option<PriorAttempt>,
    pub(crate) fingerprint: Option<Fingerprint>,
    /// When it was claimed, or on stream time the message's timestamp. The key's completion has at least this time.
    pub(crate) at_ms: u64,
    pub(crate) claimed_monotonic_ms: u64,
}

impl Grant {
    /// Its key. A key without bytes if the grant was damaged: `Engine::require_key` reports it.
    pub(super) fn key_ref(&self) -> KeyRef<'_> {
        self.request.get(self.index).unwrap_or(KeyRef::MISSING)
    }

    pub(crate) fn key(&self) -> &[u8] {
        self.key_ref().key
    }

    pub(crate) fn digest(&self) -> u64 {
        self.key_ref().digest
    }

    /// The key with everything that its claim said about it.
    #[cfg(feature = "tokio")]
    pub(crate) fn full_key(&self) -> Key<'static> {
        let mut key = self.decoded_key().with_fingerprint(self.fingerprint);
        if let Some(at_ms) = self.request.at_ms(self.index) {
            key = key.at(Timestamp::from_unix_ms(at_ms));
        }
        match self.request.get(self.index).and_then(|key_ref| key_ref.own_window.ms()) {
            Some(ms) => key.window(Duration::from_millis(ms)),
            None => key,
        }
    }

    /// The attempt that a finish ends.
    #[inline]
    pub(super) fn as_attempt(&self) -> Attempt {
        let Self { token, attempt, fingerprint, at_ms, .. } = *self;
        Attempt { token, attempt, fingerprint, at_ms }
    }

    pub(crate) fn decoded_key(&self) -> Key<'static> {
        Key::decode(self.key()).unwrap_or_else(|| Key::from(self.key().to_vec()))
    }

    /// The error of a lease that was taken over.
    pub(crate) fn superseded(&self) -> Error {
        Error::Superseded { key: Key::display_encoded(self.key()), token: FencingToken::new(self.token) }
    }
}

/// How a lease is finished.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FinishKind<'a> {
    /// The work is done. If it `follows` another lease of its call, its offsets are stored only if no completion of the call
    /// before it was rejected.
    Complete { result: StoredResult<&'a [u8]>, side_writes: Option<&'a SideWrites>, follows: bool },
    /// The work is not done, and the key can be claimed after the backoff.
    Release { prior: PriorAttempt, backoff: Backoff },
}

impl<'a> FinishKind<'a> {
    /// The offsets and messages that are stored with a completion.
    pub(super) fn side_writes(&self) -> Option<&'a SideWrites> {
        match self {
            Self::Complete { side_writes, .. } => *side_writes,
            Self::Release { .. } => None,
        }
    }
}

pub(super) fn payload_mismatch(key_ref: KeyRef<'_>) -> Error {
    Error::PayloadMismatch { key: Key::display_encoded(key_ref.key) }
}

#[cold]
pub(super) fn too_old(key_ref: KeyRef<'_>, at_ms: Option<u64>, now: Now, window_ms: u64) -> Error {
    let window_ms = key_ref.own_window.within(window_ms);
    Error::Timestamp(TimestampError::TooOld {
        key: Key::display_encoded(key_ref.key),
        at: Timestamp::from_unix_ms(at_ms.unwrap_or(0)),
        remembers_since: Timestamp::from_unix_ms(now.remembers_since(window_ms)),
    })
}

#[cold]
pub(super) fn too_far_ahead(key_ref: KeyRef<'_>, at_ms: u64, leap: Leap) -> Error {
    let Leap { stream_ms, max_ahead_ms, in_future } = leap;
    Error::Timestamp(TimestampError::TooFarAhead {
        key: Key::display_encoded(key_ref.key),
        at: Timestamp::from_unix_ms(at_ms),
        stream_time: Timestamp::from_unix_ms(stream_ms),
        max_ahead: Duration::from_millis(max_ahead_ms),
        in_future,
    })
}

/// The answer about a completed key.
pub(super) fn completed(done: &CompletedEntry, now: &Now, window_ms: u64) -> Completed {
    let until_ms = now.remembered_until_ms(done.completed_ms, done.own_window.within(window_ms));
    Completed::new(
        done.result.clone(),
        FencingToken::new(done.token),
        Timestamp::from_unix_ms(done.completed_ms),
        Timestamp::from_unix_ms(until_ms),
    )
}

pub(super) fn in_progress(retry_after_ms: Option<u64>, attempt: u32) -> InProgress {
    InProgress::new(retry_after_ms.map(Duration::from_millis), attempt)
}
