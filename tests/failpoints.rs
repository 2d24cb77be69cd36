//! SIGKILL at failpoints, which are between any two steps that a crash can separate (`src/testing/failpoint.rs`). A
//! child works until it reaches a failpoint for the n-th time; sometimes the next child is killed at a failpoint of the
//! open. The store must agree with the children's reports, and no file may be left over.
//!
//! `ONLYONCE_FAILPOINTS_ROUNDS` (default: 1) sets the rounds, each over all failpoints, `ONLYONCE_FAILPOINTS_SEED`
//! (default: random, and printed) the seed, and `ONLYONCE_FAILPOINTS_ONLY` selects one failpoint.

#[path = "common/torture.rs"]
mod torture;

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use onlyonce::internals::Failpoint;
use onlyonce::{Durability, ManualClock, Store, Timestamp};
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};
use torture::{ChildOptions, Oracle, REOPENS, command, number, open, start};

/// The failpoints of a store's creation. Later there is a spare segment most of the time.
const CREATION: [Failpoint; 4] =
    [Failpoint::SegmentBegun, Failpoint::SegmentCreated, Failpoint::StoreCreated, Failpoint::StorePlaced];
/// The failpoints of every open.
const OPENING: [Failpoint; 5] = [
    Failpoint::OpenChecked,
    Failpoint::OpenDatabase,
    Failpoint::OpenReplayed,
    Failpoint::OpenOptionsWritten,
    Failpoint::OpenTokensReserved,
];

/// The time limit for a child to reach its failpoint.
const PATIENCE: Duration = Duration::from_secs(120);
/// The time limit for a store to remove leftovers.
const QUIET: Duration = Duration::from_secs(20);

/// The process that is killed. Only the test below runs it.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    torture::child();
}

/// The largest n for a failpoint: small for rare ones, which would take too long.
fn max_times(point: Failpoint) -> u64 {
    let name = format!("{point:?}");
    match name.as_str() {
        _ if CREATION.contains(&point) => 1,
        _ if name.starts_with("Open") || name.starts_with("Close") || name == "FilterLoaded" => 2,
        _ if name.starts_with("Filter") => 5,
        _ if name.starts_with("Bucket") => 10,
        _ => 40,
    }
}

/// A store that is killed repeatedly, and its expected state.
struct Victim {
    dir: tempfile::TempDir,
    oracle: Oracle,
    children: u64,
}

impl Victim {
    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Runs a child until it reaches a failpoint for the n-th time.
    fn kill_at(&mut self, point: Failpoint, times: u64, durability: Durability, rng: &mut StdRng) {
        let aim = format!("{point:?}:{times}");
        let errors = self.dir.path().join("errors");
        let options = ChildOptions { durability, ..ChildOptions::default() };
        let mut command = command(&self.path(), options, self.oracle.clock_ms, rng.random(), self.children);
        let (mut child, listener) = start(
            command
                .env(REOPENS, "1")
                .env("ONLYONCE_FAILPOINT", &aim)
                .env("RUST_BACKTRACE", "0")
                .stderr(File::create(&errors).unwrap()),
            || 0,
        );
        self.children += 1;
        let begun = Instant::now();
        let ended = loop {
            match child.try_wait().unwrap() {
                Some(ended) => break ended,
                None if begun.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(2)),
                None => {
                    child.kill().unwrap();
                    child.wait().unwrap();
                    panic!("{aim} was not reached in {PATIENCE:?}");
                }
            }
        };
        let stderr_text = fs::read_to_string(&errors).unwrap();
        assert_eq!(ended.signal(), Some(9), "{aim}: the child ended by itself: {ended}\n{stderr_text}");
        self.oracle.apply_all(&listener.all(), usize::MAX);
    }

    /// Opens the store and checks every key; then no unneeded file may be left.
    fn check(&mut self, durability: Durability, quietly: bool) {
        let clock = ManualClock::at(Timestamp::from_unix_ms(self.oracle.clock_ms));
        let store = open(&self.path(), &clock, durability).unwrap();
        self.oracle.check(&store);
        if quietly {
            store.flush().unwrap();
            let begun = Instant::now();
            loop {
                let left = leftovers(&store, &self.path());
                if left.is_empty() {
                    break;
                }
                assert!(begun.elapsed() < QUIET, "left over: {left:?}");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        store.close().wait().unwrap();
    }
}

/// Files and column families that the store does not need.
fn leftovers(store: &Store, path: &Path) -> Vec<String> {
    let names = |dir: &str| -> Vec<String> {
        let entries = fs::read_dir(path.join(dir)).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    let live: Vec<String> = store
        .stats()
        .buckets
        .iter()
        .map(|bucket| {
            format!("bucket-{}-{}", bucket.start.as_unix_ms(), bucket.end.as_unix_ms() - bucket.start.as_unix_ms())
        })
        .collect();
    let database = path.join("db");
    // A second reader of the database sees its manifest; a compaction can delete an SST before the reader opens it.
    let scratch = tempfile::tempdir().unwrap();
    let mut options = rocksdb::Options::default();
    options.set_db_log_dir(scratch.path());
    let families = rocksdb::DB::list_cf(&options, &database).unwrap();
    let reader = match rocksdb::DB::open_cf_for_read_only(&options, &database, &families, false) {
        Ok(reader) => reader,
        Err(error) => return vec![error.to_string()],
    };
    let tables: Vec<String> =
        reader.live_files().unwrap().into_iter().map(|file| file.name.trim_start_matches('/').to_owned()).collect();

    let ours = ["onlyonce.lock", "journal", "db", "ssts", "filters"];
    let mut left: Vec<String> = names("").into_iter().filter(|name| !ours.contains(&name.as_str())).collect();
    left.extend(names("ssts"));
    left.extend(names("journal").into_iter().filter(|name| !name.ends_with(".journal")));
    left.extend(
        names("filters")
            .into_iter()
            .filter(|name| name.strip_suffix(".filter").is_none_or(|bucket| !live.iter().any(|live| live == bucket))),
    );
    left.extend(families.into_iter().filter(|name| name != "default" && name != "meta" && !live.contains(name)));
    let tables = |name: &String| name.ends_with(".dbtmp") || (name.ends_with(".sst") && !tables.contains(name));
    left.extend(names("db").into_iter().filter(tables));
    left
}

#[test]
fn a_store_is_correct_and_has_no_leftovers_after_a_kill_at_any_failpoint() {
    let rounds = number("ONLYONCE_FAILPOINTS_ROUNDS").unwrap_or(1);
    let seed = number("ONLYONCE_FAILPOINTS_SEED").unwrap_or_else(|| rand::rng().random());
    let only = std::env::var("ONLYONCE_FAILPOINTS_ONLY").ok();
    eprintln!("ONLYONCE_FAILPOINTS_SEED={seed} ONLYONCE_FAILPOINTS_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut kills, mut again, mut acknowledged) = (0, 0, 0);
    for _ in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let mut victim = Victim { dir, oracle: Oracle::new(), children: 0 };
        let mut points: Vec<Failpoint> =
            Failpoint::ALL.iter().filter(|point| !CREATION.contains(point)).copied().collect();
        points.shuffle(&mut rng);
        for point in CREATION.into_iter().chain(points) {
            if only.as_ref().is_some_and(|only| *only != format!("{point:?}")) {
                continue;
            }
            let name = format!("{point:?}");
            let syncs = name.starts_with("Sync") || rng.random_bool(0.3);
            let durability = if syncs { Durability::Disk } else { Durability::Process };
            let times = rng.random_range(1..=max_times(point));
            victim.kill_at(point, times, durability, &mut rng);
            kills += 1;
            // The next child must reach the failpoints of the creation, so that the store is not opened in between.
            if CREATION.contains(&point) {
                continue;
            }
            if rng.random_bool(0.3) {
                let opening = *OPENING.choose(&mut rng).unwrap();
                victim.kill_at(opening, 1, durability, &mut rng);
                (kills, again) = (kills + 1, again + 1);
            }
            victim.check(durability, rng.random_bool(0.3));
        }
        victim.check(Durability::Process, true);
        acknowledged += victim.oracle.acknowledged;
    }
    eprintln!(
        "{kills} kills at {} moments, {again} of them at the opening that followed one, {acknowledged} completions \
         acknowledged",
        Failpoint::ALL.len()
    );
    assert!(only.is_some() || acknowledged > 25 * kills, "too few completions were acknowledged");
}
