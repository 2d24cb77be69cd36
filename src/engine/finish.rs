//! Completions, releases, renewals and `forget`: the order of their effects.
//!
//! A completion or a release changes the memtable under the shard's lock, and is visible as committing until its record is
//! written. Otherwise a caller could rely on a completion that a crash takes back. The token is compared under the same
//! lock: otherwise a late holder could overwrite the state of the next one.
//!
//! Renewals and dropped leases change only memory: a lease ends with its process anyway.

use std::sync::Arc;

use super::core::Engine;
use super::request::{KeyRef, Request};
use super::response::{FinishKind, FinishedBy, Grant};
use crate::buckets::registry::{Probe, look_up};
use crate::clock::Now;
use crate::codec::{self, RecordKind};
use crate::invariant::Invariant;
use crate::memtable::slot::Pending;
use crate::metrics::Call;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::PriorAttempt;
use onlyonce_core::machine::{self, Entry, Forget, Holder, Processing};
use onlyonce_core::{Error, FencingToken, Key, Result, SideWrites};

impl Engine {
    /// Finishes leases, in one record. Returns for each lease whether it was accepted; false means superseded. An error
    /// concerns its lease alone.
    ///
    /// A completion that is repeated with the token that completed its key is accepted, and changes nothing.
    pub(crate) fn finish(
        &self,
        kind: RecordKind,
        finished_by: FinishedBy,
        leases: Vec<(&Grant, FinishKind<'_>)>,
    ) -> Result<Vec<Result<bool>>> {
        let completes = kind == RecordKind::Completed;
        let _timer = self.metrics.call(if completes { Call::Complete } else { Call::Release }, leases.len());
        let bytes = leases.iter().map(|(grant, finish_kind)| encoded_len(grant, finish_kind)).sum();
        // A completion by an operator takes a token.
        self.admit(if finished_by == FinishedBy::Operator { leases.len() } else { 0 }, bytes)?;
        let now = self.now();
        let open = self.begin_record();
        let mut record = self.record_writer(kind, now, bytes);
        let mut accepted = Vec::with_capacity(leases.len());
        let (mut count, mut sample) = (0, None);
        let mut side_writes = Vec::new();
        // Offsets are cumulative: after a rejected lease of its batch, an offset would cover a message that is not processed.
        let mut is_contiguous = true;
        for (grant, finish_kind) in &leases {
            let follows = matches!(finish_kind, FinishKind::Complete { follows: true, .. });
            is_contiguous |= !follows;
            let (digest, key) = (grant.digest(), grant.key());
            self.require_key(key)?;
            let mut shard = self.memtable.shard(digest);
            let stored = shard.get(digest, key);
            let own_window = match machine::finishable(stored.as_ref(), grant.token, finished_by, now, self.policy) {
                Some(processing) => processing.own_window,
                None => {
                    drop(shard);
                    let is_repeated = match (finished_by, finish_kind) {
                        (FinishedBy::Holder, FinishKind::Complete { .. }) => {
                            let earlier = leases.iter().map(|(grant, _)| grant.token).zip(&accepted);
                            self.is_repeated(grant, stored, now, earlier)
                        }
                        _ => Ok(false),
                    };
                    is_contiguous &= matches!(is_repeated, Ok(true));
                    accepted.push(is_repeated);
                    continue;
                }
            };
            accepted.push(Ok(true));
            count += 1;
            // One sample a call: a measurement for each key would be too expensive.
            sample = sample.or(Some(*grant));
            let mut attempt = grant.as_attempt();
            let entry = match *finish_kind {
                FinishKind::Complete { result, side_writes: own, .. } => {
                    side_writes.extend(own.map(|own| (own, is_contiguous)));
                    // With a token of its own, so that the old holder's late completion is no repeated one.
                    if finished_by == FinishedBy::Operator {
                        attempt.token = self.sequence.take();
                    }
                    let done = attempt.completed(own_window, result, now, self.policy);
                    record.completed(key, &done);
                    Entry::Completed(done)
                }
                FinishKind::Release { prior, backoff } => {
                    let released = attempt.released(own_window, finished_by, prior, backoff, now, self.policy);
                    record.processing(key, &released);
                    Entry::Processing(released)
                }
            };
            shard.set_pending(
                digest,
                key,
                entry,
                Pending { record: open.number(), attempt: grant.attempt, holder: Holder::Committing },
            );
        }
        let sync = if completes { self.config.sync_results() } else { self.config.sync_claims() };
        self.append_with(open, record, &side_writes, sync)?;
        self.waiters.wake(leases.iter().map(|(grant, _)| grant.digest()));
        if completes {
            self.counters.completed.add(count);
            if let (FinishedBy::Holder, Some(grant)) = (finished_by, sample) {
                self.metrics.processed(|| now.monotonic_ms.saturating_sub(grant.claimed_monotonic_ms));
            }
        } else {
            self.counters.released.add(count);
        }
        self.counters.superseded.add(accepted.iter().filter(|accepted| matches!(accepted, Ok(false))).count() as u64);
        self.wake_if_due();
        self.check_response_count(accepted, leases.len())
    }

    /// True if the token of a grant has completed its key, which is remembered: in this call, or before. `stored` is what the
    /// memtable holds of the key, `earlier` the tokens and answers of this call so far.
    #[cold]
    fn is_repeated<'a>(
        &self,
        grant: &Grant,
        stored: Option<Entry>,
        now: Now,
        earlier: impl DoubleEndedIterator<Item = (u64, &'a Result<bool>)> + ExactSizeIterator,
    ) -> Result<bool> {
        let is_done = |stored: Option<Entry>| machine::has_completed(stored.as_ref(), grant.token, now, self.policy);
        match (stored, grant.request.get(grant.index)) {
            (Some(Entry::Processing(_)), _) => {
                Ok(earlier.rev().any(|(token, accepted)| token == grant.token && matches!(accepted, Ok(true))))
            }
            (None, Some(key_ref)) => {
                let on_disk = self.look_up_on_disk_again(key_ref)?;
                self.with_locked_key(key_ref, &on_disk, |_, stored| is_done(stored))
            }
            (stored, _) => Ok(is_done(stored)),
        }
    }

    /// Renews a lease to its full length. False: superseded. Changes only memory.
    pub(crate) fn renew(&self, grant: &Grant) -> Result<bool> {
        self.renew_until(grant, u64::MAX)
    }

    /// As [`Engine::renew`], for automatic renewals: at most up to `renew_for` after the claim. Later it changes nothing, and
    /// returns whether the lease still has the key.
    pub(crate) fn keep_renewed(&self, grant: &Grant) -> Result<bool> {
        self.renew_until(grant, grant.claimed_monotonic_ms.saturating_add(self.config.renew_for_ms))
    }

    fn renew_until(&self, grant: &Grant, limit_ms: u64) -> Result<bool> {
        self.ready()?;
        let now = self.now();
        let full_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let renewed = self.change_holder(grant, now, |holder| holder.renewed(full_ms.min(limit_ms)));
        self.check_invariants()?;
        if !renewed {
            self.counters.superseded.add(1);
        }
        Ok(renewed)
    }

    /// How long a lease still excludes other holders.
    pub(crate) fn remaining_ms(&self, grant: &Grant) -> u64 {
        let now = self.now();
        let shard = self.memtable.shard(grant.digest());
        machine::remaining_ms(shard.get(grant.digest(), grant.key()).as_ref(), grant.token, now, self.policy)
    }

    /// Marks a lease as dropped without completion or release. Changes only memory.
    pub(crate) fn abandon(&self, grant: &Grant) {
        self.end_unwritten(grant, machine::interrupted(PriorAttempt::Dropped, self.policy.on_interrupt));
    }

    /// As [`Engine::abandon`], for a caller that waits for the answer. False: superseded.
    #[cfg(feature = "tokio")]
    pub(crate) fn interrupt(&self, grant: &Grant) -> Result<bool> {
        self.ready()?;
        let is_ours = self.end_unwritten(grant, machine::interrupted(PriorAttempt::Dropped, self.policy.on_interrupt));
        self.check_invariants()?;
        if !is_ours {
            self.counters.superseded.add(1);
        }
        Ok(is_ours)
    }

    /// Takes back a lease that no caller received, so that no work was done. Changes only memory: the next open counts it as
    /// crashed, unless a flush wrote it before.
    #[cfg(feature = "tokio")]
    pub(crate) fn take_back(&self, grant: &Grant) {
        self.end_unwritten(grant, machine::taken_back(grant.prior));
    }

    /// Ends a lease in memory and wakes its waiters. False: superseded. A lease that has ended already stays as it is.
    fn end_unwritten(&self, grant: &Grant, ended: Holder) -> bool {
        let now = self.timeline.now();
        let is_ours = self.change_holder(grant, now, |holder| Some(holder.ended(ended)));
        self.waiters.wake([grant.digest()]);
        is_ours
    }

    /// Changes the holder of a lease's key in memory. False if the lease is superseded or `change` returns `None`.
    fn change_holder(&self, grant: &Grant, now: Now, change: impl FnOnce(Holder) -> Option<Holder>) -> bool {
        let (digest, key) = (grant.digest(), grant.key());
        if self.require_key(key).is_err() {
            // The error has poisoned the store.
            return false;
        }
        let mut shard = self.memtable.shard(digest);
        let stored = shard.get(digest, key).filter(|stored| machine::may_finish(Some(stored), grant.token));
        let Some(Entry::Processing(processing)) = stored else { return false };
        let Some(holder) = change(processing.holder) else { return false };
        if holder == processing.holder {
            return true;
        }
        let changed = processing.with_holder(holder, now, self.policy);
        shard.set(digest, key, Entry::Processing(changed));
        drop(shard);
        self.wake_if_due();
        true
    }

    /// The grant of a held key, for its resolution, and how its attempt ended.
    pub(crate) fn held_grant(&self, request: &Arc<Request>) -> Result<Option<(Grant, PriorAttempt)>> {
        self.ready()?;
        let now = self.now();
        let key_ref = self.single_key(request)?;
        let shard = self.memtable.shard(key_ref.digest);
        let stored = shard.get(key_ref.digest, key_ref.key);
        self.check_invariants()?;
        let Some((processing, prior)) = machine::held(stored.as_ref(), now, self.policy) else { return Ok(None) };
        let grant = Grant {
            request: Arc::clone(request),
            index: key_ref.index,
            token: processing.token,
            attempt: processing.attempt,
            prior: Some(prior),
            fingerprint: processing.fingerprint,
            at_ms: processing.since_ms,
            claimed_monotonic_ms: 0,
        };
        Ok(Some((grant, prior)))
    }

    /// The key of a request that has one.
    fn single_key<'r>(&self, request: &'r Request) -> Result<KeyRef<'r>> {
        let none = || self.broken(Invariant::KeyInRequest, format_args!("the request has no key"));
        let key_ref = request.iter().next().ok_or_else(none)?;
        self.require_key(key_ref.key)?;
        Ok(key_ref)
    }

    /// Removes everything that is stored about a key. Returns whether something was stored that had not expired.
    pub(crate) fn forget(&self, request: &Request) -> Result<bool> {
        self.ready()?;
        // Excludes a flush, which could write the key to its bucket after the bucket's entry was deleted.
        let flush_lock = self.flush_lock.lock();
        self.reserve(1)?;
        let key_ref = self.single_key(request)?;
        let now = self.now();
        let snapshot = self.buckets.snapshot();
        let column_bits = snapshot.candidates(key_ref.digest);
        let probe = Probe { index: 0, digest: key_ref.digest, key: key_ref.key, column_bits };
        let (mut flushed, mut newest) = (Vec::new(), None::<Entry>);
        look_up(&self.db, &snapshot, &[probe], |_, bucket, entry| {
            newest = newest.take().filter(|newest| newest.token() > entry.token()).or(Some(entry));
            flushed.push(Arc::clone(bucket));
        })?;
        let mut shard = self.memtable.shard(key_ref.digest);
        let in_memory = shard.get(key_ref.digest, key_ref.key);
        self.check_forgettable(key_ref, in_memory.as_ref(), now)?;
        let existed = in_memory.as_ref().or(newest.as_ref()).is_some_and(|entry| self.is_live_at(entry, now));
        if let Some(entry) = &in_memory {
            // Until the record is written, other calls see the key as committing.
            let committing = Processing::removing(entry.token(), now);
            shard.set(key_ref.digest, key_ref.key, Entry::Processing(committing));
        }
        // Under the lock: the record's number is above those of the key's earlier records, and its token is below that of the
        // next claim. So a replay removes the old state and keeps a newer one.
        let open = self.begin_record();
        let token = self.sequence.take();
        drop(shard);
        self.check_invariants()?;
        if in_memory.is_none() && flushed.is_empty() {
            open.finish();
            return Ok(false);
        }
        let mut record = self.record_writer(RecordKind::Forgotten, now, key_ref.key.len() + 16);
        record.forgotten(key_ref.key, token);
        let mut entry_key = Vec::new();
        codec::put_entry_key(key_ref.digest, key_ref.key, &mut entry_key);
        Failpoint::ForgetBegun.pass();
        self.write(self.config.sync_results(), |tx| {
            tx.put_record(open.number(), record.finish());
            flushed.iter().for_each(|bucket| tx.delete_key(&bucket.family, &entry_key));
        })?;
        Failpoint::ForgetWritten.pass();
        let mut shard = self.memtable.shard(key_ref.digest);
        self.memtable.invalidate_recent(key_ref.digest);
        if shard.get(key_ref.digest, key_ref.key).is_some_and(|entry| entry.token() < token) {
            shard.remove(key_ref.digest, key_ref.key);
        }
        drop(shard);
        Failpoint::ForgetRemoved.pass();
        open.finish();
        // Released before the wakeup: a waker runs caller code.
        drop(flush_lock);
        self.waiters.wake([key_ref.digest]);
        Ok(existed)
    }

    /// Fails if a key is leased or held.
    fn check_forgettable(&self, key_ref: KeyRef<'_>, stored: Option<&Entry>, now: Now) -> Result<()> {
        let key = || Key::display_encoded(key_ref.key);
        match machine::check_forget(stored, now, self.policy) {
            Forget::Allowed => Ok(()),
            Forget::InUse { token } => Err(Error::InUse { key: key(), token: FencingToken::new(token) }),
            Forget::Undecided { token } => Err(Error::Undecided { key: key(), token: FencingToken::new(token) }),
        }
    }
}

/// The size of a finish in its record, or a few bytes more.
fn encoded_len(grant: &Grant, finish_kind: &FinishKind<'_>) -> usize {
    let encoded_len = match finish_kind {
        FinishKind::Complete { result, side_writes, .. } => {
            result.len() + side_writes.map_or(0, SideWrites::encoded_len)
        }
        FinishKind::Release { .. } => 0,
    };
    grant.key().len() + encoded_len + 16
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;
    use crate::config::{Durability, Options};
    use crate::engine::fixture::{claim, engine};
    use onlyonce_core::machine::Backoff;
    use onlyonce_core::{Claim, OnInterrupt, StoredResult};

    #[test]
    fn completions_are_synced_and_repeatable_work_is_not() {
        for (durability, on_interrupt, started, finished) in [
            (Durability::Disk, OnInterrupt::Rerun, 0, 1),
            (Durability::Disk, OnInterrupt::Hold, 1, 1),
            (Durability::Process, OnInterrupt::Hold, 0, 0),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&dir, &Options { durability, on_interrupt: Some(on_interrupt), ..Options::default() });
            let syncs_of = |what: &str, expected: u64, call: &dyn Fn()| {
                let before = engine.journal.syncs();
                call();
                assert_eq!(
                    engine.journal.syncs() - before,
                    expected,
                    "{what} under {durability:?} and {on_interrupt:?}"
                );
            };
            syncs_of("a claim", started, &|| drop(claim(&engine, "a")));
            let open = FinishKind::Release { prior: PriorAttempt::Released, backoff: Backoff::NONE };
            let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
            for (what, expected, kind, finish_kind) in [
                ("a release", started, RecordKind::Released, open),
                ("a completion", finished, RecordKind::Completed, done),
            ] {
                let grant = claim(&engine, what);
                syncs_of(what, expected, &|| {
                    let finished = engine.finish(kind, FinishedBy::Holder, vec![(&grant, finish_kind)]).unwrap();
                    assert!(matches!(finished[..], [Ok(true)]), "{finished:?}");
                });
            }
            let request = engine.request(["d"]).unwrap();
            syncs_of("a record", finished, &|| drop(engine.record(&request).unwrap()));
            syncs_of("forgetting", finished, &|| assert!(engine.forget(&request).unwrap()));
            syncs_of("an offset", finished, &|| engine.set_offset(b"s", 0, 1).unwrap());
        }
    }

    #[test]
    fn a_held_key_that_is_renewed_cannot_be_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let options = Options {
            clock: Arc::new(clock.clone()),
            on_interrupt: Some(OnInterrupt::Hold),
            lease: Duration::from_secs(1),
            ..Options::default()
        };
        let engine = engine(&dir, &options);
        let request = engine.request(["k"]).unwrap();
        let Ok(Claim::Acquired(grant)) = engine.claim(&request).unwrap().pop().unwrap() else { panic!("k is new") };
        clock.advance(Duration::from_secs(1));
        let (held, prior) = engine.held_grant(&request).unwrap().unwrap();
        // Between the two steps of a resolution.
        assert!(engine.renew(&grant).unwrap());
        let rerun = vec![(&held, FinishKind::Release { prior, backoff: Backoff::NONE })];
        let resolved = engine.finish(RecordKind::Released, FinishedBy::Operator, rerun).unwrap();
        assert!(matches!(resolved[..], [Ok(false)]), "{resolved:?}");
        assert!(matches!(engine.claim(&request).unwrap().pop(), Some(Ok(Claim::InProgress { .. }))));
    }

    #[test]
    fn the_size_of_a_completion_includes_its_key_result_and_side_writes() {
        let dir = tempfile::tempdir().unwrap();
        let grant = claim(&engine(&dir, &Options::default()), "a key");
        let open = FinishKind::Release { prior: PriorAttempt::Released, backoff: Backoff::NONE };
        let least = grant.key().len() + 16;
        assert_eq!(encoded_len(&grant, &open), least);
        assert_eq!(
            encoded_len(
                &grant,
                &FinishKind::Complete { result: StoredResult::Bytes(&[0; 100]), side_writes: None, follows: false }
            ),
            least + 100
        );
        let mut tx = SideWrites::default();
        tx.message("topic", "key", "payload");
        assert!(tx.encoded_len() > 15);
        let both =
            FinishKind::Complete { result: StoredResult::Bytes(&[0; 100]), side_writes: Some(&tx), follows: false };
        assert_eq!(encoded_len(&grant, &both), least + 100 + tx.encoded_len());
    }
}
