//! The state machine, as pure functions: what is stored of a key and what time it is, in; what to do, out.
//!
//! No I/O, no lock, no clock. The table of states in `docs/guarantees.md` is this file in words.

use crate::clock::Now;
use crate::entry::{Backoff, CompletedEntry, Entry, Holder, OwnWindow, Processing, is_live};
use onlyonce_core::{Fingerprint, OnInterrupt, PriorAttempt};

/// The options that decide.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) window_ms: u64,
    pub(crate) on_interrupt: OnInterrupt,
    /// Whether the store's time is that of its messages.
    pub(crate) is_stream: bool,
    pub(crate) opened: Opened,
    /// The lowest token that this process gives out: a lower one is of an earlier process.
    pub(crate) first_token: u64,
}

/// When this process opened the store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opened {
    pub(crate) time_ms: u64,
    pub(crate) monotonic_ms: u64,
}

impl From<&Now> for Opened {
    fn from(now: &Now) -> Self {
        Self { time_ms: now.time_ms, monotonic_ms: now.monotonic_ms }
    }
}

impl Policy {
    /// When the backoff of a released key ends, on this process's monotonic clock. One of an earlier process goes on from
    /// the opening, on what was left of it by the store's time then; on stream time, which knows nothing of real time, it
    /// ends with its process.
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

/// How a claimed, uncompleted key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeaseState {
    /// Somebody works on it for so long at least.
    Active { remaining_ms: u64 },
    /// Its outcome is on its way to the journal.
    Committing,
    /// The next claim gets it.
    Free(PriorAttempt),
    /// The next claim gets it after a backoff.
    Backoff { remaining_ms: u64, prior: PriorAttempt },
    /// Nobody gets it before it is resolved.
    Held(PriorAttempt),
    /// It was left alone for a whole window: as good as never seen.
    Forgotten,
}

pub(crate) fn lease_state(processing: &Processing, now: Now, policy: Policy) -> LeaseState {
    let is_over = |since_ms: u64| now.is_over(since_ms, policy.window_ms);
    let interrupted = |prior, is_over| match policy.on_interrupt {
        OnInterrupt::Hold => LeaseState::Held(prior),
        OnInterrupt::Rerun if is_over => LeaseState::Forgotten,
        OnInterrupt::Rerun => LeaseState::Free(prior),
    };
    match processing.holder {
        Holder::Committing | Holder::CommittingUnclaimed => LeaseState::Committing,
        Holder::Leased { until_monotonic_ms } => match until_monotonic_ms.checked_sub(now.monotonic_ms) {
            Some(remaining_ms) if remaining_ms > 0 => LeaseState::Active { remaining_ms },
            // How long it has been alone is a matter of the store's time where that has nothing to do with leases.
            _ if policy.is_stream => interrupted(PriorAttempt::LeaseExpired, is_over(processing.since_ms)),
            _ => {
                let alone_ms = now.monotonic_ms.saturating_sub(until_monotonic_ms);
                interrupted(PriorAttempt::LeaseExpired, alone_ms >= policy.window_ms)
            }
        },
        Holder::Interrupted(prior) => interrupted(prior, is_over(processing.since_ms)),
        // Before the backoff is looked at, and as for a completion: what is in a bucket goes with it.
        Holder::Released { .. } | Holder::Resolved(_) if !is_live(processing.since_ms, now, policy.window_ms) => {
            LeaseState::Forgotten
        }
        Holder::Resolved(prior) => LeaseState::Free(prior),
        Holder::Released { prior, backoff } => {
            let ends_at_ms = policy.backoff_ends_at(processing.token, processing.since_ms, backoff);
            match ends_at_ms.saturating_sub(now.monotonic_ms) {
                0 => LeaseState::Free(prior),
                remaining_ms => LeaseState::Backoff { remaining_ms, prior },
            }
        }
    }
}

/// What a claim, a check or a record finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision<'a> {
    /// Nothing that counts: the work is the caller's.
    Available { attempt: u32, prior: Option<PriorAttempt> },
    /// Somebody else's, for now. `None`: until it is resolved.
    InProgress { retry_after_ms: Option<u64>, attempt: u32 },
    /// Done: the stored result is the answer.
    Completed(&'a CompletedEntry),
    /// The key was used with another payload.
    PayloadMismatch,
    /// Nothing that counts, and whether there ever was something nobody knows: the message is older than the window.
    TooOld,
}

/// A completion takes about this long to reach the disk: when to ask again for a key that is settling.
const COMMITTING_RETRY_MS: u64 = 10;

/// `at_ms` is the message's time, on stream time; `own_window` is the window that the call gives its key.
#[inline]
pub(crate) fn decide<'a>(
    stored: Option<&'a Entry>,
    payload: Option<&Fingerprint>,
    at_ms: Option<u64>,
    own_window: OwnWindow,
    now: Now,
    policy: Policy,
) -> Decision<'a> {
    let new = match at_ms {
        Some(at_ms) if !is_live(at_ms, now, own_window.within(policy.window_ms)) => Decision::TooOld,
        _ => Decision::Available { attempt: 1, prior: None },
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
                    Decision::Available { attempt: attempt.saturating_add(1), prior: Some(prior) }
                }
            };
            (&processing.fingerprint, decision)
        }
    };
    match (first_payload, payload) {
        (Some(first), Some(this)) if first != this => Decision::PayloadMismatch,
        _ => decision,
    }
}

/// Whether the holder of `token` may settle the key. The token decides, never the clock: a late completion that
/// nobody has overtaken is accepted, for refusing it would only cause the duplicate.
pub(crate) fn may_finish(stored: Option<&Entry>, token: u64) -> bool {
    matches!(stored, Some(Entry::Processing(processing))
        if processing.token == token && !matches!(processing.holder, Holder::Committing | Holder::CommittingUnclaimed))
}

/// What becomes of a holder that vanished.
pub(crate) fn interrupted(prior: PriorAttempt, on_interrupt: OnInterrupt) -> Holder {
    match on_interrupt {
        OnInterrupt::Hold => Holder::Interrupted(prior),
        OnInterrupt::Rerun => Holder::Released { prior, backoff: Backoff::NONE },
    }
}

/// The payload that binds the next attempt: none where nothing happened, so that a corrected retry runs as if it were the
/// first.
pub(crate) fn binding(fingerprint: Option<Fingerprint>, prior: PriorAttempt) -> Option<Fingerprint> {
    fingerprint.filter(|_| prior.may_have_happened())
}

/// Whether an event of the journal changes what was read of its key so far.
///
/// A row is numbered before it takes effect, so the rows of one holder stand in their order. Those of two holders may
/// stand in the other order where their calls overlapped: tokens tell.
pub(crate) fn replay_claimed(stored: Option<&Entry>, token: u64) -> bool {
    stored.is_none_or(|entry| entry.token() < token)
}

/// As [`replay_claimed`], for a release.
pub(crate) fn replay_released(stored: Option<&Entry>, token: u64) -> bool {
    match stored {
        None => true,
        Some(Entry::Processing(processing)) => processing.token <= token,
        Some(Entry::Completed(done)) => done.token < token,
    }
}

/// As [`replay_claimed`], for a completion or a record.
pub(crate) fn replay_completed(stored: Option<&Entry>, token: u64) -> bool {
    stored.is_none_or(|entry| entry.token() <= token)
}

/// As [`replay_claimed`], for a key that was forgotten.
pub(crate) fn replay_forgotten(stored: Option<&Entry>, token: u64) -> bool {
    stored.is_some_and(|entry| entry.token() < token)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use onlyonce_core::StoredResult;

    const WINDOW_MS: u64 = 1_000;
    const OPENED: Opened = Opened { time_ms: 5_000, monotonic_ms: 0 };
    const RERUN: Policy = Policy {
        window_ms: WINDOW_MS,
        on_interrupt: OnInterrupt::Rerun,
        is_stream: false,
        opened: OPENED,
        first_token: 7,
    };
    const HOLD: Policy = Policy { on_interrupt: OnInterrupt::Hold, ..RERUN };
    const STREAM: Policy = Policy { is_stream: true, ..RERUN };
    const RELEASED: Holder = Holder::Released { prior: PriorAttempt::Released, backoff: Backoff::NONE };
    const HERS: Option<&Fingerprint> = Some(&[1; 16]);
    const HIS: Option<&Fingerprint> = Some(&[2; 16]);

    fn at(wall_ms: u64) -> Now {
        Now { time_ms: wall_ms, monotonic_ms: wall_ms - 5_000, ..Now::default() }
    }

    fn lease_state_of(entry: &Entry, now: Now, policy: Policy) -> LeaseState {
        let Entry::Processing(processing) = entry else { panic!("{entry:?} is not being processed") };
        lease_state(processing, now, policy)
    }

    fn processing(holder: Holder) -> Entry {
        Entry::Processing(Processing {
            token: 7,
            attempt: 2,
            since_ms: 5_000,
            own_window: OwnWindow::NONE,
            fingerprint: HERS.copied(),
            holder,
        })
    }

    fn completed() -> Entry {
        Entry::Completed(CompletedEntry {
            token: 7,
            completed_ms: 5_000,
            own_window: OwnWindow::NONE,
            fingerprint: HERS.copied(),
            result: StoredResult::None,
        })
    }

    fn decision(stored: &Entry, wall_ms: u64, policy: Policy) -> Decision<'_> {
        decide(Some(stored), HERS, None, OwnWindow::NONE, at(wall_ms), policy)
    }

    const NEW: Decision<'_> = Decision::Available { attempt: 1, prior: None };

    fn again(prior: PriorAttempt) -> Decision<'static> {
        Decision::Available { attempt: 3, prior: Some(prior) }
    }

    fn in_progress(retry_after_ms: Option<u64>) -> Decision<'static> {
        Decision::InProgress { retry_after_ms, attempt: 2 }
    }

    #[test]
    fn an_absent_key_is_available() {
        assert_eq!(decide(None, HIS, None, OwnWindow::NONE, at(5_000), RERUN), NEW);
    }

    #[test]
    fn a_completed_key_is_completed_until_the_last_millisecond_of_its_window() {
        for policy in [RERUN, HOLD] {
            let stored = completed();
            assert!(matches!(decision(&stored, 5_000, policy), Decision::Completed(done) if done.token == 7));
            assert!(matches!(decision(&stored, 5_999, policy), Decision::Completed(_)));
            assert_eq!(decision(&stored, 6_000, policy), NEW);
        }
    }

    #[test]
    fn a_leased_key_is_in_progress_until_its_lease_runs_out() {
        let leased = processing(Holder::Leased { until_monotonic_ms: 300 });
        assert_eq!(decision(&leased, 5_000, RERUN), in_progress(Some(300)));
        assert_eq!(decision(&leased, 5_299, RERUN), in_progress(Some(1)));
        assert_eq!(decision(&leased, 5_300, RERUN), again(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&leased, 5_300, HOLD), in_progress(None));
    }

    #[test]
    fn a_lease_longer_than_the_window_is_still_a_lease() {
        let leased = processing(Holder::Leased { until_monotonic_ms: 4_000 });
        assert_eq!(decision(&leased, 8_999, RERUN), in_progress(Some(1)));
        assert_eq!(decision(&leased, 9_000, RERUN), again(PriorAttempt::LeaseExpired), "and its end is told");
        assert_eq!(decision(&leased, 9_999, RERUN), again(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&leased, 10_000, RERUN), NEW, "for a window");
    }

    #[test]
    fn an_interrupted_key_is_free_or_held() {
        for prior in [PriorAttempt::Dropped, PriorAttempt::Crashed] {
            let interrupted = processing(Holder::Interrupted(prior));
            assert_eq!(decision(&interrupted, 5_999, RERUN), again(prior));
            assert_eq!(decision(&interrupted, 6_000, RERUN), NEW);
            assert_eq!(decision(&interrupted, 5_999, HOLD), in_progress(None));
            assert_eq!(decision(&interrupted, 999_000, HOLD), in_progress(None), "a decision does not expire");
        }
    }

    fn backoff(until_monotonic_ms: u64, length_ms: u32) -> Holder {
        Holder::Released { prior: PriorAttempt::Released, backoff: Backoff { until_monotonic_ms, length_ms } }
    }

    #[test]
    fn a_released_key_is_free_after_its_backoff_and_forgotten_after_a_window() {
        for policy in [RERUN, HOLD] {
            let released = processing(RELEASED);
            assert_eq!(decision(&released, 5_000, policy), again(PriorAttempt::Released));
            assert_eq!(decision(&released, 5_999, policy), again(PriorAttempt::Released));
            assert_eq!(decision(&released, 6_000, policy), NEW);
            let waits = processing(backoff(900, 900));
            assert_eq!(decision(&waits, 5_890, policy), in_progress(Some(10)));
            assert_eq!(decision(&waits, 5_900, policy), again(PriorAttempt::Released));
            assert_eq!(decision(&waits, 6_000, policy), NEW);
        }
    }

    #[test]
    fn a_backoff_runs_on_monotonic_time_and_no_wall_clock_lengthens_it() {
        let waits = processing(backoff(300, 300));
        let ask = |time_ms, monotonic_ms| {
            let now = Now { time_ms, monotonic_ms, ..Now::default() };
            decide(Some(&waits), HERS, None, OwnWindow::NONE, now, RERUN)
        };
        // The store's time stands still, or leaps inside the window.
        assert_eq!((ask(5_000, 299), ask(5_000, 300)), (in_progress(Some(1)), again(PriorAttempt::Released)));
        assert_eq!((ask(5_999, 299), ask(5_999, 300)), (in_progress(Some(1)), again(PriorAttempt::Released)));
    }

    #[test]
    fn a_backoff_of_an_earlier_process_goes_on_with_what_was_left_of_it() {
        let of_earlier = |time_ms, length_ms, is_stream| {
            // Its end on the clock of a process that is gone says nothing.
            let waits = processing(backoff(1 << 50, length_ms));
            let policy = Policy { opened: Opened { time_ms, monotonic_ms: 40 }, first_token: 8, is_stream, ..RERUN };
            let at = |monotonic_ms| lease_state_of(&waits, Now { time_ms, monotonic_ms, ..Now::default() }, policy);
            (40..2_000).find(|ms| at(*ms) == LeaseState::Free(PriorAttempt::Released)).map(|ms| ms - 40)
        };
        assert_eq!(of_earlier(5_000, 300, false), Some(300));
        assert_eq!(of_earlier(5_200, 300, false), Some(100));
        assert_eq!(of_earlier(5_300, 300, false), Some(0));
        assert_eq!(of_earlier(1_000, 300, false), Some(300), "a clock that was set back does not lengthen it");
        assert_eq!(of_earlier(5_000, 300, true), Some(0), "on stream time it ends with its process");
    }

    #[test]
    fn a_backoff_is_at_most_half_a_window_long() {
        let from = |length| Backoff::from(&Now::default(), length, WINDOW_MS);
        assert_eq!(from(Duration::ZERO), Backoff::NONE);
        assert_eq!(from(Duration::from_millis(300)), Backoff { until_monotonic_ms: 300, length_ms: 300 });
        assert_eq!(from(Duration::MAX), Backoff { until_monotonic_ms: 500, length_ms: 500 });
        let of_years = Backoff::from(&Now::default(), Duration::MAX, u64::MAX);
        assert_eq!(of_years.length_ms, u32::MAX);
    }

    #[test]
    fn a_key_that_was_decided_to_run_again_is_free_for_a_window() {
        let resolved = processing(Holder::Resolved(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&resolved, 5_999, HOLD), again(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&resolved, 6_000, HOLD), NEW);
        assert!(may_finish(Some(&resolved), 7), "its holder may still come back");
    }

    #[test]
    fn a_settling_key_is_nobodys_to_take() {
        for (policy, holder) in
            [(RERUN, Holder::Committing), (HOLD, Holder::Committing), (HOLD, Holder::CommittingUnclaimed)]
        {
            let committing = processing(holder);
            assert_eq!(decision(&committing, 900_000, policy), in_progress(Some(COMMITTING_RETRY_MS)));
            assert!(!may_finish(Some(&committing), 7));
        }
    }

    #[test]
    fn another_payload_is_refused_before_anything_else_is_said() {
        let states = [
            completed(),
            processing(Holder::Leased { until_monotonic_ms: 300 }),
            processing(Holder::Interrupted(PriorAttempt::Crashed)),
            processing(RELEASED),
            processing(Holder::Committing),
        ];
        for stored in &states {
            assert_eq!(
                decide(Some(stored), HIS, None, OwnWindow::NONE, at(5_100), RERUN),
                Decision::PayloadMismatch,
                "{stored:?}"
            );
            assert_ne!(
                decide(Some(stored), None, None, OwnWindow::NONE, at(5_100), RERUN),
                Decision::PayloadMismatch,
                "{stored:?}"
            );
        }
        assert_eq!(
            decide(Some(&completed()), HIS, None, OwnWindow::NONE, at(6_000), RERUN),
            NEW,
            "an expired payload binds nobody"
        );
    }

    #[test]
    fn a_completion_is_judged_by_its_token() {
        let late = processing(Holder::Leased { until_monotonic_ms: 0 });
        assert!(may_finish(Some(&late), 7));
        assert!(!may_finish(Some(&late), 6));
        assert!(!may_finish(Some(&completed()), 7));
        assert!(!may_finish(None, 7));
    }

    #[test]
    fn on_stream_time_what_is_known_answers_before_the_messages_age() {
        let ask = |stored: Option<&Entry>, at_ms, stream_ms| {
            let now = Now { time_ms: stream_ms, monotonic_ms: 100, ..Now::default() };
            match decide(stored, HERS, Some(at_ms), OwnWindow::NONE, now, STREAM) {
                Decision::Completed(_) => "completed",
                Decision::InProgress { .. } => "in progress",
                Decision::Available { prior: None, .. } => "new",
                Decision::Available { .. } => "again",
                Decision::PayloadMismatch => "mismatch",
                Decision::TooOld => "too old",
            }
        };
        assert_eq!((ask(None, 4_001, 5_000), ask(None, 4_000, 5_000)), ("new", "too old"));
        let done = completed();
        assert_eq!((ask(Some(&done), 5_000, 5_999), ask(Some(&done), 4_000, 5_999)), ("completed", "completed"));
        assert_eq!((ask(Some(&done), 5_000, 6_000), ask(Some(&done), 5_001, 6_000)), ("too old", "new"));
        let leased = processing(Holder::Leased { until_monotonic_ms: 101 });
        assert_eq!(ask(Some(&leased), 5_000, 900_000), "in progress", "however far the stream has come");
        for holder in
            [Holder::Leased { until_monotonic_ms: 100 }, Holder::Interrupted(PriorAttempt::Crashed), backoff(100, 100)]
        {
            let left = processing(holder);
            assert_eq!((ask(Some(&left), 5_000, 5_999), ask(Some(&left), 3_000, 5_999)), ("again", "again"));
            assert_eq!((ask(Some(&left), 5_000, 6_000), ask(Some(&left), 5_001, 6_000)), ("too old", "new"));
        }
        let waits = processing(backoff(101, 101));
        assert_eq!((ask(Some(&waits), 5_000, 5_999), ask(Some(&waits), 5_000, 6_000)), ("in progress", "too old"));
    }

    #[test]
    fn replay_follows_the_tokens() {
        let claimed = processing(Holder::Interrupted(PriorAttempt::Crashed));
        for (token, claim, release, complete, forget) in
            [(6, false, false, false, false), (7, false, true, true, false), (8, true, true, true, true)]
        {
            assert_eq!(replay_claimed(Some(&claimed), token), claim, "claimed {token}");
            assert_eq!(replay_released(Some(&claimed), token), release, "released {token}");
            assert_eq!(replay_completed(Some(&claimed), token), complete, "completed {token}");
            assert_eq!(replay_forgotten(Some(&claimed), token), forget, "forgotten {token}");
        }
        for (token, release) in [(6, false), (7, false), (8, true)] {
            assert_eq!(
                replay_released(Some(&completed()), token),
                release,
                "only a later holder settles again: {token}"
            );
        }
        assert!(replay_claimed(None, 1) && replay_released(None, 1) && replay_completed(None, 1));
        assert!(!replay_forgotten(None, 1));
    }
}
