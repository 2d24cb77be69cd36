//! Completions and claims in transactions of the caller, and what other calls do meanwhile.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{acquire, builder, client, complete, database, drop_schema, is_completed, new_schema, start, until};
use onlyonce_core::{
    Claim, Completion, Engine, Error, Finish, Key, KeyStatus, PriorAttempt, RecordOutcome, Release, Timestamp,
};
use tokio_postgres::NoTls;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_in_a_transaction_of_the_caller_is_committed_with_its_writes() {
    let Some(config) = database() else { return };
    let (schema, mut client) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema).lease(Duration::from_secs(4))).await;
    client.batch_execute(&format!("CREATE TABLE \"{schema}\".charges (id text)")).await.unwrap();
    let charge = format!("INSERT INTO \"{schema}\".charges VALUES ($1)");

    let Claim::Acquired(lease) = store.claim_lease("a", Duration::ZERO).await.unwrap() else { panic!() };
    let transaction = client.transaction().await.unwrap();
    transaction.execute(&charge, &[&"a"]).await.unwrap();
    let completion = Completion::new("done").offset("orders", 0, 7).message("t", "a", "");
    let completed = lease.complete_in(&transaction, completion).await.unwrap();
    assert!(!is_completed(&store, "a").await, "it is visible before the commit");
    transaction.commit().await.unwrap();
    completed.committed();
    assert!(is_completed(&store, "a").await);
    assert_eq!((store.offset(b"orders", 0).await.unwrap(), store.outbox(9).await.unwrap().len()), (Some(7), 1));

    // A transaction that is rolled back leaves the key to the next claim.
    let Claim::Acquired(lease) = store.claim_lease("b", Duration::ZERO).await.unwrap() else { panic!() };
    let kept = lease.keep_alive();
    tokio::time::sleep(Duration::from_millis(4_500)).await;
    assert!(matches!(store.claim_wait("b".into(), Duration::ZERO).await.unwrap(), Claim::InProgress(_)));
    drop(kept);
    let transaction = client.transaction().await.unwrap();
    let completed = lease.complete_in(&transaction, "done").await.unwrap();
    transaction.rollback().await.unwrap();
    drop(completed);
    let Claim::Acquired(again) = store.claim_lease("b", Duration::from_secs(10)).await.unwrap() else { panic!() };
    assert_eq!(again.attempt().prior(), Some(PriorAttempt::Dropped));

    // After the completion of a lease that was taken over the transaction cannot be committed, even if the error is ignored.
    tokio::time::sleep(Duration::from_millis(4_100)).await;
    let Claim::Acquired(second) = store.claim_lease("b", Duration::ZERO).await.unwrap() else { panic!() };
    let transaction = client.transaction().await.unwrap();
    transaction.execute(&charge, &[&"b"]).await.unwrap();
    let (error, completion, lost) = again.complete_in(&transaction, "late").await.unwrap_err().into_parts();
    assert!(matches!(error, Error::Superseded { .. }) && lost.is_none(), "{error}");
    assert_eq!(completion, Completion::new("late"));
    let _ = transaction.commit().await;
    let charges = format!("SELECT count(*) FROM \"{schema}\".charges");
    assert_eq!(client.query_one(&charges, &[]).await.unwrap().get::<_, i64>(0), 1, "the late charge is committed");
    second.complete("in time").await.unwrap();

    // Claim, work and completion in one transaction.
    let transaction = client.transaction().await.unwrap();
    let Claim::Acquired(lease) = store.claim_in(&transaction, "c").await.unwrap() else { panic!() };
    transaction.execute(&charge, &[&"c"]).await.unwrap();
    let completed = lease.complete_in(&transaction, "done").await.unwrap();
    transaction.commit().await.unwrap();
    completed.committed();
    assert!(is_completed(&store, "c").await);
    let transaction = client.transaction().await.unwrap();
    assert!(matches!(store.claim_in(&transaction, "c").await.unwrap(), Claim::Completed(_)));
    drop((transaction, store));
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_in_a_savepoint_that_is_rolled_back_did_not_happen() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let Claim::Acquired(lease) = store.claim_lease("k", Duration::ZERO).await.unwrap() else { panic!() };
    let mut transaction = beside.transaction().await.unwrap();
    let savepoint = transaction.transaction().await.unwrap();
    let completed = lease.complete_in(&savepoint, "r").await.unwrap();
    savepoint.rollback().await.unwrap();
    transaction.commit().await.unwrap();
    drop(completed);
    let Claim::Acquired(grant) = store.claim_wait("k".into(), Duration::from_secs(60)).await.unwrap() else { panic!() };
    assert_eq!((grant.attempt.number(), grant.attempt.prior()), (2, Some(PriorAttempt::Dropped)));
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_that_failed_is_repeated_with_its_lease() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let Claim::Acquired(lease) = store.claim_lease("k", Duration::ZERO).await.unwrap() else { panic!() };
    let rename = |from: &str, to: &str| format!("ALTER TABLE \"{schema}\".{from} RENAME TO {to}");
    beside.batch_execute(&rename("keys", "renamed")).await.unwrap();
    let (error, completion, lease) = lease.complete("r").await.unwrap_err().into_parts();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    // So is one in a transaction, which has failed.
    let transaction = beside.transaction().await.unwrap();
    let (error, completion, lease) =
        lease.unwrap().complete_in(&transaction, completion).await.unwrap_err().into_parts();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    transaction.rollback().await.unwrap();
    beside.batch_execute(&rename("renamed", "keys")).await.unwrap();
    lease.unwrap().complete(completion).await.unwrap();
    assert!(is_completed(&store, "k").await);
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_an_open_transaction_has_claimed_or_locked_is_in_progress_and_stops_no_other_key() {
    let Some(config) = database() else { return };
    let (schema, mut of_caller, mut beside) = (new_schema(), client(&config).await, client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let released = acquire(&store, "released").await;
    store.finish(vec![(released, Finish::Release(Release::default()))]).await.remove(0).unwrap();
    let transaction = of_caller.transaction().await.unwrap();
    let Claim::Acquired(claimed) = store.claim_in(&transaction, "new").await.unwrap() else { panic!() };
    let locking = beside.transaction().await.unwrap();
    locking.batch_execute(&format!("SELECT FROM \"{schema}\".keys FOR UPDATE")).await.unwrap();
    for round in 0..3 {
        let keys = vec!["new".into(), "released".into(), Key::from(format!("other-{round}"))];
        let mut answers = store.claim(keys).await.unwrap();
        let Ok(Claim::Acquired(other)) = answers.remove(2) else { panic!("the claim waits for a transaction") };
        assert!(answers.iter().all(|answer| matches!(answer, Ok(Claim::InProgress(_)))), "{answers:?}");
        complete(&store, &Arc::new(other), "r").await.unwrap();
    }
    let completed = claimed.complete_in(&transaction, "r").await.unwrap();
    transaction.commit().await.unwrap();
    completed.committed();
    locking.rollback().await.unwrap();
    let answer = store.claim_wait("new".into(), Duration::from_secs(60)).await.unwrap();
    assert!(matches!(answer, Claim::Completed(_)), "{answer:?}");
    let answer = store.claim_wait("released".into(), Duration::from_secs(60)).await.unwrap();
    assert!(matches!(answer, Claim::Acquired(_)), "{answer:?}");
    drop(store);
    drop_schema(&config, &schema).await;
}

/// The completion has locked the row of an expired key, which only a claim of this key may notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_of_the_caller_does_not_stop_other_claims_on_stream_time() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    let lease = Duration::from_millis(500);
    let store = start(&config, &builder(&schema).lease(lease).stream_time(Duration::from_secs(60))).await;
    let at = |name: &str| Key::from(name.to_owned()).at(Timestamp::from_unix_s(1_600_000_000));
    let Claim::Acquired(lease_of_k) = store.claim_lease(at("k"), Duration::ZERO).await.unwrap() else { panic!() };
    let transaction = beside.transaction().await.unwrap();
    let completed = lease_of_k.complete_in(&transaction, "r").await.unwrap();
    tokio::time::sleep(lease * 2).await;
    // A statement that waits for the row is repeated for ten seconds.
    let claims = store.claim(vec![at("k"), at("other")]);
    let mut answers = tokio::time::timeout(Duration::from_secs(8), claims).await.unwrap().unwrap();
    let Ok(Claim::Acquired(other)) = answers.remove(1) else { panic!("the claim waits for the transaction") };
    let answer = answers.remove(0).unwrap();
    assert!(matches!(answer, Claim::InProgress(_)), "{answer:?}");
    let outcome = store.record(vec![at("k")]).await.unwrap().remove(0).unwrap();
    assert_eq!(outcome, RecordOutcome::Duplicate { in_flight: true });
    transaction.commit().await.unwrap();
    completed.committed();
    let answer = store.claim(vec![at("k")]).await.unwrap().remove(0).unwrap();
    assert!(matches!(answer, Claim::Completed(_)), "{answer:?}");
    complete(&store, &Arc::new(other), "r").await.unwrap();
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_of_the_caller_does_not_stop_the_renewal_of_other_leases() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    let options = builder(&schema).lease(Duration::from_secs(6));
    let (store, other) = (start(&config, &options).await, options.connect(&config, NoTls).await.unwrap());
    let Claim::Acquired(completed) = store.claim_lease("completed", Duration::ZERO).await.unwrap() else { panic!() };
    let Claim::Acquired(kept) = store.claim_lease("kept", Duration::ZERO).await.unwrap() else { panic!() };
    let _handles = (completed.keep_alive(), kept.keep_alive());
    let transaction = beside.transaction().await.unwrap();
    let completed = completed.complete_in(&transaction, "r").await.unwrap();
    tokio::time::sleep(Duration::from_secs(8)).await;
    let status = other.check(vec!["kept".into()]).await.unwrap().remove(0).unwrap();
    assert!(matches!(status, KeyStatus::InProgress(_)), "a kept lease has expired: {status:?}");
    transaction.commit().await.unwrap();
    completed.committed();
    kept.complete("r").await.unwrap();
    drop((store, other));
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_in_a_transaction_that_is_dropped_takes_no_room() {
    let Some(config) = database() else { return };
    let (schema, mut beside, mut holder) = (new_schema(), client(&config).await, client(&config).await);
    let store = start(&config, &builder(&schema).in_flight_limit(1)).await;
    let (transaction, first) = (beside.transaction().await.unwrap(), holder.transaction().await.unwrap());
    let lock = format!("LOCK TABLE \"{schema}\".keys IN EXCLUSIVE MODE");
    first.batch_execute(&lock).await.unwrap();
    let claim = tokio::time::timeout(Duration::from_millis(200), store.claim_in(&transaction, "k")).await;
    assert!(claim.is_err(), "the claim does not wait: {claim:?}");
    first.rollback().await.unwrap();
    assert_eq!(store.stats().await.unwrap().in_flight, 0);
    transaction.rollback().await.unwrap();
    let grant = acquire(&store, "k").await;
    complete(&store, &grant, "r").await.unwrap();
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_forgotten_while_it_is_open_stops_no_other_call() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    // A call that waits for the transaction waits for a minute.
    let store = start(&config, &builder(&schema).retry_for(Duration::from_secs(60))).await;
    let Claim::Acquired(lease) = store.claim_lease("k", Duration::ZERO).await.unwrap() else { panic!() };
    let transaction = beside.transaction().await.unwrap();
    drop(lease.complete_in(&transaction, "r").await.unwrap());
    // The release of the key waits for the transaction.
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1";
    let (of_store, observer) = (format!("%\"{schema}\".\"keys\"%"), client(&config).await);
    until(async || observer.query_one(waits, &[&of_store]).await.unwrap().get(0)).await;
    // These are answered, also the one about the key, before the transaction ends.
    let begun = Instant::now();
    let dropped = acquire(&store, "dropped").await;
    store.abandon(dropped);
    let other = store.claim_wait("dropped".into(), Duration::ZERO).await.unwrap();
    assert!(matches!(other, Claim::Acquired(_)), "{other:?}");
    assert_eq!(store.stats().await.unwrap().in_flight, 1);
    let answer = store.claim_wait("k".into(), Duration::ZERO).await.unwrap();
    assert!(matches!(answer, Claim::InProgress(_)), "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "calls wait for the transaction: {:?}", begun.elapsed());
    transaction.rollback().await.unwrap();
    let Claim::Acquired(grant) = store.claim_wait("k".into(), Duration::from_secs(20)).await.unwrap() else { panic!() };
    assert_eq!(grant.attempt.prior(), Some(PriorAttempt::Dropped));
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_in_a_transaction_that_is_dropped_while_it_waits_stops_no_other_call() {
    let Some(config) = database() else { return };
    let (schema, mut beside, mut locker) = (new_schema(), client(&config).await, client(&config).await);
    // A call that waits for the transaction waits for a minute.
    let store = start(&config, &builder(&schema).retry_for(Duration::from_secs(60))).await;
    let Claim::Acquired(lease) = store.claim_lease("k", Duration::ZERO).await.unwrap() else { panic!() };
    let locking = locker.transaction().await.unwrap();
    locking.batch_execute(&format!("SELECT FROM \"{schema}\".keys FOR UPDATE")).await.unwrap();
    let transaction = beside.transaction().await.unwrap();
    let completion = tokio::time::timeout(Duration::from_millis(300), lease.complete_in(&transaction, "r")).await;
    assert!(completion.is_err(), "the completion does not wait: {completion:?}");
    // The release of the key waits for its row, and other releases do not wait with it.
    let (begun, dropped) = (Instant::now(), acquire(&store, "dropped").await);
    store.abandon(dropped);
    let other = store.claim_wait("dropped".into(), Duration::ZERO).await.unwrap();
    assert!(matches!(other, Claim::Acquired(_)), "{other:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "calls wait for the transaction: {:?}", begun.elapsed());
    locking.rollback().await.unwrap();
    transaction.rollback().await.unwrap();
    let Claim::Acquired(grant) = store.claim_wait("k".into(), Duration::from_secs(60)).await.unwrap() else { panic!() };
    assert_eq!(grant.attempt.prior(), Some(PriorAttempt::Dropped));
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_in_a_transaction_waits_for_a_lock_for_a_limited_time() {
    let Some(config) = database() else { return };
    let (schema, mut beside, mut locker) = (new_schema(), client(&config).await, client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let Claim::Acquired(lease) = store.claim_lease("k", Duration::ZERO).await.unwrap() else { panic!() };
    let locking = locker.transaction().await.unwrap();
    locking.batch_execute(&format!("SELECT FROM \"{schema}\".keys FOR UPDATE")).await.unwrap();
    let transaction = beside.transaction().await.unwrap();
    // Without a limit it waits for good.
    let completion = tokio::time::timeout(Duration::from_secs(60), lease.complete_in(&transaction, "r")).await;
    let (error, completion, lease) = completion.unwrap().unwrap_err().into_parts();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    transaction.rollback().await.unwrap();
    locking.rollback().await.unwrap();
    // The limit is not one of the caller's own statements.
    let transaction = beside.transaction().await.unwrap();
    let completed = lease.unwrap().complete_in(&transaction, completion).await.unwrap();
    let limit: String = transaction.query_one("SHOW lock_timeout", &[]).await.unwrap().get(0);
    assert_eq!(limit, "0");
    transaction.commit().await.unwrap();
    completed.committed();
    assert!(is_completed(&store, "k").await);
    drop(store);
    drop_schema(&config, &schema).await;
}
