use std::pin::Pin;
use std::sync::mpsc as std_mpsc;
use std::task::{Context, Waker};

use onlyonce_core::{Key, PriorAttempt};
use tempfile::TempDir;

use super::*;
use crate::api;
use crate::engine::workers::StoreHandle;
use crate::stats::Stats;
use crate::{Store, Submitted};
use onlyonce_core::OnInterrupt;

/// A store whose threads can be blocked, as by a disk that does not answer.
struct GatedStore {
    store: Store,
    _dir: TempDir,
}

/// Blocks a thread of the store until it is dropped.
struct Gate {
    _open: std_mpsc::Sender<()>,
}

impl GatedStore {
    fn new(queue_limit: usize) -> Self {
        Self::with(queue_limit, OnInterrupt::Rerun)
    }

    fn with(queue_limit: usize, on_interrupt: OnInterrupt) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let builder = Store::builder().memory_budget(32 << 20).on_interrupt(on_interrupt).queue_limit(queue_limit);
        Self { store: builder.open(dir.path().join("store")).unwrap(), _dir: dir }
    }

    fn engine(&self) -> &Arc<Engine> {
        self.store.shared.engine()
    }

    fn stats(&self) -> Stats {
        self.store.stats()
    }

    fn committer(&self) -> &Committer {
        self.store.shared.committer().unwrap()
    }

    async fn block_ask_thread(&self) -> Gate {
        block(self.committer().queue(Queue::Ask).unwrap()).await
    }

    async fn block_commit_thread(&self) -> Gate {
        block(self.committer().queue(Queue::Commit).unwrap()).await
    }

    async fn acquire(&self, key: &str) -> Lease {
        match self.store.claim(key).await.unwrap() {
            Claim::Acquired(lease) => lease,
            other => panic!("{key} should be unclaimed, but is {other:?}"),
        }
    }

    /// A claim or record call of these keys, and where its answer arrives.
    fn ask<R>(&self, keys: std::ops::Range<usize>) -> (Ask<R>, oneshot::Receiver<Result<R>>) {
        let keys: Vec<String> = keys.map(|key| key.to_string()).collect();
        let request = self.engine().request(&keys).unwrap();
        let (reply, answer) = oneshot::channel();
        (Ask { request, reply }, answer)
    }

    /// A call that finishes the leases of new keys, and where its answers arrive.
    fn finish<W, A>(
        &self,
        keys: std::ops::Range<u64>,
        how: impl Fn() -> W,
    ) -> (Finish<W, A>, oneshot::Receiver<Vec<A>>) {
        let claims = self.store.claim_batch(keys.map(|key| format!("key-{key}"))).wait().unwrap();
        let lease = |claim| match claim {
            Ok(Claim::Acquired(lease)) => lease,
            other => panic!("the key is new, but is {other:?}"),
        };
        let leases = claims.into_iter().map(|claim| (lease(claim), how())).collect();
        let (reply, answer) = oneshot::channel();
        (Finish { leases, reply }, answer)
    }
}

/// Blocks the thread of this queue.
async fn block(queue: &mpsc::Sender<Job>) -> Gate {
    let (open, opened) = std_mpsc::channel::<()>();
    let (reply, blocked) = oneshot::channel();
    let task = Box::new(move |_: &StoreHandle| {
        reply.send(()).unwrap();
        opened.recv().unwrap_err();
    });
    assert!(queue.send(Job::Task(task)).await.is_ok());
    blocked.await.unwrap();
    Gate { _open: open }
}

/// Polls a call once: it is in the queue then, or waits for room.
fn submit_only<F: Future + ?Sized>(call: &mut Pin<Box<F>>) {
    assert!(call.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
}

fn submitted<O: api::Operation>(call: api::Call<O>) -> Submitted<O::Output> {
    let mut call = call.into_future();
    submit_only(&mut call);
    call
}

#[test]
fn a_round_counts_its_calls_keys_and_bytes() {
    let gated = GatedStore::new(10);
    let completion = || Completion::new(vec![0; 1_000]).message("topic", "key", "payload");
    let mut round = Round::default();
    let mut counts_after = |job| {
        round.add(job);
        (round.calls, round.keys, round.bytes)
    };
    assert_eq!(counts_after(Job::Claim(gated.ask(0..2).0)), (1, 2, 0));
    assert_eq!(counts_after(Job::Record(gated.ask(2..5).0)), (2, 5, 0));
    let completions = gated.finish(10..12, completion).0;
    let key_bytes: usize = completions.leases.iter().map(|(lease, _)| key_bytes(lease)).sum();
    assert!(key_bytes > 2 * "key-10".len());
    let message_bytes = completion().side_writes().unwrap().encoded_len();
    assert!(message_bytes > "topickeypayload".len());
    let bytes = key_bytes + 2 * (1_000 + message_bytes);
    assert_eq!(counts_after(Job::Complete(completions)), (3, 7, bytes));
    let releases = gated.finish(20..22, || Duration::ZERO).0;
    assert_eq!(counts_after(Job::Release(releases)), (4, 9, bytes + key_bytes));
    assert_eq!(counts_after(Job::Task(Box::new(|_| ()))), (5, 9, bytes + key_bytes));
}

#[test]
fn a_round_is_full_at_its_limit_of_keys_or_bytes() {
    let round = |keys, bytes| Round { keys, bytes, ..Round::default() };
    for (keys, bytes, is_full) in
        [(ROUND_KEYS - 1, ROUND_BYTES - 1, false), (ROUND_KEYS, 0, true), (1, ROUND_BYTES, true)]
    {
        assert_eq!(round(keys, bytes).is_full(), is_full, "{keys} keys, {bytes} bytes");
    }
    let gated = GatedStore::new(10);
    let (queue, mut jobs) = mpsc::channel(10);
    let half = ROUND_KEYS / 2;
    for i in 1..4 {
        assert!(queue.try_send(Job::Claim(gated.ask(i * half..(i + 1) * half).0)).is_ok());
    }
    let round = Round::gather(Job::Claim(gated.ask(0..half).0), &mut jobs, 1);
    assert_eq!((round.calls, jobs.len()), (2, 2), "the other calls wait for the next round");
}

#[tokio::test]
async fn large_results_are_written_one_by_one_and_small_ones_together() {
    for (bytes, syncs) in [(ROUND_BYTES / 2, 1), (ROUND_BYTES / 2 + 1, 2)] {
        let gated = GatedStore::new(10);
        let key_bytes = gated.engine().request(["a"]).unwrap().key_bytes();
        let (a, b) = (gated.acquire("a").await, gated.acquire("b").await);
        let before = gated.stats();
        let gate = gated.block_commit_thread().await;
        let [a, b] = [a, b].map(|lease| submitted(lease.complete(vec![0; bytes - key_bytes])));
        drop(gate);
        a.await.unwrap();
        b.await.unwrap();
        let after = gated.stats();
        assert_eq!((after.completed, after.journal_syncs - before.journal_syncs), (2, syncs), "{bytes} bytes each");
    }
}

#[test]
fn an_error_about_one_call_does_not_fail_the_other_calls() {
    let gated = GatedStore::new(10);
    let asks = [0..1, 1..3, 3..4].map(|keys| gated.ask::<()>(keys).0);
    let (corrupt, poisoned) = (
        Error::Corrupt { place: "a bucket".to_owned(), detail: "one key".to_owned() },
        Error::Poisoned { reason: "a test".to_owned() },
    );
    for (error, calls, succeeds) in [(corrupt, 4, [true, false, true]), (poisoned, 1, [false; 3])] {
        let called = std::cell::Cell::new(0);
        let answers = together(&asks, |request| {
            called.set(called.get() + 1);
            // The keys of the second call cannot be read.
            if request.len() == 1 { Ok(vec![Ok(())]) } else { Err(error.clone()) }
        });
        assert_eq!(called.get(), calls, "{error}");
        let succeeded: Vec<bool> = answers.iter().map(|(_, answer)| answer.is_ok()).collect();
        assert_eq!(succeeded, succeeds, "{error}");
    }
}

// The following tests run on one thread: a call that blocked it would leave the gate closed forever.

#[tokio::test]
async fn concurrent_calls_share_one_journal_record_and_one_sync() {
    let gated = GatedStore::new(100);
    // Tokio makes a task yield after more operations than this.
    let keys: Vec<String> = (0..50).map(|i| format!("key-{i}")).collect();
    let gate = gated.block_ask_thread().await;
    let mut leases = Vec::new();
    let before = gated.stats();
    let claims: Vec<_> = keys.iter().map(|key| submitted(gated.store.claim(key))).collect();
    drop(gate);
    for claim in claims {
        let Claim::Acquired(lease) = claim.await.unwrap() else { panic!("the key is new") };
        leases.push(lease);
    }
    let tokens: Vec<u64> = leases.iter().map(|lease| lease.token().get()).collect();
    assert_eq!(
        tokens.last().unwrap() - tokens.first().unwrap(),
        49,
        "no record number between the tokens of one batch"
    );

    let gate = gated.block_commit_thread().await;
    let completions: Vec<_> = leases.into_iter().map(|lease| submitted(lease.complete("done"))).collect();
    drop(gate);
    for completion in completions {
        completion.await.unwrap();
    }
    let after = gated.stats();
    assert_eq!((after.completed, after.journal_syncs - before.journal_syncs), (50, 1));
}

#[tokio::test]
async fn each_of_several_calls_gets_its_own_answer_and_keeps_its_own_keys() {
    let gated = GatedStore::new(100);
    drop(gated.store.claim(Key::from("guarded").fingerprint("first payload")).await.unwrap());
    gated.acquire("done").await.complete("first").await.unwrap();
    let gate = gated.block_ask_thread().await;
    let batch = submitted(gated.store.claim_batch(["x", "done", "y"]));
    let claim_y = submitted(gated.store.claim("y"));
    let mismatch = submitted(gated.store.claim(Key::from("guarded").fingerprint("second payload")));
    let claim_z = submitted(gated.store.claim("z"));
    drop(gate);
    let batch: Vec<Claim<Lease>> = batch.await.unwrap().into_iter().map(Result::unwrap).collect();
    let [Claim::Acquired(x), Claim::Completed(done), Claim::Acquired(y)] = &batch[..] else { panic!("{batch:?}") };
    assert_eq!((x.key(), y.key(), done.result()), (Key::from("x"), Key::from("y"), Some(&b"first"[..])));
    assert!(matches!(claim_y.await, Ok(Claim::InProgress(_))), "the batch acquired y first");
    assert!(matches!(mismatch.await, Err(Error::PayloadMismatch { .. })));
    let Claim::Acquired(z) = claim_z.await.unwrap() else { panic!("z is new") };
    assert_eq!(z.key(), Key::from("z"));
    assert_eq!(z.grant().request.len(), 1, "the lease holds no key of another call");
}

#[tokio::test]
async fn a_full_queue_makes_calls_wait_without_blocking_the_thread() {
    let gated = GatedStore::new(3);
    let gate = gated.block_ask_thread().await;
    let claims: Vec<_> = (0..5).map(|i| submitted(gated.store.claim(i.to_string()))).collect();
    let queue = gated.committer().queue(Queue::Ask).unwrap();
    assert_eq!((queue.capacity(), queue.max_capacity()), (0, 3));
    drop(gate);
    for claim in claims {
        assert!(matches!(claim.await, Ok(Claim::Acquired(_))));
    }
}

#[tokio::test]
async fn a_claim_that_is_dropped_in_the_queue_has_no_effect() {
    let gated = GatedStore::new(10);
    let gate = gated.block_ask_thread().await;
    drop(submitted(gated.store.claim("k")));
    drop(gate);
    let lease = gated.acquire("k").await;
    assert_eq!((lease.attempt().number(), lease.attempt().prior()), (1, None));
}

#[tokio::test]
async fn a_claim_that_is_dropped_before_its_answer_is_taken_releases_the_keys() {
    for on_interrupt in [OnInterrupt::Rerun, OnInterrupt::Hold] {
        let gated = GatedStore::with(10, on_interrupt);
        let claim = submitted(gated.store.claim_batch(["k", "l"]));
        // This task runs after the claim, so that the claim has its answer.
        gated.committer().call(Queue::Ask, |_| ()).await.unwrap();
        drop(claim);
        for key in ["k", "l"] {
            let attempt = gated.acquire(key).await.attempt();
            assert_eq!((attempt.number(), attempt.prior()), (2, Some(PriorAttempt::Released)), "{on_interrupt:?}");
        }
    }
}

#[tokio::test]
async fn a_completion_that_is_dropped_in_the_queue_is_stored() {
    let gated = GatedStore::new(10);
    let lease = gated.acquire("k").await;
    let gate = gated.block_commit_thread().await;
    drop(submitted(lease.complete("done")));
    drop(gate);
    let answer = gated.store.claim("k").wait_up_to(Duration::from_secs(60)).await.unwrap();
    assert!(matches!(answer, Claim::Completed(first) if first.result() == Some(b"done")));
}

#[tokio::test]
async fn a_completion_of_an_adapter_that_is_dropped_in_the_queue_keeps_its_key_until_it_is_stored() {
    let gated = GatedStore::new(10);
    let engine: Arc<dyn onlyonce_core::Engine> = gated.store.clone().into();
    let claim = onlyonce_core::EngineLease::claim(&engine, Key::from("k"), Duration::ZERO).await;
    let Ok(Claim::Acquired(lease)) = claim else { panic!("k is new") };
    let gate = gated.block_commit_thread().await;
    let mut completion = Box::pin(lease.complete("done"));
    submit_only(&mut completion);
    drop(completion);
    assert!(matches!(gated.store.claim("k").await, Ok(Claim::InProgress(_))));
    drop(gate);
    let answer = gated.store.claim("k").wait_up_to(Duration::from_secs(60)).await.unwrap();
    assert!(matches!(answer, Claim::Completed(first) if first.result() == Some(b"done")));
}

#[tokio::test]
async fn a_completion_that_is_dropped_before_the_queue_has_room_drops_its_lease() {
    let gated = GatedStore::new(1);
    let (k, other) = (gated.acquire("k").await, gated.acquire("other").await);
    let gate = gated.block_commit_thread().await;
    let fills_the_queue = submitted(other.complete("done"));
    drop(submitted(k.complete("done")));
    let attempt = gated.acquire("k").await.attempt();
    assert_eq!((attempt.number(), attempt.prior()), (2, Some(PriorAttempt::Dropped)));
    drop(gate);
    fills_the_queue.await.unwrap();
}

#[tokio::test]
async fn a_poisoned_store_returns_the_error_to_all_waiting_calls() {
    let gated = GatedStore::new(2);
    let lease = gated.acquire("k").await;
    let waiter = {
        let store = gated.store.clone();
        tokio::spawn(async move { store.claim("k").wait_up_to(Duration::from_secs(600)).await })
    };
    while gated.stats().in_progress < 2 {
        tokio::task::yield_now().await;
    }
    let gate = gated.block_ask_thread().await;
    let claims: Vec<_> = (0..5).map(|i| submitted(gated.store.claim(i.to_string()))).collect();
    gated.engine().health.poison("a test");
    drop(gate);
    for claim in claims {
        assert!(matches!(claim.await, Err(Error::Poisoned { .. })));
    }
    // At once: the lease, which is not finished, would end much later.
    let waited = tokio::time::timeout(Duration::from_secs(10), waiter).await;
    assert!(matches!(waited.unwrap().unwrap(), Err(Error::Poisoned { .. })));
    let failed = lease.complete("done").await.unwrap_err();
    assert!(matches!(failed.error(), Error::Poisoned { .. }), "{failed}");
    let (_, completion, lease) = failed.into_parts();
    assert_eq!((completion.result(), lease.unwrap().key()), (&b"done"[..], Key::from("k")));
}

#[tokio::test]
async fn a_panic_of_a_thread_poisons_the_store_and_fails_all_waiting_calls() {
    let gated = GatedStore::new(10);
    let lease = gated.acquire("k").await;
    let gate = gated.block_ask_thread().await;
    let committer = gated.committer();
    let mut panics = Box::pin(committer.call(Queue::Ask, |_| panic!("the thread panics, as this test intends")));
    submit_only(&mut panics);
    let next_call = submitted(gated.store.claim("l"));
    drop(gate);
    assert!(matches!(panics.await, Err::<(), _>(Error::WriteFailed { .. })));
    // It can be in the round of the task that panicked, and have its answer.
    drop(next_call.await);
    assert!(gated.store.claim("m").await.is_err());
    let failed = lease.complete("done").await.unwrap_err();
    assert!(matches!(failed.error(), Error::Poisoned { .. }), "{failed}");
}

#[tokio::test]
async fn close_runs_the_queued_calls_first() {
    let gated = GatedStore::new(100);
    let lease = gated.acquire("k").await;
    let gates = (gated.block_ask_thread().await, gated.block_commit_thread().await);
    let (claim, completion) = (submitted(gated.store.claim("l")), submitted(lease.complete("done")));
    let close = submitted(gated.store.close());
    drop(gates);
    close.await.unwrap();
    assert!(matches!(claim.await, Ok(Claim::Acquired(_))));
    completion.await.unwrap();
    assert!(matches!(gated.store.claim("m").await, Err(Error::Closed)));
}
