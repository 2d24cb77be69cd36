//! Renewing leases while their work runs.
//!
//! One thread renews for all stores of the process, so that work cannot delay a renewal: neither a handler that blocks its
//! thread nor a runtime whose threads are all busy. A renewal changes only memory, so the thread never waits for a disk.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::task::Waker;
#[cfg(feature = "tokio")]
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::core::Engine;
use super::response::Grant;
use onlyonce_core::Error;

/// Renewals in the length of a lease: two may be missed.
const RENEWALS: u64 = 3;

const THREAD: &str = "onlyonce-renew";

/// Renews a lease three times in its length, until it is dropped. The first renewal happens when it starts.
pub(crate) struct Renewal {
    entry: Arc<Entry>,
}

struct Entry {
    engine: Weak<Engine>,
    grant: Grant,
    period: Duration,
    state: Mutex<State>,
}

struct State {
    /// Its position in the renewer's queue.
    due: Due,
    /// Checked under the lock by each renewal, so that none happens after the end.
    ended: bool,
    lost: Option<Error>,
    waker: Option<Waker>,
}

/// When a renewal is due, and a unique number.
type Due = (Instant, u64);

impl Renewal {
    pub(crate) fn start(engine: &Arc<Engine>, grant: &Grant) -> Self {
        let period = Duration::from_millis((engine.config().lease_ms / RENEWALS).max(1));
        let state = State { due: (Instant::now(), 0), ended: false, lost: None, waker: None };
        let entry = Entry { engine: Arc::downgrade(engine), grant: grant.clone(), period, state: Mutex::new(state) };
        let renewal = Self { entry: Arc::new(entry) };
        // The model checker does not schedule the thread.
        if renewal.entry.renew()
            && !cfg!(shuttle)
            && let Err(error) = RENEWER.add(&renewal.entry)
        {
            let error = Error::io("starting a thread for", engine.path(), error);
            tracing::error!(error = error.chain(), "a lease is not renewed while its work runs");
            renewal.entry.state.lock().lost = Some(error);
        }
        renewal
    }

    /// Why the lease is no longer renewed, if it is not.
    pub(crate) fn lost(&self) -> Option<Error> {
        self.entry.state.lock().lost.clone()
    }

    /// As [`Renewal::lost`]; wakes the task when there is an answer.
    #[cfg(feature = "tokio")]
    pub(crate) fn poll_lost(&self, context: &Context<'_>) -> Poll<Error> {
        let mut state = self.entry.state.lock();
        if let Some(error) = &state.lost {
            return Poll::Ready(error.clone());
        }
        let before = match &state.waker {
            Some(waker) if waker.will_wake(context.waker()) => None,
            _ => state.waker.replace(context.waker().clone()),
        };
        // Dropping a waker runs caller code, so it happens without a lock.
        drop(state);
        drop(before);
        Poll::Pending
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        let due = {
            let mut state = self.entry.state.lock();
            state.ended = true;
            state.due
        };
        RENEWER.remove(due);
    }
}

impl Entry {
    /// Renews the lease. False if it needs no more renewals.
    fn renew(&self) -> bool {
        let engine = self.engine.upgrade();
        let waker = {
            let mut state = self.state.lock();
            if state.ended || state.lost.is_some() {
                return false;
            }
            let renewed = engine.as_ref().map_or(Err(Error::Closed), |engine| engine.keep_renewed(&self.grant));
            state.lost = match renewed {
                Ok(true) => return true,
                Ok(false) => Some(self.grant.superseded()),
                Err(error) => Some(error),
            };
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        false
    }

    /// Ends the renewal after a panic, and poisons the store if its clock panicked.
    fn handle_panic(&self) {
        let reason = format!("the thread {THREAD} panicked");
        let waker = {
            let mut state = self.state.lock();
            if state.lost.is_some() {
                // The waker panicked, not the store's clock.
                return;
            }
            state.lost = Some(Error::Poisoned { reason: reason.clone() });
            state.waker.take()
        };
        if let Some(engine) = self.engine.upgrade() {
            engine.health.poison(&reason);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

static RENEWER: Renewer =
    Renewer { queue: Mutex::new(Queue { due: BTreeMap::new(), next: 0, is_running: false }), changed: Condvar::new() };

/// The renewals of all stores, and the thread that runs them.
struct Renewer {
    queue: Mutex<Queue>,
    /// Notified when a new entry is the first.
    changed: Condvar,
}

struct Queue {
    /// At most one entry for each renewal: a renewal removes its entry when it ends.
    due: BTreeMap<Due, Arc<Entry>>,
    next: u64,
    /// The thread starts with the first entry and never ends.
    is_running: bool,
}

impl Renewer {
    fn add(&'static self, entry: &Arc<Entry>) -> std::io::Result<()> {
        let mut queue = self.queue.lock();
        if !queue.is_running {
            std::thread::Builder::new().name(THREAD.to_owned()).spawn(|| self.run())?;
            queue.is_running = true;
        }
        if queue.put(entry) {
            self.changed.notify_one();
        }
        Ok(())
    }

    fn remove(&self, due: Due) {
        let removed = self.queue.lock().due.remove(&due);
        // Without the lock: dropping the entry's waker runs caller code.
        drop(removed);
    }

    fn run(&self) {
        let mut queue = self.queue.lock();
        loop {
            match queue.due.first_key_value() {
                None => self.changed.wait(&mut queue),
                Some((&(at, _), _)) if at > Instant::now() => {
                    self.changed.wait_until(&mut queue, at);
                }
                Some(_) => {
                    let Some((_, entry)) = queue.due.pop_first() else { continue };
                    if MutexGuard::unlocked(&mut queue, || renew(&entry)) {
                        queue.put(&entry);
                    }
                    // If the work has ended meanwhile, this drops its waker, which runs caller code.
                    MutexGuard::unlocked(&mut queue, || drop(catch_unwind(AssertUnwindSafe(|| drop(entry)))));
                }
            }
        }
    }
}

impl Queue {
    /// Adds an entry that is due one period from now, unless its renewal has ended. True if it is the first.
    fn put(&mut self, entry: &Arc<Entry>) -> bool {
        let mut state = entry.state.lock();
        if state.ended {
            return false;
        }
        self.next += 1;
        state.due = (Instant::now() + entry.period, self.next);
        self.due.insert(state.due, Arc::clone(entry));
        self.due.first_key_value().is_some_and(|(first, _)| *first == state.due)
    }
}

/// Renews a lease. A store's clock and a task's waker run caller code: a panic there must not end the thread, which all stores
/// share.
fn renew(entry: &Entry) -> bool {
    match catch_unwind(AssertUnwindSafe(|| entry.renew())) {
        Ok(is_needed) => is_needed,
        Err(_) => {
            let _ = catch_unwind(AssertUnwindSafe(|| entry.handle_panic()));
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::clock::{Clock, ManualClock};
    use crate::config::Options;
    use crate::fs::directory::Directory;
    use onlyonce_core::Claim;

    const LEASE: Duration = Duration::from_millis(60);

    fn engine(dir: &tempfile::TempDir, lease: Duration, clock: impl Clock) -> Arc<Engine> {
        let directory = Directory::acquire(&dir.path().join("store"), Duration::ZERO).unwrap();
        let options = Options { lease, clock: Arc::new(clock), ..Options::default() };
        Arc::new(Engine::open(directory, &options).unwrap())
    }

    fn grant(engine: &Arc<Engine>, key: &str) -> Grant {
        match engine.claim(&engine.request([key]).unwrap()).unwrap().pop() {
            Some(Ok(Claim::Acquired(grant))) => grant,
            other => panic!("{key} should be free, but is {other:?}"),
        }
    }

    /// The number of this store's leases in the queue.
    fn queued(engine: &Arc<Engine>) -> usize {
        let engine = Arc::downgrade(engine);
        RENEWER.queue.lock().due.values().filter(|entry| entry.engine.ptr_eq(&engine)).count()
    }

    fn wait_until(what: &str, mut is_true: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !is_true() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_ended_renewal_is_removed_from_the_queue() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, LEASE, ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1)));
        let grants: Vec<Grant> = (0..50).map(|i| grant(&engine, &i.to_string())).collect();
        let renewals: Vec<Renewal> = grants.iter().map(|grant| Renewal::start(&engine, grant)).collect();
        for _ in 0..1_000 {
            drop(Renewal::start(&engine, &grants[0]));
        }
        // The thread may have taken one out of the queue.
        wait_until("all are queued", || queued(&engine) == 50);
        drop(renewals);
        assert_eq!(queued(&engine), 0);
        std::thread::sleep(LEASE);
        assert_eq!(queued(&engine), 0, "none is queued again");
        assert_eq!(Arc::strong_count(&engine), 1);
    }

    #[test]
    fn concurrent_renewals_lose_no_lease() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, LEASE * 5, crate::clock::SystemClock::new());
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let engine = &engine;
                scope.spawn(move || {
                    for round in 0..8_u64 {
                        let key = format!("{thread}-{round}");
                        let grant = grant(engine, &key);
                        let renewal = Renewal::start(engine, &grant);
                        std::thread::sleep(Duration::from_millis(round * 300 % 700));
                        let other = engine.claim(&engine.request([&key]).unwrap()).unwrap().pop();
                        assert!(matches!(other, Some(Ok(Claim::InProgress { .. }))), "{key}: {other:?}");
                        assert!(renewal.lost().is_none());
                    }
                });
            }
        });
        assert_eq!(queued(&engine), 0);
    }

    /// A clock that panics in the renewal thread once it is armed.
    struct Panics {
        clock: ManualClock,
        armed: Arc<AtomicBool>,
    }

    impl Clock for Panics {
        fn wall(&self) -> onlyonce_core::Timestamp {
            self.clock.wall()
        }

        fn monotonic_ms(&self) -> u64 {
            let is_renewal = std::thread::current().name() == Some(THREAD);
            assert!(!(is_renewal && self.armed.load(Ordering::SeqCst)), "the clock panics, as it should");
            self.clock.monotonic_ms()
        }
    }

    #[test]
    fn a_clock_that_panics_poisons_its_store_and_no_other() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1));
        let armed = Arc::new(AtomicBool::new(false));
        let broken = engine(&dirs[0], LEASE, Panics { clock: clock.clone(), armed: Arc::clone(&armed) });
        let sound = engine(&dirs[1], LEASE, clock.clone());
        let grants = [grant(&broken, "k"), grant(&sound, "k")];
        let (lost, kept) = (Renewal::start(&broken, &grants[0]), Renewal::start(&sound, &grants[1]));
        armed.store(true, Ordering::SeqCst);
        wait_until("the loss is reported", || lost.lost().is_some());
        assert!(matches!(lost.lost(), Some(Error::Poisoned { .. })), "{:?}", lost.lost());
        wait_until("the store is poisoned", || broken.request(["k"]).is_err());
        for _ in 0..5 {
            clock.advance(LEASE / 2);
            wait_until("the other store's lease is renewed", || sound.remaining_ms(&grants[1]) == 60);
        }
        assert!(kept.lost().is_none());
    }

    #[cfg(feature = "tokio")]
    #[test]
    fn a_lost_lease_wakes_its_task_once_and_a_panicking_waker_stops_no_renewal() {
        use std::sync::atomic::AtomicUsize;

        struct Wakes(AtomicUsize);
        impl std::task::Wake for Wakes {
            fn wake(self: Arc<Self>) {
                self.0.fetch_add(1, Ordering::SeqCst);
                panic!("the waker panics, as it should");
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(&dir, LEASE, ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1)));
        let grants = [grant(&engine, "a"), grant(&engine, "b")];
        let renewals = [0, 1].map(|i| Renewal::start(&engine, &grants[i]));
        let wakes = [0, 1].map(|_| Arc::new(Wakes(AtomicUsize::new(0))));
        for i in [0, 1, 0, 1] {
            let waker = Waker::from(Arc::clone(&wakes[i]));
            assert!(renewals[i].poll_lost(&Context::from_waker(&waker)).is_pending());
        }
        for i in [0, 1] {
            engine.abandon(&grants[i]);
            wait_until("it is woken", || wakes[i].0.load(Ordering::SeqCst) == 1);
            let lost = renewals[i].poll_lost(&Context::from_waker(Waker::noop()));
            assert!(matches!(lost, Poll::Ready(Error::Superseded { .. })), "{lost:?}");
        }
        assert_eq!(engine.health.poisoned(), None);
        assert!(matches!(Renewal::start(&engine, &grants[0]).lost(), Some(Error::Superseded { .. })), "at once");
    }
}
