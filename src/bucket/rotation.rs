//! Rotation: the next bucket is there before it is needed, and one whose time has passed is dropped whole.

use std::sync::atomic::Ordering;

use super::set::BucketSet;
use super::window::Slice;
use crate::clock::Now;
use crate::config::Span;
use crate::error::Result;
use crate::storage::db::Db;

/// Whether there are buckets whose keys are all forgotten.
pub(crate) fn has_passed(set: &BucketSet, span: Span, now: &Now) -> bool {
    set.has_passed() || set.view().newest_first().iter().any(|bucket| !bucket.slice.is_live(now, span.window_ms))
}

/// Drops every bucket whose keys are all forgotten, as long as `go_on` says so. Costs a change of the manifest each, however
/// many keys it has.
pub(crate) fn drop_passed(db: &Db, set: &BucketSet, span: Span, now: &Now, go_on: &impl Fn() -> bool) {
    set.remove_passed(db, go_on);
    let view = set.view();
    for bucket in view.newest_first().into_iter().rev() {
        if !bucket.slice.is_live(now, span.window_ms) && go_on() {
            set.remove(db, &bucket, now, span.window_ms);
        }
    }
}

/// Creates the bucket after the present one, once half of the present one's time is over. A store that has nothing to
/// remember creates none.
pub(crate) fn prepare_next(db: &Db, set: &BucketSet, span: Span, now_ms: u64) -> Result<()> {
    let present = Slice::containing(now_ms, span.bucket_ms);
    let view = set.view();
    let buckets = view.newest_first();
    let Some(bucket) = buckets.iter().find(|bucket| bucket.slice == present) else { return Ok(()) };
    let keys = bucket.keys.load(Ordering::Relaxed);
    if keys > 0 && now_ms - present.start_ms >= span.bucket_ms / 2 {
        set.ensure(db, present.next())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::storage::directory::Directory;

    const SPAN: Span = Span { window_ms: 4_000, bucket_ms: 1_000 };

    fn open(dir: &tempfile::TempDir, now_ms: u64) -> (Db, BucketSet) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, families) = Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap();
        let set = BucketSet::open(&db, &families, SPAN, &at(now_ms), 0, 1 << 20, None).unwrap();
        (db, set)
    }

    fn at(time_ms: u64) -> Now {
        Now { time_ms, ..Now::default() }
    }

    fn seconds(set: &BucketSet) -> Vec<u64> {
        set.view().newest_first().iter().rev().map(|bucket| bucket.slice.start_ms / 1_000).collect()
    }

    #[test]
    fn the_next_bucket_is_there_when_half_of_one_with_keys_is_over() {
        let dir = tempfile::tempdir().unwrap();
        let (db, set) = open(&dir, 0);
        let prepared = |now_ms| {
            prepare_next(&db, &set, SPAN, now_ms).unwrap();
            seconds(&set)
        };
        assert!(prepared(5_900).is_empty(), "there is nothing to remember");
        let bucket = set.ensure(&db, Slice::containing(5_000, 1_000)).unwrap();
        assert_eq!(prepared(5_900), [5], "nor is there now");
        set.mark(&bucket, &[77]);
        assert_eq!(prepared(5_499), [5]);
        assert_eq!(prepared(5_500), [5, 6]);
        assert_eq!(prepared(5_600), [5, 6]);
        assert_eq!(prepared(6_900), [5, 6]);
    }

    #[test]
    fn a_bucket_goes_when_its_last_possible_key_is_forgotten_also_where_nobody_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let (db, set) = open(&dir, 0);
        for second in 0..3 {
            set.ensure(&db, Slice::containing(second * 1_000, 1_000)).unwrap();
        }
        for (now_ms, passed, left) in [(4_998, false, &[0, 1, 2][..]), (4_999, true, &[1, 2]), (5_998, false, &[1, 2])]
        {
            assert_eq!(has_passed(&set, SPAN, &at(now_ms)), passed, "{now_ms}");
            drop_passed(&db, &set, SPAN, &at(now_ms), &|| true);
            assert_eq!(seconds(&set), left, "{now_ms}");
        }
        db.close().unwrap();

        let (db, set) = open(&dir, 5_999);
        assert_eq!(seconds(&set), [2]);
        assert!(has_passed(&set, SPAN, &at(5_999)), "it is still on the disk");
        drop_passed(&db, &set, SPAN, &at(5_999), &|| false);
        assert!(has_passed(&set, SPAN, &at(5_999)), "there was no time for it");
        drop_passed(&db, &set, SPAN, &at(5_999), &|| true);
        assert!(!has_passed(&set, SPAN, &at(5_999)));
        db.close().unwrap();
        let (_db, set) = open(&dir, 0);
        assert_eq!(seconds(&set), [2], "and now it is gone");
    }
}
