//! What a store counts.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use onlyonce_core::Timestamp;

/// A snapshot of a store's figures, from [`Store::stats`](crate::Store::stats). The counts begin at zero when the
/// store is opened; the rest is as of now.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Claims that were given a lease.
    pub acquired: u64,
    /// Of those, claims of a key that an earlier attempt did not complete.
    pub reclaimed: u64,
    /// Claims and records that found the key completed: duplicates.
    pub duplicates: u64,
    /// Claims and records that found the key in progress.
    pub in_progress: u64,
    /// Claims and records that were refused because the key was used with another payload.
    pub payload_mismatches: u64,
    /// Claims and records that were refused because their messages are older than the window.
    pub too_old: u64,
    /// Claims and records that were refused because their messages are too far ahead of stream time.
    pub too_far_ahead: u64,
    /// Leases that were completed.
    pub completed: u64,
    /// Keys recorded for the first time.
    pub recorded: u64,
    /// Leases that were released.
    pub released: u64,
    /// Completions, releases and renewals that came too late: another holder had taken over.
    pub superseded: u64,
    /// Messages that were let through without an answer of the store: see
    /// [`Store::count_fail_open`](crate::Store::count_fail_open).
    pub fail_open: u64,
    /// Keys that were looked up in the filters.
    pub filter_checks: u64,
    /// Of those, keys that a filter (or a bucket without one) sent to the disk.
    pub filter_hits: u64,
    /// Of those, keys that were not on the disk.
    pub filter_false_positives: u64,
    /// Syncs of the log that calls waited for. Calls at the same time share one.
    pub log_syncs: u64,
    /// Keys in progress: leased, or with a lease that has run out while its holder's process lives. Released and dropped keys
    /// are not among them.
    pub in_flight: u64,
    /// Keys that wait for [`Store::resolve`](crate::Store::resolve).
    pub held: u64,
    /// Completed and released keys in memory and in the journal, not yet in a bucket.
    pub unflushed: u64,
    /// The live buckets, the oldest first.
    pub buckets: Vec<BucketStats>,
    /// Bytes of memory that the filters take.
    pub filter_bytes: u64,
    /// Bytes of all files in the store's directory.
    pub disk_bytes: u64,
    /// The store's time, in milliseconds since the Unix epoch: elapsed time, or stream time. It may differ from the wall clock, which
    /// counts only when it was confirmed for 10 minutes. 0 on a stream store that has seen no message.
    pub now: Timestamp,
    /// How long a completed key is remembered.
    pub window: Duration,
    /// A key completed at this time (milliseconds since the Unix epoch) or later is remembered. It never goes back, also where the
    /// window becomes wider or the store's time goes back.
    pub remembers_since: Timestamp,
    /// Why the store refuses, if it is poisoned.
    pub poisoned: Option<String>,
}

/// The figures of a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BucketStats {
    /// The first moment whose completions it holds, in milliseconds since the Unix epoch.
    pub start: Timestamp,
    /// The first moment after it.
    pub end: Timestamp,
    /// Its keys. Counted while the store runs, estimated by RocksDB for buckets from before.
    pub keys: u64,
    /// Whether a filter covers it. While not, every lookup of a key asks it on disk.
    pub filtered: bool,
}

/// The counters behind [`Stats`].
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

/// A count that only grows.
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
