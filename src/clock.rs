//! The only place that reads the time.
//!
//! Windows run on wall time, leases on monotonic time. [`Clock`] gives both; [`Timeline`] makes wall time safe to
//! reason with by never letting it go back, not even across restarts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Where a store takes the time from. The system's clock is the default; tests use [`ManualClock`].
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since the Unix epoch. It may jump; the store never lets it go back.
    fn wall_ms(&self) -> u64;
    /// Milliseconds since some fixed moment of this process. It must not go back.
    fn monotonic_ms(&self) -> u64;
}

/// The system's clocks.
#[derive(Debug, Clone)]
pub(crate) struct SystemClock {
    start: Instant,
}

impl SystemClock {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Clock for SystemClock {
    fn wall_ms(&self) -> u64 {
        let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        millis(since_epoch)
    }

    fn monotonic_ms(&self) -> u64 {
        millis(self.start.elapsed())
    }
}

/// A clock that moves only when it is told to.
///
/// ```
/// use onlyonce::ManualClock;
/// use std::time::Duration;
///
/// let clock = ManualClock::at(1_700_000_000_000);
/// clock.advance(Duration::from_secs(60));
/// ```
#[derive(Debug, Clone)]
pub struct ManualClock {
    inner: Arc<ManualInner>,
}

#[derive(Debug)]
struct ManualInner {
    wall_ms: AtomicU64,
    monotonic_ms: AtomicU64,
}

impl ManualClock {
    /// A clock that shows `wall_ms`, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn at(wall_ms: u64) -> Self {
        Self { inner: Arc::new(ManualInner { wall_ms: AtomicU64::new(wall_ms), monotonic_ms: AtomicU64::new(0) }) }
    }

    /// Moves both clocks forward, by whole milliseconds.
    pub fn advance(&self, by: Duration) {
        self.inner.wall_ms.fetch_add(millis(by), Ordering::SeqCst);
        self.inner.monotonic_ms.fetch_add(millis(by), Ordering::SeqCst);
    }

    /// Sets the wall clock alone, forward or back, as an operator or a time server may.
    pub fn set_wall_ms(&self, wall_ms: u64) {
        self.inner.wall_ms.store(wall_ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn wall_ms(&self) -> u64 {
        self.inner.wall_ms.load(Ordering::SeqCst)
    }

    fn monotonic_ms(&self) -> u64 {
        self.inner.monotonic_ms.load(Ordering::SeqCst)
    }
}

/// One reading of both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Now {
    /// Wall time that never goes back.
    pub(crate) wall_ms: u64,
    pub(crate) monotonic_ms: u64,
}

/// A clock that says more than this, some 140,000 years from now, is broken; the bound keeps sums of times in range.
const MAX_WALL_MS: u64 = 1 << 52;

/// A clock with a high-water mark.
pub(crate) struct Timeline {
    clock: Arc<dyn Clock>,
    high_water_ms: AtomicU64,
}

impl Timeline {
    pub(crate) fn new(clock: Arc<dyn Clock>, high_water_ms: u64) -> Self {
        let behind_ms = high_water_ms.saturating_sub(clock.wall_ms());
        if behind_ms > 0 {
            tracing::warn!(
                behind_ms,
                "the wall clock is behind what this store has seen: its time stands still until the clock catches up"
            );
        }
        Self { clock, high_water_ms: AtomicU64::new(high_water_ms) }
    }

    pub(crate) fn now(&self) -> Now {
        let wall_ms = self.clock.wall_ms().min(MAX_WALL_MS);
        let mut high_water_ms = self.high_water_ms.load(Ordering::Acquire);
        // Most readings fall into a millisecond that was seen before: they need no write to the shared line.
        if wall_ms > high_water_ms {
            high_water_ms = self.high_water_ms.fetch_max(wall_ms, Ordering::AcqRel);
        }
        Now { wall_ms: wall_ms.max(high_water_ms), monotonic_ms: self.clock.monotonic_ms() }
    }

    /// The latest wall time that any answer was based on.
    pub(crate) fn high_water_ms(&self) -> u64 {
        self.high_water_ms.load(Ordering::Acquire)
    }
}

/// Whole milliseconds of a duration; one beyond half a billion years counts as that.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_time_never_goes_back() {
        let clock = ManualClock::at(1_000);
        let timeline = Timeline::new(Arc::new(clock.clone()), 5_000);
        assert_eq!(timeline.now().wall_ms, 5_000);
        clock.set_wall_ms(7_000);
        assert_eq!(timeline.now().wall_ms, 7_000);
        clock.set_wall_ms(10);
        assert_eq!(timeline.now().wall_ms, 7_000);
        assert_eq!(timeline.high_water_ms(), 7_000);
    }
}
