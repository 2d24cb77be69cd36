//! Counts redeliveries of keys whose work does not run.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use onlyonce_core::Key;
use parking_lot::Mutex;

/// Maximum number of tracked keys. Redeliveries of further keys are not counted.
const MAX_KEYS: usize = 65_536;
/// A series without a redelivery for this long is removed, however short the limit: a queue may redeliver this late.
const MIN_EXPIRY: Duration = Duration::from_secs(3_600);

/// Redelivery counts by key, in memory: a restart resets them.
#[derive(Debug, Default)]
pub(crate) struct Redeliveries {
    by_key: Mutex<HashMap<u64, Series>>,
    hasher: RandomState,
}

#[derive(Debug, Clone, Copy)]
struct Series {
    first: Instant,
    last: Instant,
    count: u32,
}

/// The redeliveries of a key that has exceeded its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exceeded {
    pub(crate) redeliveries: u32,
    pub(crate) elapsed: Duration,
}

impl Redeliveries {
    /// Counts a redelivery of `key`. If it already has `min_count` redeliveries over at least `limit`, removes the count and
    /// returns it: the delivery is to be rejected.
    pub(crate) fn count(&self, key: &Key<'_>, min_count: u32, limit: Duration, now: Instant) -> Option<Exceeded> {
        let digest = self.hasher.hash_one(key);
        let mut by_key = self.by_key.lock();
        let is_expired = |series: &Series| now.saturating_duration_since(series.last) > limit.max(MIN_EXPIRY);
        if by_key.get(&digest).is_some_and(is_expired) {
            by_key.remove(&digest);
        }
        if by_key.len() >= MAX_KEYS && !by_key.contains_key(&digest) {
            by_key.retain(|_, series| !is_expired(series));
            if by_key.len() >= MAX_KEYS {
                return None;
            }
        }
        let series = by_key.entry(digest).or_insert(Series { first: now, last: now, count: 0 });
        let elapsed = now.saturating_duration_since(series.first);
        if series.count >= min_count && elapsed >= limit {
            let exceeded = Exceeded { redeliveries: series.count, elapsed };
            by_key.remove(&digest);
            return Some(exceeded);
        }
        series.count = series.count.saturating_add(1);
        series.last = now;
        None
    }

    /// Resets the count of `key`, because its work ran or is completed.
    pub(crate) fn reset(&self, key: &Key<'_>) {
        let mut by_key = self.by_key.lock();
        if !by_key.is_empty() {
            by_key.remove(&self.hasher.hash_one(key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn the_limit_needs_both_the_count_and_the_time() {
        let (redeliveries, key) = (Redeliveries::default(), Key::from("a"));
        let mut now = Instant::now();
        let mut count_after = |pause: Duration| {
            now += pause;
            redeliveries.count(&key, 3, 10 * MINUTE, now)
        };
        assert_eq!(count_after(Duration::ZERO), None);
        // Long enough, but too few.
        assert_eq!(count_after(20 * MINUTE), None);
        assert_eq!(count_after(MINUTE), None);
        assert_eq!(count_after(MINUTE), Some(Exceeded { redeliveries: 3, elapsed: 22 * MINUTE }));
        // Counts again from 0, such as after a redrive. Many, but not long enough.
        assert!((0..50).all(|_| count_after(Duration::from_secs(10)).is_none()));
    }

    #[test]
    fn a_reset_and_a_long_pause_start_a_new_count() {
        let (redeliveries, key) = (Redeliveries::default(), Key::from("a"));
        let start = Instant::now();
        let exceeds = |at: Duration| redeliveries.count(&key, 1, MINUTE, start + at).is_some();
        assert!(!exceeds(Duration::ZERO));
        redeliveries.reset(&key);
        let pause = MIN_EXPIRY + Duration::from_secs(1) + MINUTE;
        assert!(!exceeds(2 * MINUTE), "reset");
        assert!(!exceeds(2 * MINUTE + pause), "expired");
        assert!(exceeds(4 * MINUTE + pause));
    }

    #[test]
    fn the_number_of_tracked_keys_is_bounded() {
        let redeliveries = Redeliveries::default();
        let now = Instant::now();
        for key in 0..MAX_KEYS + 10 {
            assert_eq!(redeliveries.count(&Key::from(key.to_string()), 1, MINUTE, now), None);
        }
        assert_eq!(redeliveries.by_key.lock().len(), MAX_KEYS);
        let later = now + Duration::from_secs(4_000);
        assert_eq!(redeliveries.count(&Key::from("new"), 1, MINUTE, later), None);
        assert_eq!(redeliveries.by_key.lock().len(), 1, "expired keys are removed");
    }
}
