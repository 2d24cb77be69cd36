//! Clients that disconnect.

use std::time::Duration;

use onlyonce_http::IdempotencyLayer;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::memory::MemoryServer;
use crate::setup::{TIMEOUT, next_frame};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_finishes_after_its_client_disconnects_and_the_retry_gets_the_response() {
    let server = MemoryServer::new().await;
    for key in ["a", "b", "c"] {
        let before = server.handlers.runs();
        let mut client = TcpStream::connect(server.address).await.unwrap();
        let head = format!("POST /slow HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\nidempotency-key: {key}\r\n");
        client.write_all(format!("{head}content-length: 0\r\n\r\n").as_bytes()).await.unwrap();
        server.handlers.started.receive().await;
        drop(client);
        // Gives the server time to notice.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(server.layer.wait_idle(Duration::from_millis(50)).await, 1, "the handler still runs");
        server.handlers.finish.send();
        assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
        let retry = server.post("/slow", key).await;
        assert!(retry.is_replayed());
        assert_eq!(retry.body, format!("run {}, attempt 1, prior None", before + 1));
        assert_eq!(server.handlers.runs(), before + 1);
    }
}

#[tokio::test]
async fn a_client_that_disconnects_while_sending_its_body_claims_nothing() {
    let server = MemoryServer::new().await;
    let mut client = TcpStream::connect(server.address).await.unwrap();
    let head = "POST /charges HTTP/1.1\r\nhost: h\r\nx-tenant: a\r\nidempotency-key: k\r\ncontent-length: 6\r\n\r\n";
    client.write_all(format!("{head}12").as_bytes()).await.unwrap();
    drop(client);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let whole = server.send(server.request("/charges", Some("k")), "12 EUR").await;
    assert_eq!(whole.text(), (201, "run 1, attempt 1, prior None, body of 6"));
}

#[tokio::test]
async fn a_stream_is_read_for_a_limited_time_after_its_client_disconnects() {
    let read_on = |limit| move |layer: IdempotencyLayer| layer.after_disconnect(limit);
    // The stream ends in time.
    let server = MemoryServer::with(|builder| builder, read_on(TIMEOUT)).await;
    let stream = server.handlers.next_stream();
    let mut body = server.open("/events/declared", "k").await.into_body();
    next_frame(&mut body).await;
    drop(body);
    stream.send(", after it").unwrap();
    assert_eq!(server.layer.wait_idle(Duration::from_millis(100)).await, 1);
    assert_eq!(server.post("/events/declared", "k").await.problem(), (409, "in-progress".to_owned()));
    drop(stream);
    assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
    let retry = server.post("/events/declared", "k").await;
    assert!(retry.is_replayed());
    assert_eq!(retry.body, "run 1, attempt 1, prior None, after it");

    // The stream does not end: either it sends nothing, or it always has data.
    for path in ["/events/declared", "/events/busy"] {
        let server = MemoryServer::with(|builder| builder, read_on(Duration::from_millis(100))).await;
        let _endless = server.handlers.next_stream();
        let mut body = server.open(path, "k").await.into_body();
        next_frame(&mut body).await;
        drop(body);
        assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
        assert_eq!(server.layer.stats().interrupted, 1);
        server.handlers.streams.lock().unwrap().clear();
        drop(server.handlers.next_stream());
        let retry = server.post(path, "k").await;
        assert_eq!(retry.text(), (200, "run 2, attempt 2, prior Some(Dropped)"));
    }
}
