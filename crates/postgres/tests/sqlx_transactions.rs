//! Transactions of sqlx: a completion is committed with the caller's writes or not at all, as in one of `tokio-postgres`.

mod common;

use std::time::Duration;

use common::{builder, database, drop_schema, new_schema, start};
use onlyonce_core::{Claim, Completion, Engine, Error, PriorAttempt, StoredKey};
use onlyonce_postgres::{PgLease, PgStore};
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio_postgres::Config;
use tokio_postgres::config::Host;

async fn connect(config: &Config) -> PgConnection {
    let Some(Host::Unix(dir)) = config.get_hosts().first() else { panic!("the server has no Unix socket") };
    let (user, database) = (config.get_user().unwrap(), config.get_dbname().unwrap());
    let options = PgConnectOptions::new_without_pgpass().socket(dir).username(user).database(database);
    PgConnection::connect_with(&options).await.unwrap()
}

async fn claim(store: &PgStore, key: &'static str) -> PgLease {
    match store.claim_lease(key, Duration::from_secs(20)).await.unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{key}: {other:?}"),
    }
}

async fn result(store: &PgStore, key: &'static str) -> Option<Vec<u8>> {
    match store.inspect(key.into()).await.unwrap() {
        Some(StoredKey::Completed(completed)) => completed.result().map(<[u8]>::to_vec),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_in_a_transaction_of_sqlx_is_committed_with_its_writes() {
    let Some(config) = database() else { return };
    let (schema, mut sqlx) = (new_schema(), connect(&config).await);
    let store = start(&config, &builder(&schema).lease(Duration::from_secs(3))).await;
    let create = format!("CREATE TABLE \"{schema}\".charges (id text); SET synchronous_commit = off");
    sqlx.execute(AssertSqlSafe(create)).await.unwrap();
    let charge = |id: &str| AssertSqlSafe(format!("INSERT INTO \"{schema}\".charges VALUES ('{id}')"));

    let lease = claim(&store, "a").await;
    let mut transaction = sqlx.begin().await.unwrap();
    transaction.execute(charge("a")).await.unwrap();
    let completion = Completion::new("done").offset("orders", 0, 7).message("t", "a", "");
    let completed = lease.complete_in(&mut transaction, completion).await.unwrap();
    // The commit waits for the standby.
    let setting: String = sqlx::query_scalar("SHOW synchronous_commit").fetch_one(&mut *transaction).await.unwrap();
    assert_eq!(setting, "on");
    assert_eq!(result(&store, "a").await, None, "it is visible before the commit");
    transaction.commit().await.unwrap();
    completed.committed();
    assert_eq!(result(&store, "a").await.as_deref(), Some(&b"done"[..]));
    assert_eq!((store.offset(b"orders", 0).await.unwrap(), store.outbox(9).await.unwrap().len()), (Some(7), 1));

    // A transaction that is rolled back leaves the key to the next claim.
    let lease = claim(&store, "b").await;
    let mut transaction = sqlx.begin().await.unwrap();
    let completed = lease.complete_in(&mut transaction, "done").await.unwrap();
    transaction.rollback().await.unwrap();
    drop(completed);
    let late = claim(&store, "b").await;
    assert_eq!((late.attempt().number(), late.attempt().prior()), (2, Some(PriorAttempt::Dropped)));

    // After the completion of a lease that was taken over the transaction cannot be committed.
    let second = claim(&store, "b").await;
    assert_eq!(second.attempt().prior(), Some(PriorAttempt::LeaseExpired));
    let mut transaction = sqlx.begin().await.unwrap();
    transaction.execute(charge("b")).await.unwrap();
    let error = late.complete_in(&mut transaction, "late").await.unwrap_err();
    assert!(matches!(error.error(), Error::Superseded { .. }), "{error}");
    let _ = transaction.commit().await;
    let charges = AssertSqlSafe(format!("SELECT count(*) FROM \"{schema}\".charges"));
    assert_eq!(
        sqlx::query_scalar::<_, i64>(charges).fetch_one(&mut sqlx).await.unwrap(),
        1,
        "the late charge is there"
    );
    second.complete("in time").await.unwrap();
    drop(store);
    drop_schema(&config, &schema).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_in_a_transaction_of_sqlx_happens_if_the_transaction_is_committed() {
    let Some(config) = database() else { return };
    let (schema, mut sqlx) = (new_schema(), connect(&config).await);
    let store = start(&config, &builder(&schema)).await;
    for is_committed in [false, true] {
        let mut transaction = sqlx.begin().await.unwrap();
        let Claim::Acquired(lease) = store.claim_in(&mut transaction, "k").await.unwrap() else { panic!() };
        assert_eq!(lease.attempt().number(), 1);
        let completed = lease.complete_in(&mut transaction, "done").await.unwrap();
        if is_committed {
            transaction.commit().await.unwrap();
            completed.committed();
        } else {
            transaction.rollback().await.unwrap();
            drop(completed);
        }
        assert_eq!(result(&store, "k").await.is_some(), is_committed);
    }
    // A released key is claimed by the other statements, and a completed one has its result.
    claim(&store, "released").await.release(onlyonce_core::Release::default()).await.unwrap();
    let mut transaction = sqlx.begin().await.unwrap();
    let Claim::Acquired(lease) = store.claim_in(&mut transaction, "released").await.unwrap() else { panic!() };
    assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Released)));
    let Claim::Completed(first) = store.claim_in(&mut transaction, "k").await.unwrap() else { panic!() };
    assert_eq!(first.result(), Some(&b"done"[..]));
    transaction.commit().await.unwrap();
    lease.complete("r").await.unwrap();
    // A statement of the server that fails is an error that says so.
    let mut transaction = sqlx.begin().await.unwrap();
    assert!(transaction.execute("SELECT 1 / 0").await.is_err());
    let error = store.claim_in(&mut transaction, "other").await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable { .. }) && error.chain().contains("aborted"), "{}", error.chain());
    drop(transaction);
    drop(store);
    drop_schema(&config, &schema).await;
}
