//! Random calls on a simulated disk that stops at any operation, then a kill or a power cut, then the same on what is left:
//! many generations, so that segments are used again and have remains of earlier uses.
//!
//!     ONLYONCE_JOURNAL_ROUNDS=100000 cargo test --release -p onlyonce-journal --test crash
//!
//! `ONLYONCE_JOURNAL_SEED` repeats a run.

#![cfg(not(shuttle))]

mod common;

use std::time::Instant;

use common::{Content, SEGMENT, content, durability, open, options, payload, rng, rounds};
use onlyonce_journal::{Durability, Error, Journal, Options, Position, SimulatedDisk};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// How a generation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Crash {
    Kill,
    KillInAWrite,
    PowerCut,
}

impl Crash {
    fn any(rng: &mut StdRng) -> Self {
        [Self::Kill, Self::KillInAWrite, Self::PowerCut, Self::PowerCut][rng.random_range(0..4)]
    }

    fn image(self, disk: &SimulatedDisk, rng: &mut StdRng) -> SimulatedDisk {
        match self {
            Self::Kill => disk.killed(),
            Self::KillInAWrite => disk.killed_in_a_write(rng.random()),
            Self::PowerCut => disk.power_cut(rng.random()),
        }
    }
}

/// What a journal must have.
struct Model {
    checkpoint: Vec<u8>,
    records: Vec<Vec<u8>>,
    /// How many of the records must survive a kill and a power cut.
    written: usize,
    durable: usize,
    /// A checkpoint that was interrupted, and how many records it replaces.
    attempted: Option<(Vec<u8>, usize)>,
    next_id: u64,
}

impl Model {
    fn new(checkpoint: Vec<u8>) -> Self {
        Self { checkpoint, records: Vec::new(), written: 0, durable: 0, attempted: None, next_id: 1 }
    }

    fn next_payload(&mut self, len: usize) -> Vec<u8> {
        self.next_id += 1;
        payload(self.next_id, len)
    }

    /// Everything that is recorded is on disk.
    fn synced(&mut self) {
        self.written = self.records.len();
        self.durable = self.records.len();
    }

    fn check(&self, found: &Content, crash: Crash) -> Result<(), String> {
        let least = if crash == Crash::PowerCut { self.durable } else { self.written };
        if let Some((checkpoint, replaced)) = &self.attempted
            && *checkpoint == found.checkpoint
        {
            return if self.records[*replaced..] == found.records {
                Ok(())
            } else {
                Err("the attempted checkpoint is not followed by the records from its position on".to_owned())
            };
        }
        if found.checkpoint != self.checkpoint {
            return Err("another checkpoint".to_owned());
        }
        if !self.records.starts_with(&found.records) {
            return Err("the records are no prefix of those that were appended".to_owned());
        }
        if found.records.len() < least {
            return Err(format!("{least} records were acknowledged"));
        }
        Ok(())
    }

    /// Checks what a crash left. After a power cut all of it is on disk; after a kill that is so after the next open.
    fn survive(&mut self, found: &Content, crash: Crash) -> Result<(), String> {
        self.check(found, crash)?;
        if crash == Crash::PowerCut {
            self.accept(found.clone());
        }
        Ok(())
    }

    /// Goes on from what was found.
    fn accept(&mut self, found: Content) {
        self.checkpoint = found.checkpoint;
        self.records = found.records;
        self.attempted = None;
        self.synced();
    }
}

/// A size from nothing to several segments.
fn size(rng: &mut StdRng) -> usize {
    match rng.random_range(0..100) {
        0..60 => rng.random_range(0..300),
        60..85 => rng.random_range(0..6_000),
        85..97 => rng.random_range(0..SEGMENT),
        _ => rng.random_range(0..3 * SEGMENT),
    }
}

/// Calls the journal until the disk stops, or for some calls. Returns whether it closed the journal.
fn work(journal: &Journal<SimulatedDisk>, disk: &SimulatedDisk, model: &mut Model, rng: &mut StdRng) -> bool {
    let mut saved: Option<(Position, usize)> = None;
    for _ in 0..rng.random_range(0..25) {
        match rng.random_range(0..100) {
            0..70 => {
                let len = size(rng);
                let mut record = model.next_payload(len);
                if rng.random_bool(0.1) {
                    // Bytes of the journal itself are data like any other.
                    let files = disk.files();
                    let file = files.values().nth(rng.random_range(0..files.len())).unwrap();
                    let from = rng.random_range(0..file.len() - 3_000);
                    record.extend_from_slice(&file[from..from + 3_000]);
                }
                let durability = durability(rng);
                model.records.push(record.clone());
                let (first, second) = record.split_at(record.len() / 2);
                journal.append(&[first, second], durability).unwrap();
                if disk.has_stopped() {
                    return false;
                }
                model.written = model.records.len();
                if durability == Durability::Disk {
                    model.durable = model.records.len();
                }
            }
            70..78 => {
                journal.sync().unwrap();
                if disk.has_stopped() {
                    return false;
                }
                model.synced();
            }
            78..84 => saved = Some((journal.position(), model.records.len())),
            84..92 => {
                let (position, replaced) = saved.take().unwrap_or((journal.position(), model.records.len()));
                let len = size(rng);
                let checkpoint = model.next_payload(len.max(8));
                model.attempted = Some((checkpoint.clone(), replaced));
                journal.checkpoint(position, &checkpoint).unwrap();
                if disk.has_stopped() {
                    return false;
                }
                model.attempted = None;
                model.checkpoint = checkpoint;
                model.records.drain(..replaced);
                model.synced();
            }
            92..98 => journal.maintain().unwrap(),
            _ => {
                journal.close().unwrap();
                assert!(matches!(journal.append(&[b"late"], Durability::Disk), Err(Error::Closed)));
                if !disk.has_stopped() {
                    model.synced();
                }
                return true;
            }
        }
        if disk.has_stopped() {
            return false;
        }
    }
    false
}

fn any_options(rng: &mut StdRng) -> Options {
    options(SEGMENT << rng.random_range(0..3), SEGMENT * rng.random_range(0..5))
}

/// Creates a journal, on a disk that may stop meanwhile.
fn create(rng: &mut StdRng, crashes: &mut u64) -> (SimulatedDisk, Model, Content) {
    let is_mapped = rng.random_bool(0.3);
    loop {
        let disk = SimulatedDisk::default();
        disk.set_mapped(is_mapped);
        let options = any_options(rng);
        if rng.random_bool(0.5) {
            disk.stop_after(rng.random_range(0..12));
        }
        let mut model = Model::new(payload(1, rng.random_range(8..2 * SEGMENT)));
        let journal = Journal::create(disk.clone(), &options, &model.checkpoint).unwrap();
        let is_created = !disk.has_stopped();
        if is_created {
            disk.stop_after(rng.random_range(0..40));
            work(&journal, &disk, &mut model, rng);
        }
        drop(journal);
        let crash = Crash::any(rng);
        let image = crash.image(&disk, rng);
        *crashes += 1;
        match content(&image) {
            Ok(found) => {
                model.survive(&found, crash).unwrap();
                if !is_created {
                    // It is a journal from its first open on.
                    drop(open(image.clone(), &options).unwrap());
                }
                return (image, model, found);
            }
            // Its owner removes the files and creates it again.
            Err(Error::Corrupt { .. } | Error::Missing { .. }) if !is_created => {}
            Err(error) => panic!("{crash:?}: {error}"),
        }
    }
}

/// One journal through many crashes.
fn live(seed: u64, generations: u64, crashes: &mut u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut disk, mut model, mut found) = create(&mut rng, crashes);
    for generation in 0..generations {
        let what = |error: String, found: &str| -> ! {
            panic!("seed {seed}, generation {generation}: {error}; found {found}")
        };
        let options = any_options(&mut rng);
        // Crashes of the open itself lose nothing.
        while rng.random_bool(0.3) {
            disk.stop_after(rng.random_range(0..15));
            match open(disk.clone(), &options) {
                Ok((_, again, _)) if again == found => {}
                Ok((_, again, _)) => what("the open found other content".to_owned(), &again.summary()),
                Err(error) => what(error.to_string(), "nothing"),
            }
            if !disk.has_stopped() {
                model.accept(found.clone());
            }
            let crash = Crash::any(&mut rng);
            disk = crash.image(&disk, &mut rng);
            *crashes += 1;
            let again = content(&disk).unwrap_or_else(|error| what(error.to_string(), "nothing"));
            if crash != Crash::PowerCut && again != found {
                what("a killed open changed the content".to_owned(), &again.summary());
            }
            if let Err(error) = model.survive(&again, crash) {
                what(format!("{crash:?} of an open: {error}"), &again.summary());
            }
            found = again;
        }
        let (journal, again, _) = open(disk.clone(), &options).unwrap_or_else(|error| {
            panic!("seed {seed}, generation {generation}: {error}");
        });
        if again != found {
            what("a second open found other content".to_owned(), &again.summary());
        }
        model.accept(again);
        if rng.random_bool(0.8) {
            disk.stop_after(rng.random_range(0..60));
        }
        let is_closed = work(&journal, &disk, &mut model, &mut rng);
        drop(journal);
        let crash = if is_closed && !disk.has_stopped() { Crash::PowerCut } else { Crash::any(&mut rng) };
        disk = crash.image(&disk, &mut rng);
        *crashes += 1;
        match content(&disk) {
            Ok(again) => {
                if let Err(error) = model.survive(&again, crash) {
                    what(format!("{crash:?}: {error}"), &again.summary());
                }
                found = again;
            }
            Err(error) => what(format!("{crash:?}: {error}"), "nothing"),
        }
    }
}

#[test]
fn a_crash_at_any_operation_loses_nothing_acknowledged() {
    const GENERATIONS: u64 = 40;
    let mut rng = rng("crash");
    let (start, mut crashes) = (Instant::now(), 0);
    for _ in 0..rounds(100) {
        live(rng.random(), GENERATIONS, &mut crashes);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{crashes} crashes in {seconds:.1} s, {:.0} a second", crashes as f64 / seconds);
}

#[test]
fn remains_of_a_lost_write_never_follow_a_new_record() {
    // One record with its header is one block.
    let record = |byte: u8| vec![byte; 4_096 - 16];
    let disk = SimulatedDisk::default();
    drop(Journal::create(disk.clone(), &common::small(), b"checkpoint").unwrap());
    let (journal, ..) = open(disk.clone(), &common::small()).unwrap();
    (1..6).for_each(|byte| journal.append(&[&record(byte)], Durability::Process).unwrap());
    // A power cut loses the first block of the open's segment, and keeps the later ones.
    let mut files = disk.files();
    let segment = files.values_mut().find(|content| content[12_288..].contains(&5)).unwrap();
    segment[8_192..12_288].fill(0);
    let disk = SimulatedDisk::with_files(files);
    let (journal, found, _) = open(disk.clone(), &common::small()).unwrap();
    assert_eq!(found.records.len(), 0);
    // The new record ends where the second one begins, with the lsn before it.
    journal.append(&[&record(9)], Durability::Disk).unwrap();
    assert!(
        disk.files().values().any(|content| content.windows(16).any(|bytes| bytes == [5; 16])),
        "remains are there"
    );
    assert_eq!(content(&disk).unwrap().records, [record(9)]);
}

#[test]
fn a_bad_copy_of_a_header_is_replaced_before_the_good_one() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &common::small(), b"checkpoint").unwrap();
    for id in 0..9 {
        journal.append(&[&payload(id, 20_000)], Durability::Disk).unwrap();
        journal.checkpoint(journal.position(), b"checkpoint").unwrap();
    }
    journal.close().unwrap();
    // The next open begins its segment in the one that the close began.
    let (name, _) = disk.files().into_iter().max_by_key(|(_, content)| content[32..40].to_vec()).unwrap();
    for (bad, stop, seed) in
        (0..2).flat_map(|bad| (1..4).flat_map(move |stop| (0..600).map(move |seed| (bad, stop, seed))))
    {
        let disk = disk.damaged(&name, |content| content[bad * 4_096 + 20] ^= 1);
        disk.stop_after(stop);
        let _ = open(disk.clone(), &common::small()).unwrap();
        if let Err(error) = content(&disk.power_cut(seed)) {
            panic!("copy {bad}, {stop} operations, seed {seed}: {error}");
        }
    }
}
