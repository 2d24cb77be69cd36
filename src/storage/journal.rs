//! The journal's rows: one a batch, in the order of their numbers, in the default column family.

use std::collections::BTreeSet;

use parking_lot::Mutex;
use rocksdb::WriteBatch;

/// The key of a row: its number, so that rows lie in the order they were written.
fn key(number: u64) -> [u8; 8] {
    number.to_be_bytes()
}

pub(super) fn put(batch: &mut WriteBatch, number: u64, row: &[u8]) {
    batch.put(key(number), row);
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

/// Numbers for rows that are being written, and the first that still is.
///
/// A seal may delete the rows below [`RowNumbers::settled_below`]: each of them is written, and what it says is in
/// the hot table.
#[derive(Default)]
pub(crate) struct RowNumbers {
    open: Mutex<BTreeSet<u64>>,
}

impl RowNumbers {
    /// Takes a number from `next` and keeps it open until the guard is dropped. `next` must only grow.
    pub(crate) fn begin(&self, next: impl FnOnce() -> u64) -> OpenRow<'_> {
        let mut open = self.open.lock();
        let number = next();
        open.insert(number);
        OpenRow { numbers: self, number }
    }

    /// Every row numbered below the answer is finished; `next` gives a number for where none is open.
    pub(crate) fn settled_below(&self, next: impl FnOnce() -> u64) -> u64 {
        let open = self.open.lock();
        open.first().copied().unwrap_or_else(next)
    }
}

/// A row on its way to the journal.
pub(crate) struct OpenRow<'a> {
    numbers: &'a RowNumbers,
    number: u64,
}

impl OpenRow<'_> {
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for OpenRow<'_> {
    fn drop(&mut self) {
        self.numbers.open.lock().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_settled_up_to_the_first_that_is_open() {
        let numbers = RowNumbers::default();
        let begin = |number| numbers.begin(|| number);
        let settled = |next| numbers.settled_below(|| next);
        let (one, two, five) = (begin(1), begin(2), begin(5));
        assert_eq!(settled(6), 1);
        drop(two);
        assert_eq!(settled(6), 1);
        drop(one);
        assert_eq!(settled(6), 5);
        drop(five);
        assert_eq!(settled(6), 6);
    }
}
