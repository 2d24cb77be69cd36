use std::time::Duration;

use super::bench::{Bench, Setup, Verdict, ensure, ensure_eq, ensure_matches};
use crate::answer::{Claim, KeyStatus, RecordOutcome};
use crate::attempt::PriorAttempt;
use crate::error::{Error, TimestampError};
use crate::key::Key;
use crate::timestamp::Timestamp;

const WINDOW: Duration = Duration::from_secs(60);
const MAX_AHEAD: Duration = Duration::from_secs(10);
/// The time of the first message, far before the wall clock.
const START_MS: u64 = 1_600_000_000_000;

pub(super) fn setup(setup: Setup) -> Setup {
    Setup { window: WINDOW, max_ahead: Some(MAX_AHEAD), ..setup.short_lease() }
}

fn at(key: &'static str, after_start_ms: i64) -> Key<'static> {
    Key::from(key).at(Timestamp::from_unix_ms(START_MS.saturating_add_signed(after_start_ms)))
}

/// Records a message of its own for each step, and the last one at this time.
async fn advance_stream(bench: &Bench, from_ms: i64, to_ms: i64) -> Verdict {
    for now_ms in (from_ms..to_ms).step_by(5_000).chain([to_ms]) {
        let key = Key::from(format!("step-{now_ms}")).at(at("", now_ms).timestamp().unwrap_or_default());
        ensure_eq!(bench.record(key).await??, RecordOutcome::First, "the record of a step");
    }
    Ok(())
}

fn is_too_far_ahead(error: Option<Error>, is_future: bool) -> bool {
    matches!(error, Some(Error::Timestamp(TimestampError::TooFarAhead { in_future, .. })) if in_future == is_future)
}

pub(super) async fn a_key_needs_the_timestamp_of_its_message(bench: &Bench) -> Verdict {
    ensure!(bench.engine.limits().is_stream_time, "the limits do not say that it runs on stream time");
    let missing = |error: Option<Error>| matches!(error, Some(Error::Timestamp(TimestampError::Missing)));
    ensure!(missing(bench.claim("k").await?.err()), "a claim needs no timestamp");
    ensure!(missing(bench.record("k").await?.err()), "a record needs no timestamp");
    ensure!(missing(bench.check("k").await?.err()), "a check needs no timestamp");
    let waiting = bench.engine.claim_wait("k".into(), Duration::ZERO).await;
    ensure!(missing(waiting.err()), "a claim that may wait needs no timestamp");
    bench.acquire_as(at("k", 0), 1, None).await?;
    Ok(())
}

pub(super) async fn a_key_is_remembered_until_stream_time_is_a_window_past_its_message(bench: &Bench) -> Verdict {
    bench.record(at("k", 0)).await??;
    advance_stream(bench, 1_000, 59_999).await?;
    bench.completed(at("k", 0)).await?;
    bench.completed(at("k", 3_000)).await?;
    advance_stream(bench, 60_000, 60_000).await?;
    ensure_eq!(bench.check(at("k", 3_000)).await??, KeyStatus::New, "a message of the same key within the window");
    ensure_eq!(bench.engine.inspect("k".into()).await?, None, "what is stored");
    Ok(())
}

pub(super) async fn an_attempt_is_remembered_until_stream_time_is_a_window_past_its_message(bench: &Bench) -> Verdict {
    let _expired = bench.acquire(at("expired", 0)).await?;
    for key in ["early", "late"] {
        let grant = bench.acquire(at(key, 0)).await?;
        bench.release(&grant).await??;
    }
    let slow = bench.acquire(at("slow", 0)).await?;
    advance_stream(bench, 1_000, 9_000).await?;
    bench.release(&slow).await??;
    bench.expire_leases().await;
    advance_stream(bench, 14_000, 59_999).await?;
    bench.acquire_as(at("early", 0), 2, Some(PriorAttempt::Released)).await?;
    advance_stream(bench, 60_000, 60_000).await?;
    for key in ["late", "slow", "expired"] {
        bench.acquire_as(at(key, 3_000), 1, None).await?;
    }
    Ok(())
}

pub(super) async fn a_message_older_than_the_window_of_its_key_is_too_old(bench: &Bench) -> Verdict {
    let key = || at("k", 0).window(WINDOW / 3);
    bench.record(key()).await??;
    advance_stream(bench, 1_000, 19_999).await?;
    bench.completed(key()).await?;
    advance_stream(bench, 20_000, 20_000).await?;
    let error = bench.claim(key()).await?.err();
    ensure_matches!(error, Some(Error::Timestamp(TimestampError::TooOld { .. })), "the claim");
    Ok(())
}

pub(super) async fn an_unknown_message_older_than_the_window_is_too_old(bench: &Bench) -> Verdict {
    bench.record(at("now", 0)).await??;
    for error in [
        bench.claim(at("old", -60_000)).await?.err(),
        bench.record(at("old", -60_000)).await?.err(),
        bench.check(at("old", -60_000)).await?.err(),
    ] {
        let at_ms = START_MS - 60_000;
        let expected = |error: &Error| {
            matches!(error, Error::Timestamp(TimestampError::TooOld { at, remembers_since, .. })
                if at.as_unix_ms() == at_ms && remembers_since.as_unix_ms() == at_ms + 1)
        };
        ensure_matches!(error, Some(error) if expected(error), "the error");
    }
    bench.acquire_as(at("old", -59_999), 1, None).await?;
    Ok(())
}

pub(super) async fn a_message_far_ahead_is_rejected_until_a_second_one_confirms_it(bench: &Bench) -> Verdict {
    bench.record(at("now", 0)).await??;
    bench.acquire(at("just within", 10_000)).await?;
    for _ in 0..2 {
        let error = bench.claim(at("ahead", 30_000)).await?.err();
        ensure!(is_too_far_ahead(error, false), "a message that is far ahead is accepted");
        // An ordinary message shows that the other one was a stray.
        bench.check(at("ordinary", 9_000)).await??;
        bench.record(at("ordinary", 9_000)).await??;
    }
    ensure!(is_too_far_ahead(bench.claim(at("ahead", 30_000)).await?.err(), false), "the stray is accepted");
    let further = bench.claim(at("further", 50_000)).await?.err();
    ensure!(is_too_far_ahead(further, false), "a message confirms one that is much further ahead");
    let old = bench.claim(at("old", -60_000)).await?.err();
    ensure_matches!(old, Some(Error::Timestamp(TimestampError::TooOld { .. })), "a message that is no evidence");
    bench.acquire(at("second", 29_000)).await?;
    bench.acquire(at("ahead", 30_000)).await?;
    ensure!(is_too_far_ahead(bench.claim(at("retried", 60_000)).await?.err(), false), "a first try is accepted");
    bench.acquire(at("retried", 60_000)).await?;
    Ok(())
}

pub(super) async fn the_next_message_of_a_batch_confirms_one_that_is_far_ahead(bench: &Bench) -> Verdict {
    bench.record(at("now", 0)).await??;
    let answers = bench.engine.claim(vec![at("stray", 40_000), at("ordinary", 1_000)]).await?;
    let [Err(Error::Timestamp(TimestampError::TooFarAhead { stream_time, max_ahead, .. })), Ok(Claim::Acquired(_))] =
        &answers[..]
    else {
        ensure!(false, "expected that the first message is too far ahead, got {answers:?}");
        return Ok(());
    };
    ensure_eq!((stream_time.as_unix_ms(), *max_ahead), (START_MS, MAX_AHEAD), "stream time and bound of the error");
    let answers = bench.engine.claim(vec![at("a", 40_000), at("b", 41_000)]).await?;
    ensure_matches!(answers[..], [Ok(Claim::Acquired(_)), Ok(Claim::Acquired(_))], "two messages in a row");
    let old = at("old", -60_000);
    let answers = bench.engine.record(vec![at("c", 80_000), old, at("d", 81_000)]).await?;
    ensure_matches!(answers[..], [Ok(_), Err(_), Ok(_)], "two messages with an old one in between");
    Ok(())
}

pub(super) async fn a_message_from_the_future_is_rejected_however_often_it_comes(bench: &Bench) -> Verdict {
    // The year 2096.
    let future = || Key::from("future").at(Timestamp::from_unix_ms(4_000_000_000_000));
    for _ in 0..2 {
        for _ in 0..3 {
            ensure!(is_too_far_ahead(bench.claim(future()).await?.err(), true), "it is accepted");
        }
        bench.record(at("now", 0)).await??;
    }
    ensure!(is_too_far_ahead(bench.check(future()).await?.err(), true), "a check would accept it");
    ensure!(is_too_far_ahead(bench.claim(future()).await?.err(), true), "it is accepted");
    let ahead = bench.claim(at("ahead", 30_000)).await?.err();
    ensure!(is_too_far_ahead(ahead, false), "a message from the future confirms one that is far ahead");
    Ok(())
}

pub(super) async fn a_check_does_not_advance_stream_time(bench: &Bench) -> Verdict {
    bench.record(at("now", 0)).await??;
    ensure_eq!(bench.check(at("ahead", 9_000)).await??, KeyStatus::New, "a check of a message that is ahead");
    // At 9 seconds it would be too old.
    bench.acquire(at("old", -55_000)).await?;
    bench.acquire(at("ahead", 9_000)).await?;
    let error = bench.check(at("older", -52_000)).await?.err();
    ensure_matches!(error, Some(Error::Timestamp(TimestampError::TooOld { .. })), "a check after the claim");
    Ok(())
}

pub(super) async fn a_completion_has_the_timestamp_of_its_message(bench: &Bench) -> Verdict {
    let grant = bench.acquire(at("k", 0)).await?;
    advance_stream(bench, 1_000, 9_000).await?;
    bench.complete(&grant, "r").await??;
    let completed = bench.completed(at("k", 0)).await?;
    ensure_eq!(completed.completed_at().as_unix_ms(), START_MS, "the time of the completion");
    ensure_eq!(completed.remembered_until().as_unix_ms(), START_MS + 60_000, "the end of its window");
    Ok(())
}
