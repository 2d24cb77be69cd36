//! The engine: a store's parts, its health, and the way its rows go to the journal.
//!
//! A claim takes its place in the hot table before its row is written, so that nobody else can (`claim.rs`); a
//! completion takes effect only when its row is written, so that nobody relies on what a crash would undo
//! (`committing.rs`). No lock is held while the disk is read or written.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::meta_entries::{
    CLOCK, FLOOR, FORMAT, HIGH_WATER, ON_INTERRUPT, SECRET, SPAN, STREAM_TIME, TOKENS, corrupt_meta, meta,
};
use super::request::{KeyRef, Request, TimeSource, admit_bytes};
use super::response::too_far_ahead;
use super::sequence::Sequence;
use super::side_writes::{self, Admitted};
use super::timekeeping::{self, TimeSaved};
use super::transition::{self, Policy};
use super::waiters::{Waiter, Waiters};
use crate::buckets::filters::Filters;
use crate::buckets::recovery::{self, Replayed};
use crate::buckets::registry::BucketRegistry;
use crate::clock::{ClockState, Now, Timeline};
use crate::codec::{self, Event, RecordKind, RecordWriter};
use crate::config::{Config, MAX_KEY, Options, Stored};
use crate::digest::Digester;
use crate::entry::{Entry, Holder, Processing};
use crate::fs::directory::Directory;
use crate::invariant::{Invariant, Poison};
use crate::memtable::table::{MemTable, Shard};
use crate::metrics::Metrics;
use crate::rocks::db::{self, Db};
use crate::stats::Counters;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{AtomicBool, AtomicU64, Condvar, Mutex};
use onlyonce_core::Key;
use onlyonce_core::PriorAttempt;
use onlyonce_core::{Error, Result, TimestampError};

/// What the filters may take of sixteen parts of the memory budget. The rest: four parts for keys that are not sealed, two
/// for cached blocks, two for the journal's memtable, one for what was sealed lately.
const FILTER_SIXTEENTHS: usize = 7;

/// The share that sealed keys may take which stay at hand because they are asked for most.
const RECENT_SHARE: usize = 16;

/// How long a call waits for the keeper before it looks again whether sealing still works.
const BACKLOG_WAIT: Duration = Duration::from_millis(100);

pub(crate) struct Engine {
    pub(super) config: Config,
    pub(super) policy: Policy,
    pub(super) db: Db,
    pub(super) memtable: MemTable,
    pub(super) buckets: BucketRegistry,
    pub(super) filters: Filters,
    pub(super) sequence: Sequence,
    pub(super) timeline: Timeline,
    pub(super) time_saved: TimeSaved,
    pub(super) counters: Counters,
    pub(super) metrics: Metrics,
    /// Held while sealed keys change their place, and by whoever must not see them do so. The number of the last
    /// image that a seal wrote at the journal's head.
    pub(super) flush_lock: Mutex<u64>,
    /// Grows before keys that were sealed leave the hot table: what was found absent there before may now be in a
    /// bucket.
    pub(super) flush_generation: AtomicU64,
    pub(super) backlog: Backlog,
    pub(super) waiters: Arc<Waiters>,
    /// Messages of rows below this one are removed from the outbox.
    pub(super) delivered_below: AtomicU64,
    /// Bytes of rows that were written since the last seal, or found at open.
    pub(super) journal_bytes: AtomicU64,
    /// Bytes of rows that were written since the journal was flushed last.
    pub(super) log_bytes: AtomicU64,
    /// Whether something was written that is not on the disk yet.
    pub(super) unsynced: AtomicBool,
    /// What the journal held when it was opened.
    pub(super) found: Replayed,
    digester: Digester,
    /// Shared with the hot table, the buckets and the sequence.
    poison: Arc<Poison>,
    closed: AtomicBool,
}

/// Where calls wait for room in the hot table.
#[derive(Default)]
pub(super) struct Backlog {
    pub(super) failure: Mutex<Option<Error>>,
    pub(super) eased: Condvar,
    /// Told when there is enough to seal.
    pub(super) wake: OnceLock<crossbeam::channel::Sender<()>>,
}

impl Engine {
    /// Opens the store in `directory`, or creates it, and reads the journal back.
    pub(crate) fn open(directory: Directory, options: &Options) -> Result<Self> {
        let path = directory.root().to_owned();
        let seed = || {
            // Before anything is created; what an existing store adds is checked below.
            let config = options.check(None)?;
            let mut secret = codec::Secret::default();
            // A model that is repeated must find its keys in the same stripes.
            if !cfg!(shuttle) {
                getrandom::fill(&mut secret)
                    .map_err(|error| Error::io("cannot draw a secret for", &path, error.to_string()))?;
            }
            let format = if config.max_ahead_ms.is_some() { codec::STREAM_FORMAT } else { codec::FORMAT };
            let mut meta_entries = vec![
                (FORMAT, format.to_le_bytes().to_vec()),
                (SECRET, secret.to_vec()),
                (SPAN, codec::put_span(config.span)),
                (ON_INTERRUPT, codec::put_on_interrupt(config.on_interrupt)),
                (TOKENS, 1_u64.to_le_bytes().to_vec()),
                (HIGH_WATER, 0_u64.to_le_bytes().to_vec()),
                (FLOOR, 0_u64.to_le_bytes().to_vec()),
            ];
            meta_entries.push(match config.max_ahead_ms {
                Some(ahead_ms) => (STREAM_TIME, ahead_ms.to_le_bytes().to_vec()),
                None => (CLOCK, codec::put_clock(&ClockState::default())),
            });
            Ok(meta_entries)
        };
        let (db, families) = Db::open(directory, options.memory_budget, options.lock_wait, seed)?;

        let format = u32::from_le_bytes(meta(&db, FORMAT)?);
        let max_ahead_ms = match format {
            codec::FORMAT => None,
            codec::STREAM_FORMAT => Some(u64::from_le_bytes(meta(&db, STREAM_TIME)?)),
            found => return Err(Error::UnsupportedFormat { path, found, supported: codec::STREAM_FORMAT }),
        };
        let secret: codec::Secret = meta(&db, SECRET)?;
        let span = meta::<16>(&db, SPAN)?;
        let span = codec::read_span(&span).ok_or_else(|| corrupt_meta(SPAN))?;
        let tokens = u64::from_le_bytes(meta(&db, TOKENS)?);
        let on_interrupt =
            codec::read_on_interrupt(&meta::<1>(&db, ON_INTERRUPT)?).ok_or_else(|| corrupt_meta(ON_INTERRUPT))?;
        let config = options.check(Some(Stored { span, on_interrupt, max_ahead_ms }))?;

        let digester = Digester::new(&secret);
        let memtable = MemTable::new(config.memory_budget / RECENT_SHARE);
        let poison = Arc::clone(memtable.poison());
        let replayed = recovery::replay(&db, |key, event| {
            let digest = digester.digest(key);
            apply(&mut memtable.shard(digest), digest, key, event);
        })?;
        if replayed.last_number >= tokens {
            return Err(Error::Corrupt {
                place: "`tokens` in `meta`".to_owned(),
                detail: format!("the journal has row {} where only {tokens} were reserved", replayed.last_number),
            });
        }
        let timeline = timekeeping::resume(&db, &options.clock, &config, span, replayed.time_ms)?;
        let filter_budget = (config.memory_budget / 16).saturating_mul(FILTER_SIXTEENTHS) as u64;
        let filters = Filters::find(&db, &secret, &families)?;
        let now = timeline.now();
        let (span, expected) = (config.span, config.bucket_keys);
        let buckets = BucketRegistry::open(&db, &families, span, &now, expected, filter_budget, filters.geometry())?;
        let buckets = buckets.of(&poison);
        let engine = Self {
            policy: Policy {
                window_ms: config.span.window_ms,
                on_interrupt: config.on_interrupt,
                is_stream: timeline.is_stream(),
                opened: (&now).into(),
                first_token: tokens,
            },
            config,
            db,
            memtable,
            buckets,
            filters,
            sequence: Sequence::after(tokens).of(&poison),
            timeline,
            time_saved: TimeSaved::default(),
            counters: Counters::default(),
            metrics: Metrics::new(&path),
            flush_lock: Mutex::new(replayed.last_number),
            flush_generation: AtomicU64::new(0),
            backlog: Backlog::default(),
            waiters: Arc::default(),
            delivered_below: AtomicU64::new(0),
            journal_bytes: AtomicU64::new(replayed.bytes),
            log_bytes: AtomicU64::new(replayed.bytes),
            unsynced: AtomicBool::new(false),
            found: replayed,
            digester,
            poison,
            closed: AtomicBool::new(false),
        };
        Failpoint::OpenReplayed.pass();
        engine.notice_crashes();
        engine.begin()?;
        Ok(engine)
    }

    /// Whoever held a key when the journal was written died with that process. A key that is held for a decision, and whose
    /// store reruns now, is free.
    fn notice_crashes(&self) {
        let now = self.timeline.now();
        for mut shard in self.memtable.shards() {
            let crashed: Vec<_> = shard
                .in_flight()
                .filter_map(|(digest, key, processing)| {
                    let (prior, since_ms) = match processing.holder {
                        Holder::Leased { .. } => (PriorAttempt::Crashed, self.next_since_ms(&processing, now)),
                        Holder::Interrupted(prior) => (prior, processing.since_ms),
                        _ => return None,
                    };
                    let holder = transition::interrupted(prior, self.policy.on_interrupt);
                    Some((digest, key.to_vec(), Processing { since_ms, holder, ..processing }))
                })
                .collect();
            for (digest, key, processing) in crashed {
                shard.set(digest, &key, Entry::Processing(processing));
            }
        }
    }

    /// Puts on the disk, before the first answer, what this opening changed: its options, the retention floor and its
    /// tokens.
    fn begin(&self) -> Result<()> {
        self.unbroken()?;
        self.timeline.ask_to_be_saved();
        self.write(true, |tx| {
            tx.put_meta(SPAN, &codec::put_span(self.config.span))?;
            tx.put_meta(ON_INTERRUPT, &codec::put_on_interrupt(self.config.on_interrupt))?;
            self.config.max_ahead_ms.map_or(Ok(()), |ahead_ms| tx.put_meta(STREAM_TIME, &ahead_ms.to_le_bytes()))
        })?;
        Failpoint::OpenOptionsWritten.pass();
        self.reserve(0)?;
        Failpoint::OpenTokensReserved.pass();
        // Tokens must not begin again where a log is lost.
        self.db.begin_log()?;
        tracing::info!(
            path = %self.db.directory().root().display(),
            journal_records = self.found.records,
            unflushed = self.memtable.flushable(),
            interrupted = self.memtable.in_flight(),
            buckets = self.buckets.snapshot().newest_first().len(),
            "store opened"
        );
        Ok(())
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.db.directory().root()
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn now(&self) -> Now {
        self.timeline.now()
    }

    /// A place to wait until work on a key of this digest ends. See [`Waiters::enter`].
    pub(crate) fn wait_for(&self, digest: u64) -> Waiter {
        self.waiters.enter(digest)
    }

    /// Encodes and digests the keys of a call that is about them and not about work on them: also those that were claimed
    /// when `key_limit` was higher.
    pub(crate) fn request_about<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Arc<Request>> {
        self.ready()?;
        Ok(Arc::new(Request::new(keys, TimeSource::Any, MAX_KEY, &self.digester)?))
    }

    /// Encodes and digests the keys of a call.
    pub(crate) fn request<'k, K: Into<Key<'k>>>(&self, keys: impl IntoIterator<Item = K>) -> Result<Arc<Request>> {
        self.ready()?;
        let time = if self.timeline.is_stream() { TimeSource::Stream } else { TimeSource::Clock };
        Ok(Arc::new(Request::new(keys, time, self.config.key_limit, &self.digester)?))
    }

    /// The internal form of a grant that left the process as data.
    #[cfg(feature = "tokio")]
    pub(crate) fn imported(&self, grant: &onlyonce_core::Grant) -> Result<super::response::Grant> {
        let request = self.request_about(std::iter::once(&grant.key))?;
        Ok(super::response::Grant {
            request,
            index: 0,
            token: grant.token().get(),
            attempt: grant.attempt.number(),
            prior: grant.attempt.prior(),
            fingerprint: grant.key.payload_fingerprint().copied(),
            at_ms: grant.claimed_at.as_unix_ms(),
            claimed_monotonic_ms: grant.granted_at_ms,
        })
    }

    /// Moves stream time on, whatever the messages say, and puts that on the disk.
    pub(crate) fn advance_stream_time(&self, to_ms: u64) -> Result<()> {
        self.ready()?;
        if !self.timeline.is_stream() {
            return Err(Error::Timestamp(TimestampError::Unexpected));
        }
        if !self.timeline.advance(to_ms) {
            let bounds = "up to a year ahead of the wall clock or of stream time, in milliseconds".to_owned();
            return Err(Error::Config { option: "advance_stream_time", value: to_ms.to_string(), bounds });
        }
        self.save_time()
    }

    /// The moment at which a key is decided about: taken while its stripe is locked, so that it is not before the moment
    /// at which a bucket went in which the key was looked for.
    pub(super) fn moment(&self, request: &Request, key_ref: KeyRef<'_>, at_ms: u64, now: Now) -> Result<Now> {
        match self.timeline.follow(at_ms, request.timestamps_after(key_ref.index)) {
            Ok(time_ms) => Ok(Now { time_ms, ..now }),
            Err(leap) => Err(too_far_ahead(key_ref, at_ms, leap)),
        }
    }

    /// Since when a key is what it becomes now: never earlier than what it was, though the time may come back. On stream time a
    /// key's time is its message's, whatever becomes of it.
    pub(super) fn next_since_ms(&self, processing: &Processing, now: Now) -> u64 {
        if self.timeline.is_stream() { processing.since_ms } else { now.time_ms.max(processing.since_ms) }
    }

    /// A row whose items have the store's time, or times of their own.
    pub(super) fn record_writer(&self, kind: RecordKind, now: Now, capacity: usize) -> RecordWriter {
        RecordWriter::new(kind, now.time_ms, capacity)
    }

    /// Refuses where the store is closed or poisoned.
    pub(super) fn ready(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        self.poison.error().map_or(Ok(()), Err)
    }

    pub(crate) fn poisoned(&self) -> Option<&str> {
        self.poison.reason()
    }

    /// Refuses everything from now on: nobody knows any more what is on the disk.
    pub(crate) fn poison(&self, reason: &str) {
        self.refuse_with(reason.to_owned(), Error::Poisoned { reason: reason.to_owned() });
    }

    /// Poisons the store where a write failed so that nobody knows any more what is on the disk.
    pub(super) fn poison_by(&self, error: &Error) {
        match error {
            Error::WriteFailed { .. } => self.poison(&error.chain()),
            Error::DirectoryGone { .. } => self.refuse_with(error.to_string(), error.clone()),
            _ => {}
        }
    }

    fn refuse_with(&self, reason: String, error: Error) {
        let logged = reason.clone();
        if self.poison.set_with(reason, error) {
            tracing::error!(reason = logged, "store poisoned: it refuses until it is reopened");
        }
        self.wake_all();
    }

    /// Whoever waits for something looks again, and learns that the store has ended.
    pub(super) fn wake_all(&self) {
        self.backlog.eased.notify_all();
        self.waiters.wake_all();
    }

    /// Fails, and poisons the store: something is not as it must be.
    #[cold]
    pub(crate) fn broken(&self, invariant: Invariant, detail: std::fmt::Arguments<'_>) -> Error {
        let error = self.poison.broken(invariant, detail);
        self.wake_all();
        error
    }

    /// Fails where an invariant was broken. Before an answer: the table says nothing of it by itself.
    pub(super) fn unbroken(&self) -> Result<()> {
        self.poison.unbroken().inspect_err(|_| self.wake_all())
    }

    /// As many answers as a call has keys.
    pub(crate) fn check_response_count<T>(&self, responses: Vec<T>, keys: usize) -> Result<Vec<T>> {
        if responses.len() == keys {
            return Ok(responses);
        }
        Err(self.broken(Invariant::AnswerForEachKey, format_args!("{} answers to {keys} keys", responses.len())))
    }

    /// Writes to the database; poisons the store where the outcome is unknown.
    pub(super) fn write(&self, sync: bool, fill: impl FnOnce(&mut db::Tx<'_>) -> Result<()>) -> Result<()> {
        self.ready()?;
        let mut saving = None;
        let written = {
            let _timer = self.metrics.commit(sync);
            self.db.write(sync, |tx| {
                fill(tx)?;
                saving = self.time_saved.put_changed(&self.timeline, tx)?;
                Ok(())
            })
        };
        written.inspect_err(|error| self.poison_by(error))?;
        if let Some(saving) = saving {
            saving.done();
        }
        // Only after the write: whoever syncs takes the mark first, so that no write is left out.
        self.unsynced.fetch_or(!sync, Ordering::Release);
        Ok(())
    }

    /// Puts the store's time on the disk.
    pub(super) fn save_time(&self) -> Result<()> {
        self.timeline.ask_to_be_saved();
        self.write(true, |_| Ok(()))
    }

    /// Makes sure that `count` tokens, and the numbers of some rows, can be taken.
    pub(super) fn reserve(&self, count: usize) -> Result<()> {
        self.sequence
            .ensure(count as u64 + 16, |reserved| self.write(true, |tx| tx.put_meta(TOKENS, &reserved.to_le_bytes())))
    }

    /// Refuses further calls, and closes the database when those under way are done.
    pub(crate) fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.backlog.eased.notify_all();
        self.waiters.wake_all();
        Failpoint::CloseBegun.pass();
        self.metrics.end(&self.counters, || self.gauges());
        let written = match self.poison.error() {
            None => self.db.write(false, |tx| timekeeping::put(&self.timeline, tx).map(drop)),
            Some(error) => Err(error),
        };
        Failpoint::CloseTimeWritten.pass();
        // A process that is over at once must not leave its tables to the next.
        let merged = if self.poison.reason().is_none() { self.wait_for_merges() } else { Ok(()) };
        if let Err(error) = merged {
            tracing::warn!(%error, "nobody knows whether tables pile up");
        }
        // What was reserved and not taken is given back, or every open would cost four billion numbers: consumers may keep
        // tokens in 53 bits. Nobody takes one any more that counts: the calls under way have ended.
        let closed = self.db.close_with(|tx| match self.poison.reason() {
            None => tx.put_meta(TOKENS, &self.sequence.next_unused().to_le_bytes()),
            Some(_) => Ok(()),
        });
        tracing::info!(path = %self.db.directory().root().display(), "store closed");
        written.and(closed)
    }

    /// Room for what a call brings: in memory, in one write, and among the tokens.
    pub(super) fn admit(&self, keys: usize, bytes: usize) -> Result<()> {
        // Also where nothing comes to be written: whoever waits for a key learns here that the store has ended.
        self.ready()?;
        admit_bytes(bytes)?;
        self.wait_for_room()?;
        self.reserve(keys)
    }

    /// Waits while so much is completed and not sealed that memory would overflow.
    fn wait_for_room(&self) -> Result<()> {
        while self.is_backlogged() {
            self.ready()?;
            self.wake_workers();
            let mut failure = self.backlog.failure.lock();
            if let Some(error) = failure.as_ref() {
                return Err(Error::FlushFailed { source: error.clone().into() });
            }
            self.backlog.eased.wait_for(&mut failure, BACKLOG_WAIT);
        }
        Ok(())
    }

    pub(super) fn wake_workers(&self) {
        if let Some(wake) = self.backlog.wake.get() {
            // A full channel has told it already.
            let _ = wake.try_send(());
        }
    }

    pub(super) fn wake_if_due(&self) {
        if self.is_flush_due() {
            self.wake_workers();
        }
    }

    /// Takes the number of a row that is about to be written. Before what it says can be seen in the hot table: then
    /// the rows of one key stand in the order of its holders, and none of them outlives one that overrules it.
    pub(super) fn begin_record(&self) -> OpenRecord<'_> {
        let number = self.memtable.records().begin(|| self.sequence.take());
        OpenRecord { engine: self, number, finished: false }
    }

    pub(super) fn count_record_bytes(&self, bytes: usize) {
        self.journal_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.count_log(bytes);
    }

    /// What goes to the log and waits for no seal.
    pub(super) fn count_log(&self, bytes: usize) {
        self.log_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Writes a row. From then on what it says counts.
    pub(super) fn append(&self, open: OpenRecord<'_>, record: RecordWriter, sync: bool) -> Result<()> {
        self.append_with(open, record, &[], sync)
    }

    /// As [`Engine::append`], with what its completions take along.
    pub(super) fn append_with(
        &self,
        open: OpenRecord<'_>,
        record: RecordWriter,
        side_writes: &[Admitted<'_>],
        sync: bool,
    ) -> Result<()> {
        self.unbroken()?;
        if !record.is_empty() {
            let record = record.finish();
            self.write(sync, |tx| {
                tx.put_record(open.number, &record);
                side_writes::put(tx, open.number, side_writes)
            })?;
            self.count_record_bytes(record.len());
            self.count_log(side_writes.iter().map(|(side_writes, _)| side_writes.encoded_len()).sum());
        }
        open.finish();
        Ok(())
    }
}

/// A row on its way to the journal.
pub(super) struct OpenRecord<'a> {
    engine: &'a Engine,
    number: u64,
    finished: bool,
}

impl OpenRecord<'_> {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// It is written, or nothing waits for it.
    pub(super) fn finish(mut self) {
        self.finished = true;
        self.engine.memtable.records().finish(self.number);
    }
}

/// A row that was given up stays open: what it says is never believed, and what is on the disk is not known.
impl Drop for OpenRecord<'_> {
    fn drop(&mut self) {
        if !self.finished && !self.engine.closed.load(Ordering::Acquire) {
            self.engine.poison("a write was given up half way");
        }
    }
}

/// Does to a stripe what an event of the journal says.
fn apply(shard: &mut Shard<'_>, digest: u64, key: &[u8], event: Event) {
    let stored = shard.get(digest, key);
    let stored = stored.as_ref();
    match event {
        Event::Claimed(processing) if transition::replay_claimed(stored, processing.token) => {
            shard.set(digest, key, Entry::Processing(processing));
        }
        Event::Released(processing) if transition::replay_released(stored, processing.token) => {
            shard.set(digest, key, Entry::Processing(processing));
        }
        Event::Completed(done) if transition::replay_completed(stored, done.token) => {
            shard.set(digest, key, Entry::Completed(done.borrowed()));
        }
        Event::Forgotten { token } if transition::replay_forgotten(stored, token) => shard.remove(digest, key),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::entry::{CompletedEntry, OwnWindow};
    use onlyonce_core::StoredResult;

    fn engine(dir: &tempfile::TempDir) -> Engine {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let clock = Arc::new(ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        Engine::open(directory, &Options { memory_budget: 32 << 20, clock, ..Options::default() }).unwrap()
    }

    /// Puts a completed key with a result of so many bytes into the table.
    fn fill(engine: &Engine, digest: u64, bytes: usize) {
        let result = vec![0; bytes];
        let result = StoredResult::Bytes(result.as_slice());
        let done = CompletedEntry {
            token: digest,
            completed_ms: engine.now().time_ms,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result,
        };
        engine.memtable.shard(digest).set(digest, b"k", Entry::Completed(done));
    }

    #[test]
    fn each_store_digests_its_keys_under_a_secret_of_its_own() {
        let digest = || {
            let dir = tempfile::tempdir().unwrap();
            engine(&dir).request(["k"]).unwrap().digests().next().unwrap()
        };
        assert_ne!(digest(), digest());
    }

    #[test]
    fn a_sixteenth_of_the_budget_is_kept_at_hand_of_what_was_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir);
        for digest in 0..6 {
            fill(&engine, digest, 1 << 20);
            engine.flush().unwrap();
        }
        let cached = |digest: &u64| engine.memtable.recent().get(*digest, b"k").is_some();
        assert_eq!((0..6).filter(cached).collect::<Vec<_>>(), [4, 5], "of two MiB");
    }

    #[test]
    fn rows_of_two_holders_come_to_the_same_in_either_order() {
        let processing = |token| {
            let holder = Holder::Interrupted(PriorAttempt::Crashed);
            Processing { token, attempt: 1, since_ms: 5, own_window: OwnWindow::NONE, fingerprint: None, holder }
        };
        let claimed = |token| Event::Claimed(processing(token));
        let finished = |token| Event::Released(processing(token));
        let completed = |token| {
            Event::Completed(CompletedEntry {
                token,
                completed_ms: 5,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::None,
            })
        };
        let after = |events: &[Event]| {
            let table = MemTable::new(0);
            for event in events {
                apply(&mut table.shard(5), 5, b"k", event.clone());
            }
            table.shard(5).get(5, b"k")
        };
        for late in [claimed(2), finished(2), completed(2)] {
            let alone = after(std::slice::from_ref(&late));
            assert_eq!(alone.as_ref().map(Entry::token), Some(2));
            assert_eq!(matches!(alone, Some(Entry::Completed(_))), matches!(late, Event::Completed(_)));
            for early in [claimed(1), finished(1), completed(1), Event::Forgotten { token: 1 }] {
                assert_eq!(after(&[early.clone(), late.clone()]), alone, "{early:?}, {late:?}");
                assert_eq!(after(&[late.clone(), early.clone()]), alone, "{late:?}, {early:?}");
            }
            assert_eq!(after(&[late, Event::Forgotten { token: 3 }]), None);
        }
    }

    #[test]
    fn a_row_that_is_given_up_poisons_the_store_unless_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir);
        engine.begin_record().finish();
        assert_eq!(engine.poisoned(), None);
        let (first, last) = (engine.begin_record(), engine.begin_record());
        drop(first);
        assert!(engine.poisoned().is_some_and(|reason| reason.contains("half way")));
        drop(last);

        let dir = tempfile::tempdir().unwrap();
        let engine = super::tests::engine(&dir);
        let open = engine.begin_record();
        engine.close().unwrap();
        drop(open);
        assert_eq!(engine.poisoned(), None, "whoever asks is told that it is closed");
    }

    #[test]
    fn the_keeper_is_told_when_there_is_enough_to_seal() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir);
        let (wake, woken) = crossbeam::channel::bounded(1);
        engine.backlog.wake.set(wake).unwrap();
        let record = |key: &str| engine.record(&engine.request([key]).unwrap()).unwrap();
        record("a");
        assert!(woken.try_recv().is_err());
        fill(&engine, 1, 4 << 20);
        record("b");
        woken.try_recv().expect("it is due");
    }

    #[test]
    fn where_too_much_waits_to_be_sealed_calls_wait_for_the_seal_and_learn_why_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir);
        fill(&engine, 1, 8 << 20);
        let request = engine.request(["k"]).unwrap();
        *engine.backlog.failure.lock() = Some(Error::io("writing", "/", "no space"));
        for refused in [engine.claim(&request).map(|_| ()), engine.record(&request).map(|_| ())] {
            assert!(
                matches!(&refused, Err(Error::FlushFailed { source }) if onlyonce_core::chain(source).contains("no space")),
                "{refused:?}"
            );
        }
        *engine.backlog.failure.lock() = None;
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| engine.claim(&request).unwrap().len());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            engine.flush().unwrap();
            assert_eq!(waits.join().unwrap(), 1);
        });
    }

    #[test]
    fn what_goes_to_the_journal_is_counted_until_it_is_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir);
        let counted = || (engine.journal_bytes.load(Ordering::Relaxed), engine.log_bytes.load(Ordering::Relaxed));
        assert_eq!(counted(), (0, 0));
        engine.record(&engine.request(["k"]).unwrap()).unwrap();
        let mut written = 0;
        let count = |_, record: &[u8]| {
            written += record.len() as u64;
            Ok(())
        };
        engine.db.for_each_record(count).unwrap();
        assert_eq!(counted(), (written, written));
        engine.flush().unwrap();
        assert_eq!(counted(), (0, written), "the log goes later");
        assert!(written > 0);
    }
}
