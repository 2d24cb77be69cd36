//! What is stored about a key, and the state that follows from it and the time.

use std::time::Duration;

use crate::answer::{Completed, LeaseState, OnInterrupt, StoredResult};
use crate::attempt::{FencingToken, PriorAttempt};
use crate::key::{Fingerprint, Key};
use crate::timestamp::Timestamp;

/// The time of a call.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    /// The store's time: its clock, or stream time.
    pub(super) time: Timestamp,
    /// Milliseconds since the store was made. Leases and backoffs run on it.
    pub(super) monotonic_ms: u64,
}

#[derive(Debug)]
pub(super) enum Entry {
    Processing(Processing),
    Completed(Done),
}

/// A claimed key.
#[derive(Debug, Clone)]
pub(super) struct Processing {
    pub(super) token: FencingToken,
    pub(super) attempt: u32,
    /// When the holder became what it is. On stream time, the timestamp of the message.
    pub(super) since: Timestamp,
    pub(super) fingerprint: Option<Fingerprint>,
    /// How long the key is remembered once it is completed.
    pub(super) window: Duration,
    pub(super) holder: Holder,
}

#[derive(Debug, Clone)]
pub(super) enum Holder {
    Leased(Lease),
    /// The holder released the key, or vanished under [`OnInterrupt::Rerun`].
    Open {
        prior: PriorAttempt,
        until_ms: u64,
    },
    /// The holder dropped its lease under [`OnInterrupt::Hold`].
    Interrupted(PriorAttempt),
    /// A held key was resolved to run again.
    Resolved(PriorAttempt),
}

#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) until_ms: u64,
    /// The ids of the values that renew it. While there are any, it does not expire.
    pub(super) keepers: Vec<u64>,
}

/// A completed key.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) token: FencingToken,
    pub(super) completed_at: Timestamp,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) window: Duration,
    pub(super) result: StoredResult,
}

/// The options that decide about a state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    pub(super) window: Duration,
    pub(super) lease: Duration,
    pub(super) on_interrupt: OnInterrupt,
    pub(super) is_stream: bool,
}

impl Processing {
    /// The state of a claimed key. `None` if its last attempt ended more than a window ago, so that it is forgotten.
    pub(super) fn state(&self, now: Now, policy: Policy) -> Option<LeaseState> {
        let is_over = self.since.saturating_add(policy.window) <= now.time;
        let interrupted = |prior, is_over: bool| match policy.on_interrupt {
            OnInterrupt::Hold => Some(LeaseState::Held(prior)),
            OnInterrupt::Rerun => (!is_over).then_some(LeaseState::Free(prior)),
        };
        match &self.holder {
            Holder::Leased(lease) if !lease.keepers.is_empty() => Some(LeaseState::Leased(policy.lease)),
            Holder::Leased(lease) => match lease.until_ms.checked_sub(now.monotonic_ms) {
                Some(left_ms) if left_ms > 0 => Some(LeaseState::Leased(Duration::from_millis(left_ms))),
                _ if policy.is_stream => interrupted(PriorAttempt::LeaseExpired, is_over),
                _ => {
                    let alone = Duration::from_millis(now.monotonic_ms.saturating_sub(lease.until_ms));
                    interrupted(PriorAttempt::LeaseExpired, alone >= policy.window)
                }
            },
            Holder::Interrupted(prior) => interrupted(*prior, is_over),
            Holder::Open { .. } | Holder::Resolved(_) if is_over => None,
            Holder::Resolved(prior) => Some(LeaseState::Free(*prior)),
            Holder::Open { prior, until_ms } => match until_ms.saturating_sub(now.monotonic_ms) {
                0 => Some(LeaseState::Free(*prior)),
                left_ms => Some(LeaseState::Backoff(Duration::from_millis(left_ms), *prior)),
            },
        }
    }

    /// When the holder became what it becomes now.
    pub(super) fn left_at(&self, now: Now, policy: Policy) -> Timestamp {
        if policy.is_stream { self.since } else { self.since.max(now.time) }
    }

    /// Ends the attempt with unknown outcome. Only a lease can be dropped.
    pub(super) fn interrupt(&mut self, now: Now, policy: Policy) {
        if !matches!(self.holder, Holder::Leased(_)) {
            return;
        }
        self.since = self.left_at(now, policy);
        self.holder = match policy.on_interrupt {
            OnInterrupt::Hold => Holder::Interrupted(PriorAttempt::Dropped),
            OnInterrupt::Rerun => Holder::Open { prior: PriorAttempt::Dropped, until_ms: 0 },
        };
    }
}

impl Done {
    pub(super) fn remembered_until(&self) -> Timestamp {
        self.completed_at.saturating_add(self.window)
    }

    pub(super) fn is_live(&self, now: Now) -> bool {
        now.time < self.remembered_until()
    }

    pub(super) fn to_completed(&self) -> Completed {
        Completed::new(self.result.clone(), self.token, self.completed_at, self.remembered_until())
    }
}

/// How long a key is remembered: for its own window, if that is shorter than the store's.
pub(super) fn window_of(key: &Key<'_>, window: Duration) -> Duration {
    key.own_window().map_or(window, |own| own.min(window))
}
