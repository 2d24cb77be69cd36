//! When two requests under one key are the same.

use http::Method;
use http::header::{ACCEPT, CONTENT_TYPE};
use onlyonce_http::{IdempotencyLayer, RequestFingerprint};
use serde_json::Value;

use crate::memory::MemoryServer;
use crate::setup::TestResponse;

#[tokio::test]
async fn a_key_used_for_another_request_gets_422() {
    let server = MemoryServer::new().await;
    let first = server.send(server.request("/charges?a=1", Some("k")), "12 EUR").await;
    assert_eq!(first.status, 201);
    let patch = server.request("/charges?a=1", Some("k")).method(Method::PATCH);
    for (request, body) in [
        (server.request("/charges?a=1", Some("k")), "13 EUR"),
        (server.request("/charges?a=1", Some("k")), ""),
        (server.request("/charges?a=2", Some("k")), "12 EUR"),
        (server.request("/charges", Some("k")), "12 EUR"),
        (server.request("/charges/1?a=1", Some("k")), "12 EUR"),
        (patch, "12 EUR"),
    ] {
        assert_eq!(server.send(request, body).await.problem(), (422, "key-reused".to_owned()));
    }
    assert_eq!((server.handlers.runs(), server.layer.stats().payload_mismatches), (1, 6));
    let again = server.send(server.request("/charges?a=1", Some("k")), "12 EUR").await;
    assert!(again.is_replayed(), "the first response is still stored");
}

#[tokio::test]
async fn an_empty_query_equals_no_query() {
    let server = MemoryServer::new().await;
    assert_eq!(server.post("/charges", "k").await.status, 201);
    assert!(server.post("/charges?", "k").await.is_replayed());
    assert_eq!(server.post("/charges?a", "k").await.problem(), (422, "key-reused".to_owned()));
}

#[tokio::test]
async fn canonical_json_treats_reordered_json_as_the_same_request() {
    let canonical = |layer: IdempotencyLayer| {
        let rule = RequestFingerprint::canonical_json().with_headers([ACCEPT]);
        layer.fingerprint(move |request, body| rule.compute(request, body))
    };
    let server = MemoryServer::with(|builder| builder, canonical).await;
    let order =
        |key, kind, accept| server.request("/charges", Some(key)).header(CONTENT_TYPE, kind).header(ACCEPT, accept);
    let json = "application/json; charset=utf-8";
    let first = server.send(order("k", json, "a"), r#"{"cents":1200,"to":{"name":"A","city":"B"}}"#).await;
    assert_eq!(first.status, 201);
    let other = r#" { "to": {"city": "\u0042", "name": "A"}, "cents": 1.2e3 } "#;
    assert!(server.send(order("k", json, "a"), other).await.is_replayed());
    for (kind, accept, body) in [
        (json, "a", r#"{"cents":1201,"to":{"name":"A","city":"B"}}"#),
        (json, "a", r#"{"cents":"1200","to":{"name":"A","city":"B"}}"#),
        (json, "b", other),
        ("text/plain", "a", other),
    ] {
        assert_eq!(
            server.send(order("k", kind, accept), body).await.problem(),
            (422, "key-reused".to_owned()),
            "{body}"
        );
    }
    // Bodies without an unambiguous canonical form are compared by bytes.
    for (key, one, other) in [
        ("number", r#"{"to": 9007199254740993}"#, r#"{"to": 9007199254740992}"#),
        ("digits", r#"{"cents": 0.1}"#, r#"{"cents": 0.10000000000000000555}"#),
        ("twice", r#"{"cents":1,"cents":2}"#, r#"{"cents":2}"#),
        ("broken", r#"{"cents":1"#, r#"{"cents": 1"#),
    ] {
        assert_eq!(server.send(order(key, json, "a"), one).await.status, 201);
        assert!(server.send(order(key, json, "a"), one).await.is_replayed(), "{key}");
        assert_eq!(server.send(order(key, json, "a"), other).await.problem(), (422, "key-reused".to_owned()), "{key}");
    }

    // The default rule compares bytes.
    let bytes = MemoryServer::new().await;
    let order = || bytes.request("/charges", Some("k")).header(CONTENT_TYPE, json);
    assert_eq!(bytes.send(order(), r#"{"a":1}"#).await.status, 201);
    assert_eq!(bytes.send(order(), r#"{"a": 1}"#).await.problem(), (422, "key-reused".to_owned()));
}

#[tokio::test]
async fn a_custom_fingerprint_replaces_the_default_comparison() {
    // The client sends a digest because its multipart boundary changes with each retry.
    let by_digest =
        |layer: IdempotencyLayer| layer.fingerprint(|request, _| request.headers["content-digest"].as_bytes().to_vec());
    let server = MemoryServer::with(|builder| builder, by_digest).await;
    let upload = |digest| server.request("/charges", Some("k")).header("content-digest", digest);
    assert_eq!(server.send(upload("sha-256=:a:"), "--x1\r\n").await.status, 201);
    assert!(server.send(upload("sha-256=:a:"), "--x2\r\n").await.is_replayed());
    assert_eq!(server.send(upload("sha-256=:b:"), "--x1\r\n").await.problem(), (422, "key-reused".to_owned()));
}

#[tokio::test]
async fn json_rpc_calls_have_their_key_in_the_body_and_a_new_id_in_each_retry() {
    let json_rpc = |layer: IdempotencyLayer| {
        let rule = RequestFingerprint::canonical_json_without(["/id", "/params/_meta"]);
        layer
            .key_optional()
            .key_limit(40)
            .key(|_, body| {
                let call: Value = serde_json::from_slice(body).ok()?;
                Some(call.pointer("/params/idempotencyKey")?.as_str()?.to_owned())
            })
            .fingerprint(move |request, body| rule.compute(request, body))
            .adapt_replay(|_, body, response| {
                let call: Value = serde_json::from_slice(body).unwrap();
                let mut result: Value = serde_json::from_slice(response.body()).unwrap();
                result["id"] = call["id"].clone();
                response.map(|_| result.to_string().into())
            })
    };
    let server = MemoryServer::with(|builder| builder, json_rpc).await;
    let call = async |id: u32, params: Value| {
        let call = serde_json::json!({ "jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params });
        let request = server.request("/rpc", None).header(CONTENT_TYPE, "application/json");
        server.send(request, call.to_string()).await
    };
    let result = |response: &TestResponse| -> (Value, Value) {
        let body: Value = serde_json::from_str(&response.body).unwrap();
        (body["id"].clone(), body["result"].clone())
    };
    let charge = |cents: u32, token: u32| {
        let meta = serde_json::json!({ "progressToken": token });
        serde_json::json!({ "idempotencyKey": "a key of any text: é", "cents": cents, "_meta": meta })
    };
    let first = call(1, charge(12, 1)).await;
    assert_eq!(result(&first), (1.into(), "run 1, attempt 1, prior None".into()));
    let retry = call(2, charge(12, 2)).await;
    assert!(retry.is_replayed());
    assert_eq!(
        result(&retry),
        (2.into(), "run 1, attempt 1, prior None".into()),
        "the id of the retry, the result of the first call"
    );
    assert_eq!(call(3, charge(13, 3)).await.problem(), (422, "key-reused".to_owned()));
    // Calls without a key pass; invalid keys are rejected.
    for run in [2, 3] {
        let listed = call(4, serde_json::json!({})).await;
        assert_eq!(result(&listed).1, format!("run {run}, not guarded"));
    }
    let empty = call(5, serde_json::json!({ "idempotencyKey": "" })).await;
    assert_eq!(empty.problem(), (400, "key-malformed".to_owned()));
    let long = call(6, serde_json::json!({ "idempotencyKey": "k".repeat(41) })).await;
    assert_eq!(long.problem(), (400, "key-too-long".to_owned()));

    let required = MemoryServer::with(|builder| builder, |layer| layer.body_limit(10).key(|_, _| None)).await;
    assert_eq!(required.post("/charges", "k").await.problem(), (400, "key-missing".to_owned()));
    let large = required.send(required.request("/charges", None), "12345678901").await;
    assert_eq!(large.problem(), (413, "body-too-large".to_owned()));
}
