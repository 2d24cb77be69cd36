//! Every operation on every kind of entry, at every kind of moment, under every policy: the answer by the documented table of
//! states, and laws that hold for every step.

use std::convert::Infallible;
use std::fmt::Debug;
use std::sync::Arc;

use super::entry::*;
use super::event::*;
use super::finish::*;
use super::moment::*;
use super::step::*;
use super::transition::*;
use crate::answer::{OnInterrupt, StoredResult};
use crate::attempt::PriorAttempt;
use crate::key::Fingerprint;

const WINDOW_MS: u64 = 1_000;
const SINCE_MS: u64 = 5_000;
/// The token of an earlier holder.
const EARLIER: u64 = 6;
/// The token of the stored entry.
const STORED: u64 = 7;
/// The token that a step takes.
const NEXT: u64 = 8;
const TOKENS: [u64; 3] = [EARLIER, STORED, NEXT];
const PAYLOADS: [Option<Fingerprint>; 3] = [None, Some([1; 16]), Some([2; 16])];
const PRIORS: [PriorAttempt; 4] =
    [PriorAttempt::Released, PriorAttempt::Dropped, PriorAttempt::LeaseExpired, PriorAttempt::Crashed];

/// What the table of states says about a key.
#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    New,
    TooOld,
    Completed,
    InProgress(Option<u64>),
    Again(PriorAttempt),
}

/// One case: an entry, a moment and a policy.
#[derive(Debug, Clone)]
struct Case {
    stored: Option<Entry>,
    now: PlainMoment,
    policy: Policy,
}

impl Case {
    fn run<O: Op>(&self, op: O) -> (Step<O::Answer<'_>>, bool) {
        let mut took_token = false;
        let token = || {
            took_token = true;
            Ok::<u64, Infallible>(NEXT)
        };
        let Ok(outcome) = step(self.stored.as_ref(), op, self.now, self.policy, token);
        (outcome, took_token)
    }

    /// A step that is compared with the laws of every step.
    fn checked<O: Op + Clone + Debug>(&self, op: O) -> Step<O::Answer<'_>> {
        let (outcome, took_token) = self.run(op.clone());
        let what = || format!("{op:?} on {self:?}: {:?}", outcome.change);
        let before = self.stored.as_ref();
        if let Some(event) = outcome.change.event() {
            // A replay of the journal arrives where memory is.
            assert!(event.follows(before), "{}", what());
            // The token is the highest, or that of the attempt which ends.
            let token = match event {
                Event::Forgotten { token } => *token,
                event => event.clone().into_entry().unwrap().token(),
            };
            assert!(if took_token { token == NEXT } else { token == STORED }, "{}", what());
        } else {
            assert!(!took_token, "{}", what());
        }
        let after = match &outcome.change {
            Change::None => return outcome,
            Change::InMemory(processing) => Some(Entry::Processing(processing.clone())),
            Change::Immediate(event) | Change::OnceWritten { event, .. } => event.clone().into_entry(),
        };
        if let (Some(before), Some(after)) = (before, &after) {
            // A state never expires before the state that it replaces, except on stream time, where a key has its message's.
            let counted = counts(before, self.now, self.policy);
            assert!(self.policy.is_stream || !counted || after.time_ms() >= before.time_ms(), "{}", what());
            assert!(after.token() >= before.token(), "{}", what());
        }
        // Only a completion that no caller can rely on yet is not visible; a claim must be.
        match (&outcome.change, &after) {
            (Change::OnceWritten { holder, .. }, _) => {
                assert!(matches!(holder, Holder::Committing | Holder::CommittingUnclaimed), "{}", what());
            }
            (Change::Immediate(_), Some(Entry::Processing(processing))) => {
                assert!(matches!(processing.holder, Holder::Leased { .. }), "{}", what());
            }
            (Change::InMemory(_), Some(Entry::Processing(_))) => {}
            _ => panic!("{}", what()),
        }
        outcome
    }

    fn elapsed_ms(&self) -> u64 {
        self.now.time_ms - SINCE_MS
    }

    /// The state of the key for a call without a payload. Written from the documentation, not from the code.
    fn state(&self, at_ms: Option<u64>) -> State {
        let new = match at_ms {
            Some(at_ms) if at_ms + WINDOW_MS <= self.now.time_ms => State::TooOld,
            _ => State::New,
        };
        let is_over = self.elapsed_ms() >= WINDOW_MS;
        let holds = self.policy.on_interrupt == OnInterrupt::Hold;
        match &self.stored {
            None => new,
            Some(Entry::Completed(done)) => match done.own_window.ms() {
                Some(own_ms) if self.elapsed_ms() >= own_ms => new,
                _ if is_over => new,
                _ => State::Completed,
            },
            Some(Entry::Processing(processing)) => match processing.holder {
                Holder::Committing | Holder::CommittingUnclaimed => State::InProgress(Some(10)),
                Holder::Claiming { until_monotonic_ms } => {
                    match until_monotonic_ms.saturating_sub(self.now.monotonic_ms) {
                        0 => State::InProgress(Some(10)),
                        left_ms => State::InProgress(Some(left_ms)),
                    }
                }
                Holder::Leased { until_monotonic_ms } => {
                    let (until, now) = (until_monotonic_ms, self.now.monotonic_ms);
                    let lapsed = if self.policy.is_stream { is_over } else { now >= until + WINDOW_MS };
                    match (now < until, holds, lapsed) {
                        (true, _, _) => State::InProgress(Some(until - now)),
                        (false, true, _) => State::InProgress(None),
                        (false, false, true) => new,
                        (false, false, false) => State::Again(PriorAttempt::LeaseExpired),
                    }
                }
                Holder::Interrupted(_) if holds => State::InProgress(None),
                _ if is_over => new,
                Holder::Interrupted(prior) | Holder::Resolved(prior) => State::Again(prior),
                Holder::Released { prior, backoff } => {
                    // A backoff of this process. Those of earlier ones have a test of their own.
                    match backoff.until_monotonic_ms.saturating_sub(self.now.monotonic_ms) {
                        0 => State::Again(prior),
                        left_ms => State::InProgress(Some(left_ms)),
                    }
                }
            },
        }
    }

    fn processing(&self) -> Option<&Processing> {
        match &self.stored {
            Some(Entry::Processing(processing)) => Some(processing),
            _ => None,
        }
    }

    fn is_held(&self) -> bool {
        self.state(None) == State::InProgress(None)
    }
}

fn entries() -> Vec<Option<Entry>> {
    let mut holders = vec![Holder::Committing, Holder::CommittingUnclaimed];
    for prior in PRIORS {
        holders.extend([Holder::Interrupted(prior), Holder::Resolved(prior)]);
        for length_ms in [0, 300] {
            let backoff = Backoff { until_monotonic_ms: u64::from(length_ms), length_ms };
            holders.push(Holder::Released { prior, backoff });
        }
    }
    for until_monotonic_ms in [0, 300, 2_000] {
        holders.extend([Holder::Leased { until_monotonic_ms }, Holder::Claiming { until_monotonic_ms }]);
    }
    let windows = [OwnWindow::NONE, OwnWindow::from_ms(400).unwrap()];
    let mut entries = vec![None];
    for fingerprint in [PAYLOADS[0], PAYLOADS[1]] {
        for own_window in windows {
            entries.extend(holders.iter().map(|holder| {
                let (token, attempt, since_ms, holder) = (STORED, 2, SINCE_MS, *holder);
                Some(Entry::Processing(Processing { token, attempt, since_ms, fingerprint, own_window, holder }))
            }));
            let (token, completed_ms, result) = (STORED, SINCE_MS, StoredResult::Bytes(b"r".as_slice().into()));
            entries.push(Some(Entry::Completed(CompletedEntry {
                token,
                completed_ms,
                fingerprint,
                own_window,
                result,
            })));
        }
    }
    entries
}

fn cases() -> impl Iterator<Item = Case> {
    let opened = Opened { time_ms: SINCE_MS, monotonic_ms: 0 };
    let policy =
        |on_interrupt, is_stream| Policy { window_ms: WINDOW_MS, on_interrupt, is_stream, opened, first_token: 1 };
    let policies = [
        policy(OnInterrupt::Rerun, false),
        policy(OnInterrupt::Hold, false),
        policy(OnInterrupt::Rerun, true),
        policy(OnInterrupt::Hold, true),
    ];
    // Both sides of each boundary: a backoff and a lease of 300 ms, an own window of 400, the window, a lapsed lease.
    let times = [0, 1, 299, 300, 399, 400, 999, 1_000, 1_299, 1_300, 2_000, 3_000, 9_000];
    entries().into_iter().flat_map(move |stored| {
        let stored = stored.clone();
        policies.into_iter().flat_map(move |policy| {
            let stored = stored.clone();
            times.into_iter().map(move |elapsed_ms| {
                let now = PlainMoment { time_ms: SINCE_MS + elapsed_ms, monotonic_ms: elapsed_ms };
                Case { stored: stored.clone(), now, policy }
            })
        })
    })
}

fn requests() -> Vec<KeyRequest<'static>> {
    const { assert!(PAYLOADS.len() == 3) };
    let payloads: [Option<&'static Fingerprint>; 3] = [None, Some(&[1; 16]), Some(&[2; 16])];
    payloads
        .into_iter()
        .flat_map(|payload| [None, Some(SINCE_MS), Some(SINCE_MS + 9_000)].map(|at_ms| (payload, at_ms)))
        .map(|(payload, at_ms)| KeyRequest { payload, at_ms, own_window: OwnWindow::NONE })
        .collect()
}

/// The expected decision, with what the table says about payloads.
fn expected(case: &Case, request: KeyRequest<'_>) -> Option<State> {
    let state = case.state(request.at_ms);
    let first = match (&case.stored, state) {
        (_, State::New | State::TooOld) | (None, _) => None,
        (Some(Entry::Processing(processing)), _) => processing.fingerprint,
        (Some(Entry::Completed(done)), _) => done.fingerprint,
    };
    match (first, request.payload) {
        (Some(first), Some(payload)) if first != *payload => None,
        _ => Some(state),
    }
}

fn found<A: Into<(u32, Option<PriorAttempt>)>>(decision: Decision<'_, A>) -> Option<State> {
    Some(match decision {
        Decision::Available(available) => match available.into() {
            (1, None) => State::New,
            (3, Some(prior)) => State::Again(prior),
            other => panic!("neither new nor the attempt after the second: {other:?}"),
        },
        Decision::InProgress { retry_after_ms, attempt } => {
            assert_eq!(attempt, 2);
            State::InProgress(retry_after_ms)
        }
        Decision::Completed(done) => {
            assert_eq!((done.token, done.result.as_slice()), (STORED, StoredResult::Bytes(b"r".as_slice())));
            State::Completed
        }
        Decision::PayloadMismatch => return None,
        Decision::TooOld => State::TooOld,
    })
}

impl From<Available> for (u32, Option<PriorAttempt>) {
    fn from(available: Available) -> Self {
        (available.attempt, available.prior)
    }
}

impl From<Acquired> for (u32, Option<PriorAttempt>) {
    fn from(acquired: Acquired) -> Self {
        (acquired.attempt, acquired.prior)
    }
}

#[test]
fn a_check_a_claim_and_a_record_find_the_same_and_change_only_a_key_that_they_get() {
    let mut count = 0;
    for case in cases() {
        for request in requests() {
            count += 1;
            let expected = expected(&case, request);
            let is_free = matches!(expected, Some(State::New | State::Again(_)));
            let checked = decide(case.stored.as_ref(), request, case.now, case.policy);
            assert_eq!(found(checked), expected, "{case:?} {request:?}");

            let until_monotonic_ms = case.now.monotonic_ms + 50;
            let claim = case.checked(Claim { request, until_monotonic_ms });
            assert_eq!(found(claim.answer), expected, "{case:?} {request:?}");
            match claim.change {
                Change::Immediate(Event::Claimed(claimed)) if is_free => {
                    assert_eq!(claimed.holder, Holder::Leased { until_monotonic_ms });
                    // Two claims never get the key.
                    let next = Case { stored: Some(Entry::Processing(claimed)), ..case.clone() };
                    assert_eq!(
                        next.checked(Claim { request: KeyRequest::default(), until_monotonic_ms }).change,
                        Change::None
                    );
                }
                Change::None if !is_free => {}
                change => panic!("{case:?} {request:?}: {change:?}"),
            }

            let record = case.checked(Record { request });
            assert_eq!(found(record.answer), expected, "{case:?} {request:?}");
            match record.change {
                Change::OnceWritten { event: Event::Completed(done), holder, .. } if is_free => {
                    assert_eq!((done.result, holder), (StoredResult::None, Holder::CommittingUnclaimed));
                }
                Change::None if !is_free => {}
                change => panic!("{case:?} {request:?}: {change:?}"),
            }
        }
    }
    assert_eq!(count, cases().count() * 9);
    assert!(count > 30_000, "{count}");
}

#[test]
fn a_lease_is_finished_by_its_token_and_a_held_key_by_an_operator() {
    let (mut accepted, mut repeated) = (0, 0);
    for case in cases() {
        for (token, by) in
            TOKENS.into_iter().flat_map(|token| [(token, FinishedBy::Holder), (token, FinishedBy::Operator)])
        {
            let attempt = Attempt { token, attempt: 2, fingerprint: PAYLOADS[1], at_ms: SINCE_MS };
            let is_committing = matches!(
                case.processing().map(|processing| processing.holder),
                Some(Holder::Claiming { .. } | Holder::Committing | Holder::CommittingUnclaimed)
            );
            let has_key = token == STORED && case.processing().is_some() && !is_committing;
            let may_finish = has_key && (by == FinishedBy::Holder || case.is_held());
            let result = StoredResult::Bytes(b"r".as_slice().into());
            let complete = case.checked(Complete { attempt, by, result });
            let release = case.checked(Release { attempt, by, prior: PriorAttempt::Released, backoff: Backoff::NONE });
            assert_eq!(complete.answer == Finished::Accepted, may_finish, "{case:?} {token} {by:?}");
            assert_eq!(release.answer == Finished::Accepted, may_finish, "{case:?} {token} {by:?}");
            assert_ne!(release.answer, Finished::Repeated);
            let is_repeated = token == STORED && by == FinishedBy::Holder && case.state(None) == State::Completed;
            assert_eq!(complete.answer == Finished::Repeated, is_repeated, "{case:?} {token} {by:?}");
            repeated += u32::from(is_repeated);
            if !may_finish {
                assert_eq!((complete.change, release.change), (Change::None, Change::None), "{case:?} {token} {by:?}");
                continue;
            }
            accepted += 1;
            let before = case.processing().unwrap();
            let is_leased = matches!(before.holder, Holder::Leased { .. }) && by == FinishedBy::Holder;
            let done = match complete.change {
                Change::OnceWritten { event: Event::Completed(done), .. } if !is_leased => done,
                Change::OnceWritten { event: Event::ClaimCompleted(done), .. } if is_leased => done,
                change => panic!("{case:?}: {change:?}"),
            };
            assert_eq!((done.own_window, done.fingerprint), (before.own_window, PAYLOADS[1]));
            let Change::OnceWritten { event: Event::Released(free), .. } = release.change else { panic!("{case:?}") };
            // No work of this attempt happened: the next one may have another payload.
            assert_eq!((free.fingerprint, free.attempt, free.token), (None, 2, STORED));
        }
    }
    assert!(accepted > 1_000 && repeated > 10, "{accepted} {repeated}");
}

#[test]
fn a_renewal_and_a_drop_change_only_a_lease_and_only_in_memory() {
    for case in cases() {
        for token in TOKENS {
            let lease_until_ms =
                case.processing().filter(|_| token == STORED).and_then(|processing| match processing.holder {
                    Holder::Leased { until_monotonic_ms } => Some(until_monotonic_ms),
                    _ => None,
                });
            let until_monotonic_ms = case.now.monotonic_ms + 500;
            let renewed = case.checked(Renew { token, until_monotonic_ms });
            assert_eq!(renewed.answer, lease_until_ms.is_some(), "{case:?}");
            match (renewed.change, lease_until_ms) {
                (Change::InMemory(processing), Some(before_ms)) => {
                    assert!(before_ms < until_monotonic_ms);
                    let holder = Holder::Leased { until_monotonic_ms };
                    assert_eq!(
                        Some(processing),
                        case.processing().map(|before| Processing { holder, ..before.clone() })
                    );
                }
                (Change::None, before_ms) => assert!(before_ms.is_none_or(|before_ms| before_ms >= until_monotonic_ms)),
                (change, _) => panic!("{case:?}: {change:?}"),
            }
            for outcome in [Abandoned::Unknown, Abandoned::NotReceived { prior: Some(PriorAttempt::Crashed) }] {
                let dropped = case.checked(Abandon { token, outcome });
                let has_key = token == STORED
                    && case.processing().is_some_and(|processing| {
                        !matches!(
                            processing.holder,
                            Holder::Claiming { .. } | Holder::Committing | Holder::CommittingUnclaimed
                        )
                    });
                assert_eq!(dropped.answer, has_key, "{case:?}");
                match dropped.change {
                    Change::InMemory(processing) => {
                        assert!(lease_until_ms.is_some(), "{case:?}");
                        let next = Case { stored: Some(Entry::Processing(processing)), ..case.clone() };
                        let expected = match (outcome, case.policy.on_interrupt) {
                            (Abandoned::Unknown, OnInterrupt::Hold) => State::InProgress(None),
                            (Abandoned::Unknown, OnInterrupt::Rerun) => State::Again(PriorAttempt::Dropped),
                            (Abandoned::NotReceived { .. }, _) => State::Again(PriorAttempt::Crashed),
                        };
                        let claim = next.checked(Claim { request: KeyRequest::default(), until_monotonic_ms });
                        if !case.policy.is_stream {
                            assert_eq!(found(claim.answer), Some(expected), "{case:?}");
                        }
                    }
                    Change::None => assert!(lease_until_ms.is_none(), "{case:?}"),
                    change => panic!("{case:?}: {change:?}"),
                }
            }
        }
    }
}

#[test]
fn a_key_is_forgotten_unless_a_holder_may_work_on_it() {
    for case in cases() {
        let forgotten = case.checked(Forget);
        let state = case.state(None);
        let expected = match state {
            _ if case.is_held() => Forgotten::Undecided { token: STORED },
            State::InProgress(_) if !matches!(case.processing().unwrap().holder, Holder::Released { .. }) => {
                Forgotten::InUse { token: STORED }
            }
            _ => Forgotten::Removed { counted: !matches!(state, State::New) },
        };
        assert_eq!(forgotten.answer, expected, "{case:?}");
        let removes = matches!(expected, Forgotten::Removed { .. }) && case.stored.is_some();
        assert_eq!(forgotten.change.event().is_some(), removes, "{case:?}");
    }
}

#[test]
fn the_event_of_every_step_replays_after_those_before_it() {
    for case in cases() {
        let claim = case.checked(Claim { request: KeyRequest::default(), until_monotonic_ms: 1 << 20 });
        let attempt = Attempt { token: STORED, attempt: 2, fingerprint: None, at_ms: SINCE_MS };
        let complete = case.checked(Complete { attempt, by: FinishedBy::Holder, result: StoredResult::None });
        for event in [claim.change, complete.change].iter().filter_map(Change::event) {
            let replayed = replay(case.stored.as_ref(), event.clone());
            assert_eq!(replayed, Change::Immediate(event.clone()), "{case:?}");
            let after = event.clone().into_entry();
            if let Event::Claimed(_) = event {
                assert_eq!(replay(after.as_ref(), event.clone()), Change::None, "{case:?}");
            }
            // An event of the holder before is older than both.
            let older = Event::<Arc<[u8]>>::Forgotten { token: EARLIER };
            assert_eq!(replay(after.as_ref(), older), Change::None, "{case:?}");
        }
    }
}

#[test]
fn an_open_leaves_no_lease_and_changes_nothing_else() {
    for case in cases() {
        let opened = case.checked(Crash).change;
        let holder = case.processing().map(|processing| processing.holder);
        let holds = case.policy.on_interrupt == OnInterrupt::Hold;
        let expected = match holder {
            Some(Holder::Leased { .. }) => Some(PriorAttempt::Crashed),
            Some(Holder::Interrupted(prior)) if !holds => Some(prior),
            _ => None,
        };
        match (opened, expected) {
            (Change::InMemory(processing), Some(prior)) => {
                assert_eq!(processing.holder, interrupted(prior, case.policy.on_interrupt), "{case:?}");
            }
            (Change::None, None) => {}
            (change, _) => panic!("{case:?}: {change:?}"),
        }
    }
}
