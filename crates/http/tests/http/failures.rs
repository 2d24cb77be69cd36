//! Panics, errors, and failures of the store.

use http::Request;
use http::header::{LOCATION, RETRY_AFTER};
use http_body_util::BodyExt;
use onlyonce_core::{Error, Key, OnInterrupt, OnStoreFailure, Resolution};
use onlyonce_http::{IdempotencyLayer, StoredResponse};
use serde_json::Value;
use tower_layer::Layer;
use tower_service::Service;

use crate::memory::MemoryServer;
use crate::setup::{KEY, PlainService, REPLAYED, TIMEOUT, TestResponse, full_body};

#[tokio::test]
async fn problem_responses_say_what_happened_and_what_to_do() {
    let server = MemoryServer::with(|builder| builder.on_interrupt(OnInterrupt::Hold), |layer| layer).await;
    let texts = |response: &TestResponse| -> (String, String) {
        let problem: Value = serde_json::from_str(&response.body).unwrap();
        (problem["title"].as_str().unwrap().to_owned(), problem["detail"].as_str().unwrap().to_owned())
    };
    let uri = format!("http://{}/charges", server.address);
    let without_scope = server.send(Request::post(uri).header(&KEY, "k"), "").await;
    let (title, detail) = texts(&without_scope);
    assert_eq!((without_scope.status.as_u16(), &title[..]), (403, "Request has no idempotency scope"));
    assert!(detail.contains("Check the credentials"), "{detail}");
    server.post("/status/500", "k").await;
    let (_, detail) = texts(&server.post("/status/500", "k").await);
    assert_eq!(detail, "The outcome is unknown and requires manual resolution. Do not retry with a different key.");
}

#[tokio::test]
async fn a_panic_gets_500_and_the_next_attempt_may_have_happened() {
    let server = MemoryServer::new().await;
    assert_eq!(server.post("/panic", "k").await.problem(), (500, "handler-failed".to_owned()));
    assert_eq!(server.layer.stats().interrupted, 1);
    let retry = server.post("/panic", "k").await;
    assert_eq!(retry.text(), (200, "run 2, attempt 2, prior Some(Dropped)"));
    assert!(server.post("/panic", "k").await.is_replayed());
    assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
}

#[tokio::test]
async fn a_response_whose_body_fails_is_not_stored() {
    let server = MemoryServer::new().await;
    assert_eq!(server.post("/broken", "k").await.problem(), (500, "handler-failed".to_owned()));
    for replayed in [false, true] {
        let retry = server.post("/broken", "k").await;
        assert_eq!(retry.text(), (200, "so far, run 2, attempt 2, prior Some(Dropped)"));
        assert_eq!(retry.is_replayed(), replayed);
    }
}

#[tokio::test]
async fn a_service_error_is_passed_on_and_interrupts_the_key() {
    let server = MemoryServer::new().await;
    let layer = IdempotencyLayer::builder(server.store.clone()).shared_scope();
    let mut service = layer.layer(PlainService { failures: 1, ..PlainService::default() });
    let request = || Request::post("/charges").header(&KEY, "k").body(full_body("same")).unwrap();
    assert_eq!(service.call(request()).await.unwrap_err().to_string(), "a failure that the test wants");
    assert_eq!(layer.stats().interrupted, 1);
    let retry = service.call(request()).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(retry, "run 1, prior Some(Dropped)");
    assert!(service.call(request()).await.unwrap().headers().contains_key(&REPLAYED));
}

#[tokio::test]
async fn while_the_store_fails_requests_run_only_under_fail_open() {
    let closed = MemoryServer::new().await;
    assert_eq!(closed.post("/charges", "k").await.status, 201);
    closed.store.fail_with(Error::Closed);
    for key in ["k", "new"] {
        assert_eq!(closed.post("/charges", key).await.problem(), (503, "store-unavailable".to_owned()));
    }
    let stats = closed.layer.stats();
    assert_eq!((closed.handlers.runs(), stats.fail_closed, stats.fail_open), (1, 2, 0));

    let open = |layer: IdempotencyLayer| layer.on_store_failure(OnStoreFailure::FailOpen);
    let open = MemoryServer::with(|builder| builder, open).await;
    open.store.fail_with(Error::Closed);
    for run in 1..=3 {
        let response = open.send(open.request("/charges", Some("k")), "x").await;
        assert_eq!(response.text(), (201, format!("run {run}, not guarded, body of 1").as_str()));
    }
    assert_eq!((open.layer.stats().fail_open, open.layer.stats().fail_closed), (3, 0));
    assert_eq!(open.store.fail_open_count(), 3, "the engine counts them, too");
}

#[tokio::test]
async fn a_response_that_cannot_be_stored_is_sent_only_under_fail_open() {
    for (policy, status) in [(OnStoreFailure::FailClosed, 503), (OnStoreFailure::FailOpen, 200)] {
        let server = MemoryServer::with(|builder| builder, |layer| layer.on_store_failure(policy)).await;
        let client = server.spawn_post("/slow", "k");
        server.handlers.started.receive().await;
        server.store.fail_with(Error::Closed);
        server.handlers.finish.send();
        let response = client.await.unwrap();
        assert_eq!(response.status.as_u16(), status);
        let stats = server.layer.stats();
        if policy == OnStoreFailure::FailClosed {
            assert_eq!(response.code(), "outcome-not-stored");
            assert_eq!((stats.fail_closed, stats.fail_open), (1, 0));
        } else {
            assert_eq!(response.body, "run 1, attempt 1, prior None");
            assert_eq!((stats.fail_closed, stats.fail_open), (0, 1));
        }
    }
}

#[tokio::test]
async fn a_held_key_gets_409_without_retry_after_until_it_is_resolved() {
    let server = MemoryServer::with(|builder| builder.on_interrupt(OnInterrupt::Hold), |layer| layer).await;
    assert_eq!(server.post("/status/500", "k").await.status, 500);
    let held = server.post("/status/500", "k").await;
    assert_eq!(held.problem(), (409, "held".to_owned()));
    assert!(held.headers.get(RETRY_AFTER).is_none());
    assert_eq!(server.post("/status/429", "free").await.status, 429);
    assert_eq!(server.post("/status/429", "free").await.body, "run 3, attempt 2, prior Some(Released)");

    let engine = &server.engine;
    let keys: Vec<_> = engine.held().await.unwrap().into_iter().map(|held| held.key).collect();
    assert_eq!(keys, [Key::from("k").scope("a")]);
    let found = http::Response::builder().status(201).header(LOCATION, "/charges/7").body("found").unwrap();
    let resolution = Resolution::Completed(StoredResponse::new(found).encode());
    engine.resolve(keys[0].clone(), resolution).await.unwrap();
    let retry = server.post("/status/500", "k").await;
    assert!(retry.is_replayed());
    assert_eq!((retry.text(), &retry.headers[LOCATION]), ((201, "found"), &"/charges/7".parse().unwrap()));

    server.post("/status/500", "again").await;
    engine.resolve(Key::from("again").scope("a"), Resolution::Rerun).await.unwrap();
    assert_eq!(server.post("/status/500", "again").await.body, "run 5, attempt 2, prior Some(Dropped)");
}
