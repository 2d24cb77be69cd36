//! Numbers of journal records, and which records are still being written.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::invariant::{Invariant, Poison};
use crate::testing::sync_shim::{AtomicU64, Mutex};

/// Numbers for rows that are being written, and which of them are.
///
/// A seal may delete the rows below [`RecordNumbers::finished_below`]: each of them is written, and what it says is in
/// the hot table. What a row says counts once [`RecordNumbers::is_finished`] says so.
#[derive(Debug, Default)]
pub(crate) struct RecordNumbers {
    /// In the order they were taken; seldom more than there are threads.
    open: Mutex<Open>,
    /// Every row below this one is settled. Spares most readers the lock.
    finished: AtomicU64,
    poison: Arc<Poison>,
}

#[derive(Debug, Default)]
struct Open {
    numbers: Vec<u64>,
    last: u64,
}

impl RecordNumbers {
    /// Has them end the store where an invariant is broken.
    pub(crate) fn of(poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..Self::default() }
    }

    /// Takes a number from `next`, which must only grow, and keeps it open until it is finished.
    pub(crate) fn begin(&self, next: impl FnOnce() -> u64) -> u64 {
        let mut open = self.open.lock();
        let number = next();
        if number <= open.last {
            self.poison.broken(Invariant::RecordNumbersRise, format_args!("row {number} after row {}", open.last));
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
        let finished = open.numbers.first().copied().unwrap_or(open.last + 1);
        if open.numbers.len() + 1 != before || finished < self.finished.load(Ordering::Relaxed) {
            let detail = format_args!("row {number} of {before} that are open; settled below {finished}");
            self.poison.broken(Invariant::RecordFinishedOnce, detail);
        }
        self.finished.store(finished, Ordering::Release);
    }

    /// Whether the row is finished.
    pub(crate) fn is_finished(&self, number: u64) -> bool {
        number < self.finished.load(Ordering::Acquire) || !self.open.lock().numbers.contains(&number)
    }

    /// Every row numbered below the answer is finished; `next` gives a number for where none is open.
    pub(crate) fn finished_below(&self, next: impl FnOnce() -> u64) -> u64 {
        let open = self.open.lock();
        if let Some(first) = open.numbers.first() {
            return *first;
        }
        let number = next();
        if number <= open.last {
            self.poison.broken(Invariant::RecordNumbersRise, format_args!("{number} after row {}", open.last));
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_settled_up_to_the_first_that_is_open() {
        let numbers = RecordNumbers::default();
        let finished = |next| numbers.finished_below(|| next);
        for number in [1, 2, 5] {
            assert_eq!(numbers.begin(|| number), number);
        }
        assert_eq!(finished(6), 1);
        assert!(numbers.is_finished(0) && !numbers.is_finished(1) && !numbers.is_finished(5));
        numbers.finish(2);
        assert_eq!(finished(6), 1);
        assert!(numbers.is_finished(2) && !numbers.is_finished(1));
        numbers.finish(1);
        assert_eq!(finished(6), 5);
        assert!(numbers.is_finished(1) && !numbers.is_finished(5));
        numbers.finish(5);
        assert_eq!(finished(6), 6);
        assert!(numbers.is_finished(5));
        numbers.poison.unbroken().unwrap();
    }

    #[test]
    fn a_row_number_that_does_not_rise_and_a_row_that_is_finished_twice_break_an_invariant() {
        let broken = |act: &dyn Fn(&RecordNumbers)| {
            let numbers = RecordNumbers::default();
            numbers.begin(|| 5);
            act(&numbers);
            numbers.poison.unbroken().unwrap_err().to_string()
        };
        for again in [4, 5] {
            let said = broken(&|numbers| assert_eq!(numbers.begin(|| again), again));
            assert!(said.contains("records strictly rise"), "{said}");
        }
        let said = broken(&|numbers| [5, 5].iter().for_each(|number| numbers.finish(*number)));
        assert!(said.contains("finished once"), "{said}");
        let said = broken(&|numbers| {
            numbers.finish(5);
            numbers.finished_below(|| 5);
        });
        assert!(said.contains("records strictly rise"), "{said}");
    }
}
