use std::sync::Arc;
use std::time::Duration;

use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::{KeyStatus, LeaseState, StoredKey};
use crate::attempt::{AttemptInfo, FencingToken, PriorAttempt};
use crate::completion::Completion;
use crate::engine::{Finish, Grant, Release};
use crate::error::Error;

pub(super) fn setup(setup: Setup) -> Setup {
    Setup { result_limit: 4, ..setup.short_lease() }
}

pub(super) async fn a_completed_key_answers_with_its_result(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.complete(&grant, "done").await??;
    let completed = bench.completed("k").await?;
    ensure_eq!(completed.result(), Some(&b"done"[..]), "the result");
    ensure_eq!(completed.token(), grant.token(), "the token of the completion");
    let window = completed.remembered_until().saturating_since(completed.completed_at());
    ensure_eq!(window, bench.setup.window, "the time from completion until the key is forgotten");
    ensure!(completed.completed_at() >= grant.claimed_at, "it is completed before it was claimed");
    ensure_eq!(bench.check("k").await??, KeyStatus::Completed(completed.clone()), "a check");
    ensure_eq!(bench.engine.inspect("k".into()).await?, Some(StoredKey::Completed(completed)), "what is stored");
    Ok(())
}

pub(super) async fn an_empty_result_is_a_result(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.complete(&grant, "").await??;
    ensure_eq!(bench.completed("k").await?.result(), Some(&b""[..]), "the result");
    Ok(())
}

pub(super) async fn a_result_over_the_limit_is_too_large(bench: &Bench) -> Verdict {
    for (key, result, is_too_large) in [("fits", "1234", false), ("does not fit", "12345", true)] {
        let grant = bench.acquire(key).await?;
        bench.complete(&grant, result).await??;
        let completed = bench.completed(key).await?;
        ensure_eq!(completed.is_result_too_large(), is_too_large, "whether {result} is too large");
        ensure_eq!(completed.result().is_none(), is_too_large, "whether {result} is left out");
    }
    Ok(())
}

pub(super) async fn a_released_key_is_acquired_again(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.release(&grant).await??;
    ensure_eq!(bench.check("k").await??, KeyStatus::New, "a check");
    let stored = bench.engine.inspect("k".into()).await?;
    let free = LeaseState::Free(PriorAttempt::Released);
    ensure_eq!(stored, Some(StoredKey::processing(grant.token(), 1, free)), "what is stored");
    let again = bench.acquire_as("k", 2, Some(PriorAttempt::Released)).await?;
    ensure!(!again.attempt.may_have_happened(), "a released attempt had no effect");
    Ok(())
}

pub(super) async fn a_released_key_is_in_progress_until_its_backoff_is_over(bench: &Bench) -> Verdict {
    let backoff = bench.unit() * 6;
    let grant = bench.acquire("k").await?;
    bench.finish(&grant, Finish::Release(Release::after(backoff))).await??;
    let other = bench.in_progress("k").await?;
    ensure_eq!(other.attempt, 1, "the attempt");
    ensure_matches!(other.retry_after, Some(left) if !left.is_zero() && *left <= backoff, "when to claim again");
    let stored = bench.engine.inspect("k".into()).await?;
    ensure_matches!(
        stored,
        Some(StoredKey::Processing { state: LeaseState::Backoff(_, PriorAttempt::Released), .. }),
        "what is stored"
    );
    bench.advance(backoff + bench.unit()).await;
    bench.acquire_as("k", 2, Some(PriorAttempt::Released)).await?;
    Ok(())
}

pub(super) async fn a_backoff_of_any_length_is_accepted(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.finish(&grant, Finish::Release(Release::after(Duration::MAX))).await??;
    let retry_after = bench.in_progress("k").await?.retry_after;
    // Half a window at least, less the time that this check may take.
    let least = bench.setup.window / 4;
    ensure_matches!(retry_after, Some(left) if *left >= least, "when to claim again");
    Ok(())
}

fn in_doubt() -> Release {
    Release { may_have_happened: true, ..Release::default() }
}

pub(super) async fn a_release_reports_that_the_effect_may_have_happened(bench: &Bench) -> Verdict {
    let first = bench.acquire("k").await?;
    bench.release(&first).await??;
    let second = bench.acquire_as("k", 2, Some(PriorAttempt::Released)).await?;
    bench.finish(&second, Finish::Release(in_doubt())).await??;
    let again = bench.acquire_as("k", 3, Some(PriorAttempt::Dropped)).await?;
    ensure!(again.attempt.may_have_happened(), "the effect may have happened");
    Ok(())
}

pub(super) async fn a_doubt_persists_across_releases(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.finish(&grant, Finish::Release(in_doubt())).await??;
    for number in 2..5 {
        let grant = bench.acquire_as("k", number, Some(PriorAttempt::Dropped)).await?;
        bench.release(&grant).await??;
    }
    Ok(())
}

pub(super) async fn a_release_can_reset_the_attempts(bench: &Bench) -> Verdict {
    for expected in [1, 2] {
        let grant = bench.acquire("k").await?;
        ensure_eq!(grant.attempt.number(), expected, "the attempt");
        bench.release(&grant).await??;
    }
    let grant = bench.acquire("k").await?;
    bench.finish(&grant, Finish::Release(Release { reset_attempts: true, ..Release::default() })).await??;
    ensure_eq!(bench.acquire("k").await?.attempt.number(), 1, "the attempt after the reset");
    Ok(())
}

pub(super) async fn a_late_completion_is_accepted_if_no_claim_came_first(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.expire_leases().await;
    bench.complete(&grant, "late").await??;
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"late"[..]), "the result");
    Ok(())
}

pub(super) async fn a_repeated_completion_succeeds_and_changes_nothing(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let completion = |result: &str| Completion::new(result).offset("s", 0, 7).message("topic", "k", "payload");
    bench.complete(&grant, completion("one")).await??;
    let first = bench.completed("k").await?;
    bench.engine.set_offset(b"s", 0, 9).await?;
    bench.complete(&grant, completion("two")).await??;
    ensure_eq!(bench.completed("k").await?, first, "the completion");
    ensure_eq!(bench.engine.offset(b"s", 0).await?, Some(9), "the offset");
    ensure_eq!(bench.outbox_keys().await?, ["k"], "the messages");
    Ok(())
}

pub(super) async fn a_repeated_release_changes_nothing(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.release(&grant).await??;
    let repeated = bench.release(&grant).await?;
    ensure_matches!(repeated, Ok(()) | Err(Error::Superseded { .. }), "the repeated release");
    let again = bench.acquire_as("k", 2, Some(PriorAttempt::Released)).await?;
    ensure_superseded(&bench.release(&grant).await?, &grant, "a release that is repeated after the next claim")?;
    bench.complete(&again, "r").await??;
    Ok(())
}

pub(super) async fn a_release_does_not_undo_a_completion(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.complete(&grant, "r").await??;
    ensure_superseded(&bench.release(&grant).await?, &grant, "a release after the completion")?;
    ensure_superseded(&bench.renew(&grant).await?, &grant, "a renewal after the completion")?;
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"r"[..]), "the result");
    Ok(())
}

pub(super) async fn a_lease_that_occurs_twice_in_a_call_is_completed_once(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let completion = || Completion::new("r").message("topic", "k", "payload");
    let answers = bench.complete_all(vec![(&grant, completion()), (&grant, completion())]).await?;
    ensure_matches!(answers[..], [Ok(()), _], "the answers");
    ensure_eq!(bench.outbox_keys().await?, ["k"], "the messages");
    Ok(())
}

pub(super) async fn an_unknown_token_is_superseded_and_changes_nothing(bench: &Bench) -> Verdict {
    let real = bench.acquire("k").await?;
    let attempt = AttemptInfo::new(FencingToken::new(real.token().get() + 1_000), 1, None);
    for key in ["k", "absent"] {
        let made_up = Arc::new(Grant::new(key.into(), attempt, real.claimed_at, real.granted_at_ms));
        ensure_superseded(&bench.complete(&made_up, "r").await?, &made_up, "a completion")?;
        ensure_superseded(&bench.release(&made_up).await?, &made_up, "a release")?;
        ensure_superseded(&bench.renew(&made_up).await?, &made_up, "a renewal")?;
        bench.abandon(&made_up);
    }
    ensure_eq!(bench.check("absent").await??, KeyStatus::New, "a check of the absent key");
    ensure_matches!(bench.check("k").await??, KeyStatus::InProgress(_), "a check of the leased key");
    bench.complete(&real, "r").await??;
    Ok(())
}

pub(super) async fn a_batch_answers_for_each_lease(bench: &Bench) -> Verdict {
    let (completed, released) = (bench.acquire("a").await?, bench.acquire("b").await?);
    let attempt = AttemptInfo::new(FencingToken::new(released.token().get() + 1_000), 1, None);
    let made_up = Arc::new(Grant::new("c".into(), attempt, released.claimed_at, released.granted_at_ms));
    let leases = vec![
        (Arc::clone(&made_up), Finish::Release(Release::default())),
        (completed, Finish::Complete(Completion::new("r"))),
        (Arc::clone(&made_up), Finish::Complete(Completion::new("r"))),
        (released, Finish::Release(Release::default())),
    ];
    let answers = bench.engine.finish(leases).await;
    ensure_matches!(
        answers[..],
        [Err(Error::Superseded { .. }), Ok(()), Err(Error::Superseded { .. }), Ok(())],
        "the answers"
    );
    bench.completed("a").await?;
    bench.acquire_as("b", 2, Some(PriorAttempt::Released)).await?;
    Ok(())
}
