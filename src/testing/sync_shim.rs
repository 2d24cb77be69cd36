//! What threads meet at: locks, atomics, waiting. By one name, so that `tests/shuttle.rs` can have a model checker's in
//! their place, which lets one thread go at a time and decides at each of them who is next.
//!
//! What decides nothing between threads stays outside: figures, clocks, the filter's bits.

#[cfg(shuttle)]
pub(crate) use modelled::*;
#[cfg(not(shuttle))]
pub(crate) use real::*;

#[cfg(not(shuttle))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    pub(crate) use std::thread::{Thread, current, park, park_timeout, sleep, yield_now};

    pub(crate) use arc_swap::{ArcSwap, Guard};
    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
}

#[cfg(shuttle)]
mod modelled {
    use std::sync::Arc;
    use std::time::Duration;

    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    // No time passes here: whoever parks is woken, or the model has found a wake-up that is lost.
    pub(crate) use shuttle::thread::{Thread, current, park, park_timeout, yield_now};
    pub(crate) use shuttle_parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

    /// Whoever sleeps lets the others go first.
    pub(crate) fn sleep(_: Duration) {
        yield_now();
    }

    /// As `parking_lot`'s. Whoever is told goes in any order; nobody wakes without being told.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar {
        told: shuttle::sync::Mutex<u64>,
        changed: shuttle::sync::Condvar,
    }

    impl Condvar {
        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            // Taken before the caller's lock is given back: whoever tells from then on is heard.
            let mut told = self.told.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let before = *told;
            MutexGuard::unlocked(guard, || {
                while *told == before {
                    told = self.changed.wait(told).unwrap_or_else(|poisoned| poisoned.into_inner());
                }
                drop(told);
            });
        }

        /// A time that passes whenever the model likes.
        pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) {
            MutexGuard::unlocked(guard, yield_now);
        }

        pub(crate) fn notify_all(&self) {
            *self.told.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
            self.changed.notify_all();
        }
    }

    /// As `arc_swap`'s: a picture that is read while the next one takes its place.
    #[derive(Debug)]
    pub(crate) struct ArcSwap<T>(Mutex<Arc<T>>);

    pub(crate) type Guard<A> = A;

    impl<T> ArcSwap<T> {
        pub(crate) fn from_pointee(value: T) -> Self {
            Self(Mutex::new(Arc::new(value)))
        }

        pub(crate) fn load(&self) -> Guard<Arc<T>> {
            self.load_full()
        }

        pub(crate) fn load_full(&self) -> Arc<T> {
            Arc::clone(&self.0.lock())
        }

        pub(crate) fn store(&self, value: Arc<T>) {
            *self.0.lock() = value;
        }

        pub(crate) fn rcu(&self, mut change: impl FnMut(&Arc<T>) -> T) {
            loop {
                let before = self.load_full();
                let after = Arc::new(change(&before));
                let mut now = self.0.lock();
                if Arc::ptr_eq(&now, &before) {
                    *now = after;
                    return;
                }
            }
        }
    }
}
