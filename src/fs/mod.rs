//! File-system parts outside RocksDB and the journal: the store's directory with its lock.

pub(crate) mod directory;
