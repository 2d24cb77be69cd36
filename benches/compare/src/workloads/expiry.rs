//! W7: many keys expire at once. Measures the latency of concurrent claims, and the time until the disk space is free.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use onlyonce::KeyStatus;
use rocksdb::{DB, Options, WriteBatch};

use super::{BATCH, Run, remove, say};
use crate::args::Workload;
use crate::keys::{Key, NEW, RESULT, key, keys};
use crate::machine::directory_bytes;
use crate::measure::{pulse, worst_of_slices};
use crate::row::Row;
use crate::subject::{Durability, Kind, Setup, Subject};
use crate::subjects::onlyonce::{BUCKET, OnlyOnce, claim_and_complete_one};

/// The interval of claims. Latency counts from the scheduled time.
const EVERY: Duration = Duration::from_micros(200);

/// The time before the expiry, for comparison.
const QUIET: Duration = Duration::from_millis(1_500);

/// The maximum time to wait for the disk space.
const PATIENCE: Duration = Duration::from_secs(30);

/// The TTL of keys under the TTL compaction of RocksDB.
const TTL: Duration = Duration::from_secs(1);

pub fn run(run: &Run) -> Result<Vec<Row>> {
    let count = run.scale.leaving;
    let mut rows = Vec::new();
    let dir = run.directory("expiry");
    if run.has_subject(Kind::Onlyonce) {
        say(&format!("W7: onlyonce, {count} keys"));
        rows.push(bucket(&dir, count)?);
        remove(&dir)?;
    }
    if run.has_subject(Kind::RocksdbTuned) || run.has_subject(Kind::RocksdbDefault) {
        for expiry in [Expiry::DeleteRange, Expiry::Ttl] {
            say(&format!("W7: {}, {count} keys", expiry.subject()));
            rows.push(plain_rocksdb(&dir, count, expiry)?);
            remove(&dir)?;
        }
    }
    Ok(rows)
}

fn bucket(dir: &Path, count: u64) -> Result<Row> {
    std::fs::create_dir_all(dir)?;
    let setup = Setup { dir, durability: Durability::Process, keys: count, buckets: 2, filter_bytes: 0 };
    let store = OnlyOnce::open(&setup)?;
    let empty = directory_bytes(dir);
    super::fill(&store, count, 1, &[])?;
    store.finish_background_work()?;
    let leaving = directory_bytes(dir).saturating_sub(empty);
    // The window is two buckets wide: all keys are remembered for one more second, and the bucket is dropped an hour later.
    const SECOND: Duration = Duration::from_secs(1);
    store.next_bucket()?;
    store.clock.advance(BUCKET - SECOND);
    let known = store.check(&keys(0, 1_000))?;
    ensure!(known == 1_000, "only {known} of 1,000 keys inside the window are known");

    let mut from = NEW;
    let claim = || {
        from += 1;
        ensure!(
            claim_and_complete_one(&store.store, &key(from), RESULT)? == 1,
            "a new key was reported as a duplicate"
        );
        Ok(())
    };
    let row = watch("onlyonce", dir, count, leaving, claim, || {
        store.clock.advance(BUCKET + SECOND);
        Ok(())
    })?;
    for check in store.store.check_batch(&keys(0, 1_000)).wait()? {
        ensure!(check? == KeyStatus::New, "a key is remembered longer than the window");
    }
    Box::new(store).close()?;
    Ok(row)
}

/// How keys expire in a plain RocksDB.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expiry {
    DeleteRange,
    Ttl,
}

impl Expiry {
    fn subject(self) -> &'static str {
        match self {
            Self::DeleteRange => "rocksdb, delete_range and compaction",
            Self::Ttl => "rocksdb, TTL compaction",
        }
    }
}

fn plain_rocksdb(dir: &Path, count: u64, expiry: Expiry) -> Result<Row> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_max_background_jobs(2);
    let path = dir.join("db");
    std::fs::create_dir_all(dir)?;
    let db = match expiry {
        Expiry::DeleteRange => DB::open(&options, &path)?,
        Expiry::Ttl => DB::open_with_ttl(&options, &path, TTL)?,
    };
    let empty = directory_bytes(dir);
    let mut batch = WriteBatch::default();
    for number in 0..count {
        batch.put(in_bucket(0, &key(number)), RESULT);
        if batch.len() >= BATCH {
            db.write(std::mem::take(&mut batch))?;
        }
    }
    db.write(batch)?;
    db.flush()?;
    let leaving = directory_bytes(dir).saturating_sub(empty);
    if expiry == Expiry::Ttl {
        // The TTL is in whole seconds, and counts from the last key.
        std::thread::sleep(TTL + Duration::from_secs(1));
    }

    let mut from = NEW;
    let claim = || {
        from += 1;
        let key = in_bucket(1, &key(from));
        ensure!(db.get_pinned(key)?.is_none(), "a new key was reported as a duplicate");
        Ok(db.put(key, RESULT)?)
    };
    let mut row = watch(expiry.subject(), dir, count, leaving, claim, || {
        let (begin, end) = (0u64.to_be_bytes(), 1u64.to_be_bytes());
        if expiry == Expiry::DeleteRange {
            let mut batch = WriteBatch::default();
            batch.delete_range(begin, end);
            db.write(batch)?;
        }
        db.compact_range(Some(begin), Some(end));
        Ok(())
    })?;
    row.note.get_or_insert_with(|| "get, then put".to_owned());
    Ok(row)
}

/// A key with the number of its time bucket as the prefix.
fn in_bucket(bucket: u64, key: &Key) -> [u8; 44] {
    let mut bytes = [0; 44];
    bytes[..8].copy_from_slice(&bucket.to_be_bytes());
    bytes[8..].copy_from_slice(key);
    bytes
}

/// Expires the keys during concurrent claims.
fn watch(
    subject: &str,
    dir: &Path,
    count: u64,
    leaving: u64,
    claim: impl FnMut() -> Result<()> + Send,
    leave: impl FnOnce() -> Result<()>,
) -> Result<Row> {
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    let (beats, left_s, free_s) = std::thread::scope(|scope| {
        let claimer = scope.spawn(|| pulse(start, EVERY, || stop.load(Ordering::Relaxed), claim));
        std::thread::sleep(QUIET);
        let before = directory_bytes(dir);
        let left = Instant::now();
        let waited = leave().map(|()| {
            // The claims use some space meanwhile.
            while before.saturating_sub(directory_bytes(dir)) < leaving * 7 / 10 && left.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(10));
            }
            left.elapsed()
        });
        // Include work that follows the expiry, such as compactions.
        std::thread::sleep(Duration::from_millis(500));
        stop.store(true, Ordering::Relaxed);
        let beats = claimer.join().map_err(|_| anyhow!("the claimer panicked"))??;
        anyhow::Ok((beats, (left - start).as_secs_f64(), waited?))
    })?;

    let worst = |from: f64, to: f64| {
        beats.iter().filter(|[at, _]| (from..to).contains(at)).map(|[_, ms]| *ms).fold(0.0, f64::max)
    };
    let mut row = Row::new(Workload::W7, "many keys expire", subject);
    row.keys = count;
    row.more("worst_wait_before_ms", worst(0.2, left_s));
    row.more("worst_wait_ms", worst(left_s, f64::MAX));
    row.figures.worst_us = Some(worst(left_s, f64::MAX) * 1e3);
    if free_s < PATIENCE {
        row.more("disk_free_s", free_s.as_secs_f64());
    } else {
        row.note = Some(format!("the disk space was not freed within {} s", PATIENCE.as_secs()));
    }
    row.more("expired_mib", leaving as f64 / f64::from(1 << 20));
    row.series.insert("worst_wait_ms".to_owned(), worst_of_slices(&beats, 0.05));
    Ok(row)
}
