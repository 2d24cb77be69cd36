//! Claims that wait for the holder of a key.

use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{Claim, Grant, Key, Result};
use tokio::time::{Instant, timeout_at};

use crate::acquire::Acquired;
use crate::core::{Core, poll_interval};
use crate::row::signed;
use crate::waiters::WaitSlot;

/// A key that is in progress: the answer, and the token of its holder.
pub(crate) struct Busy {
    pub(crate) in_progress: onlyonce_core::InProgress,
    pub(crate) token: u64,
}

/// Claims a key until it is not in progress, or the limit is reached.
pub(crate) async fn claim_wait<C, F>(
    core: &Arc<Core>,
    key: &Key<'static>,
    limit: Duration,
    claim: C,
) -> Result<Claim<Grant>>
where
    C: Fn(Key<'static>) -> F,
    F: Future<Output = Result<Acquired>>,
{
    let end = Instant::now().checked_add(limit);
    let mut slot: Option<WaitSlot> = None;
    loop {
        // Listens before it claims, so that it misses no announcement.
        let woken = slot.as_ref().and_then(WaitSlot::notify).map(|notify| {
            let mut notified = Box::pin(notify.notified());
            notified.as_mut().enable();
            notified
        });
        let busy = match claim(key.clone()).await? {
            Acquired::InProgress { in_progress, token, .. } => Busy { in_progress, token },
            other => return Ok(answer(other)),
        };
        let now = Instant::now();
        if end.is_some_and(|end| now >= end) {
            return Ok(Claim::InProgress(busy.in_progress));
        }
        let has_slot = slot.as_ref().is_some_and(|slot| slot.token() == busy.token);
        if !has_slot {
            drop(woken);
            // The first waiter of the process asks the holder's process for an announcement. Claims again afterwards: the lease may
            // have ended before.
            let new = core.waiters.wait_for(busy.token);
            let request = if core.has_session() { new.ask() } else { None };
            slot = Some(new);
            if let Some(request) = request {
                ask_for_announcement(core, key, busy.token).await?;
                request.done();
            }
            continue;
        }
        let free = busy.in_progress.retry_after.and_then(|left| now.checked_add(left));
        let poll = now.checked_add(poll_interval(core.has_session()));
        let wake = end.into_iter().chain(free).chain(poll).min();
        match (woken, wake) {
            // It claims again after both.
            (Some(woken), Some(wake)) => drop(timeout_at(wake, woken).await),
            (Some(woken), None) => woken.await,
            (None, _) => {}
        }
    }
}

/// Marks the row, so that the end of the lease is announced.
async fn ask_for_announcement(core: &Core, key: &Key<'_>, token: u64) -> Result<()> {
    let encoded = core.encode_stored(key)?;
    core.database.rows_read(&core.sql.wait, &[&encoded, &signed(token)]).await?;
    Ok(())
}

/// The answer to a claim.
pub(crate) fn answer(acquired: Acquired) -> Claim<Grant> {
    match acquired {
        Acquired::Taken(grant) => Claim::Acquired(grant),
        Acquired::Completed(completed) => Claim::Completed(completed),
        Acquired::InProgress { in_progress, .. } => Claim::InProgress(in_progress),
    }
}
