//! The store's verbs as futures.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::committer::Committer;
use super::lease::{claim, failed};
use super::{Claim, CompleteError, Lease, RunError};
use crate::claim::{Work, in_order, is_of, sort_out};
use crate::engine::request::Request;
use crate::error::{Error, Result, other_unit};
use crate::key::Key;
use crate::store::{self, Check, Ran, Recorded, Stored, checked, earlier, only, recorded};
use crate::tx::{Message, MessageId, Tx};

/// Calls that a queue holds where nothing else is said.
const QUEUE: usize = 1_024;
/// The most that may be said.
const MAX_QUEUE: usize = 1_000_000;

/// A [`Store`](crate::Store) whose calls are futures. Clones share one committer; make one and clone it.
///
/// When the last clone and lease are dropped, the committer does what is left in its queues, lets go of the store and
/// closes it if nobody else has it: in the background, so that nobody waits. [`Store::close`] is the way to know. Await it
/// before `main` returns: a process that ends while the store is closing may be ended by SIGABRT in RocksDB's own teardown;
/// nothing that was acknowledged is lost by it.
///
/// What is not here ([`held`](crate::Store::held), [`resolve`](crate::Store::resolve), [`forget`](crate::Store::forget),
/// [`seal`](crate::Store::seal), [`stats`](crate::Store::stats)) is for operators and may take long: call it on
/// [`Store::blocking`] in Tokio's `spawn_blocking`.
#[derive(Clone)]
pub struct Store {
    committer: Arc<Committer>,
}

impl Store {
    /// Starts the two threads of a committer for an open store.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the system gives no thread.
    pub fn new(store: store::Store) -> Result<Self> {
        Self::with_queue(store, QUEUE)
    }

    /// As [`Store::new`], with queues of so many calls each, from 1 to 1,000,000. A batch is one call. More than the
    /// tasks that call at the same time is of no use; fewer make smaller commit groups.
    ///
    /// # Errors
    ///
    /// As [`Store::new`], and [`Error::Config`] for a number out of its bounds.
    pub fn with_queue(store: store::Store, calls: usize) -> Result<Self> {
        if !(1..=MAX_QUEUE).contains(&calls) {
            let bounds = format!("from 1 to {MAX_QUEUE}");
            return Err(Error::Config { option: "with_queue", value: calls.to_string(), bounds });
        }
        let committer = Committer::start(Arc::clone(&store.running), calls)?;
        Ok(Self { committer: Arc::new(committer) })
    }

    /// The same store, whose calls block. So does dropping it, where it is the last.
    #[must_use]
    pub fn blocking(&self) -> store::Store {
        store::Store { running: Arc::clone(&self.committer.running) }
    }

    /// Asks for the right to work on a key, as [`Store::claim`](crate::Store::claim). Claims at the same time share one
    /// write.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`](crate::Store::claim).
    pub async fn claim<'k>(&self, key: impl Into<Key<'k>>) -> Result<Claim> {
        let request = self.one(key)?;
        self.claim_one(&request).await
    }

    /// As [`Store::claim`], for a message with this timestamp on a store that runs on stream time, as
    /// [`Store::claim_at`](crate::Store::claim_at).
    ///
    /// # Errors
    ///
    /// As [`Store::claim_at`](crate::Store::claim_at).
    pub async fn claim_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Claim> {
        let request = self.one_at(key, timestamp_ms)?;
        self.claim_one(&request).await
    }

    /// As [`Store::claim`], but waits up to `limit` for a holder in this process to be done with the key: then it answers
    /// with the result, or gets the key where it was released or dropped or its lease ran out. `InProgress` after the
    /// limit.
    ///
    /// It is woken, and asks again only then and when the holder's lease or backoff ends. A key held under
    /// [`OnInterrupt::Hold`](crate::OnInterrupt::Hold) is waited for until it is resolved. The limit runs on Tokio's clock.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, future};
    ///
    /// # async fn work(store: &future::Store) -> Result<(), Box<dyn std::error::Error>> {
    /// let Claim::Acquired(lease) = store.claim("order-4711").await? else { unreachable!() };
    /// let holder = tokio::spawn(lease.complete("charged"));
    /// match store.claim_wait("order-4711", Duration::from_secs(10)).await? {
    ///     Claim::Completed(first) => assert_eq!(first.result(), Some(&b"charged"[..])),
    ///     other => panic!("its holder was at it: {other:?}"),
    /// }
    /// holder.await??;
    /// # Ok(())
    /// # }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let store = future::Store::new(onlyonce::Store::open(dir.path().join("store"))?)?;
    /// # let runtime = tokio::runtime::Runtime::new()?;
    /// # runtime.block_on(work(&store))?;
    /// # Ok(runtime.block_on(store.close())?)
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]; [`Error::Closed`] and [`Error::Poisoned`] where the store ends meanwhile.
    ///
    /// # Panics
    ///
    /// In a Tokio runtime without time, where it has to wait.
    pub async fn claim_wait<'k>(&self, key: impl Into<Key<'k>>, limit: Duration) -> Result<Claim> {
        let request = self.one(key)?;
        self.wait_for_one(&request, limit).await
    }

    /// As [`Store::claim_wait`], for a delivery: its timestamp counts where the store runs on stream time, and must be in
    /// milliseconds there.
    pub(crate) async fn claim_delivered(
        &self,
        key: Key<'_>,
        timestamp_ms: Option<u64>,
        limit: Duration,
    ) -> Result<Claim> {
        let request = match (self.one(key.clone()), timestamp_ms) {
            (Err(Error::TimestampMissing), Some(at_ms)) => match other_unit(at_ms) {
                Some(unit) => return Err(Error::TimestampUnit { key: key.to_string(), at_ms, unit }),
                None => self.one_at(key, at_ms)?,
            },
            (request, _) => request?,
        };
        self.wait_for_one(&request, limit).await
    }

    pub(super) async fn wait_for_one(&self, request: &Arc<Request>, limit: Duration) -> Result<Claim> {
        let engine = &self.committer.running.engine;
        let end = now().checked_add(limit);
        let mut place = None;
        loop {
            let answer = self.claim_one(request).await?;
            let Claim::InProgress(other) = &answer else { return Ok(answer) };
            if end.is_some_and(|end| end <= now()) {
                return Ok(answer);
            }
            if let Some(place) = place.take() {
                match earlier(end, other.retry_after, now()) {
                    None => place.await,
                    Some(until) => drop(timeout_at(until.into(), place).await),
                }
            }
            // Before the next question: what ends from here on wakes us.
            place = request.digests().next().map(|digest| engine.wait_for(digest));
        }
    }

    /// What a claim would find, as [`Store::check`](crate::Store::check). Changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`].
    pub async fn check<'k>(&self, key: impl Into<Key<'k>>) -> Result<Check> {
        self.check_one(self.one(key)?).await
    }

    /// As [`Store::check`], for a message with this timestamp, as [`Store::check_at`](crate::Store::check_at).
    ///
    /// # Errors
    ///
    /// As [`Store::claim_at`].
    pub async fn check_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Check> {
        self.check_one(self.one_at(key, timestamp_ms)?).await
    }

    async fn check_one(&self, request: Arc<Request>) -> Result<Check> {
        let answers = self.committer.ask(move |running| running.engine.check(&request)).await??;
        Ok(checked(only(answers)??))
    }

    /// What is stored of a key, as [`Store::get`](crate::Store::get).
    ///
    /// # Errors
    ///
    /// As [`Store::claim`], without the limits.
    pub async fn get<'k>(&self, key: impl Into<Key<'k>>) -> Result<Option<Stored>> {
        let request = self.committer.running.engine.request_about(std::iter::once(key))?;
        let entries = self.committer.ask(move |running| running.engine.get(&request)).await??;
        Ok(only(entries)?.map(|entry| store::stored(entry, &self.committer.running.engine)))
    }

    /// Marks a key as completed, as [`Store::record`](crate::Store::record): after the effect, unless losing is better than
    /// repeating. Records at the same time share one write and one sync.
    ///
    /// # Errors
    ///
    /// As [`Store::record`](crate::Store::record).
    pub async fn record<'k>(&self, key: impl Into<Key<'k>>) -> Result<Recorded> {
        let request = self.one(key)?;
        Ok(recorded(&only(self.committer.record(request).await?)??))
    }

    /// As [`Store::record`], for a message with this timestamp, as [`Store::record_at`](crate::Store::record_at).
    ///
    /// # Errors
    ///
    /// As [`Store::record_at`](crate::Store::record_at).
    pub async fn record_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Recorded> {
        let request = self.one_at(key, timestamp_ms)?;
        Ok(recorded(&only(self.committer.record(request).await?)??))
    }

    /// Claims the key, does the work and completes it with the result; gives the stored result where the work was
    /// done before; releases the key where the work fails. Where this future is dropped, or the work panics, while the
    /// work runs, the lease is dropped: the next claim is told [`Prior::Dropped`](crate::Prior::Dropped). The lease is
    /// renewed while the work runs, as by [`Lease::keep_alive`]; where it is lost all the same, the work goes on, and its
    /// completion is refused with [`Error::Superseded`].
    ///
    /// An `Err` of the work says that it did nothing. Where it may have (a timeout after the charge was sent), claim and
    /// drop the lease yourself: the next holder is told then.
    ///
    /// ```
    /// use onlyonce::{Ran, future};
    ///
    /// # async fn charge(_token: u64) -> Result<Vec<u8>, std::io::Error> { Ok(b"receipt 1".to_vec()) }
    /// # async fn work(store: &future::Store) -> Result<(), Box<dyn std::error::Error>> {
    /// for _ in 0..2 {
    ///     match store.run("order-4711", async |lease| charge(lease.token()).await).await? {
    ///         Ran::First(result) => assert_eq!(result, b"receipt 1"),
    ///         Ran::Replayed(first) => assert_eq!(first.result(), Some(&b"receipt 1"[..])),
    ///         Ran::InProgress(_) => unreachable!("nobody else works here"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let store = future::Store::new(onlyonce::Store::open(dir.path().join("store"))?)?;
    /// # let runtime = tokio::runtime::Runtime::new()?;
    /// # runtime.block_on(work(&store))?;
    /// # Ok(runtime.block_on(store.close())?)
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`RunError`] says whether the claim, the work or the completion failed.
    pub async fn run<'k, E>(
        &self,
        key: impl Into<Key<'k>>,
        work: impl AsyncFnOnce(&mut Lease) -> Result<Vec<u8>, E>,
    ) -> Result<Ran, RunError<E>> {
        let mut lease = match self.claim(key).await.map_err(RunError::Claim)? {
            Claim::Acquired(lease) => lease,
            Claim::Completed(first) => return Ok(Ran::Replayed(first)),
            Claim::InProgress(other) => return Ok(Ran::InProgress(other)),
        };
        let renewal = lease.lease.renewal();
        let done = work(&mut lease).await;
        drop(renewal);
        match done {
            Ok(result) => lease.finish(result.into()).await.map(Ran::First).map_err(RunError::Complete),
            Err(error) => {
                if let Err(error) = lease.release().await {
                    tracing::warn!(%error, "the key of failed work could not be released");
                }
                Err(RunError::Work(error))
            }
        }
    }

    /// What a claim of each key would find, as [`Store::check_batch`](crate::Store::check_batch).
    ///
    /// # Errors
    ///
    /// As [`Store::check_batch`](crate::Store::check_batch).
    pub async fn check_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Result<Check>>> {
        self.check_request(self.committer.running.engine.request(keys)?).await
    }

    /// As [`Store::check_batch`], for messages with their timestamps, as
    /// [`Store::check_batch_at`](crate::Store::check_batch_at).
    ///
    /// # Errors
    ///
    /// As [`Store::check_batch_at`](crate::Store::check_batch_at).
    pub async fn check_batch_at<'k, K: Into<Key<'k>>>(
        &self,
        messages: impl IntoIterator<Item = (K, u64)>,
    ) -> Result<Vec<Result<Check>>> {
        self.check_request(self.committer.running.engine.request_at(messages)?).await
    }

    async fn check_request(&self, request: Arc<Request>) -> Result<Vec<Result<Check>>> {
        let answers = self.committer.ask(move |running| running.engine.check(&request)).await??;
        Ok(answers.into_iter().map(|answer| answer.map(checked)).collect())
    }

    /// Claims each key, as [`Store::claim_batch`](crate::Store::claim_batch).
    ///
    /// ```
    /// use onlyonce::{Claim, future};
    ///
    /// # async fn work(store: &future::Store) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut leases = Vec::new();
    /// for claim in store.claim_batch(["a", "b"]).await? {
    ///     if let Claim::Acquired(lease) = claim? {
    ///         leases.push((lease, "done"));
    ///     }
    /// }
    /// for completed in store.complete_batch(leases).await {
    ///     completed?;
    /// }
    /// # Ok(())
    /// # }
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let store = future::Store::new(onlyonce::Store::open(dir.path().join("store"))?)?;
    /// # let runtime = tokio::runtime::Runtime::new()?;
    /// # runtime.block_on(work(&store))?;
    /// # Ok(runtime.block_on(store.close())?)
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Store::claim_batch`](crate::Store::claim_batch).
    pub async fn claim_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Result<Claim>>> {
        self.claim_request(self.committer.running.engine.request(keys)?).await
    }

    /// As [`Store::claim_batch`], for messages with their timestamps, as
    /// [`Store::claim_batch_at`](crate::Store::claim_batch_at).
    ///
    /// # Errors
    ///
    /// As [`Store::claim_batch_at`](crate::Store::claim_batch_at).
    pub async fn claim_batch_at<'k, K: Into<Key<'k>>>(
        &self,
        messages: impl IntoIterator<Item = (K, u64)>,
    ) -> Result<Vec<Result<Claim>>> {
        self.claim_request(self.committer.running.engine.request_at(messages)?).await
    }

    async fn claim_request(&self, request: Arc<Request>) -> Result<Vec<Result<Claim>>> {
        let claims = self.committer.claim(request).await?.open();
        Ok(claims.into_iter().map(|claimed| Ok(claim(claimed?, &self.committer))).collect())
    }

    /// Completes each lease with its result, as [`Store::complete_batch`](crate::Store::complete_batch). Dropped when it
    /// was polled once, it happens all the same, unless the queue was full; otherwise its leases are dropped.
    ///
    /// # Errors
    ///
    /// For each lease as [`Lease::complete`]. A lease of another store is refused with [`Error::ForeignLease`] and
    /// given back.
    #[must_use = "each lease has an answer of its own"]
    pub async fn complete_batch<R: Into<Vec<u8>>>(
        &self,
        leases: impl IntoIterator<Item = (Lease, R)>,
    ) -> Vec<Result<(), CompleteError>> {
        self.complete_works(leases.into_iter().map(|(lease, result)| (lease, result.into().into()))).await
    }

    /// As [`Store::complete_batch`], with what each `fill` adds to the same write, as
    /// [`Store::complete_batch_with`](crate::Store::complete_batch_with): behind a lease that is refused no offset of the
    /// batch is stored. Set none behind a message that somebody else is at, either, and complete one batch of a partition
    /// before the next.
    ///
    /// # Errors
    ///
    /// As [`Store::complete_batch`]. After one, go on reading from [`Store::offset`].
    #[must_use = "each lease has an answer of its own"]
    pub async fn complete_batch_with<R: Into<Vec<u8>>, F: FnOnce(&mut Tx)>(
        &self,
        leases: impl IntoIterator<Item = (Lease, R, F)>,
    ) -> Vec<Result<(), CompleteError>> {
        self.complete_works(Work::batch(leases)).await
    }

    async fn complete_works(&self, leases: impl IntoIterator<Item = (Lease, Work)>) -> Vec<Result<(), CompleteError>> {
        let (ours, answers) = sort_out(leases, &self.committer.running, |lease| &lease.lease);
        let ours: Vec<_> = ours.into_iter().map(|(lease, work)| (lease.lease, work)).collect();
        let completed = if ours.is_empty() { Vec::new() } else { self.committer.complete(ours).await };
        let own = |answer: Result<_, _>| answer.map(drop).map_err(|error| failed(error, &self.committer));
        in_order(answers, completed.into_iter().map(own), &self.committer.running, CompleteError::lost)
    }

    /// How far a partition of a stream was read, as [`Store::offset`](crate::Store::offset).
    ///
    /// # Errors
    ///
    /// As [`Store::offset`](crate::Store::offset).
    pub async fn offset(&self, stream: impl AsRef<[u8]>, partition: u32) -> Result<Option<u64>> {
        let stream = stream.as_ref().to_owned();
        self.committer.call(move |running| running.engine.offset(&stream, partition)).await?
    }

    /// Notes how far a partition was read, as [`Store::set_offset`](crate::Store::set_offset): with a sync of its own under
    /// [`Durability::Disk`](crate::Durability::Disk). Dropped, it is made or not.
    ///
    /// # Errors
    ///
    /// As [`Store::set_offset`](crate::Store::set_offset).
    pub async fn set_offset(&self, stream: impl AsRef<[u8]>, partition: u32, offset: u64) -> Result<()> {
        let stream = stream.as_ref().to_owned();
        self.committer.call(move |running| running.engine.set_offset(&stream, partition, offset)).await?
    }

    /// The first messages of the outbox, as [`Store::outbox`](crate::Store::outbox).
    ///
    /// # Errors
    ///
    /// As [`Store::outbox`](crate::Store::outbox).
    pub async fn outbox(&self, limit: usize) -> Result<Vec<Message>> {
        self.committer.ask(move |running| running.engine.outbox(limit)).await?
    }

    /// Removes messages from the outbox, as [`Store::delivered`](crate::Store::delivered). Dropped, it is made or not.
    ///
    /// # Errors
    ///
    /// As [`Store::delivered`](crate::Store::delivered).
    pub async fn delivered(&self, ids: impl IntoIterator<Item = MessageId>) -> Result<()> {
        let ids: Vec<MessageId> = ids.into_iter().collect();
        self.committer.call(move |running| running.engine.delivered(ids)).await?
    }

    /// Releases each lease after its backoff, as [`Store::release_batch`](crate::Store::release_batch).
    ///
    /// # Errors
    ///
    /// For each lease as [`Lease::release`].
    #[must_use = "each lease has an answer of its own"]
    pub async fn release_batch(&self, leases: impl IntoIterator<Item = (Lease, Duration)>) -> Vec<Result<()>> {
        let mut ours = Vec::new();
        let mut answers: Vec<Option<Result<()>>> = Vec::new();
        for (lease, backoff) in leases {
            if is_of(&lease.lease, &self.committer.running) {
                ours.push((lease.lease, backoff));
                answers.push(None);
            } else {
                answers.push(Some(lease.release_after(backoff).await));
            }
        }
        let released = if ours.is_empty() { Vec::new() } else { self.committer.release(ours).await };
        in_order(answers, released, &self.committer.running, |error| error)
    }

    /// Records each key, as [`Store::record_batch`](crate::Store::record_batch).
    ///
    /// # Errors
    ///
    /// As [`Store::record_batch`](crate::Store::record_batch).
    pub async fn record_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Result<Recorded>>> {
        self.record_request(self.committer.running.engine.request(keys)?).await
    }

    /// As [`Store::record_batch`], for messages with their timestamps, as
    /// [`Store::record_batch_at`](crate::Store::record_batch_at).
    ///
    /// # Errors
    ///
    /// As [`Store::record_batch_at`](crate::Store::record_batch_at).
    pub async fn record_batch_at<'k, K: Into<Key<'k>>>(
        &self,
        messages: impl IntoIterator<Item = (K, u64)>,
    ) -> Result<Vec<Result<Recorded>>> {
        self.record_request(self.committer.running.engine.request_at(messages)?).await
    }

    async fn record_request(&self, request: Arc<Request>) -> Result<Vec<Result<Recorded>>> {
        let answers = self.committer.record(request).await?;
        Ok(answers.into_iter().map(|answer| answer.map(|answer| recorded(&answer))).collect())
    }

    /// What `delivery` counts, for the figures of the store.
    pub(crate) fn delivery_counters(&self) -> &crate::stats::DeliveryCounters {
        self.committer.running.engine.delivery_counters()
    }

    /// Counts a message that was let through without an answer, as [`Store::count_fail_open`](crate::Store::count_fail_open).
    pub fn count_fail_open(&self) {
        self.committer.running.engine.count_fail_open();
    }

    /// Does what is in the queues, puts everything on the disk and lets go of the directory. Clones and leases that are
    /// left, those of [`Store::blocking`] too, get [`Error::Closed`].
    ///
    /// # Errors
    ///
    /// As [`Store::close`](crate::Store::close).
    pub async fn close(&self) -> Result<()> {
        self.committer.close().await
    }

    /// The largest result that is kept, in bytes.
    #[cfg(feature = "http")]
    pub(crate) fn result_limit(&self) -> usize {
        self.committer.running.engine.config().result_limit
    }

    #[cfg(test)]
    pub(super) fn committer(&self) -> &Arc<Committer> {
        &self.committer
    }

    pub(super) fn one<'k>(&self, key: impl Into<Key<'k>>) -> Result<Arc<Request>> {
        self.committer.running.engine.request(std::iter::once(key))
    }

    fn one_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Arc<Request>> {
        self.committer.running.engine.request_at(std::iter::once((key, timestamp_ms)))
    }

    async fn claim_one(&self, request: &Arc<Request>) -> Result<Claim> {
        let claimed = only(self.committer.claim(Arc::clone(request)).await?.open())??;
        Ok(claim(claimed, &self.committer))
    }
}

/// Now, on the clock that Tokio's timers run on.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}
