//! Races under a model checker: shuttle runs one thread at a time and chooses, at every lock and atomic of the store, who
//! is next. The store is the real one, with its database, but for its own threads: a model's thread seals.
//!
//!     cargo test --config .cargo/shuttle.toml --release --features internals --test shuttle
//!
//! `ONLYONCE_SHUTTLE_ROUNDS` schedules a model instead of a few hundred, `ONLYONCE_SHUTTLE_SEED` for others. A failure prints
//! its schedule; with `ONLYONCE_SHUTTLE_SCHEDULE` set to it and the test's name, it is repeated.
//!
//! Memory is as strong here as it gets: what a processor reorders is not seen. `races.rs` is for that.

#![cfg(shuttle)]

mod common;
#[path = "common/oracle.rs"]
mod oracle;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::START_MS;
use onlyonce::internals::{RecordNumbers, SyncGroup};
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

/// Runs a model under many schedules: half of them choose at random, the others let threads go by changing priorities,
/// which finds what takes few but special changes of turn.
fn model(rounds: u64, model: impl Fn() + Send + Sync + 'static) {
    if let Ok(schedule) = std::env::var("ONLYONCE_SHUTTLE_SCHEDULE") {
        return shuttle::replay(model, &schedule);
    }
    let rounds = number("ONLYONCE_SHUTTLE_ROUNDS").unwrap_or(rounds);
    let seed = number("ONLYONCE_SHUTTLE_SEED").unwrap_or(20_261_121);
    let mut config = Config::new();
    // The database runs on the stacks of the model's threads.
    config.stack_size = 1 << 20;
    let model = Arc::new(model);
    let half = rounds.div_ceil(2) as usize;
    eprintln!("{} schedules, seed {seed}", half * 2);
    let random = Arc::clone(&model);
    Runner::new(RandomScheduler::new_from_seed(seed, half), config.clone()).run(move || random());
    Runner::new(PctScheduler::new_from_seed(seed, 4, half), config).run(move || model());
}

/// A store of a model, on a file system in memory where there is one.
struct Bench {
    oracle: Oracle,
    // After the store.
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
fn whatever_consumers_do_the_answers_are_right_while_seals_move_keys_and_leases_run_out() {
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
fn a_key_that_is_completed_again_after_its_window_is_never_hidden_by_its_older_self() {
    model(600, || {
        let bench = Bench::new(2, Durability::Process);
        // The older self lies in a bucket, and at hand.
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
fn what_is_forgotten_stays_forgotten_and_what_comes_after_it_stays() {
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
fn a_seal_that_fails_takes_nothing_away() {
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
            let runs = bench.dir.path().join("store/runs");
            std::fs::remove_dir(&runs).unwrap();
            // It works where there was nothing to seal yet.
            let _ = bench.oracle.store.flush();
            std::fs::create_dir(&runs).unwrap();
            bench.oracle.store.flush().unwrap();
        }));
        join(threads);
        (0..2).for_each(|key| bench.oracle.check(key));
        let stats = bench.oracle.store.stats();
        assert_eq!((stats.completed, stats.in_flight), (2, 0));
    });
}

#[test]
fn a_store_that_is_closed_under_its_callers_keeps_what_it_said() {
    model(300, || {
        let bench = Bench::new(2, Durability::Disk);
        let said = Arc::new(Mutex::new(BTreeSet::new()));
        let mut threads: Vec<_> = (0..2)
            .map(|key| {
                let said = Arc::clone(&said);
                spawn(&bench, move |bench| {
                    let completed = match bench.oracle.store.claim(key.to_string()).wait() {
                        Ok(Claim::Acquired(lease)) => {
                            lease.complete("done").wait().map_err(|error| error.into_parts().0)
                        }
                        Ok(other) => panic!("{other:?}"),
                        Err(error) => Err(error),
                    };
                    match completed {
                        Ok(()) => drop(said.lock().unwrap().insert(key)),
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
        for key in said.lock().unwrap().iter() {
            assert!(matches!(again.claim(key.to_string()).wait(), Ok(Claim::Completed(_))), "{key}");
        }
    });
}

#[test]
fn a_row_is_settled_when_it_is_finished_and_not_before() {
    model(20_000, || {
        let rows = Arc::new(RecordNumbers::default());
        let next = Arc::new(AtomicU64::new(1));
        // Begun, and not about to be finished.
        let open = Arc::new(Mutex::new(BTreeSet::new()));
        let writers = (0..3).map(|_| {
            let (rows, next, open) = (Arc::clone(&rows), Arc::clone(&next), Arc::clone(&open));
            thread::spawn(move || {
                for _ in 0..2 {
                    let number = rows.begin(|| next.fetch_add(1, Ordering::SeqCst));
                    open.lock().unwrap().insert(number);
                    assert!(!rows.is_finished(number));
                    open.lock().unwrap().remove(&number);
                    rows.finish(number);
                    assert!(rows.is_finished(number));
                }
            })
        });
        let mut threads: Vec<_> = writers.collect();
        let (rows, open) = (Arc::clone(&rows), Arc::clone(&open));
        threads.push(thread::spawn(move || {
            for _ in 0..3 {
                let before: Vec<u64> = open.lock().unwrap().iter().copied().collect();
                let settled = before.iter().filter(|number| rows.is_finished(**number)).count();
                let below = rows.finished_below(|| next.load(Ordering::SeqCst));
                let open = open.lock().unwrap();
                let still = before.iter().filter(|number| open.contains(number)).copied();
                assert!(settled + still.clone().count() <= before.len());
                assert!(still.clone().all(|number| below <= number), "{below} is above one of {before:?}");
            }
        }));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn whoever_waits_for_a_key_is_woken_by_every_end_of_its_work() {
    model(600, || {
        let bench = Bench::new(1, if pick(2) == 0 { Durability::Disk } else { Durability::Process });
        let threads: Vec<_> = (0..3)
            .map(|_| {
                spawn(&bench, |bench| {
                    loop {
                        // A wake-up that is lost leaves it waiting, for no time passes here: the model takes it for a deadlock.
                        match bench.oracle.store.claim("k").wait_up_to(Duration::MAX).wait().unwrap() {
                            Claim::Acquired(lease) => match pick(4) {
                                0 => drop(lease),
                                1 => lease.release().wait().unwrap(),
                                _ => lease.complete("done").wait().unwrap(),
                            },
                            Claim::Completed(first) => break assert_eq!(first.result(), Some(&b"done"[..])),
                            Claim::InProgress(other) => panic!("it gave up waiting: {other:?}"),
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
fn whoever_waits_for_a_key_is_told_that_the_store_was_closed() {
    model(600, || {
        let bench = Bench::new(1, Durability::Process);
        let Claim::Acquired(lease) = bench.oracle.store.claim("k").wait().unwrap() else { panic!("it is new") };
        let waits = spawn(&bench, |bench| {
            let told = bench.oracle.store.claim("k").wait_up_to(Duration::MAX).wait();
            assert!(matches!(told, Err(Error::Closed)), "{told:?}");
        });
        let closes = spawn(&bench, |bench| bench.oracle.store.close().wait().unwrap());
        join([waits, closes]);
        drop(lease);
    });
}

/// A disk that has what was written when its last sync began.
#[derive(Default)]
struct Disk {
    written: AtomicU64,
    synced: AtomicU64,
    syncs: AtomicU64,
    syncing: AtomicU64,
    fails_at: Option<u64>,
}

impl Disk {
    fn sync(&self) -> onlyonce::Result<()> {
        assert_eq!(self.syncing.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
        let covered = self.written.load(Ordering::SeqCst);
        thread::yield_now();
        let this = self.syncs.fetch_add(1, Ordering::SeqCst);
        self.syncing.fetch_sub(1, Ordering::SeqCst);
        if self.fails_at == Some(this) {
            return Err(Error::WriteFailed { source: "the disk is gone".into() });
        }
        self.synced.store(covered, Ordering::SeqCst);
        Ok(())
    }
}

fn share_syncs(fails_at: impl Fn() -> Option<u64> + Send + Sync + 'static) {
    model(20_000, move || {
        let group = Arc::new(SyncGroup::default());
        let disk = Arc::new(Disk { fails_at: fails_at(), ..Disk::default() });
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let (group, disk) = (Arc::clone(&group), Arc::clone(&disk));
                thread::spawn(move || {
                    let mut failed = false;
                    for _ in 0..2 {
                        let mine = disk.written.fetch_add(1, Ordering::SeqCst) + 1;
                        thread::yield_now();
                        let outcome = group.wait(|| disk.sync());
                        match outcome {
                            Ok(()) => {
                                assert!(!failed, "believed after a failure");
                                assert!(disk.synced.load(Ordering::SeqCst) >= mine, "it came back too early");
                            }
                            Err(_) => failed = true,
                        }
                    }
                    assert!(!failed || disk.fails_at.is_some());
                })
            })
            .collect();
        // A wake-up that is lost leaves a thread waiting, which the model takes for a deadlock.
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        if let Some(fails_at) = disk.fails_at.filter(|fails_at| disk.syncs.load(Ordering::SeqCst) > *fails_at) {
            assert_eq!(disk.syncs.load(Ordering::SeqCst), fails_at + 1, "nobody syncs after a failure");
            assert!(group.wait(|| disk.sync()).is_err());
        }
    });
}

#[test]
fn callers_that_share_a_sync_all_come_back_and_none_too_early() {
    share_syncs(|| None);
}

#[test]
fn a_sync_that_fails_is_believed_by_nobody_and_leaves_nobody_waiting() {
    share_syncs(|| Some(pick(3) as u64));
}
