//! The options of a store and their validation.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, SystemClock, YEAR, millis};
use onlyonce_core::{Error, OnInterrupt, Result};

/// Each live bucket is a column family, and RocksDB's cost grows faster than linearly with their number.
pub(crate) const MAX_BUCKETS: u64 = 48;
const DEFAULT_BUCKETS: u32 = 24;
const DEFAULT_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);
/// More than any machine has, and less than the largest size of RocksDB's caches.
const MAX_MEMORY_BUDGET: usize = 1 << 44;
const MIB: usize = 1024 * 1024;
const MAX_SPARE_SEGMENTS: u64 = 1 << 40;
/// The longest key, with its scope, of any store.
pub(crate) const MAX_KEY: usize = 65_535;

/// What a result survives once the call has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Results are synced to disk before the call returns and survive a power cut. Costs one fdatasync a call or
    /// batch; concurrent calls share one.
    Disk,
    /// Results are written to the operating system before the call returns and survive `kill -9`. A power cut can
    /// lose the results of the last `sync_interval`.
    Process,
}

/// The options of a store, as the caller set them.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) window: Option<Duration>,
    pub(crate) bucket: Option<Duration>,
    pub(crate) lease: Duration,
    pub(crate) renew_for: Option<Duration>,
    pub(crate) durability: Durability,
    pub(crate) sync_interval: Duration,
    pub(crate) on_interrupt: Option<OnInterrupt>,
    /// How far one message may advance stream time. Set only for stores that run on stream time.
    pub(crate) stream_time: Option<Duration>,
    pub(crate) memory_budget: usize,
    pub(crate) expected_rate: u64,
    pub(crate) result_limit: usize,
    pub(crate) key_limit: usize,
    pub(crate) in_flight_limit: usize,
    pub(crate) held_limit: usize,
    /// Bytes of unused segments that the journal keeps.
    pub(crate) spare_segments: u64,
    pub(crate) lock_wait: Duration,
    /// Capacity of each queue of the committer, in calls.
    pub(crate) queue_limit: usize,
    /// Whether an open creates a store if there is none.
    pub(crate) create: bool,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            window: None,
            bucket: None,
            lease: Duration::from_secs(30),
            renew_for: None,
            durability: Durability::Disk,
            sync_interval: Duration::from_secs(1),
            on_interrupt: None,
            stream_time: None,
            memory_budget: 256 * MIB,
            expected_rate: 0,
            result_limit: MIB,
            key_limit: 1_024,
            in_flight_limit: 1_000_000,
            held_limit: 1_000_000,
            spare_segments: 64 << 20,
            lock_wait: Duration::from_secs(1),
            queue_limit: 1_024,
            create: true,
            clock: Arc::new(SystemClock::new()),
        }
    }
}

/// The options that a store keeps across opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) span: Span,
    pub(crate) on_interrupt: OnInterrupt,
    /// How far one message may advance stream time, if the store runs on it.
    pub(crate) max_ahead_ms: Option<u64>,
}

/// Window and bucket width, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) window_ms: u64,
    pub(crate) bucket_ms: u64,
}

/// The options, checked and complete.
#[derive(Clone)]
pub(crate) struct Config {
    pub(crate) span: Span,
    pub(crate) lease_ms: u64,
    /// How long after its claim a lease is renewed automatically.
    pub(crate) renew_for_ms: u64,
    pub(crate) durability: Durability,
    pub(crate) sync_interval: Duration,
    pub(crate) on_interrupt: OnInterrupt,
    /// How far one message may advance stream time, if the store runs on it.
    pub(crate) max_ahead_ms: Option<u64>,
    pub(crate) memory_budget: usize,
    /// Expected number of keys in a bucket.
    pub(crate) bucket_keys: u64,
    pub(crate) result_limit: usize,
    pub(crate) key_limit: usize,
    pub(crate) in_flight_limit: usize,
    pub(crate) held_limit: usize,
    #[cfg_attr(not(feature = "tokio"), expect(dead_code, reason = "only submitted calls have a queue"))]
    pub(crate) queue_limit: usize,
}

impl Options {
    /// Checks the options that do not depend on the stored ones. Must run before RocksDB sees them: RocksDB aborts
    /// the process if it cannot allocate its caches.
    pub(crate) fn check_bounds(&self) -> Result<()> {
        // Before anything is created: what the store itself stores is only a default for these.
        within("window", self.window.unwrap_or(YEAR), Duration::from_millis(1), YEAR * 10)?;
        within("bucket", self.bucket.unwrap_or(YEAR), Duration::from_millis(1), YEAR * 10)?;
        within("stream_time", self.stream_time.unwrap_or(YEAR), Duration::from_millis(1), YEAR * 10)?;
        within("lease", self.lease, Duration::from_millis(1), YEAR)?;
        within("renew_for", self.renew_for.unwrap_or(YEAR), Duration::from_millis(1), YEAR)?;
        within("sync_interval", self.sync_interval, Duration::from_millis(1), Duration::from_secs(3_600))?;
        within("lock_wait", self.lock_wait, Duration::ZERO, Duration::from_secs(3_600))?;
        within("memory_budget", self.memory_budget, 32 * MIB, MAX_MEMORY_BUDGET)?;
        within("result_limit", self.result_limit, 0, 64 * MIB)?;
        within("key_limit", self.key_limit, 1, MAX_KEY)?;
        within("in_flight_limit", self.in_flight_limit, 1, usize::MAX)?;
        within("queue_limit", self.queue_limit, 1, 1_000_000)?;
        within("spare_segments", self.spare_segments, 0, MAX_SPARE_SEGMENTS)?;
        within("held_limit", self.held_limit, 1, usize::MAX)
    }

    /// Checks every option against its bounds. `stored` are the options of an existing store.
    pub(crate) fn check(&self, stored: Option<Stored>) -> Result<Config> {
        let max_ahead = self.max_ahead(stored)?;
        let on_interrupt = self.on_interrupt.or(stored.map(|stored| stored.on_interrupt)).unwrap_or(OnInterrupt::Rerun);
        let stored = stored.map(|stored| stored.span);
        let window = match (self.window, stored) {
            (Some(window), _) => window,
            (None, Some(stored)) => Duration::from_millis(stored.window_ms),
            (None, None) => DEFAULT_WINDOW,
        };
        within("window", window, Duration::from_millis(1), YEAR * 10)?;
        let bucket = match (self.bucket, stored) {
            (Some(bucket), _) => bucket,
            (None, Some(stored)) if self.window.is_none() || stored.window_ms == millis(window) => {
                Duration::from_millis(stored.bucket_ms)
            }
            _ => (window / DEFAULT_BUCKETS).max(Duration::from_millis(1)),
        };
        within("bucket", bucket, Duration::from_millis(1), window)?;
        let span = Span { window_ms: millis(window), bucket_ms: millis(bucket) };
        if span.window_ms.div_ceil(span.bucket_ms) > MAX_BUCKETS {
            let least = Duration::from_millis(span.window_ms.div_ceil(MAX_BUCKETS));
            return Err(Error::Config {
                option: "bucket",
                value: format!("{bucket:?}"),
                bounds: format!("at least {least:?} for a window of {window:?} (at most {MAX_BUCKETS} buckets)"),
            });
        }
        // The stored value may exceed a window that has become narrower.
        let max_ahead =
            max_ahead.map(|max_ahead| if self.stream_time.is_some() { max_ahead } else { max_ahead.min(window) });
        if let Some(max_ahead) = max_ahead {
            within("stream_time", max_ahead, Duration::from_millis(1), window)?;
        }
        self.check_bounds()?;
        Ok(Config {
            span,
            lease_ms: millis(self.lease),
            renew_for_ms: self.renew_for.map_or(u64::MAX, millis),
            durability: self.durability,
            sync_interval: self.sync_interval,
            on_interrupt,
            max_ahead_ms: max_ahead.map(millis),
            memory_budget: self.memory_budget,
            bucket_keys: self.expected_rate.saturating_mul(span.bucket_ms) / 1_000,
            result_limit: self.result_limit,
            key_limit: self.key_limit,
            in_flight_limit: self.in_flight_limit,
            held_limit: self.held_limit,
            queue_limit: self.queue_limit,
        })
    }
}

impl Options {
    /// How far one message may advance stream time. The time source is fixed when the store is created.
    fn max_ahead(&self, stored: Option<Stored>) -> Result<Option<Duration>> {
        match (self.stream_time, stored) {
            (Some(max_ahead), Some(Stored { max_ahead_ms: None, .. })) => Err(Error::Config {
                option: "stream_time",
                value: format!("{max_ahead:?}"),
                bounds: "unset: this store was created to run on its clock".to_owned(),
            }),
            (None, Some(stored)) => Ok(stored.max_ahead_ms.map(Duration::from_millis)),
            (requested, _) => Ok(requested),
        }
    }
}

fn within<T: PartialOrd + std::fmt::Debug>(option: &'static str, value: T, least: T, most: T) -> Result<()> {
    if (&least..=&most).contains(&&value) {
        return Ok(());
    }
    Err(Error::Config { option, value: format!("{value:?}"), bounds: format!("from {least:?} to {most:?}") })
}

impl Config {
    /// Whether `complete` and `record` wait for a sync.
    pub(crate) fn sync_results(&self) -> bool {
        self.durability == Durability::Disk
    }

    /// Whether a claim waits for a sync. Under `Rerun` it does not: if a power cut loses the claim, the key can be claimed as if
    /// for the first time.
    pub(crate) fn sync_claims(&self) -> bool {
        self.durability == Durability::Disk && self.on_interrupt == OnInterrupt::Hold
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rejected(options: Options) -> String {
        options.check(None).map(|_| ()).unwrap_err().to_string()
    }

    #[test]
    fn an_error_names_the_option_and_its_bounds() {
        let second = Duration::from_secs(1);
        let message = rejected(Options { window: Some(second), bucket: Some(second * 2), ..Options::default() });
        assert!(message.contains("`bucket` is 2s") && message.contains("to 1s"), "{message}");
        let message = rejected(Options { window: Some(second * 490), bucket: Some(second), ..Options::default() });
        assert!(message.contains("`bucket`") && message.contains("at most 48 buckets"), "{message}");
        let message = rejected(Options { lease: Duration::ZERO, ..Options::default() });
        assert!(message.contains("`lease` is 0ns"), "{message}");
        let message = rejected(Options { memory_budget: 1, ..Options::default() });
        assert!(message.contains("`memory_budget` is 1"), "{message}");
        let message = rejected(Options { spare_segments: u64::MAX, ..Options::default() });
        assert!(message.contains("`spare_segments` is 184"), "{message}");
    }

    #[test]
    fn a_store_keeps_its_window_until_it_is_opened_with_another_one() {
        let span = Span { window_ms: 7_000, bucket_ms: 500 };
        let stored = Stored { span, on_interrupt: OnInterrupt::Hold, max_ahead_ms: None };
        assert_eq!(Options::default().check(Some(stored)).unwrap().span, span);
        assert_eq!(Options::default().check(Some(stored)).unwrap().on_interrupt, OnInterrupt::Hold);
        let wider = Options { window: Some(Duration::from_secs(24)), ..Options::default() };
        assert_eq!(wider.check(Some(stored)).unwrap().span, Span { window_ms: 24_000, bucket_ms: 1_000 });
    }

    #[test]
    fn the_time_source_is_fixed_at_creation() {
        let second = Duration::from_secs(1);
        let requested = Options { stream_time: Some(second), ..Options::default() };
        assert_eq!(requested.check(None).unwrap().max_ahead_ms, Some(1_000));
        let span = Span { window_ms: 7_000, bucket_ms: 500 };
        let on_clock = Stored { span, on_interrupt: OnInterrupt::Rerun, max_ahead_ms: None };
        let on_stream = Stored { max_ahead_ms: Some(7_000), ..on_clock };
        let message = requested.check(Some(on_clock)).map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("`stream_time` is 1s") && message.contains("run on its clock"), "{message}");
        assert_eq!(requested.check(Some(on_stream)).unwrap().max_ahead_ms, Some(1_000));
        assert_eq!(Options::default().check(Some(on_stream)).unwrap().max_ahead_ms, Some(7_000));
        let narrower = Options { window: Some(second), bucket: Some(second), ..Options::default() };
        assert_eq!(narrower.check(Some(on_stream)).unwrap().max_ahead_ms, Some(1_000));
        let message = rejected(Options { stream_time: Some(second * 2), ..narrower });
        assert!(message.contains("`stream_time` is 2s") && message.contains("to 1s"), "{message}");
    }
}
