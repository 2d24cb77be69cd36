//! W3, records of new keys, and W4, claim then complete. A measurement includes the flush to the final files.

use std::time::Instant;

use anyhow::{Result, anyhow, ensure};

use super::{BATCH, Run, describe, insert_again, say};
use crate::args::{Size, Workload};
use crate::keys::{self, Key, RESULT};
use crate::machine::{directory_bytes, journal_bytes};
use crate::measure::{Latencies, call_each};
use crate::row::Row;
use crate::subject::{Durability, Kind, Setup, Subject};

pub fn records(run: &Run, size: &Size) -> Result<Vec<Row>> {
    let subjects = run.subjects.iter().filter(|kind| **kind != Kind::Bloom);
    all(run, size, Workload::W3, "record", subjects, &[])
}

pub fn claims_and_completions(run: &Run, size: &Size) -> Result<Vec<Row>> {
    let subjects = run.subjects.iter().filter(|kind| **kind == Kind::Onlyonce);
    all(run, size, Workload::W4, "claim, complete", subjects, RESULT)
}

fn all<'a>(
    run: &Run,
    size: &Size,
    workload: Workload,
    case: &str,
    subjects: impl Iterator<Item = &'a Kind> + Clone,
    result: &[u8],
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (batch, &threads) in [BATCH, 1].into_iter().flat_map(|batch| size.threads.iter().map(move |n| (batch, n))) {
        let count = if batch == 1 { size.single } else { size.batched };
        // Generated before the measurement, so that background work gets no free time.
        let keys = &keys::keys(0, usize::try_from(count)?)[..];
        for &kind in subjects.clone() {
            say(&format!("{workload:?}: {}, {} keys, {threads} threads, {batch} a call", kind.name(), keys.len()));
            let dir = run.directory("inserts");
            let setup = Setup {
                dir: &dir,
                durability: Durability::Process,
                keys: keys.len() as u64,
                buckets: 24,
                filter_bytes: 0,
            };
            let mut row = run.with(kind, &setup, |subject| one(subject, keys, batch, threads, result, &dir))?;
            row.workload = workload;
            row.case = case.to_owned();
            row.subject = kind.name().to_owned();
            describe(&mut row, kind);
            if kind == Kind::Onlyonce {
                row.buckets = Some(1);
            }
            if !kind.is_persistent() {
                row.figures.disk_bytes_per_key = None;
                row.figures.write_amp = None;
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

fn one(
    subject: &dyn Subject,
    keys: &[Key],
    batch: usize,
    threads: u32,
    result: &[u8],
    dir: &std::path::Path,
) -> Result<Row> {
    let written = subject.bytes_written()?;
    let cpu_s = subject.cpu_s()?;
    let start = Instant::now();
    let called = std::thread::scope(|scope| {
        let part = keys.len().div_ceil(threads as usize);
        let insert = |keys| call_each(keys, batch, |keys| subject.insert(keys, result));
        let callers: Vec<_> = keys.chunks(part).map(|keys| scope.spawn(move || insert(keys))).collect();
        callers
            .into_iter()
            .map(|caller| caller.join().map_err(|_| anyhow!("a caller panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let answered = start.elapsed();
    subject.finish_background_work()?;
    let elapsed = start.elapsed();
    let written = subject.bytes_written()? - written;
    let cpu_s = subject.cpu_s()? - cpu_s;

    let first: u64 = called.iter().map(|called| called.answers).sum();
    let count = keys.len();
    ensure!(first == count as u64, "{count} distinct keys were inserted, but {first} were reported as new");
    let journal = journal_bytes(dir);
    let disk = directory_bytes(dir) - journal;
    insert_again(subject, keys, result)?;

    let mut latencies = Latencies::new()?;
    for called in &called {
        latencies.merge(&called.latencies)?;
    }
    // The caller sets workload, case and subject.
    let mut row = Row::new(Workload::W3, "", "");
    row.keys = count as u64;
    row.threads = threads;
    row.batch = batch as u32;
    row.figures.ops_per_s = Some(count as f64 / elapsed.as_secs_f64());
    row.latencies(&latencies);
    row.figures.cpu_us_per_key = Some(cpu_s * 1e6 / count as f64);
    row.figures.disk_bytes_per_key = Some(disk as f64 / count as f64);
    row.figures.write_amp = Some(written as f64 / (count * (size_of::<Key>() + result.len())) as f64);
    row.more("answered_per_s", count as f64 / answered.as_secs_f64());
    if journal > 0 {
        row.more("journal_mib", journal as f64 / f64::from(1 << 20));
    }
    Ok(row)
}
