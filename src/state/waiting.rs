//! Who waits in this process for a key's holder to be done, and is woken then.
//!
//! Whoever waits takes a place first and asks for the key afterwards; whoever ends the work says so in the hot table
//! first and looks for places afterwards. One of the two sees the other.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Wake, Waker};
use std::time::Instant;

use crate::concurrency::{AtomicUsize, Mutex, Thread, current, fence, park, park_timeout};

/// The places of a store. Costs whoever ends work one look at a counter where nobody waits.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    count: AtomicUsize,
    /// By digest: two keys of one digest are woken together, and ask again.
    places: Mutex<BTreeMap<u64, Vec<Arc<Place>>>>,
}

#[derive(Debug)]
struct Place {
    digest: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Waiting(Option<Waker>),
    Woken,
}

impl Waiting {
    /// A place to wait for the next end of work on a key. Ask for the key once more before you wait.
    pub(crate) fn enter(self: &Arc<Self>, digest: u64) -> Waiter {
        let place = Arc::new(Place { digest, state: Mutex::new(State::Waiting(None)) });
        let mut places = self.places.lock();
        self.count.fetch_add(1, Ordering::SeqCst);
        places.entry(digest).or_default().push(Arc::clone(&place));
        drop(places);
        fence(Ordering::SeqCst);
        Waiter { waiting: Arc::clone(self), place }
    }

    /// Wakes who waits for these keys. Called after what they wait for can be seen.
    pub(super) fn wake(&self, digests: impl IntoIterator<Item = u64>) {
        fence(Ordering::SeqCst);
        if self.count.load(Ordering::SeqCst) == 0 {
            return;
        }
        for digest in digests {
            let woken = self.places.lock().remove(&digest).unwrap_or_default();
            self.call(woken);
        }
    }

    /// Wakes everybody: the store has an error for each of them.
    pub(super) fn wake_all(&self) {
        let woken = std::mem::take(&mut *self.places.lock());
        self.call(woken.into_values().flatten());
    }

    fn call(&self, woken: impl IntoIterator<Item = Arc<Place>>) {
        for place in woken {
            self.count.fetch_sub(1, Ordering::SeqCst);
            let before = std::mem::replace(&mut *place.state.lock(), State::Woken);
            // With no lock held: a waker may run code of its own.
            if let State::Waiting(Some(waker)) = before {
                waker.wake();
            }
        }
    }

    fn leave(&self, place: &Arc<Place>) {
        let mut places = self.places.lock();
        let Some(here) = places.get_mut(&place.digest) else { return };
        let before = here.len();
        here.retain(|other| !Arc::ptr_eq(other, place));
        self.count.fetch_sub(before - here.len(), Ordering::SeqCst);
        if here.is_empty() {
            places.remove(&place.digest);
        }
    }
}

/// A place in [`Waiting`], until it is dropped. As a future, done when it is woken.
#[derive(Debug)]
pub(crate) struct Waiter {
    waiting: Arc<Waiting>,
    place: Arc<Place>,
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
        match &mut *self.place.state.lock() {
            State::Woken => Poll::Ready(()),
            State::Waiting(waker) => {
                *waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if matches!(*self.place.state.lock(), State::Waiting(_)) {
            self.waiting.leave(&self.place);
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
        let waiting = Arc::new(Waiting::default());
        let (mut a, mut b, mut other) = (waiting.enter(1), waiting.enter(1), waiting.enter(2));
        assert!(!is_woken(&mut a) && !is_woken(&mut b) && !is_woken(&mut other));
        waiting.wake([1, 7]);
        assert!(is_woken(&mut a) && is_woken(&mut b) && !is_woken(&mut other));
        waiting.wake_all();
        assert!(is_woken(&mut other));
        assert_eq!(waiting.count.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn who_leaves_or_was_woken_takes_no_place() {
        let waiting = Arc::new(Waiting::default());
        let woken = waiting.enter(1);
        waiting.wake([1]);
        let (left, stays) = (waiting.enter(1), waiting.enter(1));
        drop((woken, left));
        assert_eq!(waiting.count.load(Ordering::SeqCst), 1);
        drop(stays);
        assert_eq!(waiting.count.load(Ordering::SeqCst), 0);
        assert!(waiting.places.lock().is_empty());
    }

    #[test]
    fn who_leaves_takes_nobody_elses_place() {
        let waiting = Arc::new(Waiting::default());
        let (left, mut stays) = (waiting.enter(1), waiting.enter(1));
        drop(left);
        assert!(!is_woken(&mut stays));
        waiting.wake([1]);
        assert!(is_woken(&mut stays));
    }

    #[test]
    fn a_thread_sleeps_until_it_is_woken_or_its_time_is_over() {
        let waiting = Arc::new(Waiting::default());
        let begun = Instant::now();
        waiting.enter(1).block_until(Some(begun + Duration::from_millis(30)));
        assert!(begun.elapsed() >= Duration::from_millis(30));
        let waiter = waiting.enter(1);
        let sleeper = std::thread::spawn(move || waiter.block_until(None));
        waiting.wake([1]);
        sleeper.join().unwrap();
    }

    #[test]
    fn an_end_between_the_question_and_the_sleep_is_not_missed() {
        let (waiting, done) = (Arc::new(Waiting::default()), AtomicUsize::new(0));
        for round in 1..=if cfg!(miri) { 10 } else { 2_000 } {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    done.store(round, Ordering::Release);
                    waiting.wake([5]);
                });
                let waiter = waiting.enter(5);
                if done.load(Ordering::Acquire) < round {
                    // Forever, were the end missed.
                    waiter.block_until(None);
                }
            });
        }
    }
}
