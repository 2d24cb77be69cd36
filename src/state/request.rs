//! The keys of one call, encoded and digested once for everything that follows.

use crate::error::{Error, Result};
use crate::key::{Digester, Fingerprint, Key};

/// Bytes of keys and results that one call may bring: a row must fit into RocksDB's 32-bit lengths, with room to spare.
const CALL_BYTES: usize = 1 << 30;

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
pub(crate) struct Asked<'a> {
    pub(crate) place: usize,
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) payload: Option<&'a Fingerprint>,
}

/// Refuses a call that brings too much.
pub(super) fn admit_bytes(bytes: usize) -> Result<()> {
    if bytes > CALL_BYTES { Err(Error::BatchTooLarge { bytes, limit: CALL_BYTES }) } else { Ok(()) }
}

impl Request {
    /// Refuses all keys if one is empty or too long, or if they are too many: where they come from a stream, no more of
    /// it is read.
    pub(crate) fn new<'k, K: Into<Key<'k>>>(
        keys: impl IntoIterator<Item = K>,
        key_limit: usize,
        digester: &Digester,
    ) -> Result<Self> {
        let keys = keys.into_iter();
        let mut request = Self::for_about(keys.size_hint().0);
        for key in keys {
            request.push(&key.into(), key_limit, digester)?;
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
        let mut request = Self::for_about(messages.size_hint().0);
        for (key, at_ms) in messages {
            request.push(&key.into(), key_limit, digester)?;
            request.times_ms.push(at_ms);
        }
        Ok(request)
    }

    fn for_about(keys: usize) -> Self {
        let keys = keys.min(1 << 16);
        Self { bytes: Vec::with_capacity(keys * 48), items: Vec::with_capacity(keys), times_ms: Vec::new() }
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
    pub(crate) fn at_ms(&self, place: usize) -> Option<u64> {
        self.times_ms.get(place).copied()
    }

    /// The times of the messages behind this place.
    pub(crate) fn times_behind(&self, place: usize) -> impl Iterator<Item = u64> {
        self.times_ms.get(place + 1..).unwrap_or_default().iter().copied()
    }

    /// The key in this place.
    pub(crate) fn get(&self, place: usize) -> Option<Asked<'_>> {
        let item = self.items.get(place)?;
        let before = place.checked_sub(1).and_then(|before| self.items.get(before));
        let key = self.bytes.get(before.map_or(0, |before| before.end)..item.end).unwrap_or_default();
        Some(Asked { place, digest: item.digest, key, payload: item.payload.as_ref() })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Asked<'_>> {
        let mut start = 0;
        self.items.iter().enumerate().map(move |(place, item)| {
            let key = self.bytes.get(start..item.end).unwrap_or_default();
            start = item.end;
            Asked { place, digest: item.digest, key, payload: item.payload.as_ref() }
        })
    }
}
