//! The layers of the filter, and how they grow: nothing is copied and nobody waits.
//!
//! The base layer has a column for every bucket. A bucket that outgrows its column goes on in a layer of its own,
//! four times as large as the one before. When a bucket that had to do so ends, the next ones get a larger base; the
//! old one goes when the last bucket in it does.

use std::sync::Arc;

use super::matrix::{ColumnId, Columns, FilterMatrix, Geometry};
use super::sizing::with_margin;

/// The keys a bucket that a new store's base layer is made for.
const FIRST_CAPACITY: u64 = 100_000;
/// How much larger each further layer of a bucket is.
const GROWTH: u64 = 4;

/// An immutable list of layers; the layers themselves change. Made anew when a layer comes or goes.
#[derive(Clone)]
pub(crate) struct FilterStack {
    matrices: Vec<Arc<FilterMatrix>>,
    width: u32,
    budget_bytes: u64,
}

impl FilterStack {
    /// A stack for so many slots that takes about `budget_bytes` at most; `bucket_keys` are the keys of the buckets
    /// that are there already. Its base is of this geometry, if it may be, so that columns that were kept fit into it.
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

    /// The columns of a base for so many slots.
    fn width_for(columns: u64) -> u32 {
        u32::try_from(columns).unwrap_or(64).next_power_of_two().clamp(8, 64)
    }

    /// The topmost base.
    pub(crate) fn base(&self) -> Option<&Arc<FilterMatrix>> {
        self.matrices.iter().rev().find(|matrix| matches!(matrix.columns(), Columns::All(_)))
    }

    /// Whether the layer is still asked.
    pub(crate) fn has(&self, matrix: &Arc<FilterMatrix>) -> bool {
        self.matrices.iter().any(|other| Arc::ptr_eq(other, matrix))
    }

    /// The base that has all keys of the slot, if one has.
    pub(crate) fn base_of(&self, column_id: ColumnId) -> Option<&Arc<FilterMatrix>> {
        let mut with_keys = self.matrices.iter().filter(|matrix| matrix.keys(column_id) > 0);
        let only = with_keys.next().filter(|matrix| matches!(matrix.columns(), Columns::All(_)))?;
        with_keys.next().is_none().then_some(only)
    }

    /// The topmost base, if the slot's keys lie elsewhere and would fit into it.
    pub(crate) fn target_for(&self, column_id: ColumnId, keys: u64) -> Option<&Arc<FilterMatrix>> {
        let index = self.matrices.iter().rposition(|matrix| matches!(matrix.columns(), Columns::All(_)))?;
        let (below, rest) = self.matrices.split_at_checked(index)?;
        let (target, above) = rest.split_first()?;
        let elsewhere = below.iter().any(|matrix| matrix.keys(column_id) > 0);
        let overflown = above.iter().any(|matrix| matrix.keys(column_id) > 0);
        let fits = target.keys(column_id).saturating_add(keys) <= target.capacity();
        (elsewhere && !overflown && fits && target.column_for(column_id)).then_some(target)
    }

    /// The stack without what it has of a slot below `target`, which has all of it by now. Nothing is erased: somebody may
    /// still be looking at the stack as it was.
    pub(crate) fn moved(&self, column_id: ColumnId, target: &Arc<FilterMatrix>) -> Self {
        let mut matrices = Vec::with_capacity(self.matrices.len());
        let mut below = true;
        for matrix in &self.matrices {
            below &= !Arc::ptr_eq(matrix, target);
            if below {
                matrix.leave(column_id);
            }
            if !below || !matrix.is_empty() {
                matrices.push(Arc::clone(matrix));
            }
        }
        Self { matrices, ..*self }
    }

    /// Puts a base layer on top, for `keys` keys a bucket or as many as half of what is left of the budget allows: a larger
    /// one may have to come. The first, which is made for what is there or was announced, may take more. False if it is
    /// for none.
    fn add_base(&mut self, keys: u64) -> bool {
        let columns = Columns::All(self.width);
        let left = self.budget_bytes.saturating_sub(self.bytes());
        let share = if self.matrices.is_empty() { left / 8 * 7 } else { left / 2 };
        let affordable = share / FilterMatrix::bytes_for(columns, 1).max(1);
        let keys = keys.min(affordable);
        // A store must have some base, even where the budget is spent.
        let more = keys > 0 || self.matrices.is_empty();
        if more {
            self.matrices.push(Arc::new(FilterMatrix::new(columns, keys.max(1_000))));
        }
        more
    }

    /// Whether keys of the slot can be marked at all.
    pub(crate) fn covers(&self, column_id: ColumnId) -> bool {
        u32::from(column_id) < self.width
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.matrices.iter().map(|matrix| matrix.bytes()).sum()
    }

    /// The slots whose buckets may hold the key with this digest, a bit each.
    #[inline]
    pub(crate) fn column_bits(&self, digest: u64) -> u64 {
        self.matrices.iter().fold(0, |column_bits, matrix| column_bits | matrix.column_bits(digest))
    }

    /// As [`FilterStack::column_bits`], for many digests, each in its place.
    pub(crate) fn column_bits_of(&self, digests: &[u64], column_bits: &mut [u64]) {
        for matrix in &self.matrices {
            matrix.column_bits_of(digests, column_bits);
        }
    }

    /// The layer that takes the slot's next keys: the topmost that has a column for it.
    fn top(&self, column_id: ColumnId) -> Option<&Arc<FilterMatrix>> {
        self.matrices.iter().rev().find(|matrix| match matrix.columns() {
            Columns::One(only) => only == column_id,
            Columns::All(width) => u32::from(column_id) < width,
        })
    }

    /// A stack with room for `keys` more keys of the slot, if this one has too little and the budget allows more.
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
        // Not worth a further look at every check.
        if capacity < keys || capacity < top.capacity() / 2 {
            return None;
        }
        let mut more = self.clone();
        more.matrices.push(Arc::new(FilterMatrix::new(columns, capacity)));
        Some(more)
    }

    /// Notes the digests of keys that the slot's bucket holds. False if a bit of one of them could not be set.
    #[must_use]
    pub(crate) fn insert(&self, column_id: ColumnId, digests: impl IntoIterator<Item = u64>) -> bool {
        self.top(column_id).is_some_and(|matrix| matrix.insert(column_id, digests))
    }

    /// A stack with a larger base, if a bucket of `keys` keys would not fit into the present one.
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

    /// The stack without the slot, whose bucket is gone. Takes time: every word of a base is visited.
    pub(crate) fn without(&self, column_id: ColumnId) -> Self {
        for matrix in &self.matrices {
            matrix.clear(column_id);
        }
        let mut matrices = self.matrices.clone();
        let newest_base = matrices.iter().rposition(|matrix| matches!(matrix.columns(), Columns::All(_)));
        let mut index = 0;
        matrices.retain(|matrix| {
            let keep = !matrix.is_empty() || Some(index) == newest_base;
            index += 1;
            keep
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
        if let Some(more) = stack.with_room(column_id, digests.len() as u64) {
            *stack = more;
        }
        assert!(stack.insert(column_id, digests));
    }

    #[test]
    fn a_bucket_that_outgrows_its_column_goes_on_in_a_larger_layer() {
        let mut stack = FilterStack::new(4, 64 << 20, &[], None);
        for chunk in 0..10 {
            grow(&mut stack, 2, chunk * 100_000..(chunk + 1) * 100_000);
        }
        assert_eq!(stack.matrices.len(), 3, "100,000, then 400,000, then 1,600,000");
        assert!(digests(0..1_000_000).into_iter().all(|digest| stack.column_bits(digest) & 1 << 2 != 0));
        let wrong = digests(2_000_000..2_100_000).into_iter().filter(|digest| stack.column_bits(*digest) != 0).count();
        assert!(wrong < 250, "{wrong} of 100,000 new keys would go to the disk");

        let stack = stack.without(2);
        assert_eq!(stack.matrices.len(), 1, "only the base stays");
        assert!(digests(0..1_000_000).into_iter().all(|digest| stack.column_bits(digest) == 0));
    }

    #[test]
    fn the_budget_holds_and_every_key_is_still_found() {
        let budget = 2 << 20;
        let mut stack = FilterStack::new(4, budget, &[], None);
        for chunk in 0..20 {
            grow(&mut stack, 0, chunk * 100_000..(chunk + 1) * 100_000);
        }
        assert!(stack.bytes() <= budget + budget / 8, "{} bytes", stack.bytes());
        assert!(digests(0..2_000_000).into_iter().all(|digest| stack.column_bits(digest) & 1 != 0));
    }

    #[test]
    fn a_base_that_was_too_small_is_replaced_as_its_buckets_go() {
        let mut stack = FilterStack::new(4, 64 << 20, &[], None);
        grow(&mut stack, 0, 0..90_000);
        assert!(stack.with_base_for(90_000).is_none());
        stack = stack.with_base_for(300_000).unwrap();
        grow(&mut stack, 1, 90_000..400_000);
        assert_eq!(stack.matrices.len(), 2, "the larger base takes the second bucket whole");
        stack = stack.without(0);
        assert_eq!(stack.matrices.len(), 1, "and the old base goes with the first");
        assert!(digests(90_000..400_000).into_iter().all(|digest| stack.column_bits(digest) & 2 != 0));
    }

    #[test]
    fn a_bucket_moves_to_the_newest_base_and_the_old_layers_go() {
        let mut stack = FilterStack::new(4, 64 << 20, &[], None);
        grow(&mut stack, 0, 0..90_000);
        grow(&mut stack, 0, 90_000..200_000);
        grow(&mut stack, 1, 200_000..210_000);
        stack = stack.with_base_for(200_000).unwrap();
        assert_eq!(stack.matrices.len(), 3);
        assert!(stack.target_for(0, 300_000).is_none(), "too many");
        for (column_id, range) in [(0, 0..200_000), (1, 200_000..210_000)] {
            let before = stack.clone();
            let target = Arc::clone(stack.target_for(column_id, range.end - range.start).unwrap());
            assert!(target.insert(column_id, digests(range.clone())));
            stack = stack.moved(column_id, &target);
            assert!(stack.target_for(column_id, 1).is_none(), "it is there");
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
    fn a_first_base_takes_what_it_needs_where_the_budget_has_it() {
        let needed = FilterMatrix::bytes_for(Columns::All(32), with_margin(100_000));
        let stack = FilterStack::new(28, needed * 8 / 7 + 1_024, &[100_000], None);
        assert!(stack.with_room(1, 110_000).is_none(), "{} of {needed} bytes", stack.bytes());
        assert_eq!(stack.matrices.len(), 1);
    }

    #[test]
    fn a_stack_for_buckets_that_are_there_fits_them() {
        let stack = FilterStack::new(26, 128 << 20, &[10, 250_000, 40_000], None);
        assert!(stack.with_room(1, 250_000).is_none());
        assert_eq!(stack.matrices.len(), 1);
    }
}
