use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::attempt::FencingToken;
use crate::timestamp::Timestamp;

/// The result of every call that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call failed. Its text says what happened, where, and what to do; its [`source`](std::error::Error::source) is the
/// error of the system underneath, if there is one.
///
/// A caller rarely needs the variants: [`Error::kind`] groups them by what to do, [`Error::is_retryable`] says whether to
/// retry, and [`Error::outcome`] whether the call may have changed the store.
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
        /// The accepted values.
        bounds: String,
    },

    /// The directory is open in another store, in this process or another one.
    #[error(
        "{} is already open (waited {waited:?}): close the other store, or share it by cloning; `lock_wait` sets how long \
         to wait for a process that is about to exit",
        path.display()
    )]
    AlreadyOpen {
        /// The store's directory.
        path: PathBuf,
        /// How long this open waited for the lock.
        waited: Duration,
    },

    /// The path holds something other than a store. No store was created in it.
    #[error("{} is not an onlyonce store: {reason}; give an empty or a new directory", path.display())]
    NotAStore {
        /// The path that was given.
        path: PathBuf,
        /// What was found there.
        reason: String,
    },

    /// There is no store at the path, and `create(false)` forbids to create one.
    #[error("no store at {}: check the path, or allow the open to create a store", path.display())]
    NotFound {
        /// The path that was given.
        path: PathBuf,
    },

    /// A different version of this crate wrote the store.
    #[error("{} has format {found}, this version reads {supported}: use the version that wrote it", path.display())]
    UnsupportedFormat {
        /// The store's directory.
        path: PathBuf,
        /// The format on disk.
        found: u32,
        /// The format that this version reads.
        supported: u32,
    },

    /// Data on disk contradicts its checksum or other data. Nothing was changed.
    #[error("{place} is corrupt: {detail}; restore the directory from a copy, or move it away to start empty")]
    Corrupt {
        /// The file, column family or journal record.
        place: String,
        /// What was found there.
        detail: String,
    },

    /// The disk or the file system rejected an operation. Answers of the store do not change because of it.
    #[error("{action} {} failed", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the system or of RocksDB.
        source: Cause,
    },

    /// A write failed, and it is unknown whether it reached the disk. A local store is poisoned; on a database a repetition of the
    /// call finds out.
    #[error("write failed with unknown outcome: repeat the call, after a reopen if the store is local")]
    WriteFailed {
        /// The error of the system, of RocksDB, or of the database server.
        source: Cause,
    },

    /// An invariant does not hold: a bug in this crate, or a memory fault. The store is poisoned so that nothing builds on
    /// the fault.
    #[error("broken invariant: {invariant} ({detail}); this is a bug in onlyonce: report it, and reopen the store")]
    Broken {
        /// The invariant, as in `docs/invariants.md`.
        invariant: &'static str,
        /// What was found instead.
        detail: String,
    },

    /// An earlier write failed with an unknown outcome, or an invariant was broken. This call did nothing.
    #[error("the store is poisoned by an earlier failure ({reason}): reopen it")]
    Poisoned {
        /// The first failure.
        reason: String,
    },

    /// The directory of an open store, or a file in it, was deleted or moved. The store rejects all calls. Opening the path
    /// again would create an empty store, for which every duplicate is new.
    #[error(
        "{} was deleted or moved while the store was open: move it back, or restore the directory from a copy, before you \
         open it again",
        path.display()
    )]
    DirectoryGone {
        /// What is missing: the store's directory, or a file in it.
        path: PathBuf,
    },

    /// The store is closed. This call did nothing.
    #[error("the store is closed: open it again")]
    Closed,

    /// The key is not valid. Nothing was changed.
    #[error(transparent)]
    Key(#[from] KeyError),

    /// The key was used before with a different payload.
    #[error("key {key} was first used with a different payload: use a new key for a new request")]
    PayloadMismatch {
        /// The key, escaped.
        key: String,
    },

    /// The message's timestamp does not fit the store. Nothing was changed.
    #[error(transparent)]
    Timestamp(#[from] TimestampError),

    /// The lease was lost: it expired and another holder claimed the key, or the key was resolved.
    #[error("lease {token} on key {key} was taken over: stop the work, its result is not stored")]
    Superseded {
        /// The key, escaped.
        key: String,
        /// The token of the lost lease.
        token: FencingToken,
    },

    /// The lease belongs to a different store. It is returned with the error and is still good.
    #[error("lease on key {key} belongs to a different store: finish it there")]
    ForeignLease {
        /// The key, escaped.
        key: String,
    },

    /// `resolve` was called for a key that is not held.
    #[error("key {key} is not held: `held()` lists the held keys")]
    NotHeld {
        /// The key, escaped.
        key: String,
    },

    /// `forget` was called for a key with a lease.
    #[error("key {key} is in progress (token {token}): forget it after its lease has ended")]
    InUse {
        /// The key, escaped.
        key: String,
        /// The token of its lease.
        token: FencingToken,
    },

    /// `forget` was called for a held key. Without its entry the next claim would not learn that the effect may have happened.
    #[error("key {key} is held for resolution (token {token}): call `resolve` first, then `forget`")]
    Undecided {
        /// The key, escaped.
        key: String,
        /// The token of its last lease.
        token: FencingToken,
    },

    /// More keys are in progress than `in_flight_limit` allows. Completed, released and dropped keys do not count.
    #[error("{in_flight} keys are in progress, the limit is {limit}: finish some leases, or raise `in_flight_limit`")]
    TooManyInFlight {
        /// The number of keys in progress.
        in_flight: usize,
        /// The limit.
        limit: usize,
    },

    /// More keys are held for resolution than `held_limit` allows.
    #[error("{held} keys are held for resolution, the limit is {limit}: resolve some, or raise `held_limit`")]
    TooManyHeld {
        /// The number of held keys.
        held: usize,
        /// The limit.
        limit: usize,
    },

    /// Completed keys cannot be flushed to disk, and memory for more is full.
    #[error("completed keys cannot be flushed to disk and memory is full: fix the disk error and retry")]
    FlushFailed {
        /// The error of the flush.
        source: Cause,
    },

    /// One call has more bytes than one write can hold.
    #[error("the batch has {bytes} bytes, over the limit of {limit}: split it")]
    BatchTooLarge {
        /// Bytes of its keys, results and messages.
        bytes: usize,
        /// The limit, in bytes.
        limit: usize,
    },

    /// A typed result cannot be encoded or decoded.
    #[error(transparent)]
    Result(#[from] ResultError),

    /// The engine under the store cannot be reached, such as a database server. This call did nothing.
    #[error("the engine is unavailable: retry")]
    Unavailable {
        /// The engine's error.
        source: Cause,
    },
}

/// A key that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The key has no bytes.
    #[error("the key{} is empty: give it at least one byte", in_batch(index))]
    Empty {
        /// The key's index in its batch, from 0. `None` if the call has one key.
        index: Option<usize>,
    },
    /// The key, with its scope, is longer than `key_limit`.
    #[error(
        "key {key}{} has {len} bytes with its scope, over the limit of {limit}: use `Key::content`, or raise `key_limit`",
        in_batch(index)
    )]
    TooLong {
        /// The start of the key, escaped.
        key: String,
        /// Its length, in bytes.
        len: usize,
        /// The limit, in bytes.
        limit: usize,
        /// The key's index in its batch, from 0. `None` if the call has one key.
        index: Option<usize>,
    },
    /// The key's own window is shorter than a millisecond: the key would be forgotten at once.
    #[error("the window of the key{} is shorter than 1 ms: give it a longer one, or leave it out", in_batch(index))]
    WindowTooShort {
        /// The key's index in its batch, from 0. `None` if the call has one key.
        index: Option<usize>,
    },
    /// The scope is longer than 255 bytes.
    #[error("scope {scope} of the key{} has {len} bytes, over the limit of 255: shorten it", in_batch(index))]
    ScopeTooLong {
        /// The start of the scope, escaped.
        scope: String,
        /// Its length, in bytes.
        len: usize,
        /// The key's index in its batch, from 0. `None` if the call has one key.
        index: Option<usize>,
    },
}

impl KeyError {
    /// The same error about the key with this index in a batch.
    #[must_use]
    pub fn at_index(mut self, at: usize) -> Self {
        let (Self::Empty { index }
        | Self::TooLong { index, .. }
        | Self::WindowTooShort { index }
        | Self::ScopeTooLong { index, .. }) = &mut self;
        *index = Some(at);
        self
    }
}

/// A message's timestamp that does not fit the store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TimestampError {
    /// The store runs on stream time, and the key has no timestamp.
    #[error("the store runs on stream time: give the key its message's timestamp with `Key::at`")]
    Missing,
    /// The store runs on its clock, and the key has a timestamp.
    #[error("the store runs on its clock: remove `Key::at`, or create a store with `Builder::stream_time`")]
    Unexpected,
    /// The key is unknown, and a key completed at this timestamp would have expired. It is unknown whether the work was done.
    #[error(
        "message {key} has timestamp {at}, older than the retention window (since {remembers_since}): it is unknown \
         whether it was processed, set it aside{}",
        unit_hint(*at)
    )]
    TooOld {
        /// The key, escaped.
        key: String,
        /// The message's timestamp.
        at: Timestamp,
        /// The earliest timestamp that is not too old.
        remembers_since: Timestamp,
    },
    /// The timestamp is further ahead of stream time than one message may be. A second message that is as far ahead confirms
    /// it, and so does a retry of this one without another message in between. A timestamp that is also ahead of the wall
    /// clock is not accepted before the wall clock comes within the bound.
    #[error(
        "message {key} has timestamp {at}, more than {max_ahead:?} ahead of stream time ({stream_time}){}: retry later{}",
        if *in_future { " and of the wall clock; its producer's clock may be wrong" } else { "" },
        unit_hint(*at)
    )]
    TooFarAhead {
        /// The key, escaped.
        key: String,
        /// The message's timestamp.
        at: Timestamp,
        /// Stream time; the epoch if no message has set it.
        stream_time: Timestamp,
        /// How far ahead a message may be.
        max_ahead: Duration,
        /// True if it is as far ahead of the wall clock.
        in_future: bool,
    },
    /// The timestamp of a queue's message is plainly not in milliseconds. No retry helps: reject the message, and fix its
    /// producer.
    #[error(
        "message {key} has timestamp {at}, which looks like {unit}: the producer must send milliseconds since 1970"
    )]
    WrongUnit {
        /// The key, escaped.
        key: String,
        /// The timestamp, read as milliseconds.
        at: Timestamp,
        /// Its likely unit.
        unit: &'static str,
    },
}

/// A typed result that cannot be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResultError {
    /// The result was not encoded. Nothing was stored.
    #[error("the result cannot be encoded: {detail}")]
    Encode {
        /// The encoder's error.
        detail: String,
    },
    /// The stored result is not of the requested type.
    #[error("the stored result cannot be decoded: {detail}; read it as the type that was stored")]
    Decode {
        /// The decoder's error.
        detail: String,
    },
}

/// What to do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The caller's input is wrong (key, option, timestamp, batch size, typed result): fix it.
    InvalidInput,
    /// The key was used with a different payload: reject the request.
    PayloadMismatch,
    /// The message is older than the window, so that it is unknown whether it was processed: set it aside.
    TooOld,
    /// The lease was lost, or is not this store's: stop the work.
    LeaseLost,
    /// A limit is reached, or the key is busy: retry later.
    Busy,
    /// The disk is full: free space. Calls succeed again afterwards, unless the store is poisoned.
    StorageFull,
    /// The store cannot answer (I/O error, closed, poisoned, already open): retry, reopen it, or call an operator.
    Unavailable,
    /// Data on disk is not what it should be: restore it from a copy.
    Corrupt,
}

/// Whether a failed call changed the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It did not: the call can be repeated.
    NotWritten,
    /// It is unknown until the store is reopened.
    Unknown,
}

impl Error {
    /// The group of the error, by what to do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. }
            | Self::WriteFailed { source }
            | Self::FlushFailed { source }
            | Self::Unavailable { source }
                if source.kind() == io::ErrorKind::StorageFull =>
            {
                ErrorKind::StorageFull
            }
            Self::Timestamp(TimestampError::TooOld { .. }) => ErrorKind::TooOld,
            Self::Timestamp(TimestampError::TooFarAhead { .. }) => ErrorKind::Busy,
            Self::Config { .. }
            | Self::Key(_)
            | Self::Timestamp(_)
            | Self::Result(_)
            | Self::BatchTooLarge { .. }
            | Self::NotHeld { .. }
            | Self::NotAStore { .. }
            | Self::NotFound { .. } => ErrorKind::InvalidInput,
            Self::PayloadMismatch { .. } => ErrorKind::PayloadMismatch,
            Self::Superseded { .. } | Self::ForeignLease { .. } => ErrorKind::LeaseLost,
            Self::InUse { .. } | Self::Undecided { .. } | Self::TooManyInFlight { .. } | Self::TooManyHeld { .. } => {
                ErrorKind::Busy
            }
            Self::Corrupt { .. } | Self::UnsupportedFormat { .. } => ErrorKind::Corrupt,
            Self::Io { .. }
            | Self::WriteFailed { .. }
            | Self::FlushFailed { .. }
            | Self::Unavailable { .. }
            | Self::Broken { .. }
            | Self::Poisoned { .. }
            | Self::DirectoryGone { .. }
            | Self::Closed
            | Self::AlreadyOpen { .. } => ErrorKind::Unavailable,
        }
    }

    /// Whether the failed call changed the store.
    #[must_use]
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::WriteFailed { .. } | Self::DirectoryGone { .. } | Self::Broken { .. } => Outcome::Unknown,
            _ => Outcome::NotWritten,
        }
    }

    /// True if the same call can succeed later on this store, without a change by the caller.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::AlreadyOpen { .. }
                | Self::Io { .. }
                | Self::InUse { .. }
                | Self::Undecided { .. }
                | Self::TooManyInFlight { .. }
                | Self::TooManyHeld { .. }
                | Self::FlushFailed { .. }
                | Self::Unavailable { .. }
                | Self::Timestamp(TimestampError::TooFarAhead { .. })
        )
    }

    /// An I/O error about `path`.
    #[must_use]
    pub fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<Cause>) -> Self {
        Self::Io { action, path: path.into(), source: source.into() }
    }

    /// The same error, about the key with this index in a batch.
    #[must_use]
    pub fn at_index(self, index: usize) -> Self {
        match self {
            Self::Key(error) => Self::Key(error.at_index(index)),
            other => other,
        }
    }

    /// The texts of the error and of all its sources, separated by colons: for logs, which print no sources.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// The texts of an error and of all its sources, separated by colons.
pub fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |source| source.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}

/// The error of the system underneath: of the operating system, of RocksDB, of a database server. Clones share it.
#[derive(Clone)]
pub struct Cause {
    kind: io::ErrorKind,
    error: Arc<dyn std::error::Error + Send + Sync>,
}

impl Cause {
    /// An error of another library, with the kind of I/O error that it means.
    #[must_use]
    pub fn new(kind: io::ErrorKind, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { kind, error: Arc::from(error.into()) }
    }

    /// The kind of I/O error that it is or means: `StorageFull` for a full disk, `Other` if unknown.
    #[must_use]
    pub fn kind(&self) -> io::ErrorKind {
        self.kind
    }

    /// The error itself, to downcast it.
    #[must_use]
    pub fn get_ref(&self) -> &(dyn std::error::Error + Send + Sync + 'static) {
        &*self.error
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        Self::new(error.kind(), error)
    }
}

/// An error of the store as the source of another one.
impl From<Error> for Cause {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Io { source, .. }
            | Error::WriteFailed { source }
            | Error::FlushFailed { source }
            | Error::Unavailable { source } => source.kind(),
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

impl From<String> for Cause {
    fn from(text: String) -> Self {
        Self::new(io::ErrorKind::Other, text)
    }
}

impl From<&str> for Cause {
    fn from(text: &str) -> Self {
        Self::new(io::ErrorKind::Other, text)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl fmt::Debug for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// The position of a key in its batch.
fn in_batch(index: &Option<usize>) -> String {
    index.map(|index| format!(" at index {index} of the batch")).unwrap_or_default()
}

/// The likely unit of a timestamp that is plainly not in milliseconds. Each range covers the years 1973 to 5138, so that no
/// two ranges overlap.
#[must_use]
pub fn likely_unit(at: Timestamp) -> Option<&'static str> {
    match at.as_unix_ms() {
        100_000_000..100_000_000_000 => Some("seconds"),
        100_000_000_000_000..100_000_000_000_000_000 => Some("microseconds"),
        100_000_000_000_000_000.. => Some("nanoseconds"),
        _ => None,
    }
}

fn unit_hint(at: Timestamp) -> String {
    let hint = |unit| format!("; the timestamp looks like {unit}, and it must be in milliseconds");
    likely_unit(at).map(hint).unwrap_or_default()
}

/// Untrusted bytes, fit for a message: escaped, and cut after 64 bytes.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
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
    fn the_unit_of_a_timestamp_is_recognised() {
        let unit = |ms| likely_unit(Timestamp::from_unix_ms(ms));
        // 1973-03-03, 2023-11-14, and the year 5138.
        for seconds in [100_000_000_u64, 1_700_000_000, 99_999_999_999] {
            assert_eq!(unit(seconds), Some("seconds"));
            assert_eq!(unit(seconds * 1_000), None);
            assert_eq!(unit(seconds * 1_000_000), Some("microseconds"));
            assert_eq!(unit(seconds.saturating_mul(1_000_000_000)), Some("nanoseconds"));
        }
        assert_eq!((unit(0), unit(99_999_999), unit(u64::MAX)), (None, None, Some("nanoseconds")));
        let too_old = TimestampError::TooOld {
            key: "\"k\"".to_owned(),
            at: Timestamp::from_unix_ms(1_700_000_000),
            remembers_since: Timestamp::from_unix_s(1_600_000_000),
        };
        assert!(too_old.to_string().contains("looks like seconds"), "{too_old}");
    }

    #[test]
    fn a_full_disk_is_a_kind_of_its_own_wherever_it_is_met() {
        let full = || Cause::new(io::ErrorKind::StorageFull, "No space left on device");
        let errors = [
            Error::io("writing", "/store", full()),
            Error::WriteFailed { source: full() },
            Error::FlushFailed { source: full() },
            Error::io("writing", "/store", io::Error::from_raw_os_error(28)),
        ];
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        }
        assert_eq!(Error::io("writing", "/store", "broken").kind(), ErrorKind::Unavailable);
    }

    #[test]
    fn an_error_keeps_its_source_and_does_not_print_it_twice() {
        let error = Error::io("opening", "/store", io::Error::from_raw_os_error(13));
        let source = std::error::Error::source(&error).unwrap();
        assert!(source.downcast_ref::<Cause>().unwrap().get_ref().downcast_ref::<io::Error>().is_some());
        assert!(!error.to_string().contains(&source.to_string()), "{error}");
        assert_eq!(error.chain(), format!("{error}: {source}"));
    }

    #[test]
    fn an_error_names_the_key_of_a_batch() {
        let error = Error::from(KeyError::Empty { index: None }).at_index(3);
        assert!(error.to_string().contains("index 3"), "{error}");
    }

    #[test]
    fn untrusted_bytes_are_escaped_and_cut() {
        assert_eq!(printable(b"a\n\xff"), "\"a\\n\\xff\"");
        assert_eq!(printable(&[b'a'; 65]), format!("\"{}…\"", "a".repeat(64)));
    }
}
