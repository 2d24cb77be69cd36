//! A stack of filter matrices that grows without copying bits and without blocking readers.
//!
//! The base matrix has a column for every bucket. A bucket that outgrows its column continues in a matrix of its own,
//! four times as large as its last one. Buckets that come after it get a larger base. An old base is freed with the
//! last bucket in it.

use std::sync::Arc;

use super::matrix::{ColumnId, Columns, FilterMatrix, Geometry};
use super::sizing::with_margin;

/// Capacity of a column in a new store's base, in keys.
const FIRST_CAPACITY: u64 = 100_000;
/// Growth factor of each further matrix of a bucket.
const GROWTH: u64 = 4;

/// An immutable list of matrices. Only bits change in place; to add or free a matrix, a new list replaces this one.
#[derive(Clone)]
pub(crate) struct FilterStack {
    matrices: Vec<Arc<FilterMatrix>>,
    width: u32,
    budget_bytes: u64,
}

impl FilterStack {
    /// A stack for `columns` columns within about `budget_bytes`. `bucket_keys` are the key counts of existing
    /// buckets. The base has `geometry` if that fits, so that persisted columns can be loaded into it.
    pub(crate) fn new(columns: u64, budget_bytes: u64, bucket_keys: &[u64], geometry: Option<Geometry>) -> Self {
        let width = Self::width_for(columns);
        let mut stack = Self { matrices: Vec::new(), width, budget_bytes };
        if let Some(geometry) = geometry
            && geometry.width() == width
            && geometry.bytes() <= budget_bytes
        {
            stack.matrices.push(Arc::new(FilterMatrix::like(geometry)));
            return stack;
        }
        let largest = bucket_keys.iter().copied().max().unwrap_or(0);
        stack.add_base(with_margin(largest).max(FIRST_CAPACITY));
        stack
    }

    /// The width of a base with at least `columns` columns.
    fn width_for(columns: u64) -> u32 {
        u32::try_from(columns).unwrap_or(64).next_power_of_two().clamp(8, 64)
    }

    /// The newest base.
    pub(crate) fn base(&self) -> Option<&Arc<FilterMatrix>> {
        self.matrices.iter().rev().find(|matrix| matches!(matrix.columns(), Columns::All(_)))
    }

    /// Whether the matrix is still in the stack.
    pub(crate) fn has(&self, matrix: &Arc<FilterMatrix>) -> bool {
        self.matrices.iter().any(|other| Arc::ptr_eq(other, matrix))
    }

    /// The base that has all keys of the column's bucket, if there is one.
    pub(crate) fn base_of(&self, column_id: ColumnId) -> Option<&Arc<FilterMatrix>> {
        let mut with_keys = self.matrices.iter().filter(|matrix| matrix.keys(column_id) > 0);
        let only = with_keys.next().filter(|matrix| matches!(matrix.columns(), Columns::All(_)))?;
        with_keys.next().is_none().then_some(only)
    }

    /// The newest base, if the bucket's keys are in older matrices and fit into it.
    pub(crate) fn target_for(&self, column_id: ColumnId, keys: u64) -> Option<&Arc<FilterMatrix>> {
        let index = self.matrices.iter().rposition(|matrix| matches!(matrix.columns(), Columns::All(_)))?;
        let (older, rest) = self.matrices.split_at_checked(index)?;
        let (target, newer) = rest.split_first()?;
        let has_older = older.iter().any(|matrix| matrix.keys(column_id) > 0);
        let has_newer = newer.iter().any(|matrix| matrix.keys(column_id) > 0);
        let fits = target.keys(column_id).saturating_add(keys) <= target.capacity();
        (has_older && !has_newer && fits && target.has_column(column_id)).then_some(target)
    }

    /// The stack after all keys of a bucket were moved to `target`: matrices below `target` that are now empty are
    /// freed. Their bits are not cleared, because readers may still use the old stack.
    pub(crate) fn moved(&self, column_id: ColumnId, target: &Arc<FilterMatrix>) -> Self {
        let mut matrices = Vec::with_capacity(self.matrices.len());
        let mut is_older = true;
        for matrix in &self.matrices {
            is_older &= !Arc::ptr_eq(matrix, target);
            if is_older {
                matrix.forget_keys(column_id);
            }
            if !is_older || !matrix.is_empty() {
                matrices.push(Arc::clone(matrix));
            }
        }
        Self { matrices, ..*self }
    }

    /// Adds a base for `keys` keys a bucket. It takes at most half of the remaining budget, because an even larger
    /// base may follow; the first base, whose size is known, may take seven eighths. False if the budget is spent.
    fn add_base(&mut self, keys: u64) -> bool {
        let columns = Columns::All(self.width);
        let left = self.budget_bytes.saturating_sub(self.bytes());
        let share = if self.matrices.is_empty() { left / 8 * 7 } else { left / 2 };
        let affordable = share / FilterMatrix::bytes_for(columns, 1).max(1);
        let keys = keys.min(affordable);
        // A store needs a base even if the budget is spent.
        let is_added = keys > 0 || self.matrices.is_empty();
        if is_added {
            self.matrices.push(Arc::new(FilterMatrix::new(columns, keys.max(1_000))));
        }
        is_added
    }

    /// Whether the stack has a column with this id.
    pub(crate) fn covers(&self, column_id: ColumnId) -> bool {
        u32::from(column_id) < self.width
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.matrices.iter().map(|matrix| matrix.bytes()).sum()
    }

    /// The columns whose buckets may hold the key with this digest, one bit for each.
    #[inline]
    pub(crate) fn column_bits(&self, digest: u64) -> u64 {
        self.matrices.iter().fold(0, |column_bits, matrix| column_bits | matrix.column_bits(digest))
    }

    /// As [`FilterStack::column_bits`], for many digests at once.
    pub(crate) fn column_bits_of(&self, digests: &[u64], column_bits: &mut [u64]) {
        for matrix in &self.matrices {
            matrix.column_bits_of(digests, column_bits);
        }
    }

    /// The newest matrix that has this column: the bucket's next keys go there.
    fn top(&self, column_id: ColumnId) -> Option<&Arc<FilterMatrix>> {
        self.matrices.iter().rev().find(|matrix| match matrix.columns() {
            Columns::One(only) => only == column_id,
            Columns::All(width) => u32::from(column_id) < width,
        })
    }

    /// A stack with room for `keys` more keys of the bucket, if this one has too little room and the budget allows
    /// more.
    pub(crate) fn with_room(&self, column_id: ColumnId, keys: u64) -> Option<Self> {
        let top = self.top(column_id)?;
        if top.keys(column_id).saturating_add(keys) <= top.capacity() {
            return None;
        }
        let columns = Columns::One(column_id);
        let wanted = top.capacity().saturating_mul(GROWTH).max(keys);
        let affordable =
            self.budget_bytes.saturating_sub(self.bytes()) / FilterMatrix::bytes_for(columns, 8).max(1) * 8;
        let capacity = wanted.min(affordable);
        // Every lookup would have to read this matrix, too; a small gain is not worth that.
        if capacity < keys || capacity < top.capacity() / 2 {
            return None;
        }
        let mut grown = self.clone();
        grown.matrices.push(Arc::new(FilterMatrix::new(columns, capacity)));
        Some(grown)
    }

    /// Inserts the digests of the bucket's keys. False if a bit could not be set.
    #[must_use]
    pub(crate) fn insert(&self, column_id: ColumnId, digests: impl IntoIterator<Item = u64>) -> bool {
        self.top(column_id).is_some_and(|matrix| matrix.insert(column_id, digests))
    }

    /// A stack with a larger base, if a bucket of `keys` keys does not fit into the present one.
    pub(crate) fn with_base_for(&self, keys: u64) -> Option<Self> {
        let base = self.base()?;
        if keys <= base.capacity() {
            return None;
        }
        let mut larger = self.clone();
        let added = larger.add_base(with_margin(keys));
        let grown = larger.matrices.last().is_some_and(|matrix| matrix.capacity() > base.capacity());
        (added && grown).then_some(larger)
    }

    /// Clears the column of a dropped bucket and frees empty matrices. Expensive: it visits every word of every base.
    pub(crate) fn without(&self, column_id: ColumnId) -> Self {
        for matrix in &self.matrices {
            matrix.clear(column_id);
        }
        let mut matrices = self.matrices.clone();
        let newest_base = matrices.iter().rposition(|matrix| matches!(matrix.columns(), Columns::All(_)));
        let mut index = 0;
        matrices.retain(|matrix| {
            let is_needed = !matrix.is_empty() || Some(index) == newest_base;
            index += 1;
            is_needed
        });
        Self { matrices, width: self.width, budget_bytes: self.budget_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digester;

    fn digests(range: std::ops::Range<u64>) -> Vec<u64> {
        let digester = Digester::new(&[2; 16]);
        range.map(|i| digester.digest(&i.to_le_bytes())).collect()
    }

    fn grow(stack: &mut FilterStack, column_id: ColumnId, range: std::ops::Range<u64>) {
        let digests = digests(range);
        if let Some(grown) = stack.with_room(column_id, digests.len() as u64) {
            *stack = grown;
        }
        assert!(stack.insert(column_id, digests));
    }

    #[test]
    fn a_bucket_that_outgrows_its_column_continues_in_a_larger_matrix() {
        let mut stack = FilterStack::new(4, 64 << 20, &[], None);
        for batch in 0..10 {
            grow(&mut stack, 2, batch * 100_000..(batch + 1) * 100_000);
        }
        assert_eq!(stack.matrices.len(), 3, "100,000, then 400,000, then 1,600,000");
        assert!(digests(0..1_000_000).into_iter().all(|digest| stack.column_bits(digest) & 1 << 2 != 0));
        let new_keys = digests(2_000_000..2_100_000).into_iter();
        let false_positives = new_keys.filter(|digest| stack.column_bits(*digest) != 0).count();
        assert!(false_positives < 250, "{false_positives} of 100,000 new keys would be looked up on disk");

        let stack = stack.without(2);
        assert_eq!(stack.matrices.len(), 1, "only the base is left");
        assert!(digests(0..1_000_000).into_iter().all(|digest| stack.column_bits(digest) == 0));
    }

    #[test]
    fn a_stack_stays_within_its_budget_and_still_finds_every_key() {
        let budget = 2 << 20;
        let mut stack = FilterStack::new(4, budget, &[], None);
        for batch in 0..20 {
            grow(&mut stack, 0, batch * 100_000..(batch + 1) * 100_000);
        }
        assert!(stack.bytes() <= budget + budget / 8, "{} bytes", stack.bytes());
        assert!(digests(0..2_000_000).into_iter().all(|digest| stack.column_bits(digest) & 1 != 0));
    }

    #[test]
    fn a_base_that_is_too_small_is_freed_with_its_last_bucket() {
        let mut stack = FilterStack::new(4, 64 << 20, &[], None);
        grow(&mut stack, 0, 0..90_000);
        assert!(stack.with_base_for(90_000).is_none());
        stack = stack.with_base_for(300_000).unwrap();
        grow(&mut stack, 1, 90_000..400_000);
        assert_eq!(stack.matrices.len(), 2, "the larger base holds the whole second bucket");
        stack = stack.without(0);
        assert_eq!(stack.matrices.len(), 1, "the old base is freed with the first bucket");
        assert!(digests(90_000..400_000).into_iter().all(|digest| stack.column_bits(digest) & 2 != 0));
    }

    #[test]
    fn a_bucket_moves_to_the_newest_base_and_its_old_matrices_are_freed() {
        let mut stack = FilterStack::new(4, 64 << 20, &[], None);
        grow(&mut stack, 0, 0..90_000);
        grow(&mut stack, 0, 90_000..200_000);
        grow(&mut stack, 1, 200_000..210_000);
        stack = stack.with_base_for(200_000).unwrap();
        assert_eq!(stack.matrices.len(), 3);
        assert!(stack.target_for(0, 300_000).is_none(), "too many keys");
        for (column_id, range) in [(0, 0..200_000), (1, 200_000..210_000)] {
            let before = stack.clone();
            let target = Arc::clone(stack.target_for(column_id, range.end - range.start).unwrap());
            assert!(target.insert(column_id, digests(range.clone())));
            stack = stack.moved(column_id, &target);
            assert!(stack.target_for(column_id, 1).is_none(), "it has moved already");
            for stack in [&before, &stack] {
                assert!(
                    digests(range.clone()).into_iter().all(|digest| stack.column_bits(digest) & 1 << column_id != 0)
                );
            }
        }
        assert_eq!(stack.matrices.len(), 1);
        assert!(digests(0..200_000).into_iter().all(|digest| stack.column_bits(digest) & 1 != 0));
    }

    #[test]
    fn the_first_base_has_the_size_it_needs_if_the_budget_allows() {
        let needed = FilterMatrix::bytes_for(Columns::All(32), with_margin(100_000));
        let stack = FilterStack::new(28, needed * 8 / 7 + 1_024, &[100_000], None);
        assert!(stack.with_room(1, 110_000).is_none(), "{} of {needed} bytes", stack.bytes());
        assert_eq!(stack.matrices.len(), 1);
    }

    #[test]
    fn a_new_stack_has_room_for_the_existing_buckets() {
        let stack = FilterStack::new(26, 128 << 20, &[10, 250_000, 40_000], None);
        assert!(stack.with_room(1, 250_000).is_none());
        assert_eq!(stack.matrices.len(), 1);
    }
}
