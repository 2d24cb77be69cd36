//! Clocks that misbehave: a wall clock that jumps a day or a year, forth and back, while the store runs and between its
//! runs, and one that stands still. The store's time never goes back, windows follow it exactly, and leases follow the
//! monotonic clock and nothing else.
//!
//! `ONLYONCE_CLOCK_ROUNDS` (25 if not set) and `ONLYONCE_CLOCK_SEED` (default: drawn, and printed) set how often the
//! random walk is walked, and how.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::START_MS;
use onlyonce::{Check, Claim, Clock, Durability, Lease, Prior, Store};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const WINDOW_MS: u64 = 10_000;
const LEASE_MS: u64 = 1_000;
const DAY_MS: u64 = 86_400_000;
const YEAR_MS: u64 = 366 * DAY_MS;

/// Two clocks that have nothing to do with each other.
#[derive(Clone)]
struct Clocks {
    wall_ms: Arc<AtomicU64>,
    monotonic_ms: Arc<AtomicU64>,
}

impl Clock for Clocks {
    fn wall_ms(&self) -> u64 {
        self.wall_ms.load(Ordering::SeqCst)
    }

    fn monotonic_ms(&self) -> u64 {
        self.monotonic_ms.load(Ordering::SeqCst)
    }
}

impl Clocks {
    fn new() -> Self {
        Self { wall_ms: Arc::new(AtomicU64::new(START_MS)), monotonic_ms: Arc::new(AtomicU64::new(5_000)) }
    }

    fn set_wall(&self, ms: u64) {
        self.wall_ms.store(ms, Ordering::SeqCst);
    }

    fn run_on(&self, ms: u64) {
        self.monotonic_ms.fetch_add(ms, Ordering::SeqCst);
    }

    fn open(&self, path: &Path) -> Store {
        Store::builder()
            .window(Duration::from_millis(WINDOW_MS))
            .bucket(Duration::from_secs(1))
            .lease(Duration::from_millis(LEASE_MS))
            .memory_budget(32 << 20)
            .durability(Durability::Process)
            .clock(self.clone())
            .open(path)
            .unwrap()
    }
}

fn acquire(store: &Store, key: &str) -> Lease {
    match store.claim(key).unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{key} should be free, but is {other:?}"),
    }
}

fn retry_after_ms(store: &Store, key: &str) -> u128 {
    match store.claim(key).unwrap() {
        Claim::InProgress(other) => other.retry_after.unwrap().as_millis(),
        other => panic!("{key} should be in progress, but is {other:?}"),
    }
}

fn is_completed(store: &Store, key: &str) -> bool {
    matches!(store.check(key).unwrap(), Check::Completed(_))
}

#[test]
fn a_jump_of_the_wall_clock_ends_no_lease_and_lengthens_none() {
    let (dir, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
    let store = clocks.open(&dir.path().join("store"));
    let lease = acquire(&store, "k");
    for wall_ms in [START_MS + DAY_MS, START_MS - DAY_MS, START_MS + YEAR_MS, START_MS - YEAR_MS, 0] {
        clocks.set_wall(wall_ms);
        assert_eq!(retry_after_ms(&store, "k"), u128::from(LEASE_MS), "at {wall_ms}");
        store.seal().unwrap();
    }
    clocks.run_on(LEASE_MS - 1);
    assert_eq!(retry_after_ms(&store, "k"), 1);
    clocks.run_on(1);
    let second = acquire(&store, "k");
    assert_eq!((second.attempt(), second.prior()), (2, Some(Prior::LeaseExpired)));
    assert!(lease.complete("late").is_err());
    second.complete("r").unwrap();
}

#[test]
fn a_wall_clock_that_stands_still_forgets_nothing_and_leases_run_out() {
    let (dir, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
    let store = clocks.open(&dir.path().join("store"));
    store.record("done").unwrap();
    let _lease = acquire(&store, "k");
    for _ in 0..100 {
        clocks.run_on(WINDOW_MS);
        store.seal().unwrap();
        assert!(is_completed(&store, "done"));
    }
    assert_eq!(store.check("k").unwrap(), Check::New, "its lease ran out");
    clocks.set_wall(START_MS + WINDOW_MS);
    assert!(!is_completed(&store, "done"));
}

#[test]
fn what_is_completed_after_a_jump_counts_from_there() {
    let (dir, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
    let store = clocks.open(&dir.path().join("store"));
    let (forth, back) = (acquire(&store, "forth"), acquire(&store, "back"));
    let far_ms = START_MS + YEAR_MS;
    clocks.set_wall(far_ms);
    forth.complete("r").unwrap();
    clocks.set_wall(START_MS);
    back.complete("r").unwrap();
    for key in ["forth", "back"] {
        let Check::Completed(completed) = store.check(key).unwrap() else { panic!("{key}") };
        assert_eq!(completed.completed_at_ms(), far_ms, "{key}: the store's time does not go back");
    }
    store.seal().unwrap();
    clocks.set_wall(far_ms + WINDOW_MS - 1);
    assert!(is_completed(&store, "forth") && is_completed(&store, "back"));
    clocks.set_wall(far_ms + WINDOW_MS);
    assert!(!is_completed(&store, "forth") && !is_completed(&store, "back"));
}

#[test]
fn a_clock_that_is_set_between_two_runs_forgets_nothing_early_and_repeats_no_token() {
    let (dir, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
    let path = dir.path().join("store");
    let (mut now_ms, mut last_token) = (START_MS, 0);
    for (run, wall_ms) in [START_MS, START_MS - YEAR_MS, START_MS + 5_000, START_MS - DAY_MS].into_iter().enumerate() {
        clocks.set_wall(wall_ms);
        now_ms = now_ms.max(wall_ms);
        let store = clocks.open(&path);
        assert_eq!(store.stats().now_ms, now_ms, "run {run}");
        assert!((0..run).all(|run| is_completed(&store, &format!("of run {run}"))), "run {run}");
        let lease = acquire(&store, &format!("of run {run}"));
        assert!(lease.token() > last_token, "run {run}");
        last_token = lease.token();
        lease.complete("r").unwrap();
        store.close().unwrap();
    }
    clocks.set_wall(START_MS + YEAR_MS);
    let store = clocks.open(&path);
    assert!((0..4).all(|run| !is_completed(&store, &format!("of run {run}"))));
    store.seal().unwrap();
    assert!(acquire(&store, "new").token() > last_token);
}

#[test]
fn a_backoff_runs_on_monotonic_time() {
    let (dir, clocks) = (tempfile::tempdir().unwrap(), Clocks::new());
    let store = clocks.open(&dir.path().join("store"));
    // An hour ahead for a moment.
    clocks.set_wall(START_MS + 3_600_000);
    acquire(&store, "k").release_after(Duration::from_secs(5)).unwrap();
    clocks.set_wall(START_MS);
    assert_eq!(retry_after_ms(&store, "k"), 5_000);
    clocks.run_on(4_999);
    clocks.set_wall(START_MS - DAY_MS);
    assert_eq!(retry_after_ms(&store, "k"), 1);
    clocks.run_on(1);
    assert_eq!(acquire(&store, "k").prior(), Some(Prior::Released));
}

/// Of a released key.
#[derive(Debug, Clone)]
struct Backoff {
    length_ms: u64,
    until_monotonic_ms: u64,
}

/// What should be known of a key.
#[derive(Debug, Clone)]
enum Known {
    Completed {
        at_ms: u64,
        result: Vec<u8>,
    },
    Leased {
        token: u64,
        attempt: u32,
        until_monotonic_ms: u64,
    },
    /// Dropped, crashed or released at this time. Across a restart a dropped lease may be told as crashed.
    Left {
        attempt: u32,
        priors: Vec<Prior>,
        at_ms: u64,
        backoff: Option<Backoff>,
    },
}

/// A store, its clocks, and what should be true.
struct Walk {
    clocks: Clocks,
    store: Store,
    path: std::path::PathBuf,
    /// The store's time.
    now_ms: u64,
    known: BTreeMap<String, Known>,
    leases: Vec<(String, Lease)>,
    last_token: u64,
}

impl Walk {
    fn new(path: &Path) -> Self {
        let clocks = Clocks::new();
        let store = clocks.open(path);
        let (known, leases) = (BTreeMap::new(), Vec::new());
        Self { clocks, store, path: path.to_owned(), now_ms: START_MS, known, leases, last_token: 0 }
    }

    fn monotonic_ms(&self) -> u64 {
        self.clocks.monotonic_ms()
    }

    fn move_clocks(&mut self, rng: &mut StdRng) {
        let (wall_ms, far_ms) = (self.clocks.wall_ms(), if rng.random_bool(0.5) { DAY_MS } else { YEAR_MS });
        let little_ms = rng.random_range(0..1_500);
        match rng.random_range(0..20) {
            0 => self.clocks.set_wall(wall_ms + far_ms),
            1 => self.clocks.set_wall(wall_ms.saturating_sub(far_ms)),
            // Somebody mends it.
            2..=4 => self.clocks.set_wall(self.now_ms + little_ms),
            5..=6 => self.clocks.run_on(little_ms * 2),
            7 => self.clocks.set_wall(wall_ms + little_ms),
            _ => {
                self.clocks.set_wall(wall_ms + little_ms);
                self.clocks.run_on(little_ms);
            }
        }
        // Whatever time the store is asked at, it has seen.
        self.store.check("somebody asks").unwrap();
        self.now_ms = self.now_ms.max(self.clocks.wall_ms());
    }

    fn claim(&mut self, key: &str) {
        let monotonic_ms = self.monotonic_ms();
        let expected = self.known.get(key).cloned();
        let claim = self.store.claim(key).unwrap();
        let again = |lease: &Lease, attempt: u32, priors: &[Prior], may_be_new: bool| {
            let told = (lease.attempt(), lease.prior());
            let as_expected = priors.iter().any(|prior| told == (attempt + 1, Some(*prior)));
            assert!(
                as_expected || may_be_new && told == (1, None),
                "{key} is {expected:?}, and {lease:?} was given out"
            );
        };
        match (&expected, &claim) {
            (None, Claim::Acquired(lease)) => assert_eq!((lease.attempt(), lease.prior()), (1, None), "{key}"),
            (Some(Known::Completed { at_ms, result }), Claim::Completed(completed)) => {
                assert!(self.now_ms < at_ms + WINDOW_MS, "{key} is remembered too long");
                assert_eq!((completed.completed_at_ms(), completed.result()), (*at_ms, Some(&result[..])), "{key}");
            }
            (Some(Known::Completed { at_ms, .. }), Claim::Acquired(lease)) => {
                assert!(self.now_ms >= at_ms + WINDOW_MS, "{key} is forgotten early: {expected:?} at {}", self.now_ms);
                assert_eq!(lease.attempt(), 1, "{key}");
            }
            (Some(Known::Leased { until_monotonic_ms, .. }), Claim::InProgress(other)) => {
                let left_ms = until_monotonic_ms.checked_sub(monotonic_ms).expect("a lease that has run out");
                assert_eq!(other.retry_after, Some(Duration::from_millis(left_ms)), "{key}");
            }
            (Some(Known::Leased { attempt, until_monotonic_ms, .. }), Claim::Acquired(lease)) => {
                assert!(monotonic_ms >= *until_monotonic_ms, "{key} has two holders");
                let alone = monotonic_ms >= until_monotonic_ms + WINDOW_MS;
                again(lease, *attempt, &[Prior::LeaseExpired], alone);
            }
            (Some(Known::Left { backoff: Some(backoff), .. }), Claim::InProgress(other)) => {
                let left_ms = backoff.until_monotonic_ms - monotonic_ms;
                assert_eq!(other.retry_after, Some(Duration::from_millis(left_ms)), "{key}");
            }
            (Some(Known::Left { attempt, priors, at_ms, backoff }), Claim::Acquired(lease)) => {
                let is_over = self.now_ms >= at_ms + WINDOW_MS;
                let ended = backoff.as_ref().is_none_or(|backoff| monotonic_ms >= backoff.until_monotonic_ms);
                assert!(is_over || ended, "{key} is given out before its backoff is over");
                again(lease, *attempt, priors, is_over);
            }
            _ => panic!("{key} is {expected:?}, and was answered {claim:?}"),
        }
        if let Claim::Acquired(lease) = claim {
            assert!(lease.token() > self.last_token, "{key}");
            self.last_token = lease.token();
            let (token, attempt) = (lease.token(), lease.attempt());
            let until_monotonic_ms = monotonic_ms + LEASE_MS;
            self.known.insert(key.to_owned(), Known::Leased { token, attempt, until_monotonic_ms });
            self.leases.push((key.to_owned(), lease));
        }
    }

    fn end_a_lease(&mut self, rng: &mut StdRng) {
        if self.leases.is_empty() {
            return;
        }
        let (key, lease) = self.leases.swap_remove(rng.random_range(0..self.leases.len()));
        let held = match self.known.get(&key) {
            Some(Known::Leased { token, until_monotonic_ms, .. }) if *token == lease.token() => {
                Some(self.monotonic_ms() >= until_monotonic_ms + WINDOW_MS)
            }
            _ => None,
        };
        let (attempt, before) = (lease.attempt(), lease.prior());
        let (accepted, after) = match rng.random_range(0..4) {
            0 => {
                drop(lease);
                // One that had run out a window before may have been forgotten.
                let at_ms = if held == Some(true) { 0 } else { self.now_ms };
                (held.is_some(), Known::Left { attempt, priors: vec![Prior::Dropped], at_ms, backoff: None })
            }
            1 => {
                let length_ms = rng.random_range(0..2) * rng.random_range(1..3_000);
                let accepted = lease.release_after(Duration::from_millis(length_ms)).is_ok();
                let priors = vec![before.unwrap_or(Prior::Released)];
                let backoff = Some(Backoff { length_ms, until_monotonic_ms: self.monotonic_ms() + length_ms });
                (accepted, Known::Left { attempt, priors, at_ms: self.now_ms, backoff })
            }
            _ => {
                let result = format!("result {}", lease.token()).into_bytes();
                let accepted = lease.complete(result.clone()).is_ok();
                (accepted, Known::Completed { at_ms: self.now_ms, result })
            }
        };
        match held {
            None => assert!(!accepted, "{key} had another holder"),
            // Alone for a whole window, it may be as good as never claimed.
            Some(true) if !accepted => drop(self.known.remove(&key)),
            Some(_) => {
                assert!(accepted, "{key} was still its holder's");
                self.known.insert(key, after);
            }
        }
    }

    /// Closes the store, sets the clock while nobody looks, and opens it again.
    fn reopen(&mut self, rng: &mut StdRng) {
        self.store.close().unwrap();
        let closed_at_ms = self.monotonic_ms();
        self.leases.clear();
        let far_ms = *[0, 1_000, DAY_MS, YEAR_MS].choose(rng).unwrap();
        let wall_ms = self.clocks.wall_ms();
        self.clocks.set_wall(if rng.random_bool(0.3) { wall_ms + far_ms } else { wall_ms.saturating_sub(far_ms) });
        self.clocks.run_on(rng.random_range(0..2_000));
        self.now_ms = self.now_ms.max(self.clocks.wall_ms());
        self.store = self.clocks.open(&self.path);
        let opened_at_ms = self.monotonic_ms();
        assert_eq!(self.store.stats().now_ms, self.now_ms);
        for known in self.known.values_mut() {
            match known {
                Known::Leased { attempt, until_monotonic_ms, .. } => {
                    let priors = vec![Prior::Crashed, Prior::LeaseExpired];
                    // One that had run out a window before may have been forgotten.
                    let at_ms = if closed_at_ms >= *until_monotonic_ms + WINDOW_MS { 0 } else { self.now_ms };
                    *known = Known::Left { attempt: *attempt, priors, at_ms, backoff: None };
                }
                // It goes on with what was left of it.
                Known::Left { at_ms, backoff: Some(backoff), .. } => {
                    let left_ms = (*at_ms + backoff.length_ms).saturating_sub(self.now_ms).min(backoff.length_ms);
                    backoff.until_monotonic_ms = opened_at_ms + left_ms;
                }
                Known::Left { priors, backoff: None, .. } if !priors.contains(&Prior::Crashed) => {
                    priors.push(Prior::Crashed);
                }
                _ => {}
            }
        }
    }
}

#[test]
fn a_random_walk_of_both_clocks_is_answered_as_a_plain_map_would() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seed = number("ONLYONCE_CLOCK_SEED").unwrap_or_else(|| rand::rng().random());
    let rounds = number("ONLYONCE_CLOCK_ROUNDS").unwrap_or(25);
    eprintln!("ONLYONCE_CLOCK_SEED={seed} ONLYONCE_CLOCK_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let keys: Vec<String> = (0..12).map(|i| format!("key-{i}")).collect();
    for _ in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let mut walk = Walk::new(&dir.path().join("store"));
        for _ in 0..300 {
            match rng.random_range(0..100) {
                0..=29 => walk.move_clocks(&mut rng),
                30..=69 => walk.claim(keys.choose(&mut rng).unwrap()),
                70..=94 => walk.end_a_lease(&mut rng),
                95..=97 => walk.store.seal().unwrap(),
                _ => walk.reopen(&mut rng),
            }
        }
        keys.iter().for_each(|key| walk.claim(key));
    }
}
