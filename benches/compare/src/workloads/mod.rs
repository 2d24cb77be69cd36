//! One file per workload. A run returns rows, or an error if an answer is wrong.

pub mod checks;
pub mod day;
pub mod durable;
pub mod expiry;
pub mod growth;
pub mod inserts;
pub mod opening;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::args::{Scale, Workload};
use crate::keys::{Key, keys};
use crate::machine;
use crate::row::Row;
use crate::subject::{self, Kind, Setup, Subject};
use crate::subjects::liar::Liar;

/// The batch size of all workloads but W6.
pub const BATCH: usize = 512;

/// A run of the benchmark.
pub struct Run {
    pub scale: Scale,
    pub workloads: Vec<Workload>,
    pub subjects: Vec<Kind>,
    pub dir: PathBuf,
    pub plant_wrong_answer: bool,
    /// The size of the filter of onlyonce in bytes per key, as measured last. The bare filter gets the same size.
    pub filter_bytes_per_key: std::cell::Cell<f64>,
}

impl Run {
    pub fn has(&self, workload: Workload) -> bool {
        self.workloads.contains(&workload)
    }

    pub fn has_subject(&self, kind: Kind) -> bool {
        self.subjects.contains(&kind)
    }

    /// Opens a subject in a new directory, runs `work`, and removes the directory.
    pub fn with<T>(&self, kind: Kind, setup: &Setup, work: impl FnOnce(&dyn Subject) -> Result<T>) -> Result<T> {
        self.with_opened(kind.name(), setup, || subject::open(kind, setup), work)
    }

    pub fn with_opened<T>(
        &self,
        name: &str,
        setup: &Setup,
        open: impl FnOnce() -> Result<Box<dyn Subject>>,
        work: impl FnOnce(&dyn Subject) -> Result<T>,
    ) -> Result<T> {
        // Otherwise the kernel would write back data of an earlier subject during this measurement.
        machine::write_back()?;
        let mut subject = open().with_context(|| format!("{name} does not open"))?;
        if self.plant_wrong_answer {
            subject = Box::new(Liar::new(subject));
        }
        let done = work(&*subject).with_context(|| format!("{name} failed"))?;
        subject.close().with_context(|| format!("{name} does not close"))?;
        remove(setup.dir)?;
        Ok(done)
    }

    pub fn directory(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The current number of syncs per second of the disk.
    pub fn fsyncs_per_s(&self) -> Result<f64> {
        machine::fsyncs_per_s(&self.dir, Duration::from_millis(200))
    }
}

/// Prints the current measurement.
pub fn say(what: &str) {
    eprintln!("{what}");
}

pub fn remove(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("{} cannot be removed", dir.display()))
}

/// Inserts the first `count` keys, an equal part into each bucket. The last bucket is not flushed.
pub fn fill(subject: &dyn Subject, count: u64, buckets: u32, result: &[u8]) -> Result<()> {
    const PIECE: u64 = 128 * 1024;
    let mut first = 0;
    for bucket in 0..u64::from(buckets) {
        let end = count * (bucket + 1) / u64::from(buckets);
        let mut from = count * bucket / u64::from(buckets);
        while from < end {
            let piece = keys(from, PIECE.min(end - from) as usize);
            for batch in piece.chunks(BATCH) {
                first += subject.insert(batch, result)? as u64;
            }
            from += piece.len() as u64;
        }
        if bucket + 1 < u64::from(buckets) {
            subject.next_bucket()?;
        }
    }
    ensure!(first == count, "{count} distinct keys were inserted, but {first} were reported as new");
    Ok(())
}

/// Inserts some keys again. None may be reported as new.
pub fn insert_again(subject: &dyn Subject, known: &[Key], result: &[u8]) -> Result<()> {
    for batch in known.chunks(BATCH).step_by(known.len().div_ceil(BATCH).div_ceil(8)) {
        let first = subject.insert(batch, result)?;
        ensure!(first == 0, "{first} of {} keys known keys were reported as new", batch.len());
    }
    Ok(())
}

/// Sets the note and the durability of a row from the kind of subject.
pub fn describe(row: &mut Row, kind: Kind) {
    row.note = kind.note().map(str::to_owned);
    if !kind.is_persistent() {
        row.durability = "none".to_owned();
    }
}
