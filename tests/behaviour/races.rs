//! Many threads on few keys: one holder at a time, increasing tokens, no work done twice.
//!
//! `ONLYONCE_RACES_SECONDS` sets the length of the longest test. `ONLYONCE_RACES_SEED` repeats its random choices, but
//! not its schedule.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use crate::common::START_MS;
use crate::oracle::{Oracle, Seen};
use onlyonce::{Claim, Durability, ManualClock, OnInterrupt, RecordOutcome, Store, Timestamp};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const THREADS: usize = 16;

fn store(path: &std::path::Path) -> Store {
    Store::builder()
        .durability(Durability::Process)
        .lease(Duration::from_secs(60))
        .memory_budget(32 << 20)
        .open(path)
        .unwrap()
}

#[test]
fn each_key_has_one_holder_at_a_time_among_sixteen_threads() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("store"));
    let keys: Vec<String> = (0..4).map(|i| format!("key-{i}")).collect();
    let holders: Vec<AtomicUsize> = keys.iter().map(|_| AtomicUsize::new(0)).collect();
    let last_tokens: Vec<AtomicU64> = keys.iter().map(|_| AtomicU64::new(0)).collect();
    let acquired = AtomicUsize::new(0);
    let end = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, keys, holders, last_tokens, acquired) = (&store, &keys, &holders, &last_tokens, &acquired);
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(thread as u64);
                while Instant::now() < end {
                    let i = rng.random_range(0..keys.len());
                    match store.claim(&keys[i]).wait().unwrap() {
                        Claim::Acquired(lease) => {
                            assert_eq!(holders[i].fetch_add(1, Ordering::SeqCst), 0, "two holders of {}", keys[i]);
                            let last = last_tokens[i].swap(lease.token().get(), Ordering::SeqCst);
                            assert!(
                                last < lease.token().get(),
                                "token {last} was granted before {}",
                                lease.token().get()
                            );
                            acquired.fetch_add(1, Ordering::SeqCst);
                            if rng.random_bool(0.3) {
                                std::thread::yield_now();
                            }
                            holders[i].fetch_sub(1, Ordering::SeqCst);
                            match rng.random_range(0..3) {
                                0 => drop(lease),
                                _ => lease.release().wait().unwrap(),
                            }
                        }
                        Claim::InProgress(other) => assert!(other.retry_after.is_some()),
                        Claim::Completed(_) => panic!("{} was never completed", keys[i]),
                    }
                }
            });
        }
        scope.spawn(|| {
            while Instant::now() < end {
                store.flush().unwrap();
            }
        });
    });
    let acquired = acquired.load(Ordering::SeqCst);
    assert!(acquired > 1_000, "only {acquired} claims in three seconds");
    assert_eq!(store.stats().acquired, acquired as u64);
}

#[test]
fn every_key_is_processed_once_while_flushes_move_it() {
    const KEYS: usize = 30_000;
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("store"));
    let effects: Vec<AtomicUsize> = (0..KEYS).map(|_| AtomicUsize::new(0)).collect();
    let done = AtomicUsize::new(0);
    let barrier = Barrier::new(THREADS);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (store, effects, done, barrier) = (&store, &effects, &done, &barrier);
            scope.spawn(move || {
                barrier.wait();
                // Every thread claims every key, in a different order.
                for step in 0..KEYS {
                    let i = (step * 7_919 + thread * 1_871) % KEYS;
                    match store.claim(i.to_string()).wait().unwrap() {
                        Claim::Acquired(lease) => {
                            effects[i].fetch_add(1, Ordering::SeqCst);
                            lease.complete(i.to_string()).wait().unwrap();
                        }
                        Claim::Completed(first) => assert_eq!(first.result(), Some(i.to_string().as_bytes())),
                        Claim::InProgress(_) => {}
                    }
                }
                done.fetch_add(1, Ordering::SeqCst);
            });
        }
        scope.spawn(|| {
            while done.load(Ordering::SeqCst) < THREADS {
                store.flush().unwrap();
            }
        });
    });
    for (i, effects) in effects.iter().enumerate() {
        assert_eq!(effects.load(Ordering::SeqCst), 1, "key {i}");
    }
    let stats = store.stats();
    assert_eq!(stats.completed, KEYS as u64);
    assert_eq!(stats.in_flight, 0);
}

#[test]
fn overlapping_batches_record_each_key_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("store"));
    let firsts: Mutex<BTreeMap<u64, usize>> = Mutex::default();
    std::thread::scope(|scope| {
        for thread in 0..THREADS as u64 {
            let (store, firsts) = (&store, &firsts);
            scope.spawn(move || {
                for batch in 0..40 {
                    let keys: Vec<u64> = (0..200).map(|i| (batch * 100 + i * 3 + thread) % 5_000).collect();
                    let named: Vec<String> = keys.iter().map(u64::to_string).collect();
                    let recorded = store.record_batch(&named).wait().unwrap();
                    let mut firsts = firsts.lock().unwrap();
                    for (key, recorded) in keys.into_iter().zip(recorded) {
                        if recorded.unwrap() == RecordOutcome::First {
                            *firsts.entry(key).or_default() += 1;
                        }
                    }
                }
            });
        }
        scope.spawn(|| (0..20).for_each(|_| store.flush().unwrap()));
    });
    let firsts = firsts.into_inner().unwrap();
    assert!(firsts.values().all(|count| *count == 1));
    assert_eq!(store.stats().recorded, firsts.len() as u64);
}

#[test]
fn a_takeover_and_a_late_completion_never_both_win() {
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let dir = tempfile::tempdir().unwrap();
    let store = Store::builder()
        .clock(clock.clone())
        .lease(Duration::from_millis(10))
        .durability(Durability::Process)
        .on_interrupt(OnInterrupt::Rerun)
        .open(dir.path().join("store"))
        .unwrap();
    let (mut late_won, mut taken_over) = (0, 0);
    for round in 0..2_000 {
        let key = format!("key-{round}");
        let Claim::Acquired(first) = store.claim(&key).wait().unwrap() else { panic!("{key} is new") };
        clock.advance(Duration::from_millis(10));
        let barrier = Barrier::new(2);
        let (late, second) = std::thread::scope(|scope| {
            let late = scope.spawn(|| {
                barrier.wait();
                first.complete("first").wait().is_ok()
            });
            barrier.wait();
            let second = match store.claim(&key).wait().unwrap() {
                Claim::Acquired(lease) => {
                    assert_eq!(lease.attempt().number(), 2);
                    lease.complete("second").wait().unwrap();
                    true
                }
                _ => false,
            };
            (late.join().unwrap(), second)
        });
        assert_ne!(late, second, "{key}: exactly one of them completes");
        late_won += usize::from(late);
        taken_over += usize::from(second);
        let Claim::Completed(completed) = store.claim(&key).wait().unwrap() else { panic!("{key} is completed") };
        assert_eq!(completed.result(), Some(if late { &b"first"[..] } else { b"second" }));
    }
    eprintln!("late completions {late_won}, takeovers {taken_over}");
}

/// Concurrent claims, completions, releases, drops, renewals, records and forgets, single and in batches, while leases
/// expire, keys are flushed, and buckets are created and dropped. The oracle checks every answer.
fn run_all_calls(durability: Durability, time: Duration, seed: u64) -> Seen {
    const THREADS: u64 = 64;
    const KEYS: usize = 192;
    const WINDOW_MS: u64 = 400;
    const LEASE_MS: u64 = 5;
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let store = Store::builder()
        .window(Duration::from_millis(WINDOW_MS))
        .bucket(Duration::from_millis(WINDOW_MS / 10))
        .lease(Duration::from_millis(LEASE_MS))
        .durability(durability)
        // Large results and the smallest memory budget, so that completed keys are flushed all the time.
        .memory_budget(32 << 20)
        .clock(clock.clone())
        .open(dir.path().join("store"))
        .unwrap();
    let oracle = Oracle::new(store, clock, KEYS, WINDOW_MS, LEASE_MS, 3_000);
    let end = Instant::now() + time;
    let flushes = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let oracle = &oracle;
            scope.spawn(move || {
                let mut rng = StdRng::seed_from_u64(seed ^ (thread << 32));
                let mut held = Vec::new();
                while Instant::now() < end {
                    oracle.step(&mut |below| rng.random_range(0..below), &mut held);
                }
                oracle.complete_batch(held);
            });
        }
        scope.spawn(|| {
            while Instant::now() < end {
                oracle.clock.advance(Duration::from_millis(1));
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        scope.spawn(|| {
            while Instant::now() < end {
                oracle.store.flush().unwrap();
                flushes.fetch_add(1, Ordering::Relaxed);
            }
        });
    });
    oracle.store.flush().unwrap();
    let stats = oracle.store.stats();
    assert_eq!(stats.poisoned, None);
    assert_eq!(stats.acquired, oracle.seen.acquired.load(Ordering::SeqCst));
    assert_eq!(stats.completed, oracle.seen.completed.load(Ordering::SeqCst));
    assert_eq!(stats.recorded, oracle.seen.recorded.load(Ordering::SeqCst));
    assert!(stats.buckets.len() <= 16, "{} buckets are left", stats.buckets.len());
    let windows = (stats.now.as_unix_ms() - START_MS) / WINDOW_MS;
    eprintln!("{durability:?}: {} flushes, {windows} windows, {:?}", flushes.into_inner(), oracle.seen);
    oracle.seen
}

#[test]
fn all_answers_are_correct_while_sixty_four_threads_make_all_calls() {
    let number = |variable, default| std::env::var(variable).map_or(default, |value| value.parse().unwrap());
    let seconds = number("ONLYONCE_RACES_SECONDS", 5);
    let seed = number("ONLYONCE_RACES_SEED", 20_261_121);
    eprintln!("{seconds} seconds, seed {seed}");
    for (durability, seed) in [(Durability::Process, seed), (Durability::Disk, seed + 1)] {
        let seen = run_all_calls(durability, Duration::from_secs(seconds).div_f64(2.0), seed);
        // An event that never happened was not tested.
        let seen = [
            ("taken over", seen.taken_over),
            ("superseded", seen.superseded),
            ("dropped", seen.dropped),
            ("released", seen.released),
            ("completed", seen.completed),
            ("recorded", seen.recorded),
            ("forgotten", seen.forgotten),
            ("duplicates", seen.duplicates),
        ];
        for (what, often) in seen {
            assert!(often.into_inner() > 0, "no key was {what}");
        }
    }
}
