//! Ending what a claim began: a completion takes effect only when its row is written.

use std::sync::Arc;

use super::core::Engine;
use super::request::{KeyRef, Request};
use super::response::{FinishKind, FinishedBy, Grant};
use super::transition::{self, LeaseState};
use crate::buckets::registry::{Probe, look_up};
use crate::clock::Now;
use crate::codec::{self, RecordKind};
use crate::entry::{CompletedEntry, Entry, Holder, OwnWindow, Processing};
use crate::invariant::Invariant;
use crate::memtable::arena::Pending;
use crate::metrics::Call;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::PriorAttempt;
use onlyonce_core::{Error, FencingToken, Key, Result, SideWrites};

impl Engine {
    /// Settles leases. One row a kind of settlement, whatever their number; each answer is its lease's. `Ok(false)`:
    /// superseded. An error is about its lease alone.
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
        // An offset says that all before it is done: behind a lease of its batch that was overtaken it would say too much.
        let mut is_contiguous = true;
        for (grant, finish_kind) in &leases {
            let follows = matches!(finish_kind, FinishKind::Complete { follows: true, .. });
            is_contiguous |= !follows;
            let (digest, key) = (grant.digest(), grant.key());
            self.has_key(key)?;
            let mut shard = self.memtable.shard(digest);
            let stored = shard.get(digest, key);
            let may = match (finished_by, &stored) {
                (FinishedBy::Operator, Some(Entry::Processing(processing))) => {
                    matches!(self.lease_state_at(processing, now), LeaseState::Held(_))
                }
                _ => true,
            };
            let own_window = match &stored {
                Some(Entry::Processing(processing)) if may && transition::may_finish(stored.as_ref(), grant.token) => {
                    processing.own_window
                }
                _ => {
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
            // One of a call: for all of them it would cost too much.
            sample = sample.or(Some(*grant));
            let Grant { token, attempt, fingerprint, at_ms, .. } = **grant;
            // Also where the store's time came back meanwhile: a later state of a key is never in an earlier bucket.
            let time_ms = if self.policy.is_stream { at_ms } else { now.time_ms.max(at_ms) };
            let entry = match *finish_kind {
                FinishKind::Complete { result, side_writes: own, .. } => {
                    side_writes.extend(own.map(|own| (own, is_contiguous)));
                    // With a token of its own, so that the old holder's late completion is no repeated one.
                    let token = if finished_by == FinishedBy::Operator { self.sequence.take() } else { token };
                    let done = CompletedEntry { token, completed_ms: time_ms, fingerprint, own_window, result };
                    record.completed(key, &done);
                    Entry::Completed(done)
                }
                FinishKind::Release { prior, backoff } => {
                    let holder = match finished_by {
                        FinishedBy::Holder => Holder::Released { prior, backoff },
                        FinishedBy::Operator => Holder::Resolved(prior),
                    };
                    let fingerprint = transition::binding(fingerprint, prior);
                    let open = Processing { token, attempt, since_ms: time_ms, fingerprint, own_window, holder };
                    record.processing(key, &open);
                    Entry::Processing(open)
                }
            };
            shard.set_pending(
                digest,
                key,
                entry,
                Pending { record: open.number(), attempt, holder: Holder::Committing },
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
        let is_done = |stored: Option<Entry>| {
            matches!(stored, Some(Entry::Completed(done))
                if done.token == grant.token && done.is_live(now, self.policy.window_ms))
        };
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

    /// Gives a lease its full time again. False: superseded. Costs no write: a lease ends with its process anyway.
    pub(crate) fn renew(&self, grant: &Grant) -> Result<bool> {
        self.renew_until(grant, u64::MAX)
    }

    /// As [`Engine::renew`], while the work runs: no longer than `renew_for` after the claim. After that it changes nothing,
    /// and says whether the key is still the lease's.
    pub(crate) fn keep_renewed(&self, grant: &Grant) -> Result<bool> {
        self.renew_until(grant, grant.claimed_monotonic_ms.saturating_add(self.config.renew_for_ms))
    }

    fn renew_until(&self, grant: &Grant, limit_ms: u64) -> Result<bool> {
        self.ready()?;
        let now = self.now();
        let full_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let renewed = self.change_holder(grant, now, |holder| match holder {
            Holder::Leased { until_monotonic_ms } => {
                Some(Holder::Leased { until_monotonic_ms: until_monotonic_ms.max(full_ms.min(limit_ms)) })
            }
            // It was resolved to run again: the journal says so, and a renewal, which it does not see, cannot undo it. Or
            // its lease was dropped.
            _ => None,
        });
        self.unbroken()?;
        if !renewed {
            self.counters.superseded.add(1);
        }
        Ok(renewed)
    }

    /// How long nobody else can get the key of a lease.
    pub(crate) fn remaining_ms(&self, grant: &Grant) -> u64 {
        let now = self.now();
        let shard = self.memtable.shard(grant.digest());
        match shard.get(grant.digest(), grant.key()) {
            Some(Entry::Processing(processing)) if processing.token == grant.token => {
                match self.lease_state_at(&processing, now) {
                    LeaseState::Active { remaining_ms } => remaining_ms,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Notes that a lease was dropped without a word. Costs no write.
    pub(crate) fn abandon(&self, grant: &Grant) {
        self.leave(grant, transition::interrupted(PriorAttempt::Dropped, self.policy.on_interrupt));
    }

    /// As [`Engine::abandon`], for a caller that waits for the answer. False: superseded.
    #[cfg(feature = "tokio")]
    pub(crate) fn interrupt(&self, grant: &Grant) -> Result<bool> {
        self.ready()?;
        let is_ours = self.leave(grant, transition::interrupted(PriorAttempt::Dropped, self.policy.on_interrupt));
        self.unbroken()?;
        if !is_ours {
            self.counters.superseded.add(1);
        }
        Ok(is_ours)
    }

    /// Takes back a lease that reached nobody: nothing was done with it. Costs no write, so that the next opening counts it as
    /// one that crashed, unless a flush came between.
    #[cfg(feature = "tokio")]
    pub(crate) fn take_back(&self, grant: &Grant) {
        self.leave(
            grant,
            Holder::Released { prior: grant.prior.unwrap_or(PriorAttempt::Released), backoff: Default::default() },
        );
    }

    /// False if the grant was taken over. A holder that has left already leaves nothing more.
    fn leave(&self, grant: &Grant, left: Holder) -> bool {
        let now = self.timeline.now();
        let leave = |holder| Some(if matches!(holder, Holder::Leased { .. }) { left } else { holder });
        let is_ours = self.change_holder(grant, now, leave);
        self.waiters.wake([grant.digest()]);
        is_ours
    }

    fn change_holder(&self, grant: &Grant, now: Now, change: impl FnOnce(Holder) -> Option<Holder>) -> bool {
        let (digest, key) = (grant.digest(), grant.key());
        if self.has_key(key).is_err() {
            // The store is poisoned by it.
            return false;
        }
        let mut shard = self.memtable.shard(digest);
        let stored = shard.get(digest, key).filter(|stored| transition::may_finish(Some(stored), grant.token));
        let Some(Entry::Processing(processing)) = stored else { return false };
        let Some(holder) = change(processing.holder) else { return false };
        if holder == processing.holder {
            return true;
        }
        let since_ms = self.next_since_ms(&processing, now);
        let fingerprint = match holder {
            Holder::Released { prior, .. } => transition::binding(processing.fingerprint, prior),
            _ => processing.fingerprint,
        };
        let left = Processing { since_ms, holder, fingerprint, ..processing };
        shard.set(digest, key, Entry::Processing(left));
        drop(shard);
        self.wake_if_due();
        true
    }

    /// The grant of a key that is held, as if its holder had come back.
    pub(crate) fn held_grant(&self, request: &Arc<Request>) -> Result<Option<(Grant, PriorAttempt)>> {
        self.ready()?;
        let now = self.now();
        let key_ref = self.only_key(request)?;
        let shard = self.memtable.shard(key_ref.digest);
        let stored = shard.get(key_ref.digest, key_ref.key);
        self.unbroken()?;
        let Some(Entry::Processing(processing)) = stored else { return Ok(None) };
        let LeaseState::Held(prior) = self.lease_state_at(&processing, now) else { return Ok(None) };
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

    /// The key of a request that is about one.
    fn only_key<'r>(&self, request: &'r Request) -> Result<KeyRef<'r>> {
        let none = || self.broken(Invariant::KeyInRequest, format_args!("a request about one key has none"));
        let key_ref = request.iter().next().ok_or_else(none)?;
        self.has_key(key_ref.key)?;
        Ok(key_ref)
    }

    /// Removes all that is stored of a key: true if there was something that counted.
    pub(crate) fn forget(&self, request: &Request) -> Result<bool> {
        // A seal under way would bring the key back into its bucket.
        let flush_lock = self.flush_lock.lock();
        self.reserve(1)?;
        let key_ref = self.only_key(request)?;
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
        if let Some(Entry::Processing(processing)) = &in_memory {
            match self.lease_state_at(processing, now) {
                LeaseState::Active { .. } | LeaseState::Committing => {
                    return Err(Error::InUse {
                        key: Key::display_encoded(key_ref.key),
                        token: FencingToken::new(processing.token),
                    });
                }
                // Without its entry the next claim would not learn that its effect may have happened.
                LeaseState::Held(_) => {
                    return Err(Error::Undecided {
                        key: Key::display_encoded(key_ref.key),
                        token: FencingToken::new(processing.token),
                    });
                }
                _ => {}
            }
        }
        let counted = in_memory.as_ref().or(newest.as_ref()).is_some_and(|entry| self.counts_now(entry, now));
        if let Some(entry) = &in_memory {
            // Whoever comes between now and the row sees work that is nearly over.
            let committing = Processing {
                token: entry.token(),
                attempt: 1,
                since_ms: now.time_ms,
                fingerprint: None,
                own_window: OwnWindow::NONE,
                holder: Holder::Committing,
            };
            shard.set(key_ref.digest, key_ref.key, Entry::Processing(committing));
        }
        // Under the lock: behind every row of what is forgotten here, and below the token of whoever claims the key next.
        let open = self.begin_record();
        let token = self.sequence.take();
        drop(shard);
        self.unbroken()?;
        if in_memory.is_none() && flushed.is_empty() {
            open.finish();
            return Ok(false);
        }
        let mut record = self.record_writer(RecordKind::Forgotten, now, key_ref.key.len() + 16);
        record.forgotten(key_ref.key, token);
        let record = record.finish();
        let mut entry_key = Vec::new();
        codec::put_entry_key(key_ref.digest, key_ref.key, &mut entry_key);
        Failpoint::ForgetBegun.pass();
        self.write(self.config.sync_results(), |tx| {
            tx.put_record(open.number(), &record);
            for bucket in &flushed {
                tx.delete_key(&bucket.family, &entry_key);
            }
            Ok(())
        })?;
        Failpoint::ForgetWritten.pass();
        self.count_record_bytes(record.len());
        let mut shard = self.memtable.shard(key_ref.digest);
        self.memtable.invalidate_recent(key_ref.digest);
        if shard.get(key_ref.digest, key_ref.key).is_some_and(|entry| entry.token() < token) {
            shard.remove(key_ref.digest, key_ref.key);
        }
        drop(shard);
        Failpoint::ForgetRemoved.pass();
        open.finish();
        // A waker may run code of its own.
        drop(flush_lock);
        self.waiters.wake([key_ref.digest]);
        Ok(counted)
    }
}

/// What a settlement brings to its row, in bytes or a few more.
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
    use crate::config::{Durability, Options};
    use crate::entry::Backoff;
    use crate::fs::directory::Directory;
    use onlyonce_core::{Claim, OnInterrupt, StoredResult};

    fn engine(dir: &tempfile::TempDir, options: &Options) -> Engine {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Engine::open(directory, options).unwrap()
    }

    fn claim(engine: &Engine, key: &str) -> Grant {
        match engine.claim(&engine.request([key]).unwrap()).unwrap().pop().unwrap() {
            Ok(Claim::Acquired(grant)) => grant,
            other => panic!("{key}: {other:?}"),
        }
    }

    #[test]
    fn what_is_finished_waits_for_the_disk_and_what_may_be_repeated_does_not() {
        for (durability, on_interrupt, started, finished) in [
            (Durability::Disk, OnInterrupt::Rerun, 0, 1),
            (Durability::Disk, OnInterrupt::Hold, 1, 1),
            (Durability::Process, OnInterrupt::Hold, 0, 0),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(&dir, &Options { durability, on_interrupt: Some(on_interrupt), ..Options::default() });
            let syncs_of = |what: &str, expected: u64, call: &dyn Fn()| {
                let before = engine.db.syncs();
                call();
                assert_eq!(engine.db.syncs() - before, expected, "{what} under {durability:?} and {on_interrupt:?}");
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
    fn a_settlement_brings_its_key_its_result_and_what_it_takes_along() {
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
