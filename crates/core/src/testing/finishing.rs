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
use crate::machine::{self, Attempt, Backoff, Entry, FinishedBy, Forget, PlainMoment, Processing};
use crate::timestamp::Timestamp;

impl State {
    pub(super) fn renew(&mut self, grant: &Grant) -> Result<()> {
        let full_ms = self.monotonic_ms().saturating_add(self.lease_ms);
        let leased = self.lease_of(grant).ok_or_else(|| grant.superseded())?;
        if let Entry::Processing(processing) = &mut leased.entry
            && let Some(holder) = processing.holder.renewed(full_ms)
        {
            processing.holder = holder;
        }
        Ok(())
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
        let (now, policy, token) = (self.now(), self.policy, grant.token().get());
        let stored = self.stored(&grant.key, now);
        match (machine::finishable(stored.as_ref(), token, FinishedBy::Holder, now, policy), finish) {
            (Some(processing), Finish::Complete(completion)) => {
                self.complete(grant, processing, completion, now, batch)
            }
            (Some(processing), Finish::Release(release)) => self.release(grant, processing, release, now),
            // Repeated: it is stored already, and so are its side writes.
            (None, Finish::Complete(_)) if machine::has_completed(stored.as_ref(), token, now, policy) => {}
            (None, finish) => {
                if matches!(finish, Finish::Complete(_)) {
                    batch.hold_back_offsets();
                }
                return Err(grant.superseded());
            }
        }
        Ok(())
    }

    fn complete(
        &mut self,
        grant: &Grant,
        processing: &Processing,
        completion: Completion,
        now: PlainMoment,
        batch: &mut Batch,
    ) {
        if let Some(side_writes) = completion.side_writes() {
            self.side_writes.store(side_writes, batch);
        }
        let attempt = Attempt { at_ms: grant.claimed_at.as_unix_ms(), ..attempt(processing) };
        let result = self.stored_result(completion.result());
        let done = attempt.completed(processing.own_window, result, now, self.policy);
        self.keys.insert(grant.key.clone(), Stored::new(Entry::Completed(done)));
    }

    fn stored_result(&self, result: &[u8]) -> StoredResult {
        StoredResult::within(result, self.config.result_limit).to_shared()
    }

    fn release(&mut self, grant: &Grant, processing: &Processing, release: Release, now: PlainMoment) {
        if release.may_have_happened && self.policy.on_interrupt == OnInterrupt::Hold {
            return self.abandon(grant);
        }
        // This attempt may have had no effect: whether an earlier one had is still open.
        let doubt = grant.attempt.prior().filter(|prior| prior.may_have_happened());
        let prior = doubt.unwrap_or(match release.may_have_happened {
            true => PriorAttempt::Dropped,
            false => PriorAttempt::Released,
        });
        let backoff = Backoff::from(now, release.backoff, self.policy.window_ms);
        let number = if release.reset_attempts { 0 } else { processing.attempt };
        let attempt = Attempt { attempt: number, ..attempt(processing) };
        let released = attempt.released(processing.own_window, FinishedBy::Holder, prior, backoff, now, self.policy);
        self.keys.insert(grant.key.clone(), Stored::new(Entry::Processing(released)));
    }

    /// Ends an attempt with unknown outcome. Only a lease can be dropped.
    pub(super) fn abandon(&mut self, grant: &Grant) {
        let (now, policy) = (self.now(), self.policy);
        let Some(leased) = self.lease_of(grant) else { return };
        if let Entry::Processing(processing) = &leased.entry {
            let dropped = machine::interrupted(PriorAttempt::Dropped, policy.on_interrupt);
            *leased = Stored::new(Entry::Processing(processing.clone().with_holder(dropped, now, policy)));
        }
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

    pub(super) fn resolve(&mut self, key: Key<'static>, resolution: Resolution) -> Result<()> {
        self.check_stored_key(&key)?;
        let (now, policy) = (self.now(), self.policy);
        let stored = self.stored(&key, now);
        let Some((processing, prior)) = machine::held(stored.as_ref(), now, policy) else {
            return Err(Error::NotHeld { key: key.to_string() });
        };
        let (attempt, own_window) = (attempt(processing), processing.own_window);
        let entry = match resolution {
            Resolution::Rerun => {
                Entry::Processing(attempt.released(own_window, FinishedBy::Operator, prior, Backoff::NONE, now, policy))
            }
            // With a token of its own, so that the old holder's late completion fails.
            Resolution::Completed(result) => {
                let attempt = Attempt { token: self.next_token(), ..attempt };
                Entry::Completed(attempt.completed(own_window, self.stored_result(&result), now, policy))
            }
        };
        self.keys.insert(key, Stored::new(entry));
        Ok(())
    }

    pub(super) fn forget(&mut self, key: &Key<'static>) -> Result<bool> {
        self.check_stored_key(key)?;
        let now = self.now();
        let stored = self.stored(key, now);
        let name = || key.to_string();
        match machine::check_forget(stored.as_ref(), now, self.policy) {
            Forget::Allowed => {}
            Forget::InUse { token } => return Err(Error::InUse { key: name(), token: FencingToken::new(token) }),
            Forget::Undecided { token } => {
                return Err(Error::Undecided { key: name(), token: FencingToken::new(token) });
            }
        }
        self.keys.remove(key);
        Ok(stored.is_some_and(|entry| machine::counts(&entry, now, self.policy)))
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

/// The attempt of an entry.
fn attempt(processing: &Processing) -> Attempt {
    let Processing { token, attempt, fingerprint, since_ms: at_ms, .. } = *processing;
    Attempt { token, attempt, fingerprint, at_ms }
}
