//! Renewals, dropped leases and held keys. They change only memory.

use std::sync::Arc;

use super::core::Engine;
use super::request::Request;
use super::response::Grant;
use onlyonce_core::machine::{self, Abandon, Abandoned, Renew};
use onlyonce_core::{PriorAttempt, Result};

impl Engine {
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
        self.health.ready()?;
        let now = self.now();
        let full_ms = now.monotonic_ms.saturating_add(self.config.lease_ms);
        let renew = Renew { token: grant.token, until_monotonic_ms: full_ms.min(limit_ms) };
        let renewed = self.execute_in_memory(grant.key_ref(), renew, now, |is_ours| is_ours)?;
        self.count_superseded(renewed)
    }

    /// How long a lease still excludes other holders.
    pub(crate) fn remaining_ms(&self, grant: &Grant) -> u64 {
        let now = self.now();
        let shard = self.tables.memtable.shard(grant.digest());
        machine::remaining_ms(shard.get(grant.digest(), grant.key()).as_ref(), grant.token, now, self.policy)
    }

    /// Marks a lease as dropped without completion or release. Changes only memory.
    pub(crate) fn abandon(&self, grant: &Grant) {
        // An error has poisoned the store.
        let _ = self.end_unwritten(grant, Abandoned::Unknown);
    }

    /// As [`Engine::abandon`], for a caller that waits for the answer. False: superseded.
    #[cfg(feature = "tokio")]
    pub(crate) fn interrupt(&self, grant: &Grant) -> Result<bool> {
        self.health.ready()?;
        let is_ours = self.end_unwritten(grant, Abandoned::Unknown)?;
        self.count_superseded(is_ours)
    }

    /// Takes back a lease that no caller received, so that no work was done. Changes only memory: the next open counts it as
    /// crashed, unless a flush wrote it before.
    #[cfg(feature = "tokio")]
    pub(crate) fn take_back(&self, grant: &Grant) {
        let _ = self.end_unwritten(grant, Abandoned::NotReceived { prior: grant.prior });
    }

    /// Ends a lease in memory and wakes its waiters. False: superseded. A lease that has ended already stays as it is.
    fn end_unwritten(&self, grant: &Grant, outcome: Abandoned) -> Result<bool> {
        let abandon = Abandon { token: grant.token, outcome };
        let is_ours = self.execute_in_memory(grant.key_ref(), abandon, self.timeline.now(), |is_ours| is_ours)?;
        self.waiters.wake([grant.digest()]);
        self.wake_if_due();
        Ok(is_ours)
    }

    fn count_superseded(&self, is_ours: bool) -> Result<bool> {
        self.health.check_invariants()?;
        if !is_ours {
            self.counters.superseded.add(1);
        }
        Ok(is_ours)
    }

    /// The grant of a held key, for its resolution, and how its attempt ended.
    pub(crate) fn held_grant(&self, request: &Arc<Request>) -> Result<Option<(Grant, PriorAttempt)>> {
        self.health.ready()?;
        let now = self.now();
        let key_ref = self.single_key(request)?;
        let shard = self.tables.memtable.shard(key_ref.digest);
        let stored = shard.get(key_ref.digest, key_ref.key);
        self.health.check_invariants()?;
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
}
