//! The sequence: numbers for tokens and journal records, which increase across restarts.
//!
//! Order: a block of numbers is reserved on disk before one of them is used. Otherwise a token could be handed out a second
//! time after a power cut, and a late holder would pass for the current one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::invariant::{Invariant, Poison};
use crate::testing::sync_shim::{AtomicU64, Mutex};
use onlyonce_core::{Error, Result};

/// How many numbers one synced write reserves.
const BLOCK: u64 = 1 << 32;

/// When fewer numbers are left, the next block is reserved. More than all threads together can take between
/// [`Sequence::ensure`] and [`Sequence::take`].
const MARGIN: u64 = 1 << 28;

/// Hands out each number at most once in the lifetime of the store.
pub(crate) struct Sequence {
    next: AtomicU64,
    reserved: AtomicU64,
    reserving: Mutex<()>,
    poison: Arc<Poison>,
}

impl Sequence {
    /// A sequence that starts after all numbers that were reserved. [`Sequence::ensure`] reserves the first block.
    pub(crate) fn after(reserved: u64) -> Self {
        Self {
            next: AtomicU64::new(reserved),
            reserved: AtomicU64::new(reserved),
            reserving: Mutex::new(()),
            poison: Arc::default(),
        }
    }

    /// Sets what to poison if an invariant is broken.
    pub(crate) fn of(self, poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..self }
    }

    /// Ensures that `count` numbers can be taken. `reserve` syncs a new limit before it returns. It is called once in
    /// [`BLOCK`] numbers.
    pub(crate) fn ensure(&self, count: u64, reserve: impl FnOnce(u64) -> Result<()>) -> Result<()> {
        if self.left() >= count.saturating_add(MARGIN) {
            return Ok(());
        }
        let _reserving = self.reserving.lock();
        if self.left() >= count.saturating_add(MARGIN) {
            return Ok(());
        }
        let reserved = self.reserved.load(Ordering::Acquire);
        let Some(more) = reserved.checked_add(BLOCK.max(count.saturating_add(MARGIN))) else {
            return Err(Error::Corrupt {
                place: "`tokens` in `meta`".to_owned(),
                detail: format!("{reserved} leaves no numbers to reserve"),
            });
        };
        reserve(more)?;
        self.reserved.store(more, Ordering::Release);
        Ok(())
    }

    /// The lowest number that is not taken. A close returns the numbers from it on, when no call can take more.
    pub(crate) fn next_unused(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    fn left(&self) -> u64 {
        self.reserved.load(Ordering::Acquire).saturating_sub(self.next.load(Ordering::Acquire))
    }

    /// Takes the next number. Call [`Sequence::ensure`] before.
    pub(crate) fn take(&self) -> u64 {
        let number = self.next.fetch_add(1, Ordering::AcqRel);
        if number >= self.reserved.load(Ordering::Acquire) {
            self.report_unreserved(number);
        }
        number
    }

    #[cold]
    #[inline(never)]
    fn report_unreserved(&self, number: u64) {
        let reserved = self.reserved.load(Ordering::Acquire);
        self.poison.broken(Invariant::NumberReserved, format_args!("{number}, reserved below {reserved}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn a_number_is_reserved_before_it_is_taken_and_never_twice() {
        let disk = AtomicU64::new(1);
        let reserve = |more| {
            disk.store(more, Ordering::SeqCst);
            Ok(())
        };
        let first = Sequence::after(disk.load(Ordering::SeqCst));
        first.ensure(2, reserve).unwrap();
        let (a, b) = (first.take(), first.take());
        assert!(a == 1 && b == 2 && disk.load(Ordering::SeqCst) > b);

        let second = Sequence::after(disk.load(Ordering::SeqCst));
        second.ensure(1, reserve).unwrap();
        let c = second.take();
        assert!(c > b && disk.load(Ordering::SeqCst) > c);
    }

    #[test]
    fn a_new_block_is_reserved_before_the_last_one_is_used_up() {
        let sequence = Sequence::after(1);
        let writes = AtomicU64::new(0);
        let reserve = |_| {
            writes.fetch_add(1, Ordering::SeqCst);
            Ok(())
        };
        sequence.ensure(1, reserve).unwrap();
        sequence.ensure(1, reserve).unwrap();
        assert_eq!(writes.load(Ordering::SeqCst), 1);
        sequence.next.fetch_add((1 << 32) - (1 << 28), Ordering::SeqCst);
        sequence.ensure(1, reserve).unwrap();
        assert_eq!(writes.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_number_that_is_not_reserved_breaks_an_invariant() {
        let sequence = Sequence::after(7);
        sequence.ensure(1, |_| Ok(())).unwrap();
        sequence.take();
        sequence.poison.unbroken().unwrap();
        let sequence = Sequence::after(7);
        sequence.take();
        let message = sequence.poison.unbroken().unwrap_err().to_string();
        let expected = format!("{} (7, reserved below 7)", Invariant::NumberReserved.text());
        assert!(message.contains(&expected), "{message}");
    }

    #[test]
    fn numbers_that_cannot_be_reserved_are_not_handed_out() {
        let sequence = Sequence::after(1);
        let refused = sequence.ensure(1, |_| Err(Error::Closed));
        assert!(matches!(refused, Err(Error::Closed)));
        assert_eq!(sequence.left(), 0);
        assert!(Sequence::after(u64::MAX - 5).ensure(1, |_| Ok(())).is_err());
    }
}
