//! The maintenance that an open runs itself, and the compactions that an open and a close wait for.
//!
//! A process may end before its first round of maintenance: a cron job, or a service that is killed repeatedly. Without this,
//! such processes would leave expired buckets, the journal and small SSTs to each other forever.
//!
//! An open drops expired buckets for [`DROP_TIME`], and flushes the keys of an ended bucket, and a journal of many segments, if
//! the journal has at most [`FLUSH_BYTES`]. The maintenance thread does the rest before it can be stopped. If a column family
//! has more SSTs than [`MAX_SSTS`], an open and a close wait for compactions, at most for [`COMPACTION_TIME`].

use std::time::{Duration, Instant};

use super::core::Engine;
use super::maintenance::MaintenanceState;
use crate::buckets::range::BucketRange;
use onlyonce_core::{Error, Result};

/// How long an open drops buckets. A drop that has begun is finished, which takes some milliseconds.
const DROP_TIME: Duration = Duration::from_millis(250);
/// The journal size up to which an open flushes. The flush takes about as long as the replay.
const FLUSH_BYTES: u64 = 8 << 20;
/// How long an open or a close waits for compactions.
const COMPACTION_TIME: Duration = Duration::from_secs(1);
/// The number of SSTs in a column family beyond which they wait. RocksDB compacts at half as many, unless each process ends
/// before a compaction does.
const MAX_SSTS: u64 = 64;

impl Engine {
    /// Runs the tasks that are due at open, and returns the state for the first round of maintenance. That round retries a
    /// failed task, unless the store is poisoned.
    pub(super) fn catch_up(&self) -> Result<MaintenanceState> {
        let mut maintenance_state = self.maintenance_state();
        match self.run_due_tasks(&mut maintenance_state) {
            Err(
                error @ (Error::WriteFailed { .. }
                | Error::DirectoryGone { .. }
                | Error::Poisoned { .. }
                | Error::Broken { .. }),
            ) => Err(error),
            Err(error) => {
                tracing::warn!(error = error.chain(), "maintenance at open failed; it will be retried");
                Ok(maintenance_state)
            }
            Ok(()) => Ok(maintenance_state),
        }
    }

    fn run_due_tasks(&self, maintenance_state: &mut MaintenanceState) -> Result<()> {
        let started = Instant::now();
        maintenance_state.has_leftover_work = !self.drop_expired_while(|| started.elapsed() < DROP_TIME)?;
        // An earlier process may have dropped a bucket and not removed its filter file.
        self.tables.filters.remove_expired(&self.tables.buckets)?;
        // The journal has keys of an ended bucket: completed keys, or claims that may have expired since.
        let bucket_ms = self.config().span.bucket_ms;
        let ended = self.replayed.oldest_ms.is_some_and(|oldest_ms| {
            BucketRange::containing(oldest_ms, bucket_ms) != BucketRange::containing(self.now().time_ms, bucket_ms)
        });
        let is_flush_due = ended || self.has_many_segments()?;
        if is_flush_due && self.replayed.bytes <= FLUSH_BYTES {
            self.flush()?;
        } else {
            maintenance_state.has_leftover_work |= is_flush_due;
        }
        self.wait_for_compactions()
    }

    /// Waits for RocksDB's compactions if a column family has too many SSTs.
    pub(super) fn wait_for_compactions(&self) -> Result<()> {
        let families = self.tables.buckets.snapshot().newest_first();
        let families = families.iter().map(|bucket| bucket.family.as_str());
        if !self.tables.db.wait_for_merges(families, MAX_SSTS, COMPACTION_TIME)? {
            tracing::warn!(waited = ?COMPACTION_TIME, "SSTs accumulate faster than RocksDB compacts them");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RecordKind;
    use crate::config::Options;
    use crate::engine::fixture::{engine, flush_generation};
    use crate::engine::response::{FinishKind, FinishedBy};
    use onlyonce_core::Claim;
    use onlyonce_core::StoredResult;

    fn options(clock: &ManualClock) -> Options {
        Options {
            clock: Arc::new(clock.clone()),
            window: Some(Duration::from_secs(10)),
            bucket: Some(Duration::from_secs(1)),
            result_limit: 4 << 20,
            ..Options::default()
        }
    }

    fn open(dir: &tempfile::TempDir, clock: &ManualClock) -> Engine {
        engine(dir, &options(clock))
    }

    fn complete(engine: &Engine, key: &str, result: &[u8]) {
        let Some(Ok(Claim::Acquired(grant))) = engine.claim(&engine.request([key]).unwrap()).unwrap().pop() else {
            panic!("{key} is new")
        };
        let done = FinishKind::Complete { result: StoredResult::Bytes(result), side_writes: None, follows: false };
        engine.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&grant, done)]).unwrap();
    }

    #[test]
    fn an_open_flushes_the_keys_of_an_ended_bucket_only() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        engine.close().unwrap();
        let engine = open(&dir, &clock);
        assert!(!engine.catch_up().unwrap().has_leftover_work);
        assert_eq!((engine.tables.memtable.flushable(), flush_generation(&engine)), (1, 0), "its bucket has not ended");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        assert!(!engine.catch_up().unwrap().has_leftover_work);
        assert_eq!((engine.tables.memtable.flushable(), flush_generation(&engine)), (0, 1));
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        engine.catch_up().unwrap();
        assert_eq!(flush_generation(&engine), 0, "nothing is left to flush");
    }

    #[test]
    fn the_next_open_drops_expired_buckets_and_their_filter_files() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        clock.advance(Duration::from_secs(1));
        engine.flush().unwrap();
        engine.persist_filters(|| true).unwrap();
        let filters = engine.tables.db.directory().filters();
        assert_eq!(std::fs::read_dir(&filters).unwrap().count(), 1);
        complete(&engine, "b", b"r");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(20));
        let engine = open(&dir, &clock);
        assert_eq!(engine.tables.memtable.flushable(), 1);
        engine.catch_up().unwrap();
        assert_eq!((engine.tables.memtable.flushable(), engine.tables.buckets.snapshot().newest_first().len()), (0, 0));
        assert!(!engine.tables.buckets.has_expired());
        assert_eq!(std::fs::read_dir(&filters).unwrap().count(), 0);
        assert!(engine.tables.db.sst_numbers().unwrap().keys().all(|family| !family.starts_with("bucket")));
    }

    #[test]
    fn a_large_flush_is_left_to_the_first_round_of_maintenance() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        let large = vec![7; 3 << 20];
        ["a", "b", "c"].iter().for_each(|key| complete(&engine, key, &large));
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        let mut maintenance_state = engine.catch_up().unwrap();
        assert!(maintenance_state.has_leftover_work);
        assert_eq!((engine.tables.memtable.flushable(), flush_generation(&engine)), (3, 0));
        engine.run_maintenance(&mut maintenance_state).unwrap();
        assert_eq!(
            (engine.tables.memtable.flushable(), flush_generation(&engine), maintenance_state.has_leftover_work),
            (0, 1, false)
        );
    }

    #[test]
    fn an_open_succeeds_if_a_due_task_fails_unless_the_store_is_poisoned() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        std::fs::remove_dir_all(engine.tables.db.directory().sst_dir()).unwrap();
        engine.catch_up().unwrap();
        assert_eq!(engine.tables.memtable.flushable(), 1, "its SST cannot be written");
        engine.health.poison("a test");
        assert!(matches!(engine.catch_up(), Err(Error::Poisoned { .. })));
    }
}
