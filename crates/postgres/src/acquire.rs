//! Claims and records: what makes an absent or free key a leased or completed one.
//!
//! A round inserts the keys that are absent, in one statement, which also returns the rows that were there before. The state
//! machine decides about these. Rows whose key is available are replaced in a second statement, if they have not changed
//! meanwhile. A key that changed is read again in the next round. No key waits for a transaction that another key waits for: a key whose
//! row another transaction has locked is in progress.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::machine::{self, Available, Decision, Entry, PlainMoment, Processing};
use onlyonce_core::{
    AttemptInfo, Completed, Error, FencingToken, Fingerprint, Grant, InProgress, PriorAttempt, Result, Timestamp,
};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use crate::caller::Columns;
use crate::connection::LostAnswers;
use crate::core::{AbandonReason, Core};
use crate::error::unavailable;
use crate::queue::{Job, last_queued};
use crate::reading::{self, claimed, completed};
use crate::row::{Read, Stored};
use crate::writing::{Item, Replacement, Verb, Via, insert, read, replace};

/// The answer about one key.
#[derive(Debug)]
pub(crate) enum Acquired {
    /// The claim acquired the key, or the record completed it.
    Taken(Grant),
    Completed(Completed),
    InProgress {
        in_progress: InProgress,
        /// The token of the holder. 0 if it is not known.
        token: u64,
        /// Whether the key is available, but for another transaction that has locked its row.
        is_locked: bool,
    },
}

/// How long a call waits for another transaction that has locked a row. Its other keys wait as long.
const LOCKED_LIMIT: Duration = Duration::from_millis(100);
/// When a claim of a key is worth a repetition whose row another transaction has locked.
pub(crate) const LOCKED_RETRY: Duration = Duration::from_millis(100);

/// The keys of one call, and where its answers go.
pub(crate) struct AcquireJob {
    pub(crate) items: Vec<Item>,
    pub(crate) answer: oneshot::Sender<Delivery>,
    pub(crate) queued: Instant,
}

impl Job for AcquireJob {
    fn items(&self) -> usize {
        self.items.len()
    }

    fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }

    fn queued(&self) -> Option<Instant> {
        Some(self.queued)
    }
}

/// Answers a call that waited too long for a batch.
pub(crate) fn reject(core: &Arc<Core>, verb: Verb, job: AcquireJob) {
    let answers: Vec<Result<Acquired>> = job.items.iter().map(|_| Err(waited_too_long())).collect();
    deliver(core, verb, vec![job], vec![answers.len()], answers);
}

pub(crate) fn waited_too_long() -> Error {
    let source = "no statement was free for the call in time: retry, raise `connections`, or `retry_for`".into();
    Error::Unavailable { source }
}

/// Answers on their way to their caller. Leases that do not reach it are given back.
pub(crate) struct Delivery {
    core: Arc<Core>,
    verb: Verb,
    answers: Vec<Result<Acquired>>,
}

impl Delivery {
    pub(crate) fn take(mut self) -> Vec<Result<Acquired>> {
        std::mem::take(&mut self.answers)
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        for answer in self.answers.drain(..) {
            if let (Verb::Claim, Ok(Acquired::Taken(grant))) = (self.verb, answer) {
                self.core.abandon(Arc::new(grant), AbandonReason::NotDelivered);
            }
        }
    }
}

/// Sends the answers of a batch to its calls.
pub(crate) fn deliver(
    core: &Arc<Core>,
    verb: Verb,
    jobs: Vec<AcquireJob>,
    counts: Vec<usize>,
    answers: Vec<Result<Acquired>>,
) {
    let mut answers = answers.into_iter();
    for (job, count) in jobs.into_iter().zip(counts) {
        let delivery = Delivery { core: Arc::clone(core), verb, answers: answers.by_ref().take(count).collect() };
        // Without a receiver the delivery is dropped, which gives its leases back.
        let _ = job.answer.send(delivery);
    }
}

/// Runs the calls of a batch.
pub(crate) async fn run_batch(core: Arc<Core>, verb: Verb, jobs: Vec<AcquireJob>) {
    let is_contended = |job: &AcquireJob| job.items.iter().any(|item| core.contended.contains(&item.encoded));
    let (contended, others): (Vec<_>, Vec<_>) = jobs.into_iter().partition(is_contended);
    for job in contended {
        // Apart, so that the others do not wait with them.
        let core = Arc::clone(&core);
        tokio::spawn(async move {
            let _permit = core.contended.batches.acquire().await;
            if !job.is_abandoned() {
                run_jobs(&core, verb, vec![job]).await;
            }
        });
    }
    run_jobs(&core, verb, others).await;
}

async fn run_jobs(core: &Arc<Core>, verb: Verb, mut jobs: Vec<AcquireJob>) {
    let counts: Vec<usize> = jobs.iter().map(|job| job.items.len()).collect();
    let items: Vec<Item> = jobs.iter_mut().flat_map(|job| std::mem::take(&mut job.items)).collect();
    let lost = LostAnswers::since(last_queued(&jobs));
    let answers = acquire(core, Via::Pool(&lost), verb, &items).await;
    deliver(core, verb, jobs, counts, answers);
}

/// Acquires each key. The answers are in the order of the items.
pub(crate) async fn acquire(core: &Core, via: Via<'_>, verb: Verb, items: &[Item]) -> Vec<Result<Acquired>> {
    let mut answers: Vec<Option<Result<Acquired>>> = items.iter().map(|_| None).collect();
    let begun = Instant::now();
    let (mut last_progress, mut idle_rounds) = (begun, 0_u32);
    loop {
        let open = items.iter().zip(&answers).enumerate().filter(|(_, (_, answer))| answer.is_none());
        let (indexes, round): (Vec<usize>, Vec<&Item>) = open.map(|(index, (item, _))| (index, item)).unzip();
        if round.is_empty() {
            break;
        }
        let decided = match run_round(core, via, verb, &round).await {
            Ok(decided) => decided,
            Err(error) => round.iter().map(|_| Some(Err(error.clone()))).collect(),
        };
        let may_be_unlocked = |answer: &Result<Acquired>| {
            matches!(answer, Ok(Acquired::InProgress { is_locked: true, .. })) && begun.elapsed() < LOCKED_LIMIT
        };
        let decided: Vec<_> = decided.into_iter().map(|answer| answer.filter(|it| !may_be_unlocked(it))).collect();
        let has_progress = decided.iter().any(Option::is_some);
        for (index, decided) in indexes.into_iter().zip(decided) {
            if let Some(answer) = answers.get_mut(index) {
                *answer = decided;
            }
        }
        if has_progress {
            (last_progress, idle_rounds) = (Instant::now(), 0);
            continue;
        }
        idle_rounds += 1;
        if last_progress.elapsed() >= core.database.retry_for() {
            answers.iter_mut().filter(|answer| answer.is_none()).for_each(|answer| *answer = Some(Err(via.busy())));
        } else if idle_rounds > 3 {
            sleep(Duration::from_millis(u64::from(idle_rounds.min(20)))).await;
        }
    }
    answers.into_iter().flatten().collect()
}

/// Decides about items. Those of one key are decided one after the other: after the one that acquires it, the others are left to
/// the next round. `None`: ask again.
async fn run_round(core: &Core, via: Via<'_>, verb: Verb, items: &[&Item]) -> Result<Vec<Option<Result<Acquired>>>> {
    let mut seen = HashSet::new();
    let firsts: Vec<&Item> = items.iter().copied().filter(|item| seen.insert(item.encoded.as_slice())).collect();
    // An earlier round of the call may have written.
    let admitted = Admission::of(core, verb, firsts.len()).await.map_err(|error| via.failed(error))?;
    let decided = decide_round(core, via, verb, items, &firsts, &admitted).await;
    admitted.end(verb, decided.iter().flatten().flatten());
    decided
}

async fn decide_round(
    core: &Core,
    via: Via<'_>,
    verb: Verb,
    items: &[&Item],
    firsts: &[&Item],
    admission: &Admission<'_>,
) -> Result<Vec<Option<Result<Acquired>>>> {
    let mut answers: Vec<Option<Result<Acquired>>> = items.iter().map(|_| None).collect();
    let mut room = admission.room;
    let is_narrow = room < firsts.len();
    // A lease is not older than this, however long its statement takes.
    let mut begun_ms = core.monotonic_ms();
    let mut rejected = HashSet::new();
    let (tried, locked): (Vec<&Item>, Vec<&Item>) = firsts.iter().copied().partition(|item| via.admits(core, item));
    let mut found = if is_narrow { read(core, via, &tried).await? } else { insert(core, via, verb, &tried).await? };
    found.extend(locked.into_iter().map(|item| (item.encoded.clone(), Read::Locked)));
    if is_narrow {
        // Only as many absent keys are inserted as there is room for.
        let absent: Vec<&Item> = tried.iter().copied().filter(|item| !found.contains_key(&item.encoded)).collect();
        let (fitting, others) = absent.split_at(room.min(absent.len()));
        room -= fitting.len();
        rejected.extend(others.iter().map(|item| item.encoded.as_slice()));
        if !fitting.is_empty() {
            found.extend(insert(core, via, verb, fitting).await?);
        }
    }
    if verb == Verb::Claim {
        // A row that has changed since is not found, and its key is left to the next round.
        for (key, version) in reading::left_out(&found) {
            match read_result(core, via, &key, version).await {
                Ok(result) => reading::set_result(&mut found, &key, result),
                Err(error) => drop(found.insert(key, Read::Failed(error))),
            }
        }
    }
    let mut replacements: Vec<Replacement<'_>> = Vec::new();
    let mut replaced_keys = HashSet::new();
    for (index, (item, answer)) in items.iter().zip(&mut answers).enumerate() {
        if rejected.contains(item.encoded.as_slice()) {
            *answer = Some(Err(admission.rejection.clone()));
            continue;
        }
        let (now, stored) = match found.get(&item.encoded) {
            Some(Read::Inserted { now, token, .. }) => {
                *answer = Some(Ok(Facts::first(*token, item, *now).taken(item, begun_ms)));
                found.remove(&item.encoded);
                continue;
            }
            Some(Read::Found { now, stored, .. }) => (*now, stored),
            Some(Read::Locked) => {
                let in_progress = InProgress::new(Some(LOCKED_RETRY), 1);
                *answer = Some(Ok(Acquired::InProgress { in_progress, token: 0, is_locked: false }));
                continue;
            }
            Some(Read::Failed(error)) => {
                *answer = Some(Err(error.clone()));
                continue;
            }
            None => continue,
        };
        if replaced_keys.contains(item.encoded.as_slice()) {
            continue;
        }
        match decide_item(core, verb, item, stored, now) {
            Decided::Answer(decided) => *answer = Some(decided),
            Decided::Available(available) => {
                if room == 0 && is_narrow {
                    *answer = Some(Err(admission.rejection.clone()));
                    continue;
                }
                room = room.saturating_sub(1);
                replaced_keys.insert(item.encoded.as_slice());
                replacements.extend(replacement(core, index, item, stored, available, now));
            }
        }
    }
    if !replacements.is_empty() {
        // Its error is not one of the keys that were inserted.
        begun_ms = core.monotonic_ms();
        let mut replaced = replace(core, via, verb, &replacements).await;
        for it in replacements {
            let Some(answer) = answers.get_mut(it.index) else { continue };
            let tokens = match &mut replaced {
                Ok(tokens) => tokens,
                Err(error) => {
                    *answer = Some(Err(error.clone()));
                    continue;
                }
            };
            let Replacement { attempt, prior, fingerprint, time_ms, .. } = it;
            match tokens.remove(&it.item.encoded) {
                Some(Some(token)) => {
                    let facts = Facts { token, attempt, prior, fingerprint, time_ms };
                    *answer = Some(Ok(facts.taken(it.item, begun_ms)));
                }
                // The other transaction may be an earlier try of this call.
                Some(None) if via.may_have_written() => {}
                Some(None) => {
                    let in_progress = InProgress::new(Some(LOCKED_RETRY), attempt.saturating_sub(1).max(1));
                    let token = it.token;
                    *answer = Some(Ok(Acquired::InProgress { in_progress, token, is_locked: true }));
                }
                None => {}
            }
        }
    }
    Ok(answers)
}

async fn read_result(core: &Core, via: Via<'_>, key: &[u8], version: i64) -> Result<Option<Vec<u8>>> {
    let rows = via.rows(core, &core.sql.result, &[&key, &version]).await?;
    rows.first().map(|row| row.column(0)).transpose().map_err(unavailable)
}

/// What the state machine says about a row.
enum Decided {
    Answer(Result<Acquired>),
    Available(Available),
}

fn decide_item(core: &Core, verb: Verb, item: &Item, stored: &Stored, now: PlainMoment) -> Decided {
    if stored.call == item.call
        && let Some(repeated) = repeated(verb, item, &stored.entry, stored.is_leased, stored.prior)
    {
        return Decided::Answer(Ok(repeated));
    }
    Decided::Answer(match machine::decide(Some(&stored.entry), item.request(), now, core.policy) {
        Decision::Available(available) => return Decided::Available(available),
        Decision::InProgress { retry_after_ms, attempt } => Ok(Acquired::InProgress {
            in_progress: InProgress::new(retry_after_ms.map(Duration::from_millis), attempt),
            token: stored.entry.token(),
            is_locked: false,
        }),
        Decision::Completed(done) => Ok(Acquired::Completed(completed(done, core.policy.window_ms))),
        // A key of this store has no timestamp, so that no message is too old.
        Decision::PayloadMismatch | Decision::TooOld => Err(Error::PayloadMismatch { key: item.key.to_string() }),
    })
}

fn replacement<'a>(
    core: &Core,
    index: usize,
    item: &'a Item,
    stored: &Stored,
    available: Available,
    now: PlainMoment,
) -> Option<Replacement<'a>> {
    // The token and the lease follow from the statement.
    let next = claimed(Some(&stored.entry), item.request(), (0, 0), now, core.policy)?;
    Some(Replacement {
        index,
        item,
        version: stored.version,
        token: stored.entry.token(),
        attempt: available.attempt,
        prior: available.prior,
        fingerprint: next.fingerprint,
        time_ms: next.since_ms,
    })
}

/// The answer of a call whose earlier try has written the row, and whose answer was lost. `None` if the row has changed since.
pub(crate) fn repeated(
    verb: Verb,
    item: &Item,
    entry: &Entry,
    is_leased: bool,
    prior: Option<PriorAttempt>,
) -> Option<Acquired> {
    let facts = match (entry, verb) {
        (Entry::Processing(leased), Verb::Claim) if is_leased => {
            let Processing { token, attempt, fingerprint, since_ms: time_ms, .. } = *leased;
            Facts { token, attempt, prior, fingerprint, time_ms }
        }
        (Entry::Completed(done), Verb::Record) => Facts::first(done.token, item, done.completed_ms),
        _ => return None,
    };
    Some(facts.taken(item, GRANTED_EARLIER_MS))
}

/// The beginning of a lease that an earlier try was granted: if it is kept, it is renewed at once.
const GRANTED_EARLIER_MS: u64 = 0;

/// The facts of an attempt that a call began.
pub(crate) struct Facts {
    pub(crate) token: u64,
    pub(crate) attempt: u32,
    pub(crate) prior: Option<PriorAttempt>,
    pub(crate) fingerprint: Option<Fingerprint>,
    pub(crate) time_ms: u64,
}

impl Facts {
    /// The first attempt at a key.
    pub(crate) fn first(token: u64, item: &Item, time_ms: u64) -> Self {
        Self { token, attempt: 1, prior: None, fingerprint: item.key.payload_fingerprint().copied(), time_ms }
    }

    /// `granted_at_ms` is no later than the beginning of the lease.
    pub(crate) fn taken(self, item: &Item, granted_at_ms: u64) -> Acquired {
        let info = AttemptInfo::new(FencingToken::new(self.token), self.attempt, self.prior);
        let key = item.key.clone().with_fingerprint(self.fingerprint);
        Acquired::Taken(Grant::new(key, info, Timestamp::from_unix_ms(self.time_ms), granted_at_ms))
    }
}

/// How many keys of a round may be acquired.
pub(crate) struct Admission<'a> {
    core: &'a Core,
    /// It is given back if the call is dropped.
    reserved: usize,
    pub(crate) room: usize,
    /// The error of keys for which there is no room.
    pub(crate) rejection: Error,
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.core.in_flight.grant(self.reserved, [], self.core.options.lease);
    }
}

impl<'a> Admission<'a> {
    /// Counts the leases that were granted, and gives the rest of the room back.
    pub(crate) fn end<'b>(mut self, verb: Verb, answers: impl IntoIterator<Item = &'b Result<Acquired>>) {
        let leased = answers.into_iter().filter_map(|answer| match (verb, answer) {
            (Verb::Claim, Ok(Acquired::Taken(grant))) => Some(grant.token().get()),
            _ => None,
        });
        self.core.in_flight.grant(std::mem::take(&mut self.reserved), leased, self.core.options.lease);
    }

    pub(crate) async fn of(core: &'a Core, verb: Verb, wanted: usize) -> Result<Self> {
        let limit = core.in_flight.limit();
        let rejection = Error::TooManyInFlight { in_flight: limit, limit };
        if verb == Verb::Record {
            return Ok(Self { core, reserved: 0, room: wanted, rejection });
        }
        if core.options.holds() {
            let (held, limit) = (count_held(core).await?, core.options.held_limit);
            if held >= limit {
                return Ok(Self { core, reserved: 0, room: 0, rejection: Error::TooManyHeld { held, limit } });
            }
        }
        let reserved = core.in_flight.reserve(wanted);
        Ok(Self { core, reserved, room: reserved, rejection })
    }
}

/// The number of held keys. Counts them only if there may be as many as the limit allows.
async fn count_held(core: &Core) -> Result<usize> {
    let limit = core.options.held_limit;
    // Leases that were dropped and are not written will be held.
    let estimate = usize::try_from(core.held.estimate()).unwrap_or(usize::MAX).saturating_add(core.abandoned_count());
    if estimate < limit {
        return Ok(estimate);
    }
    core.wait_for_all_abandoned().await;
    let held = reading::count_held(core).await?;
    core.held.set(held);
    Ok(usize::try_from(held).unwrap_or(usize::MAX))
}
