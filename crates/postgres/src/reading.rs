//! Calls that change nothing: check, inspect, held, counts.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::machine::{
    self, Change, CompletedEntry, Decision, Entry, Event, KeyRequest, OwnWindow, PlainMoment, Policy, Processing, Step,
    step,
};
use onlyonce_core::{
    Answers, Completed, Error, FencingToken, HeldKey, InProgress, Key, KeyStatus, Result, StoredKey, Timestamp,
    TimestampError,
};
use tokio::time::Instant;

use crate::caller::Columns;
use crate::connection::{LostAnswers, nothing_written};
use crate::core::Core;
use crate::error::{Failure, unavailable};
use crate::row::{Read, Stored, unsigned};
use crate::stream_time::StreamTime;

/// What is stored about each key that has a row, by its encoded key.
pub(crate) type Found = HashMap<Vec<u8>, Read>;

pub(crate) fn decode(core: &Core, rows: &[impl Columns]) -> Result<Found, Failure> {
    let mut found = Found::new();
    for row in rows {
        let read = Read::decode(row, core.policy)?;
        match &read {
            Read::Inserted { key, .. } => drop(found.insert(key.clone(), read)),
            // A row that was there before is no answer about a key that was inserted.
            Read::Found { key, .. } => drop(found.entry(key.clone()).or_insert(read)),
            Read::Locked | Read::Failed(_) => {}
        }
    }
    Ok(found)
}

/// The rows whose result was not read: their keys and versions.
pub(crate) fn left_out(found: &Found) -> Vec<(Vec<u8>, i64)> {
    let of_row = |(key, read): (&Vec<u8>, &Read)| match read {
        Read::Found { stored, .. } if stored.is_result_left_out => Some((key.clone(), stored.version)),
        _ => None,
    };
    found.iter().filter_map(of_row).collect()
}

/// Adds a result that was not read with its row. `None`: the row has changed, and is as one that was not read.
pub(crate) fn set_result(found: &mut Found, key: &[u8], result: Option<Vec<u8>>) {
    let Some(result) = result else {
        found.remove(key);
        return;
    };
    if let Some(Read::Found { stored, .. }) = found.get_mut(key) {
        stored.set_result(result);
    }
}

/// As [`read`], with all results.
async fn read_with_results(core: &Core, keys: &[&[u8]]) -> Result<Found> {
    let begun = Instant::now();
    loop {
        let mut found = read(core, keys, &LostAnswers::default()).await.map_err(nothing_written)?;
        let mut has_changed = false;
        for (key, version) in left_out(&found) {
            let rows = core.database.rows_read(&core.sql.result, &[&key, &version]).await?;
            let result = rows.first().map(|row| row.try_get(0)).transpose().map_err(unavailable)?;
            has_changed |= result.is_none();
            set_result(&mut found, &key, result);
        }
        if !has_changed {
            return Ok(found);
        }
        if begun.elapsed() >= core.database.retry_for() {
            return Err(Error::Unavailable { source: CHANGED.into() });
        }
    }
}

/// The reason of a call that fails because its key changed during every try.
pub(crate) const CHANGED: &str = "other calls changed the key during every try: retry";

async fn read(core: &Core, keys: &[&[u8]], lost: &LostAnswers) -> Result<Found> {
    let rows = core.database.rows_of_call(lost, &core.sql.read, &[&keys, &core.worker()]).await?;
    decode(core, &rows).map_err(unavailable)
}

/// The row of a key and the store's time.
pub(crate) async fn read_one(
    core: &Core,
    key: &[u8],
    lost: &LostAnswers,
) -> Result<Option<(Box<Stored>, PlainMoment)>> {
    Ok(match read(core, &[key], lost).await?.remove(key) {
        Some(Read::Found { now, stored, .. }) => Some((stored, now)),
        _ => None,
    })
}

/// What a claim of each key would return.
pub(crate) async fn check(core: &Core, keys: &[Key<'static>]) -> Answers<KeyStatus> {
    let encoded = core.encode_all(keys)?;
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    core.wait_for_abandoned(&encoded).await;
    let stream = if core.policy.is_stream { Some(StreamTime::read(core).await?) } else { None };
    let encoded_keys: Vec<&[u8]> = encoded.iter().map(Vec::as_slice).collect();
    let found = read_with_results(core, &encoded_keys).await?;
    let check = |(key, encoded)| check_one(core, key, found.get(encoded), stream.as_ref());
    Ok(keys.iter().zip(&encoded).map(check).collect())
}

fn check_one(core: &Core, key: &Key<'_>, read: Option<&Read>, stream: Option<&StreamTime>) -> Result<KeyStatus> {
    let (stored, mut now) = match read {
        Some(Read::Found { now, stored, .. }) => (Some(&stored.entry), *now),
        _ => (None, PlainMoment::default()),
    };
    if let (Some(stream), Some(at)) = (stream, key.timestamp()) {
        now.time_ms = stream.preview(at).map_err(|error| error.about(key))?.as_unix_ms();
    }
    match machine::decide(stored, key_request(key), now, core.policy) {
        Decision::Available(_) => Ok(KeyStatus::New),
        Decision::InProgress { retry_after_ms, attempt } => {
            Ok(KeyStatus::InProgress(InProgress::new(retry_after_ms.map(Duration::from_millis), attempt)))
        }
        Decision::Completed(done) => Ok(KeyStatus::Completed(completed(done, core.policy.window_ms))),
        Decision::PayloadMismatch => Err(Error::PayloadMismatch { key: key.to_string() }),
        Decision::TooOld => Err(too_old(core, key, now)),
    }
}

/// What a call says about a key.
pub(crate) fn key_request<'a>(key: &'a Key<'_>) -> KeyRequest<'a> {
    KeyRequest {
        payload: key.payload_fingerprint(),
        at_ms: key.timestamp().map(Timestamp::as_unix_ms),
        own_window: OwnWindow::new(key.own_window()),
    }
}

/// The entry of a claim that gets the key. `None` if it does not.
pub(crate) fn claimed(
    stored: Option<&Entry>,
    request: KeyRequest<'_>,
    (token, until_monotonic_ms): (u64, u64),
    now: PlainMoment,
    policy: Policy,
) -> Option<Processing> {
    let claim = machine::Claim { request, until_monotonic_ms };
    let Ok(Step { change, .. }) = step::<Arc<[u8]>, _, Infallible>(stored, claim, now, policy, || Ok(token));
    match change {
        Change::Immediate(Event::Claimed(processing)) => Some(processing),
        _ => None,
    }
}

/// The entry of a record that gets the key. `None` if it does not.
pub(crate) fn recorded(
    stored: Option<&Entry>,
    request: KeyRequest<'_>,
    token: u64,
    now: PlainMoment,
    policy: Policy,
) -> Option<CompletedEntry> {
    let record = machine::Record { request };
    let Ok(Step { change, .. }) = step::<Arc<[u8]>, _, Infallible>(stored, record, now, policy, || Ok(token));
    match change {
        Change::OnceWritten { event: Event::Completed(done), .. } => Some(done),
        _ => None,
    }
}

/// The error of a message about which nothing is stored, and whose key would have expired.
pub(crate) fn too_old(core: &Core, key: &Key<'_>, now: PlainMoment) -> Error {
    let window_ms = OwnWindow::new(key.own_window()).within(core.policy.window_ms);
    // The first millisecond that a window from it on reaches beyond now.
    let remembers_since = Timestamp::from_unix_ms(now.time_ms.saturating_sub(window_ms).saturating_add(1));
    TimestampError::TooOld { key: key.to_string(), at: key.timestamp().unwrap_or_default(), remembers_since }.into()
}

/// The answer about a completed key.
pub(crate) fn completed(done: &machine::CompletedEntry, window_ms: u64) -> Completed {
    let until_ms = done.completed_ms.saturating_add(done.own_window.within(window_ms));
    Completed::new(
        done.result.clone(),
        FencingToken::new(done.token),
        Timestamp::from_unix_ms(done.completed_ms),
        Timestamp::from_unix_ms(until_ms),
    )
}

/// Everything that is stored about a key.
pub(crate) async fn inspect(core: &Core, key: &Key<'_>) -> Result<Option<StoredKey>> {
    let encoded = core.encode_when_written(key).await?;
    let found = read_with_results(core, &[encoded.as_slice()]).await?.remove(&encoded);
    let Some(Read::Found { now, stored, .. }) = found else { return Ok(None) };
    let counts = machine::counts(&stored.entry, now, core.policy);
    Ok(counts.then(|| match &stored.entry {
        Entry::Completed(done) => StoredKey::Completed(completed(done, core.policy.window_ms)),
        Entry::Processing(processing) => StoredKey::processing(
            FencingToken::new(processing.token),
            processing.attempt,
            machine::lease_state(processing, now, core.policy).into(),
        ),
    }))
}

/// The keys that are held for resolution, the oldest claim first.
pub(crate) async fn held(core: &Core) -> Result<Vec<HeldKey>> {
    if !core.options.holds() {
        return Ok(Vec::new());
    }
    let rows = core.database.rows_read(&core.sql.held, &[&core.worker()]).await?;
    let rows = rows.iter().map(|row| Read::decode(row, core.policy));
    let rows = rows.collect::<Result<Vec<_>, _>>().map_err(unavailable)?;
    let held = rows.into_iter().filter_map(|row| {
        let Read::Found { key, now, stored } = row else { return None };
        let (processing, prior) = machine::held(Some(&stored.entry), now, core.policy)?;
        let (token, since) = (FencingToken::new(processing.token), Timestamp::from_unix_ms(processing.since_ms));
        Some(HeldKey::new(Key::decode(&key)?, token, processing.attempt, prior, since))
    });
    Ok(held.collect())
}

/// Counts the held keys, up to the limit.
pub(crate) async fn count_held(core: &Core) -> Result<u64> {
    if !core.options.holds() {
        return Ok(0);
    }
    let limit = i64::try_from(core.options.held_limit).unwrap_or(i64::MAX);
    let rows = core.database.rows_read(&core.sql.count_held, &[&core.worker(), &limit]).await?;
    rows.first().map_or(Ok(0), |row| row.try_get(0).map(unsigned)).map_err(unavailable)
}
