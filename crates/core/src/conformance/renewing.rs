use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use super::bench::{Bench, Setup, Stop, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::Resolution;
use crate::attempt::PriorAttempt;
use crate::engine::{Grant, KeepAlive};
use crate::error::Error;

pub(super) fn setup(setup: Setup) -> Setup {
    Setup { lease: setup.unit * 12, ..setup }
}

pub(super) async fn a_renewed_lease_starts_again(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    for _ in 0..2 {
        bench.advance(bench.setup.lease * 2 / 3).await;
        bench.renew(&grant).await??;
    }
    bench.advance(bench.setup.lease / 3).await;
    ensure!(bench.in_progress("k").await?.retry_after.is_some(), "the lease ended");
    Ok(())
}

pub(super) async fn an_expired_lease_is_renewed_if_no_claim_came_first(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.expire_leases().await;
    bench.renew(&grant).await??;
    ensure!(bench.in_progress("k").await?.retry_after.is_some(), "the lease did not start again");
    ensure!(bench.engine.held().await?.is_empty(), "the key is held");
    Ok(())
}

pub(super) async fn a_dropped_lease_is_not_renewed(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    bench.abandon(&grant);
    ensure_superseded(&bench.renew(&grant).await?, &grant, "the renewal")?;
    if bench.holds() {
        ensure_eq!(bench.in_progress("k").await?.retry_after, None, "when to claim again");
        bench.engine.resolve("k".into(), Resolution::Rerun).await?;
    }
    bench.acquire_as("k", 2, Some(PriorAttempt::Dropped)).await?;
    Ok(())
}

pub(super) async fn a_batch_of_renewals_answers_for_each_lease(bench: &Bench) -> Verdict {
    let (a, b, c) = (bench.acquire("a").await?, bench.acquire("b").await?, bench.acquire("c").await?);
    bench.abandon(&b);
    let answers = bench.engine.renew(vec![Arc::clone(&a), Arc::clone(&b), c]).await?;
    ensure_matches!(answers[..], [Ok(()), Err(Error::Superseded { .. }), Ok(())], "the answers");
    Ok(())
}

/// Passes several leases' time, during which the engine can renew.
async fn pass_leases(bench: &Bench) {
    for _ in 0..4 {
        bench.advance(bench.setup.lease / 2).await;
        tokio::time::sleep(bench.setup.lease / 2).await;
    }
}

pub(super) async fn a_kept_lease_does_not_expire(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let kept = bench.engine.keep_alive(&grant);
    pass_leases(bench).await;
    ensure!(bench.in_progress("k").await?.retry_after.is_some(), "the lease ended");
    drop(kept);
    ensure!(bench.in_progress("k").await?.retry_after.is_some(), "the lease ended with its renewal");
    bench.complete(&grant, "r").await??;
    Ok(())
}

pub(super) async fn a_lease_expires_after_its_renewal_ended(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let kept = bench.engine.keep_alive(&grant);
    pass_leases(bench).await;
    drop(kept);
    bench.expire_leases().await;
    bench.acquire_as("k", 2, Some(PriorAttempt::LeaseExpired)).await?;
    Ok(())
}

async fn ensure_lost(bench: &Bench, kept: &mut dyn KeepAlive, grant: &Grant) -> Verdict {
    let limit = bench.setup.lease * 10;
    let lost = tokio::time::timeout(limit, kept.lost()).await;
    let error = lost.map_err(|_| Stop(format!("the loss is not reported within {limit:?}")))?;
    ensure_superseded(&Err::<(), _>(error), grant, "the loss")
}

pub(super) async fn a_lease_that_was_taken_over_is_lost(bench: &Bench) -> Verdict {
    let late = bench.acquire("k").await?;
    bench.expire_leases().await;
    let second = bench.acquire("k").await?;
    let mut kept = bench.engine.keep_alive(&late);
    ensure_lost(bench, kept.as_mut(), &late).await?;
    ensure_lost(bench, kept.as_mut(), &late).await?;
    bench.complete(&second, "r").await??;
    Ok(())
}

pub(super) async fn a_kept_lease_is_lost_when_it_was_dropped(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let mut kept = bench.engine.keep_alive(&grant);
    bench.abandon(&grant);
    if !bench.holds() {
        bench.acquire_as("k", 2, Some(PriorAttempt::Dropped)).await?;
    }
    ensure_lost(bench, kept.as_mut(), &grant).await
}

pub(super) async fn a_renewal_that_is_not_lost_is_pending(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let mut kept = bench.engine.keep_alive(&grant);
    let mut lost = kept.lost();
    let polled = poll_fn(|context| Poll::Ready(lost.as_mut().poll(context))).await;
    ensure_matches!(polled, Poll::Pending, "a lease that is held");
    Ok(())
}
