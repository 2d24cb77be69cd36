//! The health of a store: poisoned, broken or closed, and how each comes about.
//!
//! A write that fails has an unknown outcome. The store is *poisoned*: all calls fail until it is reopened, and the journal
//! decides at the next open.

use std::sync::atomic::Ordering;

use super::core::Engine;
use super::meta_entries::TOKENS;
use super::timekeeping::Saving;
use crate::invariant::Invariant;
use crate::journal::tx::Tx;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Error, Result};

impl Engine {
    /// Fails if the store is closed or poisoned.
    pub(super) fn ready(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        self.poison.error().map_or(Ok(()), Err)
    }

    pub(crate) fn poisoned(&self) -> Option<&str> {
        self.poison.reason()
    }

    /// Poisons the store: the content of the disk is unknown, so all later calls fail.
    pub(crate) fn poison(&self, reason: &str) {
        self.poison_with(reason.to_owned(), Error::Poisoned { reason: reason.to_owned() });
    }

    /// Poisons the store if `error` leaves the content of the disk unknown.
    pub(super) fn poison_by(&self, error: &Error) {
        match error {
            Error::WriteFailed { .. } => self.poison(&error.chain()),
            Error::DirectoryGone { .. } => self.poison_with(error.to_string(), error.clone()),
            _ => {}
        }
    }

    fn poison_with(&self, reason: String, error: Error) {
        let logged = reason.clone();
        if self.poison.set_with(reason, error) {
            tracing::error!(reason = logged, "store poisoned: all calls fail until it is reopened");
        }
        self.wake_all();
    }

    /// Wakes all waiting calls, so that they fail if the store is poisoned or closed.
    pub(super) fn wake_all(&self) {
        self.backlog.eased.notify_all();
        self.waiters.wake_all();
    }

    /// Poisons the store because of a broken invariant, and returns the error for the call that found it.
    #[cold]
    pub(crate) fn broken(&self, invariant: Invariant, detail: std::fmt::Arguments<'_>) -> Error {
        let error = self.poison.broken(invariant, detail);
        self.wake_all();
        error
    }

    /// Fails if an invariant was broken. Called before a response is returned, because the memtable's methods return no error.
    pub(super) fn check_invariants(&self) -> Result<()> {
        self.poison.unbroken().inspect_err(|_| self.wake_all())
    }

    /// Checks that a call has one response for each key.
    pub(crate) fn check_response_count<T>(&self, responses: Vec<T>, keys: usize) -> Result<Vec<T>> {
        if responses.len() == keys {
            return Ok(responses);
        }
        Err(self.broken(Invariant::AnswerForEachKey, format_args!("{} answers to {keys} keys", responses.len())))
    }

    /// Rejects further calls, and closes the database when the running calls have ended.
    pub(crate) fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.backlog.eased.notify_all();
        self.waiters.wake_all();
        Failpoint::CloseBegun.pass();
        self.metrics.end(&self.counters, || self.gauges());
        let written = match self.poison.error() {
            None => self.write_time(),
            Some(error) => Err(error),
        };
        Failpoint::CloseTimeWritten.pass();
        // Otherwise processes that run briefly would accumulate small SSTs over restarts.
        let compacted = if self.poison.reason().is_none() { self.wait_for_compactions() } else { Ok(()) };
        if let Err(error) = compacted {
            tracing::warn!(error = error.chain(), "failed to wait for compactions; small SSTs may accumulate");
        }
        // Unused tokens are returned. Otherwise every open would use up 2^32 of them, and consumers may store tokens in 53
        // bits. The running calls have ended by then, so no token from this one on is in use.
        let closed = self.journal.close_with(|tx| {
            if self.poison.reason().is_none() {
                tx.put_meta(TOKENS, &self.sequence.next_unused().to_le_bytes());
            }
        });
        self.db.close();
        tracing::info!(path = %self.db.directory().root().display(), "store closed");
        written.and(closed)
    }

    fn write_time(&self) -> Result<()> {
        let mut tx = Tx::default();
        self.timeline.ask_to_be_saved();
        let saving = self.time_saved.put_changed(&self.timeline, &mut tx, || true);
        self.journal.write(tx, false)?;
        saving.into_iter().for_each(Saving::done);
        Ok(())
    }
}
