//! fjall: a log-structured store in Rust.

use anyhow::Result;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use crate::keys::Key;
use crate::subject::{Durability, Setup, Subject};

pub struct Fjall {
    db: Database,
    keyspace: Keyspace,
    mode: PersistMode,
}

impl Fjall {
    pub fn open(setup: &Setup) -> Result<Self> {
        let db = Database::builder(setup.dir.join("db")).cache_size(setup.memory() / 2).open()?;
        let keyspace = db.keyspace("seen", KeyspaceCreateOptions::default)?;
        let mode = match setup.durability {
            Durability::Process => PersistMode::Buffer,
            Durability::Disk => PersistMode::SyncData,
        };
        Ok(Self { db, keyspace, mode })
    }
}

impl Subject for Fjall {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let mut batch = self.db.batch().durability(Some(self.mode));
        for key in keys {
            if !self.keyspace.contains_key(key)? {
                batch.insert(&self.keyspace, &key[..], result);
            }
        }
        let first = batch.len();
        batch.commit()?;
        Ok(first)
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let mut known = 0;
        for key in keys {
            known += usize::from(self.keyspace.get(key)?.is_some());
        }
        Ok(known)
    }

    fn finish_background_work(&self) -> Result<()> {
        self.keyspace.rotate_memtable_and_wait()?;
        Ok(self.db.persist(PersistMode::SyncAll)?)
    }
}
