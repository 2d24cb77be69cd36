//! What the `metrics` facade is told, and spans for `tracing`. Both with the feature `metrics` alone; without it this is
//! nothing, and costs nothing.
//!
//! The facade is never called for a key. Counters are the store's own, which the keeper tells once a second; histograms are for
//! calls. The names are in `docs/metrics.md`, and `tests/metrics.rs` compares the two.

use std::path::Path;

use crate::stats::Counters;
use onlyonce_core::PriorAttempt;

/// What somebody called for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Call {
    Check,
    Claim,
    Record,
    Complete,
    Release,
}

/// What the store holds at the moment.
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "nobody is told"))]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Gauges {
    pub(crate) in_flight: u64,
    pub(crate) unflushed: u64,
    pub(crate) buckets: u64,
    pub(crate) filter_bytes: u64,
    pub(crate) journal_bytes: u64,
    pub(crate) log_syncs: u64,
    pub(crate) now_ms: u64,
    pub(crate) is_poisoned: bool,
}

/// As [`Gauges`], of what takes long to find out.
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "nobody is told"))]
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

    /// Nobody listens.
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

    /// How often counters and levels are told, and those that take long to find out.
    const INTERVAL: Duration = Duration::from_secs(1);
    const EXPENSIVE_INTERVAL: Duration = Duration::from_secs(10);

    /// The counters of [`Counters`]: name, label, and where the figure is.
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
    /// A gauge, and where its figure is.
    type GaugeSource = (Gauge, fn(&Gauges) -> f64);
    const PRIORS: [(PriorAttempt, &str); 4] = [
        (PriorAttempt::Released, "released"),
        (PriorAttempt::LeaseExpired, "lease_expired"),
        (PriorAttempt::Dropped, "dropped"),
        (PriorAttempt::Crashed, "crashed"),
    ];

    fn describe() {
        describe_counter!("onlyonce.claims", Unit::Count, "Keys claimed or recorded, by what was answered");
        describe_counter!(
            "onlyonce.claims.repeated",
            Unit::Count,
            "Claims that go on with unfinished work, by how it was left"
        );
        describe_counter!("onlyonce.completions", Unit::Count, "Leases completed");
        describe_counter!("onlyonce.releases", Unit::Count, "Leases released");
        describe_counter!(
            "onlyonce.leases.lost",
            Unit::Count,
            "Completions, releases and renewals that another holder had overtaken"
        );
        describe_counter!("onlyonce.filter.checks", Unit::Count, "Keys looked up in the filters");
        describe_counter!("onlyonce.filter.hits", Unit::Count, "Keys that a filter did not rule out");
        describe_counter!(
            "onlyonce.filter.false_positives",
            Unit::Count,
            "Keys that no bucket had, though a filter did not rule them out"
        );
        describe_counter!("onlyonce.fail_open", Unit::Count, "Messages let through without an answer of the store");
        describe_counter!("onlyonce.log.syncs", Unit::Count, "Syncs of the log that calls waited for");
        describe_gauge!("onlyonce.keys.in_flight", Unit::Count, "Keys in progress");
        describe_gauge!("onlyonce.keys.held", Unit::Count, "Keys that wait for a decision");
        describe_gauge!("onlyonce.keys.unflushed", Unit::Count, "Completed keys that are not in a bucket yet");
        describe_gauge!("onlyonce.buckets", Unit::Count, "Live buckets");
        describe_gauge!("onlyonce.filter.size", Unit::Bytes, "Memory of the filters");
        describe_gauge!("onlyonce.journal.size", Unit::Bytes, "Journal records since the last flush");
        describe_gauge!("onlyonce.disk.size", Unit::Bytes, "Files of the store");
        describe_gauge!("onlyonce.time", Unit::Seconds, "The store's time, since the Unix epoch");
        describe_gauge!("onlyonce.poisoned", Unit::Count, "1 where the store refuses until it is reopened, else 0");
        describe_histogram!("onlyonce.call.duration", Unit::Seconds, "How long a call took, by what was called");
        describe_histogram!("onlyonce.call.keys", Unit::Count, "Keys of a call, by what was called");
        describe_histogram!(
            "onlyonce.commit.duration",
            Unit::Seconds,
            "How long a write took, by whether it waited for the disk"
        );
        describe_histogram!("onlyonce.flush.duration", Unit::Seconds, "How long a flush took");
        describe_histogram!(
            "onlyonce.processing.duration",
            Unit::Seconds,
            "From the claim to the completion, one key a call"
        );
        describe_histogram!(
            "onlyonce.claim.attempt",
            Unit::Count,
            "The number of an attempt, of those after the first"
        );
    }

    /// Handles of one store's figures. Whoever is to hear them must be there when the store is opened.
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
        log_syncs: Counter,
        gauges: [GaugeSource; 7],
        held: Gauge,
        disk_bytes: Gauge,
        last: Mutex<LastExport>,
    }

    /// What was told last.
    #[derive(Default)]
    struct LastExport {
        counters: Vec<u64>,
        log_syncs: u64,
        at: Option<Instant>,
        expensive_at: Option<Instant>,
    }

    /// Measures until it is dropped.
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
                log_syncs: metrics::counter!("onlyonce.log.syncs", labels(None)),
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

        /// Measures a call from here on.
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

        /// Measures a write from here on.
        pub(crate) fn commit(&self, sync: bool) -> Timer<'_> {
            let histogram = if sync { &self.synced_commit } else { &self.commit };
            Timer::new(histogram, tracing::debug_span!("onlyonce.commit", sync))
        }

        /// Measures a seal from here on.
        pub(crate) fn flush(&self) -> Timer<'_> {
            Timer::new(&self.flush, tracing::debug_span!("onlyonce.flush"))
        }

        /// A claim that goes on with unfinished work.
        pub(crate) fn repeated(&self, prior: PriorAttempt, attempt: u32) {
            self.attempt.record(attempt);
            for ((this, _), counter) in PRIORS.iter().zip(&self.repeated) {
                counter.increment(u64::from(*this == prior));
            }
        }

        /// How long work took.
        pub(crate) fn processed(&self, ms: impl FnOnce() -> u64) {
            self.processing.record(Duration::from_millis(ms()));
        }

        /// Tells counters and levels, where it is time.
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

        /// Tells what was counted since the last time, and that there is nothing any more.
        pub(crate) fn end(&self, counters: &Counters, gauges: impl FnOnce() -> Gauges) {
            let Gauges { log_syncs, is_poisoned, now_ms, .. } = gauges();
            let nothing = Gauges { log_syncs, is_poisoned, now_ms, ..Gauges::default() };
            self.export_now(&mut self.last.lock(), counters, &nothing);
            self.held.set(0.0);
        }

        /// Differences, for the next opening counts from zero, and whoever listens goes on.
        fn export_now(&self, last: &mut LastExport, counters: &Counters, gauges: &Gauges) {
            let now: Vec<u64> = COUNTERS.iter().map(|(_, _, get)| get(counters)).collect();
            let before = last.counters.iter().copied().chain(std::iter::repeat(0));
            for ((counter, now), before) in self.counters.iter().zip(&now).zip(before) {
                counter.increment(now.saturating_sub(before));
            }
            last.counters = now;
            self.log_syncs.increment(gauges.log_syncs.saturating_sub(last.log_syncs));
            last.log_syncs = gauges.log_syncs;
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
