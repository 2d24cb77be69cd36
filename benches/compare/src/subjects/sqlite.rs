//! SQLite with a write-ahead log.

use std::sync::{Mutex, MutexGuard};

use anyhow::{Result, anyhow};
use rusqlite::Connection;

use crate::keys::Key;
use crate::subject::{Durability, Setup, Subject};

pub struct Sqlite {
    /// SQLite allows one writer at a time, so threads share a connection.
    connection: Mutex<Connection>,
}

impl Sqlite {
    pub fn open(setup: &Setup) -> Result<Self> {
        let connection = Connection::open(setup.dir.join("db.sqlite"))?;
        let synchronous = match setup.durability {
            Durability::Process => "NORMAL",
            Durability::Disk => "FULL",
        };
        let cache_kib = setup.memory() / 2 / 1024;
        connection.execute_batch(&format!(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = {synchronous}; PRAGMA cache_size = -{cache_kib};
             CREATE TABLE seen (key BLOB PRIMARY KEY, result BLOB) WITHOUT ROWID;"
        ))?;
        Ok(Self { connection: Mutex::new(connection) })
    }

    fn connection(&self) -> Result<MutexGuard<'_, Connection>> {
        self.connection.lock().map_err(|_| anyhow!("another thread panicked"))
    }
}

impl Subject for Sqlite {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let mut connection = self.connection()?;
        let transaction = connection.transaction()?;
        let mut first = 0;
        {
            let mut insert = transaction.prepare_cached("INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING")?;
            for key in keys {
                first += insert.execute((&key[..], result))?;
            }
        }
        transaction.commit()?;
        Ok(first)
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let mut connection = self.connection()?;
        let transaction = connection.transaction()?;
        let mut known = 0;
        {
            let mut select = transaction.prepare_cached("SELECT result FROM seen WHERE key = ?")?;
            for key in keys {
                known += usize::from(select.query([&key[..]])?.next()?.is_some());
            }
        }
        transaction.commit()?;
        Ok(known)
    }

    fn finish_background_work(&self) -> Result<()> {
        self.connection()?.query_row("PRAGMA wal_checkpoint(TRUNCATE)", (), |_| Ok(()))?;
        Ok(())
    }
}
