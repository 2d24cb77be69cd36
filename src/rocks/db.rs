//! The RocksDB database: creates, opens, reads, writes and closes it, and converts RocksDB's errors into [`Error`].

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rocksdb::{
    ColumnFamilyDescriptor, DBPinnableSlice, DBWithThreadMode, DEFAULT_COLUMN_FAMILY_NAME, Direction,
    IngestExternalFileOptions, IteratorMode, MultiThreaded, ReadOptions, WriteBatch, WriteOptions, properties,
};

use super::manifest::ManifestState;
use super::options::{ENDED_BUCKET, Tuning};
use super::sst::SstWriter;
use super::{failed, manifest, sst, unreadable};
use crate::fs::directory::Directory;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{AtomicU64, Mutex, RwLock, RwLockReadGuard};
use onlyonce_core::{Error, Result};

type Rocks = DBWithThreadMode<MultiThreaded>;

/// RocksDB requires this column family. It stays empty.
const UNUSED: &str = DEFAULT_COLUMN_FAMILY_NAME;
const META: &str = "meta";

/// In a process that is being killed, RocksDB's own lock outlives the store's by at most this.
const OPEN_WAIT: Duration = Duration::from_secs(1);
/// How long to wait between two attempts to open a database whose files a dying process still holds.
const OPEN_POLL: Duration = Duration::from_millis(20);

/// The levels of a column family: RocksDB's default.
const LEVELS: usize = 7;

/// How long to sleep between two checks for finished compactions.
const MERGE_POLL: Duration = Duration::from_millis(1);

/// Below and above every key of a bucket.
const FIRST_KEY: &[u8] = &[];
const LAST_KEY: &[u8] = &[0xff; 16];

/// An open database, until it is closed.
pub(crate) struct Db {
    // Each call holds a read lock, so that `close` can wait for running calls.
    rocks: RwLock<Option<Rocks>>,
    directory: Arc<Directory>,
    tuning: Tuning,
    ssts_written: AtomicU64,
    /// The last state of the manifest that was read.
    manifest: Mutex<Option<ManifestState>>,
}

/// The initial `meta` values of a new database.
pub(crate) type Seed<'a> = &'a [(&'static str, Vec<u8>)];

impl Db {
    /// Opens the database in `directory`, or creates it with `seed`. `stated` is what the journal has of its manifest. Returns it
    /// with the names of its bucket column families.
    pub(crate) fn open(
        directory: impl Into<Arc<Directory>>,
        memory_budget: usize,
        wait: Duration,
        stated: Option<ManifestState>,
        seed: impl FnOnce() -> Result<Vec<(&'static str, Vec<u8>)>>,
    ) -> Result<(Self, Vec<String>)> {
        let directory = directory.into();
        let tuning = Tuning::for_budget(memory_budget);
        if !directory.holds_a_store()? {
            let seed = seed()?;
            directory.create_database(|path| create(&tuning, path, &seed))?;
        }
        let path = directory.database();
        manifest::check(&path, stated)?;
        let options = tuning.database(&path)?;
        let families = Rocks::list_cf(&options, &path).map_err(|error| unreadable("opening", &path, &error))?;
        let buckets: Vec<String> = families.iter().filter(|name| *name != UNUSED && *name != META).cloned().collect();
        if !families.iter().any(|name| name == META) {
            return Err(Error::Corrupt {
                place: path.display().to_string(),
                detail: "column family `meta` is missing from the MANIFEST file".to_owned(),
            });
        }
        Failpoint::OpenChecked.pass();
        let start = Instant::now();
        let rocks = loop {
            let descriptors = families.iter().map(|name| {
                let options = match name.as_str() {
                    UNUSED | META => tuning.meta(),
                    _ => tuning.bucket(),
                };
                ColumnFamilyDescriptor::new(name, options)
            });
            match Rocks::open_cf_descriptors(&options, &path, descriptors) {
                Ok(rocks) => break rocks,
                Err(error) if error.kind() == rocksdb::ErrorKind::IOError && start.elapsed() < wait.min(OPEN_WAIT) => {
                    std::thread::sleep(OPEN_POLL);
                }
                Err(error) => return Err(unreadable("opening", &path, &error)),
            }
        };
        Failpoint::OpenDatabase.pass();
        let ssts_written = AtomicU64::new(0);
        let (rocks, manifest) = (RwLock::new(Some(rocks)), Mutex::new(None));
        Ok((Self { rocks, directory, tuning, ssts_written, manifest }, buckets))
    }

    /// Reads a value of `meta` of a database that is not open, without changing anything. `None` if that is not possible.
    pub(crate) fn read_meta(directory: &Directory, name: &str) -> Option<Vec<u8>> {
        let path = directory.database();
        manifest::check(&path, None).ok()?;
        let options = Tuning::for_budget(32 << 20).database(&path).ok()?;
        let rocks = Rocks::open_cf_for_read_only(&options, &path, [UNUSED, META], false).ok()?;
        let value = rocks.get_cf(&rocks.cf_handle(META)?, name);
        value.ok().flatten()
    }

    pub(crate) fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// The size at which RocksDB flushes the memtable of `meta` by itself, before its next change.
    pub(crate) fn meta_memtable_bytes(&self) -> usize {
        self.tuning.memory_budget
    }

    fn rocks(&self) -> Result<Open<'_>> {
        let guard = self.rocks.read();
        if guard.is_some() { Ok(Open(guard)) } else { Err(Error::Closed) }
    }

    /// Fails if RocksDB would reject a change. After a failed flush it rejects all of them until it has recovered.
    pub(crate) fn check_writable(&self) -> Result<()> {
        let open = self.rocks()?;
        self.write(open.get()?, WriteBatch::default())
    }

    fn write(&self, rocks: &Rocks, batch: WriteBatch) -> Result<()> {
        let mut unlogged = WriteOptions::default();
        unlogged.disable_wal(true);
        rocks.write_opt(batch, &unlogged).map_err(|error| failed("writing to", &self.directory.database(), &error))
    }

    /// Applies the changes that `fill` adds, atomically. They are not on disk before the next
    /// [`Db::flush_memtables`]: the journal has them until then.
    pub(crate) fn apply(&self, fill: impl FnOnce(&mut Batch<'_>) -> Result<()>) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let mut batch = Batch { rocks, batch: WriteBatch::default() };
        fill(&mut batch)?;
        if batch.batch.is_empty() {
            return Ok(());
        }
        self.write(rocks, batch.batch)
    }

    /// Reads a value of `meta`.
    pub(crate) fn meta(&self, name: &(impl AsRef<[u8]> + ?Sized)) -> Result<Option<Vec<u8>>> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(META) else { return Err(missing_family(META)) };
        rocks.get_cf(&family, name).map_err(|error| unreadable("reading", &self.directory.database(), &error))
    }

    /// Passes the values of `meta` to `visit`, ordered by name from `from` on, until it returns false.
    pub(crate) fn for_each_meta(&self, from: &[u8], mut visit: impl FnMut(&[u8], &[u8]) -> Result<bool>) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(META) else { return Err(missing_family(META)) };
        for item in rocks.iterator_cf(&family, IteratorMode::From(from, Direction::Forward)) {
            let (name, value) = item.map_err(|error| unreadable("reading", &self.directory.database(), &error))?;
            if !visit(&name, &value)? {
                break;
            }
        }
        Ok(())
    }

    /// Reads the value of `entry_key` in a bucket and passes it to `read`. A dropped bucket has no keys.
    pub(crate) fn get<R>(&self, bucket: &str, entry_key: &[u8], read: impl FnOnce(&[u8]) -> R) -> Result<Option<R>> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Ok(None) };
        match rocks.get_pinned_cf(&family, entry_key) {
            Ok(value) => Ok(value.map(|value| read(&value))),
            Err(error) if error.kind() == rocksdb::ErrorKind::ColumnFamilyDropped => Ok(None),
            Err(error) => Err(unreadable("reading", &self.directory.database(), &error)),
        }
    }

    /// Reads many values of a bucket. Passes the index and the value of each entry key that exists to `read`.
    pub(crate) fn get_many(
        &self,
        bucket: &str,
        entry_keys: &[Vec<u8>],
        mut read: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Ok(()) };
        let values: Vec<Result<Option<DBPinnableSlice<'_>>, rocksdb::Error>> =
            rocks.batched_multi_get_cf(&family, entry_keys, false);
        for (index, value) in values.into_iter().enumerate() {
            match value {
                Ok(Some(value)) => read(index, &value)?,
                Ok(None) => {}
                Err(error) if error.kind() == rocksdb::ErrorKind::ColumnFamilyDropped => {}
                Err(error) => return Err(unreadable("reading", &self.directory.database(), &error)),
            }
        }
        Ok(())
    }

    /// Passes the entry keys of a bucket to `visit`, in order, until it returns false.
    pub(crate) fn for_each_key(&self, bucket: &str, mut visit: impl FnMut(&[u8]) -> Result<bool>) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Ok(()) };
        let mut options = ReadOptions::default();
        // A full scan must not evict blocks that lookups use.
        options.fill_cache(false);
        options.set_readahead_size(1 << 20);
        let mut entries = rocks.raw_iterator_cf_opt(&family, options);
        entries.seek_to_first();
        while let Some(key) = entries.key() {
            if !visit(key)? {
                return Ok(());
            }
            entries.next();
        }
        entries.status().map_err(|error| unreadable("reading", &self.directory.database(), &error))
    }

    pub(crate) fn create_bucket(&self, bucket: &str) -> Result<()> {
        let open = self.rocks()?;
        open.get()?
            .create_cf(bucket, &self.tuning.bucket())
            .map_err(|error| failed("creating a bucket in", &self.directory.database(), &error))
    }

    /// Drops a bucket. Its files are deleted once no reader uses them.
    pub(crate) fn drop_bucket(&self, bucket: &str) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let cannot_drop = |error| failed("dropping a bucket in", &self.directory.database(), &error);
        // Deletes the files first: dropping a column family blocks all lookups, and is fast without files.
        if let Some(family) = rocks.cf_handle(bucket) {
            rocks.delete_file_in_range_cf(&family, FIRST_KEY, LAST_KEY).map_err(cannot_drop)?;
        }
        Failpoint::BucketEmptied.pass();
        rocks.drop_cf(bucket).map_err(cannot_drop)?;
        Failpoint::BucketDropped.pass();
        Ok(())
    }

    /// The present state of the manifest, which lists all SSTs. It is on disk when this returns.
    pub(crate) fn manifest(&self) -> Result<ManifestState> {
        let mut last = self.manifest.lock();
        let state = ManifestState::read(&self.directory.database(), *last)?;
        *last = Some(state);
        Ok(state)
    }

    /// The numbers of the SSTs of each column family.
    pub(crate) fn sst_numbers(&self) -> Result<HashMap<String, Vec<u64>>> {
        let numbers = |ssts: Vec<(u64, u64)>| ssts.into_iter().map(|(number, _)| number).collect();
        Ok(self.ssts()?.into_iter().map(|(family, ssts)| (family, numbers(ssts))).collect())
    }

    /// The numbers and sizes in bytes of the SSTs of each column family. Numbers are never reused.
    pub(crate) fn ssts(&self) -> Result<BTreeMap<String, Vec<(u64, u64)>>> {
        let open = self.rocks()?;
        let path = self.directory.database();
        let files = open.get()?.live_files().map_err(|error| failed("listing the files of", &path, &error))?;
        let mut ssts: BTreeMap<String, Vec<(u64, u64)>> = BTreeMap::new();
        for file in files {
            let number =
                file.name.trim_start_matches('/').trim_end_matches(".sst").parse().map_err(|_| Error::Corrupt {
                    place: path.display().to_string(),
                    detail: format!("the file name {} is not a number", file.name),
                })?;
            ssts.entry(file.column_family_name).or_default().push((number, file.size as u64));
        }
        Ok(ssts)
    }

    /// RocksDB's estimate of the number of keys in a bucket. Exact except for keys that were forgotten or ingested
    /// twice.
    pub(crate) fn estimate_keys(&self, bucket: &str) -> Result<u64> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Ok(0) };
        let keys = rocks
            .property_int_value_cf(&family, properties::ESTIMATE_NUM_KEYS)
            .map_err(|error| unreadable("reading", &self.directory.database(), &error))?;
        Ok(keys.unwrap_or(0))
    }

    /// Writes an SST with `fill` and ingests it into `bucket`. It is on disk when this returns. Idempotent: ingesting
    /// the same keys again changes nothing.
    pub(crate) fn add_sst(&self, bucket: &str, fill: impl FnOnce(&mut SstWriter<'_>) -> Result<()>) -> Result<()> {
        let number = self.ssts_written.fetch_add(1, Ordering::Relaxed);
        let path: PathBuf = self.directory.sst_dir().join(format!("{number}.sst"));
        let written = sst::write(&self.tuning, &path, fill).and_then(|()| self.ingest(bucket, &path));
        if written.is_err() {
            // The file is not part of the store. If it cannot be removed now, the next open removes it.
            let _ = std::fs::remove_file(&path);
        }
        written
    }

    fn ingest(&self, bucket: &str, path: &Path) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Err(missing_family(bucket)) };
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        Failpoint::SstWritten.pass();
        rocks
            .ingest_external_file_cf_opts(&family, &options, vec![path])
            .map_err(|error| failed("ingesting", path, &error))?;
        Failpoint::SstIngested.pass();
        Ok(())
    }

    /// Flushes RocksDB's memtables of the buckets with deleted keys and of `meta`, so that what was applied is on disk. `meta`
    /// comes last: it counts the flushes, and its count shows at the next open that RocksDB's manifest has all the other SSTs.
    pub(crate) fn flush_memtables<'a>(&self, buckets: impl Iterator<Item = &'a str>) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let cannot_flush = |error| failed("flushing", &self.directory.database(), &error);
        for bucket in buckets.filter_map(|bucket| rocks.cf_handle(bucket)) {
            // RocksDB may be flushing a full memtable already.
            for entries in [properties::NUM_ENTRIES_ACTIVE_MEM_TABLE, properties::NUM_ENTRIES_IMM_MEM_TABLES] {
                if rocks.property_int_value_cf(&bucket, entries).map_err(cannot_flush)?.is_some_and(|count| count > 0) {
                    rocks.flush_cf(&bucket).map_err(cannot_flush)?;
                }
            }
        }
        let Some(meta) = rocks.cf_handle(META) else { return Err(missing_family(META)) };
        rocks.flush_cf(&meta).map_err(cannot_flush)
    }

    /// The number of sorted runs of a bucket: a lookup asks the filter of one SST in each.
    pub(crate) fn sorted_runs(&self, bucket: &str) -> Result<u64> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Ok(0) };
        let mut runs = 0;
        for level in 0..LEVELS {
            let ssts = rocks
                .property_int_value_cf(&family, properties::num_files_at_level(level))
                .map_err(|error| unreadable("reading", &self.directory.database(), &error))?
                .unwrap_or(0);
            // An SST that overlaps with no other one of a deeper level is ingested there. Each SST of level 0 is a run.
            runs += if level == 0 { ssts } else { ssts.min(1) };
        }
        Ok(runs)
    }

    /// Makes RocksDB merge the SSTs of a bucket that has ended. Returns before they are merged. Also after an error RocksDB may
    /// merge them.
    pub(crate) fn merge_bucket(&self, bucket: &str) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(family) = rocks.cf_handle(bucket) else { return Ok(()) };
        rocks
            .set_options_cf(&family, &ENDED_BUCKET)
            .map_err(|error| failed("merging a bucket in", &self.directory.database(), &error))
    }

    /// Waits until no column family has more than `max_ssts` SSTs in level 0. False if compaction has not achieved
    /// that within `limit`.
    pub(crate) fn wait_for_merges<'a>(
        &self,
        buckets: impl Iterator<Item = &'a str>,
        max_ssts: u64,
        limit: Duration,
    ) -> Result<bool> {
        let begun = Instant::now();
        let open = self.rocks()?;
        let rocks = open.get()?;
        for family in std::iter::once(META).chain(buckets) {
            // A bucket that was dropped concurrently has none.
            while let Some(family) = rocks.cf_handle(family)
                && let Ok(Some(ssts)) = rocks.property_int_value_cf(&family, properties::num_files_at_level(0))
                && ssts > max_ssts
            {
                if begun.elapsed() >= limit {
                    return Ok(false);
                }
                std::thread::sleep(MERGE_POLL);
            }
        }
        Ok(true)
    }

    /// Waits for running calls and closes. Later calls fail with [`Error::Closed`].
    pub(crate) fn close(&self) {
        let Some(rocks) = self.rocks.write().take() else { return };
        rocks.cancel_all_background_work(true);
        drop(rocks);
        Failpoint::CloseDatabase.pass();
        self.directory.release();
    }
}

/// A guard that keeps the database open.
struct Open<'a>(RwLockReadGuard<'a, Option<Rocks>>);

impl Open<'_> {
    fn get(&self) -> Result<&Rocks> {
        self.0.as_ref().ok_or(Error::Closed)
    }
}

/// Changes that are applied together.
pub(crate) struct Batch<'a> {
    rocks: &'a Rocks,
    batch: WriteBatch,
}

impl Batch<'_> {
    pub(crate) fn put_meta(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        let family = self.rocks.cf_handle(META).ok_or_else(|| missing_family(META))?;
        self.batch.put_cf(&family, name, value);
        Ok(())
    }

    pub(crate) fn delete_meta(&mut self, name: &[u8]) -> Result<()> {
        let family = self.rocks.cf_handle(META).ok_or_else(|| missing_family(META))?;
        self.batch.delete_cf(&family, name);
        Ok(())
    }

    /// Deletes a key of a bucket. A dropped bucket has no keys.
    pub(crate) fn delete_key(&mut self, bucket: &str, entry_key: &[u8]) {
        if let Some(family) = self.rocks.cf_handle(bucket) {
            self.batch.delete_cf(&family, entry_key);
        }
    }
}

fn create(tuning: &Tuning, path: &Path, seed: Seed<'_>) -> Result<()> {
    let mut options = tuning.database(path)?;
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    let descriptors = [UNUSED, META].map(|name| ColumnFamilyDescriptor::new(name, tuning.meta()));
    let cannot_create = |error| failed("creating", path, &error);
    let rocks = Rocks::open_cf_descriptors(&options, path, descriptors).map_err(cannot_create)?;
    let mut batch = WriteBatch::default();
    let meta = rocks.cf_handle(META).ok_or_else(|| missing_family(META))?;
    for (name, value) in seed {
        batch.put_cf(&meta, name, value);
    }
    let mut unlogged = WriteOptions::default();
    unlogged.disable_wal(true);
    rocks.write_opt(batch, &unlogged).and_then(|()| rocks.flush_cf(&meta)).map_err(cannot_create)
}

fn missing_family(name: &str) -> Error {
    Error::Corrupt { place: "the database".to_owned(), detail: format!("column family `{name}` is missing") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir) -> Db {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Db::open(directory, 32 << 20, Duration::ZERO, None, || Ok(Vec::new())).unwrap().0
    }

    #[test]
    fn waiting_for_compactions_ends_when_they_are_done_or_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir);
        let flush = |number: u64| {
            db.apply(|batch| batch.put_meta(&number.to_be_bytes(), b"a value")).unwrap();
            db.flush_memtables(std::iter::empty()).unwrap();
        };
        (1..=60).for_each(flush);
        assert!(db.wait_for_merges(std::iter::empty(), 8, Duration::from_secs(60)).unwrap());
        let ssts: usize = db.ssts().unwrap().values().map(Vec::len).sum();
        assert!(ssts <= 20, "{ssts} of 60 SSTs are left");
        let mut values = 0;
        db.for_each_meta(&[], |_, _| {
            values += 1;
            Ok(true)
        })
        .unwrap();
        assert_eq!(values, 60);
        // Repeated, because a compaction may just have removed the last SST of level 0.
        let is_timeout = (61..100).any(|number| {
            flush(number);
            let begun = Instant::now();
            let merged = db.wait_for_merges(std::iter::empty(), 0, Duration::from_millis(20)).unwrap();
            assert!(merged || begun.elapsed() >= Duration::from_millis(20));
            !merged
        });
        assert!(is_timeout, "a single SST is never compacted");
    }

    #[test]
    fn what_was_applied_is_on_disk_after_a_flush_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir);
        db.apply(|batch| batch.put_meta(b"flushed", b"value")).unwrap();
        db.flush_memtables(std::iter::empty()).unwrap();
        db.apply(|batch| batch.put_meta(b"lost", b"value")).unwrap();
        db.close();
        assert!(matches!(db.meta("flushed"), Err(Error::Closed)));
        let db = open(&dir);
        assert_eq!(db.meta("flushed").unwrap().as_deref(), Some(&b"value"[..]));
        assert_eq!(db.meta("lost").unwrap(), None, "RocksDB flushes at a close only what its log is on for");
    }
}
