//! The journal of a store: transactions and checkpoints in the segments of `onlyonce-journal`.
//!
//! A transaction is appended to the journal first, and then applied to the database, whose own log is off. What it changes in
//! the database is on disk with the next flush of the database; until then the journal has it. Order: two transactions that
//! change the database are applied in the order of their records, or a replay could end in another state.
//!
//! Each flush of the database has a number, which is in `meta` and in the checkpoint that follows. Order: the number is synced in
//! the journal, then flushed, then in the checkpoint. So an open notices a database or a journal that is older than the other.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use onlyonce_journal::{Access, Durability, Journal, Options, Position, Recovered, Recovery, Report};

use super::checkpoint::{self, Checkpoint};
use super::medium::StoreMedium;
use super::tx::{self, Change, Tx};
use crate::fs::directory::Directory;
use crate::rocks::db::Db;
use crate::rocks::manifest::ManifestState;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{AtomicUsize, Mutex, RwLock, RwLockReadGuard};
use crate::wake::Wake;
use onlyonce_core::{Cause, Error, Result};

/// How the journal's segments are used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segments {
    /// Whether most calls wait for a sync.
    pub(crate) are_synced_often: bool,
    /// Bytes of unused segments that are kept.
    pub(crate) spare_bytes: u64,
}

/// The meta entry with the number of the last flush.
const FLUSHES: &str = "flushes";
/// The meta entry with the state of the manifest that the last open began.
pub(crate) const MANIFEST: &str = "manifest";

/// A journal that was read, before the database is opened: RocksDB deletes the SSTs that its manifest does not list, so what the journal
/// says of the manifest is needed first.
pub(crate) struct JournalReplay {
    path: PathBuf,
    recovery: Recovery<StoreMedium>,
    report: Report,
    options: Options,
    /// What it states of the database's manifest.
    pub(crate) manifest: Option<ManifestState>,
    checkpoint: Vec<u8>,
    records: Records,
}

/// Records in memory, one after the other.
#[derive(Default)]
struct Records {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Records {
    fn push(&mut self, record: &[u8]) {
        self.bytes.extend_from_slice(record);
        self.ends.push(self.bytes.len());
    }

    fn iter(&self) -> impl Iterator<Item = &[u8]> {
        let starts = std::iter::once(&0).chain(&self.ends);
        starts.zip(&self.ends).map(|(start, end)| self.bytes.get(*start..*end).unwrap_or_default())
    }
}

impl JournalReplay {
    /// Reads the journal in `path`, and changes nothing.
    pub(crate) fn read(path: &Path, store: &Arc<Directory>, segments: Segments) -> Result<Self> {
        let missing =
            || Error::Corrupt { place: path.display().to_string(), detail: "the journal is missing".to_owned() };
        if !path.is_dir() {
            return Err(missing());
        }
        let access = if segments.are_synced_often { Access::Write } else { Access::Map };
        let medium = medium(path, access, Some(Arc::clone(store)))?;
        let (mut checkpoint, mut records, mut manifest) = (Vec::new(), Records::default(), None);
        let read = Journal::recover(medium, |recovered| {
            match recovered {
                Recovered::Checkpoint(bytes) => {
                    checkpoint = bytes.to_vec();
                    manifest = Checkpoint::read(bytes).ok().and_then(|(read, _)| read.manifest);
                }
                Recovered::Record(bytes) => {
                    manifest = tx::stated_manifest(bytes, MANIFEST).or(manifest);
                    records.push(bytes);
                }
            }
            Ok(())
        });
        let (recovery, report) = match read {
            Err(onlyonce_journal::Error::Missing { .. }) => return Err(missing()),
            read => read.map_err(|error| unusable(path, error))?,
        };
        let options = options(segments.spare_bytes);
        Ok(Self { path: path.to_owned(), recovery, report, options, manifest, checkpoint, records })
    }
}

/// The journal of an open store.
pub(crate) struct StoreJournal {
    db: Arc<Db>,
    // Each call holds a read lock, so that `close_with` can wait for running calls.
    journal: RwLock<Option<Journal<StoreMedium>>>,
    /// The number of the last flush. Held while a transaction that changes the database is appended and applied.
    flushes: Mutex<u64>,
    /// About the memory of the changes that the database has not flushed.
    unflushed: AtomicUsize,
    /// Wakes the thread that calls `maintain`.
    pub(crate) segment_needed: Wake,
}

impl StoreJournal {
    /// Creates the journal of a new store in this directory, which must not exist.
    pub(crate) fn create(path: &Path) -> Result<()> {
        crate::fs::directory::make_private(path)?;
        let medium = medium(path, Access::Write, None)?;
        let journal = Journal::create(medium, &Options::default(), &Checkpoint::default().encode(&[]))
            .map_err(|error| unusable(path, error))?;
        journal.close().map_err(|error| unusable(path, error))
    }

    /// Opens a journal that was read: applies its changes to the database, and passes the records of keys to `visit`, with their
    /// numbers; that of the checkpoint has none. Returns the bytes that it replayed, too.
    ///
    /// Nothing of this is on disk before the next flush, unless it is more than RocksDB's memtable holds: an open that fails has
    /// changed nothing.
    pub(crate) fn open(
        replay: JournalReplay,
        db: &Arc<Db>,
        mut visit: impl FnMut(Option<u64>, &[u8]) -> Result<()>,
    ) -> Result<(Self, u64)> {
        let JournalReplay { path, recovery, report, options, checkpoint, records, .. } = replay;
        let flushed = flushes(db)?;
        let (checkpoint, record) = Checkpoint::read(&checkpoint)?;
        checkpoint::compare(&db.directory().database(), &checkpoint, flushed, &db.ssts()?)?;
        let (mut last, mut unflushed) = (checkpoint.flushes, 0);
        if !record.is_empty() {
            visit(None, record)?;
        }
        for bytes in records.iter() {
            let applied = apply(db, bytes)?;
            last = applied.flushes.unwrap_or(last);
            unflushed += applied.memory;
            if let Some((number, record)) = applied.record {
                visit(Some(number), record)?;
            }
        }
        if flushed > last {
            let detail = format!(
                "it ends at flush {last}, and the database has flush {flushed}: restore all files of the store from one copy"
            );
            return Err(Error::Corrupt { place: path.display().to_string(), detail });
        }
        let journal = recovery.start(&options).map_err(|error| unusable(&path, error))?;
        if let Some(place) = report.torn {
            tracing::warn!(place, "discarded the torn tail of the journal after an unclean shutdown");
        }
        let (flushes, unflushed) = (Mutex::new(last), AtomicUsize::new(unflushed));
        let (db, journal) = (Arc::clone(db), RwLock::new(Some(journal)));
        Ok((Self { db, journal, flushes, unflushed, segment_needed: Wake::default() }, report.bytes))
    }

    fn journal(&self) -> Result<Open<'_>> {
        let guard = self.journal.read();
        if guard.is_some() { Ok(Open(guard)) } else { Err(Error::Closed) }
    }

    /// Appends a transaction and applies it to the database. With `sync` it is on disk when this returns. After
    /// [`Error::WriteFailed`] and [`Error::DirectoryGone`] the outcome is unknown; after any other error nothing has changed.
    pub(crate) fn write(&self, tx: Tx, sync: bool) -> Result<()> {
        let open = self.journal()?;
        let journal = open.get()?;
        // Only a hint: this write need not be the one that takes the last segment.
        if journal.lacks_segment() {
            self.segment_needed.wake();
        }
        if tx.is_empty() {
            // Checked in any case: what the caller has read may be of a deleted store, also if nothing is left to sync.
            return if sync { self.written(journal.sync()).and_then(|()| self.reject_deleted()) } else { Ok(()) };
        }
        if tx.changes_database() {
            let flushes = self.flushes.lock();
            // Synced after it is applied, without the lock.
            self.append_and_apply(journal, tx, false)?;
            drop(flushes);
            return if sync { self.written(journal.sync()) } else { Ok(()) };
        }
        let (head, record) = tx.finish();
        let durability = if sync { Durability::Disk } else { Durability::Process };
        self.written(journal.append(&[&head, &record], durability))
    }

    /// The caller holds `flushes`. With `sync` the record is on disk before it is applied.
    fn append_and_apply(&self, journal: &Journal<StoreMedium>, tx: Tx, sync: bool) -> Result<()> {
        // Before the append: a change that is in the journal must be applied.
        self.db.check_writable()?;
        // RocksDB flushes a full memtable by itself, and what it flushes must be synced by then.
        let may_fill = self.unflushed().saturating_add(tx.len()) >= self.db.meta_memtable_bytes() / 3;
        let durability = if sync || may_fill { Durability::Disk } else { Durability::Process };
        let (head, record) = tx.finish();
        self.written(journal.append(&[&head, &record], durability))?;
        let applied = apply(&self.db, &head).map_err(|error| Error::WriteFailed { source: error.into() })?;
        self.unflushed.fetch_add(applied.memory, Ordering::Relaxed);
        Ok(())
    }

    /// Appends a transaction and syncs it, without applying it: the next open does. For changes that are written again, and
    /// applied, before the next checkpoint.
    pub(crate) fn append_only(&self, tx: Tx) -> Result<()> {
        let open = self.journal()?;
        let _in_order = self.flushes.lock();
        let (head, record) = tx.finish();
        self.written(open.get()?.append(&[&head, &record], Durability::Disk))
    }

    /// About the memory of the changes that the database has not flushed.
    pub(crate) fn unflushed(&self) -> usize {
        self.unflushed.load(Ordering::Relaxed)
    }

    /// Allocates what a call of so many bytes needs, so that a full disk is noticed before the call has changed anything.
    pub(crate) fn reserve(&self, bytes: usize) -> Result<()> {
        let open = self.journal()?;
        self.written(open.get()?.reserve(bytes))
    }

    /// Syncs everything written so far.
    pub(crate) fn sync(&self) -> Result<()> {
        let open = self.journal()?;
        self.written(open.get()?.sync())
    }

    /// The position after all transactions whose writes have returned.
    pub(crate) fn position(&self) -> Result<Position> {
        Ok(self.journal()?.get()?.position())
    }

    /// Flushes the database, and returns the number of the flush. The journal is synced before, because what the database has
    /// must not be newer than the journal: a message would be on disk, and its completion would not.
    pub(crate) fn flush<'a>(&self, families: impl Iterator<Item = &'a str>) -> Result<u64> {
        let open = self.journal()?;
        let journal = open.get()?;
        let mut flushes = self.flushes.lock();
        let number = *flushes + 1;
        let mut tx = Tx::default();
        tx.put_meta(FLUSHES, &number.to_le_bytes());
        // Synced before it is applied, and everything before it as well: RocksDB may flush `meta` by itself when it resumes after
        // a full disk.
        self.append_and_apply(journal, tx, true)?;
        *flushes = number;
        Failpoint::DatabaseFlushBegun.pass();
        self.db.flush_memtables(families)?;
        self.unflushed.store(0, Ordering::Relaxed);
        Failpoint::DatabaseFlushed.pass();
        Ok(number)
    }

    /// Appends a checkpoint, which replaces the transactions before `from`.
    pub(crate) fn checkpoint(&self, from: Position, checkpoint: &[u8]) -> Result<()> {
        let open = self.journal()?;
        self.written(open.get()?.checkpoint(from, checkpoint))
    }

    /// Prepares the next segment. Called by a thread that may wait for the disk.
    pub(crate) fn maintain(&self) -> Result<()> {
        let open = self.journal()?;
        self.written(open.get()?.maintain())
    }

    #[cfg(test)]
    pub(crate) fn lacks_segment(&self) -> bool {
        self.journal().is_ok_and(|open| open.get().is_ok_and(Journal::lacks_segment))
    }

    /// The number of segments that the next open would read.
    pub(crate) fn segments(&self) -> Result<u64> {
        Ok(self.journal()?.get()?.stats().segments)
    }

    /// The bytes of all segments.
    pub(crate) fn allocated(&self) -> u64 {
        let stats = self.journal().ok().and_then(|open| open.get().ok().map(Journal::stats));
        stats.map_or(0, |stats| stats.used_bytes + stats.spare_bytes)
    }

    /// The number of syncs.
    pub(crate) fn syncs(&self) -> u64 {
        self.journal().ok().and_then(|open| open.get().ok().map(|journal| journal.stats().syncs)).unwrap_or(0)
    }

    /// Waits for running calls, appends the changes of `last`, syncs everything and closes. Later calls fail with
    /// [`Error::Closed`].
    pub(crate) fn close_with(&self, last: impl FnOnce(&mut Tx)) -> Result<()> {
        let Some(journal) = self.journal.write().take() else { return Ok(()) };
        let mut tx = Tx::default();
        last(&mut tx);
        if !tx.is_empty() {
            let (head, record) = tx.finish();
            // To the journal alone: the next open applies it to the database.
            self.written(journal.append(&[&head, &record], Durability::Process))?;
        }
        Failpoint::CloseTokensWritten.pass();
        self.written(journal.close())?;
        Failpoint::CloseSynced.pass();
        // Also if there was nothing to sync.
        self.reject_deleted()
    }

    /// Fails if the directory of the store was deleted. Writes to deleted files succeed, and so do their syncs.
    fn reject_deleted(&self) -> Result<()> {
        self.db.directory().deleted().map_or(Ok(()), |path| Err(Error::DirectoryGone { path }))
    }

    /// The outcome of a call to the open journal.
    fn written(&self, outcome: onlyonce_journal::Result<()>) -> Result<()> {
        use onlyonce_journal::Error as E;
        outcome.map_err(|error| match (error, self.db.directory().deleted()) {
            (E::Closed, _) => Error::Closed,
            (_, Some(path)) => Error::DirectoryGone { path },
            (E::NotWritten { action, ref place, ref source }, None) => {
                Error::io(action, PathBuf::from(place), Cause::new(source.kind(), source.clone()))
            }
            (error, None) => Error::WriteFailed { source: cause(&error) },
        })
    }
}

/// A guard that keeps the journal open.
struct Open<'a>(RwLockReadGuard<'a, Option<Journal<StoreMedium>>>);

impl Open<'_> {
    fn get(&self) -> Result<&Journal<StoreMedium>> {
        self.0.as_ref().ok_or(Error::Closed)
    }
}

/// The number of the last flush that the database has.
fn flushes(db: &Db) -> Result<u64> {
    let corrupt =
        || Error::Corrupt { place: format!("`{FLUSHES}` in `meta`"), detail: "it is not 8 bytes long".to_owned() };
    match db.meta(FLUSHES)? {
        None => Ok(0),
        Some(value) => Ok(u64::from_le_bytes(value.try_into().map_err(|_| corrupt())?)),
    }
}

/// A transaction whose changes are applied to the database.
struct Applied<'a> {
    /// The number and the bytes of its record.
    record: Option<(u64, &'a [u8])>,
    /// About the memory of its changes.
    memory: usize,
    /// The number of a flush.
    flushes: Option<u64>,
}

/// Applies the changes of an encoded transaction to the database.
fn apply<'a>(db: &Db, bytes: &'a [u8]) -> Result<Applied<'a>> {
    let mut applied = Applied { record: None, memory: 0, flushes: None };
    db.apply(|batch| {
        applied.record = tx::read(bytes, |change| {
            applied.memory += change.memory();
            match change {
                Change::PutMeta { name, value } => {
                    if name == FLUSHES.as_bytes() {
                        applied.flushes = value.try_into().ok().map(u64::from_le_bytes);
                    }
                    batch.put_meta(name, value)
                }
                Change::DeleteMeta { name } => batch.delete_meta(name),
                Change::DeleteKey { family, entry_key } => {
                    batch.delete_key(family, entry_key);
                    Ok(())
                }
            }
        })?;
        Ok(())
    })?;
    Ok(applied)
}

/// Sizes of segments are multiples of this.
const BLOCK: u64 = 4_096;
/// Bounds of the largest size. Segments are created full of zeros, and a flush frees them after some 12 MB of records: larger ones
/// would mostly be zeros. With smaller ones a journal would need hundreds of files.
const LEAST_LARGEST: u64 = 1 << 20;
const MOST_LARGEST: u64 = 8 << 20;
/// How many unused segments of the largest size a journal keeps.
const KEPT: u64 = 8;

fn options(spare_bytes: u64) -> Options {
    let mut options = Options::default();
    options.spare_bytes = spare_bytes;
    options.largest_segment = (spare_bytes / KEPT / BLOCK * BLOCK).clamp(LEAST_LARGEST, MOST_LARGEST);
    options
}

fn medium(path: &Path, access: Access, store: Option<Arc<Directory>>) -> Result<StoreMedium> {
    StoreMedium::new(path, access, store).map_err(|error| Error::io("opening", path, error))
}

fn cause(error: &onlyonce_journal::Error) -> Cause {
    use onlyonce_journal::Error as E;
    let kind = match error {
        E::NotWritten { source, .. } | E::Unknown { source, .. } => source.kind(),
        _ => std::io::ErrorKind::Other,
    };
    Cause::new(kind, error.clone())
}

/// Why the journal in `path` cannot be created or opened.
fn unusable(path: &Path, error: onlyonce_journal::Error) -> Error {
    use onlyonce_journal::Error as E;
    match error {
        E::Corrupt { place, detail } => Error::Corrupt { place, detail },
        E::NotWritten { action, ref place, ref source } => {
            Error::io(action, PathBuf::from(place), Cause::new(source.kind(), source.clone()))
        }
        E::Closed => Error::Closed,
        _ => Error::io("opening the journal in", path, cause(&error)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;

    const SEGMENTS: Segments = Segments { are_synced_often: false, spare_bytes: 1 << 20 };

    fn open(dir: &tempfile::TempDir) -> (Arc<Db>, StoreJournal) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let path = directory.journal();
        let seed = || StoreJournal::create(&path).map(|()| Vec::new());
        let db = Arc::new(Db::open(directory, 32 << 20, Duration::ZERO, None, seed).unwrap().0);
        let replay = JournalReplay::read(&path, db.directory(), SEGMENTS).unwrap();
        let (journal, _) = StoreJournal::open(replay, &db, |_, _| Ok(())).unwrap();
        (db, journal)
    }

    fn put(name: &[u8], value: &[u8]) -> Tx {
        let mut tx = Tx::default();
        tx.put_meta(name, value);
        tx
    }

    #[test]
    fn a_flush_of_the_database_syncs_the_journal_first() {
        let dir = tempfile::tempdir().unwrap();
        let (_, journal) = open(&dir);
        for round in 1..=3_u64 {
            journal.write(put(b"name", &round.to_le_bytes()), false).unwrap();
            let before = journal.syncs();
            journal.flush(std::iter::empty()).unwrap();
            assert!(journal.syncs() > before, "the database has a change that a power cut could take from the journal");
        }
    }

    #[test]
    fn a_change_that_could_fill_the_memtable_of_meta_is_synced_before_it_is_applied() {
        let dir = tempfile::tempdir().unwrap();
        let (_, journal) = open(&dir);
        for (bytes, synced) in [(1 << 20, 0), (20 << 20, 1), (1, 1)] {
            let before = journal.syncs();
            journal.write(put(b"name", &vec![7; bytes]), false).unwrap();
            assert_eq!(journal.syncs() - before, synced, "{bytes} bytes, {} before", journal.unflushed());
        }
        journal.flush(std::iter::empty()).unwrap();
        assert_eq!(journal.unflushed(), 0);
        let before = journal.syncs();
        journal.write(put(b"name", b"value"), false).unwrap();
        assert_eq!(journal.syncs(), before);
    }

    #[test]
    fn an_older_database_or_journal_is_corruption_and_nothing_is_changed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let copy = |from: &Path, to: &Path| {
            std::fs::create_dir_all(to).unwrap();
            for entry in std::fs::read_dir(from).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        };
        let flush = |db: &Db, journal: &StoreJournal| {
            let position = journal.position().unwrap();
            let flushes = journal.flush(std::iter::empty()).unwrap();
            let checkpoint = Checkpoint { flushes, ssts: db.ssts().unwrap(), manifest: None }.encode(&[]);
            journal.checkpoint(position, &checkpoint).unwrap();
        };
        let (db, journal) = open(&dir);
        flush(&db, &journal);
        journal.close_with(|_| {}).unwrap();
        db.close();
        let old = dir.path().join("old");
        ["db", "journal"].iter().for_each(|part| copy(&root.join(part), &old.join(part)));
        drop((db, journal));
        let (db, journal) = open(&dir);
        flush(&db, &journal);
        journal.close_with(|_| {}).unwrap();
        db.close();
        drop((db, journal));
        for (part, text) in [("db", "MANIFEST file ends at flush 1"), ("journal", "it ends at flush 1")] {
            let newer = dir.path().join(format!("newer-{part}"));
            std::fs::rename(root.join(part), &newer).unwrap();
            copy(&old.join(part), &root.join(part));
            let directory = Directory::acquire(&root, Duration::ZERO).unwrap();
            let path = directory.journal();
            let db = Arc::new(Db::open(directory, 32 << 20, Duration::ZERO, None, || Ok(Vec::new())).unwrap().0);
            let replay = JournalReplay::read(&path, db.directory(), SEGMENTS).unwrap();
            let rejected = StoreJournal::open(replay, &db, |_, _| Ok(())).map(drop);
            let error = rejected.expect_err(part).to_string();
            assert!(error.contains(text), "{error}");
            db.close();
            drop(db);
            std::fs::remove_dir_all(root.join(part)).unwrap();
            std::fs::rename(newer, root.join(part)).unwrap();
        }
        open(&dir);
    }

    #[test]
    fn changes_are_applied_in_the_order_of_their_records() {
        let dir = tempfile::tempdir().unwrap();
        let (db, journal) = open(&dir);
        let next = AtomicU64::new(0);
        for round in 0..50_u64 {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..25 {
                            let value = next.fetch_add(1, Ordering::Relaxed);
                            journal.write(put(&round.to_le_bytes(), &value.to_le_bytes()), false).unwrap();
                        }
                    });
                }
            });
        }
        let values = |db: &Db| -> Vec<_> { (0..50_u64).map(|round| db.meta(&round.to_le_bytes()).unwrap()).collect() };
        let applied = values(&db);
        // The database was not flushed: a replay applies all of it again.
        journal.close_with(|_| {}).unwrap();
        db.close();
        let (db, _) = open(&dir);
        assert_eq!(values(&db), applied);
    }
}
