//! The memtable: the state of every key whose journal record is not flushed to a bucket yet, in shards with a lock each.

pub(crate) mod arena;
pub(crate) mod frozen;
mod recent;
mod shard;
pub(crate) mod slot;
pub(crate) mod table;
