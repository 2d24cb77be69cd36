//! A layer of the filter: a matrix of bits, a column for each bucket, eight rows a key.
//!
//! Where the columns are many, the rows of a key lie anywhere: eight reads of memory, that answer for every bucket.
//! Where there is one column, they lie in one cache line, a bit in each of its eight words: one read of memory.

use std::sync::atomic::{AtomicU64, Ordering};

use super::sizing::{HASHES, capacity_of, rows_for};

/// Shards of a layer: each is an allocation of its own, so that none is too large to come by.
const SHARDS: usize = 16;
const SHARD_BITS: u32 = SHARDS.trailing_zeros();

const WORD_BITS: u32 = u64::BITS;
/// Words of a cache line, and bits of one.
const LINE_WORDS: usize = 8;
const LINE_BITS: u64 = 512;
const LINE_BYTES: usize = LINE_WORDS * 8;

/// A number below [`SLOTS`] that stands for a live bucket.
pub(crate) type Slot = u8;
pub(crate) const SLOTS: usize = 64;

/// What the columns of a layer stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Columns {
    /// Column `n` is slot `n`; this many columns, a power of two.
    All(u32),
    /// One column, for this slot: where a bucket has far more keys than the others.
    One(Slot),
}

impl Columns {
    fn width(self) -> u32 {
        match self {
            Self::All(width) => width,
            Self::One(_) => 1,
        }
    }

    fn column(self, slot: Slot) -> Option<u32> {
        match self {
            Self::All(width) => Some(u32::from(slot)).filter(|column| *column < width),
            Self::One(only) => (slot == only).then_some(0),
        }
    }
}

/// A matrix of bits. Rows are chosen by a key's digest, columns by the bucket that holds it.
///
/// Bits are set while others read; a reader that must see them takes a lock that the writer gave back afterwards
/// (the hot table's stripe), so that relaxed accesses are enough.
pub(crate) struct Layer {
    columns: Columns,
    /// `log2` of the rows that lie in one word.
    rows_per_word_bits: u32,
    rows_per_shard: u64,
    shards: Vec<Shard>,
    /// Keys inserted for each slot.
    keys: [AtomicU64; SLOTS],
}

impl Layer {
    /// A layer whose columns are made for `keys` keys each. The memory is taken as it is touched.
    pub(crate) fn new(columns: Columns, keys: u64) -> Self {
        let rows_per_word_bits = (WORD_BITS / columns.width()).trailing_zeros();
        let lines = (rows_for(keys.max(1)).div_ceil(SHARDS as u64) >> rows_per_word_bits) / LINE_WORDS as u64 + 1;
        let words = usize::try_from(lines).unwrap_or(usize::MAX / SHARDS / LINE_BYTES / 2) * LINE_WORDS;
        Self {
            columns,
            rows_per_word_bits,
            rows_per_shard: (words as u64) << rows_per_word_bits,
            shards: (0..SHARDS).map(|_| Shard::new(words)).collect(),
            keys: [const { AtomicU64::new(0) }; SLOTS],
        }
    }

    /// The memory that a layer takes.
    pub(crate) fn bytes_for(columns: Columns, keys: u64) -> u64 {
        rows_for(keys).saturating_mul(u64::from(columns.width())) / 8
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.words.len() as u64 * 8).sum()
    }

    pub(crate) fn columns(&self) -> Columns {
        self.columns
    }

    /// The keys that each column is made for.
    pub(crate) fn capacity(&self) -> u64 {
        capacity_of(self.rows_per_shard * SHARDS as u64)
    }

    /// The keys that were inserted for a slot.
    pub(crate) fn keys(&self, slot: Slot) -> u64 {
        self.keys.get(usize::from(slot)).map_or(0, |keys| keys.load(Ordering::Relaxed))
    }

    /// Whether no slot has keys here.
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.iter().all(|keys| keys.load(Ordering::Relaxed) == 0)
    }

    /// The slots that may hold the key with this digest, a bit each.
    pub(crate) fn slots(&self, digest: u64) -> u64 {
        let mut found = u64::MAX >> (WORD_BITS - self.columns.width());
        self.for_each_row(digest, |word, shift| {
            found &= word.load(Ordering::Relaxed) >> shift;
            found != 0
        });
        match self.columns {
            Columns::All(_) => found,
            Columns::One(slot) => found << slot,
        }
    }

    /// As [`Layer::slots`], for many digests: adds to what stands in each one's place.
    pub(crate) fn slots_of(&self, digests: &[u64], slots: &mut [u64]) {
        for (digest, slots) in digests.iter().zip(slots) {
            *slots |= self.slots(*digest);
        }
    }

    /// Notes that the slot's bucket holds keys with these digests. False if the layer has no column for the slot.
    pub(crate) fn insert(&self, slot: Slot, digests: impl IntoIterator<Item = u64>) -> bool {
        let Some(column) = self.columns.column(slot) else { return false };
        let mut inserted = 0;
        for digest in digests {
            self.for_each_row(digest, |word, shift| {
                let bit = 1 << (shift + column);
                if word.load(Ordering::Relaxed) & bit == 0 {
                    word.fetch_or(bit, Ordering::Relaxed);
                }
                true
            });
            inserted += 1;
        }
        if let Some(keys) = self.keys.get(usize::from(slot)) {
            keys.fetch_add(inserted, Ordering::Relaxed);
        }
        true
    }

    /// Empties a slot's column. It must not stand for a live bucket any more.
    pub(crate) fn clear(&self, slot: Slot) {
        let Some(column) = self.columns.column(slot).filter(|_| self.keys(slot) > 0) else { return };
        let mut column_bits = 0_u64;
        for row in 0..1_u32 << self.rows_per_word_bits {
            column_bits |= 1 << (row * self.columns.width() + column);
        }
        for word in self.shards.iter().flat_map(Shard::words) {
            if word.load(Ordering::Relaxed) & column_bits != 0 {
                word.fetch_and(!column_bits, Ordering::Relaxed);
            }
        }
        if let Some(keys) = self.keys.get(usize::from(slot)) {
            keys.store(0, Ordering::Relaxed);
        }
    }

    /// Visits the key's rows: the word each lies in, and where it begins there. Half way, `visit` may have seen enough.
    #[inline]
    fn for_each_row(&self, digest: u64, visit: impl FnMut(&AtomicU64, u32) -> bool) {
        let Some(shard) = self.shards.get((digest >> (u64::BITS - SHARD_BITS)) as usize) else { return };
        match self.columns {
            Columns::All(width) => self.for_each_scattered(shard.words(), width, digest, visit),
            Columns::One(_) => self.for_each_in_line(shard.words(), digest, visit),
        }
    }

    #[inline]
    fn for_each_scattered(
        &self,
        words: &[AtomicU64],
        width: u32,
        digest: u64,
        mut visit: impl FnMut(&AtomicU64, u32) -> bool,
    ) {
        let width_bits = width.trailing_zeros();
        let row_mask = (1_u64 << self.rows_per_word_bits) - 1;
        let mut state = digest;
        for hash in 1..=HASHES {
            state = state.wrapping_add(GOLDEN_GAMMA);
            let row = reduce(mix(state), self.rows_per_shard);
            let Some(word) = words.get((row >> self.rows_per_word_bits) as usize) else { return };
            let go_on = visit(word, ((row & row_mask) as u32) << width_bits);
            // Asked once, so that four reads of memory are under way at a time. Four rows of full columns let one key in
            // eighty on, for each bucket.
            if hash == HASHES / 2 && !go_on {
                return;
            }
        }
    }

    #[inline]
    fn for_each_in_line(&self, words: &[AtomicU64], digest: u64, mut visit: impl FnMut(&AtomicU64, u32) -> bool) {
        let state = digest.wrapping_add(GOLDEN_GAMMA);
        let line = reduce(mix(state), self.rows_per_shard / LINE_BITS) as usize * LINE_WORDS;
        let Some(line) = words.get(line..line + LINE_WORDS) else { return };
        // Six bits of a second number for each word.
        let mut places = mix(state.wrapping_add(GOLDEN_GAMMA));
        for word in line {
            visit(word, (places & 63) as u32);
            places >>= 6;
        }
    }
}

/// SplitMix64: each number of the sequence is as good as drawn anew.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline]
fn mix(state: u64) -> u64 {
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// Lemire's reduction: the high half of the product is uniform below `end`.
#[inline]
fn reduce(number: u64, end: u64) -> u64 {
    ((u128::from(number) * u128::from(end)) >> 64) as u64
}

/// A part of a layer: words that begin at a cache line.
struct Shard {
    words: Box<[AtomicU64]>,
    start: usize,
}

impl Shard {
    /// So many words, zero. The memory is taken as it is touched.
    fn new(words: usize) -> Self {
        let words: Box<[AtomicU64]> = bytemuck::zeroed_slice_box(words + LINE_WORDS - 1);
        let over = words.as_ptr().addr() % LINE_BYTES;
        let start = if over == 0 { 0 } else { (LINE_BYTES - over) / 8 };
        Self { words, start }
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self.words.get(self.start..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::sizing::{false_positive_rate, false_positive_rate_in_line};
    use crate::key::Digester;

    fn digests(range: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
        let digester = Digester::new(&[1; 16]);
        range.map(move |i| digester.digest(&i.to_le_bytes()))
    }

    #[test]
    fn what_was_inserted_is_found_in_its_slot() {
        for columns in [Columns::All(1), Columns::All(4), Columns::All(32), Columns::All(64), Columns::One(9)] {
            let slot = match columns {
                Columns::All(width) => Slot::try_from(width - 1).unwrap(),
                Columns::One(slot) => slot,
            };
            let layer = Layer::new(columns, 1_000);
            assert!(layer.insert(slot, digests(0..1_000)));
            assert_eq!(layer.keys(slot), 1_000);
            for digest in digests(0..1_000) {
                assert_ne!(layer.slots(digest) & 1 << slot, 0, "{columns:?}");
            }
        }
    }

    #[test]
    fn the_rate_of_wrong_answers_is_the_computed_one() {
        for columns in [Columns::All(1), Columns::All(8), Columns::All(32), Columns::One(3)] {
            let layer = Layer::new(columns, 25_000);
            let slot = if columns == Columns::One(3) { 3 } else { 0 };
            // Twice what it is made for, so that wrong answers are frequent enough to count.
            layer.insert(slot, digests(0..50_000));
            let trials = 400_000;
            let wrong = digests(1_000_000..1_000_000 + trials).filter(|digest| layer.slots(*digest) != 0).count();
            let rate = wrong as f64 / trials as f64;
            let rows = layer.rows_per_shard * SHARDS as u64;
            let expected = match columns {
                Columns::All(_) => false_positive_rate(50_000, rows),
                Columns::One(_) => false_positive_rate_in_line(50_000, rows),
            };
            assert!((0.85..1.15).contains(&(rate / expected)), "{columns:?}: {rate} where {expected} was computed");
        }
    }

    #[test]
    fn clearing_a_slot_leaves_the_others() {
        let layer = Layer::new(Columns::All(8), 1_000);
        for slot in 0..8 {
            layer.insert(slot, digests(u64::from(slot) * 100..u64::from(slot) * 100 + 100));
        }
        layer.clear(5);
        assert!(digests(500..600).all(|digest| layer.slots(digest) & 1 << 5 == 0));
        for slot in [0_u8, 4, 6, 7] {
            let start = u64::from(slot) * 100;
            assert!(digests(start..start + 100).all(|digest| layer.slots(digest) & 1 << slot != 0));
        }
        assert!(!layer.is_empty());
        (0..8).for_each(|slot| layer.clear(slot));
        assert!(
            layer.is_empty()
                && layer.shards.iter().flat_map(Shard::words).all(|word| word.load(Ordering::Relaxed) == 0)
        );
    }

    #[test]
    fn a_slot_without_a_column_is_refused() {
        assert!(!Layer::new(Columns::All(8), 10).insert(8, [1]));
        assert!(!Layer::new(Columns::One(3), 10).insert(4, [1]));
    }
}
