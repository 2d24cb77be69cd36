//! RocksDB with default options, tuned, and with a column family per time bucket.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use rocksdb::{BlockBasedOptions, BoundColumnFamily, Cache, DB, Options, ReadOptions, WriteBatch, WriteOptions};

use crate::keys::Key;
use crate::subject::{Durability, Setup, Subject};

/// The default column family.
const DEFAULT: &str = "default";

pub struct Rocks {
    db: DB,
    durability: Durability,
    tuned: bool,
}

impl Rocks {
    pub fn with_defaults(setup: &Setup) -> Result<Self> {
        let mut options = Options::default();
        options.create_if_missing(true);
        let db = DB::open(&options, setup.dir.join("db"))?;
        Ok(Self { db, durability: setup.durability, tuned: false })
    }

    pub fn tuned(setup: &Setup) -> Result<Self> {
        let options = tuned_options(setup);
        // Opened by name, because a batched multi-get needs its handle.
        let db = DB::open_cf_with_opts(&options, setup.dir.join("db"), [(DEFAULT, options.clone())])?;
        Ok(Self { db, durability: setup.durability, tuned: true })
    }
}

impl Subject for Rocks {
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let write = write_options(self.durability);
        if let [key] = keys {
            if self.db.get_pinned(key)?.is_some() {
                return Ok(0);
            }
            self.db.put_opt(key, result, &write)?;
            return Ok(1);
        }
        let mut batch = WriteBatch::default();
        if self.tuned {
            let family = family(&self.db, DEFAULT)?;
            for (key, found) in keys.iter().zip(self.db.batched_multi_get_cf(&family, keys, false)) {
                if found?.is_none() {
                    batch.put(key, result);
                }
            }
        } else {
            for key in keys {
                if self.db.get_pinned(key)?.is_none() {
                    batch.put(key, result);
                }
            }
        }
        let first = batch.len();
        self.db.write_opt(batch, &write)?;
        Ok(first)
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let mut known = 0;
        if self.tuned && keys.len() > 1 {
            let family = family(&self.db, DEFAULT)?;
            for found in self.db.batched_multi_get_cf(&family, keys, false) {
                known += usize::from(found?.is_some());
            }
        } else {
            for key in keys {
                known += usize::from(self.db.get_pinned(key)?.is_some());
            }
        }
        Ok(known)
    }

    fn finish_background_work(&self) -> Result<()> {
        Ok(self.db.flush()?)
    }
}

/// A window on plain RocksDB: a column family per time bucket. A check must look into all of them.
pub struct Families {
    db: DB,
    options: Options,
    current: AtomicU32,
}

impl Families {
    pub fn open(setup: &Setup) -> Result<Self> {
        std::fs::create_dir_all(setup.dir)?;
        let mut options = tuned_options(setup);
        // All column families together get the memory of one.
        options.set_write_buffer_size(16 << 20);
        let db = DB::open(&options, setup.dir.join("db"))?;
        db.create_cf(name(0), &options)?;
        Ok(Self { db, options, current: AtomicU32::new(0) })
    }

    fn families(&self) -> Result<Vec<Arc<BoundColumnFamily<'_>>>> {
        (0..=self.current.load(Ordering::Relaxed)).rev().map(|number| family(&self.db, &name(number))).collect()
    }
}

impl Subject for Families {
    /// Inserts absent keys without a check.
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize> {
        let family = family(&self.db, &name(self.current.load(Ordering::Relaxed)))?;
        let mut batch = WriteBatch::default();
        for key in keys {
            batch.put_cf(&family, key, result);
        }
        self.db.write(batch)?;
        Ok(keys.len())
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let mut known = 0;
        let families = self.families()?;
        if let [key] = keys {
            for family in &families {
                if self.db.get_pinned_cf(family, key)?.is_some() {
                    return Ok(1);
                }
            }
            return Ok(0);
        }
        let mut absent: Vec<&Key> = keys.iter().collect();
        let read = ReadOptions::default();
        for family in &families {
            let found = self.db.batched_multi_get_cf_opt(family, absent.iter().copied(), false, &read);
            let mut still_absent = Vec::with_capacity(absent.len());
            for (key, found) in absent.iter().zip(found) {
                match found? {
                    Some(_) => known += 1,
                    None => still_absent.push(*key),
                }
            }
            absent = still_absent;
        }
        Ok(known)
    }

    fn next_bucket(&self) -> Result<()> {
        let current = self.current.load(Ordering::Relaxed);
        self.db.flush_cf(&family(&self.db, &name(current))?)?;
        self.db.create_cf(name(current + 1), &self.options)?;
        self.current.store(current + 1, Ordering::Relaxed);
        Ok(())
    }

    fn finish_background_work(&self) -> Result<()> {
        for family in self.families()? {
            self.db.flush_cf(&family)?;
            // A bucket that has ended is read for the rest of the window, so it is compacted once.
            self.db.compact_range_cf(&family, None::<&[u8]>, None::<&[u8]>);
        }
        Ok(())
    }
}

fn name(number: u32) -> String {
    format!("bucket-{number}")
}

fn family<'a>(db: &'a DB, name: &str) -> Result<Arc<BoundColumnFamily<'a>>> {
    db.cf_handle(name).with_context(|| format!("RocksDB has no column family {name}"))
}

fn tuned_options(setup: &Setup) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_bloom_filter(10.0, false);
    // Filters and indexes are outside of the block cache, so they are always in memory.
    table.set_block_cache(&Cache::new_lru_cache(usize::try_from(setup.memory() / 2).unwrap_or(usize::MAX)));
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(64 << 20);
    options.set_max_write_buffer_number(4);
    options.set_max_background_jobs(2);
    options.set_memtable_whole_key_filtering(true);
    options.set_memtable_prefix_bloom_ratio(0.1);
    options
}

fn write_options(durability: Durability) -> WriteOptions {
    let mut write = WriteOptions::default();
    write.set_sync(durability == Durability::Disk);
    write
}
