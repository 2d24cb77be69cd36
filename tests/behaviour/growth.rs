//! Disk usage and open times must not grow with opens, closes, crashes, idle hours, forgotten keys and expired buckets.
//! The stores are on a file system in memory if there is one, so that thousands of opens do not wait for a disk.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::copy_store;
use onlyonce::{Builder, Claim, Durability, KeyStatus, ManualClock, RecordOutcome, Store, Timestamp};
use tempfile::TempDir;

const START_MS: u64 = 1_700_000_000_000;
const MINUTE: Duration = Duration::from_secs(60);

/// The disk usage of a store.
#[derive(Debug, Clone, Copy, Default)]
struct Footprint {
    files: usize,
    tables: usize,
    /// Without those of the journal's segments, which are allocated in advance, and of filters: whether the filter of an ended
    /// bucket is persisted before the bucket expires depends on the machine's speed.
    bytes: u64,
    journal: u64,
    manifest: u64,
}

/// The largest size of the segments of a store that never has many records between two flushes.
const JOURNAL_BYTES: u64 = 16 << 20;

impl Footprint {
    fn of(path: &Path) -> Self {
        let mut here = Self::default();
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            // A file that is deleted in the meantime counts as nothing.
            let Ok(metadata) = entry.metadata() else { continue };
            let name = entry.file_name().to_string_lossy().into_owned();
            if metadata.is_dir() && matches!(name.as_str(), "journal" | "filters") {
                let apart = Self::of(&entry.path());
                here.files += apart.files;
                here.journal += if name == "journal" { apart.bytes } else { 0 };
                continue;
            }
            if metadata.is_dir() {
                here = here.plus(Self::of(&entry.path()));
                continue;
            }
            let is_manifest = name.starts_with("MANIFEST-");
            here = here.plus(Self {
                files: 1,
                tables: usize::from(name.ends_with(".sst")),
                bytes: metadata.len(),
                journal: 0,
                manifest: if is_manifest { metadata.len() } else { 0 },
            });
        }
        here
    }

    fn plus(self, other: Self) -> Self {
        Self {
            files: self.files + other.files,
            tables: self.tables + other.tables,
            bytes: self.bytes + other.bytes,
            journal: self.journal + other.journal,
            manifest: self.manifest + other.manifest,
        }
    }

    /// The maximum of each value.
    fn or(self, other: Self) -> Self {
        Self {
            files: self.files.max(other.files),
            tables: self.tables.max(other.tables),
            bytes: self.bytes.max(other.bytes),
            journal: self.journal.max(other.journal),
            manifest: self.manifest.max(other.manifest),
        }
    }

    /// Fails if it is more than `before`, with a margin for the SSTs of compactions.
    fn assert_no_more_than(self, before: Self) {
        // An open that finds more than 32 segments flushes.
        assert!(self.files <= before.files + 8 + 34, "{self:?} after {before:?}");
        assert!(self.journal <= JOURNAL_BYTES, "{self:?} after {before:?}");
        assert!(self.tables <= before.tables + 8, "{self:?} after {before:?}");
        assert!(self.bytes <= before.bytes + before.bytes / 4 + 100_000, "{self:?} after {before:?}");
        assert!(self.manifest <= 2 * before.manifest + 4_096, "{self:?} after {before:?}");
    }
}

/// A directory in memory, if there is one.
fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// A store that is opened repeatedly.
struct Cron {
    dir: TempDir,
    clock: ManualClock,
    window: Duration,
    bucket: Duration,
    runs: u64,
}

impl Cron {
    fn new(window: Duration, bucket: Duration) -> Self {
        Self { dir: scratch(), clock: ManualClock::at(Timestamp::from_unix_ms(START_MS)), window, bucket, runs: 0 }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn builder(&self) -> Builder {
        let durability = if self.runs.is_multiple_of(2) { Durability::Disk } else { Durability::Process };
        Store::builder()
            .window(self.window)
            .bucket(self.bucket)
            .durability(durability)
            .memory_budget(32 << 20)
            // A process that another test starts holds the lock until it executes its program.
            .lock_wait(Duration::from_secs(10))
            .clock(self.clock.clone())
    }

    /// Runs a short process, and returns the disk usage after it.
    fn run(&mut self, work: impl FnOnce(&Store, u64)) -> Footprint {
        let store = self.builder().open(self.path()).unwrap();
        work(&store, self.runs);
        store.close().wait().unwrap();
        self.runs += 1;
        Footprint::of(&self.path())
    }

    /// As [`Cron::run`], but the process is killed before it closes the store.
    fn run_and_kill(&mut self, work: impl FnOnce(&Store, u64)) -> Footprint {
        let store = self.builder().open(self.path()).unwrap();
        work(&store, self.runs);
        let left = self.dir.path().join("left");
        copy_store(&self.path(), &left);
        store.close().wait().unwrap();
        fs::remove_dir_all(self.path()).unwrap();
        fs::rename(left, self.path()).unwrap();
        self.runs += 1;
        Footprint::of(&self.path())
    }
}

/// The median duration of three opens.
fn open_time(builder: &impl Fn() -> Builder, path: &Path) -> Duration {
    let mut times = [(); 3].map(|()| {
        let begun = Instant::now();
        let store = builder().open(path).unwrap();
        let time = begun.elapsed();
        store.close().wait().unwrap();
        time
    });
    times.sort_unstable();
    times[1]
}

#[test]
fn after_two_thousand_opens_a_store_is_small_and_opens_fast() {
    let mut cron = Cron::new(60 * MINUTE, 10 * MINUTE);
    let early_copy = cron.dir.path().join("early");
    let mut early_clock = None;
    let (mut early, mut late) = (Footprint::default(), Footprint::default());
    for run in 0..2_000 {
        let left = cron.run(|store, run| {
            assert_eq!(store.record(format!("job {run}")).wait().unwrap(), RecordOutcome::First);
            if run > 0 {
                let again = store.record(format!("job {}", run - 1)).wait().unwrap();
                assert_eq!(again, RecordOutcome::Duplicate { in_flight: false });
            }
        });
        cron.clock.advance(Duration::from_secs(20));
        match run {
            300..600 => early = early.or(left),
            1_700.. => late = late.or(left),
            _ => {}
        }
        if run == 619 {
            // As far into a bucket as the last process.
            copy_store(&cron.path(), &early_copy);
            early_clock = Some(ManualClock::at(Timestamp::from_unix_ms(START_MS + (run + 1) * 20_000)));
        }
    }
    late.assert_no_more_than(early);
    assert!(late.files < 100 && late.manifest < 50_000, "{late:?}");
    // On the clock of its time, or its buckets would have expired.
    let (late_builder, early_clock) = (|| cron.builder(), early_clock.unwrap());
    let early_builder = || cron.builder().clock(early_clock.clone());
    // Each open leaves a segment to the next ones, until one of them flushes: both begin with none.
    let flush = |builder: Builder, path: &Path| {
        let store = builder.open(path).unwrap();
        store.flush().unwrap();
        store.close().wait().unwrap();
        Footprint::of(path).tables
    };
    let tables = [flush(late_builder(), &cron.path()), flush(early_builder(), &early_copy)];
    assert!(tables[0].abs_diff(tables[1]) <= 2 && tables[1] >= 6, "not as many live buckets: {tables:?}");
    let mut slower = Vec::new();
    // Alternating, so that other load on the machine counts for both.
    for _ in 0..9 {
        let (late, early) = (open_time(&late_builder, &cron.path()), open_time(&early_builder, &early_copy));
        slower.push(late.as_secs_f64() / early.as_secs_f64());
    }
    slower.sort_unstable_by(f64::total_cmp);
    assert!(slower[4] < 1.6, "an open is slower by these factors: {slower:?}");
}

#[test]
fn keys_of_short_processes_are_flushed_and_expire() {
    let mut cron = Cron::new(MINUTE, Duration::from_secs(2));
    let mut most = Footprint::default();
    for _ in 0..112 {
        most = most.or(cron.run(|store, run| {
            store.record(format!("line {run}")).wait().unwrap();
        }));
        cron.clock.advance(Duration::from_millis(1_300));
    }
    cron.run(|store, runs| {
        let live = MINUTE.as_millis() as u64 / 1_300;
        let stats = store.stats();
        assert!(stats.unflushed <= 2, "{} keys are unflushed", stats.unflushed);
        let kept: u64 = stats.buckets.iter().map(|bucket| bucket.keys).sum();
        assert!((live - 2..live + 6).contains(&kept), "{kept} of {runs} keys are stored, {live} are within the window");
        let is_known = |run: u64| matches!(store.check(format!("line {run}")).wait().unwrap(), KeyStatus::Completed(_));
        assert!(is_known(runs - 1) && is_known(runs - live) && !is_known(runs - live - 2));
    });
    cron.clock.advance(2 * MINUTE);
    cron.run(|store, runs| {
        let stats = store.stats();
        assert_eq!((stats.unflushed, stats.buckets.len()), (0, 0), "a minute after the last window");
        for run in 0..runs {
            assert!(matches!(store.check(format!("line {run}")).wait().unwrap(), KeyStatus::New));
        }
    });
    // The next process removes the options file and the manifest of the one that dropped the buckets.
    let left = cron.run(|_, _| {});
    let fresh = Cron::new(MINUTE, Duration::from_secs(2)).run(|_, _| {});
    assert!(most.files < 80, "{most:?}");
    left.assert_no_more_than(fresh);
}

#[test]
fn killed_processes_leave_no_more_files_than_others() {
    let mut cron = Cron::new(MINUTE, Duration::from_secs(10));
    let (mut early, mut late) = (Footprint::default(), Footprint::default());
    for run in 0..240 {
        let left = cron.run_and_kill(|store, run| {
            store.record(format!("done {run}")).wait().unwrap();
            let Claim::Acquired(lease) = store.claim(format!("begun {run}")).wait().unwrap() else {
                panic!("the key is new")
            };
            // The process is killed while it works.
            std::mem::drop(lease);
        });
        cron.clock.advance(Duration::from_secs(3));
        match run {
            40..120 => early = early.or(left),
            160.. => late = late.or(left),
            _ => {}
        }
    }
    late.assert_no_more_than(early);
    // A crash is remembered for a window after the open that detects it.
    for _ in 0..2 {
        cron.clock.advance(3 * MINUTE);
        cron.run(|_, _| {});
    }
    cron.run(|store, _| {
        let stats = store.stats();
        assert_eq!((stats.in_flight, stats.unflushed, stats.buckets.len()), (0, 0, 0), "all keys have expired");
    });
}

#[test]
fn forgotten_keys_leave_no_data_after_short_or_long_processes() {
    let mut cron = Cron::new(60 * 24 * MINUTE, 60 * MINUTE);
    cron.run(|store, _| {
        let keys = (0..2_000).map(|i| format!("key {i}"));
        assert!(store.record_batch(keys).wait().unwrap().iter().all(Result::is_ok));
        store.flush().unwrap();
    });
    let (mut early, mut late) = (Footprint::default(), Footprint::default());
    for run in 0..200 {
        let left = cron.run(|store, run| assert!(store.forget(format!("key {run}")).wait().unwrap()));
        if run < 60 {
            early = early.or(left);
        } else {
            late = late.or(left);
        }
    }
    late.assert_no_more_than(early);
    let (clock, path) = (cron.clock.clone(), cron.path());
    let left = cron.run(|store, run| {
        for i in run..2_000 {
            assert!(store.forget(format!("key {i}")).wait().unwrap());
            if i % 50 == 0 {
                store.flush().unwrap();
            }
        }
        // The SSTs of a bucket are merged when it has ended. Before that there may be as many as one merge takes.
        clock.advance(60 * MINUTE);
        let deadline = Instant::now() + Duration::from_secs(60);
        while Footprint::of(&path).tables > early.tables + 8 {
            assert!(Instant::now() < deadline, "{:?}", Footprint::of(&path));
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    // The next open writes a new manifest.
    Footprint { manifest: 0, ..left }.assert_no_more_than(early);
    cron.run(|store, _| assert!(matches!(store.check("key 7").wait().unwrap(), KeyStatus::New)));
}

#[test]
fn expired_buckets_and_idle_hours_leave_no_data_in_a_long_process() {
    let mut cron = Cron::new(Duration::from_secs(4), Duration::from_secs(1));
    let (clock, path) = (cron.clock.clone(), cron.path());
    let (mut early, mut late) = (Footprint::default(), Footprint::default());
    cron.run(|store, _| {
        for second in 0..600 {
            store.record(format!("second {second}")).wait().unwrap();
            clock.advance(Duration::from_secs(1));
            store.flush().unwrap();
            assert!(store.stats().buckets.len() <= 7);
            let here = Footprint::of(&path);
            match second {
                50..150 => early = early.or(here),
                500.. => late = late.or(here),
                _ => {}
            }
        }
        assert!(late.files <= early.files + 8 && late.bytes <= early.bytes + 600_000, "{late:?} after {early:?}");
        assert!(late.manifest < 400_000, "{late:?}");
        let rested = late;
        for _ in 0..200 {
            clock.advance(60 * MINUTE);
            store.flush().unwrap();
        }
        let idle = Footprint::of(&path);
        assert!(idle.files <= rested.files && idle.bytes <= rested.bytes, "{idle:?} after {rested:?}");
        assert_eq!(store.stats().buckets.len(), 0);
    });
}

#[test]
fn unused_segments_take_no_more_than_their_option() {
    let used = |spare: u64| {
        let dir = scratch();
        let builder = Store::builder().durability(Durability::Process).spare_segments(spare);
        let store = builder.open(dir.path().join("store")).unwrap();
        let most = (0..3)
            .map(|round| {
                for batch in 0..120 {
                    let keys: Vec<_> =
                        (0..512).map(|key| format!("{round} {batch} {key} {}", "-".repeat(100))).collect();
                    store.record_batch(&keys).wait().unwrap();
                }
                store.flush().unwrap();
                store.stats().journal_disk_bytes
            })
            .max()
            .unwrap();
        store.close().wait().unwrap();
        most
    };
    let (none, default) = (used(0), used(64 << 20));
    // Two or three unused segments, and two in use, of 1 MiB each.
    assert!(none <= 5 << 20, "{none}");
    // More than 8 MB were written between two flushes.
    assert!((8 << 20..72 << 20).contains(&default), "{default}");
}

#[test]
fn an_open_and_a_close_use_no_tokens() {
    let mut cron = Cron::new(60 * MINUTE, 10 * MINUTE);
    let mut last = 0;
    for _ in 0..20 {
        cron.run(|store, run| {
            let Claim::Acquired(lease) = store.claim(format!("job {run}")).wait().unwrap() else {
                panic!("the key is new")
            };
            assert!(lease.token().get() > last, "tokens increase over restarts");
            last = lease.token().get();
            lease.complete("done").wait().unwrap();
        });
    }
    assert!(last < 1_000, "20 leases used tokens up to {last}");
    // A killed process returns no reserved tokens.
    cron.run_and_kill(|store, _| {
        let Claim::Acquired(lease) = store.claim("the last job").wait().unwrap() else { panic!("the key is new") };
        last = lease.token().get();
    });
    cron.run(|store, _| {
        let Claim::Acquired(lease) = store.claim("the last job").wait().unwrap() else {
            panic!("the key was not completed")
        };
        assert!(lease.token().get() > last);
    });
}
