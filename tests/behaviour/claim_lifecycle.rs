//! The state table, row by row: what a claim returns in each state of its key, and what its lease permits.

use std::time::Duration;

use crate::common::{Bench, START_MS};
use onlyonce::{
    Claim, Completion, Error, Key, KeyStatus, Lease, LeaseState, OnInterrupt, Outcome, PriorAttempt, RecordOutcome,
    Resolution, ResultError, RunError, RunOutcome, Store, StoredKey, Timestamp,
};
use serde::{Deserialize, Serialize};

fn held_bench() -> Bench {
    Bench::with(|builder| builder.on_interrupt(onlyonce::OnInterrupt::Hold))
}

#[test]
fn an_absent_key_is_acquired_as_the_first_attempt() {
    let bench = Bench::new();
    assert_eq!(bench.store().check("k").wait().unwrap(), KeyStatus::New);
    let lease = bench.acquire("k");
    assert_eq!((lease.attempt().number(), lease.attempt().prior()), (1, None));
    assert_eq!(lease.remaining(), Duration::from_secs(1));
}

#[test]
fn a_leased_key_is_in_progress_until_its_lease_expires() {
    let bench = Bench::new();
    let _lease = bench.acquire("k");
    bench.advance_ms(400);
    let other = bench.in_progress("k");
    assert_eq!((other.retry_after, other.attempt), (Some(Duration::from_millis(600)), 1));
    assert_eq!(bench.store().check("k").wait().unwrap(), KeyStatus::InProgress(other));
}

#[test]
fn an_expired_lease_is_taken_over() {
    let bench = Bench::new();
    let first = bench.acquire("k");
    bench.advance_ms(1_000);
    assert_eq!(first.remaining(), Duration::ZERO);
    let second = bench.acquire("k");
    assert_eq!((second.attempt().number(), second.attempt().prior()), (2, Some(PriorAttempt::LeaseExpired)));
    assert!(second.token().get() > first.token().get());

    let error = first.complete("late").wait().unwrap_err();
    assert!(matches!(error.error(), Error::Superseded { .. }), "{error}");
    assert_eq!((error.completion().result(), error.outcome()), (&b"late"[..], Outcome::NotWritten));
    second.complete("in time").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"in time");
    assert_eq!(bench.store().stats().superseded, 1);
}

#[test]
fn a_dropped_lease_frees_its_key_and_the_next_claim_reports_the_drop() {
    let bench = Bench::new();
    drop(bench.acquire("k"));
    let again = bench.acquire("k");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Dropped)));
}

#[test]
fn a_dropped_lease_is_reported_for_a_window_after_its_drop() {
    for (later_ms, expected) in [(9_999, (2, Some(PriorAttempt::Dropped))), (10_000, (1, None))] {
        let bench = Bench::with(|builder| builder.lease(Duration::from_secs(30)));
        let lease = bench.acquire("k");
        bench.advance_ms(9_000);
        drop(lease);
        bench.advance_ms(later_ms);
        let again = bench.acquire("k");
        assert_eq!((again.attempt().number(), again.attempt().prior()), expected, "{later_ms} ms later");
    }
}

#[test]
fn a_panic_in_the_work_drops_the_lease() {
    let bench = Bench::new();
    let store = bench.store().clone();
    let panicked = std::thread::spawn(move || {
        let _ = store.run("k", |_| -> Result<Vec<u8>, Error> { panic!("the work panics, as this test intends") });
    })
    .join();
    assert!(panicked.is_err());
    assert_eq!(bench.acquire("k").attempt().prior(), Some(PriorAttempt::Dropped));
}

#[test]
fn a_key_is_acquired_again_after_a_crash_and_the_claim_reports_it() {
    let mut bench = Bench::new();
    let lease = bench.acquire("k");
    bench.reopen();
    let again = bench.acquire("k");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Crashed)));
    assert!(again.token().get() > lease.token().get());
    let error = lease.complete("after the crash").wait().unwrap_err();
    assert!(matches!(error.error(), Error::Closed), "{error}");
}

#[test]
fn a_crash_is_reported_however_long_the_work_ran() {
    let mut bench = Bench::new();
    let mut lease = bench.acquire("k");
    for _ in 0..30 {
        bench.advance_ms(900);
        lease.renew().unwrap();
    }
    bench.reopen();
    assert_eq!(bench.acquire("k").attempt().prior(), Some(PriorAttempt::Crashed), "27 s of work in a window of 10 s");
}

#[test]
fn under_hold_an_interrupted_key_waits_for_its_resolution() {
    let mut bench = held_bench();
    let dropped_token = {
        let lease = bench.acquire("dropped");
        lease.token().get()
    };
    let expired = bench.acquire("expired");
    let crashed = bench.acquire("crashed");
    bench.advance_ms(1_000);
    for key in ["dropped", "expired"] {
        let other = bench.in_progress(key);
        assert_eq!((other.retry_after, other.attempt), (None, 1), "{key}");
    }
    drop((expired, crashed));
    bench.reopen();
    bench.advance_ms(60_000);
    let held = bench.store().held().wait().unwrap();
    let keys: Vec<_> = held.iter().map(|held| held.key.clone()).collect();
    assert_eq!(keys, [Key::from("dropped"), Key::from("expired"), Key::from("crashed")]);
    assert!(held.iter().all(|held| held.attempt == 1 && held.prior == PriorAttempt::Crashed));
    assert_eq!(held[0].token.get(), dropped_token);
    assert_eq!(bench.store().stats().held, 3);

    bench.store().resolve(&held[0].key, Resolution::Rerun).wait().unwrap();
    let again = bench.acquire("dropped");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Crashed)));
    bench.store().resolve("expired", Resolution::Completed(b"the effect happened".to_vec())).wait().unwrap();
    assert_eq!(bench.completed("expired").unwrap(), b"the effect happened");
    let twice = bench.store().resolve("expired", Resolution::Rerun).wait();
    assert!(matches!(twice, Err(Error::NotHeld { .. })), "{twice:?}");
    assert!(matches!(bench.store().resolve("unknown", Resolution::Rerun).wait(), Err(Error::NotHeld { .. })));
    assert_eq!(bench.store().stats().held, 1);
}

#[test]
fn under_hold_a_resolution_survives_a_restart() {
    let mut bench = held_bench();
    drop(bench.acquire("k"));
    bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
    bench.reopen();
    assert_eq!(bench.acquire("k").attempt().prior(), Some(PriorAttempt::Dropped));
}

#[test]
fn under_hold_a_late_completion_is_still_accepted() {
    let bench = held_bench();
    let lease = bench.acquire("k");
    bench.advance_ms(5_000);
    assert_eq!(bench.in_progress("k").retry_after, None);
    lease.complete("late, but not taken over").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"late, but not taken over");
}

#[test]
fn a_released_key_is_acquired_again() {
    let bench = Bench::new();
    bench.acquire("k").release().wait().unwrap();
    let again = bench.acquire("k");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Released)));
}

#[test]
fn an_unknown_outcome_persists_across_releases() {
    let mut bench = Bench::new();
    drop(bench.acquire("k"));
    for attempt in 2..4 {
        let lease = bench.acquire("k");
        assert_eq!((lease.attempt().number(), lease.attempt().prior()), (attempt, Some(PriorAttempt::Dropped)));
        lease.release().wait().unwrap();
    }
    bench.reopen();
    let lease = bench.acquire("k");
    assert_eq!(
        lease.attempt().prior(),
        Some(PriorAttempt::Dropped),
        "it is still unknown whether the first attempt had an effect"
    );
    lease.complete("r").wait().unwrap();
}

#[test]
fn a_store_keeps_on_interrupt_when_it_is_opened_without_it() {
    let bench = held_bench();
    drop(bench.acquire("k"));
    bench.store().close().wait().unwrap();
    let unchanged = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    assert!(matches!(unchanged.claim("k").wait().unwrap(), Claim::InProgress(held) if held.retry_after.is_none()));
    assert_eq!(unchanged.record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: true });
    assert_eq!(unchanged.held().wait().unwrap().len(), 1);
    unchanged.close().wait().unwrap();
    let changed = Store::builder()
        .on_interrupt(onlyonce::OnInterrupt::Rerun)
        .clock(bench.clock.clone())
        .open(bench.path())
        .unwrap();
    assert_eq!(changed.record("k").wait().unwrap(), RecordOutcome::First);
    changed.close().wait().unwrap();
    let unchanged = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    drop(unchanged.claim("l").wait().unwrap());
    assert!(matches!(unchanged.claim("l").wait().unwrap(), Claim::Acquired(_)), "the last explicit setting counts");
}

#[test]
fn a_release_and_its_backoff_survive_a_restart() {
    let mut bench = Bench::new();
    bench.acquire("k").release().after(Duration::from_secs(3)).wait().unwrap();
    bench.advance_ms(1_000);
    bench.reopen();
    let other = bench.in_progress("k");
    assert_eq!((other.retry_after, other.attempt), (Some(Duration::from_secs(2)), 1));
    bench.advance_ms(2_000);
    assert_eq!(bench.acquire("k").attempt().prior(), Some(PriorAttempt::Released));
}

#[test]
fn a_completed_key_returns_the_first_result() {
    let mut bench = Bench::new();
    bench.acquire("k").complete("first").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"first");
    bench.store().flush().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"first");
    bench.reopen();
    assert_eq!(bench.completed("k").unwrap(), b"first");
}

#[test]
fn an_empty_result_is_stored_and_one_over_the_limit_is_not() {
    let mut bench = Bench::with(|builder| builder.result_limit(4));
    bench.acquire("empty").complete("").wait().unwrap();
    bench.acquire("fits").complete("1234").wait().unwrap();
    bench.acquire("too large").complete("12345").wait().unwrap();
    for flushed in [false, true] {
        if flushed {
            bench.store().flush().unwrap();
            bench.reopen();
        }
        assert_eq!(bench.completed("empty"), Some(Vec::new()));
        assert_eq!(bench.completed("fits"), Some(b"1234".to_vec()));
        let Claim::Completed(too_large) = bench.store().claim("too large").wait().unwrap() else {
            panic!("not completed")
        };
        assert!(too_large.is_result_too_large() && too_large.result().is_none());
    }
}

#[test]
fn a_different_payload_is_rejected_in_every_state() {
    let bench = Bench::new();
    let first = || Key::from("k").fingerprint("12 EUR");
    let other = || Key::from("k").fingerprint("99 EUR");
    let assert_rejected = |store: &Store| {
        assert!(matches!(store.claim(other()).wait(), Err(Error::PayloadMismatch { .. })));
        assert!(matches!(store.check(other()).wait(), Err(Error::PayloadMismatch { .. })));
        assert!(matches!(store.record(other()).wait(), Err(Error::PayloadMismatch { .. })));
    };
    let Claim::Acquired(lease) = bench.store().claim(first()).wait().unwrap() else { panic!("not acquired") };
    assert_rejected(bench.store());
    // Dropped, because a release forgets the payload: see `a_release_forgets_the_payload_unless_an_outcome_is_unknown`.
    drop(lease);
    assert_rejected(bench.store());
    let Claim::Acquired(lease) = bench.store().claim("k").wait().unwrap() else { panic!("not acquired") };
    assert_rejected(bench.store());
    lease.complete("receipt").wait().unwrap();
    assert_rejected(bench.store());
    bench.store().flush().unwrap();
    assert_rejected(bench.store());
    assert!(matches!(bench.store().claim(first()).wait().unwrap(), Claim::Completed(_)));
    assert!(
        matches!(bench.store().claim("k").wait().unwrap(), Claim::Completed(_)),
        "a key without a payload is not compared"
    );
    bench.advance_ms(10_000);
    assert!(matches!(bench.store().claim(other()).wait().unwrap(), Claim::Acquired(_)));
    assert_eq!(bench.store().stats().payload_mismatches, 10);
}

#[test]
fn a_renewal_restarts_the_lease() {
    let bench = Bench::new();
    let mut lease = bench.acquire("k");
    bench.advance_ms(900);
    lease.renew().unwrap();
    bench.advance_ms(900);
    assert_eq!(bench.in_progress("k").retry_after, Some(Duration::from_millis(100)));
    bench.advance_ms(100);
    lease.renew().expect("it expired, but was not taken over");
    bench.advance_ms(1_000);
    let _second = bench.acquire("k");
    assert!(matches!(lease.renew(), Err(Error::Superseded { .. })));
    assert!(matches!(lease.release().wait(), Err(Error::Superseded { .. })));
}

#[test]
fn a_holder_cannot_renew_a_lease_after_its_key_was_resolved_to_rerun() {
    let bench = held_bench();
    let mut late = bench.acquire("k");
    late.renew().unwrap();
    assert_eq!(bench.store().stats().superseded, 0);
    bench.advance_ms(1_000);
    bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
    assert!(matches!(late.renew(), Err(Error::Superseded { .. })));
    assert_eq!(bench.store().stats().superseded, 1);
    assert_eq!(bench.acquire("k").attempt().number(), 2, "the next claim acquires it, as the resolution demands");
}

#[test]
fn tokens_increase_over_keys_and_restarts() {
    let mut bench = Bench::new();
    let mut last = 0;
    for round in 0..6 {
        for key in ["a", "b", "c"] {
            let lease = bench.acquire(&format!("{key}{round}"));
            assert!(lease.token().get() > last, "round {round}");
            last = lease.token().get();
            if round < 3 { lease.release().wait().unwrap() } else { lease.complete("r").wait().unwrap() }
        }
        if round % 2 == 0 {
            bench.store().flush().unwrap();
        }
        if round == 3 {
            // Every key is completed or has expired: the journal holds no token.
            bench.advance_ms(11_000);
            bench.store().flush().unwrap();
        }
        bench.reopen();
    }
}

#[test]
fn only_the_first_record_of_a_key_is_first() {
    let mut bench = Bench::new();
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::First);
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    let _lease = bench.acquire("claimed");
    assert_eq!(bench.store().record("claimed").wait().unwrap(), RecordOutcome::Duplicate { in_flight: true });
    assert_eq!(bench.completed("k"), None, "recorded without a result");
    bench.store().flush().unwrap();
    bench.reopen();
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    assert_eq!(bench.store().record("claimed").wait().unwrap(), RecordOutcome::First, "its holder's process has ended");
}

#[test]
fn run_does_the_work_once_and_replays_the_result() {
    let bench = Bench::new();
    let store = bench.store();
    let failed = store.run("k", |_| Err::<Vec<u8>, _>("card declined"));
    assert!(matches!(failed, Err(RunError::Work("card declined"))), "{failed:?}");
    let ran = store.run("k", |lease| {
        assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Released)));
        assert!(matches!(store.run("k", |_| Ok::<_, Error>(Vec::new())), Ok(RunOutcome::InProgress(_))));
        Ok::<_, Error>(b"receipt".to_vec())
    });
    assert!(matches!(ran, Ok(RunOutcome::First(result)) if result == b"receipt"));
    match store.run("k", |_| -> Result<Vec<u8>, Error> { panic!("must not run twice") }) {
        Ok(RunOutcome::Replayed(first)) => assert_eq!(first.result(), Some(&b"receipt"[..])),
        other => panic!("{other:?}"),
    }
}

#[test]
fn typed_results_are_read_back_unchanged() {
    let bench = Bench::new();
    let receipt = ("charge-17".to_owned(), 1_200_u64);
    bench.acquire("k").complete(Completion::encode(&receipt).unwrap()).wait().unwrap();
    let Claim::Completed(completed) = bench.store().claim("k").wait().unwrap() else { panic!("not completed") };
    assert_eq!(completed.result_as::<(String, u64)>().unwrap(), Some(receipt));
    assert!(matches!(completed.result_as::<Vec<(u64, String)>>(), Err(Error::Result(ResultError::Decode { .. }))));
}

#[test]
fn a_result_type_that_cannot_be_decoded_is_rejected_by_encode() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Kind {
        Card { last4: String },
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Amount {
        Cents(u64),
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Flattened {
        id: u64,
        #[serde(flatten)]
        kind: Kind,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Skipping {
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<String>,
        cents: u64,
    }
    fn assert_not_encodable<T: Serialize + serde::de::DeserializeOwned>(result: T) {
        let error = Completion::encode(&result).unwrap_err();
        let text = error.to_string();
        assert!(
            matches!(error, Error::Result(ResultError::Encode { .. })) && text.contains("complete with the bytes"),
            "{text}"
        );
    }
    let card = || Kind::Card { last4: "4711".to_owned() };
    assert_not_encodable(serde_json::json!({ "id": 1 }));
    assert_not_encodable(card());
    assert_not_encodable(Amount::Cents(12));
    assert_not_encodable(Flattened { id: 1, kind: card() });
    assert_not_encodable(Skipping { note: None, cents: 12 });
    let bench = Bench::new();
    let completion = Completion::encode(&Skipping { note: Some("paid".to_owned()), cents: 12 }).unwrap();
    bench.acquire("k").complete(completion).wait().unwrap();
    let Claim::Completed(first) = bench.store().claim("k").wait().unwrap() else { panic!("not completed") };
    assert_eq!(first.result_as().unwrap(), Some(Skipping { note: Some("paid".to_owned()), cents: 12 }));
}

#[test]
fn an_encoding_error_contains_the_error_of_the_type() {
    #[derive(Deserialize)]
    struct Unencodable;
    impl Serialize for Unencodable {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("cannot be encoded"))
        }
    }
    #[derive(Serialize, Deserialize)]
    struct Lopsided {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        list: Vec<u8>,
    }
    let errors = [
        (Completion::encode(&Unencodable).unwrap_err(), "cannot be encoded"),
        (Completion::encode(&Lopsided { list: Vec::new() }).unwrap_err(), "could not be read back"),
    ];
    for (error, text) in errors {
        assert!(matches!(error, Error::Result(ResultError::Encode { .. })), "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn forget_makes_a_key_new_wherever_it_is_stored() {
    let mut bench = Bench::new();
    assert!(!bench.store().forget("never seen").wait().unwrap());

    bench.acquire("also flushed").complete("r").wait().unwrap();
    bench.acquire("flushed").complete("r").wait().unwrap();
    bench.store().flush().unwrap();
    bench.acquire("unflushed").complete("r").wait().unwrap();
    bench.acquire("released").release().wait().unwrap();
    let busy = bench.acquire("busy");
    for key in ["also flushed", "flushed", "unflushed", "released"] {
        assert!(bench.store().forget(key).wait().unwrap(), "{key}");
        assert!(!bench.store().forget(key).wait().unwrap(), "{key}, a second time");
    }
    assert!(matches!(bench.store().forget("busy").wait(), Err(Error::InUse { .. })));
    busy.complete("r").wait().unwrap();
    for round in 0..3 {
        for key in ["also flushed", "flushed", "unflushed", "released"] {
            assert_eq!(bench.store().check(key).wait().unwrap(), KeyStatus::New, "{key} in round {round}");
        }
        bench.reopen();
        bench.store().flush().unwrap();
    }
    assert_eq!(bench.acquire("flushed").attempt().number(), 1);
    assert_eq!(bench.completed("busy").unwrap(), b"r");
}

#[test]
fn a_key_forgotten_and_completed_again_returns_the_second_result() {
    let mut bench = Bench::new();
    for (round, result) in ["one", "two", "three"].into_iter().enumerate() {
        bench.acquire("k").complete(result).wait().unwrap();
        bench.store().flush().unwrap();
        assert_eq!(bench.completed("k").unwrap(), result.as_bytes());
        bench.reopen();
        assert_eq!(bench.completed("k").unwrap(), result.as_bytes());
        if round < 2 {
            bench.store().forget("k").wait().unwrap();
            bench.advance_ms(1_500);
        }
    }
}

#[test]
fn inspect_returns_everything_that_is_stored() {
    let bench = Bench::new();
    assert_eq!(bench.store().inspect("k").wait().unwrap(), None);
    let lease_state = || match bench.store().inspect("k").wait().unwrap() {
        Some(StoredKey::Processing { attempt, state, .. }) => (attempt, state),
        other => panic!("{other:?}"),
    };
    let lease = bench.acquire("k");
    assert_eq!(lease_state(), (1, LeaseState::Leased(Duration::from_secs(1))));
    lease.release().after(Duration::from_millis(50)).wait().unwrap();
    assert_eq!(lease_state(), (1, LeaseState::Backoff(Duration::from_millis(50), PriorAttempt::Released)));
    bench.advance_ms(50);
    assert_eq!(lease_state(), (1, LeaseState::Free(PriorAttempt::Released)));
    let lease = bench.acquire("k");
    let token = lease.token().get();
    lease.complete("done").wait().unwrap();
    match bench.store().inspect("k").wait().unwrap() {
        Some(StoredKey::Completed(completed)) => {
            assert_eq!((completed.token().get(), completed.result()), (token, Some(&b"done"[..])));
            assert_eq!(completed.completed_at().as_unix_ms(), START_MS + 50);
        }
        other => panic!("{other:?}"),
    }
    bench.advance_ms(10_000);
    assert_eq!(bench.store().inspect("k").wait().unwrap(), None);
}

#[test]
fn scopes_and_kinds_of_keys_are_distinct() {
    let bench = Bench::new();
    let keys = || {
        [
            Key::from("a"),
            Key::from("a").scope("s"),
            Key::from("a").scope("t"),
            Key::composite(["a"]),
            Key::content("a"),
            Key::from("sa"),
        ]
    };
    for key in keys() {
        assert_eq!(bench.store().record(key).wait().unwrap(), RecordOutcome::First);
    }
    for key in keys() {
        assert_eq!(bench.store().record(key).wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    }
}

#[test]
fn a_batch_releases_each_lease_with_its_own_backoff() {
    let (bench, elsewhere) = (Bench::new(), Bench::new());
    let (at_once, later, foreign) = (bench.acquire("at once"), bench.acquire("later"), elsewhere.acquire("foreign"));
    let late = bench.acquire("late");
    bench.advance_ms(1_000);
    let _taken = bench.acquire("late");
    let backoff = Duration::from_millis(300);
    let released = bench
        .store()
        .release_batch([(at_once, Duration::ZERO), (late, Duration::ZERO), (foreign, Duration::ZERO), (later, backoff)])
        .wait();
    assert!(matches!(released[..], [Ok(()), Err(Error::Superseded { .. }), Ok(()), Ok(())]), "{released:?}");
    assert_eq!(bench.acquire("at once").attempt().prior(), Some(PriorAttempt::Released));
    assert_eq!(elsewhere.acquire("foreign").attempt().prior(), Some(PriorAttempt::Released));
    assert_eq!(bench.in_progress("later").retry_after, Some(backoff));
    assert_eq!(bench.store().stats().released, 2);
}

#[test]
fn a_waiting_claim_is_woken_when_the_holder_finishes() {
    let bench = Bench::new();
    let begun = std::time::Instant::now();
    let wait = |key: &str| bench.store().claim(key).wait_up_to(Duration::from_secs(600)).wait().unwrap();
    // The clock is stopped, so that no lease expires.
    type End = fn(onlyonce::Lease, &Store) -> Option<onlyonce::Lease>;
    let ends: [(&str, End, Option<PriorAttempt>); 4] = [
        ("completed", |lease, _| lease.complete("first").wait().map(|()| None).unwrap(), None),
        ("released", |lease, _| lease.release().wait().map(|()| None).unwrap(), Some(PriorAttempt::Released)),
        ("dropped", |_, _| None, Some(PriorAttempt::Dropped)),
        ("closed", |lease, store| store.close().wait().map(|()| Some(lease)).unwrap(), None),
    ];
    for (key, end, prior) in ends {
        let lease = bench.acquire(key);
        let (before, store) = (bench.store().stats().in_progress, bench.store());
        std::thread::scope(|scope| {
            let ended = scope.spawn(move || {
                // After its second attempt the claim waits.
                while store.stats().in_progress < before + 2 {
                    std::thread::yield_now();
                }
                end(lease, store)
            });
            match key {
                "completed" => assert!(matches!(wait(key), Claim::Completed(it) if it.result() == Some(b"first"))),
                "closed" => {
                    let closed = store.claim(key).wait_up_to(Duration::from_secs(600)).wait();
                    assert!(matches!(closed, Err(Error::Closed)), "{closed:?}");
                }
                _ => assert!(matches!(wait(key), Claim::Acquired(lease) if lease.attempt().prior() == prior), "{key}"),
            }
            // The lease lives until here, because its end wakes the waiter, too.
            drop(ended.join().unwrap());
        });
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "no claim waits for its limit");
}

#[test]
fn a_wait_ends_at_its_limit() {
    let bench = Bench::new();
    let _lease = bench.acquire("k");
    let begun = std::time::Instant::now();
    let answer = bench.store().claim("k").wait_up_to(Duration::from_millis(50)).wait().unwrap();
    assert!(matches!(answer, Claim::InProgress(_)));
    assert!((Duration::from_millis(50)..Duration::from_secs(20)).contains(&begun.elapsed()));
}

#[test]
fn the_stats_count_the_answers_of_each_call() {
    let bench = Bench::with(|builder| builder.on_interrupt(onlyonce::OnInterrupt::Rerun));
    let store = bench.store();
    store.record_batch(["a", "b", "c"]).wait().unwrap();
    store.record_batch(["a", "b", "d"]).wait().unwrap();
    drop(store.claim_batch(["v", "w"]).wait().unwrap());
    let leases = store.claim_batch(["v", "w", "x", "y", "z", "a"]).wait().unwrap();
    let mut leases: Vec<_> = leases
        .into_iter()
        .filter_map(|claim| match claim.unwrap() {
            Claim::Acquired(lease) => Some(lease),
            _ => None,
        })
        .collect();
    drop(store.claim_batch(["v", "w", "x"]).wait().unwrap());
    store.record_batch(["y", "z"]).wait().unwrap();
    let _open = leases.pop();
    let released = leases.pop().unwrap();
    store.release_batch([(released, Duration::ZERO)]).wait().remove(0).unwrap();
    for completed in store.complete_batch(leases.into_iter().map(|lease| (lease, "r"))).wait() {
        completed.unwrap();
    }
    store.count_fail_open();
    let stats = store.stats();
    assert_eq!((stats.recorded, stats.acquired, stats.reclaimed), (4, 7, 2));
    assert_eq!((stats.duplicates, stats.in_progress), (3, 5));
    assert_eq!((stats.completed, stats.released, stats.superseded), (3, 1, 0));
    assert_eq!((stats.payload_mismatches, stats.too_old, stats.too_far_ahead, stats.fail_open), (0, 0, 0, 1));
    assert_eq!((stats.in_flight, stats.held, stats.unflushed), (1, 0, 8), "one key is leased, one was released");
    assert_eq!((stats.now.as_unix_ms(), stats.window), (START_MS, Duration::from_secs(10)));
    assert_eq!(stats.remembers_since.as_unix_ms(), START_MS - 10_000 + 1);
    assert!(stats.buckets.is_empty());

    store.flush().unwrap();
    bench.advance_ms(1_000);
    store.record("later").wait().unwrap();
    store.flush().unwrap();
    let stats = store.stats();
    let second = |second: u64| START_MS + second * 1_000;
    let buckets =
        stats.buckets.iter().map(|it| (it.start.as_unix_ms(), it.end.as_unix_ms(), it.keys)).collect::<Vec<_>>();
    assert_eq!(buckets, [(second(0), second(1), 8), (second(1), second(2), 1)], "the oldest first");
    assert_eq!((stats.in_flight, stats.unflushed), (1, 0));
}

/// Claims `count` keys, and ends the lease of each with `end`.
fn end_each(bench: &Bench, count: usize, end: impl Fn(Lease)) {
    (0..count).for_each(|i| end(bench.acquire(&format!("ended-{i}"))));
}

#[test]
fn released_and_dropped_keys_do_not_count_as_in_flight() {
    type End = fn(Lease);
    let ends: [(&str, End); 3] = [
        ("released", |lease| lease.release().wait().unwrap()),
        ("released after a backoff", |lease| lease.release().after(Duration::from_secs(5)).wait().unwrap()),
        ("dropped", drop),
    ];
    for (what, end) in ends {
        let bench = Bench::with(|builder| builder.in_flight_limit(10).held_limit(5));
        end_each(&bench, 25, end);
        assert_eq!(bench.store().stats().in_flight, 0, "{what}");
        let running: Vec<Lease> = (0..10).map(|i| bench.acquire(&format!("running-{i}"))).collect();
        let eleventh = bench.store().claim("eleventh").wait();
        assert!(matches!(eleventh, Err(Error::TooManyInFlight { in_flight: 10, limit: 10 })), "{what}: {eleventh:?}");
        drop(running);
    }
}

#[test]
fn a_crash_leaves_nothing_in_flight() {
    let mut bench = Bench::with(|builder| builder.in_flight_limit(10));
    end_each(&bench, 10, std::mem::forget);
    bench.reopen();
    assert_eq!(bench.store().stats().in_flight, 0);
    assert_eq!(bench.acquire("another").attempt().prior(), None);
    assert_eq!(bench.acquire("ended-3").attempt().prior(), Some(PriorAttempt::Crashed));
}

#[test]
fn held_keys_have_a_count_and_a_limit_of_their_own() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold).in_flight_limit(2).held_limit(3));
    end_each(&bench, 3, drop);
    let stats = bench.store().stats();
    assert_eq!((stats.in_flight, stats.held), (0, 3));
    let rejected = bench.store().claim("new").wait();
    assert!(matches!(rejected, Err(Error::TooManyHeld { held: 3, limit: 3 })), "{rejected:?}");
    bench.store().resolve("ended-0", Resolution::Completed(Vec::new())).wait().unwrap();
    bench.acquire("new").release().wait().unwrap();
    bench.store().resolve("ended-1", Resolution::Rerun).wait().unwrap();
    assert_eq!(
        bench.acquire("ended-1").attempt().prior(),
        Some(PriorAttempt::Dropped),
        "its own resolution made room for it"
    );
}

#[test]
fn resolved_keys_do_not_count_as_held() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold).held_limit(3));
    end_each(&bench, 3, drop);
    assert!(matches!(bench.store().claim("new").wait(), Err(Error::TooManyHeld { .. })));
    (0..3).for_each(|i| bench.store().resolve(format!("ended-{i}"), Resolution::Rerun).wait().unwrap());
    assert!(bench.store().held().wait().unwrap().is_empty());
    bench.acquire("new").release().wait().unwrap();
}

#[test]
fn ended_attempts_are_remembered_on_disk_for_exactly_a_window() {
    for flushes in [false, true] {
        for reopens in [false, true] {
            let mut bench = Bench::new();
            bench.acquire("released").release().wait().unwrap();
            drop(bench.acquire("dropped"));
            // A drop reaches the disk with the next flush: if the process ends before, the claim reports a crash.
            let dropped_prior = if reopens && !flushes { PriorAttempt::Crashed } else { PriorAttempt::Dropped };
            bench.acquire("waits").release().after(Duration::from_secs(4)).wait().unwrap();
            if flushes {
                bench.store().flush().unwrap();
                assert_eq!(bench.store().stats().unflushed, 0, "a flush removes them from memory");
            }
            bench.advance_ms(3_000);
            if reopens {
                bench.reopen();
            }
            let attempt_of = |key: &str| {
                let lease = bench.acquire(key);
                (lease.attempt().number(), lease.attempt().prior(), lease.attempt().may_have_happened())
            };
            let case = format!("flushed: {flushes}, reopened: {reopens}");
            assert_eq!(bench.in_progress("waits").retry_after, Some(Duration::from_secs(1)), "{case}");
            assert_eq!(attempt_of("released"), (2, Some(PriorAttempt::Released), false), "{case}");
            assert_eq!(attempt_of("dropped"), (2, Some(dropped_prior), true), "{case}");
            bench.advance_ms(1_000);
            assert_eq!(attempt_of("waits"), (2, Some(PriorAttempt::Released), false), "{case}");
            if flushes {
                bench.store().flush().unwrap();
            }
            // `attempt_of` claimed and dropped each key once more.
            bench.advance_ms(8_999);
            assert_eq!(bench.acquire("released").attempt().number(), 3, "{case}");
            bench.advance_ms(1_001);
            assert_eq!(attempt_of("dropped"), (1, None, false), "{case}");
        }
    }
}

#[test]
fn a_later_state_overrides_an_attempt_on_disk_also_across_buckets() {
    let mut bench = Bench::new();
    for key in ["completed", "released", "forgotten"] {
        drop(bench.acquire(key));
    }
    bench.store().flush().unwrap();
    bench.advance_ms(2_500);
    bench.acquire("completed").complete("r").wait().unwrap();
    let again = bench.acquire("released");
    assert_eq!(again.attempt().number(), 2);
    again.release().wait().unwrap();
    assert!(bench.store().forget("forgotten").wait().unwrap(), "the key was stored");
    bench.store().flush().unwrap();
    for _ in 0..2 {
        assert_eq!(bench.completed("completed").unwrap(), b"r");
        assert!(matches!(bench.store().check("released").wait().unwrap(), KeyStatus::New));
        let third = bench.acquire("forgotten");
        assert_eq!((third.attempt().number(), third.attempt().prior()), (1, None));
        third.release().wait().unwrap();
        bench.store().forget("forgotten").wait().unwrap();
        bench.reopen();
    }
    let third = bench.acquire("released");
    assert_eq!(
        (third.attempt().number(), third.attempt().prior()),
        (3, Some(PriorAttempt::Dropped)),
        "an unknown outcome persists across releases"
    );
}

#[test]
fn a_record_completes_a_key_whose_attempt_is_on_disk() {
    let bench = Bench::new();
    drop(bench.acquire("k"));
    bench.store().flush().unwrap();
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::First);
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
}

#[test]
fn a_release_forgets_the_payload_unless_an_outcome_is_unknown() {
    for flushes in [false, true] {
        let bench = Bench::new();
        let claim = |payload: &str| bench.store().claim(Key::from("k").fingerprint(payload)).wait();
        let acquire = |payload: &str| match claim(payload) {
            Ok(Claim::Acquired(lease)) => lease,
            other => panic!("{payload}: {other:?}"),
        };
        let flush = || {
            if flushes {
                bench.store().flush().unwrap();
            }
        };
        acquire("wrong").release().wait().unwrap();
        flush();
        // The corrected retry is accepted like a first attempt. Its outcome is unknown.
        drop(acquire("right"));
        flush();
        assert!(matches!(claim("other"), Err(Error::PayloadMismatch { .. })));
        acquire("right").release().wait().unwrap();
        flush();
        assert!(
            matches!(claim("other"), Err(Error::PayloadMismatch { .. })),
            "the outcome of an earlier attempt is still unknown"
        );
        acquire("right").complete("r").wait().unwrap();
        flush();
        assert!(matches!(claim("other"), Err(Error::PayloadMismatch { .. })));
    }
}

#[test]
fn a_backoff_is_at_most_half_a_window_and_a_clock_step_does_not_lengthen_it() {
    let bench = Bench::new();
    bench.acquire("forever").release().after(Duration::MAX).wait().unwrap();
    assert_eq!(bench.in_progress("forever").retry_after, Some(Duration::from_secs(5)));
    bench.acquire("k").release().after(Duration::from_secs(1)).wait().unwrap();
    bench.clock.set_wall(Timestamp::from_unix_ms(START_MS - 3_600_000));
    assert_eq!(bench.in_progress("k").retry_after, Some(Duration::from_secs(1)));
    bench.advance_ms(1_000);
    assert_eq!(bench.acquire("k").attempt().number(), 2);
    bench.clock.set_wall(Timestamp::from_unix_ms(START_MS + 1_000));
    bench.advance_ms(4_000);
    assert_eq!(bench.acquire("forever").attempt().number(), 2);
}

#[test]
fn an_unknown_outcome_persists_across_a_release_with_a_long_backoff() {
    for on_interrupt in [OnInterrupt::Rerun, OnInterrupt::Hold] {
        let bench = match on_interrupt {
            OnInterrupt::Rerun => Bench::new(),
            OnInterrupt::Hold => held_bench(),
        };
        drop(bench.acquire("k"));
        if on_interrupt == OnInterrupt::Hold {
            bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
        }
        bench.acquire("k").release().after(Duration::MAX).wait().unwrap();
        let Some(StoredKey::Processing { state: LeaseState::Backoff(left, prior), .. }) =
            bench.store().inspect("k").wait().unwrap()
        else {
            panic!("the key is in backoff")
        };
        assert_eq!(
            (left, prior),
            (Duration::from_secs(5), PriorAttempt::Dropped),
            "`inspect` shows the unknown outcome"
        );
        bench.advance_ms(5_000);
        let again = bench.acquire("k");
        assert_eq!((again.attempt().number(), again.attempt().prior()), (3, Some(PriorAttempt::Dropped)));
    }
}

#[test]
fn a_held_key_cannot_be_forgotten_before_its_resolution() {
    let bench = held_bench();
    drop(bench.acquire("k"));
    let rejected = bench.store().forget("k").wait();
    assert!(matches!(rejected, Err(Error::Undecided { .. })), "{rejected:?}");
    let text = rejected.unwrap_err().to_string();
    assert!(text.contains("\"k\"") && text.contains("resolve"), "{text}");
    assert_eq!(bench.store().held().wait().unwrap().len(), 1, "it is still held");
    bench.store().resolve("k", Resolution::Completed(Vec::new())).wait().unwrap();
    assert!(bench.store().forget("k").wait().unwrap());
    assert_eq!(bench.acquire("k").attempt().prior(), None);
}

#[test]
fn a_late_completion_is_accepted_after_a_resolution_and_a_flush() {
    let bench = held_bench();
    let late = bench.acquire("k");
    bench.advance_ms(5_000);
    bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
    bench.store().flush().unwrap();
    late.complete("late, but not taken over").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"late, but not taken over");
}

#[test]
fn a_renewal_does_not_restore_a_lost_lease() {
    let bench = Bench::new();
    let mut lease = bench.acquire("k");
    bench.advance_ms(1_000);
    let other = bench.acquire("k");
    assert!(matches!(lease.renew(), Err(Error::Superseded { .. })));
    drop(other);
    assert!(matches!(lease.renew(), Err(Error::Superseded { .. })));
    assert_eq!(bench.acquire("k").attempt().number(), 3);
}
