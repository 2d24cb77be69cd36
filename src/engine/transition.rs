//! The state machine of a key, as pure functions: they map the stored entry and the time to a decision.
//!
//! No I/O, no lock, no clock. The table of states in `docs/guarantees.md` describes the same rules.

use crate::clock::Now;
use crate::config::OnInterrupt;
use crate::entry::{Backoff, CompletedEntry, Entry, Holder, Processing, is_live};
use onlyonce_core::Fingerprint;
use onlyonce_core::PriorAttempt;

/// The options and facts that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    pub(crate) window_ms: u64,
    pub(crate) on_interrupt: OnInterrupt,
    /// Whether message timestamps drive the store's time.
    pub(crate) is_stream: bool,
    pub(crate) opened: Opened,
    /// The lowest token of this process. Lower ones were handed out by earlier processes.
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
    /// When the backoff of a released key ends, on the monotonic clock of this process. The backoff of an earlier process runs
    /// on from the open, with the length that remained on the store's time then. On stream time, which is unrelated to elapsed
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
pub(crate) enum LeaseState {
    /// A holder has it, for at least this long.
    Active { remaining_ms: u64 },
    /// Its completion or release is not durable yet.
    Committing,
    /// The next claim acquires it.
    Free(PriorAttempt),
    /// A claim acquires it after the backoff.
    Backoff { remaining_ms: u64, prior: PriorAttempt },
    /// No claim acquires it until it is resolved.
    Held(PriorAttempt),
    /// Nothing happened to it for a window. It counts as a new key.
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
            // On stream time the window does not run on elapsed time, as leases do.
            _ if policy.is_stream => interrupted(PriorAttempt::LeaseExpired, is_over(processing.since_ms)),
            _ => {
                let expired_for_ms = now.monotonic_ms.saturating_sub(until_monotonic_ms);
                interrupted(PriorAttempt::LeaseExpired, expired_for_ms >= policy.window_ms)
            }
        },
        Holder::Interrupted(prior) => interrupted(prior, is_over(processing.since_ms)),
        // Before the backoff, and by the rule of completions: a released key may be in a bucket, which is dropped then.
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

/// The answer of the state machine to a claim, a check or a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision<'a> {
    /// The key is new or free: the caller may work on it.
    Available { attempt: u32, prior: Option<PriorAttempt> },
    /// Another holder has it, or it is in backoff. `None`: it is held until it is resolved.
    InProgress { retry_after_ms: Option<u64>, attempt: u32 },
    /// The key is completed.
    Completed(&'a CompletedEntry),
    /// The key was used with another payload.
    PayloadMismatch,
    /// No entry counts, and the message is older than the window: it cannot be known whether the key was completed.
    TooOld,
}

/// The retry hint for a committing key: about as long as a completion takes to reach the disk.
const COMMITTING_RETRY_MS: u64 = 10;

/// Decides what a call gets for a key. `at_ms` is the message's timestamp on stream time.
#[inline]
pub(crate) fn decide<'a>(
    stored: Option<&'a Entry>,
    payload: Option<&Fingerprint>,
    at_ms: Option<u64>,
    now: Now,
    policy: Policy,
) -> Decision<'a> {
    let new = match at_ms {
        Some(at_ms) if !is_live(at_ms, now, policy.window_ms) => Decision::TooOld,
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
        (Some(first), Some(payload)) if first != payload => Decision::PayloadMismatch,
        _ => decision,
    }
}

/// Whether the holder of `token` may finish the key. The token decides, never the clock: if no later holder exists, a late
/// completion is accepted, since a rejection would cause the work to be repeated.
pub(crate) fn may_finish(stored: Option<&Entry>, token: u64) -> bool {
    matches!(stored, Some(Entry::Processing(processing))
        if processing.token == token && !matches!(processing.holder, Holder::Committing | Holder::CommittingUnclaimed))
}

/// The state of a key whose holder crashed, dropped its lease or let it expire.
pub(crate) fn interrupted(prior: PriorAttempt, on_interrupt: OnInterrupt) -> Holder {
    match on_interrupt {
        OnInterrupt::Hold => Holder::Interrupted(prior),
        OnInterrupt::Rerun => Holder::Released { prior, backoff: Backoff::NONE },
    }
}

/// The payload fingerprint that the next attempt must match. None if the prior attempt had no effect, so that a retry with a
/// corrected payload is accepted.
pub(crate) fn binding(fingerprint: Option<Fingerprint>, prior: PriorAttempt) -> Option<Fingerprint> {
    fingerprint.filter(|_| prior.may_have_happened())
}

/// Whether the replay of a claim changes the state that earlier records left.
///
/// A record is numbered before it takes effect, so the records of one holder are in order. The records of two holders whose
/// calls overlapped may be in the other order; then their tokens decide.
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

/// As [`replay_claimed`], for a `forget`.
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
    const PAYLOAD: Option<&Fingerprint> = Some(&[1; 16]);
    const OTHER_PAYLOAD: Option<&Fingerprint> = Some(&[2; 16]);

    fn at(wall_ms: u64) -> Now {
        Now { time_ms: wall_ms, monotonic_ms: wall_ms - 5_000, ..Now::default() }
    }

    fn lease_state_of(entry: &Entry, now: Now, policy: Policy) -> LeaseState {
        let Entry::Processing(processing) = entry else { panic!("{entry:?} is not being processed") };
        lease_state(processing, now, policy)
    }

    fn processing(holder: Holder) -> Entry {
        Entry::Processing(Processing { token: 7, attempt: 2, since_ms: 5_000, fingerprint: PAYLOAD.copied(), holder })
    }

    fn completed() -> Entry {
        Entry::Completed(CompletedEntry {
            token: 7,
            completed_ms: 5_000,
            fingerprint: PAYLOAD.copied(),
            result: StoredResult::None,
        })
    }

    fn decision(stored: &Entry, wall_ms: u64, policy: Policy) -> Decision<'_> {
        decide(Some(stored), PAYLOAD, None, at(wall_ms), policy)
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
        assert_eq!(decide(None, OTHER_PAYLOAD, None, at(5_000), RERUN), NEW);
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
    fn a_leased_key_is_in_progress_until_its_lease_expires() {
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
        assert_eq!(decision(&leased, 9_000, RERUN), again(PriorAttempt::LeaseExpired), "with the reason");
        assert_eq!(decision(&leased, 9_999, RERUN), again(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&leased, 10_000, RERUN), NEW, "after a window");
    }

    #[test]
    fn an_interrupted_key_is_free_or_held() {
        for prior in [PriorAttempt::Dropped, PriorAttempt::Crashed] {
            let interrupted = processing(Holder::Interrupted(prior));
            assert_eq!(decision(&interrupted, 5_999, RERUN), again(prior));
            assert_eq!(decision(&interrupted, 6_000, RERUN), NEW);
            assert_eq!(decision(&interrupted, 5_999, HOLD), in_progress(None));
            assert_eq!(decision(&interrupted, 999_000, HOLD), in_progress(None), "a held key does not expire");
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
            let in_backoff = processing(backoff(900, 900));
            assert_eq!(decision(&in_backoff, 5_890, policy), in_progress(Some(10)));
            assert_eq!(decision(&in_backoff, 5_900, policy), again(PriorAttempt::Released));
            assert_eq!(decision(&in_backoff, 6_000, policy), NEW);
        }
    }

    #[test]
    fn a_backoff_runs_on_monotonic_time_and_no_wall_clock_lengthens_it() {
        let in_backoff = processing(backoff(300, 300));
        let decide_at = |time_ms, monotonic_ms| {
            let now = Now { time_ms, monotonic_ms, ..Now::default() };
            decide(Some(&in_backoff), PAYLOAD, None, now, RERUN)
        };
        // The store's time does not change, or jumps within the window.
        assert_eq!(
            (decide_at(5_000, 299), decide_at(5_000, 300)),
            (in_progress(Some(1)), again(PriorAttempt::Released))
        );
        assert_eq!(
            (decide_at(5_999, 299), decide_at(5_999, 300)),
            (in_progress(Some(1)), again(PriorAttempt::Released))
        );
    }

    #[test]
    fn a_backoff_of_an_earlier_process_continues_with_its_rest() {
        let of_earlier = |time_ms, length_ms, is_stream| {
            // The end on the monotonic clock of an earlier process has no meaning.
            let in_backoff = processing(backoff(1 << 50, length_ms));
            let policy = Policy { opened: Opened { time_ms, monotonic_ms: 40 }, first_token: 8, is_stream, ..RERUN };
            let at =
                |monotonic_ms| lease_state_of(&in_backoff, Now { time_ms, monotonic_ms, ..Now::default() }, policy);
            (40..2_000).find(|ms| at(*ms) == LeaseState::Free(PriorAttempt::Released)).map(|ms| ms - 40)
        };
        assert_eq!(of_earlier(5_000, 300, false), Some(300));
        assert_eq!(of_earlier(5_200, 300, false), Some(100));
        assert_eq!(of_earlier(5_300, 300, false), Some(0));
        assert_eq!(of_earlier(1_000, 300, false), Some(300), "a clock that was set back does not extend it");
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
    fn a_key_that_was_resolved_to_run_again_is_free_for_a_window() {
        let resolved = processing(Holder::Resolved(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&resolved, 5_999, HOLD), again(PriorAttempt::LeaseExpired));
        assert_eq!(decision(&resolved, 6_000, HOLD), NEW);
        assert!(may_finish(Some(&resolved), 7), "its holder may still complete it");
    }

    #[test]
    fn a_committing_key_is_in_progress_for_every_claim() {
        for (policy, holder) in
            [(RERUN, Holder::Committing), (HOLD, Holder::Committing), (HOLD, Holder::CommittingUnclaimed)]
        {
            let committing = processing(holder);
            assert_eq!(decision(&committing, 900_000, policy), in_progress(Some(COMMITTING_RETRY_MS)));
            assert!(!may_finish(Some(&committing), 7));
        }
    }

    #[test]
    fn a_payload_mismatch_takes_precedence_over_every_state() {
        let states = [
            completed(),
            processing(Holder::Leased { until_monotonic_ms: 300 }),
            processing(Holder::Interrupted(PriorAttempt::Crashed)),
            processing(RELEASED),
            processing(Holder::Committing),
        ];
        for stored in &states {
            assert_eq!(
                decide(Some(stored), OTHER_PAYLOAD, None, at(5_100), RERUN),
                Decision::PayloadMismatch,
                "{stored:?}"
            );
            assert_ne!(decide(Some(stored), None, None, at(5_100), RERUN), Decision::PayloadMismatch, "{stored:?}");
        }
        assert_eq!(
            decide(Some(&completed()), OTHER_PAYLOAD, None, at(6_000), RERUN),
            NEW,
            "the payload of an expired entry is not compared"
        );
    }

    #[test]
    fn a_completion_is_accepted_by_its_token_alone() {
        let late = processing(Holder::Leased { until_monotonic_ms: 0 });
        assert!(may_finish(Some(&late), 7));
        assert!(!may_finish(Some(&late), 6));
        assert!(!may_finish(Some(&completed()), 7));
        assert!(!may_finish(None, 7));
    }

    #[test]
    fn on_stream_time_a_live_entry_decides_before_the_age_of_the_message() {
        let ask = |stored: Option<&Entry>, at_ms, stream_ms| {
            let now = Now { time_ms: stream_ms, monotonic_ms: 100, ..Now::default() };
            match decide(stored, PAYLOAD, Some(at_ms), now, STREAM) {
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
        assert_eq!(ask(Some(&leased), 5_000, 900_000), "in progress", "whatever the stream time");
        for holder in
            [Holder::Leased { until_monotonic_ms: 100 }, Holder::Interrupted(PriorAttempt::Crashed), backoff(100, 100)]
        {
            let left = processing(holder);
            assert_eq!((ask(Some(&left), 5_000, 5_999), ask(Some(&left), 3_000, 5_999)), ("again", "again"));
            assert_eq!((ask(Some(&left), 5_000, 6_000), ask(Some(&left), 5_001, 6_000)), ("too old", "new"));
        }
        let in_backoff = processing(backoff(101, 101));
        assert_eq!(
            (ask(Some(&in_backoff), 5_000, 5_999), ask(Some(&in_backoff), 5_000, 6_000)),
            ("in progress", "too old")
        );
    }

    #[test]
    fn a_replay_orders_events_by_their_tokens() {
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
                "only a later holder releases it again: {token}"
            );
        }
        assert!(replay_claimed(None, 1) && replay_released(None, 1) && replay_completed(None, 1));
        assert!(!replay_forgotten(None, 1));
    }
}
