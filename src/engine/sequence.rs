//! The numbers of tokens and journal rows: they only grow, also across restarts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::invariant::{Invariant, Poison};
use crate::testing::sync_shim::{AtomicU64, Mutex};
use onlyonce_core::{Error, Result};

/// Numbers that are reserved on disk at a time: one synced write for so many.
const BLOCK: u64 = 1 << 32;

/// When so few are left, the next block is reserved. More than all threads together can take between
/// [`Sequence::ensure`] and [`Sequence::take`].
const MARGIN: u64 = 1 << 28;

/// Hands out each number once in the life of the store.
pub(crate) struct Sequence {
    next: AtomicU64,
    reserved: AtomicU64,
    reserving: Mutex<()>,
    poison: Arc<Poison>,
}

impl Sequence {
    /// Goes on behind all that was reserved before; the first block is reserved by [`Sequence::ensure`].
    pub(crate) fn after(reserved: u64) -> Self {
        Self {
            next: AtomicU64::new(reserved),
            reserved: AtomicU64::new(reserved),
            reserving: Mutex::new(()),
            poison: Arc::default(),
        }
    }

    /// Has it end the store where an invariant is broken.
    pub(crate) fn of(self, poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..self }
    }

    /// Makes sure that `count` numbers can be taken. `reserve` puts a new limit on the disk before it returns; it is
    /// called once in four billion numbers.
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
                detail: format!("{reserved} is near the end of all numbers"),
            });
        };
        reserve(more)?;
        self.reserved.store(more, Ordering::Release);
        Ok(())
    }

    /// The lowest number that nobody has taken. Once nobody can take more, the rest need not stay reserved.
    pub(crate) fn next_unused(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    fn left(&self) -> u64 {
        self.reserved.load(Ordering::Acquire).saturating_sub(self.next.load(Ordering::Acquire))
    }

    /// The next number. Call [`Sequence::ensure`] before.
    pub(crate) fn take(&self) -> u64 {
        let number = self.next.fetch_add(1, Ordering::AcqRel);
        if number >= self.reserved.load(Ordering::Acquire) {
            self.is_not_reserved(number);
        }
        number
    }

    #[cold]
    #[inline(never)]
    fn is_not_reserved(&self, number: u64) {
        let reserved = self.reserved.load(Ordering::Acquire);
        self.poison.broken(Invariant::NumberReserved, format_args!("{number}, of {reserved} that are reserved"));
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
    fn a_block_that_runs_low_is_followed_by_another() {
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
        let said = sequence.poison.unbroken().unwrap_err().to_string();
        assert!(said.contains("reserved on disk before it is used (7, of 7"), "{said}");
    }

    #[test]
    fn numbers_that_cannot_be_reserved_are_not_given_out() {
        let sequence = Sequence::after(1);
        let refused = sequence.ensure(1, |_| Err(Error::Closed));
        assert!(matches!(refused, Err(Error::Closed)));
        assert_eq!(sequence.left(), 0);
        assert!(Sequence::after(u64::MAX - 5).ensure(1, |_| Ok(())).is_err());
    }
}
