//! Recovery at open: rebuilds filters while the store already serves calls.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::registry::{Bucket, BucketRegistry};
use crate::codec::digest_of_entry_key;
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Error, Result};

/// Digests inserted into the filter in one batch.
const DIGEST_BATCH: usize = 8_192;

/// Inserts all keys of a bucket into the filter, which covers the bucket from then on. Stops and returns false when
/// `should_continue` returns false.
pub(crate) fn rebuild_filter(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
) -> Result<bool> {
    // Reserves room for all keys at once.
    let mut expected = bucket.keys.load(Ordering::Relaxed);
    let finished = for_each_digest(db, registry, bucket, should_continue, |digests| {
        registry.mark_counted(bucket, digests, expected.max(digests.len() as u64));
        Failpoint::FilterHalfRebuilt.pass();
        expected = expected.saturating_sub(digests.len() as u64);
    })?;
    if finished {
        registry.set_filtered(bucket);
    }
    Ok(finished)
}

/// Moves a bucket that has outgrown its column or its base to the newest base. Stops when `should_continue` returns
/// false; keys moved by then do no harm.
pub(crate) fn move_filter(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
) -> Result<()> {
    // Chosen before the keys are read: keys that are flushed meanwhile go to this matrix or one above it. In the
    // other order they could be inserted into a matrix that is about to be freed.
    let Some(target) = registry.target_for(bucket) else { return Ok(()) };
    if for_each_digest(db, registry, bucket, should_continue, |digests| {
        registry.insert_moved(bucket, &target, digests)
    })? {
        registry.moved(bucket, &target);
    }
    Ok(())
}

/// Passes the digests of a bucket's keys to `visit` in batches, as long as `should_continue` returns true and the
/// bucket exists. True if all digests were visited.
fn for_each_digest(
    db: &Db,
    registry: &BucketRegistry,
    bucket: &Arc<Bucket>,
    should_continue: &impl Fn() -> bool,
    mut visit: impl FnMut(&[u64]),
) -> Result<bool> {
    let mut digests = Vec::with_capacity(DIGEST_BATCH);
    let mut finished = true;
    db.for_each_key(&bucket.family, |entry_key| {
        let digest = digest_of_entry_key(entry_key).ok_or_else(|| Error::Corrupt {
            place: format!("an entry of {}", bucket.range),
            detail: "its key is too short".to_owned(),
        })?;
        digests.push(digest);
        if digests.len() == DIGEST_BATCH {
            visit(&digests);
            digests.clear();
            finished = should_continue() && registry.snapshot().has(bucket);
        }
        Ok(finished)
    })?;
    if finished && !digests.is_empty() {
        visit(&digests);
    }
    Ok(finished)
}
