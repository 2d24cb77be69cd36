//! The recent cache: the arenas of the last flushes, kept for reading while they fit into its memory. It has only entries that
//! are in buckets as well, so that lookups of recent keys need no disk read.

use std::collections::VecDeque;
use std::sync::Arc;

use super::arena::ShardArena;
use super::shard::{SHARDS, shard_of};
use crate::entry::Entry;
use crate::testing::sync_shim::ArcSwap;

/// Flushed arenas by shard, the newest first.
type RecentArenas = Vec<VecDeque<Arc<ShardArena>>>;

/// Flushed arenas. Readers take a snapshot without a lock, so that the CPU can overlap the memory reads of a batch.
pub(super) struct RecentCache {
    arenas: ArcSwap<RecentArenas>,
    /// The size down to which the oldest flushes are evicted. The cache exceeds it by at most one flush.
    min_bytes: usize,
}

impl RecentCache {
    pub(super) fn new(min_bytes: usize) -> Self {
        Self { arenas: ArcSwap::from_pointee(vec![VecDeque::new(); SHARDS]), min_bytes }
    }

    /// Adds the frozen arena of each shard, in the order of the shards, and evicts the oldest flushes.
    pub(super) fn publish(&self, frozen: impl Iterator<Item = Option<Arc<ShardArena>>>) {
        let mut recent = RecentArenas::clone(&self.arenas.load());
        for (arena, recent) in frozen.zip(&mut recent) {
            if let Some(arena) = arena {
                recent.push_front(arena);
            }
        }
        let mut bytes: usize = recent.iter().flatten().map(|arena| arena.bytes()).sum();
        while recent.iter().any(|arenas| !arenas.is_empty()) {
            let oldest: usize = recent.iter().filter_map(VecDeque::back).map(|arena| arena.bytes()).sum();
            // Evict the oldest flush only if the others still have `min_bytes`.
            if bytes - oldest < self.min_bytes {
                break;
            }
            bytes -= oldest;
            recent.iter_mut().for_each(|arenas| drop(arenas.pop_back()));
        }
        self.arenas.store(Arc::new(recent));
    }

    /// Removes the cached arenas of the digest's shard.
    pub(super) fn invalidate(&self, digest: u64) {
        self.arenas.rcu(|recent| {
            let mut recent = RecentArenas::clone(recent);
            if let Some(arenas) = recent.get_mut(shard_of(digest)) {
                arenas.clear();
            }
            recent
        });
    }

    pub(super) fn snapshot(&self) -> RecentSnapshot {
        RecentSnapshot(self.arenas.load_full())
    }
}

/// The recent cache as of one moment.
pub(crate) struct RecentSnapshot(Arc<RecentArenas>);

impl RecentSnapshot {
    /// The newest flushed entry of the key, if it is cached.
    pub(crate) fn get(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        self.0.get(shard_of(digest))?.iter().find_map(|arena| arena.get_flushed(digest, key))
    }
}
