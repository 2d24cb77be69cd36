//! Failing disks: full, read-only, with lost writes; deleted directories, and too many open files. Every call returns a
//! correct answer or the error that `docs/guarantees.md` promises (G6), a store with a failed write rejects all calls
//! until it is reopened, and completions that were acknowledged under `Disk` are stored once the disk works again.
//!
//! One test makes each operation on a file fail, by a FUSE file system in this process. Most tests need root, loop devices, mkfs.ext4, python3 and /dev/fuse. Without them they print that they are skipped, or fail if
//! `ONLYONCE_REQUIRE_POWER_LOSS` is set. `ONLYONCE_FAILING_IO_ROUNDS` (default: 4) sets the rounds, and
//! `ONLYONCE_FAILING_IO_SEED` (default: random, and printed) the seed.

#[path = "common/disk.rs"]
mod disk;
#[cfg(target_os = "linux")]
#[path = "common/faulty.rs"]
mod faulty;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use disk::{Disk, fill, or_skip, run_program};
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

/// The expected state of every key.
#[derive(Default)]
struct Ledger {
    next: u64,
    /// Acknowledged completions, with their results.
    done: BTreeMap<String, Option<Vec<u8>>>,
    /// Completed or recorded with an unknown outcome.
    in_doubt: BTreeMap<String, Option<Vec<u8>>>,
    /// Claimed or rejected, and never completed.
    never: BTreeSet<String>,
    /// Acknowledged completions in their order.
    order: Vec<String>,
    /// How many of them are on disk for certain: a flush has synced them.
    synced: usize,
}

impl Ledger {
    fn key(&mut self) -> String {
        self.next += 1;
        format!("key-{}", self.next)
    }

    /// Works until a call fails, for at most `steps` steps.
    fn work(&mut self, store: &Store, rng: &mut StdRng, steps: u64) -> Option<Error> {
        (0..steps).find_map(|_| match rng.random_range(0..20) {
            0 => self.flush(store),
            1..=5 => self.record(store, rng.random_range(1..200)),
            _ => self.complete(store, rng.random_range(0..30_000)),
        })
    }

    fn flush(&mut self, store: &Store) -> Option<Error> {
        let flushed = store.flush();
        if flushed.is_ok() {
            self.synced = self.order.len();
        }
        flushed.err()
    }

    /// Removes the acknowledged completions that a store does not have. They may only be the last ones that no flush has
    /// synced.
    fn drop_lost(&mut self, store: &Store) -> usize {
        let is_stored = |key: &String| matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_));
        let stored: Vec<bool> = self.order.iter().map(is_stored).collect();
        let kept = stored.iter().rposition(|stored| *stored).map_or(0, |last| last + 1);
        let missing = stored[..kept].iter().position(|stored| !stored);
        assert_eq!(missing, None, "of {} acknowledged completions, the last {} are stored", stored.len(), kept);
        assert!(kept >= self.synced, "{kept} of {}, {} of them synced", stored.len(), self.synced);
        for key in self.order.split_off(kept) {
            self.done.remove(&key);
            self.never.insert(key);
        }
        stored.len() - kept
    }

    fn record(&mut self, store: &Store, keys: u64) -> Option<Error> {
        let keys: Vec<String> = (0..keys).map(|_| self.key()).collect();
        match store.record_batch(&keys).wait() {
            Ok(recorded) => {
                assert!(recorded.iter().all(|recorded| matches!(recorded, Ok(RecordOutcome::First))), "{recorded:?}");
                self.order.extend(keys.iter().cloned());
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
                self.order.push(key.clone());
                self.done.insert(key, Some(result));
                None
            }
            Err(error) => {
                assert_eq!(error.completion().result(), result, "the error returns the result");
                let unknown = error.outcome() == Outcome::Unknown;
                let (error, _, lease) = error.into_parts();
                assert_eq!(lease.is_none(), unknown, "the error returns a lease that is still good: {error}");
                if unknown {
                    self.in_doubt.insert(key, Some(result));
                } else {
                    self.never.insert(key);
                }
                Some(error)
            }
        }
    }

    /// Checks every key. With `may_fail`, checks can fail.
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
                            self.order.push(key.clone());
                            self.done.insert(key.clone(), result);
                        }
                        None => drop(self.never.insert(key.clone())),
                    },
                    (None, None) => assert_eq!(result, None, "G2: {key} was not completed"),
                }
            }
        }
    }
}

/// After a failed write the store rejects all calls, and reports the reason.
fn assert_poisoned(store: &Store, error: &Error) {
    assert!(matches!(error, Error::WriteFailed { .. }), "{error:?}");
    assert!(store.stats().poisoned.is_some());
    for rejected in [store.claim("other").wait().map(drop), store.check("other").wait().map(drop), store.flush()] {
        assert!(matches!(rejected, Err(Error::Poisoned { .. })), "{rejected:?}");
    }
}

/// Works until the store rejects calls. A failed flush or a failed creation of a bucket does not reject any. A full disk
/// rejects them before they change anything: then no segment of the journal can be created.
fn work_until_rejected(ledger: &mut Ledger, store: &Store, rng: &mut StdRng) -> Error {
    loop {
        match ledger.work(store, rng, 100_000) {
            Some(error @ Error::Io { .. }) if is_segment(&error) => {
                assert_eq!(error.outcome(), Outcome::NotWritten, "{error:?}");
                // A background worker can fail in a different way at the same time.
                return error;
            }
            Some(Error::Io { .. }) => {}
            // A write of a background worker failed first.
            Some(Error::Poisoned { reason }) => return Error::WriteFailed { source: reason.into() },
            Some(error @ (Error::WriteFailed { .. } | Error::FlushFailed { .. })) => return error,
            other => panic!("{other:?}"),
        }
    }
}

/// Flushes once there is space. A compaction that failed makes RocksDB reject writes of its own until it tries again.
fn flush_again(store: &Store) {
    let begun = std::time::Instant::now();
    while let Err(error) = store.flush() {
        assert!(matches!(error, Error::Io { .. }), "{error:?}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{error:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("flushed after {:?}", begun.elapsed());
}

/// Whether the error is about a file of the journal.
fn is_segment(error: &Error) -> bool {
    matches!(error, Error::Io { path, .. } if path.extension().is_some_and(|ending| ending == "journal"))
}

#[test]
fn a_full_disk_loses_nothing_and_the_store_works_again_once_there_is_space() {
    let Some(disk) = or_skip(Disk::new(96)) else { return };
    let mut rng = rng();
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    for round in 0..rounds() {
        if ledger.done.len() > 30_000 {
            // Only the filler file fills the disk.
            std::fs::remove_dir_all(&path).unwrap();
            ledger = Ledger::default();
        }
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        assert!(ledger.work(&store, &mut rng, 20).is_none());
        let filler = fill(&disk.root(), rng.random_range(0..12 << 20));
        let error = work_until_rejected(&mut ledger, &store, &mut rng);
        eprintln!("round {round}, {} acknowledged: {error}", ledger.done.len());
        let is_whole = matches!(error, Error::FlushFailed { .. } | Error::Io { .. });
        if is_whole && store.stats().poisoned.is_none() && rng.random_bool(0.5) {
            // No write failed, so that no reopen is needed.
            ledger.check(&store, false);
            std::fs::remove_file(filler).unwrap();
            flush_again(&store);
            ledger.check(&store, false);
            assert!(ledger.work(&store, &mut rng, 20).is_none());
            continue;
        }
        if !is_whole {
            assert_poisoned(&store, &error);
        }
        drop(store);
        // The open can succeed without space; then every key must be known.
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
fn a_disk_whose_sync_fails_rejects_calls_and_loses_nothing() {
    let mut rng = rng();
    for round in 0..rounds() {
        let Some(disk) = or_skip(Disk::thin(256, 64)) else { return };
        let path = disk.root().join("store");
        let mut ledger = Ledger::default();
        let store = builder().open(&path).unwrap();
        assert!(ledger.work(&store, &mut rng, 20).is_none());
        let filler = fill(&disk.pool(), rng.random_range(0..12 << 20));
        let error = work_until_rejected(&mut ledger, &store, &mut rng);
        eprintln!("round {round}, {} acknowledged: {error}", ledger.done.len());
        // The sync of a new segment changes nothing that is in use. Any other one poisons the store.
        if !is_segment(&error) {
            assert_poisoned(&store, &error);
        }
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
fn a_removed_disk_poisons_the_store_and_keeps_acknowledged_completions() {
    let Some(disk) = or_skip(Disk::new(256)) else { return };
    let mut rng = rng();
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    for _ in 0..rounds() {
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        let steps = rng.random_range(1..200);
        assert!(ledger.work(&store, &mut rng, steps).is_none());
        let Claim::Acquired(lease) = store.claim("leased").wait().unwrap() else { panic!("the key was released") };
        disk.cut();
        // The completion of the lease is the first call that fails, and returns the lease's completion.
        let failed = lease.complete("lost").wait().unwrap_err();
        assert_eq!((failed.outcome(), failed.completion().result()), (Outcome::Unknown, &b"lost"[..]));
        assert_poisoned(&store, failed.error());
        drop(store.close().wait());
        drop(store);
        assert!(disk.unmount() && disk.mount(5));
        let store = builder().open(&path).unwrap();
        ledger.check(&store, false);
        match store.claim("leased").wait().unwrap() {
            Claim::Acquired(lease) => lease.release().wait().unwrap(),
            other => panic!("no completion was acknowledged: {other:?}"),
        }
    }
}

#[test]
fn a_read_only_file_system_is_reported_and_nothing_is_changed() {
    let Some(disk) = or_skip(Disk::new(64)) else { return };
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    let store = builder().open(&path).unwrap();
    assert!(ledger.work(&store, &mut rng(), 50).is_none());
    store.close().wait().unwrap();
    drop(store);
    assert!(disk.set_read_only(true));
    let rejected = builder().open(&path);
    let Err(error @ Error::Io { .. }) = rejected else { panic!("{rejected:?}") };
    assert!(error.chain().contains("Read-only file system"), "{error}");
    let new = builder().open(disk.root().join("new"));
    assert!(matches!(new, Err(Error::Io { .. })), "{new:?}");
    assert!(disk.set_read_only(false));
    let store = builder().open(&path).unwrap();
    ledger.check(&store, false);
}

/// Makes a directory immutable: not even root can create or remove files in it.
fn freeze(dir: &Path, frozen: bool) -> bool {
    run_program("chattr", &[if frozen { "+i" } else { "-i" }, dir.to_str().unwrap()])
}

#[test]
fn a_directory_without_new_files_stops_flushes_but_not_claims() {
    let Some(disk) = or_skip(Disk::new(64)) else { return };
    let mut rng = rng();
    let path = disk.root().join("store");
    let mut ledger = Ledger::default();
    let store = builder().open(&path).unwrap();
    assert!(ledger.work(&store, &mut rng, 50).is_none());
    store.flush().unwrap();
    for dir in ["ssts", "db"] {
        assert!(ledger.record(&store, 10).is_none());
        assert!(freeze(&path.join(dir), true));
        let rejected = store.flush();
        // Claims and completions need no new file.
        let after = (ledger.record(&store, 10), ledger.complete(&store, 100));
        ledger.check(&store, false);
        assert!(freeze(&path.join(dir), false));
        assert!(matches!(&rejected, Err(Error::Io { .. })), "{dir}: {rejected:?}");
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
fn a_deleted_directory_causes_no_wrong_answer() {
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
        // Keys in memory and in open files are still found, and no other key is.
        ledger.check(&store, true);
        let is_named = |error: &Error| match error {
            Error::Io { path: at, .. } => at.starts_with(&path),
            // Deletes the database and the directory at once.
            Error::DirectoryGone { path: at } => *at == path,
            _ => false,
        };
        let later = ledger.record(&store, 10);
        match &later {
            // No completion is acknowledged without a disk. A background thread of RocksDB can find the loss first.
            Some(error) => assert!(is_named(error), "{error:?}"),
            None => assert_eq!(durability, Durability::Process, "acknowledged, but on no disk"),
        }
        let rejected = store.flush();
        assert!(rejected.as_ref().is_err_and(is_named), "{rejected:?}");
        let rejected = store.check("a key").wait().unwrap_err();
        assert!(matches!(&rejected, Error::DirectoryGone { path: at } if *at == path), "{rejected:?}");
        let text = rejected.to_string();
        assert_eq!(text.matches("deleted or moved").count(), 1, "{text}");
        assert_eq!(text.matches(path.to_str().unwrap()).count(), 1, "{text}");
        for part in ["move it back", "restore the directory", "before you open it again"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(store.stats().poisoned.is_some_and(|reason| reason.contains("deleted or moved")));
        drop(store.close().wait());
        assert!(!path.exists(), "no file of a deleted store is created again");
    }
}

#[test]
fn closing_a_partly_deleted_store_fails() {
    for deleted in ["onlyonce.lock", "db", "journal"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let process = builder().durability(Durability::Process).sync_interval(Duration::from_secs(3_600));
        let store = process.open(&path).unwrap();
        assert_eq!(store.record("a key").wait().unwrap(), RecordOutcome::First);
        let deleted = path.join(deleted);
        if deleted.is_dir() {
            std::fs::remove_dir_all(&deleted).unwrap()
        } else {
            std::fs::remove_file(&deleted).unwrap()
        }
        let closed = store.close().wait();
        let is_named = |error: &Error| matches!(error, Error::DirectoryGone { path: at } if at.starts_with(&deleted));
        assert!(closed.as_ref().is_err_and(is_named), "{closed:?}");
    }
}

/// Opens files until this process can open only `left` more, until they are dropped.
fn leave_files(left: usize) -> Vec<File> {
    let mut plugs: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    plugs.truncate(plugs.len().saturating_sub(left));
    plugs
}

#[test]
fn too_many_open_files_cause_an_error_and_lose_nothing() {
    // The limit applies to a process, so that the store needs a child process.
    let Ok(path) = std::env::var("ONLYONCE_FEW_FILES_STORE") else {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("bash")
            .args(["-c", "ulimit -n 256; exec \"$0\" --exact \"$1\" --nocapture"])
            .arg(std::env::current_exe().unwrap())
            .arg("too_many_open_files_cause_an_error_and_lose_nothing")
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
    // A running store reaches the limit.
    assert!(ledger.record(&store, 10).is_none());
    let plugs = leave_files(0);
    let rejected = store.flush();
    drop(plugs);
    assert!(matches!(rejected, Err(Error::Io { .. })), "{rejected:?}");
    assert!(ledger.work(&store, &mut rng, 20).is_none(), "a failed flush is retried");
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
    // An open reaches the limit, and fails until there are enough files.
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
    assert!((1..80).contains(&opened), "{opened} of 80 opens succeeded");
    let store = builder().open(&path).unwrap();
    ledger.check(&store, false);
}

#[cfg(target_os = "linux")]
mod operations {
    use super::*;
    use faulty::{EIO, Fault, FaultyDisk};

    fn open(disk: &FaultyDisk, durability: Durability) -> onlyonce::Result<Store> {
        // Other tests start programs, which hold the lock for a moment.
        let builder = builder().lock_wait(Duration::from_secs(10));
        let builder = builder.durability(durability).sync_interval(Duration::from_millis(20));
        builder.open(disk.root().join("store"))
    }

    /// Opens a store, works, flushes, and closes it, twice. Returns the first error.
    fn run(disk: &FaultyDisk, durability: Durability, ledger: &mut Ledger, rng: &mut StdRng) -> Option<Error> {
        for _ in 0..2 {
            let store = match open(disk, durability) {
                Ok(store) => store,
                Err(error) => return Some(error),
            };
            // Some keys are larger than a segment.
            let error = ledger
                .work(&store, rng, 25)
                .or_else(|| ledger.complete(&store, 300_000))
                .or_else(|| ledger.flush(&store))
                .or_else(|| ledger.work(&store, rng, 5));
            if let Some(error) = error {
                ledger.check(&store, true);
                match &error {
                    Error::WriteFailed { .. } => assert_poisoned(&store, &error),
                    Error::Poisoned { .. } => assert!(store.stats().poisoned.is_some()),
                    // A flush that failed can be repeated, unless RocksDB cannot write any more.
                    Error::Io { .. } | Error::FlushFailed { .. } => {}
                    _ => panic!("{error:?}"),
                }
                drop(store.close().wait());
                return Some(error);
            }
            match store.close().wait() {
                Ok(()) => ledger.synced = ledger.order.len(),
                Err(error) => return Some(error),
            }
        }
        None
    }

    fn disk() -> Option<FaultyDisk> {
        let disk = FaultyDisk::new();
        if disk.is_none() {
            let why = "needs root and /dev/fuse";
            assert!(std::env::var_os("ONLYONCE_REQUIRE_POWER_LOSS").is_none(), "tests with disks are required: {why}");
            eprintln!("SKIPPED: {why}");
        }
        disk
    }

    /// How many operations there are on files whose paths contain this.
    fn count(durability: Durability, only: &'static str) -> Option<u64> {
        let mut disk = disk()?;
        disk.faults().only = only;
        let mut ledger = Ledger::default();
        let error = run(&disk, durability, &mut ledger, &mut StdRng::seed_from_u64(1));
        assert!(error.is_none(), "{error:?}");
        let operations = disk.faults().operations;
        let kinds = std::mem::take(&mut disk.faults().kinds);
        eprintln!("{durability:?}, `{only}`: {operations} operations: {kinds:?}");
        if only == "journal/" {
            // Writes of a mapping arrive, too.
            for kind in ["write journal", "sync journal", "create new", "rename journal"] {
                assert!(kinds.get(kind).is_some_and(|count| *count > 1), "{kind}: {kinds:?}");
            }
        }
        disk.remount();
        let store = open(&disk, durability).unwrap();
        ledger.check(&store, false);
        Some(operations)
    }

    fn each_operation(durability: Durability) {
        let mut rng = rng();
        let (mut hits, mut lost, mut by_error) = (0, 0, BTreeMap::<String, u64>::new());
        for only in ["journal/", "db/", ""] {
            let Some(operations) = count(durability, only) else { return };
            for round in 0..6 * rounds() {
                let fault = match round % 3 {
                    0 => Fault::Once(EIO),
                    1 => Fault::Forever(EIO),
                    _ => Fault::Full,
                };
                let at = rng.random_range(1..=operations);
                let mut disk = disk().unwrap();
                disk.faults().only = only;
                disk.faults().plan = Some((at, fault));
                let mut ledger = Ledger::default();
                let error = run(&disk, durability, &mut ledger, &mut StdRng::seed_from_u64(1));
                disk.faults().plan = None;
                let failed = disk.faults().failed.take();
                let what = format!("`{only}`, {fault:?} at {at} of {operations}: {failed:?}: {error:?}");
                hits += u64::from(failed.is_some());
                if let Some(error) = &error {
                    assert!(failed.is_some(), "{what}");
                    let is_kind = matches!(
                        error,
                        Error::Io { .. }
                            | Error::WriteFailed { .. }
                            | Error::FlushFailed { .. }
                            | Error::Poisoned { .. }
                    );
                    assert!(is_kind, "{what}");
                    let text = error.chain();
                    let cause = if fault == Fault::Full { "No space left on device" } else { "Input/output error" };
                    // RocksDB names some causes by its own words.
                    assert!(text.contains(cause) || text.contains("IO error"), "{what}: {text}");
                    *by_error.entry(format!("{error:?}").split([' ', '(']).next().unwrap().to_owned()).or_default() +=
                        1;
                }
                disk.remount();
                let is_manifest_sync =
                    failed.as_ref().is_some_and(|failed| failed.starts_with("sync of store/db/MANIFEST"));
                let store = match open(&disk, durability) {
                    Ok(store) => store,
                    // A limit of RocksDB: it removes an SST whose ingestion failed, although the manifest that could not be
                    // synced lists it and may be on disk. The next write of a manifest by the same process heals it.
                    Err(Error::Corrupt { place, .. }) if is_manifest_sync && place.ends_with(".sst") => {
                        eprintln!("{what}: then {place} is missing");
                        continue;
                    }
                    Err(error) => panic!("{what}: then {error}"),
                };
                if durability == Durability::Process {
                    lost += ledger.drop_lost(&store);
                }
                ledger.check(&store, false);
                let later = ledger.work(&store, &mut rng, 10).or_else(|| ledger.flush(&store));
                assert!(later.is_none(), "{what}: then {later:?}");
                store.close().wait().unwrap();
                let store = open(&disk, durability).unwrap();
                ledger.check(&store, false);
            }
        }
        eprintln!(
            "{durability:?}: {hits} operations failed, {lost} completions lost that were not synced; {by_error:?}"
        );
        assert!(hits > 4 * rounds());
    }

    #[test]
    fn whichever_operation_fails_nothing_acknowledged_is_lost_under_disk() {
        each_operation(Durability::Disk);
    }

    #[test]
    fn whichever_operation_fails_only_the_last_unsynced_completions_are_lost_under_process() {
        each_operation(Durability::Process);
    }
}
