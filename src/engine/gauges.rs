//! Figures of a store: the gauges of the metrics facade and `Stats`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::core::Engine;
use crate::buckets::registry::Bucket;
use crate::memtable::table::Shard;
use crate::metrics::{ExpensiveGauges, Gauges};
use crate::stats::{BucketStats, Stats};
use onlyonce_core::machine::LeaseState;
use onlyonce_core::machine::Processing;
use onlyonce_core::{OnInterrupt, Timestamp};

impl Engine {
    /// Counts a message that was processed without deduplication.
    pub(crate) fn count_fail_open(&self) {
        self.counters.fail_open.add(1);
    }

    /// Exports counters and gauges to the metrics facade.
    pub(super) fn export_metrics(&self) {
        self.metrics.export(
            &self.counters,
            || self.gauges(),
            || ExpensiveGauges { held: self.count_held(), disk_bytes: self.tables.db.directory().bytes() },
        );
    }

    /// The gauges that cost no more than atomic loads and a snapshot.
    pub(super) fn gauges(&self) -> Gauges {
        let snapshot = self.tables.buckets.snapshot();
        Gauges {
            in_flight: self.tables.memtable.in_flight() as u64,
            unflushed: self.tables.memtable.flushable() as u64,
            buckets: snapshot.newest_first().len() as u64,
            filter_bytes: snapshot.filter_bytes(),
            journal_bytes: self.writer.journal_bytes.load(Ordering::Relaxed),
            journal_syncs: self.writer.journal.syncs(),
            now_ms: self.now().time_ms,
            is_poisoned: self.health.poisoned().is_some(),
        }
    }

    /// Counts held keys. Visits the whole memtable, unless the policy holds no keys.
    fn count_held(&self) -> u64 {
        if self.policy.on_interrupt == OnInterrupt::Rerun {
            return 0;
        }
        let now = self.now();
        let held = |processing: &Processing| matches!(self.lease_state_at(processing, now), LeaseState::Held(_));
        let held_in = |shard: Shard<'_>| shard.in_flight().filter(|(_, _, processing)| held(processing)).count();
        self.tables.memtable.shards().map(held_in).sum::<usize>() as u64
    }

    /// The counts of the engine contract. Visits the whole memtable, unless the policy holds no keys.
    #[cfg(feature = "tokio")]
    pub(crate) fn engine_stats(&self) -> onlyonce_core::EngineStats {
        onlyonce_core::EngineStats::new(self.tables.memtable.in_flight() as u64, self.count_held())
    }

    /// The store's statistics. Expensive: visits the whole memtable and the directory.
    pub(crate) fn stats(&self) -> Stats {
        let now = self.timeline.observe();
        let snapshot = self.tables.buckets.snapshot();
        let bucket_stats = |bucket: &Arc<Bucket>| BucketStats {
            start: Timestamp::from_unix_ms(bucket.range.start_ms),
            end: Timestamp::from_unix_ms(bucket.range.end_ms()),
            keys: bucket.keys.load(Ordering::Relaxed),
            filtered: snapshot.is_filtered(bucket),
        };
        let mut buckets: Vec<BucketStats> = snapshot.newest_first().iter().map(bucket_stats).collect();
        buckets.reverse();
        let counters = &self.counters;
        let window_ms = self.config().span.window_ms;
        Stats {
            acquired: counters.acquired.get(),
            reclaimed: counters.reclaimed.get(),
            duplicates: counters.duplicates.get(),
            in_progress: counters.in_progress.get(),
            payload_mismatches: counters.payload_mismatches.get(),
            too_old: counters.too_old.get(),
            too_far_ahead: counters.too_far_ahead.get(),
            completed: counters.completed.get(),
            recorded: counters.recorded.get(),
            released: counters.released.get(),
            superseded: counters.superseded.get(),
            fail_open: counters.fail_open.get(),
            filter_checks: counters.filter_checks.get(),
            filter_hits: counters.filter_hits.get(),
            filter_false_positives: counters.filter_false_positives.get(),
            journal_syncs: self.writer.journal.syncs(),
            in_flight: self.tables.memtable.in_flight() as u64,
            held: self.count_held(),
            unflushed: self.tables.memtable.flushable() as u64,
            buckets,
            filter_bytes: snapshot.filter_bytes(),
            disk_bytes: self.tables.db.directory().bytes(),
            journal_disk_bytes: self.writer.journal.allocated(),
            now: Timestamp::from_unix_ms(now.time_ms),
            window: Duration::from_millis(window_ms),
            remembers_since: Timestamp::from_unix_ms(now.remembers_since(window_ms)),
            poisoned: self.health.poisoned().map(str::to_owned),
        }
    }
}
