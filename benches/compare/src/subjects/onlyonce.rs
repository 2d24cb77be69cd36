//! The store of this repository, through its public API.

use std::time::{Duration, SystemTime};

use anyhow::Result;
use onlyonce::{Claim, KeyStatus, Lease, ManualClock, RecordOutcome, Store, Timestamp};

use crate::keys::Key;
use crate::subject::{Durability, Setup, Subject};

/// The width of a bucket. The clock is advanced manually.
pub const BUCKET: Duration = Duration::from_secs(60 * 60);

pub struct OnlyOnce {
    pub store: Store,
    pub clock: ManualClock,
}

impl OnlyOnce {
    pub fn open(setup: &Setup) -> Result<Self> {
        let window = BUCKET * setup.buckets;
        // The last bucket is the current one on the real clock, so that a process with the real clock still remembers the keys.
        let clock = ManualClock::at(Timestamp::from(SystemTime::now() - BUCKET * setup.buckets.saturating_sub(1)));
        let store = Store::builder()
            .durability(match setup.durability {
                Durability::Process => onlyonce::Durability::Process,
                Durability::Disk => onlyonce::Durability::Disk,
            })
            .window(window)
            .bucket(BUCKET)
            .memory_budget(usize::try_from(setup.memory())?)
            .expected_rate(setup.keys.div_ceil(u64::from(setup.buckets) * BUCKET.as_secs()))
            .clock(clock.clone())
            .open(setup.dir.join("store"))?;
        Ok(Self { store, clock })
    }

    /// The number of keys that a filter did not rule out, and of all looked up keys.
    pub fn filter_counts(&self) -> (u64, u64) {
        let stats = self.store.stats();
        (stats.filter_hits, stats.filter_checks)
    }
}

impl Subject for OnlyOnce {
    /// Claims and completes keys with a result; records keys without one.
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        match (keys, result) {
            ([key], []) => Ok(usize::from(self.store.record(key).wait()? == RecordOutcome::First)),
            (_, []) => {
                let mut first = 0;
                for recorded in self.store.record_batch(keys).wait()? {
                    first += usize::from(recorded? == RecordOutcome::First);
                }
                Ok(first)
            }
            ([key], _) => claim_and_complete_one(&self.store, key, result),
            _ => claim_and_complete(&self.store, keys, result),
        }
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        if let [key] = keys {
            return Ok(usize::from(self.store.check(key).wait()? != KeyStatus::New));
        }
        let mut known = 0;
        for check in self.store.check_batch(keys).wait()? {
            known += usize::from(check? != KeyStatus::New);
        }
        Ok(known)
    }

    fn next_bucket(&self) -> Result<()> {
        self.store.flush()?;
        self.clock.advance(BUCKET);
        Ok(())
    }

    fn finish_background_work(&self) -> Result<()> {
        Ok(self.store.flush()?)
    }

    fn memory_bytes(&self) -> Option<u64> {
        Some(self.store.stats().filter_bytes)
    }

    fn close(self: Box<Self>) -> Result<()> {
        Ok(self.store.close().wait()?)
    }
}

/// Claims and completes a key. Returns 1, or 0 for a duplicate.
pub fn claim_and_complete_one(store: &Store, key: &Key, result: &[u8]) -> Result<usize> {
    match store.claim(key).wait()? {
        Claim::Acquired(lease) => {
            lease.complete(result).wait()?;
            Ok(1)
        }
        Claim::Completed(_) | Claim::InProgress(_) => Ok(0),
    }
}

/// Claims the keys and completes the acquired ones. Returns their number.
pub fn claim_and_complete(store: &Store, keys: &[Key], result: &[u8]) -> Result<usize> {
    let mut leases: Vec<(Lease, &[u8])> = Vec::with_capacity(keys.len());
    for claim in store.claim_batch(keys).wait()? {
        if let Claim::Acquired(lease) = claim? {
            leases.push((lease, result));
        }
    }
    let first = leases.len();
    for completed in store.complete_batch(leases).wait() {
        completed?;
    }
    Ok(first)
}
