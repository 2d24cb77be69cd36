//! Statistics of a store: the public snapshot and the counters that fill it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use onlyonce_core::Timestamp;

/// A snapshot of a store's statistics, from [`Store::stats`](crate::Store::stats). Counters begin at zero when the
/// store is opened; all other fields are current values.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Claims that returned a lease.
    pub acquired: u64,
    /// The part of `acquired` whose keys an earlier attempt did not complete.
    pub reclaimed: u64,
    /// Claims and records that found the key completed: duplicates.
    pub duplicates: u64,
    /// Claims and records that found the key in progress.
    pub in_progress: u64,
    /// Claims and records rejected because the key was used with a different payload.
    pub payload_mismatches: u64,
    /// Claims and records rejected because their messages are older than the window.
    pub too_old: u64,
    /// Claims and records rejected because their messages are too far ahead of stream time.
    pub too_far_ahead: u64,
    /// Leases that were completed.
    pub completed: u64,
    /// Keys recorded for the first time.
    pub recorded: u64,
    /// Leases that were released.
    pub released: u64,
    /// Completions, releases and renewals rejected because another holder had taken over.
    pub superseded: u64,
    /// Work that ran without deduplication: see [`OnStoreFailure::FailOpen`](crate::OnStoreFailure::FailOpen).
    pub fail_open: u64,
    /// Keys looked up in the filter.
    pub filter_checks: u64,
    /// The part of `filter_checks` that went to disk: the filter did not rule the key out, or a bucket had no filter.
    pub filter_hits: u64,
    /// The part of `filter_hits` that no bucket held.
    pub filter_false_positives: u64,
    /// Syncs of the journal. Concurrent calls share one. Those of a flush and of `sync_interval` count as well.
    pub journal_syncs: u64,
    /// Keys in progress: leased, or with an expired lease that was not taken over. Released and dropped keys do
    /// not count.
    pub in_flight: u64,
    /// Keys held for [`Store::resolve`](crate::Store::resolve).
    pub held: u64,
    /// Completed and released keys in the memtable and the journal that are not flushed to a bucket yet.
    pub unflushed: u64,
    /// The live buckets, the oldest first.
    pub buckets: Vec<BucketStats>,
    /// Memory used by the filter, in bytes.
    pub filter_bytes: u64,
    /// Bytes of all files in the store's directory.
    pub disk_bytes: u64,
    /// The part of `disk_bytes` that the journal's segments take. They are allocated in advance and used again.
    pub journal_disk_bytes: u64,
    /// The store's time: elapsed time, or stream time. It can differ from the wall clock, because the store follows a
    /// deviating wall clock only after 10 minutes. The Unix epoch on a stream store without messages.
    pub now: Timestamp,
    /// How long a completed key is remembered.
    pub window: Duration,
    /// Keys completed at this time or later are remembered. It never goes back, even if the window becomes wider or
    /// the store's time goes back.
    pub remembers_since: Timestamp,
    /// Why the store is poisoned, if it is.
    pub poisoned: Option<String>,
}

/// Statistics of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BucketStats {
    /// The start of its time range, inclusive.
    pub start: Timestamp,
    /// The end of its time range, exclusive.
    pub end: Timestamp,
    /// Number of keys. Exact for buckets created since the open; RocksDB's estimate for older ones.
    pub keys: u64,
    /// Whether the filter covers it. Until then every lookup reads this bucket on disk.
    pub filtered: bool,
}

/// The counters of [`Stats`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) acquired: Counter,
    pub(crate) reclaimed: Counter,
    pub(crate) duplicates: Counter,
    pub(crate) in_progress: Counter,
    pub(crate) payload_mismatches: Counter,
    pub(crate) too_old: Counter,
    pub(crate) too_far_ahead: Counter,
    pub(crate) completed: Counter,
    pub(crate) recorded: Counter,
    pub(crate) released: Counter,
    pub(crate) superseded: Counter,
    pub(crate) fail_open: Counter,
    pub(crate) filter_checks: Counter,
    pub(crate) filter_hits: Counter,
    pub(crate) filter_false_positives: Counter,
}

/// A counter that only increases.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        if count > 0 {
            self.0.fetch_add(count, Ordering::Relaxed);
        }
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
