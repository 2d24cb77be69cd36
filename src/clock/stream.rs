//! Stream time: the newest message timestamp that was accepted.
//!
//! A message may advance stream time by at most `max_ahead`. A larger step, a *leap*, needs a second message to
//! confirm it: otherwise one wrong timestamp would expire all keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::steps::Steps;
use super::{Clock, MAX_WALL_MS, Now, Saved, YEAR, millis, wall};

/// Stream time, and the state of its leap detection.
pub(super) struct StreamTime {
    clock: Arc<dyn Clock>,
    high_water_ms: AtomicU64,
    /// The retention floor at open: completions before it are forgotten.
    floor_ms: u64,
    max_ahead_ms: u64,
    window_ms: u64,
    /// The time of the last message rejected for its leap. 0 if there is none, or if a message within `max_ahead`
    /// came after it.
    leap_ms: AtomicU64,
}

/// The rejection of a message that is too far ahead of stream time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leap {
    pub(crate) stream_ms: u64,
    pub(crate) max_ahead_ms: u64,
    /// Whether it is also that far ahead of the wall clock.
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
        let rejected_ms = self.leap_ms.load(Ordering::Relaxed);
        if self.reaches(stream_ms, at_ms) {
            // A message that is too old does not refute the leap.
            if rejected_ms != 0 && !self.is_late(stream_ms, at_ms) {
                self.leap_ms.store(0, Ordering::Relaxed);
            }
        } else {
            let rejected = self.may_leap(stream_ms, at_ms, rejected_ms, next_ms).err();
            match rejected {
                None if self.reaches(at_ms, rejected_ms) => self.leap_ms.store(0, Ordering::Relaxed),
                Some(Leap { in_future: false, .. }) => self.leap_ms.store(at_ms, Ordering::Relaxed),
                _ => {}
            }
            rejected.map_or(Ok(()), Err)?;
        }
        if at_ms > stream_ms {
            self.advance(at_ms);
        }
        Ok(self.high_water_ms())
    }

    /// What [`StreamTime::follow`] would return. Changes nothing.
    pub(super) fn foresee(&self, at_ms: u64) -> Result<u64, Leap> {
        let stream_ms = self.high_water_ms();
        if !self.reaches(stream_ms, at_ms) {
            self.may_leap(stream_ms, at_ms, self.leap_ms.load(Ordering::Relaxed), [])?;
        }
        Ok(stream_ms.max(at_ms))
    }

    /// Accepts a leap if an adjacent message also leaps and its time is at most `max_ahead` earlier.
    fn may_leap(
        &self,
        stream_ms: u64,
        at_ms: u64,
        rejected_ms: u64,
        next_ms: impl IntoIterator<Item = u64>,
    ) -> Result<(), Leap> {
        let max_ahead_ms = self.max_ahead_ms;
        let latest_ms = self.wall_ms().saturating_add(max_ahead_ms);
        let confirms = |other_ms: u64| !self.reaches(stream_ms, other_ms) && self.reaches(other_ms, at_ms);
        // Messages that are too old, or ahead of the wall clock, are ignored.
        let is_relevant = |other_ms: &u64| !self.is_late(stream_ms, *other_ms) && *other_ms <= latest_ms;
        let is_confirmed = || {
            // The first message of a store needs no confirmation.
            stream_ms == 0 || confirms(rejected_ms) || next_ms.into_iter().find(is_relevant).is_some_and(confirms)
        };
        let in_future = at_ms > latest_ms;
        if !in_future && is_confirmed() { Ok(()) } else { Err(Leap { stream_ms, max_ahead_ms, in_future }) }
    }

    /// Advances stream time on an operator's request. Rejects a time more than a year ahead of both stream time and
    /// the wall clock: it is probably in another unit, and stream time never goes back. Either of the two is enough,
    /// because the wall clock may be wrong.
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
    fn a_leap_needs_two_consecutive_messages_and_goes_as_far_as_both() {
        let (_, stream) = of_messages(5_000);
        let rejected = Err(Leap { stream_ms: 5_000, max_ahead_ms: 100, in_future: false });
        assert_eq!(stream.foresee(9_000), rejected);
        assert_eq!(stream.follow(9_000, []), rejected);
        assert_eq!(stream.follow(5_000, []), Ok(5_000), "so 9,000 was an outlier");
        assert_eq!(stream.follow(9_000, []), rejected);
        assert_eq!(stream.follow(20_000, []), rejected, "9,000 does not confirm 20,000");
        assert_eq!(stream.follow(4_500, []), Ok(5_000), "too old to refute a leap");
        assert_eq!(stream.foresee(20_000), Ok(20_000), "`foresee` changes nothing");
        assert_eq!(stream.follow(9_000, []), Ok(9_000), "20,000 confirms 9,000");
        assert!(stream.follow(20_101, []).is_err(), "more than `max_ahead` beyond the rejected leap");
        assert_eq!(stream.follow(20_000, []), Ok(20_000));
        assert_eq!(stream.follow(20_100, []), Ok(20_100));
    }

    #[test]
    fn the_next_message_of_the_same_batch_can_confirm_a_leap() {
        let is_rejected = |next: &[u64]| of_messages(5_000).1.follow(9_000, next.iter().copied()).is_err();
        assert!(is_rejected(&[]) && is_rejected(&[5_050, 9_000]) && is_rejected(&[8_899]));
        assert!(!is_rejected(&[8_900]) && !is_rejected(&[30_000]) && !is_rejected(&[4_500, 9_000]));
        // Future timestamps are ignored.
        assert!(is_rejected(&[u64::MAX]) && !is_rejected(&[u64::MAX, 9_000]));
    }

    #[test]
    fn a_leap_beyond_the_wall_clock_is_rejected_until_the_wall_clock_catches_up() {
        for high_water_ms in [0, 5_000] {
            let (clock, stream) = of_messages(high_water_ms);
            for _ in 0..5 {
                assert!(stream.follow(1_000_101, []).is_err_and(|leap| leap.in_future));
            }
            clock.advance(Duration::from_millis(1));
            let followed = stream.follow(1_000_101, []);
            assert_eq!(followed.is_ok(), high_water_ms == 0, "the first message of a store needs no confirmation");
            assert_eq!(stream.follow(1_000_101, []), Ok(1_000_101));
        }
    }
}
