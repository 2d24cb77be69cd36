//! The committer: two threads that wait for the disk, so that no thread of a runtime does.
//!
//! One runs claims and reads, the other completions, releases, records and everything else that is synced. Each takes all
//! queued calls as one round: one journal record and at most one sync. They are separate because under `Rerun` a claim needs
//! no sync, and must not queue after one.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use onlyonce_core::{Claim, Completion, Error, RecordOutcome, Result};
use tokio::sync::{mpsc, oneshot};

use super::call::Queue;
use super::lease::{CompleteError, Lease, complete_calls, release_all};
use crate::engine::core::Engine;
use crate::engine::request::Request;
use crate::engine::response::Grant;
use crate::engine::workers::{PoisonOnPanic, StoreHandle};
use crate::invariant::Invariant;

/// All threads of a store have names that start so.
const THREAD_PREFIX: &str = "onlyonce-";
/// A round is full at this many keys. More would delay the first callers.
const ROUND_KEYS: usize = 4_096;
/// A round is full at this many bytes of results.
const ROUND_BYTES: usize = 64 << 20;
/// A round of several calls starts once no call has arrived for this long: less than a sync takes.
const QUIET: Duration = Duration::from_micros(20);
/// The longest that a round waits for further calls.
const MAX_GATHER: Duration = Duration::from_micros(500);

/// The queues of a store's two threads. When it is dropped, the threads run what is queued, and end.
pub(crate) struct Committer {
    // Dropped before the threads are joined.
    queues: Option<Queues>,
    threads: Vec<JoinHandle<()>>,
}

struct Queues {
    ask: mpsc::Sender<Job>,
    commit: mpsc::Sender<Job>,
}

/// Waits for the threads, one of which closes the store if nothing else holds it: a process that exits while RocksDB closes
/// can be aborted by RocksDB's own teardown. A runtime's thread must not block: there a blocking task waits, for which the
/// runtime waits when it shuts down.
impl Drop for Committer {
    fn drop(&mut self) {
        drop(self.queues.take());
        let threads = std::mem::take(&mut self.threads);
        // A thread of a store cannot wait for itself, nor for a thread that waits for it.
        if std::thread::current().name().is_some_and(|name| name.starts_with(THREAD_PREFIX)) {
            return;
        }
        // A thread that panicked has poisoned the store.
        let join = move || threads.into_iter().for_each(|thread| drop(thread.join()));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(join)),
            Err(_) => join(),
        }
    }
}

/// Claims on their way to their caller. Leases that do not arrive are taken back.
pub(super) struct Undelivered {
    claims: Vec<Result<Claim<Grant>>>,
    engine: Arc<Engine>,
}

impl Undelivered {
    pub(super) fn take(mut self) -> Vec<Result<Claim<Grant>>> {
        std::mem::take(&mut self.claims)
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        for claim in self.claims.drain(..) {
            if let Ok(Claim::Acquired(grant)) = claim {
                self.engine.take_back(&grant);
            }
        }
    }
}

/// Keys to claim or record.
struct Ask<R> {
    request: Arc<Request>,
    reply: oneshot::Sender<Result<R>>,
}

/// Leases to finish, each with how.
struct Finish<W, A> {
    leases: Vec<(Lease, W)>,
    reply: oneshot::Sender<Vec<A>>,
}

type Task = Box<dyn FnOnce(&StoreHandle) + Send>;

enum Job {
    Claim(Ask<Undelivered>),
    Record(Ask<Vec<Result<RecordOutcome>>>),
    Complete(Finish<Completion, Result<Completion, CompleteError>>),
    Release(Finish<Duration, Result<()>>),
    Task(Task),
}

impl Committer {
    /// Starts the threads. Each queue holds this many calls.
    pub(super) fn start(handle: Arc<StoreHandle>, calls: usize) -> Result<Self> {
        let (ask, ask_thread) = spawn(&handle, "onlyonce-ask", calls)?;
        let (commit, commit_thread) = spawn(&handle, "onlyonce-commit", calls)?;
        Ok(Self { queues: Some(Queues { ask, commit }), threads: vec![ask_thread, commit_thread] })
    }

    fn queue(&self, queue: Queue) -> Result<&mpsc::Sender<Job>> {
        // `None` only while it is dropped.
        let queues = self.queues.as_ref().ok_or(Error::Closed)?;
        Ok(match queue {
            Queue::Ask => &queues.ask,
            Queue::Commit => &queues.commit,
        })
    }

    pub(super) async fn claim(&self, request: Arc<Request>) -> Result<Undelivered> {
        submit(self.queue(Queue::Ask)?, |reply| Job::Claim(Ask { request, reply })).await.flatten()
    }

    pub(super) async fn record(&self, request: Arc<Request>) -> Result<Vec<Result<RecordOutcome>>> {
        submit(self.queue(Queue::Commit)?, |reply| Job::Record(Ask { request, reply })).await.flatten()
    }

    /// An answer for each lease, with its completion.
    pub(super) async fn complete(&self, leases: Vec<(Lease, Completion)>) -> Vec<Result<Completion, CompleteError>> {
        let count = leases.len();
        let answers = match self.queue(Queue::Commit) {
            Ok(queue) => submit(queue, |reply| Job::Complete(Finish { leases, reply })).await,
            Err(error) => Err(error),
        };
        // The thread that had the completions is gone.
        answers.unwrap_or_else(|error| (0..count).map(|_| Err(CompleteError::lost(error.clone()))).collect())
    }

    pub(super) async fn release(&self, leases: Vec<(Lease, Duration)>) -> Vec<Result<()>> {
        let count = leases.len();
        let answers = match self.queue(Queue::Commit) {
            Ok(queue) => submit(queue, |reply| Job::Release(Finish { leases, reply })).await,
            Err(error) => Err(error),
        };
        answers.unwrap_or_else(|error| vec![Err(error); count])
    }

    /// Runs `task` on the thread of this queue, after the calls of its round.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        queue: Queue,
        task: impl FnOnce(&StoreHandle) -> T + Send + 'static,
    ) -> Result<T> {
        submit(self.queue(queue)?, |reply| {
            Job::Task(Box::new(|handle| {
                if !reply.is_closed() {
                    let _ = reply.send(task(handle));
                }
            }))
        })
        .await
    }

    /// Closes the store after everything that is queued.
    pub(super) async fn close(&self) -> Result<()> {
        // Whether the other thread has panicked or not: this one closes.
        let _ = self.call(Queue::Ask, |_| ()).await;
        self.call(Queue::Commit, StoreHandle::close).await.flatten()
    }
}

/// Waits for room in the queue, and for the answer.
async fn submit<T>(queue: &mpsc::Sender<Job>, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    // A thread ends before its queue only by a panic, which poisons the store.
    let ended = || Error::WriteFailed { source: "a thread of the store panicked".into() };
    let room = queue.reserve().await.map_err(|_| ended())?;
    room.send(job(reply));
    answer.await.map_err(|_| ended())
}

fn spawn(handle: &Arc<StoreHandle>, name: &'static str, calls: usize) -> Result<(mpsc::Sender<Job>, JoinHandle<()>)> {
    let (queue, mut jobs) = mpsc::channel(calls);
    let handle = Arc::clone(handle);
    let path = handle.engine.path().to_owned();
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _guard = PoisonOnPanic { engine: &handle.engine, name };
            let mut last_calls = 1;
            while let Some(first) = jobs.blocking_recv() {
                let round = Round::gather(first, &mut jobs, last_calls);
                last_calls = round.calls;
                round.run(&handle);
            }
        })
        .map_err(|error| Error::io("starting a thread for", path, error))?;
    Ok((queue, thread))
}

/// The calls that one thread runs together.
#[derive(Default)]
struct Round {
    calls: usize,
    keys: usize,
    bytes: usize,
    claims: Vec<Ask<Undelivered>>,
    records: Vec<Ask<Vec<Result<RecordOutcome>>>>,
    completions: Vec<Finish<Completion, Result<Completion, CompleteError>>>,
    releases: Vec<Finish<Duration, Result<()>>>,
    tasks: Vec<Task>,
}

impl Round {
    fn gather(first: Job, jobs: &mut mpsc::Receiver<Job>, last_calls: usize) -> Self {
        let mut round = Self::default();
        round.add(first);
        round.fill(jobs);
        // If other calls are about to arrive, one record and one sync for all of them are cheaper than one each.
        let started = Instant::now();
        let mut last_arrival = started;
        while !round.is_full() {
            let before = round.calls;
            std::thread::yield_now();
            round.fill(jobs);
            let now = Instant::now();
            if round.calls > before {
                last_arrival = now;
            }
            let is_alone = round.calls.max(last_calls) == 1;
            let is_quiet = now - last_arrival >= QUIET && round.calls >= last_calls;
            if is_alone || is_quiet || now - started >= MAX_GATHER {
                break;
            }
        }
        round
    }

    fn fill(&mut self, jobs: &mut mpsc::Receiver<Job>) {
        while !self.is_full()
            && let Ok(job) = jobs.try_recv()
        {
            self.add(job);
        }
    }

    fn is_full(&self) -> bool {
        self.keys >= ROUND_KEYS || self.bytes >= ROUND_BYTES
    }

    fn add(&mut self, job: Job) {
        self.calls += 1;
        match job {
            Job::Claim(ask) => {
                self.keys += ask.request.len();
                self.claims.push(ask);
            }
            Job::Record(ask) => {
                self.keys += ask.request.len();
                self.records.push(ask);
            }
            Job::Complete(finish) => {
                self.keys += finish.leases.len();
                let bytes = finish.leases.iter().map(|(lease, completion)| key_bytes(lease) + completion.encoded_len());
                self.bytes += bytes.sum::<usize>();
                self.completions.push(finish);
            }
            Job::Release(finish) => {
                self.keys += finish.leases.len();
                self.bytes += finish.leases.iter().map(|(lease, _)| key_bytes(lease)).sum::<usize>();
                self.releases.push(finish);
            }
            Job::Task(task) => self.tasks.push(task),
        }
    }

    /// Runs first what needs no sync, and last the tasks, one of which may close the store.
    fn run(mut self, handle: &Arc<StoreHandle>) {
        let engine = &handle.engine;
        // A call whose future was dropped has not happened, and does not happen.
        self.claims.retain(|ask| !ask.reply.is_closed());
        let claimed = together(&self.claims, |request| engine.claim(request));
        for (ask, (offset, answer)) in self.claims.into_iter().zip(claimed) {
            let claims =
                answer.and_then(|claims| engine.health.check_response_count(claims, ask.request.len())).map(|claims| {
                    let claims =
                        claims.into_iter().map(|claim| own_request(claim?, &ask.request, offset, engine)).collect();
                    Undelivered { claims, engine: Arc::clone(engine) }
                });
            // If the caller is gone, dropping the claims takes them back.
            let _ = ask.reply.send(claims);
        }
        let one_by_one = self.bytes > ROUND_BYTES;
        finish(self.releases, one_by_one, |leases, _| release_all(leases));
        self.records.retain(|ask| !ask.reply.is_closed());
        let recorded = together(&self.records, |request| engine.record(request));
        for (ask, (_, answer)) in self.records.into_iter().zip(recorded) {
            let answers = answer.and_then(|answers| engine.health.check_response_count(answers, ask.request.len()));
            let _ = ask.reply.send(answers);
        }
        finish(self.completions, one_by_one, complete_calls);
        for task in self.tasks {
            task(handle);
        }
    }
}

/// Runs the requests of several calls as one. Returns for each call the index of its first key, and its answers.
///
/// An error that is about one call only, such as an unreadable bucket, must not fail the others: they run one by one then.
fn together<R, T>(
    asks: &[Ask<R>],
    call: impl Fn(&Arc<Request>) -> Result<Vec<Result<T>>>,
) -> Vec<(usize, Result<Vec<Result<T>>>)> {
    if let [] | [_] = asks {
        return asks.iter().map(|ask| (0, call(&ask.request))).collect();
    }
    let all = Arc::new(Request::concat(asks.iter().map(|ask| &*ask.request)));
    match call(&all) {
        Ok(answers) => {
            let (mut answers, mut offset) = (answers.into_iter(), 0);
            asks.iter()
                .map(|ask| {
                    let first = offset;
                    offset += ask.request.len();
                    (first, Ok(answers.by_ref().take(ask.request.len()).collect()))
                })
                .collect()
        }
        Err(error) if is_about_one_call(&error) => asks.iter().map(|ask| (0, call(&ask.request))).collect(),
        Err(error) => asks.iter().map(|_| (0, Err(error.clone()))).collect(),
    }
}

/// True if a call can succeed alone after all calls together failed with this error, which changed nothing.
fn is_about_one_call(error: &Error) -> bool {
    matches!(error, Error::Io { .. } | Error::Corrupt { .. } | Error::BatchTooLarge { .. })
}

fn key_bytes(lease: &Lease) -> usize {
    lease.grant().key().len()
}

/// Points a grant to the request of its own call, so that a long lease does not keep the keys of other calls in memory.
fn own_request(claim: Claim<Grant>, request: &Arc<Request>, offset: usize, engine: &Engine) -> Result<Claim<Grant>> {
    match claim {
        Claim::Acquired(mut grant) if !Arc::ptr_eq(&grant.request, request) => {
            let index = grant.index.checked_sub(offset).filter(|index| *index < request.len());
            grant.index = index.ok_or_else(|| {
                let detail = format_args!("key {} of all is not one of those from {offset} on", grant.index);
                engine.health.broken(Invariant::AnswerForEachKey, detail)
            })?;
            grant.request = Arc::clone(request);
            Ok(Claim::Acquired(grant))
        }
        claim => Ok(claim),
    }
}

/// Finishes the leases of several calls in one write, or one by one if they are too large together.
///
/// `act` gets the leases, and how many of them belong to each call.
fn finish<W, A>(calls: Vec<Finish<W, A>>, one_by_one: bool, act: impl Fn(Vec<(Lease, W)>, &[usize]) -> Vec<A>) {
    if one_by_one || calls.len() == 1 {
        for call in calls {
            let count = [call.leases.len()];
            let _ = call.reply.send(act(call.leases, &count));
        }
        return;
    }
    let counts: Vec<usize> = calls.iter().map(|call| call.leases.len()).collect();
    let (mut leases, mut replies) = (Vec::with_capacity(counts.iter().sum()), Vec::with_capacity(calls.len()));
    for call in calls {
        replies.push(call.reply);
        leases.extend(call.leases);
    }
    let mut answers = act(leases, &counts).into_iter();
    for (count, reply) in counts.into_iter().zip(replies) {
        let _ = reply.send(answers.by_ref().take(count).collect());
    }
}

#[cfg(test)]
mod tests;
