//! Stream time: the window follows the messages' timestamps and no clock. A backlog and a replay are deduplicated as in the
//! original run, a single outlier does not advance the time, and a message that is too old is reported as such.
//!
//! `ONLYONCE_STREAM_ROUNDS` (default: 10) sets the number of random streams, and `ONLYONCE_STREAM_SEED` (default:
//! random, and printed) their seed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use onlyonce::{
    Builder, Claim, Durability, Error, Key, KeyStatus, Lease, ManualClock, OnInterrupt, PriorAttempt, RecordOutcome,
    Resolution, Store, Timestamp, TimestampError,
};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

const WINDOW_MS: u64 = 10_000;
const AHEAD_MS: u64 = 5_000;
const DAY_MS: u64 = 86_400_000;
/// 400 days before [`TODAY_MS`].
const START_MS: u64 = 1_700_000_000_000;
const TODAY_MS: u64 = START_MS + 400 * DAY_MS;

/// A store on stream time, and a wall clock, which it must ignore.
struct Stream {
    // Before the directory, so that it is dropped first.
    store: Option<Store>,
    clock: ManualClock,
    dir: TempDir,
    on_interrupt: OnInterrupt,
}

fn builder(clock: &ManualClock) -> Builder {
    Store::builder()
        .window(Duration::from_millis(WINDOW_MS))
        .bucket(Duration::from_secs(1))
        .lease(Duration::from_secs(1))
        .memory_budget(32 << 20)
        .durability(Durability::Process)
        .clock(clock.clone())
}

/// The key of a message with this timestamp.
fn message<'k>(key: impl Into<Key<'k>>, at_ms: u64) -> Key<'k> {
    key.into().at(Timestamp::from_unix_ms(at_ms))
}

impl Stream {
    fn new() -> Self {
        Self::with(OnInterrupt::Rerun)
    }

    fn with(on_interrupt: OnInterrupt) -> Self {
        let (clock, dir) = (ManualClock::at(Timestamp::from_unix_ms(TODAY_MS)), tempfile::tempdir().unwrap());
        let mut stream = Self { store: None, clock, dir, on_interrupt };
        stream.store = Some(stream.open());
        stream
    }

    fn open(&self) -> Store {
        let builder = builder(&self.clock).on_interrupt(self.on_interrupt);
        builder.stream_time(Duration::from_millis(AHEAD_MS)).open(self.path()).unwrap()
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn reopen(&mut self) {
        self.store().close().wait().unwrap();
        self.store = Some(self.open());
    }

    fn now_ms(&self) -> u64 {
        self.store().stats().now.as_unix_ms()
    }

    fn acquire(&self, key: &str, at_ms: u64) -> Lease {
        match self.store().claim(message(key, at_ms)).wait().unwrap() {
            Claim::Acquired(lease) => lease,
            other => panic!("{key} of {at_ms} should be unclaimed, but is {other:?}"),
        }
    }

    fn complete(&self, key: &str, at_ms: u64) {
        self.acquire(key, at_ms).complete(at_ms.to_string()).wait().unwrap();
    }

    /// Advances stream time.
    fn tick(&self, at_ms: u64) {
        assert_eq!(self.store().record(message(format!("tick {at_ms}"), at_ms)).wait().unwrap(), RecordOutcome::First);
    }

    fn answer(&self, key: &str, at_ms: u64) -> &'static str {
        match self.store().check(message(key, at_ms)).wait() {
            Ok(KeyStatus::New) => "new",
            Ok(KeyStatus::InProgress(_)) => "in progress",
            Ok(KeyStatus::Completed(_)) => "completed",
            Err(Error::Timestamp(TimestampError::TooOld { .. })) => "too old",
            Err(Error::Timestamp(TimestampError::TooFarAhead { .. })) => "too far ahead",
            Err(error) => panic!("{key} of {at_ms}: {error}"),
        }
    }

    fn is_too_far_ahead(&self, key: &str, at_ms: u64) -> bool {
        match self.store().record(message(key, at_ms)).wait() {
            Ok(_) => false,
            Err(error @ Error::Timestamp(TimestampError::TooFarAhead { .. })) => {
                assert!(error.is_retryable());
                true
            }
            Err(error) => panic!("{key} of {at_ms}: {error}"),
        }
    }
}

#[test]
fn a_key_is_remembered_until_stream_time_is_a_window_past_its_message() {
    for flushed in [false, true] {
        for reopened in [false, true] {
            let mut stream = Stream::new();
            stream.tick(START_MS);
            let at_ms = START_MS - 123;
            stream.complete("k", at_ms);
            if flushed {
                stream.store().flush().unwrap();
            }
            if reopened {
                stream.reopen();
            }
            stream.tick(at_ms + WINDOW_MS / 2);
            stream.tick(at_ms + WINDOW_MS - 1);
            stream.store().flush().unwrap();
            let KeyStatus::Completed(first) = stream.store().check(message("k", at_ms)).wait().unwrap() else {
                panic!("{flushed}")
            };
            assert_eq!(first.completed_at().as_unix_ms(), at_ms);
            assert_eq!(first.result(), Some(at_ms.to_string().as_bytes()));
            stream.tick(at_ms + WINDOW_MS);
            assert_eq!(stream.answer("k", at_ms), "too old", "flushed {flushed}, reopened {reopened}");
            assert_eq!(stream.answer("k", at_ms + 1), "new", "a different message with the same key");
        }
    }
}

#[test]
fn messages_forgotten_by_a_narrower_window_are_too_old_in_a_wider_one() {
    const HOUR_MS: u64 = 3_600_000;
    for (dropped, narrow_again) in [(true, false), (false, false), (true, true)] {
        let (dir, clock) = (tempfile::tempdir().unwrap(), ManualClock::at(Timestamp::from_unix_ms(TODAY_MS)));
        let path = dir.path().join("store");
        let open = |hours: u32| {
            let hour = Duration::from_secs(3_600);
            builder(&clock).window(hour * hours).bucket(hour * hours / 24).stream_time(hour).open(&path).unwrap()
        };
        let is_too_old = |store: &Store, key: &str, at_ms: u64| match store.claim(message(key, at_ms)).wait() {
            Err(Error::Timestamp(TimestampError::TooOld { remembers_since, .. })) => {
                assert_eq!(remembers_since, store.stats().remembers_since);
                true
            }
            Ok(Claim::Acquired(lease)) => {
                lease.release().wait().unwrap();
                false
            }
            other => panic!("{key} of {at_ms}: {other:?}"),
        };
        let store = open(24);
        store.record(message("done", START_MS)).wait().unwrap();
        for hour in 1..=5 {
            store.record(message(format!("tick {hour}"), START_MS + hour * HOUR_MS)).wait().unwrap();
        }
        store.close().wait().unwrap();
        let store = open(1);
        let since_ms = START_MS + 4 * HOUR_MS + 1;
        assert_eq!(store.stats().remembers_since.as_unix_ms(), since_ms);
        assert!(is_too_old(&store, "done", START_MS));
        if dropped {
            store.flush().unwrap();
        }
        store.close().wait().unwrap();
        if narrow_again {
            open(3).close().wait().unwrap();
        }
        let store = open(24);
        let case = format!("dropped {dropped}, narrow again {narrow_again}");
        assert_eq!(store.stats().remembers_since.as_unix_ms(), since_ms, "{case}");
        assert!(is_too_old(&store, "done", START_MS), "{case}: it was completed and forgotten");
        assert!(
            is_too_old(&store, "never seen", since_ms - 1) && !is_too_old(&store, "never seen", since_ms),
            "{case}"
        );
        assert!(
            matches!(store.check(message("tick 5", START_MS + 5 * HOUR_MS)).wait(), Ok(KeyStatus::Completed(_))),
            "{case}"
        );
        assert!(
            matches!(
                store.check(message("tick 4", START_MS + 4 * HOUR_MS)).wait(),
                Err(Error::Timestamp(TimestampError::TooOld { .. }))
            ),
            "{case}"
        );
    }
}

#[test]
fn a_check_returns_the_answer_of_a_claim_and_does_not_advance_stream_time() {
    let stream = Stream::new();
    stream.complete("k", START_MS);
    stream.tick(START_MS + WINDOW_MS / 2);
    // A claim of this message advances stream time by the maximum.
    let ahead_ms = START_MS + WINDOW_MS;
    assert_eq!((stream.answer("k", ahead_ms - 1), stream.answer("k", ahead_ms)), ("completed", "new"));
    assert_eq!((stream.now_ms(), stream.answer("k", START_MS)), (START_MS + WINDOW_MS / 2, "completed"));
    let claimed = stream.acquire("k", ahead_ms);
    assert_eq!((claimed.attempt().number(), stream.now_ms()), (1, ahead_ms));
    assert_eq!(stream.answer("k", START_MS), "in progress");
}

#[test]
fn a_completion_after_the_window_gets_the_timestamp_of_its_message() {
    let stream = Stream::new();
    let lease = stream.acquire("k", START_MS);
    for step in 1..=4 {
        stream.tick(START_MS + step * AHEAD_MS);
    }
    assert_eq!(stream.answer("k", START_MS), "in progress", "a lease does not depend on stream time");
    lease.complete("r").wait().unwrap();
    assert_eq!(stream.answer("k", START_MS), "too old");
    assert_eq!(stream.store().inspect("k").wait().unwrap(), None);
}

#[test]
fn a_late_message_is_remembered_for_a_window_from_its_timestamp() {
    let mut stream = Stream::new();
    stream.tick(START_MS);
    stream.tick(START_MS + AHEAD_MS);
    stream.store().flush().unwrap();
    // Its bucket has ended, and was never created.
    let late_ms = START_MS - 2_500;
    assert_eq!(stream.store().record(message("late", late_ms)).wait().unwrap(), RecordOutcome::First);
    stream.store().flush().unwrap();
    let bucket = late_ms - late_ms % 1_000;
    let buckets = stream.store().stats().buckets;
    assert!(buckets.iter().any(|stats| stats.start.as_unix_ms() == bucket && stats.keys == 1), "{buckets:?}");
    stream.reopen();
    assert_eq!(
        stream.store().record(message("late", late_ms)).wait().unwrap(),
        RecordOutcome::Duplicate { in_flight: false }
    );
    stream.tick(late_ms + WINDOW_MS - 1);
    stream.store().flush().unwrap();
    assert_eq!(stream.answer("late", late_ms), "completed");
    stream.tick(late_ms + WINDOW_MS);
    stream.store().flush().unwrap();
    assert_eq!(stream.answer("late", late_ms), "too old");
    stream.tick(bucket + 1_000 + WINDOW_MS);
    stream.store().flush().unwrap();
    assert!(stream.store().stats().buckets.iter().all(|stats| stats.start.as_unix_ms() > bucket));
}

#[test]
fn a_message_that_is_too_old_is_neither_accepted_nor_reported_as_a_duplicate() {
    let stream = Stream::new();
    stream.tick(START_MS);
    let old_ms = START_MS - WINDOW_MS;
    for answer in [
        stream.store().claim(message("old", old_ms)).wait().map(drop),
        stream.store().record(message("old", old_ms)).wait().map(drop),
        stream.store().check(message("old", old_ms)).wait().map(drop),
        stream.store().claim_batch([message("old", old_ms)]).wait().unwrap().pop().unwrap().map(drop),
    ] {
        let Err(Error::Timestamp(TimestampError::TooOld { key, at, remembers_since })) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!((key.as_str(), at.as_unix_ms(), remembers_since.as_unix_ms()), ("\"old\"", old_ms, old_ms + 1));
    }
    assert_eq!(stream.answer("old", old_ms + 1), "new");
    assert_eq!((stream.store().stats().too_old, stream.now_ms()), (3, START_MS), "a check counts nothing");
}

#[test]
fn a_message_is_too_old_once_its_key_s_own_window_is_over() {
    const OWN_MS: u64 = 3_000;
    let key = |key: &'static str, at_ms: u64| {
        Key::from(key).at(Timestamp::from_unix_ms(at_ms)).window(Duration::from_millis(OWN_MS))
    };
    for flushed in [false, true] {
        for reopened in [false, true] {
            let mut stream = Stream::new();
            let case = format!("flushed {flushed}, reopened {reopened}");
            let Claim::Acquired(lease) = stream.store().claim(key("claimed", START_MS)).wait().unwrap() else {
                panic!("{case}: the key is not new")
            };
            stream.tick(START_MS + 1_000);
            lease.complete("r").wait().unwrap();
            stream.store().record(key("recorded", START_MS)).wait().unwrap();
            stream.tick(START_MS + OWN_MS - 1);
            if flushed {
                stream.store().flush().unwrap();
            }
            if reopened {
                stream.reopen();
            }
            for name in ["claimed", "recorded"] {
                let checked = stream.store().check(key(name, START_MS)).wait().unwrap();
                assert!(matches!(checked, KeyStatus::Completed(_)), "{case}: {name}: {checked:?}");
            }
            assert_eq!(stream.store().check(key("unknown", START_MS)).wait().unwrap(), KeyStatus::New, "{case}");
            stream.tick(START_MS + OWN_MS);
            for name in ["claimed", "recorded", "unknown"] {
                for error in [
                    stream.store().check(key(name, START_MS)).wait().unwrap_err(),
                    stream.store().record(key(name, START_MS)).wait().unwrap_err(),
                    stream.store().claim(key(name, START_MS)).wait().unwrap_err(),
                ] {
                    let Error::Timestamp(TimestampError::TooOld { at, remembers_since, .. }) = error else {
                        panic!("{case}: {name}: {error}")
                    };
                    assert_eq!(
                        (at.as_unix_ms(), remembers_since.as_unix_ms()),
                        (START_MS, START_MS + 1),
                        "{case}: {name}"
                    );
                }
                assert_eq!(stream.answer(name, START_MS), "new", "{case}: {name}: the window of this call is longer");
            }
        }
    }
}

#[test]
fn a_stored_state_answers_before_the_message_is_checked_for_age() {
    let stream = Stream::with(OnInterrupt::Hold);
    stream.complete("done", START_MS);
    drop(stream.acquire("held", START_MS));
    let leased = stream.acquire("leased", START_MS);
    stream.tick(START_MS + AHEAD_MS);
    let old_ms = START_MS + AHEAD_MS - WINDOW_MS;
    assert_eq!(stream.answer("done", old_ms), "completed");
    assert_eq!(stream.answer("held", old_ms), "in progress");
    assert_eq!(stream.answer("leased", old_ms), "in progress");
    leased.release().wait().unwrap();
    assert_eq!(
        stream.acquire("leased", old_ms).attempt().number(),
        2,
        "the first attempt is expected to have had no effect"
    );
    stream.tick(START_MS + 2 * AHEAD_MS);
    assert_eq!(stream.answer("done", START_MS), "too old");
    assert_eq!(stream.answer("held", START_MS), "in progress", "a held key does not expire");
    stream.store().resolve("held", Resolution::Rerun).wait().unwrap();
    assert_eq!(stream.answer("held", START_MS), "too old");
}

#[test]
fn a_replay_of_last_year_is_deduplicated_as_in_the_original_run() {
    let mut stream = Stream::new();
    // A message every second for an hour, a pause of half a day, and another hour. Each is delivered up to four times:
    // twice at once, then half a window later, and two windows later, which is too late.
    let mut times: Vec<u64> = (0..3_600).map(|second| START_MS + second * 1_000).collect();
    times.extend((0..3_600).map(|second| START_MS + DAY_MS / 2 + second * 1_000));
    let (mut first, mut duplicates, mut too_old) = (0, 0, 0);
    let mut count = |answer: onlyonce::Result<RecordOutcome>| match answer {
        Ok(RecordOutcome::First) => first += 1,
        Ok(RecordOutcome::Duplicate { in_flight: false }) => duplicates += 1,
        Err(Error::Timestamp(TimestampError::TooOld { .. })) => too_old += 1,
        other => panic!("{other:?}"),
    };
    for at in 0..times.len() {
        let delivery = |at: usize| (format!("message {}", times[at]), times[at]);
        let mut batch = vec![delivery(at), delivery(at)];
        if at % 3 == 0 && at >= 5 {
            batch.push(delivery(at - 5));
        }
        if at % 7 == 0 && at >= 20 {
            batch.push(delivery(at - 20));
        }
        stream
            .store()
            .record_batch(batch.into_iter().map(|(key, ms)| message(key, ms)))
            .wait()
            .unwrap()
            .into_iter()
            .for_each(&mut count);
        if at % 1_500 == 1_499 {
            stream.reopen();
        }
    }
    let expected_late = (0..times.len()).filter(|at| at % 3 == 0 && *at >= 5);
    let (across, within): (Vec<_>, Vec<_>) = expected_late.partition(|at| times[*at] - times[at - 5] >= WINDOW_MS);
    let ancient = (0..times.len()).filter(|at| at % 7 == 0 && *at >= 20).count();
    assert_eq!(first, times.len());
    assert_eq!(duplicates, times.len() + within.len());
    assert_eq!(too_old, across.len() + ancient);
    assert_eq!(stream.now_ms(), *times.last().unwrap());
    stream.store().flush().unwrap();
    assert!(stream.store().stats().buckets.len() <= 13, "{:?}", stream.store().stats().buckets);
}

#[test]
fn a_backlog_after_a_days_outage_finds_the_duplicates_from_before_the_outage() {
    let mut stream = Stream::new();
    for second in 0..60 {
        stream.complete(&format!("k{second}"), START_MS + second * 1_000);
    }
    stream.store().close().wait().unwrap();
    stream.clock.advance(Duration::from_millis(DAY_MS));
    stream.store = Some(stream.open());
    assert_eq!(stream.now_ms(), START_MS + 59_000, "stream time stops during the outage");
    for second in 51..60 {
        assert_eq!(stream.answer(&format!("k{second}"), START_MS + second * 1_000), "completed");
    }
    stream.complete("k60", START_MS + 60_000);
}

#[test]
fn a_single_outlier_timestamp_does_not_advance_stream_time() {
    let stream = Stream::new();
    stream.complete("k", START_MS);
    for round in 1..50 {
        let outlier = ["a", "b", "c"][round % 3];
        let outlier_ms = START_MS + [DAY_MS, 30 * DAY_MS, AHEAD_MS + 1_000][round % 3];
        assert!(stream.is_too_far_ahead(outlier, outlier_ms));
        assert_eq!(stream.answer(outlier, outlier_ms), "new", "a second attempt is accepted");
        stream.tick(START_MS + round as u64);
        assert_eq!(
            stream.answer(outlier, outlier_ms),
            "too far ahead",
            "the next message of the stream ends the confirmation"
        );
    }
    assert_eq!(stream.now_ms(), START_MS + 49);
    assert_eq!(stream.answer("k", START_MS), "completed");
    assert_eq!(stream.store().stats().too_far_ahead, 49);
    let Err(Error::Timestamp(TimestampError::TooFarAhead { key, at, stream_time, max_ahead, in_future })) =
        stream.store().claim(message("a", START_MS + DAY_MS)).wait()
    else {
        panic!("it is still too far ahead")
    };
    assert_eq!((key.as_str(), at.as_unix_ms(), stream_time.as_unix_ms()), ("\"a\"", START_MS + DAY_MS, START_MS + 49));
    assert_eq!((max_ahead, in_future), (Duration::from_millis(AHEAD_MS), false));
}

#[test]
fn a_step_within_the_bound_makes_no_message_in_order_too_old() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::at(Timestamp::from_unix_ms(TODAY_MS));
    let window = Duration::from_millis(WINDOW_MS);
    let store = builder(&clock).stream_time(window).open(dir.path().join("store")).unwrap();
    store.record(message("k", START_MS)).wait().unwrap();
    assert_eq!(
        store.record(message("as far ahead as allowed", START_MS + WINDOW_MS)).wait().unwrap(),
        RecordOutcome::First
    );
    assert_eq!(store.record(message("next in order", START_MS + 1)).wait().unwrap(), RecordOutcome::First);
    assert!(
        matches!(store.record(message("k", START_MS)).wait(), Err(Error::Timestamp(TimestampError::TooOld { .. }))),
        "no duplicate is accepted"
    );
}

#[test]
fn a_gap_longer_than_the_bound_ends_with_the_second_message_or_a_retry() {
    let stream = Stream::new();
    stream.complete("k", START_MS);
    let monday_ms = START_MS + 3 * DAY_MS;
    assert!(stream.is_too_far_ahead("first", monday_ms));
    assert!(!stream.is_too_far_ahead("second", monday_ms + 700));
    assert!(!stream.is_too_far_ahead("first", monday_ms));
    assert_eq!(stream.now_ms(), monday_ms + 700);
    // A consumer that retries its message.
    let friday_ms = monday_ms + 4 * DAY_MS;
    assert!(stream.is_too_far_ahead("blocks", friday_ms));
    assert!(!stream.is_too_far_ahead("blocks", friday_ms));
    // One batch with all messages, which spans more than a window.
    let week_ms = friday_ms + 7 * DAY_MS;
    let batch: Vec<(String, u64)> = (0..10).map(|i| (format!("w{i}"), week_ms + i * 2_000)).collect();
    let claims = stream.store().claim_batch(batch.into_iter().map(|(key, ms)| message(key, ms))).wait().unwrap();
    assert!(claims.iter().all(|claim| matches!(claim, Ok(Claim::Acquired(_)))), "{claims:?}");
    assert_eq!(stream.now_ms(), week_ms + 18_000);
    // Every message is too far ahead of the one before.
    let batch: Vec<(String, u64)> = (1..10).map(|i| (format!("y{i}"), week_ms + i * DAY_MS)).collect();
    let claims =
        stream.store().claim_batch(batch.clone().into_iter().map(|(key, ms)| message(key, ms))).wait().unwrap();
    let (last, others) = claims.split_last().unwrap();
    assert!(others.iter().all(|claim| matches!(claim, Ok(Claim::Acquired(_)))), "{claims:?}");
    assert!(matches!(last, Err(Error::Timestamp(TimestampError::TooFarAhead { .. }))));
    assert!(!stream.is_too_far_ahead("y9", week_ms + 9 * DAY_MS));
}

#[test]
fn an_outlier_in_a_batch_is_rejected_alone_whatever_the_next_batch_has() {
    let stream = Stream::new();
    stream.tick(START_MS);
    for round in 1..5 {
        let outlier_ms = START_MS + 100 * DAY_MS;
        let at_ms = START_MS + round * 10;
        let batch =
            [("a", at_ms), ("outlier", outlier_ms), ("b", at_ms + 1)].map(|(key, at)| (format!("{key}{round}"), at));
        let answers = stream.store().record_batch(batch.into_iter().map(|(key, ms)| message(key, ms))).wait().unwrap();
        assert!(matches!(
            answers.as_slice(),
            [
                Ok(RecordOutcome::First),
                Err(Error::Timestamp(TimestampError::TooFarAhead { .. })),
                Ok(RecordOutcome::First)
            ]
        ));
        // It would be the second in a row if the first outlier still counted.
        assert!(stream.is_too_far_ahead("outlier", outlier_ms));
        stream.tick(at_ms + 2);
    }
}

#[test]
fn a_partition_that_is_too_far_ahead_waits_for_the_slower_partition() {
    let stream = Stream::new();
    stream.tick(START_MS);
    let fast = |second: u64| START_MS + DAY_MS + second * 1_000;
    for second in 0..20 {
        assert!(stream.is_too_far_ahead(&format!("fast {second}"), fast(second)));
        stream.tick(START_MS + 1 + second);
    }
    // The slow partition has no more messages.
    assert!(stream.is_too_far_ahead("fast 20", fast(20)));
    assert!(!stream.is_too_far_ahead("fast 21", fast(21)));
}

#[test]
fn messages_from_the_future_are_rejected_whatever_their_number() {
    for first_of_all in [true, false] {
        let stream = Stream::new();
        if !first_of_all {
            stream.tick(START_MS);
        }
        let future_ms = TODAY_MS + AHEAD_MS + 1;
        for i in 0..20 {
            assert!(stream.is_too_far_ahead(&format!("future {i}"), future_ms + i));
        }
        assert!(stream.is_too_far_ahead("broken", u64::MAX));
        let batch = stream.store().record_batch([message("x", future_ms), message("y", future_ms)]).wait().unwrap();
        assert!(batch.iter().all(|answer| matches!(
            answer,
            Err(Error::Timestamp(TimestampError::TooFarAhead { in_future: true, .. }))
        )));
        // Once the wall clock has reached its timestamp, the message is accepted.
        stream.clock.advance(Duration::from_secs(3_600));
        stream.is_too_far_ahead("future 0", future_ms);
        assert!(!stream.is_too_far_ahead("future 0", future_ms));
    }
}

#[test]
fn an_operator_can_advance_stream_time() {
    let mut stream = Stream::new();
    stream.complete("k", START_MS);
    let future_ms = TODAY_MS + DAY_MS;
    assert!(stream.is_too_far_ahead("future", future_ms));
    stream.store().advance_stream_time(Timestamp::from_unix_ms(future_ms - 1_000)).wait().unwrap();
    assert!(!stream.is_too_far_ahead("future", future_ms));
    assert_eq!(stream.answer("k", START_MS), "too old");
    stream.store().advance_stream_time(Timestamp::from_unix_ms(START_MS)).wait().unwrap();
    assert_eq!(stream.now_ms(), future_ms, "stream time never goes back");
    stream.store().advance_stream_time(Timestamp::from_unix_ms(future_ms + 5)).wait().unwrap();
    for another_unit in [future_ms * 1_000, u64::MAX] {
        let rejected = stream.store().advance_stream_time(Timestamp::from_unix_ms(another_unit)).wait();
        assert!(matches!(rejected, Err(Error::Config { option: "advance_stream_time", .. })), "{rejected:?}");
    }
    stream.reopen();
    assert_eq!(stream.now_ms(), future_ms + 5);
}

#[test]
fn the_wall_clock_expires_no_key_and_restores_none() {
    let mut stream = Stream::new();
    stream.complete("k", START_MS);
    for wall_ms in [0, TODAY_MS, START_MS - 1, TODAY_MS + 10_000 * DAY_MS, u64::MAX, 5] {
        stream.clock.set_wall(Timestamp::from_unix_ms(wall_ms));
        assert_eq!((stream.answer("k", START_MS), stream.now_ms()), ("completed", START_MS), "at {wall_ms}");
        stream.reopen();
        stream.store().flush().unwrap();
        assert_eq!((stream.answer("k", START_MS), stream.now_ms()), ("completed", START_MS), "at {wall_ms}");
    }
    // A wall clock at the start of 1970 does not stop the stream.
    for second in 1..40 {
        stream.tick(START_MS + second * 1_000);
    }
    assert_eq!(stream.answer("k", START_MS), "too old");
}

#[test]
fn leases_and_backoffs_run_on_monotonic_time() {
    let mut stream = Stream::new();
    let _lease = stream.acquire("leased", START_MS);
    stream.acquire("released", START_MS).release().after(Duration::from_secs(5)).wait().unwrap();
    stream.clock.set_wall(Timestamp::from_unix_ms(0));
    stream.tick(START_MS + AHEAD_MS);
    let retry_after = |key: &str| match stream.store().claim(message(key, START_MS)).wait().unwrap() {
        Claim::InProgress(other) => other.retry_after.unwrap().as_millis(),
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!((retry_after("leased"), retry_after("released")), (1_000, 5_000));
    stream.clock.advance(Duration::from_millis(999));
    assert_eq!((retry_after("leased"), retry_after("released")), (1, 4_001));
    stream.clock.advance(Duration::from_millis(1));
    let second = stream.acquire("leased", START_MS);
    assert_eq!((second.attempt().number(), second.attempt().prior()), (2, Some(PriorAttempt::LeaseExpired)));
    drop(second);
    stream.reopen();
    let released = stream.acquire("released", START_MS);
    assert_eq!(
        (released.attempt().number(), released.attempt().prior()),
        (2, Some(PriorAttempt::Released)),
        "a backoff ends with its process"
    );
}

#[test]
fn interrupted_work_keeps_the_timestamp_of_its_message_however_it_ends() {
    let mut stream = Stream::with(OnInterrupt::Hold);
    stream.tick(START_MS);
    let crashed = stream.acquire("crashed", START_MS + 100);
    drop(stream.acquire("dropped", START_MS + 200));
    stream.tick(START_MS + 3_000);
    stream.reopen();
    drop(crashed);
    let since: Vec<u64> = stream.store().held().wait().unwrap().iter().map(|held| held.since.as_unix_ms()).collect();
    assert_eq!(since, [START_MS + 100, START_MS + 200]);
    for key in ["crashed", "dropped"] {
        stream.store().resolve(key, Resolution::Completed(b"by an operator".to_vec())).wait().unwrap();
    }
    stream.store().flush().unwrap();
    let completed_at = |key, at_ms| match stream.store().check(message(key, at_ms)).wait().unwrap() {
        KeyStatus::Completed(completed) => completed.completed_at().as_unix_ms(),
        other => panic!("{key}: {other:?}"),
    };
    assert_eq!(completed_at("crashed", START_MS + 100), START_MS + 100);
    assert_eq!(completed_at("dropped", START_MS + 200), START_MS + 200);

    // A different message for a key that is not completed: the key is remembered for the window of the later message.
    drop(stream.acquire("twice", START_MS + 1_000));
    stream.store().resolve("twice", Resolution::Rerun).wait().unwrap();
    stream.acquire("twice", START_MS + 2_000).release().wait().unwrap();
    stream.acquire("twice", START_MS + 1_000).complete("r").wait().unwrap();
    assert_eq!(completed_at("twice", START_MS + 1_000), START_MS + 2_000);
}

#[test]
fn a_store_keeps_its_time_source_and_rejects_timestamps_that_do_not_fit_it() {
    let stream = Stream::new();
    let store = stream.store();
    assert!(matches!(store.claim("k").wait(), Err(Error::Timestamp(TimestampError::Missing))));
    assert!(matches!(store.check("k").wait(), Err(Error::Timestamp(TimestampError::Missing))));
    assert!(matches!(store.record("k").wait(), Err(Error::Timestamp(TimestampError::Missing))));
    assert!(matches!(
        store.claim("k").wait_up_to(Duration::ZERO).wait(),
        Err(Error::Timestamp(TimestampError::Missing))
    ));
    assert!(matches!(store.claim_batch(["k"]).wait(), Err(Error::Timestamp(TimestampError::Missing))));
    assert!(matches!(store.record_batch(["k"]).wait(), Err(Error::Timestamp(TimestampError::Missing))));
    assert!(matches!(store.check_batch(["k"]).wait(), Err(Error::Timestamp(TimestampError::Missing))));
    stream.complete("k", START_MS);
    assert!(
        store.inspect("k").wait().unwrap().is_some() && store.forget("k").wait().unwrap(),
        "these calls need no timestamp"
    );
    store.close().wait().unwrap();
    // A reopen keeps the time source and the bound.
    let store = builder(&stream.clock).open(stream.path()).unwrap();
    assert!(matches!(store.claim("k").wait(), Err(Error::Timestamp(TimestampError::Missing))));
    assert_eq!(store.record(message("a", START_MS + AHEAD_MS)).wait().unwrap(), RecordOutcome::First);
    assert!(matches!(
        store.record(message("b", START_MS + 2 * AHEAD_MS + 1)).wait(),
        Err(Error::Timestamp(TimestampError::TooFarAhead { .. }))
    ));

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = builder(&stream.clock).open(&path).unwrap();
    assert!(matches!(store.claim(message("k", START_MS)).wait(), Err(Error::Timestamp(TimestampError::Unexpected))));
    assert!(matches!(store.check(message("k", START_MS)).wait(), Err(Error::Timestamp(TimestampError::Unexpected))));
    assert!(matches!(
        store.record_batch([message("k", START_MS)]).wait(),
        Err(Error::Timestamp(TimestampError::Unexpected))
    ));
    assert!(matches!(
        store.advance_stream_time(Timestamp::from_unix_ms(START_MS)).wait(),
        Err(Error::Timestamp(TimestampError::Unexpected))
    ));
    store.close().wait().unwrap();
    let rejected = builder(&stream.clock).stream_time(Duration::from_secs(1)).open(&path);
    assert!(matches!(rejected, Err(Error::Config { option: "stream_time", .. })));
    for out_of_bounds in [Duration::ZERO, Duration::from_millis(WINDOW_MS + 1)] {
        let rejected = builder(&stream.clock).stream_time(out_of_bounds).open(dir.path().join("none"));
        assert!(matches!(rejected, Err(Error::Config { option: "stream_time", .. })));
    }
}

#[test]
fn a_stream_faster_than_its_flushes_has_few_buckets_and_forgets_no_key_early() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::at(Timestamp::from_unix_ms(TODAY_MS));
    // The maximum number of buckets.
    let builder = Store::builder().window(Duration::from_secs(48)).bucket(Duration::from_secs(1)).clock(clock);
    let builder = builder.durability(Durability::Process).memory_budget(32 << 20);
    let store = builder.stream_time(Duration::from_secs(48)).open(dir.path().join("store")).unwrap();
    // One message per 100 ms: 100,000 messages span three hours, which are hundreds of windows.
    let messages: Vec<(String, u64)> = (0..100_000).map(|i| (format!("m{i}"), START_MS + i * 100)).collect();
    let mut sent = 0;
    for batch in messages.chunks(400) {
        let answers = store.record_batch(batch.iter().map(|(key, at_ms)| message(key, *at_ms))).wait().unwrap();
        assert!(answers.iter().all(|answer| matches!(answer, Ok(RecordOutcome::First))));
        sent += batch.len();
        // The last 480 messages are within the window.
        let again = messages[sent.saturating_sub(480)..sent].iter().step_by(37);
        for answer in store.record_batch(again.map(|(key, at_ms)| message(key, *at_ms))).wait().unwrap() {
            assert_eq!(answer.unwrap(), RecordOutcome::Duplicate { in_flight: false });
        }
        if let Some((key, at_ms)) = sent.checked_sub(481).map(|old| &messages[old]) {
            assert!(matches!(
                store.record(message(key, *at_ms)).wait(),
                Err(Error::Timestamp(TimestampError::TooOld { .. }))
            ));
        }
    }
    store.flush().unwrap();
    assert!(store.stats().buckets.len() <= 51, "{}", store.stats().buckets.len());
}

#[test]
fn a_lookup_while_stream_time_advances_never_reports_a_known_key_as_new() {
    let stream = Stream::new();
    let mut at_ms = START_MS;
    for round in 0..30 {
        let key = format!("k{round}");
        assert_eq!(stream.store().record(message(&key, at_ms)).wait().unwrap(), RecordOutcome::First);
        stream.store().flush().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                stream.tick(at_ms + AHEAD_MS);
                stream.tick(at_ms + 2 * AHEAD_MS);
                stream.store().flush().unwrap();
            });
            loop {
                match stream.store().record(message(&key, at_ms)).wait() {
                    Ok(RecordOutcome::Duplicate { in_flight: false }) => {}
                    Err(Error::Timestamp(TimestampError::TooOld { .. })) => break,
                    other => panic!("{key}: {other:?}"),
                }
            }
        });
        at_ms += 2 * AHEAD_MS + 1;
    }
}

/// The expected state of a key.
#[derive(Debug, Clone)]
enum Known {
    Completed { at_ms: u64, window_ms: u64, result: Vec<u8> },
    Leased { token: u64, attempt: u32, at_ms: u64, window_ms: u64 },
    Left { attempt: u32, at_ms: u64 },
}

/// A store on stream time, and a plain map with its expected state.
struct Model {
    stream: Stream,
    now_ms: u64,
    leap_ms: Option<u64>,
    expected: BTreeMap<String, Known>,
    leases: Vec<(String, Lease)>,
}

impl Model {
    fn new() -> Self {
        Self { stream: Stream::new(), now_ms: 0, leap_ms: None, expected: BTreeMap::new(), leases: Vec::new() }
    }

    /// A random timestamp: in order, late, too old, or an outlier.
    fn time(&self, rng: &mut StdRng) -> u64 {
        let now_ms = self.now_ms.max(START_MS);
        match rng.random_range(0..100) {
            0..60 => now_ms + rng.random_range(0..300),
            60..85 => now_ms - rng.random_range(0..WINDOW_MS),
            85..90 => now_ms - WINDOW_MS,
            90..94 => now_ms - rng.random_range(0..3 * WINDOW_MS),
            94..97 => now_ms + AHEAD_MS,
            97..99 => now_ms + AHEAD_MS + 1,
            _ => now_ms + rng.random_range(AHEAD_MS..DAY_MS),
        }
    }

    /// Whether a message is accepted. If so, it advances the time.
    fn accepts(&mut self, at_ms: u64) -> bool {
        if at_ms > self.now_ms + AHEAD_MS {
            let is_confirmed = self.leap_ms.is_some_and(|leap_ms| at_ms <= leap_ms + AHEAD_MS);
            if self.now_ms > 0 && !is_confirmed {
                self.leap_ms = Some(at_ms);
                return false;
            }
            self.leap_ms = self.leap_ms.filter(|leap_ms| *leap_ms > at_ms + AHEAD_MS);
        } else if at_ms + WINDOW_MS > self.now_ms {
            self.leap_ms = None;
        }
        self.now_ms = self.now_ms.max(at_ms);
        true
    }

    fn claim(&mut self, rng: &mut StdRng, key: &str) {
        // Most retries have the timestamp of the first delivery.
        let at_ms = match self.expected.get(key) {
            Some(Known::Completed { at_ms, .. } | Known::Leased { at_ms, .. } | Known::Left { at_ms, .. })
                if rng.random_bool(0.7) =>
            {
                *at_ms
            }
            _ => self.time(rng),
        };
        let own_ms = *[1, 20, 3_000, WINDOW_MS, u64::MAX, u64::MAX, u64::MAX].choose(rng).unwrap();
        let window_ms = own_ms.min(WINDOW_MS);
        let asked = Key::from(key).at(Timestamp::from_unix_ms(at_ms)).window(Duration::from_millis(own_ms));
        let (is_accepted, claim) = (self.accepts(at_ms), self.stream.store().claim(asked).wait());
        assert_eq!(self.stream.now_ms(), self.now_ms);
        let now_ms = self.now_ms;
        let counts = |at_ms: u64, window_ms: u64| now_ms < at_ms + window_ms;
        let expected = self.expected.get(key).filter(|expected| match expected {
            Known::Completed { at_ms, window_ms, .. } => counts(*at_ms, *window_ms),
            Known::Left { at_ms, .. } => counts(*at_ms, WINDOW_MS),
            Known::Leased { .. } => true,
        });
        let context = format!("{key} of {at_ms} at {now_ms}, which is {expected:?}");
        let acquired = match (is_accepted, expected, claim) {
            (false, _, Err(Error::Timestamp(TimestampError::TooFarAhead { stream_time, in_future: false, .. }))) => {
                assert_eq!(stream_time.as_unix_ms(), now_ms, "{context}");
                return;
            }
            (true, Some(Known::Completed { at_ms, result, window_ms }), Ok(Claim::Completed(first))) => {
                assert_eq!(
                    (first.completed_at().as_unix_ms(), first.remembered_until().as_unix_ms(), first.result()),
                    (*at_ms, at_ms + window_ms, Some(&result[..])),
                    "{context}"
                );
                return;
            }
            (true, Some(Known::Leased { attempt, .. }), Ok(Claim::InProgress(other))) => {
                assert_eq!(other.attempt, *attempt, "{context}");
                return;
            }
            (true, Some(Known::Left { attempt, at_ms: left_ms }), Ok(Claim::Acquired(lease))) => {
                assert_eq!(lease.attempt().number(), attempt + 1, "{context}");
                (lease, at_ms.max(*left_ms))
            }
            (true, None, Err(Error::Timestamp(TimestampError::TooOld { at, remembers_since, .. }))) => {
                assert!(!counts(at_ms, window_ms), "{context}");
                assert_eq!(
                    (at.as_unix_ms(), remembers_since.as_unix_ms()),
                    (at_ms, now_ms - window_ms + 1),
                    "{context}"
                );
                return;
            }
            (true, None, Ok(Claim::Acquired(lease))) => {
                assert!(counts(at_ms, window_ms), "{context}: it should be too old");
                assert_eq!((lease.attempt().number(), lease.attempt().prior()), (1, None), "{context}");
                match self.expected.get(key) {
                    // It must not expire before the attempts that this completion overrules.
                    Some(Known::Completed { at_ms: expired_ms, .. }) => (lease, at_ms.max(*expired_ms)),
                    _ => (lease, at_ms),
                }
            }
            (_, _, other) => panic!("{context}, the claim returned {other:?}"),
        };
        let (lease, at_ms) = acquired;
        let (token, attempt) = (lease.token().get(), lease.attempt().number());
        self.expected.insert(key.to_owned(), Known::Leased { token, attempt, at_ms, window_ms });
        self.leases.push((key.to_owned(), lease));
    }

    fn end_a_lease(&mut self, rng: &mut StdRng) {
        if self.leases.is_empty() {
            return;
        }
        let (key, lease) = self.leases.swap_remove(rng.random_range(0..self.leases.len()));
        let Some(Known::Leased { token, attempt, at_ms, window_ms }) = self.expected.get(&key).cloned() else {
            panic!("{key}")
        };
        assert_eq!(token, lease.token().get());
        let after = match rng.random_range(0..5) {
            0 => {
                drop(lease);
                Known::Left { attempt, at_ms }
            }
            1 => {
                lease.release().wait().unwrap();
                Known::Left { attempt, at_ms }
            }
            _ => {
                let result = token.to_string().into_bytes();
                lease.complete(result.clone()).wait().unwrap();
                Known::Completed { at_ms, window_ms, result }
            }
        };
        self.expected.insert(key, after);
    }

    fn reopen(&mut self) {
        self.stream.reopen();
        self.leases.clear();
        self.leap_ms = None;
        for expected in self.expected.values_mut() {
            if let Known::Leased { attempt, at_ms, .. } = *expected {
                *expected = Known::Left { attempt, at_ms };
            }
        }
        assert_eq!(self.stream.now_ms(), self.now_ms);
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().expect(name))
}

#[test]
fn random_streams_give_the_answers_of_a_plain_map() {
    let seed = number("ONLYONCE_STREAM_SEED").unwrap_or_else(|| rand::rng().random());
    let rounds = number("ONLYONCE_STREAM_ROUNDS").unwrap_or(10);
    eprintln!("ONLYONCE_STREAM_SEED={seed} ONLYONCE_STREAM_ROUNDS={rounds}");
    let mut rng = StdRng::seed_from_u64(seed);
    let keys: Vec<String> = (0..20).map(|i| format!("key-{i}")).collect();
    for _ in 0..rounds {
        let mut model = Model::new();
        for _ in 0..600 {
            match rng.random_range(0..100) {
                0..=63 => {
                    let key = keys.choose(&mut rng).unwrap();
                    model.claim(&mut rng, key);
                }
                64..=89 => model.end_a_lease(&mut rng),
                90..=94 => model.stream.store().flush().unwrap(),
                95..=97 => model
                    .stream
                    .clock
                    .set_wall(Timestamp::from_unix_ms(rng.random_range(START_MS + 300 * DAY_MS..TODAY_MS))),
                _ => model.reopen(),
            }
        }
    }
}

/// Records a stream and prints each answer, until it is killed.
fn record_until_killed(path: &Path, from: u64) -> ! {
    let store = builder(&ManualClock::at(Timestamp::from_unix_ms(TODAY_MS)))
        .stream_time(Duration::from_millis(AHEAD_MS))
        .open(path)
        .unwrap();
    let mut out = std::io::stdout();
    writeln!(out, "\nopened {}", store.stats().now.as_unix_ms()).unwrap();
    for i in from.. {
        // Every seventh message is late.
        let at_ms = START_MS + i * 40 - if i % 7 == 0 { 3_000 } else { 0 };
        store.record(message(format!("m{i}"), at_ms)).wait().unwrap();
        writeln!(out, "recorded {i} {at_ms}").unwrap();
    }
    unreachable!("the parent kills this process first")
}

#[test]
fn a_killed_store_resumes_at_its_stream_time() {
    const TEST: &str = "stream_time::a_killed_store_resumes_at_its_stream_time";
    const STORE: &str = "ONLYONCE_STREAM_STORE";
    const FROM: &str = "ONLYONCE_STREAM_FROM";
    if crate::child::is_child(TEST) {
        record_until_killed(Path::new(&std::env::var(STORE).unwrap()), number(FROM).unwrap());
    }
    let seed = number("ONLYONCE_STREAM_SEED").unwrap_or_else(|| rand::rng().random());
    eprintln!("ONLYONCE_STREAM_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let (mut next, mut newest_ms, mut recorded) = (0, 0, BTreeMap::new());
    for round in 0..12 {
        let mut process = crate::child::command(TEST).env(STORE, &path).env(FROM, next.to_string()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
        let stream_time_ms =
            lines.by_ref().find_map(|line| line.strip_prefix("opened ").map(|ms| ms.parse::<u64>().unwrap()));
        assert!(stream_time_ms.unwrap() >= newest_ms, "round {round}: stream time went back");
        let mut left = rng.random_range(50..3_000);
        for line in lines {
            let Some((i, at_ms)) = line.strip_prefix("recorded ").and_then(|line| line.split_once(' ')) else {
                continue;
            };
            let (i, at_ms): (u64, u64) = (i.parse().unwrap(), at_ms.parse().unwrap());
            recorded.insert(i, at_ms);
            newest_ms = newest_ms.max(at_ms);
            left -= 1;
            if left == 0 {
                // The lines that are already in the pipe are still read.
                process.kill().unwrap();
            }
        }
        process.wait().unwrap();
        next = recorded.keys().last().map_or(0, |last| last + 1);
        let store = builder(&ManualClock::at(Timestamp::from_unix_ms(0)))
            .lock_wait(Duration::from_secs(10))
            .open(&path)
            .unwrap();
        let now_ms = store.stats().now.as_unix_ms();
        assert!(now_ms >= newest_ms, "round {round}: stream time went back");
        for (i, at_ms) in &recorded {
            let answer = store.check(message(format!("m{i}"), *at_ms)).wait();
            match answer {
                Ok(KeyStatus::Completed(first)) => assert_eq!(first.completed_at().as_unix_ms(), *at_ms),
                Err(Error::Timestamp(TimestampError::TooOld { .. })) => {
                    assert!(at_ms + WINDOW_MS <= now_ms, "m{i} of {at_ms} at {now_ms}")
                }
                other => panic!("round {round} of seed {seed}: m{i} of {at_ms} at {now_ms}: {other:?}"),
            }
        }
        store.close().wait().unwrap();
    }
    eprintln!("12 kills, {} records", recorded.len());
}
