//! G4: a key answers "completed" if and only if `now < completed + window`, to the millisecond.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::common::{Bench, START_MS, copy_store};
use onlyonce::{Claim, Key, KeyStatus, Lease, OnInterrupt, RecordOutcome, Resolution, Store, Timestamp};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

const WINDOW_MS: u64 = 10_000;

fn is_completed(store: &Store, key: &str) -> bool {
    matches!(store.check(key).wait().unwrap(), KeyStatus::Completed(_))
}

#[test]
fn a_key_is_forgotten_at_the_millisecond_its_window_ends() {
    for flushed in [false, true] {
        for reopened in [false, true] {
            let mut bench = Bench::new();
            bench.advance_ms(123);
            bench.acquire("k").complete("r").wait().unwrap();
            if flushed {
                bench.store().flush().unwrap();
            }
            if reopened {
                bench.reopen();
            }
            bench.advance_ms(WINDOW_MS - 1);
            bench.store().flush().unwrap();
            assert!(is_completed(bench.store(), "k"), "flushed {flushed}, reopened {reopened}");
            bench.advance_ms(1);
            assert!(!is_completed(bench.store(), "k"), "flushed {flushed}, reopened {reopened}");
            assert_eq!(bench.acquire("k").attempt().number(), 1);
        }
    }
}

const OWN_MS: u64 = 3_141;

fn own(key: &str) -> Key<'_> {
    Key::from(key).window(Duration::from_millis(OWN_MS))
}

fn acquire(store: &Store, key: Key<'_>) -> Lease {
    match store.claim(key).wait().unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("it should be free, but is {other:?}"),
    }
}

#[test]
fn a_key_is_forgotten_at_the_millisecond_its_own_window_ends() {
    for flushed in [false, true] {
        for reopened in [false, true] {
            let mut bench = Bench::new();
            bench.advance_ms(123);
            let late = acquire(bench.store(), own("completed late"));
            bench.advance_ms(1_500);
            acquire(bench.store(), own("completed")).complete("r").wait().unwrap();
            late.complete("r").wait().unwrap();
            bench.store().record(own("recorded")).wait().unwrap();
            bench.store().record("whole").wait().unwrap();
            if flushed {
                bench.store().flush().unwrap();
            }
            if reopened {
                bench.reopen();
            }
            bench.advance_ms(OWN_MS - 1);
            let case = format!("flushed {flushed}, reopened {reopened}");
            let keys = ["completed", "completed late", "recorded"];
            for key in keys {
                // A call about a completed key does not change its window.
                let KeyStatus::Completed(first) = bench.store().check(key).wait().unwrap() else {
                    panic!("{case}: {key} is forgotten too early")
                };
                assert_eq!(
                    first.remembered_until().saturating_since(first.completed_at()).as_millis(),
                    3_141,
                    "{case}"
                );
            }
            bench.advance_ms(1);
            for key in keys {
                assert!(!is_completed(bench.store(), key), "{case}: {key}");
                assert_eq!(bench.store().inspect(key).wait().unwrap(), None, "{case}: {key}");
                assert!(!bench.store().forget(key).wait().unwrap(), "{case}: {key}");
                assert_eq!(bench.acquire(key).attempt().number(), 1, "{case}: {key}");
            }
            bench.advance_ms(WINDOW_MS - OWN_MS - 1);
            assert!(is_completed(bench.store(), "whole"), "{case}");
        }
    }
}

#[test]
fn an_own_window_stays_when_the_store_s_window_changes() {
    let bench = Bench::new();
    bench.store().record(own("short")).wait().unwrap();
    bench.store().record(Key::from("long").window(Duration::from_millis(2 * WINDOW_MS))).wait().unwrap();
    bench.store().close().wait().unwrap();
    let wide = bench.builder().window(Duration::from_secs(40)).open(bench.path()).unwrap();
    bench.advance_ms(OWN_MS - 1);
    assert!(is_completed(&wide, "short"));
    bench.advance_ms(1);
    assert!(!is_completed(&wide, "short") && is_completed(&wide, "long"));
    bench.advance_ms(2 * WINDOW_MS - OWN_MS - 1);
    assert!(is_completed(&wide, "long"));
    bench.advance_ms(1);
    assert!(!is_completed(&wide, "long"));
}

#[test]
fn each_attempt_brings_its_own_window() {
    for flushed in [false, true] {
        let bench = Bench::new();
        drop(acquire(bench.store(), own("k")));
        if flushed {
            bench.store().flush().unwrap();
        }
        bench.acquire("k").complete("r").wait().unwrap();
        bench.advance_ms(WINDOW_MS - 1);
        assert!(is_completed(bench.store(), "k"), "the attempt that completes it has none");
        bench.advance_ms(1);
        bench.acquire("k").release().wait().unwrap();
        acquire(bench.store(), own("k")).complete("r").wait().unwrap();
        bench.advance_ms(OWN_MS);
        assert!(!is_completed(bench.store(), "k"));
    }
}

#[test]
fn a_completion_by_an_operator_or_a_late_holder_has_the_key_s_own_window() {
    for reopened in [false, true] {
        let mut bench = Bench::with(|builder| builder.on_interrupt(OnInterrupt::Hold));
        for key in ["completed", "run again"] {
            drop(acquire(bench.store(), own(key)));
        }
        let late = acquire(bench.store(), own("late"));
        bench.advance_ms(1_000);
        bench.store().resolve("late", Resolution::Rerun).wait().unwrap();
        late.complete("late").wait().unwrap();
        bench.store().flush().unwrap();
        if reopened {
            bench.reopen();
        }
        bench.store().resolve("completed", Resolution::Completed(Vec::new())).wait().unwrap();
        bench.advance_ms(OWN_MS - 1);
        assert!(is_completed(bench.store(), "completed") && is_completed(bench.store(), "late"), "{reopened}");
        bench.advance_ms(1);
        assert!(!is_completed(bench.store(), "completed") && !is_completed(bench.store(), "late"), "{reopened}");
    }
}

#[test]
fn a_completion_whose_own_window_is_over_still_overrules_an_earlier_attempt() {
    for flushed in [false, true] {
        for (reopened, forgotten) in [(false, false), (true, false), (false, true)] {
            let mut bench = Bench::new();
            drop(acquire(bench.store(), Key::from("k").fingerprint("12 EUR")));
            bench.store().flush().unwrap();
            bench.advance_ms(1_000);
            let again = acquire(bench.store(), own("k"));
            assert_eq!(again.attempt().number(), 2);
            again.complete("r").wait().unwrap();
            if flushed {
                bench.store().flush().unwrap();
            }
            bench.advance_ms(OWN_MS);
            if reopened {
                bench.reopen();
            }
            bench.store().flush().unwrap();
            let case = format!("flushed {flushed}, reopened {reopened}, forgotten {forgotten}");
            assert_eq!(bench.store().inspect("k").wait().unwrap(), None, "{case}");
            if forgotten {
                assert!(!bench.store().forget("k").wait().unwrap(), "{case}");
            }
            let new = acquire(bench.store(), Key::from("k").fingerprint("99 EUR"));
            assert_eq!((new.attempt().number(), new.attempt().prior()), (1, None), "{case}");
        }
    }
}

#[test]
fn every_key_of_many_buckets_is_remembered_exactly_as_long_as_its_window() {
    let mut bench = Bench::new();
    let mut completed_ms = BTreeMap::new();
    let mut now_ms = START_MS;
    // 400 keys over 40 s: four windows of ten buckets each.
    for i in 0..400_u64 {
        let key = format!("key-{i}");
        bench.store().record(&key).wait().unwrap();
        completed_ms.insert(key, now_ms);
        let step_ms = 37 + i * 41 % 127;
        bench.advance_ms(step_ms);
        now_ms += step_ms;
        match i % 40 {
            13 | 31 => bench.store().flush().unwrap(),
            39 => bench.reopen(),
            _ => {}
        }
        for (key, completed_ms) in &completed_ms {
            let remembered = now_ms < completed_ms + WINDOW_MS;
            assert_eq!(is_completed(bench.store(), key), remembered, "{key} at {now_ms}, completed at {completed_ms}");
        }
    }
    let stats = bench.store().stats();
    assert!(stats.buckets.len() <= 13, "expired buckets are dropped: {:?}", stats.buckets);
    assert!(stats.buckets.len() >= 9, "live buckets are not: {:?}", stats.buckets);
    assert_eq!(stats.remembers_since.as_unix_ms(), now_ms - WINDOW_MS + 1);
}

#[test]
fn the_window_counts_from_completion_and_not_from_the_claim() {
    let bench = Bench::with(|builder| builder.lease(Duration::from_secs(60)));
    let lease = bench.acquire("k");
    bench.advance_ms(25_000);
    lease.complete("r").wait().unwrap();
    bench.advance_ms(WINDOW_MS - 1);
    assert!(is_completed(bench.store(), "k"));
    bench.advance_ms(1);
    assert!(!is_completed(bench.store(), "k"));
}

#[test]
fn an_expired_bucket_is_deleted_from_disk() {
    let bench = Bench::new();
    let keys: Vec<String> = (0..20_000).map(|i| format!("{i:0>64}")).collect();
    bench.store().record_batch(&keys).wait().unwrap();
    bench.store().flush().unwrap();
    let full = bench.store().stats();
    assert_eq!(full.buckets.iter().map(|bucket| bucket.keys).sum::<u64>(), 20_000);
    bench.advance_ms(WINDOW_MS + 1_000);
    bench.store().flush().unwrap();
    let empty = bench.store().stats();
    assert!(empty.buckets.iter().all(|bucket| bucket.keys == 0), "{:?}", empty.buckets);
    // RocksDB deletes the files of a dropped column family in the background.
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while bench.store().stats().disk_bytes + 1_000_000 > full.disk_bytes {
        assert!(
            std::time::Instant::now() < deadline,
            "{} of {} bytes are still on disk",
            bench.store().stats().disk_bytes,
            full.disk_bytes
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_clock_that_steps_back_restores_no_expired_key_and_forgets_none() {
    let mut bench = Bench::new();
    bench.store().record("old").wait().unwrap();
    bench.advance_ms(WINDOW_MS);
    assert!(!is_completed(bench.store(), "old"));
    bench.store().record("new").wait().unwrap();

    bench.clock.set_wall(Timestamp::from_unix_ms(START_MS - 86_400_000));
    assert!(!is_completed(bench.store(), "old"));
    assert!(is_completed(bench.store(), "new"));
    bench.reopen();
    assert!(!is_completed(bench.store(), "old"), "also after a restart");
    assert!(is_completed(bench.store(), "new"));
    assert_eq!(bench.store().stats().now.as_unix_ms(), START_MS + WINDOW_MS);

    bench.store().record("at a wrong time").wait().unwrap();
    bench.advance_ms(WINDOW_MS - 1);
    assert!(is_completed(bench.store(), "at a wrong time"));
    bench.advance_ms(1);
    assert!(!is_completed(bench.store(), "at a wrong time"), "the store's time advances, although the clock is wrong");
}

#[test]
fn a_clock_that_advances_a_year_expires_all_keys() {
    let bench = Bench::new();
    let keys: Vec<String> = (0..1_000).map(|i| format!("key-{i}")).collect();
    bench.store().record_batch(&keys).wait().unwrap();
    bench.store().flush().unwrap();
    bench.advance_ms(366 * 86_400_000);
    assert!(keys.iter().all(|key| !is_completed(bench.store(), key)));
    bench.store().flush().unwrap();
    bench.store().record_batch(&keys).wait().unwrap();
    bench.store().flush().unwrap();
    assert!(keys.iter().all(|key| is_completed(bench.store(), key)));
}

#[test]
fn a_store_reopened_with_a_different_bucket_width_remembers_all_keys() {
    let bench = Bench::new();
    bench.store().record("narrow").wait().unwrap();
    bench.store().flush().unwrap();
    bench.store().close().wait().unwrap();
    let wide = bench.builder().bucket(Duration::from_secs(5)).open(bench.path()).unwrap();
    bench.advance_ms(1_700);
    wide.record("wide").wait().unwrap();
    wide.flush().unwrap();
    assert!(is_completed(&wide, "narrow") && is_completed(&wide, "wide"));
    assert!(wide.stats().buckets.len() >= 2);
    bench.advance_ms(WINDOW_MS - 1_700);
    assert!(!is_completed(&wide, "narrow") && is_completed(&wide, "wide"));
    bench.advance_ms(1_700);
    assert!(!is_completed(&wide, "wide"));
}

#[test]
fn a_store_keeps_its_window_when_it_is_opened_without_one() {
    let bench = Bench::new();
    bench.store().record("k").wait().unwrap();
    bench.store().close().wait().unwrap();
    let reopened = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    assert_eq!(reopened.stats().window, Duration::from_millis(WINDOW_MS));
    bench.advance_ms(WINDOW_MS - 1);
    assert!(matches!(reopened.check(Key::from("k")).wait().unwrap(), KeyStatus::Completed(_)));
    bench.advance_ms(1);
    assert_eq!(reopened.check(Key::from("k")).wait().unwrap(), KeyStatus::New);
    reopened.close().wait().unwrap();
    let wider = Store::builder().clock(bench.clock.clone()).window(Duration::from_millis(2 * WINDOW_MS));
    wider.open(bench.path()).unwrap().close().wait().unwrap();
    let reopened = Store::builder().clock(bench.clock.clone()).open(bench.path()).unwrap();
    assert_eq!(reopened.stats().window, Duration::from_millis(2 * WINDOW_MS), "the last explicit setting counts");
}

#[test]
fn keys_forgotten_by_a_narrower_window_stay_forgotten_in_a_wider_one() {
    const HOUR_MS: u64 = 3_600_000;
    for (dropped, crashed) in [(true, false), (false, false), (false, true)] {
        let mut bench =
            Bench::with(|builder| builder.window(Duration::from_secs(24 * 3_600)).bucket(Duration::from_secs(3_600)));
        bench.store().record("forgotten").wait().unwrap();
        bench.store().flush().unwrap();
        bench.advance_ms(9 * HOUR_MS / 2);
        // In the same bucket, at the two sides of the new window's edge.
        bench.store().record("just forgotten").wait().unwrap();
        bench.advance_ms(1);
        bench.store().record("just remembered").wait().unwrap();
        bench.advance_ms(HOUR_MS / 2 - 1);
        bench.store().record("remembered").wait().unwrap();
        bench.advance_ms(HOUR_MS / 2);
        bench.store().flush().unwrap();
        bench.store().close().wait().unwrap();
        let hour = Duration::from_secs(3_600);
        let narrow = bench.builder().window(hour).bucket(hour / 4).open(bench.path()).unwrap();
        let since_ms = narrow.stats().remembers_since.as_unix_ms();
        assert_eq!(since_ms, START_MS + 5 * HOUR_MS + HOUR_MS / 2 - HOUR_MS + 1);
        assert!(!is_completed(&narrow, "forgotten") && is_completed(&narrow, "remembered"));
        assert!(!is_completed(&narrow, "just forgotten") && is_completed(&narrow, "just remembered"));
        if dropped {
            narrow.flush().unwrap();
        }
        if crashed {
            // As a crash leaves the directory, before any other write.
            let left = tempfile::tempdir().unwrap();
            copy_store(&bench.path(), &left.path().join("store"));
            let wide = bench.builder().open(left.path().join("store")).unwrap();
            assert_eq!(wide.stats().remembers_since.as_unix_ms(), since_ms);
            assert!(!is_completed(&wide, "forgotten"));
        }
        narrow.close().wait().unwrap();
        bench.reopen();
        let case = format!("dropped {dropped}, crashed {crashed}");
        assert_eq!(bench.store().stats().remembers_since.as_unix_ms(), since_ms, "{case}");
        assert!(!is_completed(bench.store(), "forgotten") && is_completed(bench.store(), "remembered"), "{case}");
        assert!(
            !is_completed(bench.store(), "just forgotten") && is_completed(bench.store(), "just remembered"),
            "{case}"
        );
        assert_eq!(bench.store().record("forgotten").wait().unwrap(), RecordOutcome::First, "{case}");
        bench.advance_ms(20 * HOUR_MS);
        assert!(is_completed(bench.store(), "forgotten") && is_completed(bench.store(), "remembered"), "{case}");
        assert_eq!(
            bench.store().stats().remembers_since.as_unix_ms(),
            since_ms,
            "{case}: the wide window is not full yet"
        );
        bench.advance_ms(4 * HOUR_MS);
        assert_eq!(
            bench.store().stats().remembers_since.as_unix_ms(),
            bench.store().stats().now.as_unix_ms() - 24 * HOUR_MS + 1,
            "{case}"
        );
    }
}

#[test]
fn random_windows_give_the_answers_of_a_plain_map() {
    let seed = rand::rng().random();
    eprintln!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..8 {
        let bench = Bench::new();
        let mut store = bench.builder().open(bench.path().with_file_name("windows")).unwrap();
        let (mut window_ms, mut floor_ms, mut now_ms) = (WINDOW_MS, 0, START_MS);
        // When each key was completed, and its own window.
        let mut completed_ms: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for step in 0..150 {
            match rng.random_range(0..10) {
                0..=3 => {
                    let key = format!("key-{step}");
                    let own_ms = *[1, 2_000, 9_000, 25_000, u64::MAX].choose(&mut rng).unwrap();
                    store.record(Key::from(&key).window(Duration::from_millis(own_ms))).wait().unwrap();
                    completed_ms.insert(key, (now_ms, own_ms));
                }
                4..=6 => {
                    let ms = rng.random_range(0..3_000);
                    bench.advance_ms(ms);
                    now_ms += ms;
                }
                7 => store.flush().unwrap(),
                _ => {
                    floor_ms = floor_ms.max(now_ms + 1 - window_ms);
                    window_ms = *[3_000, WINDOW_MS, 30_000].choose(&mut rng).unwrap();
                    store.close().wait().unwrap();
                    let window = Duration::from_millis(window_ms);
                    let builder = bench.builder().window(window).bucket(Duration::from_secs(1));
                    store = builder.open(bench.path().with_file_name("windows")).unwrap();
                }
            }
            let since_ms = floor_ms.max(now_ms + 1 - window_ms);
            assert_eq!(store.stats().remembers_since.as_unix_ms(), since_ms, "step {step}");
            for (key, (completed_ms, own_ms)) in &completed_ms {
                assert_eq!(
                    is_completed(&store, key),
                    *completed_ms >= since_ms && now_ms < completed_ms.saturating_add(*own_ms),
                    "{key} of {completed_ms} at step {step}"
                );
            }
        }
    }
}
