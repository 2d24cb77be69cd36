use super::bench::{Bench, Setup, Stop, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::{Claim, KeyStatus, LeaseState, StoredKey};
use crate::attempt::PriorAttempt;
use crate::error::Error;

pub(super) fn setup(setup: Setup) -> Setup {
    setup.short_lease()
}

pub(super) async fn an_expired_lease_is_taken_over(bench: &Bench) -> Verdict {
    let first = bench.acquire("k").await?;
    bench.expire_leases().await;
    ensure_eq!(bench.check("k").await??, KeyStatus::New, "a check");
    let stored = bench.engine.inspect("k".into()).await?;
    let free = LeaseState::Free(PriorAttempt::LeaseExpired);
    ensure_eq!(stored, Some(StoredKey::processing(first.token(), 1, free)), "what is stored");
    let second = bench.acquire_as("k", 2, Some(PriorAttempt::LeaseExpired)).await?;
    ensure!(second.attempt.may_have_happened(), "the effect may have happened");
    ensure!(second.token() > first.token(), "the second token is not higher");
    Ok(())
}

pub(super) async fn a_lease_that_was_taken_over_is_superseded(bench: &Bench) -> Verdict {
    let late = bench.acquire("k").await?;
    bench.expire_leases().await;
    let second = bench.acquire("k").await?;
    ensure_superseded(&bench.complete(&late, "late").await?, &late, "a completion")?;
    ensure_superseded(&bench.release(&late).await?, &late, "a release")?;
    ensure_superseded(&bench.renew(&late).await?, &late, "a renewal")?;
    bench.complete(&second, "in time").await??;
    ensure_superseded(&bench.complete(&late, "late").await?, &late, "a completion after the other one")?;
    ensure_eq!(bench.completed("k").await?.result(), Some(&b"in time"[..]), "the result");
    Ok(())
}

pub(super) async fn a_dropped_lease_frees_its_key(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    let again = bench.acquire_as("k", 2, Some(PriorAttempt::Dropped)).await?;
    ensure!(again.attempt.may_have_happened(), "the effect may have happened");
    Ok(())
}

pub(super) async fn a_drop_after_a_takeover_changes_nothing(bench: &Bench) -> Verdict {
    let late = bench.acquire("k").await?;
    bench.expire_leases().await;
    let second = bench.acquire("k").await?;
    bench.abandon(&late);
    bench.in_progress("k").await?;
    bench.complete(&second, "r").await??;
    Ok(())
}

pub(super) async fn a_drop_after_a_completion_changes_nothing(bench: &Bench) -> Verdict {
    let (completed, released) = (bench.acquire("a").await?, bench.acquire("b").await?);
    bench.complete(&completed, "r").await??;
    bench.release(&released).await??;
    bench.abandon(&completed);
    bench.abandon(&released);
    bench.completed("a").await?;
    bench.acquire_as("b", 2, Some(PriorAttempt::Released)).await?;
    Ok(())
}

pub(super) async fn a_completion_after_a_drop_is_stored_or_rejected(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    let completed = bench.complete(&grant, "r").await?;
    let claim = bench.claim("k").await??;
    match (&completed, &claim) {
        (Ok(()), Claim::Completed(completed)) => ensure_eq!(completed.result(), Some(&b"r"[..]), "the result"),
        (Err(Error::Superseded { .. }), Claim::Acquired(_)) => {}
        _ => return Err(Stop(format!("the completion is answered with {completed:?}, the next claim with {claim:?}"))),
    }
    Ok(())
}

pub(super) async fn the_end_of_a_lease_ends_a_wait(bench: &Bench) -> Verdict {
    let _late = bench.acquire("k").await?;
    let waiting = super::waiting::wait_for(bench, "k");
    bench.pause().await;
    bench.expire_leases().await;
    let claim = super::waiting::ended(waiting).await?;
    let prior = |claim: &Claim<crate::Grant>| match claim {
        Claim::Acquired(grant) => grant.attempt.prior(),
        _ => None,
    };
    ensure_matches!(claim, claim if prior(claim) == Some(PriorAttempt::LeaseExpired), "the waiting claim");
    Ok(())
}

pub(super) async fn a_completion_and_a_takeover_never_both_win(bench: &Bench) -> Verdict {
    for round in 0..6 {
        let key = format!("k{round}");
        let late = bench.acquire(key.clone()).await?;
        bench.expire_leases().await;
        let (engine, other) = (bench.engine.clone(), key.clone());
        let takeover = tokio::spawn(async move { engine.claim(vec![other.into()]).await });
        if round % 2 == 1 {
            // On one thread the takeover comes first.
            tokio::task::yield_now().await;
        }
        let completed = bench.complete(&late, "r").await?;
        let claim = takeover.await.map_err(|error| Stop(format!("the claim panicked: {error}")))??.remove(0)?;
        match (&completed, &claim) {
            (Ok(()), Claim::Completed(_) | Claim::InProgress(_)) => {
                bench.completed(key).await?;
            }
            (Err(Error::Superseded { .. }), Claim::Acquired(_)) => {
                bench.in_progress(key).await?;
            }
            _ => return Err(Stop(format!("round {round}: completion {completed:?}, takeover {claim:?}"))),
        }
    }
    Ok(())
}
