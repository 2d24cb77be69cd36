//! Access to internal parts for benches (`benches/parts.rs`), models (`tests/shuttle.rs`) and crash tests
//! (`tests/failpoints.rs`). Not part of the public API: it may change at any time.

use std::hint::black_box;

use crate::codec::{RecordKind, RecordWriter, read_record};
use crate::filter::matrix::{Columns, FilterMatrix};
use crate::journal::numbers;
use crate::memtable::table;
pub use crate::testing::failpoint::Failpoint;
use onlyonce_core::StoredResult;
use onlyonce_core::machine::{CompletedEntry, Entry, OwnWindow};
use onlyonce_core::{self, Key};

/// Digests keys as a store does.
pub struct Digester(crate::digest::Digester);

impl Digester {
    /// With a fixed secret.
    #[must_use]
    pub fn new() -> Self {
        Self(crate::digest::Digester::new(&[7; 16]))
    }

    /// The digest of an encoded key.
    #[must_use]
    pub fn digest(&self, encoded: &[u8]) -> u64 {
        self.0.digest(encoded)
    }
}

impl Default for Digester {
    fn default() -> Self {
        Self::new()
    }
}

/// Encodes a key as a store does.
///
/// # Errors
///
/// If the key is not valid.
pub fn encode(key: &str) -> crate::Result<Vec<u8>> {
    let mut out = Vec::new();
    Key::from(key).encode(1_024, &mut out)?;
    Ok(out)
}

/// A base filter matrix with 32 columns.
pub struct Filter(FilterMatrix);

impl Filter {
    /// A matrix whose columns hold `keys` keys each.
    #[must_use]
    pub fn new(keys: u64) -> Self {
        Self(FilterMatrix::new(Columns::All(32), keys))
    }

    /// Inserts keys of a bucket.
    pub fn insert(&self, column_id: u8, digests: &[u64]) {
        assert!(self.0.insert(column_id, digests.iter().copied()), "a bit is missing");
    }

    /// The buckets that may hold the keys, one bit for each.
    pub fn column_bits_of(&self, digests: &[u64], column_bits: &mut [u64]) {
        self.0.column_bits_of(digests, column_bits);
    }
}

/// The memtable.
pub struct MemTable(table::MemTable);

impl MemTable {
    /// An empty memtable.
    #[must_use]
    pub fn new() -> Self {
        Self(table::MemTable::new(0))
    }

    /// Completes a key without a result.
    pub fn complete(&self, digest: u64, key: &[u8], token: u64) {
        let done = CompletedEntry {
            token,
            completed_ms: 0,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result: StoredResult::None,
        };
        self.0.shard(digest).set(digest, key, Entry::Completed(done));
    }

    /// Whether the memtable has the key.
    #[must_use]
    pub fn has(&self, digest: u64, key: &[u8]) -> bool {
        self.0.shard(digest).get(digest, key).is_some()
    }
}

impl Default for MemTable {
    fn default() -> Self {
        Self::new()
    }
}

/// Encodes a journal record that completes the keys.
#[must_use]
pub fn write_record<'k>(keys: impl IntoIterator<Item = &'k [u8]>, result: &[u8]) -> Vec<u8> {
    let mut record = RecordWriter::new(RecordKind::Completed, 1, 1 << 16);
    for (key, token) in keys.into_iter().zip(1_000_000..) {
        record.completed(
            key,
            &CompletedEntry {
                token,
                completed_ms: 1,
                own_window: OwnWindow::NONE,
                fingerprint: None,
                result: StoredResult::Bytes(result),
            },
        );
    }
    record.finish()
}

/// Decodes a journal record and counts its keys.
#[must_use]
pub fn read_keys(record: &[u8]) -> usize {
    let mut keys = 0;
    let read = read_record(record, |item| {
        black_box(item);
        keys += 1;
    });
    if read.is_some() { keys } else { 0 }
}

/// The numbers of journal records.
#[derive(Default)]
pub struct RecordNumbers(numbers::RecordNumbers);

impl RecordNumbers {
    /// Takes a number from `next`. The record is open until it is finished.
    pub fn begin(&self, next: impl FnOnce() -> u64) -> u64 {
        self.0.begin(next)
    }

    /// Marks the record as written.
    pub fn finish(&self, number: u64) {
        self.0.finish(number);
    }

    /// Whether the record is finished.
    #[must_use]
    pub fn is_finished(&self, number: u64) -> bool {
        self.0.is_finished(number)
    }

    /// The number below which every record is finished.
    pub fn finished_below(&self, next: impl FnOnce() -> u64) -> u64 {
        self.0.finished_below(next)
    }
}
