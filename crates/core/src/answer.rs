use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::attempt::{FencingToken, PriorAttempt};
use crate::error::{Error, ErrorKind, printable};
use crate::key::Key;
use crate::timestamp::Timestamp;

/// The answer to a claim.
///
/// `L` is the lease: [`Grant`](crate::Grant) in the [`Engine`](crate::Engine) contract, a guard that is dropped elsewhere.
#[derive(Debug)]
#[must_use = "a lease that is dropped counts as interrupted work"]
pub enum Claim<L> {
    /// The caller holds the lease: do the work, then complete or release the lease.
    Acquired(L),
    /// The key is completed: answer with its result.
    Completed(Completed),
    /// The key is leased, in backoff, or held for resolution: retry later.
    InProgress(InProgress),
}

/// A completed key.
#[derive(Clone, PartialEq, Eq)]
pub struct Completed {
    result: StoredResult,
    token: FencingToken,
    completed_at: Timestamp,
    remembered_until: Timestamp,
}

/// The result of a completed key, as stored.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub enum StoredResult<B = Arc<[u8]>> {
    /// The key was recorded, which stores no result.
    #[default]
    None,
    /// The result. It may be empty.
    Bytes(B),
    /// The result was longer than the store's `result_limit` and was not stored.
    TooLarge,
}

/// Results may be long, and may be secrets: `Debug` does not print them.
impl<B> fmt::Debug for StoredResult<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Bytes(_) => "Bytes(..)",
            Self::TooLarge => "TooLarge",
        })
    }
}

impl fmt::Debug for Completed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completed")
            .field("result", &self.result)
            .field("token", &self.token)
            .field("completed_at", &self.completed_at)
            .field("remembered_until", &self.remembered_until)
            .finish()
    }
}

impl<'a> StoredResult<&'a [u8]> {
    /// What an engine with this `limit` stores of a result.
    #[must_use]
    #[inline]
    pub fn within(result: &'a [u8], limit: usize) -> Self {
        if result.len() > limit { Self::TooLarge } else { Self::Bytes(result) }
    }

    /// The same, with its own copy of the bytes.
    #[must_use]
    #[inline]
    pub fn to_shared(&self) -> StoredResult {
        match self {
            Self::None => StoredResult::None,
            Self::Bytes(bytes) => StoredResult::Bytes(Arc::from(*bytes)),
            Self::TooLarge => StoredResult::TooLarge,
        }
    }
}

impl<B: AsRef<[u8]>> StoredResult<B> {
    /// The number of stored bytes.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes().map_or(0, <[u8]>::len)
    }

    /// True if no bytes are stored.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stored bytes.
    #[must_use]
    #[inline]
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes.as_ref()),
            Self::None | Self::TooLarge => None,
        }
    }

    /// The same, borrowing its bytes.
    #[must_use]
    #[inline]
    pub fn as_slice(&self) -> StoredResult<&[u8]> {
        match self {
            Self::None => StoredResult::None,
            Self::Bytes(bytes) => StoredResult::Bytes(bytes.as_ref()),
            Self::TooLarge => StoredResult::TooLarge,
        }
    }
}

impl Completed {
    /// A completed key, as an engine knows it.
    #[must_use]
    pub fn new(
        result: StoredResult,
        token: FencingToken,
        completed_at: Timestamp,
        remembered_until: Timestamp,
    ) -> Self {
        Self { result, token, completed_at, remembered_until }
    }

    /// The stored result. `None` if the key was recorded without one, or if it was too large to store.
    #[must_use]
    pub fn result(&self) -> Option<&[u8]> {
        self.result.bytes()
    }

    /// The result that [`Completion::encode`](crate::Completion::encode) encoded. `None` as for [`Completed::result`].
    ///
    /// # Errors
    ///
    /// [`Error::Result`](crate::Error::Result) if the bytes are not a `T`. The type that was stored always decodes. bincode
    /// does not store field names: another type, or a later version of it, decodes only if it has the same fields in the
    /// same order.
    #[cfg(feature = "bincode")]
    pub fn result_as<T: serde::de::DeserializeOwned>(&self) -> crate::Result<Option<T>> {
        self.result().map(crate::typed::decode).transpose()
    }

    /// True if the result was longer than the store's `result_limit` and was not stored.
    #[must_use]
    pub fn is_result_too_large(&self) -> bool {
        self.result == StoredResult::TooLarge
    }

    /// The store's time of the completion. On stream time, the timestamp of the message.
    #[must_use]
    pub fn completed_at(&self) -> Timestamp {
        self.completed_at
    }

    /// The first moment at which the key is forgotten, on the store's time.
    #[must_use]
    pub fn remembered_until(&self) -> Timestamp {
        self.remembered_until
    }

    /// The fencing token of the lease that completed the key, or of its record or resolution, which have tokens of their own.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.token
    }
}

/// The state of a key that cannot be claimed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct InProgress {
    /// When to claim again: the rest of the lease or of the backoff. `None` if the key is held for resolution.
    pub retry_after: Option<Duration>,
    /// The number of the attempt, from 1.
    pub attempt: u32,
}

impl InProgress {
    /// The state, as an engine knows it.
    #[must_use]
    pub fn new(retry_after: Option<Duration>, attempt: u32) -> Self {
        Self { retry_after, attempt }
    }
}

/// The answer to a check: what a claim would return.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyStatus {
    /// A claim would acquire the key, unless a limit rejects it.
    New,
    /// A claim would return [`Claim::InProgress`].
    InProgress(InProgress),
    /// A claim would return [`Claim::Completed`].
    Completed(Completed),
}

/// The answer to a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordOutcome {
    /// The key was new and is now completed.
    First,
    /// The key was already stored. Nothing changed.
    Duplicate {
        /// True if the key is in progress and not completed.
        in_flight: bool,
    },
}

/// Everything that is stored about a key, for tools and operators.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoredKey {
    /// A claimed key.
    #[non_exhaustive]
    Processing {
        /// The token of its last lease.
        token: FencingToken,
        /// The number of that attempt, from 1. 0 if the delivery was rejected and its attempts count from 1 again.
        attempt: u32,
        /// The state of its lease.
        state: LeaseState,
    },
    /// A completed key.
    Completed(Completed),
}

impl StoredKey {
    /// A claimed key, as an engine knows it.
    #[must_use]
    pub fn processing(token: FencingToken, attempt: u32, state: LeaseState) -> Self {
        Self::Processing { token, attempt, state }
    }
}

/// The state of a claimed key's lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// A holder is working. The lease expires after this time.
    Leased(Duration),
    /// No holder. The key can be claimed after this time.
    Backoff(Duration, PriorAttempt),
    /// No holder. The next claim acquires the key.
    Free(PriorAttempt),
    /// No holder. The key cannot be claimed until it is resolved.
    Held(PriorAttempt),
}

/// A key that is held for resolution.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct HeldKey {
    /// The key, with its scope.
    pub key: Key<'static>,
    /// The token of the interrupted attempt.
    pub token: FencingToken,
    /// The number of that attempt, from 1.
    pub attempt: u32,
    /// How it ended.
    pub prior: PriorAttempt,
    /// When the attempt was claimed, dropped, or found crashed. On stream time, the timestamp of its message.
    pub since: Timestamp,
}

impl HeldKey {
    /// A held key, as an engine knows it.
    #[must_use]
    pub fn new(key: Key<'static>, token: FencingToken, attempt: u32, prior: PriorAttempt, since: Timestamp) -> Self {
        Self { key, token, attempt, prior, since }
    }
}

/// The decision about a held key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolution {
    /// The work did not happen: the next claim acquires the key.
    Rerun,
    /// The work happened, with this result.
    Completed(Vec<u8>),
}

/// A message of the outbox.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// Removes the message from the outbox. Use it as the message's idempotency key, together with a name for the store:
    /// ids are unique within one store only. A store that is restored from a copy repeats ids and needs another name.
    pub id: MessageId,
    /// The topic to publish it to.
    pub topic: Vec<u8>,
    /// Its key there.
    pub key: Vec<u8>,
    /// Its payload.
    pub payload: Vec<u8>,
}

/// Payloads may be long, and may be secrets: `Debug` prints their lengths.
impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("topic", &printable(&self.topic))
            .field("key", &printable(&self.key))
            .field("payload_len", &self.payload.len())
            .finish()
    }
}

impl Message {
    /// A message with its id.
    #[must_use]
    pub fn new(id: MessageId, message: crate::completion::NewMessage) -> Self {
        Self { id, topic: message.topic, key: message.key, payload: message.payload }
    }
}

/// Identifies a message in its outbox. Ordered as the completions of the messages began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId {
    record: u64,
    index: u32,
}

impl MessageId {
    /// The id of message `index` of the write with number `record`.
    #[must_use]
    pub const fn new(record: u64, index: u32) -> Self {
        Self { record, index }
    }

    /// The number of the write that stored the message.
    #[must_use]
    pub const fn record(self) -> u64 {
        self.record
    }

    /// The index of the message in that write, from 0.
    #[must_use]
    pub const fn index(self) -> u32 {
        self.index
    }
}

impl std::fmt::Display for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.record, self.index)
    }
}

/// What happens to a key whose holder vanished: its lease expired or was dropped, or its process crashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnInterrupt {
    /// The next claim acquires the key, and [`AttemptInfo::prior`](crate::AttemptInfo::prior) reports how the last attempt
    /// ended.
    #[default]
    Rerun,
    /// The key is held: no claim acquires it until [`resolve`](crate::Engine::resolve) decides whether the work happened. For
    /// effects that must not be repeated without a check.
    Hold,
}

/// What to do with work while the store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnStoreFailure {
    /// The work does not run: requests get 503, deliveries are redelivered later. If the work ran and its result could not be
    /// stored, it may run again, with [`AttemptInfo::may_have_happened`](crate::AttemptInfo::may_have_happened).
    #[default]
    FailClosed,
    /// The work runs without deduplication, and is counted. Duplicates run twice, even at the same time.
    ///
    /// Work whose side writes cannot be stored does not count as done: its request gets 503, its delivery is redelivered. A
    /// delivery is also redelivered if the store is only at its in-flight limit.
    FailOpen,
}

impl OnStoreFailure {
    /// True if work runs without deduplication after its claim failed with this error: under `FailOpen`, if the store cannot
    /// answer. A claim that a limit, a key or a timestamp rejects does not run its work.
    #[must_use]
    pub fn allows_without_store(self, error: &Error) -> bool {
        let cannot_answer =
            matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::StorageFull | ErrorKind::Corrupt);
        self == Self::FailOpen && cannot_answer
    }
}
