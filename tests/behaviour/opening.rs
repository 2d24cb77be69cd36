//! Opening a store: the paths and options that it rejects, what it keeps, and which leftovers it removes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::common::{Bench, START_MS, copy_store};
use onlyonce::{Claim, Error, KeyError, KeyStatus, Outcome, RecordOutcome, Store, Timestamp};

#[test]
fn a_second_open_fails_after_the_lock_wait_and_names_the_path() {
    let bench = Bench::new();
    let start = Instant::now();
    let rejected = bench.builder().lock_wait(Duration::from_millis(120)).open(bench.path());
    let Err(error @ Error::AlreadyOpen { .. }) = rejected else { panic!("{rejected:?}") };
    assert!(start.elapsed() >= Duration::from_millis(120));
    assert!(error.to_string().contains(&bench.path().display().to_string()), "{error}");
    assert!(error.is_retryable());
    bench.store().record("the first store still works").wait().unwrap();
}

#[test]
fn an_open_waits_until_the_other_store_is_closed() {
    let mut bench = Bench::new();
    bench.store().record("k").wait().unwrap();
    let (builder, path) = (bench.builder().lock_wait(Duration::from_secs(20)), bench.path());
    let second = std::thread::spawn(move || builder.open(path).map(|store| store.check("k").wait()));
    std::thread::sleep(Duration::from_millis(50));
    bench.store().close().wait().unwrap();
    let check = second.join().unwrap().unwrap().unwrap();
    assert!(matches!(check, KeyStatus::Completed(_)), "{check:?}");
    bench.reopen();
}

#[test]
fn the_last_clone_and_lease_close_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::open(&path).unwrap();
    let clone = store.clone();
    let Claim::Acquired(lease) = store.claim("k").wait().unwrap() else { panic!("k is new") };
    drop((store, clone));
    let again = Store::builder().lock_wait(Duration::ZERO).open(&path);
    assert!(matches!(again, Err(Error::AlreadyOpen { .. })), "the lease keeps the store open");
    lease.complete("r").wait().unwrap();
    let store = Store::builder().lock_wait(Duration::from_secs(10)).open(&path).unwrap();
    assert!(matches!(store.claim("k").wait().unwrap(), Claim::Completed(_)));
}

#[test]
fn a_closed_store_rejects_calls_and_returns_the_lease_and_completion() {
    let bench = Bench::new();
    let lease = bench.acquire("k");
    bench.store().close().wait().unwrap();
    bench.store().close().wait().expect("closing twice is no error");
    assert!(matches!(bench.store().claim("k").wait(), Err(Error::Closed)));
    assert!(matches!(bench.store().check("new").wait(), Err(Error::Closed)));
    assert!(matches!(bench.store().record_batch(["a"]).wait(), Err(Error::Closed)));
    assert!(matches!(bench.store().held().wait(), Err(Error::Closed)));
    assert!(matches!(bench.store().flush(), Err(Error::Closed)));
    let error = lease.complete("result").wait().unwrap_err();
    assert!(matches!(error.error(), Error::Closed));
    assert_eq!((error.outcome(), error.completion().result()), (Outcome::NotWritten, &b"result"[..]));
    let (_, completion, lease) = error.into_parts();
    assert_eq!((completion.into_result(), lease.map(|lease| lease.attempt().number())), (b"result".to_vec(), Some(1)));
}

#[test]
fn a_path_that_is_not_a_store_is_rejected_and_not_changed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "text").unwrap();
    assert!(matches!(Store::open(&file), Err(Error::NotAStore { .. })));
    assert_eq!(fs::read(&file).unwrap(), b"text");

    let error = Store::open(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::NotAStore { reason, .. } if reason.contains("file")), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no other file was created");

    // A directory of another program, with names that a store uses, too.
    let theirs = dir.path().join("theirs");
    for name in ["ssts", "db", "db.new"] {
        fs::create_dir_all(theirs.join(name)).unwrap();
        fs::write(theirs.join(name).join("1.sst"), "weights").unwrap();
    }
    assert!(matches!(Store::open(&theirs), Err(Error::NotAStore { .. })));
    assert!(["ssts", "db", "db.new"].iter().all(|name| theirs.join(name).join("1.sst").exists()));
}

#[test]
fn a_path_that_cannot_be_a_store_is_rejected_by_name_and_nothing_is_created() {
    let dir = tempfile::tempdir().unwrap();
    // Some system calls take the empty path for the current directory.
    let here = || fs::read_dir(".").unwrap().map(|entry| entry.unwrap().file_name()).collect::<BTreeSet<_>>();
    let before = here();
    for (path, text) in [("", "option `path` is empty"), ("a\0b", "option `path` is \"a\\0b\"")] {
        let error = Store::open(path).unwrap_err();
        assert!(matches!(error, Error::Config { option: "path", .. }), "{error:?}");
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(here(), before);

    let file = dir.path().join("file");
    fs::write(&file, "text").unwrap();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let (broken, around) = (dir.path().join("broken"), dir.path().join("around"));
    std::os::unix::fs::symlink("nowhere", &broken).unwrap();
    std::os::unix::fs::symlink("around", &around).unwrap();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    for (path, reason) in [
        (file.clone(), "it is a file".to_owned()),
        (file.join("store"), format!("{} is a file", text(&file))),
        (file.join("a/store"), format!("{} is a file", text(&file))),
        (fifo, "it is not a directory".to_owned()),
        (broken.clone(), "it is a link to nowhere, which does not exist".to_owned()),
        (broken.join("a/store"), format!("{} is a link to nowhere, which does not exist", text(&broken))),
    ] {
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(&error, Error::NotAStore { reason: found, .. } if *found == reason), "{path:?}: {error}");
        assert!(error.to_string().starts_with(&text(&path)), "{error}");
    }
    let error = Store::open(&around).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == around), "{error}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
}

#[cfg(target_os = "linux")]
#[test]
fn an_error_about_an_unwritable_directory_names_the_required_permission() {
    // Not even root can create a directory here.
    let path = std::path::Path::new("/sys/onlyonce-store");
    let error = Store::open(path).unwrap_err();
    assert!(matches!(&error, Error::Io { path: at, .. } if at == path), "{error:?}");
    assert!(error.chain().ends_with("the process needs to read and write the store's directory"), "{error}");
}

#[test]
fn a_path_of_any_bytes_and_a_symbolic_link_can_be_opened() {
    use std::os::unix::ffi::OsStrExt;

    let dir = tempfile::tempdir().unwrap();
    let unusual = dir.path().join(std::ffi::OsStr::from_bytes(b"\xff \n\x1b[2J"));
    let link = dir.path().join("link");
    fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", &link).unwrap();
    for path in [&unusual, &link] {
        for expected in [RecordOutcome::First, RecordOutcome::Duplicate { in_flight: false }] {
            let store = Store::open(path).unwrap();
            assert_eq!(store.record("k").wait().unwrap(), expected);
            store.flush().unwrap();
            store.close().wait().unwrap();
        }
    }
    assert!(dir.path().join("real/onlyonce.lock").exists());
}

#[test]
fn only_its_owner_can_access_a_new_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/store");
    let store = Store::open(&path).unwrap();
    store.record("k").wait().unwrap();
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join("db")), 0o700);
    assert_eq!(mode(&path.join("onlyonce.lock")), 0o600);
}

#[test]
fn unfinished_files_of_a_crash_are_removed() {
    let mut bench = Bench::new();
    bench.store().record("k").wait().unwrap();
    bench.store().close().wait().unwrap();
    let (ssts, new) = (bench.path().join("ssts"), bench.path().join("db.new"));
    fs::write(ssts.join("7.sst"), "half an SST").unwrap();
    fs::create_dir(&new).unwrap();
    fs::write(new.join("CURRENT"), "half a store").unwrap();
    fs::write(ssts.join("notes.txt"), "not a file of the store").unwrap();
    let options = bench.path().join("db/OPTIONS-000123.dbtmp");
    fs::write(&options, "half of the options").unwrap();
    bench.reopen();
    assert!(!new.exists());
    assert!(!ssts.join("7.sst").exists() && !options.exists());
    assert!(ssts.join("notes.txt").exists(), "a file that the store did not write is kept");
    assert_eq!(bench.store().record("k").wait().unwrap(), RecordOutcome::Duplicate { in_flight: false });
}

#[test]
fn a_store_can_be_created_after_a_crash_during_its_creation() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    fs::create_dir_all(path.join("db.new")).unwrap();
    fs::write(path.join("onlyonce.lock"), "").unwrap();
    fs::write(path.join("db.new/000004.sst"), "half").unwrap();
    fs::create_dir_all(path.join("journal")).unwrap();
    fs::write(path.join("journal/000000.journal"), "half").unwrap();
    Store::open(&path).unwrap().record("k").wait().unwrap();
}

#[test]
fn a_store_without_its_database_files_is_corrupt_and_not_empty() {
    let bench = Bench::new();
    bench.store().record("k").wait().unwrap();
    bench.store().close().wait().unwrap();
    fs::remove_file(bench.path().join("db/CURRENT")).unwrap();
    let rejected = bench.builder().open(bench.path());
    assert!(matches!(&rejected, Err(Error::Corrupt { place, .. }) if place.ends_with("CURRENT")), "{rejected:?}");
    fs::remove_dir_all(bench.path().join("db")).unwrap();
    let rejected = bench.builder().open(bench.path());
    assert!(matches!(&rejected, Err(Error::Corrupt { place, .. }) if place.ends_with("db")), "{rejected:?}");
    assert!(bench.path().join("journal").exists(), "a rejected store is not changed");
}

#[test]
fn a_memory_budget_out_of_bounds_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    for exists in [false, true] {
        for bytes in [0, 1, 4, 33_554_431, (1 << 44) + 1, 1 << 50, usize::MAX] {
            let rejected = Store::builder().memory_budget(bytes).open(&path);
            assert!(matches!(rejected, Err(Error::Config { option: "memory_budget", .. })), "{bytes}: {rejected:?}");
        }
        if !exists {
            Store::open(&path).unwrap().close().wait().unwrap();
        }
    }
}

/// The end of a segment's last record: after it there are zeros.
fn records_end(segment: &[u8]) -> usize {
    segment.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

#[test]
fn a_journal_with_a_bit_flip_is_corrupt_and_a_torn_one_opens() {
    let bench = Bench::with(|builder| builder.durability(onlyonce::Durability::Disk));
    // One record of the journal for each key.
    for i in 0..100 {
        bench.store().record(format!("key-{i}")).wait().unwrap();
    }
    // A copy of an open store, as a crash leaves it: a close makes sure that no record can be missing.
    let crashed = bench.path().join("../crashed");
    copy_store(&bench.path(), &crashed);
    bench.store().close().wait().unwrap();
    let log = fs::read_dir(crashed.join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max_by_key(|path| records_end(&fs::read(path).unwrap()))
        .unwrap();
    let intact = fs::read(&log).unwrap();
    // Three bits of each byte of a record's header and of some of its payload, in the middle of the log; and a header
    // of zeros.
    let end = records_end(&intact);
    let middle = 2 * 4_096 + (end - 2 * 4_096) / 2;
    for at in middle..middle + 60 {
        for bit in [0, 3, 7] {
            let mut garbled = intact.clone();
            garbled[at] ^= 1 << bit;
            fs::write(&log, &garbled).unwrap();
            let rejected = bench.builder().open(&crashed);
            let Err(Error::Corrupt { place, .. }) = &rejected else { panic!("bit {bit} of byte {at}: {rejected:?}") };
            assert!(place.contains(log.file_name().unwrap().to_str().unwrap()), "{place}");
        }
    }
    let mut zeroed = intact.clone();
    zeroed[middle..middle + 60].fill(0);
    fs::write(&log, &zeroed).unwrap();
    assert!(matches!(bench.builder().open(&crashed), Err(Error::Corrupt { .. })));

    for (torn, what) in [
        ([&intact[..end - 3], &vec![0; intact.len() - end + 3]].concat(), "its last bytes not written"),
        ([&intact[..end], &[7; 600], &vec![0; intact.len() - end - 600]].concat(), "other bytes after it"),
    ] {
        fs::write(&log, torn).unwrap();
        let copy = bench.path().join("../copy");
        copy_store(&crashed, &copy);
        let store = bench.builder().open(&copy).unwrap_or_else(|error| panic!("{what}: {error}"));
        let remembered = |i: usize| matches!(store.check(format!("key-{i}")).wait().unwrap(), KeyStatus::Completed(_));
        assert!((0..98).all(remembered), "only the tail may be missing: {what}");
        store.close().wait().unwrap();
        fs::remove_dir_all(&copy).unwrap();
    }
}

#[test]
fn a_full_store_of_any_number_of_buckets_can_be_reopened() {
    for buckets in [1, 13, 14, 30, 31, 48] {
        let dir = tempfile::tempdir().unwrap();
        let clock = onlyonce::ManualClock::at(Timestamp::from_unix_ms(START_MS));
        let open = || {
            Store::builder()
                .window(Duration::from_secs(buckets))
                .bucket(Duration::from_secs(1))
                .clock(clock.clone())
                .memory_budget(32 << 20)
                .open(dir.path().join("store"))
        };
        let store = open().unwrap();
        for second in 0..buckets + 3 {
            store.record(format!("key-{second}")).wait().unwrap();
            store.flush().unwrap();
            clock.advance(Duration::from_secs(1));
        }
        store.close().wait().unwrap();
        let store = open().unwrap_or_else(|error| panic!("{buckets} buckets: {error}"));
        for second in 0..buckets + 3 {
            let remembered = matches!(store.check(format!("key-{second}")).wait().unwrap(), KeyStatus::Completed(_));
            assert_eq!(remembered, second > 3, "key {second} of {buckets} buckets");
        }
    }
}

#[test]
fn the_in_flight_limit_rejects_only_calls_that_add_a_key_in_flight() {
    let mut bench = Bench::with(|builder| builder.in_flight_limit(1));
    bench.acquire("done").complete("r").wait().unwrap();
    drop(bench.acquire("dropped"));
    let running = bench.acquire("running");
    assert!(matches!(bench.store().claim("new").wait(), Err(Error::TooManyInFlight { .. })));
    assert!(
        matches!(bench.store().claim("dropped").wait(), Err(Error::TooManyInFlight { .. })),
        "a claim of a dropped key adds one"
    );
    bench.advance_ms(1_000);
    let taken_over = bench.acquire("running");
    assert_eq!(taken_over.attempt().number(), 2, "a claim of an expired lease adds none");
    assert!(running.complete("late").wait().is_err());
    taken_over.complete("r").wait().unwrap();
    assert_eq!(bench.completed("done").unwrap(), b"r", "a duplicate adds none");
    assert_eq!(bench.store().record("recorded").wait().unwrap(), RecordOutcome::First, "a record adds none");
    bench.reopen();
    let again = bench.acquire("dropped");
    assert_eq!(again.attempt().number(), 2, "an interrupted key can be claimed again");
    let batch = bench.store().claim_batch(["done", "new", "dropped"]).wait().unwrap();
    assert!(
        matches!(
            batch.as_slice(),
            [Ok(Claim::Completed(_)), Err(Error::TooManyInFlight { .. }), Ok(Claim::InProgress(_))]
        ),
        "{batch:?}"
    );
    again.complete("r").wait().unwrap();
    bench.acquire("new").complete("r").wait().unwrap();
}

#[test]
fn keys_with_an_expired_lease_stop_counting_as_in_flight_after_a_window() {
    let bench = Bench::with(|builder| builder.in_flight_limit(10));
    // Their holders hang, and never drop them.
    (0..10).for_each(|i| std::mem::forget(bench.acquire(&format!("left-{i}"))));
    assert!(matches!(bench.store().claim("new").wait(), Err(Error::TooManyInFlight { .. })));
    bench.advance_ms(11_000);
    let deadline = Instant::now() + Duration::from_secs(20);
    while bench.store().claim("new").wait().is_err() {
        assert!(Instant::now() < deadline, "the keys still count as in flight");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_checkpoint_of_several_records_is_read_back() {
    let mut bench = Bench::with(|builder| builder.on_interrupt(onlyonce::OnInterrupt::Hold));
    let keys: Vec<String> = (0..20_000).map(|i| format!("{i:0>1000}")).collect();
    for batch in keys.chunks(1_000) {
        // `mem::forget`, not `drop`: the process ends while it holds them.
        std::mem::forget(bench.store().claim_batch(batch).wait().unwrap());
    }
    bench.store().flush().unwrap();
    bench.reopen();
    let stats = bench.store().stats();
    assert_eq!((stats.in_flight, stats.held), (0, 20_000));
    bench.store().resolve(&keys[12_345], onlyonce::Resolution::Rerun).wait().unwrap();
    let again = bench.acquire(&keys[12_345]);
    assert_eq!((again.attempt().number(), again.attempt().prior()), (2, Some(onlyonce::PriorAttempt::Crashed)));
    drop(again);
    bench.store().close().wait().unwrap();
}

#[test]
fn the_longest_key_and_the_largest_result_fit_into_a_call() {
    let mut bench = Bench::with(|builder| builder.result_limit(64 << 20));
    // With its scope and kind it has nearly the limit of 1,024 bytes.
    let key = "k".repeat(1_000);
    let result = vec![7; 64 << 20];
    bench.acquire(&key).complete(result.clone()).wait().unwrap();
    bench.reopen();
    assert!(bench.completed(&key) == Some(result));
}

#[test]
fn flushed_keys_are_not_read_back_from_the_journal() {
    let mut bench = Bench::new();
    bench.acquire("flushed").complete("r").wait().unwrap();
    let open = bench.acquire("open");
    bench.store().flush().unwrap();
    bench.acquire("later").complete("r").wait().unwrap();
    bench.reopen();
    drop(open);
    let stats = bench.store().stats();
    assert_eq!((stats.unflushed, stats.in_flight), (2, 0), "the later key and the leased key");
    assert_eq!(bench.completed("flushed").as_deref(), Some(&b"r"[..]));
}

#[test]
fn a_bucket_is_dropped_only_after_the_time_that_expired_it_is_on_disk() {
    let bench = Bench::new();
    bench.store().record("k").wait().unwrap();
    bench.store().flush().unwrap();
    bench.advance_ms(86_400_000);
    bench.store().flush().unwrap();
    let copy = bench.path().join("../copy");
    copy_store(&bench.path(), &copy);
    bench.clock.set_wall(Timestamp::from_unix_ms(START_MS + 1_000));
    let store = bench.builder().open(&copy).unwrap();
    assert_eq!(
        store.stats().now.as_unix_ms(),
        START_MS + 86_400_000,
        "the store's time does not depend on the clock of the reopen"
    );
    assert_eq!(store.check("k").wait().unwrap(), KeyStatus::New);
}

#[test]
fn a_clock_at_the_largest_timestamp_causes_no_failure() {
    let dir = tempfile::tempdir().unwrap();
    let open = || {
        Store::builder()
            .clock(onlyonce::ManualClock::at(Timestamp::from_unix_ms(u64::MAX - 10)))
            .open(dir.path().join("store"))
    };
    let store = open().unwrap();
    store.record("k").wait().unwrap();
    store.flush().unwrap();
    store.close().wait().unwrap();
    assert!(matches!(open().unwrap().check("k").wait().unwrap(), KeyStatus::Completed(_)));
}

#[test]
fn a_lease_of_a_different_store_is_rejected_and_returned() {
    let (bench, other) = (Bench::new(), Bench::new());
    let lease = other.acquire("k");
    assert_eq!(lease.key(), onlyonce::Key::from("k"));
    let mut answers = bench.store().complete_batch([(lease, "r"), (bench.acquire("ours"), "r")]).wait();
    assert!(answers.pop().unwrap().is_ok());
    let (error, completion, lease) = answers.pop().unwrap().unwrap_err().into_parts();
    assert!(matches!(error, Error::ForeignLease { .. }), "{error}");
    assert_eq!(completion.result(), b"r");
    lease.unwrap().complete("r").wait().unwrap();
    assert_eq!(other.completed("k").unwrap(), b"r");
}

#[test]
fn an_error_of_a_limit_names_the_key_and_nothing_is_changed() {
    let bench = Bench::with(|builder| builder.key_limit(8).in_flight_limit(2));
    let store = bench.store();
    assert!(matches!(store.claim("").wait(), Err(Error::Key(KeyError::Empty { .. }))));
    let error = store.record_batch(["fits", "far too long"]).wait().unwrap_err();
    assert!(matches!(error, Error::Key(KeyError::TooLong { len: 12, limit: 8, .. })), "{error}");
    assert_eq!(store.check("fits").wait().unwrap(), KeyStatus::New, "a rejected batch records nothing");

    let _leases = (bench.acquire("one"), bench.acquire("two"));
    let error = store.claim("three").wait().unwrap_err();
    assert!(matches!(error, Error::TooManyInFlight { in_flight: 2, limit: 2 }), "{error}");
    assert!(error.is_retryable());
    assert_eq!(store.check("three").wait().unwrap(), KeyStatus::New);
}

#[test]
fn any_bytes_can_be_a_key() {
    let mut bench = Bench::new();
    let keys: [&[u8]; 5] = [b"\0", b"\0\0", b"\xff\xfe", b"a\nb", &[0x80; 300]];
    for key in keys {
        assert_eq!(bench.store().record(key).wait().unwrap(), RecordOutcome::First, "{key:?}");
    }
    bench.store().flush().unwrap();
    bench.reopen();
    for key in keys {
        assert_eq!(bench.store().record(key).wait().unwrap(), RecordOutcome::Duplicate { in_flight: false }, "{key:?}");
    }
}

#[test]
fn answers_are_correct_while_the_filter_is_rebuilt_after_a_reopen() {
    let mut bench = Bench::new();
    let keys: Vec<String> = (0..50_000).map(|i| format!("key-{i}")).collect();
    bench.store().record_batch(&keys).wait().unwrap();
    bench.store().flush().unwrap();
    bench.reopen();
    let checks = bench.store().check_batch(keys.iter().take(2_000)).wait().unwrap();
    assert!(checks.into_iter().all(|check| matches!(check, Ok(KeyStatus::Completed(_)))));
    let deadline = Instant::now() + Duration::from_secs(30);
    while bench.store().stats().buckets.iter().any(|bucket| !bucket.filtered) {
        assert!(Instant::now() < deadline, "the filter is not rebuilt");
        std::thread::sleep(Duration::from_millis(5));
    }
    let before = bench.store().stats();
    let new: Vec<String> = (0..50_000).map(|i| format!("new-{i}")).collect();
    let checks = bench.store().check_batch(&new).wait().unwrap();
    assert!(checks.into_iter().all(|check| matches!(check, Ok(KeyStatus::New))));
    let after = bench.store().stats();
    assert_eq!(after.filter_checks - before.filter_checks, 50_000);
    let to_disk = after.filter_hits - before.filter_hits;
    assert!(to_disk < 250, "{to_disk} of 50,000 new keys needed a disk read");
    assert_eq!(to_disk, after.filter_false_positives - before.filter_false_positives);
}

#[test]
fn a_store_without_space_for_its_journal_rejects_calls_before_they_change_anything() {
    // A file-size limit makes the next segment of the journal fail, as a full disk does. It applies to a process, so that the failing
    // store needs a child process.
    if let Ok(path) = std::env::var("ONLYONCE_POISON_STORE") {
        let store = Store::builder().memory_budget(32 << 20).open(path).unwrap();
        let failure = (0..10_000).find_map(|i| {
            store
                .claim(format!("key-{i}"))
                .wait()
                .and_then(|claim| match claim {
                    Claim::Acquired(lease) => lease.complete(vec![b'r'; 4_096]).wait().map_err(|error| {
                        assert_eq!(error.completion().result().len(), 4_096, "the error returns the result");
                        error.into_parts().0
                    }),
                    other => panic!("{other:?}"),
                })
                .err()
        });
        let failure = failure.expect("the limit is reached");
        assert!(matches!(failure, Error::Io { .. }), "{failure}");
        assert_eq!(failure.outcome(), Outcome::NotWritten);
        assert!(matches!(store.claim("key-0").wait().unwrap(), Claim::Completed(_)));
        assert!(store.stats().poisoned.is_none());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let exe = std::env::current_exe().unwrap();
    let status = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 2000; exec \"$0\" --exact \"$1\""])
        .arg(&exe)
        .arg("opening::a_store_without_space_for_its_journal_rejects_calls_before_they_change_anything")
        .env("ONLYONCE_POISON_STORE", &path)
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{status}");
    let store = Store::open(&path).unwrap();
    assert!(matches!(store.claim("key-0").wait().unwrap(), Claim::Completed(_)));
}

#[test]
fn a_store_with_an_expected_rate_does_not_grow_its_filter() {
    let fill = |bench: &Bench| {
        let keys: Vec<String> = (0..150_000).map(|i| format!("key-{i}")).collect();
        let before = bench.store().stats().filter_bytes;
        for batch in keys.chunks(1_000) {
            bench.store().record_batch(batch).wait().unwrap();
        }
        bench.store().flush().unwrap();
        (before, bench.store().stats().filter_bytes)
    };
    let (before, after) = fill(&Bench::with(|builder| builder.expected_rate(150_000)));
    assert_eq!(before, after);
    let (before, after) = fill(&Bench::new());
    assert!(after > before, "{before} bytes before, {after} after: the default estimate is 100,000 keys");
    // A rate over the memory budget is accepted.
    let (_, after) = fill(&Bench::with(|builder| builder.expected_rate(u64::MAX)));
    assert!(after <= 32 << 20, "{after}");
}

#[test]
fn an_open_that_must_not_create_a_store_reports_a_missing_one_and_creates_nothing() {
    let bench = Bench::new();
    let missing = bench.path().with_file_name("missing");
    let error = bench.builder().create(false).open(&missing).unwrap_err();
    assert!(matches!(&error, Error::NotFound { path } if *path == missing), "{error}");
    assert!(!missing.exists());

    let empty = bench.path().with_file_name("empty");
    fs::create_dir(&empty).unwrap();
    assert!(matches!(bench.builder().create(false).open(&empty), Err(Error::NotFound { .. })));
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);

    let other = bench.path().with_file_name("other");
    bench.builder().open(&other).unwrap().close().wait().unwrap();
    bench.builder().create(false).open(&other).unwrap().close().wait().unwrap();
    fs::remove_dir_all(other.join("db")).unwrap();
    let damaged = bench.builder().create(false).open(&other).unwrap_err();
    assert!(matches!(damaged, Error::Corrupt { .. }), "{damaged}");
}

#[test]
fn a_store_knows_its_path_and_its_window() {
    let bench = Bench::new();
    assert_eq!(bench.store().path(), std::path::absolute(bench.path()).unwrap());
    assert_eq!(bench.store().window(), Duration::from_secs(10));
    let shown = format!("{:?}", bench.store());
    assert!(shown.contains(&format!("{:?}", bench.store().path())) && shown.contains("10s"), "{shown}");
}
