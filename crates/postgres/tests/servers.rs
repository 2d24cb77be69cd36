//! The store and its server: set-up, sessions, announcements, results.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{acquire, builder, client, complete, database, drop_schema, is_completed, new_schema, start, until};
use onlyonce_core::{
    Claim, Completion, Engine, Error, Finish, Key, KeyStatus, OnInterrupt, PriorAttempt, RecordOutcome, Release,
    Resolution, StoredKey,
};
use onlyonce_postgres::{Durability, SetupError};
use tokio_postgres::{AsyncMessage, NoTls};

#[tokio::test]
async fn a_migration_can_be_repeated_and_an_unknown_version_is_rejected_by_name() {
    let Some(config) = database() else { return };
    let (schema, client) = (new_schema(), client(&config).await);
    let options = builder(&schema).prefix("orders_");
    let error = options.connect(&config, NoTls).await.unwrap_err();
    assert!(matches!(error, SetupError::NotMigrated { .. }), "{error}");
    let (first, second) = tokio::join!(options.migrate(&config, NoTls), options.migrate(&config, NoTls));
    first.unwrap();
    second.unwrap();
    options.migrate(&config, NoTls).await.unwrap();
    let store = options.connect(&config, NoTls).await.unwrap();
    let grant = acquire(&store, "k").await;
    complete(&store, &grant, "r").await.unwrap();
    // Another prefix is another store.
    let other = start(&config, &builder(&schema).prefix("mails_")).await;
    assert!(!is_completed(&other, "k").await && is_completed(&store, "k").await);
    client.execute(&format!("UPDATE \"{schema}\".orders_meta SET version = 7"), &[]).await.unwrap();
    for error in
        [options.migrate(&config, NoTls).await.unwrap_err(), options.connect(&config, NoTls).await.unwrap_err()]
    {
        assert!(matches!(error, SetupError::UnknownVersion { found: 7, .. }), "{error}");
    }
    client.batch_execute(&format!("CREATE TABLE \"{schema}\".foreign_keys (id int)")).await.unwrap();
    let error = builder(&schema).prefix("foreign_").migrate(&config, NoTls).await.unwrap_err();
    assert!(matches!(&error, SetupError::NotAStore { table, .. } if table == "foreign_keys"), "{error}");
    drop((store, other));
    drop_schema(&config, &schema).await;
}

#[tokio::test]
async fn a_process_with_another_window_or_policy_is_rejected_until_a_migration_changes_them() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    let (hour, minute) = (Duration::from_secs(3_600), Duration::from_secs(60));
    let options = builder(&schema).window(hour);
    options.migrate(&config, NoTls).await.unwrap();
    drop(options.connect(&config, NoTls).await.unwrap());
    let shorter = options.clone().window(minute);
    let holding = options.clone().on_interrupt(OnInterrupt::Hold);
    for (other, option) in [(&shorter, "`window`"), (&holding, "`on_interrupt`")] {
        let error = other.connect(&config, NoTls).await.unwrap_err();
        assert!(matches!(&error, SetupError::Unsupported { reason } if reason.contains(option)), "{error}");
        other.migrate(&config, NoTls).await.unwrap();
        drop(other.connect(&config, NoTls).await.unwrap());
        assert!(options.connect(&config, NoTls).await.is_err());
        options.migrate(&config, NoTls).await.unwrap();
    }
    drop_schema(&config, &schema).await;
}

#[tokio::test]
async fn a_role_without_special_rights_uses_the_store() {
    let Some(config) = database() else { return };
    let (schema, client) = (new_schema(), client(&config).await);
    let options = builder(&schema);
    options.migrate(&config, NoTls).await.unwrap();
    let role = format!(
        "CREATE ROLE {schema} LOGIN; GRANT USAGE ON SCHEMA {schema} TO {schema};
         GRANT ALL ON ALL TABLES IN SCHEMA {schema} TO {schema}; GRANT ALL ON ALL SEQUENCES IN SCHEMA {schema} TO {schema}"
    );
    client.batch_execute(&role).await.unwrap();
    // It cannot create a schema, and one is not created if it is there.
    let own = format!("CREATE SCHEMA {schema}_own AUTHORIZATION {schema}");
    client.batch_execute(&own).await.unwrap();
    let limit = format!("ALTER ROLE {schema} SET idle_session_timeout = '200ms'");
    client.batch_execute(&limit).await.unwrap();
    let mut as_role = config.clone();
    as_role.user(&schema);
    builder(&format!("{schema}_own")).migrate(&as_role, NoTls).await.unwrap();
    drop_schema(&config, &format!("{schema}_own")).await;
    let store = options.connect(&as_role, NoTls).await.unwrap();
    // The limit of idle sessions is not one of the store's.
    let session =
        "SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE usename = $1 AND locktype = 'advisory'
                       AND mode = 'ExclusiveLock' AND objsubid = 2 AND objid > 1";
    let before: i32 = client.query_one(session, &[&schema]).await.unwrap().get(0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(client.query_one(session, &[&schema]).await.unwrap().get::<_, i32>(0), before);
    let grant = acquire(&store, "k").await;
    store.set_offset(b"s", 0, 1).await.unwrap();
    complete(&store, &grant, "r").await.unwrap();
    store.remove_expired().await.unwrap();
    assert!(is_completed(&store, "k").await && !store.forget("absent".into()).await.unwrap());
    drop(store);
    drop_schema(&config, &schema).await;
    client.batch_execute(&format!("DROP ROLE {schema}")).await.unwrap();
}

#[tokio::test]
async fn a_server_without_a_synchronous_standby_is_rejected_unless_a_single_server_is_accepted() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    builder(&schema).migrate(&config, NoTls).await.unwrap();
    let error = builder(&schema).durability(Durability::Replicated).connect(&config, NoTls).await.unwrap_err();
    assert!(matches!(&error, SetupError::NotDurable { .. }), "{error}");
    assert!(error.to_string().contains("synchronous_standby_names"), "{error}");
    drop(builder(&schema).connect(&config, NoTls).await.unwrap());
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_session_frees_the_keys_of_its_process() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    let store = start(&config, &builder(&schema)).await;
    let crashed = builder(&schema).connect(&config, NoTls).await.unwrap();
    let without = builder(&schema).crash_detection(false).connect(&config, NoTls).await.unwrap();
    let (held, kept) = (acquire(&crashed, "k").await, acquire(&without, "kept").await);
    assert!(matches!(store.claim_wait("k".into(), Duration::ZERO).await.unwrap(), Claim::InProgress(_)));
    drop((crashed, without));
    let Claim::Acquired(grant) = store.claim_wait("k".into(), Duration::from_secs(60)).await.unwrap() else { panic!() };
    // Not at the end of its lease.
    assert_eq!((grant.attempt.prior(), grant.attempt.number()), (Some(PriorAttempt::Crashed), 2));
    assert!(grant.token() > held.token());
    // Without the detection a key is free when its lease ends.
    let other = store.claim_wait("kept".into(), Duration::from_secs(1)).await.unwrap();
    assert!(matches!(other, Claim::InProgress(_)), "{other:?}");
    drop((kept, store));
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_whose_session_is_terminated_takes_its_worker_again() {
    let Some(config) = database() else { return };
    let (schema, client) = (new_schema(), client(&config).await);
    let (mut named, name) = (config.clone(), format!("{schema}_first"));
    named.application_name(&name);
    let (store, other) =
        (start(&named, &builder(&schema)).await, builder(&schema).connect(&config, NoTls).await.unwrap());
    let grant = acquire(&store, "k").await;
    let worker = |key: &str| format!("SELECT worker FROM \"{schema}\".keys WHERE key = '\\x00{}'", hex(key));
    let first: i32 = client.query_one(&worker("k"), &[]).await.unwrap().get(0);
    let session = "pg_locks JOIN pg_stat_activity USING (pid) WHERE locktype = 'advisory' AND objid = $1::integer::oid
                   AND application_name = $2";
    let sessions = format!("SELECT pid FROM {session}");
    let pid: i32 = client.query_one(&sessions, &[&first, &name]).await.unwrap().get(0);
    client.execute("SELECT pg_terminate_backend($1)", &[&pid]).await.unwrap();
    until(async || {
        let now = client.query_opt(&sessions, &[&first, &name]).await.unwrap();
        now.is_some_and(|now| now.get::<_, i32>(0) != pid)
    })
    .await;
    // The process uses its worker again once it is registered.
    until(async || {
        let next = acquire(&store, "next").await;
        let is_registered = client.query_one(&worker("next"), &[]).await.unwrap().get::<_, i32>(0) == first;
        complete(&store, &next, "r").await.unwrap();
        store.forget("next".into()).await.unwrap();
        is_registered
    })
    .await;
    let status = other.check(vec!["k".into()]).await.unwrap().remove(0).unwrap();
    assert!(matches!(status, KeyStatus::InProgress(_)), "{status:?}");
    complete(&store, &grant, "r").await.unwrap();
    drop((store, other));
    drop_schema(&config, &schema).await;
}

/// The channel on which a store announces the ends of leases: a name of fixed length, derived from those of the schema and the prefix.
fn channel_of(schema: &str) -> String {
    let name = format!("onlyonce {schema} ");
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    format!("onlyonce_{:08x}", hash.cast_signed())
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_is_announced_to_other_processes() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    let (holder, waiter) =
        (start(&config, &builder(&schema)).await, builder(&schema).connect(&config, NoTls).await.unwrap());
    let mut waits = Vec::new();
    for round in 0..20 {
        let key = format!("k{round}");
        let (grant, of_key, store) = (acquire(&holder, &key).await, Key::from(key), waiter.clone());
        let waiting = tokio::spawn(async move { store.claim_wait(of_key, Duration::from_secs(30)).await });
        tokio::time::sleep(Duration::from_millis(30)).await;
        let begun = Instant::now();
        complete(&holder, &grant, "r").await.unwrap();
        assert!(matches!(waiting.await.unwrap().unwrap(), Claim::Completed(_)));
        waits.push(begun.elapsed());
    }
    // A poll comes a second after the claim.
    assert!(waits.iter().any(|wait| *wait < Duration::from_millis(600)), "the polls end the waits: {waits:?}");
    drop((holder, waiter));
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_grow_although_a_restored_cluster_begins_at_an_earlier_timeline() {
    let Some(config) = database() else { return };
    let (schema, client) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let before = acquire(&store, "before").await;
    // As if the tables had been written on a later timeline.
    client.execute(&format!("UPDATE \"{schema}\".meta SET timeline = 5"), &[]).await.unwrap();
    let after = acquire(&store, "after").await;
    assert_eq!((before.token().get() >> 47, after.token().get() >> 47), (1, 6));
    client.execute(&format!("UPDATE \"{schema}\".meta SET timeline = 3"), &[]).await.unwrap();
    let reconnected = builder(&schema).connect(&config, NoTls).await.unwrap();
    assert_eq!(acquire(&reconnected, "reconnected").await.token().get() >> 47, 9);
    // As if they had been restored from a dump of another cluster with the same timeline.
    client.execute(&format!("UPDATE \"{schema}\".meta SET system_id = 1"), &[]).await.unwrap();
    let restored = builder(&schema).connect(&config, NoTls).await.unwrap();
    assert_eq!(acquire(&restored, "restored").await.token().get() >> 47, 10);
    drop((store, reconnected, restored));
    drop_schema(&config, &schema).await;
}

/// Together they are longer than a batch, and one alone is longer than what is read with its row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_results_are_stored_and_returned_whole() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    let store = start(&config, &builder(&schema).result_limit(8 << 20)).await;
    let result = |number: u8| vec![number; (1 << 20) + usize::from(number)];
    let keys: Vec<Key<'static>> = (0..12).map(|number| Key::from(format!("k{number}"))).collect();
    let mut finishes = Vec::new();
    for (number, answer) in (0..).zip(store.claim(keys.clone()).await.unwrap()) {
        let Ok(Claim::Acquired(grant)) = answer else { panic!() };
        let (store, completion) = (store.clone(), Completion::new(result(number)));
        finishes.push(tokio::spawn(async move {
            store.finish(vec![(Arc::new(grant), Finish::Complete(completion))]).await.remove(0)
        }));
    }
    for finish in finishes {
        finish.await.unwrap().unwrap();
    }
    let claimed = store.claim(keys.clone()).await.unwrap();
    let checked = store.check(keys.clone()).await.unwrap();
    for (number, (claimed, checked)) in (0..).zip(claimed.into_iter().zip(checked)) {
        let Ok(Claim::Completed(claimed)) = claimed else { panic!() };
        let Ok(KeyStatus::Completed(checked)) = checked else { panic!() };
        let expected = result(number);
        assert!(claimed.result() == Some(&expected[..]) && checked.result() == Some(&expected[..]), "{number}");
    }
    let Some(StoredKey::Completed(stored)) = store.inspect("k3".into()).await.unwrap() else { panic!() };
    assert!(stored.result() == Some(&result(3)[..]));
    let duplicate = RecordOutcome::Duplicate { in_flight: false };
    assert_eq!(store.record(vec!["k4".into()]).await.unwrap().remove(0).unwrap(), duplicate);
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_cannot_be_replaced_does_not_take_the_answers_of_the_other_keys_with_it() {
    let Some(config) = database() else { return };
    let (schema, client) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let grant = acquire(&store, "released").await;
    store.finish(vec![(grant, Finish::Release(Release::default()))]).await.remove(0).unwrap();
    let reject = format!(
        "CREATE FUNCTION \"{schema}\".reject() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''rejected''; END';
         CREATE TRIGGER reject BEFORE UPDATE ON \"{schema}\".keys FOR EACH ROW EXECUTE FUNCTION \"{schema}\".reject()"
    );
    client.batch_execute(&reject).await.unwrap();
    let mut answers = store.claim(vec!["absent".into(), "released".into()]).await.unwrap();
    assert!(matches!(answers.remove(1), Err(Error::Unavailable { .. })));
    let Ok(Claim::Acquired(absent)) = answers.remove(0) else { panic!("the lease of the absent key is lost") };
    client.batch_execute(&format!("DROP TRIGGER reject ON \"{schema}\".keys")).await.unwrap();
    complete(&store, &Arc::new(absent), "r").await.unwrap();
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_does_not_wait_for_a_transaction_that_changes_its_key() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    store.record(vec!["k".into()]).await.unwrap().remove(0).unwrap();
    let transaction = beside.transaction().await.unwrap();
    transaction.execute(&format!("DELETE FROM \"{schema}\".keys"), &[]).await.unwrap();
    let keys: [&[&'static str]; 2] = [&["k"], &["k", "other"]];
    for keys in keys {
        let mut answers = store.claim(keys.iter().map(|key| Key::from(*key)).collect()).await.unwrap();
        assert!(matches!(answers.remove(0), Ok(Claim::Completed(_))), "the deletion is not committed");
    }
    transaction.commit().await.unwrap();
    let mut answers = store.claim(vec!["k".into(), "another".into()]).await.unwrap();
    let Ok(Claim::Acquired(grant)) = answers.remove(0) else { panic!("the row that was deleted is the answer") };
    complete(&store, &Arc::new(grant), "r").await.unwrap();
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kept_lease_whose_claim_took_long_is_renewed_before_it_expires() {
    let Some(config) = database() else { return };
    let (schema, mut beside) = (new_schema(), client(&config).await);
    let options = builder(&schema).lease(Duration::from_millis(4_100));
    let (store, other) = (start(&config, &options).await, options.connect(&config, NoTls).await.unwrap());
    let template = acquire(&store, "template").await;
    // The claim waits for this transaction, after it has read the clock.
    let transaction = beside.transaction().await.unwrap();
    let insert = format!(
        "INSERT INTO \"{schema}\".keys (token, call, time_ms, until_ms, worker, attempt, state, prior, key)
         SELECT token, 1, time_ms, until_ms, 0, 1, 0, 0, '\\x00{}' FROM \"{schema}\".keys",
        hex("k")
    );
    transaction.execute(&insert, &[]).await.unwrap();
    let (begun, claim) = (
        Instant::now(),
        tokio::spawn({
            let store = store.clone();
            // On a slow machine the first try ends before the transaction.
            async move { store.claim_lease("k", Duration::from_secs(60)).await }
        }),
    );
    // A third of a lease later it would be too late.
    tokio::time::sleep(Duration::from_millis(2_800)).await;
    transaction.rollback().await.unwrap();
    let Claim::Acquired(lease) = claim.await.unwrap().unwrap() else { panic!() };
    let kept = lease.keep_alive();
    tokio::time::sleep(Duration::from_millis(4_400).saturating_sub(begun.elapsed())).await;
    let status = other.check(vec!["k".into()]).await.unwrap().remove(0).unwrap();
    assert!(matches!(status, KeyStatus::InProgress(_)), "a kept lease has expired: {status:?}");
    lease.complete("r").await.unwrap();
    drop((kept, template, store, other));
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_claims_of_one_key_are_answered_from_one_reading() {
    let Some(config) = database() else { return };
    let schema = new_schema();
    let store = start(&config, &builder(&schema)).await;
    let keys = || vec![Key::from("hot"); 500];
    let begun = Instant::now();
    let mut answers = store.claim(keys()).await.unwrap();
    let Ok(Claim::Acquired(grant)) = answers.remove(0) else { panic!() };
    assert!(answers.iter().all(|answer| matches!(answer, Ok(Claim::InProgress(_)))), "{answers:?}");
    let answers = store.claim(keys()).await.unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, Ok(Claim::InProgress(_)))), "{answers:?}");
    complete(&store, &Arc::new(grant), "r").await.unwrap();
    let answers = store.record(keys()).await.unwrap();
    let duplicate = RecordOutcome::Duplicate { in_flight: false };
    assert!(answers.iter().all(|answer| matches!(answer, Ok(outcome) if *outcome == duplicate)), "{answers:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_with_the_longest_names_announces_the_end_of_a_lease() {
    let Some(config) = database() else { return };
    let schema = format!("{:a<40}", new_schema());
    let options = builder(&schema).prefix("b".repeat(40));
    let (holder, waiter) = (start(&config, &options).await, options.connect(&config, NoTls).await.unwrap());
    let grant = acquire(&holder, "k").await;
    let waiting = tokio::spawn(async move { waiter.claim_wait("k".into(), Duration::from_secs(30)).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    complete(&holder, &grant, "r").await.unwrap();
    assert!(matches!(waiting.await.unwrap().unwrap(), Claim::Completed(_)));
    drop(holder);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_waiters_of_a_key_change_its_row_once() {
    let Some(config) = database() else { return };
    let (schema, beside) = (new_schema(), client(&config).await);
    let store = start(&config, &builder(&schema)).await;
    let other = builder(&schema).connect(&config, NoTls).await.unwrap();
    let grant = acquire(&store, "k").await;
    let version = format!("SELECT xmin::text::bigint, waited FROM \"{schema}\".keys");
    let mut waiters = Vec::new();
    let mut versions = Vec::new();
    for of in [&store, &store, &store, &other, &other] {
        let of = of.clone();
        waiters.push(tokio::spawn(async move { of.claim_wait("k".into(), Duration::from_secs(30)).await }));
        tokio::time::sleep(Duration::from_millis(100)).await;
        until(async || beside.query_one(&version, &[]).await.unwrap().get(1)).await;
        versions.push(beside.query_one(&version, &[]).await.unwrap().get::<_, i64>(0));
    }
    versions.dedup();
    assert_eq!(versions.len(), 1, "waiters changed the row again");
    complete(&store, &grant, "r").await.unwrap();
    for waiter in waiters {
        assert!(matches!(waiter.await.unwrap().unwrap(), Claim::Completed(_)));
    }
    drop((store, other));
    drop_schema(&config, &schema).await;
}

/// What a waiter of another process receives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolution_is_announced_with_the_token_of_the_held_lease() {
    let Some(config) = database() else { return };
    let (schema, beside) = (new_schema(), client(&config).await);
    let options = builder(&schema).on_interrupt(OnInterrupt::Hold);
    let (store, waiter) = (start(&config, &options).await, options.connect(&config, NoTls).await.unwrap());
    let grant = acquire(&store, "k").await;
    store.abandon(Arc::clone(&grant));
    let waiting = tokio::spawn({
        let waiter = waiter.clone();
        async move { waiter.claim_wait("k".into(), Duration::from_secs(60)).await }
    });
    let waited = format!("SELECT waited FROM \"{schema}\".keys");
    until(async || beside.query_one(&waited, &[]).await.unwrap().get(0)).await;
    // The announcements of all stores.
    let (listener, mut connection) = config.connect(NoTls).await.unwrap();
    let (sender, mut announced) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(notification) = message {
                let _ = sender.send(notification.payload().to_owned());
            }
        }
    });
    listener.batch_execute(&format!("LISTEN {}", channel_of(&schema))).await.unwrap();
    store.resolve("k".into(), Resolution::Completed(b"found".to_vec())).await.unwrap();
    let Claim::Completed(completed) = waiting.await.unwrap().unwrap() else { panic!() };
    assert!(completed.token() > grant.token());
    assert_eq!(announced.recv().await.unwrap(), grant.token().to_string());
    drop((store, waiter, listener));
    drop_schema(&config, &schema).await;
}
