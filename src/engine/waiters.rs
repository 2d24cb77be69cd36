//! Who waits in this process for a key's holder to be done, and is woken then.
//!
//! Whoever waits takes a slot first and asks for the key afterwards; whoever ends the work says so in the hot table
//! first and looks for slots afterwards. One of the two sees the other.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::testing::sync_shim::{AtomicUsize, Mutex, Thread, current, fence, park, park_timeout};

/// The slots of a store. Costs whoever ends work one look at a counter where nobody waits.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    count: AtomicUsize,
    /// By digest: two keys of one digest are woken together, and ask again.
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
    /// A slot to wait for the next end of work on a key. Ask for the key once more before you wait.
    pub(crate) fn enter(self: &Arc<Self>, digest: u64) -> Waiter {
        let slot = Arc::new(WaitSlot { digest, state: Mutex::new(State::Parked(None)) });
        let mut slots = self.slots.lock();
        self.count.fetch_add(1, Ordering::SeqCst);
        slots.entry(digest).or_default().push(Arc::clone(&slot));
        drop(slots);
        fence(Ordering::SeqCst);
        Waiter { waiters: Arc::clone(self), slot }
    }

    /// Wakes who waits for these keys. Called after what they wait for can be seen.
    pub(super) fn wake(&self, digests: impl IntoIterator<Item = u64>) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        for digest in digests {
            let woken = self.slots.lock().remove(&digest).unwrap_or_default();
            self.call(woken);
        }
    }

    /// Wakes everybody: the store has an error for each of them.
    pub(super) fn wake_all(&self) {
        let woken = std::mem::take(&mut *self.slots.lock());
        self.call(woken.into_values().flatten());
    }

    fn call(&self, woken: impl IntoIterator<Item = Arc<WaitSlot>>) {
        for slot in woken {
            self.count.fetch_sub(1, Ordering::SeqCst);
            let before = std::mem::replace(&mut *slot.state.lock(), State::Woken);
            // With no lock held: a waker may run code of its own.
            if let State::Parked(Some(waker)) = before {
                waker.wake();
            }
        }
    }

    fn leave(&self, slot: &Arc<WaitSlot>) {
        let mut slots = self.slots.lock();
        let Some(here) = slots.get_mut(&slot.digest) else { return };
        let before = here.len();
        here.retain(|other| !Arc::ptr_eq(other, slot));
        self.count.fetch_sub(before - here.len(), Ordering::SeqCst);
        if here.is_empty() {
            slots.remove(&slot.digest);
        }
    }
}

/// A slot in [`Waiters`], until it is dropped. As a future, done when it is woken.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiters: Arc<Waiters>,
    slot: Arc<WaitSlot>,
}

impl Waiter {
    /// Blocks the thread until it is woken, or until `end`. `None`: however long it takes.
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
    fn an_end_wakes_all_that_wait_for_its_key_and_nobody_else() {
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
    fn who_leaves_or_was_woken_takes_no_place() {
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
    fn who_leaves_takes_nobody_elses_place() {
        let waiters = Arc::new(Waiters::default());
        let (left, mut stays) = (waiters.enter(1), waiters.enter(1));
        drop(left);
        assert!(!is_woken(&mut stays));
        waiters.wake([1]);
        assert!(is_woken(&mut stays));
    }

    #[test]
    fn a_thread_sleeps_until_it_is_woken_or_its_time_is_over() {
        let waiters = Arc::new(Waiters::default());
        let begun = Instant::now();
        waiters.enter(1).block_until(Some(begun + Duration::from_millis(30)));
        assert!(begun.elapsed() >= Duration::from_millis(30));
        let waiter = waiters.enter(1);
        let sleeper = std::thread::spawn(move || waiter.block_until(None));
        waiters.wake([1]);
        sleeper.join().unwrap();
    }

    #[test]
    fn an_end_between_the_question_and_the_sleep_is_not_missed() {
        let (waiters, done) = (Arc::new(Waiters::default()), AtomicUsize::new(0));
        for round in 1..=if cfg!(miri) { 10 } else { 2_000 } {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    done.store(round, Ordering::Release);
                    waiters.wake([5]);
                });
                let waiter = waiters.enter(5);
                if done.load(Ordering::Acquire) < round {
                    // Forever, were the end missed.
                    waiter.block_until(None);
                }
            });
        }
    }
}
