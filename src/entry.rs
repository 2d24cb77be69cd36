//! The stored state of a key: in progress or completed.

use std::sync::Arc;

use crate::clock::{Now, millis};
use onlyonce_core::{Fingerprint, PriorAttempt, StoredResult};

/// The state of a key. There is no state "expired": expiry follows from the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Entry<B = Arc<[u8]>> {
    Processing(Processing),
    Completed(CompletedEntry<B>),
}

impl<B> Entry<B> {
    pub(crate) fn token(&self) -> u64 {
        match self {
            Self::Processing(processing) => processing.token,
            Self::Completed(done) => done.token,
        }
    }

    /// The time that selects its bucket: when it was completed, or when its holder's state last changed.
    pub(crate) fn time_ms(&self) -> u64 {
        match self {
            Self::Processing(processing) => processing.since_ms,
            Self::Completed(done) => done.completed_ms,
        }
    }
}

/// A key that was claimed and is not completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Processing {
    pub(crate) token: u64,
    pub(crate) attempt: u32,
    /// When the holder's state last changed (claimed, released, found crashed), on the store's time. On stream time
    /// always the message's timestamp.
    pub(crate) since_ms: u64,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) holder: Holder,
}

/// The state of a claimed key's holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    /// It has the lease until this time. After a replay of the journal: its process died.
    Leased { until_monotonic_ms: u64 },
    /// It has finished, and the outcome is being written to the journal. The key cannot be taken over.
    Committing,
    /// As `Committing`, for a `record` call, which has no lease.
    CommittingUnclaimed,
    /// It ended without a release, and the key is held until an operator resolves it.
    Interrupted(PriorAttempt),
    /// It released the key, or was interrupted under `OnInterrupt::Rerun`. The key is free after the backoff. The
    /// holder can no longer complete it, so a flush moves the key to a bucket like a completed one.
    Released { prior: PriorAttempt, backoff: Backoff },
    /// An operator resolved the held key to run again. The old holder may still complete it, so the key stays in
    /// memory until the next claim.
    Resolved(PriorAttempt),
}

/// How long a released key cannot be claimed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Backoff {
    /// Its end, on the monotonic clock of the process that released the key.
    pub(crate) until_monotonic_ms: u64,
    /// Its length. After a restart its end is this long after the release, on the store's time.
    pub(crate) length_ms: u32,
}

impl Backoff {
    pub(crate) const NONE: Self = Self { until_monotonic_ms: 0, length_ms: 0 };

    /// A backoff that starts at `now`. It is at most half a window long: a released key is forgotten after a window,
    /// and the attempt after the backoff must still find the facts of the last one.
    pub(crate) fn from(now: &Now, length: std::time::Duration, window_ms: u64) -> Self {
        match u32::try_from(millis(length).min(window_ms / 2)).unwrap_or(u32::MAX) {
            0 => Self::NONE,
            length_ms => Self { until_monotonic_ms: now.monotonic_ms.saturating_add(u64::from(length_ms)), length_ms },
        }
    }
}

/// A completed key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CompletedEntry<B = Arc<[u8]>> {
    pub(crate) token: u64,
    /// On stream time, the message's timestamp.
    pub(crate) completed_ms: u64,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) result: StoredResult<B>,
}

impl<B> CompletedEntry<B> {
    /// G4: remembered if and only if `now < completed + window` and not below the retention floor.
    pub(crate) fn is_live(&self, now: Now, window_ms: u64) -> bool {
        is_live(self.completed_ms, now, window_ms)
    }
}

/// G4, for a completion at this time.
pub(crate) fn is_live(completed_ms: u64, now: Now, window_ms: u64) -> bool {
    now.remembers(completed_ms, window_ms)
}

impl Entry<&[u8]> {
    /// A copy that owns its result.
    pub(crate) fn shared(&self) -> Entry {
        match self {
            Self::Processing(processing) => Entry::Processing(processing.clone()),
            Self::Completed(done) => Entry::Completed(done.shared()),
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Entry {
    /// A copy that borrows its result.
    pub(crate) fn borrowed(&self) -> Entry<&[u8]> {
        match self {
            Self::Processing(processing) => Entry::Processing(processing.clone()),
            Self::Completed(done) => Entry::Completed(done.borrowed()),
        }
    }
}

impl CompletedEntry<&[u8]> {
    /// A copy that owns its result.
    pub(crate) fn shared(&self) -> CompletedEntry {
        let result = self.result.to_shared();
        CompletedEntry { token: self.token, completed_ms: self.completed_ms, fingerprint: self.fingerprint, result }
    }
}

impl CompletedEntry {
    /// A copy that borrows its result.
    pub(crate) fn borrowed(&self) -> CompletedEntry<&[u8]> {
        let result = self.result.as_slice();
        CompletedEntry { token: self.token, completed_ms: self.completed_ms, fingerprint: self.fingerprint, result }
    }
}
