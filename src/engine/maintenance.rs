//! Rounds of maintenance: store the time, drop expired buckets, purge the memtable, flush, create the next bucket. Also the filter
//! work of another background thread.
//!
//! The threads of `workers.rs` call it, so no caller waits for it.
//!
//! Order: expired buckets are dropped before a flush, which creates the buckets that it needs. Otherwise a store that has its
//! maximum of buckets could not flush. A failure to store the time is reported last: on a full disk, expired buckets free the
//! space that it needs.

use std::sync::atomic::Ordering;

use super::core::Engine;
use crate::buckets::filters::Filters;
use crate::buckets::range::BucketRange;
use crate::buckets::rotation::{drop_expired, has_expired, merge_ended, prepare_next};
use crate::clock::Now;
use crate::testing::failpoint::Failpoint;
use onlyonce_core::Result;
use onlyonce_core::machine::{Entry, LeaseState};

/// The shortest time between two purges: each visits the whole memtable.
const PURGE_INTERVAL_MS: u64 = 1_000;

/// The size of the journal from which it is replaced by a checkpoint although there is no key to flush.
const IDLE_JOURNAL_BYTES: u64 = 1 << 20;

/// What one round of maintenance leaves for the next.
pub(super) struct MaintenanceState {
    /// The bucket range of the last round.
    last_range: BucketRange,
    purged_monotonic_ms: u64,
    /// Whether the open has left work to the first round.
    pub(super) has_leftover_work: bool,
}

impl Engine {
    /// Runs one round of maintenance.
    pub(super) fn run_maintenance(&self, state: &mut MaintenanceState) -> Result<()> {
        self.health.check_invariants()?;
        let saved = self.writer.save_time_if_changed(self.timeline.observe());
        let present = self.present_range();
        // Before the flush: see the module's order.
        self.drop_expired()?;
        let now_ms = self.now().monotonic_ms;
        if self.is_crowded() && now_ms.saturating_sub(state.purged_monotonic_ms) >= PURGE_INTERVAL_MS {
            state.purged_monotonic_ms = now_ms;
            self.purge();
        }
        // When a bucket has ended, its last keys are flushed, so that they leave memory and the journal.
        let ended = state.has_leftover_work || (state.last_range != present && self.tables.memtable.flushable() > 0);
        // Without keys to flush, a flush only replaces the journal's records by a checkpoint.
        let is_idle = self.tables.memtable.flushable() == 0
            && self.writer.journal_bytes.load(Ordering::Relaxed) >= IDLE_JOURNAL_BYTES;
        if ended || self.is_flush_due() || is_idle {
            self.flush()?;
        }
        state.last_range = present;
        state.has_leftover_work = false;
        prepare_next(&self.tables.db, &self.tables.buckets, self.config().span, self.now().time_ms)?;
        saved
    }

    /// The state before the first round.
    pub(super) fn maintenance_state(&self) -> MaintenanceState {
        MaintenanceState {
            last_range: self.present_range(),
            purged_monotonic_ms: self.now().monotonic_ms,
            has_leftover_work: false,
        }
    }

    fn present_range(&self) -> BucketRange {
        BucketRange::containing(self.now().time_ms, self.config().span.bucket_ms)
    }

    /// Removes expired keys from the memtable.
    fn purge(&self) {
        let now = self.now();
        let window_ms = self.config().span.window_ms;
        for mut shard in self.tables.memtable.shards() {
            shard.retain(|entry| match entry {
                // Also after its own window: it overrules what a bucket may hold of an earlier attempt.
                Entry::Completed(done) => now.remembers(done.completed_ms, window_ms),
                Entry::Processing(processing) => self.lease_state_at(processing, now) != LeaseState::Forgotten,
            });
        }
    }

    /// Whether claims fail because too many keys are in progress.
    fn is_crowded(&self) -> bool {
        self.tables.memtable.in_flight() >= self.config().in_flight_limit
    }

    /// Drops expired buckets, under the flush lock: a flush or a `forget` that writes to a bucket must not see it dropped.
    pub(super) fn drop_expired(&self) -> Result<()> {
        self.drop_expired_while(|| true).map(drop)
    }

    /// As [`Engine::drop_expired`], until `should_continue` returns false. Returns false if expired buckets are left.
    pub(super) fn drop_expired_while(&self, should_continue: impl Fn() -> bool) -> Result<bool> {
        let _flush_lock = self.tables.flush_lock.lock();
        let now = self.now();
        self.drop_expired_at(now, &should_continue)?;
        Ok(!has_expired(&self.tables.buckets, self.config().span, &now))
    }

    /// Drops the buckets that are expired at `now`. The caller holds the flush lock.
    pub(super) fn drop_expired_at(&self, now: Now, should_continue: &impl Fn() -> bool) -> Result<()> {
        let span = self.config().span;
        if has_expired(&self.tables.buckets, span, &now) {
            Failpoint::BucketExpired.pass();
            // Synced before the drop. Otherwise the store's time could be earlier after a crash, and dropped keys would be
            // missing although their window is not over.
            self.writer.save_time()?;
            drop_expired(&self.tables.db, &self.tables.buckets, span, &now, should_continue);
        }
        Ok(())
    }

    /// Reads or rebuilds the filter of each bucket that has none, until `should_continue` returns false.
    pub(super) fn restore_filters(&self, should_continue: &(impl Fn() -> bool + Sync)) -> Result<()> {
        let started = std::time::Instant::now();
        self.tables.filters.load(&self.tables.buckets, should_continue);
        Filters::rebuild(&self.tables.db, &self.tables.buckets, should_continue)?;
        self.health.check_invariants()?;
        tracing::info!(elapsed = ?started.elapsed(), "filters restored");
        Ok(())
    }

    /// Merges the SSTs of ended buckets.
    pub(super) fn merge_ended(&self) -> Result<()> {
        self.health.ready()?;
        let _flush_lock = self.tables.flush_lock.lock();
        merge_ended(&self.tables.db, &self.tables.buckets, self.config().span, &self.now())
    }

    /// Moves ended buckets to the newest base matrix, and persists their columns.
    pub(super) fn persist_filters(&self, should_continue: impl Fn() -> bool) -> Result<()> {
        Filters::tidy(&self.tables.db, &self.tables.buckets, self.now().time_ms, &should_continue)?;
        // A column that misses bits must not be persisted: it would hide keys from all later opens.
        self.health.check_invariants()?;
        let ssts = || {
            // Under the lock: an SST that a flush has ingested and not marked in the filter yet must not be listed as covered.
            let _flush_lock = self.tables.flush_lock.lock();
            self.tables.db.sst_numbers()
        };
        self.tables.filters.persist(&self.tables.buckets, self.now().time_ms, ssts, should_continue)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;
    use crate::codec::RecordKind;
    use crate::config::{Durability, Options};
    use crate::engine::fixture::{claim, engine, flush_generation, record, short_windows};
    use crate::engine::response::{FinishKind, FinishedBy};
    use onlyonce_core::{Claim, StoredResult};

    #[test]
    fn a_completion_is_kept_after_its_own_window_to_overrule_an_earlier_attempt_in_a_bucket() {
        let dir = tempfile::tempdir().unwrap();
        let clock = ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000));
        let engine = engine(&dir, &short_windows(&clock));
        engine.abandon(&claim(&engine, "k"));
        engine.flush().unwrap();
        let key = onlyonce_core::Key::from("k").window(Duration::from_secs(1));
        let Ok(Claim::Acquired(grant)) = engine.claim(&engine.request([key]).unwrap()).unwrap().pop().unwrap() else {
            panic!("its lease was dropped")
        };
        assert_eq!(grant.attempt, 2);
        let done = FinishKind::Complete { result: StoredResult::None, side_writes: None, follows: false };
        engine.finish(RecordKind::Completed, FinishedBy::Holder, vec![(&grant, done)]).unwrap();
        clock.advance(Duration::from_secs(1));
        engine.purge();
        assert_eq!(claim(&engine, "k").attempt, 1);
    }

    #[test]
    fn a_round_flushes_if_a_bucket_has_ended_or_a_flush_is_due() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = engine(&dir, &short_windows(&clock));
        let mut maintenance_state = engine.maintenance_state();
        let mut round = || {
            engine.run_maintenance(&mut maintenance_state).unwrap();
            (engine.tables.memtable.flushable(), flush_generation(&engine))
        };
        record(&engine, "first");
        assert_eq!(round(), (1, 0));
        clock.advance(Duration::from_secs(1));
        assert_eq!(round(), (0, 1), "its bucket has ended");
        record(&engine, "second");
        assert_eq!(round(), (1, 1), "once for each bucket");
        engine.writer.journal_bytes.fetch_add(4 << 20, Ordering::Relaxed);
        assert_eq!(round(), (0, 2), "a flush was due");
        let _open = claim(&engine, "open");
        clock.advance(Duration::from_secs(1));
        assert_eq!(round(), (0, 2), "nothing was completed");
    }

    #[test]
    fn expired_leases_are_purged_once_a_second_while_the_limit_is_reached() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let window = Some(Duration::from_millis(100));
        let lease = Duration::from_secs(1);
        let engine =
            engine(&dir, &Options { in_flight_limit: 2, window, bucket: window, lease, ..short_windows(&clock) });
        let mut maintenance_state = engine.maintenance_state();
        let mut round_after = |ms| {
            clock.advance(Duration::from_millis(ms));
            engine.run_maintenance(&mut maintenance_state).unwrap();
            engine.tables.memtable.in_flight()
        };
        // Dropping an internal grant does not end its lease, so these leases expire.
        let _leaked = claim(&engine, "a");
        assert_eq!(round_after(2_000), 1, "claims do not fail yet");
        let _leaked = claim(&engine, "b");
        assert_eq!(round_after(1_200), 0);
        let _leaked = claim(&engine, "c");
        clock.advance(Duration::from_millis(1_100));
        let alive = claim(&engine, "alive");
        assert_eq!(round_after(0), 1, "an active lease stays");
        assert!(engine.renew(&alive).unwrap());
    }

    #[test]
    fn the_journal_is_synced_after_a_write_without_a_sync() {
        for (durability, waits) in [(Durability::Process, false), (Durability::Disk, true)] {
            let dir = tempfile::tempdir().unwrap();
            let engine = engine(
                &dir,
                &Options {
                    durability,
                    ..short_windows(&ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)))
                },
            );
            engine.writer.sync_if_needed().unwrap();
            record(&engine, "k");
            // A sync of the closed journal fails, so an error shows that it was synced.
            engine.writer.journal.close_with(|_| ()).unwrap();
            assert_eq!(engine.writer.sync_if_needed().is_ok(), waits, "{durability:?}");
            engine.writer.sync_if_needed().expect("nothing is left to sync");
        }
    }

    #[test]
    fn expired_buckets_are_dropped_although_no_segment_can_be_created() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = engine(&dir, &Options { key_limit: 65_535, ..short_windows(&clock) });
        let mut maintenance_state = engine.maintenance_state();
        record(&engine, "k");
        engine.flush().unwrap();
        // A directory takes the name under which each of the next segments would be created.
        let journal = engine.tables.db.directory().journal();
        (0..50).for_each(|slot| std::fs::create_dir(journal.join(format!("{slot:06}.journal.new"))).unwrap());
        let large = |i: u32| engine.claim(&engine.request([format!("{i}{}", "k".repeat(20_000))]).unwrap());
        let rejected = (0..50).filter_map(|i| large(i).err()).next();
        assert!(matches!(rejected, Some(onlyonce_core::Error::Io { .. })), "{rejected:?}");
        let families =
            || -> Vec<_> { engine.tables.buckets.snapshot().newest_first().iter().map(|b| b.family.clone()).collect() };
        let before = families();
        clock.advance(Duration::from_secs(60));
        let prepared = engine.writer.prepare_segment();
        assert!(matches!(prepared, Err(onlyonce_core::Error::Io { .. })), "{prepared:?}");
        engine.run_maintenance(&mut maintenance_state).unwrap();
        assert!(before.len() == 1 && !families().contains(&before[0]), "{before:?}, {:?}", families());
        assert_eq!(engine.health.poisoned(), None);
    }

    #[test]
    fn the_filter_of_an_ended_bucket_is_persisted() {
        let (dir, clock) =
            (tempfile::tempdir().unwrap(), ManualClock::at(onlyonce_core::Timestamp::from_unix_ms(1_000_000)));
        let engine = engine(&dir, &short_windows(&clock));
        let persisted = || {
            engine.persist_filters(|| true).unwrap();
            std::fs::read_dir(engine.tables.db.directory().filters()).unwrap().count()
        };
        record(&engine, "k");
        engine.flush().unwrap();
        assert_eq!(persisted(), 0);
        clock.advance(Duration::from_secs(1));
        assert_eq!(persisted(), 1);
    }
}
