//! What can go wrong, and what the caller should do about it.

use std::path::PathBuf;
use std::time::Duration;

/// The result of every call that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. Each message says what to do next.
///
/// [`Error::retryable`] and [`Error::outcome`] answer the two questions a caller has: may I try again, and did the
/// call happen?
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option is out of its bounds. Nothing was opened.
    #[error("option `{option}` is {value}, but it must be {bounds}")]
    Config {
        /// The builder's method that set it.
        option: &'static str,
        /// The value that was given.
        value: String,
        /// What would have been accepted.
        bounds: String,
    },

    /// Another store, in this process or another one, has the directory open.
    #[error(
        "{} is already open (waited {waited:?}): close the other store, or share it by cloning; \
         `lock_wait` sets how long to wait for a process that is just ending",
        path.display()
    )]
    AlreadyOpen {
        /// The store's directory.
        path: PathBuf,
        /// How long this open waited for the other one to go.
        waited: Duration,
    },

    /// The path is not a store and holds something else, so no store was created in it.
    #[error("{} is not an onlyonce store: {reason}; give an empty or a new directory", path.display())]
    NotAStore {
        /// The path that was given.
        path: PathBuf,
        /// What stands in the way.
        reason: String,
    },

    /// The store was written by a newer version of this crate.
    #[error("{} has format {found}, this version reads up to {supported}: upgrade onlyonce", path.display())]
    UnsupportedFormat {
        /// The store's directory.
        path: PathBuf,
        /// The version found on disk.
        found: u32,
        /// The newest version this build can read.
        supported: u32,
    },

    /// What is on disk contradicts itself or its checksums. Nothing was changed.
    #[error("{place} is corrupt: {detail}; restore the directory from a copy, or move it away to start empty")]
    Corrupt {
        /// The file, column family or journal row at fault.
        place: String,
        /// What was found there.
        detail: String,
    },

    /// The disk or the file system refused an operation. No answer of the store is changed by it.
    #[error("{action} {}: {detail}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's or RocksDB's own words.
        detail: String,
    },

    /// A write failed and nobody can say whether it reached the disk. The store is poisoned: reopen it to learn the
    /// truth.
    #[error("a write failed and its outcome is unknown ({detail}); the store now refuses, reopen it")]
    WriteFailed {
        /// RocksDB's own words.
        detail: String,
    },

    /// What must always hold did not: a bug in this crate, or memory that changed by itself. The store is poisoned, so that
    /// nothing succeeds on top of it: report the message, and reopen the store, which reads all it needs from the disk.
    #[error("broken invariant: {invariant} ({detail}); this is a bug in onlyonce: report it, and reopen the store")]
    Broken {
        /// What must hold, as in `docs/invariants.md`.
        invariant: &'static str,
        /// What was found instead.
        detail: String,
    },

    /// An earlier write failed with an unknown outcome, or a broken invariant was met. Nothing was tried; reopen the store.
    #[error("the store is poisoned by an earlier failure ({reason}): reopen it")]
    Poisoned {
        /// The first failure.
        reason: String,
    },

    /// The directory of an open store, or a file in it that is always there, was deleted or moved. The store refuses from
    /// then on. Opening the path again would begin an empty store, which takes every duplicate for new.
    #[error(
        "{} was deleted or moved while the store was open: move it back, or restore the directory from a copy, before you \
         open it again, or it begins empty",
        path.display()
    )]
    DirectoryGone {
        /// What is gone: the store's directory, or a file in it.
        path: PathBuf,
    },

    /// The store was closed. Nothing was tried.
    #[error("the store is closed")]
    Closed,

    /// A key with no bytes.
    #[error("the key{} is empty: give it at least one byte", in_batch(place))]
    KeyEmpty {
        /// The key's place in its batch, from 0. `None` where the call has one key.
        place: Option<usize>,
    },

    /// A key, with its scope, that is longer than `key_limit`.
    #[error(
        "the key {key}{} is {len} bytes long with its scope, over the limit of {limit}: \
             use `Key::content` or raise `key_limit`",
        in_batch(place)
    )]
    KeyTooLong {
        /// The start of the key, escaped.
        key: String,
        /// Its length, in bytes.
        len: usize,
        /// The limit, in bytes.
        limit: usize,
        /// The key's place in its batch, from 0. `None` where the call has one key.
        place: Option<usize>,
    },

    /// A scope longer than 255 bytes.
    #[error("the scope {scope} of the key{} is {len} bytes long, over the limit of 255: shorten it", in_batch(place))]
    ScopeTooLong {
        /// The start of the scope, escaped.
        scope: String,
        /// Its length, in bytes.
        len: usize,
        /// The key's place in its batch, from 0. `None` where the call has one key.
        place: Option<usize>,
    },

    /// The key was used before with another payload. The caller reused an idempotency key by mistake: refuse the
    /// request.
    #[error("the key {key} was first used with another payload: do not reuse an idempotency key")]
    PayloadMismatch {
        /// The key, escaped.
        key: String,
    },

    /// On a store that runs on stream time: nothing is known of the key, and a key completed at the message's timestamp
    /// would have run out. Whether the work was ever done nobody can say: set the message aside for a decision.
    #[error(
        "the message of {key} is of {at_ms}, and the store remembers since {remembers_since_ms}: whether its work was \
         done is not known, set it aside{}",
        unit_hint(*at_ms)
    )]
    TooOld {
        /// The key, escaped.
        key: String,
        /// The message's timestamp, in milliseconds since the Unix epoch.
        at_ms: u64,
        /// The first timestamp that would not be too old.
        remembers_since_ms: u64,
    },

    /// On a store that runs on stream time: the message is further ahead than one message may be. It is let in when another
    /// one, next to it, is as far, or this one is asked for again and none within reach came between; and not before the
    /// wall clock comes within the bound, if it is in the future.
    #[error(
        "the message of {key} is of {at_ms}, more than {max_ahead:?} ahead of stream time, which is {stream_ms}{}: \
         try it again later{}",
        if *in_future { ", and of the wall clock: its producer's clock may be wrong" } else { "" },
        unit_hint(*at_ms)
    )]
    TooFarAhead {
        /// The key, escaped.
        key: String,
        /// The message's timestamp, in milliseconds since the Unix epoch.
        at_ms: u64,
        /// Stream time, or 0 where no message has set it yet.
        stream_ms: u64,
        /// How far ahead a message may be.
        max_ahead: Duration,
        /// Whether it is as far ahead of the wall clock.
        in_future: bool,
    },

    /// The store runs on stream time, and was asked without a message's timestamp.
    #[error("the store runs on stream time: give the message's timestamp, as to `claim_at`")]
    TimestampMissing,

    /// The timestamp of a queue's message, on a store that runs on stream time, is plainly in another unit than
    /// milliseconds. Nothing was changed. No retry helps: reject the message, and correct its producer.
    #[error("the message of {key} has timestamp {at_ms}, which looks like {unit}: give milliseconds since 1970")]
    TimestampUnit {
        /// The key, escaped.
        key: String,
        /// The message's timestamp, as it was read.
        at_ms: u64,
        /// What it is in, by the look of it.
        unit: &'static str,
    },

    /// The store runs on its clock, and was asked with a message's timestamp.
    #[error("the store runs on its clock: leave the timestamp out, or create a store with `Builder::stream_time`")]
    TimestampUnexpected,

    /// The lease is no longer the key's: it ran out and another holder took over, or the key was settled by hand.
    /// Stop working on it.
    #[error("the lease with token {token} on {key} is superseded: another holder owns the work, stop")]
    Superseded {
        /// The key, escaped.
        key: String,
        /// The token of the lease that lost.
        token: u64,
    },

    /// `resolve` was called for a key that is not held.
    #[error("the key {key} is not held: see `held()` for those that are")]
    NotHeld {
        /// The key, escaped.
        key: String,
    },

    /// `forget` was called for a key that somebody is working on.
    #[error("the key {key} is in progress (token {token}): forget it when its holder is done or its lease is over")]
    InUse {
        /// The key, escaped.
        key: String,
        /// The token of its holder.
        token: u64,
    },

    /// `forget` was called for a key that is held for a decision. Without its entry the next claim would not learn that its
    /// effect may have happened.
    #[error("the key {key} is held for a decision (token {token}): call `resolve` first, then `forget`")]
    Undecided {
        /// The key, escaped.
        key: String,
        /// The token of its last holder.
        token: u64,
    },

    /// More keys are being worked on than `in_flight_limit` allows. Completed, released and dropped keys do not count.
    #[error(
        "{in_flight} keys are in progress, the limit is {limit}: complete, release or drop some leases, \
             or raise `in_flight_limit`"
    )]
    TooManyInFlight {
        /// How many keys are in flight.
        in_flight: usize,
        /// The limit.
        limit: usize,
    },

    /// More keys are held for a decision than `held_limit` allows.
    #[error(
        "{held} keys are held for a decision, the limit is {limit}: resolve some (`held`, `resolve`), or raise `held_limit`"
    )]
    TooManyHeld {
        /// How many keys are held.
        held: usize,
        /// The limit.
        limit: usize,
    },

    /// Completed keys cannot be moved out of memory to disk, and there is no room for more in memory.
    #[error("completed keys cannot be sealed to disk and memory is full: {detail}; mend the disk, then try again")]
    SealingFailed {
        /// Why sealing fails.
        detail: String,
    },

    /// One call brings more bytes than one write can take.
    #[error("the batch is {bytes} bytes, over the limit of {limit}: make it smaller")]
    BatchTooLarge {
        /// Bytes of its keys and results.
        bytes: usize,
        /// The limit, in bytes.
        limit: usize,
    },

    /// A lease was given to a store that did not hand it out. It is given back unharmed.
    #[error("the lease on {key} is of another store: complete it there")]
    ForeignLease {
        /// The key, escaped.
        key: String,
    },

    /// A typed result could not be turned into bytes.
    #[error("the result cannot be encoded: {detail}")]
    Encode {
        /// The encoder's own words.
        detail: String,
    },

    /// A stored result is not of the type that was asked for.
    #[error("the stored result cannot be decoded: {detail}")]
    Decode {
        /// The decoder's own words.
        detail: String,
    },
}

/// Whether a failed call changed the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did not: the call may be made again.
    NotWritten,
    /// Nobody can say before the store is reopened.
    Unknown,
}

impl Error {
    /// Whether the failed call changed the store.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::WriteFailed { .. } | Self::DirectoryGone { .. } | Self::Broken { .. } => Outcome::Unknown,
            _ => Outcome::NotWritten,
        }
    }

    /// Whether the same call, made again later on this store, can succeed.
    #[must_use]
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::AlreadyOpen { .. }
                | Self::Io { .. }
                | Self::InUse { .. }
                | Self::Undecided { .. }
                | Self::TooManyInFlight { .. }
                | Self::TooManyHeld { .. }
                | Self::SealingFailed { .. }
                | Self::TooFarAhead { .. }
        )
    }

    /// The same about the key in this place of a batch.
    pub(crate) fn at(mut self, at: usize) -> Self {
        if let Self::KeyEmpty { place } | Self::KeyTooLong { place, .. } | Self::ScopeTooLong { place, .. } = &mut self
        {
            *place = Some(at);
        }
        self
    }

    /// An `Io` error about `path`.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, error: &dyn std::fmt::Display) -> Self {
        Self::Io { action, path: path.into(), detail: error.to_string() }
    }
}

/// Where a key is among those of its call.
fn in_batch(place: &Option<usize>) -> String {
    place.map(|place| format!(" at position {place} of the batch (from 0)")).unwrap_or_default()
}

/// The unit that a timestamp is plainly in, where that is not milliseconds. Each range is that of the years 1973 to 5138, so
/// that no two of them meet.
pub(crate) fn other_unit(at_ms: u64) -> Option<&'static str> {
    match at_ms {
        100_000_000..100_000_000_000 => Some("seconds"),
        100_000_000_000_000..100_000_000_000_000_000 => Some("microseconds"),
        100_000_000_000_000_000.. => Some("nanoseconds"),
        _ => None,
    }
}

fn unit_hint(at_ms: u64) -> String {
    let hint = |unit| format!("; the timestamp looks like {unit}, and it must be in milliseconds");
    other_unit(at_ms).map(hint).unwrap_or_default()
}

/// Bytes from a stranger, fit for a message: escaped, and cut where they are long.
pub(crate) fn printable(bytes: &[u8]) -> String {
    const SHOWN: usize = 64;
    let head = bytes.get(..SHOWN).unwrap_or(bytes);
    let more = if head.len() < bytes.len() { "…" } else { "" };
    let mut shown = String::new();
    for chunk in head.utf8_chunks() {
        shown.extend(chunk.valid().escape_debug());
        for byte in chunk.invalid() {
            shown.push_str(&format!("\\x{byte:02x}"));
        }
    }
    format!("\"{shown}{more}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_in_another_unit_is_named() {
        // 1973-03-03 and 2023-11-14, and a year that nobody has messages of.
        for seconds in [100_000_000_u64, 1_700_000_000, 99_999_999_999] {
            assert_eq!(other_unit(seconds), Some("seconds"));
            assert_eq!(other_unit(seconds * 1_000), None);
            assert_eq!(other_unit(seconds * 1_000_000), Some("microseconds"));
            assert_eq!(other_unit(seconds.saturating_mul(1_000_000_000)), Some("nanoseconds"));
        }
        assert_eq!((other_unit(0), other_unit(99_999_999), other_unit(u64::MAX)), (None, None, Some("nanoseconds")));
        let key = "\"k\"".to_owned();
        let too_old = Error::TooOld { key, at_ms: 1_700_000_000, remembers_since_ms: 1_600_000_000_000 };
        assert!(too_old.to_string().contains("looks like seconds"), "{too_old}");
    }
}
