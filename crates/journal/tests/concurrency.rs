//! Threads that append, sync, write checkpoints and maintain at the same time, with images of crashes taken meanwhile.

#![cfg(not(shuttle))]

mod common;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Content, SEGMENT, content, durability, open, options, rng, rounds, small};
use onlyonce_journal::{Durability, Error, Journal, SimulatedDisk};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const THREADS: u64 = 6;

type Ids = BTreeSet<u64>;

/// What callers know.
#[derive(Default)]
struct Known {
    /// Records that are appended or about to be: what a checkpoint has.
    applied: Ids,
    /// Records whose appends returned, and those of them that a power cut leaves.
    acknowledged: Ids,
    durable: Ids,
    rejected: Ids,
}

fn encoded(ids: &Ids) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_le_bytes()).collect()
}

fn id(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().unwrap())
}

/// The records of a checkpoint and those after it. Checks that each thread's records are in its own order.
fn ids(found: &Content) -> Ids {
    let mut ids: Ids = found.checkpoint.chunks(8).map(id).collect();
    let mut last = [0; THREADS as usize];
    for record in &found.records {
        let id = id(record);
        let last = &mut last[(id >> 32) as usize];
        assert!(id > *last, "a record is before one whose append returned before it began");
        *last = id;
        ids.insert(id);
    }
    ids
}

fn assert_has(image: &SimulatedDisk, expected: &Ids, rejected: &Ids) {
    let found = ids(&content(image).unwrap());
    assert_eq!(expected.difference(&found).next(), None, "an acknowledged record is missing");
    assert_eq!(rejected.intersection(&found).next(), None, "a rejected record is there");
}

/// Runs threads that append while others write checkpoints, maintain, and take images. The disk is full now and then if
/// asked.
fn run(seed: u64, fills_up: bool) -> u64 {
    let disk = SimulatedDisk::default();
    let mut rng = StdRng::seed_from_u64(seed);
    disk.set_mapped(rng.random_bool(0.5));
    let journal = Journal::create(disk.clone(), &options(2 * SEGMENT, 2 * SEGMENT), &[]).unwrap();
    let known = Mutex::new(Known::default());
    let (running, images) = (AtomicU64::new(THREADS), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (disk, journal, known, running, images) = (&disk, &journal, &known, &running, &images);
        for thread in 0..THREADS {
            let mut rng = StdRng::seed_from_u64(rng.random());
            scope.spawn(move || {
                for i in 1..=60 {
                    let id = thread << 32 | i;
                    let len = if rng.random_bool(0.03) { 5 * SEGMENT } else { 2_000 };
                    let mut record = id.to_le_bytes().to_vec();
                    record.resize(rng.random_range(8..len), i as u8);
                    let durability = durability(&mut rng);
                    if !fills_up {
                        known.lock().unwrap().applied.insert(id);
                    }
                    let outcome = journal.append(&[&record], durability);
                    let mut known = known.lock().unwrap();
                    match outcome {
                        Ok(()) => {
                            known.acknowledged.insert(id);
                            if durability == Durability::Disk {
                                known.durable.insert(id);
                            }
                        }
                        Err(Error::NotWritten { .. }) if fills_up => drop(known.rejected.insert(id)),
                        Err(error) => panic!("{error}"),
                    }
                }
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        let mut rng = StdRng::seed_from_u64(rng.random());
        scope.spawn(move || {
            while running.load(Ordering::SeqCst) > 0 {
                if fills_up {
                    disk.set_free(if rng.random_bool(0.5) { Some(0) } else { None });
                } else {
                    let position = journal.position();
                    let snapshot = encoded(&known.lock().unwrap().applied);
                    journal.checkpoint(position, &snapshot).unwrap();
                }
                std::thread::yield_now();
            }
        });
        scope.spawn(move || {
            while running.load(Ordering::SeqCst) > 0 {
                if !matches!(journal.maintain(), Ok(()) | Err(Error::NotWritten { .. })) {
                    panic!("the maintenance fails");
                }
                let acknowledged = known.lock().unwrap().acknowledged.clone();
                journal.sync().unwrap();
                known.lock().unwrap().durable.extend(acknowledged);
                std::thread::yield_now();
            }
        });
        scope.spawn(move || {
            while running.load(Ordering::SeqCst) > 0 {
                let (written, durable, rejected) = {
                    let known = known.lock().unwrap();
                    (known.acknowledged.clone(), known.durable.clone(), known.rejected.clone())
                };
                let number = images.fetch_add(2, Ordering::SeqCst);
                assert_has(&disk.killed(), &written, &rejected);
                assert_has(&disk.power_cut(seed ^ number), &durable, &rejected);
            }
        });
    });
    let known = known.into_inner().unwrap();
    assert_has(&disk.killed(), &known.acknowledged, &known.rejected);
    assert_has(&disk.power_cut(seed), &known.durable, &known.rejected);
    disk.set_free(None);
    journal.close().unwrap();
    assert_has(&disk.power_cut(seed), &known.acknowledged, &known.rejected);
    images.into_inner()
}

#[test]
fn an_image_at_any_time_has_everything_acknowledged_before_it() {
    let mut rng = rng("concurrency");
    let images: u64 = (0..rounds(20)).map(|_| run(rng.random(), false)).sum();
    println!("{images} images");
}

#[test]
fn a_disk_that_is_full_now_and_then_loses_nothing_acknowledged_and_keeps_nothing_rejected() {
    let mut rng = rng("full disk");
    let images: u64 = (0..rounds(20)).map(|_| run(rng.random(), true)).sum();
    println!("{images} images");
}

#[test]
fn a_close_during_appends_keeps_each_record_whose_append_succeeded_and_no_other() {
    let mut rng = rng("close");
    for _ in 0..rounds(100) {
        let disk = SimulatedDisk::default();
        let journal = Journal::create(disk.clone(), &small(), &[]).unwrap();
        let (acknowledged, is_closed) = (Mutex::new(Ids::new()), AtomicBool::new(false));
        let mut durabilities: Vec<_> = (0..THREADS).map(|_| durability(&mut rng)).collect();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (journal, acknowledged, is_closed) = (&journal, &acknowledged, &is_closed);
                let durability = durabilities.pop().unwrap();
                scope.spawn(move || {
                    for i in 1.. {
                        let was_closed = is_closed.load(Ordering::SeqCst);
                        let id = thread << 32 | i;
                        match journal.append(&[&id.to_le_bytes()], durability) {
                            Ok(()) => drop(acknowledged.lock().unwrap().insert(id)),
                            Err(Error::Closed) => break,
                            Err(error) => panic!("{error}"),
                        }
                        assert!(!was_closed, "an append succeeded after the close");
                    }
                });
            }
            while acknowledged.lock().unwrap().len() < 20 {
                std::thread::yield_now();
            }
            journal.close().unwrap();
            is_closed.store(true, Ordering::SeqCst);
            let at_close = disk.operations();
            std::thread::yield_now();
            assert!(matches!(journal.maintain(), Err(Error::Closed)));
            assert_eq!(disk.operations(), at_close, "the journal uses no file after its close");
        });
        let (_, found, _) = open(disk.power_cut(rng.random()), &small()).unwrap();
        assert_eq!(ids(&found), acknowledged.into_inner().unwrap());
    }
}
