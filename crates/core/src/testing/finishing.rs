//! What happens to a lease and to the key of one: renewal, completion, release, drop, resolution.

use std::sync::Arc;

use super::entry::Stored;
use super::side_writes::Batch;
use super::state::State;
use crate::answer::{HeldKey, OnInterrupt, Resolution, StoredResult};
use crate::attempt::{FencingToken, PriorAttempt};
use crate::completion::Completion;
use crate::engine::{Finish, Grant, Release};
use crate::error::{Error, Result};
use crate::key::Key;
use crate::machine::{
    self, Abandon, Abandoned, Attempt, Backoff, Complete, Finished, FinishedBy, Forget, Forgotten, Processing, Renew,
};
use crate::timestamp::Timestamp;

impl State {
    pub(super) fn renew(&mut self, grant: &Grant) -> Result<()> {
        let now = self.now();
        let until_monotonic_ms = now.monotonic_ms.saturating_add(self.lease_ms);
        let renew = Renew { token: grant.token().get(), until_monotonic_ms };
        self.execute(&grant.key, renew, now, |_, is_ours| is_ours.then_some(()).ok_or_else(|| grant.superseded()))
    }

    /// The key of a grant's lease, also if that expired. `None` if it was finished, dropped, taken over or resolved.
    pub(super) fn lease_of(&mut self, grant: &Grant) -> Option<&mut Stored> {
        let stored = self.keys.get_mut(&grant.key)?;
        let is_lease = stored.entry.token() == grant.token().get() && stored.leased_until_ms().is_some();
        is_lease.then_some(stored)
    }

    pub(super) fn finish(&mut self, leases: Vec<(Arc<Grant>, Finish)>) -> Vec<Result<()>> {
        let mut batch = self.side_writes.begin();
        leases.into_iter().map(|(grant, finish)| self.finish_one(&grant, finish, &mut batch)).collect()
    }

    /// The token decides, never the clock: to reject a late holder that no other has overtaken would only cause a duplicate.
    fn finish_one(&mut self, grant: &Grant, finish: Finish, batch: &mut Batch) -> Result<()> {
        match finish {
            Finish::Complete(completion) => self.complete(grant, &completion, batch),
            Finish::Release(release) => self.release(grant, release),
        }
    }

    fn complete(&mut self, grant: &Grant, completion: &Completion, batch: &mut Batch) -> Result<()> {
        let result = self.stored_result(completion.result());
        let complete = Complete { attempt: attempt(grant), by: FinishedBy::Holder, result };
        let finished = self.execute(&grant.key, complete, self.now(), |_, finished| Ok(finished))?;
        match (finished, completion.side_writes()) {
            (Finished::Accepted, Some(side_writes)) => self.side_writes.store(side_writes, batch),
            // If it is repeated, its side writes are stored already.
            (Finished::Accepted, None) | (Finished::Repeated, _) => {}
            (Finished::Committing | Finished::Superseded, _) => {
                batch.hold_back_offsets();
                return Err(grant.superseded());
            }
        }
        Ok(())
    }

    fn stored_result(&self, result: &[u8]) -> StoredResult {
        StoredResult::within(result, self.config.result_limit).to_shared()
    }

    fn release(&mut self, grant: &Grant, release: Release) -> Result<()> {
        let now = self.now();
        let superseded = || grant.superseded();
        if release.may_have_happened && self.policy.on_interrupt == OnInterrupt::Hold {
            return self.drop_lease(grant).then_some(()).ok_or_else(superseded);
        }
        // This attempt may have had no effect: whether an earlier one had is still open.
        let doubt = grant.attempt.prior().filter(|prior| prior.may_have_happened());
        let prior = doubt.unwrap_or(match release.may_have_happened {
            true => PriorAttempt::Dropped,
            false => PriorAttempt::Released,
        });
        let backoff = Backoff::from(now, release.backoff, self.policy.window_ms);
        let mut attempt = attempt(grant);
        if release.reset_attempts {
            attempt.attempt = 0;
        }
        let release = machine::Release { attempt, by: FinishedBy::Holder, prior, backoff };
        let finished = self.execute(&grant.key, release, now, |_, finished| Ok(finished))?;
        (finished == Finished::Accepted).then_some(()).ok_or_else(superseded)
    }

    /// Ends an attempt with unknown outcome. Only a lease can be dropped.
    pub(super) fn abandon(&mut self, grant: &Grant) {
        self.drop_lease(grant);
    }

    fn drop_lease(&mut self, grant: &Grant) -> bool {
        let abandon = Abandon { token: grant.token().get(), outcome: Abandoned::Unknown };
        self.execute(&grant.key, abandon, self.now(), |_, is_ours| Ok(is_ours)).unwrap_or(false)
    }

    pub(super) fn held(&self) -> Vec<HeldKey> {
        let now = self.now();
        let held = |(key, stored): (&Key<'static>, &Stored)| {
            let entry = stored.at(now, self.lease_ms);
            let (Processing { token, attempt, since_ms, .. }, prior) = machine::held(Some(&entry), now, self.policy)?;
            let (token, since) = (FencingToken::new(*token), Timestamp::from_unix_ms(*since_ms));
            Some(HeldKey::new(key.clone(), token, *attempt, prior, since))
        };
        let mut held: Vec<HeldKey> = self.keys.iter().filter_map(held).collect();
        held.sort_by_key(|held| held.token);
        held
    }

    pub(super) fn resolve(&mut self, key: &Key<'static>, resolution: Resolution) -> Result<()> {
        self.check_stored_key(key)?;
        let (now, by) = (self.now(), FinishedBy::Operator);
        let stored = self.stored(key, now);
        let Some((processing, prior)) = machine::held(stored.as_ref(), now, self.policy) else {
            return Err(Error::NotHeld { key: key.to_string() });
        };
        let Processing { token, attempt, fingerprint, since_ms: at_ms, .. } = *processing;
        let attempt = Attempt { token, attempt, fingerprint, at_ms };
        match resolution {
            Resolution::Rerun => {
                let rerun = machine::Release { attempt, by, prior, backoff: Backoff::NONE };
                self.execute(key, rerun, now, |_, _| Ok(()))
            }
            Resolution::Completed(result) => {
                let complete = Complete { attempt, by, result: self.stored_result(&result) };
                self.execute(key, complete, now, |_, _| Ok(()))
            }
        }
    }

    pub(super) fn forget(&mut self, key: &Key<'static>) -> Result<bool> {
        self.check_stored_key(key)?;
        let now = self.now();
        self.execute(key, Forget, now, |_, forgotten| match forgotten {
            Forgotten::Removed { counted } => Ok(counted),
            Forgotten::InUse { token } => Err(Error::InUse { key: key.to_string(), token: FencingToken::new(token) }),
            Forgotten::Undecided { token } => {
                Err(Error::Undecided { key: key.to_string(), token: FencingToken::new(token) })
            }
        })
    }

    /// Ends the lease of a key, and its renewal. False if it has none.
    pub(super) fn expire_lease(&mut self, key: &Key<'static>) -> bool {
        let monotonic_ms = self.monotonic_ms();
        let leased = self.keys.get_mut(key).and_then(|stored| Some((stored.leased_until_ms()?, stored)));
        let Some((until_ms, stored)) = leased else { return false };
        stored.set_leased_until(until_ms.min(monotonic_ms));
        stored.keepers.clear();
        true
    }

    /// Ends the renewal of all leases.
    pub(super) fn stop_renewals(&mut self) {
        let until_ms = self.monotonic_ms().saturating_add(self.lease_ms);
        for stored in self.keys.values_mut().filter(|stored| !stored.keepers.is_empty()) {
            stored.set_leased_until(until_ms);
            stored.keepers.clear();
        }
    }
}

/// The attempt of a grant.
fn attempt(grant: &Grant) -> Attempt {
    Attempt {
        token: grant.token().get(),
        attempt: grant.attempt.number(),
        fingerprint: grant.key.payload_fingerprint().copied(),
        at_ms: grant.claimed_at.as_unix_ms(),
    }
}
