//! The end of leases: completions, releases, and leases that are abandoned.
//!
//! One statement finishes all leases of a batch whose token is still that of the row. The token decides, never the clock. What
//! the statement did not change is read, and the state machine says whether it is a repetition or was taken over. Offsets and
//! messages are written in the same transaction.

use std::collections::HashSet;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::machine::{Attempt, Backoff, Complete, Entry, Finished, FinishedBy, PlainMoment, Step, step};
use onlyonce_core::{Completion, Error, Finish, Grant, PriorAttempt, Release, Result, StoredResult};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::acquire::waited_too_long;
use crate::caller::{Columns, Execute, InTransaction, Pooled};
use crate::connection::LostAnswers;
use crate::core::{AbandonReason, AbandonedLease, Core, encode_granted};
use crate::error::{Failure, unavailable};
use crate::opening::{CONFIRM, Object};
use crate::queue::{Job, last_queued};
use crate::reading::decode;
use crate::row::{Read, encode_prior, signed};
use crate::side_writes::Collected;
use crate::sql::state;

/// The leases of one call, and where its answers go.
pub(crate) struct FinishJob {
    pub(crate) items: Vec<LeaseEnd>,
    pub(crate) answer: oneshot::Sender<Vec<Result<()>>>,
    pub(crate) queued: Instant,
}

/// It happens although nobody waits for its answer.
impl Job for FinishJob {
    fn items(&self) -> usize {
        self.items.len()
    }

    fn bytes(&self) -> usize {
        self.items.iter().map(LeaseEnd::bytes).sum()
    }

    fn queued(&self) -> Option<Instant> {
        Some(self.queued)
    }
}

/// The most bytes of a call: the server accepts statements of less than a gibibyte.
const CALL_BYTES: usize = 512 << 20;

/// A lease and how it ends.
#[derive(Debug)]
pub(crate) struct LeaseEnd {
    pub(crate) grant: Arc<Grant>,
    encoded: Vec<u8>,
    change: Change,
    completion: Option<Completion>,
}

/// The change of a row.
#[derive(Debug, Clone, Copy)]
struct Change {
    state: i16,
    prior: Option<PriorAttempt>,
    backoff_ms: u64,
    /// Whether the payload no longer binds the key.
    unbinds: bool,
    resets_attempts: bool,
    /// Whether only a lease changes, and not what became of it.
    only_leased: bool,
    /// Whether a lease that has ended otherwise is an error.
    is_finish: bool,
}

impl LeaseEnd {
    pub(crate) fn finish(core: &Core, grant: Arc<Grant>, finish: Finish) -> Result<Self> {
        match finish {
            Finish::Complete(completion) => Self::complete(core, grant, completion),
            Finish::Release(release) => Self::release(core, grant, release),
        }
    }

    pub(crate) fn complete(core: &Core, grant: Arc<Grant>, completion: Completion) -> Result<Self> {
        let state = match StoredResult::within(completion.result(), core.options.result_limit) {
            StoredResult::TooLarge => state::COMPLETED_TOO_LARGE,
            StoredResult::None | StoredResult::Bytes(_) => state::COMPLETED,
        };
        let change = Change {
            state,
            prior: None,
            backoff_ms: 0,
            unbinds: false,
            resets_attempts: false,
            only_leased: false,
            is_finish: true,
        };
        Self::new(grant, change, Some(completion))
    }

    fn release(core: &Core, grant: Arc<Grant>, release: Release) -> Result<Self> {
        if release.may_have_happened && core.options.holds() {
            return Self::new(grant, Change { is_finish: true, ..dropped(core) }, None);
        }
        // This attempt may have had no effect: whether an earlier one had is still open.
        let doubt = grant.attempt.prior().filter(|prior| prior.may_have_happened());
        let prior = doubt.unwrap_or(match release.may_have_happened {
            true => PriorAttempt::Dropped,
            false => PriorAttempt::Released,
        });
        let backoff = Backoff::from(PlainMoment::default(), release.backoff, core.policy.window_ms);
        let change = Change {
            backoff_ms: u64::from(backoff.length_ms),
            resets_attempts: release.reset_attempts,
            only_leased: false,
            is_finish: true,
            ..released(prior)
        };
        Self::new(grant, change, None)
    }

    pub(crate) fn abandoned(core: &Core, lease: AbandonedLease) -> Result<Self> {
        let change = match lease.reason {
            AbandonReason::Dropped | AbandonReason::InTransaction => dropped(core),
            AbandonReason::NotDelivered => released(lease.grant.attempt.prior().unwrap_or(PriorAttempt::Released)),
        };
        Self::new(lease.grant, change, None)
    }

    fn new(grant: Arc<Grant>, change: Change, completion: Option<Completion>) -> Result<Self> {
        let encoded = encode_granted(&grant)?;
        Ok(Self { grant, encoded, change, completion })
    }

    fn token(&self) -> u64 {
        self.grant.token().get()
    }

    fn bytes(&self) -> usize {
        self.encoded.len() + self.completion.as_ref().map_or(0, Completion::encoded_len)
    }

    /// The payload that binds the key afterwards.
    fn fingerprint(&self) -> Option<&[u8]> {
        self.grant.key.payload_fingerprint().filter(|_| !self.change.unbinds).map(|fingerprint| &fingerprint[..])
    }

    /// The number of the attempt that the row has afterwards.
    fn attempt(&self) -> i32 {
        let number = if self.change.resets_attempts { 0 } else { self.grant.attempt.number() };
        i32::try_from(number).unwrap_or(i32::MAX)
    }

    fn result(&self) -> Option<&[u8]> {
        self.completion.as_ref().filter(|_| self.change.state == state::COMPLETED).map(Completion::result)
    }
}

/// A key without a holder, after an attempt that ended like this.
fn released(prior: PriorAttempt) -> Change {
    Change {
        state: state::RELEASED,
        prior: Some(prior),
        backoff_ms: 0,
        unbinds: !prior.may_have_happened(),
        resets_attempts: false,
        only_leased: true,
        is_finish: false,
    }
}

/// A key whose holder dropped its lease.
fn dropped(core: &Core) -> Change {
    let released = released(PriorAttempt::Dropped);
    match core.options.holds() {
        true => Change { state: state::INTERRUPTED, ..released },
        false => released,
    }
}

/// How a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Now,
    /// An earlier call did it, or there was nothing to do.
    Before,
    Superseded,
}

/// The statements of a finish: prepared ones, or their text in a transaction of the caller.
struct Statements<'a, S: ?Sized> {
    finish: &'a S,
    read: &'a S,
    set_offsets: &'a S,
    add_messages: &'a S,
}

/// Runs the calls of a batch.
pub(crate) async fn run_batch(core: Arc<Core>, jobs: Vec<FinishJob>) {
    let calls: Vec<&[LeaseEnd]> = jobs.iter().map(|job| job.items.as_slice()).collect();
    let lost = LostAnswers::since(last_queued(&jobs));
    let mut answers = finish(&core, &lost, &calls).await;
    if lost.is_rejected() && calls.len() > 1 {
        // One call may be the reason, or all of them together.
        answers.clear();
        for call in &calls {
            answers.extend(finish(&core, &lost.of_part(), &[*call]).await);
        }
    }
    for (job, answers) in jobs.into_iter().zip(answers) {
        answer(&core, job, answers);
    }
}

/// Answers a call that waited too long for a batch.
pub(crate) fn reject(core: &Core, job: FinishJob) {
    let answers = job.items.iter().map(|_| Err(waited_too_long())).collect();
    answer(core, job, answers);
}

fn answer(core: &Core, job: FinishJob, answers: Vec<Result<()>>) {
    if let Err(answers) = job.answer.send(answers) {
        // The caller dropped its future: the store abandons the lease.
        for (item, answer) in job.items.into_iter().zip(answers) {
            if answer.is_err() {
                core.abandon(item.grant, AbandonReason::Dropped);
            }
        }
    }
}

/// How long calls wait for the release of a lease whose row a transaction of the caller may have locked.
const LOCKED_LIMIT: Duration = Duration::from_secs(1);

/// Writes leases that were abandoned.
pub(crate) async fn run_abandoned(core: Arc<Core>, leases: Vec<AbandonedLease>) {
    let (locked, free): (Vec<_>, Vec<_>) =
        leases.into_iter().partition(|lease| lease.reason == AbandonReason::InTransaction);
    for lease in locked {
        // Alone, so that the others do not wait for its row.
        let core = Arc::clone(&core);
        tokio::spawn(async move {
            let key = lease.encoded.clone();
            let mut write = pin!(async {
                let _permit = core.locked_writes.acquire().await;
                write_abandoned(&core, vec![lease]).await;
            });
            let is_written = timeout(LOCKED_LIMIT, &mut write).await.is_ok();
            core.abandoned_are_written([key]);
            if !is_written {
                write.await;
            }
        });
    }
    let keys: Vec<Vec<u8>> = free.iter().map(|lease| lease.encoded.clone()).collect();
    write_abandoned(&core, free).await;
    core.abandoned_are_written(keys);
}

/// A failure is logged: the leases expire.
async fn write_abandoned(core: &Core, leases: Vec<AbandonedLease>) {
    let items: Vec<LeaseEnd> = leases.into_iter().filter_map(|lease| LeaseEnd::abandoned(core, lease).ok()).collect();
    if items.is_empty() {
        return;
    }
    let answers = finish(core, &LostAnswers::default(), &[&items]).await;
    if let Some(error) = answers.into_iter().flatten().find_map(Result::err) {
        tracing::warn!(error = %error.chain(), "leases that were abandoned stay in progress until they expire");
    }
}

/// Finishes the leases of each call. The answers are in the order of the calls and their leases.
async fn finish(core: &Core, lost: &LostAnswers, calls: &[&[LeaseEnd]]) -> Vec<Vec<Result<()>>> {
    if let [call] = calls {
        let (bytes, limit) = (call.iter().map(LeaseEnd::bytes).sum::<usize>(), CALL_BYTES);
        if bytes > limit {
            return vec![call.iter().map(|_| Err(Error::BatchTooLarge { bytes, limit })).collect()];
        }
    }
    let ended = core
        .database
        .run_of_call(lost, move |connection, _| {
            Box::pin(async move {
                match try_finish(core, connection, calls).await {
                    // A transaction has locked the row of one call: each is repeated alone.
                    Err(Failure::Locked(cause)) if calls.len() > 1 => Err(Failure::Rejected(cause)),
                    answer => answer,
                }
            })
        })
        .await;
    match ended {
        Ok(ended) => calls.iter().zip(ended).map(|(call, ended)| answers(core, call, &ended)).collect(),
        Err(error) => calls.iter().map(|call| call.iter().map(|_| Err(error.clone())).collect()).collect(),
    }
}

async fn try_finish(core: &Core, connection: &mut Object, calls: &[&[LeaseEnd]]) -> Result<Vec<Vec<Done>>, Failure> {
    let statements = Statements {
        finish: &connection.prepare_cached(&core.sql.finish).await?,
        read: &connection.prepare_cached(&core.sql.read).await?,
        set_offsets: &connection.prepare_cached(&core.sql.set_offsets).await?,
        add_messages: &connection.prepare_cached(&core.sql.add_messages).await?,
    };
    let has_side_writes = |item: &LeaseEnd| item.completion.as_ref().is_some_and(|it| it.side_writes().is_some());
    let ended = if calls.iter().any(|call| call.iter().any(has_side_writes)) {
        let transaction = connection.transaction().await?;
        let ended = finish_rows(core, &Pooled(&*transaction), &statements, calls).await?;
        let collected = collect(calls, &ended);
        collected.write(&Pooled(&*transaction), statements.set_offsets, statements.add_messages).await?;
        transaction.commit().await?;
        ended
    } else {
        finish_rows(core, &Pooled(&***connection), &statements, calls).await?
    };
    // The earlier call may have failed, because the standby did not have the completion.
    if ended.iter().flatten().any(|done| *done == Done::Before) {
        connection.batch_execute(CONFIRM).await?;
    }
    Ok(ended)
}

fn answers(core: &Core, call: &[LeaseEnd], ended: &[Done]) -> Vec<Result<()>> {
    let answer = |(item, done): (&LeaseEnd, &Done)| {
        core.in_flight.ended(item.token());
        core.kept.end(item.token(), &item.grant.superseded());
        if *done == Done::Now {
            core.waiters.wake(item.token());
            if item.change.state == state::INTERRUPTED {
                core.held.add(1);
            }
        }
        if *done == Done::Superseded { Err(item.grant.superseded()) } else { Ok(()) }
    };
    call.iter().zip(ended).map(answer).collect()
}

/// The offsets and messages of the leases that are completed now. After a rejected completion the later offsets of its call are
/// left out, because they would cover its message.
fn collect(calls: &[&[LeaseEnd]], ended: &[Vec<Done>]) -> Collected {
    let mut collected = Collected::default();
    for (call, ended) in calls.iter().zip(ended) {
        let mut with_offsets = true;
        for (item, done) in call.iter().zip(ended) {
            let Some(completion) = &item.completion else { continue };
            with_offsets &= *done != Done::Superseded;
            if let (Done::Now, Some(side_writes)) = (done, completion.side_writes()) {
                collected.add(side_writes, with_offsets);
            }
        }
    }
    collected
}

/// Changes the rows of all leases. A key that occurs twice is changed one after the other.
async fn finish_rows<S: ?Sized + Sync>(
    core: &Core,
    client: &(impl Execute<S> + ?Sized),
    statements: &Statements<'_, S>,
    calls: &[&[LeaseEnd]],
) -> Result<Vec<Vec<Done>>, Failure> {
    let mut ended: Vec<Vec<Option<Done>>> = calls.iter().map(|call| call.iter().map(|_| None).collect()).collect();
    loop {
        let mut keys = HashSet::new();
        let items = calls.iter().flat_map(|call| call.iter());
        let open = items.zip(ended.iter_mut().flatten()).filter(|(_, done)| done.is_none());
        let round: Vec<(&LeaseEnd, &mut Option<Done>)> =
            open.filter(|(item, _)| keys.insert(item.encoded.as_slice())).collect();
        if round.is_empty() {
            break;
        }
        finish_round(core, client, statements, round).await?;
    }
    Ok(ended.into_iter().map(|call| call.into_iter().flatten().collect()).collect())
}

/// Changes rows of different keys. Leaves a lease open whose row changed meanwhile.
async fn finish_round<S: ?Sized + Sync>(
    core: &Core,
    client: &(impl Execute<S> + ?Sized),
    statements: &Statements<'_, S>,
    mut round: Vec<(&LeaseEnd, &mut Option<Done>)>,
) -> Result<(), Failure> {
    let changed = change_rows(client, statements.finish, round.iter().map(|(item, _)| *item)).await?;
    for (item, done) in &mut round {
        if changed.contains(&item.encoded) {
            **done = Some(Done::Now);
        }
    }
    round.retain(|(_, done)| done.is_none());
    if round.is_empty() {
        return Ok(());
    }
    let keys: Vec<&[u8]> = round.iter().map(|(item, _)| item.encoded.as_slice()).collect();
    let mut found = decode(core, &client.rows(statements.read, &[&keys, &core.worker()]).await?)?;
    for (item, done) in round {
        let read = found.remove(&item.encoded);
        let stored = match &read {
            Some(Read::Found { now, stored, .. }) => Some((&stored.entry, *now)),
            _ => None,
        };
        *done = unchanged(core, item, stored);
    }
    Ok(())
}

/// Why the row of a lease did not change. `None`: it could have, so that the lease must be tried again.
fn unchanged(core: &Core, item: &LeaseEnd, stored: Option<(&Entry, PlainMoment)>) -> Option<Done> {
    let (entry, now) = match stored {
        Some((entry, now)) => (Some(entry), now),
        None => (None, PlainMoment::default()),
    };
    let (token, policy) = (item.token(), core.policy);
    let attempt = Attempt { token, attempt: 0, fingerprint: None, at_ms: 0 };
    let complete = Complete { attempt, by: FinishedBy::Holder, result: StoredResult::<Arc<[u8]>>::None };
    let Ok(Step { answer, .. }) = step::<_, _, Infallible>(entry, complete, now, policy, || Ok(0));
    match answer {
        Finished::Accepted | Finished::Committing => item.change.only_leased.then_some(Done::Before),
        Finished::Repeated if item.completion.is_some() => Some(Done::Before),
        Finished::Repeated | Finished::Superseded if !item.change.is_finish => Some(Done::Before),
        Finished::Repeated | Finished::Superseded => Some(Done::Superseded),
    }
}

/// Returns the keys whose rows changed.
async fn change_rows<'a, S: ?Sized + Sync>(
    client: &(impl Execute<S> + ?Sized),
    finish: &S,
    items: impl Iterator<Item = &'a LeaseEnd> + Clone,
) -> Result<HashSet<Vec<u8>>, Failure> {
    let keys: Vec<&[u8]> = items.clone().map(|item| item.encoded.as_slice()).collect();
    let tokens: Vec<i64> = items.clone().map(|item| signed(item.token())).collect();
    let states: Vec<i16> = items.clone().map(|item| item.change.state).collect();
    let results: Vec<Option<&[u8]>> = items.clone().map(LeaseEnd::result).collect();
    let backoffs: Vec<i64> = items.clone().map(|item| signed(item.change.backoff_ms)).collect();
    let priors: Vec<i16> = items.clone().map(|item| encode_prior(item.change.prior)).collect();
    let fingerprints: Vec<Option<&[u8]>> = items.clone().map(LeaseEnd::fingerprint).collect();
    let attempts: Vec<i32> = items.clone().map(LeaseEnd::attempt).collect();
    let only_leased: Vec<bool> = items.map(|item| item.change.only_leased).collect();
    let rows = client
        .rows(finish, &[&keys, &tokens, &states, &results, &backoffs, &priors, &fingerprints, &attempts, &only_leased])
        .await?;
    rows.iter().map(|row| row.column(0)).collect()
}

/// Completes a lease in a transaction of the caller. If the lease was taken over, the transaction fails.
pub(crate) async fn complete_in(core: &Core, transaction: &dyn InTransaction, ended: &LeaseEnd) -> Result<()> {
    // The transaction is not committed: nothing happened.
    let has_lock_limit = core.database.check_transaction(transaction).await?;
    let done = try_complete_in(core, transaction, ended).await.map_err(unavailable);
    core.database.end_lock_limit(transaction, has_lock_limit).await;
    let done = done?;
    if done != Done::Superseded {
        return Ok(());
    }
    let fail = "DO $$ BEGIN RAISE EXCEPTION 'a lease of this transaction was taken over'; END $$";
    // It fails, and so does the transaction.
    let _ = transaction.batch_execute(fail).await;
    Err(ended.grant.superseded())
}

async fn try_complete_in(core: &Core, transaction: &dyn InTransaction, ended: &LeaseEnd) -> Result<Done, Failure> {
    let sql = &core.sql;
    let statements = Statements::<str> {
        finish: &sql.finish,
        read: &sql.read,
        set_offsets: &sql.set_offsets,
        add_messages: &sql.add_messages,
    };
    let calls = [std::slice::from_ref(ended)];
    let done = finish_rows(core, transaction, &statements, &calls).await?;
    collect(&calls, &done).write(transaction, statements.set_offsets, statements.add_messages).await?;
    let done = done.into_iter().flatten().next().unwrap_or(Done::Superseded);
    if done == Done::Before {
        // So that the commit waits for the standby.
        transaction.batch_execute(CONFIRM).await?;
    }
    Ok(done)
}
