//! Rotation: the next bucket is there before it is needed, and one whose time has passed is dropped whole.

use std::sync::atomic::Ordering;

use super::set::BucketSet;
use super::window::Slice;
use crate::config::Span;
use crate::error::Result;
use crate::storage::db::Db;

/// Whether there are buckets whose keys are all forgotten.
pub(crate) fn has_passed(set: &BucketSet, span: Span, now_ms: u64) -> bool {
    set.has_passed() || set.view().newest_first().iter().any(|bucket| !bucket.slice.is_live(now_ms, span.window_ms))
}

/// Drops every bucket whose keys are all forgotten. Costs a change of the manifest each, however many keys it has.
pub(crate) fn drop_passed(db: &Db, set: &BucketSet, span: Span, now_ms: u64) {
    set.remove_passed(db);
    let view = set.view();
    for bucket in view.newest_first() {
        if !bucket.slice.is_live(now_ms, span.window_ms) {
            set.remove(db, &bucket);
        }
    }
}

/// Creates the bucket after the present one, once half of the present one's time is over, and sizes the filter by
/// what the last one came to. A store that has nothing to remember creates none.
pub(crate) fn prepare_next(db: &Db, set: &BucketSet, span: Span, now_ms: u64) -> Result<()> {
    let present = Slice::containing(now_ms, span.bucket_ms);
    let view = set.view();
    let buckets = view.newest_first();
    let Some(bucket) = buckets.iter().find(|bucket| bucket.slice == present) else { return Ok(()) };
    let keys = bucket.keys.load(Ordering::Relaxed);
    if keys > 0 && now_ms - present.start_ms >= span.bucket_ms / 2 {
        if buckets.iter().all(|bucket| bucket.slice != present.next()) {
            let fullest = buckets.iter().map(|bucket| bucket.keys.load(Ordering::Relaxed)).max().unwrap_or(keys);
            set.expect(fullest);
        }
        set.ensure(db, present.next())?;
    }
    Ok(())
}
