//! RocksDB: the database, its options, its errors and its files. Only this folder uses the crate `rocksdb`.

pub(crate) mod db;
pub(crate) mod manifest;
mod options;
pub(crate) mod sst;

use std::path::Path;

use onlyonce_core::{Cause, Error};

/// A RocksDB error as the cause of an [`Error`]. RocksDB reports a full disk only in its text.
fn cause(error: &rocksdb::Error) -> Cause {
    let kind = match error.kind() {
        _ if error.as_ref().contains("No space left on device") => std::io::ErrorKind::StorageFull,
        rocksdb::ErrorKind::Corruption => std::io::ErrorKind::InvalidData,
        rocksdb::ErrorKind::TimedOut => std::io::ErrorKind::TimedOut,
        _ => std::io::ErrorKind::Other,
    };
    Cause::new(kind, error.clone())
}

/// A failed operation that changed nothing.
fn failed(action: &'static str, path: &Path, error: &rocksdb::Error) -> Error {
    match error.kind() {
        rocksdb::ErrorKind::Corruption => {
            let detail = error.to_string();
            Error::Corrupt { place: place(path, &detail), detail }
        }
        _ => Error::io(action, path, cause(error)),
    }
}

/// A failed read of data that must exist. A missing file is corruption.
fn unreadable(action: &'static str, database: &Path, error: &rocksdb::Error) -> Error {
    let detail = error.to_string();
    // The text distinguishes a missing file from one that RocksDB could not write and has removed.
    if error.kind() == rocksdb::ErrorKind::IOError && detail.contains("No such file") {
        let mut files = files(database, &detail);
        if let Some(place) = files.find(|place| matches!(Path::new(place).try_exists(), Ok(false))) {
            return Error::Corrupt { place, detail };
        }
    }
    failed(action, database, error)
}

/// The file in `database` that RocksDB's error text is about. RocksDB also names the manifest in most texts, although
/// it is valid; if no other file is named, the file is unknown.
fn place(database: &Path, text: &str) -> String {
    let manifest = format!("{}/MANIFEST", database.display());
    let other = files(database, text).find(|place| !place.starts_with(&manifest));
    other.unwrap_or_else(|| database.display().to_string())
}

/// The files in `database` that a text names.
fn files(database: &Path, text: &str) -> impl Iterator<Item = String> + use<> {
    let below = format!("{}/", database.display());
    let names: Vec<_> = text
        .match_indices(&below)
        .map(|(at, _)| {
            let name = text.get(at + below.len()..).unwrap_or_default();
            let name = name.split(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '-').next();
            format!("{below}{}", name.unwrap_or_default().trim_end_matches('.'))
        })
        .collect();
    names.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_corruption_is_the_file_that_rocksdb_names() {
        let place = |text: &str| place(Path::new("/a b/db"), text);
        let manifest = "The file /a b/db/MANIFEST-000056 may be corrupted.";
        let block = format!("bad block in /a b/db/000060.sst  {manifest}");
        assert_eq!(place(&block), "/a b/db/000060.sst");
        assert_eq!(place("IO error: /a b/db/000060.sst: No such file"), "/a b/db/000060.sst");
        assert_eq!(place(manifest), "/a b/db");
        assert_eq!(place("something else"), "/a b/db");
    }
}
