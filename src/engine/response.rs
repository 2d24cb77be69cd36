//! The types that the engine takes and returns.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{
    Completed, Error, FencingToken, Fingerprint, InProgress, Key, PriorAttempt, SideWrites, StoredResult, Timestamp,
    TimestampError,
};

use super::request::{KeyRef, Request};
use crate::clock::{Leap, Now};
use crate::entry::{Backoff, CompletedEntry};

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
    pub(crate) fn key(&self) -> &[u8] {
        self.request.get(self.index).map_or(&[], |key_ref| key_ref.key)
    }

    pub(crate) fn digest(&self) -> u64 {
        self.request.get(self.index).map_or(0, |key_ref| key_ref.digest)
    }

    pub(crate) fn decoded_key(&self) -> Key<'static> {
        Key::decode(self.key()).unwrap_or_else(|| Key::from(self.key().to_vec()))
    }

    /// The error of a lease that was taken over.
    pub(crate) fn superseded(&self) -> Error {
        Error::Superseded { key: Key::display_encoded(self.key()), token: FencingToken::new(self.token) }
    }
}

/// Who finishes a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FinishedBy {
    /// Its holder, even after the lease expired, unless there is a later holder.
    Holder,
    /// An operator, while the key is held.
    Operator,
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

pub(super) fn payload_mismatch(key_ref: KeyRef<'_>) -> Error {
    Error::PayloadMismatch { key: Key::display_encoded(key_ref.key) }
}

#[cold]
pub(super) fn too_old(key_ref: KeyRef<'_>, at_ms: Option<u64>, now: Now, window_ms: u64) -> Error {
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
    let until_ms = now.remembered_until_ms(done.completed_ms, window_ms);
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
