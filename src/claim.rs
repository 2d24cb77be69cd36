//! What a claim is answered, and what may be done with it.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::codec::RecordKind;
use crate::engine::renewal::Renewal;
use crate::engine::response::{ClaimResponse, FinishKind, FinishedBy, Grant, display};
use crate::engine::workers::StoreHandle;
use crate::entry::{Backoff, CompletedEntry, Prior, StoredResult};
use crate::error::{Error, Outcome, Result};
use crate::invariant::Invariant;
use crate::key::Key;
use crate::tx::Tx;
use crate::typed_result;

/// The answer to [`Store::claim`](crate::Store::claim).
///
/// `L` is the kind of lease: [`Lease`], or that of `onlyonce::future`.
#[derive(Debug)]
#[must_use = "an acquired lease that is dropped counts as interrupted work"]
pub enum Claim<L = Lease> {
    /// The work is yours: do it, then complete or release the lease.
    Acquired(L),
    /// The work was done, inside the window: answer with this.
    Completed(Completed),
    /// Somebody is at it, or must decide about it: come back later.
    InProgress(InProgress),
}

/// A piece of work that was done, and its result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completed {
    done: CompletedEntry,
}

impl Completed {
    pub(crate) fn new(done: CompletedEntry) -> Self {
        Self { done }
    }

    /// The stored result. `None` if the key was recorded without one, or if it was too large to keep.
    #[must_use]
    pub fn result(&self) -> Option<&[u8]> {
        match &self.done.result {
            StoredResult::Bytes(bytes) => Some(bytes),
            StoredResult::None | StoredResult::TooLarge => None,
        }
    }

    /// The stored result of [`Lease::complete_as`]. `None` as for [`Completed::result`].
    ///
    /// # Errors
    ///
    /// [`Error::Decode`] if the bytes are not a `T`. The type that was stored always reads its result; bincode does not name
    /// fields, so that another type, or a later version of it, reads it only if it has the same fields in the same order.
    pub fn result_as<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let decode = |bytes| typed_result::decode(bytes).map_err(|detail| Error::Decode { detail });
        self.result().map(decode).transpose()
    }

    /// Whether there was a result over the store's `result_limit`, so that only the fact was kept.
    #[must_use]
    pub fn is_omitted(&self) -> bool {
        self.done.result == StoredResult::TooLarge
    }

    /// When it was completed, in milliseconds since the Unix epoch, on the store's clock. On stream time, the timestamp of
    /// its message.
    #[must_use]
    pub fn completed_at_ms(&self) -> u64 {
        self.done.completed_ms
    }

    /// The fencing token of the lease that completed it.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.done.token
    }
}

/// Work that is somebody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InProgress {
    /// When to ask again: what is left of the lease or the backoff. `None` if the key is held: it stays so until
    /// [`Store::resolve`](crate::Store::resolve).
    pub retry_after: Option<Duration>,
    /// Which attempt is under way, from 1.
    pub attempt: u32,
}

/// The right to do a piece of work, until [`Lease::remaining`] is over or longer if nobody else asks for it.
///
/// Pass [`Lease::token`] along with every effect outside, where the other side can refuse a lower token than it has
/// seen: that is what keeps a holder who was overtaken from doing harm.
///
/// Dropping a lease says "outcome unknown": under [`OnInterrupt::Rerun`](crate::OnInterrupt) the next claim gets the
/// key at once and is told [`Prior::Dropped`].
#[must_use = "dropping a lease marks its work as interrupted"]
pub struct Lease {
    grant: Grant,
    running: Arc<StoreHandle>,
    /// Whether the lease was settled, so that dropping it means nothing.
    settled: bool,
}

impl Lease {
    /// The key it is about, with its scope.
    #[must_use]
    pub fn key(&self) -> Key<'static> {
        Key::decode(self.grant.key()).unwrap_or_else(|| Key::from(self.grant.key().to_vec()))
    }

    /// The fencing token: higher than that of every lease before, over the life of the store. Another store begins at the
    /// same number, and so does one that takes its place, empty or restored from a copy: whoever compares tokens has to
    /// know which store they are of.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.grant.token
    }

    /// Which attempt at this work it is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.grant.attempt
    }

    /// What became of the attempts before. Anything but `None` and [`Prior::Released`] says that the effect may have
    /// happened ([`Lease::may_have_happened`]). Such a doubt persists across releases until completion.
    ///
    /// Under [`OnInterrupt::Rerun`](crate::OnInterrupt) claims are not synced, so that a power cut can take the claim and
    /// the memory of it: after one, `None` does not prove that nothing happened. Open with
    /// [`OnInterrupt::Hold`](crate::OnInterrupt) and [`Durability::Disk`](crate::Durability) where that matters.
    #[must_use]
    pub fn prior(&self) -> Option<Prior> {
        self.grant.prior
    }

    /// Whether an earlier attempt may have had its effect: ask for it before you repeat it. False on the first attempt, and
    /// where every earlier one was released, which says that it did nothing.
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        self.grant.prior.is_some_and(Prior::may_have_happened)
    }

    /// How long nobody else can get the key. Zero when the lease has run out; completing it is still accepted then,
    /// unless somebody has taken over. A look at memory.
    #[must_use]
    pub fn remaining(&self) -> Duration {
        Duration::from_millis(self.running.engine.remaining_ms(&self.grant))
    }

    /// Starts the lease's time again. Costs no write.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if somebody has taken over: stop working.
    pub fn renew(&mut self) -> Result<()> {
        if self.running.engine.renew(&self.grant)? { Ok(()) } else { Err(self.grant.superseded()) }
    }

    /// Renews the lease at once, and then three times in its length until the guard is dropped, whatever the work does
    /// meanwhile: a thread of its own renews, one for all stores of the process. Costs no write.
    ///
    /// Work that never ends keeps its key as long as its process lives, or as long as
    /// [`Builder::renew_for`](crate::Builder::renew_for) allows.
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # fn charge() -> &'static str { "charged" }
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// if let Claim::Acquired(mut lease) = store.claim("order-4711")? {
    ///     let alive = lease.keep_alive();
    ///     let receipt = charge(); // for however long
    ///     drop(alive);
    ///     lease.complete(receipt)?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn keep_alive(&mut self) -> KeepAlive<'_> {
        KeepAlive { renewal: self.renewal(), lease: self }
    }

    pub(crate) fn renewal(&self) -> Renewal {
        Renewal::start(&self.running.engine, &self.grant)
    }

    /// Says that the work is done and keeps its result for whoever asks again. An empty result is a result; one over
    /// `result_limit` is not kept, only the fact.
    ///
    /// Returns when it is as safe as the store's [`Durability`](crate::Durability) says: one write, and one fdatasync
    /// under `Disk`, shared with the calls of other threads.
    ///
    /// # Errors
    ///
    /// A [`CompleteError`], which gives the result back. [`Error::Superseded`] if somebody has taken over.
    pub fn complete(self, result: impl Into<Vec<u8>>) -> Result<(), CompleteError> {
        self.complete_and_keep(result.into()).map(drop)
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn result_limit(&self) -> usize {
        self.running.engine.config().result_limit
    }

    /// As [`Lease::complete`], and gives the result back where that worked, too.
    pub(crate) fn complete_and_keep(self, result: Vec<u8>) -> Result<Vec<u8>, CompleteError> {
        complete_one(self, result.into())
    }

    /// As [`Lease::complete`], with a result that is encoded by serde and bincode 2. Read it back with
    /// [`Completed::result_as`].
    ///
    /// It is read back once before it is stored: what is stored can be read, as the value that it was. That costs as much as
    /// reading it and writing it twice.
    ///
    /// # Errors
    ///
    /// As [`Lease::complete`], and [`Error::Encode`] if the result would not come back as it is: `serde_json::Value`,
    /// untagged, internally tagged and flattened forms, fields that are skipped when they are written, or a type that does
    /// not read what it writes. The lease is given back then. Encode such a result yourself, as JSON for example, and give the
    /// bytes to [`Lease::complete`].
    pub fn complete_as<T: Serialize + DeserializeOwned>(self, result: &T) -> Result<(), CompleteError> {
        match typed_result::encode(result, self.running.engine.config().result_limit) {
            Ok(bytes) => self.complete(bytes),
            Err(detail) => Err(CompleteError::new(Error::Encode { detail }, Vec::new(), Some(self))),
        }
    }

    /// As [`Lease::complete`], with what `fill` adds to the same write: consumer offsets, and messages for the outbox. All of
    /// it is stored, or nothing.
    ///
    /// A consumer that keeps its offset here and publishes from the outbox takes each message once, up to the broker's
    /// door: what it publishes may come twice, with the same [`Message::id`](crate::Message).
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let next = store.offset("orders", 0)?.unwrap_or(0);
    /// if let Claim::Acquired(lease) = store.claim("order-4711")? {
    ///     lease.complete_with("charged", |tx| {
    ///         tx.set_offset("orders", 0, next + 1);
    ///         tx.enqueue("charges", "order-4711", "12 EUR");
    ///     })?;
    /// }
    /// assert_eq!(store.offset("orders", 0)?, Some(1));
    /// for message in store.outbox(100)? {
    ///     // Publish it here.
    ///     store.delivered([message.id])?;
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Lease::complete`]; nothing of `fill` is stored then, unless the outcome is unknown. Where the error gives the lease
    /// back, call this again with the same `fill`: a plain [`Lease::complete`] would leave out what it adds.
    /// [`Error::BatchTooLarge`] also where messages and results are more than 1 GiB together; they have no other limit.
    pub fn complete_with(self, result: impl Into<Vec<u8>>, fill: impl FnOnce(&mut Tx)) -> Result<(), CompleteError> {
        complete_one(self, Work::with(result.into(), fill)).map(drop)
    }

    /// Ends this attempt as failed, without an effect. The next claim gets the key at once, with the next attempt number and
    /// [`Prior::Released`], or the doubt that an earlier attempt had left. If the effect may have happened, drop the lease
    /// instead.
    ///
    /// Where no doubt is left, the payload fingerprint is forgotten: a corrected retry may bring another payload. After an
    /// attempt whose outcome is unknown it stays until completion. A released key does not count as in flight; its attempts
    /// are remembered for a window, on disk like a completed key.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if somebody has taken over.
    pub fn release(self) -> Result<()> {
        self.release_after(Duration::ZERO)
    }

    /// As [`Lease::release`], but nobody gets the key before `backoff` is over. It runs on the monotonic clock, in whole
    /// milliseconds, and is at most half the store's window, nor longer than 49 days: the attempt is remembered for at least
    /// as long after it. After a restart the rest of it counts by the store's time; on stream time it ends with the process.
    ///
    /// # Errors
    ///
    /// [`Error::Superseded`] if somebody has taken over.
    pub fn release_after(self, backoff: Duration) -> Result<()> {
        let running = Arc::clone(&self.running);
        let mut released = release_all(vec![(self, backoff)]);
        released.pop().unwrap_or_else(|| Err(unanswered(&running)))
    }

    #[cfg(feature = "tokio")]
    pub(crate) fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Notes that this attempt may have had its effect, for whoever is told when it is released.
    #[cfg(feature = "tokio")]
    pub(crate) fn doubt(&mut self) {
        self.grant.prior = self.grant.prior.filter(|prior| *prior != Prior::Released).or(Some(Prior::Dropped));
    }

    /// Has the attempts counted from 1 again when it is released.
    #[cfg(feature = "tokio")]
    pub(crate) fn reset_attempts(&mut self) {
        self.grant.attempt = 0;
    }

    /// Undoes a claim whose answer reached nobody. Costs no write.
    #[cfg(feature = "tokio")]
    pub(crate) fn take_back(mut self) {
        self.running.engine.take_back(&self.grant);
        self.settled = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled {
            self.running.engine.abandon(&self.grant);
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("key", &display(self.grant.key()))
            .field("token", &self.grant.token)
            .field("attempt", &self.grant.attempt)
            .field("prior", &self.grant.prior)
            .finish_non_exhaustive()
    }
}

/// Renews a [`Lease`] until it is dropped. Made by [`Lease::keep_alive`].
#[must_use = "renewal ends when this is dropped"]
pub struct KeepAlive<'a> {
    // Before the lease: it ends first.
    renewal: Renewal,
    lease: &'a mut Lease,
}

impl KeepAlive<'_> {
    /// The fencing token of the lease that is renewed.
    #[must_use]
    pub fn token(&self) -> u64 {
        self.lease.token()
    }

    /// Why the lease is not renewed any more: [`Error::Superseded`] if somebody has taken over or decided that the work
    /// runs again, [`Error::Poisoned`] or [`Error::Closed`] if the store has ended, [`Error::Io`] if the system gives no
    /// thread to renew. Stop working then. `None` as long as the lease is renewed; known at the next renewal.
    #[must_use]
    pub fn lost(&self) -> Option<Error> {
        self.renewal.lost()
    }
}

impl std::fmt::Debug for KeepAlive<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeepAlive").field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// What completes a lease.
pub(crate) struct Work {
    pub(crate) result: Vec<u8>,
    /// Seldom there, and then on the heap: batches move many of these.
    pub(crate) tx: Option<Box<Tx>>,
}

impl From<Vec<u8>> for Work {
    fn from(result: Vec<u8>) -> Self {
        Self { result, tx: None }
    }
}

impl Work {
    /// A result with what `fill` adds to its write.
    pub(crate) fn with(result: Vec<u8>, fill: impl FnOnce(&mut Tx)) -> Self {
        let mut tx = Box::<Tx>::default();
        fill(&mut tx);
        Self { result, tx: Some(tx) }
    }

    /// The work of each lease of a batch, in its order.
    pub(crate) fn batch<L, R: Into<Vec<u8>>, F: FnOnce(&mut Tx)>(
        leases: impl IntoIterator<Item = (L, R, F)>,
    ) -> impl Iterator<Item = (L, Self)> {
        leases.into_iter().enumerate().map(|(place, (lease, result, fill))| {
            let mut work = Self::with(result.into(), fill);
            if let Some(tx) = &mut work.tx {
                tx.follows = place > 0;
            }
            (lease, work)
        })
    }

    fn settlement(&self, limit: usize) -> FinishKind<'_> {
        FinishKind::Complete(StoredResult::of(&self.result, limit), self.tx.as_deref())
    }
}

/// Leases of this store, each with its work, and in the gaps the answers of those of other stores: they are refused and given
/// back, and what stands behind one of them in its batch takes no offset along.
#[expect(clippy::type_complexity, reason = "leases of two kinds")]
pub(crate) fn sort_out<L>(
    leases: impl IntoIterator<Item = (L, Work)>,
    running: &Arc<StoreHandle>,
    lease_of: impl Fn(&L) -> &Lease,
) -> (Vec<(L, Work)>, Vec<Option<Result<(), CompleteError<L>>>>) {
    let (mut ours, mut answers) = (Vec::new(), Vec::new());
    let mut unbroken = true;
    for (lease, mut work) in leases {
        if is_of(lease_of(&lease), running) {
            if let Some(tx) = work.tx.as_mut().filter(|tx| tx.follows && !unbroken) {
                tx.offsets.clear();
            }
            ours.push((lease, work));
            answers.push(None);
        } else {
            unbroken = false;
            let error = Error::ForeignLease { key: lease_of(&lease).key().to_string() };
            answers.push(Some(Err(CompleteError::new(error, work.result, Some(lease)))));
        }
    }
    (ours, answers)
}

/// The answers of a batch in the callers' order: those that are there already, and in the gaps those that `ours` gives. A
/// gap for which there is none fails, and poisons the store.
pub(crate) fn in_order<E>(
    answers: Vec<Option<Result<(), E>>>,
    ours: impl IntoIterator<Item = Result<(), E>>,
    running: &StoreHandle,
    failed: impl Fn(Error) -> E,
) -> Vec<Result<(), E>> {
    let mut ours = ours.into_iter();
    let mut next = || ours.next().unwrap_or_else(|| Err(failed(unanswered(running))));
    answers.into_iter().map(|answer| answer.unwrap_or_else(&mut next)).collect()
}

/// What a lease fails with that has no answer, where each must have one.
#[cold]
pub(crate) fn unanswered(running: &StoreHandle) -> Error {
    running.engine.broken(Invariant::AnswerForEachKey, format_args!("a lease has none"))
}

fn complete_one(lease: Lease, work: Work) -> Result<Vec<u8>, CompleteError> {
    let running = Arc::clone(&lease.running);
    let lost = || Err(CompleteError::lost(unanswered(&running)));
    complete_all(vec![(lease, work)]).pop().unwrap_or_else(lost)
}

/// Completes leases in one write; an answer for each, with its result.
pub(crate) fn complete_all(mut leases: Vec<(Lease, Work)>) -> Vec<Result<Vec<u8>, CompleteError>> {
    let Some(running) = leases.first().map(|(lease, _)| Arc::clone(&lease.running)) else { return Vec::new() };
    let engine = &running.engine;
    let limit = engine.config().result_limit;
    let settlements = leases.iter().map(|(lease, work)| (&lease.grant, work.settlement(limit))).collect();
    match engine.finish(RecordKind::Completed, FinishedBy::Holder, settlements) {
        Ok(accepted) => leases
            .drain(..)
            .zip(accepted)
            .map(|((mut lease, Work { result, .. }), accepted)| {
                lease.settled = true;
                if accepted { Ok(result) } else { Err(CompleteError::new(lease.grant.superseded(), result, None)) }
            })
            .collect(),
        Err(error) => leases
            .drain(..)
            .map(|(mut lease, Work { result, .. })| {
                let lease = match error.outcome() {
                    Outcome::NotWritten => Some(lease),
                    Outcome::Unknown => {
                        lease.settled = true;
                        None
                    }
                };
                Err(CompleteError::new(error.clone(), result, lease))
            })
            .collect(),
    }
}

/// Releases leases in one write; an answer for each.
pub(crate) fn release_all(mut leases: Vec<(Lease, Duration)>) -> Vec<Result<()>> {
    let Some(running) = leases.first().map(|(lease, _)| Arc::clone(&lease.running)) else { return Vec::new() };
    let engine = &running.engine;
    let (now, window_ms) = (engine.now(), engine.config().span.window_ms);
    // This attempt did nothing. Whether an earlier one did is as open as before.
    let open = |lease: &Lease, backoff| FinishKind::Release {
        prior: lease.grant.prior.unwrap_or(Prior::Released),
        backoff: Backoff::from(&now, backoff, window_ms),
    };
    let settlements = leases.iter().map(|(lease, backoff)| (&lease.grant, open(lease, *backoff))).collect();
    match engine.finish(RecordKind::Released, FinishedBy::Holder, settlements) {
        Ok(accepted) => leases
            .drain(..)
            .zip(accepted)
            .map(|((mut lease, _), accepted)| {
                lease.settled = true;
                if accepted { Ok(()) } else { Err(lease.grant.superseded()) }
            })
            .collect(),
        Err(error) => leases.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// Whether two leases are of one store.
pub(crate) fn is_of(lease: &Lease, running: &Arc<StoreHandle>) -> bool {
    Arc::ptr_eq(&lease.running, running)
}

/// The public form of what the engine answered.
pub(crate) fn claim(claimed: ClaimResponse, running: &Arc<StoreHandle>) -> Claim {
    match claimed {
        ClaimResponse::Acquired(grant) => {
            Claim::Acquired(Lease { grant, running: Arc::clone(running), settled: false })
        }
        ClaimResponse::Completed(done) => Claim::Completed(Completed::new(done)),
        ClaimResponse::InProgress { retry_after_ms, attempt } => {
            Claim::InProgress(in_progress(retry_after_ms, attempt))
        }
    }
}

pub(crate) fn in_progress(retry_after_ms: Option<u64>, attempt: u32) -> InProgress {
    InProgress { retry_after: retry_after_ms.map(Duration::from_millis), attempt }
}

/// Why a completion failed, with the result and, where it is still good, the lease.
///
/// `L` is the kind of lease: [`Lease`], or that of `onlyonce::future`.
#[derive(Debug, thiserror::Error)]
#[error("the completion failed: {}", .0.error)]
pub struct CompleteError<L = Lease>(Box<Failure<L>>);

#[derive(Debug)]
struct Failure<L> {
    error: Error,
    result: Vec<u8>,
    lease: Option<L>,
}

impl<L> CompleteError<L> {
    /// Where neither the result nor the lease is left.
    pub(crate) fn lost(error: Error) -> Self {
        Self::new(error, Vec::new(), None)
    }

    pub(crate) fn new(error: Error, result: Vec<u8>, lease: Option<L>) -> Self {
        Self(Box::new(Failure { error, result, lease }))
    }

    /// What went wrong.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.0.error
    }

    /// Whether the completion may have been stored all the same.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        self.0.error.outcome()
    }

    /// The result that was to be stored.
    #[must_use]
    pub fn result(&self) -> &[u8] {
        &self.0.result
    }

    /// The error, the result, and the lease if it is still good: drop it, or try again with it.
    #[must_use]
    pub fn into_parts(self) -> (Error, Vec<u8>, Option<L>) {
        let Failure { error, result, lease } = *self.0;
        (error, result, lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[test]
    fn a_lease_without_an_answer_fails_and_poisons_the_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let Claim::Acquired(lease) = store.claim("k").unwrap() else { panic!("k is new") };
        let running = Arc::clone(&lease.running);
        let superseded = || Err(lease.grant.superseded());
        let whole = in_order(vec![None, Some(superseded()), None], [Ok(()), Ok(())], &running, |error| error);
        assert!(matches!(whole[..], [Ok(()), Err(Error::Superseded { .. }), Ok(())]), "{whole:?}");
        assert_eq!(running.engine.poisoned(), None);

        let short = in_order(vec![None, Some(superseded()), None], [Ok(())], &running, |error| error);
        let [Ok(()), Err(Error::Superseded { .. }), Err(error @ Error::Broken { .. })] = &short[..] else {
            panic!("{short:?}")
        };
        assert_eq!(error.outcome(), Outcome::Unknown);
        assert!(error.to_string().contains("each key of a call has exactly one answer"), "{error}");
        let refused = store.claim("another").unwrap_err();
        assert!(matches!(&refused, Error::Poisoned { reason } if reason.contains("exactly one answer")), "{refused}");
        let failed = lease.complete("r").unwrap_err();
        assert!(matches!(failed.error(), Error::Poisoned { .. }), "{failed}");
    }

    #[test]
    fn a_call_with_too_few_or_too_many_answers_fails() {
        let dir = tempfile::tempdir().unwrap();
        for (answers, keys) in [(vec![1], 2), (vec![1, 2], 1), (vec![], 1)] {
            let store = Store::open(dir.path().join(format!("{}-{keys}", answers.len()))).unwrap();
            let Claim::Acquired(lease) = store.claim("k").unwrap() else { panic!("k is new") };
            let engine = &lease.running.engine;
            assert_eq!(engine.check_response_count(vec![7; keys], keys).unwrap().len(), keys);
            let error = engine.check_response_count(answers, keys).unwrap_err();
            assert!(matches!(error, Error::Broken { .. }), "{error}");
            assert!(engine.poisoned().is_some());
        }
        assert!(matches!(crate::store::only::<()>(Vec::new()), Err(Error::Broken { .. })));
    }
}
