use std::time::Duration;

/// The time of a call, as the engine reads it once.
///
/// Windows run on the engine's time, leases and backoffs on monotonic time. An engine whose time is adjusted, or that keeps
/// a retention floor, overrides [`is_over`](Self::is_over) and [`remembers`](Self::remembers).
pub trait Moment: Copy {
    /// The engine's time: its clock, or stream time.
    fn time_ms(&self) -> u64;

    /// Milliseconds since a fixed moment of this process.
    fn monotonic_ms(&self) -> u64;

    /// Whether an event at `since_ms` is at least a window old.
    #[inline]
    fn is_over(&self, since_ms: u64, window_ms: u64) -> bool {
        self.time_ms() >= since_ms.saturating_add(window_ms)
    }

    /// Whether a completion at `at_ms` is remembered.
    #[inline]
    fn remembers(&self, at_ms: u64, window_ms: u64) -> bool {
        !self.is_over(at_ms, window_ms)
    }
}

/// A [`Moment`] without adjustments and without a retention floor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlainMoment {
    /// The engine's time.
    pub time_ms: u64,
    /// Milliseconds since a fixed moment of this process.
    pub monotonic_ms: u64,
}

impl Moment for PlainMoment {
    #[inline]
    fn time_ms(&self) -> u64 {
        self.time_ms
    }

    #[inline]
    fn monotonic_ms(&self) -> u64 {
        self.monotonic_ms
    }
}

/// A duration in milliseconds, at most `u64::MAX`.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
