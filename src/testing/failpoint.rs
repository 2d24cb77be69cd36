//! Moments at which a test may have the process killed: between two steps that a crash must not tear apart.
//!
//! Nothing is left of them unless the feature `internals` is on. With it, `ONLYONCE_FAILPOINT=NAME:N` in the environment
//! has the process send itself SIGKILL when it passes the point NAME for the Nth time: no destructor runs and nothing is
//! flushed, on any thread.

macro_rules! failpoints {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A moment between two steps.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[cfg_attr(not(feature = "internals"), allow(unreachable_pub, reason = "seen by tests alone"))]
        pub enum Failpoint {
            $($(#[$doc])* $name,)*
        }

        #[cfg(feature = "internals")]
        impl Failpoint {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }
    };
}

failpoints! {
    /// A new database is complete, and not yet in its place.
    StoreCreated,
    /// It is in its place, and the lock file does not say so yet.
    StorePlaced,
    /// The files of a database were found whole, and it is not open yet.
    OpenChecked,
    /// The database is open, and its journal not yet read.
    OpenDatabase,
    /// The journal is in memory, and nothing was written yet.
    OpenReplayed,
    /// The options of this opening are written, and no tokens are reserved.
    OpenOptionsWritten,
    /// Tokens are reserved, in the log alone.
    OpenTokensReserved,
    /// The columns of kept filters are in memory, and their buckets not yet told so.
    FilterLoaded,
    /// Some of the keys of a bucket are in its filter again.
    FilterHalfRebuilt,
    /// The filter of a bucket is about to be written.
    FilterBegun,
    /// Half of it is written.
    FilterHalfWritten,
    /// All of it is on the disk, under another name.
    FilterWritten,
    /// It has its name.
    FilterRenamed,
    /// The filter file of a bucket that is gone is about to be removed.
    FilterOrphaned,
    /// A bucket is about to be created.
    BucketBegun,
    /// It is in the database, and nobody knows of it.
    BucketCreated,
    /// Lookups ask it, and it has no keys.
    BucketRegistered,
    /// Buckets have passed, and the time at which they did is not on the disk.
    BucketExpired,
    /// The time is on the disk, and lookups do not ask the bucket any more.
    BucketUnlinked,
    /// Its files are gone, and the database still has it.
    BucketEmptied,
    /// The database has it no more.
    BucketDropped,
    /// What is to be sealed is set apart.
    FlushFrozen,
    /// A run is written beside the database.
    SstWritten,
    /// The database has it, and the filter does not know its keys.
    SstIngested,
    /// All runs are in the database, and it was not noted which files it has.
    FlushIngested,
    /// It was noted, and the journal is about to be cut.
    FlushManifestWritten,
    /// The journal is cut, and the table still has what was sealed.
    FlushJournalTruncated,
    /// What was sealed is at hand, and about to leave the table.
    FlushPublished,
    /// It has left.
    FlushRetired,
    /// The journal is about to be flushed, so that the log can go.
    LogFlushBegun,
    /// The log behind it is gone, and it was not noted which files there are.
    LogFlushed,
    /// A new note of the database's files is on the disk, under another name.
    ManifestWritten,
    /// It has its name, which may not be on the disk.
    ManifestRenamed,
    /// A row, or something else, is about to be written.
    WriteBegun,
    /// It is in the log, and neither synced nor believed.
    WriteDone,
    /// Somebody is about to sync for all who wait.
    SyncBegun,
    /// The disk has all of it, and nobody was told.
    SyncDone,
    /// A key is being forgotten: it has its row's number, and the row is not written.
    ForgetBegun,
    /// The row is written, and the table still has the key.
    ForgetWritten,
    /// The table has it no more, and the row counts as open.
    ForgetRemoved,
    /// The store refuses, and its time is not written.
    CloseBegun,
    /// Its time is written, in the log alone.
    CloseTimeWritten,
    /// The tokens that nobody took are given back, in the log alone.
    CloseTokensWritten,
    /// All is on the disk, and the database still open.
    CloseSynced,
    /// The database is closed, and its files are not noted.
    CloseDatabase,
    /// They are noted, and the directory is still locked.
    CloseManifestWritten,
}

impl Failpoint {
    /// Passes the point, or dies there.
    #[cfg(not(feature = "internals"))]
    #[inline(always)]
    pub(crate) fn pass(self) {}

    /// Passes the point, or dies there.
    #[cfg(feature = "internals")]
    pub(crate) fn pass(self) {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU64, Ordering};

        /// The name, and how often it is still to be passed.
        static AIM: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
            let aim = std::env::var("ONLYONCE_FAILPOINT").ok()?;
            let (name, times) = aim.split_once(':')?;
            Some((name.to_owned(), AtomicU64::new(times.parse().ok()?)))
        });

        let Some((name, left)) = &*AIM else { return };
        if *name == format!("{self:?}") && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            use nix::sys::signal::{Signal, kill};
            let sent = kill(nix::unistd::Pid::this(), Signal::SIGKILL);
            // The signal ends every thread before this call returns.
            unreachable!("SIGKILL to oneself: {sent:?}");
        }
    }
}
