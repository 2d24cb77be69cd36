//! What an open does of the upkeep, because a process may end before the keeper has come round: a command in cron, or a
//! service that is killed over and over. And what a close waits for.
//!
//! An open drops buckets that have passed for [`DROP_TIME`], and seals what was completed in a bucket that has ended, up
//! to [`FLUSH_BYTES`]. What is left the keeper does first, before it may be told to stop. Both wait for RocksDB's merges where
//! tables have piled up, for [`MERGE_TIME`].

use std::time::{Duration, Instant};

use super::core::Engine;
use super::maintenance::MaintenanceState;
use crate::buckets::range::BucketRange;
use onlyonce_core::{Error, Result};

/// How long an open drops buckets; one that it has begun with is finished, which takes some milliseconds.
const DROP_TIME: Duration = Duration::from_millis(250);
/// What an open seals by itself, in bytes of journal: it takes about as long as they took to be read.
const FLUSH_BYTES: u64 = 8 << 20;
/// How long an open or a close waits for merges.
const MERGE_TIME: Duration = Duration::from_secs(1);
/// Tables of a column family beyond which they wait: what RocksDB merges by itself, unless it is stopped half way each
/// time, is at most half as many.
const MAX_TABLES: u64 = 16;

impl Engine {
    /// Does what is due at an open, and says where the keeper's rounds go on. What fails here is tried again by the keeper,
    /// unless the store has ended.
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
                tracing::warn!(%error, "what was due at the open failed, and will be tried again");
                Ok(maintenance_state)
            }
            Ok(()) => Ok(maintenance_state),
        }
    }

    fn run_due_tasks(&self, maintenance_state: &mut MaintenanceState) -> Result<()> {
        let begun = Instant::now();
        maintenance_state.has_leftover_work = !self.drop_expired_while(|| begun.elapsed() < DROP_TIME)?;
        // A process before this one may have dropped a bucket and no more.
        self.filters.remove_expired(&self.buckets)?;
        // What was written in a bucket that has ended: completed keys, and claims that may have run out since.
        let bucket_ms = self.config().span.bucket_ms;
        let ended = self.found.oldest_ms.is_some_and(|oldest_ms| {
            BucketRange::containing(oldest_ms, bucket_ms) != BucketRange::containing(self.now().time_ms, bucket_ms)
        });
        if ended && self.found.bytes <= FLUSH_BYTES {
            self.flush()?;
        } else {
            maintenance_state.has_leftover_work |= ended;
        }
        self.wait_for_merges()
    }

    /// Waits for RocksDB's merges, where tables have piled up.
    pub(super) fn wait_for_merges(&self) -> Result<()> {
        let families = self.buckets.snapshot().newest_first();
        let families = families.iter().map(|bucket| bucket.family.as_str());
        if !self.db.wait_for_merges(families, MAX_TABLES, MERGE_TIME)? {
            tracing::warn!(waited = ?MERGE_TIME, "tables pile up faster than RocksDB merges them");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RecordKind;
    use crate::config::Options;
    use crate::engine::response::{FinishKind, FinishedBy};
    use onlyonce_core::Claim;
    use onlyonce_core::StoredResult;
    use crate::fs::directory::Directory;

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
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Engine::open(directory, &options(clock)).unwrap()
    }

    fn complete(engine: &Engine, key: &str, result: &[u8]) {
        let Some(Ok(Claim::Acquired(grant))) = engine.claim(&engine.request([key]).unwrap()).unwrap().pop()
        else {
            panic!("{key} is new")
        };
        let done = FinishKind::Complete { result: StoredResult::Bytes(result), side_writes: None, follows: false };
        engine.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&grant, done)]).unwrap();
    }

    fn flush_generation(engine: &Engine) -> u64 {
        engine.flush_generation.load(Ordering::Relaxed)
    }

    #[test]
    fn an_open_seals_what_an_ended_bucket_left_and_nothing_of_the_present_one() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        engine.close().unwrap();
        let engine = open(&dir, &clock);
        assert!(!engine.catch_up().unwrap().has_leftover_work);
        assert_eq!((engine.memtable.flushable(), flush_generation(&engine)), (1, 0), "its bucket has not ended");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        assert!(!engine.catch_up().unwrap().has_leftover_work);
        assert_eq!((engine.memtable.flushable(), flush_generation(&engine)), (0, 1));
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        engine.catch_up().unwrap();
        assert_eq!(flush_generation(&engine), 0, "there is nothing left");
    }

    #[test]
    fn what_has_run_out_goes_with_the_next_open_and_its_filter_file_too() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        clock.advance(Duration::from_secs(1));
        engine.flush().unwrap();
        engine.persist_filters(|| true).unwrap();
        let filters = engine.db.directory().filters();
        assert_eq!(std::fs::read_dir(&filters).unwrap().count(), 1);
        complete(&engine, "b", b"r");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(20));
        let engine = open(&dir, &clock);
        assert_eq!(engine.memtable.flushable(), 1);
        engine.catch_up().unwrap();
        assert_eq!((engine.memtable.flushable(), engine.buckets.snapshot().newest_first().len()), (0, 0));
        assert!(!engine.buckets.has_expired());
        assert_eq!(std::fs::read_dir(&filters).unwrap().count(), 0);
        assert!(engine.db.sst_files().unwrap().keys().all(|family| !family.starts_with("bucket")));
    }

    #[test]
    fn what_takes_long_to_seal_is_left_to_the_first_round_of_the_keeper() {
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
        assert_eq!((engine.memtable.flushable(), flush_generation(&engine)), (3, 0));
        engine.run_maintenance(&mut maintenance_state).unwrap();
        assert_eq!(
            (engine.memtable.flushable(), flush_generation(&engine), maintenance_state.has_leftover_work),
            (0, 1, false)
        );
    }

    #[test]
    fn an_open_goes_on_where_what_is_due_fails_and_not_in_a_store_that_has_ended() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        std::fs::remove_dir_all(engine.db.directory().sst_dir()).unwrap();
        engine.catch_up().unwrap();
        assert_eq!(engine.memtable.flushable(), 1, "there is no room for its run");
        engine.poison("a test");
        assert!(matches!(engine.catch_up(), Err(Error::Poisoned { .. })));
    }
}
