//! Leases of long handlers, and superseded attempts.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::routing::post;
use http::header::RETRY_AFTER;
use http::{Request, StatusCode};
use onlyonce::http::IdempotencyLayer;
use onlyonce::{ManualClock, Store, Timestamp};
use tower_service::Service;

use crate::handlers::{HandlerState, blocks};
use crate::local::LocalServer;
use crate::setup::KEY;

#[tokio::test]
async fn a_handler_that_takes_longer_than_a_lease_keeps_its_key() {
    let server = LocalServer::with(|builder| builder.lease(Duration::from_millis(300)), |layer| layer).await;
    let first = server.spawn_post("/slow", "k");
    server.handlers.started.receive().await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let other = server.post("/slow", "k").await;
        assert_eq!(other.problem(), (409, "in-progress".to_owned()));
        assert_eq!(other.headers[RETRY_AFTER], "1");
    }
    server.handlers.finish.send();
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!(server.handlers.runs(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_handler_that_blocks_its_thread_keeps_its_key() {
    let server = LocalServer::with(|builder| builder.lease(Duration::from_millis(300)), |layer| layer).await;
    let first = server.spawn_post("/blocks", "k");
    server.handlers.started.receive().await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(server.post("/blocks", "k").await.problem(), (409, "in-progress".to_owned()));
    }
    assert_eq!(first.await.unwrap().text(), (200, "run 1, attempt 1, prior None"));
    assert_eq!(server.post("/blocks", "k").await.text(), (200, "run 1, attempt 1, prior None"));
    assert_eq!(server.handlers.runs(), 1);
    server.store.close().await.unwrap();
}

#[test]
fn a_handler_that_blocks_the_only_thread_keeps_its_key() {
    let dir = tempfile::tempdir().unwrap();
    let builder = Store::builder().lease(Duration::from_millis(300)).memory_budget(32 << 20);
    let store = builder.open(dir.path().join("store")).unwrap();
    let layer = IdempotencyLayer::builder(store.clone()).shared_scope();
    let handlers = Arc::<HandlerState>::default();
    let app = Router::new().route("/", post(blocks)).layer(layer).with_state(Arc::clone(&handlers));
    // Each request runs in a runtime with a single thread.
    let status = |mut app: Router| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let request = Request::post("/").header(&KEY, "k").body(Body::empty()).unwrap();
        runtime.block_on(app.call(request)).unwrap().status()
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| status(app.clone()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(handlers.started.receive());
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(200));
            assert_eq!(status(app.clone()), StatusCode::CONFLICT);
        }
        assert_eq!(first.join().unwrap(), StatusCode::OK);
    });
    assert_eq!((status(app), handlers.runs()), (StatusCode::OK, 1));
    store.close().wait().unwrap();
}

#[tokio::test]
async fn the_response_of_a_superseded_attempt_is_discarded() {
    let clock = ManualClock::at(Timestamp::from_unix_s(1_700_000_000));
    let shared_clock = clock.clone();
    let server =
        LocalServer::with(|builder| builder.clock(shared_clock).lease(Duration::from_secs(60)), |layer| layer).await;
    let post = || server.spawn_post("/slow", "k");
    let first = post();
    server.handlers.started.receive().await;
    // The lease is renewed at once, then every 20 seconds.
    tokio::time::sleep(Duration::from_millis(50)).await;
    // The process is suspended for longer than its lease.
    clock.advance(Duration::from_secs(61));
    let second = post();
    server.handlers.started.receive().await;
    server.handlers.finish.send();
    let first = first.await.unwrap();
    assert_eq!(first.problem(), (409, "superseded".to_owned()));
    assert!(first.headers.contains_key(RETRY_AFTER));
    server.handlers.finish.send();
    assert_eq!(second.await.unwrap().body, "run 2, attempt 2, prior Some(LeaseExpired)");
    let retry = server.post("/slow", "k").await;
    assert_eq!(retry.body, "run 2, attempt 2, prior Some(LeaseExpired)");
    assert_eq!((server.layer.stats().interrupted, server.layer.stats().stored), (1, 1));
}

#[tokio::test]
async fn a_superseded_handler_is_cancelled() {
    let clock = ManualClock::at(Timestamp::from_unix_s(1_700_000_000));
    let shared_clock = clock.clone();
    let server =
        LocalServer::with(|builder| builder.clock(shared_clock).lease(Duration::from_millis(300)), |layer| layer).await;
    let post = || server.spawn_post("/slow", "k");
    let first = post();
    server.handlers.started.receive().await;
    let second = loop {
        clock.advance(Duration::from_millis(301));
        let mut second = post();
        tokio::select! {
            // The renewal came first.
            other = &mut second => assert_eq!(other.unwrap().problem(), (409, "in-progress".to_owned())),
            () = server.handlers.started.receive() => break second,
        }
    };
    // The first handler is still waiting for `finish`.
    assert_eq!(first.await.unwrap().problem(), (409, "superseded".to_owned()));
    server.handlers.finish.send();
    assert_eq!(second.await.unwrap().body, "run 2, attempt 2, prior Some(LeaseExpired)");
}
