//! What keeps a store small and quick: sealing, rotation, syncing, the rebuild of the filter. Done by the keeper's
//! threads, off every caller's path.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::core::Engine;
use super::transition::LeaseState;
use crate::buckets::filters::Filters;
use crate::buckets::flush::flush;
use crate::buckets::range::BucketRange;
use crate::buckets::registry::Bucket;
use crate::buckets::rotation::{drop_expired, has_expired, prepare_next};
use crate::clock::Now;
use crate::codec::{RecordKind, RecordWriter};
use crate::config::Span;
use crate::entry::{Entry, Processing, is_live};
use crate::memtable::frozen::FrozenSet;
use crate::memtable::table::Shard;
use crate::metrics::{ExpensiveGauges, Gauges};
use crate::stats::{BucketStats, Stats};
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::sleep;
use onlyonce_core::{OnInterrupt, Result, Timestamp};

/// Completed keys that make a run. Fewer make more runs to look through; more take longer to read back after a crash.
const FLUSH_KEYS: usize = 250_000;
/// The share of the memory budget that completed keys may fill before they are sealed, and before callers wait.
const FLUSH_SHARE: usize = 8;
const BACKLOG_SHARE: usize = 4;

/// Bytes of an image's row, after which the next one begins.
const CHECKPOINT_RECORD_BYTES: usize = 16 << 20;
/// Bytes of rows after which a seal has the log cut: at most so much, and what comes during one more seal, is read back
/// after a crash.
const TRUNCATE_BYTES: u64 = 32 << 20;
/// The same, where nothing waits to be sealed.
const IDLE_TRUNCATE_BYTES: u64 = 1 << 20;
/// How long to sleep between two looks at a row that is being written.
const RECORD_POLL: Duration = Duration::from_micros(200);

/// How long at least a purge is not repeated: it visits the whole hot table.
const PURGE_INTERVAL_MS: u64 = 1_000;

/// What the rounds of upkeep remember of each other.
pub(super) struct MaintenanceState {
    /// The slice of time in which the last one took place.
    flushed: BucketRange,
    purged_monotonic_ms: u64,
    /// Whether an open has left something to the first of them.
    pub(super) has_leftover_work: bool,
}

impl Engine {
    /// Whether there is enough in the hot table, or in the journal, to seal.
    pub(super) fn is_flush_due(&self) -> bool {
        let bytes = self.config().memory_budget / FLUSH_SHARE;
        self.memtable.flushable() >= FLUSH_KEYS
            || self.memtable.flushable_bytes() >= bytes
            || self.journal_bytes.load(Ordering::Relaxed) >= bytes as u64
    }

    /// Whether keys whose work has ended fill the memory that they may.
    pub(super) fn is_backlogged(&self) -> bool {
        self.memtable.flushable_bytes() >= self.config().memory_budget / BACKLOG_SHARE
    }

    /// One round of all that is due.
    pub(super) fn run_maintenance(&self, last: &mut MaintenanceState) -> Result<()> {
        self.unbroken()?;
        self.keep_time()?;
        let present = self.present_range();
        self.db.write_manifest_if_due();
        // First, so that a seal finds room for its buckets.
        self.drop_expired()?;
        let now_ms = self.now().monotonic_ms;
        if self.is_crowded() && now_ms.saturating_sub(last.purged_monotonic_ms) >= PURGE_INTERVAL_MS {
            last.purged_monotonic_ms = now_ms;
            self.purge();
        }
        // A bucket that has ended is sealed to its end, so that its keys leave memory and the journal.
        let ended = last.has_leftover_work || (last.flushed != present && self.memtable.flushable() > 0);
        if ended || self.is_flush_due() {
            self.flush()?;
        }
        if self.memtable.flushable() == 0 {
            // There is nothing that would be written for it but what is in flight.
            let _flush_lock = self.flush_lock.lock();
            self.truncate_log(IDLE_TRUNCATE_BYTES)?;
        }
        last.flushed = present;
        last.has_leftover_work = false;
        prepare_next(&self.db, &self.buckets, self.config().span, self.now().time_ms)
    }

    /// Looks at the clocks, and writes what the next opening must know of them: a change at once, all else with a write
    /// that comes anyway.
    fn keep_time(&self) -> Result<()> {
        self.time_saved.refresh(self.timeline.observe());
        if self.time_saved.is_outdated(&self.timeline) { self.write(false, |_| Ok(())) } else { Ok(()) }
    }

    /// Where the rounds of upkeep begin.
    pub(super) fn maintenance_state(&self) -> MaintenanceState {
        MaintenanceState {
            flushed: self.present_range(),
            purged_monotonic_ms: self.now().monotonic_ms,
            has_leftover_work: false,
        }
    }

    fn present_range(&self) -> BucketRange {
        BucketRange::containing(self.now().time_ms, self.config().span.bucket_ms)
    }

    /// Moves every key whose work has ended to its bucket and cuts the journal.
    ///
    /// The order: rows up to `start` are written and in the hot table; what they ended is set apart; the log is
    /// synced; what was set apart goes to the buckets, synced; what is in flight is written again at the journal's head
    /// and the rows below `start` are deleted, in one write; then the keys leave the table. A crash anywhere between
    /// replays rows that are in buckets already, and sealing them again changes nothing.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut last_checkpoint = self.flush_lock.lock();
        self.ready()?;
        let flushed = self.flush_locked(&mut last_checkpoint).inspect_err(|_| self.memtable.restore());
        *self.backlog.failure.lock() = flushed.as_ref().err().cloned();
        self.backlog.eased.notify_all();
        flushed?;
        // Should this fail, memory is free all the same.
        self.truncate_log(TRUNCATE_BYTES)
    }

    fn flush_locked(&self, last_checkpoint: &mut u64) -> Result<()> {
        let journal_bytes = self.journal_bytes.load(Ordering::Relaxed);
        if journal_bytes == 0 && self.memtable.flushable() == 0 {
            return Ok(());
        }
        let _timer = self.metrics.flush();
        let begun = std::time::Instant::now();
        self.reserve(0)?;
        let start = self.first_open_record(*last_checkpoint)?;
        let now = self.now();
        let Span { window_ms, bucket_ms } = self.config().span;
        let mut checkpoint = vec![self.record_writer(RecordKind::Claimed, now, 0)];
        let arenas = self.memtable.freeze(start, |key, processing| {
            let stays = self.lease_state_at(processing, now) != LeaseState::Forgotten;
            if stays {
                if checkpoint.last().is_none_or(|record| record.len() > CHECKPOINT_RECORD_BYTES) {
                    checkpoint.push(self.record_writer(RecordKind::Claimed, now, CHECKPOINT_RECORD_BYTES));
                }
                if let Some(record) = checkpoint.last_mut() {
                    record.processing(key, processing);
                }
            }
            stays
        });
        Failpoint::FlushFrozen.pass();
        self.unbroken()?;
        let frozen_set = FrozenSet::new(arenas, now, window_ms, bucket_ms);
        if self.policy.is_stream {
            // It may have come far since the last round: there must be room for what counts as of now.
            self.drop_expired_at(now, &|| true)?;
        }
        // What the journal says of a key overrules its bucket at the next open. Should a power cut take rows that the
        // buckets are ahead of, an older state of the key would be left in it.
        self.sync_log()?;
        flush(&self.db, &self.buckets, &frozen_set)?;
        self.unbroken()?;
        Failpoint::FlushIngested.pass();
        // Before the rows go: a manifest that has lost these runs must not pass for whole.
        self.db.write_manifest()?;
        Failpoint::FlushManifestWritten.pass();

        self.reserve(checkpoint.len())?;
        let mut written = Vec::with_capacity(checkpoint.len());
        self.timeline.ask_to_be_saved();
        self.write(false, |tx| {
            tx.delete_records_before(start);
            // Each row goes as soon as the transaction has it: where much is in flight, one copy fewer is a lot.
            for record in checkpoint.into_iter().filter(|record| !record.is_empty()).map(RecordWriter::finish) {
                let open = self.begin_record();
                tx.put_record(open.number(), &record);
                written.push((open, record.len()));
            }
            Ok(())
        })?;
        Failpoint::FlushJournalTruncated.pass();
        for (open, bytes) in written {
            self.log_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            *last_checkpoint = open.number();
            open.finish();
        }
        self.journal_bytes.fetch_sub(journal_bytes, Ordering::Relaxed);

        self.memtable.publish();
        Failpoint::FlushPublished.pass();
        // Before the first key leaves: see `Engine::with_locked_key`.
        self.flush_generation.fetch_add(1, Ordering::AcqRel);
        self.memtable.retire();
        Failpoint::FlushRetired.pass();
        let in_flight = self.memtable.in_flight();
        tracing::debug!(keys = frozen_set.len(), in_flight, journal_bytes, elapsed = ?begun.elapsed(), "sealed");
        Ok(())
    }

    /// Has RocksDB flush the journal, so that the log behind it can go, if `least` bytes were written to it since the last
    /// time. Hardly anything in it is alive after a seal; but what has come meanwhile is written once more, so that it is
    /// better done seldom.
    fn truncate_log(&self, least: u64) -> Result<()> {
        if self.log_bytes.load(Ordering::Relaxed) < least {
            return Ok(());
        }
        let bytes = self.log_bytes.swap(0, Ordering::Relaxed);
        let families = self.buckets.snapshot().newest_first();
        self.db.flush_journal(families.iter().map(|bucket| bucket.family.as_str())).inspect_err(|_| {
            self.log_bytes.fetch_add(bytes, Ordering::Relaxed);
        })
    }

    /// Removes from the hot table what has run out.
    fn purge(&self) {
        let now = self.now();
        let window_ms = self.config().span.window_ms;
        for mut shard in self.memtable.shards() {
            shard.retain(|entry| match entry {
                // Also after its own window: it overrules what a bucket may hold of an earlier attempt.
                Entry::Completed(done) => is_live(done.completed_ms, now, window_ms),
                Entry::Processing(processing) => self.lease_state_at(processing, now) != LeaseState::Forgotten,
            });
        }
    }

    /// Whether so many keys are in flight that claims are refused.
    fn is_crowded(&self) -> bool {
        self.memtable.in_flight() >= self.config().in_flight_limit
    }

    /// Drops the buckets that have passed. Not while keys are sealed or forgotten: a bucket must not go under them.
    fn drop_expired(&self) -> Result<()> {
        self.drop_expired_while(|| true).map(drop)
    }

    /// As [`Engine::drop_expired`], as long as `should_continue` says so. False if some are left.
    pub(super) fn drop_expired_while(&self, should_continue: impl Fn() -> bool) -> Result<bool> {
        let _flush_lock = self.flush_lock.lock();
        let now = self.now();
        self.drop_expired_at(now, &should_continue)?;
        Ok(!has_expired(&self.buckets, self.config().span, &now))
    }

    fn drop_expired_at(&self, now: Now, should_continue: &impl Fn() -> bool) -> Result<()> {
        let span = self.config().span;
        if has_expired(&self.buckets, span, &now) {
            Failpoint::BucketExpired.pass();
            // The next opening must not take these keys for remembered.
            self.save_time()?;
            drop_expired(&self.db, &self.buckets, span, &now, should_continue);
        }
        Ok(())
    }

    /// The number below which every row is settled: above the last image. While that image says of a key that it is in
    /// flight, the row that completed it must not go alone, or a replay would take the key for unfinished.
    fn first_open_record(&self, last_checkpoint: u64) -> Result<u64> {
        loop {
            let start = self.memtable.records().finished_below(|| self.sequence.take());
            if start > last_checkpoint {
                return Ok(start);
            }
            // A row that was given up stays open for good, in a store that is poisoned or closed.
            self.ready()?;
            // Some caller began its row before that image, and is still writing it.
            sleep(RECORD_POLL);
        }
    }

    /// Seals, drops and prepares whatever can be, now.
    pub(crate) fn flush_and_rotate(&self) -> Result<()> {
        self.drop_expired()?;
        self.flush()?;
        {
            let _flush_lock = self.flush_lock.lock();
            self.truncate_log(1)?;
        }
        prepare_next(&self.db, &self.buckets, self.config().span, self.now().time_ms)
    }

    /// Puts on the disk what was written without waiting for it.
    pub(super) fn sync(&self) -> Result<()> {
        if self.unsynced.swap(false, Ordering::AcqRel) { self.sync_log() } else { Ok(()) }
    }

    pub(super) fn sync_log(&self) -> Result<()> {
        self.ready()?;
        self.db.sync_log().inspect_err(|error| self.poison_by(error))
    }

    /// Brings back the filter of every bucket that has none, as long as `should_continue` says so.
    pub(super) fn restore_filters(&self, should_continue: &(impl Fn() -> bool + Sync)) -> Result<()> {
        let begun = std::time::Instant::now();
        self.filters.load(&self.buckets, should_continue);
        Filters::rebuild(&self.db, &self.buckets, should_continue)?;
        self.unbroken()?;
        tracing::info!(elapsed = ?begun.elapsed(), "filters complete");
        Ok(())
    }

    /// Tidies the filters of buckets that have ended, and keeps them on disk.
    pub(super) fn persist_filters(&self, should_continue: impl Fn() -> bool) -> Result<()> {
        Filters::tidy(&self.db, &self.buckets, self.now().time_ms, &should_continue)?;
        // A column that lacks bits must not be kept.
        self.unbroken()?;
        let ssts = || {
            // While a seal is between a run and its marks, the run must not pass for one that is marked.
            let _flush_lock = self.flush_lock.lock();
            self.db.sst_files()
        };
        self.filters.persist(&self.buckets, self.now().time_ms, ssts, should_continue)
    }

    /// Counts a message that was let through without an answer.
    pub(crate) fn count_fail_open(&self) {
        self.counters.fail_open.add(1);
    }

    /// Tells the facade what was counted, and what there is.
    pub(super) fn export_metrics(&self) {
        self.metrics.export(
            &self.counters,
            || self.gauges(),
            || ExpensiveGauges { held: self.count_held(), disk_bytes: self.db.directory().bytes() },
        );
    }

    /// What is found out quickly.
    pub(super) fn gauges(&self) -> Gauges {
        let snapshot = self.buckets.snapshot();
        Gauges {
            in_flight: self.memtable.in_flight() as u64,
            unflushed: self.memtable.flushable() as u64,
            buckets: snapshot.newest_first().len() as u64,
            filter_bytes: snapshot.filter_bytes(),
            journal_bytes: self.journal_bytes.load(Ordering::Relaxed),
            log_syncs: self.db.syncs(),
            now_ms: self.now().time_ms,
            is_poisoned: self.poisoned().is_some(),
        }
    }

    /// Visits the hot table, where a key can be held at all.
    fn count_held(&self) -> u64 {
        if self.policy.on_interrupt == OnInterrupt::Rerun {
            return 0;
        }
        let now = self.now();
        let held = |processing: &Processing| matches!(self.lease_state_at(processing, now), LeaseState::Held(_));
        let held_in = |shard: Shard<'_>| shard.in_flight().filter(|(_, _, processing)| held(processing)).count();
        self.memtable.shards().map(held_in).sum::<usize>() as u64
    }

    /// The store's figures. Visits the hot table and the directory: not for every request.
    pub(crate) fn stats(&self) -> Stats {
        let now = self.timeline.observe();
        let snapshot = self.buckets.snapshot();
        let bucket_stats = |bucket: &Arc<Bucket>| BucketStats {
            start: Timestamp::from_unix_ms(bucket.range.start_ms),
            end: Timestamp::from_unix_ms(bucket.range.end_ms()),
            keys: bucket.keys.load(Ordering::Relaxed),
            filtered: snapshot.is_filtered(bucket),
        };
        let mut buckets: Vec<BucketStats> = snapshot.newest_first().iter().map(bucket_stats).collect();
        buckets.reverse();
        let counters = &self.counters;
        let window_ms = self.config().span.window_ms;
        Stats {
            acquired: counters.acquired.get(),
            reclaimed: counters.reclaimed.get(),
            duplicates: counters.duplicates.get(),
            in_progress: counters.in_progress.get(),
            payload_mismatches: counters.payload_mismatches.get(),
            too_old: counters.too_old.get(),
            too_far_ahead: counters.too_far_ahead.get(),
            completed: counters.completed.get(),
            recorded: counters.recorded.get(),
            released: counters.released.get(),
            superseded: counters.superseded.get(),
            fail_open: counters.fail_open.get(),
            filter_checks: counters.filter_checks.get(),
            filter_hits: counters.filter_hits.get(),
            filter_false_positives: counters.filter_false_positives.get(),
            log_syncs: self.db.syncs(),
            in_flight: self.memtable.in_flight() as u64,
            held: self.count_held(),
            unflushed: self.memtable.flushable() as u64,
            buckets,
            filter_bytes: snapshot.filter_bytes(),
            disk_bytes: self.db.directory().bytes(),
            now: Timestamp::from_unix_ms(now.time_ms),
            window: Duration::from_millis(window_ms),
            remembers_since: Timestamp::from_unix_ms(now.remembers_since(window_ms)),
            poisoned: self.poisoned().map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::config::Durability;
    use crate::config::Options;
    use crate::engine::response::Grant;
    use crate::engine::response::{FinishKind, FinishedBy};
    use crate::entry::{Backoff, CompletedEntry, Holder, OwnWindow};
    use crate::fs::directory::Directory;
    use crate::memtable::arena::{OVERHEAD_BYTES, Pending};
    use onlyonce_core::StoredResult;
    use onlyonce_core::{Claim, Error, KeyStatus, RecordOutcome};

    fn engine(dir: &tempfile::TempDir, options: &Options) -> Engine {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Engine::open(directory, options).unwrap()
    }

    /// Short windows on a clock that the test moves.
    fn options(clock: &ManualClock) -> Options {
        Options {
            clock: Arc::new(clock.clone()),
            window: Some(Duration::from_secs(10)),
            bucket: Some(Duration::from_secs(1)),
            memory_budget: 32 << 20,
            durability: Durability::Process,
            ..Options::default()
        }
    }

    fn record(engine: &Engine, key: &str) {
        let response = engine.record(&engine.request([key]).unwrap()).unwrap().pop().unwrap();
        assert_eq!(response.unwrap(), RecordOutcome::First);
    }

    fn claim(engine: &Engine, key: &str) -> Grant {
        match engine.claim(&engine.request([key]).unwrap()).unwrap().pop().unwrap() {
            Ok(Claim::Acquired(grant)) => grant,
            other => panic!("{key}: {other:?}"),
        }
    }

    /// Puts a completed key into the table, for which so many bytes are counted.
    fn fill(engine: &Engine, digest: u64, bytes: usize) {
        let result = vec![0; bytes - OVERHEAD_BYTES - 1];
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

    fn flush_generation(engine: &Engine) -> u64 {
        engine.flush_generation.load(Ordering::Relaxed)
    }

    #[test]
    fn a_completion_whose_own_window_is_over_is_not_purged_while_a_bucket_has_an_earlier_attempt() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let engine = engine(&dir, &options(&clock));
        engine.abandon(&claim(&engine, "k"));
        engine.flush().unwrap();
        let key = onlyonce_core::Key::from("k").window(Duration::from_secs(1));
        let Ok(Claim::Acquired(grant)) = engine.claim(&engine.request([key]).unwrap()).unwrap().pop().unwrap() else {
            panic!("its lease was dropped")
        };
        assert_eq!(grant.attempt, 2);
        let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
        engine.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&grant, done)]).unwrap();
        clock.advance(Duration::from_secs(1));
        engine.purge();
        assert_eq!(claim(&engine, "k").attempt, 1);
    }

    #[test]
    fn a_seal_is_due_at_an_eighth_of_the_budget_or_so_many_keys_and_callers_wait_at_a_quarter() {
        let dir = tempfile::tempdir().unwrap();
        let small = engine(&dir, &options(&ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000))));
        let eighth = 4 << 20;
        let is_due_or_too_late = || (small.is_flush_due(), small.is_backlogged());
        for (journal, is_due) in [(0, false), (eighth - 1, false), (eighth, true)] {
            small.journal_bytes.store(journal as u64, Ordering::Relaxed);
            assert_eq!(is_due_or_too_late(), (is_due, false), "{journal} bytes of rows");
        }
        small.journal_bytes.store(0, Ordering::Relaxed);
        let least = OVERHEAD_BYTES + 1;
        for (digest, bytes, is_due, is_too_late) in [
            (1, eighth - least, false, false),
            (2, least - 1, false, false),
            (3, least, true, false),
            (4, eighth - 2 * least, true, false),
            (5, least, true, false),
            (6, least, true, true),
        ] {
            if bytes >= least {
                fill(&small, digest, bytes);
            }
            assert_eq!(is_due_or_too_late(), (is_due, is_too_late), "{} bytes", small.memtable.flushable_bytes());
        }

        let dir = tempfile::tempdir().unwrap();
        let large = engine(&dir, &Options::default());
        (1..FLUSH_KEYS as u64).for_each(|i| fill(&large, i.wrapping_mul(0x9e37_79b9_7f4a_7c15), least));
        assert!(!large.is_flush_due());
        fill(&large, 0, least);
        assert!(large.is_flush_due());
    }

    #[test]
    fn a_round_seals_what_an_ended_bucket_completed_or_what_is_due_and_nothing_else() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = engine(&dir, &options(&clock));
        let mut maintenance_state = engine.maintenance_state();
        let mut round = || {
            engine.run_maintenance(&mut maintenance_state).unwrap();
            (engine.memtable.flushable(), flush_generation(&engine))
        };
        record(&engine, "first");
        assert_eq!(round(), (1, 0));
        clock.advance(Duration::from_secs(1));
        assert_eq!(round(), (0, 1), "its bucket has ended");
        record(&engine, "second");
        assert_eq!(round(), (1, 1), "once for each bucket");
        engine.journal_bytes.fetch_add(4 << 20, Ordering::Relaxed);
        assert_eq!(round(), (0, 2), "it was due");
        let _open = claim(&engine, "open");
        clock.advance(Duration::from_secs(1));
        assert_eq!(round(), (0, 2), "nothing was completed");
    }

    #[test]
    fn what_is_in_flight_and_has_run_out_goes_where_it_stands_in_the_way_and_once_a_second() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let window = Some(Duration::from_millis(100));
        let lease = Duration::from_secs(1);
        let engine = engine(&dir, &Options { in_flight_limit: 2, window, bucket: window, lease, ..options(&clock) });
        let mut maintenance_state = engine.maintenance_state();
        let mut round_after = |ms| {
            clock.advance(Duration::from_millis(ms));
            engine.run_maintenance(&mut maintenance_state).unwrap();
            engine.memtable.in_flight()
        };
        // A grant is no lease: nothing is dropped, and their leases run out.
        let _leaked = claim(&engine, "a");
        assert_eq!(round_after(2_000), 1, "there is room for another");
        let _leaked = claim(&engine, "b");
        assert_eq!(round_after(1_200), 0);
        let _leaked = claim(&engine, "c");
        clock.advance(Duration::from_millis(1_100));
        let alive = claim(&engine, "alive");
        assert_eq!(round_after(0), 1, "and never what is alive");
        assert!(engine.renew(&alive).unwrap());
    }

    #[test]
    fn the_log_is_cut_by_a_round_that_has_nothing_to_seal_and_later_by_a_seal() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &options(&ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000))));
        let mut maintenance_state = engine.maintenance_state();
        let mut left_by_a_round = |bytes| {
            engine.log_bytes.store(bytes, Ordering::Relaxed);
            engine.run_maintenance(&mut maintenance_state).unwrap();
            engine.log_bytes.load(Ordering::Relaxed)
        };
        let (idle, flush_lock) = (1 << 20, 32 << 20);
        assert_eq!(left_by_a_round(idle - 1), idle - 1);
        assert_eq!(left_by_a_round(idle), 0);
        record(&engine, "unsealed");
        assert_eq!(left_by_a_round(idle), idle);
        let left_by_a_flush = |key: &str, bytes| {
            record(&engine, key);
            engine.log_bytes.store(bytes, Ordering::Relaxed);
            engine.flush().unwrap();
            engine.log_bytes.load(Ordering::Relaxed)
        };
        assert_eq!(left_by_a_flush("a", flush_lock - 1), flush_lock - 1);
        assert_eq!(left_by_a_flush("b", flush_lock), 0);
    }

    #[test]
    fn an_image_is_a_few_large_rows_however_many_rows_it_stands_for() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(
            &dir,
            &Options {
                key_limit: 65_535,
                ..options(&ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)))
            },
        );
        let records = || {
            let mut records = Vec::new();
            engine.db.for_each_record(|_, record| {
                records.push(record.len());
                Ok(())
            })?;
            Ok::<_, Error>(records)
        };
        engine.flush().unwrap();
        assert_eq!((flush_generation(&engine), records().unwrap().len()), (0, 0), "there is nothing to seal");
        let _few = ["a", "b", "c"].map(|key| claim(&engine, key));
        assert_eq!(records().unwrap().len(), 3);
        engine.flush().unwrap();
        assert_eq!((flush_generation(&engine), records().unwrap().len()), (1, 1));
        let long = "k".repeat(65_000);
        let many = engine.request((0..300).map(|i| format!("{i}{long}"))).unwrap();
        assert!(engine.claim(&many).unwrap().iter().all(Result::is_ok));
        engine.flush().unwrap();
        let records = records().unwrap();
        assert_eq!(records.len(), 2, "{records:?}");
        assert!((CHECKPOINT_RECORD_BYTES..CHECKPOINT_RECORD_BYTES + 70_000).contains(&records[0]), "{records:?}");
    }

    #[test]
    fn the_log_is_synced_where_something_was_written_that_nobody_waited_for() {
        for (durability, waits) in [(Durability::Process, false), (Durability::Disk, true)] {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(
                &dir,
                &Options { durability, ..options(&ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000))) },
            );
            engine.sync().unwrap();
            record(&engine, "k");
            // Whether it goes to the log is seen by its error.
            engine.db.close().unwrap();
            assert_eq!(engine.sync().is_ok(), waits, "{durability:?}");
            engine.sync().expect("once");
        }
    }

    #[test]
    fn the_filter_of_a_bucket_that_has_ended_is_kept_on_disk() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = engine(&dir, &options(&clock));
        let kept = || {
            engine.persist_filters(|| true).unwrap();
            std::fs::read_dir(engine.db.directory().filters()).unwrap().count()
        };
        record(&engine, "k");
        engine.flush().unwrap();
        assert_eq!(kept(), 0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(kept(), 1);
    }

    #[test]
    fn a_holder_that_renews_in_time_is_not_resolved_away() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let options = Options {
            clock: Arc::new(clock.clone()),
            on_interrupt: Some(OnInterrupt::Hold),
            lease: Duration::from_secs(1),
            ..Options::default()
        };
        let engine = engine(&dir, &options);
        let request = engine.request(["k"]).unwrap();
        let Ok(Claim::Acquired(grant)) = engine.claim(&request).unwrap().pop().unwrap() else { panic!("k is new") };
        clock.advance(Duration::from_secs(1));
        let (held, prior) = engine.held_grant(&request).unwrap().unwrap();
        // Between the two steps of a resolution.
        assert!(engine.renew(&grant).unwrap());
        let rerun = vec![(&held, FinishKind::Release { prior, backoff: Backoff::NONE })];
        let resolved = engine.finish(RecordKind::Released, FinishedBy::Operator, rerun).unwrap();
        assert!(matches!(resolved[..], [Ok(false)]), "{resolved:?}");
        assert!(matches!(engine.claim(&request).unwrap().pop(), Some(Ok(Claim::InProgress { .. }))));
    }

    #[test]
    fn a_seal_waits_for_rows_that_were_begun_before_the_last_image() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let slow = engine.begin_record();
        let checkpoint = engine.sequence.take();
        assert!(slow.number() < checkpoint);
        let (send, truncated) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| send.send(engine.first_open_record(checkpoint).unwrap()));
            let early = truncated.recv_timeout(Duration::from_millis(50));
            assert!(early.is_err(), "the journal would be cut at {early:?}, below the image {checkpoint}");
            slow.finish();
            assert!(truncated.recv().unwrap() > checkpoint);
        });
    }

    #[test]
    fn a_seal_makes_room_for_a_stream_that_has_come_far_since_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            clock: Arc::new(ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1 << 40))),
            window: Some(Duration::from_secs(48)),
            bucket: Some(Duration::from_secs(1)),
            stream_time: Some(Duration::from_secs(48)),
            ..Options::default()
        };
        let engine = engine(&dir, &options);
        for lap in 0..2_u64 {
            let second_ms = |second| 1_000_000 + (lap * 48 + second) * 1_000;
            let at = |second| onlyonce_core::Timestamp::from_unix_ms(second_ms(second));
            let keys = (0..48).map(|second| onlyonce_core::Key::from(format!("{lap}/{second}")).at(at(second)));
            let request = engine.request(keys).unwrap();
            assert!(
                engine.record(&request).unwrap().iter().all(|response| matches!(response, Ok(RecordOutcome::First)))
            );
            // No round of upkeep has come between.
            engine.flush().unwrap();
            assert_eq!(engine.buckets.snapshot().newest_first().len(), 48 + lap as usize, "lap {lap}");
        }
    }

    #[test]
    fn a_key_whose_row_is_open_is_neither_sealed_nor_completed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["k"]).unwrap();
        let key_ref = request.get(0).unwrap();
        engine.record(&engine.request(["sealed"]).unwrap()).unwrap();
        let open = engine.begin_record();
        let now_ms = engine.now().time_ms;
        let done = CompletedEntry {
            token: open.number(),
            completed_ms: now_ms,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result: StoredResult::None,
        };
        let pending = Pending { record: open.number(), attempt: 1, holder: Holder::CommittingUnclaimed };
        engine.memtable.shard(key_ref.digest).set_pending(key_ref.digest, key_ref.key, Entry::Completed(done), pending);
        let responses = |engine: &Engine| engine.check(&request).unwrap().pop().unwrap().unwrap();

        engine.flush().unwrap();
        assert!(matches!(responses(&engine), KeyStatus::InProgress(_)));
        assert_eq!(engine.memtable.flushable(), 1, "it waits for its row, and for the next seal");
        open.finish();
        assert!(matches!(responses(&engine), KeyStatus::Completed(_)));
        engine.flush().unwrap();
        assert_eq!(engine.memtable.flushable(), 0);
        assert!(matches!(responses(&engine), KeyStatus::Completed(_)));
    }
}
