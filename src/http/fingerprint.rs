//! What makes two requests the same.

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName};
use http::request::Parts;

use super::json::{Path, canonical};

/// Ready-made rules for which requests are the same, for
/// [`IdempotencyLayer::fingerprint`](super::IdempotencyLayer::fingerprint).
///
/// All of them compare the method, the path and the query byte by byte; an empty query is the same as none. They differ in
/// how they compare the body, and no header is compared unless it is named. The host is not compared: it belongs into the
/// scope where it matters.
///
/// ```
/// use onlyonce::http::{IdempotencyLayer, RequestFingerprint};
///
/// # fn layer(layer: IdempotencyLayer) -> IdempotencyLayer {
/// // A JSON-RPC client numbers its retries.
/// let rule = RequestFingerprint::canonical_json_without(["/id"]).with_headers([http::header::ACCEPT_LANGUAGE]);
/// layer.fingerprint(move |request, body| rule.of(request, body))
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct RequestFingerprint {
    /// Where JSON is compared by its meaning: what of it is not compared.
    json: Option<Vec<Path>>,
    headers: Vec<HeaderName>,
}

impl RequestFingerprint {
    /// Compares the body byte by byte. The default.
    #[must_use]
    pub fn bytes() -> Self {
        Self { json: None, headers: Vec::new() }
    }

    /// Compares a JSON body by its canonical form (RFC 8785): the order of members, white space, escapes and the way a number
    /// is written (`1.0`, `1`, `1e0`) make no difference.
    ///
    /// A body is compared byte by byte all the same if its `Content-Type` is neither `application/json` nor one that ends in
    /// `+json`, if it is not valid JSON or is nested more than 127 deep, and if the canonical form could make two
    /// different bodies equal: a member that occurs twice in one object, minus zero, or a number that a 64-bit float does not
    /// hold exactly as written (most integers over 2⁵³, more than 17 digits).
    ///
    /// Costs a parse of the whole body and a sort of its members, on the thread that handles the request;
    /// [`IdempotencyLayer::body_limit`](super::IdempotencyLayer::body_limit) bounds it.
    #[must_use]
    pub fn canonical_json() -> Self {
        Self { json: Some(Vec::new()), headers: Vec::new() }
    }

    /// As [`RequestFingerprint::canonical_json`], without some members: two bodies that differ in nothing else are the
    /// same, also where one of them does not have the member.
    ///
    /// A text that begins with `/` is a JSON Pointer (RFC 6901), `/params/_meta`; any other is the name of a member of the
    /// outermost object. A pointer to a value in an array leaves the value out, and not its place. A member that does not
    /// exist is ignored.
    #[must_use]
    pub fn canonical_json_without<T: AsRef<str>>(members: impl IntoIterator<Item = T>) -> Self {
        let paths = members.into_iter().map(|member| Path::new(member.as_ref())).collect();
        Self { json: Some(paths), headers: Vec::new() }
    }

    /// Compares these headers as well, byte by byte, with all their values in their order.
    #[must_use]
    pub fn with_headers(mut self, names: impl IntoIterator<Item = HeaderName>) -> Self {
        self.headers.extend(names);
        self
    }

    /// The BLAKE3 hash of what is compared. Rules that differ give different hashes.
    #[must_use]
    pub fn of(&self, request: &Parts, body: &Bytes) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        // Lengths and numbers keep the parts apart.
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
        match self.json.as_ref().filter(|_| is_json(request)).and_then(|left_out| canonical(body, left_out)) {
            Some(form) => hasher.update(&[1]).update(&form),
            None => hasher.update(&[0]).update(body),
        };
        *hasher.finalize().as_bytes()
    }
}

/// Whether the request says that its body is JSON.
fn is_json(request: &Parts) -> bool {
    let Some(Ok(value)) = request.headers.get(CONTENT_TYPE).map(|value| value.to_str()) else { return false };
    let kind = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    kind == "application/json" || kind.ends_with("+json")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn request(method: &str, uri: &str) -> Parts {
        http::Request::builder().method(method).uri(uri).body(()).unwrap().into_parts().0
    }

    #[test]
    fn requests_that_differ_in_method_path_query_or_body_are_not_the_same() {
        let of = |method: &str, uri: &str, body: &'static str| {
            RequestFingerprint::bytes().of(&request(method, uri), &Bytes::from(body))
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
        let different: BTreeSet<_> = requests.iter().map(|(method, uri, body)| of(method, uri, body)).collect();
        assert_eq!(different.len(), requests.len());
        assert_eq!(of("POST", "/a?", ""), of("POST", "/a", ""), "an empty query is none");
        assert_eq!(of("POST", "/a?b=1", "c"), of("POST", "http://host/a?b=1", "c"), "the host is the scope's business");
    }

    #[test]
    fn json_is_compared_by_its_meaning_where_that_was_chosen_and_the_body_is_said_to_be_json() {
        let json = RequestFingerprint::canonical_json();
        let of = |rule: &RequestFingerprint, kind: Option<&str>, body: &'static str| {
            let mut request = request("POST", "/a");
            if let Some(kind) = kind {
                request.headers.insert(CONTENT_TYPE, kind.parse().unwrap());
            }
            rule.of(&request, &Bytes::from(body))
        };
        let (one, other) = (r#"{"a":1,"b":2}"#, r#"{"b": 2, "a": 1}"#);
        for kind in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert_eq!(of(&json, Some(kind), one), of(&json, Some(kind), other), "{kind}");
            assert_ne!(of(&json, Some(kind), one), of(&json, Some(kind), r#"{"a":1,"b":3}"#), "{kind}");
            assert_ne!(
                of(&RequestFingerprint::bytes(), Some(kind), one),
                of(&RequestFingerprint::bytes(), Some(kind), other)
            );
        }
        for kind in [None, Some("text/plain"), Some("application/jsonp"), Some("")] {
            assert_ne!(of(&json, kind, one), of(&json, kind, other), "{kind:?}");
        }
        let kind = Some("application/json");
        // By its bytes where the form is uncertain.
        assert_ne!(of(&json, kind, "9007199254740993"), of(&json, kind, "9007199254740992"));
        assert_ne!(of(&json, kind, r#"{"a":1,"a":2}"#), of(&json, kind, r#"{"a":2}"#));
        assert_eq!(of(&json, kind, "{"), of(&json, kind, "{"));
        // A body that is the canonical form of another one is that one, and no other.
        assert_ne!(of(&json, kind, "1"), of(&json, None, "1"));
        let without = RequestFingerprint::canonical_json_without(["/b"]);
        assert_eq!(of(&without, kind, one), of(&without, kind, r#"{"a":1,"b":7}"#));
        assert_eq!(of(&without, kind, one), of(&without, kind, r#"{"a":1}"#));
        assert_ne!(of(&without, kind, one), of(&without, kind, r#"{"a":2,"b":2}"#));
    }

    #[test]
    fn headers_are_compared_where_they_are_named() {
        let rule = RequestFingerprint::bytes().with_headers([http::header::ACCEPT]);
        let of = |values: &[&'static str]| {
            let mut request = request("POST", "/a");
            for value in values {
                request.headers.append(http::header::ACCEPT, value.parse().unwrap());
            }
            (rule.of(&request, &Bytes::new()), RequestFingerprint::bytes().of(&request, &Bytes::new()))
        };
        let all = [of(&[]), of(&[""]), of(&["a"]), of(&["b"]), of(&["a", "b"]), of(&["ab"])];
        assert_eq!(all.iter().map(|(named, _)| named).collect::<BTreeSet<_>>().len(), all.len());
        assert!(all.iter().all(|(_, unnamed)| *unnamed == all[0].1));
    }
}
