//! What `MemoryStore` does beyond the conformance suite: options, failures, and leases of adapters on it.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use onlyonce_core::testing::MemoryStore;
use onlyonce_core::{
    Claim, Completion, Engine, EngineLease, Error, Key, KeyStatus, OnInterrupt, Outcome, PriorAttempt, Release,
    Timestamp,
};

const LEASE: Duration = Duration::from_secs(30);

fn engine(store: &MemoryStore) -> Arc<dyn Engine> {
    store.clone().into()
}

async fn acquire(engine: &Arc<dyn Engine>, key: &'static str) -> EngineLease {
    match EngineLease::claim(engine, Key::from(key), Duration::ZERO).await {
        Ok(Claim::Acquired(lease)) => lease,
        other => panic!("{key}: {other:?}"),
    }
}

async fn check(store: &MemoryStore, key: &'static str) -> KeyStatus {
    store.check(vec![Key::from(key)]).await.unwrap().remove(0).unwrap()
}

#[tokio::test]
async fn options_out_of_bounds_are_rejected_by_name() {
    let rejected = [
        ("window", MemoryStore::builder().window(Duration::ZERO)),
        ("lease", MemoryStore::builder().lease(Duration::MAX)),
        ("result_limit", MemoryStore::builder().result_limit((64 << 20) + 1)),
        ("key_limit", MemoryStore::builder().key_limit(65_536)),
        ("in_flight_limit", MemoryStore::builder().in_flight_limit(0)),
        ("held_limit", MemoryStore::builder().held_limit(0)),
        ("stream_time", MemoryStore::builder().window(LEASE).stream_time(LEASE * 2)),
    ];
    for (name, builder) in rejected {
        let error = builder.build().unwrap_err();
        assert!(matches!(error, Error::Config { option, .. } if option == name), "{name}: {error}");
    }
    MemoryStore::builder().result_limit(0).key_limit(1).in_flight_limit(1).stream_time(LEASE).build().unwrap();
}

#[tokio::test]
async fn the_defaults_are_those_of_the_local_store() {
    let store = MemoryStore::default();
    let engine = engine(&store);
    let lease = acquire(&engine, "k").await;
    assert!(matches!(check(&store, "k").await, KeyStatus::InProgress(it) if it.retry_after > Some(LEASE * 9 / 10)));
    lease.complete("r").await.unwrap();
    let KeyStatus::Completed(completed) = check(&store, "k").await else { panic!("not completed") };
    let window = completed.remembered_until().saturating_since(completed.completed_at());
    assert_eq!(window, Duration::from_secs(24 * 60 * 60));
    assert_eq!((store.limits().result_bytes, store.limits().key_bytes), (1 << 20, 1_024));
    assert!(format!("{store:?}").contains("keys: 1"));
}

#[tokio::test]
async fn a_failing_store_does_nothing_until_it_recovers() {
    let store = MemoryStore::new();
    let engine = engine(&store);
    let (completes, releases) = (acquire(&engine, "completes").await, acquire(&engine, "releases").await);
    store.fail_with(Error::Closed);
    assert!(matches!(completes.complete("r").await, Err(Error::Closed)));
    assert!(matches!(releases.release(Release::default()).await, Err(Error::Closed)));
    assert!(matches!(store.claim_wait("new".into(), LEASE).await, Err(Error::Closed)));
    assert!(matches!(store.record(vec!["new".into()]).await, Err(Error::Closed)));
    assert!(matches!(store.held().await, Err(Error::Closed)));
    assert!(matches!(store.outbox(1).await, Err(Error::Closed)));
    assert!(matches!(store.offset(b"s", 0).await, Err(Error::Closed)));
    store.recover();
    assert_eq!(check(&store, "new").await, KeyStatus::New);
    let again = acquire(&engine, "completes").await;
    assert_eq!(again.attempt().prior(), Some(PriorAttempt::Dropped), "the failed completion dropped its lease");
    again.complete("r").await.unwrap();
}

#[tokio::test]
async fn a_call_whose_answer_is_lost_has_happened_and_can_be_repeated() {
    let store = MemoryStore::new();
    let unknown = || Error::WriteFailed { source: "the connection broke".into() };
    assert_eq!(unknown().outcome(), Outcome::Unknown);
    let Ok(Claim::Acquired(grant)) = store.claim(vec!["k".into()]).await.unwrap().remove(0) else { panic!() };
    let grant = Arc::new(grant);
    let completion = || {
        let completion = Completion::new("r").message("topic", "k", "payload");
        vec![(Arc::clone(&grant), onlyonce_core::Finish::Complete(completion))]
    };
    store.lose_answers_with(unknown());
    assert!(matches!(store.finish(completion()).await.remove(0), Err(Error::WriteFailed { .. })));
    store.recover();
    assert!(matches!(check(&store, "k").await, KeyStatus::Completed(_)));
    store.finish(completion()).await.remove(0).unwrap();
    assert_eq!(store.outbox(10).await.unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failure_ends_waits_and_renewals() {
    let store = MemoryStore::new();
    let engine = engine(&store);
    let mut lease = acquire(&engine, "k").await;
    let waiting = {
        let engine = Arc::clone(&engine);
        tokio::spawn(async move { EngineLease::claim(&engine, Key::from("k"), LEASE * 100).await.map(drop_claim) })
    };
    let ended = lease.during(async {
        tokio::time::sleep(LEASE * 3).await;
        store.fail_with(Error::Closed);
        tokio::time::sleep(LEASE / 2).await;
        store.recover();
        "the work goes on"
    });
    assert_eq!(ended.await.unwrap(), "the work goes on");
    assert!(matches!(waiting.await.unwrap(), Err(Error::Closed)));
    tokio::time::sleep(LEASE).await;
    assert_eq!(acquire(&engine, "k").await.attempt().prior(), Some(PriorAttempt::LeaseExpired), "no longer renewed");
}

fn drop_claim(_: Claim<EngineLease>) {}

#[tokio::test(start_paused = true)]
async fn work_is_dropped_when_its_lease_is_lost() {
    let store = MemoryStore::new();
    let engine = engine(&store);
    let mut lease = acquire(&engine, "k").await;
    let worker = tokio::spawn(async move { lease.during(pending::<()>()).await });
    tokio::time::sleep(LEASE * 5).await;
    assert!(!worker.is_finished(), "the lease is renewed");
    assert!(store.expire_lease("k"));
    tokio::time::sleep(LEASE).await;
    assert!(!worker.is_finished(), "no other holder has claimed the key");
    let second = acquire(&engine, "k").await;
    assert!(matches!(worker.await.unwrap(), Err(Error::Superseded { .. })));
    assert_eq!(second.attempt().prior(), Some(PriorAttempt::LeaseExpired));
    second.complete("r").await.unwrap();
    assert!(!store.expire_lease("k") && !store.expire_lease("absent"), "there is no lease");
}

#[tokio::test(start_paused = true)]
async fn one_of_two_renewals_keeps_the_lease() {
    let store = MemoryStore::new();
    let Ok(Claim::Acquired(grant)) = store.claim(vec!["k".into()]).await.unwrap().remove(0) else { panic!() };
    let grant = Arc::new(grant);
    let (first, second) = (store.keep_alive(&grant), store.keep_alive(&grant));
    drop(first);
    tokio::time::sleep(LEASE * 3).await;
    assert!(matches!(check(&store, "k").await, KeyStatus::InProgress(_)));
    drop(second);
    tokio::time::sleep(LEASE - Duration::from_millis(1)).await;
    assert!(matches!(check(&store, "k").await, KeyStatus::InProgress(_)), "the lease lasts from the last renewal");
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(check(&store, "k").await, KeyStatus::New);
}

#[tokio::test]
async fn a_dropped_lease_holds_its_key_if_that_was_chosen() {
    let store = MemoryStore::builder().on_interrupt(OnInterrupt::Hold).build().unwrap();
    drop(acquire(&engine(&store), "k").await);
    assert!(matches!(check(&store, "k").await, KeyStatus::InProgress(held) if held.retry_after.is_none()));
    assert_eq!(store.held().await.unwrap().len(), 1);
}

#[tokio::test]
async fn clones_share_a_store_and_count_fail_open_work() {
    let store = MemoryStore::new();
    let engine = engine(&store);
    engine.count_fail_open();
    acquire(&engine, "k").await.complete("r").await.unwrap();
    assert_eq!(store.fail_open_count(), 1);
    assert!(matches!(check(&store.clone(), "k").await, KeyStatus::Completed(_)));
}

#[tokio::test]
async fn a_later_attempt_never_gets_an_earlier_time() {
    let store = MemoryStore::builder().stream_time(Duration::from_secs(60)).build().unwrap();
    let at = |at_s: u64| vec![Key::from("k").at(Timestamp::from_unix_s(1_600_000_000 + at_s))];
    for (at_s, expected_s) in [(5, 5), (0, 5), (7, 7)] {
        let Ok(Claim::Acquired(grant)) = store.claim(at(at_s)).await.unwrap().remove(0) else { panic!() };
        assert_eq!(grant.claimed_at, Timestamp::from_unix_s(1_600_000_000 + expected_s));
        let release = onlyonce_core::Finish::Release(Release::default());
        store.finish(vec![(Arc::new(grant), release)]).await.remove(0).unwrap();
    }
}
