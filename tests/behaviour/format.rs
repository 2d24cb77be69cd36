//! The format on disk: a store that an earlier version wrote must open and answer correctly.
//!
//! `write_the_fixture` wrote `tests/fixtures/store-v7` when format 7 was introduced, and `write_the_stream_fixture`
//! wrote `store-v8`, which runs on stream time, when format 8 was. From the first release on they are never written
//! again; a new format gets a new fixture.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::common::START_MS;
use onlyonce::{
    Builder, Claim, Error, Key, KeyStatus, ManualClock, OnInterrupt, PriorAttempt, RecordOutcome, Store, Timestamp,
    TimestampError,
};

fn builder(now_ms: u64) -> Builder {
    Store::builder()
        .memory_budget(32 << 20)
        .lease(Duration::from_secs(30))
        .clock(ManualClock::at(Timestamp::from_unix_ms(now_ms)))
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/store-v7")
}

fn stream_fixture() -> PathBuf {
    fixture().with_file_name("store-v8")
}

/// Copies the files of a store, without RocksDB's lock file and info log.
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
#[ignore = "writes the fixture, once per format"]
fn write_the_fixture() {
    assert!(!fixture().exists(), "a fixture is written once");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let store = Store::builder()
        .clock(clock.clone())
        .window(Duration::from_secs(3_600))
        .bucket(Duration::from_secs(600))
        .memory_budget(32 << 20)
        .result_limit(64)
        .open(&path)
        .unwrap();
    let complete = |key: Key<'_>, result: &[u8]| match store.claim(key).wait().unwrap() {
        Claim::Acquired(lease) => lease.complete(result).wait().unwrap(),
        other => panic!("{other:?}"),
    };
    complete(Key::from("sealed"), b"a result");
    complete(Key::from("sealed").scope("tenant"), b"");
    complete(Key::composite(["ab", "c"]), &[b'x'; 65]);
    complete(Key::content("a payload"), b"by content");
    complete(Key::from("guarded").fingerprint("12 EUR"), b"receipt");
    complete(Key::from("short").window(Duration::from_secs(800)), b"for a while");
    store.record("recorded").wait().unwrap();
    drop(store.claim(Key::from("dropped").fingerprint("5 EUR")).wait().unwrap());
    store.flush().unwrap();
    clock.advance(Duration::from_secs(700));
    complete(Key::from("later"), b"in the second bucket");
    store.flush().unwrap();
    complete(Key::from("journal"), b"not sealed yet");
    store.record(Key::from("journal").scope("recorded")).wait().unwrap();
    store.record(Key::from("short").scope("recorded").window(Duration::from_secs(100))).wait().unwrap();
    let Claim::Acquired(lease) = store.claim("released").wait().unwrap() else { panic!("new") };
    lease.release().after(Duration::from_secs(60)).wait().unwrap();
    let crashed = Key::from("crashed").fingerprint("99 EUR").window(Duration::from_secs(100));
    let _crashed = store.claim(crashed).wait().unwrap();
    complete(Key::from("forgotten"), b"gone");
    store.forget("forgotten").wait().unwrap();
    store.close().wait().unwrap();
    copy(&path, &fixture());
}

#[test]
fn a_store_of_format_7_answers_as_when_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy(&fixture(), &path);
    let now_ms = START_MS + 700_000;
    let store = builder(now_ms).open(&path).unwrap();
    assert_eq!(store.stats().window, Duration::from_secs(3_600));
    let completed = |key: Key<'_>| match store.check(key).wait().unwrap() {
        KeyStatus::Completed(completed) => completed,
        other => panic!("{other:?}"),
    };
    let flushed = completed(Key::from("sealed"));
    assert_eq!((flushed.result(), flushed.completed_at().as_unix_ms()), (Some(&b"a result"[..]), START_MS));
    assert_eq!(completed(Key::from("sealed").scope("tenant")).result(), Some(&b""[..]));
    assert!(completed(Key::composite(["ab", "c"])).is_result_too_large());
    assert_eq!(completed(Key::content("a payload")).result(), Some(&b"by content"[..]));
    assert_eq!(completed(Key::from("guarded").fingerprint("12 EUR")).result(), Some(&b"receipt"[..]));
    for (key, after_ms) in [(Key::from("short"), 100_000), (Key::from("short").scope("recorded"), 100_000)] {
        assert_eq!(completed(key).remembered_until().as_unix_ms(), now_ms + after_ms);
    }
    let mismatch = store.check(Key::from("guarded").fingerprint("13 EUR")).wait();
    assert!(matches!(mismatch, Err(Error::PayloadMismatch { .. })));
    assert_eq!(store.record("recorded").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
    let later = completed(Key::from("later"));
    assert_eq!((later.result(), later.completed_at().as_unix_ms()), (Some(&b"in the second bucket"[..]), now_ms));
    assert_eq!(completed(Key::from("journal")).result(), Some(&b"not sealed yet"[..]));
    assert_eq!(completed(Key::from("journal").scope("recorded")).result(), None);
    assert_eq!(store.check("forgotten").wait().unwrap(), KeyStatus::New);
    match store.claim("released").wait().unwrap() {
        Claim::InProgress(other) => assert_eq!(other.retry_after, Some(Duration::from_secs(60))),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        store.claim(Key::from("crashed").fingerprint("1 EUR")).wait(),
        Err(Error::PayloadMismatch { .. })
    ));
    assert!(matches!(
        store.claim(Key::from("dropped").fingerprint("1 EUR")).wait(),
        Err(Error::PayloadMismatch { .. })
    ));
    let Claim::Acquired(lease) = store.claim("dropped").wait().unwrap() else { panic!("it was dropped") };
    assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Dropped)));
    lease.release().wait().unwrap();
    let Claim::Acquired(lease) = store.claim("crashed").wait().unwrap() else { panic!("its process has ended") };
    assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Crashed)));
    assert!(lease.token().get() > flushed.token().get() && lease.token().get() > later.token().get());
    lease.release().wait().unwrap();
    store.close().wait().unwrap();

    let store = builder(START_MS + 3_600_000).on_interrupt(OnInterrupt::Hold).open(&path).unwrap();
    assert_eq!(store.check("sealed").wait().unwrap(), KeyStatus::New, "its window has ended");
    assert!(matches!(store.check("later").wait().unwrap(), KeyStatus::Completed(_)));
}

#[test]
#[ignore = "writes the fixture, once per format"]
fn write_the_stream_fixture() {
    assert!(!stream_fixture().exists(), "a fixture is written once");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = builder(START_MS + 86_400_000)
        .window(Duration::from_secs(3_600))
        .bucket(Duration::from_secs(600))
        .stream_time(Duration::from_secs(1_800))
        .open(&path)
        .unwrap();
    let acquire =
        |key: &str, at_ms| match store.claim(Key::from(key).at(Timestamp::from_unix_ms(at_ms))).wait().unwrap() {
            Claim::Acquired(lease) => lease,
            other => panic!("{other:?}"),
        };
    acquire("sealed", START_MS).complete("a result").wait().unwrap();
    store.flush().unwrap();
    acquire("later", START_MS + 700_000).complete("in the second bucket").wait().unwrap();
    store.flush().unwrap();
    // In one journal record: one message before stream time, and one ahead of it.
    store
        .record_batch(
            [("late", START_MS + 300_000), ("newest", START_MS + 800_000)]
                .map(|(key, at_ms)| Key::from(key).at(Timestamp::from_unix_ms(at_ms))),
        )
        .wait()
        .unwrap();
    acquire("journal", START_MS + 400_000).complete("not sealed yet").wait().unwrap();
    let short = Key::from("short").at(Timestamp::from_unix_ms(START_MS + 400_000)).window(Duration::from_secs(401));
    store.record(short).wait().unwrap();
    acquire("released", START_MS + 500_000).release().after(Duration::from_secs(60)).wait().unwrap();
    let _crashed = acquire("crashed", START_MS + 600_000);
    store.close().wait().unwrap();
    copy(&path, &stream_fixture());
}

#[test]
fn a_stream_store_of_format_8_answers_as_when_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    copy(&stream_fixture(), &path);
    // The wall clock must not matter.
    let store = builder(0).open(&path).unwrap();
    let stats = store.stats();
    assert_eq!((stats.now.as_unix_ms(), stats.window), (START_MS + 800_000, Duration::from_secs(3_600)));
    for (key, after_ms, result) in [
        ("sealed", 0, Some(&b"a result"[..])),
        ("later", 700_000, Some(b"in the second bucket")),
        ("late", 300_000, None),
        ("newest", 800_000, None),
        ("journal", 400_000, Some(b"not sealed yet")),
        ("short", 400_000, None),
    ] {
        match store.check(Key::from(key).at(Timestamp::from_unix_ms(START_MS + after_ms))).wait().unwrap() {
            KeyStatus::Completed(first) => {
                assert_eq!((first.completed_at().as_unix_ms(), first.result()), (START_MS + after_ms, result), "{key}");
            }
            other => panic!("{key}: {other:?}"),
        }
    }
    for (key, after_ms, prior) in
        [("released", 500_000, PriorAttempt::Released), ("crashed", 600_000, PriorAttempt::Crashed)]
    {
        match store.claim(Key::from(key).at(Timestamp::from_unix_ms(START_MS + after_ms))).wait().unwrap() {
            Claim::Acquired(lease) => {
                assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(prior)), "{key}")
            }
            other => panic!("{key}: {other:?}"),
        }
    }
    assert!(matches!(store.check("sealed").wait(), Err(Error::Timestamp(TimestampError::Missing))));
    let bound_ms = START_MS + 800_000 + 1_800_000;
    assert!(matches!(
        store.record(Key::from("too far").at(Timestamp::from_unix_ms(bound_ms + 1))).wait(),
        Err(Error::Timestamp(TimestampError::TooFarAhead { .. }))
    ));
    store.advance_stream_time(Timestamp::from_unix_ms(START_MS + 801_000)).wait().unwrap();
    let short = Key::from("short").at(Timestamp::from_unix_ms(START_MS + 400_000));
    assert_eq!(store.check(short).wait().unwrap(), KeyStatus::New, "its own window is over");
    let bound_ms = bound_ms + 1_000;
    assert_eq!(
        store.record(Key::from("far").at(Timestamp::from_unix_ms(bound_ms))).wait().unwrap(),
        RecordOutcome::First
    );
    store.advance_stream_time(Timestamp::from_unix_ms(START_MS + 3_600_000)).wait().unwrap();
    assert!(matches!(
        store.check(Key::from("sealed").at(Timestamp::from_unix_ms(START_MS))).wait(),
        Err(Error::Timestamp(TimestampError::TooOld { .. }))
    ));
    assert!(matches!(
        store.check(Key::from("late").at(Timestamp::from_unix_ms(START_MS + 300_000))).wait(),
        Ok(KeyStatus::Completed(_))
    ));
}
