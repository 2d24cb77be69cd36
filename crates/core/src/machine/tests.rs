use std::convert::Infallible;
use std::time::Duration;

use super::entry::*;
use super::event::*;
use super::finish::*;
use super::moment::*;
use super::step::*;
use super::transition::*;
use crate::answer::{OnInterrupt, StoredResult};
use crate::attempt::PriorAttempt;
use crate::key::Fingerprint;

/// A step whose next token is 8.
fn run<'s, O: Op>(stored: Option<&'s Entry>, op: O, now: PlainMoment, policy: Policy) -> Step<O::Answer<'s>> {
    let Ok(step) = step(stored, op, now, policy, || Ok::<u64, Infallible>(8));
    step
}

const WINDOW_MS: u64 = 1_000;
const OPENED: Opened = Opened { time_ms: 5_000, monotonic_ms: 0 };
const RERUN: Policy =
    Policy { window_ms: WINDOW_MS, on_interrupt: OnInterrupt::Rerun, is_stream: false, opened: OPENED, first_token: 7 };
const HOLD: Policy = Policy { on_interrupt: OnInterrupt::Hold, ..RERUN };
const STREAM: Policy = Policy { is_stream: true, ..RERUN };
const RELEASED: Holder = Holder::Released { prior: PriorAttempt::Released, backoff: Backoff::NONE };
const PAYLOAD: Option<&Fingerprint> = Some(&[1; 16]);
const OTHER_PAYLOAD: Option<&Fingerprint> = Some(&[2; 16]);

fn at(wall_ms: u64) -> PlainMoment {
    PlainMoment { time_ms: wall_ms, monotonic_ms: wall_ms - 5_000 }
}

fn lease_state_of(entry: &Entry, now: PlainMoment, policy: Policy) -> LeaseState {
    let Entry::Processing(processing) = entry else { panic!("{entry:?} is not being processed") };
    lease_state(processing, now, policy)
}

fn processing(holder: Holder) -> Entry {
    Entry::Processing(Processing {
        token: 7,
        attempt: 2,
        since_ms: 5_000,
        own_window: OwnWindow::NONE,
        fingerprint: PAYLOAD.copied(),
        holder,
    })
}

fn completed() -> Entry {
    Entry::Completed(CompletedEntry {
        token: 7,
        completed_ms: 5_000,
        own_window: OwnWindow::NONE,
        fingerprint: PAYLOAD.copied(),
        result: StoredResult::None,
    })
}

fn with_payload(payload: Option<&Fingerprint>) -> KeyRequest<'_> {
    KeyRequest { payload, ..KeyRequest::default() }
}

fn decision(stored: &Entry, wall_ms: u64, policy: Policy) -> Decision<'_> {
    decide(Some(stored), with_payload(PAYLOAD), at(wall_ms), policy)
}

const NEW: Decision<'_> = Decision::Available(Available { attempt: 1, prior: None });

fn again(prior: PriorAttempt) -> Decision<'static> {
    Decision::Available(Available { attempt: 3, prior: Some(prior) })
}

fn in_progress(retry_after_ms: Option<u64>) -> Decision<'static> {
    Decision::InProgress { retry_after_ms, attempt: 2 }
}

#[test]
fn an_absent_key_is_available() {
    assert_eq!(decide(None, with_payload(OTHER_PAYLOAD), at(5_000), RERUN), NEW);
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
fn a_claim_that_is_not_written_yet_is_not_taken_over_when_its_lease_ends() {
    let claiming = processing(Holder::Claiming { until_monotonic_ms: 300 });
    for policy in [RERUN, HOLD, STREAM] {
        assert_eq!(decision(&claiming, 5_000, policy), in_progress(Some(300)));
        assert_eq!(decision(&claiming, 5_299, policy), in_progress(Some(1)));
        assert_eq!(decision(&claiming, 5_300, policy), in_progress(Some(10)), "it is committing");
        assert_eq!(decision(&claiming, 900_000, policy), in_progress(Some(10)));
        assert_eq!(run(Some(&claiming), Forget, at(5_300), policy).answer, Forgotten::InUse { token: 7 });
    }
    assert!(!may_finish(Some(&claiming), 7), "its token is not returned yet");
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
        let now = PlainMoment { time_ms, monotonic_ms };
        decide(Some(&in_backoff), with_payload(PAYLOAD), now, RERUN)
    };
    // The engine's time does not change, or jumps within the window.
    assert_eq!((decide_at(5_000, 299), decide_at(5_000, 300)), (in_progress(Some(1)), again(PriorAttempt::Released)));
    assert_eq!((decide_at(5_999, 299), decide_at(5_999, 300)), (in_progress(Some(1)), again(PriorAttempt::Released)));
}

#[test]
fn a_backoff_of_an_earlier_process_continues_with_its_rest() {
    let of_earlier = |time_ms, length_ms, is_stream| {
        // The end on the monotonic clock of an earlier process has no meaning.
        let in_backoff = processing(backoff(1 << 50, length_ms));
        let policy = Policy { opened: Opened { time_ms, monotonic_ms: 40 }, first_token: 8, is_stream, ..RERUN };
        let at = |monotonic_ms| lease_state_of(&in_backoff, PlainMoment { time_ms, monotonic_ms }, policy);
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
    let from = |length| Backoff::from(PlainMoment::default(), length, WINDOW_MS);
    assert_eq!(from(Duration::ZERO), Backoff::NONE);
    assert_eq!(from(Duration::from_millis(300)), Backoff { until_monotonic_ms: 300, length_ms: 300 });
    assert_eq!(from(Duration::MAX), Backoff { until_monotonic_ms: 500, length_ms: 500 });
    let of_years = Backoff::from(PlainMoment::default(), Duration::MAX, u64::MAX);
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
        assert_eq!(decision(&committing, 900_000, policy), in_progress(Some(10)));
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
            decide(Some(stored), with_payload(OTHER_PAYLOAD), at(5_100), RERUN),
            Decision::PayloadMismatch,
            "{stored:?}"
        );
        assert_ne!(
            decide(Some(stored), KeyRequest::default(), at(5_100), RERUN),
            Decision::PayloadMismatch,
            "{stored:?}"
        );
    }
    assert_eq!(
        decide(Some(&completed()), with_payload(OTHER_PAYLOAD), at(6_000), RERUN),
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
        let now = PlainMoment { time_ms: stream_ms, monotonic_ms: 100 };
        match decide(stored, KeyRequest { at_ms: Some(at_ms), ..with_payload(PAYLOAD) }, now, STREAM) {
            Decision::Completed(_) => "completed",
            Decision::InProgress { .. } => "in progress",
            Decision::Available(Available { prior: None, .. }) => "new",
            Decision::Available(_) => "again",
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
fn a_message_is_too_old_after_its_own_window() {
    let ask = |own_ms| {
        let request = KeyRequest { payload: None, at_ms: Some(5_000), own_window: OwnWindow::from_ms(own_ms).unwrap() };
        decide(None, request, at(5_500), STREAM)
    };
    assert_eq!((ask(501), ask(500)), (NEW, Decision::TooOld));
}

#[test]
fn a_claim_keeps_the_payload_and_the_later_time_of_an_earlier_attempt() {
    let left = processing(Holder::Interrupted(PriorAttempt::Dropped));
    let next = Available { attempt: 3, prior: Some(PriorAttempt::Dropped) };
    let now = PlainMoment { time_ms: 4_000, monotonic_ms: 0 };
    let claimed = next.claimed(Some(&left), KeyRequest::default(), 8, 30, now);
    let expected = Processing {
        token: 8,
        attempt: 3,
        since_ms: 5_000,
        fingerprint: PAYLOAD.copied(),
        own_window: OwnWindow::NONE,
        holder: Holder::Leased { until_monotonic_ms: 30 },
    };
    assert_eq!(claimed, expected, "the engine's time went back");
    let recorded: CompletedEntry = next.recorded(Some(&left), with_payload(OTHER_PAYLOAD), 8, at(5_100));
    assert_eq!((recorded.token, recorded.completed_ms), (8, 5_100));
    assert_eq!((recorded.fingerprint, recorded.result), (OTHER_PAYLOAD.copied(), StoredResult::None));
}

#[test]
fn a_claim_of_a_new_key_keeps_nothing_of_an_expired_entry() {
    let new = Available { attempt: 1, prior: None };
    let request = KeyRequest { at_ms: Some(4_000), ..KeyRequest::default() };
    let claimed = new.claimed(Some(&processing(RELEASED)), request, 8, 30, at(9_000));
    assert_eq!((claimed.since_ms, claimed.fingerprint, claimed.attempt), (4_000, None, 1));
}

#[test]
fn a_claim_after_an_own_window_is_not_earlier_than_the_expired_completion() {
    let request = KeyRequest { at_ms: Some(4_500), ..KeyRequest::default() };
    let expired = Entry::Completed(CompletedEntry {
        token: 7,
        completed_ms: 5_000,
        own_window: OwnWindow::from_ms(100).unwrap(),
        fingerprint: PAYLOAD.copied(),
        result: StoredResult::None,
    });
    let now = at(5_200);
    let Decision::Available(available) = decide(Some(&expired), request, now, STREAM) else { panic!("it is over") };
    let claimed = available.claimed(Some(&expired), request, 8, 30, now);
    assert_eq!((claimed.since_ms, claimed.attempt, claimed.fingerprint), (5_000, 1, None));
}

#[test]
fn an_operator_finishes_only_held_keys() {
    let finishes = |holder, by, policy| finishable(Some(&processing(holder)), 7, by, at(5_100), policy).is_some();
    let dropped = Holder::Interrupted(PriorAttempt::Dropped);
    let leased = Holder::Leased { until_monotonic_ms: 101 };
    assert!(finishes(dropped, FinishedBy::Operator, HOLD));
    assert!(!finishes(dropped, FinishedBy::Operator, RERUN));
    assert!(!finishes(leased, FinishedBy::Operator, HOLD));
    assert!(finishes(leased, FinishedBy::Holder, HOLD));
    assert!(finishes(Holder::Resolved(PriorAttempt::Dropped), FinishedBy::Holder, HOLD));
    assert!(!finishes(Holder::Committing, FinishedBy::Holder, HOLD));
}

#[test]
fn a_finish_is_never_earlier_than_its_claim_and_on_stream_time_has_its_messages_time() {
    let attempt = Attempt { token: 7, attempt: 2, fingerprint: PAYLOAD.copied(), at_ms: 5_200 };
    let completed_ms = |now_ms, policy| {
        let result = StoredResult::Bytes(b"r".as_slice());
        attempt.completed(OwnWindow::NONE, result, at(now_ms), policy).completed_ms
    };
    assert_eq!((completed_ms(5_100, RERUN), completed_ms(5_300, RERUN)), (5_200, 5_300));
    assert_eq!(completed_ms(5_300, STREAM), 5_200);
}

#[test]
fn a_release_drops_the_payload_only_if_no_attempt_can_have_had_its_effect() {
    let attempt = Attempt { token: 7, attempt: 2, fingerprint: PAYLOAD.copied(), at_ms: 5_000 };
    let release = |by, prior| attempt.released(OwnWindow::NONE, by, prior, Backoff::NONE, at(5_100), HOLD);
    let released = release(FinishedBy::Holder, PriorAttempt::Released);
    assert_eq!((released.fingerprint, released.holder, released.since_ms), (None, RELEASED, 5_100));
    let resolved = release(FinishedBy::Operator, PriorAttempt::Crashed);
    assert_eq!(resolved.fingerprint, PAYLOAD.copied());
    assert_eq!(resolved.holder, Holder::Resolved(PriorAttempt::Crashed));
}

#[test]
fn a_completion_is_repeated_by_its_own_token_within_its_window() {
    let complete = |stored: &Entry, token, now_ms| {
        let attempt = Attempt { token, attempt: 2, fingerprint: None, at_ms: 5_000 };
        run(Some(stored), Complete { attempt, by: FinishedBy::Holder, result: StoredResult::None }, at(now_ms), RERUN)
    };
    let stored = completed();
    assert_eq!(complete(&stored, 7, 5_999).answer, Finished::Repeated);
    assert_eq!(complete(&stored, 7, 6_000).answer, Finished::Superseded);
    assert_eq!(complete(&stored, 6, 5_999).answer, Finished::Superseded);
    assert_eq!(complete(&processing(Holder::Committing), 7, 5_999).answer, Finished::Committing);
    assert_eq!(complete(&processing(Holder::CommittingUnclaimed), 7, 5_999).answer, Finished::Superseded);
    assert_eq!(complete(&processing(RELEASED), 7, 5_999).answer, Finished::Accepted);
}

#[test]
fn a_renewal_extends_a_lease_and_nothing_else() {
    let until = |until_monotonic_ms| Holder::Leased { until_monotonic_ms };
    assert_eq!((until(5).renewed(9), until(9).renewed(5)), (Some(until(9)), Some(until(9))));
    assert_eq!(Holder::Resolved(PriorAttempt::Dropped).renewed(9), None);
    assert_eq!((until(5).ended(RELEASED), Holder::Committing.ended(RELEASED)), (RELEASED, Holder::Committing));
    assert_eq!(taken_back(None), RELEASED);
    let remaining = |holder, token| remaining_ms(Some(&processing(holder)), token, at(5_100), HOLD);
    assert_eq!((remaining(until(101), 7), remaining(until(100), 7), remaining(until(101), 6)), (1, 0, 0));
}

#[test]
fn a_key_can_be_forgotten_unless_it_is_leased_committing_or_held() {
    let dropped = Holder::Interrupted(PriorAttempt::Dropped);
    let forget = |stored: Option<&Entry>, now_ms, policy| run(stored, Forget, at(now_ms), policy).answer;
    for in_use in [Holder::Leased { until_monotonic_ms: 101 }, Holder::Committing] {
        assert_eq!(forget(Some(&processing(in_use)), 5_100, RERUN), Forgotten::InUse { token: 7 });
    }
    assert_eq!(forget(Some(&processing(dropped)), 5_100, HOLD), Forgotten::Undecided { token: 7 });
    let removed = |counted| Forgotten::Removed { counted };
    assert_eq!(forget(Some(&processing(dropped)), 5_100, RERUN), removed(true));
    assert_eq!(forget(Some(&completed()), 5_999, HOLD), removed(true));
    assert_eq!(forget(Some(&completed()), 6_000, HOLD), removed(false));
    assert_eq!(forget(None, 5_100, HOLD), removed(false));
}

#[test]
fn an_open_ends_the_attempts_of_a_crashed_process() {
    let open = |holder, policy| match run(Some(&processing(holder)), Crash, at(5_100), policy).change {
        Change::InMemory(after) => Some((after.since_ms, after.holder)),
        Change::None => None,
        change => panic!("an open writes nothing: {change:?}"),
    };
    let leased = Holder::Leased { until_monotonic_ms: 1 << 40 };
    assert_eq!(open(leased, HOLD), Some((5_100, Holder::Interrupted(PriorAttempt::Crashed))));
    assert_eq!(open(leased, STREAM), Some((5_000, interrupted(PriorAttempt::Crashed, OnInterrupt::Rerun))));
    let dropped = Holder::Interrupted(PriorAttempt::Dropped);
    assert_eq!(open(dropped, RERUN), Some((5_000, interrupted(PriorAttempt::Dropped, OnInterrupt::Rerun))));
    assert_eq!((open(dropped, HOLD), open(RELEASED, RERUN)), (None, None));
}

#[test]
fn a_replay_orders_events_by_their_tokens() {
    let with_token = |token| {
        let Entry::Processing(before) = processing(RELEASED) else { panic!("it is in progress") };
        Processing { token, ..before }
    };
    let done = |token| {
        let Entry::Completed(done) = completed() else { panic!("it is completed") };
        CompletedEntry { token, ..done }
    };
    let changes = |stored, event| replay(stored, event) != Change::None;
    let claimed = processing(Holder::Interrupted(PriorAttempt::Crashed));
    for (token, claim, release, complete, forget) in
        [(6, false, false, false, false), (7, false, true, true, false), (8, true, true, true, true)]
    {
        assert_eq!(changes(Some(&claimed), Event::Claimed(with_token(token))), claim, "claimed {token}");
        assert_eq!(changes(Some(&claimed), Event::Released(with_token(token))), release, "released {token}");
        assert_eq!(changes(Some(&claimed), Event::Completed(done(token))), complete, "completed {token}");
        assert_eq!(changes(Some(&claimed), Event::Forgotten { token }), forget, "forgotten {token}");
    }
    let done_before = completed();
    for (token, release) in [(6, false), (7, false), (8, true)] {
        let released = Event::Released(with_token(token));
        assert_eq!(changes(Some(&done_before), released), release, "only a later holder releases it again: {token}");
    }
    let new = [Event::Claimed(with_token(1)), Event::Released(with_token(1)), Event::Completed(done(1))];
    assert!(new.into_iter().all(|event| changes(None, event)));
    assert!(!changes(None, Event::Forgotten { token: 1 }));
}
