//! Sustained throughput in keys a second, including the flush of every key to its bucket.
//!
//! `cargo bench --bench sustained [-- KEYS]`, 4,000,000 keys by default. 36-byte keys, 17-byte results, batches of
//! 512, one thread, durability `Process`.

#![allow(clippy::print_stdout, reason = "a bench reports on standard output")]

use std::time::{Duration, Instant};

use onlyonce::{Claim, Durability, KeyStatus, Lease, RecordOutcome, Store};

const BATCH: usize = 512;

type Failure = Box<dyn std::error::Error>;

/// Keys that look like UUIDs, the same on every run.
fn keys(from: u64, count: usize) -> Vec<String> {
    let mix = |i: u64| {
        let x = (i ^ (i >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
    };
    (from..from + count as u64)
        .map(|i| {
            let (a, b) = (mix(2 * i + 1), mix(2 * i + 2));
            format!(
                "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
                a >> 32,
                a >> 16 & 0xffff,
                a & 0xffff,
                b >> 48,
                b & 0xffff_ffff_ffff
            )
        })
        .collect()
}

fn open(dir: &tempfile::TempDir, name: &str) -> Result<Store, Failure> {
    Ok(Store::builder()
        .durability(Durability::Process)
        .window(Duration::from_secs(24 * 60 * 60))
        .open(dir.path().join(name))?)
}

fn report(what: &str, keys: usize, elapsed: Duration) {
    let seconds = elapsed.as_secs_f64();
    println!("{what:<28} {:>8.3} M/s   {:>7.0} ns a key", keys as f64 / seconds / 1e6, seconds * 1e9 / keys as f64);
}

fn main() -> Result<(), Failure> {
    let count = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(4_000_000);
    let dir = tempfile::tempdir()?;
    let known = keys(0, count);
    let new = keys(count as u64, count);

    let store = open(&dir, "record")?;
    let start = Instant::now();
    let mut first = 0;
    for batch in known.chunks(BATCH) {
        for recorded in store.record_batch(batch).wait()? {
            first += usize::from(recorded? == RecordOutcome::First);
        }
    }
    let returned = start.elapsed();
    store.flush()?;
    report("record, until flushed", count, start.elapsed());
    report("record, until returned", count, returned);
    assert_eq!(first, count, "every key is new exactly once");

    let start = Instant::now();
    let mut absent = 0;
    for batch in new.chunks(BATCH) {
        for status in store.check_batch(batch).wait()? {
            absent += usize::from(status? == KeyStatus::New);
        }
    }
    report("check of new keys", count, start.elapsed());
    assert_eq!(absent, count);

    let start = Instant::now();
    let mut found = 0;
    for batch in known.chunks(BATCH).take(200_000 / BATCH) {
        for status in store.check_batch(batch).wait()? {
            found += usize::from(matches!(status?, KeyStatus::Completed(_)));
        }
    }
    report("check of flushed keys", found, start.elapsed());
    store.close().wait()?;

    let store = open(&dir, "claim")?;
    let start = Instant::now();
    let mut completed = 0;
    for batch in known.chunks(BATCH) {
        let mut leases: Vec<(Lease, &[u8])> = Vec::with_capacity(BATCH);
        for claim in store.claim_batch(batch).wait()? {
            if let Claim::Acquired(lease) = claim? {
                leases.push((lease, b"result-0123456789"));
            }
        }
        completed += store.complete_batch(leases).wait().into_iter().filter(Result::is_ok).count();
    }
    store.flush()?;
    report("claim and complete", count, start.elapsed());
    assert_eq!(completed, count);
    let stats = store.stats();
    println!("{:.1} bytes on disk a key", stats.disk_bytes as f64 / count as f64);
    Ok(())
}
