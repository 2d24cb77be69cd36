//! Shared by the behaviour tests: a store with a clock that the test advances.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use onlyonce::{Builder, Claim, InProgress, Lease, ManualClock, Store, Timestamp};
use tempfile::TempDir;

/// The time at the start of every test.
pub const START_MS: u64 = 1_700_000_000_000;

/// A store in a temporary directory, with a window of ten seconds, buckets of one second, and leases of one second.
pub struct Bench {
    // Before the directory, so that it is dropped first.
    store: Option<Store>,
    pub clock: ManualClock,
    dir: TempDir,
    configure: fn(Builder) -> Builder,
}

impl Bench {
    pub fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub fn with(configure: fn(Builder) -> Builder) -> Self {
        let mut bench = Self {
            clock: ManualClock::at(Timestamp::from_unix_ms(START_MS)),
            dir: tempfile::tempdir().unwrap(),
            configure,
            store: None,
        };
        bench.store = Some(bench.open().unwrap());
        bench
    }

    pub fn builder(&self) -> Builder {
        let builder = Store::builder()
            .window(Duration::from_secs(10))
            .bucket(Duration::from_secs(1))
            .lease(Duration::from_secs(1))
            .memory_budget(32 << 20)
            .durability(onlyonce::Durability::Process)
            .lock_wait(Duration::ZERO)
            .clock(self.clock.clone());
        (self.configure)(builder)
    }

    fn open(&self) -> onlyonce::Result<Store> {
        self.builder().open(self.path())
    }

    pub fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("store")
    }

    pub fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Closes the store and opens it again. Its leases then count as those of an ended process.
    pub fn reopen(&mut self) {
        self.store().close().wait().unwrap();
        // Concurrent tests start processes, which hold this store's lock between fork and exec.
        let builder = self.builder().lock_wait(Duration::from_secs(10));
        self.store = Some(builder.open(self.path()).unwrap());
    }

    pub fn advance_ms(&self, ms: u64) {
        self.clock.advance(Duration::from_millis(ms));
    }

    pub fn acquire(&self, key: &str) -> Lease {
        match self.store().claim(key).wait().unwrap() {
            Claim::Acquired(lease) => lease,
            other => panic!("{key} should be unclaimed, but is {other:?}"),
        }
    }

    pub fn in_progress(&self, key: &str) -> InProgress {
        match self.store().claim(key).wait().unwrap() {
            Claim::InProgress(in_progress) => in_progress,
            other => panic!("{key} should be in progress, but is {other:?}"),
        }
    }

    /// The result of a completed key.
    pub fn completed(&self, key: &str) -> Option<Vec<u8>> {
        match self.store().claim(key).wait().unwrap() {
            Claim::Completed(completed) => completed.result().map(<[u8]>::to_vec),
            other => panic!("{key} should be completed, but is {other:?}"),
        }
    }
}

/// Copies the directory of a store, open or closed, as a crash at this moment leaves it. RocksDB can remove a file
/// between the listing and the copy: then the whole copy is repeated.
pub fn copy_store(from: &Path, to: &Path) {
    while !try_copy(from, to) {
        fs::remove_dir_all(to).unwrap();
    }
}

/// False if a file was removed during the copy. Any other failure panics.
fn try_copy(from: &Path, to: &Path) -> bool {
    fs::create_dir_all(to).unwrap();
    fs::read_dir(from).unwrap().all(|entry| {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        if path.is_dir() {
            return try_copy(&path, &to);
        }
        match fs::copy(&path, &to) {
            Ok(_) => true,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
            Err(error) => panic!("cannot copy {}: {error}", path.display()),
        }
    })
}
