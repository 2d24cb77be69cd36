//! The committer: two threads that wait for the disk, so that no thread of a runtime does.
//!
//! One *asks* (claims, checks), the other *settles* (completions, releases, records). Each empties its queue into one call
//! of the engine, which is one row of the journal and at most one sync, and wakes the callers. They are two because
//! under `Rerun` a claim needs no sync, and must not queue behind one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use crate::claim::{self, Claim, CompleteError, Lease, Work, complete_all, release_all};
use crate::engine::core::Engine;
use crate::engine::request::Request;
use crate::engine::response::{ClaimResponse, Response};
use crate::engine::workers::{PoisonOnPanic, StoreHandle};
use crate::error::{Error, Result};
use crate::invariant::Invariant;

/// Keys after which a round is full. More would make those who came first wait for those who came last.
const ROUND_KEYS: usize = 4_096;
/// Bytes of results after which a round is full.
const ROUND_BYTES: usize = 64 << 20;
/// A round that has company, or had it the last time, begins when nobody has come for so long: less than a sync takes.
const QUIET: Duration = Duration::from_micros(20);
/// It waits no longer in all.
const PATIENCE: Duration = Duration::from_micros(500);

/// The queues of a store's two threads. They end when it is dropped, with all that is in the queues done.
pub(super) struct Committer {
    /// Before the queues, so that it goes first: as long as those are open the threads hold the store, and it is one of
    /// them that closes it. Closing waits for the disk.
    pub(super) running: Arc<StoreHandle>,
    asking: mpsc::Sender<Job>,
    settling: mpsc::Sender<Job>,
}

/// Claims on their way to whoever asked. Leases that never get there are taken back.
pub(super) struct Undelivered(Vec<Result<Claim>>);

impl Undelivered {
    pub(super) fn open(mut self) -> Vec<Result<Claim>> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Undelivered {
    fn drop(&mut self) {
        for claim in self.0.drain(..) {
            if let Ok(Claim::Acquired(lease)) = claim {
                lease.take_back();
            }
        }
    }
}

/// Keys that somebody asks about.
struct Ask<R> {
    request: Arc<Request>,
    reply: oneshot::Sender<Result<R>>,
}

/// Leases that somebody settles, each with what becomes of it.
struct Settle<W, A> {
    leases: Vec<(Lease, W)>,
    reply: oneshot::Sender<Vec<A>>,
}

type Call = Box<dyn FnOnce(&StoreHandle) + Send>;

enum Job {
    Claim(Ask<Undelivered>),
    Record(Ask<Vec<Result<Response>>>),
    Complete(Settle<Work, Result<Vec<u8>, CompleteError>>),
    Release(Settle<Duration, Result<()>>),
    Call(Call),
}

impl Committer {
    /// Starts the threads; each queue holds so many calls.
    pub(super) fn start(running: Arc<StoreHandle>, calls: usize) -> Result<Self> {
        let asking = spawn(&running, "onlyonce-ask", calls)?;
        let settling = spawn(&running, "onlyonce-commit", calls)?;
        Ok(Self { running, asking, settling })
    }

    pub(super) async fn claim(&self, request: Arc<Request>) -> Result<Undelivered> {
        submit(&self.asking, |reply| Job::Claim(Ask { request, reply })).await.flatten()
    }

    pub(super) async fn record(&self, request: Arc<Request>) -> Result<Vec<Result<Response>>> {
        submit(&self.settling, |reply| Job::Record(Ask { request, reply })).await.flatten()
    }

    /// An answer for each, with its result.
    pub(super) async fn complete(&self, leases: Vec<(Lease, Work)>) -> Vec<Result<Vec<u8>, CompleteError>> {
        let count = leases.len();
        let answers = submit(&self.settling, |reply| Job::Complete(Settle { leases, reply })).await;
        // The results went with the thread that had them.
        answers.unwrap_or_else(|error| (0..count).map(|_| Err(CompleteError::lost(error.clone()))).collect())
    }

    pub(super) async fn release(&self, leases: Vec<(Lease, Duration)>) -> Vec<Result<()>> {
        let count = leases.len();
        let answers = submit(&self.settling, |reply| Job::Release(Settle { leases, reply })).await;
        answers.unwrap_or_else(|error| vec![Err(error); count])
    }

    /// Has `call` done by the thread that asks.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&StoreHandle) -> T + Send + 'static,
    ) -> Result<T> {
        submit(&self.asking, |reply| Job::Call(boxed(call, reply))).await
    }

    /// Has `call` done by the thread that waits for the disk, behind the completions that came with it.
    pub(super) async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&StoreHandle) -> T + Send + 'static,
    ) -> Result<T> {
        submit(&self.settling, |reply| Job::Call(boxed(call, reply))).await
    }

    /// Closes the store, when all that was in the queues before is done.
    pub(super) async fn close(&self) -> Result<()> {
        self.ask(|_| ()).await?;
        self.call(StoreHandle::close).await.flatten()
    }
}

fn boxed<T: Send + 'static>(call: impl FnOnce(&StoreHandle) -> T + Send + 'static, reply: oneshot::Sender<T>) -> Call {
    Box::new(|running| {
        if !reply.is_closed() {
            let _ = reply.send(call(running));
        }
    })
}

/// Waits for room in the queue, and for the answer.
async fn submit<T>(queue: &mpsc::Sender<Job>, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    // A thread ends before its queue only where it panicked, which poisons the store.
    let ended = || Error::WriteFailed { detail: "a thread of the store panicked".to_owned() };
    let room = queue.reserve().await.map_err(|_| ended())?;
    room.send(job(reply));
    answer.await.map_err(|_| ended())
}

fn spawn(running: &Arc<StoreHandle>, name: &'static str, calls: usize) -> Result<mpsc::Sender<Job>> {
    let (queue, mut jobs) = mpsc::channel(calls);
    let running = Arc::clone(running);
    let path = running.engine.path().to_owned();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _guard = PoisonOnPanic { engine: &running.engine, name };
            let mut before = 1;
            while let Some(first) = jobs.blocking_recv() {
                let round = Round::gather(first, &mut jobs, before);
                before = round.calls_taken;
                round.run(&running);
            }
        })
        .map_err(|error| Error::io("cannot start a thread for", path, &error))?;
    Ok(queue)
}

/// What is done in one go.
#[derive(Default)]
struct Round {
    calls_taken: usize,
    keys: usize,
    bytes: usize,
    claims: Vec<Ask<Undelivered>>,
    records: Vec<Ask<Vec<Result<Response>>>>,
    completions: Vec<Settle<Work, Result<Vec<u8>, CompleteError>>>,
    releases: Vec<Settle<Duration, Result<()>>>,
    calls: Vec<Call>,
}

impl Round {
    fn gather(first: Job, jobs: &mut mpsc::Receiver<Job>, last_time: usize) -> Self {
        let mut round = Self::default();
        round.add(first);
        round.fill(jobs);
        // Where others are about to come, one row and one sync for all of them are cheaper than one for each.
        let begun = Instant::now();
        let mut came = begun;
        while !round.is_full() {
            let before = round.calls_taken;
            std::thread::yield_now();
            round.fill(jobs);
            let now = Instant::now();
            if round.calls_taken > before {
                came = now;
            }
            let is_alone = round.calls_taken.max(last_time) == 1;
            let is_quiet = now - came >= QUIET && round.calls_taken >= last_time;
            if is_alone || is_quiet || now - begun >= PATIENCE {
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
        self.calls_taken += 1;
        match job {
            Job::Claim(ask) => {
                self.keys += ask.request.len();
                self.claims.push(ask);
            }
            Job::Record(ask) => {
                self.keys += ask.request.len();
                self.records.push(ask);
            }
            Job::Complete(settle) => {
                self.keys += settle.leases.len();
                let encoded_len = |work: &Work| work.result.len() + work.tx.as_ref().map_or(0, |tx| tx.len());
                self.bytes +=
                    settle.leases.iter().map(|(lease, work)| key_bytes(lease) + encoded_len(work)).sum::<usize>();
                self.completions.push(settle);
            }
            Job::Release(settle) => {
                self.keys += settle.leases.len();
                self.bytes += settle.leases.iter().map(|(lease, _)| key_bytes(lease)).sum::<usize>();
                self.releases.push(settle);
            }
            Job::Call(call) => self.calls.push(call),
        }
    }

    /// What needs no sync first; what closes the store last.
    fn run(mut self, running: &Arc<StoreHandle>) {
        let engine = &running.engine;
        // Nobody waits for these any more: nothing has happened yet, and nothing will.
        self.claims.retain(|ask| !ask.reply.is_closed());
        let claimed = together(&self.claims, |request| engine.claim(request));
        for (ask, (offset, answer)) in self.claims.into_iter().zip(claimed) {
            let claims =
                answer.and_then(|claimed| engine.check_response_count(claimed, ask.request.len())).map(|claimed| {
                    let claimed = claimed.into_iter().map(|claimed| own(claimed?, &ask.request, offset, engine));
                    Undelivered(claimed.map(|claimed| Ok(claim::claim(claimed?, running))).collect())
                });
            // Where nobody takes them, they are taken back by being dropped.
            let _ = ask.reply.send(claims);
        }
        let one_by_one = self.bytes > ROUND_BYTES;
        settle(self.releases, one_by_one, release_all);
        self.records.retain(|ask| !ask.reply.is_closed());
        let recorded = together(&self.records, |request| engine.record(request));
        for (ask, (_, answer)) in self.records.into_iter().zip(recorded) {
            let _ = ask.reply.send(answer.and_then(|answers| engine.check_response_count(answers, ask.request.len())));
        }
        settle(self.completions, one_by_one, complete_all);
        for call in self.calls {
            call(running);
        }
    }
}

/// Asks for the keys of several calls in one: for each its place among all keys, and its answer.
///
/// An error that is no single key's is not told to all: one call's unreadable bucket is not another's. They are
/// asked one by one then.
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
                    let index = offset;
                    offset += ask.request.len();
                    (index, Ok(answers.by_ref().take(ask.request.len()).collect()))
                })
                .collect()
        }
        Err(error) if is_of_one_call(&error) => asks.iter().map(|ask| (0, call(&ask.request))).collect(),
        Err(error) => asks.iter().map(|_| (0, Err(error.clone()))).collect(),
    }
}

/// Whether another call, made alone, may fare better than the one that failed so. Nothing was done by it.
fn is_of_one_call(error: &Error) -> bool {
    matches!(error, Error::Io { .. } | Error::Corrupt { .. } | Error::BatchTooLarge { .. })
}

fn key_bytes(lease: &Lease) -> usize {
    lease.grant().key().len()
}

/// Gives a grant the keys of its own call, so that a lease that lives long does not keep those of others in memory.
fn own(claimed: ClaimResponse, request: &Arc<Request>, offset: usize, engine: &Engine) -> Result<ClaimResponse> {
    match claimed {
        ClaimResponse::Acquired(mut grant) if !Arc::ptr_eq(&grant.request, request) => {
            let index = grant.index.checked_sub(offset).filter(|index| *index < request.len());
            grant.index = index.ok_or_else(|| {
                let detail = format_args!("key {} of all is none of those from {offset} on", grant.index);
                engine.broken(Invariant::AnswerForEachKey, detail)
            })?;
            grant.request = Arc::clone(request);
            Ok(ClaimResponse::Acquired(grant))
        }
        claimed => Ok(claimed),
    }
}

/// Settles the leases of several calls in one, or one by one where they are too large together.
fn settle<W, A>(calls: Vec<Settle<W, A>>, one_by_one: bool, act: impl Fn(Vec<(Lease, W)>) -> Vec<A>) {
    if one_by_one || calls.len() == 1 {
        for call in calls {
            let _ = call.reply.send(act(call.leases));
        }
        return;
    }
    let mut all = Vec::with_capacity(calls.iter().map(|call| call.leases.len()).sum());
    let mut replies = Vec::with_capacity(calls.len());
    for call in calls {
        replies.push((call.leases.len(), call.reply));
        all.extend(call.leases);
    }
    let mut answers = act(all).into_iter();
    for (count, reply) in replies {
        let _ = reply.send(answers.by_ref().take(count).collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Waker};

    use crate::config::OnInterrupt;
    use crate::entry::Prior;
    use crate::future::{self, Claim};
    use crate::key::Key;
    use crate::store;
    use crate::tx::Tx;

    /// A store whose threads stand still while their gates are shut, as if the disk never came back.
    struct Gated {
        store: future::Store,
        committer: Arc<Committer>,
        _dir: tempfile::TempDir,
    }

    /// Shut until it is dropped.
    struct Gate(#[expect(dead_code, reason = "dropping it is what it is for")] std::sync::mpsc::Sender<()>);

    impl Gated {
        fn new(calls: usize) -> Self {
            Self::with(calls, OnInterrupt::Rerun)
        }

        fn with(calls: usize, on_interrupt: OnInterrupt) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let builder = store::Store::builder().memory_budget(32 << 20).on_interrupt(on_interrupt);
            let store = builder.open(dir.path().join("store")).unwrap();
            let store = future::Store::with_queue(store, calls).unwrap();
            Self { committer: Arc::clone(store.committer()), store, _dir: dir }
        }

        async fn shut(queue: &mpsc::Sender<Job>) -> Gate {
            let (gate, opened) = std::sync::mpsc::channel::<()>();
            let (reply, reached) = oneshot::channel();
            let call = Box::new(move |_: &StoreHandle| {
                reply.send(()).unwrap();
                opened.recv().unwrap_err();
            });
            assert!(queue.send(Job::Call(call)).await.is_ok());
            reached.await.unwrap();
            Gate(gate)
        }

        async fn shut_asking(&self) -> Gate {
            Self::shut(&self.committer.asking).await
        }

        async fn shut_settling(&self) -> Gate {
            Self::shut(&self.committer.settling).await
        }

        async fn acquire(&self, key: &str) -> future::Lease {
            match self.store.claim(key).await.unwrap() {
                Claim::Acquired(lease) => lease,
                other => panic!("{key} should be free, but is {other:?}"),
            }
        }
    }

    /// Polls once: what is asked for is in the queue then, or waits for room.
    fn begin<F: Future>(future: std::pin::Pin<&mut F>) {
        assert!(future.poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }

    /// What these keys are claimed with.
    fn ask<R>(gated: &Gated, keys: impl Iterator<Item = u64>) -> (Ask<R>, oneshot::Receiver<Result<R>>) {
        let keys: Vec<String> = keys.map(|key| key.to_string()).collect();
        let request = gated.committer.running.engine.request(&keys).unwrap();
        let (reply, answer) = oneshot::channel();
        (Ask { request, reply }, answer)
    }

    /// Leases of new keys, each with what becomes of it.
    fn settling<W, A>(
        gated: &Gated,
        keys: std::ops::Range<u64>,
        work: impl Fn() -> W,
    ) -> (Settle<W, A>, oneshot::Receiver<Vec<A>>) {
        let claims = gated.store.blocking().claim_batch(keys.map(|key| format!("key-{key}"))).unwrap();
        let lease = |claim| if let Ok(claim::Claim::Acquired(lease)) = claim { lease } else { panic!("it is new") };
        let leases = claims.into_iter().map(|claim| (lease(claim), work())).collect();
        let (reply, answer) = oneshot::channel();
        (Settle { leases, reply }, answer)
    }

    #[test]
    fn a_round_counts_the_calls_the_keys_and_the_bytes_that_it_takes() {
        let gated = Gated::new(10);
        let taken = || {
            let mut tx = Tx::default();
            tx.enqueue("topic", "key", "bytes");
            tx
        };
        let work = || Work { result: vec![0; 1_000], tx: Some(Box::new(taken())) };
        let mut round = Round::default();
        let mut counts_after = |job| {
            round.add(job);
            (round.calls_taken, round.keys, round.bytes)
        };
        assert_eq!(counts_after(Job::Claim(ask(&gated, 0..2).0)), (1, 2, 0));
        assert_eq!(counts_after(Job::Record(ask(&gated, 2..5).0)), (2, 5, 0));
        let (completions, _answer) = settling(&gated, 10..12, work);
        let keys: usize = completions.leases.iter().map(|(lease, _)| key_bytes(lease)).sum();
        assert!(keys > 2 * "key-10".len());
        let encoded_len = keys + 2 * (1_000 + taken().len());
        assert_eq!(counts_after(Job::Complete(completions)), (3, 7, encoded_len));
        let releases = settling(&gated, 20..22, || Duration::ZERO).0;
        assert_eq!(counts_after(Job::Release(releases)), (4, 9, encoded_len + keys));
        assert_eq!(counts_after(Job::Call(Box::new(|_| ()))), (5, 9, encoded_len + keys));
    }

    #[test]
    fn a_round_is_full_at_so_many_keys_or_bytes() {
        let round = |keys, bytes| Round { keys, bytes, ..Round::default() };
        for (keys, bytes, is_full) in
            [(ROUND_KEYS - 1, ROUND_BYTES - 1, false), (ROUND_KEYS, 0, true), (1, ROUND_BYTES, true)]
        {
            assert_eq!(round(keys, bytes).is_full(), is_full, "{keys} keys, {bytes} bytes");
        }
        let gated = Gated::new(10);
        let (queue, mut jobs) = mpsc::channel(10);
        let half = ROUND_KEYS as u64 / 2;
        for i in 1..4 {
            assert!(queue.try_send(Job::Claim(ask(&gated, i * half..(i + 1) * half).0)).is_ok());
        }
        let round = Round::gather(Job::Claim(ask(&gated, 0..half).0), &mut jobs, 1);
        assert_eq!((round.calls_taken, jobs.len()), (2, 2), "the rest is of the next");
    }

    #[tokio::test]
    async fn large_results_are_written_one_by_one_and_small_ones_together() {
        for (bytes, syncs) in [(ROUND_BYTES / 2, 1), (ROUND_BYTES / 2 + 1, 2)] {
            let gated = Gated::new(10);
            let key = gated.committer.running.engine.request(["a"]).unwrap().key_bytes();
            let (a, b) = (gated.acquire("a").await, gated.acquire("b").await);
            let before = gated.committer.running.engine.stats();
            let gate = gated.shut_settling().await;
            let (mut a, mut b) = (pin!(a.complete(vec![0; bytes - key])), pin!(b.complete(vec![0; bytes - key])));
            begin(a.as_mut());
            begin(b.as_mut());
            drop(gate);
            a.await.unwrap();
            b.await.unwrap();
            let after = gated.committer.running.engine.stats();
            assert_eq!((after.completed, after.log_syncs - before.log_syncs), (2, syncs), "{bytes} bytes each");
        }
    }

    #[test]
    fn an_error_that_is_of_one_call_is_not_told_to_the_others() {
        let gated = Gated::new(10);
        let asks = [0..1, 1..3, 3..4].map(|keys| ask::<()>(&gated, keys).0);
        let (io, poisoned) = (
            Error::Corrupt { place: "a bucket".to_owned(), detail: "one key".to_owned() },
            Error::Poisoned { reason: "a test".to_owned() },
        );
        for (error, calls, told) in [(io, 4, [true, false, true]), (poisoned, 1, [false; 3])] {
            let called = std::cell::Cell::new(0);
            let answers = together(&asks, |request| {
                called.set(called.get() + 1);
                // The second call's keys cannot be read.
                if request.len() == 1 { Ok(vec![Ok(())]) } else { Err(error.clone()) }
            });
            assert_eq!(called.get(), calls, "{error}");
            let is_told: Vec<bool> = answers.iter().map(|(_, answer)| answer.is_ok()).collect();
            assert_eq!(is_told, told, "{error}");
        }
    }

    // All of these run on one thread: a call that blocked it would never let the gate open.

    #[tokio::test]
    async fn calls_at_the_same_time_share_one_row_and_one_sync() {
        let gated = Gated::new(100);
        // More would be over what Tokio lets a task do before it yields.
        let keys: Vec<String> = (0..50).map(|i| format!("key-{i}")).collect();
        let gate = gated.shut_asking().await;
        let mut claims: Vec<_> = keys.iter().map(|key| Box::pin(gated.store.claim(key))).collect();
        let mut leases = Vec::new();
        let before = gated.committer.running.engine.stats();
        claims.iter_mut().for_each(|claim| begin(claim.as_mut()));
        drop(gate);
        for claim in claims {
            let Claim::Acquired(lease) = claim.await.unwrap() else { panic!("it is new") };
            leases.push(lease);
        }
        let tokens: Vec<u64> = leases.iter().map(future::Lease::token).collect();
        assert_eq!(tokens.last().unwrap() - tokens.first().unwrap(), 49, "one batch: no row's number between them");

        let gate = gated.shut_settling().await;
        let mut completions: Vec<_> = leases.into_iter().map(|lease| Box::pin(lease.complete("done"))).collect();
        completions.iter_mut().for_each(|completion| begin(completion.as_mut()));
        drop(gate);
        for completion in completions {
            completion.await.unwrap();
        }
        let after = gated.committer.running.engine.stats();
        assert_eq!((after.completed, after.log_syncs - before.log_syncs), (50, 1));
    }

    #[tokio::test]
    async fn each_of_many_calls_gets_its_own_answer_and_keeps_its_own_keys() {
        let gated = Gated::new(100);
        drop(gated.store.claim(Key::from("guarded").fingerprint("hers")).await.unwrap());
        gated.acquire("done").await.complete("first").await.unwrap();
        let gate = gated.shut_asking().await;
        let (a, b) = (gated.store.claim_batch(["x", "done", "y"]), gated.store.claim("y"));
        let (c, d) = (gated.store.claim(Key::from("guarded").fingerprint("his")), gated.store.claim("z"));
        let (mut a, mut b, mut c, mut d) = (pin!(a), pin!(b), pin!(c), pin!(d));
        begin(a.as_mut());
        begin(b.as_mut());
        begin(c.as_mut());
        begin(d.as_mut());
        drop(gate);
        let a: Vec<Claim> = a.await.unwrap().into_iter().map(Result::unwrap).collect();
        let [Claim::Acquired(x), Claim::Completed(done), Claim::Acquired(y)] = &a[..] else { panic!("{a:?}") };
        assert_eq!((x.key(), y.key(), done.result()), (Key::from("x"), Key::from("y"), Some(&b"first"[..])));
        assert!(matches!(b.await, Ok(Claim::InProgress(_))), "the batch had y first");
        assert!(matches!(c.await, Err(Error::PayloadMismatch { .. })));
        let Claim::Acquired(z) = d.await.unwrap() else { panic!("z is new") };
        assert_eq!(z.key(), Key::from("z"));
        assert_eq!(z.lease.grant().request.len(), 1, "and none of the others");
    }

    #[tokio::test]
    async fn a_full_queue_makes_calls_wait_and_not_the_thread() {
        let gated = Gated::new(3);
        let gate = gated.shut_asking().await;
        let mut claims: Vec<_> = (0..5).map(|i| Box::pin(gated.store.claim(i.to_string()))).collect();
        claims.iter_mut().for_each(|claim| begin(claim.as_mut()));
        assert_eq!((gated.committer.asking.capacity(), gated.committer.asking.max_capacity()), (0, 3));
        drop(gate);
        for claim in claims {
            assert!(matches!(claim.await, Ok(Claim::Acquired(_))));
        }
    }

    #[tokio::test]
    async fn a_claim_that_is_dropped_in_the_queue_never_happens() {
        let gated = Gated::new(10);
        let gate = gated.shut_asking().await;
        {
            let mut claim = pin!(gated.store.claim("k"));
            begin(claim.as_mut());
        }
        drop(gate);
        let lease = gated.acquire("k").await;
        assert_eq!((lease.attempt(), lease.prior()), (1, None));
    }

    #[tokio::test]
    async fn a_claim_that_is_dropped_before_its_answer_is_taken_gives_the_key_back() {
        for on_interrupt in [OnInterrupt::Rerun, OnInterrupt::Hold] {
            let gated = Gated::with(10, on_interrupt);
            {
                let mut claim = pin!(gated.store.claim_batch(["k", "l"]));
                begin(claim.as_mut());
                // Behind it in the queue: when this is answered, so is the claim.
                gated.committer.ask(|_| ()).await.unwrap();
            }
            for key in ["k", "l"] {
                let lease = gated.acquire(key).await;
                assert_eq!((lease.attempt(), lease.prior()), (2, Some(Prior::Released)), "{on_interrupt:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_completion_that_is_dropped_in_the_queue_happens() {
        let gated = Gated::new(10);
        let lease = gated.acquire("k").await;
        let gate = gated.shut_settling().await;
        {
            let mut completion = pin!(lease.complete("done"));
            begin(completion.as_mut());
        }
        drop(gate);
        let answer = gated.store.claim_wait("k", Duration::from_secs(60)).await.unwrap();
        assert!(matches!(answer, Claim::Completed(first) if first.result() == Some(b"done")));
    }

    #[tokio::test]
    async fn a_completion_that_is_dropped_before_there_is_room_leaves_the_key_to_the_next() {
        let gated = Gated::new(1);
        let (k, other) = (gated.acquire("k").await, gated.acquire("other").await);
        let gate = gated.shut_settling().await;
        let mut fills_the_queue = pin!(other.complete("done"));
        begin(fills_the_queue.as_mut());
        {
            let mut completion = pin!(k.complete("done"));
            begin(completion.as_mut());
        }
        let again = gated.acquire("k").await;
        assert_eq!((again.attempt(), again.prior()), (2, Some(Prior::Dropped)));
        drop(gate);
        fills_the_queue.await.unwrap();
    }

    #[tokio::test]
    async fn a_poisoned_store_answers_everybody_who_waits_with_the_error() {
        let gated = Gated::new(2);
        let lease = gated.acquire("k").await;
        let waiter = {
            let store = gated.store.clone();
            tokio::spawn(async move { store.claim_wait("k", Duration::from_secs(600)).await })
        };
        while gated.committer.running.engine.stats().in_progress < 2 {
            tokio::task::yield_now().await;
        }
        let gate = gated.shut_asking().await;
        let mut claims: Vec<_> = (0..5).map(|i| Box::pin(gated.store.claim(i.to_string()))).collect();
        claims.iter_mut().for_each(|claim| begin(claim.as_mut()));
        gated.committer.running.engine.poison("a test");
        drop(gate);
        for claim in claims {
            assert!(matches!(claim.await, Err(Error::Poisoned { .. })));
        }
        // At once, and not when the lease runs out, which is still held.
        let waited = tokio::time::timeout(Duration::from_secs(10), waiter).await;
        assert!(matches!(waited.unwrap().unwrap(), Err(Error::Poisoned { .. })));
        let failed = lease.complete("done").await.unwrap_err();
        assert!(matches!(failed.error(), Error::Poisoned { .. }), "{failed}");
        let (_, result, lease) = failed.into_parts();
        assert_eq!((result, lease.unwrap().key()), (b"done".to_vec(), Key::from("k")));
    }

    #[tokio::test]
    async fn a_committer_that_panics_poisons_the_store_and_leaves_nobody_waiting() {
        let gated = Gated::new(10);
        let lease = gated.acquire("k").await;
        let gate = gated.shut_asking().await;
        let mut panics = pin!(gated.committer.ask(|_| panic!("the committer panics, as it should")));
        let mut behind = pin!(gated.store.claim("l"));
        begin(panics.as_mut());
        begin(behind.as_mut());
        drop(gate);
        assert!(matches!(panics.await, Err::<(), _>(Error::WriteFailed { .. })));
        // It may be of the same round as what panicked, and have its answer.
        drop(behind.await);
        assert!(gated.store.claim("m").await.is_err());
        let failed = lease.complete("done").await.unwrap_err();
        assert!(matches!(failed.error(), Error::Poisoned { .. }), "{failed}");
    }

    #[tokio::test]
    async fn closing_does_what_is_in_the_queues_first() {
        let gated = Gated::new(100);
        let lease = gated.acquire("k").await;
        let (asking, settling) = (gated.shut_asking().await, gated.shut_settling().await);
        let (mut claim, mut completion) = (pin!(gated.store.claim("l")), pin!(lease.complete("done")));
        begin(claim.as_mut());
        begin(completion.as_mut());
        let mut close = pin!(gated.store.close());
        begin(close.as_mut());
        drop((asking, settling));
        close.await.unwrap();
        assert!(matches!(claim.await, Ok(Claim::Acquired(_))));
        completion.await.unwrap();
        assert!(matches!(gated.store.claim("m").await, Err(Error::Closed)));
    }
}
