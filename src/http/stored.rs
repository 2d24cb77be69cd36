//! The bytes of an answer in the store.
//!
//! ```text
//! stored answer := "OHR" | version (1) | status (2) | headers | body
//! headers       := number (varint) | (name length (varint) | name | value length (varint) | value)*
//! body          := 0 (1)                               it was too large to keep
//!                | 1 (1) | length (varint) | bytes
//! ```
//!
//! The status is big-endian. The first four bytes tell an answer from what else may be stored in the same store.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::response::Parts;
use http::{Response, StatusCode};

use crate::codec::{Reader, put_prefixed, put_varint};
use crate::error::{Error, Result};

const MAGIC: &[u8; 3] = b"OHR";
const VERSION: u8 = 1;
const NOT_KEPT: u8 = 0;
const KEPT: u8 = 1;

/// Headers that no answer is stored with, whatever list they are on: they are about the one client, the one connection or
/// the one moment. The length follows from the body.
static NEVER: [HeaderName; 12] = [
    header::SET_COOKIE,
    header::DATE,
    header::CONTENT_LENGTH,
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Headers about a body, which mean nothing without it.
static OF_THE_BODY: [HeaderName; 6] = [
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_DISPOSITION,
    header::ETAG,
    header::LAST_MODIFIED,
];

/// An answer as it is stored under a key: what a retry gets.
///
/// For operators: what a key that is held should answer from now on is
/// [`Resolution::Completed`](crate::Resolution::Completed) with [`StoredResponse::encode`]'s bytes, and what a completed
/// key holds is read by [`StoredResponse::decode`].
///
/// ```
/// use onlyonce::http::StoredResponse;
///
/// let answer = ::http::Response::builder()
///     .status(201)
///     .header("content-type", "application/json")
///     .header("set-cookie", "session=1")
///     .body(r#"{"id":"ch_1"}"#)?;
/// let read = StoredResponse::decode(&StoredResponse::new(answer).encode())?;
/// assert_eq!((read.status().as_u16(), read.body()), (201, Some(&br#"{"id":"ch_1"}"#[..])));
/// assert!(read.headers().contains_key("content-type") && !read.headers().contains_key("set-cookie"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredResponse {
    status: StatusCode,
    headers: HeaderMap,
    body: Option<Bytes>,
}

impl StoredResponse {
    /// An answer with its headers, but for those that are never stored: Set-Cookie, Date, Content-Length and those of one
    /// connection.
    #[must_use]
    pub fn new(response: Response<impl Into<Bytes>>) -> Self {
        let (parts, body) = response.into_parts();
        Self::of(&parts, body.into(), |_| true)
    }

    /// As [`StoredResponse::new`], with the headers that are wanted.
    pub(super) fn of(parts: &Parts, body: Bytes, wanted: impl Fn(&HeaderName) -> bool) -> Self {
        Self { status: parts.status, headers: kept(&parts.headers, wanted), body: Some(body) }
    }

    /// The same with another body.
    pub(super) fn with_body(self, body: Bytes) -> Self {
        Self { body: Some(body), ..self }
    }

    /// The same without its body, and without the headers that are about a body.
    pub(super) fn without_body(mut self) -> Self {
        self.body = None;
        for name in &OF_THE_BODY {
            self.headers.remove(name);
        }
        self
    }

    /// The status alone.
    pub(super) fn status_alone(self) -> Self {
        Self { status: self.status, headers: HeaderMap::new(), body: None }
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers that are kept.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The body, unless it was too large to keep.
    #[must_use]
    pub fn body(&self) -> Option<&[u8]> {
        self.body.as_deref()
    }

    pub(super) fn into_parts(self) -> (StatusCode, HeaderMap, Option<Bytes>) {
        (self.status, self.headers, self.body)
    }

    /// The bytes that are stored, as `docs/format.md` draws them.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.body.as_ref().map_or(0, Bytes::len).saturating_add(256));
        out.extend_from_slice(MAGIC);
        out.push(VERSION);
        out.extend_from_slice(&self.status.as_u16().to_be_bytes());
        put_varint(&mut out, self.headers.len() as u64);
        for (name, value) in &self.headers {
            put_prefixed(&mut out, name.as_str().as_bytes());
            put_prefixed(&mut out, value.as_bytes());
        }
        match &self.body {
            None => out.push(NOT_KEPT),
            Some(body) => {
                out.push(KEPT);
                put_prefixed(&mut out, body);
            }
        }
        out
    }

    /// The answer in stored bytes. Costs a copy of the body.
    ///
    /// # Errors
    ///
    /// [`Error::Decode`] for bytes that are none, or of a newer version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let refused = |detail: &str| Error::Decode { detail: format!("a stored HTTP answer: {detail}") };
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len()) != Some(MAGIC) {
            return Err(refused("it does not begin with \"OHR\""));
        }
        match reader.byte() {
            Some(VERSION) => {}
            Some(newer) => {
                return Err(refused(&format!(
                    "it has version {newer}, and the newest supported one is {VERSION}: upgrade onlyonce"
                )));
            }
            None => return Err(refused("it is truncated")),
        }
        body_of_version_1(reader).ok_or_else(|| refused("it is corrupt"))
    }
}

fn body_of_version_1(mut reader: Reader<'_>) -> Option<StoredResponse> {
    let status = StatusCode::from_u16(u16::from_be_bytes(reader.array()?)).ok()?;
    let mut headers = HeaderMap::new();
    for _ in 0..reader.varint()? {
        let name = HeaderName::from_lowercase(reader.prefixed()?).ok()?;
        let value = HeaderValue::from_bytes(reader.prefixed()?).ok()?;
        headers.try_append(name, value).ok()?;
    }
    let body = match reader.byte()? {
        NOT_KEPT => None,
        KEPT => Some(Bytes::copy_from_slice(reader.prefixed()?)),
        _ => return None,
    };
    reader.is_empty().then_some(StoredResponse { status, headers, body })
}

/// The headers that may be stored, and of those the ones that are wanted.
fn kept(headers: &HeaderMap, wanted: impl Fn(&HeaderName) -> bool) -> HeaderMap {
    // A connection's headers may name further ones that are the connection's own.
    let connection: Vec<&[u8]> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .collect();
    let of_connection =
        |name: &HeaderName| connection.iter().any(|named| named.eq_ignore_ascii_case(name.as_str().as_bytes()));
    let mut kept = HeaderMap::new();
    for (name, value) in headers {
        if wanted(name) && !NEVER.contains(name) && !of_connection(name) {
            kept.append(name, value.clone());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn answer() -> StoredResponse {
        let response = Response::builder()
            .status(201)
            .header("location", "/charges/1")
            .header("link", "<a>; rel=next")
            .header("link", "<b>; rel=prev")
            .header("x-bytes", HeaderValue::from_bytes(b"\xe9").unwrap())
            .body("paid")
            .unwrap();
        StoredResponse::new(response)
    }

    #[test]
    fn an_answer_comes_back_with_its_status_headers_and_body() {
        let whole = answer();
        assert_eq!(StoredResponse::decode(&whole.encode()).unwrap(), whole);
        assert_eq!(whole.headers().get_all("link").iter().count(), 2);
        let empty = StoredResponse::new(Response::new(Bytes::new()));
        assert_eq!(StoredResponse::decode(&empty.encode()).unwrap().body(), Some(&b""[..]));
        let head = answer().without_body();
        let read = StoredResponse::decode(&head.encode()).unwrap();
        assert_eq!((read.status().as_u16(), read.body()), (201, None));
        assert_eq!(read.headers()["location"], "/charges/1");
        assert!(answer().status_alone().encode().len() <= 8);
    }

    #[test]
    fn headers_of_one_client_connection_or_moment_are_never_stored() {
        let mut response = Response::new("");
        for name in &NEVER {
            response.headers_mut().insert(name, HeaderValue::from_static("x"));
        }
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close, X-Hop"));
        response.headers_mut().insert("x-hop", HeaderValue::from_static("x"));
        response.headers_mut().insert("x-end", HeaderValue::from_static("x"));
        let kept = StoredResponse::new(response);
        assert_eq!(kept.headers().keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
    }

    #[test]
    fn a_cut_answer_and_a_newer_one_are_refused() {
        let bytes = answer().encode();
        for len in 0..bytes.len() {
            assert!(StoredResponse::decode(&bytes[..len]).is_err(), "cut at {len}");
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(StoredResponse::decode(&longer).is_err());
        let mut newer = bytes;
        newer[3] = 2;
        let error = StoredResponse::decode(&newer).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
    }

    /// What the fuzzer of `fuzz/` begins with: refused, or the same when it is written again.
    #[test]
    fn stored_answers_hold_their_law() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/stored_answer");
        let mut read = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            let Ok(answer) = StoredResponse::decode(&bytes) else { continue };
            assert!(answer.encode().len() <= bytes.len());
            assert_eq!(StoredResponse::decode(&answer.encode()).unwrap(), answer);
            read += 1;
        }
        assert!(read > 2, "{read} answers were read");
    }

    proptest! {
        #[test]
        fn foreign_answers_are_refused_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200), ours: bool,
        ) {
            if ours && bytes.len() > 4 {
                bytes[..4].copy_from_slice(b"OHR\x01");
            }
            let _ = StoredResponse::decode(&bytes);
        }

        #[test]
        fn a_changed_byte_is_refused_or_is_another_answer(at: prop::sample::Index, to: u8) {
            let mut bytes = answer().encode();
            let at = at.index(bytes.len());
            let changed = bytes[at] != to;
            bytes[at] = to;
            if let Ok(read) = StoredResponse::decode(&bytes) {
                prop_assert_eq!(read != answer(), changed);
            }
        }
    }
}
