//! Storing the store's time: it is read at open, and written with other writes.
//!
//! Order: a change of the store's time is stored with, or before, the first write that depends on it. Otherwise a completion
//! could survive a crash that loses the change, and expire too early or too late.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::meta_entries::{CLOCK, FLOOR, HIGH_WATER, corrupt_meta, meta};
use crate::clock::{Clock, MAX_WALL_MS, Now, Saved, Timeline};
use crate::codec;
use crate::config::{Config, Span};
use crate::journal::tx::Tx;
use crate::rocks::db::Db;
use crate::testing::sync_shim::{AtomicBool, AtomicU64, Mutex, MutexGuard};
use onlyonce_core::Result;

/// How far the store's time may advance before the next write stores it.
const SAVE_INTERVAL_MS: u64 = 10_000;

/// Resumes the time of a store. `span` is the one of the last open, `newest_ms` the newest time in the journal.
pub(super) fn resume(db: &Db, clock: &Arc<dyn Clock>, config: &Config, span: Span, newest_ms: u64) -> Result<Timeline> {
    let number = |name| -> Result<u64> { Ok(u64::from_le_bytes(meta(db, name)?)) };
    let saved = Saved { time_ms: number(HIGH_WATER)?, floor_ms: number(FLOOR)?, newest_ms };
    if saved.time_ms > MAX_WALL_MS {
        return Err(corrupt_meta(HIGH_WATER));
    }
    if saved.floor_ms > saved.time_ms {
        return Err(corrupt_meta(FLOOR));
    }
    let clock = Arc::clone(clock);
    match config.max_ahead_ms {
        None => {
            let state = db.meta(CLOCK)?.and_then(|bytes| codec::read_clock(&bytes));
            let state = state.ok_or_else(|| corrupt_meta(CLOCK))?;
            // The floor is a window before the latest time that was ever saved.
            let latest_ms = saved.floor_ms.saturating_add(span.window_ms).saturating_sub(1);
            let saved = Saved { newest_ms: newest_ms.max(latest_ms), ..saved };
            Ok(Timeline::of_clocks(clock, &saved.forgotten_by(span.window_ms), &state, config.span))
        }
        Some(max_ahead_ms) => {
            let saved = Saved { time_ms: saved.time_ms.max(newest_ms), ..saved };
            Ok(Timeline::of_messages(clock, &saved.forgotten_by(span.window_ms), max_ahead_ms, config.span.window_ms))
        }
    }
}

/// Adds the store's time to a write, and returns it.
pub(super) fn put(timeline: &Timeline, tx: &mut Tx) -> u64 {
    let (saved, state) = timeline.save();
    tx.put_meta(HIGH_WATER, &saved.time_ms.to_le_bytes());
    tx.put_meta(FLOOR, &saved.floor_ms.to_le_bytes());
    if let Some(state) = state {
        tx.put_meta(CLOCK, &codec::put_clock(&state));
    }
    saved.time_ms
}

/// Which state of the store's time was stored last.
#[derive(Default)]
pub(super) struct TimeSaved {
    /// The time that was stored last.
    time_ms: AtomicU64,
    /// The [`Timeline::changes`] that were stored with it.
    changes: AtomicU64,
    /// Whether the next write stores the time although only elapsed time has changed it.
    is_due: AtomicBool,
    /// One write at a time stores the time. Another write that depends on a change waits for it.
    saving: Mutex<()>,
}

/// The time in a write that is not done yet.
pub(super) struct Saving<'a> {
    saved: &'a TimeSaved,
    changes: u64,
    time_ms: u64,
    _saving: MutexGuard<'a, ()>,
}

impl Saving<'_> {
    /// The write was successful.
    pub(super) fn done(self) {
        self.saved.time_ms.store(self.time_ms, Ordering::Relaxed);
        self.saved.changes.store(self.changes, Ordering::Release);
    }
}

impl TimeSaved {
    /// Whether the time has changed by more than elapsed time since it was stored.
    pub(super) fn is_outdated(&self, timeline: &Timeline) -> bool {
        timeline.changes() != self.changes.load(Ordering::Acquire)
    }

    /// Makes the next write store the time if the last one that did is [`SAVE_INTERVAL_MS`] ago.
    pub(super) fn refresh(&self, now: Now) {
        if now.time_ms.abs_diff(self.time_ms.load(Ordering::Relaxed)) >= SAVE_INTERVAL_MS {
            self.is_due.store(true, Ordering::Relaxed);
        }
    }

    /// Adds the time to a write if it has changed or is due. Waits for another write that is storing a change: no write after
    /// a change may be on disk without the change. A time that is only due is not added unless `is_possible`: a write of keys
    /// alone does not fail because of it.
    pub(super) fn put_changed(
        &self,
        timeline: &Timeline,
        tx: &mut Tx,
        is_possible: impl FnOnce() -> bool,
    ) -> Option<Saving<'_>> {
        let saving = match (self.is_outdated(timeline), self.is_due.load(Ordering::Relaxed)) {
            (true, _) => Some(self.saving.lock()),
            (false, true) if is_possible() => self.saving.try_lock(),
            (false, _) => None,
        };
        let saving = saving?;
        let is_due = self.is_due.swap(false, Ordering::Relaxed);
        // Another write may have stored it meanwhile.
        if !is_due && !self.is_outdated(timeline) {
            return None;
        }
        // Before the time is read: a later change is not part of this write, and must stay outdated.
        let changes = timeline.changes();
        let time_ms = put(timeline, tx);
        Some(Saving { saved: self, changes, time_ms, _saving: saving })
    }
}
