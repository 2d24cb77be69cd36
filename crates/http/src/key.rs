//! Parses and validates the key of a request.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName};
use sfv::{Parser, StringRef};

use crate::context::Options;
use crate::problem::Problem;

/// Returns the key in a header, without quotes and escapes.
pub(crate) fn key_in_header(headers: &HeaderMap, name: &HeaderName) -> Result<Option<String>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Problem::KeyMalformed("The request has more than one key."));
    }
    let value = value.as_bytes().trim_ascii();
    let key = if value.starts_with(b"\"") { quoted(value)? } else { bare(value)? };
    Ok(Some(key))
}

/// Checks length and format.
pub(crate) fn validated(key: String, options: &Options) -> Result<String, Problem> {
    match key.len() {
        0 => Err(Problem::KeyMalformed("The key is empty.")),
        len if len > options.key_limit => Err(Problem::KeyTooLong { limit: options.key_limit }),
        _ if !(options.validate_key)(&key) => {
            Err(Problem::KeyMalformed("The key does not have the format that this service requires."))
        }
        _ => Ok(key),
    }
}

/// Parses a structured-field string (RFC 9651), as the draft requires. Parameters are ignored.
fn quoted(value: &[u8]) -> Result<String, Problem> {
    match Parser::new(value).parse_item::<Cow<'_, StringRef>>() {
        Ok(text) => Ok(text.as_str().to_owned()),
        Err(_) => {
            Err(Problem::KeyMalformed("The key begins with a double quote but is not a valid string (RFC 9651)."))
        }
    }
}

/// Parses the unquoted form of Stripe's clients. Commas are rejected: a proxy may have joined two header lines.
fn bare(value: &[u8]) -> Result<String, Problem> {
    let is_allowed = |byte: &u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b',');
    match std::str::from_utf8(value) {
        Ok(text) if value.iter().all(is_allowed) => Ok(text.to_owned()),
        _ => Err(Problem::KeyMalformed("The key contains a character that is not allowed.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    static NAME: HeaderName = HeaderName::from_static("idempotency-key");

    fn key(value: &[u8]) -> Result<Option<String>, Problem> {
        let mut headers = HeaderMap::new();
        headers.insert(&NAME, HeaderValue::from_bytes(value).unwrap());
        let options = Options { key_limit: 8, ..Options::default() };
        key_in_header(&headers, &NAME)?.map(|key| validated(key, &options)).transpose()
    }

    #[test]
    fn a_quoted_key_equals_the_bare_key() {
        for equal in [&b"k-1"[..], b"\"k-1\"", b"  \"k-1\" ", b"\"k-1\";draft=7", b"\tk-1 "] {
            assert_eq!(key(equal), Ok(Some("k-1".to_owned())), "{}", equal.escape_ascii());
        }
        assert_eq!(key(br#""a\"b\\c""#), Ok(Some(r#"a"b\c"#.to_owned())));
        assert_eq!(key(b"\"a, b\""), Ok(Some("a, b".to_owned())));
        assert_eq!(key(b"a;b=c"), Ok(Some("a;b=c".to_owned())), "a bare key has no parameters");
        assert_eq!(key_in_header(&HeaderMap::new(), &NAME), Ok(None));
    }

    #[test]
    fn a_malformed_key_is_rejected() {
        for malformed in [
            &b""[..],
            b"  ",
            b"\"\"",
            b"\"a",
            b"\"a\" b",
            b"\"a\", \"b\"",
            b"a, b",
            b"a b",
            b"a\"b",
            br#""a\b""#,
            b"\"a\tb\"",
            b"caf\xc3\xa9",
            b"\"caf\xc3\xa9\"",
            b"\xff",
        ] {
            assert!(matches!(key(malformed), Err(Problem::KeyMalformed(_))), "{}", malformed.escape_ascii());
        }
        assert!(key(b"12345678").is_ok() && key(b"\"12345678\"").is_ok());
        for long in [&b"123456789"[..], b"\"123456789\""] {
            assert_eq!(key(long), Err(Problem::KeyTooLong { limit: 8 }));
        }
        let mut two = HeaderMap::new();
        two.append(&NAME, HeaderValue::from_static("a"));
        two.append(&NAME, HeaderValue::from_static("a"));
        assert!(matches!(key_in_header(&two, &NAME), Err(Problem::KeyMalformed(_))));
    }
}
