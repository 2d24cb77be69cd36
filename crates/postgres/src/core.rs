//! What all handles, tasks and calls of a store share.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use onlyonce_core::machine::Policy;
use onlyonce_core::{Error, Grant, Key, KeyError, Result, TimestampError};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use crate::connection::Database;
use crate::contended::Contended;
use crate::failing::FailingKeys;
use crate::in_flight::InFlight;
use crate::kept::Kept;
use crate::names::Names;
use crate::options::{Options, millis};
use crate::queue::Job;
use crate::sql::Statements;
use crate::waiters::Waiters;

/// The longest key that a row may have had, whatever the limit, in bytes.
const MAX_STORED_KEY: usize = 65_535;

pub(crate) struct Core {
    pub(crate) options: Options,
    pub(crate) policy: Policy,
    pub(crate) names: Names,
    pub(crate) sql: Statements,
    pub(crate) database: Database,
    pub(crate) in_flight: InFlight,
    pub(crate) waiters: Arc<Waiters>,
    pub(crate) kept: Kept,
    pub(crate) held: HeldCount,
    pub(crate) contended: Contended,
    pub(crate) failing: FailingKeys,
    /// Each relay has a connection while it publishes.
    pub(crate) relays: Semaphore,
    /// Each write of a lease whose row a transaction may have locked has a connection while it waits.
    pub(crate) locked_writes: Semaphore,
    /// The id of the session's worker. 0 while there is no session.
    worker: AtomicI32,
    /// The last id that was not 0.
    last_worker: AtomicI32,
    is_listening: AtomicBool,
    calls: AtomicI64,
    abandoned: AbandonedLeases,
    started: Instant,
    pub(crate) fail_open: AtomicU64,
}

impl Core {
    pub(crate) fn new(options: Options, names: Names, database: Database, abandoned: AbandonedLeases) -> Self {
        // Calls of all processes have different numbers, but for one in 2^64.
        let first_call = RandomState::new().build_hasher().finish().cast_signed();
        Self {
            policy: options.policy(),
            sql: Statements::new(&names, options.max_ahead.is_some()),
            in_flight: InFlight::new(options.in_flight_limit),
            waiters: Arc::default(),
            kept: Kept::default(),
            held: HeldCount::default(),
            contended: Contended::default(),
            failing: FailingKeys::default(),
            relays: Semaphore::new((options.connections / 4).max(1)),
            locked_writes: Semaphore::new((options.connections / 4).max(1)),
            worker: AtomicI32::new(0),
            last_worker: AtomicI32::new(0),
            is_listening: AtomicBool::new(false),
            calls: AtomicI64::new(first_call),
            started: Instant::now(),
            fail_open: AtomicU64::new(0),
            options,
            names,
            database,
            abandoned,
        }
    }

    /// The worker of new leases. 0: they end by their time alone.
    pub(crate) fn worker(&self) -> i32 {
        self.worker.load(Ordering::Relaxed)
    }

    pub(crate) fn set_worker(&self, worker: i32) {
        self.worker.store(worker, Ordering::Relaxed);
        if worker != 0 {
            self.last_worker.store(worker, Ordering::Relaxed);
        }
    }

    /// The worker of the last session.
    pub(crate) fn last_worker(&self) -> Option<i32> {
        Some(self.last_worker.load(Ordering::Relaxed)).filter(|worker| *worker != 0)
    }

    /// True while announcements arrive.
    pub(crate) fn has_session(&self) -> bool {
        self.is_listening.load(Ordering::Relaxed)
    }

    pub(crate) fn set_listening(&self, is_listening: bool) {
        self.is_listening.store(is_listening, Ordering::Relaxed);
    }

    /// A number for a claim, by which its repetition recognizes its row.
    pub(crate) fn next_call(&self) -> i64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn monotonic_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }

    /// The encoded key of each key of a call. Rejects the call if one is not valid.
    pub(crate) fn encode_all(&self, keys: &[Key<'_>]) -> Result<Vec<Vec<u8>>> {
        let encode = |(index, key): (usize, &Key<'_>)| {
            let at_index = |error: KeyError| if keys.len() > 1 { error.at_index(index) } else { error };
            let mut encoded = Vec::new();
            key.encode(self.options.key_limit, &mut encoded).map_err(at_index)?;
            match (key.timestamp(), self.policy.is_stream) {
                (None, true) => Err(Error::from(TimestampError::Missing)),
                (Some(_), false) => Err(TimestampError::Unexpected.into()),
                _ => Ok(encoded),
            }
        };
        keys.iter().enumerate().map(encode).collect()
    }

    /// The encoded key of a call that accepts keys over the limit.
    pub(crate) fn encode_stored(&self, key: &Key<'_>) -> Result<Vec<u8>> {
        let mut encoded = Vec::new();
        key.encode(MAX_STORED_KEY, &mut encoded)?;
        Ok(encoded)
    }

    /// Abandons a lease without a wait. Calls that begin later see the effect.
    pub(crate) fn abandon(&self, grant: Arc<Grant>, reason: AbandonReason) {
        self.in_flight.ended(grant.token().get());
        self.kept.end(grant.token().get(), &grant.superseded());
        self.abandoned.send(grant, reason);
    }

    /// Waits until the leases of these keys that were abandoned before this call are written, so that the call sees their effect.
    pub(crate) async fn wait_for_abandoned(&self, keys: &[Vec<u8>]) {
        self.wait_until_written(|pending| keys.iter().any(|key| pending.contains_key(key))).await;
    }

    /// As [`Core::encode_stored`], once leases of the key that were abandoned before this call are written.
    pub(crate) async fn encode_when_written(&self, key: &Key<'_>) -> Result<Vec<u8>> {
        let encoded = self.encode_stored(key)?;
        self.wait_for_abandoned(std::slice::from_ref(&encoded)).await;
        Ok(encoded)
    }

    /// Waits until all leases that were abandoned are written.
    pub(crate) async fn wait_for_all_abandoned(&self) {
        self.wait_until_written(|pending| !pending.is_empty()).await;
    }

    /// How many keys have leases that were abandoned and are not written.
    pub(crate) fn abandoned_count(&self) -> usize {
        self.abandoned.pending.borrow().len()
    }

    async fn wait_until_written(&self, is_pending: impl Fn(&Pending) -> bool) {
        let options = &self.options;
        // No longer than their statements may take: a claim that comes first finds a lease that is about to end.
        let _ = timeout(options.retry_for + options.statement_limit, self.abandoned.wait_while(is_pending)).await;
    }

    pub(crate) fn abandoned_are_written(&self, keys: impl IntoIterator<Item = Vec<u8>>) {
        self.abandoned.written(keys);
    }
}

/// The encoded key of a grant, whatever the limit of today.
pub(crate) fn encode_granted(grant: &Grant) -> Result<Vec<u8>> {
    let mut encoded = Vec::new();
    grant.key.clone().with_timestamp(None).encode(MAX_STORED_KEY, &mut encoded)?;
    Ok(encoded)
}

/// Why a lease was abandoned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AbandonReason {
    /// A caller dropped it.
    Dropped,
    /// It reached no caller.
    NotDelivered,
    /// A transaction of the caller completes it or has tried to, and may still be open: the row may be locked.
    InTransaction,
}

/// A lease that was abandoned.
#[derive(Debug)]
pub(crate) struct AbandonedLease {
    pub(crate) grant: Arc<Grant>,
    pub(crate) encoded: Vec<u8>,
    pub(crate) reason: AbandonReason,
}

impl Job for AbandonedLease {
    fn items(&self) -> usize {
        1
    }
}

/// How many leases of each key are abandoned and not written.
type Pending = HashMap<Vec<u8>, usize>;

/// Leases that are abandoned: in a channel, and counted until they are written.
#[derive(Debug)]
pub(crate) struct AbandonedLeases {
    sender: mpsc::UnboundedSender<AbandonedLease>,
    pending: watch::Sender<Pending>,
}

impl AbandonedLeases {
    pub(crate) fn new() -> (Self, mpsc::UnboundedReceiver<AbandonedLease>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { sender, pending: watch::channel(Pending::new()).0 }, receiver)
    }

    fn send(&self, grant: Arc<Grant>, reason: AbandonReason) {
        // The key was valid when it was claimed.
        let Ok(encoded) = encode_granted(&grant) else { return };
        self.pending.send_modify(|pending| *pending.entry(encoded.clone()).or_default() += 1);
        if let Err(unsent) = self.sender.send(AbandonedLease { grant, encoded, reason }) {
            // The store is closed: the end of its session ends the lease.
            self.written([unsent.0.encoded]);
        }
    }

    fn written(&self, keys: impl IntoIterator<Item = Vec<u8>>) {
        self.pending.send_modify(|pending| {
            for key in keys {
                if let Entry::Occupied(mut count) = pending.entry(key) {
                    *count.get_mut() -= 1;
                    if *count.get() == 0 {
                        count.remove();
                    }
                }
            }
        });
    }

    async fn wait_while(&self, is_pending: impl Fn(&Pending) -> bool) {
        if !is_pending(&self.pending.borrow()) {
            return;
        }
        // The sender lives as long as this struct.
        let _ = self.pending.subscribe().wait_for(|pending| !is_pending(pending)).await;
    }
}

/// The number of held keys: the last count of the database, and what this process has added since.
#[derive(Debug, Default)]
pub(crate) struct HeldCount {
    counted: AtomicU64,
    added: AtomicU64,
}

impl HeldCount {
    pub(crate) fn add(&self, keys: u64) {
        self.added.fetch_add(keys, Ordering::Relaxed);
    }

    /// How many more keys may be held.
    pub(crate) fn room(&self, limit: usize) -> u64 {
        (limit as u64).saturating_sub(self.estimate())
    }

    pub(crate) fn estimate(&self) -> u64 {
        self.counted.load(Ordering::Relaxed).saturating_add(self.added.load(Ordering::Relaxed))
    }

    pub(crate) fn set(&self, counted: u64) {
        self.added.store(0, Ordering::Relaxed);
        self.counted.store(counted, Ordering::Relaxed);
    }
}

/// How long a claim waits for an announcement before it tries again.
pub(crate) const fn poll_interval(has_session: bool) -> Duration {
    if has_session { Duration::from_secs(1) } else { Duration::from_millis(100) }
}
