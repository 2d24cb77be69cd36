//! What an open does of the upkeep, because a process may end before the keeper has come round: a command in cron, or a
//! service that is killed over and over. And what a close waits for.
//!
//! An open drops buckets that have passed for [`DROP_TIME`], and seals what was completed in a bucket that has ended, up
//! to [`SEAL_BYTES`]. What is left the keeper does first, before it may be told to stop. Both wait for RocksDB's merges where
//! tables have piled up, for [`MERGE_TIME`].

use std::time::{Duration, Instant};

use super::engine::Engine;
use super::upkeep::Rounds;
use crate::bucket::window::Slice;
use crate::error::{Error, Result};

/// How long an open drops buckets; one that it has begun with is finished, which takes some milliseconds.
const DROP_TIME: Duration = Duration::from_millis(250);
/// What an open seals by itself, in bytes of journal: it takes about as long as they took to be read.
const SEAL_BYTES: u64 = 8 << 20;
/// How long an open or a close waits for merges.
const MERGE_TIME: Duration = Duration::from_secs(1);
/// Tables of a column family beyond which they wait: what RocksDB merges by itself, unless it is stopped half way each
/// time, is at most half as many.
const MOST_TABLES: u64 = 16;

impl Engine {
    /// Does what is due at an open, and says where the keeper's rounds go on. What fails here is tried again by the keeper,
    /// unless the store has ended.
    pub(super) fn catch_up(&self) -> Result<Rounds> {
        let mut rounds = self.rounds();
        match self.do_due(&mut rounds) {
            Err(
                error @ (Error::WriteFailed { .. }
                | Error::DirectoryGone { .. }
                | Error::Poisoned { .. }
                | Error::Broken { .. }),
            ) => Err(error),
            Err(error) => {
                tracing::warn!(%error, "what was due at the open failed, and will be tried again");
                Ok(rounds)
            }
            Ok(()) => Ok(rounds),
        }
    }

    fn do_due(&self, rounds: &mut Rounds) -> Result<()> {
        let begun = Instant::now();
        rounds.is_behind = !self.drop_passed_while(|| begun.elapsed() < DROP_TIME)?;
        // A process before this one may have dropped a bucket and no more.
        self.filters.remove_passed(&self.buckets)?;
        // What was written in a bucket that has ended: completed keys, and claims that may have run out since.
        let bucket_ms = self.config().span.bucket_ms;
        let ended = self.found.oldest_ms.is_some_and(|oldest_ms| {
            Slice::containing(oldest_ms, bucket_ms) != Slice::containing(self.now().time_ms, bucket_ms)
        });
        if ended && self.found.bytes <= SEAL_BYTES {
            self.seal()?;
        } else {
            rounds.is_behind |= ended;
        }
        self.wait_for_merges()
    }

    /// Waits for RocksDB's merges, where tables have piled up.
    pub(super) fn wait_for_merges(&self) -> Result<()> {
        let families = self.buckets.view().newest_first();
        let families = families.iter().map(|bucket| bucket.family.as_str());
        if !self.db.wait_for_merges(families, MOST_TABLES, MERGE_TIME)? {
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
    use crate::codec::RowKind;
    use crate::config::Options;
    use crate::entry::Kept;
    use crate::state::answer::{Claimed, Settlement, Settler};
    use crate::storage::directory::Directory;

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
        let Some(Ok(Claimed::Acquired(grant))) = engine.claim(&engine.request([key]).unwrap()).unwrap().pop() else {
            panic!("{key} is new")
        };
        let done = Settlement::Completed(Kept::Stored(result), None);
        engine.settle(RowKind::Completed, Settler::Holder, vec![(&grant, done)]).unwrap();
    }

    fn seals(engine: &Engine) -> u64 {
        engine.seals.load(Ordering::Relaxed)
    }

    #[test]
    fn an_open_seals_what_an_ended_bucket_left_and_nothing_of_the_present_one() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::at(1_000_000));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        engine.close().unwrap();
        let engine = open(&dir, &clock);
        assert!(!engine.catch_up().unwrap().is_behind);
        assert_eq!((engine.hot.flushable(), seals(&engine)), (1, 0), "its bucket has not ended");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        assert!(!engine.catch_up().unwrap().is_behind);
        assert_eq!((engine.hot.flushable(), seals(&engine)), (0, 1));
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        engine.catch_up().unwrap();
        assert_eq!(seals(&engine), 0, "there is nothing left");
    }

    #[test]
    fn what_has_run_out_goes_with_the_next_open_and_its_filter_file_too() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::at(1_000_000));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        clock.advance(Duration::from_secs(1));
        engine.seal().unwrap();
        engine.keep_filters(|| true).unwrap();
        let filters = engine.db.directory().filters();
        assert_eq!(std::fs::read_dir(&filters).unwrap().count(), 1);
        complete(&engine, "b", b"r");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(20));
        let engine = open(&dir, &clock);
        assert_eq!(engine.hot.flushable(), 1);
        engine.catch_up().unwrap();
        assert_eq!((engine.hot.flushable(), engine.buckets.view().newest_first().len()), (0, 0));
        assert!(!engine.buckets.has_passed());
        assert_eq!(std::fs::read_dir(&filters).unwrap().count(), 0);
        assert!(engine.db.runs().unwrap().keys().all(|family| !family.starts_with("bucket")));
    }

    #[test]
    fn what_takes_long_to_seal_is_left_to_the_first_round_of_the_keeper() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::at(1_000_000));
        let engine = open(&dir, &clock);
        let large = vec![7; 3 << 20];
        ["a", "b", "c"].iter().for_each(|key| complete(&engine, key, &large));
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        let mut rounds = engine.catch_up().unwrap();
        assert!(rounds.is_behind);
        assert_eq!((engine.hot.flushable(), seals(&engine)), (3, 0));
        engine.upkeep(&mut rounds).unwrap();
        assert_eq!((engine.hot.flushable(), seals(&engine), rounds.is_behind), (0, 1, false));
    }

    #[test]
    fn an_open_goes_on_where_what_is_due_fails_and_not_in_a_store_that_has_ended() {
        let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::at(1_000_000));
        let engine = open(&dir, &clock);
        complete(&engine, "a", b"r");
        engine.close().unwrap();
        clock.advance(Duration::from_secs(1));
        let engine = open(&dir, &clock);
        std::fs::remove_dir_all(engine.db.directory().runs()).unwrap();
        engine.catch_up().unwrap();
        assert_eq!(engine.hot.flushable(), 1, "there is no room for its run");
        engine.poison("a test");
        assert!(matches!(engine.catch_up(), Err(Error::Poisoned { .. })));
    }
}
