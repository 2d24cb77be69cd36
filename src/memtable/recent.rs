//! The recent cache: arenas that were flushed recently, as long as memory allows. It holds nothing that the buckets do not
//! hold, and answers without the disk.

use std::collections::VecDeque;
use std::sync::Arc;

use super::arena::ShardArena;
use super::shard::{SHARDS, shard_of};
use crate::entry::Entry;
use crate::testing::sync_shim::ArcSwap;

/// Flushed arenas by shard, the newest first.
type RecentArenas = Vec<VecDeque<Arc<ShardArena>>>;

/// Flushed arenas. Readers take a snapshot without a lock, so that a batch's reads of memory need not wait for each other.
pub(super) struct RecentCache {
    arenas: ArcSwap<RecentArenas>,
    /// The memory that it takes at least, once so much was flushed, and at most one flush more.
    least_bytes: usize,
}

impl RecentCache {
    pub(super) fn new(least_bytes: usize) -> Self {
        Self { arenas: ArcSwap::from_pointee(vec![VecDeque::new(); SHARDS]), least_bytes }
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
            // The oldest flush is evicted as long as the rest is enough.
            if bytes - oldest < self.least_bytes {
                break;
            }
            bytes -= oldest;
            recent.iter_mut().for_each(|arenas| drop(arenas.pop_back()));
        }
        self.arenas.store(Arc::new(recent));
    }

    /// Removes the cached entries of the digest's shard.
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
    /// The entry that a bucket holds of the key, if it was flushed recently.
    pub(crate) fn get(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        self.0.get(shard_of(digest))?.iter().find_map(|arena| arena.get_flushed(digest, key))
    }
}
