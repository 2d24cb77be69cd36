//! SIGKILL at named moments: between any two steps that a crash must not tear apart (`src/testing/failpoint.rs`). A child works,
//! passes the moment for the n-th time and is gone; sometimes the next one dies at a moment of the opening that follows. What
//! was said before must hold, and nothing may be left over.
//!
//! `ONLYONCE_FAILPOINTS_ROUNDS` (default 1) sets how often each moment is tried, `ONLYONCE_FAILPOINTS_SEED` (default: drawn,
//! and printed) how, `ONLYONCE_FAILPOINTS_ONLY` names a single one.

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
use torture::{Life, Oracle, WHOLE_LIFE, command, number, open, start};

/// What a new store passes, once.
const CREATION: [Failpoint; 2] = [Failpoint::StoreCreated, Failpoint::StorePlaced];
/// What every opening passes, once.
const OPENING: [Failpoint; 5] = [
    Failpoint::OpenChecked,
    Failpoint::OpenDatabase,
    Failpoint::OpenReplayed,
    Failpoint::OpenOptionsWritten,
    Failpoint::OpenTokensReserved,
];

/// How long a child may take to get to its moment.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a store may take to tidy up.
const QUIET: Duration = Duration::from_secs(20);

/// The process that is killed. Run by the test below, never by itself.
#[test]
#[ignore = "run by the test that kills it"]
fn child() {
    torture::child();
}

/// How often a moment may have to be passed before the kill: what is rare is not waited for long.
fn most_times(point: Failpoint) -> u64 {
    let name = format!("{point:?}");
    match name.as_str() {
        _ if CREATION.contains(&point) => 1,
        _ if name.starts_with("Open") || name.starts_with("Close") || name == "FilterLoaded" => 2,
        _ if name.starts_with("Filter") => 5,
        _ if name.starts_with("Bucket") => 10,
        _ => 40,
    }
}

/// A store that is killed over and over, and what is known of it.
struct Victim {
    dir: tempfile::TempDir,
    oracle: Oracle,
    children: u64,
}

impl Victim {
    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Has a child work until it passes a moment for the n-th time.
    fn kill_at(&mut self, point: Failpoint, times: u64, durability: Durability, rng: &mut StdRng) {
        let aim = format!("{point:?}:{times}");
        let errors = self.dir.path().join("errors");
        let life = Life { durability, ..Life::default() };
        let mut command = command(&self.path(), life, self.oracle.clock_ms, rng.random(), self.children);
        let (mut child, listener) = start(
            command
                .env(WHOLE_LIFE, "1")
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
                    panic!("{aim} was not passed in {PATIENCE:?}");
                }
            }
        };
        let said = fs::read_to_string(&errors).unwrap();
        assert_eq!(ended.signal(), Some(9), "{aim}: the child ended by itself: {ended}\n{said}");
        self.oracle.hear_all(&listener.all(), usize::MAX);
    }

    /// Opens the store and asks for every key; then nothing may be left that the store does not need.
    fn check(&mut self, durability: Durability, quietly: bool) {
        let clock = ManualClock::at(Timestamp::from_unix_ms(self.oracle.clock_ms));
        let store = open(&self.path(), &clock, durability).unwrap();
        self.oracle.check(&store);
        if quietly {
            store.flush().unwrap();
            let begun = Instant::now();
            loop {
                let left = left_over(&store, &self.path());
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

/// Files and column families that belong to nothing.
fn left_over(store: &Store, path: &Path) -> Vec<String> {
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
    // A reader beside the store sees what is in the manifest; while runs are merged, it may be too late for one of them.
    let scratch = tempfile::tempdir().unwrap();
    let mut options = rocksdb::Options::default();
    options.set_db_log_dir(scratch.path());
    // Else RocksDB would note that it does not track them, and a reader has nothing to note it in: it ends with SIGSEGV.
    options.set_track_and_verify_wals_in_manifest(true);
    let families = rocksdb::DB::list_cf(&options, &database).unwrap();
    let reader = match rocksdb::DB::open_cf_for_read_only(&options, &database, &families, false) {
        Ok(reader) => reader,
        Err(error) => return vec![error.to_string()],
    };
    let tables: Vec<String> =
        reader.live_files().unwrap().into_iter().map(|file| file.name.trim_start_matches('/').to_owned()).collect();

    let ours = ["onlyonce.lock", "onlyonce.files", "db", "runs", "filters"];
    let mut left: Vec<String> = names("").into_iter().filter(|name| !ours.contains(&name.as_str())).collect();
    left.extend(names("runs"));
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
fn a_process_killed_between_any_two_steps_leaves_a_store_that_keeps_its_word_and_nothing_else() {
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
            let times = rng.random_range(1..=most_times(point));
            victim.kill_at(point, times, durability, &mut rng);
            kills += 1;
            // What creates a store is passed in the next life, unless somebody has opened it meanwhile.
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
    assert!(only.is_some() || acknowledged > 25 * kills, "too little was at stake");
}
