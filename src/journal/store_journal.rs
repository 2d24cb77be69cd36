//! The journal of a store: transactions and checkpoints in the segments of `onlyonce-journal`.
//!
//! A transaction is appended to the journal first, and then applied to the database, whose own log is off. What it changes in
//! the database is on disk with the next flush of the database; until then the journal has it. Order: two transactions that
//! change the database are applied in the order of their records, or a replay could end in another state.

use std::path::{Path, PathBuf};

use onlyonce_journal::{Access, Durability, Journal, Options, Position, Recovered};

use super::checkpoint::{self, Ssts};
use super::medium::StoreMedium;
use super::tx::{self, Change, Tx};
use crate::rocks::db::Db;
use crate::testing::failpoint::Failpoint;
use crate::testing::sync_shim::{Mutex, RwLock, RwLockReadGuard};
use onlyonce_core::{Cause, Error, Result};

/// The journal of an open store.
pub(crate) struct StoreJournal {
    // Each call holds a read lock, so that `close_with` can wait for running calls.
    journal: RwLock<Option<Journal<StoreMedium>>>,
    /// Held while a transaction that changes the database is appended and applied. The bytes that were applied since the last
    /// flush of the database.
    order: Mutex<usize>,
}

/// What a replay passes on.
pub(crate) enum Replayed<'a> {
    /// The SSTs at the last checkpoint.
    Ssts(Ssts),
    /// A record of keys. That of the checkpoint has no number.
    Record(Option<u64>, &'a [u8]),
}

impl StoreJournal {
    /// Creates the journal of a new store in this directory, which must not exist.
    pub(crate) fn create(path: &Path) -> Result<()> {
        crate::fs::directory::make_private(path)?;
        let medium = medium(path, Access::Write)?;
        let empty = checkpoint::encode(&Ssts::new(), &[]);
        let journal = Journal::create(medium, &Options::default(), &empty).map_err(|error| converted(path, error))?;
        journal.close().map_err(|error| converted(path, error))
    }

    /// Opens the journal: applies its changes to the database, and passes on the rest. `is_synced_often`: whether most calls
    /// wait for a sync.
    pub(crate) fn open(
        path: &Path,
        db: &Db,
        is_synced_often: bool,
        mut visit: impl FnMut(Replayed<'_>) -> Result<()>,
    ) -> Result<Self> {
        if !path.is_dir() {
            let detail = "the journal is missing".to_owned();
            return Err(Error::Corrupt { place: path.display().to_string(), detail });
        }
        let medium = medium(path, if is_synced_often { Access::Write } else { Access::Map })?;
        let mut failed = None;
        let opened = Journal::open(medium, &Options::default(), |recovered| {
            let replayed = match recovered {
                Recovered::Checkpoint(bytes) => checkpoint::read(bytes).and_then(|(ssts, record)| {
                    visit(Replayed::Ssts(ssts))?;
                    if record.is_empty() { Ok(()) } else { visit(Replayed::Record(None, record)) }
                }),
                Recovered::Record(bytes) => replay(db, bytes).and_then(|record| match record {
                    Some((number, record)) => visit(Replayed::Record(Some(number), record)),
                    None => Ok(()),
                }),
            };
            replayed.map_err(|error| {
                failed = Some(error);
                onlyonce_journal::Error::Closed
            })
        });
        match (opened, failed) {
            (_, Some(error)) => Err(error),
            (Err(error), None) => Err(converted(path, error)),
            (Ok((journal, report)), None) => {
                if let Some(place) = report.torn {
                    tracing::warn!(place, "discarded the torn tail of the journal after an unclean shutdown");
                }
                Ok(Self { journal: RwLock::new(Some(journal)), order: Mutex::new(0) })
            }
        }
    }

    fn journal(&self) -> Result<Open<'_>> {
        let guard = self.journal.read();
        if guard.is_some() { Ok(Open(guard)) } else { Err(Error::Closed) }
    }

    /// Appends a transaction and applies it to the database. With `sync` it is on disk when this returns. After an error the
    /// outcome is unknown.
    pub(crate) fn write(&self, db: &Db, tx: Tx, sync: bool) -> Result<()> {
        let open = self.journal()?;
        let journal = open.get()?;
        self.append(db, journal, tx, sync)?;
        if sync { reject_deleted(db) } else { Ok(()) }
    }

    fn append(&self, db: &Db, journal: &Journal<StoreMedium>, tx: Tx, sync: bool) -> Result<()> {
        if tx.is_empty() {
            return if sync { synced(db, journal.sync()) } else { Ok(()) };
        }
        let durability = if sync { Durability::Disk } else { Durability::Process };
        let (head, record, changes) = tx.finish();
        if changes == 0 {
            return synced(db, journal.append(&[&head, &record], durability));
        }
        let mut unflushed = self.order.lock();
        // RocksDB flushes a full memtable by itself: what it has by then must be synced.
        let is_nearly_full = *unflushed + changes >= db.meta_memtable_bytes() / 2;
        synced(
            db,
            journal.append(&[&head, &record], if is_nearly_full { Durability::Disk } else { Durability::Process }),
        )?;
        replay(db, &head)?;
        *unflushed += changes;
        drop(unflushed);
        if sync { synced(db, journal.sync()) } else { Ok(()) }
    }

    /// Allocates what a call of so many bytes needs, so that a full disk is noticed before the call has changed anything.
    pub(crate) fn reserve(&self, bytes: usize) -> Result<()> {
        let open = self.journal()?;
        open.get()?.reserve(bytes).map_err(|error| converted(Path::new(""), error))
    }

    /// Syncs everything written so far.
    pub(crate) fn sync(&self, db: &Db) -> Result<()> {
        let open = self.journal()?;
        synced(db, open.get()?.sync())?;
        reject_deleted(db)
    }

    /// The position after all transactions whose writes have returned.
    pub(crate) fn position(&self) -> Result<Position> {
        Ok(self.journal()?.get()?.position())
    }

    /// Flushes the database. The journal is synced before, because what the database has must not be newer than the journal:
    /// a message would be on disk, and its completion would not.
    pub(crate) fn flush<'a>(&self, db: &Db, families: impl Iterator<Item = &'a str>) -> Result<()> {
        let open = self.journal()?;
        let journal = open.get()?;
        let mut unflushed = self.order.lock();
        synced(db, journal.sync())?;
        Failpoint::DatabaseFlushBegun.pass();
        db.flush_memtables(families)?;
        *unflushed = 0;
        Failpoint::DatabaseFlushed.pass();
        Ok(())
    }

    /// Appends a checkpoint, which replaces the transactions before `from`.
    pub(crate) fn checkpoint(&self, db: &Db, from: Position, checkpoint: &[u8]) -> Result<()> {
        let open = self.journal()?;
        synced(db, open.get()?.checkpoint(from, checkpoint))
    }

    /// Prepares the next segment. Called by a thread that may wait for the disk.
    pub(crate) fn maintain(&self, db: &Db) -> Result<()> {
        let open = self.journal()?;
        match open.get()?.maintain() {
            Err(error @ onlyonce_journal::Error::NotWritten { .. }) => Err(converted(Path::new(""), error)),
            maintained => synced(db, maintained),
        }
    }

    /// The number of segments that the next open would read.
    pub(crate) fn segments(&self) -> Result<u64> {
        Ok(self.journal()?.get()?.stats().segments)
    }

    /// The number of syncs.
    pub(crate) fn syncs(&self) -> u64 {
        self.journal().ok().and_then(|open| open.get().ok().map(|journal| journal.stats().syncs)).unwrap_or(0)
    }

    /// Waits for running calls, writes what `last` adds, syncs everything and closes. Later calls fail with
    /// [`Error::Closed`].
    pub(crate) fn close_with(&self, db: &Db, last: impl FnOnce(&mut Tx)) -> Result<()> {
        let Some(journal) = self.journal.write().take() else { return Ok(()) };
        let mut tx = Tx::default();
        last(&mut tx);
        let is_empty = tx.is_empty();
        let (head, _, _) = tx.finish();
        if !is_empty {
            synced(db, journal.append(&[&head], Durability::Process))?;
            // To the journal alone: the next open applies it to the database.
        }
        Failpoint::CloseTokensWritten.pass();
        synced(db, journal.close())?;
        Failpoint::CloseSynced.pass();
        reject_deleted(db)
    }
}

/// A guard that keeps the journal open.
struct Open<'a>(RwLockReadGuard<'a, Option<Journal<StoreMedium>>>);

impl Open<'_> {
    fn get(&self) -> Result<&Journal<StoreMedium>> {
        self.0.as_ref().ok_or(Error::Closed)
    }
}

/// Applies the changes of an encoded transaction to the database, and returns its record.
fn replay<'a>(db: &Db, bytes: &'a [u8]) -> Result<Option<(u64, &'a [u8])>> {
    let mut record = None;
    db.apply(|batch| {
        record = tx::read(bytes, |change| match change {
            Change::PutMeta { name, value } => batch.put_meta(name, value),
            Change::DeleteMeta { name } => batch.delete_meta(name),
            Change::DeleteKey { family, entry_key } => {
                batch.delete_key(family, entry_key);
                Ok(())
            }
        })?;
        Ok(())
    })?;
    Ok(record)
}

fn medium(path: &Path, access: Access) -> Result<StoreMedium> {
    StoreMedium::new(path, access).map_err(|error| Error::io("opening", path, error))
}

/// Fails if the directory of the store was deleted. Writes to deleted files succeed, and so do their syncs.
fn reject_deleted(db: &Db) -> Result<()> {
    db.directory().deleted().map_or(Ok(()), |path| Err(Error::DirectoryGone { path }))
}

/// The outcome of an append or a sync.
fn synced(db: &Db, outcome: onlyonce_journal::Result<()>) -> Result<()> {
    match outcome {
        Ok(()) => Ok(()),
        Err(onlyonce_journal::Error::Closed) => Err(Error::Closed),
        Err(error) => Err(match db.directory().deleted() {
            Some(path) => Error::DirectoryGone { path },
            None => Error::WriteFailed { source: cause(&error) },
        }),
    }
}

fn cause(error: &onlyonce_journal::Error) -> Cause {
    use onlyonce_journal::Error as E;
    let kind = match error {
        E::NotWritten { source, .. } | E::Unknown { source, .. } => source.kind(),
        _ => std::io::ErrorKind::Other,
    };
    Cause::new(kind, error.clone())
}

/// An error outside of an append.
fn converted(path: &Path, error: onlyonce_journal::Error) -> Error {
    use onlyonce_journal::Error as E;
    match error {
        E::Corrupt { place, detail } => Error::Corrupt { place, detail },
        E::Missing { place } => Error::Corrupt { place, detail: "the journal is missing".to_owned() },
        E::NotWritten { action, ref place, .. } => Error::io(action, PathBuf::from(place), cause(&error)),
        E::Closed => Error::Closed,
        _ => Error::io("opening the journal in", path, cause(&error)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::fs::directory::Directory;

    fn open(dir: &tempfile::TempDir) -> (Db, StoreJournal) {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let path = directory.journal();
        let seed = || StoreJournal::create(&path).map(|()| Vec::new());
        let (db, _) = Db::open(directory, 32 << 20, Duration::ZERO, seed).unwrap();
        let journal = StoreJournal::open(&path, &db, false, |_| Ok(())).unwrap();
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
        let (db, journal) = open(&dir);
        for round in 1..=3_u64 {
            journal.write(&db, put(b"name", &round.to_le_bytes()), false).unwrap();
            let before = journal.syncs();
            journal.flush(&db, std::iter::empty()).unwrap();
            assert!(journal.syncs() > before, "the database has a change that a power cut could take from the journal");
        }
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
                            journal.write(&db, put(&round.to_le_bytes(), &value.to_le_bytes()), false).unwrap();
                        }
                    });
                }
            });
        }
        let values = |db: &Db| -> Vec<_> { (0..50_u64).map(|round| db.meta(&round.to_le_bytes()).unwrap()).collect() };
        let applied = values(&db);
        // The database was not flushed: a replay applies all of it again.
        journal.close_with(&db, |_| {}).unwrap();
        db.close();
        let (db, _) = open(&dir);
        assert_eq!(values(&db), applied);
    }
}
