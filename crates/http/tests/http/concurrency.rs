//! Concurrent requests with one key.

use std::time::Duration;

use http::StatusCode;
use http::header::RETRY_AFTER;

use crate::memory::MemoryServer;
use crate::setup::TIMEOUT;

#[tokio::test]
async fn a_retry_of_a_running_request_gets_409_with_retry_after() {
    let server = MemoryServer::new().await;
    let first = server.spawn_post("/slow", "k");
    server.handlers.started.receive().await;
    let conflict = server.post("/slow", "k").await;
    assert_eq!(conflict.problem(), (409, "in-progress".to_owned()));
    assert_eq!(conflict.headers[RETRY_AFTER], "5");
    let other = server.send(server.request("/slow", Some("k")), "another body").await;
    assert_eq!(other.problem(), (422, "key-reused".to_owned()), "reuse is detected while the first request runs");
    server.handlers.finish.send();
    let first = first.await.unwrap();
    assert!(!first.is_replayed());
    let retry = server.post("/slow", "k").await;
    assert!(retry.is_replayed());
    assert_eq!(retry.text(), first.text());
    assert_eq!((server.handlers.runs(), server.layer.stats().in_progress), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_concurrent_requests_with_one_key_run_once() {
    const CLIENTS: usize = 100;
    for wait in [Duration::ZERO, Duration::from_secs(60)] {
        let server = MemoryServer::with(|builder| builder, |layer| layer.wait(wait)).await;
        let clients: Vec<_> = (0..CLIENTS).map(|_| server.spawn_post("/slow", "k")).collect();
        server.handlers.started.receive().await;
        if wait.is_zero() {
            // All others get 409 before the first one finishes.
            while server.layer.stats().in_progress < CLIENTS as u64 - 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        server.handlers.finish.send();
        assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
        let (mut first, mut replayed, mut conflicts) = (0, 0, 0);
        for client in clients {
            let response = client.await.unwrap();
            if response.status == StatusCode::CONFLICT {
                conflicts += 1;
                assert!(response.headers.contains_key(RETRY_AFTER));
                let retry = server.post("/slow", "k").await;
                assert!(retry.is_replayed());
                assert_eq!(retry.text(), (200, "run 1, attempt 1, prior None"));
            } else {
                assert_eq!(response.text(), (200, "run 1, attempt 1, prior None"));
                if response.is_replayed() { replayed += 1 } else { first += 1 }
            }
        }
        let expected = if wait.is_zero() { (1, 0, CLIENTS - 1) } else { (1, CLIENTS - 1, 0) };
        assert_eq!((first, replayed, conflicts), expected);
        assert_eq!(server.handlers.runs(), 1);
    }
}
