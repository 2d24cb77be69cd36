//! A store exports exactly the metrics that `docs/metrics.md` lists, each with its kind, unit and labels, and each of
//! them occurs. One test, because a process has one recorder.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use metrics_util::MetricKind;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use onlyonce::{
    Builder, Claim, Error, Key, Lease, ManualClock, OnInterrupt, RecordOutcome, Store, Timestamp, TimestampError,
};

const START_MS: u64 = 1_700_000_000_000;

/// Kind, unit, and the labels without that of the store.
type Shape = (String, String, BTreeSet<String>);

/// The table of `docs/metrics.md`, and the values of labels that it names.
fn documented() -> (BTreeMap<String, Shape>, BTreeSet<(String, String)>) {
    // The crates of HTTP and deliveries export the other metrics of the page, and test them.
    let page = include_str!("../docs/metrics.md").split("## Metrics of deliveries").next().unwrap();
    let ticked = |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let (mut shapes, mut values) = (BTreeMap::new(), BTreeSet::new());
    for line in page.lines().filter(|line| line.starts_with("| `onlyonce.")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, unit, labels, text] = cells[..] else { panic!("{line}") };
        let (name, labels) = (ticked(name).remove(0), ticked(labels));
        if labels.is_empty() || labels[0] == "synced" {
            // Code in the text is not a value of a label.
        } else {
            let listed = text.split_once(':').unwrap().1.split(". ").next().unwrap();
            values.extend(ticked(listed).into_iter().map(|value| (name.clone(), value)));
        }
        shapes.insert(name, (kind.to_owned(), unit.to_owned(), labels.into_iter().collect()));
    }
    (shapes, values)
}

/// The exported metrics, summed over snapshots, each of which starts from zero.
#[derive(Default)]
struct Exported {
    shapes: BTreeMap<String, Shape>,
    /// By name and by the value of the label that is not the store's.
    counts: BTreeMap<(String, String), u64>,
    gauges: BTreeMap<(String, String), f64>,
    histograms: BTreeMap<(String, String), Vec<f64>>,
    labels: BTreeSet<String>,
}

impl Exported {
    fn add(&mut self, snapshotter: &Snapshotter) {
        for (key, unit, description, value) in snapshotter.snapshot().into_vec() {
            let name = key.key().name().to_owned();
            assert!(description.is_some(), "{name} is not described");
            let labels: BTreeMap<_, _> = key.key().labels().map(|label| (label.key(), label.value())).collect();
            assert!(labels.contains_key("store"), "{name} has no label `store`");
            self.labels.extend(labels.values().map(|value| (*value).to_owned()));
            let own = labels.iter().filter(|(label, _)| **label != "store");
            let (own, value_of): (BTreeSet<String>, Vec<&str>) =
                own.map(|(label, value)| ((*label).to_owned(), *value)).unzip();
            let series = (name.clone(), value_of.join(","));
            let kind = match (key.kind(), value) {
                (MetricKind::Counter, DebugValue::Counter(count)) => {
                    *self.counts.entry(series).or_default() += count;
                    "counter"
                }
                (MetricKind::Gauge, DebugValue::Gauge(level)) => {
                    let highest = self.gauges.entry(series).or_default();
                    *highest = highest.max(level.into_inner());
                    "gauge"
                }
                (MetricKind::Histogram, DebugValue::Histogram(values)) => {
                    let all = self.histograms.entry(series).or_default();
                    all.extend(values.into_iter().map(|value| value.into_inner()));
                    "histogram"
                }
                other => panic!("{name}: {other:?}"),
            };
            let unit = match unit.unwrap().as_str() {
                "count" => "",
                unit => unit,
            };
            let shape = (kind.to_owned(), unit.to_owned(), own);
            assert_eq!(*self.shapes.entry(name.clone()).or_insert_with(|| shape.clone()), shape, "{name}");
        }
    }

    fn count(&self, name: &str, label: &str) -> u64 {
        self.counts.get(&(name.to_owned(), label.to_owned())).copied().unwrap_or_default()
    }
}

fn builder(clock: &ManualClock) -> Builder {
    Store::builder().lease(Duration::from_secs(1)).memory_budget(32 << 20).clock(clock.clone())
}

fn acquire(store: &Store, key: &str) -> Lease {
    match store.claim(key).wait().unwrap() {
        Claim::Acquired(lease) => lease,
        other => panic!("{key}: {other:?}"),
    }
}

/// Makes a store count every event.
fn live(dir: &Path) {
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let path = dir.join("store");
    let store = builder(&clock).open(&path).unwrap();
    store.check("secret-key").wait().unwrap();
    acquire(&store, "secret-key").complete("r").wait().unwrap();
    assert!(matches!(store.claim("secret-key").wait().unwrap(), Claim::Completed(_)));
    drop(store.claim(Key::from("guarded").fingerprint("a")).wait().unwrap());
    assert!(matches!(store.claim(Key::from("guarded").fingerprint("b")).wait(), Err(Error::PayloadMismatch { .. })));
    acquire(&store, "released").release().wait().unwrap();
    acquire(&store, "released").complete("r").wait().unwrap();
    drop(acquire(&store, "dropped"));
    let late = acquire(&store, "dropped");
    assert!(matches!(store.claim("dropped").wait().unwrap(), Claim::InProgress(_)));
    clock.advance(Duration::from_millis(1_500));
    let next = acquire(&store, "dropped");
    late.complete("late").wait().unwrap_err();
    clock.advance(Duration::from_millis(250));
    next.complete("r").wait().unwrap();
    let _crashes = acquire(&store, "crashed");
    store.count_fail_open();
    // Enough for false positives of the filter.
    for batch in 0..60_u64 {
        let keys: Vec<String> = (0..1_000).map(|i| format!("{batch}/{i}")).collect();
        assert!(
            store.record_batch(&keys).wait().unwrap().into_iter().all(|answer| answer.unwrap() == RecordOutcome::First)
        );
    }
    store.flush().unwrap();
    for batch in 0..300_u64 {
        store.check_batch((0..1_000).map(|i| format!("new {batch}/{i}"))).wait().unwrap();
        if store.stats().filter_false_positives > 0 {
            break;
        }
    }
    assert!(store.stats().filter_false_positives > 0, "300,000 new keys without a false positive");
    // The counters continue after a reopen.
    store.close().wait().unwrap();
    let store = builder(&clock).open(&path).unwrap();
    acquire(&store, "crashed").complete("r").wait().unwrap();
    store.close().wait().unwrap();

    let stream = builder(&clock).stream_time(Duration::from_secs(60)).open(dir.join("stream")).unwrap();
    stream.record(Key::from("a").at(Timestamp::from_unix_ms(START_MS))).wait().unwrap();
    assert!(matches!(
        stream.record(Key::from("b").at(Timestamp::from_unix_ms(5))).wait(),
        Err(Error::Timestamp(TimestampError::TooOld { .. }))
    ));
    assert!(matches!(
        stream.record(Key::from("c").at(Timestamp::from_unix_ms(u64::MAX))).wait(),
        Err(Error::Timestamp(TimestampError::TooFarAhead { .. }))
    ));
    stream.close().wait().unwrap();
}

#[test]
fn the_exported_metrics_are_those_of_the_docs_and_each_of_them_occurs() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, mut exported) = (recorder.snapshotter(), Exported::default());
    recorder.install().unwrap();
    let dir = tempfile::tempdir().unwrap();
    live(dir.path());
    // A store that stays open until its background workers have exported the gauges.
    let clock = ManualClock::at(Timestamp::from_unix_ms(START_MS));
    let held = builder(&clock).on_interrupt(OnInterrupt::Hold).open(dir.path().join("held")).unwrap();
    drop(acquire(&held, "held"));
    let _running = acquire(&held, "running");
    held.record("flushed").wait().unwrap();
    held.flush().unwrap();
    held.record("unflushed").wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let (shapes, values) = documented();
    let gauges: Vec<&String> = shapes.iter().filter(|(_, shape)| shape.0 == "gauge").map(|(name, _)| name).collect();
    let is_exported = |exported: &Exported, name: &str| {
        exported.gauges.iter().any(|(series, level)| series.0 == name && *level > 0.0)
    };
    // No store in this test is poisoned.
    while gauges.iter().any(|name| *name != "onlyonce.poisoned" && !is_exported(&exported, name)) {
        assert!(Instant::now() < deadline, "{:?}", exported.gauges);
        std::thread::sleep(Duration::from_millis(50));
        exported.add(&snapshotter);
    }
    held.close().wait().unwrap();
    exported.add(&snapshotter);

    let expected = [
        ("onlyonce.claims", "acquired", 11),
        ("onlyonce.claims", "recorded", 60_003),
        ("onlyonce.claims", "duplicate", 1),
        ("onlyonce.claims", "in_progress", 1),
        ("onlyonce.claims", "payload_mismatch", 1),
        ("onlyonce.claims", "too_old", 1),
        ("onlyonce.claims", "too_far_ahead", 1),
        ("onlyonce.claims.repeated", "released", 1),
        ("onlyonce.claims.repeated", "dropped", 1),
        ("onlyonce.claims.repeated", "lease_expired", 1),
        ("onlyonce.claims.repeated", "crashed", 1),
        ("onlyonce.completions", "", 4),
        ("onlyonce.releases", "", 1),
        ("onlyonce.leases.lost", "", 1),
        ("onlyonce.fail_open", "", 1),
    ];
    for (name, label, count) in expected {
        assert_eq!(exported.count(name, label), count, "{name} {label}");
    }
    let mut attempts = exported.histograms[&("onlyonce.claim.attempt".to_owned(), String::new())].clone();
    attempts.sort_by(f64::total_cmp);
    assert_eq!(attempts, [2.0, 2.0, 2.0, 3.0]);
    let processing = &exported.histograms[&("onlyonce.processing.duration".to_owned(), String::new())];
    assert!(processing.contains(&0.25) && processing.len() == 4, "{processing:?}");
    let keys = &exported.histograms[&("onlyonce.call.keys".to_owned(), "record".to_owned())];
    assert_eq!(keys.iter().filter(|keys| **keys == 1_000.0).count(), 60);

    let (documented, emitted): (BTreeSet<_>, BTreeSet<_>) = (shapes.keys().collect(), exported.shapes.keys().collect());
    assert_eq!(documented, emitted, "the names of docs/metrics.md, and the exported names");
    for (name, shape) in &shapes {
        assert_eq!(exported.shapes[name], *shape, "{name}");
        match shape.0.as_str() {
            "counter" => {
                assert!(exported.counts.iter().any(|(series, count)| series.0 == *name && *count > 0), "{name}")
            }
            "histogram" => {
                let values = exported.histograms.iter().filter(|(series, _)| series.0 == *name);
                assert!(values.clone().all(|(_, values)| values.iter().all(|value| (0.0..1e6).contains(value))));
                assert!(values.clone().any(|(_, values)| !values.is_empty()), "{name} never occurred");
            }
            _ => {}
        }
    }
    let named: BTreeSet<(String, String)> = exported
        .counts
        .keys()
        .chain(exported.histograms.keys())
        .filter(|(name, label)| !label.is_empty() && name != "onlyonce.commit.duration")
        .cloned()
        .collect();
    assert_eq!(values, named, "the values of labels in docs/metrics.md, and the exported values");
    for (name, value) in &values {
        let occurred = exported.count(name, value) > 0
            || exported.histograms.get(&(name.clone(), value.clone())).is_some_and(|values| !values.is_empty());
        assert!(occurred, "{name} with {value} never occurred");
    }

    for label in &exported.labels {
        assert!(!label.contains("secret") && !label.contains("order"), "a key is a label: {label}");
    }
}
