use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::{Claim, KeyStatus, LeaseState, RecordOutcome, Resolution, StoredKey};
use crate::attempt::PriorAttempt;
use crate::engine::{Finish, Release};
use crate::error::Error;
use crate::key::Key;

pub(super) fn setup(setup: Setup) -> Setup {
    setup.short_lease()
}

pub(super) async fn an_interrupted_key_is_held(bench: &Bench) -> Verdict {
    let expired = bench.acquire(Key::from("expired").scope("s")).await?;
    let dropped = bench.acquire("dropped").await?;
    bench.abandon(&dropped);
    bench.expire_leases().await;
    for grant in [&expired, &dropped] {
        let key = &grant.key;
        let other = bench.in_progress(key.clone()).await?;
        ensure_eq!((other.retry_after, other.attempt), (None, 1), "the claim of {key}");
        ensure_matches!(bench.check(key.clone()).await??, KeyStatus::InProgress(it) if it.retry_after.is_none(), "check");
        let recorded = bench.record(key.clone()).await??;
        ensure_eq!(recorded, RecordOutcome::Duplicate { in_flight: true }, "the record of {key}");
        let stored = bench.engine.inspect(key.clone()).await?;
        ensure_matches!(stored, Some(StoredKey::Processing { state: LeaseState::Held(_), .. }), "what is stored");
    }
    let waited = bench.engine.claim_wait("dropped".into(), bench.unit()).await?;
    ensure_matches!(waited, Claim::InProgress(it) if it.retry_after.is_none(), "a claim that waits");
    let held = bench.engine.held().await?;
    let listed: Vec<_> = held.iter().map(|it| (it.key.clone(), it.token, it.attempt, it.prior)).collect();
    let expected = [
        (expired.key.clone(), expired.token(), 1, PriorAttempt::LeaseExpired),
        (dropped.key.clone(), dropped.token(), 1, PriorAttempt::Dropped),
    ];
    ensure_eq!(listed, expected, "the held keys, the oldest first");
    Ok(())
}

pub(super) async fn a_release_in_doubt_holds_the_key(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let in_doubt = Release { backoff: bench.unit(), may_have_happened: true, reset_attempts: true };
    bench.finish(&grant, Finish::Release(in_doubt)).await??;
    ensure_eq!(bench.in_progress("k").await?.retry_after, None, "when to claim again");
    bench.engine.resolve("k".into(), Resolution::Rerun).await?;
    bench.acquire_as("k", 2, Some(PriorAttempt::Dropped)).await?;
    Ok(())
}

pub(super) async fn a_key_resolved_to_rerun_is_acquired_by_the_next_claim(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    bench.engine.resolve("k".into(), Resolution::Rerun).await?;
    ensure!(bench.engine.held().await?.is_empty(), "the key is still held");
    bench.acquire_as("k", 2, Some(PriorAttempt::Dropped)).await?;
    Ok(())
}

pub(super) async fn a_key_resolved_as_completed_answers_with_its_result(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    bench.engine.resolve("k".into(), Resolution::Completed(b"found".to_vec())).await?;
    ensure!(bench.engine.held().await?.is_empty(), "the key is still held");
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"found"[..]), "the result");
    Ok(())
}

pub(super) async fn only_a_held_key_can_be_resolved(bench: &Bench) -> Verdict {
    let _leased = bench.acquire("leased").await?;
    bench.record("completed").await??;
    let released = bench.acquire("released").await?;
    bench.release(&released).await??;
    let resolved = bench.acquire("resolved").await?;
    bench.abandon(&resolved);
    bench.engine.resolve("resolved".into(), Resolution::Rerun).await?;
    for key in ["absent", "leased", "completed", "released", "resolved"] {
        for resolution in [Resolution::Rerun, Resolution::Completed(Vec::new())] {
            let rejected = bench.engine.resolve(key.into(), resolution).await;
            ensure_matches!(rejected, Err(Error::NotHeld { .. }), "the resolution of {key}");
        }
    }
    ensure_eq!(bench.check("absent").await??, KeyStatus::New, "a check of the absent key");
    Ok(())
}

pub(super) async fn a_held_key_can_be_forgotten_only_after_its_resolution(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    let rejected = bench.engine.forget("k".into()).await;
    ensure_matches!(rejected, Err(Error::Undecided { token, .. }) if *token == grant.token(), "the first forget");
    ensure_eq!(bench.engine.held().await?.len(), 1, "the number of held keys");
    bench.engine.resolve("k".into(), Resolution::Completed(Vec::new())).await?;
    ensure!(bench.engine.forget("k".into()).await?, "nothing was forgotten");
    bench.acquire_as("k", 1, None).await?;
    Ok(())
}

pub(super) async fn a_late_completion_of_a_held_key_is_accepted(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.expire_leases().await;
    ensure_eq!(bench.in_progress("k").await?.retry_after, None, "when to claim again");
    bench.complete(&grant, "late").await??;
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"late"[..]), "the result");
    ensure!(bench.engine.held().await?.is_empty(), "the key is still held");
    Ok(())
}

pub(super) async fn after_a_resolution_to_rerun_the_old_holder_completes_but_does_not_renew(bench: &Bench) -> Verdict {
    for (key, is_claimed) in [("unclaimed", false), ("claimed", true)] {
        let late = bench.acquire(key).await?;
        bench.expire_leases().await;
        bench.engine.resolve(key.into(), Resolution::Rerun).await?;
        ensure_superseded(&bench.renew(&late).await?, &late, "the renewal")?;
        if is_claimed {
            let _next = bench.acquire_as(key, 2, Some(PriorAttempt::LeaseExpired)).await?;
            ensure_superseded(&bench.complete(&late, "r").await?, &late, "a completion after the next claim")?;
        } else {
            bench.complete(&late, "r").await??;
            bench.completed(key).await?;
        }
    }
    Ok(())
}

pub(super) async fn after_a_resolution_as_completed_the_old_holder_is_superseded(bench: &Bench) -> Verdict {
    let late = bench.acquire("k").await?;
    bench.expire_leases().await;
    bench.engine.resolve("k".into(), Resolution::Completed(b"found".to_vec())).await?;
    let completion = crate::Completion::new("late").message("topic", "k", "payload");
    ensure_superseded(&bench.complete(&late, completion).await?, &late, "the late completion")?;
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"found"[..]), "the result");
    ensure!(bench.outbox_keys().await?.is_empty(), "the late completion stored its message");
    Ok(())
}

pub(super) async fn a_held_key_counts_as_held_and_not_as_in_progress(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    let stats = bench.engine.stats().await?;
    ensure_eq!((stats.in_flight, stats.held), (0, 1), "keys in progress and held");
    bench.engine.resolve("k".into(), Resolution::Rerun).await?;
    ensure_eq!(bench.engine.stats().await?.held, 0, "held keys after the resolution");
    Ok(())
}
