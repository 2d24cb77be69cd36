//! Stream time: the newest timestamp of a message that was not rejected.

use std::time::Duration;

use crate::timestamp::Timestamp;

#[derive(Debug)]
pub(super) struct StreamTime {
    now: Timestamp,
    max_ahead: Duration,
    window: Duration,
    /// The timestamp of the last message that was rejected for being too far ahead, if no ordinary message came after it.
    rejected: Option<Timestamp>,
}

/// A message is too far ahead of stream time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooFarAhead {
    /// True if it is as far ahead of the wall clock.
    pub(super) in_future: bool,
}

impl StreamTime {
    pub(super) fn new(max_ahead: Duration, window: Duration) -> Self {
        Self { now: Timestamp::UNIX_EPOCH, max_ahead, window, rejected: None }
    }

    pub(super) fn now(&self) -> Timestamp {
        self.now
    }

    pub(super) fn max_ahead(&self) -> Duration {
        self.max_ahead
    }

    /// Advances to the timestamp of a message. `later` are the timestamps that follow it in its call.
    pub(super) fn advance(
        &mut self,
        at: Timestamp,
        later: &[Timestamp],
        wall: Timestamp,
    ) -> Result<Timestamp, TooFarAhead> {
        if self.reaches(self.now, at) {
            // A late message is no evidence of where the stream is now.
            if !self.is_late(at) {
                self.rejected = None;
            }
        } else if let Err(error) = self.leap(at, later, wall) {
            if !error.in_future {
                self.rejected = Some(at);
            }
            return Err(error);
        }
        self.now = self.now.max(at);
        Ok(self.now)
    }

    /// What [`StreamTime::advance`] would return. Changes nothing.
    pub(super) fn preview(&self, at: Timestamp, wall: Timestamp) -> Result<Timestamp, TooFarAhead> {
        if !self.reaches(self.now, at) {
            self.leap(at, &[], wall)?;
        }
        Ok(self.now.max(at))
    }

    /// A message that is too far ahead is accepted if a neighbour confirms it: one that is as far ahead, or at most a step earlier.
    fn leap(&self, at: Timestamp, later: &[Timestamp], wall: Timestamp) -> Result<(), TooFarAhead> {
        let latest = wall.saturating_add(self.max_ahead);
        if at > latest {
            return Err(TooFarAhead { in_future: true });
        }
        let confirms = |other: Timestamp| !self.reaches(self.now, other) && self.reaches(other, at);
        let next = later.iter().copied().find(|other| !self.is_late(*other) && *other <= latest);
        let is_first = self.now == Timestamp::UNIX_EPOCH;
        if is_first || self.rejected.is_some_and(confirms) || next.is_some_and(confirms) {
            return Ok(());
        }
        Err(TooFarAhead { in_future: false })
    }

    fn reaches(&self, from: Timestamp, to: Timestamp) -> bool {
        to <= from.saturating_add(self.max_ahead)
    }

    fn is_late(&self, at: Timestamp) -> bool {
        at.saturating_add(self.window) <= self.now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Timestamp {
        Timestamp::from_unix_ms(ms)
    }

    /// Stream time at 5,000 ms, a bound of 100 ms, a window of 500 ms.
    fn stream() -> StreamTime {
        let mut stream = StreamTime::new(Duration::from_millis(100), Duration::from_millis(500));
        stream.advance(ms(5_000), &[], ms(1_000_000)).unwrap();
        stream
    }

    fn advance(stream: &mut StreamTime, at_ms: u64) -> Result<u64, TooFarAhead> {
        stream.advance(ms(at_ms), &[], ms(1_000_000)).map(Timestamp::as_unix_ms)
    }

    #[test]
    fn a_leap_goes_as_far_as_two_messages_in_a_row_agree() {
        let mut stream = stream();
        let rejected = Err(TooFarAhead { in_future: false });
        assert_eq!(advance(&mut stream, 9_000), rejected);
        assert_eq!(advance(&mut stream, 5_000), Ok(5_000), "the other was a stray");
        assert_eq!(advance(&mut stream, 9_000), rejected);
        assert_eq!(advance(&mut stream, 20_000), rejected, "no other message is as far ahead");
        assert_eq!(advance(&mut stream, 4_500), Ok(5_000), "too old to be evidence");
        assert_eq!(stream.preview(ms(20_000), ms(1_000_000)), Ok(ms(20_000)));
        assert_eq!(advance(&mut stream, 9_000), Ok(9_000), "both messages are at least as far ahead");
        assert_eq!(advance(&mut stream, 20_101), rejected, "more than a step beyond the rejected one");
        assert_eq!(advance(&mut stream, 20_000), Ok(20_000));
        assert_eq!(advance(&mut stream, 20_100), Ok(20_100));
    }

    #[test]
    fn a_rejected_message_that_stream_time_has_reached_confirms_no_other() {
        let mut stream = stream();
        assert!(advance(&mut stream, 9_000).is_err());
        assert_eq!(advance(&mut stream, 9_000), Ok(9_000));
        assert!(advance(&mut stream, 9_101).is_err());
    }

    #[test]
    fn a_leap_is_confirmed_by_the_next_message_that_is_evidence() {
        let is_rejected = |later: &[u64]| {
            let later: Vec<_> = later.iter().copied().map(ms).collect();
            stream().advance(ms(9_000), &later, ms(1_000_000)).is_err()
        };
        assert!(is_rejected(&[]) && is_rejected(&[5_050, 9_000]) && is_rejected(&[8_899]));
        assert!(!is_rejected(&[8_900]) && !is_rejected(&[30_000]) && !is_rejected(&[4_500, 9_000]));
        assert!(is_rejected(&[u64::MAX]) && !is_rejected(&[u64::MAX, 9_000]), "the future is no evidence");
    }
}
