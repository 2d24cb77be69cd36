//! The encoding of a stored response.
//!
//! ```text
//! stored response := "OHR" | version (1) | status (2) | headers | body
//! headers         := number (varint) | (name length (varint) | name | value length (varint) | value)*
//! body            := 0 (1)                               not stored, because it was too large
//!                  | 1 (1) | length (varint) | bytes
//! ```
//!
//! The status is big-endian. The first four bytes distinguish a response from other results in the same store.

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::response::Parts;
use http::{Response, StatusCode};

use onlyonce_core::ResultError;
use onlyonce_core::wire::{Reader, put_prefixed, put_varint};

const MAGIC: &[u8; 3] = b"OHR";
const VERSION: u8 = 1;
const BODY_OMITTED: u8 = 0;
const BODY_STORED: u8 = 1;

/// Headers that are never stored, because they apply to one client, one connection or one point in time, or follow from the
/// body.
static NEVER_STORED: [HeaderName; 12] = [
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

/// Headers that describe the body.
static BODY_HEADERS: [HeaderName; 6] = [
    header::CONTENT_TYPE,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_DISPOSITION,
    header::ETAG,
    header::LAST_MODIFIED,
];

/// The response that is stored for a key and that a retry gets.
///
/// Operators resolve a held key with [`Resolution::Completed`](onlyonce_core::Resolution::Completed) and the bytes of
/// [`StoredResponse::encode`], and read the result of a completed key with [`StoredResponse::decode`].
///
/// ```
/// use onlyonce_http::StoredResponse;
///
/// let response = ::http::Response::builder()
///     .status(201)
///     .header("content-type", "application/json")
///     .header("set-cookie", "session=1")
///     .body(r#"{"id":"ch_1"}"#)?;
/// let stored = StoredResponse::decode(&StoredResponse::new(response).encode())?;
/// assert_eq!((stored.status().as_u16(), stored.body()), (201, Some(&br#"{"id":"ch_1"}"#[..])));
/// assert!(stored.headers().contains_key("content-type") && !stored.headers().contains_key("set-cookie"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredResponse {
    status: StatusCode,
    headers: HeaderMap,
    body: Option<Bytes>,
}

impl StoredResponse {
    /// Creates a stored response with all headers except those that are never stored: Set-Cookie, Date, Content-Length and
    /// hop-by-hop headers.
    #[must_use]
    pub fn new(response: Response<impl Into<Bytes>>) -> Self {
        let (parts, body) = response.into_parts();
        Self::filtered(&parts, body.into(), |_| true)
    }

    /// As [`StoredResponse::new`], with only the headers that `wanted` accepts.
    pub(crate) fn filtered(parts: &Parts, body: Bytes, wanted: impl Fn(&HeaderName) -> bool) -> Self {
        Self { status: parts.status, headers: storable_headers(&parts.headers, wanted), body: Some(body) }
    }

    pub(crate) fn with_body(self, body: Bytes) -> Self {
        Self { body: Some(body), ..self }
    }

    /// Removes the body and the headers that describe it.
    pub(crate) fn without_body(mut self) -> Self {
        self.body = None;
        for name in &BODY_HEADERS {
            self.headers.remove(name);
        }
        self
    }

    pub(crate) fn status_only(self) -> Self {
        Self { status: self.status, headers: HeaderMap::new(), body: None }
    }

    /// Returns the status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Returns the stored headers.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Returns the body, or `None` if it was too large to be stored.
    #[must_use]
    pub fn body(&self) -> Option<&[u8]> {
        self.body.as_deref()
    }

    pub(crate) fn into_parts(self) -> (StatusCode, HeaderMap, Option<Bytes>) {
        (self.status, self.headers, self.body)
    }

    /// Encodes the response in the format of `docs/format.md`.
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
            None => out.push(BODY_OMITTED),
            Some(body) => {
                out.push(BODY_STORED);
                put_prefixed(&mut out, body);
            }
        }
        out
    }

    /// Decodes stored bytes. Copies the body.
    ///
    /// # Errors
    ///
    /// [`ResultError::Decode`] if the bytes are not a stored response, are corrupt, or have a newer version.
    pub fn decode(bytes: &[u8]) -> Result<Self, ResultError> {
        let rejected = |detail: &str| ResultError::Decode { detail: format!("HTTP response: {detail}") };
        let mut reader = Reader::new(bytes);
        if reader.take(MAGIC.len()) != Some(MAGIC) {
            return Err(rejected("missing magic \"OHR\""));
        }
        match reader.byte() {
            Some(VERSION) => {}
            Some(newer) => {
                return Err(rejected(&format!(
                    "version {newer} is newer than the supported version {VERSION}; upgrade onlyonce"
                )));
            }
            None => return Err(rejected("truncated")),
        }
        decode_version_1(reader).ok_or_else(|| rejected("corrupt"))
    }
}

fn decode_version_1(mut reader: Reader<'_>) -> Option<StoredResponse> {
    let status = StatusCode::from_u16(u16::from_be_bytes(reader.array()?)).ok()?;
    let mut headers = HeaderMap::new();
    for _ in 0..reader.varint()? {
        let name = HeaderName::from_lowercase(reader.prefixed()?).ok()?;
        let value = HeaderValue::from_bytes(reader.prefixed()?).ok()?;
        headers.try_append(name, value).ok()?;
    }
    let body = match reader.byte()? {
        BODY_OMITTED => None,
        BODY_STORED => Some(Bytes::copy_from_slice(reader.prefixed()?)),
        _ => return None,
    };
    reader.is_empty().then_some(StoredResponse { status, headers, body })
}

/// Returns the wanted headers that may be stored.
fn storable_headers(headers: &HeaderMap, wanted: impl Fn(&HeaderName) -> bool) -> HeaderMap {
    // `Connection` may name further hop-by-hop headers.
    let listed: Vec<&[u8]> = headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .map(<[u8]>::trim_ascii)
        .collect();
    let is_hop_by_hop =
        |name: &HeaderName| listed.iter().any(|listed| listed.eq_ignore_ascii_case(name.as_str().as_bytes()));
    let mut storable = HeaderMap::new();
    for (name, value) in headers {
        if wanted(name) && !NEVER_STORED.contains(name) && !is_hop_by_hop(name) {
            storable.append(name, value.clone());
        }
    }
    storable
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn response() -> StoredResponse {
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
    fn a_stored_response_decodes_to_the_same_status_headers_and_body() {
        let whole = response();
        assert_eq!(StoredResponse::decode(&whole.encode()).unwrap(), whole);
        assert_eq!(whole.headers().get_all("link").iter().count(), 2);
        let empty = StoredResponse::new(Response::new(Bytes::new()));
        assert_eq!(StoredResponse::decode(&empty.encode()).unwrap().body(), Some(&b""[..]));
        let head = response().without_body();
        let decoded = StoredResponse::decode(&head.encode()).unwrap();
        assert_eq!((decoded.status().as_u16(), decoded.body()), (201, None));
        assert_eq!(decoded.headers()["location"], "/charges/1");
        assert!(response().status_only().encode().len() <= 8);
    }

    #[test]
    fn cookies_dates_and_hop_by_hop_headers_are_never_stored() {
        let mut response = Response::new("");
        for name in &NEVER_STORED {
            response.headers_mut().insert(name, HeaderValue::from_static("x"));
        }
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close, X-Hop"));
        response.headers_mut().insert("x-hop", HeaderValue::from_static("x"));
        response.headers_mut().insert("x-end", HeaderValue::from_static("x"));
        let stored = StoredResponse::new(response);
        assert_eq!(stored.headers().keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["x-end"]);
    }

    #[test]
    fn truncated_and_newer_stored_responses_are_rejected() {
        let bytes = response().encode();
        for len in 0..bytes.len() {
            assert!(StoredResponse::decode(&bytes[..len]).is_err(), "truncated at {len}");
        }
        let longer = [&bytes[..], b"x"].concat();
        assert!(StoredResponse::decode(&longer).is_err());
        let mut newer = bytes;
        newer[3] = 2;
        let error = StoredResponse::decode(&newer).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_rejected_without_a_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..200), with_magic: bool,
        ) {
            if with_magic && bytes.len() > 4 {
                bytes[..4].copy_from_slice(b"OHR\x01");
            }
            let _ = StoredResponse::decode(&bytes);
        }

        #[test]
        fn a_changed_byte_is_rejected_or_decodes_to_another_response(at: prop::sample::Index, to: u8) {
            let mut bytes = response().encode();
            let at = at.index(bytes.len());
            let changed = bytes[at] != to;
            bytes[at] = to;
            if let Ok(decoded) = StoredResponse::decode(&bytes) {
                prop_assert_eq!(decoded != response(), changed);
            }
        }
    }
}
