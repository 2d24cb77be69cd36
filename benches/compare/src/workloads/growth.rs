//! W9: the cost of checks and records with more keys and with more buckets.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{BATCH, Run, fill, remove, say};
use crate::args::Workload;
use crate::keys::{self, NEW, mix};
use crate::machine::directory_bytes;
use crate::measure::{Latencies, call_each, probe};
use crate::row::Row;
use crate::subject::{Durability, Setup, Subject};
use crate::subjects::onlyonce::OnlyOnce;

/// Checked and recorded keys.
const PROBES: u64 = 1_000_000;

pub fn run(run: &Run) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for part in run.scale.grown_parts {
        for buckets in [2, 8, 32] {
            let count = run.scale.grown / part;
            say(&format!("W9: {count} keys in {buckets} buckets"));
            rows.extend(one(run, count, buckets)?);
        }
    }
    Ok(rows)
}

fn one(run: &Run, count: u64, buckets: u32) -> Result<Vec<Row>> {
    let dir = run.directory("growth");
    std::fs::create_dir_all(&dir)?;
    let setup = Setup { dir: &dir, durability: Durability::Process, keys: count, buckets, filter_bytes: 0 };
    let store = OnlyOnce::open(&setup)?;
    fill(&store, count, buckets, &[])?;
    store.finish_background_work()?;
    let disk = directory_bytes(&dir);
    let filter_bytes = store.memory_bytes().unwrap_or(0);
    let row = |case: &str, rate: f64, cpu: Option<f64>, latencies: &Latencies| {
        let mut row = Row::new(Workload::W9, case, "onlyonce");
        row.keys = count;
        row.buckets = Some(buckets);
        row.batch = BATCH as u32;
        row.figures.ops_per_s = Some(rate);
        row.figures.cpu_us_per_key = cpu;
        row.latencies(latencies);
        row.figures.ram_bytes_per_key = Some(filter_bytes as f64 / count as f64);
        row.figures.disk_bytes_per_key = Some(disk as f64 / count as f64);
        row.more("memory_budget_mib", (setup.memory() >> 20) as f64);
        row
    };
    let check = |keys: &[keys::Key]| store.check(keys);

    let (hits, checks) = store.filter_counts();
    let new = probe(PROBES, BATCH, |i| NEW + i, check)?;
    ensure!(new.answers == 0, "{} of {} new keys are reported as known", new.answers, new.keys);
    let (hits, checks) = (store.filter_counts().0 - hits, store.filter_counts().1 - checks);
    let mut new_row = row("new keys", new.ops_per_s, new.cpu_us_per_key, &new.latencies);
    new_row.more("to_disk_percent", 100.0 * hits as f64 / checks.max(1) as f64);

    let known = probe(PROBES / 3, BATCH, |i| mix(i) % count, check)?;
    ensure!(known.answers == known.keys, "of {} known keys {} were found", known.keys, known.answers);

    let recorded = keys::keys(2 * NEW, usize::try_from(PROBES.min(count))?);
    let cpu_s = store.cpu_s()?;
    let start = Instant::now();
    let called = call_each(&recorded, BATCH, |keys| store.insert(keys, &[]))?;
    store.finish_background_work()?;
    let elapsed = start.elapsed();
    let cpu_us = (store.cpu_s()? - cpu_s) * 1e6 / recorded.len() as f64;
    ensure!(called.answers == recorded.len() as u64, "of {} new keys {} were first", recorded.len(), called.answers);

    let rows = vec![
        new_row,
        row("uniform", known.ops_per_s, known.cpu_us_per_key, &known.latencies),
        row("record", recorded.len() as f64 / elapsed.as_secs_f64(), Some(cpu_us), &called.latencies),
    ];
    Box::new(store).close()?;
    remove(&dir)?;
    Ok(rows)
}
