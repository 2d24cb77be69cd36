use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches, ensure_superseded};
use crate::answer::KeyStatus;
use crate::error::Error;

pub(super) fn setup(setup: Setup) -> Setup {
    setup.short_lease()
}

pub(super) async fn a_forgotten_key_is_new(bench: &Bench) -> Verdict {
    ensure!(!bench.engine.forget("absent".into()).await?, "there was something about an absent key");
    let completed = bench.acquire("completed").await?;
    bench.complete(&completed, "r").await??;
    bench.record("recorded").await??;
    let released = bench.acquire("released").await?;
    bench.release(&released).await??;
    for key in ["completed", "recorded", "released"] {
        ensure!(bench.engine.forget(key.into()).await?, "there was nothing about {key}");
        ensure!(!bench.engine.forget(key.into()).await?, "{key} is forgotten twice");
        ensure_eq!(bench.check(key).await??, KeyStatus::New, "a check of {key}");
        bench.acquire_as(key, 1, None).await?;
    }
    Ok(())
}

pub(super) async fn a_leased_key_is_not_forgotten(bench: &Bench) -> Verdict {
    let grant = bench.acquire("k").await?;
    let rejected = bench.engine.forget("k".into()).await;
    ensure_matches!(rejected, Err(Error::InUse { token, .. }) if *token == grant.token(), "the forget");
    bench.complete(&grant, "r").await??;
    ensure!(bench.engine.forget("k".into()).await?, "there was nothing after the completion");
    Ok(())
}

pub(super) async fn the_holder_of_a_forgotten_key_is_superseded(bench: &Bench) -> Verdict {
    let late = bench.acquire("k").await?;
    bench.expire_leases().await;
    ensure!(bench.engine.forget("k".into()).await?, "there was nothing");
    ensure_superseded(&bench.complete(&late, "late").await?, &late, "a completion")?;
    bench.acquire_as("k", 1, None).await?;
    ensure_superseded(&bench.complete(&late, "late").await?, &late, "a completion after the next claim")
}
