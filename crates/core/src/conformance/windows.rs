use std::time::Duration;

use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::{KeyStatus, LeaseState, Resolution, StoredKey};
use crate::attempt::PriorAttempt;
use crate::engine::{Finish, Release};
use crate::key::Key;

pub(super) fn setup(setup: Setup) -> Setup {
    Setup { window: setup.unit * 20, ..setup.short_lease() }
}

/// Passes time until just before the end of a window that began now.
async fn advance_before_the_end(bench: &Bench, window: Duration) {
    let before = if bench.is_exact() { Duration::from_millis(1) } else { window / 2 };
    bench.advance(window - before).await;
}

/// Passes time from there until the end.
async fn advance_to_the_end(bench: &Bench, window: Duration) {
    let rest = if bench.is_exact() { Duration::from_millis(1) } else { window / 2 + bench.unit() };
    bench.advance(rest).await;
}

pub(super) async fn a_completed_key_is_forgotten_when_its_window_is_over(bench: &Bench) -> Verdict {
    let window = bench.setup.window;
    let grant = bench.acquire("k").await?;
    bench.complete(&grant, "r").await??;
    bench.record("recorded").await??;
    advance_before_the_end(bench, window).await;
    bench.completed("k").await?;
    bench.completed("recorded").await?;
    advance_to_the_end(bench, window).await;
    for key in ["k", "recorded"] {
        ensure_eq!(bench.check(key).await??, KeyStatus::New, "a check of {key}");
        ensure_eq!(bench.engine.inspect(key.into()).await?, None, "what is stored about {key}");
        ensure!(!bench.engine.forget(key.into()).await?, "there was something about {key}");
        bench.acquire_as(key, 1, None).await?;
    }
    Ok(())
}

pub(super) async fn the_window_begins_with_the_completion(bench: &Bench) -> Verdict {
    let window = bench.setup.window;
    let grant = bench.acquire("k").await?;
    bench.advance(window * 3 / 4).await;
    bench.complete(&grant, "r").await??;
    bench.advance(window / 2).await;
    bench.completed("k").await?;
    Ok(())
}

pub(super) async fn a_key_with_a_shorter_window_is_forgotten_earlier(bench: &Bench) -> Verdict {
    let window = bench.setup.window / 2;
    let claimed = bench.acquire(Key::from("claimed").window(window)).await?;
    bench.complete(&claimed, "r").await??;
    bench.record(Key::from("recorded").window(window)).await??;
    bench.record("whole").await??;
    for key in ["claimed", "recorded"] {
        let completed = bench.completed(key).await?;
        let remembered = completed.remembered_until().saturating_since(completed.completed_at());
        ensure_eq!(remembered, window, "how long {key} is remembered");
    }
    advance_before_the_end(bench, window).await;
    bench.completed("claimed").await?;
    bench.completed("recorded").await?;
    advance_to_the_end(bench, window).await;
    ensure_eq!(bench.check("claimed").await??, KeyStatus::New, "a check of the claimed key");
    ensure_eq!(bench.check("recorded").await??, KeyStatus::New, "a check of the recorded key");
    ensure_matches!(bench.check("whole").await??, KeyStatus::Completed(_), "a key without a window of its own");
    Ok(())
}

pub(super) async fn a_longer_window_than_the_store_s_has_no_effect(bench: &Bench) -> Verdict {
    let window = bench.setup.window;
    bench.record(Key::from("k").window(Duration::MAX)).await??;
    let completed = bench.completed("k").await?;
    let remembered = completed.remembered_until().saturating_since(completed.completed_at());
    ensure_eq!(remembered, window, "how long it is remembered");
    bench.advance(window + bench.unit()).await;
    ensure_eq!(bench.check("k").await??, KeyStatus::New, "a check");
    Ok(())
}

pub(super) async fn a_released_attempt_is_forgotten_after_a_window(bench: &Bench) -> Verdict {
    let window = bench.setup.window;
    for key in ["early", "late"] {
        let grant = bench.acquire(key).await?;
        bench.release(&grant).await??;
    }
    advance_before_the_end(bench, window).await;
    bench.acquire_as("early", 2, Some(PriorAttempt::Released)).await?;
    advance_to_the_end(bench, window).await;
    ensure_eq!(bench.engine.inspect("late".into()).await?, None, "what is stored");
    bench.acquire_as("late", 1, None).await?;
    Ok(())
}

pub(super) async fn an_interrupted_attempt_is_forgotten_after_a_window(bench: &Bench) -> Verdict {
    let window = bench.setup.window;
    for key in ["early", "late"] {
        let grant = bench.acquire(key).await?;
        bench.abandon(&grant);
    }
    advance_before_the_end(bench, window).await;
    bench.acquire_as("early", 2, Some(PriorAttempt::Dropped)).await?;
    advance_to_the_end(bench, window).await;
    bench.acquire_as("late", 1, None).await?;
    Ok(())
}

pub(super) async fn an_expired_lease_is_forgotten_after_a_window(bench: &Bench) -> Verdict {
    let window = bench.setup.window;
    let (_early, _late) = (bench.acquire("early").await?, bench.acquire("late").await?);
    bench.advance(bench.setup.lease).await;
    advance_before_the_end(bench, window).await;
    bench.acquire_as("early", 2, Some(PriorAttempt::LeaseExpired)).await?;
    advance_to_the_end(bench, window).await;
    bench.acquire_as("late", 1, None).await?;
    Ok(())
}

pub(super) async fn the_longest_backoff_ends_before_its_attempt_is_forgotten(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.finish(&grant, Finish::Release(Release::after(Duration::MAX))).await??;
    let retry_after = bench.in_progress("k").await?.retry_after;
    ensure_matches!(retry_after, Some(left) if *left <= bench.setup.window, "when to claim again");
    bench.advance(retry_after.unwrap_or_default()).await;
    bench.acquire_as("k", 2, Some(PriorAttempt::Released)).await?;
    Ok(())
}

pub(super) async fn a_completion_repeated_after_its_window_is_superseded(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.complete(&grant, "r").await??;
    advance_before_the_end(bench, bench.setup.window).await;
    bench.complete(&grant, "r").await??;
    advance_to_the_end(bench, bench.setup.window).await;
    ensure_superseded(&bench.complete(&grant, "r").await?, &grant, "the completion")?;
    ensure_eq!(bench.check("k").await??, KeyStatus::New, "a check");
    Ok(())
}

pub(super) async fn a_held_key_is_not_forgotten_by_time(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    bench.advance(bench.setup.window * 2).await;
    ensure_eq!(bench.in_progress("k").await?.retry_after, None, "when to claim again");
    let stored = bench.engine.inspect("k".into()).await?;
    let held = LeaseState::Held(PriorAttempt::Dropped);
    ensure_eq!(stored, Some(StoredKey::processing(grant.token(), 1, held)), "what is stored");
    bench.engine.resolve("k".into(), Resolution::Rerun).await?;
    bench.acquire_as("k", 2, Some(PriorAttempt::Dropped)).await?;
    Ok(())
}

pub(super) async fn an_expired_payload_binds_no_later_call(bench: &Bench) -> Verdict {
    bench.record(Key::from("k").fingerprint("12 EUR")).await??;
    bench.advance(bench.setup.window + bench.unit()).await;
    bench.acquire_as(Key::from("k").fingerprint("99 EUR"), 1, None).await?;
    Ok(())
}
