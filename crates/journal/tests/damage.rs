//! Damage to the files of a journal: an open either returns an error that names a file, or loses nothing. The last tests show
//! which damage cannot be noticed.

#![cfg(not(shuttle))]

mod common;

use std::collections::BTreeMap;

use common::{Content, SEGMENT, content, durability, open, options, payload, rng, rounds, small};
use onlyonce_journal::{Durability, Error, Journal, SimulatedDisk};
use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;

type Files = BTreeMap<String, Vec<u8>>;

/// A journal, and what its files were before.
struct Sample {
    files: Files,
    earlier: Vec<Files>,
    content: Content,
    /// The file that was written last, and where its last mark begins and ends.
    mark: Option<(String, usize, usize)>,
}

fn size(rng: &mut StdRng) -> usize {
    match rng.random_range(0..10) {
        0..6 => rng.random_range(0..300),
        6..9 => rng.random_range(0..20_000),
        _ => rng.random_range(0..2 * SEGMENT),
    }
}

/// A journal after some calls, closed or running. If it runs, everything is synced and stated.
fn sample(rng: &mut StdRng, is_closed: bool) -> Sample {
    let disk = SimulatedDisk::default();
    disk.set_mapped(rng.random_bool(0.3));
    let options = options(SEGMENT << rng.random_range(0..2), SEGMENT * rng.random_range(0..4));
    let mut expected = Content { checkpoint: payload(1, 500), records: Vec::new() };
    let mut journal = Journal::create(disk.clone(), &options, &expected.checkpoint).unwrap();
    let mut earlier = vec![disk.files()];
    for id in 2..rng.random_range(3..30) {
        let record = payload(id, size(rng));
        match rng.random_range(0..10) {
            0..8 => {
                journal.append(&[&record], durability(rng)).unwrap();
                expected.records.push(record);
            }
            8 => {
                journal.checkpoint(journal.position(), &record).unwrap();
                expected = Content { checkpoint: record, records: Vec::new() };
            }
            _ => {
                if rng.random_bool(0.5) {
                    journal.close().unwrap();
                }
                journal = open(disk.clone(), &options).unwrap().0;
            }
        }
        earlier.push(disk.files());
    }
    // The last record is not synced with another call's mark.
    let last = payload(99, size(rng).min(3_000));
    journal.append(&[&last], Durability::Process).unwrap();
    expected.records.push(last);
    earlier.push(disk.files());
    let mut mark = None;
    if is_closed {
        journal.close().unwrap();
    } else {
        journal.sync().unwrap();
        let before = disk.files();
        journal.maintain().unwrap();
        let after = disk.files();
        mark = after.iter().find_map(|(name, content)| {
            let old = before.get(name)?;
            let first = old.iter().zip(content).position(|(old, new)| old != new)?;
            let last = old.iter().zip(content).rposition(|(old, new)| old != new)?;
            Some((name.clone(), first, last + 1))
        });
        // The first byte of its checksum may be the byte that was there.
        mark = mark.map(|(name, first, end)| (name, first.saturating_sub(3), end + 3));
        assert!(mark.is_some());
    }
    Sample { files: disk.files(), earlier, content: expected, mark }
}

/// A kind of damage to one file. Returns what it did, or nothing if it changed nothing.
fn damage(files: &mut Files, sample: &Sample, name: &str, foreign: &Files, rng: &mut StdRng) -> Option<String> {
    let bytes = files.get_mut(name)?;
    let len = bytes.len();
    // Most damage is where the data is.
    let used = bytes.iter().rposition(|byte| *byte != 0).map_or(1, |last| last + 1);
    let at = match rng.random_range(0..4) {
        0 => rng.random_range(0..len),
        1 => rng.random_range(0..used.min(80)),
        _ => rng.random_range(0..used),
    };
    let end = match rng.random_range(0..5) {
        0 => len,
        3 => (at / 8_192 * 8_192 + 8_192).min(len),
        1 => (at / 512 * 512 + 512).min(len),
        2 => (at / 4_096 * 4_096 + 4_096).min(len),
        _ => rng.random_range(at..=len.min(at + 200)),
    };
    let start = if rng.random_bool(0.3) { at / 4_096 * 4_096 } else { at };
    let what = match rng.random_range(0..10) {
        0 | 1 => {
            bytes[at] ^= 1 << rng.random_range(0..8);
            format!("a bit of byte {at}")
        }
        2 => {
            bytes[start..end].fill(0);
            format!("zeros at {start}..{end}")
        }
        3 => {
            rng.fill(&mut bytes[start..end]);
            format!("random bytes at {start}..{end}")
        }
        4 => {
            let len = if rng.random_bool(0.5) { at } else { at / 4_096 * 4_096 };
            bytes.truncate(len);
            format!("truncated to {len}")
        }
        5 => {
            let more = if rng.random_bool(0.5) { 4_096 * rng.random_range(1..20) } else { rng.random_range(1..5_000) };
            let byte = if rng.random_bool(0.5) { 0 } else { 0xa5 };
            bytes.resize(len + more, byte);
            format!("{more} bytes more")
        }
        6 => {
            files.remove(name);
            "removed".to_owned()
        }
        7 => {
            let index = rng.random_range(0..sample.earlier.len());
            files.insert(name.to_owned(), sample.earlier[index].get(name)?.clone());
            format!("the version after call {index}")
        }
        8 => {
            files.insert(name.to_owned(), foreign.values().choose(rng)?.clone());
            "a file of another journal".to_owned()
        }
        _ => {
            let other = files.keys().filter(|other| *other != name).choose(rng)?.clone();
            let (one, two) = (files.remove(name)?, files.remove(&other)?);
            files.insert(name.to_owned(), two);
            files.insert(other.clone(), one);
            format!("swapped with {other}")
        }
    };
    (*files != sample.files).then_some(what)
}

/// What became of damage.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    NothingLost,
    Noticed,
    Lost(Content),
}

/// Opens the damaged files, and checks that what is found stays.
fn outcome(files: Files, sample: &Sample, name: &str, what: &str) -> Outcome {
    let disk = SimulatedDisk::with_files(files);
    match open(disk.clone(), &small()) {
        Ok((journal, found, _)) => {
            journal.append(&[b"later"], Durability::Disk).unwrap();
            let mut later = found.clone();
            later.records.push(b"later".to_vec());
            assert_eq!(content(&disk.power_cut(7)).unwrap(), later, "{name}, {what}");
            if found == sample.content { Outcome::NothingLost } else { Outcome::Lost(found) }
        }
        Err(Error::Corrupt { place, detail }) => {
            let error = format!("{place}: {detail}");
            // Without any header there is no file to name.
            let names_file = error.contains(".journal") || detail.contains("no segment");
            assert!(names_file, "{name}, {what}: the error names no file: {error}");
            if !error.contains(name) && std::env::var_os("ONLYONCE_JOURNAL_VERBOSE").is_some() {
                eprintln!("{name}, {what}: {error}");
            }
            Outcome::Noticed
        }
        Err(error) => panic!("{name}, {what}: {error}"),
    }
}

fn foreign_files() -> Files {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"another journal").unwrap();
    (0..5).for_each(|id| journal.append(&[&payload(id, 30_000)], Durability::Disk).unwrap());
    disk.files()
}

#[test]
fn after_a_close_any_damage_to_a_file_is_an_error_or_loses_nothing() {
    let mut rng = rng("damage after a close");
    let foreign = foreign_files();
    let (mut noticed, mut harmless) = (0, 0);
    for _ in 0..rounds(150) {
        let sample = sample(&mut rng, true);
        for _ in 0..60 {
            let mut files = sample.files.clone();
            let name = files.keys().choose(&mut rng).unwrap().clone();
            let Some(what) = damage(&mut files, &sample, &name, &foreign, &mut rng) else { continue };
            match outcome(files, &sample, &name, &what) {
                Outcome::NothingLost => harmless += 1,
                Outcome::Noticed => noticed += 1,
                Outcome::Lost(found) => {
                    panic!("{name}, {what}: found {} of {}", found.summary(), sample.content.summary())
                }
            }
        }
    }
    println!("{noticed} errors, {harmless} times nothing was lost");
    assert!(noticed > 100 && harmless > 100);
}

#[test]
fn in_a_running_journal_damage_is_an_error_or_loses_nothing_unless_it_reaches_the_last_mark() {
    let mut rng = rng("damage in a running journal");
    let foreign = foreign_files();
    let (mut noticed, mut harmless, mut lost) = (0, 0, 0);
    for _ in 0..rounds(150) {
        let sample = sample(&mut rng, false);
        let (active, mark, mark_end) = sample.mark.clone().unwrap();
        for _ in 0..60 {
            let mut files = sample.files.clone();
            let name = files.keys().choose(&mut rng).unwrap().clone();
            let Some(what) = damage(&mut files, &sample, &name, &foreign, &mut rng) else { continue };
            let keeps_mark = files.get(&active).and_then(|bytes| bytes.get(mark..mark_end))
                == sample.files[&active].get(mark..mark_end);
            match outcome(files, &sample, &name, &what) {
                Outcome::NothingLost => harmless += 1,
                Outcome::Noticed => noticed += 1,
                Outcome::Lost(found) => {
                    lost += 1;
                    assert!(!keeps_mark, "{name}, {what}: found {}", found.summary());
                    if found.checkpoint == sample.content.checkpoint {
                        assert!(sample.content.records.starts_with(&found.records), "{name}, {what}: a gap");
                    }
                }
            }
        }
    }
    println!("{noticed} errors, {harmless} times nothing was lost, {lost} times records were lost with the mark");
    assert!(noticed > 100 && harmless > 100);
}

/// A journal with two records on disk, without a mark after the second one.
fn two_records() -> (SimulatedDisk, Journal<SimulatedDisk>) {
    let disk = SimulatedDisk::default();
    let journal = Journal::create(disk.clone(), &small(), b"checkpoint").unwrap();
    journal.append(&[b"the first record"], Durability::Disk).unwrap();
    journal.append(&[b"the second record"], Durability::Disk).unwrap();
    (disk, journal)
}

/// Where these bytes are in the file that has them.
fn find(files: &Files, bytes: &[u8]) -> (String, usize) {
    let found = files.iter().find_map(|(name, content)| {
        let at = content.windows(bytes.len()).position(|window| window == bytes)?;
        Some((name.clone(), at))
    });
    found.unwrap()
}

fn records(disk: &SimulatedDisk) -> Result<Vec<Vec<u8>>, Error> {
    content(disk).map(|content| content.records)
}

#[test]
fn damage_to_the_last_records_is_noticed_only_after_a_later_write_states_them() {
    let (disk, journal) = two_records();
    let (name, at) = find(&disk.files(), b"the second record");
    let flipped = || disk.damaged(&name, |bytes| bytes[at] ^= 1);
    assert_eq!(records(&flipped()).unwrap(), [b"the first record"], "this is not noticed: it may be a torn write");
    journal.maintain().unwrap();
    assert!(matches!(content(&flipped()), Err(Error::Corrupt { .. })));
}

#[test]
fn damage_that_reaches_the_last_mark_as_well_is_not_noticed_until_the_close() {
    let (disk, journal) = two_records();
    let (name, at) = find(&disk.files(), b"the second record");
    let earlier = disk.files().remove(&name).unwrap();
    journal.append(&[b"the third record"], Durability::Disk).unwrap();
    journal.maintain().unwrap();
    let zeroed = || disk.damaged(&name, |bytes| bytes[at..].fill(0));
    let replaced = || disk.damaged(&name, |bytes| bytes.clone_from(&earlier));
    assert_eq!(records(&zeroed()).unwrap(), [b"the first record"]);
    assert_eq!(records(&replaced()).unwrap().len(), 2);
    journal.close().unwrap();
    for damaged in [zeroed(), replaced()] {
        let Err(Error::Corrupt { place, .. }) = content(&damaged) else { panic!("it is not noticed") };
        assert!(place.contains(&name), "{place}");
    }
}

#[test]
fn a_mark_is_written_once_for_the_records_before_it() {
    let (disk, journal) = two_records();
    journal.maintain().unwrap();
    let operations = disk.operations();
    for _ in 0..3 {
        journal.sync().unwrap();
        journal.maintain().unwrap();
    }
    assert_eq!(disk.operations(), operations + 1, "an idle journal syncs its mark and then does nothing");
}

#[test]
fn a_file_that_is_no_segment_is_rejected_by_its_size_before_it_is_read() {
    let (disk, journal) = two_records();
    journal.close().unwrap();
    let (name, _) = find(&disk.files(), b"the second record");
    for bytes in [0, 4_096, SEGMENT - 1, SEGMENT + 1, SEGMENT - 4_096, (1 << 30) + 4_096] {
        let damaged = disk.damaged(&name, |content| content.resize(bytes, 0));
        let Err(Error::Corrupt { place, .. }) = content(&damaged) else { panic!("{bytes} bytes are accepted") };
        assert_eq!(place, name);
    }
}
