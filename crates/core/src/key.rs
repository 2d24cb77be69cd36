use std::borrow::Cow;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use crate::error::{KeyError, printable};
use crate::timestamp::Timestamp;
use crate::wire::{Reader, put_varint};

const FORM_MASK: u8 = 0b0000_0011;
const SCOPED: u8 = 0b1000_0000;

/// The longest scope, in bytes: one byte holds its length.
pub const MAX_SCOPE: usize = 255;

/// The first 128 bits of the BLAKE3 hash of a payload.
pub type Fingerprint = [u8; 16];

/// The name of a piece of work. Equal keys name the same work.
///
/// Text and bytes convert into plain keys. A key also carries what a call says about its work and does not belong to the
/// name: the payload's [`fingerprint`](Key::fingerprint), the message's timestamp ([`Key::at`]) and a shorter
/// [`window`](Key::window). Comparison ignores these three.
///
/// # Encoding
///
/// ```text
/// encoded key := tag (1) | scope length (1) | scope | body
/// tag         := form (bits 0 to 1) | scoped (bit 7)
/// body        := the key's bytes                      form 0, plain
///              | (part length (LEB128) | part)*       form 1, composite
///              | BLAKE3 of the payload (32)           form 2, content
/// ```
///
/// The scope and its length are present only if the tag is scoped. The tag separates the forms and the lengths separate
/// the parts, so that different keys have different bytes.
///
/// ```
/// use onlyonce_core::{Key, Timestamp};
///
/// let plain = Key::from("order-4711");
/// let of_tenant = Key::from("order-4711").scope("tenant-7");
/// let of_parts = Key::composite(["2013-01-01", "UA", "1545"]);
/// let of_payload = Key::content(b"the whole message");
/// let guarded = Key::from("order-4711").fingerprint(b"{\"amount\": 12}").at(Timestamp::from_unix_s(1_700_000_000));
///
/// assert_ne!(plain, of_tenant);
/// assert_ne!(Key::composite(["ab", "c"]), Key::composite(["a", "bc"]));
/// assert_ne!(of_parts, of_payload);
/// assert_eq!(guarded, plain);
/// ```
#[derive(Clone)]
pub struct Key<'a> {
    form: Form,
    scope: Cow<'a, [u8]>,
    body: Cow<'a, [u8]>,
    fingerprint: Option<Fingerprint>,
    timestamp: Option<Timestamp>,
    window: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    Plain = 0,
    Composite = 1,
    Content = 2,
}

impl<'a> Key<'a> {
    #[inline]
    fn new(form: Form, body: impl Into<Cow<'a, [u8]>>) -> Self {
        let scope = Cow::Borrowed(&[][..]);
        Self { form, scope, body: body.into(), fingerprint: None, timestamp: None, window: None }
    }

    /// A key of several parts. The parts cannot run together: `("ab", "c")` is not `("a", "bc")`.
    #[must_use]
    pub fn composite<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> Key<'static> {
        let mut body = Vec::new();
        for part in parts {
            let part = part.as_ref();
            put_varint(&mut body, part.len() as u64);
            body.extend_from_slice(part);
        }
        Key::new(Form::Composite, body)
    }

    /// A key that is the BLAKE3 hash of a payload: equal payloads are the same work. Costs a hash of the payload.
    #[must_use]
    pub fn content(payload: impl AsRef<[u8]>) -> Key<'static> {
        Self::content_hash(*blake3::hash(payload.as_ref()).as_bytes())
    }

    /// As [`Key::content`], from the payload's BLAKE3 hash.
    #[must_use]
    pub fn content_hash(hash: [u8; 32]) -> Key<'static> {
        Key::new(Form::Content, hash.to_vec())
    }

    /// Puts the key into a scope, such as a tenant or a route: the same key in two scopes is two keys. At most
    /// [`MAX_SCOPE`] bytes. An empty scope is no scope.
    #[must_use]
    pub fn scope<S: AsRef<[u8]> + ?Sized>(mut self, scope: &'a S) -> Self {
        self.scope = Cow::Borrowed(scope.as_ref());
        self
    }

    /// Binds the key to its payload: a later call with this key and a different payload fails with
    /// [`Error::PayloadMismatch`](crate::Error::PayloadMismatch). A call without a fingerprint is not checked.
    #[must_use]
    pub fn fingerprint(mut self, payload: impl AsRef<[u8]>) -> Self {
        let mut fingerprint = Fingerprint::default();
        blake3::Hasher::new().update(payload.as_ref()).finalize_xof().fill(&mut fingerprint);
        self.fingerprint = Some(fingerprint);
        self
    }

    /// As [`Key::fingerprint`], from the fingerprint itself.
    #[must_use]
    pub fn with_fingerprint(mut self, fingerprint: Option<Fingerprint>) -> Self {
        self.fingerprint = fingerprint;
        self
    }

    /// Gives the key the timestamp of its message. Required on a store that runs on stream time, an error on any other.
    /// Every delivery of a message must have the same timestamp.
    #[must_use]
    pub fn at(mut self, timestamp: impl Into<Timestamp>) -> Self {
        self.timestamp = Some(timestamp.into());
        self
    }

    /// Replaces the timestamp, or removes it: an adapter removes it for a store that runs on its clock.
    #[must_use]
    pub fn with_timestamp(mut self, timestamp: Option<Timestamp>) -> Self {
        self.timestamp = timestamp;
        self
    }

    /// Remembers this key for less than the store's window once it is completed, to the millisecond. A longer window than
    /// the store's has no effect; one shorter than a millisecond is an error. The call that claims or records the key sets it.
    ///
    /// Give every delivery of a message the same window. On stream time, a delivery that comes after its key's window is too
    /// old only by the window that it has itself: without one, or with a longer one, its work runs again.
    #[must_use]
    pub fn window(mut self, window: Duration) -> Self {
        self.window = Some(window);
        self
    }

    /// The same key, owning its bytes.
    #[must_use]
    pub fn into_owned(self) -> Key<'static> {
        Key { scope: Cow::Owned(self.scope.into_owned()), body: Cow::Owned(self.body.into_owned()), ..self }
    }

    /// The same key, borrowing its bytes.
    #[must_use]
    #[inline]
    pub fn borrowed(&self) -> Key<'_> {
        Key { scope: Cow::Borrowed(&self.scope), body: Cow::Borrowed(&self.body), ..*self }
    }

    /// The bytes of the key without its scope: as given for a plain key, the hash for a content key, the parts with
    /// their lengths for a composite key.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.body
    }

    /// The scope. Empty if the key has none.
    #[must_use]
    pub fn scope_bytes(&self) -> &[u8] {
        &self.scope
    }

    /// The fingerprint of [`Key::fingerprint`].
    #[must_use]
    #[inline]
    pub fn payload_fingerprint(&self) -> Option<&Fingerprint> {
        self.fingerprint.as_ref()
    }

    /// The timestamp of [`Key::at`].
    #[must_use]
    #[inline]
    pub fn timestamp(&self) -> Option<Timestamp> {
        self.timestamp
    }

    /// The window of [`Key::window`].
    #[must_use]
    #[inline]
    pub fn own_window(&self) -> Option<Duration> {
        self.window
    }

    /// Appends the encoded key to `out`. `limit` bounds key and scope together, in bytes.
    ///
    /// # Errors
    ///
    /// [`KeyError`] if the key is empty, longer than `limit`, its window is shorter than a millisecond, or its scope is longer than [`MAX_SCOPE`]. `out` is
    /// unchanged then.
    #[inline]
    pub fn encode(&self, limit: usize, out: &mut Vec<u8>) -> Result<(), KeyError> {
        if self.body.is_empty() {
            return Err(KeyError::Empty { index: None });
        }
        if self.window.is_some_and(|window| window < Duration::from_millis(1)) {
            return Err(KeyError::WindowTooShort { index: None });
        }
        let len = self.scope.len().saturating_add(self.body.len());
        if len > limit {
            return Err(KeyError::TooLong { key: printable(&self.body), len, limit, index: None });
        }
        let tag = self.form as u8;
        if self.scope.is_empty() {
            out.push(tag);
        } else {
            let Ok(scope_len) = u8::try_from(self.scope.len()) else {
                return Err(KeyError::ScopeTooLong {
                    scope: printable(&self.scope),
                    len: self.scope.len(),
                    index: None,
                });
            };
            out.push(tag | SCOPED);
            out.push(scope_len);
            out.extend_from_slice(&self.scope);
        }
        out.extend_from_slice(&self.body);
        Ok(())
    }

    /// The key that these bytes encode. `None` if they are no key.
    #[must_use]
    pub fn decode(encoded: &[u8]) -> Option<Key<'static>> {
        let mut reader = Reader::new(encoded);
        let tag = reader.byte()?;
        let form = match tag & FORM_MASK {
            0 => Form::Plain,
            1 => Form::Composite,
            2 => Form::Content,
            _ => return None,
        };
        if tag & !(FORM_MASK | SCOPED) != 0 {
            return None;
        }
        let scope = if tag & SCOPED == 0 {
            &[]
        } else {
            let len = reader.byte()?;
            reader.take(usize::from(len)).filter(|scope| !scope.is_empty())?
        };
        let body = reader.rest();
        let key = (!body.is_empty()).then(|| Key::new(form, body.to_vec()))?;
        Some(Key { scope: Cow::Owned(scope.to_vec()), ..key })
    }

    /// The encoded key as people read it; escaped bytes if it is no key.
    #[must_use]
    pub fn display_encoded(encoded: &[u8]) -> String {
        Key::decode(encoded).map_or_else(|| printable(encoded), |key| key.to_string())
    }

    /// The parts of a composite key.
    fn parts(&self) -> Option<Vec<&[u8]>> {
        let mut reader = Reader::new(&self.body);
        let mut parts = Vec::new();
        while !reader.is_empty() {
            parts.push(reader.prefixed()?);
        }
        Some(parts)
    }
}

/// Keys are equal if they name the same work. Fingerprint, timestamp and window are not compared.
impl PartialEq for Key<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.form == other.form && self.scope == other.scope && self.body == other.body
    }
}

impl Eq for Key<'_> {}

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.form.hash(state);
        self.scope.hash(state);
        self.body.hash(state);
    }
}

impl fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({self})")
    }
}

/// The key for people: escaped, and cut if it is long.
impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.form {
            Form::Plain => f.write_str(&printable(&self.body))?,
            Form::Composite => {
                let parts: Vec<String> = self.parts().unwrap_or_default().into_iter().map(printable).collect();
                write!(f, "({})", parts.join(", "))?;
            }
            Form::Content => {
                f.write_str("content:")?;
                for byte in self.body.iter() {
                    write!(f, "{byte:02x}")?;
                }
            }
        }
        if self.scope.is_empty() { Ok(()) } else { write!(f, " in {}", printable(&self.scope)) }
    }
}

impl<'a> From<&'a [u8]> for Key<'a> {
    #[inline]
    fn from(bytes: &'a [u8]) -> Self {
        Key::new(Form::Plain, bytes)
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Key<'a> {
    #[inline]
    fn from(bytes: &'a [u8; N]) -> Self {
        Key::from(bytes.as_slice())
    }
}

impl<'a> From<&'a Vec<u8>> for Key<'a> {
    #[inline]
    fn from(bytes: &'a Vec<u8>) -> Self {
        Key::from(bytes.as_slice())
    }
}

impl<'a> From<&'a str> for Key<'a> {
    #[inline]
    fn from(text: &'a str) -> Self {
        Key::from(text.as_bytes())
    }
}

impl<'a> From<&'a String> for Key<'a> {
    #[inline]
    fn from(text: &'a String) -> Self {
        Key::from(text.as_bytes())
    }
}

impl From<Vec<u8>> for Key<'static> {
    #[inline]
    fn from(bytes: Vec<u8>) -> Self {
        Key::new(Form::Plain, bytes)
    }
}

impl From<String> for Key<'static> {
    #[inline]
    fn from(text: String) -> Self {
        Key::from(text.into_bytes())
    }
}

impl<'a> From<&'a Key<'_>> for Key<'a> {
    #[inline]
    fn from(key: &'a Key<'_>) -> Self {
        key.borrowed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(key: &Key<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        key.encode(1_024, &mut out).unwrap();
        out
    }

    #[test]
    fn different_keys_have_different_bytes() {
        let keys = [
            Key::from("abc"),
            Key::from("bc").scope("a"),
            Key::from("c").scope("ab"),
            Key::from("\u{1}abc"),
            Key::composite(["ab", "c"]),
            Key::composite(["a", "bc"]),
            Key::composite(["abc"]),
            Key::composite(["abc", ""]),
            Key::composite(["", "abc"]),
            Key::content("abc"),
            Key::content("abc").scope("a"),
            Key::from(b"\x02ab\x01c"),
            Key::from(b"\x00a\xff\xfe"),
        ];
        for (i, a) in keys.iter().enumerate() {
            for (j, b) in keys.iter().enumerate() {
                assert_eq!(encoded(a) == encoded(b), i == j, "{a} and {b}");
                assert_eq!(a == b, i == j, "{a} and {b}");
            }
        }
    }

    #[test]
    fn a_key_is_decoded_from_its_bytes() {
        for key in [Key::from("k"), Key::from("k").scope("s"), Key::composite(["a", ""]), Key::content("x").scope("s")]
        {
            assert_eq!(Key::decode(&encoded(&key)).unwrap(), key);
        }
        for torn in [&b""[..], b"\x00", b"\x03a", b"\x80", b"\x80\x05ab", b"\x80\x00a", b"\x40a"] {
            assert!(Key::decode(torn).is_none(), "{torn:?}");
        }
    }

    #[test]
    fn keys_outside_the_limits_are_rejected_by_name() {
        let mut out = Vec::new();
        assert!(matches!(Key::from("").encode(8, &mut out), Err(KeyError::Empty { .. })));
        assert!(matches!(Key::composite::<&str>([]).encode(8, &mut out), Err(KeyError::Empty { .. })));
        assert!(Key::from("12345678").encode(8, &mut out).is_ok());
        let error = Key::from("123456789").encode(8, &mut out).unwrap_err();
        assert!(error.to_string().contains("123456789") && error.to_string().contains("limit of 8"), "{error}");
        let scope = "s".repeat(256);
        assert!(matches!(Key::from("k").scope(&scope).encode(1_024, &mut out), Err(KeyError::ScopeTooLong { .. })));
        let zero = Key::from("k").window(Duration::ZERO);
        assert!(matches!(zero.encode(1_024, &mut out), Err(KeyError::WindowTooShort { .. })));
        assert_eq!(out.len(), 9, "a rejected key leaves nothing");
    }

    #[test]
    fn a_content_key_equals_the_key_of_its_hash() {
        let key = Key::content("payload");
        let hash = key.as_bytes().try_into().unwrap();
        assert_eq!(Key::content_hash(hash), key);
        assert_eq!(encoded(&Key::content_hash(hash)), encoded(&key));
    }

    #[test]
    fn an_encoded_key_is_displayed_as_people_wrote_it_and_other_bytes_escaped() {
        let key = Key::from("order 17").scope("shop");
        assert_eq!(Key::display_encoded(&encoded(&key)), key.to_string());
        assert_eq!(Key::display_encoded(&[0xff; 3]), printable(&[0xff; 3]));
    }
}
