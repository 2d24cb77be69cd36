use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::bench::{Bench, Setup, Stop, Verdict, ensure, ensure_eq, ensure_matches};
use crate::answer::Claim;
use crate::attempt::PriorAttempt;
use crate::engine::{Finish, Grant, Release};
use crate::error::Result;

/// The limit of waits that end before it.
const LONG: Duration = Duration::from_secs(60);

pub(super) fn setup(setup: Setup) -> Setup {
    setup
}

/// A claim that waits in a task of its own.
pub(super) fn wait_for(bench: &Bench, key: &'static str) -> JoinHandle<Result<Claim<Grant>>> {
    let engine = Arc::clone(&bench.engine);
    tokio::spawn(async move { engine.claim_wait(key.into(), LONG).await })
}

/// The answer of a waiting claim that must end before its limit.
pub(super) async fn ended(waiting: JoinHandle<Result<Claim<Grant>>>) -> Verdict<Claim<Grant>> {
    match tokio::time::timeout(LONG / 2, waiting).await {
        Ok(Ok(answer)) => Ok(answer?),
        Ok(Err(error)) => Err(Stop(format!("the waiting claim panicked: {error}"))),
        Err(_) => Err(Stop("the waiting claim does not end".to_owned())),
    }
}

fn attempt(claim: &Claim<Grant>) -> Option<(u32, Option<PriorAttempt>)> {
    match claim {
        Claim::Acquired(grant) => Some((grant.attempt.number(), grant.attempt.prior())),
        _ => None,
    }
}

pub(super) async fn a_limit_of_zero_does_not_wait(bench: &Bench) -> Verdict {
    let acquired = bench.engine.claim_wait("k".into(), Duration::ZERO).await?;
    ensure_eq!(attempt(&acquired), Some((1, None)), "the attempt at a new key");
    let begun = Instant::now();
    let answer = bench.engine.claim_wait("k".into(), Duration::ZERO).await?;
    ensure_matches!(answer, Claim::InProgress(_), "the answer about a leased key");
    ensure!(begun.elapsed() < LONG / 2, "it waited");
    bench.record("completed").await??;
    let completed = bench.engine.claim_wait("completed".into(), LONG).await?;
    ensure_matches!(completed, Claim::Completed(_), "the answer about a completed key");
    Ok(())
}

pub(super) async fn a_wait_ends_at_its_limit(bench: &Bench) -> Verdict {
    let _leased = bench.acquire("k").await?;
    let (begun, limit) = (Instant::now(), bench.unit() * 2);
    let answer = bench.engine.claim_wait("k".into(), limit).await?;
    ensure_matches!(answer, Claim::InProgress(it) if it.retry_after.is_some(), "the answer");
    ensure!(begun.elapsed() >= limit, "it did not wait until its limit");
    ensure!(begun.elapsed() < LONG / 2, "it waited for longer");
    Ok(())
}

pub(super) async fn a_completion_ends_a_wait(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let waiting = [wait_for(bench, "k"), wait_for(bench, "k")];
    bench.pause().await;
    bench.complete(&grant, "r").await??;
    for waiting in waiting {
        let answer = ended(waiting).await?;
        ensure_matches!(answer, Claim::Completed(it) if it.result() == Some(b"r"), "the answer");
    }
    Ok(())
}

pub(super) async fn a_release_ends_a_wait(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let waiting = wait_for(bench, "k");
    bench.pause().await;
    bench.release(&grant).await??;
    ensure_eq!(attempt(&ended(waiting).await?), Some((2, Some(PriorAttempt::Released))), "the attempt");
    Ok(())
}

pub(super) async fn a_drop_ends_a_wait(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let waiting = wait_for(bench, "k");
    bench.pause().await;
    bench.abandon(&grant);
    ensure_eq!(attempt(&ended(waiting).await?), Some((2, Some(PriorAttempt::Dropped))), "the attempt");
    Ok(())
}

pub(super) async fn the_end_of_a_backoff_ends_a_wait(bench: &Bench) -> Verdict {
    let backoff = bench.unit() * 4;
    let grant = bench.acquire("k").await?;
    bench.finish(&grant, Finish::Release(Release::after(backoff))).await??;
    let waiting = wait_for(bench, "k");
    bench.advance(backoff + bench.unit()).await;
    ensure_eq!(attempt(&ended(waiting).await?), Some((2, Some(PriorAttempt::Released))), "the attempt");
    Ok(())
}
