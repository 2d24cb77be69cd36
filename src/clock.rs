//! The store's time. Only this module reads clocks.
//!
//! Windows run on the store's time, leases on monotonic time. The store's time is either elapsed time corrected by
//! the wall clock (`wall.rs`) or stream time, the newest message timestamp (`stream.rs`).

mod steps;
mod stream;
mod wall;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

pub(crate) use steps::{Step, Steps};
pub(crate) use stream::Leap;
use stream::StreamTime;
use wall::WallTime;
pub(crate) use wall::{ClockState, Deviation};

use onlyonce_core::Timestamp;

use crate::config::Span;

/// The clocks that a store reads. The default is the system's clocks; tests use [`ManualClock`].
pub trait Clock: Send + Sync + 'static {
    /// The wall clock. It may be wrong and may jump: the store's time follows a deviation of more than a second only
    /// after it has lasted for 10 minutes.
    fn wall(&self) -> Timestamp;
    /// Milliseconds since a fixed moment of this process. It must never go back and must not stop while the process
    /// runs: the store's time is based on it.
    fn monotonic_ms(&self) -> u64;
    /// A clock that continues across processes, if there is one. It tells the store how long it was closed and how
    /// long the machine was suspended. `None` by default.
    fn boot(&self) -> Option<BootTime> {
        None
    }
}

/// A reading of a clock that continues across processes within one boot of a machine, including while it is
/// suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootTime {
    /// Identifies the boot. Times of different boots are not comparable.
    pub id: [u8; 16],
    /// Milliseconds since a fixed moment of this boot.
    pub ms: u64,
}

/// The system's clocks.
#[derive(Debug, Clone)]
pub(crate) struct SystemClock {
    start: Instant,
    boot_id: Option<[u8; 16]>,
}

impl SystemClock {
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), boot_id: boot_id() }
    }
}

impl Clock for SystemClock {
    fn wall(&self) -> Timestamp {
        Timestamp::from(SystemTime::now())
    }

    fn monotonic_ms(&self) -> u64 {
        millis(self.start.elapsed())
    }

    fn boot(&self) -> Option<BootTime> {
        Some(BootTime { id: self.boot_id?, ms: since_boot_ms()? })
    }
}

/// Identifies the boot of this machine and the time namespace: in another namespace the boot clock may have a
/// different offset.
#[cfg(target_os = "linux")]
fn boot_id() -> Option<[u8; 16]> {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/time").unwrap_or_default();
    let mut hash = blake3::Hasher::new();
    hash.update(&boot).update(namespace.as_os_str().as_encoded_bytes());
    hash.finalize().as_bytes().first_chunk().copied()
}

#[cfg(target_os = "linux")]
fn since_boot_ms() -> Option<u64> {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).ok()?;
    let (seconds, nanos) = (u64::try_from(now.tv_sec()).ok()?, u64::try_from(now.tv_nsec()).ok()?);
    seconds.checked_mul(1_000)?.checked_add(nanos / 1_000_000)
}

#[cfg(not(target_os = "linux"))]
fn boot_id() -> Option<[u8; 16]> {
    None
}

#[cfg(not(target_os = "linux"))]
fn since_boot_ms() -> Option<u64> {
    None
}

/// A clock that moves only when a test moves it.
///
/// All manual clocks start in the same boot. So a store that is reopened with a clock that shows a later time treats
/// the difference as time spent closed.
///
/// ```
/// use std::time::Duration;
///
/// use onlyonce::{ManualClock, Timestamp};
///
/// let clock = ManualClock::at(Timestamp::from_unix_s(1_700_000_000));
/// clock.advance(Duration::from_secs(60));
/// ```
#[derive(Debug, Clone)]
pub struct ManualClock {
    inner: Arc<ManualInner>,
}

#[derive(Debug)]
struct ManualInner {
    monotonic_ms: AtomicU64,
    /// The wall clock minus the monotonic clock.
    wall_offset_ms: AtomicU64,
    /// The boot clock minus the monotonic clock.
    boot_offset_ms: AtomicU64,
    boots: AtomicU64,
}

impl ManualClock {
    /// A clock that shows this time.
    #[must_use]
    pub fn at(wall: Timestamp) -> Self {
        let wall_ms = wall.as_unix_ms();
        let inner = ManualInner {
            monotonic_ms: AtomicU64::new(0),
            wall_offset_ms: AtomicU64::new(wall_ms),
            boot_offset_ms: AtomicU64::new(wall_ms),
            boots: AtomicU64::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Advances all its clocks, by whole milliseconds.
    pub fn advance(&self, by: Duration) {
        self.inner.monotonic_ms.fetch_add(millis(by), Ordering::SeqCst);
    }

    /// Sets only the wall clock, forward or back, as an operator or a time server may.
    pub fn set_wall(&self, wall: Timestamp) {
        let monotonic_ms = self.inner.monotonic_ms.load(Ordering::SeqCst);
        self.inner.wall_offset_ms.store(wall.as_unix_ms().wrapping_sub(monotonic_ms), Ordering::SeqCst);
    }

    /// Simulates a suspended machine: the wall clock and the boot clock advance, the monotonic clock does not.
    pub fn suspend(&self, by: Duration) {
        // In this order a concurrent reader sees a wall clock that is slow, which the store's time does not follow.
        self.inner.boot_offset_ms.fetch_add(millis(by), Ordering::SeqCst);
        self.inner.wall_offset_ms.fetch_add(millis(by), Ordering::SeqCst);
    }

    /// Simulates a reboot of the machine. Call it while no store is open.
    pub fn reboot(&self) {
        self.inner.boots.fetch_add(1, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn wall(&self) -> Timestamp {
        let offset_ms = self.inner.wall_offset_ms.load(Ordering::SeqCst);
        Timestamp::from_unix_ms(offset_ms.wrapping_add(self.monotonic_ms()))
    }

    fn monotonic_ms(&self) -> u64 {
        self.inner.monotonic_ms.load(Ordering::SeqCst)
    }

    fn boot(&self) -> Option<BootTime> {
        let boots = self.inner.boots.load(Ordering::SeqCst);
        let ms = self.inner.boot_offset_ms.load(Ordering::SeqCst).wrapping_add(self.monotonic_ms());
        Some(BootTime { id: u128::from(boots).to_le_bytes(), ms })
    }
}

/// The store's time and what depends on it, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Now {
    /// The store's time: elapsed time, or stream time.
    pub(crate) time_ms: u64,
    pub(crate) monotonic_ms: u64,
    /// The retention floor: completions before it are forgotten permanently, even if the window becomes wider.
    pub(crate) remembers_since_ms: u64,
    /// The forward steps that shifted completions.
    pub(crate) steps: Steps,
}

impl Now {
    /// Whether an event at `at_ms` is at least a window old.
    #[inline]
    pub(crate) fn is_over(&self, at_ms: u64, window_ms: u64) -> bool {
        self.time_ms >= self.steps.counted_ms(at_ms).saturating_add(window_ms)
    }

    /// G4: a completion at this time is remembered if and only if it is less than a window old and not below the
    /// retention floor.
    #[inline]
    pub(crate) fn remembers(&self, completed_ms: u64, window_ms: u64) -> bool {
        self.steps.counted_ms(completed_ms) >= self.remembers_since_ms && !self.is_over(completed_ms, window_ms)
    }

    /// Whether any completion between these times may still be remembered.
    pub(crate) fn remembers_any(&self, first_ms: u64, last_ms: u64, window_ms: u64) -> bool {
        let newest_ms = self.steps.newest_counted_ms(first_ms, last_ms);
        newest_ms >= self.remembers_since_ms && self.time_ms < newest_ms.saturating_add(window_ms)
    }

    /// When a completion at this time expires.
    pub(crate) fn remembered_until_ms(&self, completed_ms: u64, window_ms: u64) -> u64 {
        self.steps.counted_ms(completed_ms).saturating_add(window_ms)
    }

    /// Completions at this time or later are remembered.
    pub(crate) fn remembers_since(&self, window_ms: u64) -> u64 {
        wall::floor_ms(self.remembers_since_ms, self.time_ms, window_ms)
    }
}

/// Upper bound of all times, about 140,000 years from now. Keeps sums of times in range.
pub(crate) const MAX_WALL_MS: u64 = 1 << 52;

/// A leap year.
pub(crate) const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// The store's time and the retention floor, as stored for the next open. A time of 0 means that none was stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Saved {
    pub(crate) time_ms: u64,
    pub(crate) floor_ms: u64,
    /// The newest time of a key. It is later than `time_ms` if the store's time went back, or was not saved before a crash.
    pub(crate) newest_ms: u64,
}

impl Saved {
    /// Raises the floor to the completions that had expired under this window.
    pub(crate) fn forgotten_by(&self, window_ms: u64) -> Self {
        Self { floor_ms: wall::floor_ms(self.floor_ms, self.time_ms, window_ms), ..*self }
    }
}

/// The store's time.
pub(crate) struct Timeline {
    driver: Driver,
    /// Number of explicit requests to save the time.
    save_requests: AtomicU64,
}

#[expect(clippy::large_enum_variant, reason = "there is one for each store")]
enum Driver {
    Clocks(WallTime),
    Messages(StreamTime),
}

impl Timeline {
    /// Elapsed time, continued from the stored time.
    pub(crate) fn of_clocks(clock: Arc<dyn Clock>, saved: &Saved, state: &ClockState, span: Span) -> Self {
        Self { driver: Driver::Clocks(WallTime::resume(clock, saved, state, span)), save_requests: AtomicU64::new(0) }
    }

    /// Stream time, continued from the stored time. A new store starts with the time of its first message.
    pub(crate) fn of_messages(clock: Arc<dyn Clock>, saved: &Saved, max_ahead_ms: u64, window_ms: u64) -> Self {
        let stream = StreamTime::resume(clock, saved, max_ahead_ms, window_ms);
        Self { driver: Driver::Messages(stream), save_requests: AtomicU64::new(0) }
    }

    pub(crate) fn is_stream(&self) -> bool {
        matches!(self.driver, Driver::Messages(_))
    }

    pub(crate) fn now(&self) -> Now {
        match &self.driver {
            Driver::Clocks(wall) => wall.now(),
            Driver::Messages(stream) => stream.now(),
        }
    }

    /// Reads all clocks, including those that are too expensive to read on every call.
    pub(crate) fn observe(&self) -> Now {
        match &self.driver {
            Driver::Clocks(wall) => wall.observe(),
            Driver::Messages(stream) => stream.now(),
        }
    }

    /// Advances stream time to a message at `at_ms` and returns it. `next_ms` are the times of the messages after it
    /// in the same batch, which can confirm a leap. A rejected leap is remembered, so that the next message can
    /// confirm it.
    pub(crate) fn follow(&self, at_ms: u64, next_ms: impl IntoIterator<Item = u64>) -> Result<u64, Leap> {
        match &self.driver {
            Driver::Clocks(wall) => Ok(wall.now().time_ms),
            Driver::Messages(stream) => stream.follow(at_ms, next_ms),
        }
    }

    /// What [`Timeline::follow`] would return. Changes nothing.
    pub(crate) fn foresee(&self, at_ms: u64) -> Result<u64, Leap> {
        match &self.driver {
            Driver::Clocks(wall) => Ok(wall.now().time_ms),
            Driver::Messages(stream) => stream.foresee(at_ms),
        }
    }

    /// Advances stream time explicitly; never moves it back. False if the time is more than a year ahead of both
    /// stream time and the wall clock, which must be a mistake.
    pub(crate) fn advance(&self, to_ms: u64) -> bool {
        match &self.driver {
            Driver::Clocks(_) => false,
            Driver::Messages(stream) => stream.advance_by_hand(to_ms),
        }
    }

    /// Requests that the next write saves the time.
    pub(crate) fn ask_to_be_saved(&self) {
        self.save_requests.fetch_add(1, Ordering::AcqRel);
    }

    /// A counter of changes that must be saved.
    pub(crate) fn changes(&self) -> u64 {
        let save_requests = self.save_requests.load(Ordering::Acquire);
        match &self.driver {
            Driver::Clocks(wall) => save_requests.wrapping_add(wall.changes()),
            Driver::Messages(_) => save_requests,
        }
    }

    /// The state to store for the next open. The clock state is `None` on stream time.
    pub(crate) fn save(&self) -> (Saved, Option<ClockState>) {
        match &self.driver {
            Driver::Clocks(wall) => {
                let (saved, state) = wall.save();
                (saved, Some(state))
            }
            Driver::Messages(stream) => (stream.save(), None),
        }
    }
}

/// The whole milliseconds of a duration, saturating.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_shows_the_times_it_is_set_to() {
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000));
        let shows = || (clock.wall().as_unix_ms(), clock.monotonic_ms(), clock.boot().unwrap().ms);
        assert_eq!(shows(), (1_000, 0, 1_000));
        clock.advance(Duration::from_millis(50));
        assert_eq!(shows(), (1_050, 50, 1_050));
        clock.set_wall(onlyonce_core::Timestamp::from_unix_ms(7));
        assert_eq!(shows(), (7, 50, 1_050));
        clock.suspend(Duration::from_millis(100));
        assert_eq!(shows(), (107, 50, 1_150));
        let (before, other) =
            (clock.boot().unwrap().id, ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(5)).boot().unwrap().id);
        clock.reboot();
        assert_eq!(before, other, "the clocks start in the same boot");
        assert_ne!(clock.boot().unwrap().id, other);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_clock_has_a_boot_time() {
        let (one, other) = (SystemClock::new().boot().unwrap(), SystemClock::new().boot().unwrap());
        assert_eq!(one.id, other.id);
        assert!(one.ms <= other.ms && other.ms - one.ms < 60_000, "{one:?}, {other:?}");
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime_ms = uptime.split('.').next().unwrap().parse::<u64>().unwrap() * 1_000;
        assert!(other.ms.abs_diff(uptime_ms) < 60_000, "{other:?}, up for {uptime_ms} ms");
    }
}
