//! The local store behind the engine contract: what the conformance suite cannot see, because it neither flushes a store nor
//! opens it again.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Bench;
use onlyonce::{Claim, Completion, Error, FencingToken, Key, KeyStatus, OnInterrupt, Resolution, Result, Timestamp};
use onlyonce_core::{Engine, Finish, Grant, Release};

const WINDOW_MS: u64 = 10_000;

fn holding() -> Bench {
    Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold))
}

async fn acquire(bench: &Bench, key: Key<'static>) -> Arc<Grant> {
    match Engine::claim(bench.store(), vec![key]).await.unwrap().pop() {
        Some(Ok(Claim::Acquired(grant))) => Arc::new(grant),
        other => panic!("it should be free, but is {other:?}"),
    }
}

async fn finish(bench: &Bench, leases: Vec<(&Arc<Grant>, Finish)>) -> Vec<Result<()>> {
    Engine::finish(bench.store(), leases.into_iter().map(|(grant, how)| (Arc::clone(grant), how)).collect()).await
}

async fn complete(bench: &Bench, grant: &Arc<Grant>, completion: impl Into<Completion>) -> Result<()> {
    finish(bench, vec![(grant, Finish::Complete(completion.into()))]).await.pop().unwrap()
}

fn is_superseded(answer: &Result<()>, by: FencingToken) -> bool {
    matches!(answer, Err(Error::Superseded { token, .. }) if *token == by)
}

/// A store in each of the places that it keeps a completed key in: memory, the disk, or read back from either.
async fn wherever_it_is_stored(bench: &mut Bench, flushed: bool, reopened: bool) {
    if flushed {
        bench.store().flush().unwrap();
        assert_eq!(bench.store().stats().unflushed, 0);
    }
    if reopened {
        bench.reopen();
    }
}

const PLACES: [(bool, bool); 4] = [(false, false), (false, true), (true, false), (true, true)];

#[tokio::test]
async fn a_completion_that_is_repeated_succeeds_and_writes_nothing_wherever_its_key_is_stored() {
    for (flushed, reopened) in PLACES {
        let mut bench = Bench::new();
        let case = format!("flushed {flushed}, reopened {reopened}");
        let grant = acquire(&bench, "k".into()).await;
        let completion = |result: &str| Completion::new(result).offset("s", 0, 7).message("topic", "k", "payload");
        complete(&bench, &grant, completion("first")).await.unwrap();
        bench.advance_ms(1_000);
        bench.store().set_offset("s", 0, 9).wait().unwrap();
        wherever_it_is_stored(&mut bench, flushed, reopened).await;
        let before = bench.store().stats();
        complete(&bench, &grant, completion("second")).await.unwrap();
        let after = bench.store().stats();
        assert_eq!((after.completed, after.superseded), (before.completed, before.superseded), "{case}");
        assert_eq!(after.unflushed, before.unflushed, "{case}");
        assert_eq!(bench.completed("k").unwrap(), b"first", "{case}");
        assert_eq!(bench.store().offset("s", 0).wait().unwrap(), Some(9), "{case}");
        assert_eq!(bench.store().outbox(10).wait().unwrap().len(), 1, "{case}");
        bench.advance_ms(WINDOW_MS - 1_001);
        complete(&bench, &grant, "at the end of its window").await.unwrap();
        bench.advance_ms(1);
        let late = complete(&bench, &grant, "after its window").await;
        assert!(is_superseded(&late, grant.token()), "{case}: {late:?}");
        assert_eq!(bench.store().check("k").wait().unwrap(), KeyStatus::New, "{case}");
    }
}

#[tokio::test]
async fn a_repeated_completion_holds_back_no_offsets_and_a_superseded_one_does() {
    for (flushed, reopened) in PLACES {
        let mut bench = Bench::new();
        let case = format!("flushed {flushed}, reopened {reopened}");
        let repeated = acquire(&bench, "repeated".into()).await;
        complete(&bench, &repeated, "r").await.unwrap();
        let superseded = acquire(&bench, "superseded".into()).await;
        bench.advance_ms(1_000);
        let holder = acquire(&bench, "superseded".into()).await;
        complete(&bench, &holder, "r").await.unwrap();
        wherever_it_is_stored(&mut bench, flushed, reopened).await;
        for (first, offset, stored) in [(&repeated, 5, Some(5)), (&superseded, 7, Some(5))] {
            let next = acquire(&bench, Key::from(format!("next {offset}"))).await;
            let how = |offset| Finish::Complete(Completion::new("r").offset("s", 0, offset));
            let answers = finish(&bench, vec![(first, how(offset - 1)), (&next, how(offset))]).await;
            assert_eq!(answers[0].is_ok(), stored == Some(offset), "{case}: {answers:?}");
            assert!(answers[1].is_ok(), "{case}: {answers:?}");
            assert_eq!(bench.store().offset("s", 0).wait().unwrap(), stored, "{case}: {answers:?}");
        }
    }
}

#[tokio::test]
async fn a_lease_that_occurs_twice_in_a_call_is_completed_once() {
    let bench = Bench::new();
    let (one, other) = (acquire(&bench, "one".into()).await, acquire(&bench, "other".into()).await);
    let how = |offset| Finish::Complete(Completion::new("r").offset("s", 0, offset).message("topic", "k", "payload"));
    let answers = finish(&bench, vec![(&one, how(1)), (&one, how(1)), (&other, how(2)), (&one, how(1))]).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(bench.store().offset("s", 0).wait().unwrap(), Some(2));
    assert_eq!(bench.store().outbox(10).wait().unwrap().len(), 2);
    assert_eq!(bench.store().stats().completed, 2);
}

#[tokio::test]
async fn a_completion_that_another_one_or_a_forget_came_after_cannot_be_repeated() {
    for (flushed, reopened) in PLACES {
        let mut bench = Bench::new();
        let case = format!("flushed {flushed}, reopened {reopened}");
        let (forgotten, expired) = (
            acquire(&bench, "forgotten".into()).await,
            acquire(&bench, Key::from("expired").window(Duration::from_secs(1))).await,
        );
        for grant in [&forgotten, &expired] {
            complete(&bench, grant, "first").await.unwrap();
        }
        wherever_it_is_stored(&mut bench, flushed, reopened).await;
        assert!(bench.store().forget("forgotten").wait().unwrap(), "{case}");
        bench.advance_ms(999);
        complete(&bench, &expired, "repeated").await.unwrap();
        bench.advance_ms(1);
        let again = acquire(&bench, "expired".into()).await;
        assert!(is_superseded(&complete(&bench, &expired, "late").await, expired.token()), "{case}");
        complete(&bench, &again, "second").await.unwrap();
        wherever_it_is_stored(&mut bench, flushed, reopened).await;
        for grant in [&forgotten, &expired] {
            let late = complete(&bench, grant, "late").await;
            assert!(is_superseded(&late, grant.token()), "{case}: {late:?}");
        }
        assert_eq!(bench.completed("expired").unwrap(), b"second", "{case}");
        assert_eq!(bench.store().check("forgotten").wait().unwrap(), KeyStatus::New, "{case}");
    }
}

#[tokio::test]
async fn a_late_holder_of_a_key_that_was_resolved_as_completed_is_superseded_wherever_it_is_stored() {
    for (flushed, reopened) in PLACES {
        let mut bench = holding();
        let case = format!("flushed {flushed}, reopened {reopened}");
        let late = acquire(&bench, "k".into()).await;
        bench.advance_ms(1_000);
        bench.store().resolve("k", Resolution::Completed(b"found".to_vec())).wait().unwrap();
        wherever_it_is_stored(&mut bench, flushed, reopened).await;
        let answer = complete(&bench, &late, Completion::new("late").message("topic", "k", "payload")).await;
        assert!(is_superseded(&answer, late.token()), "{case}: {answer:?}");
        let KeyStatus::Completed(found) = bench.store().check("k").wait().unwrap() else { panic!("{case}") };
        assert!(found.token() > late.token(), "{case}: {found:?}");
        assert_eq!(found.result(), Some(&b"found"[..]), "{case}");
        assert!(bench.store().outbox(1).wait().unwrap().is_empty(), "{case}");
    }
}

#[tokio::test]
async fn a_release_in_doubt_under_hold_is_superseded_after_a_takeover_and_changes_nothing() {
    let bench = holding();
    let in_doubt = || {
        let mut release = Release::default();
        release.may_have_happened = true;
        Finish::Release(release)
    };
    let old = acquire(&bench, "k".into()).await;
    bench.advance_ms(1_000);
    bench.store().resolve("k", Resolution::Rerun).wait().unwrap();
    let new = acquire(&bench, "k".into()).await;
    let answer = finish(&bench, vec![(&old, in_doubt())]).await.pop().unwrap();
    assert!(is_superseded(&answer, old.token()), "{answer:?}");
    assert!(bench.in_progress("k").retry_after.is_some(), "the new holder has its lease");
    finish(&bench, vec![(&new, in_doubt())]).await.pop().unwrap().unwrap();
    assert_eq!(bench.in_progress("k").retry_after, None, "it is held");
    assert_eq!(bench.store().stats().superseded, 1);
}

#[tokio::test]
async fn a_grant_has_the_window_and_the_timestamp_that_its_claim_gave_the_key() {
    let bench = Bench::with(|builder| builder.stream_time(Duration::from_secs(5)));
    let (at, window) = (Timestamp::from_unix_ms(common::START_MS), Duration::from_secs(3));
    let grant = acquire(&bench, Key::from("k").scope("s").fingerprint("12 EUR").at(at).window(window)).await;
    assert_eq!((grant.key.timestamp(), grant.key.own_window()), (Some(at), Some(window)));
    assert_eq!(grant.key.payload_fingerprint(), Key::from("k").fingerprint("12 EUR").payload_fingerprint());
    assert_eq!(grant.key, Key::from("k").scope("s"));
    let plain = acquire(&bench, Key::from("plain").at(at)).await;
    assert_eq!((plain.key.timestamp(), plain.key.own_window()), (Some(at), None));
}
