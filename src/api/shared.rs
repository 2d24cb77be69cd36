//! What the clones of a store and its leases share.

use std::sync::Arc;

use crate::engine::core::Engine;
use crate::engine::workers::StoreHandle;

/// An open store, and the threads that run its awaited calls.
pub(crate) struct Shared {
    // Before the committer, so that it is dropped first: the committer's threads hold the store as well while their queues
    // are open, so that one of them closes it. Closing waits for the disk, which no thread of a runtime must do.
    pub(crate) handle: Arc<StoreHandle>,
    #[cfg(feature = "tokio")]
    committer: Committers,
}

/// The committer, once a call was awaited.
#[cfg(feature = "tokio")]
#[derive(Default)]
struct Committers {
    started: std::sync::OnceLock<super::committer::Committer>,
    starting: std::sync::Mutex<()>,
}

impl Shared {
    pub(crate) fn new(handle: StoreHandle) -> Arc<Self> {
        Arc::new(Self {
            handle: Arc::new(handle),
            #[cfg(feature = "tokio")]
            committer: Committers::default(),
        })
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.handle.engine
    }

    /// The committer. Starts its threads on the first call.
    ///
    /// # Errors
    ///
    /// `Error::Io` if the system gives no thread; a later call tries again.
    #[cfg(feature = "tokio")]
    pub(crate) fn committer(&self) -> crate::Result<&super::committer::Committer> {
        if let Some(committer) = self.committer.started.get() {
            return Ok(committer);
        }
        // A poisoned lock guards nothing.
        let _starting = self.committer.starting.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(committer) = self.committer.started.get() {
            return Ok(committer);
        }
        let calls = self.engine().config().queue_limit;
        let committer = super::committer::Committer::start(Arc::clone(&self.handle), calls)?;
        Ok(self.committer.started.get_or_init(|| committer))
    }
}
