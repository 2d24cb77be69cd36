use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::{
    Completion, Error, HeldKey, Key, KeyStatus, Message, MessageId, RecordOutcome, Resolution, Result, StoredKey,
    StoredResult, Timestamp,
};

use super::Claim;
use super::builder::Builder;
use super::call::{Call, Operation, Queue, Task};
use super::lease::{CompleteError, Lease};
use super::operations::{ClaimBatch, ClaimKey, Close, CompleteBatch, RecordBatch, RecordKey, ReleaseBatch, only};
use super::shared::Shared;
use crate::codec::RecordKind;
use crate::engine::request::Request;
use crate::engine::response::{FinishKind, FinishedBy};
use crate::stats::Stats;
use onlyonce_core::machine::Backoff;

/// A deduplication and idempotency store in a directory. Clones are handles to the same store.
///
/// Each method that returns a [`Call`] runs by `.wait()` on this thread, or by `.await` on two threads of the store's own. A call takes
/// about as long as the disk needs for a small write; claims, records and completions take longer while keys are completed
/// faster than they can be flushed.
///
/// The store closes by [`Store::close`], or when its last clone and lease are dropped. After an `.await` the latter happens in the
/// background: await `close` before `main` returns.
#[derive(Clone)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

impl Store {
    /// Opens the store in a directory with the default options, or creates it. Blocks.
    ///
    /// # Errors
    ///
    /// As [`Builder::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder().open(path)
    }

    /// The options to open a store with.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Claims a key: asks for a lease on its work.
    ///
    /// A new key costs an append to the journal and no read; under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold) with
    /// [`Durability::Disk`](crate::Durability::Disk) an fdatasync as well. On a store on stream time the key needs its message's
    /// timestamp ([`Key::at`]): stream time advances to it, and the key is remembered until stream time is a window past it.
    ///
    /// # Errors
    ///
    /// [`Error::PayloadMismatch`] if the key was used with a different payload; [`Error::Key`], [`Error::Timestamp`];
    /// [`Error::TooManyInFlight`], [`Error::TooManyHeld`], [`Error::FlushFailed`] for limits. A claim that fails leaves the key
    /// unclaimed, unless its outcome is unknown ([`Error::outcome`]).
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// match store.claim("order-4711").wait()? {
    ///     Claim::Acquired(lease) => lease.complete("charged").wait()?,
    ///     Claim::Completed(first) => println!("already done: {:?}", first.result()),
    ///     Claim::InProgress(other) => println!("in progress elsewhere; retry after {:?}", other.retry_after),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// On stream time:
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, ErrorKind, Key, Store, Timestamp};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let day = Duration::from_secs(24 * 60 * 60);
    /// let store = Store::builder().window(day).stream_time(day).open(path)?;
    /// // A replay of 2023.
    /// for (id, unix_s) in [("a", 1_680_000_000), ("b", 1_680_050_000), ("a", 1_680_000_000)] {
    ///     match store.claim(Key::from(id).at(Timestamp::from_unix_s(unix_s))).wait() {
    ///         Ok(Claim::Acquired(lease)) => lease.complete("done").wait()?,
    ///         Ok(Claim::Completed(_first)) => {} // acknowledge the message
    ///         Ok(Claim::InProgress(_other)) => {} // retry later
    ///         Err(error) if error.kind() == ErrorKind::TooOld => {} // set the message aside
    ///         Err(error) => return Err(error.into()),
    ///     }
    /// }
    /// # assert_eq!(store.stats().duplicates, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn claim<'k>(&self, key: impl Into<Key<'k>>) -> Call<ClaimKey<'_>> {
        Call(ClaimKey { shared: &self.shared, request: self.one(key), limit: None })
    }

    /// Claims each key. A key that occurs twice is acquired once and in progress the second time: complete the leases of the
    /// batch before you wait for a key that was in progress, otherwise the call blocks on its own leases.
    ///
    /// One journal record, whatever the number of keys. On stream time the keys advance it one after the other; the next key of the
    /// batch can confirm one that is too far ahead.
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let messages = ["a", "b", "a"];
    /// let (mut leases, mut later) = (Vec::new(), Vec::new());
    /// for (message, claim) in messages.into_iter().zip(store.claim_batch(messages).wait()?) {
    ///     match claim? {
    ///         Claim::Acquired(lease) => leases.push((lease, format!("did {message}"))),
    ///         Claim::Completed(_first) => {} // acknowledge the message
    ///         Claim::InProgress(_other) => later.push(message),
    ///     }
    /// }
    /// for completed in store.complete_batch(leases).wait() {
    ///     completed?;
    /// }
    /// assert_eq!(later, ["a"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]. An invalid key fails the batch, and the error names its index; so does a missing or unexpected
    /// timestamp, without an index. [`Error::BatchTooLarge`] for more than 1 GiB of keys. Every other error in the list is about
    /// its key alone.
    pub fn claim_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Call<impl Operation<Output = Result<Vec<Result<Claim>>>>> {
        Call(ClaimBatch { shared: &self.shared, request: self.shared.engine().request(keys) })
    }

    /// Returns what a claim would return. Changes nothing: stream time does not advance either.
    ///
    /// Reads memory, and the disk only if a filter finds the key. `New` does not promise a lease: a limit can still reject the
    /// claim.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`].
    pub fn check<'k>(&self, key: impl Into<Key<'k>>) -> Call<impl Operation<Output = Result<KeyStatus>>> {
        let check = self.task(Queue::Ask, self.one(key), |handle, request| only(handle.engine.check(&*request?)?)?);
        Call(check)
    }

    /// Checks each key, as [`Store::check`].
    ///
    /// # Errors
    ///
    /// As [`Store::claim_batch`].
    pub fn check_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Call<impl Operation<Output = Result<Vec<Result<KeyStatus>>>>> {
        let request = self.shared.engine().request(keys);
        Call(self.task(Queue::Ask, request, |handle, request| handle.engine.check(&*request?)))
    }

    /// Records a key as completed, without a lease or a result: the one-write form for filters. As durable as a completion.
    ///
    /// Recording after the effect can repeat it after a crash; recording before the effect can lose it. Record after the
    /// effect, unless a lost one is better than a repeated one.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]. After [`Error::WriteFailed`] the key may be recorded.
    pub fn record<'k>(&self, key: impl Into<Key<'k>>) -> Call<impl Operation<Output = Result<RecordOutcome>>> {
        Call(RecordKey { shared: &self.shared, request: self.one(key) })
    }

    /// Records each key. A key that occurs twice is a duplicate the second time.
    ///
    /// # Errors
    ///
    /// As [`Store::claim_batch`].
    ///
    /// ```
    /// use onlyonce::{RecordOutcome, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let new: Vec<bool> = store
    ///     .record_batch(["a", "b", "a"])
    ///     .wait()?
    ///     .into_iter()
    ///     .map(|recorded| recorded.map(|recorded| recorded == RecordOutcome::First))
    ///     .collect::<Result<_, _>>()?;
    /// assert_eq!(new, [true, true, false]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn record_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Call<impl Operation<Output = Result<Vec<Result<RecordOutcome>>>>> {
        Call(RecordBatch { shared: &self.shared, request: self.shared.engine().request(keys) })
    }

    /// Completes each lease, in one write.
    ///
    /// Pass the leases in the order of their messages: offsets are cumulative, so that after a lease whose completion is
    /// rejected the offsets of the following completions are not stored. Outbox messages depend on their own lease alone. The
    /// store sees only these leases: do not set an offset past a message that is in progress or could not be claimed, and
    /// complete one batch of a partition before the next.
    ///
    /// ```
    /// use onlyonce::{Claim, Completion, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let mut leases = Vec::new();
    /// let mut is_contiguous = true;
    /// for (offset, claim) in (0..).zip(store.claim_batch(["a", "b", "c"]).wait()?) {
    ///     match claim? {
    ///         Claim::Acquired(lease) if is_contiguous => {
    ///             leases.push((lease, Completion::new("done").offset("orders", 0, offset + 1)));
    ///         }
    ///         Claim::Acquired(lease) => leases.push((lease, "done".into())),
    ///         Claim::Completed(_first) => {}
    ///         Claim::InProgress(_other) => is_contiguous = false, // read the message again
    ///     }
    /// }
    /// for completed in store.complete_batch(leases).wait() {
    ///     completed?;
    /// }
    /// assert_eq!(store.offset("orders", 0).wait()?, Some(3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// For each lease as [`Lease::complete`]. A lease of a different store fails with [`Error::ForeignLease`] and is returned.
    /// After an error, continue reading from [`Store::offset`].
    pub fn complete_batch<C: Into<Completion>>(
        &self,
        leases: impl IntoIterator<Item = (Lease, C)>,
    ) -> Call<impl Operation<Output = Vec<Result<(), CompleteError>>>> {
        let leases = leases.into_iter().map(|(lease, completion)| (lease, completion.into())).collect();
        Call(CompleteBatch { shared: &self.shared, leases })
    }

    /// Releases each lease, as [`Lease::release`], for claims after its backoff. A lease of a different store is released there, in
    /// a write of its own.
    ///
    /// # Errors
    ///
    /// For each lease as [`Lease::release`].
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let mut leases = Vec::new();
    /// for claim in store.claim_batch(["a", "b"]).wait()? {
    ///     if let Claim::Acquired(lease) = claim? {
    ///         leases.push((lease, Duration::ZERO));
    ///     }
    /// }
    /// for released in store.release_batch(leases).wait() {
    ///     released?;
    /// }
    /// assert!(matches!(store.claim("a").wait()?, Claim::Acquired(lease) if lease.attempt().number() == 2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn release_batch(
        &self,
        leases: impl IntoIterator<Item = (Lease, Duration)>,
    ) -> Call<impl Operation<Output = Vec<Result<()>>>> {
        Call(ReleaseBatch { shared: &self.shared, leases: leases.into_iter().collect() })
    }

    /// Returns everything that is stored about a key, for tools and operators. `None` if a claim would be its first. Needs no
    /// timestamp on stream time, and ignores `key_limit`.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`], without the limits.
    pub fn inspect<'k>(&self, key: impl Into<Key<'k>>) -> Call<impl Operation<Output = Result<Option<StoredKey>>>> {
        Call(self.task(Queue::Ask, self.about(key), |handle, request| handle.engine.inspect(&*request?)))
    }

    /// Returns the stored offset of a partition: that of the last completion with [`Completion::offset`], or of
    /// [`Store::set_offset`]. `None` if none was stored.
    ///
    /// Under [`Durability::Disk`](crate::Durability::Disk) it syncs the journal first, so that the offset can be committed to a
    /// broker. Under `Process` a power cut can undo the offsets of the last `sync_interval`.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::Poisoned`], [`Error::Io`], [`Error::Corrupt`].
    pub fn offset(
        &self,
        stream: impl Into<Vec<u8>>,
        partition: u32,
    ) -> Call<impl Operation<Output = Result<Option<u64>>>> {
        let place = (stream.into(), partition);
        Call(self.task(Queue::Commit, place, |handle, (stream, partition)| handle.engine.offset(&stream, partition)))
    }

    /// Stores a consumer offset on its own, e.g. after a run of duplicates. One write, as durable as a completion. The last write
    /// counts, also if it is lower.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::Poisoned`], and [`Error::WriteFailed`], after which it may be stored.
    pub fn set_offset(
        &self,
        stream: impl Into<Vec<u8>>,
        partition: u32,
        offset: u64,
    ) -> Call<impl Operation<Output = Result<()>>> {
        let write = (stream.into(), partition, offset);
        Call(self.task(Queue::Commit, write, |handle, (stream, partition, offset)| {
            handle.engine.set_offset(&stream, partition, offset)
        }))
    }

    /// Returns the first messages of the outbox, at most `limit`, in the order in which their completions began. A message of a
    /// slower completion can appear later, before others. The disk is the only limit to their number.
    ///
    /// A message becomes visible once its completion is durable: synced under [`Durability::Disk`](crate::Durability::Disk). Under
    /// `Process` a power cut can undo the completions of the last `sync_interval`; their work and messages are then repeated, with
    /// new ids. Use one publisher at a time, and publish before you remove: after a crash in between, the message is published
    /// again with the same [`Message::id`].
    ///
    /// # Errors
    ///
    /// As [`Store::offset`].
    pub fn outbox(&self, limit: usize) -> Call<impl Operation<Output = Result<Vec<Message>>>> {
        Call(self.task(Queue::Ask, limit, |handle, limit| handle.engine.outbox(limit)))
    }

    /// Removes messages from the outbox. Unknown ids are ignored. One write, not synced: a power cut can bring messages back.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::Poisoned`], and [`Error::WriteFailed`], after which they may be removed.
    pub fn remove_messages(
        &self,
        ids: impl IntoIterator<Item = MessageId>,
    ) -> Call<impl Operation<Output = Result<()>>> {
        let ids: Vec<MessageId> = ids.into_iter().collect();
        Call(self.task(Queue::Commit, ids, |handle, ids| handle.engine.remove_messages(ids)))
    }

    /// Lists the keys that are held for resolution under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold), the oldest claim first.
    /// Visits all keys in memory; awaited claims wait for it.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] and [`Error::Closed`].
    pub fn held(&self) -> Call<impl Operation<Output = Result<Vec<HeldKey>>>> {
        Call(self.task(Queue::Ask, (), |handle, ()| handle.engine.held()))
    }

    /// Decides about a held key. As durable as a completion.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if it is not held.
    pub fn resolve<'k>(
        &self,
        key: impl Into<Key<'k>>,
        resolution: Resolution,
    ) -> Call<impl Operation<Output = Result<()>>> {
        let decision = (self.about(key), resolution);
        Call(self.task(Queue::Commit, decision, |handle, (request, resolution)| {
            let (engine, request) = (&handle.engine, request?);
            let not_held = || {
                let key = request.iter().next().map(|key_ref| Key::display_encoded(key_ref.key));
                Error::NotHeld { key: key.unwrap_or_default() }
            };
            let (grant, prior) = engine.held_grant(&request)?.ok_or_else(not_held)?;
            let (kind, finish) = match &resolution {
                Resolution::Rerun => (RecordKind::Released, FinishKind::Release { prior, backoff: Backoff::NONE }),
                Resolution::Completed(result) => {
                    let result = StoredResult::within(result, engine.config().result_limit);
                    (RecordKind::Completed, FinishKind::Complete { result, side_writes: None, follows: false })
                }
            };
            let accepted = engine.finish(kind, FinishedBy::Operator, vec![(&grant, finish)])?;
            if matches!(accepted[..], [Ok(true)]) { Ok(()) } else { Err(not_held()) }
        }))
    }

    /// Removes everything that is stored about a key, so that the next claim is its first. True if there was something.
    ///
    /// For operators: it waits for a running flush, and its write is as durable as a completion. Other awaited calls that write
    /// wait for it.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] while the key is leased; [`Error::Undecided`] while it is held.
    pub fn forget<'k>(&self, key: impl Into<Key<'k>>) -> Call<impl Operation<Output = Result<bool>>> {
        Call(self.task(Queue::Commit, self.about(key), |handle, request| handle.engine.forget(&*request?)))
    }

    /// Advances stream time to a timestamp, unless it is already later: for operators who know that a message that is too far
    /// ahead is right, and for streams without messages. Keys that expire by then are forgotten permanently. One synced write.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a time that is more than a year ahead of both the wall clock and stream time;
    /// [`TimestampError::Unexpected`](crate::TimestampError::Unexpected) on a store that runs on its clock;
    /// [`Error::WriteFailed`], after which it counts until the store is closed, and perhaps longer.
    pub fn advance_stream_time(&self, to: impl Into<Timestamp>) -> Call<impl Operation<Output = Result<()>>> {
        let to = to.into().as_unix_ms();
        Call(self.task(Queue::Commit, to, |handle, to_ms| handle.engine.advance_stream_time(to_ms)))
    }

    /// Waits for the running calls, syncs, and releases the directory. Clones and leases that remain get [`Error::Closed`].
    ///
    /// # Errors
    ///
    /// [`Error::WriteFailed`] if the last sync fails: under [`Durability::Process`](crate::Durability::Process) the writes of the
    /// last `sync_interval` may be lost.
    pub fn close(&self) -> Call<impl Operation<Output = Result<()>>> {
        Call(Close { shared: &self.shared })
    }

    /// The store's counts and gauges. Visits all keys in memory and all files: not for every request.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.shared.engine().stats()
    }

    /// The store's directory, as an absolute path.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shared.engine().path()
    }

    /// How long a completed key is remembered.
    #[must_use]
    pub fn window(&self) -> Duration {
        Duration::from_millis(self.shared.engine().config().span.window_ms)
    }

    /// Flushes all completed keys from memory to their buckets and drops expired buckets, as the store does by itself in the
    /// background. For tests and benchmarks.
    ///
    /// # Errors
    ///
    /// [`Error::Io`]: nothing is lost, and the store tries again later. [`Error::WriteFailed`] if the journal cannot be synced.
    #[doc(hidden)]
    pub fn flush(&self) -> Result<()> {
        self.shared.engine().flush_and_rotate()
    }

    /// Counts work that ran without an answer of the store, for adapters of other frameworks.
    #[doc(hidden)]
    pub fn count_fail_open(&self) {
        self.shared.engine().count_fail_open();
    }

    fn one<'k>(&self, key: impl Into<Key<'k>>) -> Result<Arc<Request>> {
        self.shared.engine().request(std::iter::once(key))
    }

    fn about<'k>(&self, key: impl Into<Key<'k>>) -> Result<Arc<Request>> {
        self.shared.engine().request_about(std::iter::once(key))
    }

    fn task<D, T>(
        &self,
        queue: Queue,
        data: D,
        run: fn(&crate::engine::workers::StoreHandle, D) -> Result<T>,
    ) -> Task<'_, D, T> {
        Task { shared: &self.shared, queue, data, run }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("path", &self.path()).field("window", &self.window()).finish_non_exhaustive()
    }
}
