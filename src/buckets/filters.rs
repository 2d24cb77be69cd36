//! The filters behind the buckets: read from their files at open, rebuilt from the keys where those do not match, and
//! kept on disk when a bucket has ended. Meanwhile the store answers from disk.

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

/// Threads that read files, or the keys of buckets, at a time.
const THREADS: usize = 2;

const EXTENSION: &str = "filter";

/// The filter files of a store.
pub(crate) struct Filters {
    dir: PathBuf,
    key: FileKey,
    /// Files that were there at open, by the names of their buckets.
    found: Mutex<HashMap<String, FilterFile>>,
    /// What the file of a bucket answers for, by the bucket's name.
    persisted: Mutex<HashMap<String, Covered>>,
}

impl Filters {
    /// Looks at the files of these buckets, and leaves those alone that do not answer for all keys of theirs.
    pub(crate) fn find(db: &Db, secret: &Secret, buckets: &[String]) -> Result<Self> {
        let filters = Self {
            dir: db.directory().filters(),
            key: FileKey::new(secret),
            found: Mutex::default(),
            persisted: Mutex::default(),
        };
        let ssts = db.sst_files()?;
        for bucket in buckets {
            match FilterFile::open(&filters.path(bucket), &filters.key, bucket) {
                Ok(file) if file.covered.covers(ssts.get(bucket).map_or(&[], Vec::as_slice)) => {
                    filters.found.lock().insert(bucket.clone(), file);
                }
                Ok(_) => tracing::debug!(bucket, "the filter file does not answer for all keys of its bucket"),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => untrusted(bucket, &error),
            }
        }
        Ok(filters)
    }

    fn path(&self, bucket: &str) -> PathBuf {
        self.dir.join(bucket).with_extension(EXTENSION)
    }

    /// The geometry that most of the files have.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        let found = self.found.lock();
        let with = |geometry| found.values().filter(|file| file.geometry == geometry).count();
        found.values().map(|file| file.geometry).max_by_key(|geometry| with(*geometry))
    }

    /// Reads the files that were found at open. The filter answers for their buckets from then on. Gives up when
    /// `should_continue` says so.
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
                // What was read of it stays in the filter, where it lets a few keys more through to the disk.
                Some(error) => untrusted(&bucket.family, &error),
                None => {
                    registry.set_loaded(&bucket, base, file.covered.keys);
                    self.persisted.lock().insert(bucket.family.clone(), file.covered);
                }
            }
        }
    }

    /// Rebuilds the filters that are still missing from the keys of their buckets, the newest first, as long as `should_continue`
    /// says so.
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

    /// Moves every bucket that has ended to the newest base, so that the layers in which it grew up can go.
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

    /// Writes the filter of every bucket that has ended and has no file that answers for all its keys, and removes the
    /// files of buckets that are gone. `ssts` lists the files of all buckets while no key is on its way into one.
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
        // Every key of these runs is marked by now, and in this picture or a later one.
        let snapshot = registry.snapshot();
        for bucket in ended {
            let covered = Covered {
                keys: bucket.keys.load(Ordering::Relaxed),
                ssts: ssts.remove(&bucket.family).unwrap_or_default(),
            };
            let is_persisted =
                self.persisted.lock().get(&bucket.family).is_some_and(|persisted| persisted.covers(&covered.ssts));
            // One that outgrew its column is spread over several layers, and is rebuilt at the next open.
            let is_due = !is_persisted && snapshot.has(&bucket);
            let Some(matrix) = snapshot.base_of(bucket.column_id).filter(|_| is_due) else { continue };
            if !should_continue() {
                return Ok(());
            }
            let path = self.path(&bucket.family);
            file::write(&path, &self.key, &bucket.family, matrix, bucket.column_id, &covered)
                .map_err(|error| Error::io("cannot write", path, error))?;
            tracing::debug!(bucket = %bucket.range, keys = covered.keys, "filter kept");
            self.persisted.lock().insert(bucket.family.clone(), covered);
        }
        self.remove_expired(registry)
    }

    /// Removes the files of buckets that are gone, and what a crash left of one that was being written.
    pub(crate) fn remove_expired(&self, registry: &BucketRegistry) -> Result<()> {
        let buckets = registry.snapshot().newest_first();
        let is_live = |path: &Path| buckets.iter().any(|bucket| self.path(&bucket.family) == path);
        self.persisted.lock().retain(|family, _| buckets.iter().any(|bucket| bucket.family == *family));
        let unreadable = |error: io::Error| Error::io("cannot read", self.dir.clone(), error);
        for entry in fs::read_dir(&self.dir).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            // Nothing else that somebody may have put beside them.
            let ours = path.extension().is_some_and(|extension| extension == EXTENSION || extension == file::NEW);
            if ours && !is_live(&path) {
                Failpoint::FilterOrphaned.pass();
                fs::remove_file(&path).map_err(|error| Error::io("cannot remove", path, error))?;
            }
        }
        Ok(())
    }
}

fn untrusted(bucket: &str, error: &io::Error) {
    tracing::warn!(bucket, %error, "the filter file is not trusted: the filter is rebuilt from the bucket's keys");
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
    use crate::entry::{CompletedEntry, Entry, OwnWindow};
    use crate::fs::directory::Directory;
    use onlyonce_core::StoredResult;
    use std::time::Duration;

    const SECRET: Secret = [5; 16];
    const SPAN: Span = Span { window_ms: 10_000, bucket_ms: 1_000 };

    /// Keys `range`, completed in the bucket of a second.
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
            let done = CompletedEntry {
                token: 1,
                completed_ms: self.0 * 1_000,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::None,
            };
            let entry = Entry::Completed(done);
            keys.into_iter()
                .try_for_each(|i| visit(FlushEntry { digest: digest(i), key: &i.to_le_bytes(), entry: &entry }))
        }
    }

    fn open(dir: &tempfile::TempDir) -> (Db, Filters, BucketRegistry) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let (db, families) = Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap();
        let filters = Filters::find(&db, &SECRET, &families).unwrap();
        let registry =
            BucketRegistry::open(&db, &families, SPAN, &Now::default(), 0, 64 << 20, filters.geometry()).unwrap();
        (db, filters, registry)
    }

    fn fill(db: &Db, registry: &BucketRegistry, second: u64, range: std::ops::Range<u64>) {
        flush(db, registry, &Keys(second, range)).unwrap();
    }

    fn persist(db: &Db, filters: &Filters, registry: &BucketRegistry, now_ms: u64) {
        filters.persist(registry, now_ms, || db.sst_files(), || true).unwrap();
    }

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

    /// Three buckets, of which two have ended.
    fn three_buckets(dir: &tempfile::TempDir) {
        let (db, filters, registry) = open(dir);
        for second in 0..3 {
            fill(&db, &registry, second, second * 1_000..second * 1_000 + 1_000);
        }
        persist(&db, &filters, &registry, 2_500);
        db.close().unwrap();
    }

    fn assert_all_known(registry: &BucketRegistry) {
        for i in 0..3_000 {
            let column_bits = registry.snapshot().candidates(digest(i));
            let buckets: Vec<u64> =
                registry.snapshot().of_columns(column_bits).map(|bucket| bucket.range.start_ms / 1_000).collect();
            assert!(buckets.contains(&(i / 1_000)), "key {i}");
        }
    }

    #[test]
    fn the_filters_of_ended_buckets_are_read_back_and_the_others_rebuilt() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let (db, filters, registry) = open(&dir);
        assert!(filtered(&registry).is_empty());
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0, 1]);
        assert_all_known(&registry);
        Filters::rebuild(&db, &registry, &|| true).unwrap();
        assert_eq!(filtered(&registry), [0, 1, 2]);
        assert_all_known(&registry);
        let wrong = (10_000..30_000).filter(|i| registry.snapshot().candidates(digest(*i)) != 0).count();
        assert!(wrong < 20, "{wrong} of 20,000 new keys would go to the disk");
    }

    #[test]
    fn ended_buckets_move_to_the_newest_base_and_are_kept_from_there() {
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
        db.close().unwrap();
        let (_db, filters, registry) = open(&dir);
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0]);
    }

    #[test]
    fn a_file_that_does_not_know_all_runs_of_its_bucket_is_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let (db, _, registry) = open(&dir);
        fill(&db, &registry, 1, 5_000..5_100);
        db.close().unwrap();
        let (db, filters, registry) = open(&dir);
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0]);
        Filters::rebuild(&db, &registry, &|| true).unwrap();
        persist(&db, &filters, &registry, 2_500);
        db.close().unwrap();
        let (_db, filters, registry) = open(&dir);
        filters.load(&registry, &|| true);
        assert_eq!(filtered(&registry), [0, 1], "it was written anew");
        assert_ne!(registry.snapshot().candidates(digest(5_050)), 0);
    }

    #[test]
    fn a_filter_is_written_once_and_again_when_its_bucket_has_more() {
        let dir = tempfile::tempdir().unwrap();
        let (db, filters, registry) = open(&dir);
        (0..3).for_each(|second| fill(&db, &registry, second, second * 1_000..second * 1_000 + 1_000));
        let written = |filters: &Filters| {
            // Asked before each.
            let count = std::cell::Cell::new(0);
            let should_continue = || {
                count.set(count.get() + 1);
                true
            };
            filters.persist(&registry, 2_500, || db.sst_files(), should_continue).unwrap();
            count.get()
        };
        assert_eq!((written(&filters), written(&filters)), (2, 0));
        fill(&db, &registry, 1, 5_000..5_100);
        assert_eq!((written(&filters), written(&filters)), (1, 0));
    }

    #[test]
    fn a_rebuild_that_is_given_up_makes_no_filter() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _, registry) = open(&dir);
        fill(&db, &registry, 0, 0..20_000);
        db.close().unwrap();
        let (db, _, registry) = open(&dir);
        let rebuild = |most: u64| {
            let asked = std::cell::Cell::new(0);
            let should_continue = || {
                asked.set(asked.get() + 1);
                asked.get() <= most
            };
            let bucket = registry.snapshot().newest_first().remove(0);
            (rebuild_filter(&db, &registry, &bucket, &should_continue).unwrap(), asked.get())
        };
        assert_eq!(rebuild(1), (false, 2), "asked after so many keys");
        assert!(filtered(&registry).is_empty());
        assert_eq!(rebuild(2), (true, 2));
        assert_eq!(filtered(&registry), [0]);
        assert!((0..20_000).all(|i| registry.snapshot().candidates(digest(i)) != 0));
    }

    #[test]
    fn a_bucket_without_keys_takes_no_room_in_the_filter_however_many_were_expected() {
        let dir = tempfile::tempdir().unwrap();
        let (db, _, registry) = open(&dir);
        let bucket = registry.ensure(&db, range(0)).unwrap();
        let before = registry.snapshot().filter_bytes();
        // RocksDB's guess, which the rebuild makes room for.
        bucket.keys.store(1_000_000, Ordering::Relaxed);
        assert!(rebuild_filter(&db, &registry, &bucket, &|| true).unwrap());
        assert_eq!(registry.snapshot().filter_bytes(), before);
    }

    #[test]
    fn a_damaged_file_is_not_trusted() {
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
            assert_all_known(&registry);
            db.close().unwrap();
        }
    }

    #[test]
    fn the_file_of_a_bucket_that_is_gone_goes_too() {
        let dir = tempfile::tempdir().unwrap();
        three_buckets(&dir);
        let (db, filters, registry) = open(&dir);
        let filters_dir = dir.path().join("store/filters");
        fs::write(filters_dir.join("torn.new"), b"x").unwrap();
        fs::write(filters_dir.join("somebody's"), b"x").unwrap();
        let oldest = registry.snapshot().newest_first().pop().unwrap();
        registry.remove(&db, &oldest, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        let left = || {
            let names = fs::read_dir(&filters_dir).unwrap().map(|entry| entry.unwrap().file_name());
            let mut left: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
            left.sort();
            left
        };
        persist(&db, &filters, &registry, 2_500);
        assert_eq!(left(), [format!("{}.filter", range(1).family()), "somebody's".to_owned()]);
        for bucket in registry.snapshot().newest_first() {
            registry.remove(&db, &bucket, &Now { time_ms: u64::MAX, ..Now::default() }, 0);
        }
        persist(&db, &filters, &registry, 2_500);
        assert_eq!(left(), ["somebody's"], "also where no bucket is left");
    }
}
