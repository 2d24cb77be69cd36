//! Claims, checks and records: the state that follows from an entry and the time, and what a call gets.

use std::time::Duration;

use super::entry::{Backoff, CompletedEntry, Entry, Holder, OwnWindow, Processing};
use super::moment::Moment;
use crate::answer::{self, OnInterrupt, StoredResult};
use crate::attempt::PriorAttempt;
use crate::key::Fingerprint;

/// The options and facts that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// How long a completion is remembered.
    pub window_ms: u64,
    /// What happens to a key whose holder vanished.
    pub on_interrupt: OnInterrupt,
    /// Whether message timestamps drive the engine's time.
    pub is_stream: bool,
    /// When this process opened the engine.
    pub opened: Opened,
    /// The lowest token of this process. Lower ones were handed out by earlier processes.
    pub first_token: u64,
}

/// When this process opened the engine.
#[derive(Debug, Clone, Copy)]
pub struct Opened {
    /// The engine's time then.
    pub time_ms: u64,
    /// The monotonic time then.
    pub monotonic_ms: u64,
}

impl Opened {
    /// Opened at this moment.
    #[must_use]
    pub fn at(now: impl Moment) -> Self {
        Self { time_ms: now.time_ms(), monotonic_ms: now.monotonic_ms() }
    }
}

impl Policy {
    /// The time of a key's next state: not before the time of its current state, although the engine's time may go back, so
    /// that a later state of a key never expires before an earlier one. On stream time a key always has the time of its
    /// message.
    #[inline]
    #[must_use]
    pub fn next_time_ms(&self, since_ms: u64, now: impl Moment) -> u64 {
        if self.is_stream { since_ms } else { now.time_ms().max(since_ms) }
    }

    /// When the backoff of a released key ends, on the monotonic clock of this process. The backoff of an earlier process runs
    /// on from the open, with the length that remained on the engine's time then. On stream time, which is unrelated to elapsed
    /// time, such a backoff is over.
    fn backoff_ends_at(&self, token: u64, since_ms: u64, backoff: Backoff) -> u64 {
        if token >= self.first_token {
            return backoff.until_monotonic_ms;
        }
        if self.is_stream {
            return 0;
        }
        let length_ms = u64::from(backoff.length_ms);
        let left_ms = since_ms.saturating_add(length_ms).saturating_sub(self.opened.time_ms).min(length_ms);
        if left_ms == 0 { 0 } else { self.opened.monotonic_ms.saturating_add(left_ms) }
    }
}

/// The state of a key that is claimed and not completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// A holder has it, for at least this long.
    Active {
        /// How long.
        remaining_ms: u64,
    },
    /// Its claim, completion or release is not durable yet.
    Committing,
    /// The next claim acquires it.
    Free(PriorAttempt),
    /// A claim acquires it after the backoff.
    Backoff {
        /// How long it still runs.
        remaining_ms: u64,
        /// How the attempt ended.
        prior: PriorAttempt,
    },
    /// No claim acquires it until it is resolved.
    Held(PriorAttempt),
    /// Nothing happened to it for a window. It counts as a new key.
    Forgotten,
}

/// The state as callers see it.
impl From<LeaseState> for answer::LeaseState {
    fn from(state: LeaseState) -> Self {
        match state {
            LeaseState::Active { remaining_ms } => Self::Leased(Duration::from_millis(remaining_ms)),
            LeaseState::Committing => Self::Leased(Duration::ZERO),
            LeaseState::Backoff { remaining_ms, prior } => Self::Backoff(Duration::from_millis(remaining_ms), prior),
            LeaseState::Free(prior) => Self::Free(prior),
            LeaseState::Held(prior) => Self::Held(prior),
            // It expired between two readings of the clock.
            LeaseState::Forgotten => Self::Free(PriorAttempt::LeaseExpired),
        }
    }
}

/// The state of a claimed key.
#[inline]
#[must_use]
pub fn lease_state(processing: &Processing, now: impl Moment, policy: Policy) -> LeaseState {
    let is_over = |since_ms: u64| now.is_over(since_ms, policy.window_ms);
    let interrupted = |prior, is_over| match policy.on_interrupt {
        OnInterrupt::Hold => LeaseState::Held(prior),
        OnInterrupt::Rerun if is_over => LeaseState::Forgotten,
        OnInterrupt::Rerun => LeaseState::Free(prior),
    };
    match processing.holder {
        Holder::Committing | Holder::CommittingUnclaimed => LeaseState::Committing,
        Holder::Claiming { until_monotonic_ms } => match until_monotonic_ms.saturating_sub(now.monotonic_ms()) {
            0 => LeaseState::Committing,
            remaining_ms => LeaseState::Active { remaining_ms },
        },
        Holder::Leased { until_monotonic_ms } => match until_monotonic_ms.checked_sub(now.monotonic_ms()) {
            Some(remaining_ms) if remaining_ms > 0 => LeaseState::Active { remaining_ms },
            // On stream time the window does not run on elapsed time, as leases do.
            _ if policy.is_stream => interrupted(PriorAttempt::LeaseExpired, is_over(processing.since_ms)),
            _ => {
                let expired_for_ms = now.monotonic_ms().saturating_sub(until_monotonic_ms);
                interrupted(PriorAttempt::LeaseExpired, expired_for_ms >= policy.window_ms)
            }
        },
        Holder::Interrupted(prior) => interrupted(prior, is_over(processing.since_ms)),
        // Before the backoff, and by the rule of completions: an engine may drop a released key together with completed ones.
        Holder::Released { .. } | Holder::Resolved(_) if !now.remembers(processing.since_ms, policy.window_ms) => {
            LeaseState::Forgotten
        }
        Holder::Resolved(prior) => LeaseState::Free(prior),
        Holder::Released { prior, backoff } => {
            let ends_at_ms = policy.backoff_ends_at(processing.token, processing.since_ms, backoff);
            match ends_at_ms.saturating_sub(now.monotonic_ms()) {
                0 => LeaseState::Free(prior),
                remaining_ms => LeaseState::Backoff { remaining_ms, prior },
            }
        }
    }
}

/// The answer of the state machine to a claim, a check or a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision<'a, A = Available> {
    /// The key is new or free: the caller may work on it.
    Available(A),
    /// Another holder has it, or it is in backoff. `None`: it is held until it is resolved.
    InProgress {
        /// When to claim again.
        retry_after_ms: Option<u64>,
        /// The number of the attempt, from 1.
        attempt: u32,
    },
    /// The key is completed.
    Completed(&'a CompletedEntry),
    /// The key was used with another payload.
    PayloadMismatch,
    /// No entry counts, and the message is older than the window: it cannot be known whether the key was completed.
    TooOld,
}

impl<'a> Decision<'a> {
    /// Begins the attempt of a key that is available.
    #[inline(always)]
    pub(super) fn begin<A, E>(self, begin: impl FnOnce(Available) -> Result<A, E>) -> Result<Decision<'a, A>, E> {
        Ok(match self {
            Self::Available(available) => Decision::Available(begin(available)?),
            Self::InProgress { retry_after_ms, attempt } => Decision::InProgress { retry_after_ms, attempt },
            Self::Completed(done) => Decision::Completed(done),
            Self::PayloadMismatch => Decision::PayloadMismatch,
            Self::TooOld => Decision::TooOld,
        })
    }
}

/// The retry hint for a committing key: about as long as a completion takes to reach the disk.
const COMMITTING_RETRY_MS: u64 = 10;

/// What a call says about one of its keys.
#[derive(Debug, Clone, Copy)]
pub struct KeyRequest<'a> {
    /// The fingerprint of the key's payload.
    pub payload: Option<&'a Fingerprint>,
    /// On stream time, the message's timestamp.
    pub at_ms: Option<u64>,
    /// The window that the call gives the key.
    pub own_window: OwnWindow,
}

impl Default for KeyRequest<'_> {
    fn default() -> Self {
        Self { payload: None, at_ms: None, own_window: OwnWindow::NONE }
    }
}

/// Decides what a claim or a record of a key gets, and answers a check. It changes nothing.
#[inline]
#[must_use]
pub fn decide<'a>(
    stored: Option<&'a Entry>,
    request: KeyRequest<'_>,
    now: impl Moment,
    policy: Policy,
) -> Decision<'a> {
    let new = match request.at_ms {
        Some(at_ms) if !now.remembers(at_ms, request.own_window.within(policy.window_ms)) => Decision::TooOld,
        _ => Decision::Available(Available { attempt: 1, prior: None }),
    };
    let (first_payload, decision) = match stored {
        None => return new,
        Some(Entry::Completed(done)) if !done.is_live(now, policy.window_ms) => return new,
        Some(Entry::Completed(done)) => (&done.fingerprint, Decision::Completed(done)),
        Some(Entry::Processing(processing)) => {
            let attempt = processing.attempt;
            let in_progress = |retry_after_ms| Decision::InProgress { retry_after_ms, attempt };
            let decision = match lease_state(processing, now, policy) {
                LeaseState::Forgotten => return new,
                LeaseState::Active { remaining_ms } | LeaseState::Backoff { remaining_ms, .. } => {
                    in_progress(Some(remaining_ms))
                }
                LeaseState::Committing => in_progress(Some(COMMITTING_RETRY_MS)),
                LeaseState::Held(_) => in_progress(None),
                LeaseState::Free(prior) => {
                    Decision::Available(Available { attempt: attempt.saturating_add(1), prior: Some(prior) })
                }
            };
            (&processing.fingerprint, decision)
        }
    };
    match (first_payload, request.payload) {
        (Some(first), Some(payload)) if first != payload => Decision::PayloadMismatch,
        _ => decision,
    }
}

/// A key that the next attempt gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Available {
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// How the attempt before it ended. `None`: the key is new.
    pub prior: Option<PriorAttempt>,
}

impl Available {
    /// The entry of a claim that got the key.
    #[inline]
    #[must_use]
    pub(super) fn claimed(
        self,
        stored: Option<&Entry>,
        request: KeyRequest<'_>,
        token: u64,
        until_monotonic_ms: u64,
        now: impl Moment,
    ) -> Processing {
        Processing {
            token,
            attempt: self.attempt,
            since_ms: self.time_ms(stored, request, now),
            fingerprint: self.fingerprint(stored, request),
            own_window: request.own_window,
            holder: Holder::Leased { until_monotonic_ms },
        }
    }

    /// The entry of a record: a completion without a claim and without a result.
    #[inline]
    #[must_use]
    pub(super) fn recorded<B>(
        self,
        stored: Option<&Entry>,
        request: KeyRequest<'_>,
        token: u64,
        now: impl Moment,
    ) -> CompletedEntry<B> {
        CompletedEntry {
            token,
            completed_ms: self.time_ms(stored, request, now),
            fingerprint: self.fingerprint(stored, request),
            own_window: request.own_window,
            result: StoredResult::None,
        }
    }

    /// The earlier attempt at the same work.
    #[inline]
    fn earlier<'a>(&self, stored: Option<&'a Entry>) -> Option<&'a Processing> {
        match (self.prior, stored) {
            (Some(_), Some(Entry::Processing(processing))) => Some(processing),
            _ => None,
        }
    }

    /// The time of the key: now, or its message's, and at least that of an earlier attempt at the same work or of a completion
    /// whose own window is over. Otherwise this state would expire first, and an attempt before it would count again.
    #[inline]
    fn time_ms(&self, stored: Option<&Entry>, request: KeyRequest<'_>, now: impl Moment) -> u64 {
        let time_ms = request.at_ms.unwrap_or(now.time_ms());
        match stored {
            Some(Entry::Completed(done)) => time_ms.max(done.completed_ms),
            stored => self.earlier(stored).map_or(time_ms, |earlier| time_ms.max(earlier.since_ms)),
        }
    }

    /// The payload that binds the key: the call's, or that of the earlier attempt.
    #[inline]
    fn fingerprint(&self, stored: Option<&Entry>, request: KeyRequest<'_>) -> Option<Fingerprint> {
        request.payload.copied().or_else(|| self.earlier(stored)?.fingerprint)
    }
}

/// Whether an entry counts: it is within its window, or in progress.
#[must_use]
pub fn counts(entry: &Entry, now: impl Moment, policy: Policy) -> bool {
    match entry {
        Entry::Completed(done) => done.is_live(now, policy.window_ms),
        Entry::Processing(processing) => lease_state(processing, now, policy) != LeaseState::Forgotten,
    }
}

/// The entry of a key that is held for resolution, and how its attempt ended.
#[must_use]
pub fn held(stored: Option<&Entry>, now: impl Moment, policy: Policy) -> Option<(&Processing, PriorAttempt)> {
    let Some(Entry::Processing(processing)) = stored else { return None };
    match lease_state(processing, now, policy) {
        LeaseState::Held(prior) => Some((processing, prior)),
        _ => None,
    }
}
