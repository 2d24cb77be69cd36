//! Futures that are dropped before they are done.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use super::bench::{Bench, Setup, Stop, Verdict, ensure, ensure_eq};
use crate::answer::Claim;
use crate::completion::Completion;
use crate::engine::{BoxFuture, Finish, Grant};

/// How often a future is polled at most before it is dropped.
const POLLS: usize = 4;
const LONG: Duration = Duration::from_secs(20);

pub(super) fn setup(setup: Setup) -> Setup {
    setup
}

/// Polls a future so often, with time for the engine in between. `None` if it is dropped before it is done.
async fn poll_times<T>(bench: &Bench, mut future: BoxFuture<'_, T>, polls: usize) -> Option<T> {
    for poll in 0..polls {
        if let Poll::Ready(output) = poll_once(&mut future).await {
            return Some(output);
        }
        if poll > 0 {
            bench.pause().await;
        }
    }
    None
}

async fn poll_once<T>(future: &mut Pin<Box<dyn Future<Output = T> + Send + '_>>) -> Poll<T> {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

/// Acquires a key that no live future or lease can hold. No attempt at it may have had an effect.
async fn acquire_freed(bench: &Bench, key: String) -> Verdict<Arc<Grant>> {
    match bench.engine.claim_wait(key.into(), LONG).await? {
        Claim::Acquired(grant) => {
            ensure!(!grant.attempt.may_have_happened(), "a dropped claim left a doubt: {:?}", grant.attempt);
            Ok(Arc::new(grant))
        }
        other => Err(Stop(format!("a dropped claim holds the key: {other:?}"))),
    }
}

pub(super) async fn a_claim_that_was_dropped_gives_its_lease_back(bench: &Bench) -> Verdict {
    for polls in 0..POLLS {
        let key = format!("k{polls}");
        let claims = poll_times(bench, bench.engine.claim(vec![key.clone().into()]), polls).await;
        // It was done: the lease is this check's.
        for claim in claims.into_iter().flatten().flatten() {
            if let Ok(Claim::Acquired(grant)) = claim {
                bench.release(&Arc::new(grant)).await??;
            }
        }
        acquire_freed(bench, key).await?;
    }
    Ok(())
}

pub(super) async fn a_waiting_claim_that_was_dropped_gives_its_lease_back(bench: &Bench) -> Verdict {
    for polls in 0..POLLS {
        for is_released_first in [true, false] {
            let key = format!("k{polls}{is_released_first}");
            let holder = bench.acquire(key.clone()).await?;
            let mut waiting = bench.engine.claim_wait(key.clone().into(), LONG);
            for _ in 0..polls {
                ensure!(poll_once(&mut waiting).await.is_pending(), "it acquired a leased key");
                bench.pause().await;
            }
            if is_released_first {
                bench.release(&holder).await??;
                drop(waiting);
            } else {
                drop(waiting);
                bench.release(&holder).await??;
            }
            acquire_freed(bench, key).await?;
        }
    }
    Ok(())
}

pub(super) async fn a_completion_that_was_dropped_happened_or_did_not(bench: &Bench) -> Verdict {
    for polls in 0..POLLS {
        let (key, partition) = (format!("k{polls}"), u32::try_from(polls).unwrap_or_default());
        let grant = bench.acquire(key.clone()).await?;
        let completion = Completion::new("r").offset("s", partition, 1);
        let leases = vec![(Arc::clone(&grant), Finish::Complete(completion))];
        poll_times(bench, bench.engine.finish(leases), polls).await;
        bench.abandon(&grant);
        bench.pause().await;
        let claim = bench.claim(key).await??;
        let offset = bench.engine.offset(b"s", partition).await?;
        let expected = matches!(claim, Claim::Completed(_)).then_some(1);
        ensure_eq!(offset, expected, "the offset after {polls} polls, where the claim is answered with {claim:?}");
        ensure!(polls > 0 || expected.is_none(), "a future that was never polled completed the key");
    }
    Ok(())
}
