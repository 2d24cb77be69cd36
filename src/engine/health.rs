//! The health of a store: open, closed, or poisoned.
//!
//! A write that fails has an unknown outcome. The store is *poisoned*: all calls fail until it is reopened, and the journal
//! decides at the next open.
//!
//! This is the one flag of failure. A flush that fails and is repeated leaves the store healthy (`backlog.rs`).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::backlog::Backlog;
use super::waiters::Waiters;
use crate::invariant::{Invariant, Poison};
use crate::testing::sync_shim::AtomicBool;
use onlyonce_core::{Error, Result};

/// Whether calls may run. It wakes those that wait when they may not any more.
pub(crate) struct Health {
    /// Shared with the memtable, the buckets and the sequence.
    poison: Arc<Poison>,
    closed: AtomicBool,
    waiters: Arc<Waiters>,
    backlog: Arc<Backlog>,
}

impl Health {
    pub(super) fn new(poison: Arc<Poison>, waiters: &Arc<Waiters>, backlog: &Arc<Backlog>) -> Self {
        let (waiters, backlog) = (Arc::clone(waiters), Arc::clone(backlog));
        Self { poison, closed: AtomicBool::new(false), waiters, backlog }
    }

    /// Fails if the store is closed or poisoned.
    pub(super) fn ready(&self) -> Result<()> {
        if self.is_closed() { Err(Error::Closed) } else { self.unpoisoned() }
    }

    /// Fails if the store is poisoned.
    pub(super) fn unpoisoned(&self) -> Result<()> {
        self.poison.error().map_or(Ok(()), Err)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Rejects further calls. False if an earlier call has done so.
    pub(super) fn close(&self) -> bool {
        let is_first = !self.closed.swap(true, Ordering::AcqRel);
        if is_first {
            self.wake_all();
        }
        is_first
    }

    /// Why the store is poisoned, if it is.
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
        self.backlog.wake_all();
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
}
