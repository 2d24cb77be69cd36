//! Claims and records on stream time: the keys of a batch are decided one after the other, because each may advance the time of those
//! after it. The transaction locks stream time, and then the rows, so that nothing changes before it writes. It does not wait for a row
//! that another transaction has locked, because all other claims would wait with it: the key is in progress there.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::machine::{self, Decision, Entry, PlainMoment};
use onlyonce_core::{Error, InProgress, Result, Timestamp};
use tokio_postgres::types::ToSql;

use crate::acquire::{AcquireJob, Acquired, Admission, Facts, LOCKED_RETRY, deliver, repeated};
use crate::connection::LostAnswers;
use crate::core::Core;
use crate::error::Failure;
use crate::opening::Object;
use crate::queue::last_queued;
use crate::reading::{CHANGED, claimed, completed, decode, left_out, recorded, set_result, too_old};
use crate::row::{Read, Stored, encode_prior, signed, unsigned};
use crate::stream_time::StreamTime;
use crate::writing::{Item, Verb, encoded, written_as};

/// What is stored about a key, and what the batch has changed of it.
struct Current {
    entry: Entry,
    /// The item that an earlier try of this batch has written, by its number.
    call: i64,
    is_leased: bool,
    prior: Option<onlyonce_core::PriorAttempt>,
    /// Whether another transaction is changing the row.
    is_locked_elsewhere: bool,
    /// Whether the batch writes it.
    is_changed: bool,
}

/// Runs the calls of a batch.
pub(crate) async fn run_batch(core: Arc<Core>, verb: Verb, mut jobs: Vec<AcquireJob>) {
    let counts: Vec<usize> = jobs.iter().map(|job| job.items.len()).collect();
    let calls: Vec<Vec<Item>> = jobs.iter_mut().map(|job| std::mem::take(&mut job.items)).collect();
    let lost = LostAnswers::since(last_queued(&jobs));
    let calls: Vec<&[Item]> = calls.iter().map(Vec::as_slice).collect();
    let answers = acquire(&core, &lost, verb, &calls).await;
    deliver(&core, verb, jobs, counts, answers);
}

/// Acquires the keys of each call. The answers are in the order of the calls and their keys.
async fn acquire(core: &Core, lost: &LostAnswers, verb: Verb, calls: &[&[Item]]) -> Vec<Result<Acquired>> {
    let count = calls.iter().map(|call| call.len()).sum();
    match try_acquire(core, lost, verb, calls, count).await {
        Ok(answers) => answers,
        Err(error) => vec_of_errors(&error, count),
    }
}

fn vec_of_errors(error: &Error, count: usize) -> Vec<Result<Acquired>> {
    (0..count).map(|_| Err(error.clone())).collect()
}

async fn try_acquire(
    core: &Core,
    lost: &LostAnswers,
    verb: Verb,
    calls: &[&[Item]],
    count: usize,
) -> Result<Vec<Result<Acquired>>> {
    let admission = Admission::of(core, verb, count).await?;
    let of_transaction = &admission;
    let answers = core
        .database
        .run_of_call(lost, move |connection, _| Box::pin(run(core, connection, verb, calls, count, of_transaction)))
        .await;
    admission.end(verb, answers.as_deref().unwrap_or_default());
    answers
}

/// One transaction.
async fn run(
    core: &Core,
    connection: &mut Object,
    verb: Verb,
    calls: &[&[Item]],
    count: usize,
    admission: &Admission<'_>,
) -> Result<Vec<Result<Acquired>>, Failure> {
    // No lease of the transaction is older than this.
    let begun_ms = core.monotonic_ms();
    let sql = &core.sql;
    let (lock, set) = (
        connection.prepare_cached(&sql.lock_stream_time).await?,
        connection.prepare_cached(&sql.set_stream_time).await?,
    );
    let (lock_rows, read, write) = (
        connection.prepare_cached(&sql.lock).await?,
        connection.prepare_cached(&sql.read).await?,
        connection.prepare_cached(&sql.write).await?,
    );
    let (take_tokens, read_result) =
        (connection.prepare_cached(&sql.take_tokens).await?, connection.prepare_cached(&sql.result).await?);
    let transaction = connection.transaction().await?;
    let before = StreamTime::decode(core, &transaction.query_one(&lock, &[]).await?)?;
    let items: Vec<&Item> = calls.iter().flat_map(|call| call.iter()).collect();
    let keys = encoded(&items);
    let rows = transaction.query(&lock_rows, &[&keys]).await?;
    let locked = rows.iter().map(|row| row.try_get(0)).collect::<Result<HashSet<Vec<u8>>, _>>()?;
    // In a statement of its own, which sees the changes until the rows were locked.
    let rows = transaction.query(&read, &[&keys, &core.worker()]).await?;
    let mut found = decode(core, &rows)?;
    if verb == Verb::Claim {
        for (key, version) in left_out(&found) {
            let row = transaction.query_opt(&read_result, &[&key, &version]).await?;
            let Some(row) = row else { return Err(Failure::NotDone(CHANGED.into())) };
            set_result(&mut found, &key, Some(row.try_get(0)?));
        }
    }
    let mut current: HashMap<Vec<u8>, Current> = HashMap::new();
    for (key, read) in found {
        if let Read::Found { stored, .. } = read {
            let (is_locked_elsewhere, is_changed) = (!locked.contains(&key), false);
            let Stored { entry, call, is_leased, prior, .. } = *stored;
            current.insert(key, Current { entry, call, is_leased, prior, is_locked_elsewhere, is_changed });
        }
    }
    let rows = transaction.query(&take_tokens, &[&i64::try_from(count).unwrap_or(i64::MAX)]).await?;
    let mut tokens = Vec::new();
    let mut monotonic_ms = 0;
    for row in &rows {
        tokens.push(unsigned(row.try_get(0)?));
        monotonic_ms = unsigned(row.try_get(1)?);
    }
    // The lowest first.
    tokens.reverse();
    let mut batch = Batch { core, verb, stream: before, begun_ms, monotonic_ms, room: admission.room, tokens, current };
    let mut answers = Vec::new();
    for call in calls {
        let times: Vec<Timestamp> = call.iter().filter_map(|item| item.key.timestamp()).collect();
        for (index, item) in call.iter().enumerate() {
            answers.push(batch.decide(item, times.get(index + 1..).unwrap_or_default(), admission));
        }
    }
    if batch.stream != before {
        transaction.execute(&set, &[&batch.stream.now_ms(), &batch.stream.rejected_ms()]).await?;
    }
    write_changed(&transaction, &write, &batch).await?;
    transaction.commit().await?;
    Ok(answers)
}

struct Batch<'a> {
    core: &'a Core,
    verb: Verb,
    stream: StreamTime,
    begun_ms: u64,
    monotonic_ms: u64,
    room: usize,
    tokens: Vec<u64>,
    current: HashMap<Vec<u8>, Current>,
}

impl Batch<'_> {
    fn decide(&mut self, item: &Item, later: &[Timestamp], admission: &Admission<'_>) -> Result<Acquired> {
        let at = item.key.timestamp().unwrap_or_default();
        let time = self.stream.advance(at, later).map_err(|error| error.about(&item.key))?;
        let now = PlainMoment { time_ms: time.as_unix_ms(), monotonic_ms: self.monotonic_ms };
        let current = self.current.get(&item.encoded);
        if let Some(repeated) = current.and_then(|current| self.repeated(current, item)) {
            return Ok(repeated);
        }
        let stored = current.map(|current| &current.entry);
        let available = match machine::decide(stored, item.request(), now, self.core.policy) {
            Decision::Available(available) => available,
            Decision::InProgress { retry_after_ms, attempt } => {
                let retry_after = retry_after_ms.map(Duration::from_millis);
                let token = stored.map(Entry::token).unwrap_or_default();
                let in_progress = InProgress::new(retry_after, attempt);
                return Ok(Acquired::InProgress { in_progress, token, is_locked: false });
            }
            Decision::Completed(done) => return Ok(Acquired::Completed(completed(done, self.core.policy.window_ms))),
            Decision::PayloadMismatch => return Err(Error::PayloadMismatch { key: item.key.to_string() }),
            Decision::TooOld => return Err(too_old(self.core, &item.key, now)),
        };
        if let Some(locked) = current.filter(|current| current.is_locked_elsewhere) {
            let attempt = match &locked.entry {
                Entry::Processing(processing) => processing.attempt,
                Entry::Completed(_) => 1,
            };
            let in_progress = InProgress::new(Some(LOCKED_RETRY), attempt);
            return Ok(Acquired::InProgress { in_progress, token: locked.entry.token(), is_locked: true });
        }
        let Some(room) = self.room.checked_sub(1) else { return Err(admission.rejection.clone()) };
        let token = self.tokens.pop().ok_or_else(|| Error::Unavailable {
            source: "the sequence `tokens` of the store gave fewer tokens than keys: retry".into(),
        })?;
        self.room = room;
        let until_ms = now.monotonic_ms.saturating_add(self.core.options.lease_ms());
        let lease = (token, until_ms);
        let leased = claimed(stored, item.request(), lease, now, self.core.policy).ok_or_else(|| busy(item))?;
        let facts = Facts {
            token,
            attempt: leased.attempt,
            prior: available.prior,
            fingerprint: leased.fingerprint,
            time_ms: leased.since_ms,
        };
        let entry = match self.verb {
            Verb::Claim => Entry::Processing(leased),
            Verb::Record => {
                let done = recorded(stored, item.request(), token, now, self.core.policy);
                Entry::Completed(done.ok_or_else(|| busy(item))?)
            }
        };
        let is_leased = self.verb == Verb::Claim;
        let (prior, is_locked_elsewhere, is_changed) = (available.prior, false, true);
        let next = Current { entry, call: item.call, is_leased, prior, is_locked_elsewhere, is_changed };
        self.current.insert(item.encoded.clone(), next);
        Ok(facts.taken(item, self.begun_ms))
    }

    /// The answer if an earlier try of this batch has written the row, and its answer was lost.
    fn repeated(&self, current: &Current, item: &Item) -> Option<Acquired> {
        if current.call != item.call || current.is_changed {
            return None;
        }
        repeated(self.verb, item, &current.entry, current.is_leased, current.prior)
    }
}

/// The state machine decided in two ways about one key, which it does not.
fn busy(item: &Item) -> Error {
    Error::Unavailable {
        source: format!("key {} was available to one rule and not to another: report it", item.key).into(),
    }
}

/// Writes the rows that the batch has changed.
async fn write_changed(
    transaction: &tokio_postgres::Transaction<'_>,
    write: &tokio_postgres::Statement,
    batch: &Batch<'_>,
) -> Result<(), Failure> {
    let changed: Vec<(&Vec<u8>, &Current)> = batch.current.iter().filter(|(_, current)| current.is_changed).collect();
    if changed.is_empty() {
        return Ok(());
    }
    let keys: Vec<&[u8]> = changed.iter().map(|(key, _)| key.as_slice()).collect();
    let tokens: Vec<i64> = changed.iter().map(|(_, current)| signed(current.entry.token())).collect();
    let calls: Vec<i64> = changed.iter().map(|(_, current)| current.call).collect();
    let times: Vec<i64> = changed.iter().map(|(_, current)| signed(current.entry.time_ms())).collect();
    let of_entry = |current: &Current| match &current.entry {
        Entry::Processing(leased) => (leased.own_window, leased.attempt, leased.fingerprint),
        Entry::Completed(done) => (done.own_window, 1, done.fingerprint),
    };
    let windows: Vec<Option<i64>> = changed.iter().map(|(_, current)| of_entry(current).0.ms().map(signed)).collect();
    let attempts: Vec<i32> =
        changed.iter().map(|(_, current)| i32::try_from(of_entry(current).1).unwrap_or(i32::MAX)).collect();
    let priors: Vec<i16> = changed.iter().map(|(_, current)| encode_prior(current.prior)).collect();
    let fingerprints: Vec<Option<Vec<u8>>> =
        changed.iter().map(|(_, current)| of_entry(current).2.map(|bytes| bytes.to_vec())).collect();
    let (state, lease_ms, worker) = written_as(batch.core, batch.verb);
    let params: [&(dyn ToSql + Sync); 11] =
        [&keys, &tokens, &calls, &times, &windows, &attempts, &priors, &fingerprints, &state, &lease_ms, &worker];
    transaction.execute(write, &params).await?;
    Ok(())
}
