//! The journal in a directory, written with system calls and through mappings.

#![cfg(not(shuttle))]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Content, SEGMENT, durability, open, options, payload, rng, rounds, small};
use onlyonce_journal::{Access, Directory, Durability, Error, Journal, Medium, MediumFile};
use rand::RngExt;
use rand::rngs::StdRng;

const BOTH: [Access; 2] = [Access::Write, Access::Map];

fn directory(path: &Path, access: Access) -> Directory {
    Directory::new(path, access).unwrap()
}

/// The directory as a crash of the process leaves it.
fn crash_image(path: &Path) -> tempfile::TempDir {
    let image = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), image.path().join(entry.file_name())).unwrap();
    }
    image
}

fn content(path: &Path, access: Access) -> Content {
    open(directory(path, access), &small()).unwrap().1
}

fn live(rng: &mut StdRng) {
    let dir = tempfile::tempdir().unwrap();
    let any = |rng: &mut StdRng| BOTH[rng.random_range(0..2)];
    let options = options(SEGMENT << rng.random_range(0..2), SEGMENT * rng.random_range(0..3));
    let mut expected = Content { checkpoint: payload(1, 50), records: Vec::new() };
    let mut journal = Journal::create(directory(dir.path(), any(rng)), &options, &expected.checkpoint).unwrap();
    for id in 2..60 {
        let len = if rng.random_bool(0.1) { 3 * SEGMENT } else { 10_000 };
        let bytes = payload(id, rng.random_range(0..len));
        match rng.random_range(0..20) {
            0..14 => {
                journal.append(&[&bytes], durability(rng)).unwrap();
                expected.records.push(bytes);
            }
            14 | 15 => {
                journal.checkpoint(journal.position(), &bytes).unwrap();
                expected = Content { checkpoint: bytes, records: Vec::new() };
            }
            16 => journal.maintain().unwrap(),
            17 => journal.sync().unwrap(),
            18 => {
                let image = crash_image(dir.path());
                assert_eq!(content(image.path(), any(rng)), expected);
                assert_eq!(content(image.path(), any(rng)), expected, "opened again");
            }
            _ => {
                if rng.random_bool(0.5) {
                    journal.close().unwrap();
                }
                drop(journal);
                let (opened, found, _) = open(directory(dir.path(), any(rng)), &options).unwrap();
                assert_eq!(found, expected);
                journal = opened;
            }
        }
    }
}

#[test]
fn a_directory_has_what_was_appended_with_either_access_across_crashes_and_opens() {
    let mut rng = rng("files");
    for _ in 0..rounds(10) {
        live(&mut rng);
    }
}

#[test]
fn a_crash_image_between_two_appends_of_a_busy_journal_has_everything_before_it() {
    for access in BOTH {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(directory(dir.path(), access), &small(), b"").unwrap();
        let stop = AtomicBool::new(false);
        let appended = Mutex::new(0_u64);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let mut appended = appended.lock().unwrap();
                    *appended += 1;
                    let disk = appended.is_multiple_of(16);
                    let durability = if disk { Durability::Disk } else { Durability::Process };
                    journal.append(&[&payload(*appended, 200)], durability).unwrap();
                }
            });
            for _ in 0..10 {
                let (image, appended) = {
                    // A copy takes a while, and a crash does not: nothing is appended meanwhile.
                    let appended = appended.lock().unwrap();
                    (crash_image(dir.path()), *appended)
                };
                journal.maintain().unwrap();
                let expected: Vec<_> = (1..=appended).map(|id| payload(id, 200)).collect();
                assert_eq!(content(image.path(), access).records, expected);
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

#[test]
fn segments_are_used_again_and_unneeded_ones_are_removed() {
    for access in BOTH {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::create(directory(dir.path(), access), &small(), b"").unwrap();
        let files = || fs::read_dir(dir.path()).unwrap().count();
        for id in 0..200 {
            journal.append(&[&payload(id, 10_000)], Durability::Process).unwrap();
            if id % 10 == 9 {
                journal.checkpoint(journal.position(), b"").unwrap();
            }
        }
        assert!(files() <= 5, "{}", files());
        (0..20).for_each(|id| journal.append(&[&payload(id, SEGMENT)], Durability::Process).unwrap());
        assert!(files() > 20);
        journal.checkpoint(journal.position(), b"").unwrap();
        assert!(files() <= 5, "{}", files());
        let stats = journal.stats();
        assert_eq!(stats.used_bytes + stats.spare_bytes, (files() * SEGMENT) as u64);
    }
}

#[test]
fn a_journal_that_is_only_opened_does_not_grow() {
    let dir = tempfile::tempdir().unwrap();
    drop(Journal::create(directory(dir.path(), Access::Write), &small(), b"checkpoint").unwrap());
    let files = || fs::read_dir(dir.path()).unwrap().count();
    let before = files() + 1;
    for round in 0..10 {
        let (journal, found, _) = open(directory(dir.path(), Access::Write), &small()).unwrap();
        assert_eq!(found, Content { checkpoint: b"checkpoint".to_vec(), records: Vec::new() });
        if round % 2 == 0 {
            journal.close().unwrap();
        }
        drop(journal);
        assert!(files() <= before, "{} files after {round} opens", files());
    }
}

#[test]
fn a_file_that_was_not_created_completely_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    drop(Journal::create(directory(dir.path(), Access::Write), &small(), b"checkpoint").unwrap());
    let new = dir.path().join("000007.journal.new");
    fs::write(&new, b"half").unwrap();
    assert_eq!(content(dir.path(), Access::Map).checkpoint, b"checkpoint");
    assert!(!new.exists());
}

#[test]
fn a_new_journal_is_not_created_over_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let create = || Journal::create(directory(dir.path(), Access::Write), &small(), b"checkpoint");
    drop(create().unwrap());
    assert!(matches!(create(), Err(Error::Exists { .. })));
}

#[test]
fn a_header_of_a_mapped_file_is_written_alone() {
    const BLOCK: usize = 4_096;
    let dir = tempfile::tempdir().unwrap();
    let file = directory(dir.path(), Access::Map).create("a file", SEGMENT as u64).unwrap();
    let content = || fs::read(dir.path().join("a file")).unwrap();
    file.write_at(&[1; 30 * 1_024], 2 * BLOCK as u64).unwrap();
    for (copy, byte) in [(0, 2), (BLOCK, 3)] {
        let mut expected = content();
        expected[copy..copy + BLOCK].fill(byte);
        file.write_at(&[byte; BLOCK], copy as u64).unwrap();
        assert_eq!(content(), expected);
    }
}

#[test]
fn a_mapped_file_has_what_was_written_to_it_also_across_windows() {
    const BYTES: usize = 2 << 20;
    const DATA_START: usize = 8_192;
    let dir = tempfile::tempdir().unwrap();
    let file = directory(dir.path(), Access::Map).create("a file", BYTES as u64).unwrap();
    let mut rng = rng("windows");
    for reuse in 1..=4_u8 {
        let mut expected = vec![reuse; DATA_START];
        file.write_at(&expected, 0).unwrap();
        while expected.len() < BYTES {
            // Mostly small, some longer than a window.
            let longest = if rng.random_bool(0.1) { 400_000 } else { 5_000 };
            let len = rng.random_range(1..=longest).min(BYTES - expected.len());
            let at = expected.len();
            expected.resize(at + len, rng.random());
            file.write_at(&expected[at..], at as u64).unwrap();
            if rng.random_bool(0.01) {
                file.sync().unwrap();
            }
            if rng.random_bool(0.02) || expected.len() == BYTES {
                let content = fs::read(dir.path().join("a file")).unwrap();
                assert!(content.starts_with(&expected), "use {reuse}, {at}");
            }
        }
    }
}

#[test]
fn only_files_of_the_journal_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["settings.toml.new", "000001.journal.new"] {
        fs::write(dir.path().join(name), "half").unwrap();
    }
    fs::create_dir(dir.path().join("old.new")).unwrap();
    drop(directory(dir.path(), Access::Write));
    assert!(dir.path().join("settings.toml.new").exists() && dir.path().join("old.new").exists());
    assert!(!dir.path().join("000001.journal.new").exists());
}

#[test]
fn an_append_creates_no_segment_if_maintenance_runs_when_one_is_lacking() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::create(directory(dir.path(), Access::Write), &small(), &payload(1, 50)).unwrap();
    let names = || fs::read_dir(dir.path()).unwrap().count();
    let mut prepared = 0;
    for id in 2..200 {
        while journal.lacks_segment() {
            journal.maintain().unwrap();
            prepared += 1;
        }
        let before = names();
        journal.append(&[&payload(id, 2_000)], Durability::Process).unwrap();
        assert_eq!(names(), before, "append {id}");
    }
    // Each record has a header, and a segment two.
    assert!(prepared >= 200 * 2_000 / SEGMENT - 1, "{prepared}");
}
