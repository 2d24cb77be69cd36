//! A store's directory: who may use it, and what lies in it.
//!
//! ```text
//! STORE/onlyonce.lock   locked by the process that has the store open; says "created" once there is a store
//! STORE/onlyonce.files  what `db/` must hold at the next open: see `file_manifest.rs`
//! STORE/db/             RocksDB
//! STORE/db.new/         a store that is being created; removed where a crash left it
//! STORE/runs/           runs that are written and not yet ingested; removed at open
//! STORE/filters/        filters of ended buckets; what is missing or does not match is made anew
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
const FILES: &str = "onlyonce.files";
const DATABASE: &str = "db";
const NEW_DATABASE: &str = "db.new";
const SST_DIR: &str = "runs";
const FILTERS: &str = "filters";
/// What the lock file says once a store was created: without it, a lost database would pass for a new store.
const CREATED: &[u8] = b"created\n";

/// How long to sleep between two tries for a lock.
const LOCK_POLL: Duration = Duration::from_millis(5);

/// A directory that this process alone may use, until it is released or dropped.
pub(crate) struct Directory {
    root: PathBuf,
    lock: Mutex<Option<File>>,
    /// Whether the file system counts names of the lock file: most do.
    counts_links: bool,
}

impl Directory {
    /// Fails unless the directory holds a store.
    pub(crate) fn require_store(root: &Path) -> Result<()> {
        if root.join(DATABASE).is_dir() { Ok(()) } else { Err(Error::NotFound { path: root.to_owned() }) }
    }

    /// Makes the directory ours. Creates it, readable by its owner alone, where there is none; waits up to `wait`
    /// for another process to let go: a killed one holds its locks until the kernel has torn it down.
    pub(crate) fn acquire(root: &Path, wait: Duration) -> Result<Self> {
        refuse_impossible(root)?;
        // A process that changes its working directory, as services do, must not lose its store.
        let root = &std::path::absolute(root).map_err(|error| Error::io("cannot find", root, error))?;
        refuse_foreign(root)?;
        make_private(root)?;
        let path = root.join(LOCK);
        let lock = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| refused("cannot open", &path, &error))?;
        let start = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < wait => std::thread::sleep(LOCK_POLL),
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::AlreadyOpen { path: root.to_owned(), waited: wait });
                }
                Err(TryLockError::Error(error)) => return Err(Error::io("cannot lock", &path, error)),
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
        Ok(directory)
    }

    /// Sees to it that the lock file says "created" if and only if there is a store.
    fn write_created_flag(&self) -> Result<()> {
        let path = self.root.join(LOCK);
        let said = fs::read(&path).map_err(|error| Error::io("cannot read", &path, error))?;
        match (self.holds_a_store()?, said.is_empty()) {
            (true, true) => fs::write(&path, CREATED)
                .and_then(|()| File::open(&path)?.sync_all())
                .map_err(|error| Error::io("cannot write", &path, error)),
            (false, false) => Err(Error::Corrupt {
                place: self.database().display().to_string(),
                detail: "it is missing, though a store was created here".to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Lets others use the directory.
    pub(crate) fn release(&self) {
        drop(self.lock.lock().take());
    }

    /// What somebody has deleted of an open store, if it is one of two files that are always there, or the whole directory:
    /// files that are open go on taking what is written, and nothing of it stays.
    pub(crate) fn deleted(&self) -> Option<PathBuf> {
        let is_gone = |path: &Path| matches!(path.try_exists(), Ok(false));
        let is_nameless = |lock: &File| lock.metadata().is_ok_and(|metadata| metadata.nlink() == 0);
        let gone = if self.counts_links && self.lock.lock().as_ref().is_some_and(is_nameless) {
            self.root.join(LOCK)
        } else {
            // RocksDB puts a new one in its place in one step.
            Some(self.database().join("CURRENT")).filter(|current| is_gone(current))?
        };
        Some(if is_gone(&self.root) { self.root.clone() } else { gone })
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.root.join(DATABASE)
    }

    /// Where it is noted what the database must hold.
    pub(crate) fn file_manifest(&self) -> PathBuf {
        self.root.join(FILES)
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

    /// Whether a store was ever created here.
    pub(crate) fn holds_a_store(&self) -> Result<bool> {
        let path = self.database();
        path.try_exists().map_err(|error| Error::io("cannot look at", &path, error))
    }

    /// Creates a database with `create` and puts it in its place whole: a crash leaves none or all of it.
    pub(crate) fn create_database(&self, create: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let (new, database) = (self.new_database(), self.database());
        make_private(&new)?;
        create(&new)?;
        Failpoint::StoreCreated.pass();
        fs::rename(&new, &database).map_err(|error| Error::io("cannot rename", &new, error))?;
        Failpoint::StorePlaced.pass();
        sync_dir(&self.root)?;
        // The directory's own name must survive a power cut, too.
        match self.root.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent)?,
            _ => sync_dir(Path::new("."))?,
        }
        self.write_created_flag()
    }

    /// Bytes of all files below. Files that vanish meanwhile count as none.
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

/// Refuses what no file system takes for a path. The empty one would be the working directory to some calls, and nothing to
/// others.
fn refuse_impossible(root: &Path) -> Result<()> {
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

/// Refuses a path that is or goes through a file or a broken link, or a directory that holds something and was never a
/// store: the lock file is the first thing that is created in one.
fn refuse_foreign(root: &Path) -> Result<()> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return match in_the_way(root) {
                None => Ok(()),
                Some(reason) => Err(Error::NotAStore { path: root.to_owned(), reason }),
            };
        }
        Err(error) => return Err(refused("cannot read", root, &error)),
    };
    let mut found = None;
    for entry in entries {
        let name = entry.map_err(|error| Error::io("cannot read", root, error))?.file_name();
        if name == LOCK {
            return Ok(());
        }
        found = Some(name);
    }
    match found {
        None => Ok(()),
        Some(name) => Err(Error::NotAStore {
            path: root.to_owned(),
            reason: format!("it holds {:?} and no store", name.to_string_lossy()),
        }),
    }
}

/// Why there is no directory where a path leads, and none can be created.
fn in_the_way(path: &Path) -> Option<String> {
    for part in path.ancestors() {
        let Ok(found) = fs::symlink_metadata(part) else { continue };
        let name = if part == path { "it".to_owned() } else { part.display().to_string() };
        return match (found.is_symlink(), fs::metadata(part)) {
            (true, Err(_)) => {
                let target = fs::read_link(part).unwrap_or_default();
                Some(format!("{name} is a link to {}, which is not there", target.display()))
            }
            (_, Ok(found)) if found.is_file() => Some(format!("{name} is a file")),
            (_, Ok(found)) if !found.is_dir() => Some(format!("{name} is no directory")),
            _ => None,
        };
    }
    None
}

fn make_private(path: &Path) -> Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| refused("cannot create", path, &error))
}

/// An error of the file system, with what to do where it lets this process not write.
fn refused(action: &'static str, path: &Path, error: &std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            let detail = format!("{error}; the process needs to read and write the store's directory");
            Error::io(action, path, Cause::new(error.kind(), detail))
        }
        _ => Error::io(action, path, Cause::new(error.kind(), error.to_string())),
    }
}

/// A run that a crash left before the database had it, and nothing else that somebody may have put beside it.
fn is_sst(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "sst")
        && path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| stem.parse::<u64>().is_ok())
}

/// What a crash left of RocksDB's note of its own options. RocksDB removes all its temporary files but these.
fn is_half_written_options(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.starts_with("OPTIONS-") && name.ends_with(".dbtmp"))
}

/// Removes files that a crash left.
fn remove_files(dir: &Path, left: impl Fn(&Path) -> bool) -> Result<()> {
    let unreadable = |error: std::io::Error| Error::io("cannot read", dir, error);
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if left(&path) {
            fs::remove_file(&path).map_err(|error| Error::io("cannot remove", &path, error))?;
        }
    }
    Ok(())
}

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("cannot remove", path, error)),
        _ => Ok(()),
    }
}

pub(crate) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|error| Error::io("cannot sync", path, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_path_is_made_absolute_so_that_a_process_may_change_its_directory() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let relative = Path::new(dir.path().file_name().unwrap()).join("store");
        let directory = Directory::acquire(&relative, Duration::ZERO).unwrap();
        assert!(directory.root().is_absolute() && directory.root().ends_with(&relative));
    }
}
