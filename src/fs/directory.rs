//! A store's directory: its layout, its lock, and its creation.
//!
//! ```text
//! STORE/onlyonce.lock   locked by the process that has the store open; contains "created" once the store exists
//! STORE/journal/        the journal's segments
//! STORE/db/             RocksDB
//! STORE/db.new/         a store that is being created; removed at open if a crash left it
//! STORE/ssts/           SSTs that are written but not ingested yet; removed at open
//! STORE/filters/        filters of ended buckets; rebuilt if missing or mismatched
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Cause, Error, Result, printable};

const LOCK: &str = "onlyonce.lock";
const JOURNAL: &str = "journal";
const DATABASE: &str = "db";
const NEW_DATABASE: &str = "db.new";
const SST_DIR: &str = "ssts";
const FILTERS: &str = "filters";
/// The content of the lock file once a store exists. Without it, a store whose database was lost would be taken for a
/// new one, and every duplicate would be new.
const CREATED: &[u8] = b"created\n";

/// How long to sleep between two attempts to lock.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A directory locked by this process, until it is released or dropped.
pub(crate) struct Directory {
    root: PathBuf,
    lock: Mutex<Option<File>>,
    /// Whether the file system reports link counts. Most do.
    counts_links: bool,
}

impl Directory {
    /// Fails unless the directory holds a store, or the remains of one, which `acquire` reports.
    pub(crate) fn require_store(root: &Path) -> Result<()> {
        if root.join(DATABASE).is_dir() || fs::read(root.join(LOCK)).is_ok_and(|flag| !flag.is_empty()) {
            Ok(())
        } else {
            Err(Error::NotFound { path: root.to_owned() })
        }
    }

    /// Locks the directory. Creates it, readable only by its owner, if it does not exist. Waits up to `wait` for
    /// another process to release the lock, because a killed process holds its locks until the kernel has cleaned up.
    pub(crate) fn acquire(root: &Path, wait: Duration) -> Result<Self> {
        reject_invalid_path(root)?;
        // Absolute, because a process may change its working directory.
        let root = &std::path::absolute(root).map_err(|error| Error::io("resolving", root, error))?;
        reject_foreign(root)?;
        make_private(root)?;
        let path = root.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| io_error("opening", &path, &error))?;
        let start = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < wait => std::thread::sleep(LOCK_POLL),
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::AlreadyOpen { path: root.to_owned(), waited: wait });
                }
                Err(TryLockError::Error(error)) => return Err(Error::io("locking", &path, error)),
            }
        }
        let counts_links = lock.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
        let directory = Self { root: root.to_owned(), lock: Mutex::new(Some(lock)), counts_links };
        remove_dir(&directory.new_database())?;
        make_private(&directory.sst_dir())?;
        make_private(&directory.filters())?;
        remove_files(&directory.sst_dir(), is_sst)?;
        if directory.holds_a_store()? {
            remove_files(&directory.database(), is_half_written_options)?;
        }
        directory.write_created_flag()?;
        if !directory.holds_a_store()? {
            // Of a creation that was interrupted: the journal is complete before the database is in place.
            remove_dir(&directory.journal())?;
        }
        Ok(directory)
    }

    /// Writes "created" to the lock file if the store exists. Fails if the lock file has it and the store does not
    /// exist.
    fn write_created_flag(&self) -> Result<()> {
        let path = self.root.join(LOCK);
        let content = fs::read(&path).map_err(|error| Error::io("reading", &path, error))?;
        match (self.holds_a_store()?, content.is_empty()) {
            (true, true) => fs::write(&path, CREATED)
                .and_then(|()| File::open(&path)?.sync_all())
                .map_err(|error| Error::io("writing", &path, error)),
            (false, false) => Err(Error::Corrupt {
                place: self.database().display().to_string(),
                detail: "the database is missing, but a store was created here".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Releases the lock.
    pub(crate) fn release(&self) {
        drop(self.lock.lock().take());
    }

    /// Returns a sentinel file or a directory that was deleted while the store was open. Writes to deleted files succeed but
    /// are lost.
    pub(crate) fn deleted(&self) -> Option<PathBuf> {
        let is_gone = |path: &Path| matches!(path.try_exists(), Ok(false));
        let is_nameless = |lock: &File| lock.metadata().is_ok_and(|metadata| metadata.nlink() == 0);
        let missing = if self.counts_links && self.lock.lock().as_ref().is_some_and(is_nameless) {
            self.root.join(LOCK)
        } else {
            // RocksDB replaces this file atomically, so that it always exists.
            [self.database().join("CURRENT"), self.journal()].into_iter().find(|path| is_gone(path))?
        };
        Some(if is_gone(&self.root) { self.root.clone() } else { missing })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.root.join(DATABASE)
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.root.join(JOURNAL)
    }

    pub(crate) fn sst_dir(&self) -> PathBuf {
        self.root.join(SST_DIR)
    }

    pub(crate) fn filters(&self) -> PathBuf {
        self.root.join(FILTERS)
    }

    fn new_database(&self) -> PathBuf {
        self.root.join(NEW_DATABASE)
    }

    /// Whether a store exists here.
    pub(crate) fn holds_a_store(&self) -> Result<bool> {
        let path = self.database();
        path.try_exists().map_err(|error| Error::io("looking up", &path, error))
    }

    /// Creates a database with `create` and renames it into place: after a crash it is complete or does not exist.
    pub(crate) fn create_database(&self, create: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (new, database) = (self.new_database(), self.database());
        make_private(&new)?;
        create(&new)?;
        Failpoint::StoreCreated.pass();
        // First the name of the journal, which was created before: a database without a journal is corruption.
        sync_dir(&self.root)?;
        fs::rename(&new, &database).map_err(|error| Error::io("renaming", &new, error))?;
        Failpoint::StorePlaced.pass();
        sync_dir(&self.root)?;
        // The directory's own entry must survive a power cut, too.
        match self.root.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent)?,
            _ => sync_dir(Path::new("."))?,
        }
        self.write_created_flag()
    }

    /// Bytes of all files in the directory. Files deleted concurrently count as 0.
    pub(crate) fn bytes(&self) -> u64 {
        fn below(path: &Path) -> u64 {
            let Ok(entries) = fs::read_dir(path) else { return 0 };
            entries
                .flatten()
                .map(|entry| match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => below(&entry.path()),
                    Ok(metadata) => metadata.len(),
                    Err(_) => 0,
                })
                .sum()
        }
        below(&self.root)
    }
}

/// Rejects paths that no file system accepts. The empty path means the working directory to some calls and nothing to
/// others.
fn reject_invalid_path(root: &Path) -> Result<()> {
    let bytes = root.as_os_str().as_bytes();
    let (value, bounds) = if bytes.is_empty() {
        ("empty".to_owned(), "the path of a directory")
    } else if bytes.contains(&0) {
        (printable(bytes), "a path without NUL bytes")
    } else {
        return Ok(());
    };
    Err(Error::Config { option: "path", value, bounds: bounds.to_owned() })
}

/// Rejects a path that is, or leads through, a file or a broken link, and a non-empty directory without a lock file.
/// The lock file is the first file created in a store.
fn reject_foreign(root: &Path) -> Result<()> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return match obstacle(root) {
                None => Ok(()),
                Some(reason) => Err(Error::NotAStore { path: root.to_owned(), reason }),
            };
        }
        Err(error) => return Err(io_error("reading", root, &error)),
    };
    let mut found = None;
    for entry in entries {
        let name = entry.map_err(|error| Error::io("reading", root, error))?.file_name();
        if name == LOCK {
            return Ok(());
        }
        found = Some(name);
    }
    match found {
        None => Ok(()),
        Some(name) => Err(Error::NotAStore {
            path: root.to_owned(),
            reason: format!("it contains {:?} but no store", name.to_string_lossy()),
        }),
    }
}

/// Why no directory can be created at a path.
fn obstacle(path: &Path) -> Option<String> {
    for part in path.ancestors() {
        let Ok(found) = fs::symlink_metadata(part) else { continue };
        let name = if part == path { "it".to_owned() } else { part.display().to_string() };
        return match (found.is_symlink(), fs::metadata(part)) {
            (true, Err(_)) => {
                let target = fs::read_link(part).unwrap_or_default();
                Some(format!("{name} is a link to {}, which does not exist", target.display()))
            }
            (_, Ok(found)) if found.is_file() => Some(format!("{name} is a file")),
            (_, Ok(found)) if !found.is_dir() => Some(format!("{name} is not a directory")),
            _ => None,
        };
    }
    None
}

pub(crate) fn make_private(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| io_error("creating", path, &error))
}

/// An I/O error, with a remedy if permissions are missing.
fn io_error(action: &'static str, path: &Path, error: &std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            let detail = format!("{error}; the process needs to read and write the store's directory");
            Error::io(action, path, Cause::new(error.kind(), detail))
        }
        _ => Error::io(action, path, Cause::new(error.kind(), error.to_string())),
    }
}

/// Whether this is an SST written by this store. Foreign files are left alone.
fn is_sst(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "sst")
        && path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| stem.parse::<u64>().is_ok())
}

/// Whether this is an incomplete options file of RocksDB. RocksDB removes its other temporary files after a crash,
/// but not these.
fn is_half_written_options(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("OPTIONS-") && name.ends_with(".dbtmp"))
}

/// Removes the files that match, which a crash left behind.
fn remove_files(dir: &Path, is_leftover: impl Fn(&Path) -> bool) -> Result<()> {
    let unreadable = |error: std::io::Error| Error::io("reading", dir, error);
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if is_leftover(&path) {
            fs::remove_file(&path).map_err(|error| Error::io("removing", &path, error))?;
        }
    }
    Ok(())
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("removing", path, error)),
        _ => Ok(()),
    }
}

pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| Error::io("syncing", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_is_made_absolute() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let relative = Path::new(dir.path().file_name().unwrap()).join("store");
        let directory = Directory::acquire(&relative, Duration::ZERO).unwrap();
        assert!(directory.root().is_absolute() && directory.root().ends_with(&relative));
    }
}
