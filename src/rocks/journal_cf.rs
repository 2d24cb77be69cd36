//! The journal's column family: maps record numbers to records.

use rocksdb::WriteBatch;

/// The key of a record: its number, big endian, so that records are ordered by number.
fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

pub(super) fn put(batch: &mut WriteBatch, number: u64, record: &[u8]) {
    batch.put(key(number), record);
}

/// Deletes every record numbered below `end` with one range tombstone. The records are usually still in RocksDB's
/// memtable, so its next flush writes none of them.
pub(super) fn delete_before(batch: &mut WriteBatch, end: u64) {
    batch.delete_range(key(0), key(end));
}

/// The record number that `key` encodes, if it is valid.
pub(super) fn number(key: &[u8]) -> Option<u64> {
    key.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_number_is_decoded_as_encoded_and_other_keys_are_rejected() {
        for value in [0, 1, 5, u64::MAX] {
            assert_eq!(number(&key(value)), Some(value));
        }
        assert!(key(255) < key(256), "keys are ordered by number");
        assert_eq!(number(b"seven b"), None);
    }
}
