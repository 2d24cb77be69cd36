//! The backlog: where calls wait while the memtable is full, and what they wake.

use std::time::Duration;

use crate::testing::sync_shim::{Condvar, Mutex};
use crate::wake::Wake;
use onlyonce_core::{Error, Result};

/// How long a call waits before it checks again whether flushes fail.
const BACKLOG_WAIT: Duration = Duration::from_millis(100);

/// Where calls wait while the memtable is full.
#[derive(Default)]
pub(super) struct Backlog {
    /// Why the last flush failed.
    failure: Mutex<Option<Error>>,
    /// Notified when a flush ends.
    eased: Condvar,
    /// Wakes the maintenance thread.
    pub(super) flush_needed: Wake,
}

impl Backlog {
    /// Called at the end of a flush.
    pub(super) fn flushed(&self, outcome: &Result<()>) {
        *self.failure.lock() = outcome.as_ref().err().cloned();
        self.eased.notify_all();
    }

    /// Makes all waiting calls check again whether they may run.
    pub(super) fn wake_all(&self) {
        self.eased.notify_all();
    }

    /// Waits until a flush ends or for some time. Fails if flushes fail.
    pub(super) fn wait(&self) -> Result<()> {
        let mut failure = self.failure.lock();
        if let Some(error) = failure.as_ref() {
            return Err(Error::FlushFailed { source: error.clone().into() });
        }
        self.eased.wait_for(&mut failure, BACKLOG_WAIT);
        Ok(())
    }
}
