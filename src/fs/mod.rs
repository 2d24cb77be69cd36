//! File-system parts outside RocksDB: the store's directory with its lock, and group commit for syncs.

pub(crate) mod directory;
pub(crate) mod sync_group;
