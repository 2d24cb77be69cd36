//! The store: opening it, and one key at a time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::claim::{self, Claim, CompleteError, Completed, InProgress, Lease, in_progress};
use crate::clock::Clock;
use crate::codec::RecordKind;
use crate::config::{Durability, OnInterrupt, Options};
use crate::engine::core::Engine;
use crate::engine::request::Request;
use crate::engine::response::{FinishKind, FinishedBy, HeldEntry, Response, display};
use crate::engine::transition::LeaseState;
use crate::engine::waiters::Waiter;
use crate::engine::workers::StoreHandle;
use crate::entry::{Backoff, Entry, Prior, Processing, StoredResult};
use crate::error::{Error, Result};
use crate::fs::directory::Directory;
use crate::invariant::Invariant;
use crate::key::Key;
use crate::stats::Stats;
use crate::tx::{Message, MessageId};

/// A deduplication and idempotency store in a directory. Clones are handles to the same store.
///
/// All calls block, usually for as long as the disk needs for a small write. Claims, records and completions wait longer
/// where keys are completed faster than they can be moved to disk; [`Store::seal`], [`Store::forget`],
/// [`Store::stats`], [`Store::held`] and [`Store::close`] say what they wait for. The store closes when it is told to, or
/// when its last clone and lease are dropped.
#[derive(Clone)]
pub struct Store {
    pub(crate) running: Arc<StoreHandle>,
}

/// The options of a store. Made by [`Store::builder`].
#[derive(Clone)]
#[must_use = "a builder does nothing before `open`"]
pub struct Builder {
    options: Options,
}

impl Builder {
    /// How long a completed key is remembered. From 1 ms to 10 years; by default what the store was last opened with,
    /// 24 hours for a new one. Opening with a narrower window forgets older keys for good: a wider one later does not bring
    /// them back, and does not claim to remember them ([`Stats::remembers_since_ms`](crate::Stats::remembers_since_ms)).
    pub fn window(mut self, window: Duration) -> Self {
        self.options.window = Some(window);
        self
    }

    /// The width of the time slices that completed keys are kept and dropped in. By default a 24th of the window;
    /// at most 48 must cover it. Storage outlives the window by one slice at most; answers do not.
    pub fn bucket(mut self, width: Duration) -> Self {
        self.options.bucket = Some(width);
        self
    }

    /// How long a claim is safe from being taken over, unless renewed. From 1 ms to a year, 30 seconds by default.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.options.lease = lease;
        self
    }

    /// How long after its claim a lease is renewed at most while its work runs: in [`Store::run`], under
    /// [`Lease::keep_alive`], and by the layers for requests and deliveries. A key is in progress for that long at most, or
    /// for one `lease` if that is longer; then the next claim gets it with prior
    /// [`LeaseExpired`](crate::Prior::LeaseExpired), or it is held. The work itself is not stopped until then.
    ///
    /// From 1 ms to a year. Without it there is no limit: work that never ends keeps its key until its process ends.
    /// [`Lease::renew`] is not limited.
    pub fn renew_for(mut self, limit: Duration) -> Self {
        self.options.renew_for = Some(limit);
        self
    }

    /// When a finished call is safe. [`Durability::Disk`] by default.
    pub fn durability(mut self, durability: Durability) -> Self {
        self.options.durability = durability;
        self
    }

    /// Under [`Durability::Process`], how often the log is synced: what a power cut can take. From 1 ms to an hour,
    /// 1 second by default.
    pub fn sync_interval(mut self, interval: Duration) -> Self {
        self.options.sync_interval = interval;
        self
    }

    /// What becomes of a key whose holder vanished. By default what the store was last opened with,
    /// [`OnInterrupt::Rerun`] for a new one.
    pub fn on_interrupt(mut self, on_interrupt: OnInterrupt) -> Self {
        self.options.on_interrupt = Some(on_interrupt);
        self
    }

    /// Creates a store that runs on stream time: windows are driven by the timestamps of its messages, which are given with
    /// [`Store::claim_at`], [`Store::check_at`] and [`Store::record_at`], and no clock ages a key. So a backlog after an outage, or
    /// a replay of last year, finds the duplicates that it would have found then.
    ///
    /// One message may be `max_ahead` ahead of stream time; one that is further ahead needs another one that confirms it:
    /// [`Error::TooFarAhead`]. From 1 ms to the window, which is a good choice. A store that was created so stays so, and
    /// keeps `max_ahead` when this is left out; one that was not is refused.
    pub fn stream_time(mut self, max_ahead: Duration) -> Self {
        self.options.stream_time = Some(max_ahead);
        self
    }

    /// Bytes of memory for filters (half at most), unsealed keys (half at most, usually a quarter), cached blocks (a
    /// quarter) and the journal's memtable (an eighth each). From 32 MiB to 16 TiB, 256 MiB by default. Keys in flight come
    /// on top: see [`Builder::in_flight_limit`].
    pub fn memory_budget(mut self, bytes: usize) -> Self {
        self.options.memory_budget = bytes;
        self
    }

    /// How many keys a second will be completed, on the average of a bucket: the filter of the first buckets is made for
    /// it. Without it they start small and grow by layers, of which each makes a check dearer, until a bucket has ended
    /// and shows what buckets come to. A wrong guess costs memory or layers, never an answer. 0, which is unknown, by
    /// default.
    pub fn expected_rate(mut self, keys_per_s: u64) -> Self {
        self.options.expected_rate = keys_per_s;
        self
    }

    /// The largest result that is kept, in bytes; of a larger one only the fact is. At most 64 MiB, 1 MiB by default.
    pub fn result_limit(mut self, bytes: usize) -> Self {
        self.options.result_limit = bytes;
        self
    }

    /// The longest key that is accepted, with its scope, in bytes. From 1 to 65,535, 1,024 by default. Keys that were longer
    /// when they were claimed can still be looked up, resolved and forgotten.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.options.key_limit = bytes;
        self
    }

    /// How many keys may be in progress at a time: leased, or with a lease that has run out while its holder's process
    /// lives. Each takes about 250 bytes of memory, and up to six times its key's length while a flush writes it again:
    /// keep it low where strangers choose long keys. 1,000,000 by default. A claim over it is refused with
    /// [`Error::TooManyInFlight`]. Released and dropped keys do not count: they move to disk, for a window.
    pub fn in_flight_limit(mut self, keys: usize) -> Self {
        self.options.in_flight_limit = keys;
        self
    }

    /// How many keys may be held for a decision under [`OnInterrupt::Hold`]. They stay in memory, about 250 bytes each, until
    /// [`Store::resolve`] is called. 1,000,000 by default. A claim over it is refused with [`Error::TooManyHeld`].
    pub fn held_limit(mut self, keys: usize) -> Self {
        self.options.held_limit = keys;
        self
    }

    /// How long to wait for another process to let go of the directory: a killed one holds its locks for some
    /// milliseconds. Up to an hour, 1 second by default.
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.options.lock_wait = wait;
        self
    }

    /// Where the time comes from: the system by default, a [`ManualClock`](crate::ManualClock) in tests. The store's time runs on the
    /// monotonic clock. A wall clock that differs from it by more than a second counts when every reading of 10 minutes said so.
    pub fn clock(mut self, clock: impl Clock) -> Self {
        self.options.clock = Arc::new(clock);
        self
    }

    /// Opens the store in a directory, or creates it, readable by its owner alone. Reads the journal back; the filter
    /// is rebuilt while the store already answers.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for an option out of its bounds; [`Error::AlreadyOpen`], [`Error::NotAStore`],
    /// [`Error::UnsupportedFormat`] and [`Error::Corrupt`] for the directory. Nothing is lost by any of them.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Store> {
        self.options.check_bounds()?;
        let directory = Directory::acquire(path.as_ref(), self.options.lock_wait)?;
        let engine = Engine::open(directory, &self.options)?;
        Ok(Store { running: Arc::new(StoreHandle::start(engine)?) })
    }
}

/// What [`Store::check`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A claim would acquire it.
    New,
    /// A claim would find it in progress.
    InProgress(InProgress),
    /// A claim would find it completed.
    Completed(Completed),
}

/// What [`Store::record`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// The key is new, and completed from now on.
    First,
    /// The key was there.
    Duplicate {
        /// It is being worked on and not completed: whether it ever will be is open.
        in_flight: bool,
    },
}

/// What [`Store::run`] did.
#[derive(Debug)]
#[must_use]
pub enum Ran {
    /// The work was done now, with this result.
    First(Vec<u8>),
    /// The work was done before: this came of it.
    Replayed(Completed),
    /// Somebody else is at it.
    InProgress(InProgress),
}

/// Why [`Store::run`] failed.
///
/// `L` is the kind of lease: [`Lease`], or that of `onlyonce::future`.
#[derive(Debug, thiserror::Error)]
pub enum RunError<E, L = Lease> {
    /// The key could not be claimed: the work was not begun.
    #[error("the key could not be claimed: {0}")]
    Claim(Error),
    /// The work failed, and the key was released.
    #[error("the work failed: {0}")]
    Work(E),
    /// The work is done and its result could not be stored.
    #[error(transparent)]
    Complete(CompleteError<L>),
}

/// What is stored of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stored {
    /// A claimed key.
    #[non_exhaustive]
    Processing {
        /// The token of its last claim.
        token: u64,
        /// The number of that attempt, from 1. 0 when the work was given up, and its attempts begin anew.
        attempt: u32,
        /// How it stands.
        phase: Phase,
    },
    /// A completed key.
    Completed(Completed),
}

/// How a claimed key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Its holder is at work, and nobody else gets it for so long.
    Leased(Duration),
    /// Its holder is gone, and nobody gets it for so long.
    Backoff(Duration, Prior),
    /// Its holder is gone, and the next claim gets it.
    Free(Prior),
    /// Its holder is gone, and nobody gets it before it is resolved.
    Held(Prior),
}

/// A key that waits for a decision, under [`OnInterrupt::Hold`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Held {
    /// The key, with its scope.
    pub key: Key<'static>,
    /// The token of the interrupted attempt.
    pub token: u64,
    /// Its number, from 1.
    pub attempt: u32,
    /// What interrupted it.
    pub prior: Prior,
    /// When it was claimed, dropped or found crashed, in milliseconds since the Unix epoch. On stream time, the timestamp of
    /// its message.
    pub since_ms: u64,
}

/// The decision about a held key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolution {
    /// It did not happen: the next claim gets it.
    Rerun,
    /// It did happen, with this result.
    Completed(Vec<u8>),
}

impl Store {
    /// Opens the store in a directory with the default options, or creates it.
    ///
    /// # Errors
    ///
    /// As [`Builder::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::builder().open(path)
    }

    /// The options to open a store with.
    pub fn builder() -> Builder {
        Builder { options: Options::default() }
    }

    /// Asks for the right to work on a key.
    ///
    /// A new key costs an append to the log and no read; under [`OnInterrupt::Hold`] with [`Durability::Disk`] it
    /// waits for an fdatasync as well.
    ///
    /// # Errors
    ///
    /// [`Error::PayloadMismatch`] if the key was used with another payload; [`Error::KeyEmpty`],
    /// [`Error::KeyTooLong`], [`Error::ScopeTooLong`], [`Error::TooManyInFlight`], [`Error::SealingFailed`] for
    /// limits; [`Error::TimestampMissing`] on a store that runs on stream time. A claim that fails leaves the key unclaimed.
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// match store.claim("order-4711")? {
    ///     Claim::Acquired(lease) => lease.complete("charged")?,
    ///     Claim::Completed(first) => println!("done before: {:?}", first.result()),
    ///     Claim::InProgress(other) => println!("come back in {:?}", other.retry_after),
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn claim<'k>(&self, key: impl Into<Key<'k>>) -> Result<Claim> {
        let request = self.one(key)?;
        let claimed = only(self.running.engine.claim(&request)?)??;
        Ok(claim::claim(claimed, &self.running))
    }

    /// As [`Store::claim`], but waits up to `limit` for a holder in this process to be done with the key: then it answers
    /// with the result, or gets the key where it was released or dropped or its lease ran out. [`Claim::InProgress`] after
    /// the limit.
    ///
    /// It is woken, and asks again only then and when the holder's lease or backoff ends. Who completes a key that nobody
    /// waits for pays a look at a counter. A key held under [`OnInterrupt::Hold`] is waited for until it is resolved. The
    /// limit runs on the system's monotonic clock, and so does the wait for a lease's end: a
    /// [`ManualClock`](crate::ManualClock) that is moved wakes nobody.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]; [`Error::Closed`] and [`Error::Poisoned`] where the store ends meanwhile.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let Claim::Acquired(lease) = store.claim("order-4711")? else { unreachable!() };
    /// std::thread::scope(|scope| {
    ///     scope.spawn(|| lease.complete("charged"));
    ///     let answer = store.claim_wait("order-4711", Duration::from_secs(10));
    ///     assert!(matches!(answer, Ok(Claim::Completed(first)) if first.result() == Some(b"charged")));
    /// });
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn claim_wait<'k>(&self, key: impl Into<Key<'k>>, limit: Duration) -> Result<Claim> {
        let request = self.one(key)?;
        let engine = &self.running.engine;
        let end = Instant::now().checked_add(limit);
        let mut place: Option<Waiter> = None;
        loop {
            let answer = claim::claim(only(engine.claim(&request)?)??, &self.running);
            let Claim::InProgress(other) = &answer else { return Ok(answer) };
            let now = Instant::now();
            if end.is_some_and(|end| end <= now) {
                return Ok(answer);
            }
            if let Some(place) = place.take() {
                place.block_until(earlier(end, other.retry_after, now));
            }
            // Before the next question: what ends from here on wakes us.
            place = request.digests().next().map(|digest| engine.wait_for(digest));
        }
    }

    /// As [`Store::claim`], on a store that runs on stream time: for a message with this timestamp, in milliseconds since the
    /// Unix epoch. Stream time follows it; the key is remembered until stream time is a window past it, whenever the work
    /// is done. Give a message the same timestamp each time it comes.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]; [`Error::TooOld`] where nothing is known of the key and the message is a window behind stream
    /// time, [`Error::TooFarAhead`] where it is too far ahead, [`Error::TimestampUnexpected`] on a store that runs on its
    /// clock.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, Error, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let day = Duration::from_secs(24 * 60 * 60);
    /// let store = Store::builder().window(day).stream_time(day).open(path)?;
    /// // A replay of 2023.
    /// for (key, timestamp_ms) in [("a", 1_680_000_000_000), ("b", 1_680_050_000_000), ("a", 1_680_000_000_000)] {
    ///     match store.claim_at(key, timestamp_ms) {
    ///         Ok(Claim::Acquired(lease)) => lease.complete("done")?,
    ///         Ok(Claim::Completed(_first)) => {} // acknowledge it
    ///         Ok(Claim::InProgress(_other)) => {} // come back later
    ///         Err(Error::TooOld { .. }) => {} // set it aside: nobody knows whether it was done
    ///         Err(error) => return Err(error.into()),
    ///     }
    /// }
    /// # assert_eq!(store.stats().duplicates, 1);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn claim_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Claim> {
        let request = self.one_at(key, timestamp_ms)?;
        Ok(claim::claim(only(self.running.engine.claim(&request)?)??, &self.running))
    }

    /// What a claim would find. Changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`].
    pub fn check<'k>(&self, key: impl Into<Key<'k>>) -> Result<Check> {
        let request = self.one(key)?;
        Ok(checked(only(self.running.engine.check(&request)?)??))
    }

    /// What [`Store::claim_at`] would find. Changes nothing: stream time stays where it is.
    ///
    /// # Errors
    ///
    /// As [`Store::claim_at`].
    pub fn check_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Check> {
        let request = self.one_at(key, timestamp_ms)?;
        Ok(checked(only(self.running.engine.check(&request)?)??))
    }

    /// Marks a key as completed, without a lease or a result: the one-write form for filters.
    ///
    /// Called after the effect it can repeat one after a crash; called before the effect it can lose one. Do the
    /// former, unless losing is better than repeating.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]; after [`Error::WriteFailed`] it may be recorded.
    pub fn record<'k>(&self, key: impl Into<Key<'k>>) -> Result<Recorded> {
        let request = self.one(key)?;
        Ok(recorded(&only(self.running.engine.record(&request)?)??))
    }

    /// As [`Store::record`], for a message with this timestamp, as [`Store::claim_at`].
    ///
    /// # Errors
    ///
    /// As [`Store::claim_at`]; after [`Error::WriteFailed`] it may be recorded.
    pub fn record_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Recorded> {
        let request = self.one_at(key, timestamp_ms)?;
        Ok(recorded(&only(self.running.engine.record(&request)?)??))
    }

    /// Moves stream time on to a timestamp, in milliseconds since the Unix epoch, if it is not further already: for operators who
    /// know that what came too far ahead is right, and for streams where nothing comes. What has run out by then is
    /// forgotten. It cannot be taken back. One synced write.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] for a time that is more than a year ahead of both the wall clock and stream time, such as one
    /// in another unit;
    /// [`Error::TimestampUnexpected`] on a store that runs on its clock; [`Error::WriteFailed`], after which it counts as
    /// long as the store is open, and nobody can say whether for longer.
    pub fn advance_stream_time(&self, timestamp_ms: u64) -> Result<()> {
        self.running.engine.advance_stream_time(timestamp_ms)
    }

    /// Claims the key, does the work and completes it with the result; gives the stored result where the work was
    /// done before; releases the key where the work fails. A panic in the work drops the lease. The lease is renewed while
    /// the work runs, as by [`Lease::keep_alive`]. Of a result over `result_limit` only the fact is kept
    /// ([`Completed::is_omitted`]).
    ///
    /// An `Err` of the work says that it did nothing. Where it may have (a timeout after the charge was sent), claim and
    /// drop the lease yourself: the next holder is told then.
    ///
    /// # Errors
    ///
    /// [`RunError`] says whether the claim, the work or the completion failed.
    ///
    /// ```
    /// use onlyonce::{Ran, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// for _ in 0..2 {
    ///     match store.run("order-4711", |_lease| Ok::<_, std::io::Error>(b"receipt 1".to_vec()))? {
    ///         Ran::First(result) => assert_eq!(result, b"receipt 1"),
    ///         Ran::Replayed(first) => assert_eq!(first.result(), Some(&b"receipt 1"[..])),
    ///         Ran::InProgress(_) => unreachable!("nobody else works here"),
    ///     }
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn run<'k, E>(
        &self,
        key: impl Into<Key<'k>>,
        work: impl FnOnce(&mut Lease) -> Result<Vec<u8>, E>,
    ) -> Result<Ran, RunError<E>> {
        let mut lease = match self.claim(key).map_err(RunError::Claim)? {
            Claim::Acquired(lease) => lease,
            Claim::Completed(first) => return Ok(Ran::Replayed(first)),
            Claim::InProgress(other) => return Ok(Ran::InProgress(other)),
        };
        let renewal = lease.renewal();
        let done = work(&mut lease);
        drop(renewal);
        match done {
            Ok(result) => lease.complete_and_keep(result).map(Ran::First).map_err(RunError::Complete),
            Err(error) => {
                if let Err(error) = lease.release() {
                    tracing::warn!(%error, "the key of failed work could not be released");
                }
                Err(RunError::Work(error))
            }
        }
    }

    /// What is stored of a key, for people and tools. `None` if a claim would be its first.
    ///
    /// # Errors
    ///
    /// As [`Store::claim`], without the limits.
    pub fn get<'k>(&self, key: impl Into<Key<'k>>) -> Result<Option<Stored>> {
        let request = self.about(key)?;
        let entry = only(self.running.engine.get(&request)?)?;
        Ok(entry.map(|entry| stored(entry, &self.running.engine)))
    }

    /// How far a partition of a stream was read, by the last [`Tx::set_offset`](crate::Tx::set_offset) or
    /// [`Store::set_offset`]. `None` if none was ever set. A read of one row, usually from memory; under
    /// [`Durability::Disk`](crate::Durability::Disk) a sync as well, so that what it says can be committed to a broker. Under
    /// `Process` a power cut can take it back by the last `sync_interval`.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::Poisoned`], and [`Error::Io`] or [`Error::Corrupt`] where it cannot be read.
    pub fn offset(&self, stream: impl AsRef<[u8]>, partition: u32) -> Result<Option<u64>> {
        self.running.engine.offset(stream.as_ref(), partition)
    }

    /// Notes how far a partition of a stream was read, where no completion can take it along: behind duplicates. One write, as
    /// durable as a completion.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::Poisoned`], and [`Error::WriteFailed`], after which it may be noted.
    pub fn set_offset(&self, stream: impl AsRef<[u8]>, partition: u32, offset: u64) -> Result<()> {
        self.running.engine.set_offset(stream.as_ref(), partition, offset)
    }

    /// The first messages, at most `limit`, that completions have enqueued with [`Tx::enqueue`](crate::Tx::enqueue) and
    /// that were not [`delivered`](Store::delivered). In the order in which those completions began; one that takes
    /// longer may come up later, before others. A message comes up when its completion counts: under
    /// [`Durability::Disk`](crate::Durability::Disk) it is on the disk then; under `Process` a power cut can take the last
    /// `sync_interval` of completions and their messages, and what was published is done, and published, again under
    /// another id. Meant for one publisher at a time. There is no limit but the disk to how many there are.
    ///
    /// Publish them and remove them, in this order: killed in between, you publish them again. [`Message::id`] tells such a
    /// duplicate from another message.
    ///
    /// # Errors
    ///
    /// As [`Store::offset`].
    pub fn outbox(&self, limit: usize) -> Result<Vec<Message>> {
        self.running.engine.outbox(limit)
    }

    /// Removes messages from the outbox. One write, not synced: a power cut may bring them back, and they are published
    /// again. One that is not there is none.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::Poisoned`], and [`Error::WriteFailed`], after which they may be removed.
    pub fn delivered(&self, messages: impl IntoIterator<Item = MessageId>) -> Result<()> {
        self.running.engine.delivered(messages)
    }

    /// Removes all that is stored of a key, so that the next claim is its first. True if there was something.
    ///
    /// For operators: it waits for a seal under way, and its write is as durable as a completion.
    ///
    /// # Errors
    ///
    /// [`Error::InUse`] while a holder works on it; [`Error::Undecided`] while it waits for a decision.
    pub fn forget<'k>(&self, key: impl Into<Key<'k>>) -> Result<bool> {
        let request = self.about(key)?;
        self.running.engine.forget(&request)
    }

    /// The keys that wait for a decision under [`OnInterrupt::Hold`], the oldest claim first. Visits all keys in
    /// memory.
    ///
    /// # Errors
    ///
    /// [`Error::Poisoned`] and [`Error::Closed`].
    pub fn held(&self) -> Result<Vec<Held>> {
        let held = self.running.engine.held()?;
        held.into_iter()
            .map(|HeldEntry { key, processing, prior }| {
                let key = Key::decode(&key).ok_or_else(|| Error::Corrupt {
                    place: "a key in the journal".to_owned(),
                    detail: format!("{} is no key", key.escape_ascii()),
                })?;
                let Processing { token, attempt, since_ms, .. } = processing;
                Ok(Held { key, token, attempt, prior, since_ms })
            })
            .collect()
    }

    /// Decides about a held key.
    ///
    /// # Errors
    ///
    /// [`Error::NotHeld`] if it is not held, or not any more.
    pub fn resolve<'k>(&self, key: impl Into<Key<'k>>, resolution: Resolution) -> Result<()> {
        let engine = &self.running.engine;
        let request = self.about(key)?;
        let not_held =
            || Error::NotHeld { key: request.iter().next().map(|asked| display(asked.key)).unwrap_or_default() };
        let (grant, prior) = engine.held_grant(&request)?.ok_or_else(not_held)?;
        let (kind, settlement) = match &resolution {
            Resolution::Rerun => (RecordKind::Released, FinishKind::Release { prior, backoff: Backoff::NONE }),
            Resolution::Completed(result) => {
                let kept = StoredResult::of(result, engine.config().result_limit);
                (RecordKind::Completed, FinishKind::Complete(kept, None))
            }
        };
        let accepted = engine.finish(kind, FinishedBy::Operator, vec![(&grant, settlement)])?;
        if accepted == [true] { Ok(()) } else { Err(not_held()) }
    }

    /// Counts a message that was let through without an answer, because the store failed and its consumer would rather
    /// repeat work than stop. In [`Stats::fail_open`], and among the metrics.
    pub fn count_fail_open(&self) {
        self.running.engine.count_fail_open();
    }

    /// The store's figures. Visits all keys in memory and all files: not for every request.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.running.engine.stats()
    }

    /// Moves every completed key from memory to its bucket and drops what has passed: what the store does by itself
    /// in the background. Some milliseconds for a thousand keys, a second for a few million.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the disk refuses; nothing is lost, and it is tried again later. [`Error::WriteFailed`] if the log
    /// cannot be synced, which poisons the store.
    pub fn seal(&self) -> Result<()> {
        self.running.engine.flush_and_rotate()
    }

    /// Waits for the calls under way, puts everything on the disk and lets go of the directory. Clones and leases that
    /// are left get [`Error::Closed`].
    ///
    /// # Errors
    ///
    /// [`Error::WriteFailed`] if the last sync fails: under [`Durability::Process`] its last `sync_interval` is in
    /// doubt.
    pub fn close(&self) -> Result<()> {
        self.running.close()
    }

    fn one<'k>(&self, key: impl Into<Key<'k>>) -> Result<Arc<Request>> {
        self.running.engine.request(std::iter::once(key))
    }

    fn one_at<'k>(&self, key: impl Into<Key<'k>>, timestamp_ms: u64) -> Result<Arc<Request>> {
        self.running.engine.request_at(std::iter::once((key, timestamp_ms)))
    }

    fn about<'k>(&self, key: impl Into<Key<'k>>) -> Result<Arc<Request>> {
        self.running.engine.request_about(std::iter::once(key))
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// The answer to a request of one key. The engine has counted the answers, and poisons the store where one is missing.
pub(crate) fn only<T>(mut answers: Vec<T>) -> Result<T> {
    let none = || Error::Broken { invariant: Invariant::AnswerForEachKey.text(), detail: "it has none".to_owned() };
    answers.pop().ok_or_else(none)
}

/// When to ask again for a key in progress, at the latest.
pub(crate) fn earlier(end: Option<Instant>, retry_after: Option<Duration>, now: Instant) -> Option<Instant> {
    let retry = retry_after.and_then(|after| now.checked_add(after));
    end.into_iter().chain(retry).min()
}

pub(crate) fn stored(entry: Entry, engine: &Engine) -> Stored {
    match entry {
        Entry::Completed(done) => Stored::Completed(Completed::new(done)),
        Entry::Processing(processing) => Stored::Processing {
            token: processing.token,
            attempt: processing.attempt,
            phase: phase(engine.lease_state(&processing)),
        },
    }
}

fn phase(lease_state: LeaseState) -> Phase {
    match lease_state {
        LeaseState::Active { remaining_ms } => Phase::Leased(Duration::from_millis(remaining_ms)),
        LeaseState::Committing => Phase::Leased(Duration::ZERO),
        LeaseState::Backoff { remaining_ms, prior } => Phase::Backoff(Duration::from_millis(remaining_ms), prior),
        LeaseState::Free(prior) => Phase::Free(prior),
        LeaseState::Held(prior) => Phase::Held(prior),
        // It ran out between two readings of the clock.
        LeaseState::Forgotten => Phase::Free(Prior::LeaseExpired),
    }
}

pub(crate) fn checked(answer: Response) -> Check {
    match answer {
        Response::New => Check::New,
        Response::InProgress { retry_after_ms, attempt } => Check::InProgress(in_progress(retry_after_ms, attempt)),
        Response::Completed(done) => Check::Completed(Completed::new(done)),
    }
}

pub(crate) fn recorded(answer: &Response) -> Recorded {
    match answer {
        Response::New => Recorded::First,
        Response::InProgress { .. } => Recorded::Duplicate { in_flight: true },
        Response::Completed(_) => Recorded::Duplicate { in_flight: false },
    }
}
