//! A file for each question. Each run gives its rows, or says what was answered wrong.

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

/// The large batches of all workloads but the consumer's day.
pub const BATCH: usize = 512;

/// A run of the bench.
pub struct Run {
    pub scale: Scale,
    pub workloads: Vec<Workload>,
    pub subjects: Vec<Kind>,
    pub dir: PathBuf,
    pub plant_wrong_answer: bool,
    /// Bits of onlyonce's filter a key, in bytes, as measured last: the bare filter gets as many.
    pub filter_bytes_per_key: std::cell::Cell<f64>,
}

impl Run {
    pub fn has(&self, workload: Workload) -> bool {
        self.workloads.contains(&workload)
    }

    pub fn has_subject(&self, kind: Kind) -> bool {
        self.subjects.contains(&kind)
    }

    /// Opens a subject in a directory of its own, works with it, and removes what it left.
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
        // What an earlier subject left to the kernel to write would be written at this one's expense.
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

    /// The disk's syncs a second just now.
    pub fn fsyncs_per_s(&self) -> Result<f64> {
        machine::fsyncs_per_s(&self.dir, Duration::from_millis(200))
    }
}

/// Says what is measured now.
pub fn say(what: &str) {
    eprintln!("{what}");
}

pub fn remove(dir: &Path) -> Result<()> {
    std::fs::remove_dir_all(dir).with_context(|| format!("{} cannot be removed", dir.display()))
}

/// Inserts the first `count` keys, an equal part into each bucket; the last bucket is left as inserting left it.
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
    ensure!(first == count, "{count} distinct keys were inserted, and {first} were answered as the first");
    Ok(())
}

/// Inserts some keys again: none of them may be answered as the first.
pub fn insert_again(subject: &dyn Subject, known: &[Key], result: &[u8]) -> Result<()> {
    for batch in known.chunks(BATCH).step_by(known.len().div_ceil(BATCH).div_ceil(8)) {
        let first = subject.insert(batch, result)?;
        ensure!(first == 0, "{first} of {} keys that were there were answered as the first", batch.len());
    }
    Ok(())
}

/// The row's note and durability, as far as the kind of subject decides them.
pub fn describe(row: &mut Row, kind: Kind) {
    row.note = kind.note().map(str::to_owned);
    if !kind.is_persistent() {
        row.durability = "none".to_owned();
    }
}
