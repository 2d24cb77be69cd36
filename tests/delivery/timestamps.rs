//! Timestamps of messages on a store that runs on stream time.

use onlyonce::delivery::{Delivery, Outcome};
use onlyonce::{Key, Timestamp};

use crate::common::START_MS;
use crate::fixture::{Fixture, MAX_RETRY_AFTER, SECOND};
use crate::queue::WithTimestamp;

fn on_stream_time() -> Fixture {
    Fixture::with(|builder| builder.stream_time(10 * SECOND)).fail_open()
}

#[tokio::test]
async fn deliveries_on_stream_time_are_deduplicated_by_their_timestamps() {
    let fixture = on_stream_time();
    let process = async |id: &str, at: Option<u64>| {
        fixture.queue.send(id);
        fixture.process_at(at).await
    };
    // A replay of old messages.
    let start_ms = START_MS - 1_000_000;
    assert!(matches!(process("a", Some(start_ms)).await, Outcome::Done));
    assert!(matches!(process("b", Some(start_ms + 9_000)).await, Outcome::Done));
    assert!(matches!(process("a", Some(start_ms)).await, Outcome::Duplicate(_)));
    let ahead = process("c", Some(start_ms + 900_000)).await;
    assert!(matches!(ahead, Outcome::StoreFailed { retry_after: MAX_RETRY_AFTER, .. }), "{ahead:?}");
    let old = process("d", Some(start_ms - 9_000)).await;
    assert!(matches!(old, Outcome::Rejected { attempts: 0, .. }), "{old:?}");
    let missing = process("e", None).await;
    assert!(matches!(missing, Outcome::Rejected { attempts: 0, .. }), "{missing:?}");
    assert_eq!((fixture.queue.acknowledged(), fixture.processor.fail_open_count()), (3, 0));
}

#[tokio::test]
async fn the_timestamp_of_the_key_takes_precedence_over_that_of_the_delivery() {
    let fixture = on_stream_time();
    fixture.queue.send("a");
    let old = WithTimestamp(fixture.queue.next(), Some(Timestamp::from_unix_ms(1)));
    let delivery = old.with_key(Key::from("a").at(Timestamp::from_unix_ms(START_MS)));
    let outcome = fixture.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap();
    assert!(matches!(outcome, Outcome::Done), "{outcome:?}");
    fixture.queue.send("a");
    assert!(matches!(fixture.process_at(Some(START_MS)).await, Outcome::Duplicate(_)));
}

#[tokio::test]
async fn a_store_on_its_clock_ignores_the_timestamps_of_deliveries() {
    let fixture = Fixture::new();
    fixture.queue.send("a");
    assert!(matches!(fixture.process_at(Some(1)).await, Outcome::Done));
}

#[tokio::test]
async fn a_timestamp_in_a_wrong_unit_is_rejected_at_once_and_the_reason_names_the_unit() {
    let fixture = on_stream_time();
    // Before stream time is set, and after.
    for (round, at_ms) in [START_MS - 5_000, START_MS].into_iter().enumerate() {
        for (unit, wrong) in
            [("seconds", at_ms / 1_000), ("microseconds", at_ms * 1_000), ("nanoseconds", at_ms * 1_000_000)]
        {
            fixture.queue.send("wrong");
            let outcome = fixture.process_at(Some(wrong)).await;
            assert!(matches!(outcome, Outcome::Rejected { attempts: 0, .. }), "{outcome:?}");
            let reason = fixture.queue.redrive().remove(0);
            assert!(reason.contains(&format!("looks like {unit}")) && reason.contains(&wrong.to_string()), "{reason}");
            drop(fixture.queue.lock().ready.pop_front());
        }
        fixture.queue.send(&format!("right {round}"));
        assert!(matches!(fixture.process_at(Some(at_ms)).await, Outcome::Done));
    }
    assert_eq!(fixture.processor.fail_open_count(), 0);
    fixture.queue.send("old");
    let old = fixture.process_at(Some(START_MS - 11_000)).await;
    assert!(matches!(old, Outcome::Rejected { .. }), "stream time is that of the last right timestamp: {old:?}");
}
