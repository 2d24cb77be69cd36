//! How large a filter must be, and how often it is wrong.

/// Bits of a cache line, the unit in which memory answers.
pub(crate) const LINE_BITS: u64 = 512;

/// Lines that a key has where the columns are many, with two rows in each. Eight rows in eight lines would be wrong a
/// third less often, and read twice the memory.
pub(crate) const LINES: u32 = 4;

/// Bits of a column for each key that it is made for. A column is made for an eighth more keys than are expected: 18
/// bits for each of these, and with 24 buckets 1 % wrong answers in all. With 32 columns for them that is 3 bytes a key.
pub(crate) const BITS_PER_KEY: u64 = 16;

/// With room for the ups and downs of a day.
pub(crate) fn with_margin(keys: u64) -> u64 {
    keys.saturating_add(keys / 8)
}

/// The rows of a filter whose columns are to hold `keys` each.
pub(crate) fn rows_for(keys: u64) -> u64 {
    keys.saturating_mul(BITS_PER_KEY)
}

/// The keys that a column of so many rows is made for.
pub(crate) fn capacity_of(rows: u64) -> u64 {
    rows / BITS_PER_KEY
}

/// The share of absent keys that a column of `rows` bits with `keys` keys does not rule out, where lines hold
/// `512 / width` rows.
///
/// The pairs of rows that were set in a line are Poisson distributed; with `i` of them, each two different rows of `r`,
/// a row is still zero with probability `(1 - 2/r)^i`, and two rows are with `((r-2)(r-3) / (r(r-1)))^i`. An absent key
/// passes where two rows are set in each of its lines. After Putze, Sanders and Singler, "Cache-, hash- and
/// space-efficient Bloom filters", 2009.
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

/// As [`false_positive_rate`], where all bits of a key lie in one line of 512, one in each of its eight words.
///
/// The keys of a line are Poisson distributed; with `i` of them a bit of a word is still zero with probability
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
    fn twenty_four_buckets_as_large_as_expected_are_wrong_once_in_a_hundred() {
        let rows = rows_for(with_margin(1_000_000));
        assert_eq!(capacity_of(rows), 1_125_000);
        let rate = 24.0 * false_positive_rate(1_000_000, rows, 32);
        assert!((0.009..0.01).contains(&rate), "{rate}");
        let full = false_positive_rate(1_125_000, rows, 32);
        assert!((0.000_7..0.000_8).contains(&full), "{full} a full column");
        let in_line = false_positive_rate_in_line(1_000_000, rows_for(1_000_000));
        assert!((0.000_85..0.000_95).contains(&in_line), "{in_line} a full line");
    }
}
