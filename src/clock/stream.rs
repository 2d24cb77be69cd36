//! The store's time where messages drive it: the newest timestamp that was not refused.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::steps::Steps;
use super::{Clock, MAX_WALL_MS, Now, Saved, YEAR, millis, wall};

/// What moves stream time, and how far.
pub(super) struct StreamTime {
    clock: Arc<dyn Clock>,
    high_water_ms: AtomicU64,
    /// What was completed before this was forgotten by an earlier opening.
    floor_ms: u64,
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

impl StreamTime {
    pub(super) fn resume(clock: Arc<dyn Clock>, saved: &Saved, max_ahead_ms: u64, window_ms: u64) -> Self {
        Self {
            clock,
            high_water_ms: AtomicU64::new(saved.time_ms),
            floor_ms: saved.floor_ms,
            max_ahead_ms,
            window_ms,
            leap_ms: AtomicU64::new(0),
        }
    }

    pub(super) fn now(&self) -> Now {
        let monotonic_ms = self.clock.monotonic_ms();
        Now { time_ms: self.high_water_ms(), monotonic_ms, remembers_since_ms: self.floor_ms, steps: Steps::default() }
    }

    /// See [`Timeline::follow`](super::Timeline::follow).
    pub(super) fn follow(&self, at_ms: u64, next_ms: impl IntoIterator<Item = u64>) -> Result<u64, Leap> {
        let stream_ms = self.high_water_ms();
        let noted_ms = self.leap_ms.load(Ordering::Relaxed);
        if self.reaches(stream_ms, at_ms) {
            // What is too old says nothing about where the stream is now.
            if noted_ms != 0 && !self.is_late(stream_ms, at_ms) {
                self.leap_ms.store(0, Ordering::Relaxed);
            }
        } else {
            let refused = self.may_leap(stream_ms, at_ms, noted_ms, next_ms).err();
            match refused {
                None if self.reaches(at_ms, noted_ms) => self.leap_ms.store(0, Ordering::Relaxed),
                Some(Leap { in_future: false, .. }) => self.leap_ms.store(at_ms, Ordering::Relaxed),
                _ => {}
            }
            refused.map_or(Ok(()), Err)?;
        }
        if at_ms > stream_ms {
            self.advance(at_ms);
        }
        Ok(self.high_water_ms())
    }

    /// What [`StreamTime::follow`] would say. Changes nothing.
    pub(super) fn foresee(&self, at_ms: u64) -> Result<u64, Leap> {
        let stream_ms = self.high_water_ms();
        if !self.reaches(stream_ms, at_ms) {
            self.may_leap(stream_ms, at_ms, self.leap_ms.load(Ordering::Relaxed), [])?;
        }
        Ok(stream_ms.max(at_ms))
    }

    /// Whether a leap is believed: another message that leaps, next to it, is as far, or less than a step behind.
    fn may_leap(
        &self,
        stream_ms: u64,
        at_ms: u64,
        noted_ms: u64,
        next_ms: impl IntoIterator<Item = u64>,
    ) -> Result<(), Leap> {
        let max_ahead_ms = self.max_ahead_ms;
        let latest_ms = self.wall_ms().saturating_add(max_ahead_ms);
        let confirms = |other_ms: u64| !self.reaches(stream_ms, other_ms) && self.reaches(other_ms, at_ms);
        // What is too old or of the future says nothing.
        let says_something = |other_ms: &u64| !self.is_late(stream_ms, *other_ms) && *other_ms <= latest_ms;
        let is_confirmed = || {
            // The first message of a store leaps from nowhere.
            stream_ms == 0 || confirms(noted_ms) || next_ms.into_iter().find(says_something).is_some_and(confirms)
        };
        let in_future = at_ms > latest_ms;
        if !in_future && is_confirmed() { Ok(()) } else { Err(Leap { stream_ms, max_ahead_ms, in_future }) }
    }

    /// Whether an operator can mean that: nobody takes stream time back, and a time in another unit lies far ahead. The clock
    /// may be what is wrong.
    pub(super) fn advance_by_hand(&self, to_ms: u64) -> bool {
        let is_within_a_year = to_ms <= self.wall_ms().max(self.high_water_ms()).saturating_add(millis(YEAR));
        if is_within_a_year {
            self.advance(to_ms);
        }
        is_within_a_year
    }

    fn advance(&self, to_ms: u64) {
        self.high_water_ms.fetch_max(to_ms.min(MAX_WALL_MS), Ordering::AcqRel);
    }

    fn high_water_ms(&self) -> u64 {
        self.high_water_ms.load(Ordering::Acquire)
    }

    fn wall_ms(&self) -> u64 {
        self.clock.wall().as_unix_ms().min(MAX_WALL_MS)
    }

    fn reaches(&self, stream_ms: u64, at_ms: u64) -> bool {
        at_ms <= stream_ms.saturating_add(self.max_ahead_ms)
    }

    fn is_late(&self, stream_ms: u64, at_ms: u64) -> bool {
        at_ms.saturating_add(self.window_ms) <= stream_ms || at_ms < self.floor_ms
    }

    pub(super) fn save(&self) -> Saved {
        let time_ms = self.high_water_ms();
        Saved { time_ms, floor_ms: wall::floor_ms(self.floor_ms, time_ms, self.window_ms), newest_ms: time_ms }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;

    fn of_messages(high_water_ms: u64) -> (ManualClock, StreamTime) {
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let saved = Saved { time_ms: high_water_ms, ..Saved::default() };
        (clock.clone(), StreamTime::resume(Arc::new(clock), &saved, 100, 500))
    }

    #[test]
    fn stream_time_follows_the_newest_message_and_no_clock() {
        let (clock, stream) = of_messages(0);
        for (at_ms, stream_ms) in [(5_000, 5_000), (5_100, 5_100), (4_000, 5_100), (5_099, 5_100), (5_200, 5_200)] {
            assert_eq!(stream.foresee(at_ms).map(|_| stream.high_water_ms() <= stream_ms), Ok(true));
            assert_eq!(stream.follow(at_ms, []), Ok(stream_ms), "{at_ms}");
        }
        for wall_ms in [0, u64::MAX, 1_000_000] {
            clock.set_wall(onlyonce_core::Timestamp::from_unix_ms(wall_ms));
            assert_eq!(stream.now().time_ms, 5_200);
            assert_eq!(stream.follow(5_150, []), Ok(5_200));
        }
    }

    #[test]
    fn a_leap_goes_as_far_as_two_messages_in_a_row_say() {
        let (_, stream) = of_messages(5_000);
        let refused = Err(Leap { stream_ms: 5_000, max_ahead_ms: 100, in_future: false });
        assert_eq!(stream.foresee(9_000), refused);
        assert_eq!(stream.follow(9_000, []), refused);
        assert_eq!(stream.follow(5_000, []), Ok(5_000), "so the other was a stray");
        assert_eq!(stream.follow(9_000, []), refused);
        assert_eq!(stream.follow(20_000, []), refused, "nobody else says so much");
        assert_eq!(stream.follow(4_500, []), Ok(5_000), "too old to say where the stream is");
        assert_eq!(stream.foresee(20_000), Ok(20_000), "noted, and not changed by looking");
        assert_eq!(stream.follow(9_000, []), Ok(9_000), "so much say both");
        assert!(stream.follow(20_101, []).is_err(), "more than a step beyond what was noted");
        assert_eq!(stream.follow(20_000, []), Ok(20_000));
        assert_eq!(stream.follow(20_100, []), Ok(20_100));
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
            let (clock, stream) = of_messages(high_water_ms);
            for _ in 0..5 {
                assert!(stream.follow(1_000_101, []).is_err_and(|leap| leap.in_future));
            }
            clock.advance(Duration::from_millis(1));
            let noted = stream.follow(1_000_101, []);
            assert_eq!(noted.is_ok(), high_water_ms == 0, "the first of all needs no second");
            assert_eq!(stream.follow(1_000_101, []), Ok(1_000_101));
        }
    }
}
