//! Claims that wait for the end of a lease, by the token of the lease.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(crate) struct Waiters {
    by_token: Mutex<HashMap<u64, Weak<Shared>>>,
}

/// What the waiters of one token share.
#[derive(Debug, Default)]
struct Shared {
    notify: Notify,
    /// Whether the end of the lease is announced to this process.
    is_announced: AtomicBool,
}

impl Waiters {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Weak<Shared>>> {
        self.by_token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A waiter for the end of the lease with this token. Waiters of one token share it.
    pub(crate) fn wait_for(self: &Arc<Self>, token: u64) -> WaitSlot {
        let mut by_token = self.lock();
        let shared = by_token.get(&token).and_then(Weak::upgrade).unwrap_or_else(|| {
            let shared = Arc::new(Shared::default());
            by_token.insert(token, Arc::downgrade(&shared));
            shared
        });
        WaitSlot { waiters: Arc::clone(self), token, shared: Some(shared) }
    }

    /// Wakes the waiters of a lease that ended. Those that find it in progress wait again on the same slot.
    pub(crate) fn wake(&self, token: u64) {
        let shared = self.lock().get(&token).and_then(Weak::upgrade);
        if let Some(shared) = shared {
            shared.notify.notify_waiters();
        }
    }

    /// Wakes all waiters: announcements may have been missed.
    pub(crate) fn wake_all(&self) {
        let all: Vec<_> = self.lock().values().filter_map(Weak::upgrade).collect();
        for shared in all {
            shared.notify.notify_waiters();
        }
    }
}

/// The slot of a waiter. It is removed when the last waiter of its token drops it.
#[derive(Debug)]
pub(crate) struct WaitSlot {
    waiters: Arc<Waiters>,
    token: u64,
    shared: Option<Arc<Shared>>,
}

/// A waiter asks for the announcement of a lease's end. Without an answer, another waiter asks.
#[derive(Debug)]
pub(crate) struct AnnouncementRequest(Option<Arc<Shared>>);

impl AnnouncementRequest {
    pub(crate) fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for AnnouncementRequest {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.is_announced.store(false, Ordering::Relaxed);
        }
    }
}

impl WaitSlot {
    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    /// `None` if another waiter of this process has asked for the announcement, or is about to.
    pub(crate) fn ask(&self) -> Option<AnnouncementRequest> {
        let is_first = self.shared.as_ref().is_some_and(|shared| !shared.is_announced.swap(true, Ordering::Relaxed));
        is_first.then(|| AnnouncementRequest(self.shared.clone()))
    }

    pub(crate) fn notify(&self) -> Option<&Notify> {
        self.shared.as_ref().map(|shared| &shared.notify)
    }
}

impl Drop for WaitSlot {
    fn drop(&mut self) {
        drop(self.shared.take());
        let mut by_token = self.waiters.lock();
        if by_token.get(&self.token).is_some_and(|shared| shared.strong_count() == 0) {
            by_token.remove(&self.token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_waiter_is_woken_and_leaves_nothing() {
        let waiters = Arc::new(Waiters::default());
        let (first, second) = (waiters.wait_for(7), waiters.wait_for(7));
        // Again, as after a wake that was not about their lease.
        for _ in 0..2 {
            let woken = (first.notify().unwrap().notified(), second.notify().unwrap().notified());
            waiters.wake(7);
            tokio::join!(woken.0, woken.1);
        }
        drop((second, waiters.wait_for(8)));
        drop(first);
        assert!(waiters.lock().is_empty());
    }

    #[test]
    fn one_waiter_asks_for_the_announcement_and_another_one_if_it_fails() {
        let waiters = Arc::new(Waiters::default());
        let (first, second) = (waiters.wait_for(7), waiters.wait_for(7));
        let request = first.ask().unwrap();
        assert!(second.ask().is_none());
        drop(request);
        second.ask().unwrap().done();
        assert!(first.ask().is_none());
    }
}
