//! Awaited calls: the same answers as blocking calls, shared syncs, and dropped futures, which leave no key stuck.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use crate::common::Bench;
use onlyonce::{
    Claim, Completion, Durability, Error, Key, KeyError, KeyStatus, Lease, LeaseState, PriorAttempt, RecordOutcome,
    RunError, RunOutcome, Store, StoredKey, Unclaimed, UnclaimedReason,
};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio_stream::StreamExt;

const LONG: Duration = Duration::from_secs(60);

fn open(dir: &tempfile::TempDir, durability: Durability, lease: Duration) -> Store {
    let builder = Store::builder().durability(durability).lease(lease).memory_budget(32 << 20);
    builder.open(dir.path().join("store")).unwrap()
}

async fn acquire(store: &Store, key: &str) -> Lease {
    acquired(store.claim(key).await.unwrap())
}

fn acquired(claim: Claim) -> Lease {
    match claim {
        Claim::Acquired(lease) => lease,
        other => panic!("the key should be unclaimed, but is {other:?}"),
    }
}

/// Polls a future `polls` times, and drops it.
struct Cut<F> {
    future: Pin<Box<F>>,
    polls: u32,
}

impl<F: Future> Future for Cut<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.polls == 0 {
            return Poll::Ready(None);
        }
        self.polls -= 1;
        match self.future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if self.polls == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

#[test]
fn awaited_calls_give_the_answers_of_blocking_calls() {
    let bench = Bench::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = bench.store().clone();
        assert_eq!(store.check("k").await.unwrap(), KeyStatus::New);
        let mut lease = acquire(&store, "k").await;
        assert_eq!((lease.key(), lease.attempt().number(), lease.attempt().prior()), (Key::from("k"), 1, None));
        bench.advance_ms(400);
        assert_eq!(lease.remaining(), Duration::from_millis(600));
        lease.renew().unwrap();
        assert_eq!(lease.remaining(), Duration::from_secs(1));
        assert!(matches!(store.claim("k").await.unwrap(), Claim::InProgress(other) if other.attempt == 1));
        let stored = store.inspect("k").await.unwrap();
        assert!(matches!(stored, Some(StoredKey::Processing { state: LeaseState::Leased(_), .. })), "{stored:?}");
        lease.release().after(Duration::from_millis(500)).await.unwrap();
        assert!(matches!(store.claim("k").await.unwrap(), Claim::InProgress(_)));
        bench.advance_ms(500);
        let lease = acquire(&store, "k").await;
        assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Released)));
        lease.complete(Completion::encode(&("charged".to_owned(), 12)).unwrap()).await.unwrap();
        let Claim::Completed(first) = store.claim("k").await.unwrap() else { panic!("k is completed") };
        assert_eq!(first.result_as::<(String, i32)>().unwrap(), Some(("charged".to_owned(), 12)));
        assert!(matches!(store.check("k").await.unwrap(), KeyStatus::Completed(_)));

        acquire(&store, "o").await.complete(Completion::new("").offset("orders", 3, 9)).await.unwrap();
        assert_eq!(store.offset("orders", 3).await.unwrap(), Some(9));
        store.set_offset("orders", 3, 10).await.unwrap();
        assert_eq!(store.offset("orders", 3).await.unwrap(), Some(10));
        acquire(&store, "m").await.complete(Completion::new("").message("mails", "m", "hello")).await.unwrap();
        let outbox = store.outbox(10).await.unwrap();
        assert_eq!((outbox.len(), &outbox[0].payload[..]), (1, &b"hello"[..]));
        store.remove_messages([outbox[0].id]).await.unwrap();
        assert!(store.outbox(10).await.unwrap().is_empty());

        assert_eq!(store.record("r").await.unwrap(), RecordOutcome::First);
        assert_eq!(store.record("r").await.unwrap(), RecordOutcome::Duplicate { in_flight: false });
        assert!(matches!(store.claim("").await, Err(Error::Key(KeyError::Empty { .. }))));
        drop(store.claim(Key::from("g").fingerprint("hers")).await.unwrap());
        let his = store.claim(Key::from("g").fingerprint("his")).await;
        assert!(matches!(his, Err(Error::PayloadMismatch { .. })));
        let late = acquire(&store, "late").await;
        bench.advance_ms(1_000);
        let held = acquire(&store, "late").await;
        let failed = late.complete("late").await.unwrap_err();
        assert!(matches!(failed.error(), Error::Superseded { .. }) && failed.completion().result() == b"late");
        drop(held);
    });
    assert_eq!(
        bench.acquire("late").attempt().prior(),
        Some(PriorAttempt::Dropped),
        "awaited and blocking calls share the store"
    );
}

#[test]
fn batches_answer_for_each_key_and_return_foreign_leases() {
    let (bench, other) = (Bench::new(), Bench::new());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (store, other) = (bench.store().clone(), other.store().clone());
        let mut claims = store.claim_batch(["a", "b", "a"]).await.unwrap().into_iter().map(Result::unwrap);
        let (a, b) = (acquired(claims.next().unwrap()), acquired(claims.next().unwrap()));
        assert!(matches!(claims.next(), Some(Claim::InProgress(_))));
        let foreign = acquire(&other, "f").await;
        let mut answers = store.complete_batch([(a, "1"), (foreign, "2"), (b, "3")]).await.into_iter();
        assert!(answers.next().unwrap().is_ok());
        let (error, result, foreign) = answers.next().unwrap().unwrap_err().into_parts();
        assert!(matches!(error, Error::ForeignLease { .. }) && result.result() == b"2");
        assert!(answers.next().unwrap().is_ok());
        assert!(matches!(store.claim("b").await.unwrap(), Claim::Completed(b) if b.result() == Some(b"3")));

        let mine = acquire(&store, "c").await;
        let released = store.release_batch([(mine, Duration::ZERO), (foreign.unwrap(), Duration::ZERO)]).await;
        assert!(released.iter().all(Result::is_ok), "{released:?}");
        for (store, key) in [(&store, "c"), (&other, "f")] {
            assert_eq!(acquire(store, key).await.attempt().prior(), Some(PriorAttempt::Released), "{key}");
        }
        let recorded = store.record_batch(["a", "n", "n"]).await.unwrap();
        let recorded: Vec<_> = recorded.into_iter().map(Result::unwrap).collect();
        let duplicate = RecordOutcome::Duplicate { in_flight: false };
        assert_eq!(recorded, [duplicate, RecordOutcome::First, duplicate]);
        let checked = store.check_batch(["a", "never"]).await.unwrap();
        assert!(matches!(checked[..], [Ok(KeyStatus::Completed(_)), Ok(KeyStatus::New)]));
        assert!(store.complete_batch(Vec::<(Lease, Vec<u8>)>::new()).await.is_empty());
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tasks_share_their_syncs() {
    const TASKS: usize = 1_000;
    const ROUNDS: usize = 20;
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Disk, LONG);
    let before = store.stats();
    let begun = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let store = store.clone();
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    acquire(&store, &format!("task-{task}-round-{round}")).await.complete("done").await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let elapsed = begun.elapsed();
    let after = store.stats();
    let (completions, syncs) = (after.completed - before.completed, after.journal_syncs - before.journal_syncs);
    assert_eq!(completions, (TASKS * ROUNDS) as u64);
    let per_sync = completions / syncs;
    eprintln!(
        "{completions} completions, {syncs} syncs: {per_sync} completions per sync, {:.0} completions/s",
        completions as f64 / elapsed.as_secs_f64()
    );
    assert!(per_sync >= 64, "{per_sync} completions per sync");
    store.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn futures_that_are_dropped_at_random_points_leave_no_key_stuck() {
    const TASKS: usize = 64;
    const STEPS: usize = 150;
    const KEYS: usize = 200;
    let seed: u64 = match std::env::var("ONLYONCE_FUTURE_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => rand::random(),
    };
    eprintln!("ONLYONCE_FUTURE_SEED={seed}");
    let dir = tempfile::tempdir().unwrap();
    // Longer than the test, so that a stuck key stays stuck.
    let store = open(&dir, Durability::Process, Duration::from_secs(3_600));
    let holders: Arc<Vec<AtomicUsize>> = Arc::new((0..KEYS).map(|_| AtomicUsize::new(0)).collect());
    let completed: Arc<Vec<AtomicUsize>> = Arc::new((0..KEYS).map(|_| AtomicUsize::new(0)).collect());
    let dropped = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| {
            let (store, holders, completed, dropped) =
                (store.clone(), Arc::clone(&holders), Arc::clone(&completed), Arc::clone(&dropped));
            let mut rng = StdRng::seed_from_u64(seed.wrapping_add(task as u64));
            tokio::spawn(async move {
                for _ in 0..STEPS {
                    let i = rng.random_range(0..KEYS);
                    let mut polls = || if rng.random_bool(0.5) { rng.random_range(0..3) } else { u32::MAX };
                    let (first, second, wait, end) = (polls(), polls(), polls() == 0, polls() % 3);
                    let key = format!("key-{i}");
                    let claim = Box::pin(async {
                        if wait {
                            store.claim(&key).wait_up_to(Duration::from_millis(2)).await
                        } else {
                            store.claim(&key).await
                        }
                    });
                    let Some(claim) = (Cut { future: claim, polls: first }).await else {
                        dropped.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    let Claim::Acquired(lease) = claim.unwrap() else { continue };
                    assert_eq!(holders[i].fetch_add(1, Ordering::SeqCst), 0, "two holders of {key}");
                    tokio::task::yield_now().await;
                    holders[i].fetch_sub(1, Ordering::SeqCst);
                    match end {
                        0 => {
                            let done =
                                Cut { future: Box::pin(lease.complete(key.clone()).into_future()), polls: second }
                                    .await;
                            match done {
                                Some(done) => completed[i].fetch_add(usize::from(done.is_ok()), Ordering::SeqCst),
                                None => dropped.fetch_add(1, Ordering::Relaxed),
                            };
                        }
                        1 => drop(Cut { future: Box::pin(lease.release().into_future()), polls: second }.await),
                        _ => drop(lease),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    for (i, completed) in completed.iter().enumerate() {
        let key = format!("key-{i}");
        let acknowledged = completed.load(Ordering::SeqCst);
        assert!(acknowledged <= 1, "{key} was completed {acknowledged} times");
        match store.claim(&key).wait_up_to(Duration::from_secs(20)).await.unwrap() {
            Claim::Completed(first) => assert_eq!(first.result(), Some(key.as_bytes())),
            Claim::Acquired(_) => assert_eq!(acknowledged, 0, "{key} was completed, but is new"),
            Claim::InProgress(_) => panic!("{key} is stuck"),
        }
    }
    let dropped = dropped.load(Ordering::Relaxed);
    assert!(dropped > 1_000, "only {dropped} futures were dropped");
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_waiting_claim_is_woken_by_the_completion_and_returns_its_result() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let lease = acquire(&store, "k").await;
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.claim("k").wait_up_to(LONG).await.unwrap() })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let claims = store.stats().in_progress;
    assert_eq!(claims, 100, "each call claims once, registers as a waiter and claims again: none polls");
    lease.complete("first").await.unwrap();
    for waiter in waiters {
        assert!(matches!(waiter.await.unwrap(), Claim::Completed(first) if first.result() == Some(b"first")));
    }
}

#[tokio::test]
async fn a_waiting_claim_acquires_a_key_whose_lease_is_released_dropped_or_expired() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, Duration::from_millis(500));
    let begun = Instant::now();
    for (end, prior) in
        [("release", PriorAttempt::Released), ("drop", PriorAttempt::Dropped), ("nothing", PriorAttempt::LeaseExpired)]
    {
        let lease = acquire(&store, end).await;
        let waiter = {
            let store = store.clone();
            tokio::spawn(async move { store.claim(end).wait_up_to(LONG).await.unwrap() })
        };
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!waiter.is_finished());
        let held = match end {
            "release" => {
                lease.release().await.unwrap();
                None
            }
            "drop" => {
                drop(lease);
                None
            }
            _ => Some(lease),
        };
        let got = acquired(waiter.await.unwrap());
        assert_eq!((got.attempt().number(), got.attempt().prior()), (2, Some(prior)), "{end}");
        drop((held, got));
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "woken before the limit");
}

#[tokio::test]
async fn a_waiting_claim_returns_in_progress_after_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let _lease = acquire(&store, "k").await;
    let begun = Instant::now();
    let answer = store.claim("k").wait_up_to(Duration::from_millis(100)).await.unwrap();
    assert!(matches!(answer, Claim::InProgress(_)), "{answer:?}");
    assert!((Duration::from_millis(100)..Duration::from_secs(20)).contains(&begun.elapsed()));
    let at_once = store.claim("k").wait_up_to(Duration::ZERO).await.unwrap();
    assert!(matches!(at_once, Claim::InProgress(_)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_kept_alive_outlives_its_length() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, Duration::from_millis(600));
    let mut lease = acquire(&store, "k").await;
    let work = async {
        let end = Instant::now() + Duration::from_millis(1_500);
        while Instant::now() < end {
            assert!(matches!(store.claim("k").await.unwrap(), Claim::InProgress(_)), "the lease was taken over");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        "done"
    };
    let result = lease.keep_alive().during(work).await.unwrap();
    assert!(!lease.remaining().is_zero(), "`remaining` includes the renewals");
    lease.complete(result).await.unwrap();
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(store.stats().superseded, 0, "no renewal after the end");
}

/// Runs a future on a new thread, in a runtime without another thread.
fn on_one_thread<F: Future<Output: Send>>(future: impl FnOnce() -> F + Send) -> F::Output {
    std::thread::scope(|scope| {
        let work = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future());
        scope.spawn(work).join().unwrap()
    })
}

/// Work that blocks its thread for several lease lengths, while other calls claim its key.
struct Blocking<'a> {
    store: &'a onlyonce::Store,
    begun: std::sync::mpsc::Sender<()>,
    runs: &'a AtomicUsize,
}

impl Blocking<'_> {
    const LEASE: Duration = Duration::from_millis(300);

    /// Runs `work`, which blocks, and asserts that no other call acquires its key, and that its result is stored.
    fn keeps_its_key(work: impl FnOnce(Blocking<'_>) + Send) {
        let dir = tempfile::tempdir().unwrap();
        let builder = Store::builder().lease(Self::LEASE).durability(Durability::Process);
        let store = builder.memory_budget(32 << 20).open(dir.path().join("store")).unwrap();
        let (begun, has_begun) = std::sync::mpsc::channel();
        let runs = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let working = scope.spawn(|| work(Blocking { store: &store, begun, runs: &runs }));
            has_begun.recv().unwrap();
            while !working.is_finished() {
                match store.claim("k").wait().unwrap() {
                    Claim::Acquired(lease) => panic!("another call acquired the key: {lease:?}"),
                    Claim::InProgress(_) => std::thread::sleep(Duration::from_millis(10)),
                    Claim::Completed(_) => break,
                }
            }
        });
        let claim = store.claim("k").wait().unwrap();
        assert!(matches!(claim, Claim::Completed(first) if first.result() == Some(b"done")));
        assert_eq!((runs.into_inner(), store.stats().superseded), (1, 0));
        store.close().wait().unwrap();
    }

    fn block(&self) -> &'static str {
        self.runs.fetch_add(1, Ordering::SeqCst);
        self.begun.send(()).unwrap();
        std::thread::sleep(Self::LEASE * 5);
        "done"
    }
}

#[test]
fn a_lease_is_renewed_while_its_work_blocks_the_only_thread() {
    Blocking::keeps_its_key(|blocking| {
        on_one_thread(async || {
            let store = blocking.store.clone();
            let mut lease = acquire(&store, "k").await;
            let result = lease.keep_alive().during(async { blocking.block() }).await.unwrap();
            lease.complete(result).await.unwrap();
        });
    });
}

#[test]
fn a_lease_of_run_is_renewed_while_its_work_blocks_the_only_thread() {
    Blocking::keeps_its_key(|blocking| {
        on_one_thread(async || {
            let store = blocking.store.clone();
            let work = async |_: &mut Lease| Ok::<_, Error>(blocking.block().into());
            assert!(matches!(store.run_async("k", work).await, Ok(RunOutcome::First(_))));
        });
    });
}

#[test]
fn a_lease_is_renewed_while_a_blocking_call_works() {
    Blocking::keeps_its_key(|blocking| {
        let work = |lease: &mut onlyonce::Lease| {
            let result = blocking.block();
            assert!(!lease.remaining().is_zero(), "`remaining` includes the renewals");
            Ok::<_, Error>(result.into())
        };
        assert!(matches!(blocking.store.run("k", work), Ok(RunOutcome::First(_))));
    });
    Blocking::keeps_its_key(|blocking| {
        let Claim::Acquired(mut lease) = blocking.store.claim("k").wait().unwrap() else { panic!("k is new") };
        let keep_alive = lease.keep_alive();
        let result = blocking.block();
        assert!(keep_alive.error().is_none());
        drop(keep_alive);
        lease.complete(result).wait().unwrap();
    });
}

#[test]
fn a_lease_is_not_renewed_for_longer_than_renew_for() {
    let dir = tempfile::tempdir().unwrap();
    let (lease, limit) = (Duration::from_millis(100), Duration::from_millis(400));
    let builder = Store::builder().lease(lease).renew_for(limit).memory_budget(32 << 20);
    let store = builder.open(dir.path().join("store")).unwrap();
    let Claim::Acquired(mut hangs) = store.claim("k").wait().unwrap() else { panic!("k is new") };
    let claimed = Instant::now();
    let keep_alive = hangs.keep_alive();
    let next = loop {
        match store.claim("k").wait().unwrap() {
            Claim::Acquired(next) => break next,
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    assert!(claimed.elapsed() >= limit - Duration::from_millis(50), "after {:?}", claimed.elapsed());
    assert_eq!(next.attempt().prior(), Some(PriorAttempt::LeaseExpired));
    // The guard reports the loss, although renewal has ended.
    let deadline = Instant::now() + LONG;
    while keep_alive.error().is_none() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(matches!(keep_alive.error(), Some(Error::Superseded { .. })));
    drop(keep_alive);
    assert!(matches!(hangs.complete("late").wait().unwrap_err().error(), Error::Superseded { .. }));
    for out_of_bounds in [Duration::ZERO, Duration::MAX] {
        let error = Store::builder().renew_for(out_of_bounds).open(dir.path().join("other")).unwrap_err();
        assert!(matches!(error, Error::Config { option: "renew_for", .. }), "{error}");
    }
}

#[test]
fn a_renewal_reports_that_the_store_was_closed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, Duration::from_millis(100));
    on_one_thread(async || {
        let mut lease = acquire(&store, "k").await;
        let mut keep_alive = lease.keep_alive();
        store.close().await.unwrap();
        let lost = tokio::time::timeout(LONG, keep_alive.lost()).await.unwrap();
        assert!(matches!(lost, Error::Closed), "{lost}");
    });
}

#[test]
fn cancelled_work_is_not_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, Duration::from_millis(90));
    on_one_thread(async || {
        for key in ["kept keep_alive", "run"] {
            let hangs = async {
                if key == "run" {
                    drop(store.run_async(key, async |_| std::future::pending::<Result<Vec<u8>, Error>>().await).await);
                } else {
                    let mut lease = acquire(&store, key).await;
                    let _ = lease.keep_alive().during(std::future::pending::<()>()).await;
                }
            };
            assert!(tokio::time::timeout(Duration::from_millis(200), hangs).await.is_err());
            for attempt in [2, 3] {
                let next = acquire(&store, key).await;
                assert_eq!(
                    (next.attempt().number(), next.attempt().prior()),
                    (attempt, Some(PriorAttempt::Dropped)),
                    "{key}"
                );
                drop(next);
                // Enough time for a renewal, which must not happen.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    });
    assert_eq!(store.stats().superseded, 0);
    store.close().wait().unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn one_thread_renews_the_leases_of_all_stores() {
    let named = |name: &str| {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let comm =
            |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm"));
        // Threads of other tests can end at the same time.
        tasks.filter_map(|task| comm(task).ok()).filter(|comm| comm.trim_end() == name).count()
    };
    let dirs: Vec<_> = (0..5).map(|_| tempfile::tempdir().unwrap()).collect();
    let stores: Vec<_> = dirs.iter().map(|dir| open(dir, Durability::Process, LONG)).collect();
    let mut leases: Vec<_> = stores
        .iter()
        .map(|store| if let Ok(Claim::Acquired(lease)) = store.claim("k").wait() { lease } else { panic!("new") })
        .collect();
    let keep_alive: Vec<_> = leases.iter_mut().map(onlyonce::Lease::keep_alive).collect();
    // A thread gets its name only after it has started.
    let deadline = Instant::now() + LONG;
    while named("onlyonce-worker") < stores.len() || named("onlyonce-renew") != 1 {
        let (workers, renewing) = (named("onlyonce-worker"), named("onlyonce-renew"));
        assert!(Instant::now() < deadline, "{workers} background workers, and {renewing} threads that renew");
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(keep_alive);
    stores.iter().for_each(|store| store.close().wait().unwrap());
}

#[test]
fn losing_the_lease_stops_the_work() {
    let bench = Bench::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = bench.store().clone();
        let mut lease = acquire(&store, "k").await;
        let stopped = Arc::new(AtomicUsize::new(0));
        struct Count(Arc<AtomicUsize>);
        impl Drop for Count {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let guard = Count(Arc::clone(&stopped));
        let work = async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        };
        let thief = async {
            loop {
                // A renewal, one every third of a second, can come between the two.
                bench.advance_ms(1_000);
                if let Claim::Acquired(lease) = store.claim("k").await.unwrap() {
                    break lease;
                }
            }
        };
        let (lost, thief) = tokio::join!(lease.keep_alive().during(work), thief);
        assert!(matches!(lost, Err(Error::Superseded { .. })), "{lost:?}");
        assert_eq!(stopped.load(Ordering::SeqCst), 1);
        thief.complete("done").await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_does_the_work_once_and_releases_the_key_if_it_fails() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let failed = store.run_async("k", async |_| Err::<Vec<u8>, _>("declined")).await;
    assert!(matches!(failed, Err(RunError::Work("declined"))), "{failed:?}");
    // On another task, because the future is `Send`.
    let (again, token) = {
        let store = store.clone();
        let work = async move {
            let mut token = 0;
            let ran = store.run_async("k", async |lease: &mut Lease| {
                assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Released)));
                tokio::task::yield_now().await;
                lease.renew().unwrap();
                token = lease.token().get();
                Ok::<_, Error>(b"receipt".to_vec())
            });
            (ran.await.unwrap(), token)
        };
        tokio::spawn(work).await.unwrap()
    };
    assert!(matches!(again, RunOutcome::First(result) if result == b"receipt"));
    let replayed =
        store.run_async("k", async |_| -> Result<Vec<u8>, Error> { panic!("the key is completed") }).await.unwrap();
    assert!(matches!(replayed, RunOutcome::Replayed(first) if first.token().get() == token));
    let _lease = acquire(&store, "held").await;
    let other =
        store.run_async("held", async |_| -> Result<Vec<u8>, Error> { panic!("the key is leased") }).await.unwrap();
    assert!(matches!(other, RunOutcome::InProgress(_)));
}

#[tokio::test]
async fn the_next_claim_reports_cancelled_or_panicked_work() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let hangs = store.run_async("cancelled", async |_| std::future::pending::<Result<Vec<u8>, Error>>().await);
    assert!(tokio::time::timeout(Duration::from_millis(100), hangs).await.is_err());
    let panicking = {
        let store = store.clone();
        tokio::spawn(async move {
            let _ = store
                .run_async("panicked", async |_| -> Result<Vec<u8>, Error> {
                    panic!("the work panics, as this test intends")
                })
                .await;
        })
    };
    assert!(panicking.await.is_err());
    for key in ["cancelled", "panicked"] {
        let lease = acquire(&store, key).await;
        assert_eq!((lease.attempt().number(), lease.attempt().prior()), (2, Some(PriorAttempt::Dropped)), "{key}");
    }
}

#[tokio::test]
async fn a_stream_yields_each_item_until_it_is_completed_and_not_after() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let duplicates = Arc::new(AtomicUsize::new(0));
    let deliveries = tokio_stream::iter(["a", "b", "a", "fails", "b", "c", "fails", "c"]);
    let mut once = store.dedup_stream(deliveries, LONG, |item| Key::from(*item)).on_duplicate({
        let duplicates = Arc::clone(&duplicates);
        move |_, first| {
            assert_eq!(first.result(), Some(&b"done"[..]));
            duplicates.fetch_add(1, Ordering::SeqCst);
        }
    });
    let mut yielded = Vec::new();
    while let Some(next) = once.next().await {
        let (item, lease) = next.unwrap();
        yielded.push((item, lease.attempt().number()));
        match item {
            "fails" if lease.attempt().number() == 1 => drop(lease),
            _ => lease.complete("done").await.unwrap(),
        }
    }
    assert_eq!(yielded, [("a", 1), ("b", 1), ("fails", 1), ("c", 1), ("fails", 2)]);
    assert_eq!(duplicates.load(Ordering::SeqCst), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_waits_for_a_holder_and_returns_items_that_take_too_long() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let (soon, never) = (acquire(&store, "soon").await, acquire(&store, "never").await);
    let mut once =
        store.dedup_stream(tokio_stream::iter(["soon", "never", "", "new"]), Duration::from_millis(300), |item| {
            Key::from(*item)
        });
    let holder = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(50)).await;
        soon.release().await.unwrap();
    });
    let (item, lease) = once.next().await.unwrap().unwrap();
    assert_eq!((item, lease.attempt().prior()), ("soon", Some(PriorAttempt::Released)));
    assert!(matches!(
        once.next().await,
        Some(Err(Unclaimed { item: "never", reason: UnclaimedReason::InProgress(_) }))
    ));
    assert!(matches!(
        once.next().await,
        Some(Err(Unclaimed { item: "", reason: UnclaimedReason::Failed(Error::Key(KeyError::Empty { index: None })) }))
    ));
    assert_eq!(once.next().await.unwrap().unwrap().0, "new");
    assert!(once.next().await.is_none());
    holder.await.unwrap();
    never.complete("done").await.unwrap();
}

#[test]
fn a_superseded_lease_blocks_the_offsets_of_its_own_batch_alone() {
    const BATCHES: u32 = 16;
    let bench = Bench::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
    runtime.block_on(async {
        let store = bench.store().clone();
        let mut batches = Vec::new();
        for batch in 0..BATCHES {
            let late = acquire(&store, &format!("{batch}-late")).await;
            batches.push((batch, vec![(late, 1)]));
        }
        bench.advance_ms(1_000);
        let mut takeovers = Vec::new();
        for (batch, leases) in &mut batches {
            // Every second batch has a superseded lease.
            if *batch % 2 == 0 {
                takeovers.push(acquire(&store, &format!("{batch}-late")).await);
            }
            leases.push((acquire(&store, &format!("{batch}-last")).await, 2));
        }
        // All at the same time, so that they share one write.
        let tasks: Vec<_> = batches
            .into_iter()
            .map(|(batch, leases)| {
                let store = store.clone();
                tokio::spawn(async move {
                    let leases = leases
                        .into_iter()
                        .map(|(lease, offset)| (lease, Completion::new("done").offset("orders", batch, offset)));
                    store.complete_batch(leases).await.iter().map(Result::is_ok).collect::<Vec<_>>()
                })
            })
            .collect();
        for (batch, task) in (0..).zip(tasks) {
            let is_whole = batch % 2 != 0;
            assert_eq!(task.await.unwrap(), [is_whole, true]);
            assert_eq!(store.offset("orders", batch).await.unwrap(), is_whole.then_some(2), "batch {batch}");
        }
    });
}

#[tokio::test]
async fn a_store_closes_in_the_background_when_its_last_handle_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Durability::Process, LONG);
    let lease = acquire(&store, "k").await;
    acquire(&store, "done").await.complete("first").await.unwrap();
    drop(store);
    // The lease is the last handle.
    drop(lease);
    let builder = Store::builder().memory_budget(32 << 20).lock_wait(Duration::from_secs(20));
    let again = builder.open(dir.path().join("store")).unwrap();
    assert!(matches!(again.claim("done").await.unwrap(), Claim::Completed(_)));
    again.close().await.unwrap();
}

#[test]
fn queue_limit_has_bounds() {
    let bench = Bench::new();
    for calls in [0, 1_000_001] {
        let rejected = bench.builder().queue_limit(calls).open(bench.path().with_file_name("other")).unwrap_err();
        assert!(matches!(&rejected, Error::Config { value, .. } if *value == calls.to_string()), "{rejected}");
    }
}

/// The end of a `#[tokio::main]` that does not close its store: the last handle is dropped in the runtime, the runtime ends,
/// and the process exits at once.
#[test]
fn a_process_that_does_not_close_its_store_exits_cleanly_and_loses_nothing() {
    const TEST: &str = "future::a_process_that_does_not_close_its_store_exits_cleanly_and_loses_nothing";
    const DIR: &str = "ONLYONCE_EXIT_STORE";
    if let Some(dir) = std::env::var_os(DIR).filter(|_| crate::child::is_child(TEST)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let store = Store::builder().memory_budget(32 << 20).open(dir).unwrap();
            acquire(&store, "k").await.complete("r").await.unwrap();
        });
        drop(runtime);
        std::process::exit(0);
    }
    let dir = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = dir.path().join(round.to_string());
        let status = crate::child::command(TEST).env(DIR, &path).stdout(std::process::Stdio::null()).status().unwrap();
        assert!(status.success(), "round {round}: {status}");
        let store = Store::builder().lock_wait(Duration::from_secs(10)).open(&path).unwrap();
        assert!(
            matches!(store.check("k").wait().unwrap(), KeyStatus::Completed(first) if first.result() == Some(b"r"))
        );
        store.close().wait().unwrap();
    }
}
