//! Leases that are renewed in the background.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use onlyonce_core::{Error, Grant};
use tokio::sync::{Notify, watch};

#[derive(Debug, Default)]
pub(crate) struct Kept {
    leases: Mutex<HashMap<u64, KeptLease>>,
    /// Notified when the renewal task has something to do.
    pub(crate) changed: Notify,
}

#[derive(Debug)]
struct KeptLease {
    grant: Arc<Grant>,
    handles: usize,
    /// When it was granted or renewed, on the clock of [`Grant::granted_at_ms`].
    renewed_at_ms: u64,
    /// Whether a transaction of the caller has its row: a renewal would wait for it, and the renewals of other leases with it.
    is_paused: bool,
    lost: watch::Sender<Option<Error>>,
}

impl Kept {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, KeptLease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renews the lease until the returned value is dropped.
    pub(crate) fn keep(&self, grant: &Arc<Grant>) -> watch::Receiver<Option<Error>> {
        let mut leases = self.lock();
        let kept = leases.entry(grant.token().get()).or_insert_with(|| KeptLease {
            grant: Arc::clone(grant),
            handles: 0,
            renewed_at_ms: grant.granted_at_ms,
            is_paused: false,
            lost: watch::channel(None).0,
        });
        kept.handles += 1;
        let lost = kept.lost.subscribe();
        drop(leases);
        self.changed.notify_one();
        lost
    }

    /// One handle less.
    pub(crate) fn release(&self, token: u64) {
        let mut leases = self.lock();
        if let Some(kept) = leases.get_mut(&token) {
            kept.handles -= 1;
            if kept.handles == 0 {
                leases.remove(&token);
            }
        }
    }

    /// The lease has ended: it is renewed no more, and its handles report why.
    pub(crate) fn end(&self, token: u64, error: &Error) {
        if let Some(kept) = self.lock().remove(&token) {
            kept.lost.send_replace(Some(error.clone()));
        }
    }

    /// The leases that were renewed before this time.
    pub(crate) fn due(&self, before_ms: u64) -> Vec<Arc<Grant>> {
        let leases = self.lock();
        let is_due = |kept: &&KeptLease| !kept.is_paused && kept.renewed_at_ms <= before_ms;
        leases.values().filter(is_due).map(|kept| Arc::clone(&kept.grant)).collect()
    }

    /// All leases are due at once.
    pub(crate) fn renew_all_now(&self) {
        self.lock().values_mut().for_each(|kept| kept.renewed_at_ms = 0);
        self.changed.notify_one();
    }

    /// Renews the lease no more, or again.
    pub(crate) fn pause(&self, token: u64, is_paused: bool) {
        if let Some(kept) = self.lock().get_mut(&token) {
            kept.is_paused = is_paused;
        }
        self.changed.notify_one();
    }

    /// The time of the oldest renewal.
    pub(crate) fn oldest_ms(&self) -> Option<u64> {
        self.lock().values().filter(|kept| !kept.is_paused).map(|kept| kept.renewed_at_ms).min()
    }

    pub(crate) fn renewed(&self, token: u64, at_ms: u64) {
        if let Some(kept) = self.lock().get_mut(&token) {
            kept.renewed_at_ms = at_ms;
        }
    }
}
