//! What every subject can do, and how it is set up.

use std::path::Path;

use anyhow::Result;
use clap::ValueEnum;

use crate::keys::Key;
use crate::machine;
use crate::subjects;

/// The systems that are measured.
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
    /// A server beside the process; `SET NX EX`.
    Redis,
    /// A cache in memory: what forgetting everything at a restart would give.
    Moka,
    /// A bare Bloom filter: what memory itself would give.
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

    /// Whether it remembers keys after a restart.
    pub fn is_persistent(self) -> bool {
        !matches!(self, Self::Moka | Self::Bloom)
    }

    /// What has to be said beside its figures.
    pub fn note(self) -> Option<&'static str> {
        match self {
            Self::RocksdbDefault | Self::RocksdbTuned | Self::Fjall => {
                Some("two threads may both find a key absent: get-then-put is not atomic")
            }
            Self::Redb => {
                Some("unsynced commits do not outlive the process, unlike those of the others; one a second is synced")
            }
            Self::Redis => Some("pipelines of 64 over two connections; single: one request at a time"),
            Self::Moka => Some("volatile"),
            Self::Bloom => Some("volatile, and with false positives"),
            Self::Onlyonce | Self::Lmdb | Self::Sqlite => None,
        }
    }
}

/// When an answered insert is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// In the operating system's hands.
    Process,
    /// On the disk.
    Disk,
}

/// How a subject is opened.
pub struct Setup<'a> {
    pub dir: &'a Path,
    pub durability: Durability,
    /// How many keys it will hold.
    pub keys: u64,
    /// How many slices of time they will lie in.
    pub buckets: u32,
    /// Bits for the bare filter.
    pub filter_bytes: u64,
}

impl Setup<'_> {
    /// The memory that each subject may use for filters and caches: 3.2 bytes of filter a key in the half that
    /// filters get, and 256 MiB.
    pub fn memory(&self) -> u64 {
        memory_for(self.keys)
    }
}

/// See [`Setup::memory`].
pub fn memory_for(keys: u64) -> u64 {
    (keys as f64 * 3.2 * 2.0) as u64 + (256 << 20)
}

/// Calls are made with one key, or with many: one transaction a call.
pub trait Subject: Send + Sync {
    /// Inserts the keys that are absent, and says how many were. An empty result is none.
    fn insert(&self, keys: &[Key], result: &[u8]) -> Result<usize>;

    /// How many of the keys are there.
    fn check(&self, keys: &[Key]) -> Result<usize>;

    /// What is inserted from now on belongs to the next slice of time.
    fn next_bucket(&self) -> Result<()> {
        Ok(())
    }

    /// Ends the work that inserts have left to do: everything lies where it is going to stay.
    fn settle(&self) -> Result<()>;

    /// Memory that it takes for its keys, where it can tell.
    fn memory_bytes(&self) -> Option<u64> {
        None
    }

    /// All bytes that were written up to now.
    fn bytes_written(&self) -> Result<u64> {
        machine::bytes_written()
    }

    /// All processor time that was used up to now, in seconds.
    fn cpu_s(&self) -> Result<f64> {
        machine::cpu_s("self")
    }

    /// Lets go of the directory.
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
