//! Races under a model checker: shuttle runs one thread at a time, and chooses the next thread at every lock and atomic
//! of the store. The store is real, with its database, but without background threads: a thread of the model flushes.
//!
//!     cargo test --config .cargo/shuttle.toml --release --features __internals --test shuttle
//!
//! `ONLYONCE_SHUTTLE_ROUNDS` sets the schedules per model (default: a few hundred), and `ONLYONCE_SHUTTLE_SEED` the
//! seed. A failure prints its schedule; run the test with `ONLYONCE_SHUTTLE_SCHEDULE` set to it to repeat it.
//!
//! The model's memory is sequentially consistent: reordering by a processor is not covered here, but by `races.rs`.

#![cfg(shuttle)]

mod common;
#[path = "common/oracle.rs"]
mod oracle;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::START_MS;
use onlyonce::internals::RecordNumbers;
use onlyonce::{Claim, Durability, Error, ManualClock, Store, Timestamp};
use oracle::Oracle;
use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{self, JoinHandle};
use shuttle::{Config, Runner};

const WINDOW_MS: u64 = 20;
const LEASE_MS: u64 = 5;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap())
}

/// Runs a model under many schedules: half of them random, the others by changing priorities, which finds races that
/// need few but specific switches.
fn model(rounds: u64, model: impl Fn() + Send + Sync + 'static) {
    if let Ok(schedule) = std::env::var("ONLYONCE_SHUTTLE_SCHEDULE") {
        return shuttle::replay(model, &schedule);
    }
    let rounds = number("ONLYONCE_SHUTTLE_ROUNDS").unwrap_or(rounds);
    let seed = number("ONLYONCE_SHUTTLE_SEED").unwrap_or(20_261_121);
    let mut config = Config::new();
    // RocksDB runs on the stacks of the model's threads.
    config.stack_size = 1 << 20;
    let model = Arc::new(model);
    let half = rounds.div_ceil(2) as usize;
    eprintln!("{} schedules, seed {seed}", half * 2);
    let random = Arc::clone(&model);
    Runner::new(RandomScheduler::new_from_seed(seed, half), config.clone()).run(move || random());
    Runner::new(PctScheduler::new_from_seed(seed, 4, half), config).run(move || model());
}

/// The store of a model, on a file system in memory if there is one.
struct Bench {
    oracle: Oracle,
    // After the store, so that it is dropped last.
    dir: tempfile::TempDir,
}

impl Bench {
    fn new(keys: usize, durability: Durability) -> Arc<Self> {
        let memory = std::path::Path::new("/dev/shm");
        let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
        let store = Store::builder()
            .window(Duration::from_millis(WINDOW_MS))
            .bucket(Duration::from_millis(WINDOW_MS / 2))
            .lease(Duration::from_millis(LEASE_MS))
            .memory_budget(32 << 20)
            .durability(durability)
            .clock(clock.clone())
            .open(dir.path().join("store"))
            .unwrap();
        Arc::new(Self { oracle: Oracle::new(store, clock, keys, WINDOW_MS, LEASE_MS, 0), dir })
    }

    fn advance_ms(&self, ms: u64) {
        self.oracle.clock.advance(Duration::from_millis(ms));
    }
}

fn spawn(bench: &Arc<Bench>, work: impl FnOnce(&Bench) + Send + 'static) -> JoinHandle<()> {
    let bench = Arc::clone(bench);
    thread::spawn(move || work(&bench))
}

fn join(threads: impl IntoIterator<Item = JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

fn pick(below: usize) -> usize {
    shuttle::rand::thread_rng().gen_range(0..below)
}

#[test]
fn all_answers_are_correct_while_flushes_move_keys_and_leases_expire() {
    model(300, || {
        let bench = Bench::new(3, if pick(2) == 0 { Durability::Disk } else { Durability::Process });
        for _ in 0..4 {
            let mut threads: Vec<_> = (0..3)
                .map(|_| {
                    spawn(&bench, |bench| {
                        let mut held = Vec::new();
                        for _ in 0..4 {
                            bench.oracle.step(&mut pick, &mut held);
                        }
                        for work in held {
                            bench.oracle.complete(work);
                        }
                    })
                })
                .collect();
            threads.push(spawn(&bench, |bench| {
                bench.oracle.store.flush().unwrap();
                bench.advance_ms(LEASE_MS);
                bench.oracle.store.flush().unwrap();
            }));
            join(threads);
            bench.advance_ms(LEASE_MS);
        }
    });
}

#[test]
fn a_key_completed_again_after_its_window_is_never_hidden_by_its_older_entry() {
    model(600, || {
        let bench = Bench::new(2, Durability::Process);
        // The older entry is in a bucket and in the recent cache.
        assert!(bench.oracle.complete(bench.oracle.claim(0).unwrap()));
        bench.oracle.store.flush().unwrap();
        bench.advance_ms(WINDOW_MS);
        let mut threads: Vec<_> = (0..2)
            .map(|_| {
                spawn(&bench, |bench| {
                    for _ in 0..2 {
                        if let Some(work) = bench.oracle.claim(0) {
                            assert!(bench.oracle.complete(work));
                        }
                    }
                })
            })
            .collect();
        threads.push(spawn(&bench, |bench| (0..2).for_each(|_| bench.oracle.store.flush().unwrap())));
        join(threads);
        assert_eq!(bench.oracle.seen.completed.load(Ordering::SeqCst), 2, "once in each window");
    });
}

#[test]
fn a_completion_and_a_takeover_of_its_lease_never_both_win() {
    model(600, || {
        let bench = Bench::new(1, Durability::Process);
        let late = bench.oracle.claim(0).unwrap();
        let threads = [
            spawn(&bench, |bench| {
                bench.oracle.complete(late);
            }),
            spawn(&bench, |bench| bench.advance_ms(LEASE_MS)),
            spawn(&bench, |bench| bench.oracle.store.flush().unwrap()),
            spawn(&bench, |bench| {
                for _ in 0..2 {
                    thread::yield_now();
                    if let Some(work) = bench.oracle.claim(0) {
                        assert!(bench.oracle.complete(work));
                    }
                }
            }),
        ];
        join(threads);
        let seen = &bench.oracle.seen;
        assert_eq!(seen.completed.load(Ordering::SeqCst), 1);
        assert_eq!(seen.superseded.load(Ordering::SeqCst), seen.taken_over.load(Ordering::SeqCst));
    });
}

#[test]
fn a_forgotten_key_stays_forgotten_and_a_later_completion_is_kept() {
    model(400, || {
        let bench = Bench::new(1, Durability::Process);
        assert!(bench.oracle.complete(bench.oracle.claim(0).unwrap()));
        if pick(2) == 0 {
            bench.oracle.store.flush().unwrap();
        }
        let threads = [
            spawn(&bench, |bench| {
                bench.oracle.forget(0);
                bench.oracle.check(0);
            }),
            spawn(&bench, |bench| {
                bench.oracle.check(0);
                if let Some(work) = bench.oracle.claim(0) {
                    assert!(bench.oracle.complete(work));
                    bench.oracle.check(0);
                }
            }),
            spawn(&bench, |bench| (0..2).for_each(|_| bench.oracle.store.flush().unwrap())),
        ];
        join(threads);
        bench.oracle.check(0);
    });
}

#[test]
fn a_failed_flush_loses_nothing() {
    model(400, || {
        let bench = Bench::new(2, Durability::Process);
        let mut threads: Vec<_> = (0..2)
            .map(|_| {
                spawn(&bench, |bench| {
                    for key in 0..2 {
                        if let Some(work) = bench.oracle.claim(key) {
                            assert!(bench.oracle.complete(work));
                        }
                        bench.oracle.check(key);
                    }
                })
            })
            .collect();
        threads.push(spawn(&bench, |bench| {
            let sst_dir = bench.dir.path().join("store/ssts");
            std::fs::remove_dir(&sst_dir).unwrap();
            // It succeeds if there is nothing to flush.
            let _ = bench.oracle.store.flush();
            std::fs::create_dir(&sst_dir).unwrap();
            bench.oracle.store.flush().unwrap();
        }));
        join(threads);
        (0..2).for_each(|key| bench.oracle.check(key));
        let stats = bench.oracle.store.stats();
        assert_eq!((stats.completed, stats.in_flight), (2, 0));
    });
}

#[test]
fn a_store_closed_during_calls_keeps_what_it_acknowledged() {
    model(300, || {
        let bench = Bench::new(2, Durability::Disk);
        let acknowledged = Arc::new(Mutex::new(BTreeSet::new()));
        let mut threads: Vec<_> = (0..2)
            .map(|key| {
                let acknowledged = Arc::clone(&acknowledged);
                spawn(&bench, move |bench| {
                    let completed = match bench.oracle.store.claim(key.to_string()).wait() {
                        Ok(Claim::Acquired(lease)) => {
                            lease.complete("done").wait().map_err(|error| error.into_parts().0)
                        }
                        Ok(other) => panic!("{other:?}"),
                        Err(error) => Err(error),
                    };
                    match completed {
                        Ok(()) => drop(acknowledged.lock().unwrap().insert(key)),
                        Err(error) => assert!(matches!(error, Error::Closed), "{error}"),
                    }
                })
            })
            .collect();
        threads.push(spawn(&bench, |bench| match bench.oracle.store.flush() {
            Ok(()) | Err(Error::Closed) => {}
            Err(error) => panic!("{error}"),
        }));
        threads.push(spawn(&bench, |bench| bench.oracle.store.close().wait().unwrap()));
        join(threads);
        let again = Store::builder().clock(bench.oracle.clock.clone()).open(bench.dir.path().join("store")).unwrap();
        for key in acknowledged.lock().unwrap().iter() {
            assert!(matches!(again.claim(key.to_string()).wait(), Ok(Claim::Completed(_))), "{key}");
        }
    });
}

#[test]
fn a_record_counts_as_finished_exactly_when_it_is() {
    model(20_000, || {
        let records = Arc::new(RecordNumbers::default());
        let next = Arc::new(AtomicU64::new(1));
        // Started, and not finished soon.
        let open = Arc::new(Mutex::new(BTreeSet::new()));
        let writers = (0..3).map(|_| {
            let (records, next, open) = (Arc::clone(&records), Arc::clone(&next), Arc::clone(&open));
            thread::spawn(move || {
                for _ in 0..2 {
                    let number = records.begin(|| next.fetch_add(1, Ordering::SeqCst));
                    open.lock().unwrap().insert(number);
                    assert!(!records.is_finished(number));
                    open.lock().unwrap().remove(&number);
                    records.finish(number);
                    assert!(records.is_finished(number));
                }
            })
        });
        let mut threads: Vec<_> = writers.collect();
        let (records, open) = (Arc::clone(&records), Arc::clone(&open));
        threads.push(thread::spawn(move || {
            for _ in 0..3 {
                let before: Vec<u64> = open.lock().unwrap().iter().copied().collect();
                let finished = before.iter().filter(|number| records.is_finished(**number)).count();
                let below = records.finished_below(|| next.load(Ordering::SeqCst));
                let open = open.lock().unwrap();
                let still = before.iter().filter(|number| open.contains(number)).copied();
                assert!(finished + still.clone().count() <= before.len());
                assert!(still.clone().all(|number| below <= number), "{below} is above one of {before:?}");
            }
        }));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_waiting_claim_is_woken_by_every_end_of_the_work() {
    model(600, || {
        let bench = Bench::new(1, if pick(2) == 0 { Durability::Disk } else { Durability::Process });
        let threads: Vec<_> = (0..3)
            .map(|_| {
                spawn(&bench, |bench| {
                    loop {
                        // After a lost wakeup it waits forever, because no time passes here: the model reports a deadlock.
                        match bench.oracle.store.claim("k").wait_up_to(Duration::MAX).wait().unwrap() {
                            Claim::Acquired(lease) => match pick(4) {
                                0 => drop(lease),
                                1 => lease.release().wait().unwrap(),
                                _ => lease.complete("done").wait().unwrap(),
                            },
                            Claim::Completed(first) => break assert_eq!(first.result(), Some(&b"done"[..])),
                            Claim::InProgress(other) => panic!("the claim returned at its limit: {other:?}"),
                        }
                    }
                })
            })
            .collect();
        let sealer = spawn(&bench, |bench| bench.oracle.store.flush().unwrap());
        join(threads.into_iter().chain([sealer]));
    });
}

#[test]
fn a_waiting_claim_returns_an_error_when_the_store_is_closed() {
    model(600, || {
        let bench = Bench::new(1, Durability::Process);
        let Claim::Acquired(lease) = bench.oracle.store.claim("k").wait().unwrap() else { panic!("it is new") };
        let waits = spawn(&bench, |bench| {
            let answer = bench.oracle.store.claim("k").wait_up_to(Duration::MAX).wait();
            assert!(matches!(answer, Err(Error::Closed)), "{answer:?}");
        });
        let closes = spawn(&bench, |bench| bench.oracle.store.close().wait().unwrap());
        join([waits, closes]);
        drop(lease);
    });
}
