//! The disk: RocksDB, and nothing that knows what a claim is. The only folder that names `rocksdb::`.

pub(crate) mod db;
pub(crate) mod directory;
pub(crate) mod journal;
mod log;
mod options;
pub(crate) mod run;
mod sync;

use std::path::Path;

use crate::error::Error;

/// A failed operation that changed nothing.
fn failed(action: &'static str, path: &Path, error: &rocksdb::Error) -> Error {
    match error.kind() {
        rocksdb::ErrorKind::Corruption => {
            Error::Corrupt { place: path.display().to_string(), detail: error.to_string() }
        }
        _ => Error::io(action, path, error),
    }
}
