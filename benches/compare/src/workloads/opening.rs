//! W8: the time from an open to the first claim, and until all filters are complete.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use onlyonce::{Claim, KeyStatus};

use super::{BATCH, Run, remove, say};
use crate::args::Workload;
use crate::child::{fill_and_close, open_filled, work_and_kill};
use crate::keys::{Key, key, mix};
use crate::machine::directory_bytes;
use crate::row::Row;

const BUCKETS: u32 = 24;

/// How long the process records keys before it is killed.
const WORK: Duration = Duration::from_secs(2);

/// The maximum time to wait for filters.
const PATIENCE: Duration = Duration::from_secs(300);

/// The number of a key that no other part inserts.
const FIRST_CLAIM: u64 = 1 << 50;

pub fn run(run: &Run) -> Result<Vec<Row>> {
    let keys = run.scale.opened;
    let dir = run.directory("opening");
    say(&format!("W8: a store of {keys} keys, closed"));
    fill_and_close(&dir, keys, BUCKETS)?;
    let closed = open(&dir, keys, "clean close", FIRST_CLAIM)?;
    say(&format!("W8: a store of {keys} keys, killed"));
    work_and_kill(&dir, keys, BUCKETS, WORK)?;
    let killed = open(&dir, keys, "SIGKILL", FIRST_CLAIM + 1)?;
    remove(&dir)?;
    Ok(vec![closed, killed])
}

fn open(dir: &Path, keys: u64, case: &str, first_claim: u64) -> Result<Row> {
    let start = Instant::now();
    let store = open_filled(dir, keys, BUCKETS)?;
    let opened = start.elapsed();
    let claim = store.claim(&key(first_claim)).wait()?;
    let claimed = start.elapsed();
    ensure!(matches!(claim, Claim::Acquired(_)), "a new key was not acquired");
    drop(claim);
    let unflushed = store.stats().unflushed;
    while !store.stats().buckets.iter().all(|bucket| bucket.filtered) {
        ensure!(start.elapsed() < PATIENCE, "the filters are not complete after {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(2));
    }
    let filtered = start.elapsed();

    // Keys of the oldest bucket may have expired meanwhile.
    let oldest = keys / u64::from(BUCKETS);
    let sample: Vec<Key> = (0..20 * BATCH as u64).map(|i| key(oldest + mix(i) % (keys - oldest))).collect();
    for batch in sample.chunks(BATCH) {
        for check in store.check_batch(batch).wait()? {
            ensure!(check? != KeyStatus::New, "a recorded key is forgotten");
        }
    }
    let stats = store.stats();
    let live = stats.buckets.iter().map(|bucket| bucket.keys).sum::<u64>() + stats.unflushed;
    let mut row = Row::new(Workload::W8, case, "onlyonce");
    row.keys = keys;
    row.buckets = Some(BUCKETS);
    row.more("open_ms", opened.as_secs_f64() * 1e3);
    row.more("first_claim_ms", claimed.as_secs_f64() * 1e3);
    row.more("filters_complete_s", filtered.as_secs_f64());
    row.more("unflushed_keys", unflushed as f64);
    row.figures.ram_bytes_per_key = Some(stats.filter_bytes as f64 / live as f64);
    row.figures.disk_bytes_per_key = Some(directory_bytes(dir) as f64 / live as f64);
    row.note = Some("the page cache is warm from the fill".to_owned());
    store.close().wait()?;
    Ok(row)
}
