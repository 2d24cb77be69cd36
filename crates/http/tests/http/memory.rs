//! Servers over the in-memory engine.

use onlyonce_core::testing::{MemoryStore, MemoryStoreBuilder};
use onlyonce_http::IdempotencyLayer;

use crate::setup::TestServer;

/// A server and its store.
pub(crate) struct MemoryServer {
    pub(crate) server: TestServer,
    pub(crate) store: MemoryStore,
}

impl MemoryServer {
    pub(crate) async fn new() -> Self {
        Self::with(|builder| builder, |layer| layer).await
    }

    pub(crate) async fn with(
        store: impl FnOnce(MemoryStoreBuilder) -> MemoryStoreBuilder,
        layer: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let store = store(MemoryStore::builder()).build().unwrap();
        Self { server: TestServer::start(store.clone(), layer).await, store }
    }
}

impl std::ops::Deref for MemoryServer {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.server
    }
}
