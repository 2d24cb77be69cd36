//! Ending what a claim began: a completion takes effect only when its row is written.

use std::sync::Arc;

use super::answer::{Grant, Settlement, Settler, display};
use super::engine::Engine;
use super::page::Pending;
use super::request::{Asked, Request};
use super::transition::{self, Standing};
use crate::bucket::set::{Probe, look_up};
use crate::clock::Now;
use crate::codec::{self, RowKind};
use crate::entry::{Done, Entry, Holder, Prior, Processing};
use crate::error::{Error, Result};
use crate::invariant::Invariant;
use crate::kill_point::KillPoint;
use crate::meter::Call;
use crate::tx::Tx;

impl Engine {
    /// Settles leases. One row a kind of settlement, whatever their number; each answer is its lease's. `Ok(false)`:
    /// superseded.
    pub(crate) fn settle(
        &self,
        kind: RowKind,
        settler: Settler,
        leases: Vec<(&Grant, Settlement<'_>)>,
    ) -> Result<Vec<bool>> {
        let completes = kind == RowKind::Completed;
        let _timer = self.meter.call(if completes { Call::Complete } else { Call::Release }, leases.len());
        let bytes = leases.iter().map(|(grant, settlement)| brought(grant, settlement)).sum();
        self.admit(0, bytes)?;
        let now = self.now();
        let open = self.begin_row();
        let mut row = self.row(kind, now, bytes);
        let mut accepted = Vec::with_capacity(leases.len());
        let mut taken = Vec::new();
        // An offset says that all before it is done: behind a lease of its batch that was overtaken it would say too much.
        let mut unbroken = true;
        for (grant, settlement) in &leases {
            let follows = matches!(settlement, Settlement::Completed(_, Some(tx)) if tx.follows);
            unbroken |= !follows;
            let (digest, key) = (grant.digest(), grant.key());
            self.has_key(key)?;
            let mut stripe = self.hot.stripe(digest);
            let stored = stripe.get(digest, key);
            let may = match (settler, &stored) {
                (Settler::Operator, Some(Entry::Processing(processing))) => {
                    matches!(self.standing_at(processing, now), Standing::Held(_))
                }
                _ => true,
            };
            let is_ours = may && transition::may_settle(stored.as_ref(), grant.token);
            accepted.push(is_ours);
            if !is_ours {
                unbroken = false;
                continue;
            }
            let Grant { token, attempt, fingerprint, at_ms, .. } = **grant;
            // Also where the store's time came back meanwhile: a later state of a key is never in an earlier bucket.
            let time_ms = if self.policy.is_stream { at_ms } else { now.time_ms.max(at_ms) };
            let entry = match *settlement {
                Settlement::Completed(result, tx) => {
                    taken.extend(tx.map(|tx| (tx, unbroken)));
                    let done = Done { token, completed_ms: time_ms, fingerprint, result };
                    row.completed(key, &done);
                    Entry::Completed(done)
                }
                Settlement::Open { prior, backoff } => {
                    let holder = match settler {
                        Settler::Holder => Holder::Open { prior, backoff },
                        Settler::Operator => Holder::Resolved(prior),
                    };
                    let fingerprint = transition::binding(fingerprint, prior);
                    let open = Processing { token, attempt, since_ms: time_ms, fingerprint, holder };
                    row.processing(key, &open);
                    Entry::Processing(open)
                }
            };
            stripe.settle(digest, key, entry, Pending { row: open.number(), attempt, holder: Holder::Settling });
        }
        let sync = if completes { self.config.sync_results() } else { self.config.sync_claims() };
        let count = accepted.iter().filter(|accepted| **accepted).count() as u64;
        self.append_with(open, row, &taken, sync)?;
        self.waiting.wake(leases.iter().map(|(grant, _)| grant.digest()));
        if completes {
            self.counters.completed.add(count);
            // One of a call: for all of them it would cost too much.
            let sample = leases.iter().zip(&accepted).find(|(_, accepted)| **accepted);
            if let (Settler::Holder, Some(((grant, _), _))) = (settler, sample) {
                self.meter.processed(|| now.monotonic_ms.saturating_sub(grant.claimed_monotonic_ms));
            }
        } else {
            self.counters.released.add(count);
        }
        self.counters.superseded.add((accepted.len() as u64).saturating_sub(count));
        self.wake_if_due();
        self.answered(accepted, leases.len())
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
        let stripe = self.hot.stripe(grant.digest());
        match stripe.get(grant.digest(), grant.key()) {
            Some(Entry::Processing(processing)) if processing.token == grant.token => {
                match self.standing_at(&processing, now) {
                    Standing::Alive { remaining_ms } => remaining_ms,
                    _ => 0,
                }
            }
            _ => 0,
        }
    }

    /// Notes that a lease was dropped without a word. Costs no write.
    pub(crate) fn abandon(&self, grant: &Grant) {
        self.leave(grant, transition::interrupted(Prior::Dropped, self.policy.on_interrupt));
    }

    /// Takes back a lease that reached nobody: nothing was done with it. Costs no write, so that the next opening counts it as
    /// one that crashed, unless a flush came between.
    #[cfg(feature = "tokio")]
    pub(crate) fn take_back(&self, grant: &Grant) {
        self.leave(grant, Holder::Open { prior: grant.prior.unwrap_or(Prior::Released), backoff: Default::default() });
    }

    fn leave(&self, grant: &Grant, left: Holder) {
        let now = self.timeline.now();
        self.change_holder(grant, now, |holder| matches!(holder, Holder::Leased { .. }).then_some(left));
        self.waiting.wake([grant.digest()]);
    }

    fn change_holder(&self, grant: &Grant, now: Now, change: impl FnOnce(Holder) -> Option<Holder>) -> bool {
        let (digest, key) = (grant.digest(), grant.key());
        if self.has_key(key).is_err() {
            // The store is poisoned by it.
            return false;
        }
        let mut stripe = self.hot.stripe(digest);
        let stored = stripe.get(digest, key).filter(|stored| transition::may_settle(Some(stored), grant.token));
        let Some(Entry::Processing(processing)) = stored else { return false };
        let Some(holder) = change(processing.holder) else { return false };
        if holder == processing.holder {
            return true;
        }
        let since_ms = self.left_at(&processing, now);
        let fingerprint = match holder {
            Holder::Open { prior, .. } => transition::binding(processing.fingerprint, prior),
            _ => processing.fingerprint,
        };
        let left = Processing { since_ms, holder, fingerprint, ..processing };
        stripe.set(digest, key, Entry::Processing(left));
        drop(stripe);
        self.wake_if_due();
        true
    }

    /// The grant of a key that is held, as if its holder had come back.
    pub(crate) fn held_grant(&self, request: &Arc<Request>) -> Result<Option<(Grant, Prior)>> {
        self.ready()?;
        let now = self.now();
        let asked = self.only_key(request)?;
        let stripe = self.hot.stripe(asked.digest);
        let stored = stripe.get(asked.digest, asked.key);
        self.unbroken()?;
        let Some(Entry::Processing(processing)) = stored else { return Ok(None) };
        let Standing::Held(prior) = self.standing_at(&processing, now) else { return Ok(None) };
        let grant = Grant {
            request: Arc::clone(request),
            place: asked.place,
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
    fn only_key<'r>(&self, request: &'r Request) -> Result<Asked<'r>> {
        let none = || self.broken(Invariant::KeyInRequest, format_args!("a request about one key has none"));
        let asked = request.iter().next().ok_or_else(none)?;
        self.has_key(asked.key)?;
        Ok(asked)
    }

    /// Removes all that is stored of a key: true if there was something that counted.
    pub(crate) fn forget(&self, request: &Request) -> Result<bool> {
        // A seal under way would bring the key back into its bucket.
        let sealing = self.sealing.lock();
        self.reserve(1)?;
        let asked = self.only_key(request)?;
        let now = self.now();
        let view = self.buckets.view();
        let slots = view.candidates(asked.digest);
        let probe = Probe { place: 0, digest: asked.digest, key: asked.key, slots };
        let (mut sealed, mut counted) = (Vec::new(), false);
        look_up(&self.db, &view, &[probe], |_, bucket, entry| {
            counted |= self.counts_now(&entry, now);
            sealed.push(Arc::clone(bucket));
        })?;
        let mut stripe = self.hot.stripe(asked.digest);
        let hot = stripe.get(asked.digest, asked.key);
        if let Some(Entry::Processing(processing)) = &hot {
            match self.standing_at(processing, now) {
                Standing::Alive { .. } | Standing::Settling => {
                    return Err(Error::InUse { key: display(asked.key), token: processing.token });
                }
                // Without its entry the next claim would not learn that its effect may have happened.
                Standing::Held(_) => return Err(Error::Undecided { key: display(asked.key), token: processing.token }),
                _ => {}
            }
        }
        counted |= hot.as_ref().is_some_and(|entry| self.counts_now(entry, now));
        if let Some(entry) = &hot {
            // Whoever comes between now and the row sees work that is nearly over.
            let settling = Processing {
                token: entry.token(),
                attempt: 1,
                since_ms: now.time_ms,
                fingerprint: None,
                holder: Holder::Settling,
            };
            stripe.set(asked.digest, asked.key, Entry::Processing(settling));
        }
        // Under the lock: behind every row of what is forgotten here, and below the token of whoever claims the key next.
        let open = self.begin_row();
        let token = self.sequence.take();
        drop(stripe);
        self.unbroken()?;
        if hot.is_none() && sealed.is_empty() {
            open.finish();
            return Ok(false);
        }
        let mut row = self.row(RowKind::Forgotten, now, asked.key.len() + 16);
        row.forgotten(asked.key, token);
        let row = row.finish();
        let mut row_key = Vec::new();
        codec::row_key(asked.digest, asked.key, &mut row_key);
        KillPoint::ForgetBegun.pass();
        self.write(self.config.sync_results(), |tx| {
            tx.put_row(open.number(), &row);
            for bucket in &sealed {
                tx.delete_key(&bucket.family, &row_key);
            }
            Ok(())
        })?;
        KillPoint::ForgetWritten.pass();
        self.count_row(row.len());
        let mut stripe = self.hot.stripe(asked.digest);
        self.hot.forget_recent(asked.digest);
        if stripe.get(asked.digest, asked.key).is_some_and(|entry| entry.token() < token) {
            stripe.remove(asked.digest, asked.key);
        }
        drop(stripe);
        KillPoint::ForgetTaken.pass();
        open.finish();
        // A waker may run code of its own.
        drop(sealing);
        self.waiting.wake([asked.digest]);
        Ok(counted)
    }
}

/// What a settlement brings to its row, in bytes or a few more.
fn brought(grant: &Grant, settlement: &Settlement<'_>) -> usize {
    let brought = match settlement {
        Settlement::Completed(result, taken) => result.len() + taken.map_or(0, Tx::len),
        Settlement::Open { .. } => 0,
    };
    grant.key().len() + brought + 16
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Durability, OnInterrupt, Options};
    use crate::entry::{Backoff, Kept};
    use crate::state::answer::Claimed;
    use crate::storage::directory::Directory;

    fn engine(dir: &tempfile::TempDir, options: &Options) -> Engine {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Engine::open(directory, options).unwrap()
    }

    fn claim(engine: &Engine, key: &str) -> Grant {
        match engine.claim(&engine.request([key]).unwrap()).unwrap().pop().unwrap() {
            Ok(Claimed::Acquired(grant)) => grant,
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
            let open = Settlement::Open { prior: Prior::Released, backoff: Backoff::NONE };
            let done = Settlement::Completed(Kept::Absent, None);
            for (what, expected, kind, settlement) in
                [("a release", started, RowKind::Settled, open), ("a completion", finished, RowKind::Completed, done)]
            {
                let grant = claim(&engine, what);
                syncs_of(what, expected, &|| {
                    assert_eq!(engine.settle(kind, Settler::Holder, vec![(&grant, settlement)]).unwrap(), [true]);
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
        let open = Settlement::Open { prior: Prior::Released, backoff: Backoff::NONE };
        let least = grant.key().len() + 16;
        assert_eq!(brought(&grant, &open), least);
        assert_eq!(brought(&grant, &Settlement::Completed(Kept::Stored(&[0; 100]), None)), least + 100);
        let mut tx = Tx::default();
        tx.enqueue("topic", "key", "bytes");
        assert!(tx.len() > 13);
        let both = Settlement::Completed(Kept::Stored(&[0; 100]), Some(&tx));
        assert_eq!(brought(&grant, &both), least + 100 + tx.len());
    }
}
