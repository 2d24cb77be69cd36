//! The journal's column family: one record a write, under its number.

use rocksdb::WriteBatch;

/// The key of a row: its number, so that rows lie in the order they were written.
fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

pub(super) fn put(batch: &mut WriteBatch, number: u64, record: &[u8]) {
    batch.put(key(number), record);
}

/// Deletes every row numbered below `end`: one tombstone, whatever their count. It meets them in the memtable, and
/// the flush that follows writes none of them.
pub(super) fn delete_before(batch: &mut WriteBatch, end: u64) {
    batch.delete_range(key(0), key(end));
}

/// The number of the row under `key`, if it is one.
pub(super) fn number(key: &[u8]) -> Option<u64> {
    key.try_into().ok().map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_found_by_its_number_and_what_has_none_is_no_row() {
        for value in [0, 1, 5, u64::MAX] {
            assert_eq!(number(&key(value)), Some(value));
        }
        assert!(key(255) < key(256), "in the order of their numbers");
        assert_eq!(number(b"seven b"), None);
    }
}
