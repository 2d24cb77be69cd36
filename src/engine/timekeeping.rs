//! How the store's time comes from the disk and gets there: with other writes, and not after anything that relies on it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::meta_entries::{CLOCK, FLOOR, HIGH_WATER, corrupt_meta, meta};
use crate::clock::{Clock, MAX_WALL_MS, Now, Saved, Timeline};
use crate::codec;
use crate::config::{Config, Span};
use crate::rocks::db::{Db, Tx};
use crate::testing::sync_shim::{AtomicBool, AtomicU64, Mutex, MutexGuard};
use onlyonce_core::Result;

/// How much of the store's time may pass before the next write takes it along.
const SAVED_EVERY_MS: u64 = 10_000;

/// The time of a store that was last opened with `span`, and in whose journal `newest_ms` is the newest time.
pub(super) fn resume(db: &Db, clock: &Arc<dyn Clock>, config: &Config, span: Span, newest_ms: u64) -> Result<Timeline> {
    let number = |name| -> Result<u64> { Ok(u64::from_le_bytes(meta(db, name)?)) };
    let saved = Saved { time_ms: number(HIGH_WATER)?, floor_ms: number(FLOOR)? };
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
            Ok(Timeline::of_clocks(clock, &saved.forgotten_by(span.window_ms), &state, config.span))
        }
        Some(max_ahead_ms) => {
            let saved = Saved { time_ms: saved.time_ms.max(newest_ms), ..saved };
            Ok(Timeline::of_messages(clock, &saved.forgotten_by(span.window_ms), max_ahead_ms, config.span.window_ms))
        }
    }
}

/// Puts the time into a write, as the next opening needs it. What it is.
pub(super) fn put(timeline: &Timeline, tx: &mut Tx<'_>) -> Result<u64> {
    let (saved, state) = timeline.save();
    tx.put_meta(HIGH_WATER, &saved.time_ms.to_le_bytes())?;
    tx.put_meta(FLOOR, &saved.floor_ms.to_le_bytes())?;
    if let Some(state) = state {
        tx.put_meta(CLOCK, &codec::put_clock(&state))?;
    }
    Ok(saved.time_ms)
}

/// What is known of the time on the disk.
#[derive(Default)]
pub(super) struct TimeSaved {
    /// The store's time that was saved last.
    time_ms: AtomicU64,
    /// The [`Timeline::changes`] that were saved with it.
    changes: AtomicU64,
    /// Whether the next write takes it along although nothing has changed.
    is_due: AtomicBool,
    /// One write at a time takes it along; one that depends on a change waits for it.
    saving: Mutex<()>,
}

/// A write that takes the time along, until it is done.
pub(super) struct Saving<'a> {
    saved: &'a TimeSaved,
    changes: u64,
    time_ms: u64,
    _saving: MutexGuard<'a, ()>,
}

impl Saving<'_> {
    /// It is written.
    pub(super) fn done(self) {
        self.saved.time_ms.store(self.time_ms, Ordering::Relaxed);
        self.saved.changes.store(self.changes, Ordering::Release);
    }
}

impl TimeSaved {
    /// Whether the time changed in a way that elapsed time does not explain.
    pub(super) fn is_outdated(&self, timeline: &Timeline) -> bool {
        timeline.changes() != self.changes.load(Ordering::Acquire)
    }

    /// Has the next write take the time along, where it is long ago that one did.
    pub(super) fn refresh(&self, now: Now) {
        if now.time_ms.abs_diff(self.time_ms.load(Ordering::Relaxed)) >= SAVED_EVERY_MS {
            self.is_due.store(true, Ordering::Relaxed);
        }
    }

    /// Takes the time along where it has changed or is due. Nothing that is written after a change may be on the disk
    /// without it: a write that finds another one at it waits.
    pub(super) fn put_changed(&self, timeline: &Timeline, tx: &mut Tx<'_>) -> Result<Option<Saving<'_>>> {
        let saving = match (self.is_outdated(timeline), self.is_due.load(Ordering::Relaxed)) {
            (true, _) => Some(self.saving.lock()),
            (false, true) => self.saving.try_lock(),
            (false, false) => None,
        };
        let Some(saving) = saving else { return Ok(None) };
        let is_due = self.is_due.swap(false, Ordering::Relaxed);
        // Another write may have taken it along meanwhile.
        if !is_due && !self.is_outdated(timeline) {
            return Ok(None);
        }
        // Before the time is read: what changes from here on is not part of it.
        let changes = timeline.changes();
        let time_ms = put(timeline, tx)?;
        Ok(Some(Saving { saved: self, changes, time_ms, _saving: saving }))
    }
}
