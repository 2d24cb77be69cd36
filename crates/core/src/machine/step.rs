//! One step of a key: an operation on its stored entry gives an answer and a change.

use std::sync::Arc;

use super::entry::{Backoff, Entry, Holder, Processing};
use super::event::Event;
use super::finish::{Attempt, FinishedBy, finishable, interrupted, may_finish, taken_back};
use super::moment::Moment;
use super::transition::{Decision, KeyRequest, LeaseState, Policy, counts, decide, lease_state};
use crate::answer::StoredResult;
use crate::attempt::PriorAttempt;
use crate::key::Fingerprint;

/// An operation on one key.
///
/// An engine executes each in the same way: it looks the entry up, holds its lock, calls [`step`], applies the change, and
/// writes the change's event.
pub trait Op<B = Arc<[u8]>>: Sized {
    /// What the caller gets.
    type Answer<'s>;

    /// See [`step`].
    ///
    /// # Errors
    ///
    /// The error of `token`.
    fn step<'s, E>(
        self,
        stored: Option<&'s Entry>,
        now: impl Moment,
        policy: Policy,
        token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<Self::Answer<'s>, B>, E>;
}

/// Executes an operation on the stored entry of a key: what the caller gets, and what changes.
///
/// It calls `token` at most once, for an operation that starts an attempt of its own: a claim or a record that gets the key, a
/// completion by an operator, a removal. Each token must be higher than all before it. An error of `token` ends the step: nothing
/// changes.
///
/// # Errors
///
/// The error of `token`.
#[inline(always)]
pub fn step<'s, B, O: Op<B>, E>(
    stored: Option<&'s Entry>,
    op: O,
    now: impl Moment,
    policy: Policy,
    token: impl FnOnce() -> Result<u64, E>,
) -> Result<Step<O::Answer<'s>, B>, E> {
    op.step(stored, now, policy, token)
}

/// The outcome of an operation on one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step<A, B = Arc<[u8]>> {
    /// What the caller gets.
    pub answer: A,
    /// What changes.
    pub change: Change<B>,
}

impl<A, B> Step<A, B> {
    #[inline]
    fn unchanged<E>(answer: A) -> Result<Self, E> {
        Ok(Self { answer, change: Change::None })
    }
}

/// What a step changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<B = Arc<[u8]>> {
    /// Nothing.
    None,
    /// The entry becomes this one in memory. It is not written: after a crash the entry before it counts.
    InMemory(Processing),
    /// The event takes effect at once. The answer is returned once the event is written; until then no other attempt begins, even
    /// if the lease ends.
    Immediate(Event<B>),
    /// The event takes effect once it is written, because a caller could rely on it. Until then the key is in progress.
    OnceWritten {
        /// The event.
        event: Event<B>,
        /// The number of the key's attempt until then.
        attempt: u32,
        /// The key's holder until then.
        holder: Holder,
    },
}

impl<B> Change<B> {
    /// The event that is written.
    #[must_use]
    pub fn event(&self) -> Option<&Event<B>> {
        match self {
            Self::None | Self::InMemory(_) => None,
            Self::Immediate(event) | Self::OnceWritten { event, .. } => Some(event),
        }
    }
}

/// Claims the key.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'r> {
    /// What the call says about the key.
    pub request: KeyRequest<'r>,
    /// The end of the lease, on the monotonic clock.
    pub until_monotonic_ms: u64,
}

/// The attempt that a claim began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acquired {
    /// Its token.
    pub token: u64,
    /// Its number, from 1.
    pub attempt: u32,
    /// How the attempt before it ended. `None`: the key was new.
    pub prior: Option<PriorAttempt>,
    /// When it was claimed. On stream time, the message's timestamp.
    pub since_ms: u64,
    /// The payload that binds the key.
    pub fingerprint: Option<Fingerprint>,
}

impl<B> Op<B> for Claim<'_> {
    type Answer<'s> = Decision<'s, Acquired>;

    #[inline(always)]
    fn step<'s, E>(
        self,
        stored: Option<&'s Entry>,
        now: impl Moment,
        policy: Policy,
        token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<Self::Answer<'s>, B>, E> {
        let mut change = Change::None;
        let answer = decide(stored, self.request, now, policy).begin(|available| {
            let claimed = available.claimed(stored, self.request, token()?, self.until_monotonic_ms, now);
            let Processing { token, attempt, since_ms, fingerprint, .. } = claimed;
            // Visible at once: otherwise a concurrent claim could get the key, too.
            change = Change::Immediate(Event::Claimed(claimed));
            Ok(Acquired { token, attempt, prior: available.prior, since_ms, fingerprint })
        })?;
        Ok(Step { answer, change })
    }
}

/// Completes the key, if a claim would get it, without a lease and without a result.
#[derive(Debug, Clone, Copy)]
pub struct Record<'r> {
    /// What the call says about the key.
    pub request: KeyRequest<'r>,
}

impl<B> Op<B> for Record<'_> {
    type Answer<'s> = Decision<'s>;

    #[inline(always)]
    fn step<'s, E>(
        self,
        stored: Option<&'s Entry>,
        now: impl Moment,
        policy: Policy,
        token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<Decision<'s>, B>, E> {
        let answer = decide(stored, self.request, now, policy);
        let change = match answer {
            Decision::Available(available) => Change::OnceWritten {
                event: Event::Completed(available.recorded(stored, self.request, token()?, now)),
                attempt: available.attempt,
                holder: Holder::CommittingUnclaimed,
            },
            _ => Change::None,
        };
        Ok(Step { answer, change })
    }
}

/// What the holder of a lease gets when it finishes the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// The lease is finished.
    Accepted,
    /// The same token has completed the key before. The first completion stays.
    Repeated,
    /// A finish with the same token is not written yet.
    Committing,
    /// Another attempt owns the key, or nothing is known about it.
    Superseded,
}

/// Completes an attempt.
#[derive(Debug, Clone, Copy)]
pub struct Complete<B = Arc<[u8]>> {
    /// The attempt, as its grant describes it.
    pub attempt: Attempt,
    /// Who completes it.
    pub by: FinishedBy,
    /// The result.
    pub result: StoredResult<B>,
}

impl<B> Op<B> for Complete<B> {
    type Answer<'s> = Finished;

    #[inline(always)]
    fn step<E>(
        self,
        stored: Option<&Entry>,
        now: impl Moment,
        policy: Policy,
        token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<Finished, B>, E> {
        let Self { mut attempt, by, result } = self;
        let Some(processing) = finishable(stored, attempt.token, by, now, policy) else {
            return Step::unchanged(match (by, stored) {
                (FinishedBy::Holder, Some(Entry::Completed(done)))
                    if done.token == attempt.token && done.is_live(now, policy.window_ms) =>
                {
                    Finished::Repeated
                }
                _ => unfinishable(stored, attempt.token),
            });
        };
        // With a token of its own, so that the old holder's late completion is no repeated one.
        if by == FinishedBy::Operator {
            attempt.token = token()?;
        }
        let done = attempt.completed(processing.own_window, result, now, policy);
        let event = match processing.holder {
            Holder::Leased { .. } if by == FinishedBy::Holder => Event::ClaimCompleted(done),
            _ => Event::Completed(done),
        };
        Ok(finished(event, attempt))
    }
}

/// Releases an attempt, or resolves a held key to run again.
#[derive(Debug, Clone, Copy)]
pub struct Release {
    /// The attempt, as its grant describes it.
    pub attempt: Attempt,
    /// Who releases it.
    pub by: FinishedBy,
    /// How the attempt ended.
    pub prior: PriorAttempt,
    /// How long the key cannot be claimed.
    pub backoff: Backoff,
}

impl<B> Op<B> for Release {
    type Answer<'s> = Finished;

    #[inline(always)]
    fn step<E>(
        self,
        stored: Option<&Entry>,
        now: impl Moment,
        policy: Policy,
        _token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<Finished, B>, E> {
        let Self { attempt, by, prior, backoff } = self;
        let Some(processing) = finishable(stored, attempt.token, by, now, policy) else {
            return Step::unchanged(unfinishable(stored, attempt.token));
        };
        let released = attempt.released(processing.own_window, by, prior, backoff, now, policy);
        Ok(finished(Event::Released(released), attempt))
    }
}

#[inline(always)]
fn finished<B>(event: Event<B>, attempt: Attempt) -> Step<Finished, B> {
    let change = Change::OnceWritten { event, attempt: attempt.attempt, holder: Holder::Committing };
    Step { answer: Finished::Accepted, change }
}

#[cold]
fn unfinishable(stored: Option<&Entry>, token: u64) -> Finished {
    match stored {
        Some(Entry::Processing(Processing { token: of, holder: Holder::Committing, .. })) if *of == token => {
            Finished::Committing
        }
        _ => Finished::Superseded,
    }
}

/// Renews a lease. The answer is whether the lease still has the key.
#[derive(Debug, Clone, Copy)]
pub struct Renew {
    /// The token of the lease.
    pub token: u64,
    /// The new end of the lease, on the monotonic clock. An earlier end changes nothing.
    pub until_monotonic_ms: u64,
}

impl<B> Op<B> for Renew {
    type Answer<'s> = bool;

    fn step<E>(
        self,
        stored: Option<&Entry>,
        _now: impl Moment,
        _policy: Policy,
        _token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<bool, B>, E> {
        // The attempt is as old as before.
        let renewed = |before: &Processing| {
            let holder = before.holder.renewed(self.until_monotonic_ms)?;
            Some(Processing { holder, ..before.clone() })
        };
        Ok(in_memory(stored, self.token, renewed))
    }
}

/// Ends a lease that is not finished. The answer is whether the token still has the key.
#[derive(Debug, Clone, Copy)]
pub struct Abandon {
    /// The token of the lease.
    pub token: u64,
    /// What it leaves.
    pub outcome: Abandoned,
}

/// What an abandoned lease leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abandoned {
    /// The work may have happened.
    Unknown,
    /// No caller received the lease, so that no work was done. The key is as it was after this earlier attempt.
    NotReceived {
        /// How the earlier attempt ended.
        prior: Option<PriorAttempt>,
    },
}

impl<B> Op<B> for Abandon {
    type Answer<'s> = bool;

    fn step<E>(
        self,
        stored: Option<&Entry>,
        now: impl Moment,
        policy: Policy,
        _token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<bool, B>, E> {
        let ended = match self.outcome {
            Abandoned::Unknown => interrupted(PriorAttempt::Dropped, policy.on_interrupt),
            Abandoned::NotReceived { prior } => taken_back(prior),
        };
        let ended = |before: &Processing| Some(before.clone().with_holder(before.holder.ended(ended), now, policy));
        Ok(in_memory(stored, self.token, ended))
    }
}

/// Changes the holder of a token's key, in memory. False if the token does not have the key, or `change` returns `None`.
fn in_memory<B>(
    stored: Option<&Entry>,
    token: u64,
    change: impl FnOnce(&Processing) -> Option<Processing>,
) -> Step<bool, B> {
    let superseded = Step { answer: false, change: Change::None };
    let Some(Entry::Processing(before)) = stored.filter(|_| may_finish(stored, token)) else { return superseded };
    let Some(after) = change(before) else { return superseded };
    let change = if after.holder == before.holder { Change::None } else { Change::InMemory(after) };
    Step { answer: true, change }
}

/// Removes everything that is stored about the key.
#[derive(Debug, Clone, Copy)]
pub struct Forget;

/// The answer to [`Forget`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forgotten {
    /// The entry is removed.
    Removed {
        /// Whether the entry counted: it had not expired.
        counted: bool,
    },
    /// A holder has the key.
    InUse {
        /// The token of the holder.
        token: u64,
    },
    /// The key is held: without the entry, the next claim would not report that the work may have happened.
    Undecided {
        /// The token of the interrupted attempt.
        token: u64,
    },
}

impl<B> Op<B> for Forget {
    type Answer<'s> = Forgotten;

    fn step<E>(
        self,
        stored: Option<&Entry>,
        now: impl Moment,
        policy: Policy,
        token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<Forgotten, B>, E> {
        let Some(entry) = stored else { return Step::unchanged(Forgotten::Removed { counted: false }) };
        if let Entry::Processing(processing) = entry {
            let token = processing.token;
            match lease_state(processing, now, policy) {
                LeaseState::Active { .. } | LeaseState::Committing => {
                    return Step::unchanged(Forgotten::InUse { token });
                }
                LeaseState::Held(_) => return Step::unchanged(Forgotten::Undecided { token }),
                LeaseState::Free(_) | LeaseState::Backoff { .. } | LeaseState::Forgotten => {}
            }
        }
        let event = Event::Forgotten { token: token()? };
        Ok(Step {
            answer: Forgotten::Removed { counted: counts(entry, now, policy) },
            change: Change::OnceWritten { event, attempt: 1, holder: Holder::Committing },
        })
    }
}

/// Replays an event of the journal on the entry that the events before it left. It depends on no time and on no policy.
#[inline]
#[must_use]
pub fn replay<B>(stored: Option<&Entry>, event: Event<B>) -> Change<B> {
    if event.follows(stored) { Change::Immediate(event) } else { Change::None }
}

/// After the replay, ends the attempt of a key whose process has crashed. A held key becomes free under
/// [`OnInterrupt::Rerun`](crate::OnInterrupt::Rerun).
#[derive(Debug, Clone, Copy)]
pub struct Crash;

impl<B> Op<B> for Crash {
    type Answer<'s> = ();

    fn step<E>(
        self,
        stored: Option<&Entry>,
        now: impl Moment,
        policy: Policy,
        _token: impl FnOnce() -> Result<u64, E>,
    ) -> Result<Step<(), B>, E> {
        let Some(Entry::Processing(processing)) = stored else { return Step::unchanged(()) };
        let (prior, since_ms) = match processing.holder {
            Holder::Leased { .. } => (PriorAttempt::Crashed, policy.next_time_ms(processing.since_ms, now)),
            Holder::Interrupted(prior) => (prior, processing.since_ms),
            _ => return Step::unchanged(()),
        };
        let holder = interrupted(prior, policy.on_interrupt);
        if holder == processing.holder {
            return Step::unchanged(());
        }
        let crashed = Processing { since_ms, holder, ..processing.clone() };
        Ok(Step { answer: (), change: Change::InMemory(crashed) })
    }
}
