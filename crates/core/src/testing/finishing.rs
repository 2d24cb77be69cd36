//! What happens to a lease and to the key of one: renewal, completion, release, drop, resolution.

use std::sync::Arc;

use super::entry::{Done, Entry, Holder, Lease, Now, Processing};
use super::side_writes::Batch;
use super::state::{State, millis};
use crate::answer::{HeldKey, LeaseState, OnInterrupt, Resolution, StoredResult};
use crate::attempt::PriorAttempt;
use crate::completion::Completion;
use crate::engine::{Finish, Grant, Release};
use crate::error::{Error, Result};
use crate::key::Key;

impl State {
    pub(super) fn renew(&mut self, grant: &Grant) -> Result<()> {
        let until_ms = self.monotonic_ms().saturating_add(millis(self.policy.lease));
        let lease = self.lease_of(grant).ok_or_else(|| grant.superseded())?;
        lease.until_ms = lease.until_ms.max(until_ms);
        Ok(())
    }

    /// The lease of a grant, also if it expired. `None` if it was finished, dropped, taken over or resolved.
    pub(super) fn lease_of(&mut self, grant: &Grant) -> Option<&mut Lease> {
        match self.keys.get_mut(&grant.key) {
            Some(Entry::Processing(Processing { token, holder: Holder::Leased(lease), .. }))
                if *token == grant.token() =>
            {
                Some(lease)
            }
            _ => None,
        }
    }

    pub(super) fn finish(&mut self, leases: Vec<(Arc<Grant>, Finish)>) -> Vec<Result<()>> {
        let mut batch = self.side_writes.begin();
        leases.into_iter().map(|(grant, finish)| self.finish_one(&grant, finish, &mut batch)).collect()
    }

    /// The token decides, never the clock: to reject a late holder that no other has overtaken would only cause a duplicate.
    fn finish_one(&mut self, grant: &Grant, finish: Finish, batch: &mut Batch) -> Result<()> {
        let now = self.now();
        match (self.keys.get(&grant.key), finish) {
            (Some(Entry::Processing(processing)), finish) if processing.token == grant.token() => {
                let processing = processing.clone();
                match finish {
                    Finish::Complete(completion) => self.complete(grant, &processing, completion, now, batch),
                    Finish::Release(release) => self.release(grant, processing, release, now),
                }
                Ok(())
            }
            // Repeated: it is stored already, and so are its side writes.
            (Some(Entry::Completed(done)), Finish::Complete(_)) if done.token == grant.token() && done.is_live(now) => {
                Ok(())
            }
            (_, finish) => {
                if matches!(finish, Finish::Complete(_)) {
                    batch.hold_back_offsets();
                }
                Err(grant.superseded())
            }
        }
    }

    fn complete(&mut self, grant: &Grant, p: &Processing, completion: Completion, now: Now, batch: &mut Batch) {
        if let Some(side_writes) = completion.side_writes() {
            self.side_writes.store(side_writes, batch);
        }
        let done = Done {
            token: p.token,
            completed_at: if self.policy.is_stream { grant.claimed_at } else { now.time.max(grant.claimed_at) },
            fingerprint: p.fingerprint,
            window: p.window,
            result: self.stored_result(completion.result()),
        };
        self.keys.insert(grant.key.clone(), Entry::Completed(done));
    }

    fn stored_result(&self, result: &[u8]) -> StoredResult {
        StoredResult::within(result, self.config.result_limit).to_shared()
    }

    fn release(&mut self, grant: &Grant, mut processing: Processing, release: Release, now: Now) {
        if release.may_have_happened && self.policy.on_interrupt == OnInterrupt::Hold {
            return self.abandon(grant);
        }
        // This attempt may have had no effect: whether an earlier one had is still open.
        let doubt = grant.attempt.prior().filter(|prior| prior.may_have_happened());
        let prior = doubt.unwrap_or(match release.may_have_happened {
            true => PriorAttempt::Dropped,
            false => PriorAttempt::Released,
        });
        // The attempt that follows must find this one: it is remembered for a window.
        let backoff_ms = millis(release.backoff).min(millis(self.policy.window) / 2);
        let until_ms = if backoff_ms == 0 { 0 } else { now.monotonic_ms.saturating_add(backoff_ms) };
        processing.since = processing.left_at(now, self.policy);
        processing.fingerprint = processing.fingerprint.filter(|_| prior.may_have_happened());
        processing.attempt = if release.reset_attempts { 0 } else { processing.attempt };
        processing.holder = Holder::Open { prior, until_ms };
        self.keys.insert(grant.key.clone(), Entry::Processing(processing));
    }

    pub(super) fn abandon(&mut self, grant: &Grant) {
        let (now, policy) = (self.now(), self.policy);
        if let Some(Entry::Processing(processing)) = self.keys.get_mut(&grant.key)
            && processing.token == grant.token()
        {
            processing.interrupt(now, policy);
        }
    }

    pub(super) fn held(&self) -> Vec<HeldKey> {
        let now = self.now();
        let mut held: Vec<HeldKey> = self
            .processing()
            .filter_map(|(key, it)| match it.state(now, self.policy) {
                Some(LeaseState::Held(prior)) => Some(HeldKey::new(key.clone(), it.token, it.attempt, prior, it.since)),
                _ => None,
            })
            .collect();
        held.sort_by_key(|held| held.token);
        held
    }

    pub(super) fn resolve(&mut self, key: Key<'static>, resolution: Resolution) -> Result<()> {
        self.check_stored_key(&key)?;
        let now = self.now();
        let Some(Entry::Processing(processing)) = self.keys.get(&key) else {
            return Err(Error::NotHeld { key: key.to_string() });
        };
        let Some(LeaseState::Held(prior)) = processing.state(now, self.policy) else {
            return Err(Error::NotHeld { key: key.to_string() });
        };
        let (processing, since) = (processing.clone(), processing.left_at(now, self.policy));
        let entry = match resolution {
            Resolution::Rerun => Entry::Processing(Processing { since, holder: Holder::Resolved(prior), ..processing }),
            // With a token of its own, so that the old holder's late completion fails.
            Resolution::Completed(result) => Entry::Completed(Done {
                token: self.next_token(),
                completed_at: since,
                fingerprint: processing.fingerprint,
                window: processing.window,
                result: self.stored_result(&result),
            }),
        };
        self.keys.insert(key, entry);
        Ok(())
    }

    pub(super) fn forget(&mut self, key: &Key<'static>) -> Result<bool> {
        self.check_stored_key(key)?;
        let now = self.now();
        let counted = match self.keys.get(key) {
            None => false,
            Some(Entry::Completed(done)) => done.is_live(now),
            Some(Entry::Processing(processing)) => {
                let token = processing.token;
                match processing.state(now, self.policy) {
                    Some(LeaseState::Leased(_)) => return Err(Error::InUse { key: key.to_string(), token }),
                    Some(LeaseState::Held(_)) => return Err(Error::Undecided { key: key.to_string(), token }),
                    state => state.is_some(),
                }
            }
        };
        self.keys.remove(key);
        Ok(counted)
    }

    /// Ends the lease of a key, and its renewal. False if it has none.
    pub(super) fn expire_lease(&mut self, key: &Key<'static>) -> bool {
        let monotonic_ms = self.monotonic_ms();
        match self.keys.get_mut(key) {
            Some(Entry::Processing(Processing { holder: Holder::Leased(lease), .. })) => {
                *lease = Lease { until_ms: lease.until_ms.min(monotonic_ms), keepers: Vec::new() };
                true
            }
            _ => false,
        }
    }

    /// Ends the renewal of all leases.
    pub(super) fn stop_renewals(&mut self) {
        let until_ms = self.monotonic_ms().saturating_add(millis(self.policy.lease));
        for entry in self.keys.values_mut() {
            if let Entry::Processing(Processing { holder: Holder::Leased(lease), .. }) = entry
                && !lease.keepers.is_empty()
            {
                *lease = Lease { until_ms, keepers: Vec::new() };
            }
        }
    }
}
