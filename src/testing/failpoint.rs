//! Failpoints: places between two steps at which a test can kill the process.
//!
//! They compile to nothing without the feature `__internals`. With it, the environment variable
//! `ONLYONCE_FAILPOINT=NAME:N` makes the process send itself SIGKILL at the Nth pass of failpoint NAME: no destructor
//! runs, and no buffer is flushed, on any thread.

macro_rules! failpoints {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A place between two steps.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(not(feature = "__internals"), allow(unreachable_pub, reason = "only tests use it"))]
        pub enum Failpoint {
            $($(#[$doc])* $name,)*
        }

        #[cfg(feature = "__internals")]
        impl Failpoint {
            /// All failpoints.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

failpoints! {
    /// A new database is complete, but not renamed into place.
    StoreCreated,
    /// The database is in place, but the lock file does not contain "created" yet.
    StorePlaced,
    /// The files are checked, but the database is not open yet.
    OpenChecked,
    /// The database is open, but the journal is not replayed yet.
    OpenDatabase,
    /// The journal is replayed, but nothing is written yet.
    OpenReplayed,
    /// The options are written, but no tokens are reserved yet.
    OpenOptionsWritten,
    /// Tokens are reserved.
    OpenTokensReserved,
    /// The persisted columns are in memory, but their buckets are not marked as filtered yet.
    FilterLoaded,
    /// Some keys of a bucket are in its rebuilt filter.
    FilterHalfRebuilt,
    /// Before a filter file is written.
    FilterBegun,
    /// Half of the filter file is written.
    FilterHalfWritten,
    /// The filter file is on disk under its temporary name.
    FilterWritten,
    /// The filter file is renamed into place.
    FilterRenamed,
    /// Before the filter file of a dropped bucket is removed.
    FilterOrphaned,
    /// Before a bucket is created.
    BucketBegun,
    /// The bucket is in the database, but not in the registry yet.
    BucketCreated,
    /// Lookups see the bucket, and it has no keys.
    BucketRegistered,
    /// Buckets have expired, but the time of expiry is not on disk.
    BucketExpired,
    /// The time is on disk, and lookups do not see the bucket any more.
    BucketUnlinked,
    /// The bucket's files are deleted, but its column family still exists.
    BucketEmptied,
    /// The column family is dropped.
    BucketDropped,
    /// The keys of a flush are frozen.
    FlushFrozen,
    /// An SST is written, but not ingested yet.
    SstWritten,
    /// The SST is ingested, but its keys are not in the filter yet.
    SstIngested,
    /// All SSTs are ingested, but no checkpoint lists them yet.
    FlushIngested,
    /// The journal is synced, but RocksDB's memtable of `meta` is not flushed yet.
    DatabaseFlushBegun,
    /// Everything that the checkpoint replaces is on disk.
    DatabaseFlushed,
    /// Before the checkpoint is appended.
    CheckpointBegun,
    /// The checkpoint is on disk, but the memtable still has the flushed keys.
    CheckpointWritten,
    /// The flushed keys are in the recent cache, but still in the memtable.
    FlushPublished,
    /// The flushed keys are removed from the memtable.
    FlushRetired,
    /// Before a segment of the journal is allocated.
    SegmentBegun,
    /// The segment is on disk, but not used yet.
    SegmentCreated,
    /// Before a write to a segment.
    WriteBegun,
    /// The write is in the segment, but neither synced nor in effect.
    WriteDone,
    /// Before a segment is synced.
    SyncBegun,
    /// The segment is synced, but no waiter has returned.
    SyncDone,
    /// `forget` has a record number, but has not written the record.
    ForgetBegun,
    /// The record is written, but the memtable still has the key.
    ForgetWritten,
    /// The key is removed from the memtable, but the record is not finished yet.
    ForgetRemoved,
    /// The store rejects calls, but its time is not written yet.
    CloseBegun,
    /// The time is written, but not synced.
    CloseTimeWritten,
    /// The unused tokens are returned, but not synced.
    CloseTokensWritten,
    /// Everything is synced, but the database is still open.
    CloseSynced,
    /// The database is closed, but the directory is still locked.
    CloseDatabase,
}

impl Failpoint {
    /// Passes the failpoint. Kills the process if the environment selects this pass.
    #[cfg(not(feature = "__internals"))]
    #[inline(always)]
    pub(crate) fn pass(self) {}

    /// Passes the failpoint. Kills the process if the environment selects this pass.
    #[cfg(feature = "__internals")]
    pub(crate) fn pass(self) {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU64, Ordering};

        /// The selected failpoint, and the number of passes left.
        static SELECTED: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
            let selected = std::env::var("ONLYONCE_FAILPOINT").ok()?;
            let (name, times) = selected.split_once(':')?;
            Some((name.to_owned(), AtomicU64::new(times.parse().ok()?)))
        });

        let Some((name, left)) = &*SELECTED else { return };
        if *name == format!("{self:?}") && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            use nix::sys::signal::{Signal, kill};
            let sent = kill(nix::unistd::Pid::this(), Signal::SIGKILL);
            // The signal ends every thread before this call returns.
            unreachable!("SIGKILL to this process: {sent:?}");
        }
    }
}
