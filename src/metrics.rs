//! Exports metrics to the `metrics` facade and opens spans for `tracing`. Without the feature `metrics` this module
//! compiles to nothing.
//!
//! The facade is called once a call or once a second, never once a key: a background worker exports the store's
//! counters every second, and each call records its histograms. `docs/metrics.md` lists the names; `tests/metrics.rs`
//! compares them with this file.

use std::path::Path;

use crate::stats::Counters;
use onlyonce_core::PriorAttempt;

/// The verb of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Call {
    Check,
    Claim,
    Record,
    Complete,
    Release,
}

/// Current state of the store.
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "only the feature `metrics` reads it"))]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Gauges {
    pub(crate) in_flight: u64,
    pub(crate) unflushed: u64,
    pub(crate) buckets: u64,
    pub(crate) filter_bytes: u64,
    pub(crate) journal_bytes: u64,
    pub(crate) journal_syncs: u64,
    pub(crate) now_ms: u64,
    pub(crate) is_poisoned: bool,
}

/// As [`Gauges`], for values that are expensive to compute.
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "only the feature `metrics` reads it"))]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct ExpensiveGauges {
    pub(crate) held: u64,
    pub(crate) disk_bytes: u64,
}

#[cfg(not(feature = "metrics"))]
pub(crate) use disabled::Metrics;
#[cfg(feature = "metrics")]
pub(crate) use enabled::Metrics;

#[cfg(not(feature = "metrics"))]
mod disabled {
    use super::{Call, Counters, ExpensiveGauges, Gauges, Path, PriorAttempt};

    /// Exports nothing.
    #[derive(Debug)]
    pub(crate) struct Metrics;

    pub(crate) struct Timer;

    impl Metrics {
        pub(crate) fn new(_store: &Path) -> Self {
            Self
        }

        #[inline(always)]
        pub(crate) fn call(&self, _call: Call, _keys: usize) -> Timer {
            Timer
        }

        #[inline(always)]
        pub(crate) fn commit(&self, _sync: bool) -> Timer {
            Timer
        }

        #[inline(always)]
        pub(crate) fn flush(&self) -> Timer {
            Timer
        }

        #[inline(always)]
        pub(crate) fn repeated(&self, _prior: PriorAttempt, _attempt: u32) {}

        #[inline(always)]
        pub(crate) fn processed(&self, _ms: impl FnOnce() -> u64) {}

        #[inline(always)]
        pub(crate) fn export(
            &self,
            _counters: &Counters,
            _gauges: impl FnOnce() -> Gauges,
            _expensive: impl FnOnce() -> ExpensiveGauges,
        ) {
        }

        #[inline(always)]
        pub(crate) fn end(&self, _counters: &Counters, _gauges: impl FnOnce() -> Gauges) {}
    }
}

#[cfg(feature = "metrics")]
mod enabled {
    use std::time::{Duration, Instant};

    use metrics::{Counter, Gauge, Histogram, Label, Unit, describe_counter, describe_gauge, describe_histogram};
    use tracing::span::EnteredSpan;

    use super::{Call, Counters, ExpensiveGauges, Gauges, Path, PriorAttempt};
    use crate::testing::sync_shim::Mutex;

    /// How often counters and gauges are exported, and how often the expensive gauges.
    const INTERVAL: Duration = Duration::from_secs(1);
    const EXPENSIVE_INTERVAL: Duration = Duration::from_secs(10);

    /// A counter of [`Counters`]: its name, its label, and how to read it.
    type CounterSource = (&'static str, Option<(&'static str, &'static str)>, fn(&Counters) -> u64);
    const COUNTERS: &[CounterSource] = &[
        ("onlyonce.claims", Some(("outcome", "acquired")), |counters| counters.acquired.get()),
        ("onlyonce.claims", Some(("outcome", "recorded")), |counters| counters.recorded.get()),
        ("onlyonce.claims", Some(("outcome", "duplicate")), |counters| counters.duplicates.get()),
        ("onlyonce.claims", Some(("outcome", "in_progress")), |counters| counters.in_progress.get()),
        ("onlyonce.claims", Some(("outcome", "payload_mismatch")), |counters| counters.payload_mismatches.get()),
        ("onlyonce.claims", Some(("outcome", "too_old")), |counters| counters.too_old.get()),
        ("onlyonce.claims", Some(("outcome", "too_far_ahead")), |counters| counters.too_far_ahead.get()),
        ("onlyonce.completions", None, |counters| counters.completed.get()),
        ("onlyonce.releases", None, |counters| counters.released.get()),
        ("onlyonce.leases.lost", None, |counters| counters.superseded.get()),
        ("onlyonce.filter.checks", None, |counters| counters.filter_checks.get()),
        ("onlyonce.filter.hits", None, |counters| counters.filter_hits.get()),
        ("onlyonce.filter.false_positives", None, |counters| counters.filter_false_positives.get()),
        ("onlyonce.fail_open", None, |counters| counters.fail_open.get()),
    ];
    /// A gauge, and how to read its value.
    type GaugeSource = (Gauge, fn(&Gauges) -> f64);
    const PRIORS: [(PriorAttempt, &str); 4] = [
        (PriorAttempt::Released, "released"),
        (PriorAttempt::LeaseExpired, "lease_expired"),
        (PriorAttempt::Dropped, "dropped"),
        (PriorAttempt::Crashed, "crashed"),
    ];

    fn describe() {
        describe_counter!("onlyonce.claims", Unit::Count, "Keys claimed or recorded, by outcome");
        describe_counter!(
            "onlyonce.claims.repeated",
            Unit::Count,
            "Claims of keys that an earlier attempt did not complete, by how that attempt ended"
        );
        describe_counter!("onlyonce.completions", Unit::Count, "Leases completed");
        describe_counter!("onlyonce.releases", Unit::Count, "Leases released");
        describe_counter!(
            "onlyonce.leases.lost",
            Unit::Count,
            "Completions, releases and renewals rejected because the lease had been taken over"
        );
        describe_counter!("onlyonce.filter.checks", Unit::Count, "Keys looked up in the filter");
        describe_counter!("onlyonce.filter.hits", Unit::Count, "Keys that the filter did not rule out");
        describe_counter!(
            "onlyonce.filter.false_positives",
            Unit::Count,
            "Keys that the filter did not rule out and no bucket holds"
        );
        describe_counter!(
            "onlyonce.fail_open",
            Unit::Count,
            "Messages processed without deduplication because the store was unavailable"
        );
        describe_counter!("onlyonce.journal.syncs", Unit::Count, "Syncs of the journal");
        describe_gauge!("onlyonce.keys.in_flight", Unit::Count, "Keys in progress");
        describe_gauge!("onlyonce.keys.held", Unit::Count, "Keys held for resolution");
        describe_gauge!(
            "onlyonce.keys.unflushed",
            Unit::Count,
            "Completed and released keys not yet flushed to a bucket"
        );
        describe_gauge!("onlyonce.buckets", Unit::Count, "Live buckets");
        describe_gauge!("onlyonce.filter.size", Unit::Bytes, "Memory used by the filter");
        describe_gauge!("onlyonce.journal.size", Unit::Bytes, "Bytes of journal records since the last flush");
        describe_gauge!("onlyonce.disk.size", Unit::Bytes, "Bytes of all files of the store");
        describe_gauge!("onlyonce.time", Unit::Seconds, "The store's time, in seconds since the Unix epoch");
        describe_gauge!("onlyonce.poisoned", Unit::Count, "1 if the store is poisoned and must be reopened, else 0");
        describe_histogram!("onlyonce.call.duration", Unit::Seconds, "Duration of a call, by verb");
        describe_histogram!("onlyonce.call.keys", Unit::Count, "Keys in a call, by verb");
        describe_histogram!(
            "onlyonce.commit.duration",
            Unit::Seconds,
            "Duration of a write, by whether it waited for a sync"
        );
        describe_histogram!("onlyonce.flush.duration", Unit::Seconds, "Duration of a flush");
        describe_histogram!(
            "onlyonce.processing.duration",
            Unit::Seconds,
            "Time from claim to completion, for calls with one key"
        );
        describe_histogram!("onlyonce.claim.attempt", Unit::Count, "Attempt number of a repeated claim");
    }

    /// Metric handles of one store. The recorder must be installed before the store is opened.
    pub(crate) struct Metrics {
        /// In the order of [`Call`].
        durations: [Histogram; 5],
        keys: [Histogram; 5],
        commit: Histogram,
        synced_commit: Histogram,
        flush: Histogram,
        processing: Histogram,
        attempt: Histogram,
        repeated: [Counter; 4],
        counters: Vec<Counter>,
        journal_syncs: Counter,
        gauges: [GaugeSource; 7],
        held: Gauge,
        disk_bytes: Gauge,
        last: Mutex<LastExport>,
    }

    /// The values at the last export.
    #[derive(Default)]
    struct LastExport {
        counters: Vec<u64>,
        journal_syncs: u64,
        at: Option<Instant>,
        expensive_at: Option<Instant>,
    }

    /// Measures the time until it is dropped.
    pub(crate) struct Timer<'m> {
        histogram: &'m Histogram,
        begun: Instant,
        _span: EnteredSpan,
    }

    impl Drop for Timer<'_> {
        fn drop(&mut self) {
            self.histogram.record(self.begun.elapsed());
        }
    }

    impl<'m> Timer<'m> {
        fn new(histogram: &'m Histogram, span: tracing::Span) -> Self {
            Self { histogram, begun: Instant::now(), _span: span.entered() }
        }
    }

    impl Metrics {
        pub(crate) fn new(store: &Path) -> Self {
            describe();
            let store = Label::new("store", store.display().to_string());
            let labels = |more: Option<(&'static str, &'static str)>| {
                let more = more.map(|(name, value)| Label::from_static_parts(name, value));
                std::iter::once(store.clone()).chain(more).collect::<Vec<Label>>()
            };
            let histogram = |name, label| metrics::histogram!(name, labels(label));
            let gauge = |name| metrics::gauge!(name, labels(None));
            let of_calls = |name| {
                ["check", "claim", "record", "complete", "release"].map(|call| histogram(name, Some(("call", call))))
            };
            Self {
                durations: of_calls("onlyonce.call.duration"),
                keys: of_calls("onlyonce.call.keys"),
                commit: histogram("onlyonce.commit.duration", Some(("synced", "false"))),
                synced_commit: histogram("onlyonce.commit.duration", Some(("synced", "true"))),
                flush: histogram("onlyonce.flush.duration", None),
                processing: histogram("onlyonce.processing.duration", None),
                attempt: histogram("onlyonce.claim.attempt", None),
                repeated: PRIORS
                    .map(|(_, prior)| metrics::counter!("onlyonce.claims.repeated", labels(Some(("prior", prior))))),
                counters: COUNTERS.iter().map(|(name, label, _)| metrics::counter!(*name, labels(*label))).collect(),
                journal_syncs: metrics::counter!("onlyonce.journal.syncs", labels(None)),
                gauges: [
                    (gauge("onlyonce.keys.in_flight"), |gauges| gauges.in_flight as f64),
                    (gauge("onlyonce.keys.unflushed"), |gauges| gauges.unflushed as f64),
                    (gauge("onlyonce.buckets"), |gauges| gauges.buckets as f64),
                    (gauge("onlyonce.filter.size"), |gauges| gauges.filter_bytes as f64),
                    (gauge("onlyonce.journal.size"), |gauges| gauges.journal_bytes as f64),
                    (gauge("onlyonce.time"), |gauges| gauges.now_ms as f64 / 1_000.0),
                    (gauge("onlyonce.poisoned"), |gauges| f64::from(u8::from(gauges.is_poisoned))),
                ],
                held: gauge("onlyonce.keys.held"),
                disk_bytes: gauge("onlyonce.disk.size"),
                last: Mutex::default(),
            }
        }

        /// Starts to measure a call.
        pub(crate) fn call(&self, call: Call, keys: usize) -> Timer<'_> {
            let [check, claim, record, complete, release] = &self.durations;
            let [check_keys, claim_keys, record_keys, complete_keys, release_keys] = &self.keys;
            let (duration, histogram, span) = match call {
                Call::Check => (check, check_keys, tracing::debug_span!("onlyonce.check", keys)),
                Call::Claim => (claim, claim_keys, tracing::debug_span!("onlyonce.claim", keys)),
                Call::Record => (record, record_keys, tracing::debug_span!("onlyonce.record", keys)),
                Call::Complete => (complete, complete_keys, tracing::debug_span!("onlyonce.complete", keys)),
                Call::Release => (release, release_keys, tracing::debug_span!("onlyonce.release", keys)),
            };
            histogram.record(keys as f64);
            Timer::new(duration, span)
        }

        /// Starts to measure a write.
        pub(crate) fn commit(&self, sync: bool) -> Timer<'_> {
            let histogram = if sync { &self.synced_commit } else { &self.commit };
            Timer::new(histogram, tracing::debug_span!("onlyonce.commit", sync))
        }

        /// Starts to measure a flush.
        pub(crate) fn flush(&self) -> Timer<'_> {
            Timer::new(&self.flush, tracing::debug_span!("onlyonce.flush"))
        }

        /// Counts a claim of a key that an earlier attempt did not complete.
        pub(crate) fn repeated(&self, prior: PriorAttempt, attempt: u32) {
            self.attempt.record(attempt);
            for ((this, _), counter) in PRIORS.iter().zip(&self.repeated) {
                counter.increment(u64::from(*this == prior));
            }
        }

        /// Records the time from claim to completion.
        pub(crate) fn processed(&self, ms: impl FnOnce() -> u64) {
            self.processing.record(Duration::from_millis(ms()));
        }

        /// Exports counters and gauges if their interval is over.
        pub(crate) fn export(
            &self,
            counters: &Counters,
            gauges: impl FnOnce() -> Gauges,
            expensive: impl FnOnce() -> ExpensiveGauges,
        ) {
            let mut last = self.last.lock();
            if !is_due(&mut last.at, INTERVAL) {
                return;
            }
            self.export_now(&mut last, counters, &gauges());
            if is_due(&mut last.expensive_at, EXPENSIVE_INTERVAL) {
                let ExpensiveGauges { held, disk_bytes } = expensive();
                self.held.set(held as f64);
                self.disk_bytes.set(disk_bytes as f64);
            }
        }

        /// Exports the last counts when the store closes, and sets the gauges to zero.
        pub(crate) fn end(&self, counters: &Counters, gauges: impl FnOnce() -> Gauges) {
            let Gauges { journal_syncs, is_poisoned, now_ms, .. } = gauges();
            let nothing = Gauges { journal_syncs, is_poisoned, now_ms, ..Gauges::default() };
            self.export_now(&mut self.last.lock(), counters, &nothing);
            self.held.set(0.0);
        }

        /// Exports differences: the store's counters begin at zero at each open, and the exported ones continue.
        fn export_now(&self, last: &mut LastExport, counters: &Counters, gauges: &Gauges) {
            let now: Vec<u64> = COUNTERS.iter().map(|(_, _, get)| get(counters)).collect();
            let before = last.counters.iter().copied().chain(std::iter::repeat(0));
            for ((counter, now), before) in self.counters.iter().zip(&now).zip(before) {
                counter.increment(now.saturating_sub(before));
            }
            last.counters = now;
            self.journal_syncs.increment(gauges.journal_syncs.saturating_sub(last.journal_syncs));
            last.journal_syncs = gauges.journal_syncs;
            for (gauge, get) in &self.gauges {
                gauge.set(get(gauges));
            }
        }
    }

    fn is_due(last: &mut Option<Instant>, interval: Duration) -> bool {
        let is_due = last.is_none_or(|last| last.elapsed() >= interval);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}
