//! The flush: moves completed and released keys from the memtable to their buckets, and truncates the journal.
//!
//! Order, and the bug that each step prevents:
//!
//! 1. Records below `start` are finished, then the arenas are frozen. Otherwise the journal would be truncated below a record
//!    that is still being written.
//! 2. RocksDB's log is synced, then SSTs are written. At open the journal overrules the buckets: if a power cut took records
//!    whose keys are in a bucket already, an older record of the same key would hide its completion.
//! 3. The SSTs are ingested and the file manifest is written, then the journal is truncated. Otherwise a lost SST would go
//!    unnoticed.
//! 4. The checkpoint is written and the older records are deleted in one write. Otherwise a crash could lose a key in progress.
//! 5. The recent cache is published, then the generation is incremented, then the memtable drops the keys. Otherwise a reader
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
use crate::memtable::frozen::FrozenSet;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::sleep;
use onlyonce_core::Result;
use onlyonce_core::machine::LeaseState;

/// The size at which a record of the checkpoint ends and the next one begins.
const CHECKPOINT_RECORD_BYTES: usize = 16 << 20;
/// The log size at which a flush truncates the log. A replay after a crash reads at most so much, and what is written during
/// one more flush.
const TRUNCATE_BYTES: u64 = 32 << 20;
/// The same while there is nothing to flush.
pub(super) const IDLE_TRUNCATE_BYTES: u64 = 1 << 20;
/// How often a flush checks whether an open record was finished.
const RECORD_POLL: Duration = Duration::from_micros(200);

impl Engine {
    /// Moves all flushable keys to their buckets and truncates the journal.
    pub(crate) fn flush(&self) -> Result<()> {
        let mut last_checkpoint = self.flush_lock.lock();
        self.ready()?;
        let flushed = self.flush_locked(&mut last_checkpoint).inspect_err(|_| self.memtable.restore());
        *self.backlog.failure.lock() = flushed.as_ref().err().cloned();
        self.backlog.eased.notify_all();
        flushed?;
        // After the backlog is eased: if this fails, the memory is free nevertheless.
        self.truncate_log(TRUNCATE_BYTES)
    }

    fn flush_locked(&self, last_checkpoint: &mut u64) -> Result<()> {
        let journal_bytes = self.journal_bytes.load(Ordering::Relaxed);
        if journal_bytes == 0 && self.memtable.flushable() == 0 {
            return Ok(());
        }
        let _timer = self.metrics.flush();
        let started = std::time::Instant::now();
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
        self.check_invariants()?;
        let frozen_set = FrozenSet::new(arenas, now, window_ms, bucket_ms);
        if self.policy.is_stream {
            // Stream time may have advanced far since the last round of maintenance. Expired buckets make room for those of
            // this flush.
            self.drop_expired_at(now, &|| true)?;
        }
        // Before the SSTs: if a power cut lost records whose keys are in a bucket, an older record would hide them.
        self.sync_log()?;
        flush(&self.db, &self.buckets, &frozen_set)?;
        self.check_invariants()?;
        Failpoint::FlushIngested.pass();
        // Before the records are deleted: at the next open, a missing SST must be an error.
        self.db.write_manifest()?;
        Failpoint::FlushManifestWritten.pass();

        *last_checkpoint = self.write_checkpoint(start, checkpoint)?.unwrap_or(*last_checkpoint);
        self.journal_bytes.fetch_sub(journal_bytes, Ordering::Relaxed);

        self.memtable.publish();
        Failpoint::FlushPublished.pass();
        // Before the memtable drops a key: `Engine::with_locked_key` reads the disk again if it sees the change.
        self.flush_generation.fetch_add(1, Ordering::AcqRel);
        self.memtable.retire();
        Failpoint::FlushRetired.pass();
        let in_flight = self.memtable.in_flight();
        tracing::debug!(keys = frozen_set.len(), in_flight, journal_bytes, elapsed = ?started.elapsed(), "flushed");
        Ok(())
    }

    /// Writes the checkpoint and deletes the records below `start`, in one write. Returns the number of the checkpoint's last
    /// record, if it has any.
    fn write_checkpoint(&self, start: u64, checkpoint: Vec<RecordWriter>) -> Result<Option<u64>> {
        self.reserve(checkpoint.len())?;
        let mut written = Vec::with_capacity(checkpoint.len());
        self.timeline.ask_to_be_saved();
        self.write(false, |tx| {
            tx.delete_records_before(start);
            // Each record is freed once it is in the transaction: a checkpoint may be large.
            for record in checkpoint.into_iter().filter(|record| !record.is_empty()).map(RecordWriter::finish) {
                let open = self.begin_record();
                tx.put_record(open.number(), &record);
                written.push((open, record.len()));
            }
            Ok(())
        })?;
        Failpoint::FlushJournalTruncated.pass();
        let mut last = None;
        for (open, bytes) in written {
            self.log_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            last = Some(open.number());
            open.finish();
        }
        Ok(last)
    }

    /// The number below which all records are finished, once it is above the last checkpoint. The journal is never truncated
    /// within a checkpoint: its record may say that a key is in progress which an earlier record has completed, so both must be
    /// deleted together. Otherwise a replay would take the key for unfinished.
    fn first_open_record(&self, last_checkpoint: u64) -> Result<u64> {
        loop {
            let start = self.memtable.records().finished_below(|| self.sequence.take());
            if start > last_checkpoint {
                return Ok(start);
            }
            // An abandoned record stays open forever. The store is poisoned or closed then.
            self.ready()?;
            // A caller took a number before the checkpoint and is still writing its record.
            sleep(RECORD_POLL);
        }
    }

    /// Truncates RocksDB's log by a flush of RocksDB's own memtable of the journal, if at least `min_bytes` were written since
    /// the last time. After a flush nearly all records in that memtable are deleted, but those that are not are written
    /// again, so the log is truncated rarely.
    pub(super) fn truncate_log(&self, min_bytes: u64) -> Result<()> {
        if self.log_bytes.load(Ordering::Relaxed) < min_bytes {
            return Ok(());
        }
        let bytes = self.log_bytes.swap(0, Ordering::Relaxed);
        let families = self.buckets.snapshot().newest_first();
        self.db.flush_journal(families.iter().map(|bucket| bucket.family.as_str())).inspect_err(|_| {
            self.log_bytes.fetch_add(bytes, Ordering::Relaxed);
        })
    }

    /// Flushes, drops expired buckets, truncates the log and creates the next bucket, all at once.
    pub(crate) fn flush_and_rotate(&self) -> Result<()> {
        self.drop_expired()?;
        self.flush()?;
        {
            let _flush_lock = self.flush_lock.lock();
            self.truncate_log(1)?;
        }
        prepare_next(&self.db, &self.buckets, self.config().span, self.now().time_ms)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::ManualClock;
    use crate::config::Options;
    use crate::engine::fixture::{claim, engine, flush_generation, record, short_windows};
    use crate::memtable::slot::Pending;
    use onlyonce_core::machine::{CompletedEntry, Entry, Holder, OwnWindow};
    use onlyonce_core::{Error, Key, KeyStatus, RecordOutcome, StoredResult, Timestamp};

    #[test]
    fn the_log_is_truncated_by_an_idle_round_or_by_a_flush_of_a_larger_log() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &short_windows(&ManualClock::at(Timestamp::from_unix_ms(1_000_000))));
        let mut maintenance_state = engine.maintenance_state();
        let mut log_bytes_after_a_round = |bytes| {
            engine.log_bytes.store(bytes, Ordering::Relaxed);
            engine.run_maintenance(&mut maintenance_state).unwrap();
            engine.log_bytes.load(Ordering::Relaxed)
        };
        let (idle, busy) = (1 << 20, 32 << 20);
        assert_eq!(log_bytes_after_a_round(idle - 1), idle - 1);
        assert_eq!(log_bytes_after_a_round(idle), 0);
        record(&engine, "unflushed");
        assert_eq!(log_bytes_after_a_round(idle), idle);
        let log_bytes_after_a_flush = |key: &str, bytes| {
            record(&engine, key);
            engine.log_bytes.store(bytes, Ordering::Relaxed);
            engine.flush().unwrap();
            engine.log_bytes.load(Ordering::Relaxed)
        };
        assert_eq!(log_bytes_after_a_flush("a", busy - 1), busy - 1);
        assert_eq!(log_bytes_after_a_flush("b", busy), 0);
    }

    #[test]
    fn a_checkpoint_has_few_large_records() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(
            &dir,
            &Options { key_limit: 65_535, ..short_windows(&ManualClock::at(Timestamp::from_unix_ms(1_000_000))) },
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
        assert_eq!((flush_generation(&engine), records().unwrap().len()), (0, 0), "there is nothing to flush");
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
    fn a_flush_waits_for_records_that_began_before_the_last_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, &Options::default());
        let slow = engine.begin_record();
        let checkpoint = engine.sequence.take();
        assert!(slow.number() < checkpoint);
        let (send, truncated) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| send.send(engine.first_open_record(checkpoint).unwrap()));
            let early = truncated.recv_timeout(Duration::from_millis(50));
            assert!(early.is_err(), "the journal would be truncated at {early:?}, below the checkpoint {checkpoint}");
            slow.finish();
            assert!(truncated.recv().unwrap() > checkpoint);
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
            assert_eq!(engine.buckets.snapshot().newest_first().len(), 48 + lap as usize, "lap {lap}");
        }
    }

    #[test]
    fn a_key_whose_record_is_open_is_neither_flushed_nor_completed() {
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
        engine.memtable.shard(key_ref.digest).set_pending(key_ref.digest, key_ref.key, Entry::Completed(done), pending);
        let status = |engine: &Engine| engine.check(&request).unwrap().pop().unwrap().unwrap();

        engine.flush().unwrap();
        assert!(matches!(status(&engine), KeyStatus::InProgress(_)));
        assert_eq!(engine.memtable.flushable(), 1, "it waits for its record and for the next flush");
        open.finish();
        assert!(matches!(status(&engine), KeyStatus::Completed(_)));
        engine.flush().unwrap();
        assert_eq!(engine.memtable.flushable(), 0);
        assert!(matches!(status(&engine), KeyStatus::Completed(_)));
    }
}
