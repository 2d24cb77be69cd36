//! Numbers journal records and tracks which of them are still being written.
//!
//! A flush takes a number and waits until [`RecordNumbers::finished_below`] is not lower. Its checkpoint replaces records: to
//! replace one whose effect is neither in the memtable nor on disk would lose an acknowledged call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::invariant::{Invariant, Poison};
use crate::testing::sync_shim::{AtomicU64, Mutex};

/// The numbers of journal records, and which records are still being written.
///
/// A finished record is written, and its content is in the memtable. A record's changes take effect once
/// [`RecordNumbers::is_finished`] returns true.
#[derive(Debug, Default)]
pub(crate) struct RecordNumbers {
    /// In the order of their numbers; rarely more than there are threads.
    open: Mutex<Open>,
    /// Every record below this number is finished. Lets most readers skip the lock.
    finished: AtomicU64,
    poison: Arc<Poison>,
}

#[derive(Debug, Default)]
struct Open {
    numbers: Vec<u64>,
    last: u64,
}

impl RecordNumbers {
    /// Sets the poison that broken invariants are reported to.
    pub(crate) fn of(poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..Self::default() }
    }

    /// Takes a number from `next`, which must increase strictly. The record is open until it is finished.
    pub(crate) fn begin(&self, next: impl FnOnce() -> u64) -> u64 {
        let mut open = self.open.lock();
        let number = next();
        if number <= open.last {
            self.poison
                .broken(Invariant::RecordNumbersRise, format_args!("record {number} after record {}", open.last));
        }
        open.numbers.push(number);
        open.last = number;
        number
    }

    /// Marks the record as written, or as one that will never be written.
    pub(crate) fn finish(&self, number: u64) {
        let mut open = self.open.lock();
        let before = open.numbers.len();
        open.numbers.retain(|other| *other != number);
        let finished = open.numbers.first().copied().unwrap_or(open.last + 1);
        if open.numbers.len() + 1 != before || finished < self.finished.load(Ordering::Relaxed) {
            let detail = format_args!("record {number} of {before} open records, finished below {finished}");
            self.poison.broken(Invariant::RecordFinishedOnce, detail);
        }
        self.finished.store(finished, Ordering::Release);
    }

    /// Whether the record is finished.
    pub(crate) fn is_finished(&self, number: u64) -> bool {
        number < self.finished.load(Ordering::Acquire) || !self.open.lock().numbers.contains(&number)
    }

    /// The number below which every record is finished: the first open record, or a number from `next` if none is
    /// open.
    pub(crate) fn finished_below(&self, next: impl FnOnce() -> u64) -> u64 {
        let open = self.open.lock();
        if let Some(first) = open.numbers.first() {
            return *first;
        }
        let number = next();
        if number <= open.last {
            self.poison.broken(Invariant::RecordNumbersRise, format_args!("{number} after record {}", open.last));
        }
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_finished_below_the_first_open_one() {
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
    fn a_record_number_that_does_not_increase_and_a_record_finished_twice_break_an_invariant() {
        let broken = |act: &dyn Fn(&RecordNumbers)| {
            let numbers = RecordNumbers::default();
            numbers.begin(|| 5);
            act(&numbers);
            numbers.poison.unbroken().unwrap_err().to_string()
        };
        for again in [4, 5] {
            let text = broken(&|numbers| assert_eq!(numbers.begin(|| again), again));
            assert!(text.contains("records strictly rise"), "{text}");
        }
        let text = broken(&|numbers| [5, 5].iter().for_each(|number| numbers.finish(*number)));
        assert!(text.contains("finished once"), "{text}");
        let text = broken(&|numbers| {
            numbers.finish(5);
            numbers.finished_below(|| 5);
        });
        assert!(text.contains("records strictly rise"), "{text}");
    }
}
