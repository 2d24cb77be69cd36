//! The warning about messages without an id. The only test of its binary, because `tracing` caches in the whole process
//! whether a log line is enabled.

mod order;

use std::sync::{Arc, Mutex};

use onlyonce_core::testing::MemoryStore;
use onlyonce_delivery::{Attempt, KeyOrigin, Processor};
use order::Order;

/// Collects the field `expected` of warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

struct Expected(Option<String>);

impl tracing::field::Visit for Expected {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        if field.name() == "expected" {
            self.0 = Some(format!("{value:?}"));
        }
    }
}

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::Id {
        tracing::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::Id, _: &tracing::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut expected = Expected(None);
        event.record(&mut expected);
        self.0.lock().unwrap().extend(expected.0);
    }

    fn enter(&self, _: &tracing::Id) {}

    fn exit(&self, _: &tracing::Id) {}
}

#[tokio::test]
async fn only_the_first_message_without_an_id_is_logged_as_a_warning() {
    let warnings = Warnings::default();
    let _guard = tracing::subscriber::set_default(warnings.clone());
    let processor = Processor::new(MemoryStore::new());
    for id in ["a", "b", "c"] {
        for origin in [KeyOrigin::Digest, KeyOrigin::Position] {
            let charge = async |_: &Order, _: &mut Attempt| Ok("receipt");
            let outcome = processor.process(Order::new(id).origin(origin), charge).await.unwrap();
            assert!(outcome.is_acknowledged());
        }
    }
    assert_eq!(*warnings.0.lock().unwrap(), ["\"header `id` of topic `orders`\""]);
}
