//! The digest of a key: 64 bits that determine its shard, its filter bits and its position in an SST.

use siphasher::sip::SipHasher13;

/// Digests encoded keys with SipHash-1-3 under the store's secret, so that an attacker cannot choose colliding keys.
/// A collision costs time only: every lookup compares the key itself.
#[derive(Clone, Copy)]
pub(crate) struct Digester(SipHasher13);

impl Digester {
    pub(crate) fn new(secret: &[u8; 16]) -> Self {
        Self(SipHasher13::new_with_key(secret))
    }

    pub(crate) fn digest(&self, encoded: &[u8]) -> u64 {
        self.0.hash(encoded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_depends_on_the_secret_alone() {
        let digester = Digester::new(&[7; 16]);
        assert_eq!(digester.digest(b"order-4711"), Digester::new(&[7; 16]).digest(b"order-4711"));
        assert_ne!(digester.digest(b"order-4711"), Digester::new(&[8; 16]).digest(b"order-4711"));
    }
}
