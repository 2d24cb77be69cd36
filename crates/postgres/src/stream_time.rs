//! Stream time: the newest timestamp of a message that was not rejected. It is stored, and all processes share it.

use std::time::Duration;

use onlyonce_core::{Key, Result, Timestamp, TimestampError};
use tokio_postgres::Row;

use crate::core::Core;
use crate::error::unavailable;
use crate::row::{signed, unsigned};

/// Stream time as it was read, and the server's wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamTime {
    now: Timestamp,
    /// The timestamp of the last message that was rejected for being too far ahead, if no ordinary message came after it.
    rejected: Option<Timestamp>,
    wall: Timestamp,
    max_ahead: Duration,
    window: Duration,
}

/// A message is too far ahead of stream time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooFarAhead {
    at: Timestamp,
    stream_time: Timestamp,
    max_ahead: Duration,
    /// True if it is as far ahead of the wall clock.
    in_future: bool,
}

impl TooFarAhead {
    pub(crate) fn about(self, key: &Key<'_>) -> onlyonce_core::Error {
        let Self { at, stream_time, max_ahead, in_future } = self;
        TimestampError::TooFarAhead { key: key.to_string(), at, stream_time, max_ahead, in_future }.into()
    }
}

impl StreamTime {
    pub(crate) fn decode(core: &Core, row: &Row) -> Result<Self, tokio_postgres::Error> {
        let timestamp = |ms: i64| Timestamp::from_unix_ms(unsigned(ms));
        Ok(Self {
            now: timestamp(row.try_get(0)?),
            rejected: row.try_get::<_, Option<i64>>(1)?.map(timestamp),
            wall: timestamp(row.try_get(2)?),
            max_ahead: core.options.max_ahead.unwrap_or_default(),
            window: core.options.window,
        })
    }

    pub(crate) async fn read(core: &Core) -> Result<Self> {
        let rows = core.database.rows_read(&core.sql.stream_time, &[]).await?;
        let row = rows.first().ok_or_else(|| onlyonce_core::Error::Unavailable {
            source: "the table `meta` of the store has no row: restore it".into(),
        })?;
        Self::decode(core, row).map_err(unavailable)
    }

    pub(crate) fn now_ms(&self) -> i64 {
        signed(self.now.as_unix_ms())
    }

    pub(crate) fn rejected_ms(&self) -> Option<i64> {
        self.rejected.map(|at| signed(at.as_unix_ms()))
    }

    /// Advances to the timestamp of a message. `later` are the timestamps that follow it in its call.
    pub(crate) fn advance(&mut self, at: Timestamp, later: &[Timestamp]) -> Result<Timestamp, TooFarAhead> {
        if self.reaches(self.now, at) {
            // A late message is no evidence of where the stream is now.
            if !self.is_late(at) {
                self.rejected = None;
            }
        } else if let Err(error) = self.leap(at, later) {
            if !error.in_future {
                self.rejected = Some(at);
            }
            return Err(error);
        }
        self.now = self.now.max(at);
        Ok(self.now)
    }

    /// What [`StreamTime::advance`] would return. Changes nothing.
    pub(crate) fn preview(&self, at: Timestamp) -> Result<Timestamp, TooFarAhead> {
        if !self.reaches(self.now, at) {
            self.leap(at, &[])?;
        }
        Ok(self.now.max(at))
    }

    /// A message that is too far ahead is accepted if a neighbour confirms it: one that is as far ahead, or at most a step earlier.
    fn leap(&self, at: Timestamp, later: &[Timestamp]) -> Result<(), TooFarAhead> {
        let rejection = |in_future| TooFarAhead { at, stream_time: self.now, max_ahead: self.max_ahead, in_future };
        let latest = self.wall.saturating_add(self.max_ahead);
        if at > latest {
            return Err(rejection(true));
        }
        let confirms = |other: Timestamp| !self.reaches(self.now, other) && self.reaches(other, at);
        let next = later.iter().copied().find(|other| !self.is_late(*other) && *other <= latest);
        let is_first = self.now == Timestamp::UNIX_EPOCH;
        if is_first || self.rejected.is_some_and(confirms) || next.is_some_and(confirms) {
            return Ok(());
        }
        Err(rejection(false))
    }

    fn reaches(&self, from: Timestamp, to: Timestamp) -> bool {
        to <= from.saturating_add(self.max_ahead)
    }

    fn is_late(&self, at: Timestamp) -> bool {
        at.saturating_add(self.window) <= self.now
    }
}
