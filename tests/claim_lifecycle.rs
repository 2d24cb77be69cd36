//! The state table, row by row: what a claim is answered, and what its lease may do.

mod common;

use std::time::Duration;

use common::Bench;
use onlyonce::{Check, Claim, Error, Key, Outcome, Phase, Prior, Ran, Recorded, Resolution, RunError, Store, Stored};
use serde::{Deserialize, Serialize};

fn held_bench() -> Bench {
    Bench::with(|builder| builder.on_interrupt(onlyonce::OnInterrupt::Hold))
}

#[test]
fn an_absent_key_is_acquired_as_the_first_attempt() {
    let bench = Bench::new();
    assert_eq!(bench.store().check("k").unwrap(), Check::New);
    let lease = bench.acquire("k");
    assert_eq!((lease.attempt(), lease.prior()), (1, None));
    assert_eq!(lease.remaining(), Duration::from_secs(1));
}

#[test]
fn a_key_with_a_living_lease_is_in_progress_until_it_runs_out() {
    let bench = Bench::new();
    let _lease = bench.acquire("k");
    bench.advance_ms(400);
    let other = bench.in_progress("k");
    assert_eq!((other.retry_after, other.attempt), (Some(Duration::from_millis(600)), 1));
    assert_eq!(bench.store().check("k").unwrap(), Check::InProgress(other));
}

#[test]
fn a_lease_that_ran_out_is_taken_over() {
    let bench = Bench::new();
    let first = bench.acquire("k");
    bench.advance_ms(1_000);
    assert_eq!(first.remaining(), Duration::ZERO);
    let second = bench.acquire("k");
    assert_eq!((second.attempt(), second.prior()), (2, Some(Prior::LeaseExpired)));
    assert!(second.token() > first.token());

    let error = first.complete("late").unwrap_err();
    assert!(matches!(error.error(), Error::Superseded { .. }), "{error}");
    assert_eq!((error.result(), error.outcome()), (&b"late"[..], Outcome::NotWritten));
    second.complete("in time").unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"in time");
    assert_eq!(bench.store().stats().superseded, 1);
}

#[test]
fn a_dropped_lease_frees_its_key_and_is_told() {
    let bench = Bench::new();
    drop(bench.acquire("k"));
    let again = bench.acquire("k");
    assert_eq!((again.attempt(), again.prior()), (2, Some(Prior::Dropped)));
}

#[test]
fn a_dropped_lease_is_told_for_a_window_from_its_drop_on() {
    for (later_ms, told) in [(9_999, (2, Some(Prior::Dropped))), (10_000, (1, None))] {
        let bench = Bench::with(|builder| builder.lease(Duration::from_secs(30)));
        let lease = bench.acquire("k");
        bench.advance_ms(9_000);
        drop(lease);
        bench.advance_ms(later_ms);
        let again = bench.acquire("k");
        assert_eq!((again.attempt(), again.prior()), told, "{later_ms} ms later");
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
    assert_eq!(bench.acquire("k").prior(), Some(Prior::Dropped));
}

#[test]
fn a_key_whose_process_died_is_acquired_again_and_the_crash_is_told() {
    let mut bench = Bench::new();
    let lease = bench.acquire("k");
    bench.reopen();
    let again = bench.acquire("k");
    assert_eq!((again.attempt(), again.prior()), (2, Some(Prior::Crashed)));
    assert!(again.token() > lease.token());
    let error = lease.complete("from the grave").unwrap_err();
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
    assert_eq!(bench.acquire("k").prior(), Some(Prior::Crashed), "27 s of work in a window of 10 s");
}

#[test]
fn under_hold_an_interrupted_key_waits_for_its_resolution() {
    let mut bench = held_bench();
    let dropped_token = {
        let lease = bench.acquire("dropped");
        lease.token()
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
    let held = bench.store().held().unwrap();
    let keys: Vec<_> = held.iter().map(|held| held.key.clone()).collect();
    assert_eq!(keys, [Key::from("dropped"), Key::from("expired"), Key::from("crashed")]);
    assert!(held.iter().all(|held| held.attempt == 1 && held.prior == Prior::Crashed));
    assert_eq!(held[0].token, dropped_token);
    assert_eq!(bench.store().stats().held, 3);

    bench.store().resolve(&held[0].key, Resolution::Rerun).unwrap();
    let again = bench.acquire("dropped");
    assert_eq!((again.attempt(), again.prior()), (2, Some(Prior::Crashed)));
    bench.store().resolve("expired", Resolution::Completed(b"it did happen".to_vec())).unwrap();
    assert_eq!(bench.completed("expired").unwrap(), b"it did happen");
    let twice = bench.store().resolve("expired", Resolution::Rerun);
    assert!(matches!(twice, Err(Error::NotHeld { .. })), "{twice:?}");
    assert!(matches!(bench.store().resolve("unknown", Resolution::Rerun), Err(Error::NotHeld { .. })));
    assert_eq!(bench.store().stats().held, 1);
}

#[test]
fn under_hold_a_resolution_survives_a_restart() {
    let mut bench = held_bench();
    drop(bench.acquire("k"));
    bench.store().resolve("k", Resolution::Rerun).unwrap();
    bench.reopen();
    assert_eq!(bench.acquire("k").prior(), Some(Prior::Dropped));
}

#[test]
fn under_hold_a_late_completion_is_still_accepted() {
    let bench = held_bench();
    let lease = bench.acquire("k");
    bench.advance_ms(5_000);
    assert_eq!(bench.in_progress("k").retry_after, None);
    lease.complete("late, and nobody has overtaken").unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"late, and nobody has overtaken");
}

#[test]
fn a_released_key_is_acquired_again() {
    let bench = Bench::new();
    bench.acquire("k").release().unwrap();
    let again = bench.acquire("k");
    assert_eq!((again.attempt(), again.prior()), (2, Some(Prior::Released)));
}

#[test]
fn a_doubt_outlasts_a_release() {
    let mut bench = Bench::new();
    drop(bench.acquire("k"));
    for attempt in 2..4 {
        let lease = bench.acquire("k");
        assert_eq!((lease.attempt(), lease.prior()), (attempt, Some(Prior::Dropped)));
        lease.release().unwrap();
    }
    bench.reopen();
    let lease = bench.acquire("k");
    assert_eq!(lease.prior(), Some(Prior::Dropped), "nobody has found out whether the first attempt did anything");
    lease.complete("r").unwrap();
}

#[test]
fn a_store_that_holds_goes_on_holding_when_it_is_not_told_otherwise() {
    let bench = held_bench();
    drop(bench.acquire("k"));
    bench.store().close().unwrap();
    let untold = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    assert!(matches!(untold.claim("k").unwrap(), Claim::InProgress(held) if held.retry_after.is_none()));
    assert_eq!(untold.record("k").unwrap(), Recorded::Duplicate { in_flight: true });
    assert_eq!(untold.held().unwrap().len(), 1);
    untold.close().unwrap();
    let told = Store::builder()
        .on_interrupt(onlyonce::OnInterrupt::Rerun)
        .clock(bench.clock.clone())
        .open(bench.path())
        .unwrap();
    assert_eq!(told.record("k").unwrap(), Recorded::First);
    told.close().unwrap();
    let untold = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    drop(untold.claim("l").unwrap());
    assert!(matches!(untold.claim("l").unwrap(), Claim::Acquired(_)), "and no longer");
}

#[test]
fn a_release_and_its_backoff_survive_a_restart() {
    let mut bench = Bench::new();
    bench.acquire("k").release_after(Duration::from_secs(3)).unwrap();
    bench.advance_ms(1_000);
    bench.reopen();
    let other = bench.in_progress("k");
    assert_eq!((other.retry_after, other.attempt), (Some(Duration::from_secs(2)), 1));
    bench.advance_ms(2_000);
    assert_eq!(bench.acquire("k").prior(), Some(Prior::Released));
}

#[test]
fn a_completed_key_answers_with_the_first_result() {
    let mut bench = Bench::new();
    bench.acquire("k").complete("first").unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"first");
    bench.store().seal().unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"first");
    bench.reopen();
    assert_eq!(bench.completed("k").unwrap(), b"first");
}

#[test]
fn an_empty_result_is_a_result_and_one_over_the_limit_is_omitted() {
    let mut bench = Bench::with(|builder| builder.result_limit(4));
    bench.acquire("empty").complete("").unwrap();
    bench.acquire("fits").complete("1234").unwrap();
    bench.acquire("too large").complete("12345").unwrap();
    for sealed in [false, true] {
        if sealed {
            bench.store().seal().unwrap();
            bench.reopen();
        }
        assert_eq!(bench.completed("empty"), Some(Vec::new()));
        assert_eq!(bench.completed("fits"), Some(b"1234".to_vec()));
        let Claim::Completed(omitted) = bench.store().claim("too large").unwrap() else { panic!("not completed") };
        assert!(omitted.is_omitted() && omitted.result().is_none());
    }
}

#[test]
fn another_payload_is_refused_in_every_state() {
    let bench = Bench::new();
    let first = || Key::from("k").fingerprint("12 EUR");
    let other = || Key::from("k").fingerprint("99 EUR");
    let refused = |store: &Store| {
        assert!(matches!(store.claim(other()), Err(Error::PayloadMismatch { .. })));
        assert!(matches!(store.check(other()), Err(Error::PayloadMismatch { .. })));
        assert!(matches!(store.record(other()), Err(Error::PayloadMismatch { .. })));
    };
    let Claim::Acquired(lease) = bench.store().claim(first()).unwrap() else { panic!("not acquired") };
    refused(bench.store());
    lease.release().unwrap();
    refused(bench.store());
    let Claim::Acquired(lease) = bench.store().claim("k").unwrap() else { panic!("not acquired") };
    refused(bench.store());
    lease.complete("receipt").unwrap();
    refused(bench.store());
    bench.store().seal().unwrap();
    refused(bench.store());
    assert!(matches!(bench.store().claim(first()).unwrap(), Claim::Completed(_)));
    assert!(matches!(bench.store().claim("k").unwrap(), Claim::Completed(_)), "without a payload nothing is compared");
    bench.advance_ms(10_000);
    assert!(matches!(bench.store().claim(other()).unwrap(), Claim::Acquired(_)));
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
    assert!(matches!(lease.release(), Err(Error::Superseded { .. })));
}

#[test]
fn a_holder_cannot_renew_what_was_resolved_to_run_again() {
    let bench = held_bench();
    let mut late = bench.acquire("k");
    late.renew().unwrap();
    assert_eq!(bench.store().stats().superseded, 0);
    bench.advance_ms(1_000);
    bench.store().resolve("k", Resolution::Rerun).unwrap();
    assert!(matches!(late.renew(), Err(Error::Superseded { .. })));
    assert_eq!(bench.store().stats().superseded, 1);
    assert_eq!(bench.acquire("k").attempt(), 2, "the next one gets it, as was resolved");
}

#[test]
fn tokens_increase_over_keys_and_restarts() {
    let mut bench = Bench::new();
    let mut last = 0;
    for round in 0..6 {
        for key in ["a", "b", "c"] {
            let lease = bench.acquire(&format!("{key}{round}"));
            assert!(lease.token() > last, "round {round}");
            last = lease.token();
            if round < 3 { lease.release().unwrap() } else { lease.complete("r").unwrap() }
        }
        if round % 2 == 0 {
            bench.store().seal().unwrap();
        }
        if round == 3 {
            // Everything is completed or forgotten: nothing of any token is left in the journal.
            bench.advance_ms(11_000);
            bench.store().seal().unwrap();
        }
        bench.reopen();
    }
}

#[test]
fn record_is_first_once() {
    let mut bench = Bench::new();
    assert_eq!(bench.store().record("k").unwrap(), Recorded::First);
    assert_eq!(bench.store().record("k").unwrap(), Recorded::Duplicate { in_flight: false });
    let _lease = bench.acquire("claimed");
    assert_eq!(bench.store().record("claimed").unwrap(), Recorded::Duplicate { in_flight: true });
    assert_eq!(bench.completed("k"), None, "recorded without a result");
    bench.store().seal().unwrap();
    bench.reopen();
    assert_eq!(bench.store().record("k").unwrap(), Recorded::Duplicate { in_flight: false });
    assert_eq!(bench.store().record("claimed").unwrap(), Recorded::First, "its holder is gone");
}

#[test]
fn run_works_once_and_replays() {
    let bench = Bench::new();
    let store = bench.store();
    let failed = store.run("k", |_| Err::<Vec<u8>, _>("card declined"));
    assert!(matches!(failed, Err(RunError::Work("card declined"))), "{failed:?}");
    let ran = store.run("k", |lease| {
        assert_eq!((lease.attempt(), lease.prior()), (2, Some(Prior::Released)));
        assert!(matches!(store.run("k", |_| Ok::<_, Error>(Vec::new())), Ok(Ran::InProgress(_))));
        Ok::<_, Error>(b"receipt".to_vec())
    });
    assert!(matches!(ran, Ok(Ran::First(result)) if result == b"receipt"));
    match store.run("k", |_| -> Result<Vec<u8>, Error> { panic!("must not run twice") }) {
        Ok(Ran::Replayed(first)) => assert_eq!(first.result(), Some(&b"receipt"[..])),
        other => panic!("{other:?}"),
    }
}

#[test]
fn typed_results_come_back_as_they_were() {
    let bench = Bench::new();
    let receipt = ("charge-17".to_owned(), 1_200_u64);
    bench.acquire("k").complete_as(&receipt).unwrap();
    let Claim::Completed(completed) = bench.store().claim("k").unwrap() else { panic!("not completed") };
    assert_eq!(completed.result_as::<(String, u64)>().unwrap(), Some(receipt));
    assert!(matches!(completed.result_as::<Vec<(u64, String)>>(), Err(Error::Decode { .. })));
}

#[test]
fn typed_results_of_every_form_are_read_back_from_memory_and_disk() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Kind {
        Card {
            last4: String,
        },
        #[serde(other)]
        Unknown,
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Amount {
        Cents(u64),
        Text(String),
    }
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Receipt {
        #[serde(skip_serializing_if = "Option::is_none")]
        note: Option<String>,
        amount: Amount,
        #[serde(flatten)]
        kind: Kind,
    }
    let receipts = || {
        let card = |note: Option<&str>, amount| Receipt {
            note: note.map(str::to_owned),
            amount,
            kind: Kind::Card { last4: "4711".to_owned() },
        };
        [card(None, Amount::Cents(12)), card(Some("paid"), Amount::Text("12 EUR".to_owned()))]
    };
    let any = serde_json::json!({ "id": 1, "lines": [null, 1.5, "x"] });
    let mut bench = Bench::new();
    bench.acquire("any").complete_as(&any).unwrap();
    for (key, receipt) in ["plain", "noted"].into_iter().zip(receipts()) {
        bench.acquire(key).complete_as(&receipt).unwrap();
    }
    let first = |bench: &Bench, key: &str| match bench.store().claim(key).unwrap() {
        Claim::Completed(first) => first,
        other => panic!("{key} should be completed, but is {other:?}"),
    };
    // In memory, in a bucket, and after a restart.
    for round in 0..3 {
        assert_eq!(first(&bench, "any").result_as().unwrap(), Some(any.clone()), "{round}");
        for (key, receipt) in ["plain", "noted"].into_iter().zip(receipts()) {
            assert_eq!(first(&bench, key).result_as().unwrap(), Some(receipt), "{key}, {round}");
        }
        // As another type that knows less.
        #[derive(Deserialize)]
        struct Last4 {
            last4: String,
        }
        let last4 = first(&bench, "noted").result_as::<Last4>().unwrap().unwrap().last4;
        assert_eq!(last4, "4711");
        if round == 0 { bench.store().seal().unwrap() } else { bench.reopen() }
    }
}

#[test]
fn a_result_that_could_not_be_read_back_gives_the_lease_back() {
    #[derive(Deserialize)]
    struct Refuses;
    impl Serialize for Refuses {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("it refuses"))
        }
    }
    #[derive(Serialize, Deserialize)]
    struct Lopsided {
        #[serde(skip_serializing_if = "Vec::is_empty")]
        list: Vec<u8>,
    }
    let bench = Bench::new();
    let (error, _, lease) = bench.acquire("k").complete_as(&Refuses).unwrap_err().into_parts();
    assert!(matches!(error, Error::Encode { .. }) && error.to_string().contains("it refuses"), "{error}");
    let (error, _, lease) = lease.unwrap().complete_as(&Lopsided { list: Vec::new() }).unwrap_err().into_parts();
    assert!(matches!(error, Error::Encode { .. }) && error.to_string().contains("missing field `list`"), "{error}");
    let (error, _, lease) = lease.unwrap().complete_as(&Some(f64::NAN)).unwrap_err().into_parts();
    assert!(matches!(error, Error::Encode { .. }) && error.to_string().contains("another value"), "{error}");
    lease.unwrap().complete("by hand").unwrap();
    assert_eq!(bench.completed("k").unwrap(), b"by hand");
}

#[test]
fn forget_makes_a_key_new_wherever_it_lies() {
    let mut bench = Bench::new();
    assert!(!bench.store().forget("never seen").unwrap());

    bench.acquire("hot").complete("r").unwrap();
    bench.acquire("sealed").complete("r").unwrap();
    bench.store().seal().unwrap();
    bench.acquire("unsealed").complete("r").unwrap();
    bench.acquire("released").release().unwrap();
    let busy = bench.acquire("busy");
    for key in ["hot", "sealed", "unsealed", "released"] {
        assert!(bench.store().forget(key).unwrap(), "{key}");
        assert!(!bench.store().forget(key).unwrap(), "{key}, a second time");
    }
    assert!(matches!(bench.store().forget("busy"), Err(Error::InUse { .. })));
    busy.complete("r").unwrap();
    for round in 0..3 {
        for key in ["hot", "sealed", "unsealed", "released"] {
            assert_eq!(bench.store().check(key).unwrap(), Check::New, "{key} in round {round}");
        }
        bench.reopen();
        bench.store().seal().unwrap();
    }
    assert_eq!(bench.acquire("sealed").attempt(), 1);
    assert_eq!(bench.completed("busy").unwrap(), b"r");
}

#[test]
fn a_key_forgotten_and_completed_again_answers_with_the_second_result() {
    let mut bench = Bench::new();
    for (round, result) in ["one", "two", "three"].into_iter().enumerate() {
        bench.acquire("k").complete(result).unwrap();
        bench.store().seal().unwrap();
        assert_eq!(bench.completed("k").unwrap(), result.as_bytes());
        bench.reopen();
        assert_eq!(bench.completed("k").unwrap(), result.as_bytes());
        if round < 2 {
            bench.store().forget("k").unwrap();
            bench.advance_ms(1_500);
        }
    }
}

#[test]
fn get_tells_what_is_stored() {
    let bench = Bench::new();
    assert_eq!(bench.store().get("k").unwrap(), None);
    let phase = || match bench.store().get("k").unwrap() {
        Some(Stored::Processing { attempt, phase, .. }) => (attempt, phase),
        other => panic!("{other:?}"),
    };
    let lease = bench.acquire("k");
    assert_eq!(phase(), (1, Phase::Leased(Duration::from_secs(1))));
    lease.release_after(Duration::from_millis(50)).unwrap();
    assert_eq!(phase(), (1, Phase::Backoff(Duration::from_millis(50), Prior::Released)));
    bench.advance_ms(50);
    assert_eq!(phase(), (1, Phase::Free(Prior::Released)));
    let lease = bench.acquire("k");
    let token = lease.token();
    lease.complete("done").unwrap();
    match bench.store().get("k").unwrap() {
        Some(Stored::Completed(completed)) => {
            assert_eq!((completed.token(), completed.result()), (token, Some(&b"done"[..])));
            assert_eq!(completed.completed_at_ms(), common::START_MS + 50);
        }
        other => panic!("{other:?}"),
    }
    bench.advance_ms(10_000);
    assert_eq!(bench.store().get("k").unwrap(), None);
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
        assert_eq!(bench.store().record(key).unwrap(), Recorded::First);
    }
    for key in keys() {
        assert_eq!(bench.store().record(key).unwrap(), Recorded::Duplicate { in_flight: false });
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
    let released = bench.store().release_batch([
        (at_once, Duration::ZERO),
        (late, Duration::ZERO),
        (foreign, Duration::ZERO),
        (later, backoff),
    ]);
    assert!(matches!(released[..], [Ok(()), Err(Error::Superseded { .. }), Ok(()), Ok(())]), "{released:?}");
    assert_eq!(bench.acquire("at once").prior(), Some(Prior::Released));
    assert_eq!(elsewhere.acquire("foreign").prior(), Some(Prior::Released));
    assert_eq!(bench.in_progress("later").retry_after, Some(backoff));
    assert_eq!(bench.store().stats().released, 2);
}

#[test]
fn a_call_that_waits_for_a_key_is_woken_when_its_holder_is_done() {
    let bench = Bench::new();
    let begun = std::time::Instant::now();
    let wait = |key: &str| bench.store().claim_wait(key, Duration::from_secs(600)).unwrap();
    // The clock stands still: a lease that nobody settles never runs out.
    type End = fn(onlyonce::Lease, &Store) -> Option<onlyonce::Lease>;
    let ends: [(&str, End, Option<Prior>); 4] = [
        ("completed", |lease, _| lease.complete("first").map(|()| None).unwrap(), None),
        ("released", |lease, _| lease.release().map(|()| None).unwrap(), Some(Prior::Released)),
        ("dropped", |_, _| None, Some(Prior::Dropped)),
        ("closed", |lease, store| store.close().map(|()| Some(lease)).unwrap(), None),
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
                    let closed = store.claim_wait(key, Duration::from_secs(600));
                    assert!(matches!(closed, Err(Error::Closed)), "{closed:?}");
                }
                _ => assert!(matches!(wait(key), Claim::Acquired(lease) if lease.prior() == prior), "{key}"),
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
    let answer = bench.store().claim_wait("k", Duration::from_millis(50)).unwrap();
    assert!(matches!(answer, Claim::InProgress(_)));
    assert!((Duration::from_millis(50)..Duration::from_secs(20)).contains(&begun.elapsed()));
}

#[test]
fn the_figures_count_what_each_call_was_answered() {
    let bench = Bench::with(|builder| builder.on_interrupt(onlyonce::OnInterrupt::Rerun));
    let store = bench.store();
    store.record_batch(["a", "b", "c"]).unwrap();
    store.record_batch(["a", "b", "d"]).unwrap();
    drop(store.claim_batch(["v", "w"]).unwrap());
    let leases = store.claim_batch(["v", "w", "x", "y", "z", "a"]).unwrap();
    let mut leases: Vec<_> = leases
        .into_iter()
        .filter_map(|claim| match claim.unwrap() {
            Claim::Acquired(lease) => Some(lease),
            _ => None,
        })
        .collect();
    drop(store.claim_batch(["v", "w", "x"]).unwrap());
    store.record_batch(["y", "z"]).unwrap();
    let _open = leases.pop();
    let released = leases.pop().unwrap();
    store.release_batch([(released, Duration::ZERO)]).remove(0).unwrap();
    for completed in store.complete_batch(leases.into_iter().map(|lease| (lease, "r"))) {
        completed.unwrap();
    }
    store.count_fail_open();
    let stats = store.stats();
    assert_eq!((stats.recorded, stats.acquired, stats.reclaimed), (4, 7, 2));
    assert_eq!((stats.duplicates, stats.in_progress), (3, 5));
    assert_eq!((stats.completed, stats.released, stats.superseded), (3, 1, 0));
    assert_eq!((stats.payload_mismatches, stats.too_old, stats.too_far_ahead, stats.fail_open), (0, 0, 0, 1));
    assert_eq!((stats.in_flight, stats.held, stats.unsealed), (2, 0, 7), "one is open, one was released");
    assert_eq!((stats.now_ms, stats.window), (common::START_MS, Duration::from_secs(10)));
    assert_eq!(stats.remembers_since_ms, common::START_MS - 10_000 + 1);
    assert!(stats.buckets.is_empty());

    store.seal().unwrap();
    bench.advance_ms(1_000);
    store.record("later").unwrap();
    store.seal().unwrap();
    let stats = store.stats();
    let second = |second: u64| common::START_MS + second * 1_000;
    let figures = stats.buckets.iter().map(|it| (it.start_ms, it.end_ms, it.keys)).collect::<Vec<_>>();
    assert_eq!(figures, [(second(0), second(1), 7), (second(1), second(2), 1)], "the oldest first");
    assert_eq!((stats.in_flight, stats.unsealed), (2, 0));
}
