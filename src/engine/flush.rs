//! The flush: moves completed and released keys from the memtable to their buckets, and writes a checkpoint.
//!
//! Order, and the bug that each step prevents:
//!
//! 1. The journal's position is read, then a number is taken, then all records below that number are finished, then the arenas
//!    are frozen. So a key that is frozen has its record in the journal. A completion that is not frozen has its record after
//!    the position, and a key in progress is in the checkpoint. Otherwise the checkpoint could replace a record whose effect is
//!    nowhere else.
//! 2. The journal is synced, then SSTs are written. At open the journal overrules the buckets: if a power cut took records
//!    whose keys are in a bucket already, an older record of the same key would hide its completion.
//! 3. The SSTs are ingested and `meta` is flushed, then the checkpoint is written, which lists all SSTs. Otherwise it would
//!    replace records whose effect is not on disk, and a lost SST would go unnoticed.
//! 4. The recent cache is published, then the generation is incremented, then the memtable drops the keys. Otherwise a reader
//!    could miss a key in both places, or find an older state of it in the cache.
//!
//! A crash in between replays records whose keys are in buckets already. To flush them again changes nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::core::Engine;
use crate::buckets::flush::flush;
use crate::buckets::rotation::prepare_next;
use crate::codec::{RecordKind, RecordWriter};
use crate::config::Span;
use crate::journal::checkpoint::Checkpoint;
use crate::memtable::frozen::FrozenSet;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::sleep;
use onlyonce_core::Result;
use onlyonce_core::machine::LeaseState;
use onlyonce_journal::Position;

/// An open that finds more segments flushes. It begins one, unless the last one is empty.
const MAX_SEGMENTS: u64 = 32;
/// More than a checkpoint has besides the keys in progress, unless there are hundreds of SSTs.
const CHECKPOINT_BYTES: usize = 8 << 10;
/// How often a flush checks whether an open record was finished.
const RECORD_POLL: Duration = Duration::from_micros(200);

impl Engine {
    /// Moves all flushable keys to their buckets and writes a checkpoint.
    pub(crate) fn flush(&self) -> Result<()> {
        let _flush_lock = self.tables.flush_lock.lock();
        self.health.ready()?;
        let flushed = self.flush_locked().inspect_err(|_| self.tables.memtable.restore());
        self.backlog.flushed(&flushed);
        flushed
    }

    fn flush_locked(&self) -> Result<()> {
        let journal_bytes = self.writer.journal_bytes.load(Ordering::Relaxed);
        if journal_bytes == 0 && self.tables.memtable.flushable() == 0 && !self.has_many_segments()? {
            return Ok(());
        }
        let _timer = self.metrics.flush();
        let started = std::time::Instant::now();
        self.writer.reserve_tokens(0)?;
        // Before the number: a record from `start` on is appended after this position.
        let position = self.writer.journal.position()?;
        let start = self.finish_records()?;
        let now = self.now();
        let Span { window_ms, bucket_ms } = self.config().span;
        let mut in_progress = self.record_writer(RecordKind::Claimed, now, 0);
        let arenas = self.tables.memtable.freeze(start, |key, processing| {
            let stays = self.lease_state_at(processing, now) != LeaseState::Forgotten;
            if stays {
                in_progress.processing(key, processing);
            }
            stays
        });
        Failpoint::FlushFrozen.pass();
        self.health.check_invariants()?;
        let frozen_set = FrozenSet::new(arenas, now, window_ms, bucket_ms);
        // Before anything is written: the checkpoint must fit.
        self.writer.reserve_bytes(in_progress.len() + CHECKPOINT_BYTES)?;
        if self.policy.is_stream {
            // Stream time may have advanced far since the last round of maintenance. Expired buckets make room for those of
            // this flush.
            self.drop_expired_at(now, &|| true)?;
        }
        // Before the SSTs: if a power cut lost records whose keys are in a bucket, an older record would hide them.
        self.writer.sync()?;
        flush(&self.tables.db, &self.tables.buckets, &frozen_set)?;
        self.health.check_invariants()?;
        Failpoint::FlushIngested.pass();
        // Stored with each flush: on stream time no other write has it.
        self.timeline.ask_to_be_saved();
        self.writer.write_uncounted(false, |_| ())?;
        let families = self.tables.buckets.snapshot().newest_first();
        let flushes = self
            .writer
            .journal
            .flush(families.iter().map(|bucket| bucket.family.as_str()))
            .inspect_err(|error| self.health.poison_by(error))?;
        self.write_checkpoint(position, flushes, in_progress)?;
        self.writer.journal_bytes.fetch_sub(journal_bytes, Ordering::Relaxed);

        self.tables.memtable.publish();
        Failpoint::FlushPublished.pass();
        // Before the memtable drops a key: `Engine::with_locked_key` reads the disk again if it sees the change.
        self.tables.flush_generation.fetch_add(1, Ordering::AcqRel);
        self.tables.memtable.retire();
        Failpoint::FlushRetired.pass();
        let in_flight = self.tables.memtable.in_flight();
        tracing::debug!(keys = frozen_set.len(), in_flight, journal_bytes, elapsed = ?started.elapsed(), "flushed");
        Ok(())
    }

    /// Appends a checkpoint with the keys in progress and with all SSTs. It replaces what was written before `position`.
    fn write_checkpoint(&self, position: Position, flushes: u64, in_progress: RecordWriter) -> Result<()> {
        let record = if in_progress.is_empty() { Vec::new() } else { in_progress.finish() };
        let manifest = self.tables.db.manifest().inspect_err(|error| self.health.poison_by(error))?;
        let checkpoint = Checkpoint { flushes, ssts: self.tables.db.ssts()?, manifest: Some(manifest) }.encode(&record);
        Failpoint::CheckpointBegun.pass();
        self.writer.journal.checkpoint(position, &checkpoint).inspect_err(|error| self.health.poison_by(error))?;
        Failpoint::CheckpointWritten.pass();
        Ok(())
    }

    /// Whether the journal has more segments than opens and closes may leave to each other.
    pub(super) fn has_many_segments(&self) -> Result<bool> {
        Ok(self.writer.journal.segments()? > MAX_SEGMENTS)
    }

    /// Waits until all records that have a number are written, and returns the next number.
    fn finish_records(&self) -> Result<u64> {
        let start = self.writer.sequence.take();
        while self.tables.memtable.records().finished_below(|| self.writer.sequence.take()) < start {
            // An abandoned record stays open forever. The store is poisoned or closed then.
            self.health.ready()?;
            sleep(RECORD_POLL);
        }
        Ok(start)
    }

    /// Drops expired buckets, flushes and creates the next bucket, all at once.
    pub(crate) fn flush_and_rotate(&self) -> Result<()> {
        self.drop_expired()?;
        self.flush()?;
        prepare_next(&self.tables.db, &self.tables.buckets, self.config().span, self.now().time_ms)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::ManualClock;
    use crate::config::Options;
    use crate::engine::fixture::{engine, fill, flush_generation, record, short_windows};
    use crate::engine::response::{FinishKind, FinishedBy};
    use crate::memtable::slot::Pending;
    use onlyonce_core::machine::{CompletedEntry, Entry, Holder, OwnWindow, Processing};
    use onlyonce_core::{Claim, Key, KeyStatus, RecordOutcome, StoredResult, Timestamp};

    #[test]
    fn an_idle_round_replaces_a_large_journal_by_a_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &short_windows(&ManualClock::at(Timestamp::from_unix_ms(1_000_000))));
        let mut maintenance_state = engine.maintenance_state();
        let mut journal_bytes_after_a_round = |bytes| {
            engine.writer.journal_bytes.store(bytes, Ordering::Relaxed);
            engine.run_maintenance(&mut maintenance_state).unwrap();
            engine.writer.journal_bytes.load(Ordering::Relaxed)
        };
        let idle = 1 << 20;
        assert_eq!(journal_bytes_after_a_round(idle - 1), idle - 1);
        assert!(journal_bytes_after_a_round(idle) < 1_000, "the flush itself writes the time");
        record(&engine, "unflushed");
        assert_eq!(journal_bytes_after_a_round(idle), idle);
    }

    #[test]
    fn a_checkpoint_has_the_keys_in_progress_and_frees_the_records_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let options =
            Options { key_limit: 65_535, ..short_windows(&ManualClock::at(Timestamp::from_unix_ms(1_000_000))) };
        let flushed = engine(&dir, &options);
        flushed.flush().unwrap();
        assert_eq!(flush_generation(&flushed), 0, "there is nothing to flush");
        let long = "k".repeat(65_000);
        let many = flushed.request((0..300).map(|i| format!("{i}{long}"))).unwrap();
        assert!(flushed.claim(&many).unwrap().iter().all(Result::is_ok));
        flushed.flush().unwrap();
        assert_eq!(flush_generation(&flushed), 1);
        flushed.close().unwrap();
        drop(flushed);
        let reopened = engine(&dir, &options);
        assert_eq!(reopened.tables.memtable.in_flight() + reopened.tables.memtable.flushable(), 300);
        assert_eq!(reopened.replayed.records, 1, "the checkpoint's");
    }

    #[test]
    fn the_generation_is_incremented_before_a_flushed_key_leaves_the_memtable() {
        // Its shard is the first one whose keys are removed, so that another order has time to be seen.
        const DIGEST: u64 = 1;
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        for round in 0..100 {
            fill(&engine, DIGEST, 1);
            std::thread::scope(|scope| {
                let seen = scope.spawn(|| {
                    loop {
                        let shard = engine.tables.memtable.shard(DIGEST);
                        if shard.get(DIGEST, b"k").is_none() {
                            return flush_generation(&engine);
                        }
                    }
                });
                engine.flush().unwrap();
                assert_eq!(seen.join().unwrap(), round + 1, "a reader would miss the key in the memtable and on disk");
            });
        }
    }

    #[test]
    fn the_recent_cache_has_the_newer_state_before_the_generation_is_incremented() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        for round in 0..100 {
            let result_bytes = round as usize + 1;
            fill(&engine, 1, result_bytes);
            std::thread::scope(|scope| {
                let seen = scope.spawn(|| {
                    while flush_generation(&engine) == round {}
                    engine.tables.memtable.recent().get(1, b"k")
                });
                engine.flush().unwrap();
                let Some(Entry::Completed(done)) = seen.join().unwrap() else { panic!("it is in the cache") };
                let StoredResult::Bytes(result) = done.result else { panic!("{done:?}") };
                assert_eq!(result.len(), result_bytes, "a reader would believe the older state");
            });
        }
    }

    #[test]
    fn a_flush_waits_for_the_records_that_began_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let slow = engine.begin_record();
        let (send, ended) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| send.send(engine.finish_records().unwrap()));
            let early = ended.recv_timeout(Duration::from_millis(50));
            assert!(early.is_err(), "the checkpoint would replace the open record: {early:?}");
            let number = slow.number();
            slow.finish();
            assert!(ended.recv().unwrap() > number);
        });
    }

    #[test]
    fn a_flush_drops_expired_buckets_if_stream_time_has_advanced() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            clock: Arc::new(ManualClock::at(Timestamp::from_unix_ms(1 << 40))),
            window: Some(Duration::from_secs(48)),
            bucket: Some(Duration::from_secs(1)),
            stream_time: Some(Duration::from_secs(48)),
            ..Options::default()
        };
        let engine = engine(&dir, &options);
        for lap in 0..2_u64 {
            let second_ms = |second| 1_000_000 + (lap * 48 + second) * 1_000;
            let at = |second| Timestamp::from_unix_ms(second_ms(second));
            let keys = (0..48).map(|second| Key::from(format!("{lap}/{second}")).at(at(second)));
            let request = engine.request(keys).unwrap();
            assert!(engine.record(&request).unwrap().iter().all(|outcome| matches!(outcome, Ok(RecordOutcome::First))));
            // No round of maintenance in between.
            engine.flush().unwrap();
            assert_eq!(engine.tables.buckets.snapshot().newest_first().len(), 48 + lap as usize, "lap {lap}");
        }
    }

    #[test]
    fn a_key_whose_claim_is_not_written_yet_is_not_taken_over_so_that_its_records_are_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(Timestamp::from_unix_ms(1_000_000));
        let options = Options { clock: Arc::new(clock.clone()), lease: Duration::from_millis(1), ..Options::default() };
        let slow = engine(&dir, &options);
        let request = slow.request(["k"]).unwrap();
        let key_ref = request.get(0).unwrap();
        let claim = |engine: &Engine| engine.claim(&request).unwrap().pop().unwrap().unwrap();
        // A claim that is slow to write its record, for longer than its lease.
        let open = slow.begin_record();
        let now = slow.now();
        let processing = Processing {
            token: slow.writer.sequence.take(),
            attempt: 1,
            since_ms: now.time_ms,
            fingerprint: None,
            own_window: OwnWindow::NONE,
            holder: Holder::Leased { until_monotonic_ms: now.monotonic_ms + 1 },
        };
        let pending = Pending { record: open.number(), attempt: 1, holder: Holder::Committing };
        slow.tables.memtable.shard(key_ref.digest).set_pending(
            key_ref.digest,
            key_ref.key,
            Entry::Processing(processing.clone()),
            pending,
        );
        clock.advance(Duration::from_millis(5));
        assert!(matches!(claim(&slow), Claim::InProgress(_)), "its record would come after those of the next attempt");
        let mut record = slow.record_writer(RecordKind::Claimed, now, 0);
        record.processing(key_ref.key, &processing);
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| slow.flush().unwrap());
            std::thread::sleep(Duration::from_millis(50));
            slow.append(open, record, &[], false).unwrap();
            flush.join().unwrap();
        });
        let Claim::Acquired(grant) = claim(&slow) else { panic!("its lease has ended") };
        let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
        slow.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&grant, done)]).unwrap();
        slow.flush().unwrap();
        slow.close().unwrap();
        drop(slow);
        assert!(matches!(claim(&engine(&dir, &options)), Claim::Completed(_)));
    }

    #[test]
    fn a_key_whose_record_is_open_is_not_completed_and_the_flush_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let request = engine.request(["k"]).unwrap();
        let key_ref = request.get(0).unwrap();
        engine.record(&engine.request(["flushed"]).unwrap()).unwrap();
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
        engine.tables.memtable.shard(key_ref.digest).set_pending(
            key_ref.digest,
            key_ref.key,
            Entry::Completed(done),
            pending,
        );
        let status = |engine: &Engine| engine.check(&request).unwrap().pop().unwrap().unwrap();

        std::thread::scope(|scope| {
            let flush = scope.spawn(|| engine.flush().unwrap());
            std::thread::sleep(Duration::from_millis(50));
            assert!(matches!(status(&engine), KeyStatus::InProgress(_)));
            assert!(!flush.is_finished() && engine.tables.memtable.flushable() == 2);
            open.finish();
            flush.join().unwrap();
        });
        assert_eq!(engine.tables.memtable.flushable(), 0);
        assert!(matches!(status(&engine), KeyStatus::Completed(_)));
    }
}
