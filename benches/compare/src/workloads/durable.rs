//! W5: claim, then complete, synced before the answer. Peers only insert.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use clap::ValueEnum;

use super::{BATCH, Run, describe, say};
use crate::args::Workload;
use crate::child;
use crate::keys::{RESULT, keys};
use crate::measure::{Called, Latencies};
use crate::row::Row;
use crate::subject::{Durability, Kind, Setup, Subject};

/// The callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// One thread, one key at a time.
    Alone,
    /// 64 threads, one key at a time each.
    Callers,
    /// One thread, 512 keys at a time.
    Batches,
}

impl Way {
    /// The argument on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Callers => "callers",
            Self::Batches => "batches",
        }
    }

    pub fn case(self) -> &'static str {
        match self {
            Self::Alone => "alone",
            Self::Callers => "64 callers",
            Self::Batches => "batches",
        }
    }

    fn threads(self) -> u32 {
        if self == Self::Callers { 64 } else { 1 }
    }

    fn batch(self) -> usize {
        if self == Self::Batches { BATCH } else { 1 }
    }
}

pub fn run(run: &Run) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for way in [Way::Alone, Way::Callers, Way::Batches] {
        for &kind in run.subjects.iter().filter(|kind| kind.is_persistent()) {
            say(&format!("W5: {}, {}", kind.name(), way.case()));
            let dir = run.directory("durable");
            let setup =
                Setup { dir: &dir, durability: Durability::Disk, keys: 1_000_000, buckets: 24, filter_bytes: 0 };
            let fsyncs_per_s = run.fsyncs_per_s()?;
            let mut row = run.with(kind, &setup, |subject| {
                let cpu_s = subject.cpu_s()?;
                let start = Instant::now();
                let (count, latencies) = insert_for(subject, way, run.scale.synced)?;
                subject.finish_background_work()?;
                let mut row = Row::new(Workload::W5, way.case(), kind.name());
                row.keys = count;
                row.figures.ops_per_s = Some(count as f64 / start.elapsed().as_secs_f64());
                row.figures.cpu_us_per_key = Some((subject.cpu_s()? - cpu_s) * 1e6 / count as f64);
                row.latencies(&latencies);
                Ok(row)
            })?;
            describe(&mut row, kind);
            row.durability = "disk".to_owned();
            row.threads = way.threads();
            row.batch = way.batch() as u32;
            row.figures.fsyncs_per_s = Some(fsyncs_per_s);
            if kind == Kind::Redb {
                row.note = None;
            }
            if kind == Kind::Onlyonce {
                row.buckets = Some(1);
                match child::syncs_per_cycle(&run.directory("traced"), way, run.scale.synced)? {
                    Some(syncs) => row.more("syncs_per_cycle", syncs),
                    None => row.note = Some("syncs are not counted without strace".to_owned()),
                }
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Inserts new keys for a time, and returns how many.
pub fn insert_for(subject: &dyn Subject, way: Way, duration: Duration) -> Result<(u64, Latencies)> {
    let deadline = Instant::now() + duration;
    let one_caller = |caller: u64| -> Result<(u64, Latencies)> {
        let (mut called, mut count) = (Called::new()?, 0);
        while Instant::now() < deadline {
            let keys = keys((caller << 32) + count, way.batch());
            called.call_each(&keys, way.batch(), |keys| subject.insert(keys, RESULT))?;
            count += keys.len() as u64;
        }
        let first = called.answers;
        ensure!(first == count, "{count} distinct keys were inserted, but {first} were reported as new");
        Ok((count, called.latencies))
    };
    let called = std::thread::scope(|scope| {
        let one_caller = &one_caller;
        let callers: Vec<_> =
            (0..u64::from(way.threads())).map(|caller| scope.spawn(move || one_caller(caller))).collect();
        callers
            .into_iter()
            .map(|caller| caller.join().map_err(|_| anyhow!("a caller panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let mut all = (0, Latencies::new()?);
    for (count, latencies) in &called {
        all.0 += count;
        all.1.merge(latencies)?;
    }
    Ok(all)
}
