//! Group commit: concurrent callers that wait for the disk share one sync.
//!
//! The first waiter becomes the leader and syncs for all writes made before its sync starts. A write made during a
//! sync is not covered by it: counting it would acknowledge a write that is not on disk.

use crate::testing::sync_shim::{Condvar, Mutex, MutexGuard, yield_now};
use onlyonce_core::{Error, Outcome, Result};

/// Maximum yields of the leader while more callers keep arriving.
const MAX_YIELDS: usize = 16;

/// Tracks which writes are on disk. RocksDB has a group commit of its own, but it never groups writes that sync with
/// writes that do not. With alternating claims (not synced) and completions (synced) its groups stay small.
#[derive(Debug, Default)]
pub(crate) struct SyncGroup {
    state: Mutex<State>,
    synced: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The number of writes made, and of writes known to be on disk.
    written: u64,
    synced: u64,
    /// Whether a leader is syncing.
    syncing: bool,
    /// The number of successful syncs.
    syncs: u64,
    /// The error of a failed sync. It is permanent: after a failed fsync the kernel may drop the dirty pages, so a
    /// later successful sync proves nothing.
    failed: Option<Error>,
}

impl SyncGroup {
    /// Returns when everything written before this call is on disk. `sync` syncs everything written so far; only the
    /// leader calls it.
    pub(crate) fn wait(&self, sync: impl Fn() -> Result<()>) -> Result<()> {
        let mut state = self.state.lock();
        state.written += 1;
        let mine = state.written;
        loop {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.synced >= mine {
                return Ok(());
            }
            if state.syncing {
                self.synced.wait(&mut state);
                continue;
            }
            state.syncing = true;
            // One sync for all arriving callers is cheaper than one for each.
            for _ in 0..MAX_YIELDS {
                let before = state.written;
                MutexGuard::unlocked(&mut state, || (0..2).for_each(|_| yield_now()));
                if state.written == before {
                    break;
                }
            }
            let covered = state.written;
            drop(state);
            let outcome = sync();
            state = self.state.lock();
            state.syncing = false;
            match outcome {
                Ok(()) => {
                    state.synced = covered;
                    state.syncs += 1;
                }
                Err(error) => state.failed = Some(as_write_failure(error)),
            }
            self.synced.notify_all();
        }
    }

    /// The number of syncs that callers waited for.
    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }
}

/// Turns the error of a sync into one with an unknown outcome: the waiters' writes were already made.
fn as_write_failure(error: Error) -> Error {
    match error.outcome() {
        Outcome::Unknown => error,
        Outcome::NotWritten => Error::WriteFailed { source: error.into() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    #[test]
    fn callers_share_syncs_and_none_returns_before_its_write_is_synced() {
        const THREADS: u64 = if cfg!(miri) { 4 } else { 32 };
        const WRITES: u64 = if cfg!(miri) { 3 } else { 20 };
        let group = SyncGroup::default();
        let (written, synced, syncs) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let sync = || {
            let covered = written.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
            synced.store(covered, Ordering::SeqCst);
            syncs.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for _ in 0..WRITES {
                        let mine = written.fetch_add(1, Ordering::SeqCst) + 1;
                        group.wait(sync).unwrap();
                        assert!(synced.load(Ordering::SeqCst) >= mine);
                    }
                });
            }
        });
        let syncs = syncs.into_inner();
        assert_eq!(group.syncs(), syncs);
        // Under Miri's scheduler few threads arrive at the same time.
        assert!(
            cfg!(miri) || syncs <= THREADS * WRITES / 2,
            "{syncs} syncs for {WRITES} writes of each of {THREADS} threads"
        );
    }

    #[test]
    fn after_a_failed_sync_every_later_wait_fails() {
        let group = SyncGroup::default();
        let failed = group.wait(|| Err(Error::WriteFailed { source: "no space left".into() }));
        assert!(failed.unwrap_err().chain().contains("no space left"));
        assert!(group.wait(|| Ok(())).is_err());
    }
}
