use std::collections::BTreeSet;
use std::time::Duration;

use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches};
use crate::answer::{Claim, KeyStatus, LeaseState, RecordOutcome, StoredKey};
use crate::error::Result;
use crate::key::Key;

pub(super) fn setup(setup: Setup) -> Setup {
    setup
}

pub(super) async fn an_absent_key_is_acquired_as_the_first_attempt(bench: &Bench) -> Verdict {
    let key = || Key::from("k").scope("tenant");
    ensure_eq!(bench.check(key()).await??, KeyStatus::New, "a check of an absent key");
    ensure_eq!(bench.engine.inspect(key()).await?, None, "what is stored about an absent key");
    let grant = bench.acquire_as(key(), 1, None).await?;
    ensure!(!grant.attempt.may_have_happened(), "the first attempt reports that the effect may have happened");
    ensure_eq!(grant.key, key(), "the key of the grant");
    Ok(())
}

pub(super) async fn a_leased_key_is_in_progress(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let other = bench.in_progress("k").await?;
    ensure_eq!(other.attempt, 1, "the attempt");
    let lease = Duration::ZERO..=bench.setup.lease;
    ensure_matches!(other.retry_after, Some(left) if lease.contains(left), "when to claim again");
    ensure_matches!(bench.check("k").await??, KeyStatus::InProgress(_), "a check");
    let stored = bench.engine.inspect("k".into()).await?;
    let Some(StoredKey::Processing { token, attempt, state, .. }) = stored else {
        ensure!(false, "a leased key is stored as {stored:?}");
        return Ok(());
    };
    ensure_eq!((token, attempt), (grant.token(), 1), "token and attempt that are stored");
    ensure_matches!(state, LeaseState::Leased(left) if lease.contains(left), "the state of the lease");
    Ok(())
}

pub(super) async fn a_key_that_occurs_twice_in_a_batch_is_acquired_once(bench: &Bench) -> Verdict {
    let answers = bench.engine.claim(["a", "b", "a"].map(Key::from).to_vec()).await?;
    let [Ok(Claim::Acquired(a)), Ok(Claim::Acquired(b)), Ok(Claim::InProgress(_))] = &answers[..] else {
        ensure!(false, "expected two leases and a key in progress, got {answers:?}");
        return Ok(());
    };
    ensure!(a.key == Key::from("a") && b.key == Key::from("b"), "the grants have other keys: {answers:?}");
    ensure!(a.token() != b.token(), "two leases have one token");
    Ok(())
}

pub(super) async fn answers_follow_the_order_of_the_keys(bench: &Bench) -> Verdict {
    let leased = bench.acquire("leased").await?;
    let done = bench.acquire("done").await?;
    bench.complete(&done, "r").await??;
    let keys = || ["new", "done", "leased", "newer"].map(Key::from).to_vec();
    let shape = |answers: &[Result<KeyStatus>]| -> String {
        let letter = |answer: &Result<KeyStatus>| match answer {
            Ok(KeyStatus::New) => 'n',
            Ok(KeyStatus::Completed(_)) => 'c',
            Ok(KeyStatus::InProgress(_)) => 'p',
            Err(_) => 'e',
        };
        answers.iter().map(letter).collect()
    };
    ensure_eq!(shape(&bench.engine.check(keys()).await?), "ncpn", "the answers to a check");
    let claims = bench.engine.claim(keys()).await?;
    let [Ok(Claim::Acquired(new)), Ok(Claim::Completed(_)), Ok(Claim::InProgress(_)), Ok(Claim::Acquired(newer))] =
        &claims[..]
    else {
        ensure!(false, "the claims are answered with {claims:?}");
        return Ok(());
    };
    ensure!(new.key == Key::from("new") && newer.key == Key::from("newer"), "the grants have other keys: {claims:?}");
    bench.release(&leased).await??;
    let records = bench.engine.record(["done", "fresh", "leased"].map(Key::from).to_vec()).await?;
    ensure_matches!(
        &records[..],
        [Ok(RecordOutcome::Duplicate { in_flight: false }), Ok(RecordOutcome::First), Ok(RecordOutcome::First)],
        "the answers to a record"
    );
    Ok(())
}

pub(super) async fn every_lease_has_a_higher_token_than_the_leases_before_it(bench: &Bench) -> Verdict {
    let mut tokens = Vec::new();
    for round in 0..4 {
        for key in ["a", "b", "c"] {
            let grant = bench.acquire(format!("{key}{}", round / 2)).await?;
            tokens.push(grant.token());
            bench.release(&grant).await??;
        }
    }
    ensure!(tokens.is_sorted(), "the tokens do not increase: {tokens:?}");
    ensure_eq!(tokens.iter().collect::<BTreeSet<_>>().len(), tokens.len(), "the number of different tokens");
    ensure!(tokens.iter().all(|token| token.get() > 0), "tokens begin at 1: {tokens:?}");
    Ok(())
}

pub(super) async fn a_call_without_keys_has_no_answers(bench: &Bench) -> Verdict {
    let engine = &bench.engine;
    let counts = [
        engine.claim(Vec::new()).await?.len(),
        engine.record(Vec::new()).await?.len(),
        engine.check(Vec::new()).await?.len(),
        engine.renew(Vec::new()).await?.len(),
        engine.finish(Vec::new()).await.len(),
    ];
    ensure_eq!(counts, [0; 5], "the number of answers");
    engine.remove_messages(Vec::new()).await?;
    Ok(())
}

pub(super) async fn keys_of_different_scopes_and_forms_are_different(bench: &Bench) -> Verdict {
    let keys = || {
        vec![
            Key::from("a"),
            Key::from("a").scope("s"),
            Key::from("a").scope("t"),
            Key::composite(["a"]),
            Key::content("a"),
            Key::from("sa"),
            Key::from("\u{1}a"),
        ]
    };
    let first = bench.engine.record(keys()).await?;
    ensure!(first.iter().all(|it| matches!(it, Ok(RecordOutcome::First))), "two of them are one key: {first:?}");
    let second = bench.engine.record(keys()).await?;
    let is_duplicate = |it: &Result<RecordOutcome>| matches!(it, Ok(RecordOutcome::Duplicate { in_flight: false }));
    ensure!(second.iter().all(is_duplicate), "a key differs from itself: {second:?}");
    Ok(())
}
