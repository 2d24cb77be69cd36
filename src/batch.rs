//! Many keys in one call: the way to be fast, for consumers that poll in batches anyway.

use std::sync::Arc;
use std::time::Duration;

use crate::claim::{self, Claim, CompleteError, Lease, Work, complete_all, in_order, is_of, release_all, sort_out};
use crate::engine::request::Request;
use crate::error::Result;
use crate::key::Key;
use crate::store::{Check, Recorded, Store, checked, recorded};
use crate::tx::Tx;

/// Each takes keys in the caller's order and answers in that order, with one write at most. The outer error says
/// that nothing was done; an inner one is about its key alone.
impl Store {
    /// What a claim of each key would find. Changes nothing.
    ///
    /// # Errors
    ///
    /// As [`Store::check`]. A key that is empty or too long refuses the whole batch, and the error says which.
    pub fn check_batch<'k, K: Into<Key<'k>>>(&self, keys: impl IntoIterator<Item = K>) -> Result<Vec<Result<Check>>> {
        self.check_request(&self.running.engine.request(keys)?)
    }

    /// As [`Store::check_batch`], for messages with their timestamps, each as [`Store::check_at`], and each by itself.
    ///
    /// # Errors
    ///
    /// As [`Store::check_at`]. A key that is empty or too long refuses the whole batch, and the error says which.
    pub fn check_batch_at<'k, K: Into<Key<'k>>>(
        &self,
        messages: impl IntoIterator<Item = (K, u64)>,
    ) -> Result<Vec<Result<Check>>> {
        self.check_request(&self.running.engine.request_at(messages)?)
    }

    fn check_request(&self, request: &Arc<Request>) -> Result<Vec<Result<Check>>> {
        let answers = self.running.engine.check(request)?;
        Ok(answers.into_iter().map(|answer| answer.map(checked)).collect())
    }

    /// Claims each key. One that stands twice is acquired once, and in progress the second time: complete the leases of
    /// the batch before you wait for what it found in progress, or you wait for yourself.
    ///
    /// ```
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let messages = ["a", "b", "a"];
    /// let (mut leases, mut later) = (Vec::new(), Vec::new());
    /// for (message, claim) in messages.into_iter().zip(store.claim_batch(messages)?) {
    ///     match claim? {
    ///         Claim::Acquired(lease) => {
    ///             let result = format!("did {message}");
    ///             leases.push((lease, result));
    ///         }
    ///         Claim::Completed(_first) => {} // acknowledge it
    ///         Claim::InProgress(_other) => later.push(message),
    ///     }
    /// }
    /// for completed in store.complete_batch(leases) {
    ///     completed?;
    /// }
    /// assert_eq!(later, ["a"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Store::claim`]. A key that is empty or too long refuses the whole batch, and the error says which; one with
    /// another payload only itself.
    pub fn claim_batch<'k, K: Into<Key<'k>>>(&self, keys: impl IntoIterator<Item = K>) -> Result<Vec<Result<Claim>>> {
        self.claim_request(&self.running.engine.request(keys)?)
    }

    /// As [`Store::claim_batch`], for messages with their timestamps, each as [`Store::claim_at`]. Stream time follows one after
    /// the other; the next of the batch can confirm one that is too far ahead.
    ///
    /// # Errors
    ///
    /// As [`Store::claim_at`]. A key that is empty or too long refuses the whole batch, and the error says which; one with
    /// another payload, one that is too old and one that is too far ahead only itself.
    pub fn claim_batch_at<'k, K: Into<Key<'k>>>(
        &self,
        messages: impl IntoIterator<Item = (K, u64)>,
    ) -> Result<Vec<Result<Claim>>> {
        self.claim_request(&self.running.engine.request_at(messages)?)
    }

    fn claim_request(&self, request: &Arc<Request>) -> Result<Vec<Result<Claim>>> {
        let claimed = self.running.engine.claim(request)?;
        Ok(claimed.into_iter().map(|claimed| Ok(claim::claim(claimed?, &self.running))).collect())
    }

    /// Completes each lease with its result.
    ///
    /// # Errors
    ///
    /// For each lease as [`Lease::complete`]. A lease of another store is refused with
    /// [`Error::ForeignLease`](crate::Error::ForeignLease) and given back.
    #[must_use = "each lease has an answer of its own"]
    pub fn complete_batch<R: Into<Vec<u8>>>(
        &self,
        leases: impl IntoIterator<Item = (Lease, R)>,
    ) -> Vec<Result<(), CompleteError>> {
        self.complete_works(leases.into_iter().map(|(lease, result)| (lease, result.into().into())))
    }

    /// As [`Store::complete_batch`], with what each `fill` adds to the same write, as
    /// [`Lease::complete_with`]. Give the leases in the order of their messages: an offset says that all before it is
    /// done, so that behind a lease that is refused no offset of the batch is stored. Messages for the outbox
    /// depend on their own lease alone.
    ///
    /// The store sees these leases and nothing else. Set no offset behind a message that somebody else is at or that could
    /// not be claimed, and complete one batch of a partition before the next.
    ///
    /// ```
    /// use onlyonce::{Claim, Store, Tx};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let mut leases = Vec::new();
    /// let mut all_before_are_done = true;
    /// for (offset, claim) in (0..).zip(store.claim_batch(["a", "b", "c"])?) {
    ///     match claim? {
    ///         Claim::Acquired(lease) => {
    ///             let fill = move |tx: &mut Tx| {
    ///                 if all_before_are_done {
    ///                     tx.set_offset("orders", 0, offset + 1);
    ///                 }
    ///             };
    ///             leases.push((lease, "done", fill));
    ///         }
    ///         Claim::Completed(_first) => {}
    ///         Claim::InProgress(_other) => all_before_are_done = false, // read it again
    ///     }
    /// }
    /// for completed in store.complete_batch_with(leases) {
    ///     completed?;
    /// }
    /// assert_eq!(store.offset("orders", 0)?, Some(3));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Store::complete_batch`]. After one, go on reading from [`Store::offset`].
    #[must_use = "each lease has an answer of its own"]
    pub fn complete_batch_with<R: Into<Vec<u8>>, F: FnOnce(&mut Tx)>(
        &self,
        leases: impl IntoIterator<Item = (Lease, R, F)>,
    ) -> Vec<Result<(), CompleteError>> {
        self.complete_works(Work::batch(leases))
    }

    fn complete_works(&self, leases: impl IntoIterator<Item = (Lease, Work)>) -> Vec<Result<(), CompleteError>> {
        let (ours, answers) = sort_out(leases, &self.running, |lease| lease);
        let completed = complete_all(ours).into_iter().map(|completed| completed.map(drop));
        in_order(answers, completed, &self.running, CompleteError::lost)
    }

    /// Releases each lease after its backoff, as [`Lease::release_after`]: at once where it is zero. A lease of another
    /// store is released there, in a write of its own.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use onlyonce::{Claim, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let mut leases = Vec::new();
    /// for claim in store.claim_batch(["a", "b"])? {
    ///     if let Claim::Acquired(lease) = claim? {
    ///         leases.push((lease, Duration::ZERO));
    ///     }
    /// }
    /// for released in store.release_batch(leases) {
    ///     released?;
    /// }
    /// assert!(matches!(store.claim("a")?, Claim::Acquired(lease) if lease.attempt() == 2));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// For each lease as [`Lease::release`].
    #[must_use = "each lease has an answer of its own"]
    pub fn release_batch(&self, leases: impl IntoIterator<Item = (Lease, Duration)>) -> Vec<Result<()>> {
        let mut ours = Vec::new();
        let mut answers: Vec<Option<Result<()>>> = Vec::new();
        for (lease, backoff) in leases {
            if is_of(&lease, &self.running) {
                ours.push((lease, backoff));
                answers.push(None);
            } else {
                answers.push(Some(lease.release_after(backoff)));
            }
        }
        in_order(answers, release_all(ours), &self.running, |error| error)
    }

    /// Records each key. One that stands twice is a duplicate the second time.
    ///
    /// # Errors
    ///
    /// As [`Store::record`]. A key that is empty or too long refuses the whole batch, and the error says which; one with
    /// another payload only itself.
    ///
    /// ```
    /// use onlyonce::{Recorded, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("store");
    /// let store = Store::open(path)?;
    /// let new: Vec<bool> = store
    ///     .record_batch(["a", "b", "a"])?
    ///     .into_iter()
    ///     .map(|recorded| recorded.map(|recorded| recorded == Recorded::First))
    ///     .collect::<Result<_, _>>()?;
    /// assert_eq!(new, [true, true, false]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn record_batch<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Vec<Result<Recorded>>> {
        self.record_request(&self.running.engine.request(keys)?)
    }

    /// As [`Store::record_batch`], for messages with their timestamps, as [`Store::claim_batch_at`].
    ///
    /// # Errors
    ///
    /// As [`Store::claim_batch_at`].
    pub fn record_batch_at<'k, K: Into<Key<'k>>>(
        &self,
        messages: impl IntoIterator<Item = (K, u64)>,
    ) -> Result<Vec<Result<Recorded>>> {
        self.record_request(&self.running.engine.request_at(messages)?)
    }

    fn record_request(&self, request: &Arc<Request>) -> Result<Vec<Result<Recorded>>> {
        let answers = self.running.engine.record(request)?;
        Ok(answers.into_iter().map(|answer| answer.map(|answer| recorded(&answer))).collect())
    }
}
