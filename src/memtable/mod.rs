//! The memtable: the journal's records in memory, in shards, until a flush moves them to buckets.

pub(crate) mod arena;
pub(crate) mod frozen;
mod recent;
mod shard;
pub(crate) mod table;
