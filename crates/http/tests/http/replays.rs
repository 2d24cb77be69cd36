//! Stored responses and their replay.

use std::time::Duration;

use http::header::{CACHE_CONTROL, CONTENT_TYPE, DATE, ETAG, LOCATION, SERVER, SET_COOKIE};
use onlyonce_core::{Claim, EngineLease, Key};

use crate::memory::MemoryServer;

#[tokio::test]
async fn side_writes_are_stored_with_the_response_or_not_at_all() {
    let server = MemoryServer::new().await;
    for _ in 0..3 {
        assert_eq!(server.post("/order/201", "done").await.status, 201);
    }
    assert_eq!(server.post("/order/500", "failed").await.status, 500);
    assert_eq!(server.post("/order/429", "limited").await.status, 429);
    assert_eq!(server.post("/order/402", "declined").await.status, 402);
    let messages = server.engine.outbox(10).await.unwrap();
    let sent: Vec<_> = messages.iter().map(|message| (&message.topic[..], &message.key[..])).collect();
    assert_eq!(sent, [(&b"orders"[..], &b"201"[..]), (b"orders", b"402")], "one message for each stored response");
    assert!(messages[0].payload.starts_with(b"run 1,"));
}

#[tokio::test]
async fn a_retry_gets_the_response_of_the_first_request() {
    let server = MemoryServer::with(|builder| builder, |layer| layer.store_headers([SERVER, SET_COOKIE, DATE])).await;
    let order = || server.request("/charges?for=books", Some("\"order-1\""));
    let first = server.send(order(), "12 EUR").await;
    assert_eq!(first.text(), (201, "run 1, attempt 1, prior None, body of 6"));
    assert!(!first.is_replayed());
    assert_eq!(first.headers[SET_COOKIE], "session=secret");
    let second = server.send(order(), "12 EUR").await;
    assert!(second.is_replayed());
    assert_eq!(second.text(), first.text());
    for name in [LOCATION, ETAG, CONTENT_TYPE, CACHE_CONTROL, SERVER] {
        assert_eq!(second.headers.get(&name), first.headers.get(&name), "{name}");
    }
    assert!(second.headers.get(SET_COOKIE).is_none(), "never stored, even if listed");
    assert_ne!(second.headers.get(DATE), first.headers.get(DATE), "the date of the retry");
    // The bare form of Stripe's clients is the same key.
    let bare = server.send(server.request("/charges?for=books", Some("order-1")), "12 EUR").await;
    assert_eq!(bare.text(), first.text());
    let upper = server.send(server.request("/charges?for=books", Some("Order-1")), "12 EUR").await;
    assert_eq!(upper.text(), (201, "run 2, attempt 1, prior None, body of 6"), "keys are case-sensitive");
    let stats = server.layer.stats();
    assert_eq!((stats.executed, stats.stored, stats.replayed), (2, 2, 2), "{stats:?}");

    let few = MemoryServer::with(|builder| builder, |layer| layer.store_only_headers([ETAG])).await;
    few.post("/charges", "k").await;
    let replayed = few.post("/charges", "k").await;
    assert!(replayed.headers.contains_key(ETAG) && !replayed.headers.contains_key(LOCATION));
}

#[tokio::test]
async fn a_response_over_the_result_limit_is_sent_once_and_its_work_is_not_repeated() {
    let server = MemoryServer::with(|builder| builder.result_limit(1_000), |layer| layer).await;
    for bytes in [1_000, 1_001, 100_000] {
        let (path, runs) = (format!("/large/{bytes}"), server.handlers.runs());
        let first = server.post(&path, &path).await;
        assert_eq!((first.status.as_u16(), first.body.len()), (201, bytes), "the first client gets the whole body");
        let retry = server.post(&path, &path).await;
        assert_eq!(retry.problem(), (201, "response-not-stored".to_owned()), "a retry gets the original status");
        assert!(retry.is_replayed());
        assert_eq!(retry.headers[LOCATION], "/large/1");
        assert!(retry.headers.get(ETAG).is_none(), "describes the body");
        assert_eq!(server.handlers.runs(), runs + 1);
    }
    let fits = server.post("/large/900", "fits").await;
    assert_eq!(server.post("/large/900", "fits").await.body, fits.body);
    assert_eq!(server.layer.stats().bodies_not_stored, 3);

    // The limit has no room for the headers, or not even for the status.
    for (limit, status) in [(8, 201), (0, 500)] {
        let server = MemoryServer::with(|builder| builder.result_limit(limit), |layer| layer).await;
        assert_eq!(server.post("/large/100", "k").await.body.len(), 100);
        let retry = server.post("/large/100", "k").await;
        assert_eq!(retry.problem(), (status, "response-not-stored".to_owned()));
        assert!(retry.headers.get(LOCATION).is_none());
        assert_eq!(server.handlers.runs(), 1);
    }
}

#[tokio::test]
async fn an_unreadable_stored_response_gets_500_and_does_not_run() {
    let server = MemoryServer::new().await;
    for (key, result) in [("foreign", &b"charged"[..]), ("damaged", b"OHR\x01\x00\xc9\x05"), ("newer", b"OHR\x02")] {
        let claim = EngineLease::claim(&server.engine, Key::from(key).scope("a"), Duration::ZERO).await.unwrap();
        let Claim::Acquired(lease) = claim else { panic!("{key} is free") };
        lease.complete(result).await.unwrap();
        let response = server.post("/charges", key).await;
        assert_eq!(response.problem(), (500, "response-unreadable".to_owned()), "{key}");
    }
    server.engine.record(vec![Key::from("recorded").scope("a")]).await.unwrap();
    assert_eq!(server.post("/charges", "recorded").await.problem(), (500, "response-not-stored".to_owned()));
    assert_eq!(server.handlers.runs(), 0);
}
