//! What is stored about a key: its entry in the state machine, and what renews its lease.

use crate::answer::Completed;
use crate::attempt::FencingToken;
use crate::key::Key;
use crate::machine::{CompletedEntry, Entry, Holder, KeyRequest, OwnWindow, PlainMoment, Processing};
use crate::timestamp::Timestamp;

#[derive(Debug)]
pub(super) struct Stored {
    pub(super) entry: Entry,
    /// The ids of the values that renew the lease. While there are any, it does not expire.
    pub(super) keepers: Vec<u64>,
}

impl Stored {
    pub(super) fn new(entry: Entry) -> Self {
        Self { entry, keepers: Vec::new() }
    }

    /// The entry at this moment: a lease with keepers was renewed just now.
    pub(super) fn at(&self, now: PlainMoment, lease_ms: u64) -> Entry {
        match &self.entry {
            Entry::Processing(processing) if self.is_kept() => {
                let until_monotonic_ms = now.monotonic_ms.saturating_add(lease_ms);
                Entry::Processing(Processing { holder: Holder::Leased { until_monotonic_ms }, ..processing.clone() })
            }
            entry => entry.clone(),
        }
    }

    fn is_kept(&self) -> bool {
        self.leased_until_ms().is_some() && !self.keepers.is_empty()
    }

    /// The end of its lease. `None` if it has none.
    pub(super) fn leased_until_ms(&self) -> Option<u64> {
        match &self.entry {
            Entry::Processing(Processing { holder: Holder::Leased { until_monotonic_ms }, .. }) => {
                Some(*until_monotonic_ms)
            }
            _ => None,
        }
    }

    /// Changes the end of its lease. Does nothing if it has none.
    pub(super) fn set_leased_until(&mut self, ms: u64) {
        if let Entry::Processing(Processing { holder: Holder::Leased { until_monotonic_ms }, .. }) = &mut self.entry {
            *until_monotonic_ms = ms;
        }
    }
}

/// What a call says about a key.
pub(super) fn key_request<'a>(key: &'a Key<'_>) -> KeyRequest<'a> {
    KeyRequest {
        payload: key.payload_fingerprint(),
        at_ms: key.timestamp().map(Timestamp::as_unix_ms),
        own_window: OwnWindow::new(key.own_window()),
    }
}

/// The answer about a completed key.
pub(super) fn completed(done: &CompletedEntry, window_ms: u64) -> Completed {
    let until_ms = done.completed_ms.saturating_add(done.own_window.within(window_ms));
    Completed::new(
        done.result.clone(),
        FencingToken::new(done.token),
        Timestamp::from_unix_ms(done.completed_ms),
        Timestamp::from_unix_ms(until_ms),
    )
}
