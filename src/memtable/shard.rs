//! Which shard a digest belongs to, and what a shard holds.

use std::sync::Arc;

use super::arena::ShardArena;

/// Many more than there are cores, so that two threads rarely contend for one. Under a model checker they should contend.
pub(super) const SHARDS: usize = if cfg!(any(shuttle, miri)) { 2 } else { 256 };
const SHARD_BITS: u32 = SHARDS.trailing_zeros();

/// The top bits of a digest, so that shards in order hold digests in order, as an SST needs them.
pub(super) fn shard_of(digest: u64) -> usize {
    (digest >> (u64::BITS - SHARD_BITS)) as usize
}

/// The arenas of one shard.
#[derive(Debug)]
pub(super) struct Arenas {
    /// The arena that changes.
    pub(super) active: ShardArena,
    /// The arena that a flush is writing to buckets.
    pub(super) frozen: Option<Arc<ShardArena>>,
}
