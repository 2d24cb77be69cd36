//! A request: the keys of one call, encoded and digested once.

use crate::digest::Digester;
use onlyonce_core::machine::{KeyRequest, OwnWindow};
use onlyonce_core::{Error, Result, TimestampError};
use onlyonce_core::{Fingerprint, Key};

/// The limit of a call's keys, results and messages in bytes: they are one record of the journal, which has a limit of 2 GiB.
const CALL_BYTES: usize = 1 << 30;

/// The size hint of a call with one key.
const ONE: (usize, Option<usize>) = (1, Some(1));

/// The keys of a call, in the caller's order.
#[derive(Debug)]
pub(crate) struct Request {
    bytes: Vec<u8>,
    items: Vec<Item>,
    /// The timestamps of their messages: empty, or one for each key.
    times_ms: Vec<u64>,
}

/// What drives the time of the store that a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeSource {
    /// Clocks: keys have no timestamps.
    Clock,
    /// Messages: every key has a timestamp.
    Stream,
    /// The request is about keys, not about work on them: timestamps are ignored.
    Any,
}

#[derive(Debug)]
struct Item {
    end: usize,
    digest: u64,
    payload: Option<Fingerprint>,
    own_window: OwnWindow,
}

impl Item {
    fn key_ref<'a>(&'a self, index: usize, key: &'a [u8]) -> KeyRef<'a> {
        KeyRef { index, digest: self.digest, key, payload: self.payload.as_ref(), own_window: self.own_window }
    }
}

/// One key of a request.
#[derive(Clone, Copy)]
pub(crate) struct KeyRef<'a> {
    pub(crate) index: usize,
    pub(crate) digest: u64,
    pub(crate) key: &'a [u8],
    pub(crate) payload: Option<&'a Fingerprint>,
    pub(crate) own_window: OwnWindow,
}

impl<'a> KeyRef<'a> {
    /// A key that its request does not have.
    pub(super) const MISSING: KeyRef<'static> = KeyRef::of(0, &[]);

    /// A key outside of a request.
    pub(super) const fn of(digest: u64, key: &'a [u8]) -> Self {
        Self { index: 0, digest, key, payload: None, own_window: OwnWindow::NONE }
    }

    /// What the call says about the key. `at_ms` is the message's timestamp on stream time.
    #[inline]
    pub(super) fn key_request(&self, at_ms: Option<u64>) -> KeyRequest<'a> {
        KeyRequest { payload: self.payload, at_ms, own_window: self.own_window }
    }
}

/// Fails if a call has too many bytes.
pub(super) fn admit_bytes(bytes: usize) -> Result<()> {
    if bytes > CALL_BYTES { Err(Error::BatchTooLarge { bytes, limit: CALL_BYTES }) } else { Ok(()) }
}

impl Request {
    /// Encodes and digests keys. An invalid key fails all of them, and the error has its index; so do an invalid timestamp and too
    /// many bytes, without an index. Nothing after that is taken from the iterator.
    pub(crate) fn new<'k, K: Into<Key<'k>>>(
        keys: impl IntoIterator<Item = K>,
        time: TimeSource,
        key_limit: usize,
        digester: &Digester,
    ) -> Result<Self> {
        let keys = keys.into_iter();
        let is_batch = keys.size_hint() != ONE;
        let mut request = Self::for_about(keys.size_hint().0);
        for key in keys {
            request.push(&key.into(), time, key_limit, digester).map_err(|error| request.indexed(error, is_batch))?;
        }
        Ok(request)
    }

    fn for_about(keys: usize) -> Self {
        let keys = keys.min(1 << 16);
        Self { bytes: Vec::with_capacity(keys * 48), items: Vec::with_capacity(keys), times_ms: Vec::new() }
    }

    /// An error about the next key, with its index if it is one of a batch.
    #[cold]
    fn indexed(&self, error: Error, is_batch: bool) -> Error {
        if is_batch { error.at_index(self.items.len()) } else { error }
    }

    // Inlined: as a call it costs about sixty instructions a key.
    #[inline(always)]
    fn push(&mut self, key: &Key<'_>, time: TimeSource, key_limit: usize, digester: &Digester) -> Result<()> {
        match (time, key.timestamp()) {
            (TimeSource::Clock, None) | (TimeSource::Any, _) => {}
            (TimeSource::Stream, Some(timestamp)) => self.times_ms.push(timestamp.as_unix_ms()),
            (TimeSource::Stream, None) => return Err(TimestampError::Missing.into()),
            (TimeSource::Clock, Some(_)) => return Err(TimestampError::Unexpected.into()),
        }
        let start = self.bytes.len();
        key.encode(key_limit, &mut self.bytes)?;
        admit_bytes(self.bytes.len())?;
        let encoded = self.bytes.get(start..).unwrap_or_default();
        let digest = digester.digest(encoded);
        let (payload, own_window) = (key.payload_fingerprint().copied(), OwnWindow::new(key.own_window()));
        self.items.push(Item { end: self.bytes.len(), digest, payload, own_window });
        Ok(())
    }

    /// Concatenates the keys of several calls. Either all calls have timestamps or none has.
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

    /// The digests of the keys.
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

    /// The timestamp of the message at this index, on stream time.
    pub(crate) fn at_ms(&self, index: usize) -> Option<u64> {
        self.times_ms.get(index).copied()
    }

    /// The timestamps of the messages after this index.
    pub(crate) fn timestamps_after(&self, index: usize) -> impl Iterator<Item = u64> {
        self.times_ms.get(index + 1..).unwrap_or_default().iter().copied()
    }

    /// The key at this index.
    pub(crate) fn get(&self, index: usize) -> Option<KeyRef<'_>> {
        let item = self.items.get(index)?;
        let previous = index.checked_sub(1).and_then(|previous| self.items.get(previous));
        let key = self.bytes.get(previous.map_or(0, |previous| previous.end)..item.end).unwrap_or_default();
        Some(item.key_ref(index, key))
    }

    /// The key of a call with one key.
    pub(crate) fn only(&self) -> Option<KeyRef<'_>> {
        if self.items.len() == 1 { self.get(0) } else { None }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = KeyRef<'_>> {
        let mut start = 0;
        self.items.iter().enumerate().map(move |(index, item)| {
            let key = self.bytes.get(start..item.end).unwrap_or_default();
            start = item.end;
            item.key_ref(index, key)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [&str; 3] = ["a", "longer", "a"];

    fn timed<'k>(keys: impl Iterator<Item = (&'k str, u64)>) -> impl Iterator<Item = Key<'k>> {
        keys.map(|(key, ms)| Key::from(key).at(onlyonce_core::Timestamp::from_unix_ms(ms)))
    }

    fn digester() -> Digester {
        Digester::new(&[5; 16])
    }

    fn encoded(key: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        Key::from(key).encode(1_024, &mut bytes).unwrap();
        bytes
    }

    fn assert_has_keys(request: &Request, keys: &[&str]) {
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
    fn a_request_keeps_the_order_of_its_keys_and_timestamps() {
        let request = Request::new(KEYS, TimeSource::Clock, 1_024, &digester()).unwrap();
        assert_has_keys(&request, &KEYS);
        assert_eq!((request.at_ms(0), request.timestamps_after(0).count()), (None, 0));
        let request =
            Request::new(timed(KEYS.into_iter().zip([7, 5, 9])), TimeSource::Stream, 1_024, &digester()).unwrap();
        assert_has_keys(&request, &KEYS);
        assert_eq!([0, 1, 2, 3].map(|index| request.at_ms(index)), [Some(7), Some(5), Some(9), None]);
        assert_eq!(request.timestamps_after(0).collect::<Vec<_>>(), [5, 9]);
        assert_eq!(request.timestamps_after(1).collect::<Vec<_>>(), [9]);
        assert_eq!(request.timestamps_after(2).count(), 0);
    }

    #[cfg(feature = "tokio")]
    #[test]
    fn a_concatenated_request_has_all_keys_and_timestamps() {
        let calls = [&[("a", 7)][..], &[], &[("longer", 5), ("a", 9)]];
        let calls = calls
            .map(|call| Request::new(timed(call.iter().copied()), TimeSource::Stream, 1_024, &digester()).unwrap());
        let all = Request::concat(calls.iter());
        assert_has_keys(&all, &KEYS);
        assert_eq!(all.timestamps_after(0).collect::<Vec<_>>(), [5, 9]);
    }

    #[test]
    fn a_key_has_the_window_of_its_call() {
        let window = std::time::Duration::from_millis(1_500);
        let keys = [Key::from("a").window(window), Key::from("a")];
        let request = Request::new(&keys, TimeSource::Clock, 1_024, &digester()).unwrap();
        let windows: Vec<_> = request.iter().map(|key_ref| key_ref.own_window.ms()).collect();
        assert_eq!(windows, [Some(1_500), None]);
        assert_eq!(request.get(0).unwrap().own_window.ms(), Some(1_500));
        assert_eq!(size_of::<Item>(), 40, "the window fits into the padding");
    }

    #[test]
    fn a_call_may_have_one_gibibyte_and_no_byte_more() {
        admit_bytes(1 << 30).unwrap();
        let refused = admit_bytes((1 << 30) + 1);
        assert!(matches!(refused, Err(Error::BatchTooLarge { bytes: 1_073_741_825, limit: 1_073_741_824 })));
    }
}
