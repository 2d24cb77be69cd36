//! Calls that race. They run in parallel on a runtime with several threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;

use super::bench::{Bench, Setup, Stop, Verdict, ensure, ensure_eq};
use crate::answer::{Claim, RecordOutcome};
use crate::engine::{Finish, Release};
use crate::error::Result;
use crate::key::Key;

const ROUNDS: usize = 20;
const TASKS: usize = 6;

pub(super) fn setup(setup: Setup) -> Setup {
    setup
}

/// The outputs of all tasks.
async fn join<T: 'static>(mut tasks: JoinSet<Result<T>>) -> Verdict<Vec<T>> {
    let mut outputs = Vec::new();
    while let Some(output) = tasks.join_next().await {
        outputs.push(output.map_err(|error| Stop(format!("a task panicked: {error}")))??);
    }
    Ok(outputs)
}

pub(super) async fn one_of_racing_claims_acquires_the_key(bench: &Bench) -> Verdict {
    for round in 0..ROUNDS {
        let mut tasks = JoinSet::new();
        for _ in 0..TASKS {
            let engine = Arc::clone(&bench.engine);
            let key = Key::from(format!("k{round}"));
            tasks.spawn(async move { engine.claim(vec![key]).await?.remove(0) });
        }
        let claims = join(tasks).await?;
        let acquired = claims.iter().filter(|claim| matches!(claim, Claim::Acquired(_))).count();
        let in_progress = claims.iter().filter(|claim| matches!(claim, Claim::InProgress(_))).count();
        ensure_eq!((acquired, in_progress), (1, TASKS - 1), "leases and rejections in round {round}");
    }
    Ok(())
}

pub(super) async fn racing_batches_record_each_key_once(bench: &Bench) -> Verdict {
    const KEYS: usize = 10;
    for round in 0..ROUNDS {
        let mut tasks = JoinSet::new();
        for task in 0..TASKS {
            let engine = Arc::clone(&bench.engine);
            // Each begins at another key, so that their orders differ.
            let keys = (0..KEYS).map(|i| Key::from(format!("{round}-{}", (i + task) % KEYS))).collect();
            tasks.spawn(async move { engine.record(keys).await });
        }
        let answers = join(tasks).await?.into_iter().flatten();
        let first = answers.filter(|answer| matches!(answer, Ok(RecordOutcome::First))).count();
        ensure_eq!(first, KEYS, "the number of keys that were recorded first in round {round}");
    }
    Ok(())
}

pub(super) async fn racing_waiters_hold_the_key_one_after_the_other(bench: &Bench) -> Verdict {
    let holders = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (engine, holders) = (Arc::clone(&bench.engine), Arc::clone(&holders));
        tasks.spawn(async move {
            let claim = engine.claim_wait("k".into(), Duration::from_secs(60)).await?;
            let Claim::Acquired(grant) = claim else { return Ok(None) };
            let others = holders.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(1)).await;
            holders.fetch_sub(1, Ordering::SeqCst);
            let number = grant.attempt.number();
            engine.finish(vec![(Arc::new(grant), Finish::Release(Release::default()))]).await.remove(0)?;
            Ok(Some((others, number)))
        });
    }
    let mut turns = join(tasks).await?;
    ensure!(turns.iter().flatten().all(|(others, _)| *others == 0), "two tasks held the key at the same time");
    turns.sort_unstable();
    let numbers: Vec<_> = turns.iter().flatten().map(|(_, number)| *number as usize).collect();
    ensure_eq!(numbers, (1..=TASKS).collect::<Vec<_>>(), "the attempts");
    Ok(())
}
