//! Loads, rebuilds and persists the filters of the buckets.
//!
//! At open, filters are read from their files; a filter whose file is missing or does not match is rebuilt from the
//! bucket's keys. A bucket whose filter is not complete yet is looked up on disk. The filter of a bucket is persisted
//! once the bucket has ended.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::recovery::{move_filter, rebuild_filter};
use super::registry::{Bucket, BucketRegistry};
use crate::codec::Secret;
use crate::filter::file::{self, Covered, FileKey, FilterFile};
use crate::filter::matrix::{Geometry, SHARDS};
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::{Error, Result};

/// Threads that read filter files or buckets in parallel.
const THREADS: usize = 2;

const EXTENSION: &str = "filter";

/// The filter files of a store.
pub(crate) struct Filters {
    dir: PathBuf,
    key: FileKey,
    /// Usable files found at open, by bucket name.
    found: Mutex<HashMap<String, FilterFile>>,
    /// What the file of each bucket covers, by bucket name.
    persisted: Mutex<HashMap<String, Covered>>,
}

impl Filters {
    /// Opens the filter files of these buckets. Ignores files that do not cover all keys of their bucket.
    pub(crate) fn find(db: &Db, secret: &Secret, buckets: &[String]) -> Result<Self> {
        let filters = Self {
            dir: db.directory().filters(),
            key: FileKey::new(secret),
            found: Mutex::default(),
            persisted: Mutex::default(),
        };
        let ssts = db.sst_numbers()?;
        for bucket in buckets {
            match FilterFile::open(&filters.path(bucket), &filters.key, bucket) {
                Ok(file) if file.covered.covers(ssts.get(bucket).map_or(&[], Vec::as_slice)) => {
                    filters.found.lock().insert(bucket.clone(), file);
                }
                Ok(_) => {
                    tracing::debug!(bucket, "filter file does not cover all SSTs of its bucket, rebuilding the filter")
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => warn_unusable(bucket, &error),
            }
        }
        Ok(filters)
    }

    fn path(&self, bucket: &str) -> PathBuf {
        self.dir.join(bucket).with_extension(EXTENSION)
    }

    /// The most frequent geometry of the files found at open.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        let found = self.found.lock();
        let files_with = |geometry| found.values().filter(|file| file.geometry == geometry).count();
        found.values().map(|file| file.geometry).max_by_key(|geometry| files_with(*geometry))
    }

    /// Reads the files that were found at open. From then on the filter covers their buckets. Stops when
    /// `should_continue` returns false.
    pub(crate) fn load(&self, registry: &BucketRegistry, should_continue: &(impl Fn() -> bool + Sync)) {
        let mut found = std::mem::take(&mut *self.found.lock());
        let snapshot = registry.snapshot();
        let Some(base) = snapshot.base() else { return };
        let files: Vec<(Arc<Bucket>, FilterFile)> = snapshot
            .newest_first()
            .into_iter()
            .filter_map(|bucket| found.remove(&bucket.family).map(|file| (bucket, file)))
            .filter(|(bucket, file)| base.geometry() == Some(file.geometry) && snapshot.has_column(bucket))
            .collect();
        let damaged: Vec<Mutex<Option<io::Error>>> = files.iter().map(|_| Mutex::new(None)).collect();
        let next = AtomicUsize::new(0);
        in_parallel(|| {
            while let shard @ 0..SHARDS = next.fetch_add(1, Ordering::Relaxed)
                && should_continue()
            {
                let mut columns = Vec::with_capacity(files.len());
                for ((bucket, file), damaged) in files.iter().zip(&damaged) {
                    match file.column(shard) {
                        Ok(column) => columns.push((bucket.column_id, column)),
                        Err(error) => *damaged.lock() = Some(error),
                    }
                }
                registry.add_columns(base, shard, &columns);
            }
        });
        if !should_continue() {
            return;
        }
        Failpoint::FilterLoaded.pass();
        for ((bucket, file), damaged) in files.into_iter().zip(damaged) {
            match damaged.into_inner() {
                // The bits already read stay in the filter. They only cause a few false positives.
                Some(error) => warn_unusable(&bucket.family, &error),
                None => {
                    registry.set_loaded(&bucket, base, file.covered.keys);
                    self.persisted.lock().insert(bucket.family.clone(), file.covered);
                }
            }
        }
    }

    /// Rebuilds the missing filters from the keys of their buckets, the newest bucket first. Stops when
    /// `should_continue` returns false.
    pub(crate) fn rebuild(
        db: &Db,
        registry: &BucketRegistry,
        should_continue: &(impl Fn() -> bool + Sync),
    ) -> Result<()> {
        let snapshot = registry.snapshot();
        let missing: Vec<Arc<Bucket>> =
            snapshot.newest_first().into_iter().filter(|bucket| !snapshot.is_filtered(bucket)).collect();
        let next = AtomicUsize::new(0);
        let failed = Mutex::new(None);
        in_parallel(|| {
            while let Some(bucket) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                match rebuild_filter(db, registry, bucket, should_continue) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => *failed.lock() = Some(error),
                }
            }
        });
        failed.into_inner().map_or(Ok(()), Err)
    }

    /// Moves every ended bucket to the newest base, so that the extra matrices it grew into can be freed.
    pub(crate) fn tidy(
        db: &Db,
        registry: &BucketRegistry,
        now_ms: u64,
        should_continue: &impl Fn() -> bool,
    ) -> Result<()> {
        let snapshot = registry.snapshot();
        for bucket in snapshot.newest_first() {
            if bucket.range.end_ms() <= now_ms && snapshot.is_filtered(&bucket) {
                move_filter(db, registry, &bucket, should_continue)?;
            }
        }
        Ok(())
    }

    /// Persists the filter of every ended bucket whose file is missing or does not cover all its keys, and removes
    /// the files of dropped buckets. `ssts` lists the SSTs of all buckets at a moment when no flush is running.
    pub(crate) fn persist(
        &self,
        registry: &BucketRegistry,
        now_ms: u64,
        ssts: impl FnOnce() -> Result<HashMap<String, Vec<u64>>>,
        should_continue: impl Fn() -> bool,
    ) -> Result<()> {
        let snapshot = registry.snapshot();
        let ended: Vec<Arc<Bucket>> = snapshot
            .newest_first()
            .into_iter()
            .filter(|bucket| bucket.range.end_ms() <= now_ms && snapshot.is_filtered(bucket))
            .collect();
        if ended.is_empty() {
            return self.remove_expired(registry);
        }
        let mut ssts = ssts()?;
        // Taken after the SSTs are listed: the filter of this snapshot has all keys of those SSTs. In the other order
        // a file could claim to cover an SST whose keys it lacks.
        let snapshot = registry.snapshot();
        for bucket in ended {
            let covered = Covered {
                keys: bucket.keys.load(Ordering::Relaxed),
                ssts: ssts.remove(&bucket.family).unwrap_or_default(),
            };
            let is_persisted =
                self.persisted.lock().get(&bucket.family).is_some_and(|persisted| persisted.covers(&covered.ssts));
            // A bucket that outgrew its column is spread over several matrices. It is rebuilt at the next open.
            let is_due = !is_persisted && snapshot.has(&bucket);
            let Some(matrix) = snapshot.base_of(bucket.column_id).filter(|_| is_due) else { continue };
            if !should_continue() {
                return Ok(());
            }
            let path = self.path(&bucket.family);
            file::write(&path, &self.key, &bucket.family, matrix, bucket.column_id, &covered)
                .map_err(|error| Error::io("writing", path, error))?;
            tracing::debug!(bucket = %bucket.range, keys = covered.keys, "filter persisted");
            self.persisted.lock().insert(bucket.family.clone(), covered);
        }
        self.remove_expired(registry)
    }

    /// Removes the filter files of dropped buckets, and partial files left by a crash.
    pub(crate) fn remove_expired(&self, registry: &BucketRegistry) -> Result<()> {
        let buckets = registry.snapshot().newest_first();
        let is_live = |path: &Path| buckets.iter().any(|bucket| self.path(&bucket.family) == path);
        self.persisted.lock().retain(|family, _| buckets.iter().any(|bucket| bucket.family == *family));
        let unreadable = |error: io::Error| Error::io("reading", self.dir.clone(), error);
        for entry in fs::read_dir(&self.dir).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            // Foreign files in the directory are left alone.
            let is_ours = path.extension().is_some_and(|extension| extension == EXTENSION || extension == file::NEW);
            if is_ours && !is_live(&path) {
                Failpoint::FilterOrphaned.pass();
                fs::remove_file(&path).map_err(|error| Error::io("removing", path, error))?;
            }
        }
        Ok(())
    }
}

fn warn_unusable(bucket: &str, error: &io::Error) {
    tracing::warn!(bucket, %error, "filter file unusable, rebuilding the filter from the bucket's keys");
}

fn in_parallel(work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(&work);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buckets::flush::{FlushEntry, FlushSource, flush};
    use crate::buckets::range::BucketRange;
    use crate::clock::Now;
    use crate::config::Span;
    use crate::fs::directory::Directory;
    use onlyonce_core::StoredResult;
    use onlyonce_core::machine::{CompletedEntry, Entry, OwnWindow};
    use std::time::Duration;

    const SECRET: Secret = [5; 16];
    const SPAN: Span = Span { window_ms: 10_000, bucket_ms: 1_000 };

    /// The keys of a range, completed in the bucket of this second.
    struct Keys(u64, std::ops::Range<u64>);

    fn range(second: u64) -> BucketRange {
        BucketRange { start_ms: second * 1_000, width_ms: 1_000 }
    }

    fn digest(i: u64) -> u64 {
        i.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    impl FlushSource for Keys {
        fn ranges(&self) -> Vec<(BucketRange, usize)> {
            vec![(range(self.0), self.1.clone().count())]
        }

        fn visit(&self, _: BucketRange, mut visit: impl FnMut(FlushEntry<'_>) -> Result<()>) -> Result<()> {
            let mut keys: Vec<u64> = self.1.clone().collect();
            keys.sort_unstable_by_key(|i| digest(*i));
            let completed = CompletedEntry {
                token: 1,
                completed_ms: self.0 * 1_000,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::None,
            };
            let entry = Entry::Completed(completed);
            keys.into_iter()
                .try_for_each(|i| visit(FlushEntry { digest: digest(i), key: &i.to_le_bytes(), entry: &entry }))
        }
    }

    fn open(dir: &tempfile::TempDir) -> (Db, Filters, BucketRegistry) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, families) = Db::open(directory, 32 << 20, Duration::ZERO, None, || Ok(Vec::new())).unwrap();
        let filters = Filters::find(&db, &SECRET, &families).unwrap();
        let registry =
            BucketRegistry::open(&db, &families, SPAN, &Now::default(), 0, 64 << 20, filters.geometry()).unwrap();
        (db, filters, registry)
    }

    fn fill(db: &Db, registry: &BucketRegistry, second: u64, range: std::ops::Range<u64>) {
        flush(db, registry, &Keys(second, range)).unwrap();
    }

    fn persist(db: &Db, filters: &Filters, registry: &BucketRegistry, now_ms: u64) {
        filters.persist(registry, now_ms, || db.sst_numbers(), || true).unwrap();
    }

    /// The start times, in seconds, of the buckets that the filter covers.
    fn filtered(registry: &BucketRegistry) -> Vec<u64> {
        let snapshot = registry.snapshot();
        let mut seconds: Vec<u64> = snapshot
            .newest_first()
            .iter()
            .filter(|bucket| snapshot.is_filtered(bucket))
            .map(|bucket| bucket.range.start_ms / 1_000)
            .collect();
        seconds.sort_unstable();
        seconds
    }

    /// A closed store with three buckets, two of them ended and persisted.
    fn three_buckets(dir: &tempfile::TempDir) {
        let (db, filters, registry) = open(dir);
        for second in 0..3 {
            fill(&db, &registry, second, second * 1_000..second * 1_000 + 1_000);
        }
        persist(&db, &filters, &registry, 2_500);
        db.close();
    }

    fn assert_all_candidates(registry: &BucketRegistry) {
        for i in 0..3_000 {
            let column_bits = registry.snapshot().candidates(digest(i));
            let buckets: Vec<u64> =
                registry.snapshot().of_columns(column_bits).map(|bucket| bucket.range.start_ms / 1_000).collect();
            assert!(buckets.contains(&(i / 1_000)), "key {i}");
        }
    }

    #[test]
    fn filters_of_ended_buckets_are_loaded_and_the_others_are_rebuilt() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let (db, filters, registry) = open(&dir);
        assert!(filtered(&registry).is_empty());
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0, 1]);
        assert_all_candidates(&registry);
        Filters::rebuild(&db, &registry, &|| true).unwrap();
        assert_eq!(filtered(&registry), [0, 1, 2]);
        assert_all_candidates(&registry);
        let false_positives = (10_000..30_000).filter(|i| registry.snapshot().candidates(digest(*i)) != 0).count();
        assert!(false_positives < 20, "{false_positives} of 20,000 new keys would be looked up on disk");
    }

    #[test]
    fn ended_buckets_move_to_the_newest_base_and_are_persisted_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let (db, filters, registry) = open(&dir);
        fill(&db, &registry, 0, 0..90_000);
        fill(&db, &registry, 0, 90_000..200_000);
        fill(&db, &registry, 1, 200_000..300_000);
        assert!(registry.snapshot().base_of(0).is_none(), "it has outgrown its column");
        let bytes = registry.snapshot().filter_bytes();
        Filters::tidy(&db, &registry, 999, &|| true).unwrap();
        assert!(registry.snapshot().base_of(0).is_none(), "it has not ended");
        Filters::tidy(&db, &registry, 1_500, &|| true).unwrap();
        assert!(registry.snapshot().base_of(0).is_some());
        assert!(registry.snapshot().filter_bytes() < bytes);
        for i in 0..300_000 {
            assert_ne!(registry.snapshot().candidates(digest(i)), 0, "key {i}");
        }
        persist(&db, &filters, &registry, 1_500);
        db.close();
        let (_db, filters, registry) = open(&dir);
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0]);
    }

    #[test]
    fn a_filter_file_that_does_not_cover_all_ssts_of_its_bucket_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let (db, _, registry) = open(&dir);
        fill(&db, &registry, 1, 5_000..5_100);
        db.close();
        let (db, filters, registry) = open(&dir);
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0]);
        Filters::rebuild(&db, &registry, &|| true).unwrap();
        persist(&db, &filters, &registry, 2_500);
        db.close();
        let (_db, filters, registry) = open(&dir);
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0, 1], "the file was written again");
        assert_ne!(registry.snapshot().candidates(digest(5_050)), 0);
    }

    #[test]
    fn a_filter_is_persisted_again_only_after_its_bucket_gets_more_keys() {
        let dir = tempfile::tempdir().unwrap();
        let (db, filters, registry) = open(&dir);
        (0..3).for_each(|second| fill(&db, &registry, second, second * 1_000..second * 1_000 + 1_000));
        let written = |filters: &Filters| {
            // Called once before each write.
            let count = std::cell::Cell::new(0);
            let should_continue = || {
                count.set(count.get() + 1);
                true
            };
            filters.persist(&registry, 2_500, || db.sst_numbers(), should_continue).unwrap();
            count.get()
        };
        assert_eq!((written(&filters), written(&filters)), (2, 0));
        fill(&db, &registry, 1, 5_000..5_100);
        assert_eq!((written(&filters), written(&filters)), (1, 0));
    }

    #[test]
    fn a_rebuild_that_stops_early_leaves_the_bucket_unfiltered() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _, registry) = open(&dir);
        fill(&db, &registry, 0, 0..20_000);
        db.close();
        let (db, _, registry) = open(&dir);
        let rebuild = |max_calls: u64| {
            let calls = std::cell::Cell::new(0);
            let should_continue = || {
                calls.set(calls.get() + 1);
                calls.get() <= max_calls
            };
            let bucket = registry.snapshot().newest_first().remove(0);
            (rebuild_filter(&db, &registry, &bucket, &should_continue).unwrap(), calls.get())
        };
        assert_eq!(rebuild(1), (false, 2), "called after each batch of digests");
        assert!(filtered(&registry).is_empty());
        assert_eq!(rebuild(2), (true, 2));
        assert_eq!(filtered(&registry), [0]);
        assert!((0..20_000).all(|i| registry.snapshot().candidates(digest(i)) != 0));
    }

    #[test]
    fn a_bucket_without_keys_does_not_grow_the_filter_whatever_the_estimate() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _, registry) = open(&dir);
        let bucket = registry.ensure(&db, range(0)).unwrap();
        let before = registry.snapshot().filter_bytes();
        // RocksDB's estimate, for which the rebuild reserves room.
        bucket.keys.store(1_000_000, Ordering::Relaxed);
        assert!(rebuild_filter(&db, &registry, &bucket, &|| true).unwrap());
        assert_eq!(registry.snapshot().filter_bytes(), before);
    }

    #[test]
    fn a_damaged_filter_file_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let path = dir.path().join("store/filters").join(range(1).family()).with_extension(EXTENSION);
        let good = fs::read(&path).unwrap();
        for at in [9, 40, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            let (db, filters, registry) = open(&dir);
            filters.load(&registry, &|| true);
            assert_eq!(filtered(&registry), [0], "byte {at} of {}", good.len());
            assert_all_candidates(&registry);
            db.close();
        }
    }

    #[test]
    fn the_filter_file_of_a_dropped_bucket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let (db, filters, registry) = open(&dir);
        let filters_dir = dir.path().join("store/filters");
        fs::write(filters_dir.join("torn.new"), b"x").unwrap();
        fs::write(filters_dir.join("foreign"), b"x").unwrap();
        let oldest = registry.snapshot().newest_first().pop().unwrap();
        registry.remove(&db, &oldest, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        let left = || {
            let names = fs::read_dir(&filters_dir).unwrap().map(|entry| entry.unwrap().file_name());
            let mut left: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
            left.sort();
            left
        };
        persist(&db, &filters, &registry, 2_500);
        assert_eq!(left(), [format!("{}.filter", range(1).family()), "foreign".to_owned()]);
        for bucket in registry.snapshot().newest_first() {
            registry.remove(&db, &bucket, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        }
        persist(&db, &filters, &registry, 2_500);
        assert_eq!(left(), ["foreign"], "also when no bucket is left");
    }
}
