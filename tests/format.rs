//! The format on disk: a store that an earlier version wrote must open, and answer, for ever.
//!
//! `tests/fixtures/store-v1` was written by `write_the_fixture` below when format 1 was made. It is never written
//! again; a new format gets a fixture of its own beside it.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::START_MS;
use onlyonce::{Builder, Check, Claim, Error, Key, ManualClock, OnInterrupt, Prior, Recorded, Store};

fn builder(now_ms: u64) -> Builder {
    Store::builder().memory_budget(32 << 20).lease(Duration::from_secs(30)).clock(ManualClock::at(now_ms))
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store-v1")
}

/// Copies the files of a store, without RocksDB's own lock and log of events.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        if entry.is_dir() {
            copy(&entry, &to.join(name));
        } else if name != "LOCK" && !name.to_string_lossy().starts_with("LOG") {
            fs::copy(&entry, to.join(name)).unwrap();
        }
    }
}

#[test]
#[ignore = "writes the fixture, once a format"]
fn write_the_fixture() {
    assert!(!fixture().exists(), "a fixture is written once");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let clock = ManualClock::at(START_MS);
    let store = Store::builder()
        .clock(clock.clone())
        .window(Duration::from_secs(3_600))
        .bucket(Duration::from_secs(600))
        .memory_budget(32 << 20)
        .result_limit(64)
        .open(&path)
        .unwrap();
    let complete = |key: Key<'_>, result: &[u8]| match store.claim(key).unwrap() {
        Claim::Acquired(lease) => lease.complete(result).unwrap(),
        other => panic!("{other:?}"),
    };
    complete(Key::from("sealed"), b"a result");
    complete(Key::from("sealed").scope("tenant"), b"");
    complete(Key::composite(["ab", "c"]), &[b'x'; 65]);
    complete(Key::content("a payload"), b"by content");
    complete(Key::from("guarded").fingerprint("12 EUR"), b"receipt");
    store.record("recorded").unwrap();
    store.seal().unwrap();
    clock.advance(Duration::from_secs(700));
    complete(Key::from("later"), b"in the second bucket");
    store.seal().unwrap();
    complete(Key::from("journal"), b"not sealed yet");
    store.record(Key::from("journal").scope("recorded")).unwrap();
    let Claim::Acquired(lease) = store.claim("released").unwrap() else { panic!("new") };
    lease.release_after(Duration::from_secs(60)).unwrap();
    let _crashed = store.claim(Key::from("crashed").fingerprint("99 EUR")).unwrap();
    complete(Key::from("forgotten"), b"gone");
    store.forget("forgotten").unwrap();
    store.close().unwrap();
    copy(&path, &fixture());
}

#[test]
fn a_store_of_format_1_answers_as_on_the_day_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy(&fixture(), &path);
    let now_ms = START_MS + 700_000;
    let store = builder(now_ms).open(&path).unwrap();
    assert_eq!(store.stats().window, Duration::from_secs(3_600));
    let completed = |key: Key<'_>| match store.check(key).unwrap() {
        Check::Completed(completed) => completed,
        other => panic!("{other:?}"),
    };
    let sealed = completed(Key::from("sealed"));
    assert_eq!((sealed.result(), sealed.completed_at_ms()), (Some(&b"a result"[..]), START_MS));
    assert_eq!(completed(Key::from("sealed").scope("tenant")).result(), Some(&b""[..]));
    assert!(completed(Key::composite(["ab", "c"])).is_omitted());
    assert_eq!(completed(Key::content("a payload")).result(), Some(&b"by content"[..]));
    assert_eq!(completed(Key::from("guarded").fingerprint("12 EUR")).result(), Some(&b"receipt"[..]));
    let mismatch = store.check(Key::from("guarded").fingerprint("13 EUR"));
    assert!(matches!(mismatch, Err(Error::PayloadMismatch { .. })));
    assert_eq!(store.record("recorded").unwrap(), Recorded::Duplicate { in_flight: false });
    let later = completed(Key::from("later"));
    assert_eq!((later.result(), later.completed_at_ms()), (Some(&b"in the second bucket"[..]), now_ms));
    assert_eq!(completed(Key::from("journal")).result(), Some(&b"not sealed yet"[..]));
    assert_eq!(completed(Key::from("journal").scope("recorded")).result(), None);
    assert_eq!(store.check("forgotten").unwrap(), Check::New);
    match store.claim("released").unwrap() {
        Claim::InProgress(other) => assert_eq!(other.retry_after, Some(Duration::from_secs(60))),
        other => panic!("{other:?}"),
    }
    assert!(matches!(store.claim(Key::from("crashed").fingerprint("1 EUR")), Err(Error::PayloadMismatch { .. })));
    let Claim::Acquired(lease) = store.claim("crashed").unwrap() else { panic!("its process is gone") };
    assert_eq!((lease.attempt(), lease.prior()), (2, Some(Prior::Crashed)));
    assert!(lease.token() > sealed.token() && lease.token() > later.token());
    lease.release().unwrap();
    store.close().unwrap();

    let store = builder(START_MS + 3_600_000).on_interrupt(OnInterrupt::Hold).open(&path).unwrap();
    assert_eq!(store.check("sealed").unwrap(), Check::New, "its window has passed");
    assert!(matches!(store.check("later").unwrap(), Check::Completed(_)));
}
