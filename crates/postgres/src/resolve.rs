//! Decisions of operators: resolve and forget. Each reads the row, decides, and changes it if it has not changed meanwhile.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::machine::{self, Forget, Forgotten, Step, step};
use onlyonce_core::{Error, FencingToken, Key, PriorAttempt, Resolution, Result, StoredResult};
use tokio::time::{Instant, sleep};
use tokio_postgres::types::ToSql;

use crate::connection::LostAnswers;
use crate::core::Core;
use crate::reading::{CHANGED, read_one};
use crate::row::{encode_prior, signed};
use crate::sql::state;

/// Decides about a held key.
pub(crate) async fn resolve(core: &Core, key: &Key<'_>, resolution: Resolution) -> Result<()> {
    let encoded = core.encode_when_written(key).await?;
    let (call, begun, lost) = (core.next_call(), Instant::now(), LostAnswers::default());
    let (state, result, takes_token) = match resolution {
        Resolution::Rerun => (state::RESOLVED, None, false),
        // With a token of its own, so that the old holder's late completion fails.
        Resolution::Completed(result) => match StoredResult::within(&result, core.options.result_limit) {
            StoredResult::TooLarge => (state::COMPLETED_TOO_LARGE, None, true),
            StoredResult::None | StoredResult::Bytes(_) => (state::COMPLETED, Some(result), true),
        },
    };
    loop {
        let not_held = || Error::NotHeld { key: key.to_string() };
        let (stored, now) = read_one(core, &encoded, &lost).await?.ok_or_else(not_held)?;
        if stored.call == call {
            // An earlier try has written the row, and its answer was lost.
            return Ok(());
        }
        let (processing, prior) = machine::held(Some(&stored.entry), now, core.policy).ok_or_else(not_held)?;
        let time_ms = core.policy.next_time_ms(processing.since_ms, now);
        let (version, token, result) = (stored.version, processing.token, result.as_deref());
        let change = Change { version, token, call, state, time_ms, result, takes_token, prior };
        if write(core, &encoded, change, &lost).await? {
            core.waiters.wake(token);
            return Ok(());
        }
        pause(core, begun, &lost).await?;
    }
}

struct Change<'a> {
    version: i64,
    /// The token of the holder, for which other claims wait.
    token: u64,
    call: i64,
    state: i16,
    time_ms: u64,
    result: Option<&'a [u8]>,
    takes_token: bool,
    prior: PriorAttempt,
}

/// Returns whether the row had not changed.
async fn write(core: &Core, key: &[u8], change: Change<'_>, lost: &LostAnswers) -> Result<bool> {
    let Change { version, call, state, result, takes_token, .. } = change;
    let (time_ms, prior, token) = (signed(change.time_ms), encode_prior(Some(change.prior)), signed(change.token));
    let params: [&(dyn ToSql + Sync); 9] =
        [&key, &version, &call, &state, &time_ms, &result, &takes_token, &prior, &token];
    Ok(!core.database.rows_of_call(lost, &core.sql.resolve, &params).await?.is_empty())
}

/// Removes everything that is stored about a key.
pub(crate) async fn forget(core: &Core, key: &Key<'_>) -> Result<bool> {
    let encoded = core.encode_when_written(key).await?;
    let (begun, lost) = (Instant::now(), LostAnswers::default());
    // True if a deletion may have happened whose answer was lost.
    let mut may_be_deleted = false;
    loop {
        let Some((stored, now)) = read_one(core, &encoded, &lost).await? else { return Ok(may_be_deleted) };
        let forget = step::<Arc<[u8]>, _, Infallible>(Some(&stored.entry), Forget, now, core.policy, || Ok(0));
        let Ok(Step { answer, .. }) = forget;
        let counts = match answer {
            Forgotten::Removed { counted } => counted,
            Forgotten::InUse { token } => {
                return Err(Error::InUse { key: key.to_string(), token: FencingToken::new(token) });
            }
            Forgotten::Undecided { token } => {
                return Err(Error::Undecided { key: key.to_string(), token: FencingToken::new(token) });
            }
        };
        if delete(core, &encoded, stored.version, &lost).await? {
            return Ok(counts);
        }
        may_be_deleted |= counts;
        pause(core, begun, &lost).await?;
    }
}

async fn delete(core: &Core, key: &[u8], version: i64, lost: &LostAnswers) -> Result<bool> {
    Ok(!core.database.rows_of_call(lost, &core.sql.forget, &[&key, &version]).await?.is_empty())
}

/// Waits before the next try.
async fn pause(core: &Core, begun: Instant, lost: &LostAnswers) -> Result<()> {
    if begun.elapsed() >= core.database.retry_for() {
        return Err(lost.failed(CHANGED.into()));
    }
    sleep(Duration::from_millis(2)).await;
    Ok(())
}
