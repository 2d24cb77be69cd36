//! The keys, which look like UUIDs and are the same in every run.

/// A key.
pub type Key = [u8; 36];

/// The result of workloads that store one.
pub const RESULT: &[u8] = b"result-0123456789";

/// Keys from this number on are new when they are checked.
pub const NEW: u64 = 1 << 40;

const SEED: u64 = 0x0eed_5eed_0fa1_1e55;

/// A bijection that looks random (the finalizer of SplitMix64): different numbers make different keys.
pub fn mix(number: u64) -> u64 {
    let x = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The key with this number.
pub fn key(number: u64) -> Key {
    let (high, low) = (mix(SEED ^ number), mix(number.wrapping_add(SEED)));
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&high.to_be_bytes());
    bytes[8..].copy_from_slice(&low.to_be_bytes());
    let mut key = [b'-'; 36];
    let mut at = 0;
    for (i, byte) in bytes.into_iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            at += 1;
        }
        key[at] = digit(byte >> 4);
        key[at + 1] = digit(byte & 15);
        at += 2;
    }
    key
}

/// The keys with the numbers from `from` on.
pub fn keys(from: u64, count: usize) -> Vec<Key> {
    (from..from + count as u64).map(key).collect()
}

fn digit(nibble: u8) -> u8 {
    nibble + if nibble < 10 { b'0' } else { b'a' - 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_look_like_uuids_and_differ() {
        let text = String::from_utf8(key(1).to_vec()).unwrap();
        let lengths: Vec<usize> = text.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert!(text.chars().all(|c| c == '-' || c.is_ascii_hexdigit()));
        let distinct: std::collections::HashSet<Key> = keys(0, 100_000).into_iter().collect();
        assert_eq!(distinct.len(), 100_000);
    }
}
