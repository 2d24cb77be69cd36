//! Disks that fail: full ones, ones that cannot keep what they took, read-only ones, directories that vanish, too many
//! open files. Every call answers rightly or fails with the error that `docs/guarantees.md` promises (G6), a store whose
//! write has failed refuses until it is reopened, and what was acknowledged under `Disk` is there when the disk is well
//! again.
//!
//! Most need root, loop devices, mkfs.ext4 and python3, and skip, aloud, where they are missing;
//! `ONLYONCE_REQUIRE_POWER_LOSS` makes that a failure. `ONLYONCE_FAILING_IO_ROUNDS` (4 if not set) and
//! `ONLYONCE_FAILING_IO_SEED` (default: drawn, and printed) set how often and how.

#[path = "common/disk.rs"]
mod disk;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use disk::{Disk, fill, or_skip, runs};
use onlyonce::{Builder, Claim, Durability, Error, KeyStatus, Lease, Outcome, RecordOutcome, Store};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn builder() -> Builder {
    Store::builder()
        .durability(Durability::Disk)
        .memory_budget(32 << 20)
        .lease(Duration::from_secs(3_600))
        .lock_wait(Duration::ZERO)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

fn rounds() -> u64 {
    number("ONLYONCE_FAILING_IO_ROUNDS").unwrap_or(4)
}

fn rng() -> StdRng {
    let seed = number("ONLYONCE_FAILING_IO_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_FAILING_IO_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// What is known of every key that was ever worked on.
#[derive(Default)]
struct Ledger {
    next: u64,
    /// Acknowledged, with the result.
    done: BTreeMap<String, Option<Vec<u8>>>,
    /// Completed or recorded with an unknown outcome.
    in_doubt: BTreeMap<String, Option<Vec<u8>>>,
    /// Claimed, or refused: never completed.
    never: BTreeSet<String>,
}

impl Ledger {
    fn key(&mut self) -> String {
        self.next += 1;
        format!("key-{}", self.next)
    }

    /// Works until something fails, for so many steps at most.
    fn work(&mut self, store: &Store, rng: &mut StdRng, steps: u64) -> Option<Error> {
        (0..steps).find_map(|_| match rng.random_range(0..20) {
            0 => store.flush().err(),
            1..=5 => self.record(store, rng.random_range(1..200)),
            _ => self.complete(store, rng.random_range(0..30_000)),
        })
    }

    fn record(&mut self, store: &Store, keys: u64) -> Option<Error> {
        let keys: Vec<String> = (0..keys).map(|_| self.key()).collect();
        match store.record_batch(&keys).wait() {
            Ok(recorded) => {
                assert!(recorded.iter().all(|recorded| matches!(recorded, Ok(RecordOutcome::First))), "{recorded:?}");
                self.done.extend(keys.into_iter().map(|key| (key, None)));
                None
            }
            Err(error) => {
                match error.outcome() {
                    Outcome::Unknown => self.in_doubt.extend(keys.into_iter().map(|key| (key, None))),
                    Outcome::NotWritten => self.never.extend(keys),
                }
                Some(error)
            }
        }
    }

    fn complete(&mut self, store: &Store, bytes: usize) -> Option<Error> {
        let key = self.key();
        let lease = match store.claim(&key).wait() {
            Ok(Claim::Acquired(lease)) => lease,
            Ok(other) => panic!("{key} is new: {other:?}"),
            Err(error) => {
                self.never.insert(key);
                return Some(error);
            }
        };
        if bytes.is_multiple_of(17) {
            self.never.insert(key);
            drop(lease);
            return None;
        }
        self.complete_lease(key, lease, vec![b'r'; bytes])
    }

    fn complete_lease(&mut self, key: String, lease: Lease, result: Vec<u8>) -> Option<Error> {
        match lease.complete(result.clone()).wait() {
            Ok(()) => {
                self.done.insert(key, Some(result));
                None
            }
            Err(error) => {
                assert_eq!(error.completion().result(), result, "the result comes back");
                let unknown = error.outcome() == Outcome::Unknown;
                let (error, _, lease) = error.into_parts();
                assert_eq!(lease.is_none(), unknown, "a lease that is still good comes back: {error}");
                if unknown {
                    self.in_doubt.insert(key, Some(result));
                } else {
                    self.never.insert(key);
                }
                Some(error)
            }
        }
    }

    /// Asks everything. With `may_fail`, questions may be refused.
    fn check(&mut self, store: &Store, may_fail: bool) {
        let in_doubt = std::mem::take(&mut self.in_doubt);
        let all = self.done.keys().chain(in_doubt.keys()).chain(&self.never);
        let keys: Vec<String> = all.cloned().collect();
        for keys in keys.chunks(500) {
            let checks = match store.check_batch(keys).wait() {
                Ok(checks) => checks,
                Err(_) if may_fail => continue,
                Err(error) => panic!("{error}"),
            };
            for (key, check) in keys.iter().zip(checks) {
                let result = match check.unwrap() {
                    KeyStatus::Completed(completed) => Some(completed.result().map(<[u8]>::to_vec)),
                    KeyStatus::New | KeyStatus::InProgress(_) => None,
                };
                match (self.done.get(key), in_doubt.get(key)) {
                    (Some(done), _) => assert_eq!(result.as_ref(), Some(done), "G1: {key} was acknowledged"),
                    (None, Some(tried)) => match result {
                        Some(result) => {
                            assert_eq!(result, *tried, "{key}");
                            self.done.insert(key.clone(), result);
                        }
                        None => drop(self.never.insert(key.clone())),
                    },
                    (None, None) => assert_eq!(result, None, "G2: {key} was never completed"),
                }
            }
        }
    }
}

/// A write has failed: everything is refused from here on, and the store says why.
fn assert_poisoned(store: &Store, error: &Error) {
    assert!(matches!(error, Error::WriteFailed { .. }), "{error:?}");
    assert!(store.stats().poisoned.is_some());
    for refused in [store.claim("other").wait().map(drop), store.check("other").wait().map(drop), store.flush()] {
        assert!(matches!(refused, Err(Error::Poisoned { .. })), "{refused:?}");
    }
}

/// Works until the store refuses. A seal or a new bucket that fails by itself is not yet a reason.
fn work_until_refused(ledger: &mut Ledger, store: &Store, rng: &mut StdRng) -> Error {
    loop {
        match ledger.work(store, rng, 100_000) {
            Some(Error::Io { .. }) => {}
            // The keeper's write was the one that failed.
            Some(Error::Poisoned { reason }) => return Error::WriteFailed { source: reason.into() },
            Some(error @ (Error::WriteFailed { .. } | Error::FlushFailed { .. })) => return error,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_full_disk_loses_nothing_and_is_worked_on_when_there_is_space_again() {
    let Some(disk) = or_skip(Disk::new(96)) else { return };
    let mut rng = rng();
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    for round in 0..rounds() {
        if ledger.done.len() > 30_000 {
            // So that it is the filler that fills the disk.
            std::fs::remove_dir_all(&path).unwrap();
            ledger = Ledger::default();
        }
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        assert!(ledger.work(&store, &mut rng, 20).is_none());
        let filler = fill(&disk.root(), rng.random_range(0..12 << 20));
        let error = work_until_refused(&mut ledger, &store, &mut rng);
        eprintln!("round {round}, {} acknowledged: {error}", ledger.done.len());
        if matches!(error, Error::FlushFailed { .. }) {
            // Nothing was written that could have failed: no reopening is needed.
            std::fs::remove_file(filler).unwrap();
            store.flush().unwrap();
            ledger.check(&store, false);
            assert!(ledger.work(&store, &mut rng, 20).is_none());
            continue;
        }
        assert_poisoned(&store, &error);
        drop(store);
        // It may open where there is no space; then it knows everything.
        match builder().open(&path) {
            Ok(store) => ledger.check(&store, true),
            Err(error) => assert!(matches!(error, Error::Io { .. } | Error::WriteFailed { .. }), "{error:?}"),
        }
        std::fs::remove_file(filler).unwrap();
    }
    let store = builder().open(&path).unwrap();
    ledger.check(&store, false);
    assert!(ledger.work(&store, &mut rng, 20).is_none());
}

#[test]
fn a_disk_that_cannot_keep_what_it_took_poisons_the_store() {
    let mut rng = rng();
    for round in 0..rounds() {
        let Some(disk) = or_skip(Disk::thin(256, 64)) else { return };
        let path = disk.root().join("store");
        let mut ledger = Ledger::default();
        let store = builder().open(&path).unwrap();
        assert!(ledger.work(&store, &mut rng, 20).is_none());
        let filler = fill(&disk.pool(), rng.random_range(0..12 << 20));
        let error = work_until_refused(&mut ledger, &store, &mut rng);
        eprintln!("round {round}, {} acknowledged: {error}", ledger.done.len());
        assert_poisoned(&store, &error);
        drop(store);
        assert!(disk.unmount());
        std::fs::remove_file(filler).unwrap();
        disk.repair();
        assert!(disk.mount(5));
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        assert!(ledger.work(&store, &mut rng, 20).is_none());
        drop(store);
    }
}

#[test]
fn a_disk_that_goes_away_poisons_the_store_and_has_what_was_acknowledged() {
    let Some(disk) = or_skip(Disk::new(256)) else { return };
    let mut rng = rng();
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    for _ in 0..rounds() {
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        let steps = rng.random_range(1..200);
        assert!(ledger.work(&store, &mut rng, steps).is_none());
        let Claim::Acquired(lease) = store.claim("under way").wait().unwrap() else { panic!("it was released") };
        disk.cut();
        // The lease is still in hand: its completion fails first, and gives back what it brought.
        let failed = lease.complete("lost").wait().unwrap_err();
        assert_eq!((failed.outcome(), failed.completion().result()), (Outcome::Unknown, &b"lost"[..]));
        assert_poisoned(&store, failed.error());
        drop(store.close().wait());
        drop(store);
        assert!(disk.unmount() && disk.mount(5));
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        match store.claim("under way").wait().unwrap() {
            Claim::Acquired(lease) => lease.release().wait().unwrap(),
            other => panic!("nothing was acknowledged: {other:?}"),
        }
    }
}

#[test]
fn a_read_only_file_system_is_an_error_of_its_own_and_changes_nothing() {
    let Some(disk) = or_skip(Disk::new(64)) else { return };
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    let store = builder().open(&path).unwrap();
    assert!(ledger.work(&store, &mut rng(), 50).is_none());
    store.close().wait().unwrap();
    drop(store);
    assert!(disk.set_read_only(true));
    let refused = builder().open(&path);
    let Err(error @ Error::Io { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.chain().contains("Read-only file system"), "{error}");
    let new = builder().open(disk.root().join("new"));
    assert!(matches!(new, Err(Error::Io { .. })), "{new:?}");
    assert!(disk.set_read_only(false));
    let store = builder().open(&path).unwrap();
    ledger.check(&store, false);
}

/// Forbids everybody, root too, to create or remove files in a directory.
fn freeze(dir: &Path, frozen: bool) -> bool {
    runs("chattr", &[if frozen { "+i" } else { "-i" }, dir.to_str().unwrap()])
}

#[test]
fn a_directory_that_takes_no_new_file_stops_seals_and_not_claims() {
    let Some(disk) = or_skip(Disk::new(64)) else { return };
    let mut rng = rng();
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    let store = builder().open(&path).unwrap();
    assert!(ledger.work(&store, &mut rng, 50).is_none());
    store.flush().unwrap();
    for dir in ["runs", "db"] {
        assert!(ledger.record(&store, 10).is_none());
        assert!(freeze(&path.join(dir), true));
        let refused = store.flush();
        // What is written needs no new file.
        let after = (ledger.record(&store, 10), ledger.complete(&store, 100));
        ledger.check(&store, false);
        assert!(freeze(&path.join(dir), false));
        assert!(matches!(&refused, Err(Error::Io { .. })), "{dir}: {refused:?}");
        assert!(matches!(&after, (None, None)), "{dir}: {after:?}");
        store.flush().unwrap();
    }
    store.close().wait().unwrap();
    drop(store);
    let store = builder().open(&path).unwrap();
    ledger.check(&store, false);
    store.flush().unwrap();
}

#[test]
fn a_directory_that_is_deleted_under_a_store_makes_no_wrong_answer() {
    for durability in [Durability::Disk, Durability::Process] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let mut rng = rng();
        let mut ledger = Ledger::default();
        let store = builder().durability(durability).sync_interval(Duration::from_secs(3_600)).open(&path).unwrap();
        assert!(ledger.work(&store, &mut rng, 100).is_none());
        store.flush().unwrap();
        assert!(ledger.work(&store, &mut rng, 20).is_none());
        std::fs::remove_dir_all(&path).unwrap();
        // What is in memory and in open files is there, and nothing is invented.
        ledger.check(&store, true);
        let is_named = |error: &Error| match error {
            Error::Io { path: at, .. } => at.starts_with(&path),
            // The database is deleted at once, and the directory with it.
            Error::DirectoryGone { path: at } => *at == path,
            _ => false,
        };
        let later = ledger.record(&store, 10);
        match &later {
            // Nothing is acknowledged that is not on a disk. RocksDB may have met it first, in the background.
            Some(error) => assert!(is_named(error), "{error:?}"),
            None => assert_eq!(durability, Durability::Process, "acknowledged, and on no disk"),
        }
        let refused = store.flush();
        assert!(refused.as_ref().is_err_and(is_named), "{refused:?}");
        let refused = store.check("a key").wait().unwrap_err();
        assert!(matches!(&refused, Error::DirectoryGone { path: at } if *at == path), "{refused:?}");
        let said = refused.to_string();
        assert_eq!(said.matches("deleted or moved").count(), 1, "{said}");
        assert_eq!(said.matches(path.to_str().unwrap()).count(), 1, "{said}");
        for part in ["move it back", "restore the directory", "before you open it again"] {
            assert!(said.contains(part), "{said}");
        }
        assert!(store.stats().poisoned.is_some_and(|reason| reason.contains("deleted or moved")));
        drop(store.close().wait());
        assert!(!path.exists(), "nothing comes back of a store that was deleted");
    }
}

#[test]
fn a_store_that_was_deleted_in_part_is_not_closed_as_if_nothing_had_happened() {
    for gone in ["onlyonce.lock", "db"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let process = builder().durability(Durability::Process).sync_interval(Duration::from_secs(3_600));
        let store = process.open(&path).unwrap();
        assert_eq!(store.record("a key").wait().unwrap(), RecordOutcome::First);
        let gone = path.join(gone);
        if gone.is_dir() {
            std::fs::remove_dir_all(&gone).unwrap()
        } else {
            std::fs::remove_file(&gone).unwrap()
        }
        let closed = store.close().wait();
        let is_named = |error: &Error| matches!(error, Error::DirectoryGone { path: at } if at.starts_with(&gone));
        assert!(closed.as_ref().is_err_and(is_named), "{closed:?}");
    }
}

/// Opens all files that this process may, but so many. There are more again when they are dropped.
fn leave_files(left: usize) -> Vec<File> {
    let mut plugs: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    plugs.truncate(plugs.len().saturating_sub(left));
    plugs
}

#[test]
fn too_many_open_files_are_an_error_and_lose_nothing() {
    // The limit holds for a process, so the store that meets it lives in a child.
    let Ok(path) = std::env::var("ONLYONCE_FEW_FILES_STORE") else {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("bash")
            .args(["-c", "ulimit -n 256; exec \"$0\" --exact \"$1\" --nocapture"])
            .arg(std::env::current_exe().unwrap())
            .arg("too_many_open_files_are_an_error_and_lose_nothing")
            .env("ONLYONCE_FEW_FILES_STORE", dir.path().join("store"))
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
        return;
    };
    let mut rng = rng();
    let mut ledger = Ledger::default();
    let store = builder().open(&path).unwrap();
    assert!(ledger.work(&store, &mut rng, 200).is_none());
    // A running store meets the limit.
    assert!(ledger.record(&store, 10).is_none());
    let plugs = leave_files(0);
    let refused = store.flush();
    drop(plugs);
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    assert!(ledger.work(&store, &mut rng, 20).is_none(), "a seal that failed is tried again");
    drop(store);
    for left in 0..8 {
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        let plugs = leave_files(left);
        let error = ledger.work(&store, &mut rng, 60);
        ledger.check(&store, true);
        drop(plugs);
        let ours = |error| matches!(error, Error::Io { .. } | Error::WriteFailed { .. } | Error::Poisoned { .. });
        assert!(error.clone().is_none_or(ours), "{left}: {error:?}");
        drop(store);
    }
    // A store that is being opened does: refused, until there are enough.
    let mut opened = 0;
    for left in 0..80 {
        let plugs = leave_files(left);
        let store = builder().open(&path);
        match &store {
            Ok(store) => {
                opened += 1;
                ledger.check(store, true);
            }
            Err(error) => assert!(matches!(error, Error::Io { .. } | Error::WriteFailed { .. }), "{left}: {error:?}"),
        }
        drop(store);
        drop(plugs);
    }
    assert!((1..80).contains(&opened), "{opened} of 80 opened");
    let store = builder().open(&path).unwrap();
    ledger.check(&store, false);
}
