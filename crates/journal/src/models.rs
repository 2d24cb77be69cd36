//! Races under a model checker: shuttle runs one thread at a time, and chooses the next one at every lock and atomic.
//!
//!     cargo test --config .cargo/shuttle.toml --release -p onlyonce-journal --lib
//!
//! `ONLYONCE_SHUTTLE_ROUNDS` sets the schedules per model, and `ONLYONCE_SHUTTLE_SEED` the seed. A failure prints its schedule;
//! run the test with `ONLYONCE_SHUTTLE_SCHEDULE` set to it to repeat it. A lost wakeup is a deadlock, which shuttle reports.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use shuttle::rand::Rng;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{self, JoinHandle};
use shuttle::{Config, Runner};

use super::error::{Error, Result, not_written, unknown};
use super::group_commit::{Batch, Durability, GroupCommit, Sink};
use super::record::Kind;
use super::{Journal, Medium, Options, Recovered, SimulatedDisk};

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|value| value.parse().unwrap())
}

/// Runs a model under many schedules: half of them random, the others by changing priorities.
fn model(rounds: u64, model: impl Fn() + Send + Sync + 'static) {
    if let Ok(schedule) = std::env::var("ONLYONCE_SHUTTLE_SCHEDULE") {
        return shuttle::replay(model, &schedule);
    }
    let rounds = number("ONLYONCE_SHUTTLE_ROUNDS").unwrap_or(rounds);
    let seed = number("ONLYONCE_SHUTTLE_SEED").unwrap_or(20_261_130);
    let model = Arc::new(model);
    let half = rounds.div_ceil(2) as usize;
    eprintln!("{} schedules, seed {seed}", half * 2);
    let random = Arc::clone(&model);
    Runner::new(RandomScheduler::new_from_seed(seed, half), Config::new()).run(move || random());
    Runner::new(PctScheduler::new_from_seed(seed, 4, half), Config::new()).run(move || model());
}

fn pick(below: usize) -> usize {
    shuttle::rand::thread_rng().gen_range(0..below)
}

fn durability() -> Durability {
    if pick(2) == 0 { Durability::Disk } else { Durability::Process }
}

fn join(threads: Vec<JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Which operation of a model fails, if one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// The write is rejected as a whole.
    Rejected(u64),
    Write(u64),
    Sync(u64),
}

/// A sink that knows which records are written and on disk.
struct Disk {
    fault: Fault,
    written: Mutex<BTreeSet<u64>>,
    durable: Mutex<BTreeSet<u64>>,
    writes: AtomicU64,
    syncs: AtomicU64,
    writing: AtomicU64,
    syncing: AtomicU64,
}

impl Disk {
    fn new(fault: Fault) -> Self {
        Self {
            fault,
            written: Mutex::default(),
            durable: Mutex::default(),
            writes: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
            writing: AtomicU64::new(0),
            syncing: AtomicU64::new(0),
        }
    }

    fn has(&self, id: u64, durability: Durability) -> bool {
        let set = if durability == Durability::Disk { &self.durable } else { &self.written };
        set.lock().unwrap().contains(&id)
    }
}

impl Sink for Disk {
    fn write(&self, batch: &Batch) -> Result<()> {
        assert_eq!(self.writing.fetch_add(1, Ordering::SeqCst), 0, "two writes at a time");
        thread::yield_now();
        let this = self.writes.fetch_add(1, Ordering::SeqCst);
        let outcome = match self.fault {
            Fault::Rejected(at) if at == this => {
                Err(not_written("creating", "a file", io::ErrorKind::StorageFull.into()))
            }
            Fault::Write(at) if at == this => Err(unknown("writing", "a file", io::Error::other("the disk failed"))),
            _ => {
                let ids = batch.records().map(|(_, bytes)| u64::from_le_bytes(*bytes.first_chunk().unwrap()));
                self.written.lock().unwrap().extend(ids);
                Ok(())
            }
        };
        thread::yield_now();
        self.writing.fetch_sub(1, Ordering::SeqCst);
        outcome
    }

    fn sync(&self) -> Result<()> {
        assert_eq!(self.syncing.fetch_add(1, Ordering::SeqCst), 0, "two syncs at a time");
        let written = self.written.lock().unwrap().clone();
        thread::yield_now();
        let this = self.syncs.fetch_add(1, Ordering::SeqCst);
        let outcome = match self.fault {
            Fault::Sync(at) if at == this => Err(unknown("syncing", "a file", io::Error::other("the disk failed"))),
            Fault::Sync(at) => {
                assert!(this < at, "a sync after the one that failed");
                self.durable.lock().unwrap().extend(written);
                Ok(())
            }
            _ => {
                self.durable.lock().unwrap().extend(written);
                Ok(())
            }
        };
        self.syncing.fetch_sub(1, Ordering::SeqCst);
        outcome
    }
}

/// Threads append and sync, and one closes if asked.
fn commit(rounds: u64, closes: bool, fault: impl Fn() -> Fault + Send + Sync + 'static) {
    model(rounds, move || {
        let fault = fault();
        let (group, disk) = (Arc::new(GroupCommit::default()), Arc::new(Disk::new(fault)));
        let mut threads: Vec<_> = (0..4u64)
            .map(|thread| {
                let (group, disk) = (Arc::clone(&group), Arc::clone(&disk));
                thread::spawn(move || {
                    let (mut acknowledged, mut has_failed) = (Vec::new(), false);
                    for i in 0..2 {
                        let (id, durability) = (thread * 2 + i, durability());
                        match group.append(Kind::Data, &[&id.to_le_bytes()], durability, &*disk) {
                            Ok(()) => {
                                assert!(!has_failed, "an append succeeded after a failure");
                                assert!(disk.has(id, durability), "the append returned too early");
                                acknowledged.push(id);
                            }
                            Err(Error::NotWritten { .. }) => assert!(!disk.has(id, Durability::Process)),
                            Err(Error::Closed) => {
                                assert!(
                                    closes && !disk.has(id, Durability::Process),
                                    "it is written although it failed"
                                );
                                has_failed = true;
                            }
                            Err(_) => has_failed = true,
                        }
                        if pick(3) == 0 {
                            match group.sync(&*disk) {
                                Ok(()) => {
                                    assert!(!has_failed);
                                    assert!(acknowledged.iter().all(|id| disk.has(*id, Durability::Disk)));
                                }
                                Err(Error::NotWritten { .. }) => panic!("a sync rejects nothing"),
                                Err(_) => has_failed = true,
                            }
                        }
                    }
                    assert!(!has_failed || closes || matches!(fault, Fault::Write(_) | Fault::Sync(_)));
                })
            })
            .collect();
        if closes {
            let (group, disk) = (Arc::clone(&group), Arc::clone(&disk));
            threads.push(thread::spawn(move || {
                if group.close(&*disk).is_ok() {
                    let written = disk.written.lock().unwrap().clone();
                    assert_eq!(written, *disk.durable.lock().unwrap());
                    assert_eq!(disk.writing.load(Ordering::SeqCst) + disk.syncing.load(Ordering::SeqCst), 0);
                }
            }));
        }
        join(threads);
        assert_eq!(group.waiting(), (0, 0), "waiters and rejections are left");
    });
}

#[test]
fn every_call_returns_and_none_before_its_record_is_written_or_on_disk() {
    commit(40_000, false, || Fault::None);
}

#[test]
fn a_rejected_batch_fails_its_own_callers_only() {
    commit(40_000, false, || Fault::Rejected(pick(4) as u64));
}

#[test]
fn a_failed_write_or_sync_fails_every_call_after_it() {
    commit(40_000, false, || {
        let at = pick(3) as u64;
        if pick(2) == 0 { Fault::Write(at) } else { Fault::Sync(at) }
    });
}

#[test]
fn a_close_waits_for_calls_before_it_and_rejects_those_after_it() {
    commit(40_000, true, || [Fault::None, Fault::Rejected(1), Fault::Write(1), Fault::Sync(1)][pick(4)]);
}

#[test]
fn a_journal_in_concurrent_use_keeps_what_it_acknowledged() {
    model(4_000, || {
        let disk = SimulatedDisk::default();
        let options = Options { smallest_segment: 64 << 10, largest_segment: 64 << 10, ..Options::default() };
        let journal = Arc::new(Journal::create(disk.clone(), &options, &[]).unwrap());
        let (applied, acknowledged) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
        let mut threads: Vec<_> = (0..3u8)
            .map(|thread| {
                let (journal, applied) = (Arc::clone(&journal), Arc::clone(&applied));
                let acknowledged = Arc::clone(&acknowledged);
                thread::spawn(move || {
                    for i in 0..2 {
                        let (id, durability) = (thread * 2 + i + 1, durability());
                        applied.lock().unwrap().push(id);
                        match journal.append(&[&vec![id; 30_000]], durability) {
                            Ok(()) => acknowledged.lock().unwrap().push((id, durability)),
                            Err(error) => assert!(matches!(error, Error::Closed), "{error}"),
                        }
                    }
                })
            })
            .collect();
        let (other, its_disk) = (Arc::clone(&journal), disk.clone());
        let (its_applied, its_acknowledged) = (Arc::clone(&applied), Arc::clone(&acknowledged));
        threads.push(thread::spawn(move || {
            let position = other.position();
            let snapshot = its_applied.lock().unwrap().clone();
            let _ = other.checkpoint(position, &snapshot);
            let expected = its_acknowledged.lock().unwrap().clone();
            let written = found(its_disk.killed());
            assert!(expected.iter().all(|(id, _)| written.contains(id)));
            let durable = found(its_disk.power_cut(pick(1_000) as u64));
            assert!(expected.iter().all(|(id, durability)| *durability == Durability::Process || durable.contains(id)));
        }));
        let other = Arc::clone(&journal);
        threads.push(thread::spawn(move || {
            let _ = other.maintain();
            if pick(2) == 0 {
                other.close().unwrap();
            }
        }));
        join(threads);
        let written = found(disk.killed());
        assert!(acknowledged.lock().unwrap().iter().all(|(id, _)| written.contains(id)));
    });
}

/// The first bytes of all records, and of those that the checkpoint replaces.
fn found(disk: impl Medium) -> Vec<u8> {
    let mut found = Vec::new();
    Journal::open(disk, &Options::default(), |recovered| {
        match recovered {
            Recovered::Checkpoint(bytes) => found.extend_from_slice(bytes),
            Recovered::Record(bytes) => found.extend(bytes.first()),
        }
        Ok(())
    })
    .unwrap();
    found
}
