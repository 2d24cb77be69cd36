//! How large a filter must be, and how often it is wrong.

/// Bits that a key sets. With [`BITS_PER_KEY`] bits for each, `k = 8` is within a factor of five of the best rate
/// (`ln 2 * 20 = 14` hashes), for little more than half of the memory accesses.
pub(crate) const HASHES: u32 = 8;

/// Bits of a column for each key that it is made for: 0.014 % wrong answers a full column, 0.35 % over 25 of them.
pub(crate) const BITS_PER_KEY: u64 = 20;

/// The rows of a filter whose columns are to hold `keys` each.
pub(crate) fn rows_for(keys: u64) -> u64 {
    keys.saturating_mul(BITS_PER_KEY)
}

/// The keys that a column of so many rows is made for.
pub(crate) fn capacity_of(rows: u64) -> u64 {
    rows / BITS_PER_KEY
}

/// The share of absent keys that a column of `rows` bits with `keys` keys does not rule out.
///
/// After `n` keys of `k` bits each a bit of `m` is still zero with probability `(1 - 1/m)^(kn)`, about `e^(-kn/m)`;
/// an absent key passes where its `k` bits are all set: `(1 - e^(-kn/m))^k`. Bloom, "Space/time trade-offs in hash
/// coding with allowable errors", 1970; the approximation is Mitzenmacher's, "Compressed Bloom filters", 2002.
#[cfg(test)]
pub(crate) fn false_positive_rate(keys: u64, rows: u64) -> f64 {
    let k = f64::from(HASHES);
    (1.0 - (-k * keys as f64 / rows as f64).exp()).powf(k)
}

/// As [`false_positive_rate`], where all bits of a key lie in one line of 512, one in each of its eight words.
///
/// The keys of a line are Poisson distributed; with `i` of them a bit of a word is still zero with probability
/// `(1 - 1/64)^i`. Putze, Sanders and Singler, "Cache-, hash- and space-efficient Bloom filters", 2009.
#[cfg(test)]
pub(crate) fn false_positive_rate_in_line(keys: u64, rows: u64) -> f64 {
    let mean = 512.0 * keys as f64 / rows as f64;
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
    fn a_full_column_is_wrong_once_in_seven_thousand() {
        let rate = false_positive_rate(1_000_000, rows_for(1_000_000));
        assert!((0.000_13..0.000_15).contains(&rate), "{rate}");
        assert_eq!(capacity_of(rows_for(1_000_000)), 1_000_000);
        let in_line = false_positive_rate_in_line(1_000_000, rows_for(1_000_000));
        assert!((0.000_24..0.000_28).contains(&in_line), "and once in four thousand in a line: {in_line}");
    }
}
