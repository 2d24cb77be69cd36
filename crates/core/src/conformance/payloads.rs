use super::bench::{Bench, Setup, Verdict, ensure_eq, ensure_matches};
use crate::answer::{KeyStatus, Resolution, StoredKey};
use crate::attempt::PriorAttempt;
use crate::engine::{Finish, Release};
use crate::error::Error;
use crate::key::Key;

pub(super) fn setup(setup: Setup) -> Setup {
    setup
}

fn key(payload: &str) -> Key<'static> {
    Key::from("k").fingerprint(payload)
}

async fn ensure_mismatch(bench: &Bench, payload: &str, state: &str) -> Verdict {
    let claim = bench.claim(key(payload)).await?.err();
    ensure_matches!(claim, Some(Error::PayloadMismatch { .. }), "a claim of a {state} key");
    let check = bench.check(key(payload)).await?.err();
    ensure_matches!(check, Some(Error::PayloadMismatch { .. }), "a check of a {state} key");
    let record = bench.record(key(payload)).await?.err();
    ensure_matches!(record, Some(Error::PayloadMismatch { .. }), "a record of a {state} key");
    Ok(())
}

pub(super) async fn another_payload_is_rejected_while_the_key_is_leased_or_completed(bench: &Bench) -> Verdict {
    let grant = bench.acquire(key("12 EUR")).await?;
    ensure_mismatch(bench, "99 EUR", "leased").await?;
    bench.in_progress(key("12 EUR")).await?;
    bench.complete(&grant, "r").await??;
    ensure_mismatch(bench, "99 EUR", "completed").await?;
    bench.completed(key("12 EUR")).await?;
    bench.record(Key::from("recorded").fingerprint("a")).await??;
    let other = bench.claim(Key::from("recorded").fingerprint("b")).await?;
    ensure_matches!(other, Err(Error::PayloadMismatch { .. }), "a claim of a recorded key");
    Ok(())
}

pub(super) async fn a_call_without_a_payload_is_not_compared(bench: &Bench) -> Verdict {
    let grant = bench.acquire(key("12 EUR")).await?;
    bench.in_progress("k").await?;
    bench.complete(&grant, "r").await??;
    bench.completed("k").await?;
    let stored = bench.engine.inspect(key("99 EUR")).await?;
    ensure_matches!(stored, Some(StoredKey::Completed(_)), "what is stored");
    bench.record("unbound").await??;
    bench.completed(Key::from("unbound").fingerprint("a")).await?;
    Ok(())
}

pub(super) async fn a_release_without_doubt_forgets_the_payload(bench: &Bench) -> Verdict {
    let wrong = bench.acquire(key("wrong")).await?;
    bench.release(&wrong).await??;
    ensure_eq!(bench.check(key("right")).await??, KeyStatus::New, "a check with the corrected payload");
    let right = bench.acquire_as(key("right"), 2, Some(PriorAttempt::Released)).await?;
    bench.complete(&right, "r").await??;
    ensure_mismatch(bench, "wrong", "completed").await
}

pub(super) async fn a_release_in_doubt_keeps_the_payload(bench: &Bench) -> Verdict {
    let first = bench.acquire(key("first")).await?;
    let in_doubt = Release { may_have_happened: true, ..Release::default() };
    bench.finish(&first, Finish::Release(in_doubt)).await??;
    ensure_mismatch(bench, "other", "released").await?;
    let second = bench.acquire(key("first")).await?;
    bench.release(&second).await??;
    ensure_mismatch(bench, "other", "twice released").await
}

pub(super) async fn a_dropped_lease_keeps_its_payload_for_later_attempts(bench: &Bench) -> Verdict {
    let first = bench.acquire(key("first")).await?;
    bench.abandon(&first);
    ensure_mismatch(bench, "other", "dropped").await?;
    // It brings no payload, and is bound by the first.
    let second = bench.acquire("k").await?;
    ensure_mismatch(bench, "other", "leased").await?;
    bench.complete(&second, "r").await??;
    ensure_mismatch(bench, "other", "completed").await
}

pub(super) async fn a_held_key_keeps_its_payload(bench: &Bench) -> Verdict {
    let first = bench.acquire(key("first")).await?;
    bench.abandon(&first);
    ensure_mismatch(bench, "other", "held").await?;
    bench.engine.resolve("k".into(), Resolution::Rerun).await?;
    ensure_mismatch(bench, "other", "resolved").await?;
    bench.acquire_as(key("first"), 2, Some(PriorAttempt::Dropped)).await?;
    Ok(())
}
