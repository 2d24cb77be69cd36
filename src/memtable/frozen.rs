//! The frozen set: the completed and released keys of one flush, in the order of an SST.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::arena::{Flushable, ShardArena};
use crate::buckets::flush::{FlushEntry, FlushSource};
use crate::buckets::range::BucketRange;
use crate::clock::Now;
use crate::entry::is_live;
use onlyonce_core::Result;

/// The frozen arenas of a flush, without the keys that have expired.
pub(crate) struct FrozenSet {
    /// In the order of the shards, so of the digests. Shards without flushable keys have none.
    arenas: Vec<Arc<ShardArena>>,
    now: Now,
    window_ms: u64,
    bucket_ms: u64,
    /// The bucket ranges of the keys, with their number.
    ranges: BTreeMap<BucketRange, usize>,
}

impl FrozenSet {
    pub(crate) fn new(arenas: Vec<Arc<ShardArena>>, now: Now, window_ms: u64, bucket_ms: u64) -> Self {
        let mut frozen_set = Self { arenas, now, window_ms, bucket_ms, ranges: BTreeMap::new() };
        let mut ranges: BTreeMap<BucketRange, usize> = BTreeMap::new();
        for live in frozen_set.arenas.iter().flat_map(|arena| frozen_set.live(arena)) {
            *ranges.entry(frozen_set.range(live)).or_default() += 1;
        }
        frozen_set.ranges = ranges;
        frozen_set
    }

    pub(crate) fn len(&self) -> usize {
        self.ranges.values().sum()
    }

    fn live<'a>(&self, arena: &'a ShardArena) -> impl Iterator<Item = Flushable<'a>> {
        let (now, window_ms) = (self.now, self.window_ms);
        arena.flushable().filter(move |key| is_live(key.time_ms(), now, window_ms))
    }

    fn range(&self, key: Flushable<'_>) -> BucketRange {
        BucketRange::containing(key.time_ms(), self.bucket_ms)
    }
}

impl FlushSource for FrozenSet {
    fn ranges(&self) -> Vec<(BucketRange, usize)> {
        self.ranges.iter().map(|(range, keys)| (*range, *keys)).collect()
    }

    fn visit(&self, range: BucketRange, mut visit: impl FnMut(FlushEntry<'_>) -> Result<()>) -> Result<()> {
        let mut in_range: Vec<(u64, Flushable<'_>)> = Vec::new();
        // The digests of a shard are all below those of the next one, so sorting each shard sorts the whole set.
        for arena in &self.arenas {
            in_range.clear();
            in_range.extend(self.live(arena).filter(|key| self.range(*key) == range).map(|key| (key.digest(), key)));
            in_range.sort_unstable_by(|(a_digest, a), (b_digest, b)| {
                a_digest.cmp(b_digest).then_with(|| a.key().cmp(b.key()))
            });
            for (digest, key) in &in_range {
                let entry = &key.entry().ok_or_else(|| key.not_flushable())?;
                visit(FlushEntry { digest: *digest, key: key.key(), entry })?;
            }
        }
        Ok(())
    }
}
