//! Clocks that misbehave: a wall clock that is wrong for a moment, for an hour or forever, a machine that is suspended,
//! paused, rebooted or booted with a wrong clock, and processes that run for a second. The store's time runs on elapsed
//! time; a step of the wall clock counts once its readings confirm it for 10 minutes. Leases follow the monotonic clock
//! alone.
//!
//! `ONLYONCE_CLOCK_ROUNDS` (default: 25) sets the number of random walks, and `ONLYONCE_CLOCK_SEED` (default: random,
//! and printed) their seed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::{START_MS, copy_store};
use onlyonce::{BootTime, Claim, Clock, Durability, KeyStatus, Lease, PriorAttempt, Store, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const SECOND_MS: u64 = 1_000;
const MINUTE_MS: u64 = 60 * SECOND_MS;
const HOUR_MS: u64 = 60 * MINUTE_MS;
const DAY_MS: u64 = 24 * HOUR_MS;
const YEAR_MS: u64 = 366 * DAY_MS;
const LEASE_MS: u64 = SECOND_MS;
/// Longer than a completion can wait for the disk when the clock steps.
const A_MOMENT_MS: u64 = 2_000;
/// How long all readings of the wall clock must agree before a step counts.
const CONFIRMED_AFTER_MS: u64 = 10 * MINUTE_MS;
/// The steps that count at once, in total per `CONFIRMED_AFTER_MS`.
const TOLERANCE_MS: u64 = SECOND_MS;
const IN_2099_MS: u64 = 4_080_000_000_000;

/// Independent clocks. A thread of the store can see each change without the others.
#[derive(Clone)]
struct Clocks(Arc<Inner>);

struct Inner {
    wall_ms: AtomicU64,
    monotonic_ms: AtomicU64,
    asleep_ms: AtomicU64,
    /// 0 if no clock runs across processes.
    boot: AtomicU64,
}

impl Clock for Clocks {
    fn wall(&self) -> Timestamp {
        Timestamp::from_unix_ms(self.0.wall_ms.load(Ordering::SeqCst))
    }

    fn monotonic_ms(&self) -> u64 {
        self.0.monotonic_ms.load(Ordering::SeqCst)
    }

    fn boot(&self) -> Option<BootTime> {
        let boot = self.0.boot.load(Ordering::SeqCst);
        let ms = self.0.asleep_ms.load(Ordering::SeqCst) + self.monotonic_ms();
        (boot > 0).then(|| BootTime { id: u128::from(boot).to_le_bytes(), ms })
    }
}

impl Clocks {
    fn new() -> Self {
        Self(Arc::new(Inner {
            wall_ms: AtomicU64::new(START_MS),
            monotonic_ms: AtomicU64::new(5_000),
            asleep_ms: AtomicU64::new(0),
            boot: AtomicU64::new(1),
        }))
    }

    fn without_a_boot_clock() -> Self {
        let clocks = Self::new();
        clocks.0.boot.store(0, Ordering::SeqCst);
        clocks
    }

    fn wall_ms(&self) -> u64 {
        self.wall().as_unix_ms()
    }

    fn set_wall(&self, ms: u64) {
        self.0.wall_ms.store(ms, Ordering::SeqCst);
    }

    /// Advances the monotonic clock alone.
    fn run_on(&self, ms: u64) {
        self.0.monotonic_ms.fetch_add(ms, Ordering::SeqCst);
    }

    /// Advances all clocks, as correct clocks do.
    fn pass(&self, ms: u64) {
        self.run_on(ms);
        self.set_wall(self.wall_ms() + ms);
    }

    /// Advances the boot clock alone: the machine is suspended, and its monotonic clock stops.
    fn sleep(&self, ms: u64) {
        self.0.asleep_ms.fetch_add(ms, Ordering::SeqCst);
    }

    fn suspend(&self, ms: u64) {
        self.sleep(ms);
        self.set_wall(self.wall_ms() + ms);
    }

    /// Advances the wall clock alone: the machine is paused by its host.
    fn pause(&self, ms: u64) {
        self.set_wall(self.wall_ms() + ms);
    }

    /// The machine is switched off, and on again after `ms`.
    fn reboot_after(&self, ms: u64) {
        if self.0.boot.load(Ordering::SeqCst) > 0 {
            self.0.boot.fetch_add(1, Ordering::SeqCst);
        }
        self.set_wall(self.wall_ms() + ms);
    }

    fn open(&self, path: &Path, window_ms: u64) -> Store {
        Store::builder()
            .window(Duration::from_millis(window_ms))
            .bucket(Duration::from_millis(window_ms / 10))
            .lease(Duration::from_millis(LEASE_MS))
            .memory_budget(32 << 20)
            .durability(Durability::Process)
            .clock(self.clone())
            .open(path)
            .unwrap()
    }
}

/// A store and its clocks.
struct Bench {
    // Before the directory, so that it is dropped first.
    store: Store,
    clocks: Clocks,
    window_ms: u64,
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(clocks: Clocks, window_ms: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = clocks.open(&dir.path().join("store"), window_ms);
        Self { store, clocks, window_ms, dir }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("store")
    }

    fn reopen(&mut self) {
        self.reopen_after(|_| ());
    }

    fn reopen_after(&mut self, closed: impl FnOnce(&Clocks)) {
        self.store.close().wait().unwrap();
        closed(&self.clocks);
        self.store = self.clocks.open(&self.path(), self.window_ms);
    }

    /// Opens a copy of the store's directory as a crash leaves it.
    fn crash(&self) -> Self {
        self.crash_after(|_| ())
    }

    fn crash_after(&self, crashed: impl FnOnce(&Clocks)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_store(&self.path(), &dir.path().join("store"));
        crashed(&self.clocks);
        let store = self.clocks.open(&dir.path().join("store"), self.window_ms);
        Self { store, clocks: self.clocks.clone(), window_ms: self.window_ms, dir }
    }

    fn now_ms(&self) -> u64 {
        self.store.stats().now.as_unix_ms()
    }

    fn record(&self, key: &str) {
        self.store.record(key).wait().unwrap();
    }

    fn knows(&self, key: &str) -> bool {
        matches!(self.store.check(key).wait().unwrap(), KeyStatus::Completed(_))
    }

    /// Advances all clocks; the store reads them each minute.
    fn live(&self, ms: u64) {
        self.each_minute(ms, |clocks, ms| clocks.pass(ms));
    }

    /// As `live`, with a wall clock that is stopped.
    fn live_with_a_stopped_clock(&self, ms: u64) {
        self.each_minute(ms, |clocks, ms| clocks.run_on(ms));
    }

    fn each_minute(&self, ms: u64, pass: impl Fn(&Clocks, u64)) {
        self.now_ms();
        for passed_ms in (0..ms).step_by(MINUTE_MS as usize) {
            pass(&self.clocks, MINUTE_MS.min(ms - passed_ms));
            self.now_ms();
        }
    }
}

fn acquire(store: &Store, key: &str) -> Lease {
    match store.claim(key).wait().unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{key} should be unclaimed, but is {other:?}"),
    }
}

fn retry_after_ms(store: &Store, key: &str) -> u128 {
    match store.claim(key).wait().unwrap() {
        Claim::InProgress(other) => other.retry_after.unwrap().as_millis(),
        other => panic!("{key} should be in progress, but is {other:?}"),
    }
}

#[test]
fn a_step_of_the_wall_clock_ends_no_lease_and_lengthens_none() {
    let bench = Bench::new(Clocks::new(), 10 * SECOND_MS);
    let (store, clocks) = (&bench.store, &bench.clocks);
    let lease = acquire(store, "k");
    for wall_ms in [START_MS + DAY_MS, START_MS - DAY_MS, START_MS + YEAR_MS, START_MS - YEAR_MS, 0] {
        clocks.set_wall(wall_ms);
        assert_eq!(retry_after_ms(store, "k"), u128::from(LEASE_MS), "at {wall_ms}");
        store.flush().unwrap();
    }
    clocks.run_on(LEASE_MS - 1);
    assert_eq!(retry_after_ms(store, "k"), 1);
    clocks.run_on(1);
    let second = acquire(store, "k");
    assert_eq!((second.attempt().number(), second.attempt().prior()), (2, Some(PriorAttempt::LeaseExpired)));
    assert!(lease.complete("late").wait().is_err());
    second.complete("r").wait().unwrap();
}

#[test]
fn a_step_of_the_wall_clock_ends_no_backoff_and_lengthens_none() {
    let bench = Bench::new(Clocks::new(), 10 * SECOND_MS);
    let (store, clocks) = (&bench.store, &bench.clocks);
    acquire(store, "k").release().after(Duration::from_secs(5)).wait().unwrap();
    for wall_ms in [START_MS + HOUR_MS, IN_2099_MS, START_MS - DAY_MS, START_MS] {
        clocks.set_wall(wall_ms);
        assert_eq!(retry_after_ms(store, "k"), 5_000, "at {wall_ms}");
    }
    clocks.run_on(4_999);
    assert_eq!(retry_after_ms(store, "k"), 1);
    clocks.run_on(1);
    assert_eq!(acquire(store, "k").attempt().prior(), Some(PriorAttempt::Released));
}

#[test]
fn one_reading_in_2099_expires_no_key_and_has_no_later_effect() {
    for restarted in [false, true] {
        let mut bench = Bench::new(Clocks::new(), HOUR_MS);
        bench.record("flushed");
        bench.store.flush().unwrap();
        bench.record("young");
        let buckets = bench.store.stats().buckets.len();
        bench.clocks.set_wall(IN_2099_MS);
        assert!(bench.knows("flushed") && bench.knows("young"));
        bench.record("in 2099");
        bench.store.flush().unwrap();
        if restarted {
            bench.reopen();
        }
        bench.clocks.set_wall(START_MS);
        for key in ["flushed", "young", "in 2099"] {
            assert!(bench.knows(key), "{key}, restarted: {restarted}");
        }
        assert_eq!((bench.now_ms(), bench.store.stats().buckets.len()), (START_MS, buckets));
        bench.reopen();
        bench.live(HOUR_MS - 1);
        assert!(["flushed", "young", "in 2099"].iter().all(|key| bench.knows(key)));
        bench.live(1);
        assert!(!["flushed", "young", "in 2099"].iter().any(|key| bench.knows(key)), "the keys expire as time passes");
        bench.live(HOUR_MS / 10);
        bench.store.flush().unwrap();
        assert_eq!(
            bench.store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>(),
            0,
            "no key is left on disk"
        );
    }
}

#[test]
fn a_clock_that_is_an_hour_ahead_for_a_moment_does_not_move_the_time() {
    let bench = Bench::new(Clocks::new(), 10 * MINUTE_MS);
    bench.record("k");
    bench.clocks.set_wall(START_MS + HOUR_MS);
    bench.live(CONFIRMED_AFTER_MS - 1);
    assert_eq!(bench.now_ms(), START_MS + CONFIRMED_AFTER_MS - 1);
    assert!(bench.knows("k"));
    bench.record("an hour ahead");
    bench.clocks.set_wall(START_MS + CONFIRMED_AFTER_MS - 1);
    assert_eq!(bench.now_ms(), START_MS + CONFIRMED_AFTER_MS - 1);
    bench.live(1);
    assert!(!bench.knows("k"), "its window has ended");
    bench.live(CONFIRMED_AFTER_MS - 2);
    assert!(bench.knows("an hour ahead"));
    bench.live(1);
    assert!(!bench.knows("an hour ahead"), "its window does not end an hour later");
}

#[test]
fn a_stopped_wall_clock_does_not_stop_the_time() {
    let bench = Bench::new(Clocks::new(), 10 * MINUTE_MS);
    for round in 0..20 {
        let key = format!("k{round}");
        bench.record(&key);
        bench.live_with_a_stopped_clock(10 * MINUTE_MS - 1);
        assert!(bench.knows(&key), "round {round}");
        bench.live_with_a_stopped_clock(1);
        assert!(!bench.knows(&key), "round {round}");
        bench.store.flush().unwrap();
        assert_eq!(bench.now_ms(), START_MS + (round + 1) * 10 * MINUTE_MS);
    }
    assert!(bench.store.stats().buckets.len() <= 13);
}

#[test]
fn steps_of_up_to_a_second_in_ten_minutes_count_at_once() {
    let bench = Bench::new(Clocks::new(), HOUR_MS);
    let ahead = |ms| {
        bench.clocks.set_wall(bench.clocks.wall_ms() + ms);
        bench.now_ms() - START_MS
    };
    assert_eq!((ahead(400), ahead(600)), (400, 1_000));
    assert_eq!(ahead(1), 1_000, "the second for these ten minutes is used");
    bench.clocks.set_wall(START_MS + 1_000);
    bench.live(CONFIRMED_AFTER_MS);
    assert_eq!(ahead(400), 1_400 + CONFIRMED_AFTER_MS);
    // A step back does not count at once.
    bench.clocks.set_wall(bench.clocks.wall_ms() - TOLERANCE_MS);
    bench.live(2 * CONFIRMED_AFTER_MS);
    assert_eq!(bench.now_ms(), START_MS + 1_400 + 3 * CONFIRMED_AFTER_MS);
}

#[test]
fn a_step_counts_once_all_readings_of_ten_minutes_agree() {
    let bench = Bench::new(Clocks::new(), HOUR_MS);
    bench.record("old");
    bench.store.flush().unwrap();
    bench.clocks.pause(YEAR_MS);
    bench.live(CONFIRMED_AFTER_MS - 1);
    assert!(bench.knows("old"));
    // One reading without the step restarts the ten minutes.
    bench.clocks.set_wall(bench.now_ms());
    bench.now_ms();
    bench.clocks.pause(YEAR_MS);
    bench.live(CONFIRMED_AFTER_MS - 1);
    assert!(bench.knows("old"));
    assert_eq!(bench.now_ms(), START_MS + 2 * CONFIRMED_AFTER_MS - 2);
    bench.live(1);
    assert!(!bench.knows("old"));
    assert_eq!(bench.now_ms(), START_MS + YEAR_MS + 2 * CONFIRMED_AFTER_MS - 1);
    bench.store.flush().unwrap();
    assert_eq!(bench.store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>(), 0);
}

#[test]
fn completions_before_a_pause_is_confirmed_are_remembered_for_their_window() {
    for (flushed, restarted, pause_ms) in
        [(false, false, 3 * DAY_MS), (true, false, 3 * DAY_MS), (true, true, 3 * DAY_MS), (true, true, 5 * MINUTE_MS)]
    {
        let mut bench = Bench::new(Clocks::without_a_boot_clock(), HOUR_MS);
        bench.record("before");
        bench.live(MINUTE_MS);
        bench.clocks.pause(pause_ms);
        // One key a second after the pause, and one just before the step counts.
        bench.live(SECOND_MS);
        bench.record("early");
        drop(acquire(&bench.store, "dropped"));
        bench.live(CONFIRMED_AFTER_MS - 2 * SECOND_MS);
        bench.record("late");
        if flushed {
            bench.store.flush().unwrap();
        }
        if restarted {
            bench.reopen();
        }
        bench.live(SECOND_MS);
        let case = format!("flushed {flushed}, restarted {restarted}, {pause_ms} ms");
        assert_eq!(bench.now_ms(), START_MS + MINUTE_MS + pause_ms + CONFIRMED_AFTER_MS, "{case}");
        assert_eq!(bench.knows("before"), pause_ms < HOUR_MS, "{case}");
        assert!(bench.knows("early") && bench.knows("late"), "{case}");
        bench.store.flush().unwrap();
        if restarted {
            bench.reopen();
        }
        assert_eq!(
            acquire(&bench.store, "dropped").attempt().number(),
            2,
            "{case}: an ended attempt is remembered, too"
        );
        bench.live(HOUR_MS - CONFIRMED_AFTER_MS + SECOND_MS - 1);
        bench.store.flush().unwrap();
        assert!(bench.knows("early") && bench.knows("late"), "{case}");
        bench.live(1);
        assert!(!bench.knows("early") && bench.knows("late"), "{case}");
        bench.live(CONFIRMED_AFTER_MS - 2 * SECOND_MS);
        assert!(!bench.knows("late"), "{case}");
        bench.live(HOUR_MS);
        bench.store.flush().unwrap();
        assert_eq!(bench.store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>(), 0, "{case}");
    }
}

#[test]
fn work_that_began_at_a_wrong_time_and_ends_before_a_pause_is_confirmed_is_remembered() {
    for flushed in [false, true] {
        let mut bench = Bench::new(Clocks::without_a_boot_clock(), 5 * HOUR_MS);
        bench.clocks.pause(2 * HOUR_MS);
        bench.live(CONFIRMED_AFTER_MS);
        let leases = ["completed", "dropped", "crashed"].map(|key| acquire(&bench.store, key));
        let claimed_ms = bench.now_ms();
        bench.clocks.set_wall(bench.clocks.wall_ms() - 2 * HOUR_MS);
        bench.live(CONFIRMED_AFTER_MS);
        assert!(bench.now_ms() < claimed_ms, "the store's time went back");
        bench.clocks.pause(3 * DAY_MS);
        bench.live(CONFIRMED_AFTER_MS / 2);
        let [completed, dropped, crashed] = leases;
        completed.complete("r").wait().unwrap();
        drop(dropped);
        if flushed {
            bench.store.flush().unwrap();
        }
        bench.reopen();
        drop(crashed);
        bench.live(CONFIRMED_AFTER_MS / 2);
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms(), "the pause is confirmed");
        bench.store.flush().unwrap();
        assert!(bench.knows("completed"), "flushed {flushed}");
        for key in ["dropped", "crashed"] {
            assert_eq!(acquire(&bench.store, key).attempt().number(), 2, "{key}, flushed {flushed}");
        }
        bench.live(8 * HOUR_MS);
        assert!(!bench.knows("completed"), "flushed {flushed}");
    }
}

#[test]
fn a_step_that_two_opens_confirm_expires_no_completion_before_the_crash() {
    let mut bench = Bench::new(Clocks::without_a_boot_clock(), HOUR_MS);
    bench.reopen_after(|clocks| clocks.pause(DAY_MS));
    // Shorter than the interval at which writes save the time.
    bench.clocks.pass(9 * SECOND_MS);
    bench.record("k");
    let crashed = bench.crash_after(|clocks| clocks.pass(CONFIRMED_AFTER_MS));
    assert_eq!(crashed.now_ms(), START_MS + DAY_MS, "the pause is confirmed");
    assert!(crashed.knows("k"), "it is a few minutes old");
    crashed.live(HOUR_MS + MINUTE_MS);
    assert!(!crashed.knows("k"));
}

#[test]
fn a_crash_preserves_confirmed_steps_and_the_current_deviation() {
    let bench = Bench::new(Clocks::new(), HOUR_MS);
    bench.record("before");
    bench.clocks.pass(A_MOMENT_MS);
    bench.clocks.pause(3 * DAY_MS);
    bench.record("meanwhile");
    let crashed = bench.crash();
    crashed.live(CONFIRMED_AFTER_MS);
    assert!(!crashed.knows("before") && crashed.knows("meanwhile"));
    let crashed = crashed.crash();
    assert!(!crashed.knows("before") && crashed.knows("meanwhile"));
    crashed.live(HOUR_MS);
    assert!(!crashed.knows("meanwhile"));
}

#[test]
fn many_pauses_expire_no_key_early_and_delay_expiry_by_little_more_than_a_window() {
    // Each pause is longer than a bucket, so that no two of them can be merged.
    let bench = Bench::new(Clocks::without_a_boot_clock(), 5 * HOUR_MS);
    let mut alive_since: Vec<(String, u64)> = Vec::new();
    let mut elapsed_ms = 0;
    for round in 0..60 {
        let key = format!("k{round}");
        bench.record(&key);
        alive_since.push((key, elapsed_ms));
        bench.clocks.pause(40 * MINUTE_MS);
        bench.live(11 * MINUTE_MS);
        elapsed_ms += 51 * MINUTE_MS;
        bench.store.flush().unwrap();
        for (key, since_ms) in &alive_since {
            let age_ms = elapsed_ms - since_ms;
            assert!(age_ms >= 5 * HOUR_MS || bench.knows(key), "{key} is forgotten at an age of {age_ms} ms");
            // A window until another step can be stored, and one or two confirmations.
            assert!(age_ms < 11 * HOUR_MS || !bench.knows(key), "{key} is still remembered at an age of {age_ms} ms");
        }
        assert!(bench.store.stats().buckets.len() <= 17, "{:?}", bench.store.stats().buckets);
    }
    bench.live(12 * HOUR_MS);
    assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
}

#[test]
fn a_second_pause_before_the_first_is_confirmed_expires_no_key_early() {
    for first_ms in [HOUR_MS, 3 * DAY_MS] {
        let bench = Bench::new(Clocks::new(), DAY_MS);
        bench.clocks.pause(first_ms);
        bench.live(3 * MINUTE_MS);
        bench.record("between");
        bench.live(2 * MINUTE_MS);
        bench.clocks.pause(60 * HOUR_MS);
        bench.live(2 * MINUTE_MS);
        bench.record("k");
        bench.live(2 * CONFIRMED_AFTER_MS);
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms(), "both are confirmed");
        assert!(bench.knows("k"), "it is a few minutes old, after a pause of {first_ms} ms");
        assert!(!bench.knows("between"), "it is older than a day");
        bench.live(DAY_MS);
        assert!(!bench.knows("k"));
    }
}

#[test]
fn a_completion_that_waited_for_the_disk_when_the_clock_stepped_is_remembered() {
    for went_back in [false, true] {
        let mut bench = Bench::new(Clocks::new(), DAY_MS);
        if went_back {
            bench.clocks.pause(HOUR_MS);
            bench.live(CONFIRMED_AFTER_MS);
            bench.reopen();
            bench.clocks.set_wall(bench.clocks.wall_ms() - HOUR_MS);
            bench.live(CONFIRMED_AFTER_MS + MINUTE_MS);
        }
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
        bench.record("acknowledged after the pause");
        bench.clocks.pass(900);
        bench.clocks.pause(60 * HOUR_MS);
        bench.live(CONFIRMED_AFTER_MS);
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
        assert!(bench.knows("acknowledged after the pause"), "the store's time went back: {went_back}");
    }
}

#[test]
fn the_time_of_a_suspend_counts() {
    let bench = Bench::new(Clocks::new(), HOUR_MS);
    bench.record("old");
    let lease = acquire(&bench.store, "leased");
    bench.clocks.suspend(HOUR_MS - 1);
    assert_eq!(bench.now_ms(), START_MS + HOUR_MS - 1);
    assert!(bench.knows("old"));
    bench.record("new");
    bench.clocks.suspend(1_000);
    assert!(!bench.knows("old") && bench.knows("new"));
    assert_eq!(retry_after_ms(&bench.store, "leased"), u128::from(LEASE_MS));
    lease.complete("r").wait().unwrap();
    // Also with a stopped wall clock.
    bench.clocks.sleep(HOUR_MS);
    bench.store.flush().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while bench.knows("new") {
        assert!(std::time::Instant::now() < deadline, "no worker reads the boot clock");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A store whose clock was wrong for long enough to count, and was then corrected.
fn corrected_after(wrong_ms: u64, window_ms: u64) -> Bench {
    let bench = Bench::new(Clocks::new(), window_ms);
    bench.record("before");
    bench.clocks.pass(A_MOMENT_MS);
    bench.clocks.pause(wrong_ms);
    bench.live(CONFIRMED_AFTER_MS);
    assert_eq!(bench.now_ms(), START_MS + A_MOMENT_MS + CONFIRMED_AFTER_MS + wrong_ms);
    bench.record("meanwhile");
    bench.store.flush().unwrap();
    bench.clocks.set_wall(bench.clocks.wall_ms() - wrong_ms);
    bench.live(CONFIRMED_AFTER_MS - 1);
    assert_eq!(
        bench.now_ms(),
        START_MS + A_MOMENT_MS - 1 + 2 * CONFIRMED_AFTER_MS + wrong_ms,
        "the correction does not count at once"
    );
    bench.record("before it counts");
    bench.live(1);
    bench
}

#[test]
fn the_time_goes_back_to_a_corrected_clock_within_the_window() {
    for restarted in [false, true] {
        let mut bench = corrected_after(2 * HOUR_MS, 5 * HOUR_MS);
        if restarted {
            bench.reopen();
        }
        let now_ms = START_MS + A_MOMENT_MS + 2 * CONFIRMED_AFTER_MS;
        assert_eq!((bench.now_ms(), bench.clocks.wall_ms()), (now_ms, now_ms));
        assert!(bench.knows("before") && bench.knows("meanwhile") && bench.knows("before it counts"));
        let floor_ms = bench.store.stats().remembers_since.as_unix_ms();
        bench.live(5 * HOUR_MS);
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
        assert!(bench.store.stats().remembers_since.as_unix_ms() >= floor_ms, "the retention floor never goes back");
        assert!(bench.knows("meanwhile"), "its completion time is two hours later");
        bench.live(2 * HOUR_MS + CONFIRMED_AFTER_MS);
        assert!(!bench.knows("meanwhile") && !bench.knows("before it counts"));
        // The width of a bucket.
        bench.live(HOUR_MS / 2);
        bench.store.flush().unwrap();
        assert_eq!(bench.store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>(), 0);
    }
}

#[test]
fn beyond_the_window_the_time_goes_back_to_the_retention_floor_and_advances() {
    let mut bench = corrected_after(YEAR_MS, HOUR_MS);
    let highest_ms = START_MS + A_MOMENT_MS + 2 * CONFIRMED_AFTER_MS + YEAR_MS;
    let floor_ms = highest_ms - HOUR_MS + 1;
    assert_eq!(
        (bench.now_ms(), bench.store.stats().remembers_since.as_unix_ms()),
        (floor_ms, floor_ms),
        "as far back as the floor allows"
    );
    assert!(!bench.knows("before") && bench.knows("meanwhile") && bench.knows("before it counts"));
    // It advances, also across restarts and with a stopped clock, and does not go back a second time.
    for round in 0..6 {
        match round {
            2 => bench.reopen(),
            4 => bench.reopen_after(|clocks| clocks.pass(5 * MINUTE_MS)),
            _ => bench.live(5 * MINUTE_MS),
        }
        bench.store.flush().unwrap();
    }
    let passed_ms = 25 * MINUTE_MS;
    assert_eq!(bench.now_ms(), floor_ms + passed_ms);
    bench.record("after");
    bench.live(2 * HOUR_MS);
    assert!(!["meanwhile", "before it counts", "after"].iter().any(|key| bench.knows(key)), "every key expires");
    assert_eq!(bench.now_ms(), floor_ms + passed_ms + 2 * HOUR_MS);
    bench.store.flush().unwrap();
    assert!(bench.store.stats().buckets.len() <= 13, "{:?}", bench.store.stats().buckets);
    // Small steps count at once as before, and a step that catches up counts like any other.
    bench.clocks.set_wall(bench.clocks.wall_ms() + 300);
    assert_eq!(bench.now_ms(), floor_ms + passed_ms + 2 * HOUR_MS + 300);
    bench.clocks.pause(2 * YEAR_MS);
    bench.live(CONFIRMED_AFTER_MS);
    assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
}

#[test]
fn completions_at_a_wrong_time_expire_too() {
    // The clock is repeatedly wrong for long enough to count, by less than a window and by more.
    let bench = Bench::new(Clocks::new(), HOUR_MS);
    for round in 0..12_u64 {
        let wrong_ms = [30 * MINUTE_MS, 2 * HOUR_MS, YEAR_MS][round as usize % 3];
        bench.record(&format!("right {round}"));
        bench.clocks.pause(wrong_ms);
        bench.live(CONFIRMED_AFTER_MS + MINUTE_MS);
        bench.record(&format!("wrong {round}"));
        bench.store.flush().unwrap();
        bench.clocks.set_wall(bench.clocks.wall_ms() - wrong_ms);
        bench.live(CONFIRMED_AFTER_MS + MINUTE_MS);
        bench.store.flush().unwrap();
        assert!(bench.knows(&format!("wrong {round}")), "round {round}");
        assert!(bench.store.stats().buckets.len() <= 16, "round {round}: {:?}", bench.store.stats().buckets);
    }
    bench.live(3 * HOUR_MS);
    bench.store.flush().unwrap();
    assert_eq!(bench.store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>(), 0);
}

#[test]
fn a_store_that_was_closed_for_days_expires_its_keys_once_the_time_is_confirmed() {
    for rebooted in [false, true] {
        let mut bench = Bench::new(Clocks::new(), DAY_MS);
        bench.record("old");
        bench.store.flush().unwrap();
        bench.live(3 * HOUR_MS);
        let days_ms = 3 * DAY_MS;
        bench.reopen_after(|clocks| match rebooted {
            true => clocks.reboot_after(days_ms),
            false => clocks.pass(days_ms),
        });
        bench.record("meanwhile");
        if rebooted {
            assert!(bench.knows("old"), "one reading of the clock does not count");
            assert_eq!(bench.now_ms(), START_MS + 3 * HOUR_MS);
            bench.live(CONFIRMED_AFTER_MS - 1);
            assert!(bench.knows("old"));
            bench.live(1);
        }
        assert!(!bench.knows("old") && bench.knows("meanwhile"), "rebooted: {rebooted}");
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
        bench.store.flush().unwrap();
        let keys = bench.store.stats().buckets.iter().map(|bucket| bucket.keys).sum::<u64>();
        assert_eq!(keys, 1, "rebooted: {rebooted}");
        bench.reopen();
        bench.live(DAY_MS - 1 - if rebooted { CONFIRMED_AFTER_MS } else { 0 });
        assert!(bench.knows("meanwhile"));
        bench.live(1);
        assert!(!bench.knows("meanwhile"));
    }
}

#[test]
fn a_clock_that_is_wrong_from_boot_until_its_correction_expires_no_key_early() {
    for wrong_ms in [HOUR_MS as i64, 3 * DAY_MS as i64, 80 * YEAR_MS as i64, -(HOUR_MS as i64), -(YEAR_MS as i64)] {
        let mut bench = Bench::new(Clocks::new(), DAY_MS);
        bench.record("old");
        bench.store.flush().unwrap();
        bench.reopen_after(|clocks| {
            clocks.reboot_after(MINUTE_MS);
            clocks.set_wall(clocks.wall_ms().saturating_add_signed(wrong_ms));
        });
        bench.record("wrong");
        bench.store.flush().unwrap();
        bench.live(5 * MINUTE_MS);
        assert_eq!(bench.now_ms(), START_MS + 5 * MINUTE_MS, "{wrong_ms}");
        bench.clocks.set_wall(START_MS + 6 * MINUTE_MS);
        bench.reopen();
        assert!(bench.knows("old") && bench.knows("wrong"), "{wrong_ms}");
        bench.live(CONFIRMED_AFTER_MS);
        assert_eq!(bench.now_ms(), bench.clocks.wall_ms(), "{wrong_ms}");
        bench.live(DAY_MS - 16 * MINUTE_MS - 1);
        assert!(bench.knows("old") && bench.knows("wrong"), "{wrong_ms}");
        bench.live(16 * MINUTE_MS);
        assert!(!bench.knows("old") && !bench.knows("wrong"), "{wrong_ms}");
    }
}

#[test]
fn a_clock_that_is_a_year_late_after_a_reboot_restores_no_key_and_does_not_stop_the_time() {
    let mut bench = Bench::new(Clocks::new(), HOUR_MS);
    bench.record("forgotten");
    bench.live(2 * HOUR_MS);
    bench.record("remembered");
    bench.store.flush().unwrap();
    bench.reopen_after(|clocks| {
        clocks.reboot_after(MINUTE_MS);
        clocks.set_wall(clocks.wall_ms() - YEAR_MS);
    });
    let begun_ms = START_MS + 2 * HOUR_MS;
    assert_eq!(bench.now_ms(), begun_ms);
    bench.live(CONFIRMED_AFTER_MS);
    let floor_ms = begun_ms + CONFIRMED_AFTER_MS - HOUR_MS + 1;
    assert_eq!(bench.now_ms(), floor_ms);
    assert!(!bench.knows("forgotten") && bench.knows("remembered"));
    bench.live(HOUR_MS);
    bench.reopen_after(|clocks| clocks.reboot_after(MINUTE_MS));
    bench.live(HOUR_MS);
    assert!(!bench.knows("remembered"));
    assert_eq!(bench.now_ms(), floor_ms + 2 * HOUR_MS, "the minute while it was off is not confirmed");
}

#[test]
fn a_command_that_runs_for_a_second_each_day_expires_its_keys() {
    for (clocks, rebooted, kept_days) in [
        (Clocks::new(), false, 2),
        // Expiry is a day late, and another day for each of the three steps that are stored until their keys expire.
        (Clocks::new(), true, 5),
        (Clocks::without_a_boot_clock(), false, 5),
    ] {
        let mut bench = Bench::new(clocks, 2 * DAY_MS);
        let case = format!("rebooted {rebooted}, with a boot clock {}", bench.clocks.boot().is_some());
        for day in 0..30_usize {
            bench.record(&format!("of day {day}"));
            for before in 0..day {
                let is_known = bench.knows(&format!("of day {before}"));
                assert!(is_known || day - before >= 2, "{case}: of day {before}, on day {day}");
                assert!(!is_known || day - before < kept_days, "{case}: of day {before}, on day {day}");
            }
            bench.store.flush().unwrap();
            assert!(bench.store.stats().buckets.len() <= 16, "{case}: {:?}", bench.store.stats().buckets);
            bench.clocks.pass(SECOND_MS);
            bench.reopen_after(|clocks| match rebooted {
                true => clocks.reboot_after(DAY_MS),
                false => clocks.pass(DAY_MS),
            });
        }
    }
}

#[test]
fn the_second_run_after_a_reboot_confirms_what_the_first_one_read() {
    let mut bench = Bench::new(Clocks::new(), DAY_MS);
    bench.record("old");
    bench.clocks.pass(1);
    bench.reopen_after(|clocks| clocks.reboot_after(3 * DAY_MS));
    bench.record("after the reboot");
    assert!(bench.knows("old"));
    bench.reopen_after(|clocks| clocks.pass(CONFIRMED_AFTER_MS - 1));
    assert!(bench.knows("old"));
    bench.reopen_after(|clocks| clocks.pass(1));
    assert!(!bench.knows("old") && bench.knows("after the reboot"));
    assert_eq!(bench.now_ms(), bench.clocks.wall_ms());
}

#[test]
fn opens_in_different_boots_confirm_the_smaller_of_their_two_steps() {
    let mut bench = Bench::new(Clocks::without_a_boot_clock(), DAY_MS);
    bench.record("old");
    let opened_at = |bench: &mut Bench, wall_ms: u64| {
        bench.reopen_after(|clocks| clocks.set_wall(wall_ms));
        bench.now_ms()
    };
    assert_eq!(opened_at(&mut bench, START_MS + HOUR_MS), START_MS);
    assert_eq!(
        opened_at(&mut bench, START_MS + HOUR_MS + CONFIRMED_AFTER_MS - 1),
        START_MS,
        "the second open is too early to confirm"
    );
    assert_eq!(opened_at(&mut bench, IN_2099_MS), START_MS + HOUR_MS, "only one open has read more than that");
    assert!(bench.knows("old"));
    assert_eq!(
        opened_at(&mut bench, IN_2099_MS + DAY_MS),
        START_MS + HOUR_MS,
        "a step of more than a year is not confirmed"
    );
    assert_eq!(opened_at(&mut bench, START_MS + HOUR_MS), START_MS + HOUR_MS, "the clock is back");
    assert_eq!(opened_at(&mut bench, START_MS + 3 * HOUR_MS), START_MS + HOUR_MS);
    assert_eq!(
        opened_at(&mut bench, START_MS + 2 * HOUR_MS),
        START_MS + HOUR_MS,
        "the second step is too early to be confirmed"
    );
    assert_eq!(opened_at(&mut bench, START_MS + 4 * HOUR_MS), START_MS + 2 * HOUR_MS);
}

#[test]
fn a_clock_that_is_set_between_two_runs_expires_no_key_early_and_repeats_no_token() {
    let mut bench = Bench::new(Clocks::new(), DAY_MS);
    let mut last_token = 0;
    for (run, wall_ms) in [START_MS, START_MS - YEAR_MS, IN_2099_MS, START_MS - DAY_MS, 0].into_iter().enumerate() {
        bench.reopen_after(|clocks| clocks.set_wall(wall_ms));
        assert_eq!(bench.now_ms(), START_MS, "run {run}");
        assert!((0..run).all(|run| bench.knows(&format!("of run {run}"))), "run {run}");
        let lease = acquire(&bench.store, &format!("of run {run}"));
        assert!(lease.token().get() > last_token, "run {run}");
        last_token = lease.token().get();
        lease.complete("r").wait().unwrap();
    }
    bench.reopen_after(|clocks| {
        clocks.run_on(YEAR_MS);
        clocks.set_wall(START_MS + YEAR_MS);
    });
    assert!((0..5).all(|run| !bench.knows(&format!("of run {run}"))));
    bench.store.flush().unwrap();
    assert!(acquire(&bench.store, "new").token().get() > last_token);
}

/// The documented rule for the store's time, as a model.
#[derive(Debug, Clone)]
struct Rule {
    window_ms: u64,
    time_ms: u64,
    floor_ms: u64,
    lead_ms: u64,
    /// The latest time before the time went back.
    newest_ms: u64,
    /// Elapsed time as the store measures it, which never goes back.
    elapsed_ms: u64,
    /// When the wall clock began to deviate in one direction, and the readings since then, or since a step could not be
    /// stored.
    since: Moment,
    /// True if the last confirmed step was ahead.
    was_ahead: bool,
    /// When the clock may have made a further step ahead.
    grown_since: Option<Moment>,
    resumed_ms: u64,
    readings: Vec<Seen>,
    /// Ranges of completion times (from, to), and how much later they count.
    steps: Vec<(u64, u64, u64)>,
    /// All confirmed steps: the elapsed time at which the wall clock first showed the step, and its size.
    confirmed: Vec<(u64, u64)>,
    followed: (u64, u64),
    seen: Ticks,
    /// How often each event happened.
    tally: BTreeMap<&'static str, u32>,
}

/// The start of a deviation of the wall clock.
#[derive(Debug, Clone, Copy)]
struct Moment {
    /// The store's time at that moment, less the time that a completion can wait for the disk.
    time_ms: u64,
    /// The elapsed time at the first reading.
    elapsed_ms: u64,
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    time_ms: u64,
    wall_ms: u64,
    deviation_ms: i64,
}

/// The readings of the clocks that never go back.
#[derive(Debug, Clone, Copy)]
struct Ticks {
    monotonic_ms: u64,
    boot: Option<BootTime>,
}

impl Ticks {
    fn of(clocks: &Clocks) -> Self {
        Self { monotonic_ms: clocks.monotonic_ms(), boot: clocks.boot() }
    }

    /// How much time has certainly passed. `None` if no clock runs across processes.
    fn since(&self, before: &Self) -> Option<u64> {
        match (self.boot, before.boot) {
            (Some(now), Some(then)) if now.id == then.id => Some(now.ms - then.ms),
            _ => None,
        }
    }
}

impl Rule {
    fn new(clocks: &Clocks, window_ms: u64) -> Self {
        let time_ms = clocks.wall_ms();
        let (readings, steps, seen) = (Vec::new(), Vec::new(), Ticks::of(clocks));
        Self {
            window_ms,
            time_ms,
            floor_ms: 0,
            lead_ms: 0,
            newest_ms: 0,
            elapsed_ms: 0,
            since: Moment { time_ms, elapsed_ms: 0 },
            was_ahead: false,
            grown_since: None,
            resumed_ms: time_ms,
            readings,
            steps,
            confirmed: Vec::new(),
            followed: (0, 0),
            seen,
            tally: BTreeMap::new(),
        }
    }

    fn count(&mut self, event: &'static str) {
        *self.tally.entry(event).or_default() += 1;
    }

    fn forgotten_below(&self) -> u64 {
        self.floor_ms.max((self.time_ms + 1).saturating_sub(self.window_ms))
    }

    /// When a completion counts as having happened.
    fn counted(&self, at_ms: u64) -> u64 {
        Self::carried(&self.steps, at_ms)
    }

    fn carried(steps: &[(u64, u64, u64)], at_ms: u64) -> u64 {
        let carry = steps.iter().filter(|(from_ms, to_ms, _)| (from_ms..=to_ms).contains(&&at_ms));
        at_ms + carry.map(|(_, _, by_ms)| by_ms).sum::<u64>()
    }

    /// The steps that still shift completions.
    fn living(steps: &[(u64, u64, u64)], time_ms: u64, window_ms: u64) -> Vec<(u64, u64, u64)> {
        let newest_ms = |from_ms: u64, to_ms: u64| {
            let ends = steps.iter().map(|(_, to_ms, _)| *to_ms).filter(|end_ms| (from_ms..=to_ms).contains(end_ms));
            ends.map(|ms| Self::carried(steps, ms)).max().unwrap()
        };
        steps.iter().copied().filter(|(from_ms, to_ms, _)| time_ms < newest_ms(*from_ms, *to_ms) + window_ms).collect()
    }

    fn is_over(&self, at_ms: u64) -> bool {
        self.time_ms >= self.counted(at_ms) + self.window_ms
    }

    fn remembers(&self, completed_ms: u64) -> bool {
        self.counted(completed_ms) >= self.floor_ms && !self.is_over(completed_ms)
    }

    /// The true age of an event, whatever time the store gave it: the elapsed time since, and the confirmed steps whose
    /// deviation began after it.
    fn age_ms(&self, happened_elapsed_ms: u64) -> u64 {
        let later = self.confirmed.iter().filter(|(since_ms, _)| *since_ms >= happened_elapsed_ms);
        self.elapsed_ms - happened_elapsed_ms + later.map(|(_, by_ms)| by_ms).sum::<u64>()
    }

    fn reopen(&mut self, clocks: &Clocks) {
        let seen = Ticks::of(clocks);
        let elapsed_ms = seen.since(&self.seen);
        self.seen = seen;
        self.floor_ms = self.forgotten_below();
        let saved_ms = self.time_ms;
        self.time_ms += elapsed_ms.unwrap_or(0);
        let wall_ms = clocks.wall_ms() + self.lead_ms;
        if wall_ms.abs_diff(self.time_ms) <= TOLERANCE_MS {
            self.time_ms = wall_ms.max(saved_ms);
        }
        self.time_ms = self.time_ms.max(self.floor_ms);
        self.resumed_ms = self.time_ms;
        self.elapsed_ms += self.time_ms - saved_ms;
        self.followed = (0, 0);
        let first = self.readings.first().copied();
        self.read(clocks.wall_ms());
        // The step that two opens have read, far enough apart.
        if let (None, Some(first), Some(now)) = (elapsed_ms, first, self.readings.first())
            && (first.time_ms, first.wall_ms) == (now.time_ms, now.wall_ms)
            && clocks.wall_ms() >= first.wall_ms + CONFIRMED_AFTER_MS
            && now.deviation_ms > 0
            && self.least_deviation_ms() <= YEAR_MS
            && self.confirm()
        {
            self.count("two opens");
            self.read_rest(clocks.wall_ms());
        }
    }

    fn observe(&mut self, clocks: &Clocks) {
        let seen = Ticks::of(clocks);
        let elapsed_ms = seen.since(&self.seen).unwrap_or(seen.monotonic_ms - self.seen.monotonic_ms);
        self.time_ms += elapsed_ms;
        self.elapsed_ms += elapsed_ms;
        self.seen = seen;
        self.read(clocks.wall_ms());
    }

    fn least_deviation_ms(&self) -> u64 {
        self.readings.iter().map(|seen| seen.deviation_ms.unsigned_abs()).min().unwrap_or(0)
    }

    fn read(&mut self, wall_ms: u64) {
        let (time_ms, window_ms) = (self.time_ms, self.window_ms);
        self.steps = Self::living(&self.steps, time_ms, window_ms);
        let deviation_ms = (wall_ms + self.lead_ms) as i64 - time_ms as i64;
        if deviation_ms > 0 {
            let is_over = time_ms - self.followed.1 >= CONFIRMED_AFTER_MS;
            let followed = if is_over { (0, time_ms) } else { self.followed };
            if followed.0 + deviation_ms.unsigned_abs() <= TOLERANCE_MS {
                self.followed = (followed.0 + deviation_ms.unsigned_abs(), followed.1);
                self.count("followed");
                self.time_ms += deviation_ms.unsigned_abs();
                self.elapsed_ms += deviation_ms.unsigned_abs();
                return self.readings.clear();
            }
        } else if deviation_ms >= -(TOLERANCE_MS as i64) {
            return self.readings.clear();
        }
        let turned = self.readings.last().is_some_and(|last| (last.deviation_ms > 0) != (deviation_ms > 0));
        let falls_behind = deviation_ms < 0 && deviation_ms.unsigned_abs() > self.least_deviation_ms() + TOLERANCE_MS;
        if turned || falls_behind {
            self.readings.clear();
        }
        // A completion that waited for the disk in this process when the clock stepped was acknowledged after the step.
        let since_ms = (time_ms - TOLERANCE_MS).max(self.resumed_ms).min(time_ms);
        let since = Moment { time_ms: since_ms, elapsed_ms: self.elapsed_ms };
        if self.readings.is_empty() {
            self.since = since;
            self.grown_since = None;
        } else if deviation_ms.unsigned_abs() + TOLERANCE_MS < self.least_deviation_ms() {
            self.grown_since = Some(self.since);
        } else if deviation_ms.unsigned_abs() > self.least_deviation_ms() + TOLERANCE_MS {
            self.grown_since = self.grown_since.or(Some(since));
        }
        self.readings.push(Seen { time_ms, wall_ms, deviation_ms });
        if time_ms - self.readings[0].time_ms >= CONFIRMED_AFTER_MS && self.confirm() {
            self.read_rest(wall_ms);
        }
    }

    /// If the clock is still ahead after a step, the next step shifts the same completions.
    fn read_rest(&mut self, wall_ms: u64) {
        let grown_since = self.grown_since.filter(|_| self.was_ahead);
        self.read(wall_ms);
        if self.readings.first().is_some_and(|rest| rest.deviation_ms > 0) {
            self.since = grown_since.unwrap_or(self.since);
        }
    }

    fn confirm(&mut self) -> bool {
        let (time_ms, least_ms, first) = (self.time_ms, self.least_deviation_ms(), self.readings[0]);
        self.was_ahead = first.deviation_ms > 0;
        if first.deviation_ms < 0 {
            let wall_ms = time_ms - self.lead_ms - least_ms;
            self.floor_ms = self.forgotten_below();
            self.newest_ms = self.newest_ms.max(time_ms);
            if wall_ms >= self.floor_ms {
                self.time_ms = wall_ms;
                self.count("back to the wall clock");
            } else if self.lead_ms == 0 {
                self.time_ms = self.floor_ms;
                self.count("back to the floor");
            } else {
                self.count("no second time back");
            }
            self.lead_ms = self.time_ms - wall_ms;
            self.resumed_ms = self.resumed_ms.min(self.time_ms);
        } else if least_ms <= self.lead_ms {
            self.lead_ms -= least_ms;
            self.count("nearer");
        } else {
            let by_ms = least_ms - self.lead_ms;
            if by_ms > TOLERANCE_MS {
                let after_ms = time_ms + by_ms;
                let mut steps = self.steps.clone();
                // Work that began before the time went back keeps its later time when it ends.
                steps.push((self.since.time_ms, time_ms.max(self.newest_ms) + TOLERANCE_MS, by_ms));
                steps = Self::living(&steps, after_ms, self.window_ms);
                if steps.len() > 3 {
                    let by = |pair: &[(u64, u64, u64)]| {
                        let overlap = pair[0].0 <= pair[1].1 && pair[1].0 <= pair[0].1;
                        if overlap { pair[0].2 + pair[1].2 } else { pair[0].2.max(pair[1].2) }
                    };
                    let (at, largest_ms) =
                        steps.windows(2).map(by).enumerate().min_by_key(|(_, by_ms)| *by_ms).unwrap();
                    if largest_ms > self.window_ms / 10 {
                        self.readings.drain(..self.readings.len() - 1);
                        self.grown_since = None;
                        self.count("no space for a step");
                        return false;
                    }
                    let (other, into) = (steps.remove(at + 1), &mut steps[at]);
                    *into = (into.0.min(other.0), into.1.max(other.1), largest_ms);
                }
                self.steps = steps;
                self.confirmed.push((self.since.elapsed_ms, by_ms));
                self.count("a step");
            } else {
                self.elapsed_ms += by_ms;
            }
            self.time_ms += by_ms;
            self.lead_ms = 0;
        }
        self.readings.clear();
        self.followed = (0, self.time_ms);
        true
    }
}

/// The possible values of a time that depends on when keys were flushed.
type OneOf = BTreeSet<u64>;

/// The later of the two.
fn not_before(time_ms: u64, times: &OneOf) -> OneOf {
    times.iter().map(|other_ms| time_ms.max(*other_ms)).collect()
}

/// The expected state of a key.
#[derive(Debug, Clone)]
enum Known {
    Completed {
        at_ms: u64,
        result: Vec<u8>,
    },
    Leased {
        token: u64,
        attempt: u32,
        /// Its end gets no earlier time, even if the store's time goes back.
        since: OneOf,
        until_monotonic_ms: u64,
    },
    /// Dropped, crashed or released at this time. After a restart a dropped lease can be reported as crashed.
    Left {
        attempt: u32,
        priors: Vec<PriorAttempt>,
        /// When the attempt ended.
        since: OneOf,
        /// When it was claimed: the time that the next open assumes if the end was not flushed.
        claimed: OneOf,
        /// True if it may have been a window old at some time: then it may be forgotten, even if the time went back later.
        was_over: bool,
    },
}

/// A store, its clocks, and their expected state.
struct Walk {
    bench: Bench,
    rule: Rule,
    known: BTreeMap<String, Known>,
    /// The elapsed time at which the last attempt of a key ended, or its process.
    ended: BTreeMap<String, u64>,
    leases: Vec<(String, Lease)>,
    last_token: u64,
}

impl Walk {
    fn new(clocks: Clocks, window_ms: u64) -> Self {
        let bench = Bench::new(clocks, window_ms);
        let rule = Rule::new(&bench.clocks, window_ms);
        Self { bench, rule, known: BTreeMap::new(), ended: BTreeMap::new(), leases: Vec::new(), last_token: 0 }
    }

    fn monotonic_ms(&self) -> u64 {
        self.bench.clocks.monotonic_ms()
    }

    /// Changes one clock, and lets the store read the clocks before the next change.
    fn change(&mut self, change: impl FnOnce(&Clocks)) {
        change(&self.bench.clocks);
        self.bench.store.check("any key").wait().unwrap();
        self.rule.observe(&self.bench.clocks);
        self.assert_time();
    }

    fn assert_time(&mut self) {
        // A check reads two clocks, the stats read all of them.
        let stats = self.bench.store.stats();
        assert_eq!(stats.now.as_unix_ms(), self.rule.time_ms, "{:?}", self.rule);
        assert_eq!(stats.remembers_since.as_unix_ms(), self.rule.forgotten_below(), "{:?}", self.rule);
        for known in self.known.values_mut() {
            if let Known::Left { since, was_over, .. } = known {
                *was_over |= !since.iter().all(|since_ms| self.rule.remembers(*since_ms));
            }
        }
    }

    fn move_clocks(&mut self, rng: &mut StdRng) {
        let wall_ms = self.bench.clocks.wall_ms();
        let far_ms = *[2 * SECOND_MS, MINUTE_MS, HOUR_MS, DAY_MS, YEAR_MS].choose(rng).unwrap();
        let little_ms = rng.random_range(0..3 * MINUTE_MS);
        match rng.random_range(0..30) {
            0 => self.change(|clocks| clocks.set_wall(wall_ms + far_ms)),
            1 => self.change(|clocks| clocks.set_wall(wall_ms.saturating_sub(far_ms))),
            // An operator or a time server corrects it.
            2 => self.change(|clocks| clocks.set_wall(START_MS + clocks.monotonic_ms())),
            3..=4 => {
                let right_ms = self.rule.time_ms;
                let off_ms = rng.random_range(0..2 * TOLERANCE_MS);
                self.change(|clocks| clocks.set_wall(right_ms + off_ms - TOLERANCE_MS));
            }
            5 => self.change(|clocks| clocks.run_on(little_ms)),
            6 => {
                // The wall clock shows it a little later.
                self.change(|clocks| clocks.sleep(far_ms.min(HOUR_MS)));
                self.change(|clocks| clocks.set_wall(wall_ms + far_ms.min(HOUR_MS)));
            }
            _ => {
                self.change(|clocks| clocks.run_on(little_ms));
                self.change(|clocks| clocks.set_wall(wall_ms + little_ms));
            }
        }
    }

    fn claim(&mut self, key: &str) {
        let monotonic_ms = self.monotonic_ms();
        let expected = self.known.get(key).cloned();
        let claim = self.bench.store.claim(key).wait().unwrap();
        let again = |lease: &Lease, attempt: u32, priors: &[PriorAttempt], may_be_new: bool| {
            let actual = (lease.attempt().number(), lease.attempt().prior());
            let as_expected = priors.iter().any(|prior| actual == (attempt + 1, Some(*prior)));
            assert!(
                as_expected || may_be_new && actual == (1, None),
                "{key} is {expected:?}, and {lease:?} was granted at {:?}",
                self.rule
            );
        };
        match (&expected, &claim) {
            (None, Claim::Acquired(lease)) => {
                assert_eq!((lease.attempt().number(), lease.attempt().prior()), (1, None), "{key}")
            }
            (Some(Known::Completed { at_ms, result }), Claim::Completed(completed)) => {
                assert!(self.rule.remembers(*at_ms), "{key} is remembered too long");
                assert_eq!(
                    (completed.completed_at().as_unix_ms(), completed.result()),
                    (*at_ms, Some(&result[..])),
                    "{key}"
                );
            }
            (Some(Known::Completed { at_ms, .. }), Claim::Acquired(lease)) => {
                assert!(!self.rule.remembers(*at_ms), "{key} expired early: {expected:?} at {:?}", self.rule);
                // Where the store's time repeats, a step during the second pass can shift an attempt of the first pass,
                // but not the completion after it.
                let repeats = self.rule.tally.keys().any(|event| event.starts_with("back to"));
                assert!(
                    lease.attempt().number() == 1 || repeats,
                    "{key} is {expected:?} at {:?}, {lease:?}",
                    self.rule
                );
            }
            (Some(Known::Leased { until_monotonic_ms, .. }), Claim::InProgress(other)) => {
                let left_ms = until_monotonic_ms.checked_sub(monotonic_ms).expect("an expired lease");
                assert_eq!(other.retry_after, Some(Duration::from_millis(left_ms)), "{key}");
            }
            (Some(Known::Leased { attempt, until_monotonic_ms, .. }), Claim::Acquired(lease)) => {
                assert!(monotonic_ms >= *until_monotonic_ms, "{key} has two holders");
                let alone = monotonic_ms >= until_monotonic_ms + self.rule.window_ms;
                again(lease, *attempt, &[PriorAttempt::LeaseExpired], alone);
            }
            (Some(Known::Left { attempt, priors, was_over, .. }), Claim::Acquired(lease)) => {
                again(lease, *attempt, priors, *was_over);
            }
            _ => panic!("{key} is {expected:?}, but the claim returned {claim:?}"),
        }
        self.assert_not_forgotten_early(key, &claim, matches!(expected, Some(Known::Completed { .. })));
        if let Claim::Acquired(lease) = claim {
            assert!(lease.token().get() > self.last_token, "{key}");
            self.last_token = lease.token().get();
            let (token, attempt) = (lease.token().get(), lease.attempt().number());
            let until_monotonic_ms = monotonic_ms + LEASE_MS;
            let since = match expected {
                Some(Known::Left { since, .. } | Known::Leased { since, .. }) if lease.attempt().prior().is_some() => {
                    not_before(self.rule.time_ms, &since)
                }
                _ => OneOf::from([self.rule.time_ms]),
            };
            self.known.insert(key.to_owned(), Known::Leased { token, attempt, since, until_monotonic_ms });
            self.leases.push((key.to_owned(), lease));
        }
    }

    /// Asserts that a key is remembered for a window after its end, whatever time the store gave the end.
    fn assert_not_forgotten_early(&mut self, key: &str, claim: &Claim, was_completed: bool) {
        let Claim::Acquired(lease) = claim else { return };
        let Some(ended_ms) = self.ended.remove(key) else { return };
        let age_ms = self.rule.age_ms(ended_ms);
        let is_known = !was_completed && lease.attempt().prior().is_some();
        assert!(
            is_known || age_ms >= self.rule.window_ms,
            "{key} is forgotten {age_ms} ms after its end: {:?}",
            self.rule
        );
    }

    fn end_a_lease(&mut self, rng: &mut StdRng) {
        if self.leases.is_empty() {
            return;
        }
        let (key, lease) = self.leases.swap_remove(rng.random_range(0..self.leases.len()));
        let held = match self.known.get(&key) {
            Some(Known::Leased { token, until_monotonic_ms, .. }) if *token == lease.token().get() => {
                Some(self.monotonic_ms() >= until_monotonic_ms + self.rule.window_ms)
            }
            _ => None,
        };
        let (attempt, before) = (lease.attempt().number(), lease.attempt().prior());
        let now_ms = self.rule.time_ms;
        let claimed = match self.known.get(&key) {
            Some(Known::Leased { since, .. }) => since.clone(),
            _ => OneOf::from([now_ms]),
        };
        let since = not_before(now_ms, &claimed);
        let left = |priors, was_over| {
            let (since, claimed) = (since.clone(), claimed.clone());
            Known::Left { attempt, priors, since, claimed, was_over }
        };
        let (accepted, after) = match rng.random_range(0..4) {
            0 => {
                drop(lease);
                // A lease that expired more than a window ago may be forgotten.
                let was_over = held == Some(true);
                (held.is_some(), left(vec![PriorAttempt::Dropped], was_over))
            }
            1 => {
                let accepted = lease.release().wait().is_ok();
                let priors = vec![before.unwrap_or(PriorAttempt::Released)];
                (accepted, left(priors, false))
            }
            _ => {
                let result = format!("result {}", lease.token().get()).into_bytes();
                let accepted = lease.complete(result.clone()).wait().is_ok();
                let at_ms = match self.bench.store.check(&key).wait().unwrap() {
                    KeyStatus::Completed(first) if accepted => {
                        let at_ms = first.completed_at().as_unix_ms();
                        assert!(since.contains(&at_ms), "{key} was completed at {at_ms}: {since:?}");
                        at_ms
                    }
                    _ => now_ms,
                };
                (accepted, Known::Completed { at_ms, result })
            }
        };
        match held {
            None => assert!(!accepted, "{key} had a different holder"),
            // After a window without another claim, the lease may be forgotten.
            Some(true) if !accepted => drop(self.known.remove(&key)),
            Some(_) => {
                assert!(accepted, "{key} was not taken over");
                match &after {
                    Known::Left { was_over: true, .. } => self.ended.remove(&key),
                    _ => self.ended.insert(key.clone(), self.rule.elapsed_ms),
                };
                self.known.insert(key, after);
            }
        }
    }

    /// Closes the store, changes the clocks while no process reads them, and opens it again.
    fn reopen(&mut self, rng: &mut StdRng) {
        let (closed_at_ms, closed_elapsed_ms) = (self.monotonic_ms(), self.rule.elapsed_ms);
        self.bench.store.close().wait().unwrap();
        self.leases.clear();
        let off_ms = rng.random_range(0..20 * MINUTE_MS);
        let far_ms = *[0, 0, 0, MINUTE_MS, DAY_MS, YEAR_MS].choose(rng).unwrap();
        let (rebooted, forward) = (rng.random_bool(0.3), rng.random_bool(0.5));
        self.bench.reopen_after(|clocks| {
            if rebooted {
                clocks.reboot_after(off_ms);
            } else {
                clocks.pass(off_ms);
            }
            let wall_ms = clocks.wall_ms();
            clocks.set_wall(if forward { wall_ms + far_ms } else { wall_ms.saturating_sub(far_ms) });
        });
        self.rule.reopen(&self.bench.clocks);
        for (key, known) in &mut self.known {
            match known {
                Known::Leased { attempt, until_monotonic_ms, since, .. } => {
                    let priors = vec![PriorAttempt::Crashed, PriorAttempt::LeaseExpired];
                    // A lease that expired more than a window ago may be forgotten.
                    let was_over = closed_at_ms >= *until_monotonic_ms + self.rule.window_ms;
                    if !was_over {
                        self.ended.insert(key.clone(), closed_elapsed_ms);
                    }
                    let claimed = since.clone();
                    let since = not_before(self.rule.time_ms, &claimed);
                    *known = Known::Left { attempt: *attempt, priors, since, claimed, was_over };
                }
                Known::Left { priors, since, claimed, .. } => {
                    priors.push(PriorAttempt::Crashed);
                    since.extend(not_before(self.rule.time_ms, claimed));
                }
                Known::Completed { .. } => {}
            }
        }
        self.assert_time();
    }
}

#[test]
fn a_random_walk_of_all_clocks_gives_the_answers_of_a_plain_map() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seed = number("ONLYONCE_CLOCK_SEED").unwrap_or_else(|| rand::rng().random());
    let rounds = number("ONLYONCE_CLOCK_ROUNDS").unwrap_or(25);
    eprintln!("ONLYONCE_CLOCK_SEED={seed} ONLYONCE_CLOCK_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let keys: Vec<String> = (0..12).map(|i| format!("key-{i}")).collect();
    let mut tally: BTreeMap<&str, u32> = BTreeMap::new();
    for _ in 0..rounds {
        let clocks = if rng.random_bool(0.7) { Clocks::new() } else { Clocks::without_a_boot_clock() };
        let mut walk = Walk::new(clocks, *[20 * MINUTE_MS, 3 * HOUR_MS].choose(&mut rng).unwrap());
        for _ in 0..400 {
            match rng.random_range(0..100) {
                0..=39 => walk.move_clocks(&mut rng),
                40..=69 => walk.claim(keys.choose(&mut rng).unwrap()),
                70..=94 => walk.end_a_lease(&mut rng),
                95..=97 => walk.bench.store.flush().unwrap(),
                _ => walk.reopen(&mut rng),
            }
        }
        keys.iter().for_each(|key| walk.claim(key));
        let buckets = walk.bench.store.stats().buckets;
        assert!(buckets.len() <= 20, "{buckets:?}");
        walk.rule.tally.iter().for_each(|(event, times)| *tally.entry(event).or_default() += times);
    }
    eprintln!("{tally:?}");
    if rounds >= 25 {
        for event in ["a step", "followed", "back to", "two opens"] {
            let times: u32 = tally.iter().filter(|(name, _)| name.starts_with(event)).map(|(_, times)| times).sum();
            assert!(times > 0, "{event}: never happened, so that it was not tested");
        }
    }
}
