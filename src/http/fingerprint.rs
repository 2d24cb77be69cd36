//! What makes two requests the same.

use bytes::Bytes;
use http::request::Parts;

/// The BLAKE3 hash of method, path, query and body. Their lengths keep them apart.
pub(super) fn fingerprint(parts: &Parts, body: &Bytes) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let query = parts.uri.query();
    for part in [parts.method.as_str(), parts.uri.path(), query.unwrap_or_default()] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    // "/charges?" is not "/charges".
    hasher.update(&[u8::from(query.is_some())]).update(body);
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn requests_that_differ_in_method_path_query_or_body_are_not_the_same() {
        let of = |method: &str, uri: &str, body: &'static str| {
            let (parts, ()) = http::Request::builder().method(method).uri(uri).body(()).unwrap().into_parts();
            fingerprint(&parts, &Bytes::from(body))
        };
        let requests = [
            ("POST", "/a", ""),
            ("PATCH", "/a", ""),
            ("POST", "/b", ""),
            ("POST", "/a?", ""),
            ("POST", "/a?b", ""),
            ("POST", "/a?b=1", ""),
            ("POST", "/a", "b"),
            ("POST", "/ab", ""),
        ];
        let different: BTreeSet<_> = requests.iter().map(|(method, uri, body)| of(method, uri, body)).collect();
        assert_eq!(different.len(), requests.len());
        assert_eq!(of("POST", "/a?b=1", "c"), of("POST", "http://host/a?b=1", "c"), "the host is the scope's business");
    }
}
