//! The hot path, for `tests/instructions`, which counts its instructions. The keys are the same on every run.
//!
//! `hot_path KEYS`; it prints nothing. Each function named `counted_…` has a line in `benches/instructions.txt`.

use onlyonce::{Claim, Durability, KeyStatus, RecordOutcome, Store};

const BATCH: usize = 512;

type Failure = Box<dyn std::error::Error>;

fn keys(from: u64, count: u64) -> Vec<String> {
    (from..from + count)
        .map(|i| {
            format!("{:016x}-{:019}", i.wrapping_mul(0x9e37_79b9_7f4a_7c15), i.wrapping_mul(0x94d0_49bb_1331_11eb))
        })
        .collect()
}

#[inline(never)]
fn counted_record_batch(store: &Store, keys: &[String]) -> Result<usize, Failure> {
    let mut first = 0;
    for batch in keys.chunks(BATCH) {
        for recorded in store.record_batch(batch).wait()? {
            first += usize::from(recorded? == RecordOutcome::First);
        }
    }
    Ok(first)
}

#[inline(never)]
fn counted_record_one(store: &Store, keys: &[String]) -> Result<usize, Failure> {
    let mut first = 0;
    for key in keys {
        first += usize::from(store.record(key).wait()? == RecordOutcome::First);
    }
    Ok(first)
}

#[inline(never)]
fn counted_claim_complete_batch(store: &Store, keys: &[String]) -> Result<usize, Failure> {
    let mut completed = 0;
    for batch in keys.chunks(BATCH) {
        let mut leases = Vec::with_capacity(BATCH);
        for claim in store.claim_batch(batch).wait()? {
            if let Claim::Acquired(lease) = claim? {
                leases.push((lease, b"result-0123456789".as_slice()));
            }
        }
        for outcome in store.complete_batch(leases).wait() {
            outcome?;
            completed += 1;
        }
    }
    Ok(completed)
}

#[inline(never)]
fn counted_check_new(store: &Store, keys: &[String]) -> Result<usize, Failure> {
    check(store, keys, |status| *status == KeyStatus::New)
}

#[inline(never)]
fn counted_check_recent(store: &Store, keys: &[String]) -> Result<usize, Failure> {
    check(store, keys, |status| matches!(status, KeyStatus::Completed(_)))
}

fn check(store: &Store, keys: &[String], matches: impl Fn(&KeyStatus) -> bool) -> Result<usize, Failure> {
    let mut found = 0;
    for batch in keys.chunks(BATCH) {
        for status in store.check_batch(batch).wait()? {
            found += usize::from(matches(&status?));
        }
    }
    Ok(found)
}

fn main() -> Result<(), Failure> {
    let count = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(10_240);
    let dir = tempfile::tempdir()?;
    let store = Store::builder().durability(Durability::Process).open(dir.path().join("store"))?;
    let keys = |part: u64| keys(part * count, count);
    // Flushed to buckets, so that the filter has keys and rules out the new ones.
    for part in 10..14 {
        for recorded in store.record_batch(keys(part)).wait()? {
            recorded?;
        }
    }
    store.flush()?;
    let counts = [
        counted_record_batch(&store, &keys(0))?,
        counted_record_one(&store, &keys(1))?,
        counted_claim_complete_batch(&store, &keys(2))?,
        counted_check_new(&store, &keys(3))?,
        counted_check_recent(&store, &keys(2))?,
    ];
    assert!(counts.iter().all(|counted| *counted as u64 == count), "expected {count} keys each: {counts:?}");
    Ok(())
}
