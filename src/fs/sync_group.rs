//! Group commit: callers that wait for the disk at the same time share one sync.

use crate::testing::sync_shim::{Condvar, Mutex, MutexGuard, yield_now};
use onlyonce_core::{Error, Outcome, Result};

/// How often whoever is going to sync lets others go first, as long as more of them come.
const MAX_YIELDS: usize = 16;

/// Whose writes are on the disk. RocksDB has a group commit of its own, but does not mix writes that sync with writes that
/// do not: where claims (which need no sync) and completions come by turns, its groups stay small.
#[derive(Debug, Default)]
pub(crate) struct SyncGroup {
    state: Mutex<State>,
    synced: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Writes that were made, and of those the ones that are on the disk.
    written: u64,
    synced: u64,
    /// Whether somebody syncs at the moment.
    syncing: bool,
    /// Syncs that were made.
    syncs: u64,
    /// Why a sync failed. Nobody knows what is on the disk since: a sync that succeeds after it proves nothing.
    failed: Option<Error>,
}

impl SyncGroup {
    /// Returns when all that was written before this call is on the disk. `sync` syncs everything written so far; one
    /// caller at a time calls it, for all that wait.
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
            // Where others are about to come, one sync for all of them is cheaper than one for each.
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
                Err(error) => state.failed = Some(of_made_writes(error)),
            }
            self.synced.notify_all();
        }
    }

    /// Syncs that callers waited for.
    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }
}

/// The error of a sync for those who wait: their writes are made, whatever kept them from being synced.
fn of_made_writes(error: Error) -> Error {
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
        // Miri lets threads go as it likes, and few come at the same time.
        assert!(
            cfg!(miri) || syncs <= THREADS * WRITES / 2,
            "{syncs} syncs for {WRITES} writes of each of {THREADS} threads"
        );
    }

    #[test]
    fn after_a_sync_that_failed_none_is_believed() {
        let group = SyncGroup::default();
        let failed = group.wait(|| Err(Error::WriteFailed { source: "no space left".into() }));
        assert!(failed.unwrap_err().chain().contains("no space left"));
        assert!(group.wait(|| Ok(())).is_err());
    }
}
