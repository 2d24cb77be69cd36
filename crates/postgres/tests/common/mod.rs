//! The database of the tests, and stores in schemas of their own.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use onlyonce_core::{Claim, Completion, Engine, Error, Finish, Grant, Key, KeyStatus};
use onlyonce_postgres::{Durability, PgStore, PgStoreBuilder};
use tokio_postgres::{Client, Config, NoTls};

/// The database of `tests/postgres/run`. `None`, with a message, if there is none.
pub(crate) fn database() -> Option<Config> {
    let Ok(config) = std::env::var("ONLYONCE_POSTGRES") else {
        println!("SKIPPED: it needs the database that tests/postgres/run starts");
        return None;
    };
    Some(Config::from_str(&config).unwrap())
}

/// A schema that no other test uses.
pub(crate) fn new_schema() -> String {
    static SCHEMAS: AtomicU32 = AtomicU32::new(0);
    format!("s{}_{}", std::process::id(), SCHEMAS.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn builder(schema: &str) -> PgStoreBuilder {
    PgStore::builder().schema(schema).durability(Durability::SingleServer)
}

/// An empty store with these options.
pub(crate) async fn start(config: &Config, builder: &PgStoreBuilder) -> PgStore {
    builder.migrate(config, NoTls).await.unwrap();
    builder.connect(config, NoTls).await.unwrap()
}

/// A connection beside the store.
pub(crate) async fn client(config: &Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Removes the schema when the test is over.
pub(crate) async fn drop_schema(config: &Config, schema: &str) {
    client(config).await.batch_execute(&format!("DROP SCHEMA \"{schema}\" CASCADE")).await.unwrap();
}

pub(crate) async fn acquire(store: &PgStore, key: &str) -> Arc<Grant> {
    match store.claim(vec![Key::from(key.to_owned())]).await.unwrap().remove(0).unwrap() {
        Claim::Acquired(grant) => Arc::new(grant),
        other => panic!("{key}: {other:?}"),
    }
}

pub(crate) async fn complete(store: &PgStore, grant: &Arc<Grant>, result: &str) -> Result<(), Error> {
    store.finish(vec![(Arc::clone(grant), Finish::Complete(Completion::new(result)))]).await.remove(0)
}

pub(crate) async fn is_completed(store: &PgStore, key: &str) -> bool {
    matches!(store.check(vec![Key::from(key.to_owned())]).await.unwrap().remove(0), Ok(KeyStatus::Completed(_)))
}

/// Waits until this holds.
pub(crate) async fn until(holds: impl AsyncFn() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "it does not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
