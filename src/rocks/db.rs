//! The RocksDB database: creates, opens, reads, writes and closes it, and converts RocksDB's errors into [`Error`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rocksdb::{
    ColumnFamilyDescriptor, DBPinnableSlice, DBWithThreadMode, DEFAULT_COLUMN_FAMILY_NAME, Direction, FlushOptions,
    IngestExternalFileOptions, IteratorMode, MultiThreaded, ReadOptions, WriteBatch, WriteOptions, properties,
};

use super::lsn::LsnTracker;
use super::options::Tuning;
use super::sst::SstWriter;
use super::{cause, failed, file_manifest, journal_cf, sst, unreadable};
use crate::fs::directory::Directory;
use crate::fs::sync_group::SyncGroup;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{AtomicBool, AtomicU64, Mutex, RwLock, RwLockReadGuard};
use onlyonce_core::{Error, Result};

type Rocks = DBWithThreadMode<MultiThreaded>;

const JOURNAL: &str = DEFAULT_COLUMN_FAMILY_NAME;
const META: &str = "meta";

/// In a process that is being killed, RocksDB's own lock outlives the store's by at most this.
const OPEN_WAIT: Duration = Duration::from_secs(1);
/// How long to wait between two attempts to open a database whose files a dying process still holds.
const OPEN_POLL: Duration = Duration::from_millis(20);

/// How long to sleep between two checks for finished compactions.
const MERGE_POLL: Duration = Duration::from_millis(1);

/// Enough for a record of one key and its LSN header, so that the batch is allocated once.
const SMALL_BATCH_BYTES: usize = 256;

/// Below and above every key of a bucket.
const FIRST_KEY: &[u8] = &[];
const LAST_KEY: &[u8] = &[0xff; 16];

/// An open database, until it is closed.
pub(crate) struct Db {
    // Each call holds a read lock, so that `close` can wait for running calls.
    rocks: RwLock<Option<Rocks>>,
    directory: Directory,
    tuning: Tuning,
    group: SyncGroup,
    lsn: LsnTracker,
    ssts_written: AtomicU64,
    /// A write or a sync has failed, so the content of the files is unknown.
    in_doubt: AtomicBool,
    /// Held while the file manifest is written.
    manifest_lock: Mutex<()>,
    /// Bytes written since the last file manifest.
    bytes_since_manifest: AtomicU64,
}

/// The initial `meta` values of a new database.
pub(crate) type Seed<'a> = &'a [(&'static str, Vec<u8>)];

impl Db {
    /// Opens the database in `directory`, or creates it with `seed`. Returns it with the names of its bucket column
    /// families.
    pub(crate) fn open(
        directory: Directory,
        memory_budget: usize,
        wait: Duration,
        seed: impl FnOnce() -> Result<Vec<(&'static str, Vec<u8>)>>,
    ) -> Result<(Self, Vec<String>)> {
        let tuning = Tuning::for_budget(memory_budget);
        if !directory.holds_a_store()? {
            let seed = seed()?;
            directory.create_database(|path| create(&tuning, path, &seed))?;
        }
        let path = directory.database();
        file_manifest::check(&directory.file_manifest(), &path)?;
        let options = tuning.database();
        let families = Rocks::list_cf(&options, &path).map_err(|error| unreadable("opening", &path, &error))?;
        let buckets: Vec<String> = families.iter().filter(|name| *name != JOURNAL && *name != META).cloned().collect();
        if !families.iter().any(|name| name == META) {
            return Err(Error::Corrupt {
                place: path.display().to_string(),
                detail: "column family `meta` is missing".to_owned(),
            });
        }
        file_manifest::reopen(&directory.file_manifest())?;
        Failpoint::OpenChecked.pass();
        let start = Instant::now();
        let rocks = loop {
            let descriptors = families.iter().map(|name| {
                let options = match name.as_str() {
                    JOURNAL => tuning.journal(),
                    META => tuning.meta(),
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
        let db = Self {
            rocks: RwLock::new(Some(rocks)),
            directory,
            tuning,
            group: SyncGroup::default(),
            lsn: LsnTracker::default(),
            ssts_written: AtomicU64::new(0),
            in_doubt: AtomicBool::new(false),
            manifest_lock: Mutex::new(()),
            bytes_since_manifest: AtomicU64::new(0),
        };
        db.lsn.begin_epoch(file_manifest::newest_log(&path)?.unwrap_or_default());
        Ok((db, buckets))
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    fn rocks(&self) -> Result<Open<'_>> {
        let guard = self.rocks.read();
        if guard.is_some() { Ok(Open(guard)) } else { Err(Error::Closed) }
    }

    /// Writes the transaction that `fill` builds, atomically. With `sync` it is on disk when this returns. After an
    /// error the outcome is unknown.
    pub(crate) fn write(&self, sync: bool, fill: impl FnOnce(&mut Tx<'_>) -> Result<()>) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let mut tx = Tx { rocks, batch: WriteBatch::with_capacity_bytes(SMALL_BATCH_BYTES) };
        fill(&mut tx)?;
        if !tx.batch.is_empty() {
            self.write_batch(rocks, tx.batch)?;
        }
        if sync {
            self.group.wait(|| self.sync(rocks))?;
        }
        Ok(())
    }

    fn write_batch(&self, rocks: &Rocks, mut batch: WriteBatch) -> Result<()> {
        let bytes = batch.size_in_bytes() as u64;
        let header = self.lsn.begin();
        header.put(&mut batch);
        Failpoint::WriteBegun.pass();
        rocks.write(batch).map_err(|error| self.write_failed(&error))?;
        self.lsn.written(&header);
        self.bytes_since_manifest.fetch_add(bytes, Ordering::Relaxed);
        Failpoint::WriteDone.pass();
        Ok(())
    }

    /// The number of log syncs that callers waited for.
    pub(crate) fn syncs(&self) -> u64 {
        self.group.syncs()
    }

    /// Syncs everything written so far.
    pub(crate) fn sync_log(&self) -> Result<()> {
        let open = self.rocks()?;
        self.sync(open.get()?)
    }

    fn sync(&self, rocks: &Rocks) -> Result<()> {
        let written_lsn = self.lsn.written_lsn();
        Failpoint::SyncBegun.pass();
        rocks.flush_wal(true).map_err(|error| self.write_failed(&error))?;
        if let Some(path) = self.directory.deleted() {
            self.in_doubt.store(true, Ordering::Release);
            return Err(Error::DirectoryGone { path });
        }
        self.lsn.synced(written_lsn);
        Failpoint::SyncDone.pass();
        Ok(())
    }

    fn write_failed(&self, error: &rocksdb::Error) -> Error {
        self.in_doubt.store(true, Ordering::Release);
        match self.directory.deleted() {
            Some(path) => Error::DirectoryGone { path },
            None => Error::WriteFailed { source: cause(error) },
        }
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

    /// Passes every journal record to `visit`, ordered by number.
    pub(crate) fn for_each_record(&self, mut visit: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
        let open = self.rocks()?;
        for item in open.get()?.iterator(IteratorMode::Start) {
            let (key, record) = item.map_err(|error| unreadable("reading", &self.directory.database(), &error))?;
            let Some(number) = journal_cf::number(&key) else {
                return Err(Error::Corrupt {
                    place: "the journal".to_owned(),
                    detail: format!("the key {} is not a record number", key.escape_ascii()),
                });
            };
            visit(number, &record)?;
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

    /// The numbers of the SSTs of each column family. Numbers are never reused.
    pub(crate) fn sst_files(&self) -> Result<HashMap<String, Vec<u64>>> {
        let open = self.rocks()?;
        let path = self.directory.database();
        let files = open.get()?.live_files().map_err(|error| failed("listing the files of", &path, &error))?;
        let mut sst_files: HashMap<String, Vec<u64>> = HashMap::new();
        for file in files {
            let number =
                file.name.trim_start_matches('/').trim_end_matches(".sst").parse().map_err(|_| Error::Corrupt {
                    place: path.display().to_string(),
                    detail: format!("the file name {} is not a number", file.name),
                })?;
            sst_files.entry(file.column_family_name).or_default().push(number);
        }
        Ok(sst_files)
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

    /// Flushes `meta`, so that its values do not depend on the log alone, and begins a new log. Must not run
    /// concurrently with writes.
    pub(crate) fn begin_log(&self) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(meta) = rocks.cf_handle(META) else { return Err(missing_family(META)) };
        let database = self.directory.database();
        rocks.flush_cf(&meta).map_err(|error| failed("flushing", &database, &error))?;
        self.lsn.begin_epoch(file_manifest::newest_log(&database)?.unwrap_or_default());
        self.write_manifest()
    }

    /// Writes the file manifest if enough was written that there may be a new log. Waits for the disk.
    pub(crate) fn write_manifest_if_due(&self) {
        if self.bytes_since_manifest.load(Ordering::Relaxed) >= self.tuning.manifest_interval_bytes()
            && let Err(error) = self.write_manifest()
        {
            // Only the detection of missing files suffers, not the data.
            tracing::warn!(error = error.chain(), "failed to write file manifest");
        }
    }

    /// Writes the file manifest.
    pub(crate) fn write_manifest(&self) -> Result<()> {
        self.write_manifest_as(false)
    }

    fn write_manifest_as(&self, closed: bool) -> Result<()> {
        let _manifest_lock = self.manifest_lock.lock();
        self.bytes_since_manifest.store(0, Ordering::Relaxed);
        file_manifest::write(&self.directory.file_manifest(), &self.directory.database(), closed)
    }

    /// Flushes RocksDB's memtables of the journal and of `meta`, so that RocksDB can delete old logs. Also flushes
    /// buckets with pending deletes, which would otherwise keep the logs alive.
    pub(crate) fn flush_journal<'a>(&self, buckets: impl Iterator<Item = &'a str>) -> Result<()> {
        let open = self.rocks()?;
        let rocks = open.get()?;
        let Some(meta) = rocks.cf_handle(META) else { return Err(missing_family(META)) };
        let Some(journal) = rocks.cf_handle(JOURNAL) else { return Err(missing_family(JOURNAL)) };
        let cannot_flush = |error| failed("flushing", &self.directory.database(), &error);
        let mut families = vec![journal, meta];
        for bucket in buckets.filter_map(|bucket| rocks.cf_handle(bucket)) {
            let entries =
                rocks.property_int_value_cf(&bucket, properties::NUM_ENTRIES_ACTIVE_MEM_TABLE).map_err(cannot_flush)?;
            if entries.is_some_and(|entries| entries > 0) {
                families.push(bucket);
            }
        }
        let families: Vec<_> = families.iter().collect();
        Failpoint::LogFlushBegun.pass();
        rocks.flush_cfs_opt(&families, &FlushOptions::default()).map_err(cannot_flush)?;
        Failpoint::LogFlushed.pass();
        self.write_manifest()
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
        for family in [JOURNAL, META].into_iter().chain(buckets) {
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

    /// As [`Db::close_with`], without a last write.
    #[cfg(test)]
    pub(crate) fn close(&self) -> Result<()> {
        self.close_with(|_| Ok(()))
    }

    /// Waits for running calls, writes what `last` adds, syncs everything and closes. Later calls fail with
    /// [`Error::Closed`].
    pub(crate) fn close_with(&self, last: impl FnOnce(&mut Tx<'_>) -> Result<()>) -> Result<()> {
        let Some(rocks) = self.rocks.write().take() else { return Ok(()) };
        let mut tx = Tx { rocks: &rocks, batch: WriteBatch::default() };
        let filled = last(&mut tx);
        let batch = tx.batch;
        let written = filled.and_then(|()| if batch.is_empty() { Ok(()) } else { self.write_batch(&rocks, batch) });
        Failpoint::CloseTokensWritten.pass();
        let synced = written.and_then(|()| self.sync(&rocks));
        Failpoint::CloseSynced.pass();
        rocks.cancel_all_background_work(true);
        drop(rocks);
        Failpoint::CloseDatabase.pass();
        if !self.in_doubt.load(Ordering::Acquire)
            && let Err(error) = self.write_manifest_as(true)
        {
            tracing::warn!(
                error = error.chain(),
                "failed to write shutdown file manifest; the next open cannot detect truncated files"
            );
        }
        Failpoint::CloseManifestWritten.pass();
        self.directory.release();
        synced
    }
}

/// A guard that keeps the database open.
struct Open<'a>(RwLockReadGuard<'a, Option<Rocks>>);

impl Open<'_> {
    fn get(&self) -> Result<&Rocks> {
        self.0.as_ref().ok_or(Error::Closed)
    }
}

/// A batch of writes that are applied atomically.
pub(crate) struct Tx<'a> {
    rocks: &'a Rocks,
    batch: WriteBatch,
}

impl Tx<'_> {
    pub(crate) fn put_record(&mut self, number: u64, record: &[u8]) {
        journal_cf::put(&mut self.batch, number, record);
    }

    pub(crate) fn delete_records_before(&mut self, end: u64) {
        journal_cf::delete_before(&mut self.batch, end);
    }

    pub(crate) fn put_meta(&mut self, name: &(impl AsRef<[u8]> + ?Sized), value: &[u8]) -> Result<()> {
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
    let mut options = tuning.database();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    let descriptors =
        [ColumnFamilyDescriptor::new(JOURNAL, tuning.journal()), ColumnFamilyDescriptor::new(META, tuning.meta())];
    let cannot_create = |error| failed("creating", path, &error);
    let rocks = Rocks::open_cf_descriptors(&options, path, descriptors).map_err(cannot_create)?;
    let mut batch = WriteBatch::default();
    let meta = rocks.cf_handle(META).ok_or_else(|| missing_family(META))?;
    for (name, value) in seed {
        batch.put_cf(&meta, name, value);
    }
    let mut synced = WriteOptions::default();
    synced.set_sync(true);
    rocks.write_opt(batch, &synced).map_err(cannot_create)
}

fn missing_family(name: &str) -> Error {
    Error::Corrupt { place: "the database".to_owned(), detail: format!("column family `{name}` is missing") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir) -> Db {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        Db::open(directory, 32 << 20, Duration::ZERO, || Ok(Vec::new())).unwrap().0
    }

    #[test]
    fn waiting_for_compactions_ends_when_they_are_done_or_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir);
        let flush = |number: u64| {
            db.write(false, |tx| {
                tx.put_record(number, b"a record");
                Ok(())
            })
            .unwrap();
            db.flush_journal(std::iter::empty()).unwrap();
        };
        (1..=60).for_each(flush);
        assert!(db.wait_for_merges(std::iter::empty(), 8, Duration::from_secs(60)).unwrap());
        let ssts: usize = db.sst_files().unwrap().values().map(Vec::len).sum();
        assert!(ssts <= 20, "{ssts} of 120 SSTs are left");
        let mut records = 0;
        db.for_each_record(|_, _| {
            records += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(records, 60);
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
    fn the_last_write_of_a_close_is_there_at_the_next_open() {
        let dir = tempfile::tempdir().unwrap();
        let db = open(&dir);
        db.close_with(|tx| tx.put_meta("last", b"value")).unwrap();
        assert!(matches!(db.close_with(|_| panic!("the database is closed")), Ok(())));
        assert_eq!(open(&dir).meta("last").unwrap().as_deref(), Some(&b"value"[..]));
    }
}
