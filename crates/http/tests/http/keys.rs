//! Keys, scopes, methods and limits of requests.

use bytes::Bytes;
use http::header::LINK;
use http::{Method, Request, Uri};
use onlyonce_http::IdempotencyLayer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower_layer::Layer;
use tower_service::Service;

use crate::memory::MemoryServer;
use crate::setup::{KEY, PlainService, REPLAYED, TENANT, full_body};

#[tokio::test]
async fn a_missing_malformed_or_too_long_key_is_rejected() {
    let documented = |layer: IdempotencyLayer| layer.documentation(Uri::from_static("https://dev.example.com/keys"));
    let server = MemoryServer::with(|builder| builder, documented).await;
    let missing = server.send(server.request("/charges", None), "").await;
    assert_eq!(missing.problem(), (400, "key-missing".to_owned()));
    assert!(missing.body.contains("\"https://dev.example.com/keys#key-missing\""), "{}", missing.body);
    assert_eq!(missing.headers[LINK], "<https://dev.example.com/keys>; rel=\"describedby\"; type=\"text/html\"");
    for malformed in ["", "\"", "\"a", "a b", "a,b", "\"\"", "\"a\" b", "caf\u{e9}"] {
        let response = server.post("/charges", malformed).await;
        assert_eq!(response.problem(), (400, "key-malformed".to_owned()), "{malformed}");
    }
    let two = server.request("/charges", Some("a")).header(&KEY, "b");
    assert_eq!(server.send(two, "").await.problem(), (400, "key-malformed".to_owned()));
    let longest = "k".repeat(255);
    assert_eq!(server.post("/charges", &longest).await.status, 201);
    for long in [format!("{longest}k"), format!("\"{longest}k\"")] {
        assert_eq!(server.post("/charges", &long).await.problem(), (400, "key-too-long".to_owned()));
    }
    assert_eq!(server.handlers.runs(), 1);
    assert_eq!(server.layer.stats().rejected, 12);

    let format = |layer: IdempotencyLayer| layer.validate_key(|key| key.starts_with("order-"));
    let strict = MemoryServer::with(|builder| builder, format).await;
    for (key, status) in [("order-1", 201), ("\"order-2\"", 201), ("1", 400), ("\"orde\"", 400)] {
        assert_eq!(strict.post("/charges", key).await.status, status, "{key}");
    }

    // The store's limit applies to key and scope together.
    let small = MemoryServer::with(|builder| builder.key_limit(20), |layer| layer).await;
    assert_eq!(small.post("/charges", &"k".repeat(19)).await.status, 201);
    let long = small.post("/charges", &"k".repeat(20)).await;
    assert_eq!(long.problem(), (400, "key-too-long".to_owned()));
    assert!(long.body.contains("length is 19 bytes"), "{}", long.body);
}

#[tokio::test]
async fn unguarded_methods_pass_unchanged() {
    let server = MemoryServer::new().await;
    for _ in 0..2 {
        let put = server.request("/charges", Some("k")).method(Method::PUT);
        let response = server.send(put, "x").await;
        assert!(response.body.ends_with("not guarded, body of 1") && !response.is_replayed(), "{}", response.body);
    }
    assert_eq!(server.send(server.request("/", None).method(Method::GET), "").await.text(), (200, "unchanged"));
    assert_eq!(server.handlers.runs(), 2);

    let put = MemoryServer::with(|builder| builder, |layer| layer.methods([Method::PUT]).key_optional()).await;
    for replayed in [false, true] {
        let response = put.send(put.request("/charges", Some("k")).method(Method::PUT), "x").await;
        assert_eq!(response.is_replayed(), replayed);
    }
    let none = put.send(put.request("/charges", None).method(Method::PUT), "x").await;
    assert!(none.body.contains("not guarded"), "the key is optional");
    assert!(put.post("/charges", "k").await.body.contains("not guarded"), "POST is not guarded");
    assert_eq!(put.layer.stats().executed, 1);
}

#[tokio::test]
async fn a_body_at_the_limit_passes_and_one_byte_more_gets_413() {
    let server = MemoryServer::with(|builder| builder, |layer| layer.body_limit(1_000)).await;
    let body = |bytes| Bytes::from("x".repeat(bytes));
    let at = server.send(server.request("/charges", Some("at")), body(1_000)).await;
    assert_eq!(at.text(), (201, "run 1, attempt 1, prior None, body of 1000"));
    let over = server.send(server.request("/charges", Some("over")), body(1_001)).await;
    assert_eq!(over.problem(), (413, "body-too-large".to_owned()));
    // Chunked, without a length.
    for (bytes, status) in [(1_000, 201), (1_001, 413)] {
        let mut chunks = vec![Bytes::from("x".repeat(999)), Bytes::from("x")];
        chunks.resize(1 + bytes - 999, Bytes::from("x"));
        let mut raw = format!(
            "POST /charges HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\nidempotency-key: chunked-{bytes}\r\n\
             connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        .into_bytes();
        for chunk in chunks {
            raw.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
            raw.extend_from_slice(&chunk);
            raw.extend_from_slice(b"\r\n");
        }
        raw.extend_from_slice(b"0\r\n\r\n");
        let mut socket = TcpStream::connect(server.address).await.unwrap();
        socket.write_all(&raw).await.unwrap();
        let mut response = Vec::new();
        socket.read_to_end(&mut response).await.unwrap();
        let response = String::from_utf8(response).unwrap();
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes}: {response}");
    }
    assert_eq!(server.handlers.runs(), 2);
    // A rejected request does not use its key.
    assert_eq!(server.send(server.request("/charges", Some("over")), body(1)).await.status, 201);
}

#[tokio::test]
async fn a_tenant_never_gets_the_response_of_another() {
    let server = MemoryServer::new().await;
    let by = |tenant: &str| {
        let uri = format!("http://{}/charges", server.address);
        Request::builder().method(Method::POST).uri(uri).header(&TENANT, tenant).header(&KEY, "k")
    };
    let longest = "t".repeat(255);
    for (run, tenant) in ["a", "b", longest.as_str()].into_iter().enumerate() {
        let response = server.send(by(tenant), "same").await;
        assert_eq!(response.body, format!("run {}, attempt 1, prior None, body of 4", run + 1), "{tenant}");
    }
    assert_eq!(server.send(by("b"), "same").await.body, "run 2, attempt 1, prior None, body of 4");
    // An empty or too long scope is rejected.
    let too_long = "t".repeat(256);
    for invalid in ["", too_long.as_str()] {
        assert_eq!(server.send(by(invalid), "same").await.problem(), (403, "scope-missing".to_owned()));
    }
    assert_eq!(server.handlers.runs(), 3);

    let mut shared = IdempotencyLayer::builder(server.store.clone()).shared_scope().layer(PlainService::default());
    let by =
        |tenant| Request::post("/charges").header(&TENANT, tenant).header(&KEY, "k").body(full_body("same")).unwrap();
    let first = shared.call(by("a")).await.unwrap();
    assert!(first.headers().get(&REPLAYED).is_none(), "the shared scope equals no tenant's scope");
    assert!(shared.call(by("b")).await.unwrap().headers().contains_key(&REPLAYED));
}
