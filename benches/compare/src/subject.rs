//! The interface and the settings of subjects.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use crate::keys::Key;
use crate::machine;
use crate::subjects;

/// The measured systems.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kind {
    Onlyonce,
    /// Get, then put; default options.
    RocksdbDefault,
    /// Multi-get, then put; Bloom filters, larger memtables, a cache.
    RocksdbTuned,
    Fjall,
    Redb,
    Lmdb,
    Sqlite,
    /// A server process; `SET NX EX`.
    Redis,
    /// A cache in memory, which loses everything at a restart.
    Moka,
    /// A bare Bloom filter: the limit that memory sets.
    Bloom,
}

impl Kind {
    pub const ALL: [Self; 10] = [
        Self::Onlyonce,
        Self::RocksdbDefault,
        Self::RocksdbTuned,
        Self::Fjall,
        Self::Redb,
        Self::Lmdb,
        Self::Sqlite,
        Self::Redis,
        Self::Moka,
        Self::Bloom,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Onlyonce => "onlyonce",
            Self::RocksdbDefault => "rocksdb-default",
            Self::RocksdbTuned => "rocksdb-tuned",
            Self::Fjall => "fjall",
            Self::Redb => "redb",
            Self::Lmdb => "lmdb",
            Self::Sqlite => "sqlite",
            Self::Redis => "redis",
            Self::Moka => "moka",
            Self::Bloom => "bloom",
        }
    }

    /// Whether it keeps keys across a restart.
    pub fn is_persistent(self) -> bool {
        !matches!(self, Self::Moka | Self::Bloom)
    }

    /// A remark on its figures.
    pub fn note(self) -> Option<&'static str> {
        match self {
            Self::RocksdbDefault | Self::RocksdbTuned | Self::Fjall => {
                Some("get then put is not atomic: two threads may both find a key absent")
            }
            Self::Redb => Some(
                "unsynced commits do not survive a crash of the process, unlike in the other stores; one commit per second is synced",
            ),
            Self::Redis => Some("pipelines of 64 over two connections; single: one request at a time"),
            Self::Moka => Some("volatile"),
            Self::Bloom => Some("volatile, with false positives"),
            Self::Onlyonce | Self::Lmdb | Self::Sqlite => None,
        }
    }
}

/// What an answered insert survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Written to the operating system: a crash of the process.
    Process,
    /// Synced to disk: a power failure.
    Disk,
}

/// The settings of a subject.
pub struct Setup<'a> {
    pub dir: &'a Path,
    pub durability: Durability,
    /// The expected number of keys.
    pub keys: u64,
    /// The number of time buckets.
    pub buckets: u32,
    /// The size of the bare filter.
    pub filter_bytes: u64,
}

impl Setup<'_> {
    /// The memory that each subject may use for filters and caches: twice 3.2 bytes per key, because filters get half of it, and
    /// 256 MiB.
    pub fn memory(&self) -> u64 {
        memory_for(self.keys)
    }
}

/// See [`Setup::memory`].
pub fn memory_for(keys: u64) -> u64 {
    (keys as f64 * 3.2 * 2.0) as u64 + (256 << 20)
}

/// A call has one key or many, and is one transaction.
pub trait Subject: Send + Sync {
    /// Inserts the absent keys and returns their number. An empty result means no result.
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize>;

    /// The number of known keys among these.
    fn check(&self, keys: &[Key]) -> Result<usize>;

    /// Starts the next time bucket.
    fn next_bucket(&self) -> Result<()> {
        Ok(())
    }

    /// Completes all pending background work: flushes, compactions, checkpoints.
    fn finish_background_work(&self) -> Result<()>;

    /// The memory for its keys, if known.
    fn memory_bytes(&self) -> Option<u64> {
        None
    }

    /// The total of written bytes.
    fn bytes_written(&self) -> Result<u64> {
        machine::bytes_written()
    }

    /// The total CPU time in seconds.
    fn cpu_s(&self) -> Result<f64> {
        machine::cpu_s("self")
    }

    /// Closes the subject.
    fn close(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// Opens a subject in an empty directory.
pub fn open(kind: Kind, setup: &Setup) -> Result<Box<dyn Subject>> {
    std::fs::create_dir_all(setup.dir)?;
    Ok(match kind {
        Kind::Onlyonce => Box::new(subjects::onlyonce::OnlyOnce::open(setup)?),
        Kind::RocksdbDefault => Box::new(subjects::rocks::Rocks::with_defaults(setup)?),
        Kind::RocksdbTuned => Box::new(subjects::rocks::Rocks::tuned(setup)?),
        Kind::Fjall => Box::new(subjects::fjall::Fjall::open(setup)?),
        Kind::Redb => Box::new(subjects::redb::Redb::open(setup)?),
        Kind::Lmdb => Box::new(subjects::lmdb::Lmdb::open(setup)?),
        Kind::Sqlite => Box::new(subjects::sqlite::Sqlite::open(setup)?),
        Kind::Redis => Box::new(subjects::redis::Redis::start(setup)?),
        Kind::Moka => Box::new(subjects::moka::Moka::new(setup)),
        Kind::Bloom => Box::new(subjects::bloom::Bloom::new(setup)),
    })
}
