//! The stored state of a key: in progress or completed.

use std::sync::Arc;
use std::time::Duration;

use super::moment::{Moment, millis};
use crate::answer::StoredResult;
use crate::attempt::PriorAttempt;
use crate::key::Fingerprint;

/// The state of a key. There is no state "expired": expiry follows from the time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry<B = Arc<[u8]>> {
    /// The key is claimed and not completed.
    Processing(Processing),
    /// The key is completed.
    Completed(CompletedEntry<B>),
}

impl<B> Entry<B> {
    /// The token of its last holder.
    #[inline]
    #[must_use]
    pub fn token(&self) -> u64 {
        match self {
            Self::Processing(processing) => processing.token,
            Self::Completed(done) => done.token,
        }
    }

    /// When it was completed, or when its holder's state last changed.
    #[inline]
    #[must_use]
    pub fn time_ms(&self) -> u64 {
        match self {
            Self::Processing(processing) => processing.since_ms,
            Self::Completed(done) => done.completed_ms,
        }
    }
}

/// A key that was claimed and is not completed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processing {
    /// The token of its last holder.
    pub token: u64,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// When the holder's state last changed (claimed, released, found crashed), on the store's time. On stream time
    /// always the message's timestamp.
    pub since_ms: u64,
    /// The payload that binds the key.
    pub fingerprint: Option<Fingerprint>,
    /// The window of the completion that ends this attempt. The attempt itself is remembered for the store's window.
    pub own_window: OwnWindow,
    /// The state of the holder.
    pub holder: Holder,
}

/// A key's own window in milliseconds. [`OwnWindow::NONE`] if the store's window applies.
///
/// Six bytes without alignment: they fit into the padding of the structures that hold one for each key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnWindow([u8; 6]);

impl OwnWindow {
    /// Longer than the longest window of a store.
    pub const NONE: Self = Self([0xff; 6]);

    /// The own window that a caller gives a key.
    #[must_use]
    pub fn new(window: Option<Duration>) -> Self {
        window.and_then(|window| Self::from_ms(millis(window))).unwrap_or(Self::NONE)
    }

    /// `None` if it is longer than the window of any store.
    #[inline]
    #[must_use]
    pub fn from_ms(ms: u64) -> Option<Self> {
        let [a, b, c, d, e, f, 0, 0] = ms.to_le_bytes() else { return None };
        Some(Self([a, b, c, d, e, f])).filter(|window| *window != Self::NONE)
    }

    #[inline]
    fn as_ms(self) -> u64 {
        let [a, b, c, d, e, f] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// The own window. `None` if the store's window applies.
    #[inline]
    #[must_use]
    pub fn ms(self) -> Option<u64> {
        (self != Self::NONE).then(|| self.as_ms())
    }

    /// The window of a key with this own window in a store with this window.
    #[inline]
    #[must_use]
    pub fn within(self, window_ms: u64) -> u64 {
        self.as_ms().min(window_ms)
    }
}

/// The state of a claimed key's holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// It has the lease until this time. After a replay of the journal: its process died.
    Leased {
        /// The end of the lease, on the monotonic clock.
        until_monotonic_ms: u64,
    },
    /// As `Leased`, and the claim is being written to the journal. The key cannot be taken over, also after the lease: the
    /// records of a key are in the order of its attempts.
    Claiming {
        /// The end of the lease, on the monotonic clock.
        until_monotonic_ms: u64,
    },
    /// It has finished, and the outcome is being written to the journal. The key cannot be taken over.
    Committing,
    /// As `Committing`, for a `record` call, which has no lease.
    CommittingUnclaimed,
    /// It ended without a release, and the key is held until an operator resolves it.
    Interrupted(PriorAttempt),
    /// It released the key, or was interrupted under `OnInterrupt::Rerun`. The key is free after the backoff. An
    /// engine may move the key out of memory, like a completed one.
    Released {
        /// How the attempt ended.
        prior: PriorAttempt,
        /// How long the key cannot be claimed.
        backoff: Backoff,
    },
    /// An operator resolved the held key to run again. The old holder may still complete it, so an engine that
    /// moves released keys out of memory keeps this one.
    Resolved(PriorAttempt),
}

/// How long a released key cannot be claimed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backoff {
    /// Its end, on the monotonic clock of the process that released the key.
    pub until_monotonic_ms: u64,
    /// Its length. After a restart its end is this long after the release, on the store's time.
    pub length_ms: u32,
}

impl Backoff {
    /// The key can be claimed at once.
    pub const NONE: Self = Self { until_monotonic_ms: 0, length_ms: 0 };

    /// A backoff that starts at `now`. It is at most half a window long: a released key is forgotten after a window,
    /// and the attempt after the backoff must still find the facts of the last one.
    #[must_use]
    pub fn from(now: impl Moment, length: Duration, window_ms: u64) -> Self {
        match u32::try_from(millis(length).min(window_ms / 2)).unwrap_or(u32::MAX) {
            0 => Self::NONE,
            length_ms => {
                Self { until_monotonic_ms: now.monotonic_ms().saturating_add(u64::from(length_ms)), length_ms }
            }
        }
    }
}

/// A completed key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompletedEntry<B = Arc<[u8]>> {
    /// The token of the holder that completed it.
    pub token: u64,
    /// When it was completed. On stream time, the message's timestamp.
    pub completed_ms: u64,
    /// The payload that binds the key.
    pub fingerprint: Option<Fingerprint>,
    /// The window of the key, if it has its own.
    pub own_window: OwnWindow,
    /// The stored result.
    pub result: StoredResult<B>,
}

impl<B> CompletedEntry<B> {
    /// G4: remembered if and only if it is less than a window old, and not below the retention floor.
    #[inline]
    #[must_use]
    pub fn is_live(&self, now: impl Moment, window_ms: u64) -> bool {
        now.remembers(self.completed_ms, self.own_window.within(window_ms))
    }
}

impl Entry<&[u8]> {
    /// A copy that owns its result.
    #[inline]
    #[must_use]
    pub fn shared(&self) -> Entry {
        match self {
            Self::Processing(processing) => Entry::Processing(processing.clone()),
            Self::Completed(done) => Entry::Completed(done.shared()),
        }
    }
}

impl Entry {
    /// A copy that borrows its result.
    #[inline]
    #[must_use]
    pub fn borrowed(&self) -> Entry<&[u8]> {
        match self {
            Self::Processing(processing) => Entry::Processing(processing.clone()),
            Self::Completed(done) => Entry::Completed(done.borrowed()),
        }
    }
}

impl CompletedEntry<&[u8]> {
    /// A copy that owns its result.
    #[inline]
    #[must_use]
    pub fn shared(&self) -> CompletedEntry {
        let result = self.result.to_shared();
        let Self { token, completed_ms, fingerprint, own_window, .. } = *self;
        CompletedEntry { token, completed_ms, fingerprint, own_window, result }
    }
}

impl CompletedEntry {
    /// A copy that borrows its result.
    #[inline]
    #[must_use]
    pub fn borrowed(&self) -> CompletedEntry<&[u8]> {
        let result = self.result.as_slice();
        let Self { token, completed_ms, fingerprint, own_window, .. } = *self;
        CompletedEntry { token, completed_ms, fingerprint, own_window, result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_remembered_for_the_shorter_of_its_own_window_and_the_store_s() {
        for (own, expected_ms) in [
            (None, 1_000),
            (Some(Duration::ZERO), 0),
            (Some(Duration::from_millis(999)), 999),
            (Some(Duration::from_secs(1)), 1_000),
            (Some(Duration::from_millis(1_001)), 1_000),
            (Some(Duration::MAX), 1_000),
        ] {
            assert_eq!(OwnWindow::new(own).within(1_000), expected_ms, "{own:?}");
        }
    }

    #[test]
    fn no_store_has_a_window_that_an_own_window_cannot_have() {
        let longest_ms = millis(Duration::from_secs(10 * 366 * 24 * 60 * 60));
        assert_eq!(OwnWindow::from_ms(longest_ms).unwrap().ms(), Some(longest_ms));
        assert_eq!(OwnWindow::NONE.within(longest_ms), longest_ms);
        assert_eq!(OwnWindow::NONE.ms(), None);
    }
}
