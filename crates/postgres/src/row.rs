//! A row of `keys` as an entry of the state machine, and back.

use std::convert::Infallible;
use std::sync::Arc;

use onlyonce_core::machine::{
    Backoff, Change, CompletedEntry, Crash, Entry, Holder, OwnWindow, PlainMoment, Policy, Processing, Step, step,
};
use onlyonce_core::{Error, Fingerprint, OnInterrupt, PriorAttempt, StoredResult};

use crate::caller::Columns;
use crate::error::Failure;
use crate::sql::{INLINE_RESULT, state};

/// A row as it was read.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) entry: Entry,
    /// `xmin`, which every change of the row changes.
    pub(crate) version: i64,
    /// The call that claimed, recorded or resolved the key last.
    pub(crate) call: i64,
    /// True if the row is leased and its attempt is the one that the call claimed.
    pub(crate) is_leased: bool,
    /// How the attempt before this one ended, for a leased row.
    pub(crate) prior: Option<PriorAttempt>,
    /// Whether the result is so long that it was not read with the row.
    pub(crate) is_result_left_out: bool,
}

/// A row of the statements that read keys.
#[derive(Debug)]
pub(crate) enum Read {
    /// The key was inserted.
    Inserted {
        /// The encoded key.
        key: Vec<u8>,
        /// The store's time then.
        now: u64,
        /// Its token.
        token: u64,
    },
    /// The key was there.
    Found {
        /// The encoded key.
        key: Vec<u8>,
        /// The time of the statement.
        now: PlainMoment,
        /// The row.
        stored: Box<Stored>,
    },
    /// Another transaction has inserted the key, and is not committed.
    Locked,
    /// The key was not inserted or not read, which is no failure of the other keys.
    Failed(Error),
}

impl Read {
    pub(crate) fn decode(row: &impl Columns, policy: Policy) -> Result<Self, Failure> {
        let key: Vec<u8> = row.column(0)?;
        let (now, token) = (unsigned(row.column(1)?), unsigned(row.column(3)?));
        let Some(version) = row.column::<Option<i64>>(2)? else {
            return Ok(Self::Inserted { key, now, token });
        };
        let now = PlainMoment { time_ms: unsigned(row.column(14)?), monotonic_ms: now };
        let stored = Stored::decode(row, version, token, now, policy)?;
        Ok(Self::Found { key, now, stored: Box::new(stored) })
    }
}

impl Stored {
    fn decode(row: &impl Columns, version: i64, token: u64, now: PlainMoment, policy: Policy) -> Result<Self, Failure> {
        let (time_ms, until_ms): (i64, i64) = (row.column(5)?, row.column(6)?);
        let (time_ms, until_ms) = (unsigned(time_ms), unsigned(until_ms));
        let own_window = row.column::<Option<i64>>(7)?.map(unsigned).and_then(OwnWindow::from_ms);
        let own_window = own_window.unwrap_or(OwnWindow::NONE);
        let attempt = u32::try_from(row.column::<i32>(8)?).unwrap_or_default();
        let (row_state, prior): (i16, i16) = (row.column(9)?, row.column(10)?);
        let fingerprint = row.column::<Option<&[u8]>>(11)?.and_then(|bytes| Fingerprint::try_from(bytes).ok());
        let is_dead = row.column::<Option<bool>>(13)?.unwrap_or_default();
        let prior = decode_prior(prior);
        let ended_as = prior.unwrap_or(PriorAttempt::Released);
        let completed =
            |result| Entry::Completed(CompletedEntry { token, completed_ms: time_ms, fingerprint, own_window, result });
        let processing = |holder| Processing { token, attempt, since_ms: time_ms, fingerprint, own_window, holder };
        let open = |holder| Entry::Processing(processing(holder));
        let entry = match row_state {
            state::LEASED => {
                let leased = processing(Holder::Leased { until_monotonic_ms: until_ms });
                Entry::Processing(if is_dead { crashed(leased, until_ms, now, policy) } else { leased })
            }
            state::RELEASED => {
                let backoff = Backoff { until_monotonic_ms: until_ms, length_ms: 0 };
                open(Holder::Released { prior: ended_as, backoff })
            }
            state::INTERRUPTED => open(Holder::Interrupted(ended_as)),
            state::RESOLVED => open(Holder::Resolved(ended_as)),
            state::COMPLETED => {
                completed(StoredResult::Bytes(row.column::<Option<&[u8]>>(12)?.unwrap_or_default().into()))
            }
            state::COMPLETED_TOO_LARGE => completed(StoredResult::TooLarge),
            _ => completed(StoredResult::None),
        };
        let length = row.column::<Option<i32>>(15)?.unwrap_or_default();
        let (is_leased, is_result_left_out) = (row_state == state::LEASED, length > INLINE_RESULT);
        Ok(Self { entry, version, call: row.column(4)?, is_leased, prior, is_result_left_out })
    }

    /// Adds a result that was not read with the row.
    pub(crate) fn set_result(&mut self, result: Vec<u8>) {
        if let Entry::Completed(done) = &mut self.entry {
            done.result = StoredResult::Bytes(result.into());
        }
        self.is_result_left_out = false;
    }
}

/// A lease whose worker's session has ended. It is forgotten when it would be if it had expired.
fn crashed(leased: Processing, until_ms: u64, now: PlainMoment, policy: Policy) -> Processing {
    let is_over = now.monotonic_ms >= until_ms.saturating_add(policy.window_ms);
    if policy.on_interrupt == OnInterrupt::Rerun && !policy.is_stream && is_over {
        return leased;
    }
    let entry = Entry::Processing(leased.clone());
    let Ok(Step { change, .. }) = step::<Arc<[u8]>, _, Infallible>(Some(&entry), Crash, now, policy, || Ok(0));
    match change {
        Change::InMemory(crashed) => crashed,
        _ => leased,
    }
}

/// A column that is never negative.
pub(crate) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or_default()
}

/// A number as a column stores it. Times and tokens stay far below the bound.
pub(crate) fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(crate) fn encode_prior(prior: Option<PriorAttempt>) -> i16 {
    match prior {
        None => 0,
        Some(PriorAttempt::Released) => 1,
        Some(PriorAttempt::LeaseExpired) => 2,
        Some(PriorAttempt::Dropped) => 3,
        Some(PriorAttempt::Crashed) => 4,
    }
}

fn decode_prior(prior: i16) -> Option<PriorAttempt> {
    match prior {
        1 => Some(PriorAttempt::Released),
        2 => Some(PriorAttempt::LeaseExpired),
        3 => Some(PriorAttempt::Dropped),
        4 => Some(PriorAttempt::Crashed),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prior_attempt_is_decoded_from_its_number() {
        use PriorAttempt::{Crashed, Dropped, LeaseExpired, Released};
        for prior in [None, Some(Released), Some(LeaseExpired), Some(Dropped), Some(Crashed)] {
            assert_eq!(decode_prior(encode_prior(prior)), prior);
        }
    }
}
