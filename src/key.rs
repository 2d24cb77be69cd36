//! Idempotency keys: what the caller names a piece of work by, and the bytes that name becomes.
//!
//! ```text
//! encoded key := tag (1) | scope length (1) | scope | body
//! tag         := form (bits 0 to 1) | scoped (bit 7)
//! body        := the key's bytes                      form 0, plain
//!              | (part length (varint) | part)*       form 1, composite
//!              | BLAKE3 of the payload (32)           form 2, content
//! ```
//!
//! The scope and its length are there only where the tag says so. The tag keeps the forms apart, the lengths keep
//! the parts apart: two different keys never have the same bytes.

use std::borrow::Cow;

use siphasher::sip::SipHasher13;

use crate::codec::{Reader, put_varint};
use crate::error::{Error, Result, printable};

const FORM_MASK: u8 = 0b0000_0011;
const SCOPED: u8 = 0b1000_0000;

/// The first 128 bits of the BLAKE3 hash of a payload.
pub(crate) type Fingerprint = [u8; 16];

/// The name of a piece of work: the same name, the same work.
///
/// Text and bytes turn into keys by themselves; the other forms have a constructor each.
///
/// ```
/// use onlyonce::Key;
///
/// let plain = Key::from("order-4711");
/// let of_tenant = Key::from("order-4711").scope("tenant-7");
/// let of_parts = Key::composite(["2013-01-01", "UA", "1545"]);
/// let of_payload = Key::content(b"the whole message");
/// let guarded = Key::from("order-4711").fingerprint(b"{\"amount\": 12}");
///
/// assert_ne!(plain, of_tenant);
/// assert_ne!(Key::composite(["ab", "c"]), Key::composite(["a", "bc"]));
/// assert_ne!(of_parts, of_payload);
/// assert_eq!(guarded, plain, "a fingerprint guards a key, it is no part of it");
/// ```
#[derive(Clone)]
pub struct Key<'a> {
    form: Form,
    scope: Cow<'a, [u8]>,
    body: Cow<'a, [u8]>,
    fingerprint: Option<Fingerprint>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Form {
    Plain = 0,
    Composite = 1,
    Content = 2,
}

impl<'a> Key<'a> {
    /// A key whose parts cannot run into each other: `("ab", "c")` is not `("a", "bc")`.
    #[must_use]
    pub fn composite<P: AsRef<[u8]>>(parts: impl IntoIterator<Item = P>) -> Key<'static> {
        let mut body = Vec::new();
        for part in parts {
            let part = part.as_ref();
            put_varint(&mut body, part.len() as u64);
            body.extend_from_slice(part);
        }
        Key { form: Form::Composite, scope: Cow::Borrowed(&[]), body: Cow::Owned(body), fingerprint: None }
    }

    /// A key that is the BLAKE3 hash of a payload: the same payload, the same work. Costs a hash of the payload.
    #[must_use]
    pub fn content(payload: impl AsRef<[u8]>) -> Key<'static> {
        let hash = blake3::hash(payload.as_ref());
        Key {
            form: Form::Content,
            scope: Cow::Borrowed(&[]),
            body: Cow::Owned(hash.as_bytes().to_vec()),
            fingerprint: None,
        }
    }

    /// The key of a payload whose BLAKE3 hash is known: [`Key::content`] of the payload, whose [`Key::as_bytes`] are the hash.
    #[must_use]
    pub fn content_hash(hash: [u8; 32]) -> Key<'static> {
        Key { form: Form::Content, scope: Cow::Borrowed(&[]), body: Cow::Owned(hash.to_vec()), fingerprint: None }
    }

    /// Puts the key into a scope, such as a tenant or a route: the same key in two scopes is two keys. At most 255
    /// bytes; an empty scope is no scope.
    #[must_use]
    pub fn scope<S: AsRef<[u8]> + ?Sized>(mut self, scope: &'a S) -> Self {
        self.scope = Cow::Borrowed(scope.as_ref());
        self
    }

    /// Guards the key by its payload: a later call with this key and another payload is refused with
    /// [`Error::PayloadMismatch`]. A call without a fingerprint is not checked.
    #[must_use]
    pub fn fingerprint(mut self, payload: impl AsRef<[u8]>) -> Self {
        let mut fingerprint = Fingerprint::default();
        blake3::Hasher::new().update(payload.as_ref()).finalize_xof().fill(&mut fingerprint);
        self.fingerprint = Some(fingerprint);
        self
    }

    /// The same key, owning its bytes.
    #[must_use]
    pub fn into_owned(self) -> Key<'static> {
        Key {
            form: self.form,
            scope: Cow::Owned(self.scope.into_owned()),
            body: Cow::Owned(self.body.into_owned()),
            fingerprint: self.fingerprint,
        }
    }

    /// The bytes of the key without its scope: as given for a plain key, the hash for a content key, the parts with
    /// their lengths for a composite one.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.body
    }

    pub(crate) fn guard(&self) -> Option<Fingerprint> {
        self.fingerprint
    }

    /// Appends the encoded key, or says why it cannot be one.
    pub(crate) fn encode(&self, limit: usize, out: &mut Vec<u8>) -> Result<()> {
        if self.body.is_empty() {
            return Err(Error::KeyEmpty { place: None });
        }
        let len = self.scope.len().saturating_add(self.body.len());
        if len > limit {
            return Err(Error::KeyTooLong { key: printable(&self.body), len, limit, place: None });
        }
        let tag = self.form as u8;
        if self.scope.is_empty() {
            out.push(tag);
        } else {
            let Ok(scope_len) = u8::try_from(self.scope.len()) else {
                // One byte holds its length.
                return Err(Error::ScopeTooLong { scope: printable(&self.scope), len: self.scope.len(), place: None });
            };
            out.push(tag | SCOPED);
            out.push(scope_len);
            out.extend_from_slice(&self.scope);
        }
        out.extend_from_slice(&self.body);
        Ok(())
    }

    /// The key that these bytes encode.
    pub(crate) fn decode(encoded: &[u8]) -> Option<Key<'static>> {
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
        (!body.is_empty()).then(|| Key {
            form,
            scope: Cow::Owned(scope.to_vec()),
            body: Cow::Owned(body.to_vec()),
            fingerprint: None,
        })
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

/// Two keys are equal if they name the same work; fingerprints are not compared.
impl PartialEq for Key<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.form == other.form && self.scope == other.scope && self.body == other.body
    }
}

impl Eq for Key<'_> {}

impl std::hash::Hash for Key<'_> {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.form.hash(state);
        self.scope.hash(state);
        self.body.hash(state);
    }
}

impl std::fmt::Debug for Key<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Key({self})")
    }
}

/// Shows a key to people: escaped, and cut where it is long.
impl std::fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
    fn from(bytes: &'a [u8]) -> Self {
        Key { form: Form::Plain, scope: Cow::Borrowed(&[]), body: Cow::Borrowed(bytes), fingerprint: None }
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Key<'a> {
    fn from(bytes: &'a [u8; N]) -> Self {
        Key::from(bytes.as_slice())
    }
}

impl<'a> From<&'a Vec<u8>> for Key<'a> {
    fn from(bytes: &'a Vec<u8>) -> Self {
        Key::from(bytes.as_slice())
    }
}

impl<'a> From<&'a str> for Key<'a> {
    fn from(text: &'a str) -> Self {
        Key::from(text.as_bytes())
    }
}

impl<'a> From<&'a String> for Key<'a> {
    fn from(text: &'a String) -> Self {
        Key::from(text.as_bytes())
    }
}

impl From<Vec<u8>> for Key<'static> {
    fn from(bytes: Vec<u8>) -> Self {
        Key { form: Form::Plain, scope: Cow::Borrowed(&[]), body: Cow::Owned(bytes), fingerprint: None }
    }
}

impl From<String> for Key<'static> {
    fn from(text: String) -> Self {
        Key::from(text.into_bytes())
    }
}

impl<'a> From<&'a Key<'_>> for Key<'a> {
    fn from(key: &'a Key<'_>) -> Self {
        Key {
            form: key.form,
            scope: Cow::Borrowed(&key.scope),
            body: Cow::Borrowed(&key.body),
            fingerprint: key.fingerprint,
        }
    }
}

/// Turns encoded keys into the 64 bits that choose the stripe, the filter's bits and the place in a run.
///
/// SipHash-1-3 with a secret of the store's own, so that a stranger cannot choose keys that collide. A collision
/// costs time only: the key's own bytes decide.
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
    fn a_key_comes_back_from_its_bytes() {
        for key in [Key::from("k"), Key::from("k").scope("s"), Key::composite(["a", ""]), Key::content("x").scope("s")]
        {
            assert_eq!(Key::decode(&encoded(&key)).unwrap(), key);
        }
        for torn in [&b""[..], b"\x00", b"\x03a", b"\x80", b"\x80\x05ab", b"\x80\x00a", b"\x40a"] {
            assert!(Key::decode(torn).is_none(), "{torn:?}");
        }
    }

    #[test]
    fn keys_outside_the_limits_are_refused_by_name() {
        let mut out = Vec::new();
        assert!(matches!(Key::from("").encode(8, &mut out), Err(Error::KeyEmpty { .. })));
        assert!(matches!(Key::composite::<&str>([]).encode(8, &mut out), Err(Error::KeyEmpty { .. })));
        assert!(Key::from("12345678").encode(8, &mut out).is_ok());
        let error = Key::from("123456789").encode(8, &mut out).unwrap_err();
        assert!(error.to_string().contains("123456789") && error.to_string().contains("limit of 8"), "{error}");
        let scope = "s".repeat(256);
        assert!(matches!(Key::from("k").scope(&scope).encode(1_024, &mut out), Err(Error::ScopeTooLong { .. })));
    }

    #[test]
    fn a_content_key_comes_back_from_its_hash() {
        let key = Key::content("payload");
        let hash = key.as_bytes().try_into().unwrap();
        assert_eq!(Key::content_hash(hash), key);
        assert_eq!(encoded(&Key::content_hash(hash)), encoded(&key));
    }

    #[test]
    fn a_digest_is_the_same_on_every_machine() {
        let digester = Digester::new(&[7; 16]);
        assert_eq!(digester.digest(b"order-4711"), Digester::new(&[7; 16]).digest(b"order-4711"));
        assert_ne!(digester.digest(b"order-4711"), Digester::new(&[8; 16]).digest(b"order-4711"));
    }
}
