//! What the engine is asked for, and what it answers: the words between the machine and the face.

use std::sync::Arc;
use std::time::Duration;

use super::request::{KeyRef, Request};
use crate::clock::{Leap, Now};
use crate::entry::{Backoff, CompletedEntry, Prior, Processing, StoredResult};
use crate::error::{Error, printable};
use crate::key::{Fingerprint, Key};
use crate::tx::Tx;

/// What a claim, a check or a record was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Response {
    New,
    InProgress { retry_after_ms: Option<u64>, attempt: u32 },
    Completed(CompletedEntry),
}

/// The right to work on a key.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    /// The keys of the call that it was given in, shared by all that were.
    pub(crate) request: Arc<Request>,
    pub(crate) index: usize,
    pub(crate) token: u64,
    pub(crate) attempt: u32,
    pub(crate) prior: Option<Prior>,
    pub(crate) fingerprint: Option<Fingerprint>,
    /// When it was claimed; on stream time, what the key's time is to be. What ends it is not earlier.
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

    /// What its holder is told when somebody has taken over.
    pub(crate) fn superseded(&self) -> Error {
        Error::Superseded { key: display(self.key()), token: self.token }
    }
}

/// What a claim was answered.
#[derive(Debug)]
pub(crate) enum ClaimResponse {
    Acquired(Grant),
    InProgress { retry_after_ms: Option<u64>, attempt: u32 },
    Completed(CompletedEntry),
}

/// A key that waits for a decision.
pub(crate) struct HeldEntry {
    pub(crate) key: Arc<[u8]>,
    pub(crate) processing: Processing,
    pub(crate) prior: Prior,
}

/// Who settles a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FinishedBy {
    /// Its holder, however late, unless somebody has taken over.
    Holder,
    /// An operator, as long as the key is held.
    Operator,
}

/// What becomes of a lease.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FinishKind<'a> {
    /// The work is done, and this is written with it.
    Complete(StoredResult<&'a [u8]>, Option<&'a Tx>),
    /// The work is not done, and free for the next from then on.
    Release { prior: Prior, backoff: Backoff },
}

pub(super) fn payload_mismatch(key_ref: KeyRef<'_>) -> Error {
    Error::PayloadMismatch { key: display(key_ref.key) }
}

#[cold]
pub(super) fn too_old(key_ref: KeyRef<'_>, at_ms: Option<u64>, now: Now, window_ms: u64) -> Error {
    let remembers_since_ms = now.remembers_since(window_ms);
    Error::TooOld { key: display(key_ref.key), at_ms: at_ms.unwrap_or(0), remembers_since_ms }
}

#[cold]
pub(super) fn too_far_ahead(key_ref: KeyRef<'_>, at_ms: u64, leap: Leap) -> Error {
    let Leap { stream_ms, max_ahead_ms, in_future } = leap;
    let max_ahead = Duration::from_millis(max_ahead_ms);
    Error::TooFarAhead { key: display(key_ref.key), at_ms, stream_ms, max_ahead, in_future }
}

/// A key as people read it.
pub(crate) fn display(encoded: &[u8]) -> String {
    match Key::decode(encoded) {
        Some(key) => key.to_string(),
        None => printable(encoded),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_shown_as_people_wrote_them_and_other_bytes_readably() {
        let mut encoded = Vec::new();
        Key::from("order 17").scope("shop").encode(1_024, &mut encoded).unwrap();
        assert_eq!(display(&encoded), Key::from("order 17").scope("shop").to_string());
        assert!(display(&encoded).contains("order 17"));
        let foreign = &[0xff; 3];
        assert!(Key::decode(foreign).is_none());
        assert_eq!(display(foreign), printable(foreign));
    }
}
