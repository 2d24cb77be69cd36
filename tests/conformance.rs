//! The local store passes the conformance suite of engines, on a clock that the test sets.

use std::time::Duration;

use onlyonce::{Durability, ManualClock, Store, Timestamp};
use onlyonce_core::BoxFuture;
use onlyonce_core::conformance::{self, Clock, Factory, Setup, Subject};

struct LocalStore;

struct Manual(ManualClock);

impl Clock for Manual {
    fn advance(&self, by: Duration) -> BoxFuture<'_, ()> {
        self.0.advance(by);
        Box::pin(std::future::ready(()))
    }
}

impl Factory for LocalStore {
    fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>> {
        Box::pin(async move {
            let dir = tempfile::tempdir().unwrap();
            let clock = ManualClock::at(Timestamp::from_unix_s(1_700_000_000));
            let builder = Store::builder()
                .window(setup.window)
                .lease(setup.lease)
                .on_interrupt(setup.on_interrupt)
                .result_limit(setup.result_limit)
                .key_limit(setup.key_limit)
                .in_flight_limit(setup.in_flight_limit)
                .held_limit(setup.held_limit)
                .memory_budget(32 << 20)
                .durability(Durability::Process)
                .clock(clock.clone());
            let builder = match setup.max_ahead {
                Some(max_ahead) => builder.stream_time(max_ahead),
                None => builder,
            };
            let store = builder.open(dir.path().join("store")).unwrap();
            Some(Subject::new(store).clock(Manual(clock)).keep(dir))
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_store_passes_the_checks_of_every_engine() {
    conformance::run(&LocalStore).await.into_result().unwrap();
}
