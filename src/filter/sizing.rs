//! Filter sizes and false-positive rates.

/// Bits of a cache line, the unit of a memory access.
pub(crate) const LINE_BITS: u64 = 512;

/// Cache lines of a key in a matrix with many columns, with two rows in each. Eight rows in eight lines would have a
/// third fewer false positives, but read twice as much memory.
pub(crate) const LINES: u32 = 4;

/// Bits of a column for each key of its capacity. The capacity is an eighth above the expected keys, which makes 18
/// bits for each expected key, and 1 % false positives over 24 buckets. With 32 columns for 24 buckets that is 3
/// bytes a key.
pub(crate) const BITS_PER_KEY: u64 = 16;

/// Adds an eighth, because buckets differ in size over a day.
pub(crate) fn with_margin(keys: u64) -> u64 {
    keys.saturating_add(keys / 8)
}

/// The rows of a matrix whose columns hold `keys` keys each.
pub(crate) fn rows_for(keys: u64) -> u64 {
    keys.saturating_mul(BITS_PER_KEY)
}

/// The keys that a column of `rows` rows holds.
pub(crate) fn capacity_of(rows: u64) -> u64 {
    rows / BITS_PER_KEY
}

/// The false-positive rate of a column with `rows` bits and `keys` keys, if a line has `512 / width` rows.
///
/// The number of keys that set a pair of rows in a line is Poisson distributed. After `i` pairs, each of two
/// different rows of `r`, one row is still zero with probability `(1 - 2/r)^i`, and two rows are with `((r-2)(r-3) /
/// (r(r-1)))^i`. An absent key is a false positive if both of its rows are set in each of its lines. After Putze,
/// Sanders and Singler, "Cache-, hash- and space-efficient Bloom filters", 2009.
#[cfg(test)]
pub(crate) fn false_positive_rate(keys: u64, rows: u64, width: u64) -> f64 {
    let r = (LINE_BITS / width) as f64;
    let mean = f64::from(LINES) * keys as f64 * r / rows as f64;
    let mut share = (-mean).exp();
    let mut both_set = 0.0;
    for i in 1..2_000 {
        share *= mean / f64::from(i);
        let one_zero = (1.0 - 2.0 / r).powi(i);
        let both_zero = ((r - 2.0) * (r - 3.0) / (r * (r - 1.0))).powi(i);
        both_set += share * (1.0 - 2.0 * one_zero + both_zero);
    }
    both_set.powi(LINES as i32)
}

/// As [`false_positive_rate`], if all bits of a key are in one line of 512 bits, one in each of its eight words.
///
/// The number of keys in a line is Poisson distributed. With `i` keys, a bit of a word is still zero with probability
/// `(1 - 1/64)^i`. Putze, Sanders and Singler, "Cache-, hash- and space-efficient Bloom filters", 2009.
#[cfg(test)]
pub(crate) fn false_positive_rate_in_line(keys: u64, rows: u64) -> f64 {
    let mean = LINE_BITS as f64 * keys as f64 / rows as f64;
    let mut share = (-mean).exp();
    let mut rate = 0.0;
    for i in 1..2_000 {
        share *= mean / f64::from(i);
        rate += share * (1.0 - (1.0 - 1.0 / 64.0_f64).powi(i)).powi(8);
    }
    rate
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_four_buckets_of_the_expected_size_have_one_percent_false_positives() {
        let rows = rows_for(with_margin(1_000_000));
        assert_eq!(capacity_of(rows), 1_125_000);
        let rate = 24.0 * false_positive_rate(1_000_000, rows, 32);
        assert!((0.009..0.01).contains(&rate), "{rate}");
        let full = false_positive_rate(1_125_000, rows, 32);
        assert!((0.000_7..0.000_8).contains(&full), "{full} for a full column");
        let in_line = false_positive_rate_in_line(1_000_000, rows_for(1_000_000));
        assert!((0.000_85..0.000_95).contains(&in_line), "{in_line} for a full line");
    }
}
