//! The store passes the conformance suite of engines: on a clock that the test sets, and on the server's.

mod common;

use std::time::{Duration, Instant};

use common::{builder, client, database, new_schema, start};
use onlyonce_core::conformance::{self, Clock, Factory, Outcome, Setup, Subject};
use onlyonce_core::{BoxFuture, Engine};
use onlyonce_postgres::{PgStore, PgStoreBuilder};
use tokio::sync::Semaphore;
use tokio_postgres::{Client, Config};

fn with(setup: Setup, schema: &str) -> PgStoreBuilder {
    builder(schema)
        .window(setup.window)
        .lease(setup.lease)
        .on_interrupt(setup.on_interrupt)
        .result_limit(setup.result_limit)
        .key_limit(setup.key_limit)
        .in_flight_limit(setup.in_flight_limit)
        .held_limit(setup.held_limit)
        .connections(4)
}

/// Few stores are set up at a time, so that the set-up of some does not take the time of other checks' leases.
static SET_UPS: Semaphore = Semaphore::const_new(3);

/// A store in a schema of its own.
async fn store(config: &Config, setup: Setup) -> (PgStore, String) {
    let _set_up = SET_UPS.acquire().await.unwrap();
    let schema = new_schema();
    let options = match setup.max_ahead {
        Some(max_ahead) => with(setup, &schema).stream_time(max_ahead),
        None => with(setup, &schema),
    };
    (start(config, &options).await, schema)
}

/// The floor of the store's clock, ahead of the server's clock: the store's time is the floor.
struct Floor {
    store: PgStore,
    client: Client,
    schema: String,
}

impl Floor {
    async fn set(config: &Config, store: PgStore, schema: String) -> Self {
        let client = client(config).await;
        client.execute(&format!("UPDATE \"{schema}\".meta SET floor_ms = 4000000000000"), &[]).await.unwrap();
        Self { store, client, schema }
    }
}

impl Clock for Floor {
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // Dropped leases are written before time passes.
            self.store.stats().await.unwrap();
            let advance = format!("UPDATE \"{}\".meta SET floor_ms = floor_ms + $1", self.schema);
            self.client.execute(&advance, &[&i64::try_from(by.as_millis()).unwrap()]).await.unwrap();
        })
    }
}

struct OnSetTime(Config);

impl Factory for OnSetTime {
    fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>> {
        Box::pin(async move {
            let (store, schema) = store(&self.0, setup).await;
            Some(Subject::new(store.clone()).clock(Floor::set(&self.0, store, schema).await))
        })
    }

    fn checks_at_a_time(&self) -> usize {
        8
    }
}

struct OnServerTime(Config);

impl Factory for OnServerTime {
    fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>> {
        Box::pin(async move { Some(Subject::new(store(&self.0, setup).await.0)) })
    }

    /// The shortest lease has three seconds, and a check makes a dozen calls in it.
    fn time_unit(&self) -> Duration {
        Duration::from_millis(500)
    }

    /// More of them would take the time of each other's leases on a slow machine.
    fn checks_at_a_time(&self) -> usize {
        48
    }
}

async fn passes(factory: &dyn Factory) {
    let begun = Instant::now();
    let report = conformance::run(factory).await;
    assert!(report.outcomes.iter().all(|(_, outcome)| *outcome != Outcome::Skipped), "a check is skipped");
    let passed = report.outcomes.iter().filter(|(_, outcome)| *outcome == Outcome::Passed).count();
    println!("{passed} of {} checks passed in {:?}", report.outcomes.len(), begun.elapsed());
    assert!(report.outcomes.len() > 150, "{} checks are too few", report.outcomes.len());
    report.into_result().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_the_checks_of_every_engine_on_set_time() {
    let Some(config) = database() else { return };
    passes(&OnSetTime(config)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_the_checks_of_every_engine_on_the_server_s_time() {
    let Some(config) = database() else { return };
    passes(&OnServerTime(config)).await;
}
