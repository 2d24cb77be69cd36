//! Claims that are awaited.

use std::sync::Arc;
use std::time::{Duration, Instant};

use onlyonce_core::{Claim as AnyClaim, Result};

use super::operations::{next_claim, only};
use super::shared::Shared;
use super::{Claim, claimed};
use crate::engine::request::Request;
use crate::engine::response::Grant;

pub(super) async fn claim_one(shared: &Arc<Shared>, request: &Arc<Request>) -> Result<Claim> {
    Ok(claimed(grant_one(shared, request).await?, shared))
}

pub(super) async fn claim_waiting(shared: &Arc<Shared>, request: &Arc<Request>, limit: Duration) -> Result<Claim> {
    Ok(claimed(grant_waiting(shared, request, limit).await?, shared))
}

async fn grant_one(shared: &Arc<Shared>, request: &Arc<Request>) -> Result<AnyClaim<Grant>> {
    only(shared.committer()?.claim(Arc::clone(request)).await?.take())?
}

/// Claims one key. If it is in progress, waits up to `limit` for its holder, its lease or its backoff.
pub(super) async fn grant_waiting(
    shared: &Arc<Shared>,
    request: &Arc<Request>,
    limit: Duration,
) -> Result<AnyClaim<Grant>> {
    let end = now().checked_add(limit);
    let mut waiter = None;
    loop {
        let answer = grant_one(shared, request).await?;
        let AnyClaim::InProgress(other) = &answer else { return Ok(answer) };
        if end.is_some_and(|end| end <= now()) {
            return Ok(answer);
        }
        if let Some(waiter) = waiter.take() {
            match next_claim(end, other.retry_after, now()) {
                None => waiter.await,
                Some(until) => drop(tokio::time::timeout_at(until.into(), waiter).await),
            }
        }
        // Registered before the next claim: a holder that finishes from here on wakes this task.
        waiter = request.digests().next().map(|digest| shared.engine().wait_for(digest));
    }
}

/// Now, on the clock of Tokio's timers.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
