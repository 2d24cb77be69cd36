//! Waiters: calls of this process that wait until work on a key ends.
//!
//! Order: a waiter registers before it checks the key again; a finisher changes the memtable before it looks for waiters. With
//! `SeqCst` fences between the two steps, one of them sees the other. With another order a wakeup could be lost, and the waiter
//! would sleep until its timeout.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::testing::sync_shim::{AtomicUsize, Mutex, Thread, current, fence, park, park_timeout};

/// The wait slots of a store. Finishing a key without waiters costs one atomic load.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    count: AtomicUsize,
    /// By digest. Waiters of two keys with one digest are woken together, and check their key again.
    slots: Mutex<BTreeMap<u64, Vec<Arc<WaitSlot>>>>,
}

#[derive(Debug)]
struct WaitSlot {
    digest: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Parked(Option<Waker>),
    Woken,
}

impl Waiters {
    /// Registers a waiter for the next end of work on a key. Check the key once more before you wait.
    pub(crate) fn enter(self: &Arc<Self>, digest: u64) -> Waiter {
        let slot = Arc::new(WaitSlot { digest, state: Mutex::new(State::Parked(None)) });
        let mut slots = self.slots.lock();
        self.count.fetch_add(1, Ordering::SeqCst);
        slots.entry(digest).or_default().push(Arc::clone(&slot));
        drop(slots);
        fence(Ordering::SeqCst);
        Waiter { waiters: Arc::clone(self), slot }
    }

    /// Wakes the waiters of these keys. Call it after the change of the keys is visible.
    pub(super) fn wake(&self, digests: impl IntoIterator<Item = u64>) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        for digest in digests {
            let woken = self.slots.lock().remove(&digest).unwrap_or_default();
            self.wake_slots(woken);
        }
    }

    /// Wakes all waiters: the store is poisoned or closed, and their calls fail.
    pub(super) fn wake_all(&self) {
        let woken = std::mem::take(&mut *self.slots.lock());
        self.wake_slots(woken.into_values().flatten());
    }

    fn wake_slots(&self, woken: impl IntoIterator<Item = Arc<WaitSlot>>) {
        for slot in woken {
            self.count.fetch_sub(1, Ordering::SeqCst);
            let before = std::mem::replace(&mut *slot.state.lock(), State::Woken);
            // Without a lock: a waker runs caller code.
            if let State::Parked(Some(waker)) = before {
                waker.wake();
            }
        }
    }

    fn leave(&self, slot: &Arc<WaitSlot>) {
        let mut slots = self.slots.lock();
        let Some(of_digest) = slots.get_mut(&slot.digest) else { return };
        let before = of_digest.len();
        of_digest.retain(|other| !Arc::ptr_eq(other, slot));
        self.count.fetch_sub(before - of_digest.len(), Ordering::SeqCst);
        if of_digest.is_empty() {
            slots.remove(&slot.digest);
        }
    }
}

/// A registered wait slot, until it is dropped. As a future, it is ready once it is woken.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiters: Arc<Waiters>,
    slot: Arc<WaitSlot>,
}

impl Waiter {
    /// Blocks the thread until the slot is woken, or until `end`. `None`: without a timeout.
    pub(crate) fn block_until(mut self, end: Option<Instant>) {
        let waker = Waker::from(Arc::new(Unpark(current())));
        let mut context = Context::from_waker(&waker);
        while Pin::new(&mut self).poll(&mut context).is_pending() {
            match end.map(|end| end.saturating_duration_since(Instant::now())) {
                None => park(),
                Some(left) if left.is_zero() => return,
                Some(left) => park_timeout(left),
            }
        }
    }
}

impl Future for Waiter {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &mut *self.slot.state.lock() {
            State::Woken => Poll::Ready(()),
            State::Parked(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if matches!(*self.slot.state.lock(), State::Parked(_)) {
            self.waiters.leave(&self.slot);
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn is_woken(waiter: &mut Waiter) -> bool {
        Pin::new(waiter).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn a_finished_key_wakes_all_its_waiters_and_no_others() {
        let waiters = Arc::new(Waiters::default());
        let (mut a, mut b, mut other) = (waiters.enter(1), waiters.enter(1), waiters.enter(2));
        assert!(!is_woken(&mut a) && !is_woken(&mut b) && !is_woken(&mut other));
        waiters.wake([1, 7]);
        assert!(is_woken(&mut a) && is_woken(&mut b) && !is_woken(&mut other));
        waiters.wake_all();
        assert!(is_woken(&mut other));
        assert_eq!(waiters.count.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn dropped_and_woken_waiters_leave_no_slot() {
        let waiters = Arc::new(Waiters::default());
        let woken = waiters.enter(1);
        waiters.wake([1]);
        let (left, stays) = (waiters.enter(1), waiters.enter(1));
        drop((woken, left));
        assert_eq!(waiters.count.load(Ordering::SeqCst), 1);
        drop(stays);
        assert_eq!(waiters.count.load(Ordering::SeqCst), 0);
        assert!(waiters.slots.lock().is_empty());
    }

    #[test]
    fn a_dropped_waiter_keeps_the_slots_of_others() {
        let waiters = Arc::new(Waiters::default());
        let (left, mut stays) = (waiters.enter(1), waiters.enter(1));
        drop(left);
        assert!(!is_woken(&mut stays));
        waiters.wake([1]);
        assert!(is_woken(&mut stays));
    }

    #[test]
    fn a_blocked_waiter_returns_when_it_is_woken_or_its_timeout_is_over() {
        let waiters = Arc::new(Waiters::default());
        let started = Instant::now();
        waiters.enter(1).block_until(Some(started + Duration::from_millis(30)));
        assert!(started.elapsed() >= Duration::from_millis(30));
        let waiter = waiters.enter(1);
        let sleeper = std::thread::spawn(move || waiter.block_until(None));
        waiters.wake([1]);
        sleeper.join().unwrap();
    }

    #[test]
    fn a_wakeup_between_the_check_and_the_wait_is_not_lost() {
        let (waiters, done) = (Arc::new(Waiters::default()), AtomicUsize::new(0));
        for round in 1..=if cfg!(miri) { 10 } else { 2_000 } {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    done.store(round, Ordering::Release);
                    waiters.wake([5]);
                });
                let waiter = waiters.enter(5);
                if done.load(Ordering::Acquire) < round {
                    // Blocks forever if the wakeup is lost.
                    waiter.block_until(None);
                }
            });
        }
    }
}
