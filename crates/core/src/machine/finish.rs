//! How an attempt ends: the entries of completions, releases, renewals and interruptions.

use super::entry::{Backoff, CompletedEntry, Entry, Holder, OwnWindow, Processing};
use super::moment::Moment;
use super::transition::{LeaseState, Policy, lease_state};
use crate::answer::{OnInterrupt, StoredResult};
use crate::attempt::PriorAttempt;
use crate::key::Fingerprint;

/// Who finishes a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishedBy {
    /// Its holder, even after the lease expired, unless there is a later holder.
    Holder,
    /// An operator, while the key is held.
    Operator,
}

/// Whether the holder of `token` may finish the key. The token decides, never the clock: if no later holder exists, a late
/// completion is accepted, since a rejection would cause the work to be repeated.
#[inline]
#[must_use]
pub(super) fn may_finish(stored: Option<&Entry>, token: u64) -> bool {
    matches!(stored, Some(Entry::Processing(processing))
        if processing.token == token
            && !matches!(processing.holder, Holder::Claiming { .. } | Holder::Committing | Holder::CommittingUnclaimed))
}

/// The entry that a completion or a release with `token` finishes. `None`: superseded.
#[inline]
#[must_use]
pub(super) fn finishable(
    stored: Option<&Entry>,
    token: u64,
    finished_by: FinishedBy,
    now: impl Moment,
    policy: Policy,
) -> Option<&Processing> {
    match stored {
        Some(Entry::Processing(processing)) if may_finish(stored, token) => {
            let is_held = || matches!(lease_state(processing, now, policy), LeaseState::Held(_));
            (finished_by == FinishedBy::Holder || is_held()).then_some(processing)
        }
        _ => None,
    }
}

/// How long the lease with `token` still excludes other holders.
#[must_use]
pub fn remaining_ms(stored: Option<&Entry>, token: u64, now: impl Moment, policy: Policy) -> u64 {
    match stored {
        Some(Entry::Processing(processing)) if processing.token == token => {
            match lease_state(processing, now, policy) {
                LeaseState::Active { remaining_ms } => remaining_ms,
                _ => 0,
            }
        }
        _ => 0,
    }
}

/// The attempt that a finish ends, as its grant describes it.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// The token of the next entry.
    pub token: u64,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// The payload that binds the key.
    pub fingerprint: Option<Fingerprint>,
    /// When it was claimed. On stream time, the message's timestamp.
    pub at_ms: u64,
}

impl Attempt {
    /// The entry of a completion.
    #[inline]
    #[must_use]
    pub(super) fn completed<B>(
        self,
        own_window: OwnWindow,
        result: StoredResult<B>,
        now: impl Moment,
        policy: Policy,
    ) -> CompletedEntry<B> {
        let Self { token, fingerprint, at_ms, .. } = self;
        CompletedEntry { token, completed_ms: policy.next_time_ms(at_ms, now), fingerprint, own_window, result }
    }

    /// The entry of a release. `prior` is how the attempt ended.
    #[must_use]
    pub(super) fn released(
        self,
        own_window: OwnWindow,
        finished_by: FinishedBy,
        prior: PriorAttempt,
        backoff: Backoff,
        now: impl Moment,
        policy: Policy,
    ) -> Processing {
        let Self { token, attempt, fingerprint, at_ms } = self;
        let holder = match finished_by {
            FinishedBy::Holder => Holder::Released { prior, backoff },
            FinishedBy::Operator => Holder::Resolved(prior),
        };
        let (since_ms, fingerprint) = (policy.next_time_ms(at_ms, now), binding(fingerprint, prior));
        Processing { token, attempt, since_ms, fingerprint, own_window, holder }
    }
}

impl Holder {
    /// The holder after a renewal, which never shortens a lease. `None` if the lease has ended: a resolution is durable, so a
    /// renewal, which is not, must not undo it.
    #[must_use]
    pub(super) fn renewed(self, full_ms: u64) -> Option<Self> {
        match self {
            Self::Leased { until_monotonic_ms } => {
                Some(Self::Leased { until_monotonic_ms: until_monotonic_ms.max(full_ms) })
            }
            _ => None,
        }
    }

    /// The holder after its lease was given up: `ended`. A lease that has ended already stays as it is.
    #[must_use]
    pub(super) fn ended(self, ended: Self) -> Self {
        if matches!(self, Self::Leased { .. }) { ended } else { self }
    }
}

impl Processing {
    /// The entry after its holder changed without a finish.
    #[must_use]
    pub(super) fn with_holder(self, holder: Holder, now: impl Moment, policy: Policy) -> Self {
        let since_ms = policy.next_time_ms(self.since_ms, now);
        let fingerprint = match holder {
            Holder::Released { prior, .. } => binding(self.fingerprint, prior),
            _ => self.fingerprint,
        };
        Self { since_ms, holder, fingerprint, ..self }
    }
}

/// The state of a key whose holder crashed, dropped its lease or let it expire.
#[must_use]
pub(super) fn interrupted(prior: PriorAttempt, on_interrupt: OnInterrupt) -> Holder {
    match on_interrupt {
        OnInterrupt::Hold => Holder::Interrupted(prior),
        OnInterrupt::Rerun => Holder::Released { prior, backoff: Backoff::NONE },
    }
}

/// The state of a key whose lease reached no caller, so that no work was done. `prior` is how the attempt before it ended.
#[must_use]
pub(super) fn taken_back(prior: Option<PriorAttempt>) -> Holder {
    Holder::Released { prior: prior.unwrap_or(PriorAttempt::Released), backoff: Backoff::NONE }
}

/// The payload fingerprint that the next attempt must match. None if the prior attempt had no effect, so that a retry with a
/// corrected payload is accepted.
#[inline]
fn binding(fingerprint: Option<Fingerprint>, prior: PriorAttempt) -> Option<Fingerprint> {
    fingerprint.filter(|_| prior.may_have_happened())
}
