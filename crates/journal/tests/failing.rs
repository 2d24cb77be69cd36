//! Operations of the disk that fail: what was not written is never replayed, and after a failure with an unknown outcome nothing
//! more is written or synced.

#![cfg(not(shuttle))]

mod common;

use std::io::ErrorKind;

use common::{Content, SEGMENT, content, durability, open, options, payload, rng, rounds, small};
use onlyonce_journal::{Durability, Error, Journal, Options, SimulatedDisk};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What a failed operation may leave.
#[derive(Default)]
struct Model {
    checkpoint: Vec<u8>,
    /// A checkpoint with an unknown outcome.
    unknown_checkpoint: Option<Vec<u8>>,
    /// Records since the checkpoint, and whether they are acknowledged. One that is not has an unknown outcome.
    records: Vec<(Vec<u8>, bool)>,
    rejected: u64,
}

impl Model {
    fn check(&self, found: &Content) {
        if self.unknown_checkpoint.as_ref() == Some(&found.checkpoint) {
            assert!(found.records.is_empty(), "{}", found.summary());
            return;
        }
        assert_eq!(found.checkpoint, self.checkpoint);
        let mut left = found.records.iter().peekable();
        for (record, is_acknowledged) in &self.records {
            let is_found = left.next_if(|next| *next == record).is_some();
            assert!(is_found || !is_acknowledged, "an acknowledged record is missing: {}", found.summary());
        }
        assert_eq!(left.next(), None, "a record was rejected, and is there: {}", found.summary());
    }
}

/// Calls a journal until one call has an unknown outcome. Returns false if there was none.
fn work(journal: &Journal<SimulatedDisk>, model: &mut Model, rng: &mut StdRng) -> bool {
    for id in 2..40 {
        let len = if rng.random_bool(0.1) { 2 * SEGMENT } else { 9_000 };
        let bytes = payload(id, rng.random_range(8..len));
        let outcome = match rng.random_range(0..12) {
            0 => journal.checkpoint(journal.position(), &bytes).inspect(|()| {
                model.checkpoint.clone_from(&bytes);
                model.records.clear();
            }),
            1 => journal.maintain(),
            2 => journal.sync(),
            _ => {
                let outcome = journal.append(&[&bytes], durability(rng));
                if !matches!(outcome, Err(Error::NotWritten { .. })) {
                    model.records.push((bytes.clone(), outcome.is_ok()));
                }
                outcome
            }
        };
        match outcome {
            Ok(()) => {}
            Err(Error::NotWritten { .. }) => model.rejected += 1,
            Err(Error::Unknown { .. }) => {
                model.unknown_checkpoint = Some(bytes);
                return true;
            }
            Err(error) => panic!("{error}"),
        }
    }
    false
}

fn assert_poisoned(journal: &Journal<SimulatedDisk>, disk: &SimulatedDisk) {
    let operations = disk.operations();
    for durability in [Durability::Process, Durability::Disk] {
        assert!(matches!(journal.append(&[b"late"], durability), Err(Error::Unknown { .. })));
    }
    assert!(matches!(journal.sync(), Err(Error::Unknown { .. })));
    assert!(matches!(journal.checkpoint(journal.position(), b"late"), Err(Error::Unknown { .. })));
    assert!(matches!(journal.maintain(), Err(Error::Unknown { .. })));
    assert!(matches!(journal.close(), Err(Error::Unknown { .. })));
    assert_eq!(disk.operations(), operations, "nothing is written or synced after an unknown outcome");
}

#[test]
fn whichever_operation_fails_the_journal_has_what_it_acknowledged_and_not_what_it_rejected() {
    let mut rng = rng("failing operations");
    let (mut unknown, mut rejected, mut closes) = (0, 0, 0);
    for _ in 0..rounds(60) {
        let seed: u64 = rng.random();
        let options = options(SEGMENT << rng.random_range(0..2), SEGMENT * rng.random_range(0..3));
        let is_mapped = rng.random_bool(0.3);
        for fails_at in 0.. {
            let kind = [ErrorKind::Other, ErrorKind::StorageFull][rng.random_range(0..2)];
            let rng = &mut StdRng::seed_from_u64(seed);
            let disk = SimulatedDisk::default();
            disk.set_mapped(is_mapped);
            let mut model = Model { checkpoint: payload(1, 100), ..Model::default() };
            let journal = Journal::create(disk.clone(), &options, &model.checkpoint).unwrap();
            let before = disk.operations();
            disk.fail_after(fails_at, kind);
            if work(&journal, &mut model, rng) {
                unknown += 1;
                assert_poisoned(&journal, &disk);
            } else if disk.operations() - before > fails_at {
                // The failed operation prepared a segment, and nothing is lost.
                rejected += model.rejected;
                model.records.push((payload(41, 50), true));
                journal.append(&[&payload(41, 50)], Durability::Disk).unwrap();
            } else {
                disk.fail_after(0, kind);
                // It may do without a new segment.
                closes += u64::from(journal.close().is_err());
            }
            model.check(&content(&disk.killed()).unwrap());
            if disk.operations() - before <= fails_at {
                break;
            }
        }
    }
    println!("{unknown} unknown outcomes, {rejected} rejected calls, {closes} failed closes");
    assert!(unknown > 10 && rejected > 10);
}

#[test]
fn whichever_operation_of_an_open_fails_the_next_open_loses_nothing() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    for id in 0..9 {
        journal.append(&[&payload(id, 20_000)], Durability::Process).unwrap();
    }
    let expected = content(&disk.killed()).unwrap();
    for fails_at in 0.. {
        let disk = disk.killed();
        disk.fail_after(fails_at, ErrorKind::Other);
        let failed = open(disk.clone(), &small()).err();
        assert_eq!(content(&disk.killed()).unwrap(), expected);
        let Some(error) = failed else { break };
        assert!(matches!(error, Error::NotWritten { .. } | Error::Unknown { .. }), "{error}");
    }
}

#[test]
fn a_failed_sync_is_not_repeated() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    journal.append(&[b"a record"], Durability::Process).unwrap();
    let syncs = disk.syncs();
    disk.fail_after(0, ErrorKind::Other);
    assert!(matches!(journal.sync(), Err(Error::Unknown { .. })));
    assert_poisoned(&journal, &disk);
    assert_eq!(disk.syncs(), syncs);
}

#[test]
fn a_record_that_does_not_fit_on_a_full_disk_is_rejected_and_smaller_ones_are_appended() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    disk.set_free(Some(0));
    let large = payload(1, 5 * SEGMENT);
    for _ in 0..3 {
        let Err(Error::NotWritten { source, .. }) = journal.append(&[&large], Durability::Disk) else {
            panic!("it fits")
        };
        assert_eq!(source.kind(), ErrorKind::StorageFull);
        journal.append(&[b"small"], Durability::Disk).unwrap();
    }
    disk.set_free(None);
    journal.append(&[&large], Durability::Disk).unwrap();
    let found = content(&disk.power_cut(1)).unwrap();
    assert_eq!(found.records, [b"small".to_vec(), b"small".to_vec(), b"small".to_vec(), large]);
}

#[test]
fn a_journal_on_a_full_disk_can_be_closed() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    journal.append(&[b"one"], Durability::Process).unwrap();
    journal.append(&[&payload(1, SEGMENT)], Durability::Process).unwrap();
    disk.set_free(Some(0));
    journal.close().unwrap();
    assert_eq!(content(&disk.power_cut(1)).unwrap().records.len(), 2);
}

#[test]
fn a_checkpoint_with_a_position_that_is_gone_or_of_another_journal_is_rejected() {
    let create = || Journal::create(SimulatedDisk::default(), &small(), b"checkpoint").unwrap();
    let (journal, other) = (create(), create());
    let first = journal.position();
    (0..9).for_each(|_| other.append(&[b"a record"], Durability::Process).unwrap());
    assert!(matches!(journal.checkpoint(other.position(), b""), Err(Error::Option { option: "from", .. })));
    // A position that both have.
    assert!(matches!(other.checkpoint(first, b""), Err(Error::Option { option: "from", .. })));
    journal.append(&[b"a record"], Durability::Process).unwrap();
    journal.checkpoint(journal.position(), b"newer").unwrap();
    assert!(matches!(journal.checkpoint(first, b"older"), Err(Error::Option { option: "from", .. })));
    journal.checkpoint(journal.position(), b"newest").unwrap();
}

#[test]
fn reserved_space_is_there_when_the_disk_is_full() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    let large = payload(7, 5 * SEGMENT);
    disk.set_free(Some(0));
    let rejected = journal.reserve(large.len());
    assert!(matches!(rejected, Err(Error::NotWritten { source, .. }) if source.kind() == ErrorKind::StorageFull));
    disk.set_free(None);
    journal.reserve(large.len()).unwrap();
    disk.set_free(Some(0));
    journal.append(&[&large], Durability::Disk).unwrap();
    journal.append(&[b"small"], Durability::Disk).unwrap();
    let found = content(&disk).unwrap();
    assert_eq!(found.records, [large, b"small".to_vec()]);
}

#[test]
fn a_rejected_record_gives_the_space_back_that_was_allocated_for_it() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    let before = journal.stats();
    disk.set_free(Some(10 * SEGMENT as u64));
    let rejected = journal.append(&[&payload(7, 30 * SEGMENT)], Durability::Process);
    assert!(matches!(rejected, Err(Error::NotWritten { .. })));
    assert_eq!(journal.stats().spare_bytes, before.spare_bytes);
    disk.set_free(None);
    journal.append(&[&payload(8, 30 * SEGMENT)], Durability::Disk).unwrap();
    journal.checkpoint(journal.position(), b"newer").unwrap();
    // Two segments, or as many as the options allow.
    assert!(journal.stats().spare_bytes <= 2 * SEGMENT as u64, "{:?}", journal.stats());
}

#[test]
fn a_close_on_a_full_disk_succeeds() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    disk.set_free(Some(0));
    let mut records = 0;
    while journal.append(&[b"abc"], Durability::Process).is_ok() {
        records += 1;
    }
    journal.close().unwrap();
    assert!(matches!(journal.close(), Err(Error::Closed)));
    assert_eq!(content(&disk).unwrap().records.len(), records);
}

#[test]
fn a_large_record_needs_few_segments() {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &Options::default(), &payload(1, 30 << 20)).unwrap();
    journal.append(&[&payload(2, 100 << 20)], Durability::Process).unwrap();
    assert!(disk.files().len() <= 10, "{} files", disk.files().len());
}

#[test]
fn nothing_is_created_over_a_journal_or_opened_without_one() {
    let disk = SimulatedDisk::default();
    assert!(matches!(open(disk.clone(), &small()), Err(Error::Missing { .. })));
    drop(Journal::create(disk.clone(), &small(), b"checkpoint").unwrap());
    let again = Journal::create(disk.clone(), &small(), b"other").err();
    assert!(matches!(again, Some(Error::Exists { .. })), "{again:?}");
    assert_eq!(content(&disk).unwrap().checkpoint, b"checkpoint");
}
