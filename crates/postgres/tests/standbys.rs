//! The store and servers of its own: a standby that is missing, a restart, a failover.

#[path = "common/cluster.rs"]
mod cluster;
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cluster::Cluster;
use common::{acquire, builder, client, complete, database, is_completed, new_schema, start, until};
use onlyonce_core::{Claim, Engine, Error, Grant, Key, LeaseState, StoredKey};
use onlyonce_postgres::{Durability, PgStore};
use tokio_postgres::NoTls;

/// The standby receives nothing when this returns.
async fn disconnect(standby: &Cluster) {
    standby.disconnect();
    let is_connected = "SELECT count(*) > 0 FROM pg_stat_wal_receiver";
    until(async || !client(&standby.config()).await.query_one(is_connected, &[]).await.unwrap().get::<_, bool>(0))
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_the_server_ends_no_lease_and_calls_wait_for_its_restart() {
    let Some(_) = database() else { return };
    let mut server = Cluster::new("crash");
    server.start();
    let (config, schema) = (server.config(), new_schema());
    let options = builder(&schema).retry_for(Duration::from_secs(60));
    let (store, other) = (start(&config, &options).await, options.connect(&config, NoTls).await.unwrap());
    let (grant, done) = (acquire(&store, "k").await, acquire(&store, "done").await);
    complete(&store, &done, "r").await.unwrap();
    server.kill();
    let restart = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(500));
        server.start();
        server
    });
    // These calls are repeated until the server is back.
    assert!(is_completed(&other, "done").await);
    let answer = other.claim_wait("k".into(), Duration::ZERO).await.unwrap();
    assert!(matches!(answer, Claim::InProgress(_)), "the crash of the server ended a lease: {answer:?}");
    let next = acquire(&other, "next").await;
    assert!(next.token() > grant.token());
    let mut server = restart.join().unwrap();
    // A clean restart keeps the table of workers, and ends their sessions.
    server.stop();
    server.start();
    let answer = other.claim_wait("k".into(), Duration::ZERO).await.unwrap();
    assert!(matches!(answer, Claim::InProgress(_)), "a restart of the server ended a lease: {answer:?}");
    complete(&store, &grant, "r").await.unwrap();
    drop((store, other));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_to_a_synchronous_standby_loses_no_completion_and_repeats_no_token() {
    let Some(_) = database() else { return };
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    let (mut config, schema) = (primary.config(), new_schema());
    // Both servers, and the one that accepts writes.
    config.host_path(standby.socket()).target_session_attrs(tokio_postgres::config::TargetSessionAttrs::ReadWrite);
    let options = builder(&schema).durability(Durability::Replicated).retry_for(Duration::from_secs(30));
    let store = start(&config, &options).await;
    let held = acquire(&store, "held").await;
    let before = acquire(&store, "before").await;
    complete(&store, &before, "r").await.unwrap();
    let completions = Arc::new(AtomicUsize::new(0));
    let load = {
        let (store, completions) = (store.clone(), Arc::clone(&completions));
        tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for number in 0..100_000 {
                // The calls fail at last, because the new primary has no standby.
                let Ok(answers) = store.claim(vec![Key::from(format!("load-{number}"))]).await else { break };
                let Ok(Claim::Acquired(grant)) = &answers[0] else { break };
                if complete(&store, &Arc::new(grant.clone()), "r").await.is_ok() {
                    acknowledged.push(number);
                    completions.fetch_add(1, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            acknowledged
        })
    };
    until(async || completions.load(Ordering::SeqCst) > 20).await;
    primary.kill();
    standby.promote();
    // This store accepts the new primary alone.
    let alone = options.clone().durability(Durability::SingleServer).connect(&config, NoTls).await.unwrap();
    let acknowledged = load.await.unwrap();
    let refused = store.check(vec!["k".into()]).await.unwrap_err();
    assert!(refused.chain().contains("synchronous_standby_names"), "a server without a standby is used: {refused:?}");
    let last = acknowledged.last().copied().unwrap_or_default();
    for number in last..last + 3 {
        let stored = alone.inspect(Key::from(format!("load-{number}"))).await.unwrap();
        let token = stored.map_or(0, |stored| match stored {
            StoredKey::Completed(completed) => completed.token().get(),
            StoredKey::Processing { token, .. } => token.get(),
            other => panic!("{other:?}"),
        });
        assert!(token >> 47 < 2, "load-{number} was claimed on a server without a standby");
    }
    for number in acknowledged {
        assert!(is_completed(&alone, &format!("load-{number}")).await, "the completion of load-{number} is lost");
    }
    assert!(is_completed(&alone, "before").await);
    let Some(StoredKey::Processing { token, state, .. }) = alone.inspect("held".into()).await.unwrap() else {
        panic!()
    };
    assert!(matches!(state, LeaseState::Leased(_)) && token == held.token(), "the failover ended a lease: {state:?}");
    let after = acquire(&alone, "after").await;
    assert_eq!((held.token().get() >> 47, after.token().get() >> 47), (1, 2), "the timelines of the tokens");
    complete(&alone, &held, "r").await.unwrap();
    drop((store, alone));
}

/// The control of the test above: a standby that does not receive. A completion that waits for it is not acknowledged, and one that
/// does not wait is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_that_the_standby_has_not_received_is_not_acknowledged_or_is_lost() {
    let Some(_) = database() else { return };
    for durability in [Durability::Replicated, Durability::SingleServer] {
        let mut primary = Cluster::new("primary");
        primary.start();
        let mut standby = primary.standby("standby");
        standby.start();
        if durability == Durability::Replicated {
            primary.require_standby();
        }
        let (config, schema) = (primary.config(), new_schema());
        let limit = Duration::from_secs(2);
        let options = builder(&schema).durability(durability).retry_for(limit).statement_limit(limit);
        let store = start(&config, &options).await;
        let grant = acquire(&store, "k").await;
        // The standby has the claim.
        let written: String =
            client(&config).await.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
        let has_it = format!("SELECT coalesce(pg_last_wal_replay_lsn() >= '{written}'::pg_lsn, false)");
        until(async || client(&standby.config()).await.query_one(&has_it, &[]).await.unwrap().get(0)).await;
        disconnect(&standby).await;
        let completed = complete(&store, &grant, "r").await;
        primary.kill();
        standby.promote();
        let after = builder(&schema).connect(&standby.config(), NoTls).await.unwrap();
        let is_there = is_completed(&after, "k").await;
        match durability {
            Durability::Replicated => {
                let error = completed.unwrap_err();
                assert!(matches!(error, Error::WriteFailed { .. }), "{error}");
            }
            Durability::SingleServer => {
                completed.unwrap();
                assert!(!is_there, "the control lost nothing");
            }
        }
        drop((store, after));
    }
}

/// The standby must have a completion before a call acknowledges it, although the answer of the first try was lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_completion_that_the_standby_has_not_received_is_not_acknowledged() {
    let Some(_) = database() else { return };
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    let (config, schema) = (primary.config(), new_schema());
    let (limit, retry_for) = (Duration::from_secs(2), Duration::from_secs(10));
    let options = builder(&schema).durability(Durability::Replicated).retry_for(retry_for).statement_limit(limit);
    let store = start(&config, &options).await;
    let other = options.connect(&config, NoTls).await.unwrap();
    let (grant, terminated) = (acquire(&store, "k").await, acquire(&other, "terminated").await);
    disconnect(&standby).await;
    let spawn = |store: &PgStore, grant: &Arc<Grant>| {
        let (store, grant) = (store.clone(), Arc::clone(grant));
        tokio::spawn(async move { complete(&store, &grant, "r").await })
    };
    // The wait for the standby is interrupted, and the completion is visible on connections that are open.
    let mut of_terminated = spawn(&other, &terminated);
    let terminate = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%backoff%'";
    let beside = client(&config).await;
    until(async || !beside.query(terminate, &[]).await.unwrap().is_empty()).await;
    let completion = spawn(&store, &grant);
    let early = tokio::time::timeout(Duration::from_secs(1), &mut of_terminated).await;
    assert!(early.is_err(), "only the primary has the completion: {early:?}");
    // The server restarts during the wait, and the completion is visible to all.
    primary.kill();
    primary.start();
    for completion in [completion, of_terminated] {
        let error = completion.await.unwrap().unwrap_err();
        assert!(matches!(error, Error::WriteFailed { .. }), "{error}");
    }
    let error = complete(&store, &grant, "r").await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. } | Error::WriteFailed { .. }), "{error}");
    drop((store, other));
}

/// The server answers a commit whose wait was cancelled as if the standby had it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_whose_wait_for_the_standby_is_cancelled_is_acknowledged_when_the_standby_has_it() {
    let Some(_) = database() else { return };
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    let (config, schema) = (primary.config(), new_schema());
    let options = builder(&schema).durability(Durability::Replicated).retry_for(Duration::from_secs(60));
    let store = start(&config, &options).await;
    let grant = acquire(&store, "k").await;
    disconnect(&standby).await;
    let mut completion = tokio::spawn({
        let store = store.clone();
        async move { complete(&store, &grant, "r").await }
    });
    let cancel =
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%backoff%'";
    let beside = client(&config).await;
    until(async || !beside.query(cancel, &[]).await.unwrap().is_empty()).await;
    let early = tokio::time::timeout(Duration::from_secs(1), &mut completion).await;
    assert!(early.is_err(), "only the primary has the completion: {early:?}");
    standby.reconnect(&primary);
    completion.await.unwrap().unwrap();
    drop(store);
}

/// The completer dies after its server has restarted during the wait for the standby: nothing but the row knows of the completion.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_in_a_transaction_does_not_return_a_completion_that_the_standby_has_not_received() {
    let Some(_) = database() else { return };
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    let (config, schema, limit) = (primary.config(), new_schema(), Duration::from_secs(2));
    let options = builder(&schema).durability(Durability::Replicated).retry_for(limit).statement_limit(limit);
    let (store, other) = (start(&config, &options).await, options.connect(&config, NoTls).await.unwrap());
    let grant = acquire(&store, "k").await;
    disconnect(&standby).await;
    let completion = tokio::spawn({
        let store = store.clone();
        async move { complete(&store, &grant, "r").await }
    });
    let waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query LIKE '%backoff%'";
    let beside = client(&config).await;
    until(async || beside.query_one(waits, &[]).await.unwrap().get(0)).await;
    completion.abort();
    drop(store);
    primary.kill();
    primary.start();
    let mut of_caller = client(&config).await;
    let transaction = of_caller.transaction().await.unwrap();
    let stored = format!("SELECT state FROM \"{schema}\".keys");
    let state: i16 = transaction.query_one(&stored, &[]).await.unwrap().get(0);
    assert_eq!(state, 4, "the completion is not visible, so that the test tests nothing");
    let error = other.claim_in(&transaction, "k").await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    drop((transaction, other));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_whose_server_waits_for_a_standby_opens_few_connections() {
    let Some(_) = database() else { return };
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    let (mut config, schema, limit) = (primary.config(), new_schema(), Duration::from_secs(1));
    config.application_name("counted");
    let options =
        builder(&schema).durability(Durability::Replicated).retry_for(limit).statement_limit(limit).connections(4);
    let store = start(&config, &options).await;
    disconnect(&standby).await;
    let beside = client(&primary.config()).await;
    let (begun, mut failed, mut most) = (Instant::now(), 0, 0);
    while begun.elapsed() < Duration::from_secs(8) || failed < 10 {
        let claims = (0..6).map(|number| {
            let store = store.clone();
            tokio::spawn(async move { store.claim(vec![Key::from(format!("k{number}"))]).await.unwrap().remove(0) })
        });
        for claim in claims.collect::<Vec<_>>() {
            failed += usize::from(claim.await.unwrap().is_err());
        }
        let count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'counted'";
        most = beside.query_one(count, &[]).await.unwrap().get::<_, i64>(0).max(most);
    }
    // The session, the connections of the pool that were open, and the confirmations of new ones.
    assert!(most <= 16, "{most} connections after {failed} failed calls");
    standby.reconnect(&primary);
    until(async || store.claim(vec!["after".into()]).await.unwrap().remove(0).is_ok()).await;
    drop(store);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_of_the_caller_is_rejected_as_soon_as_the_server_has_no_standby() {
    let Some(_) = database() else { return };
    let mut primary = Cluster::new("primary");
    primary.start();
    let mut standby = primary.standby("standby");
    standby.start();
    primary.require_standby();
    let (config, schema) = (primary.config(), new_schema());
    let store = start(&config, &builder(&schema).durability(Durability::Replicated)).await;
    let Claim::Acquired(lease) = store.claim_lease("k", Duration::ZERO).await.unwrap() else { panic!() };
    let mut beside = client(&config).await;
    beside.batch_execute("SET synchronous_commit = off").await.unwrap();
    primary.give_up_standby();
    let empty = "SELECT current_setting('synchronous_standby_names') = ''";
    until(async || beside.query_one(empty, &[]).await.unwrap().get(0)).await;
    let transaction = beside.transaction().await.unwrap();
    let (error, _, lease) = lease.complete_in(&transaction, "r").await.unwrap_err().into_parts();
    assert!(error.chain().contains("synchronous_standby_names") && lease.is_some(), "{error:?}");
    let error = store.claim_in(&transaction, "other").await.unwrap_err();
    assert!(error.chain().contains("synchronous_standby_names"), "{error:?}");
    // So is a relay, as soon as a check has noticed it.
    until(async || {
        let relayed = store.relay(1, async |_| Ok::<_, ()>(())).await;
        relayed.is_err_and(|error| error.chain().contains("synchronous_standby_names"))
    })
    .await;
    drop((transaction, store));
}
