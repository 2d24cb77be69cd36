use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::answer::{Claim, HeldKey, KeyStatus, Message, MessageId, RecordOutcome, Resolution, StoredKey};
use crate::attempt::{AttemptInfo, FencingToken};
use crate::completion::Completion;
use crate::error::{Error, Result};
use crate::key::Key;
use crate::timestamp::Timestamp;

/// A future of an engine.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One answer for each key of a call, in the call's order. The outer error means that the call did nothing; an inner error is
/// about its key alone.
pub type Answers<T> = Result<Vec<Result<T>>>;

/// What stores keys: the contract that the HTTP layer and the delivery processor are written against.
///
/// The local store implements it, and `testing::MemoryStore` for tests. An implementation passes the
/// conformance suite (`onlyonce_core::conformance`, feature `conformance`).
///
/// # Tokens
///
/// A grant identifies its attempt by its fencing token. The token decides, never the clock: a late completion is accepted if no
/// claim came first. So every call can be repeated after an error whose [`outcome`](Error::outcome) is unknown:
///
/// - A completion that is repeated with the token that completed the key succeeds and changes nothing, as long as the key is
///   remembered. The first result and the first side writes stay.
/// - A renewal that is repeated succeeds again.
/// - A claim that is repeated does not get the lease of the first one, whose answer was lost: that lease expires.
/// - After a release, or after [`Engine::abandon`], the engine may forget the token: a finish with it succeeds or fails with
///   [`Error::Superseded`]. A renewal fails.
/// - Every other call with the token fails with [`Error::Superseded`] and changes nothing: after another claim of the key, after
///   [`Engine::forget`], after a resolution as completed, and a release or a renewal after the completion.
///
/// # Dropped futures
///
/// A call whose future is dropped happens or does not happen as a whole. A lease that a dropped claim would have returned is
/// given back, as if it was released. A lease that a dropped [`Engine::finish`] would have finished keeps its key until the
/// call happens; if it does not happen, the engine abandons the lease. Before the first poll that is the caller's duty.
pub trait Engine: Send + Sync + 'static {
    /// Claims each key. A key that occurs twice in `keys` is acquired once and in progress the second time.
    ///
    /// The call fails as a whole if a key is not valid ([`Error::Key`], with the key's index if the call has several), or if
    /// its timestamp is missing or unexpected. So do [`Engine::record`] and [`Engine::check`].
    fn claim<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<Claim<Grant>>>;

    /// Claims one key. If it is in progress, waits up to `limit` until its holder finishes or its lease or backoff ends. A
    /// limit of zero does not wait.
    fn claim_wait<'a>(&'a self, key: Key<'static>, limit: Duration) -> BoxFuture<'a, Result<Claim<Grant>>>;

    /// Completes each key that a claim would acquire, without a lease or a result. A key that occurs twice in `keys` is
    /// recorded once and completed the second time.
    fn record<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<RecordOutcome>>;

    /// Returns what a claim of each key would return. Changes nothing.
    fn check<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<KeyStatus>>;

    /// Returns everything that is stored about a key. `None` if a claim would be its first.
    ///
    /// This call, [`Engine::resolve`] and [`Engine::forget`] accept keys over the engine's limit, which was higher when they were
    /// stored, and ignore a key's timestamp.
    fn inspect<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<Option<StoredKey>>>;

    /// Restarts the time of each lease, also of an expired one that no other holder has claimed.
    fn renew<'a>(&'a self, grants: Vec<Arc<Grant>>) -> BoxFuture<'a, Answers<()>>;

    /// Renews a lease in the background until the returned value is dropped, or the engine's limit is reached.
    fn keep_alive(&self, grant: &Arc<Grant>) -> Box<dyn KeepAlive>;

    /// Completes or releases each lease.
    ///
    /// The order counts for offsets: after a lease whose completion is rejected, the offsets of the following completions in
    /// this call are not stored, because they would cover its message. A release holds back no offsets: the caller has decided
    /// about its message. Outbox messages depend on their own lease alone.
    fn finish<'a>(&'a self, leases: Vec<(Arc<Grant>, Finish)>) -> BoxFuture<'a, Vec<Result<()>>>;

    /// Ends an attempt with unknown outcome. Called when a lease is dropped: it does not block, and reports no error. It has no
    /// effect if the lease was finished or taken over.
    fn abandon(&self, grant: Arc<Grant>);

    /// Lists the keys that are held for resolution, the oldest claim first.
    fn held(&self) -> BoxFuture<'_, Result<Vec<HeldKey>>>;

    /// Decides about a held key. Fails with [`Error::NotHeld`] for any other key.
    ///
    /// After [`Resolution::Rerun`] the old holder cannot renew, and can complete until the next claim.
    /// [`Resolution::Completed`] takes a token of its own, so that the old holder's completion fails with [`Error::Superseded`].
    fn resolve<'a>(&'a self, key: Key<'static>, resolution: Resolution) -> BoxFuture<'a, Result<()>>;

    /// Removes everything that is stored about a key. True if there was something. Fails with [`Error::InUse`] if the key has a
    /// lease, and with [`Error::Undecided`] if it is held.
    fn forget<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<bool>>;

    /// Returns the stored offset of a partition. It is as durable as the store's completions when this returns.
    fn offset<'a>(&'a self, stream: &'a [u8], partition: u32) -> BoxFuture<'a, Result<Option<u64>>>;

    /// Stores an offset without a completion, for example after a run of duplicates.
    fn set_offset<'a>(&'a self, stream: &'a [u8], partition: u32, offset: u64) -> BoxFuture<'a, Result<()>>;

    /// Returns the first messages of the outbox, at most `limit`, in the order of their ids.
    fn outbox(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Message>>>;

    /// Removes messages from the outbox. Unknown ids are ignored.
    fn remove_messages(&self, ids: Vec<MessageId>) -> BoxFuture<'_, Result<()>>;

    /// The engine's limits.
    fn limits(&self) -> Limits;

    /// The engine's counts.
    fn stats(&self) -> BoxFuture<'_, Result<EngineStats>>;

    /// Counts work that ran without an answer of the store ([`OnStoreFailure::FailOpen`](crate::OnStoreFailure::FailOpen)).
    fn count_fail_open(&self) {}
}

/// A lease as data: the right to work on a key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Grant {
    /// The key, with its scope and fingerprint. An engine may leave out its timestamp and window.
    pub key: Key<'static>,
    /// The facts of the attempt.
    pub attempt: AttemptInfo,
    /// The store's time of the claim. On stream time, the time that the key gets when it is completed.
    pub claimed_at: Timestamp,
    /// For the engine's own use: when it granted the lease, in milliseconds on a monotonic clock of its own.
    pub granted_at_ms: u64,
}

impl Grant {
    /// A grant, as an engine makes it.
    #[must_use]
    pub fn new(key: Key<'static>, attempt: AttemptInfo, claimed_at: Timestamp, granted_at_ms: u64) -> Self {
        Self { key, attempt, claimed_at, granted_at_ms }
    }

    /// The fencing token, which identifies the attempt.
    #[must_use]
    pub fn token(&self) -> FencingToken {
        self.attempt.token()
    }

    /// The error of a lease that was taken over.
    #[must_use]
    pub fn superseded(&self) -> Error {
        Error::Superseded { key: self.key.to_string(), token: self.token() }
    }
}

/// How a lease is finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// The work is done.
    Complete(Completion),
    /// The work is not done: the key can be claimed again.
    Release(Release),
}

/// How a lease is released.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Release {
    /// The key cannot be claimed before this time is over. An engine may shorten it, to half its window at most.
    pub backoff: Duration,
    /// True if the attempt may have had its effect: the next claim reports it. Under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold)
    /// the key is held instead, as if the lease was dropped.
    pub may_have_happened: bool,
    /// True if the attempts count from 1 again, for example after the delivery was rejected.
    pub reset_attempts: bool,
}

impl Release {
    /// A release without effect, after which the key can be claimed once `backoff` is over.
    #[must_use]
    pub fn after(backoff: Duration) -> Self {
        Self { backoff, ..Self::default() }
    }
}

/// Renews a lease until it is dropped.
pub trait KeepAlive: Send {
    /// Waits until the lease cannot be renewed any more, and returns why. [`Error::Superseded`] means that another holder
    /// claimed the key, or that the lease was finished or dropped; any other error means that renewal ended and the work may
    /// finish within the lease. A second call returns the same error.
    fn lost<'a>(&'a mut self) -> BoxFuture<'a, Error>;
}

/// The limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// The longest result that is stored, in bytes. Of a longer one, only the completion is stored.
    pub result_bytes: usize,
    /// The longest key with its scope, in bytes.
    pub key_bytes: usize,
    /// True if keys need the timestamp of their message.
    pub is_stream_time: bool,
}

impl Limits {
    /// The limits, as an engine knows them.
    #[must_use]
    pub fn new(result_bytes: usize, key_bytes: usize, is_stream_time: bool) -> Self {
        Self { result_bytes, key_bytes, is_stream_time }
    }
}

/// The counts of an engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Keys in progress.
    pub in_flight: u64,
    /// Keys held for resolution.
    pub held: u64,
}

impl EngineStats {
    /// The counts, as an engine knows them.
    #[must_use]
    pub fn new(in_flight: u64, held: u64) -> Self {
        Self { in_flight, held }
    }
}
