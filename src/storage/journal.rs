//! The journal's rows: one a batch, in the order of their numbers, in the default column family.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rocksdb::WriteBatch;

use crate::concurrency::{AtomicU64, Mutex};
use crate::invariant::{Invariant, Poison};

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

/// Numbers for rows that are being written, and which of them are.
///
/// A seal may delete the rows below [`RowNumbers::settled_below`]: each of them is written, and what it says is in
/// the hot table. What a row says counts once [`RowNumbers::is_settled`] says so.
#[derive(Debug, Default)]
pub(crate) struct RowNumbers {
    /// In the order they were taken; seldom more than there are threads.
    open: Mutex<Open>,
    /// Every row below this one is settled. Spares most readers the lock.
    settled: AtomicU64,
    poison: Arc<Poison>,
}

#[derive(Debug, Default)]
struct Open {
    numbers: Vec<u64>,
    last: u64,
}

impl RowNumbers {
    /// Has them end the store where an invariant is broken.
    pub(crate) fn of(poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..Self::default() }
    }

    /// Takes a number from `next`, which must only grow, and keeps it open until it is finished.
    pub(crate) fn begin(&self, next: impl FnOnce() -> u64) -> u64 {
        let mut open = self.open.lock();
        let number = next();
        if number <= open.last {
            self.poison.broken(Invariant::RowNumbersRise, format_args!("row {number} after row {}", open.last));
        }
        open.numbers.push(number);
        open.last = number;
        number
    }

    /// The row is written, or never will be.
    pub(crate) fn finish(&self, number: u64) {
        let mut open = self.open.lock();
        let before = open.numbers.len();
        open.numbers.retain(|other| *other != number);
        let settled = open.numbers.first().copied().unwrap_or(open.last + 1);
        if open.numbers.len() + 1 != before || settled < self.settled.load(Ordering::Relaxed) {
            let detail = format_args!("row {number} of {before} that are open; settled below {settled}");
            self.poison.broken(Invariant::RowFinishedOnce, detail);
        }
        self.settled.store(settled, Ordering::Release);
    }

    /// Whether the row is finished.
    pub(crate) fn is_settled(&self, number: u64) -> bool {
        number < self.settled.load(Ordering::Acquire) || !self.open.lock().numbers.contains(&number)
    }

    /// Every row numbered below the answer is finished; `next` gives a number for where none is open.
    pub(crate) fn settled_below(&self, next: impl FnOnce() -> u64) -> u64 {
        let open = self.open.lock();
        if let Some(first) = open.numbers.first() {
            return *first;
        }
        let number = next();
        if number <= open.last {
            self.poison.broken(Invariant::RowNumbersRise, format_args!("{number} after row {}", open.last));
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_found_by_its_number_and_what_has_none_is_no_row() {
        for row in [0, 1, 5, u64::MAX] {
            assert_eq!(number(&key(row)), Some(row));
        }
        assert!(key(255) < key(256), "in the order of their numbers");
        assert_eq!(number(b"seven b"), None);
    }

    #[test]
    fn rows_are_settled_up_to_the_first_that_is_open() {
        let numbers = RowNumbers::default();
        let settled = |next| numbers.settled_below(|| next);
        for number in [1, 2, 5] {
            assert_eq!(numbers.begin(|| number), number);
        }
        assert_eq!(settled(6), 1);
        assert!(numbers.is_settled(0) && !numbers.is_settled(1) && !numbers.is_settled(5));
        numbers.finish(2);
        assert_eq!(settled(6), 1);
        assert!(numbers.is_settled(2) && !numbers.is_settled(1));
        numbers.finish(1);
        assert_eq!(settled(6), 5);
        assert!(numbers.is_settled(1) && !numbers.is_settled(5));
        numbers.finish(5);
        assert_eq!(settled(6), 6);
        assert!(numbers.is_settled(5));
        numbers.poison.unbroken().unwrap();
    }

    #[test]
    fn a_row_number_that_does_not_rise_and_a_row_that_is_finished_twice_break_an_invariant() {
        let broken = |act: &dyn Fn(&RowNumbers)| {
            let numbers = RowNumbers::default();
            numbers.begin(|| 5);
            act(&numbers);
            numbers.poison.unbroken().unwrap_err().to_string()
        };
        for again in [4, 5] {
            let said = broken(&|numbers| assert_eq!(numbers.begin(|| again), again));
            assert!(said.contains("rows strictly rise"), "{said}");
        }
        let said = broken(&|numbers| [5, 5].iter().for_each(|number| numbers.finish(*number)));
        assert!(said.contains("finished once"), "{said}");
        let said = broken(&|numbers| {
            numbers.finish(5);
            numbers.settled_below(|| 5);
        });
        assert!(said.contains("rows strictly rise"), "{said}");
    }
}
