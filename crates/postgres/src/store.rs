use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use onlyonce_core::{
    Answers, BoxFuture, Claim, Engine, EngineStats, Error, Finish, Grant, HeldKey, KeepAlive, Key, KeyStatus, Limits,
    Message, MessageId, RecordOutcome, Resolution, Result, StoredKey,
};
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::acquire::{AcquireJob, Acquired};
use crate::connection::{Database, Source};
use crate::connector::Connector;
use crate::core::{AbandonReason, AbandonedLeases, Core};
use crate::error::SetupError;
use crate::finish::{FinishJob, LeaseEnd};
use crate::keep_alive::{KeepAliveHandle, renew_kept};
use crate::maintenance::{expire_all, keep_floor, maintain, watch_durability};
use crate::names::Names;
use crate::options::Options;
use crate::queue::{QUEUED_CALLS, run_batches};
use crate::session::{Session, keep_session};
use crate::writing::{Item, Verb};
use crate::{acquire, finish, in_order, reading, renewal, resolve, side_writes, waiting};

/// A store on PostgreSQL: an [`Engine`] whose keys all nodes share. Clones share its connections.
///
/// Its calls run on tasks of the runtime that it was connected on. Dropping the last clone closes it; the keys of its leases are
/// free then, and the next claim reports [`Crashed`](onlyonce_core::PriorAttempt::Crashed).
#[derive(Clone)]
pub struct PgStore {
    shared: Arc<Shared>,
}

struct Shared {
    core: Arc<Core>,
    claims: mpsc::Sender<AcquireJob>,
    records: mpsc::Sender<AcquireJob>,
    /// As many as there are leases.
    finishes: mpsc::UnboundedSender<FinishJob>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The queues end when their senders are dropped; these end now. So does the session.
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// How many batches of one kind are in flight at a time, of the connections: while some wait for the disk, the next one is on its way.
const fn batches(connections: usize) -> usize {
    if connections > 4 { connections / 2 } else { 2 }
}

impl PgStore {
    pub(crate) async fn start(options: Options, names: Names, connector: Connector) -> Result<Self, SetupError> {
        let at_a_time = batches(options.connections);
        let database = Database::new(&connector, &options)?;
        let (abandoned, leases) = AbandonedLeases::new();
        let core = Arc::new(Core::new(options, names, database, abandoned));
        let session = Session::open(&core, &connector, None).await?;
        let (claims, claim_jobs) = mpsc::channel(QUEUED_CALLS);
        let (records, record_jobs) = mpsc::channel(QUEUED_CALLS);
        let limit = core.database.queue_limit();
        let (finishes, finish_jobs) = mpsc::unbounded_channel();
        for (verb, jobs) in [(Verb::Claim, claim_jobs), (Verb::Record, record_jobs)] {
            let core = Arc::clone(&core);
            let of_rejected = Arc::clone(&core);
            let reject = move |job| acquire::reject(&of_rejected, verb, job);
            if core.policy.is_stream {
                // They wait for each other at the database, too.
                let run = move |jobs| in_order::run_batch(Arc::clone(&core), verb, jobs);
                tokio::spawn(run_batches(jobs, 1, limit, reject, run));
            } else {
                let run = move |jobs| acquire::run_batch(Arc::clone(&core), verb, jobs);
                tokio::spawn(run_batches(jobs, at_a_time, limit, reject, run));
            }
        }
        let (of_finishes, of_rejected) = (Arc::clone(&core), Arc::clone(&core));
        let reject = move |job| finish::reject(&of_rejected, job);
        let run = move |jobs| finish::run_batch(Arc::clone(&of_finishes), jobs);
        tokio::spawn(run_batches(finish_jobs, at_a_time, limit, reject, run));
        let of_abandoned = Arc::clone(&core);
        let run = move |leases| finish::run_abandoned(Arc::clone(&of_abandoned), leases);
        let tasks = vec![
            // They have no time limit.
            tokio::spawn(run_batches(leases, 1, limit, drop, run)),
            tokio::spawn(keep_session(Arc::clone(&core), connector.clone(), session)),
            tokio::spawn(renew_kept(Arc::clone(&core))),
            tokio::spawn(maintain(Arc::clone(&core))),
            tokio::spawn(keep_floor(Arc::clone(&core))),
            tokio::spawn(watch_durability(Arc::clone(&core), connector)),
        ];
        Ok(Self { shared: Arc::new(Shared { core, claims, records, finishes, tasks }) })
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.shared.core
    }

    /// Removes the rows of expired keys now. A task of the store does so in the background; answers do not depend on it.
    ///
    /// # Errors
    ///
    /// [`Error::Unavailable`] if the server cannot be reached.
    pub async fn remove_expired(&self) -> Result<()> {
        expire_all(self.core()).await
    }

    /// How often work ran without an answer of the store.
    #[must_use]
    pub fn fail_open_count(&self) -> u64 {
        self.core().fail_open.load(Ordering::Relaxed)
    }

    /// Writes the leases that were dropped, and closes the store. Leases that are still held end with it.
    pub async fn close(self) {
        self.core().wait_for_all_abandoned().await;
    }

    /// Sends a call to its queue, and waits for its answers.
    async fn acquire(&self, verb: Verb, keys: Vec<Key<'static>>) -> Result<Vec<Result<Acquired>>> {
        let core = self.core();
        let encoded = core.encode_all(&keys)?;
        if keys.is_empty() {
            return Ok(Vec::new());
        }
        core.wait_for_abandoned(&encoded).await;
        let item = |(key, encoded)| Item { key, encoded, call: core.next_call() };
        let items = keys.into_iter().zip(encoded).map(item).collect();
        let (answer, answers) = oneshot::channel();
        let queue = match verb {
            Verb::Claim => &self.shared.claims,
            Verb::Record => &self.shared.records,
        };
        let job = AcquireJob { items, answer, queued: Instant::now() };
        queue.send_timeout(job, core.database.queue_limit()).await.map_err(|unsent| match unsent {
            SendTimeoutError::Timeout(_) => acquire::waited_too_long(),
            SendTimeoutError::Closed(_) => Error::Closed,
        })?;
        Ok(answers.await.map_err(|_| Error::Closed)?.take())
    }

    async fn claim_one(&self, key: Key<'static>) -> Result<Acquired> {
        let answer = self.acquire(Verb::Claim, vec![key]).await?.pop();
        answer.unwrap_or(Err(Error::Closed))
    }

    async fn finish_all(&self, leases: Vec<(Arc<Grant>, Finish)>) -> Result<Vec<Result<()>>> {
        if leases.is_empty() {
            return Ok(Vec::new());
        }
        let items = leases.into_iter().map(|(grant, finish)| LeaseEnd::finish(self.core(), grant, finish));
        let items = items.collect::<Result<_>>()?;
        let (answer, answers) = oneshot::channel();
        let job = FinishJob { items, answer, queued: Instant::now() };
        self.shared.finishes.send(job).map_err(|_| Error::Closed)?;
        answers.await.map_err(|_| Error::Closed)
    }
}

impl From<PgStore> for Arc<dyn Engine> {
    fn from(store: PgStore) -> Self {
        Arc::new(store)
    }
}

impl fmt::Debug for PgStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = self.core();
        f.debug_struct("PgStore").field("options", &core.options).field("database", &core.database).finish()
    }
}

impl Engine for PgStore {
    fn claim<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<Claim<Grant>>> {
        Box::pin(async move {
            let answers = self.acquire(Verb::Claim, keys).await?;
            Ok(answers.into_iter().map(|answer| answer.map(waiting::answer)).collect())
        })
    }

    fn claim_wait<'a>(&'a self, key: Key<'static>, limit: Duration) -> BoxFuture<'a, Result<Claim<Grant>>> {
        Box::pin(async move { waiting::claim_wait(self.core(), &key, limit, |key| self.claim_one(key)).await })
    }

    fn record<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<RecordOutcome>> {
        Box::pin(async move {
            let outcome = |acquired| match acquired {
                Acquired::Taken(_) => RecordOutcome::First,
                Acquired::Completed(_) => RecordOutcome::Duplicate { in_flight: false },
                Acquired::InProgress { .. } => RecordOutcome::Duplicate { in_flight: true },
            };
            let answers = self.acquire(Verb::Record, keys).await?;
            Ok(answers.into_iter().map(|answer| answer.map(outcome)).collect())
        })
    }

    fn check<'a>(&'a self, keys: Vec<Key<'static>>) -> BoxFuture<'a, Answers<KeyStatus>> {
        Box::pin(async move { reading::check(self.core(), &keys).await })
    }

    fn inspect<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<Option<StoredKey>>> {
        Box::pin(async move { reading::inspect(self.core(), &key).await })
    }

    fn renew<'a>(&'a self, grants: Vec<Arc<Grant>>) -> BoxFuture<'a, Answers<()>> {
        Box::pin(async move {
            if grants.is_empty() {
                return Ok(Vec::new());
            }
            renewal::renew(self.core(), Source::Shared, &grants).await
        })
    }

    fn keep_alive(&self, grant: &Arc<Grant>) -> Box<dyn KeepAlive> {
        Box::new(KeepAliveHandle::start(self.core(), grant))
    }

    fn finish<'a>(&'a self, leases: Vec<(Arc<Grant>, Finish)>) -> BoxFuture<'a, Vec<Result<()>>> {
        Box::pin(async move {
            let count = leases.len();
            self.finish_all(leases).await.unwrap_or_else(|error| vec![Err(error); count])
        })
    }

    fn abandon(&self, grant: Arc<Grant>) {
        self.core().abandon(grant, AbandonReason::Dropped);
    }

    fn held(&self) -> BoxFuture<'_, Result<Vec<HeldKey>>> {
        Box::pin(async move {
            self.core().wait_for_all_abandoned().await;
            reading::held(self.core()).await
        })
    }

    fn resolve<'a>(&'a self, key: Key<'static>, resolution: Resolution) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move { resolve::resolve(self.core(), &key, resolution).await })
    }

    fn forget<'a>(&'a self, key: Key<'static>) -> BoxFuture<'a, Result<bool>> {
        Box::pin(async move { resolve::forget(self.core(), &key).await })
    }

    fn offset<'a>(&'a self, stream: &'a [u8], partition: u32) -> BoxFuture<'a, Result<Option<u64>>> {
        Box::pin(side_writes::offset(self.core(), stream, partition))
    }

    fn set_offset<'a>(&'a self, stream: &'a [u8], partition: u32, offset: u64) -> BoxFuture<'a, Result<()>> {
        Box::pin(side_writes::set_offset(self.core(), stream, partition, offset))
    }

    fn outbox(&self, limit: usize) -> BoxFuture<'_, Result<Vec<Message>>> {
        Box::pin(side_writes::outbox(self.core(), limit))
    }

    fn remove_messages(&self, ids: Vec<MessageId>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { side_writes::remove_messages(self.core(), &ids).await })
    }

    fn limits(&self) -> Limits {
        let Options { result_limit, key_limit, .. } = self.core().options;
        Limits::new(result_limit, key_limit, self.core().policy.is_stream)
    }

    fn stats(&self) -> BoxFuture<'_, Result<EngineStats>> {
        Box::pin(async move {
            self.core().wait_for_all_abandoned().await;
            let held = reading::count_held(self.core()).await?;
            Ok(EngineStats::new(self.core().in_flight.count() as u64, held))
        })
    }

    fn count_fail_open(&self) {
        self.core().fail_open.fetch_add(1, Ordering::Relaxed);
    }
}
