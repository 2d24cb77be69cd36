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
/// What an open seals by itself, in bytes of completed keys: about as long as they took to be read.
const SEAL_BYTES: usize = 8 << 20;
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
            Err(error @ (Error::WriteFailed { .. } | Error::Poisoned { .. } | Error::Broken { .. })) => Err(error),
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
        if ended && self.hot.completed_bytes() <= SEAL_BYTES {
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
