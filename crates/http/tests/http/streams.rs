//! Streaming responses.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use http::header::CONTENT_TYPE;
use onlyonce_core::{Error, Key, OnStoreFailure};
use onlyonce_http::IdempotencyLayer;
use tokio::sync::mpsc::UnboundedReceiver;
use tower_layer::Layer;
use tower_service::Service;

use crate::memory::MemoryServer;
use crate::setup::{KEY, TIMEOUT, full_body, next_frame, with_timeout};

#[tokio::test]
async fn a_stream_is_forwarded_as_it_arrives_and_its_retry_gets_all_of_it() {
    // Detected by its content type, or by its duration.
    for kind in ["declared", "slow"] {
        let (path, lease) = (format!("/events/{kind}"), Duration::from_secs(1));
        let options = |layer: IdempotencyLayer| layer.stream_after(Duration::from_millis(50));
        let server = MemoryServer::with(|builder| builder.lease(lease), options).await;
        let stream = server.handlers.next_stream();
        let (head, mut body) = server.open(&path, "k").await.into_parts();
        assert_eq!(head.status, 200, "before the end");
        assert_eq!(next_frame(&mut body).await, "run 1, attempt 1, prior None");
        for message in ["one", "two"] {
            stream.send(message).unwrap();
            assert_eq!(next_frame(&mut body).await, message);
            // The key stays in progress, in total for longer than a lease.
            tokio::time::sleep(lease * 2 / 3).await;
            assert_eq!(server.post(&path, "k").await.problem(), (409, "in-progress".to_owned()));
        }
        assert_eq!(server.layer.stats().stored, 0);
        drop(stream);
        assert_eq!(next_frame(&mut body).await, "end");
        let stats = server.layer.stats();
        assert_eq!((stats.streamed, stats.stored, stats.interrupted), (1, 1, 0), "stored before the end is sent");
        let retry = server.post(&path, "k").await;
        assert!(retry.is_replayed());
        assert_eq!(retry.text(), (200, "run 1, attempt 1, prior Noneonetwo"));
        assert_eq!(retry.headers[CONTENT_TYPE], head.headers[CONTENT_TYPE]);
        assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
    }
}

#[tokio::test]
async fn a_stream_over_the_result_limit_is_forwarded_and_its_work_is_not_repeated() {
    let server = MemoryServer::with(|builder| builder.result_limit(100), |layer| layer).await;
    let stream = server.handlers.next_stream();
    let mut body = server.open("/events/declared", "k").await.into_body();
    next_frame(&mut body).await;
    for _ in 0..20 {
        stream.send("ten bytes.").unwrap();
        assert_eq!(next_frame(&mut body).await, "ten bytes.");
    }
    drop(stream);
    assert_eq!(next_frame(&mut body).await, "end");
    assert_eq!(server.post("/events/declared", "k").await.problem(), (200, "response-not-stored".to_owned()));
    assert_eq!((server.handlers.runs(), server.layer.stats().bodies_not_stored), (1, 1));
}

#[tokio::test]
async fn a_failed_stream_is_aborted_and_the_next_attempt_may_have_happened() {
    let server = MemoryServer::new().await;
    for (attempt, end) in ["fail", "panic"].into_iter().enumerate() {
        let stream = server.handlers.next_stream();
        let mut body = server.open("/events/declared", "k").await.into_body();
        next_frame(&mut body).await;
        stream.send(end).unwrap();
        assert_eq!(next_frame(&mut body).await, "aborted");
        server.wait_for_stat(|stats| stats.interrupted, attempt as u64 + 1).await;
        assert_eq!(server.layer.wait_idle(TIMEOUT).await, 0);
    }
    drop(server.handlers.next_stream());
    let retry = server.post("/events/declared", "k").await;
    assert_eq!(retry.text(), (200, "run 3, attempt 3, prior Some(Dropped)"));
    assert!(server.post("/events/declared", "k").await.is_replayed());
    assert_eq!((server.layer.stats().interrupted, server.layer.stats().stored), (2, 1));
}

#[tokio::test]
async fn a_stream_that_cannot_be_stored_is_aborted() {
    for (policy, end) in [(OnStoreFailure::FailClosed, "aborted"), (OnStoreFailure::FailOpen, "end")] {
        let server = MemoryServer::with(|builder| builder, |layer| layer.on_store_failure(policy)).await;
        let stream = server.handlers.next_stream();
        let mut body = server.open("/events/declared", "k").await.into_body();
        next_frame(&mut body).await;
        server.store.fail_with(Error::Closed);
        drop(stream);
        assert_eq!(next_frame(&mut body).await, end);
        let stats = server.layer.stats();
        let failed = (stats.fail_closed, stats.fail_open);
        assert_eq!(failed, if policy == OnStoreFailure::FailClosed { (1, 0) } else { (0, 1) });
    }
}

#[tokio::test]
async fn a_superseded_stream_is_aborted() {
    let server = MemoryServer::new().await;
    let _endless = server.handlers.next_stream();
    let mut body = server.open("/events/declared", "k").await.into_body();
    next_frame(&mut body).await;
    assert!(server.store.expire_lease(Key::from("k").scope("a")));
    let stream = server.handlers.next_stream();
    let mut other = server.open("/events/declared", "k").await.into_body();
    assert_eq!(next_frame(&mut other).await, "run 2, attempt 2, prior Some(LeaseExpired)");
    assert_eq!(next_frame(&mut body).await, "aborted");
    drop(stream);
    assert_eq!(next_frame(&mut other).await, "end");
    let stats = server.layer.stats();
    assert_eq!((stats.interrupted, stats.stored), (1, 1));
}

/// A streaming body with a known length.
struct SizedStream {
    frames: UnboundedReceiver<&'static str>,
    left: u64,
}

impl http_body::Body for SizedStream {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Self::Error>>> {
        let frame = std::task::ready!(self.frames.poll_recv(context));
        self.left -= frame.map_or(0, |frame| frame.len() as u64);
        Poll::Ready(frame.map(|frame| Ok(http_body::Frame::data(Bytes::from(frame)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}

#[tokio::test]
async fn the_last_frame_of_a_known_length_is_sent_after_the_response_is_stored() {
    for closed in [false, true] {
        let server = MemoryServer::new().await;
        let stream = server.handlers.next_stream();
        let frames = Arc::new(Mutex::new(server.handlers.streams.lock().unwrap().pop_front()));
        let layer =
            IdempotencyLayer::builder(server.store.clone()).shared_scope().stream_after(Duration::from_millis(20));
        let mut service = layer.layer(ImmediateService(move || {
            let frames = frames.lock().unwrap().take().unwrap();
            http::Response::new(SizedStream { frames, left: 6 })
        }));
        let request = Request::post("/charges").header(&KEY, "k").body(full_body("same")).unwrap();
        stream.send("one").unwrap();
        let mut body = with_timeout(service.call(request)).await.unwrap().into_body();
        assert_eq!(next_frame(&mut body).await, "one");
        if closed {
            server.store.fail_with(Error::Closed);
        }
        stream.send("two").unwrap();
        let expected = if closed { ["aborted", "end"] } else { ["two", "end"] };
        assert_eq!([next_frame(&mut body).await, next_frame(&mut body).await], expected);
        assert_eq!(layer.stats().stored, u64::from(!closed));
    }
}

/// A service that calls a function and responds at once.
#[derive(Clone)]
struct ImmediateService<F>(F);

impl<F, R, B> Service<Request<onlyonce_http::Body<B>>> for ImmediateService<F>
where
    F: Fn() -> http::Response<R>,
{
    type Response = http::Response<R>;
    type Error = std::convert::Infallible;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<onlyonce_http::Body<B>>) -> Self::Future {
        std::future::ready(Ok((self.0)()))
    }
}
