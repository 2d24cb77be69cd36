//! A filter matrix: a bit matrix with a column for each bucket and eight rows for each key.
//!
//! In a matrix with many columns, the rows of a key are in four cache lines, two in each: at most four memory
//! accesses cover every bucket. In a matrix with one column they are in one line, one bit in each of its eight words:
//! one memory access.

use std::sync::atomic::{AtomicU64, Ordering};

use super::sizing::{LINE_BITS, LINES, capacity_of, rows_for};
use crate::invariant::STRICT;

/// Shards of a matrix. Each is an allocation of its own, so that no allocation is too large to succeed.
pub(crate) const SHARDS: usize = 16;
const SHARD_BITS: u32 = SHARDS.trailing_zeros();

const WORD_BITS: u32 = u64::BITS;
/// Words of a cache line.
const LINE_WORDS: usize = 8;
const LINE_BYTES: usize = LINE_WORDS * 8;

/// Lines of a key that are read before the first check whether the key is ruled out.
const AHEAD: u32 = LINES / 2;
/// Keys looked up together: enough that a core, which has ten to twelve outstanding cache misses at a time, never
/// idles.
const GROUP: usize = 64;

/// The id of a live bucket's column, below [`MAX_COLUMNS`].
pub(crate) type ColumnId = u8;
pub(crate) const MAX_COLUMNS: usize = 64;

/// The columns that a matrix has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Columns {
    /// Columns 0 to this number, exclusive; a power of two.
    All(u32),
    /// Only this column, for a bucket with far more keys than the others.
    One(ColumnId),
}

impl Columns {
    fn width(self) -> u32 {
        match self {
            Self::All(width) => width,
            Self::One(_) => 1,
        }
    }

    fn column(self, column_id: ColumnId) -> Option<u32> {
        match self {
            Self::All(width) => Some(u32::from(column_id)).filter(|column| *column < width),
            Self::One(only) => (column_id == only).then_some(0),
        }
    }
}

/// The dimensions of a base matrix. Matrices of the same geometry map a key to the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(super) width: u32,
    pub(super) lines_per_shard: u64,
}

impl Geometry {
    /// Whether a matrix can have this geometry.
    pub(super) fn is_valid(self) -> bool {
        self.width.is_power_of_two() && (8..=WORD_BITS).contains(&self.width) && self.lines_per_shard > 0
    }

    /// Bytes of one column in a line.
    fn column_line_bytes(self) -> usize {
        LINE_BYTES / self.width as usize
    }

    /// Bytes of one column in a shard.
    pub(super) fn column_bytes(self) -> u64 {
        self.lines_per_shard.saturating_mul(self.column_line_bytes() as u64)
    }

    pub(crate) fn width(self) -> u32 {
        self.width
    }

    /// Memory of a matrix with this geometry.
    pub(super) fn bytes(self) -> u64 {
        self.lines_per_shard.saturating_mul((SHARDS * LINE_BYTES) as u64)
    }
}

/// A bit matrix. A key's digest selects the rows, its bucket the column.
///
/// Bits are set while other threads read. A reader that must see them acquires a lock that the writer releases
/// afterwards (the memtable shard's), so relaxed accesses are sufficient. Writers must hold a common lock: two
/// concurrent changes of one word could lose a bit.
pub(crate) struct FilterMatrix {
    columns: Columns,
    lines_per_shard: u64,
    shards: Vec<Shard>,
    /// Keys inserted into each column.
    keys: [AtomicU64; MAX_COLUMNS],
}

impl FilterMatrix {
    /// A matrix whose columns hold `keys` keys each. The operating system allocates its pages on first use.
    pub(crate) fn new(columns: Columns, keys: u64) -> Self {
        let rows_per_line = LINE_BITS / u64::from(columns.width());
        let lines = rows_for(keys.max(1)).div_ceil(SHARDS as u64 * rows_per_line);
        Self::of_lines(columns, lines)
    }

    /// A base matrix of this geometry.
    pub(super) fn like(geometry: Geometry) -> Self {
        Self::of_lines(Columns::All(geometry.width), geometry.lines_per_shard)
    }

    fn of_lines(columns: Columns, lines_per_shard: u64) -> Self {
        let lines = usize::try_from(lines_per_shard).unwrap_or(usize::MAX / SHARDS / LINE_BYTES / 2);
        Self {
            columns,
            lines_per_shard: lines as u64,
            shards: (0..SHARDS).map(|_| Shard::new(lines * LINE_WORDS)).collect(),
            keys: [const { AtomicU64::new(0) }; MAX_COLUMNS],
        }
    }

    /// The dimensions, if this is a base matrix.
    pub(crate) fn geometry(&self) -> Option<Geometry> {
        match self.columns {
            Columns::All(width) => Some(Geometry { width, lines_per_shard: self.lines_per_shard }),
            Columns::One(_) => None,
        }
    }

    /// The bits of a column in one shard, row after row, the lowest bit of a byte first. `None` if this is not a base
    /// matrix, or if it has no such column or shard.
    pub(crate) fn column(&self, shard: usize, column_id: ColumnId) -> Option<Vec<u8>> {
        let (geometry, column) = (self.geometry()?, self.columns.column(column_id)?);
        let rows_per_word = WORD_BITS / geometry.width;
        let line_bytes = geometry.column_line_bytes();
        let mut bytes = Vec::with_capacity(geometry.column_bytes() as usize);
        for line in self.shards.get(shard)?.lines() {
            // A line has at most 64 rows.
            let mut rows = 0_u64;
            for (word, index) in line.iter().zip(0..) {
                let word = word.load(Ordering::Relaxed) >> column;
                for row in 0..rows_per_word {
                    rows |= ((word >> (row * geometry.width)) & 1) << (index * rows_per_word + row);
                }
            }
            bytes.extend_from_slice(rows.to_le_bytes().get(..line_bytes)?);
        }
        Some(bytes)
    }

    /// Adds columns, as returned by [`FilterMatrix::column`], to one shard. False if a column does not match this
    /// matrix; then bits are missing.
    #[must_use]
    pub(crate) fn add_columns(&self, shard: usize, columns: &[(ColumnId, Vec<u8>)]) -> bool {
        let (Some(geometry), Some(shard)) = (self.geometry(), self.shards.get(shard)) else { return false };
        let rows_per_word = WORD_BITS / geometry.width;
        let line_bytes = geometry.column_line_bytes();
        let mut readers: Vec<_> = columns
            .iter()
            .filter_map(|(column_id, bytes)| Some((self.columns.column(*column_id)?, bytes.chunks_exact(line_bytes))))
            .collect();
        let column_bytes = geometry.column_bytes();
        let fit = readers.len() == columns.len() && columns.iter().all(|(_, bytes)| bytes.len() as u64 == column_bytes);
        for line in shard.lines() {
            for (column, lines) in &mut readers {
                let mut rows = [0; 8];
                let bytes = lines.next().unwrap_or_default();
                for (row, byte) in rows.iter_mut().zip(bytes) {
                    *row = *byte;
                }
                let mut rows = u64::from_le_bytes(rows);
                while rows != 0 {
                    let row = rows.trailing_zeros();
                    rows &= rows - 1;
                    if let Some(word) = line.get((row / rows_per_word) as usize) {
                        set(word, 1 << (row % rows_per_word * geometry.width + *column));
                    }
                }
            }
        }
        fit
    }

    /// Whether the matrix has this column.
    pub(super) fn has_column(&self, column_id: ColumnId) -> bool {
        self.columns.column(column_id).is_some()
    }

    /// Sets the key count of a column to zero because another matrix has all its keys. The bits stay.
    pub(super) fn forget_keys(&self, column_id: ColumnId) {
        if let Some(count) = self.keys.get(usize::from(column_id)) {
            count.store(0, Ordering::Relaxed);
        }
    }

    /// Adds to the key count of a column. False if there is no such column.
    pub(crate) fn count(&self, column_id: ColumnId, keys: u64) -> bool {
        self.keys.get(usize::from(column_id)).map(|count| count.fetch_add(keys, Ordering::Relaxed)).is_some()
    }

    /// Memory of a matrix whose columns hold `keys` keys each.
    pub(crate) fn bytes_for(columns: Columns, keys: u64) -> u64 {
        rows_for(keys).saturating_mul(u64::from(columns.width())) / 8
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.words.len() as u64 * 8).sum()
    }

    pub(crate) fn columns(&self) -> Columns {
        self.columns
    }

    /// Capacity of each column, in keys.
    pub(crate) fn capacity(&self) -> u64 {
        capacity_of(self.rows())
    }

    fn rows(&self) -> u64 {
        self.lines_per_shard * SHARDS as u64 * LINE_BITS / u64::from(self.columns.width())
    }

    /// The number of keys in a column.
    pub(crate) fn keys(&self, column_id: ColumnId) -> u64 {
        self.keys.get(usize::from(column_id)).map_or(0, |keys| keys.load(Ordering::Relaxed))
    }

    /// Whether no column has keys.
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.iter().all(|keys| keys.load(Ordering::Relaxed) == 0)
    }

    /// The columns that may hold the key with this digest, one bit for each.
    pub(crate) fn column_bits(&self, digest: u64) -> u64 {
        let mut column_bits = [0];
        self.column_bits_of(&[digest], &mut column_bits);
        let [column_bits] = column_bits;
        column_bits
    }

    /// As [`FilterMatrix::column_bits`], for many digests at once. Ors the result into `column_bits`.
    pub(crate) fn column_bits_of(&self, digests: &[u64], column_bits: &mut [u64]) {
        for (digests, column_bits) in digests.chunks(GROUP).zip(column_bits.chunks_mut(GROUP)) {
            match self.columns {
                Columns::All(width) => self.columns_of(width, digests, column_bits),
                Columns::One(column_id) => {
                    for (digest, column_bits) in digests.iter().zip(column_bits) {
                        *column_bits |= u64::from(self.has_in_line(*digest)) << column_id;
                    }
                }
            }
        }
    }

    fn columns_of(&self, width: u32, digests: &[u64], column_bits: &mut [u64]) {
        let mut found = [u64::MAX >> (WORD_BITS - width); GROUP];
        // These reads are independent of each other, so that their cache misses overlap.
        for number in 0..AHEAD {
            for (digest, found) in digests.iter().zip(&mut found) {
                *found &= self.both(*digest, number, width);
            }
        }
        // After four rows of a full column, one key in fifty is still a candidate for each bucket. The candidates are
        // looked up together again, without a branch on each result: a branch misprediction would cost more than a
        // line.
        let mut candidates = [0; GROUP];
        let mut count = compact(&mut candidates, 0..digests.len(), &found);
        for number in AHEAD..LINES {
            for index in candidates.iter().take(count) {
                if let (Some(digest), Some(found)) = (digests.get(*index), found.get_mut(*index)) {
                    *found &= self.both(*digest, number, width);
                }
            }
            let before = candidates;
            count = compact(&mut candidates, before.into_iter().take(count), &found);
        }
        for (found, column_bits) in found.iter().zip(column_bits) {
            *column_bits |= found;
        }
    }

    /// The conjunction of a key's two rows in its line of this number.
    #[inline]
    fn both(&self, digest: u64, number: u32, width: u32) -> u64 {
        let index = BitIndex::of(digest, number, width, self.lines_per_shard);
        let Some(line) = self.shard(digest).get(index.line) else { return u64::MAX };
        index.rows.iter().fold(u64::MAX, |common, (word, shift)| {
            common & line.get(*word).map_or(u64::MAX, |word| word.load(Ordering::Relaxed) >> shift)
        })
    }

    #[inline]
    fn has_in_line(&self, digest: u64) -> bool {
        let (line, mut indexes) = self.line_of_one(digest);
        line.iter().fold(true, |all, word| {
            let set = (word.load(Ordering::Relaxed) >> (indexes & 63)) & 1;
            indexes >>= 6;
            all & (set == 1)
        })
    }

    /// The line of a key in a matrix with one column, and six bits for the position in each of its words.
    #[inline]
    fn line_of_one(&self, digest: u64) -> (&[AtomicU64], u64) {
        let line = reduce(mix(digest.wrapping_add(GOLDEN_GAMMA)), self.lines_per_shard);
        let line = self.shard(digest).get(line as usize).map_or(&[][..], |line| line.as_slice());
        (line, mix(digest.wrapping_add(GOLDEN_GAMMA.wrapping_mul(2))))
    }

    #[inline]
    fn shard(&self, digest: u64) -> &[[AtomicU64; LINE_WORDS]] {
        self.shards.get((digest >> (u64::BITS - SHARD_BITS)) as usize).map_or(&[], Shard::lines)
    }

    /// Inserts keys into a column. False if a bit could not be set, or if there is no such column: then the matrix
    /// must not be used for the bucket. Fastest for sorted digests.
    #[must_use]
    pub(crate) fn insert(&self, column_id: ColumnId, digests: impl IntoIterator<Item = u64>) -> bool {
        let Some(column) = self.columns.column(column_id) else { return false };
        let (mut inserted, mut is_complete, mut last) = (0, true, None);
        for digest in digests {
            match self.columns {
                Columns::All(width) => {
                    for number in 0..LINES {
                        let index = BitIndex::of(digest, number, width, self.lines_per_shard);
                        let line = self.shard(digest).get(index.line).map_or(&[][..], |line| line.as_slice());
                        for (word, shift) in index.rows {
                            match line.get(word) {
                                Some(word) => set(word, 1 << (shift + column)),
                                None => is_complete = false,
                            }
                        }
                    }
                }
                Columns::One(_) => {
                    let (line, mut indexes) = self.line_of_one(digest);
                    is_complete &= line.len() == LINE_WORDS;
                    for word in line {
                        set(word, 1 << (indexes & 63));
                        indexes >>= 6;
                    }
                }
            }
            inserted += 1;
            if STRICT {
                is_complete &= self.has(column_id, digest);
            }
            last = Some(digest);
        }
        // Reads back the last key of each call; strict builds read back every key.
        let is_read_back = last.is_none_or(|digest| self.has(column_id, digest));
        self.count(column_id, inserted) && is_complete && is_read_back
    }

    fn has(&self, column_id: ColumnId, digest: u64) -> bool {
        self.column_bits(digest) & 1 << column_id != 0
    }

    /// Clears a column. Its bucket must have been removed from the snapshot before.
    pub(crate) fn clear(&self, column_id: ColumnId) {
        let Some(column) = self.columns.column(column_id) else { return };
        let mut column_bits = 0_u64;
        for shift in (0..WORD_BITS).step_by(self.columns.width() as usize) {
            column_bits |= 1 << (shift + column);
        }
        for word in self.shards.iter().flat_map(Shard::words) {
            let bits = word.load(Ordering::Relaxed);
            if bits & column_bits != 0 {
                word.store(bits & !column_bits, Ordering::Relaxed);
            }
        }
        if let Some(keys) = self.keys.get(usize::from(column_id)) {
            keys.store(0, Ordering::Relaxed);
        }
    }
}

/// Moves the indexes of keys that are not ruled out yet to the front, and returns their number.
#[inline]
fn compact(candidates: &mut [usize; GROUP], indexes: impl Iterator<Item = usize>, found: &[u64; GROUP]) -> usize {
    let mut count = 0;
    for index in indexes {
        if let Some(next) = candidates.get_mut(count) {
            *next = index;
        }
        count += usize::from(found.get(index).is_some_and(|found| *found != 0));
    }
    count
}

/// Sets bits with a plain load and store, because writers hold a common lock: an atomic read-modify-write would
/// serialise the cache misses.
#[inline]
fn set(word: &AtomicU64, bits: u64) {
    word.store(word.load(Ordering::Relaxed) | bits, Ordering::Relaxed);
}

/// The position of two rows of a key: a line, and for each row its word and the shift within the word.
struct BitIndex {
    line: usize,
    rows: [(usize, u32); 2],
}

impl BitIndex {
    /// The rows in the key's line of this number. Line 0 increases with the digest, so that sorted keys access memory
    /// in order.
    #[inline]
    fn of(digest: u64, number: u32, width: u32, lines: u64) -> Self {
        let mixed = mix(digest.wrapping_add(GOLDEN_GAMMA.wrapping_mul(u64::from(number) + 1)));
        let line = reduce(if number == 0 { digest << SHARD_BITS } else { mixed }, lines) as usize;
        let width_bits = width.trailing_zeros();
        let rows = LINE_BITS as u32 >> width_bits;
        // The high bits select the line, the low bits the rows. The second row is any row but the first.
        let first = mixed as u32 & (rows - 1);
        let further = 1 + ((((mixed >> 16) as u32 & 0xffff) * (rows - 1)) >> 16);
        let second = (first + further) & (rows - 1);
        let index = |row: u32| {
            ((row >> (WORD_BITS.trailing_zeros() - width_bits)) as usize, (row << width_bits) & (WORD_BITS - 1))
        };
        Self { line, rows: [index(first), index(second)] }
    }
}

/// The increment of SplitMix64, whose outputs are statistically independent.
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

/// A part of a matrix: words aligned to a cache line.
struct Shard {
    words: Box<[AtomicU64]>,
    start: usize,
}

impl Shard {
    /// A shard of zeroed words. The operating system allocates its pages on first use.
    fn new(words: usize) -> Self {
        let words: Box<[AtomicU64]> = bytemuck::zeroed_slice_box(words + LINE_WORDS - 1);
        let misaligned = words.as_ptr().addr() % LINE_BYTES;
        let start = if misaligned == 0 { 0 } else { (LINE_BYTES - misaligned) / 8 };
        Self { words, start }
    }

    #[inline]
    fn lines(&self) -> &[[AtomicU64; LINE_WORDS]] {
        self.words.get(self.start..).unwrap_or_default().as_chunks().0
    }

    fn words(&self) -> &[AtomicU64] {
        self.lines().as_flattened()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digester;
    use crate::filter::sizing::{false_positive_rate, false_positive_rate_in_line};

    fn digests(range: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
        let digester = Digester::new(&[1; 16]);
        range.map(move |i| digester.digest(&i.to_le_bytes()))
    }

    #[test]
    fn inserted_keys_are_found_in_their_column() {
        for columns in [Columns::All(1), Columns::All(4), Columns::All(32), Columns::All(64), Columns::One(9)] {
            let column_id = match columns {
                Columns::All(width) => ColumnId::try_from(width - 1).unwrap(),
                Columns::One(column_id) => column_id,
            };
            let matrix = FilterMatrix::new(columns, 1_000);
            assert!(matrix.insert(column_id, digests(0..1_000)));
            assert_eq!(matrix.keys(column_id), 1_000);
            for digest in digests(0..1_000) {
                assert_ne!(matrix.column_bits(digest) & 1 << column_id, 0, "{columns:?}");
            }
        }
    }

    #[test]
    fn the_false_positive_rate_matches_the_formula() {
        for columns in [Columns::All(8), Columns::All(32), Columns::All(64), Columns::One(3)] {
            let matrix = FilterMatrix::new(columns, 25_000);
            let column_id = if columns == Columns::One(3) { 3 } else { 0 };
            // Twice the capacity, so that false positives are frequent enough to count.
            assert!(matrix.insert(column_id, digests(0..50_000)));
            let trials = 400_000;
            let false_positives =
                digests(1_000_000..1_000_000 + trials).filter(|digest| matrix.column_bits(*digest) != 0).count();
            let rate = false_positives as f64 / trials as f64;
            let expected = match columns {
                Columns::All(width) => false_positive_rate(50_000, matrix.rows(), u64::from(width)),
                Columns::One(_) => false_positive_rate_in_line(50_000, matrix.rows()),
            };
            assert!((0.85..1.15).contains(&(rate / expected)), "{columns:?}: {rate}, expected {expected}");
        }
    }

    #[test]
    fn clearing_a_column_leaves_the_others_unchanged() {
        let matrix = FilterMatrix::new(Columns::All(8), 1_000);
        for column_id in 0..8 {
            assert!(matrix.insert(column_id, digests(u64::from(column_id) * 100..u64::from(column_id) * 100 + 100)));
        }
        matrix.clear(5);
        assert!(digests(500..600).all(|digest| matrix.column_bits(digest) & 1 << 5 == 0));
        for column_id in [0_u8, 4, 6, 7] {
            let start = u64::from(column_id) * 100;
            assert!(digests(start..start + 100).all(|digest| matrix.column_bits(digest) & 1 << column_id != 0));
        }
        assert!(!matrix.is_empty());
        (0..8).for_each(|column_id| matrix.clear(column_id));
        assert!(
            matrix.is_empty()
                && matrix.shards.iter().flat_map(Shard::words).all(|word| word.load(Ordering::Relaxed) == 0)
        );
    }

    #[test]
    fn an_exported_column_is_loaded_unchanged() {
        for width in [8, 16, 32, 64] {
            let matrix = FilterMatrix::new(Columns::All(width), 3_000);
            let column_ids: Vec<ColumnId> = [0, 5, width as ColumnId - 1].into();
            for column_id in &column_ids {
                assert!(matrix.insert(
                    *column_id,
                    digests(u64::from(*column_id) * 10_000..u64::from(*column_id) * 10_000 + 3_000)
                ));
            }
            let other = FilterMatrix::like(matrix.geometry().unwrap());
            for shard in 0..SHARDS {
                let columns: Vec<_> = column_ids
                    .iter()
                    .map(|column_id| (*column_id, matrix.column(shard, *column_id).unwrap()))
                    .collect();
                assert_eq!(columns[0].1.len() as u64, matrix.geometry().unwrap().column_bytes());
                assert!(other.add_columns(shard, &columns));
            }
            let words = |matrix: &FilterMatrix| -> Vec<u64> {
                matrix.shards.iter().flat_map(Shard::words).map(|word| word.load(Ordering::Relaxed)).collect()
            };
            assert_eq!(words(&matrix), words(&other), "{width} columns");
        }
    }

    #[test]
    fn an_insert_into_a_missing_column_fails() {
        assert!(!FilterMatrix::new(Columns::All(8), 10).insert(8, [1]));
        assert!(!FilterMatrix::new(Columns::One(3), 10).insert(4, [1]));
    }

    #[test]
    fn an_insert_reports_missing_bits_and_missing_columns() {
        for columns in [Columns::All(8), Columns::One(3)] {
            let mut matrix = FilterMatrix::new(columns, 3_000);
            assert!(matrix.insert(3, digests(0..1_000)));
            matrix.shards[5] = Shard::new(0);
            assert!(!matrix.insert(3, digests(0..1_000)), "{columns:?}");
            assert!(!matrix.insert(9, digests(0..10)), "{columns:?} has no such column");
        }
        let matrix = FilterMatrix::new(Columns::All(8), 3_000);
        let column = matrix.column(0, 3).unwrap();
        assert!(matrix.add_columns(0, &[(3, column.clone())]));
        assert!(!matrix.add_columns(0, &[(3, column[1..].to_vec())]), "the column is too short");
        assert!(!matrix.add_columns(0, &[(9, column.clone())]), "no such column");
        assert!(!matrix.add_columns(SHARDS, &[(3, column)]), "no such shard");
        assert!(matrix.column(SHARDS, 3).is_none() && matrix.column(0, 9).is_none());
        assert!(!matrix.count(64, 1));
    }
}
