//! The state table, row by row: what a claim is answered, and what its lease may do.

mod common;

use std::time::Duration;

use common::{Bench, START_MS};
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
fn a_key_with_a_living_lease_is_in_progress_until_it_runs_out() {
    let bench = Bench::new();
    let _lease = bench.acquire("k");
    bench.advance_ms(400);
    let other = bench.in_progress("k");
    assert_eq!((other.retry_after, other.attempt), (Some(Duration::from_millis(600)), 1));
    assert_eq!(bench.store().check("k").wait().unwrap(), KeyStatus::InProgress(other));
}

#[test]
fn a_lease_that_ran_out_is_taken_over() {
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
fn a_dropped_lease_frees_its_key_and_is_told() {
    let bench = Bench::new();
    drop(bench.acquire("k"));
    let again = bench.acquire("k");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Dropped)));
}

#[test]
fn a_dropped_lease_is_told_for_a_window_from_its_drop_on() {
    for (later_ms, told) in [(9_999, (2, Some(PriorAttempt::Dropped))), (10_000, (1, None))] {
        let bench = Bench::with(|builder| builder.lease(Duration::from_secs(30)));
        let lease = bench.acquire("k");
        bench.advance_ms(9_000);
        drop(lease);
        bench.advance_ms(later_ms);
        let again = bench.acquire("k");
        assert_eq!((again.attempt().number(), again.attempt().prior()), told, "{later_ms} ms later");
    }
}

#[test]
fn a_panic_in_the_work_is_a_dropped_lease() {
    let bench = Bench::new();
    let store = bench.store().clone();
    let panicked = std::thread::spawn(move || {
        let _ = store.run("k", |_| -> Result<Vec<u8>, Error> { panic!("the work panics, as it should") });
    })
    .join();
    assert!(panicked.is_err());
    assert_eq!(bench.acquire("k").attempt().prior(), Some(PriorAttempt::Dropped));
}

#[test]
fn a_key_whose_process_died_is_acquired_again_and_the_crash_is_told() {
    let mut bench = Bench::new();
    let lease = bench.acquire("k");
    bench.reopen();
    let again = bench.acquire("k");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Crashed)));
    assert!(again.token().get() > lease.token().get());
    let error = lease.complete("from the grave").wait().unwrap_err();
    assert!(matches!(error.error(), Error::Closed), "{error}");
}

#[test]
fn a_crash_is_told_however_long_the_work_had_been_going_on() {
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
    bench.store().resolve("expired", Resolution::Completed(b"it did happen".to_vec())).wait().unwrap();
    assert_eq!(bench.completed("expired").unwrap(), b"it did happen");
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
    lease.complete("late, and nobody has overtaken").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"late, and nobody has overtaken");
}

#[test]
fn a_released_key_is_acquired_again() {
    let bench = Bench::new();
    bench.acquire("k").release().wait().unwrap();
    let again = bench.acquire("k");
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(PriorAttempt::Released)));
}

#[test]
fn a_doubt_outlasts_a_release() {
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
        "nobody has found out whether the first attempt did anything"
    );
    lease.complete("r").wait().unwrap();
}

#[test]
fn a_store_that_holds_goes_on_holding_when_it_is_not_told_otherwise() {
    let bench = held_bench();
    drop(bench.acquire("k"));
    bench.store().close().wait().unwrap();
    let untold = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    assert!(matches!(untold.claim("k").wait().unwrap(), Claim::InProgress(held) if held.retry_after.is_none()));
    assert_eq!(untold.record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: true });
    assert_eq!(untold.held().wait().unwrap().len(), 1);
    untold.close().wait().unwrap();
    let told = Store::builder()
        .on_interrupt(onlyonce::OnInterrupt::Rerun)
        .clock(bench.clock.clone())
        .open(bench.path())
        .unwrap();
    assert_eq!(told.record("k").wait().unwrap(), RecordOutcome::First);
    told.close().wait().unwrap();
    let untold = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    drop(untold.claim("l").wait().unwrap());
    assert!(matches!(untold.claim("l").wait().unwrap(), Claim::Acquired(_)), "and no longer");
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
fn a_completed_key_answers_with_the_first_result() {
    let mut bench = Bench::new();
    bench.acquire("k").complete("first").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"first");
    bench.store().flush().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"first");
    bench.reopen();
    assert_eq!(bench.completed("k").unwrap(), b"first");
}

#[test]
fn an_empty_result_is_a_result_and_one_over_the_limit_is_omitted() {
    let mut bench = Bench::with(|builder| builder.result_limit(4));
    bench.acquire("empty").complete("").wait().unwrap();
    bench.acquire("fits").complete("1234").wait().unwrap();
    bench.acquire("too large").complete("12345").wait().unwrap();
    for sealed in [false, true] {
        if sealed {
            bench.store().flush().unwrap();
            bench.reopen();
        }
        assert_eq!(bench.completed("empty"), Some(Vec::new()));
        assert_eq!(bench.completed("fits"), Some(b"1234".to_vec()));
        let Claim::Completed(omitted) = bench.store().claim("too large").wait().unwrap() else {
            panic!("not completed")
        };
        assert!(omitted.is_result_too_large() && omitted.result().is_none());
    }
}

#[test]
fn another_payload_is_refused_in_every_state() {
    let bench = Bench::new();
    let first = || Key::from("k").fingerprint("12 EUR");
    let other = || Key::from("k").fingerprint("99 EUR");
    let refused = |store: &Store| {
        assert!(matches!(store.claim(other()).wait(), Err(Error::PayloadMismatch { .. })));
        assert!(matches!(store.check(other()).wait(), Err(Error::PayloadMismatch { .. })));
        assert!(matches!(store.record(other()).wait(), Err(Error::PayloadMismatch { .. })));
    };
    let Claim::Acquired(lease) = bench.store().claim(first()).wait().unwrap() else { panic!("not acquired") };
    refused(bench.store());
    // Released, it would bind nobody: see `a_release_without_doubt_forgets_the_payload_and_one_in_doubt_keeps_it`.
    drop(lease);
    refused(bench.store());
    let Claim::Acquired(lease) = bench.store().claim("k").wait().unwrap() else { panic!("not acquired") };
    refused(bench.store());
    lease.complete("receipt").wait().unwrap();
    refused(bench.store());
    bench.store().flush().unwrap();
    refused(bench.store());
    assert!(matches!(bench.store().claim(first()).wait().unwrap(), Claim::Completed(_)));
    assert!(
        matches!(bench.store().claim("k").wait().unwrap(), Claim::Completed(_)),
        "without a payload nothing is compared"
    );
    bench.advance_ms(10_000);
    assert!(matches!(bench.store().claim(other()).wait().unwrap(), Claim::Acquired(_)));
    assert_eq!(bench.store().stats().payload_mismatches, 10);
}

#[test]
fn a_renewed_lease_starts_again() {
    let bench = Bench::new();
    let mut lease = bench.acquire("k");
    bench.advance_ms(900);
    lease.renew().unwrap();
    bench.advance_ms(900);
    assert_eq!(bench.in_progress("k").retry_after, Some(Duration::from_millis(100)));
    bench.advance_ms(100);
    lease.renew().expect("it ran out, and nobody has overtaken");
    bench.advance_ms(1_000);
    let _second = bench.acquire("k");
    assert!(matches!(lease.renew(), Err(Error::Superseded { .. })));
    assert!(matches!(lease.release().wait(), Err(Error::Superseded { .. })));
}

#[test]
fn a_holder_cannot_renew_what_was_resolved_to_run_again() {
    let bench = held_bench();
    let mut late = bench.acquire("k");
    late.renew().unwrap();
    assert_eq!(bench.store().stats().superseded, 0);
    bench.advance_ms(1_000);
    bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
    assert!(matches!(late.renew(), Err(Error::Superseded { .. })));
    assert_eq!(bench.store().stats().superseded, 1);
    assert_eq!(bench.acquire("k").attempt().number(), 2, "the next one gets it, as was resolved");
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
            // Everything is completed or forgotten: nothing of any token is left in the journal.
            bench.advance_ms(11_000);
            bench.store().flush().unwrap();
        }
        bench.reopen();
    }
}

#[test]
fn record_is_first_once() {
    let mut bench = Bench::new();
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::First);
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    let _lease = bench.acquire("claimed");
    assert_eq!(bench.store().record("claimed").wait().unwrap(), RecordOutcome::Duplicate { in_flight: true });
    assert_eq!(bench.completed("k"), None, "recorded without a result");
    bench.store().flush().unwrap();
    bench.reopen();
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    assert_eq!(bench.store().record("claimed").wait().unwrap(), RecordOutcome::First, "its holder is gone");
}

#[test]
fn run_works_once_and_replays() {
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
fn typed_results_come_back_as_they_were() {
    let bench = Bench::new();
    let receipt = ("charge-17".to_owned(), 1_200_u64);
    bench.acquire("k").complete(Completion::encode(&receipt).unwrap()).wait().unwrap();
    let Claim::Completed(completed) = bench.store().claim("k").wait().unwrap() else { panic!("not completed") };
    assert_eq!(completed.result_as::<(String, u64)>().unwrap(), Some(receipt));
    assert!(matches!(completed.result_as::<Vec<(u64, String)>>(), Err(Error::Result(ResultError::Decode { .. }))));
}

#[test]
fn a_result_that_cannot_be_read_back_is_rejected_before_its_lease_is_used() {
    #[derive(Serialize, Deserialize)]
    struct Lopsided {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        list: Vec<u8>,
    }
    let bench = Bench::new();
    let lease = bench.acquire("k");
    for error in [
        Completion::encode(&serde_json::json!({ "id": 1 })).unwrap_err(),
        Completion::encode(&Lopsided { list: Vec::new() }).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Result(ResultError::Encode { .. })), "{error}");
        assert!(error.to_string().contains("complete with the bytes"), "{error}");
    }
    lease.complete("by hand").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"by hand");
}

#[test]
fn forget_makes_a_key_new_wherever_it_lies() {
    let mut bench = Bench::new();
    assert!(!bench.store().forget("never seen").wait().unwrap());

    bench.acquire("hot").complete("r").wait().unwrap();
    bench.acquire("sealed").complete("r").wait().unwrap();
    bench.store().flush().unwrap();
    bench.acquire("unsealed").complete("r").wait().unwrap();
    bench.acquire("released").release().wait().unwrap();
    let busy = bench.acquire("busy");
    for key in ["hot", "sealed", "unsealed", "released"] {
        assert!(bench.store().forget(key).wait().unwrap(), "{key}");
        assert!(!bench.store().forget(key).wait().unwrap(), "{key}, a second time");
    }
    assert!(matches!(bench.store().forget("busy").wait(), Err(Error::InUse { .. })));
    busy.complete("r").wait().unwrap();
    for round in 0..3 {
        for key in ["hot", "sealed", "unsealed", "released"] {
            assert_eq!(bench.store().check(key).wait().unwrap(), KeyStatus::New, "{key} in round {round}");
        }
        bench.reopen();
        bench.store().flush().unwrap();
    }
    assert_eq!(bench.acquire("sealed").attempt().number(), 1);
    assert_eq!(bench.completed("busy").unwrap(), b"r");
}

#[test]
fn a_key_forgotten_and_completed_again_answers_with_the_second_result() {
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
fn get_tells_what_is_stored() {
    let bench = Bench::new();
    assert_eq!(bench.store().inspect("k").wait().unwrap(), None);
    let phase = || match bench.store().inspect("k").wait().unwrap() {
        Some(StoredKey::Processing { attempt, state, .. }) => (attempt, state),
        other => panic!("{other:?}"),
    };
    let lease = bench.acquire("k");
    assert_eq!(phase(), (1, LeaseState::Leased(Duration::from_secs(1))));
    lease.release().after(Duration::from_millis(50)).wait().unwrap();
    assert_eq!(phase(), (1, LeaseState::Backoff(Duration::from_millis(50), PriorAttempt::Released)));
    bench.advance_ms(50);
    assert_eq!(phase(), (1, LeaseState::Free(PriorAttempt::Released)));
    let lease = bench.acquire("k");
    let token = lease.token().get();
    lease.complete("done").wait().unwrap();
    match bench.store().inspect("k").wait().unwrap() {
        Some(StoredKey::Completed(completed)) => {
            assert_eq!((completed.token().get(), completed.result()), (token, Some(&b"done"[..])));
            assert_eq!(completed.completed_at().as_unix_ms(), common::START_MS + 50);
        }
        other => panic!("{other:?}"),
    }
    bench.advance_ms(10_000);
    assert_eq!(bench.store().inspect("k").wait().unwrap(), None);
}

#[test]
fn scopes_and_forms_are_different_keys() {
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
fn a_batch_of_releases_answers_for_each_lease_after_its_own_backoff() {
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
fn a_call_that_waits_for_a_key_is_woken_when_its_holder_is_done() {
    let bench = Bench::new();
    let begun = std::time::Instant::now();
    let wait = |key: &str| bench.store().claim(key).wait_up_to(Duration::from_secs(600)).wait().unwrap();
    // The clock stands still: a lease that nobody settles never runs out.
    type End = fn(onlyonce::Lease, &Store) -> Option<onlyonce::Lease>;
    let ends: [(&str, End, Option<PriorAttempt>); 4] = [
        ("completed", |lease, _| lease.complete("first").wait().map(|()| None).unwrap(), None),
        ("released", |lease, _| lease.release().wait().map(|()| None).unwrap(), Some(PriorAttempt::Released)),
        ("dropped", |_, _| None, Some(PriorAttempt::Dropped)),
        ("closed", |lease, store| store.close().wait().map(|()| Some(lease)).unwrap(), None),
    ];
    for (key, end, prior) in ends {
        let lease = bench.acquire(key);
        let (asked, store) = (bench.store().stats().in_progress, bench.store());
        std::thread::scope(|scope| {
            let ended = scope.spawn(move || {
                // It has asked twice: its place is taken.
                while store.stats().in_progress < asked + 2 {
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
            // Until here there is a lease, whose end would wake, too.
            drop(ended.join().unwrap());
        });
    }
    assert!(begun.elapsed() < Duration::from_secs(60), "nobody waits for a limit");
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
fn the_figures_count_what_each_call_was_answered() {
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
    assert_eq!((stats.in_flight, stats.held, stats.unflushed), (1, 0, 8), "one is open, one was released");
    assert_eq!((stats.now.as_unix_ms(), stats.window), (common::START_MS, Duration::from_secs(10)));
    assert_eq!(stats.remembers_since.as_unix_ms(), common::START_MS - 10_000 + 1);
    assert!(stats.buckets.is_empty());

    store.flush().unwrap();
    bench.advance_ms(1_000);
    store.record("later").wait().unwrap();
    store.flush().unwrap();
    let stats = store.stats();
    let second = |second: u64| common::START_MS + second * 1_000;
    let figures =
        stats.buckets.iter().map(|it| (it.start.as_unix_ms(), it.end.as_unix_ms(), it.keys)).collect::<Vec<_>>();
    assert_eq!(figures, [(second(0), second(1), 8), (second(1), second(2), 1)], "the oldest first");
    assert_eq!((stats.in_flight, stats.unflushed), (1, 0));
}

/// The keys `0..count`, each claimed and ended by `end`.
fn end_each(bench: &Bench, count: usize, end: impl Fn(Lease)) {
    (0..count).for_each(|i| end(bench.acquire(&format!("ended-{i}"))));
}

#[test]
fn ended_work_takes_no_place_among_the_keys_in_flight() {
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
fn held_keys_are_counted_and_limited_apart_from_those_in_flight() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold).in_flight_limit(2).held_limit(3));
    end_each(&bench, 3, drop);
    let stats = bench.store().stats();
    assert_eq!((stats.in_flight, stats.held), (0, 3));
    let refused = bench.store().claim("new").wait();
    assert!(matches!(refused, Err(Error::TooManyHeld { held: 3, limit: 3 })), "{refused:?}");
    bench.store().resolve("ended-0", Resolution::Completed(Vec::new())).wait().unwrap();
    bench.acquire("new").release().wait().unwrap();
    bench.store().resolve("ended-1", Resolution::Rerun).wait().unwrap();
    assert_eq!(
        bench.acquire("ended-1").attempt().prior(),
        Some(PriorAttempt::Dropped),
        "its decision makes room for itself"
    );
}

#[test]
fn decided_keys_are_in_nobodys_way() {
    let bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold).held_limit(3));
    end_each(&bench, 3, drop);
    assert!(matches!(bench.store().claim("new").wait(), Err(Error::TooManyHeld { .. })));
    (0..3).for_each(|i| bench.store().resolve(format!("ended-{i}"), Resolution::Rerun).wait().unwrap());
    assert!(bench.store().held().wait().unwrap().is_empty());
    bench.acquire("new").release().wait().unwrap();
}

#[test]
fn what_ended_attempts_left_is_remembered_on_disk_for_a_window_and_no_longer() {
    for flushes in [false, true] {
        for reopens in [false, true] {
            let mut bench = Bench::new();
            bench.acquire("released").release().wait().unwrap();
            drop(bench.acquire("dropped"));
            // What a drop leaves is written down by the flush: a process that ends before it has crashed.
            let cut_off = if reopens && !flushes { PriorAttempt::Crashed } else { PriorAttempt::Dropped };
            bench.acquire("waits").release().after(Duration::from_secs(4)).wait().unwrap();
            if flushes {
                bench.store().flush().unwrap();
                assert_eq!(bench.store().stats().unflushed, 0, "they leave memory");
            }
            bench.advance_ms(3_000);
            if reopens {
                bench.reopen();
            }
            let told = |key: &str| {
                let lease = bench.acquire(key);
                (lease.attempt().number(), lease.attempt().prior(), lease.attempt().may_have_happened())
            };
            let case = format!("flushed: {flushes}, reopened: {reopens}");
            assert_eq!(bench.in_progress("waits").retry_after, Some(Duration::from_secs(1)), "{case}");
            assert_eq!(told("released"), (2, Some(PriorAttempt::Released), false), "{case}");
            assert_eq!(told("dropped"), (2, Some(cut_off), true), "{case}");
            bench.advance_ms(1_000);
            assert_eq!(told("waits"), (2, Some(PriorAttempt::Released), false), "{case}");
            if flushes {
                bench.store().flush().unwrap();
            }
            // Each was claimed and dropped once more.
            bench.advance_ms(8_999);
            assert_eq!(bench.acquire("released").attempt().number(), 3, "{case}");
            bench.advance_ms(1_001);
            assert_eq!(told("dropped"), (1, None, false), "{case}");
        }
    }
}

#[test]
fn an_attempt_on_disk_is_overruled_by_what_came_later_also_in_another_bucket() {
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
    assert!(bench.store().forget("forgotten").wait().unwrap(), "it was there");
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
        "a doubt persists across releases"
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
fn a_release_without_doubt_forgets_the_payload_and_one_in_doubt_keeps_it() {
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
        // The corrected retry runs as if it were the first. What becomes of it is not known.
        drop(acquire("right"));
        flush();
        assert!(matches!(claim("other"), Err(Error::PayloadMismatch { .. })));
        acquire("right").release().wait().unwrap();
        flush();
        assert!(matches!(claim("other"), Err(Error::PayloadMismatch { .. })), "whether it happened is open");
        acquire("right").complete("r").wait().unwrap();
        flush();
        assert!(matches!(claim("other"), Err(Error::PayloadMismatch { .. })));
    }
}

#[test]
fn a_backoff_is_at_most_half_a_window_and_no_jump_of_the_clock_lengthens_it() {
    let bench = Bench::new();
    bench.acquire("for ever").release().after(Duration::MAX).wait().unwrap();
    assert_eq!(bench.in_progress("for ever").retry_after, Some(Duration::from_secs(5)));
    bench.acquire("k").release().after(Duration::from_secs(1)).wait().unwrap();
    bench.clock.set_wall(Timestamp::from_unix_ms(START_MS - 3_600_000));
    assert_eq!(bench.in_progress("k").retry_after, Some(Duration::from_secs(1)));
    bench.advance_ms(1_000);
    assert_eq!(bench.acquire("k").attempt().number(), 2);
    bench.clock.set_wall(Timestamp::from_unix_ms(START_MS + 1_000));
    bench.advance_ms(4_000);
    assert_eq!(bench.acquire("for ever").attempt().number(), 2);
}

#[test]
fn a_doubt_outlasts_a_release_however_long_its_backoff_is() {
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
            panic!("its backoff is not over")
        };
        assert_eq!((left, prior), (Duration::from_secs(5), PriorAttempt::Dropped), "an operator reads it, too");
        bench.advance_ms(5_000);
        let again = bench.acquire("k");
        assert_eq!((again.attempt().number(), again.attempt().prior()), (3, Some(PriorAttempt::Dropped)));
    }
}

#[test]
fn a_key_that_waits_for_a_decision_is_not_forgotten_without_one() {
    let bench = held_bench();
    drop(bench.acquire("k"));
    let refused = bench.store().forget("k").wait();
    assert!(matches!(refused, Err(Error::Undecided { .. })), "{refused:?}");
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("\"k\"") && text.contains("resolve"), "{text}");
    assert_eq!(bench.store().held().wait().unwrap().len(), 1, "its decision is still open");
    bench.store().resolve("k", Resolution::Completed(Vec::new())).wait().unwrap();
    assert!(bench.store().forget("k").wait().unwrap());
    assert_eq!(bench.acquire("k").attempt().prior(), None);
}

#[test]
fn whoever_has_a_resolved_key_completes_it_late_also_after_a_flush() {
    let bench = held_bench();
    let late = bench.acquire("k");
    bench.advance_ms(5_000);
    bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
    bench.store().flush().unwrap();
    late.complete("it was slow, and nobody has taken over").wait().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"it was slow, and nobody has taken over");
}

#[test]
fn a_renewal_does_not_bring_back_a_dropped_lease() {
    let bench = Bench::new();
    let mut lease = bench.acquire("k");
    bench.advance_ms(1_000);
    let other = bench.acquire("k");
    assert!(matches!(lease.renew(), Err(Error::Superseded { .. })));
    drop(other);
    assert!(matches!(lease.renew(), Err(Error::Superseded { .. })));
    assert_eq!(bench.acquire("k").attempt().number(), 3);
}
