//! The counters that the feature `metrics` exports.

mod order;

use std::collections::BTreeMap;
use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use onlyonce_core::testing::MemoryStore;
use onlyonce_core::{Claim, EngineLease, Error, Key, OnStoreFailure};
use onlyonce_delivery::{Attempt, Failure, KeyOrigin, Processor};
use order::Order;

async fn charge(_: &Order, _: &mut Attempt) -> Result<&'static str, Failure> {
    Ok("receipt")
}

/// Produces each outcome at least once.
async fn produce_outcomes() {
    let store = MemoryStore::new();
    let processor = Processor::new(store.clone()).attempts(1).redelivery_timeout(Duration::ZERO);
    for origin in [KeyOrigin::Id, KeyOrigin::Id, KeyOrigin::Position, KeyOrigin::Digest] {
        processor.process(Order::new("done").origin(origin), charge).await.unwrap();
    }
    processor.process(Order::new("done").failing_answers(), charge).await.unwrap_err();
    let decline = async |_: &Order, _: &mut Attempt| Err::<&str, _>("declined".into());
    processor.clone().attempts(2).process(Order::new("failed"), decline).await.unwrap();

    let held = EngineLease::claim(processor.engine(), Key::from("held"), Duration::ZERO).await.unwrap();
    assert!(matches!(held, Claim::Acquired(_)));
    for _ in 0..2 {
        processor.process(Order::new("held"), charge).await.unwrap();
    }
    drop(held);
    let superseded = async |_: &Order, _: &mut Attempt| {
        store.expire_lease("superseded");
        drop(EngineLease::claim(processor.engine(), Key::from("superseded"), Duration::ZERO).await?);
        Ok("receipt")
    };
    processor.process(Order::new("superseded"), superseded).await.unwrap();
    store.fail_with(Error::Closed);
    processor.process(Order::new("a"), charge).await.unwrap();
    processor.clone().on_store_failure(OnStoreFailure::FailOpen).process(Order::new("a"), charge).await.unwrap();
}

/// The counters, by name and label.
fn counters(snapshotter: &Snapshotter) -> BTreeMap<String, u64> {
    let entry = |(key, _, description, value): (metrics_util::CompositeKey, _, Option<_>, DebugValue)| {
        assert!(description.is_some(), "{key:?} has no description");
        let label = key.key().labels().map(|label| format!(" {}", label.value())).collect::<String>();
        let DebugValue::Counter(count) = value else { panic!("{key:?} is not a counter") };
        (format!("{}{label}", key.key().name()), count)
    };
    snapshotter.snapshot().into_vec().into_iter().map(entry).collect()
}

#[test]
fn each_outcome_is_exported() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&recorder, || runtime.block_on(produce_outcomes()));
    let expected = [
        ("onlyonce.deliveries done", 1),
        ("onlyonce.deliveries duplicate", 4),
        ("onlyonce.deliveries failed", 1),
        ("onlyonce.deliveries failed_open", 1),
        ("onlyonce.deliveries in_progress", 1),
        ("onlyonce.deliveries rejected", 1),
        ("onlyonce.deliveries store_failed", 1),
        ("onlyonce.deliveries superseded", 1),
        ("onlyonce.deliveries.ack_failures", 1),
        ("onlyonce.deliveries.duplicates digest", 1),
        ("onlyonce.deliveries.duplicates id", 2),
        ("onlyonce.deliveries.duplicates position", 1),
        ("onlyonce.deliveries.redelivery_timeouts", 1),
        ("onlyonce.deliveries.without_id", 1),
    ];
    let expected = expected.into_iter().map(|(name, count)| (name.to_owned(), count)).collect();
    assert_eq!(counters(&snapshotter), expected);
}
