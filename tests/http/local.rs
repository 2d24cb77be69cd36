//! Servers over a store on disk.

use onlyonce::http::IdempotencyLayer;
use onlyonce::{Builder, Durability, Store};

use crate::setup::TestServer;

/// A server and its store.
pub(crate) struct LocalServer {
    server: TestServer,
    // Dropped before its directory.
    pub(crate) store: Store,
    _dir: tempfile::TempDir,
}

impl LocalServer {
    pub(crate) async fn new() -> Self {
        Self::with(|builder| builder, |layer| layer).await
    }

    pub(crate) async fn with(
        store: impl FnOnce(Builder) -> Builder,
        layer: impl FnOnce(IdempotencyLayer) -> IdempotencyLayer,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let builder = Store::builder().durability(Durability::Process).memory_budget(32 << 20);
        let store = store(builder).open(dir.path().join("store")).unwrap();
        Self { server: TestServer::start(store.clone(), layer).await, store, _dir: dir }
    }
}

impl std::ops::Deref for LocalServer {
    type Target = TestServer;

    fn deref(&self) -> &TestServer {
        &self.server
    }
}
