//! Synchronisation primitives under one name, so that `tests/shuttle.rs` can replace them with those of a model
//! checker. The model checker runs one thread at a time and schedules the next one at each primitive.
//!
//! Atomics that synchronise nothing stay outside this module: statistics, clocks, the filter's bits.

#[cfg(shuttle)]
pub(crate) use modelled::*;
#[cfg(not(shuttle))]
pub(crate) use real::*;

#[cfg(not(shuttle))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    pub(crate) use std::thread::{Thread, current, park, park_timeout, sleep};

    pub(crate) use arc_swap::{ArcSwap, Guard};
    pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
}

#[cfg(shuttle)]
mod modelled {
    use std::sync::Arc;
    use std::time::Duration;

    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, fence};
    // Time does not pass in a model: a parked thread that is never woken is a lost wakeup, which the model reports.
    pub(crate) use shuttle::thread::{Thread, current, park, park_timeout, yield_now};
    pub(crate) use shuttle_parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

    /// Yields to other threads instead of sleeping.
    pub(crate) fn sleep(_: Duration) {
        yield_now();
    }

    /// Like `parking_lot::Condvar`. Each wait has a limit, and ends at any moment that the model chooses.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar;

    impl Condvar {
        pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) {
            MutexGuard::unlocked(guard, yield_now);
        }

        pub(crate) fn notify_all(&self) {}
    }

    /// Like `arc_swap::ArcSwap`: readers keep the value they loaded while another one is stored.
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
