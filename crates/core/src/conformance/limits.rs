use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches};
use crate::answer::{KeyStatus, Resolution};
use crate::error::{Error, KeyError, TimestampError};
use crate::key::Key;
use crate::timestamp::Timestamp;

pub(super) fn setup(setup: Setup) -> Setup {
    Setup { in_flight_limit: 3, held_limit: 2, ..setup }
}

pub(super) async fn keys_outside_the_limits_are_rejected(bench: &Bench) -> Verdict {
    let long = "k".repeat(bench.setup.key_limit);
    let too_long: Is = |error| matches!(error, KeyError::TooLong { .. });
    for (key, is_expected) in invalid_keys()
        .into_iter()
        .chain([(Key::from(format!("{long}k")), too_long), (Key::from(long.clone()).scope("s"), too_long)])
    {
        let errors = [
            ("claim", bench.claim(key.clone()).await?.err()),
            ("claim_wait", bench.engine.claim_wait(key.clone(), bench.unit()).await.err()),
            ("record", bench.record(key.clone()).await?.err()),
            ("check", bench.check(key.clone()).await?.err()),
        ];
        for (call, error) in errors {
            ensure_matches!(error, Some(Error::Key(error)) if is_expected(error), "{call} of {key}");
        }
    }
    bench.acquire(long).await?;
    Ok(())
}

type Is = fn(&KeyError) -> bool;

/// Keys that are not valid, whatever the limit, and their errors.
fn invalid_keys() -> [(Key<'static>, Is); 2] {
    let scope = "s".repeat(256);
    [
        (Key::from(""), |error| matches!(error, KeyError::Empty { .. })),
        (Key::from("k").scope(&scope).into_owned(), |error| matches!(error, KeyError::ScopeTooLong { .. })),
    ]
}

pub(super) async fn calls_about_stored_keys_reject_invalid_keys_and_accept_long_ones(bench: &Bench) -> Verdict {
    let engine = &bench.engine;
    for (key, is_expected) in invalid_keys() {
        let errors = [
            ("inspect", engine.inspect(key.clone()).await.err()),
            ("resolve", engine.resolve(key.clone(), Resolution::Rerun).await.err()),
            ("forget", engine.forget(key.clone()).await.err()),
        ];
        for (call, error) in errors {
            ensure_matches!(error, Some(Error::Key(error)) if is_expected(error), "{call} of {key}");
        }
    }
    // It may have been stored under a higher limit.
    let long = || Key::from("k".repeat(bench.setup.key_limit + 1));
    ensure_eq!(engine.inspect(long()).await?, None, "what is stored about a long key");
    ensure!(!engine.forget(long()).await?, "there was something about a long key");
    let resolved = engine.resolve(long(), Resolution::Rerun).await;
    ensure_matches!(resolved, Err(Error::NotHeld { .. }), "the resolution of a long key");
    Ok(())
}

pub(super) async fn an_invalid_key_fails_its_batch_and_changes_nothing(bench: &Bench) -> Verdict {
    let keys = || ["a", "b", ""].map(Key::from).to_vec();
    let third = |error: Option<Error>| matches!(error, Some(Error::Key(KeyError::Empty { index: Some(2) })));
    ensure!(third(bench.engine.claim(keys()).await.err()), "a claim does not report the third key");
    ensure!(third(bench.engine.record(keys()).await.err()), "a record does not report the third key");
    ensure!(third(bench.engine.check(keys()).await.err()), "a check does not report the third key");
    for key in ["a", "b"] {
        ensure_eq!(bench.check(key).await??, KeyStatus::New, "a check of {key}");
    }
    Ok(())
}

pub(super) async fn keys_in_progress_are_limited(bench: &Bench) -> Verdict {
    let (a, b, c) = (bench.acquire("a").await?, bench.acquire("b").await?, bench.acquire("c").await?);
    let rejected = bench.claim("d").await?;
    ensure_matches!(rejected, Err(Error::TooManyInFlight { in_flight: 3, limit: 3 }), "the fourth claim");
    ensure_eq!(bench.check("d").await??, KeyStatus::New, "a check of the fourth key");
    bench.in_progress("a").await?;
    bench.complete(&a, "r").await??;
    let d = bench.acquire("d").await?;
    ensure_matches!(bench.claim("e").await?, Err(Error::TooManyInFlight { .. }), "the fifth claim");
    bench.release(&b).await??;
    bench.acquire("e").await?;
    bench.complete(&c, "r").await??;
    bench.complete(&d, "r").await??;
    let batch = bench.engine.claim(["f", "g", "h"].map(Key::from).to_vec()).await?;
    ensure_matches!(batch[..], [Ok(_), Ok(_), Err(Error::TooManyInFlight { .. })], "a batch over the limit");
    Ok(())
}

pub(super) async fn held_keys_are_limited(bench: &Bench) -> Verdict {
    for key in ["a", "b"] {
        let grant = bench.acquire(key).await?;
        bench.abandon(&grant);
    }
    let rejected = bench.claim("d").await?;
    ensure_matches!(rejected, Err(Error::TooManyHeld { held: 2, limit: 2 }), "the third claim");
    ensure_eq!(bench.in_progress("a").await?.retry_after, None, "when to claim a held key again");
    bench.engine.resolve("a".into(), Resolution::Rerun).await?;
    bench.acquire("d").await?;
    Ok(())
}

pub(super) async fn the_limits_are_those_of_the_engine(bench: &Bench) -> Verdict {
    let limits = bench.engine.limits();
    ensure_eq!(limits.result_bytes, bench.setup.result_limit, "the limit of results");
    ensure_eq!(limits.key_bytes, bench.setup.key_limit, "the limit of keys");
    ensure!(!limits.is_stream_time, "the engine runs on its clock");
    Ok(())
}

pub(super) async fn stats_count_the_keys_in_progress(bench: &Bench) -> Verdict {
    let (a, b) = (bench.acquire("a").await?, bench.acquire("b").await?);
    bench.record("c").await??;
    let stats = bench.engine.stats().await?;
    ensure_eq!((stats.in_flight, stats.held), (2, 0), "keys in progress and held");
    bench.complete(&a, "r").await??;
    bench.release(&b).await??;
    ensure_eq!(bench.engine.stats().await?.in_flight, 0, "keys in progress after their end");
    bench.engine.count_fail_open();
    Ok(())
}

pub(super) async fn a_store_on_its_clock_rejects_timestamps(bench: &Bench) -> Verdict {
    let key = || Key::from("k").at(Timestamp::from_unix_s(1_600_000_000));
    let unexpected = |error: Option<Error>| matches!(error, Some(Error::Timestamp(TimestampError::Unexpected)));
    ensure!(unexpected(bench.claim(key()).await?.err()), "a claim accepts a timestamp");
    ensure!(unexpected(bench.record(key()).await?.err()), "a record accepts a timestamp");
    ensure!(unexpected(bench.check(key()).await?.err()), "a check accepts a timestamp");
    ensure_eq!(bench.check("k").await??, KeyStatus::New, "a check");
    Ok(())
}
