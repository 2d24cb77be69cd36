//! Keys of messages: ids, positions, digests and keys that the caller chose.

use onlyonce::Key;
use onlyonce::delivery::{Attempt, Delivery, Failure, KeyOrigin, MissingId, Outcome};

use crate::fixture::{Fixture, charge};
use crate::queue::WithoutId;

#[tokio::test]
async fn duplicates_are_counted_by_the_origin_of_their_key() {
    let fixture = Fixture::new();
    for (origin, duplicates) in [(KeyOrigin::Digest, 3), (KeyOrigin::Position, 2)] {
        for _ in 0..=duplicates {
            fixture.queue.send(&format!("{origin:?}"));
            assert!(fixture.process_without_id(origin).await.is_acknowledged());
        }
    }
    for _ in 0..=4 {
        fixture.queue.send("a");
        assert!(fixture.process(charge).await.is_acknowledged());
    }
    // A key that the caller chose is an id.
    fixture.queue.send("Digest");
    let delivery = WithoutId(fixture.queue.next(), KeyOrigin::Digest).with_key("a");
    let outcome = fixture.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap();
    assert!(matches!(outcome, Outcome::Duplicate(_)), "{outcome:?}");
    fixture.queue.send("a");
    fixture.queue.fail_answers(1);
    fixture.try_process(async |_, _| Ok("receipt")).await.unwrap_err();
    let stats = fixture.processor.clone().stats();
    let duplicates = [stats.duplicates_by_digest, stats.duplicates_by_position, stats.duplicates_by_id];
    assert_eq!((duplicates, stats.without_id, stats.done, stats.ack_failures), ([3, 2, 6], 4, 3, 1), "{stats:?}");
}

#[tokio::test]
async fn a_processor_that_requires_ids_rejects_messages_without_one() {
    let mut fixture = Fixture::new();
    fixture.set(|processor| processor.require_ids());
    for _ in 0..2 {
        fixture.queue.send("a");
        let delivery = WithoutId(fixture.queue.next(), KeyOrigin::Digest);
        let work = async |_: &WithoutId, _: &mut Attempt| -> Result<&str, Failure> { panic!("it has no id") };
        let outcome = fixture.processor.process(delivery, work).await.unwrap();
        let Outcome::Rejected { failure: Some(failure), attempts: 0 } = outcome else { panic!("{outcome:?}") };
        let missing = failure.error().downcast_ref::<MissingId>().unwrap();
        assert_eq!(missing.location, "header `id` of topic `orders`");
    }
    let reasons = fixture.queue.redrive();
    assert!(reasons[0].starts_with("message has no id in header `id` of topic `orders`"), "{reasons:?}");
    // Messages with an id or a position pass.
    assert!(matches!(fixture.process(charge).await, Outcome::Done));
    assert!(matches!(fixture.process_without_id(KeyOrigin::Position).await, Outcome::Duplicate(_)));
    assert_eq!((fixture.processor.stats().without_id, fixture.processor.stats().rejected), (2, 2));
}

#[tokio::test]
async fn a_key_that_the_caller_chose_replaces_the_key_of_the_queue() {
    let fixture = Fixture::new();
    for (id, is_first) in [("delivery-1", true), ("delivery-2", false)] {
        fixture.queue.send(id);
        let delivery = fixture.queue.next().with_key(Key::from("order-4711").scope("orders"));
        assert_eq!(delivery.inner().key(), Key::from(id));
        let outcome = fixture.processor.process(delivery, async |_, _| Ok("receipt")).await.unwrap();
        assert_eq!(matches!(outcome, Outcome::Done), is_first, "{outcome:?}");
    }
    assert_eq!(fixture.queue.acknowledged(), 2);
}
