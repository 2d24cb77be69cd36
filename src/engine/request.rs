//! The keys of one call, encoded and digested once for everything that follows.

use crate::error::{Error, Result};
use crate::key::{Digester, Fingerprint, Key};

/// Bytes of keys and results that one call may bring: a row must fit into RocksDB's 32-bit lengths, with room to spare.
const CALL_BYTES: usize = 1 << 30;

/// The size of an iterator over the key of a call that has one.
const ONE: (usize, Option<usize>) = (1, Some(1));

/// The keys of a call, in the caller's order.
#[derive(Debug)]
pub(crate) struct Request {
    bytes: Vec<u8>,
    items: Vec<Item>,
    /// The times of their messages: none, or one for each.
    times_ms: Vec<u64>,
}

#[derive(Debug)]
struct Item {
    end: usize,
    digest: u64,
    payload: Option<Fingerprint>,
}

/// One key of a request.
#[derive(Clone, Copy)]
pub(crate) struct KeyRef<'a> {
    pub(crate) index: usize,
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) payload: Option<&'a Fingerprint>,
}

/// Refuses a call that brings too much.
pub(super) fn admit_bytes(bytes: usize) -> Result<()> {
    if bytes > CALL_BYTES { Err(Error::BatchTooLarge { bytes, limit: CALL_BYTES }) } else { Ok(()) }
}

impl Request {
    /// Refuses all keys if one is empty or too long, which the error names by its place, or if they are too many: where
    /// they come from a stream, no more of it is read.
    pub(crate) fn new<'k, K: Into<Key<'k>>>(
        keys: impl IntoIterator<Item = K>,
        key_limit: usize,
        digester: &Digester,
    ) -> Result<Self> {
        let keys = keys.into_iter();
        let is_batch = keys.size_hint() != ONE;
        let mut request = Self::for_about(keys.size_hint().0);
        for key in keys {
            request.push(&key.into(), key_limit, digester).map_err(|error| request.placed(error, is_batch))?;
        }
        Ok(request)
    }

    /// As [`Request::new`], for keys with the times of their messages.
    pub(crate) fn at<'k, K: Into<Key<'k>>>(
        messages: impl IntoIterator<Item = (K, u64)>,
        key_limit: usize,
        digester: &Digester,
    ) -> Result<Self> {
        let messages = messages.into_iter();
        let is_batch = messages.size_hint() != ONE;
        let mut request = Self::for_about(messages.size_hint().0);
        for (key, at_ms) in messages {
            request.push(&key.into(), key_limit, digester).map_err(|error| request.placed(error, is_batch))?;
            request.times_ms.push(at_ms);
        }
        Ok(request)
    }

    fn for_about(keys: usize) -> Self {
        let keys = keys.min(1 << 16);
        Self { bytes: Vec::with_capacity(keys * 48), items: Vec::with_capacity(keys), times_ms: Vec::new() }
    }

    /// An error about the next key, which says where that is in a batch.
    #[cold]
    fn placed(&self, error: Error, is_batch: bool) -> Error {
        if is_batch { error.at(self.items.len()) } else { error }
    }

    // A part of two loops over keys: as a call of its own it costs every key some sixty instructions.
    #[inline(always)]
    fn push(&mut self, key: &Key<'_>, key_limit: usize, digester: &Digester) -> Result<()> {
        let start = self.bytes.len();
        key.encode(key_limit, &mut self.bytes)?;
        admit_bytes(self.bytes.len())?;
        let encoded = self.bytes.get(start..).unwrap_or_default();
        let digest = digester.digest(encoded);
        self.items.push(Item { end: self.bytes.len(), digest, payload: key.guard() });
        Ok(())
    }

    /// The keys of several calls, one call after the other. All of them with times, or none.
    #[cfg(feature = "tokio")]
    pub(crate) fn concat<'r>(requests: impl Iterator<Item = &'r Self>) -> Self {
        let mut all = Self { bytes: Vec::new(), items: Vec::new(), times_ms: Vec::new() };
        for Self { bytes, items, times_ms } in requests {
            all.times_ms.extend(times_ms);
            let start = all.bytes.len();
            all.bytes.extend_from_slice(bytes);
            all.items.extend(items.iter().map(|item| Item { end: start + item.end, ..*item }));
        }
        all
    }

    /// The digests of its keys.
    pub(crate) fn digests(&self) -> impl Iterator<Item = u64> {
        self.items.iter().map(|item| item.digest)
    }

    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Bytes of all encoded keys.
    pub(crate) fn key_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// When the message in this place is of, on stream time.
    pub(crate) fn at_ms(&self, index: usize) -> Option<u64> {
        self.times_ms.get(index).copied()
    }

    /// The times of the messages behind this place.
    pub(crate) fn timestamps_after(&self, index: usize) -> impl Iterator<Item = u64> {
        self.times_ms.get(index + 1..).unwrap_or_default().iter().copied()
    }

    /// The key in this place.
    pub(crate) fn get(&self, index: usize) -> Option<KeyRef<'_>> {
        let item = self.items.get(index)?;
        let before = index.checked_sub(1).and_then(|before| self.items.get(before));
        let key = self.bytes.get(before.map_or(0, |before| before.end)..item.end).unwrap_or_default();
        Some(KeyRef { index, digest: item.digest, key, payload: item.payload.as_ref() })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = KeyRef<'_>> {
        let mut start = 0;
        self.items.iter().enumerate().map(move |(index, item)| {
            let key = self.bytes.get(start..item.end).unwrap_or_default();
            start = item.end;
            KeyRef { index, digest: item.digest, key, payload: item.payload.as_ref() }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 3] = ["a", "longer", "a"];

    fn digester() -> Digester {
        Digester::new(&[5; 16])
    }

    fn encoded(key: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        Key::from(key).encode(1_024, &mut bytes).unwrap();
        bytes
    }

    fn assert_is_of(request: &Request, keys: &[&str]) {
        assert_eq!(request.len(), keys.len());
        assert_eq!(request.key_bytes(), keys.iter().map(|key| encoded(key).len()).sum::<usize>());
        let digests: Vec<u64> = keys.iter().map(|key| digester().digest(&encoded(key))).collect();
        assert_eq!(request.digests().collect::<Vec<_>>(), digests);
        assert_eq!(request.iter().count(), keys.len());
        for (index, key_ref) in request.iter().enumerate() {
            for key_ref in [key_ref, request.get(index).unwrap()] {
                assert_eq!((key_ref.index, key_ref.digest), (index, digests[index]));
                assert_eq!((key_ref.key, key_ref.payload), (encoded(keys[index]).as_slice(), None));
            }
        }
        assert!(request.get(keys.len()).is_none());
    }

    #[test]
    fn a_call_has_its_keys_in_their_order_and_their_times() {
        let request = Request::new(KEYS, 1_024, &digester()).unwrap();
        assert_is_of(&request, &KEYS);
        assert_eq!((request.at_ms(0), request.timestamps_after(0).count()), (None, 0));
        let request = Request::at(KEYS.into_iter().zip([7, 5, 9]), 1_024, &digester()).unwrap();
        assert_is_of(&request, &KEYS);
        assert_eq!([0, 1, 2, 3].map(|index| request.at_ms(index)), [Some(7), Some(5), Some(9), None]);
        assert_eq!(request.timestamps_after(0).collect::<Vec<_>>(), [5, 9]);
        assert_eq!(request.timestamps_after(1).collect::<Vec<_>>(), [9]);
        assert_eq!(request.timestamps_after(2).count(), 0);
    }

    #[cfg(feature = "tokio")]
    #[test]
    fn several_calls_in_one_have_all_their_keys_and_times() {
        let calls = [&[("a", 7)][..], &[], &[("longer", 5), ("a", 9)]];
        let calls = calls.map(|call| Request::at(call.iter().copied(), 1_024, &digester()).unwrap());
        let all = Request::concat(calls.iter());
        assert_is_of(&all, &KEYS);
        assert_eq!(all.timestamps_after(0).collect::<Vec<_>>(), [5, 9]);
    }

    #[test]
    fn a_call_may_bring_a_gigabyte_and_no_byte_more() {
        admit_bytes(1 << 30).unwrap();
        let refused = admit_bytes((1 << 30) + 1);
        assert!(matches!(refused, Err(Error::BatchTooLarge { bytes: 1_073_741_825, limit: 1_073_741_824 })));
    }
}
