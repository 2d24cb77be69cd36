//! LMDB: a memory-mapped B-tree.

use std::path::Path;

use anyhow::{Result, bail};
use heed::types::Bytes;
use heed::{CommitOrAbort, Env, EnvFlags, EnvOpenOptions, WithTls};

use crate::keys::Key;
use crate::subject::{Durability, Setup, Subject};

pub struct Lmdb {
    env: Env<WithTls>,
    seen: heed::Database<'static, Bytes, Bytes>,
}

impl Lmdb {
    pub fn open(setup: &Setup) -> Result<Self> {
        // Address space, not memory.
        let map_bytes = usize::try_from(setup.keys * 512 + (8 << 30))?.next_multiple_of(1 << 20);
        let env = open_env(setup.dir, map_bytes, setup.durability)?;
        let opened = env.create_databases_and_commit(env.write_txn()?, |databases, transaction| {
            anyhow::Ok(CommitOrAbort::<_, ()>::Commit(databases.create_database(transaction, None)?))
        })?;
        let CommitOrAbort::Commit(seen) = opened else { bail!("LMDB did not create its database") };
        Ok(Self { env, seen })
    }
}

#[expect(unsafe_code, reason = "the memory map is sound because no other process uses the directory")]
fn open_env(dir: &Path, map_bytes: usize, durability: Durability) -> heed::Result<Env<WithTls>> {
    let mut options = EnvOpenOptions::new();
    options.map_size(map_bytes).max_readers(256);
    // SAFETY: the directory was created for this run, and nothing but this environment touches it. Without syncs a
    // power failure may corrupt the database, but no run survives one.
    unsafe {
        if durability == Durability::Process {
            options.flags(EnvFlags::NO_SYNC);
        }
        options.open(dir)
    }
}

impl Subject for Lmdb {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let mut transaction = self.env.write_txn()?;
        let mut first = 0;
        for key in keys {
            first += usize::from(self.seen.get_or_put(&mut transaction, key, result)?.is_none());
        }
        transaction.commit()?;
        Ok(first)
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let transaction = self.env.read_txn()?;
        let mut known = 0;
        for key in keys {
            known += usize::from(self.seen.get(&transaction, key)?.is_some());
        }
        Ok(known)
    }

    fn finish_background_work(&self) -> Result<()> {
        Ok(self.env.force_sync()?)
    }

    fn close(self: Box<Self>) -> Result<()> {
        self.env.prepare_for_closing().wait();
        Ok(())
    }
}
