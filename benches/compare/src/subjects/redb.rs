//! redb: a copy-on-write B-tree in Rust.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use crate::keys::Key;
use crate::subject::{Durability, Setup, Subject};

const SEEN: TableDefinition<&[u8], &[u8]> = TableDefinition::new("seen");

pub struct Redb {
    db: Database,
    durability: Durability,
    synced: Mutex<Instant>,
}

impl Redb {
    pub fn open(setup: &Setup) -> Result<Self> {
        let cache = usize::try_from(setup.memory() / 2)?;
        let db = Database::builder().set_cache_size(cache).create(setup.dir.join("db.redb"))?;
        let redb = Self { db, durability: setup.durability, synced: Mutex::new(Instant::now()) };
        redb.commit(true, |_| Ok(()))?;
        Ok(redb)
    }

    fn commit<T>(&self, synced: bool, work: impl FnOnce(&mut redb::Table<&[u8], &[u8]>) -> Result<T>) -> Result<T> {
        let mut transaction = self.db.begin_write()?;
        transaction.set_durability(if synced { redb::Durability::Immediate } else { redb::Durability::None })?;
        let done = work(&mut transaction.open_table(SEEN)?)?;
        transaction.commit()?;
        Ok(done)
    }

    /// Unsynced commits cannot free pages, so one commit per second is synced, like the logs of the other stores.
    fn is_sync_due(&self) -> Result<bool> {
        if self.durability == Durability::Disk {
            return Ok(true);
        }
        let mut synced = self.synced.lock().map_err(|_| anyhow!("another thread panicked"))?;
        let due = synced.elapsed() >= Duration::from_secs(1);
        if due {
            *synced = Instant::now();
        }
        Ok(due)
    }
}

impl Subject for Redb {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        self.commit(self.is_sync_due()?, |table| {
            let mut first = 0;
            for key in keys {
                if table.get(&key[..])?.is_none() {
                    table.insert(&key[..], result)?;
                    first += 1;
                }
            }
            Ok(first)
        })
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let table = self.db.begin_read()?.open_table(SEEN)?;
        let mut known = 0;
        for key in keys {
            known += usize::from(table.get(&key[..])?.is_some());
        }
        Ok(known)
    }

    fn finish_background_work(&self) -> Result<()> {
        self.commit(true, |_| Ok(()))
    }
}
