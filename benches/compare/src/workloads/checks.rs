//! W1, checks of new keys, and W2, checks of known keys.

use anyhow::{Result, ensure};

use super::{BATCH, Run, describe, fill, say};
use crate::args::{Size, Workload};
use crate::child;
use crate::keys::{NEW, RESULT, mix};
use crate::machine::{self, directory_bytes};
use crate::measure::{Probed, probe};
use crate::row::Row;
use crate::subject::{Durability, Kind, Setup, Subject};
use crate::subjects::onlyonce::OnlyOnce;
use crate::subjects::rocks::Families;

const BUCKETS: u32 = 24;

/// Used for the filter of onlyonce if onlyonce is not measured.
pub const FILTER_BYTES_PER_KEY: f64 = 2.5;

/// W1 with many keys: onlyonce, RocksDB with a column family per bucket, and the bare filter.
pub fn many(run: &Run, size: &Size) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let keys = size.live;
    let dir = run.directory("many");
    let setup =
        |filter_bytes| Setup { dir: &dir, durability: Durability::Process, keys, buckets: BUCKETS, filter_bytes };
    if run.has_subject(Kind::Onlyonce) {
        say(&format!("W1: onlyonce, {keys} keys"));
        let setup = setup(0);
        machine::write_back()?;
        std::fs::create_dir_all(&dir)?;
        let store = OnlyOnce::open(&setup)?;
        fill(&store, keys, BUCKETS, &[])?;
        store.finish_background_work()?;
        let filter_bytes_per_key = store.memory_bytes().unwrap_or(0) as f64 / keys as f64;
        run.filter_bytes_per_key.set(filter_bytes_per_key);
        let disk = directory_bytes(&dir);
        let (hits, checks) = store.filter_counts();
        let mut new = new_keys(size, &store, "onlyonce", keys)?;
        let (hits, checks) = (store.filter_counts().0 - hits, store.filter_counts().1 - checks);
        for row in &mut new {
            row.figures.ram_bytes_per_key = Some(filter_bytes_per_key);
            row.figures.disk_bytes_per_key = Some(disk as f64 / keys as f64);
            row.more("to_disk_percent", 100.0 * hits as f64 / checks.max(1) as f64);
            row.more("memory_budget_mib", (setup.memory() >> 20) as f64);
            row.note = Some("ram: filters".to_owned());
        }
        rows.extend(new);
        Box::new(store).close()?;
        super::remove(&dir)?;
    }
    if run.has_subject(Kind::RocksdbTuned) {
        say(&format!("W1: rocksdb-tuned with {BUCKETS} column families, {keys} keys"));
        let setup = setup(0);
        let open = || Ok(Box::new(Families::open(&setup)?) as Box<dyn Subject>);
        let families = run.with_opened("rocksdb-families", &setup, open, |families| {
            fill(families, keys, BUCKETS, &[])?;
            families.finish_background_work()?;
            new_keys(size, families, "rocksdb-families", keys)
        })?;
        rows.extend(families.into_iter().map(|mut row| {
            row.note = Some("one column family per bucket, each compacted; filters of 10 bits per key".to_owned());
            row
        }));
    }
    if run.has_subject(Kind::Bloom) {
        say(&format!("W1: bare filter, {keys} keys"));
        let setup = setup((run.filter_bytes_per_key.get() * keys as f64) as u64);
        rows.extend(run.with(Kind::Bloom, &setup, |bloom| {
            fill(bloom, keys, 1, &[])?;
            let mut rows = new_keys(size, bloom, "bloom", keys)?;
            for row in &mut rows {
                describe(row, Kind::Bloom);
                row.buckets = Some(1);
                row.figures.ram_bytes_per_key = bloom.memory_bytes().map(|bytes| bytes as f64 / keys as f64);
            }
            Ok(rows)
        })?);
    }
    Ok(rows)
}

/// W1 and W2 with as many keys as the slowest subject can be filled with in reasonable time.
pub fn compared(run: &Run, size: &Size) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let keys = size.compared;
    for &kind in run.subjects.iter().filter(|kind| **kind != Kind::Bloom) {
        say(&format!("W1 and W2: {}, {keys} keys", kind.name()));
        let dir = run.directory("compared");
        let setup = Setup { dir: &dir, durability: Durability::Process, keys, buckets: BUCKETS, filter_bytes: 0 };
        rows.extend(run.with(kind, &setup, |subject| {
            let mut rows = Vec::new();
            let own = subject.memory_bytes();
            fill(subject, keys, BUCKETS, RESULT)?;
            if run.has(Workload::W2) {
                rows.extend(recent(size, subject, kind, keys, "recent")?);
            }
            subject.finish_background_work()?;
            let disk = directory_bytes(&dir);
            let ram = match (kind, subject.memory_bytes()) {
                (Kind::Onlyonce, after) => after,
                (Kind::Moka, _) => Some(child::moka_bytes(keys)?),
                (_, after) => after.zip(own).map(|(after, before)| after.saturating_sub(before)),
            };
            if run.has(Workload::W2) {
                if kind == Kind::Onlyonce {
                    rows.extend(recent(size, subject, kind, keys, "recent, flushed")?);
                }
                for batch in [1, BATCH] {
                    let pick = |i| mix(i ^ 0x5eed) % keys;
                    let count = if batch == 1 { size.probes / 4 } else { size.probes };
                    let probed = probe(count, batch, pick, |keys| subject.check(keys))?;
                    rows.push(known_row(kind, "uniform", keys, batch, &probed)?);
                }
            }
            if run.has(Workload::W1) {
                rows.extend(new_keys(size, subject, kind.name(), keys)?);
            }
            for row in &mut rows {
                describe(row, kind);
                row.buckets = (kind == Kind::Onlyonce).then_some(BUCKETS);
                row.figures.ram_bytes_per_key = ram.map(|bytes| bytes as f64 / keys as f64);
                row.figures.disk_bytes_per_key = kind.is_persistent().then_some(disk as f64 / keys as f64);
            }
            Ok(rows)
        })?);
    }
    Ok(rows)
}

/// Checks of keys that were never inserted.
pub fn new_keys(size: &Size, subject: &dyn Subject, name: &str, keys: u64) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for batch in [1, BATCH] {
        let from = NEW + batch as u64 * (1 << 32);
        let count = if batch == 1 { size.probes / 4 } else { size.probes };
        let probed = probe(count, batch, |i| from + i, |keys| subject.check(keys))?;
        if name == Kind::Bloom.name() {
            ensure!(probed.answers * 50 < probed.keys, "{} of {} new keys pass", probed.answers, probed.keys);
        } else {
            ensure!(probed.answers == 0, "{} of {} new keys are reported as known", probed.answers, probed.keys);
        }
        rows.push(row(Workload::W1, "new keys", name, keys, batch, &probed));
    }
    for row in &mut rows {
        row.buckets = Some(BUCKETS);
    }
    Ok(rows)
}

/// Checks of the most recent keys.
fn recent(size: &Size, subject: &dyn Subject, kind: Kind, keys: u64, case: &str) -> Result<Vec<Row>> {
    let last = (keys / 100).max(1);
    let mut rows = Vec::new();
    // Batches first: recent keys are flushed soon.
    for batch in [BATCH, 1] {
        let count = if batch == 1 { size.probes / 4 } else { size.probes };
        let probed = probe(count, batch, |i| keys - 1 - mix(i) % last, |keys| subject.check(keys))?;
        rows.push(known_row(kind, case, keys, batch, &probed)?);
    }
    Ok(rows)
}

fn known_row(kind: Kind, case: &str, keys: u64, batch: usize, probed: &Probed) -> Result<Row> {
    ensure!(probed.answers == probed.keys, "of {} known keys {} were found", probed.keys, probed.answers);
    Ok(row(Workload::W2, case, kind.name(), keys, batch, probed))
}

fn row(workload: Workload, case: &str, name: &str, keys: u64, batch: usize, probed: &Probed) -> Row {
    let mut row = Row::new(workload, case, name);
    row.keys = keys;
    row.batch = batch as u32;
    row.figures.ops_per_s = Some(probed.ops_per_s);
    // Redis uses its CPU time in another process.
    row.figures.cpu_us_per_key = probed.cpu_us_per_key.filter(|_| name != Kind::Redis.name());
    row.latencies(&probed.latencies);
    row
}
