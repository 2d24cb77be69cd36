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
        } else {
            match self.leap(at, later, wall) {
                Ok(()) if self.rejected.is_some_and(|rejected| self.reaches(at, rejected)) => self.rejected = None,
                Ok(()) => {}
                Err(error) => {
                    if !error.in_future {
                        self.rejected = Some(at);
                    }
                    return Err(error);
                }
            }
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
