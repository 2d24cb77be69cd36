//! Microbenchmarks of single parts: `cargo bench --features __internals --bench parts`. `sustained` and the package
//! `onlyonce-compare` measure the whole store.

use std::hint::black_box;

use divan::Bencher;
use divan::counter::ItemsCount;
use onlyonce::internals::{Digester, Filter, MemTable, encode, read_keys, write_record};
use onlyonce::{Durability, Store};

const BATCH: usize = 512;

fn main() {
    divan::main();
}

fn key(i: u64) -> String {
    format!("{:016x}-{:016x}", i.wrapping_mul(0x9e37_79b9_7f4a_7c15), i.wrapping_mul(0xbf58_476d_1ce4_e5b9))
}

fn encoded(from: u64, count: usize) -> Vec<Vec<u8>> {
    (from..).take(count).map(|i| encode(&key(i)).expect("the key is valid")).collect()
}

fn digests(from: u64, count: usize) -> Vec<u64> {
    let digester = Digester::new();
    encoded(from, count).iter().map(|key| digester.digest(key)).collect()
}

#[divan::bench]
fn key_digest(bencher: Bencher<'_, '_>) {
    let (digester, keys) = (Digester::new(), encoded(0, BATCH));
    bencher
        .counter(ItemsCount::new(BATCH))
        .bench_local(|| keys.iter().fold(0, |all, key| all ^ digester.digest(black_box(key))));
}

#[divan::bench(args = [100_000, 1_000_000])]
fn filter_check(bencher: Bencher<'_, '_>, keys: u64) {
    let filter = Filter::new(keys);
    for column_id in 0..24 {
        filter.insert(column_id, &digests(u64::from(column_id) * keys, usize::try_from(keys).expect("the count fits")));
    }
    let (new, mut column_bits, mut at) = (digests(1 << 40, 1 << 18), vec![0; BATCH], 0);
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        column_bits.fill(0);
        at = (at + BATCH) % new.len();
        filter.column_bits_of(&new[at..at + BATCH], &mut column_bits);
        column_bits.last().copied()
    });
}

#[divan::bench(sample_count = 10)]
fn filter_insert(bencher: Bencher<'_, '_>) {
    let mut keys = digests(0, 250_000);
    keys.sort_unstable();
    bencher
        .counter(ItemsCount::new(keys.len()))
        .with_inputs(|| Filter::new(250_000))
        .bench_local_refs(|filter| filter.insert(3, &keys));
}

#[divan::bench(sample_count = 10)]
fn memtable_complete(bencher: Bencher<'_, '_>) {
    let (keys, digests) = (encoded(0, 100_000), digests(0, 100_000));
    bencher.counter(ItemsCount::new(keys.len())).with_inputs(MemTable::new).bench_local_refs(|table| {
        for ((key, digest), token) in keys.iter().zip(&digests).zip(1..) {
            table.complete(*digest, key, token);
        }
    });
}

#[divan::bench]
fn memtable_absent(bencher: Bencher<'_, '_>) {
    let table = MemTable::new();
    for ((key, digest), token) in encoded(0, 100_000).iter().zip(digests(0, 100_000)).zip(1..) {
        table.complete(digest, key, token);
    }
    let (keys, digests) = (encoded(1 << 40, BATCH), digests(1 << 40, BATCH));
    bencher
        .counter(ItemsCount::new(BATCH))
        .bench_local(|| keys.iter().zip(&digests).filter(|(key, digest)| table.has(**digest, key)).count());
}

#[divan::bench]
fn codec_write(bencher: Bencher<'_, '_>) {
    let keys = encoded(0, BATCH);
    bencher
        .counter(ItemsCount::new(BATCH))
        .bench_local(|| write_record(keys.iter().map(Vec::as_slice), b"result-0123456789"));
}

#[divan::bench]
fn codec_read(bencher: Bencher<'_, '_>) {
    let record = write_record(encoded(0, BATCH).iter().map(Vec::as_slice), b"result-0123456789");
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| read_keys(black_box(&record)));
}

/// Concurrent callers that wait for the disk share a sync: the more callers, the cheaper each `record`.
#[divan::bench(threads = [1, 4, 16, 64], sample_count = 200)]
fn group_commit(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().expect("the directory is created");
    let store = Store::builder().durability(Durability::Disk).open(dir.path().join("store")).expect("the store opens");
    let next = std::sync::atomic::AtomicU64::new(0);
    bencher.counter(ItemsCount::new(1_usize)).bench(|| {
        let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        store.record(key(number)).wait().expect("the key is recorded")
    });
}
