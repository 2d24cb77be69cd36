//! Rotation: creates the next bucket before it is needed, merges the SSTs of ended buckets, and drops expired buckets whole.

use std::sync::atomic::Ordering;

use super::range::BucketRange;
use super::registry::BucketRegistry;
use crate::clock::Now;
use crate::config::Span;
use crate::rocks::db::Db;
use onlyonce_core::Result;

/// The number of sorted runs from which an ended bucket is merged. A lookup asks a filter of each of them.
const MERGED_RUNS: u64 = 4;

/// Whether there are buckets whose keys have all expired.
pub(crate) fn has_expired(registry: &BucketRegistry, span: Span, now: &Now) -> bool {
    registry.has_expired()
        || registry.snapshot().newest_first().iter().any(|bucket| !bucket.range.is_live(now, span.window_ms))
}

/// Drops every bucket whose keys have all expired. Stops when `should_continue` returns false. Each drop costs one
/// manifest edit, whatever the number of keys.
pub(crate) fn drop_expired(
    db: &Db,
    registry: &BucketRegistry,
    span: Span,
    now: &Now,
    should_continue: &impl Fn() -> bool,
) {
    registry.remove_expired(db, should_continue);
    let snapshot = registry.snapshot();
    for bucket in snapshot.newest_first().into_iter().rev() {
        if !bucket.range.is_live(now, span.window_ms) && should_continue() {
            registry.remove(db, &bucket, now, span.window_ms);
        }
    }
}

/// Creates the next bucket once half of the present bucket's time is over, if the present bucket has keys.
pub(crate) fn prepare_next(db: &Db, registry: &BucketRegistry, span: Span, now_ms: u64) -> Result<()> {
    let present = BucketRange::containing(now_ms, span.bucket_ms);
    let snapshot = registry.snapshot();
    let buckets = snapshot.newest_first();
    let Some(bucket) = buckets.iter().find(|bucket| bucket.range == present) else { return Ok(()) };
    let keys = bucket.keys.load(Ordering::Relaxed);
    if keys > 0 && now_ms - present.start_ms >= span.bucket_ms / 2 {
        registry.ensure(db, present.next())?;
    }
    Ok(())
}

/// Merges the SSTs of the ended buckets that have many. The caller excludes drops of buckets. Returns the first error, after it has
/// tried all buckets.
pub(crate) fn merge_ended(db: &Db, registry: &BucketRegistry, span: Span, now: &Now) -> Result<()> {
    let mut outcome = Ok(());
    for bucket in registry.snapshot().newest_first() {
        let has_ended = bucket.range.end_ms() <= now.time_ms && bucket.range.is_live(now, span.window_ms);
        if has_ended
            && !bucket.is_merge_requested.load(Ordering::Relaxed)
            && db.sorted_runs(&bucket.family)? >= MERGED_RUNS
        {
            tracing::debug!(bucket = %bucket.range, "merging the SSTs of an ended bucket");
            bucket.is_merge_requested.store(true, Ordering::Relaxed);
            outcome = outcome.and(db.merge_bucket(&bucket.family));
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fs::directory::Directory;
    use crate::rocks::sst::SstWriter;

    const SPAN: Span = Span { window_ms: 4_000, bucket_ms: 1_000 };

    fn open(dir: &tempfile::TempDir, now_ms: u64) -> (Db, BucketRegistry) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, families) = Db::open(directory, 32 << 20, Duration::ZERO, None, || Ok(Vec::new())).unwrap();
        let registry = BucketRegistry::open(&db, &families, SPAN, &at(now_ms), 0, 1 << 20, None).unwrap();
        (db, registry)
    }

    fn at(time_ms: u64) -> Now {
        Now { time_ms, ..Now::default() }
    }

    fn seconds(registry: &BucketRegistry) -> Vec<u64> {
        registry.snapshot().newest_first().iter().rev().map(|bucket| bucket.range.start_ms / 1_000).collect()
    }

    #[test]
    fn the_next_bucket_is_created_halfway_through_a_bucket_with_keys() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry) = open(&dir, 0);
        let prepared = |now_ms| {
            prepare_next(&db, &registry, SPAN, now_ms).unwrap();
            seconds(&registry)
        };
        assert!(prepared(5_900).is_empty(), "there is no bucket");
        let bucket = registry.ensure(&db, BucketRange::containing(5_000, 1_000)).unwrap();
        assert_eq!(prepared(5_900), [5], "the bucket has no keys");
        registry.mark(&bucket, &[77]);
        assert_eq!(prepared(5_499), [5]);
        assert_eq!(prepared(5_500), [5, 6]);
        assert_eq!(prepared(5_600), [5, 6]);
        assert_eq!(prepared(6_900), [5, 6]);
    }

    #[test]
    fn the_ssts_of_a_bucket_are_merged_once_it_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry) = open(&dir, 0);
        let bucket = registry.ensure(&db, BucketRange::containing(5_000, 1_000)).unwrap();
        // Each spans the whole range. RocksDB would add SSTs side by side to one sorted run.
        let add = |number: u8| {
            let put =
                |sst: &mut SstWriter<'_>| [0, 255].iter().try_for_each(|first| sst.put(&[*first, number], b"value"));
            db.add_sst(&bucket.family, put).unwrap();
        };
        let ssts = || db.sst_numbers().unwrap().remove(&bucket.family).unwrap_or_default();
        let is_requested = |now_ms| {
            merge_ended(&db, &registry, SPAN, &at(now_ms)).unwrap();
            bucket.is_merge_requested.load(Ordering::Relaxed)
        };
        (0..3).for_each(add);
        assert!(!is_requested(6_000), "so few are not worth it");
        (3..10).for_each(add);
        assert!(!is_requested(5_999), "it may get more");
        assert!(!is_requested(10_000), "it is dropped next");
        assert_eq!((ssts().len(), db.sorted_runs(&bucket.family).unwrap()), (10, 10));
        assert!(is_requested(6_000));
        let started = std::time::Instant::now();
        while ssts().len() > 2 {
            assert!(started.elapsed() < Duration::from_secs(60), "{:?} are not merged", ssts());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(db.sorted_runs(&bucket.family).unwrap() <= 2);
        let mut keys = 0;
        db.for_each_key(&bucket.family, |_| {
            keys += 1;
            Ok(true)
        })
        .unwrap();
        assert_eq!(keys, 20);
    }

    #[test]
    fn a_bucket_is_dropped_when_its_last_possible_key_expires_also_while_the_store_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let (db, registry) = open(&dir, 0);
        for second in 0..3 {
            registry.ensure(&db, BucketRange::containing(second * 1_000, 1_000)).unwrap();
        }
        for (now_ms, expired, left) in [(4_998, false, &[0, 1, 2][..]), (4_999, true, &[1, 2]), (5_998, false, &[1, 2])]
        {
            assert_eq!(has_expired(&registry, SPAN, &at(now_ms)), expired, "{now_ms}");
            drop_expired(&db, &registry, SPAN, &at(now_ms), &|| true);
            assert_eq!(seconds(&registry), left, "{now_ms}");
        }
        db.close();

        let (db, registry) = open(&dir, 5_999);
        assert_eq!(seconds(&registry), [2]);
        assert!(has_expired(&registry, SPAN, &at(5_999)), "the expired bucket is still on disk");
        drop_expired(&db, &registry, SPAN, &at(5_999), &|| false);
        assert!(has_expired(&registry, SPAN, &at(5_999)), "the drop was stopped");
        drop_expired(&db, &registry, SPAN, &at(5_999), &|| true);
        assert!(!has_expired(&registry, SPAN, &at(5_999)));
        db.close();
        let (_db, registry) = open(&dir, 0);
        assert_eq!(seconds(&registry), [2], "the expired bucket was dropped from disk");
    }
}
