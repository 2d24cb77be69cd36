//! The only place that reads the time.
//!
//! Windows run on the store's time, leases on monotonic time. The store's time is the wall clock's or that of its
//! messages; [`Timeline`] makes it safe to reason with by never letting it go back, not even across restarts.

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

/// One reading of the times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Now {
    /// The store's time: wall time or stream time. It never goes back.
    pub(crate) time_ms: u64,
    pub(crate) monotonic_ms: u64,
    /// What backoffs run on: wall time, so that they outlast the process, and monotonic time on a stream store.
    pub(crate) backoff_ms: u64,
}

/// A clock that says more than this, some 140,000 years from now, is broken; the bound keeps sums of times in range.
const MAX_WALL_MS: u64 = 1 << 52;

/// A year, and a day where it has one more.
pub(crate) const YEAR: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// A clock with a high-water mark; or, where `stream` is there, a high-water mark that messages move.
pub(crate) struct Timeline {
    clock: Arc<dyn Clock>,
    high_water_ms: AtomicU64,
    stream: Option<Stream>,
}

/// What moves stream time, and how far.
struct Stream {
    max_ahead_ms: u64,
    window_ms: u64,
    /// The time of the last message that was refused for its leap. 0 if there is none, or one within reach came since.
    leap_ms: AtomicU64,
}

/// A message that is too far ahead of stream time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leap {
    pub(crate) stream_ms: u64,
    pub(crate) max_ahead_ms: u64,
    /// Whether it is as far ahead of the wall clock, too.
    pub(crate) in_future: bool,
}

impl Timeline {
    /// Time that the wall clock drives.
    pub(crate) fn new(clock: Arc<dyn Clock>, high_water_ms: u64) -> Self {
        let behind_ms = high_water_ms.saturating_sub(clock.wall_ms());
        if behind_ms > 0 {
            tracing::warn!(
                behind_ms,
                "the wall clock is behind what this store has seen: its time stands still until the clock catches up"
            );
        }
        Self { clock, high_water_ms: AtomicU64::new(high_water_ms), stream: None }
    }

    /// Time that messages drive, from `high_water_ms` on, or from wherever the first one is if that is 0.
    pub(crate) fn of_messages(clock: Arc<dyn Clock>, high_water_ms: u64, max_ahead_ms: u64, window_ms: u64) -> Self {
        let stream = Some(Stream { max_ahead_ms, window_ms, leap_ms: AtomicU64::new(0) });
        Self { clock, high_water_ms: AtomicU64::new(high_water_ms), stream }
    }

    pub(crate) fn is_stream(&self) -> bool {
        self.stream.is_some()
    }

    pub(crate) fn now(&self) -> Now {
        if self.is_stream() {
            let monotonic_ms = self.clock.monotonic_ms();
            return Now { time_ms: self.high_water_ms(), monotonic_ms, backoff_ms: monotonic_ms };
        }
        let wall_ms = self.clock.wall_ms().min(MAX_WALL_MS);
        let mut high_water_ms = self.high_water_ms.load(Ordering::Acquire);
        // Most readings fall into a millisecond that was seen before: they need no write to the shared line.
        if wall_ms > high_water_ms {
            high_water_ms = self.high_water_ms.fetch_max(wall_ms, Ordering::AcqRel);
        }
        let time_ms = wall_ms.max(high_water_ms);
        Now { time_ms, monotonic_ms: self.clock.monotonic_ms(), backoff_ms: time_ms }
    }

    /// Takes stream time along to a message of `at_ms`; what it is then. `next_ms` are the times of the messages behind it
    /// that came with it: they, too, can confirm a leap. One that is refused is noted.
    pub(crate) fn follow(&self, at_ms: u64, next_ms: impl IntoIterator<Item = u64>) -> Result<u64, Leap> {
        let Some(stream) = &self.stream else { return Ok(self.high_water_ms()) };
        let stream_ms = self.high_water_ms();
        let noted_ms = stream.leap_ms.load(Ordering::Relaxed);
        if stream.reaches(stream_ms, at_ms) {
            // What is too old says nothing about where the stream is now.
            if noted_ms != 0 && !stream.is_late(stream_ms, at_ms) {
                stream.leap_ms.store(0, Ordering::Relaxed);
            }
        } else {
            let refused = self.may_leap(stream, stream_ms, at_ms, noted_ms, next_ms).err();
            match refused {
                None if stream.reaches(at_ms, noted_ms) => stream.leap_ms.store(0, Ordering::Relaxed),
                Some(Leap { in_future: false, .. }) => stream.leap_ms.store(at_ms, Ordering::Relaxed),
                _ => {}
            }
            refused.map_or(Ok(()), Err)?;
        }
        if at_ms > stream_ms {
            self.advance(at_ms);
        }
        Ok(self.high_water_ms())
    }

    /// What [`Timeline::follow`] would say. Changes nothing.
    pub(crate) fn foresee(&self, at_ms: u64) -> Result<u64, Leap> {
        let stream_ms = self.high_water_ms();
        if let Some(stream) = &self.stream
            && !stream.reaches(stream_ms, at_ms)
        {
            self.may_leap(stream, stream_ms, at_ms, stream.leap_ms.load(Ordering::Relaxed), [])?;
        }
        Ok(stream_ms.max(at_ms))
    }

    /// Whether an operator can mean that: nobody takes stream time back, and a time in another unit lies far ahead. The clock
    /// may be what is wrong.
    pub(crate) fn is_within_a_year(&self, at_ms: u64) -> bool {
        at_ms <= self.clock.wall_ms().min(MAX_WALL_MS).max(self.high_water_ms()).saturating_add(millis(YEAR))
    }

    /// Whether a leap is believed: another message that leaps, next to it, is as far, or less than a step behind.
    fn may_leap(
        &self,
        stream: &Stream,
        stream_ms: u64,
        at_ms: u64,
        noted_ms: u64,
        next_ms: impl IntoIterator<Item = u64>,
    ) -> Result<(), Leap> {
        let max_ahead_ms = stream.max_ahead_ms;
        let latest_ms = self.clock.wall_ms().min(MAX_WALL_MS).saturating_add(max_ahead_ms);
        let confirms = |other_ms: u64| !stream.reaches(stream_ms, other_ms) && stream.reaches(other_ms, at_ms);
        // What is too old or of the future says nothing.
        let says_something = |other_ms: &u64| !stream.is_late(stream_ms, *other_ms) && *other_ms <= latest_ms;
        let is_confirmed = || {
            // The first message of a store leaps from nowhere.
            stream_ms == 0 || confirms(noted_ms) || next_ms.into_iter().find(says_something).is_some_and(confirms)
        };
        let in_future = at_ms > latest_ms;
        if !in_future && is_confirmed() { Ok(()) } else { Err(Leap { stream_ms, max_ahead_ms, in_future }) }
    }

    /// Moves the store's time on, unless it is further already.
    pub(crate) fn advance(&self, to_ms: u64) {
        self.high_water_ms.fetch_max(to_ms.min(MAX_WALL_MS), Ordering::AcqRel);
    }

    /// The latest time that any answer was based on.
    pub(crate) fn high_water_ms(&self) -> u64 {
        self.high_water_ms.load(Ordering::Acquire)
    }
}

impl Stream {
    fn reaches(&self, stream_ms: u64, at_ms: u64) -> bool {
        at_ms <= stream_ms.saturating_add(self.max_ahead_ms)
    }

    fn is_late(&self, stream_ms: u64, at_ms: u64) -> bool {
        at_ms.saturating_add(self.window_ms) <= stream_ms
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
        assert_eq!(timeline.now().time_ms, 5_000);
        clock.set_wall_ms(7_000);
        assert_eq!(timeline.now().time_ms, 7_000);
        clock.set_wall_ms(10);
        assert_eq!(timeline.now().time_ms, 7_000);
        assert_eq!(timeline.high_water_ms(), 7_000);
    }

    fn of_messages(high_water_ms: u64) -> (ManualClock, Timeline) {
        let clock = ManualClock::at(1_000_000);
        (clock.clone(), Timeline::of_messages(Arc::new(clock), high_water_ms, 100, 500))
    }

    #[test]
    fn stream_time_follows_the_newest_message_and_no_clock() {
        let (clock, timeline) = of_messages(0);
        for (at_ms, stream_ms) in [(5_000, 5_000), (5_100, 5_100), (4_000, 5_100), (5_099, 5_100), (5_200, 5_200)] {
            assert_eq!(timeline.foresee(at_ms).map(|_| timeline.high_water_ms() <= stream_ms), Ok(true));
            assert_eq!(timeline.follow(at_ms, []), Ok(stream_ms), "{at_ms}");
        }
        for wall_ms in [0, u64::MAX, 1_000_000] {
            clock.set_wall_ms(wall_ms);
            assert_eq!(timeline.now().time_ms, 5_200);
            assert_eq!(timeline.follow(5_150, []), Ok(5_200));
        }
    }

    #[test]
    fn a_leap_goes_as_far_as_two_messages_in_a_row_say() {
        let (_, timeline) = of_messages(5_000);
        let refused = Err(Leap { stream_ms: 5_000, max_ahead_ms: 100, in_future: false });
        assert_eq!(timeline.foresee(9_000), refused);
        assert_eq!(timeline.follow(9_000, []), refused);
        assert_eq!(timeline.follow(5_000, []), Ok(5_000), "so the other was a stray");
        assert_eq!(timeline.follow(9_000, []), refused);
        assert_eq!(timeline.follow(20_000, []), refused, "nobody else says so much");
        assert_eq!(timeline.follow(4_500, []), Ok(5_000), "too old to say where the stream is");
        assert_eq!(timeline.foresee(20_000), Ok(20_000), "noted, and not changed by looking");
        assert_eq!(timeline.follow(9_000, []), Ok(9_000), "so much say both");
        assert!(timeline.follow(20_101, []).is_err(), "more than a step beyond what was noted");
        assert_eq!(timeline.follow(20_000, []), Ok(20_000));
        assert_eq!(timeline.follow(20_100, []), Ok(20_100));
    }

    #[test]
    fn a_leap_is_confirmed_by_the_next_that_came_with_it() {
        let refused = |next: &[u64]| of_messages(5_000).1.follow(9_000, next.iter().copied()).is_err();
        assert!(refused(&[]) && refused(&[5_050, 9_000]) && refused(&[8_899]));
        assert!(!refused(&[8_900]) && !refused(&[30_000]) && !refused(&[4_500, 9_000]));
        // What is of the future says nothing: neither for it nor against it.
        assert!(refused(&[u64::MAX]) && !refused(&[u64::MAX, 9_000]));
    }

    #[test]
    fn a_leap_beyond_the_wall_clock_waits_for_it() {
        for high_water_ms in [0, 5_000] {
            let (clock, timeline) = of_messages(high_water_ms);
            for _ in 0..5 {
                assert!(timeline.follow(1_000_101, []).is_err_and(|leap| leap.in_future));
            }
            clock.advance(Duration::from_millis(1));
            let noted = timeline.follow(1_000_101, []);
            assert_eq!(noted.is_ok(), high_water_ms == 0, "the first of all needs no second");
            assert_eq!(timeline.follow(1_000_101, []), Ok(1_000_101));
        }
    }
}
