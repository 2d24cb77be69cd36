//! Fingerprints of requests: rules for when two requests under one key are the same.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName};
use http::request::Parts;

use crate::json::{MemberPath, canonical};

/// A rule for computing fingerprints, for [`IdempotencyLayer::fingerprint`](crate::IdempotencyLayer::fingerprint).
///
/// All rules compare method, path and query byte by byte; an empty query equals no query. They differ in the comparison of
/// the body. Headers are compared only if they are named. The host is not compared: add it to the scope if it matters.
///
/// ```
/// use onlyonce_http::{IdempotencyLayer, RequestFingerprint};
///
/// # fn layer(layer: IdempotencyLayer) -> IdempotencyLayer {
/// // Each retry of a JSON-RPC client has a new `id`.
/// let rule = RequestFingerprint::canonical_json_without(["/id"]).with_headers([http::header::ACCEPT_LANGUAGE]);
/// layer.fingerprint(move |request, body| rule.compute(request, body))
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct RequestFingerprint {
    /// `Some` for canonical JSON: the members that are ignored.
    ignored_members: Option<Vec<MemberPath>>,
    headers: Vec<HeaderName>,
}

impl RequestFingerprint {
    /// Compares the body byte by byte. This is the default.
    #[must_use]
    pub fn bytes() -> Self {
        Self { ignored_members: None, headers: Vec::new() }
    }

    /// Compares a JSON body by its canonical form (RFC 8785), which ignores the order of members, white space, escapes and
    /// the notation of numbers (`1.0`, `1`, `1e0`).
    ///
    /// A body is still compared byte by byte if its `Content-Type` is neither `application/json` nor ends in `+json`, if it
    /// is not valid JSON or is nested more than 127 levels deep, or if the canonical form could make two different bodies
    /// equal: a duplicate member, minus zero, or a number that a 64-bit float cannot represent exactly (most integers over
    /// 2⁵³, more than 17 digits).
    ///
    /// Parses the body and sorts its members on the thread that handles the request.
    /// [`IdempotencyLayer::body_limit`](crate::IdempotencyLayer::body_limit) bounds the cost.
    #[must_use]
    pub fn canonical_json() -> Self {
        Self { ignored_members: Some(Vec::new()), headers: Vec::new() }
    }

    /// As [`RequestFingerprint::canonical_json`], ignoring some members: two bodies that differ only in these members, or
    /// in their presence, are equal.
    ///
    /// A text that begins with `/` is a JSON Pointer (RFC 6901), such as `/params/_meta`. Other texts name a member of the
    /// outermost object. A pointer to an array element ignores its value but not its position. A path to a missing member
    /// has no effect.
    #[must_use]
    pub fn canonical_json_without<T: AsRef<str>>(members: impl IntoIterator<Item = T>) -> Self {
        let paths = members.into_iter().map(|member| MemberPath::new(member.as_ref())).collect();
        Self { ignored_members: Some(paths), headers: Vec::new() }
    }

    /// Also compares these headers byte by byte, including the order of their values.
    #[must_use]
    pub fn with_headers(mut self, names: impl IntoIterator<Item = HeaderName>) -> Self {
        self.headers.extend(names);
        self
    }

    /// Computes the fingerprint: a BLAKE3 hash of the compared parts.
    #[must_use]
    pub fn compute(&self, request: &Parts, body: &Bytes) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        // Length prefixes make the encoding unambiguous.
        let mut add = |part: &[u8]| {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        };
        add(request.method.as_str().as_bytes());
        add(request.uri.path().as_bytes());
        add(request.uri.query().unwrap_or_default().as_bytes());
        for name in &self.headers {
            let values = request.headers.get_all(name);
            add(name.as_str().as_bytes());
            add(&(values.iter().count() as u64).to_le_bytes());
            values.iter().for_each(|value| add(value.as_bytes()));
        }
        match self.ignored_members.as_ref().filter(|_| is_json(request)).and_then(|ignored| canonical(body, ignored)) {
            Some(form) => hasher.update(&[1]).update(&form),
            None => hasher.update(&[0]).update(body),
        };
        *hasher.finalize().as_bytes()
    }
}

/// Returns whether the `Content-Type` is JSON.
fn is_json(request: &Parts) -> bool {
    let Some(Ok(value)) = request.headers.get(CONTENT_TYPE).map(|value| value.to_str()) else { return false };
    let content_type = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    content_type == "application/json" || content_type.ends_with("+json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn request(method: &str, uri: &str) -> Parts {
        http::Request::builder().method(method).uri(uri).body(()).unwrap().into_parts().0
    }

    #[test]
    fn requests_that_differ_in_method_path_query_or_body_have_different_fingerprints() {
        let compute = |method: &str, uri: &str, body: &'static str| {
            RequestFingerprint::bytes().compute(&request(method, uri), &Bytes::from(body))
        };
        let requests = [
            ("POST", "/a", ""),
            ("PATCH", "/a", ""),
            ("POST", "/b", ""),
            ("POST", "/a?b", ""),
            ("POST", "/a?b=1", ""),
            ("POST", "/a", "b"),
            ("POST", "/ab", ""),
        ];
        let different: BTreeSet<_> = requests.iter().map(|(method, uri, body)| compute(method, uri, body)).collect();
        assert_eq!(different.len(), requests.len());
        assert_eq!(compute("POST", "/a?", ""), compute("POST", "/a", ""), "an empty query equals no query");
        assert_eq!(
            compute("POST", "/a?b=1", "c"),
            compute("POST", "http://host/a?b=1", "c"),
            "the host is not compared"
        );
    }

    #[test]
    fn canonical_json_applies_to_json_content_types_and_falls_back_to_bytes() {
        let json = RequestFingerprint::canonical_json();
        let compute = |rule: &RequestFingerprint, kind: Option<&str>, body: &'static str| {
            let mut request = request("POST", "/a");
            if let Some(kind) = kind {
                request.headers.insert(CONTENT_TYPE, kind.parse().unwrap());
            }
            rule.compute(&request, &Bytes::from(body))
        };
        let (one, other) = (r#"{"a":1,"b":2}"#, r#"{"b": 2, "a": 1}"#);
        for kind in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert_eq!(compute(&json, Some(kind), one), compute(&json, Some(kind), other), "{kind}");
            assert_ne!(compute(&json, Some(kind), one), compute(&json, Some(kind), r#"{"a":1,"b":3}"#), "{kind}");
            assert_ne!(
                compute(&RequestFingerprint::bytes(), Some(kind), one),
                compute(&RequestFingerprint::bytes(), Some(kind), other)
            );
        }
        for kind in [None, Some("text/plain"), Some("application/jsonp"), Some("")] {
            assert_ne!(compute(&json, kind, one), compute(&json, kind, other), "{kind:?}");
        }
        let kind = Some("application/json");
        // Bodies without an unambiguous canonical form are compared by bytes.
        assert_ne!(compute(&json, kind, "9007199254740993"), compute(&json, kind, "9007199254740992"));
        assert_ne!(compute(&json, kind, r#"{"a":1,"a":2}"#), compute(&json, kind, r#"{"a":2}"#));
        assert_eq!(compute(&json, kind, "{"), compute(&json, kind, "{"));
        // A canonical form does not equal the same bytes of another content type.
        assert_ne!(compute(&json, kind, "1"), compute(&json, None, "1"));
        let without = RequestFingerprint::canonical_json_without(["/b"]);
        assert_eq!(compute(&without, kind, one), compute(&without, kind, r#"{"a":1,"b":7}"#));
        assert_eq!(compute(&without, kind, one), compute(&without, kind, r#"{"a":1}"#));
        assert_ne!(compute(&without, kind, one), compute(&without, kind, r#"{"a":2,"b":2}"#));
    }

    #[test]
    fn only_named_headers_are_compared() {
        let rule = RequestFingerprint::bytes().with_headers([http::header::ACCEPT]);
        let compute = |values: &[&'static str]| {
            let mut request = request("POST", "/a");
            for value in values {
                request.headers.append(http::header::ACCEPT, value.parse().unwrap());
            }
            (rule.compute(&request, &Bytes::new()), RequestFingerprint::bytes().compute(&request, &Bytes::new()))
        };
        let all =
            [compute(&[]), compute(&[""]), compute(&["a"]), compute(&["b"]), compute(&["a", "b"]), compute(&["ab"])];
        assert_eq!(all.iter().map(|(named, _)| named).collect::<BTreeSet<_>>().len(), all.len());
        assert!(all.iter().all(|(_, unnamed)| *unnamed == all[0].1));
    }
}
