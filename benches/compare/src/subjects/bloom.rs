//! A bare Bloom filter with blocks of 512 bits, one cache line per key: the physical limit of a check.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;

use crate::keys::Key;
use crate::subject::{Setup, Subject};

const BITS_OF_A_KEY: u32 = 8;

/// The number of keys whose cache lines are prefetched together.
const GROUP: usize = 32;

#[repr(align(64))]
#[derive(Default)]
struct Block([AtomicU64; 8]);

pub struct Bloom {
    blocks: Vec<Block>,
}

impl Bloom {
    pub fn new(setup: &Setup) -> Self {
        let blocks = usize::try_from(setup.filter_bytes / 64).unwrap_or(usize::MAX).max(1);
        Self { blocks: std::iter::repeat_with(Block::default).take(blocks).collect() }
    }

    fn block(&self, digest: u64) -> &Block {
        // The high half of the product spreads digests over any number of blocks.
        &self.blocks[((u128::from(digest) * self.blocks.len() as u128) >> 64) as usize]
    }
}

impl Block {
    fn set(&self, digest: u64) {
        for bit in bits(digest) {
            self.0[bit / 64].fetch_or(1 << (bit % 64), Ordering::Relaxed);
        }
    }

    fn has(&self, digest: u64) -> bool {
        bits(digest).all(|bit| self.0[bit / 64].load(Ordering::Relaxed) >> (bit % 64) & 1 == 1)
    }
}

/// Eight bit positions of nine bits each.
fn bits(digest: u64) -> impl Iterator<Item = usize> {
    let spread = u128::from(digest.wrapping_mul(0x9e37_79b9_7f4a_7c15)) * 0xd6e8_feb8_6659_fd93;
    (0..BITS_OF_A_KEY).map(move |i| (spread >> (i * 13)) as usize % 512)
}

/// Multiplies and folds eight bytes at a time: the cheapest sufficient hash.
fn digest(key: &Key) -> u64 {
    let mut state = 0x243f_6a88_85a3_08d3_u64;
    for word in key.chunks(8) {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        let product = u128::from(state ^ u64::from_le_bytes(bytes)) * 0x9fb2_1c65_1e98_df25;
        state = (product as u64) ^ ((product >> 64) as u64);
    }
    state
}

impl Subject for Bloom {
    /// All keys count as new: a filter cannot tell.
    fn insert(&self, keys: &[Key], _result: &[u8]) -> Result<usize> {
        for group in keys.chunks(GROUP) {
            let mut digests = [0; GROUP];
            for (digest_of, key) in digests.iter_mut().zip(group) {
                *digest_of = digest(key);
            }
            for &digest in &digests[..group.len()] {
                self.block(digest).set(digest);
            }
        }
        Ok(keys.len())
    }

    fn check(&self, keys: &[Key]) -> Result<usize> {
        let mut known = 0;
        for group in keys.chunks(GROUP) {
            let mut looks = [(0, None); GROUP];
            for (look, key) in looks.iter_mut().zip(group) {
                let digest = digest(key);
                let block = self.block(digest);
                // Requests the cache line only. It is used after all lines of the group are requested.
                std::hint::black_box(block.0[0].load(Ordering::Relaxed));
                *look = (digest, Some(block));
            }
            known += looks.iter().filter(|(digest, block)| block.is_some_and(|block| block.has(*digest))).count();
        }
        Ok(known)
    }

    fn finish_background_work(&self) -> Result<()> {
        Ok(())
    }

    fn memory_bytes(&self) -> Option<u64> {
        Some(self.blocks.len() as u64 * 64)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::keys::{NEW, keys};
    use crate::subject::Durability;

    #[test]
    fn it_knows_its_keys_and_few_others() {
        let setup = Setup {
            dir: Path::new(""),
            durability: Durability::Process,
            keys: 100_000,
            buckets: 1,
            filter_bytes: 100_000 * 20 / 8,
        };
        let bloom = Bloom::new(&setup);
        bloom.insert(&keys(0, 100_000), &[]).unwrap();
        assert_eq!(bloom.check(&keys(0, 100_000)).unwrap(), 100_000);
        let wrong = bloom.check(&keys(NEW, 100_000)).unwrap();
        assert!(wrong < 200, "{wrong} of 100,000 new keys are reported as known");
    }
}
