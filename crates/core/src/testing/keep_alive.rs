use std::sync::Arc;

use super::memory_store::MemoryStore;
use crate::engine::{BoxFuture, Grant, KeepAlive};
use crate::error::Error;

/// Renews a lease of a [`MemoryStore`] until it is dropped. The lease knows who renews it: no task or thread runs.
pub(super) struct Keeper {
    store: MemoryStore,
    grant: Arc<Grant>,
    id: u64,
    /// The number of failures before it started.
    failures: u64,
    lost: Option<Error>,
}

impl Keeper {
    pub(super) fn start(store: &MemoryStore, grant: &Arc<Grant>) -> Self {
        let id = store.next_keeper();
        let mut state = store.lock();
        let started = state.failure.admit().and_then(|()| state.renew(grant));
        if started.is_ok()
            && let Some(leased) = state.lease_of(grant)
        {
            leased.keepers.push(id);
        }
        let failures = state.failure.count();
        drop(state);
        Self { store: store.clone(), grant: Arc::clone(grant), id, failures, lost: started.err() }
    }

    /// Why the lease is not renewed any more. `None` while it is, or while it could be again.
    fn find_lost(&self) -> Option<Error> {
        let mut state = self.store.lock();
        let failure = state.failure.since(self.failures);
        failure.or_else(|| state.lease_of(&self.grant).is_none().then(|| self.grant.superseded()))
    }
}

impl KeepAlive for Keeper {
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error> {
        Box::pin(async move {
            loop {
                // Listens before it looks, so that it misses no change.
                let changed = self.store.changed();
                let lost = self.lost.clone().or_else(|| self.find_lost());
                if let Some(error) = lost {
                    self.lost = Some(error.clone());
                    return error;
                }
                changed.await;
            }
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut state = self.store.lock();
        let Some(leased) = state.lease_of(&self.grant) else { return };
        let before = leased.keepers.len();
        leased.keepers.retain(|id| *id != self.id);
        if leased.keepers.len() < before {
            // It superseded nothing: the lease lasts from the last renewal on, which is now.
            let _ = state.renew(&self.grant);
        }
    }
}
