//! Files without RocksDB: the store's directory and its lock, and group commit for syncs.

pub(crate) mod directory;
pub(crate) mod sync_group;
