//! Forwards response bodies that may last long, and keeps a copy for retries.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::response::Parts;
use http_body::Frame;
use tokio::sync::mpsc;

use crate::body::{BoxError, Buffer, PartialBody, StreamItem, next_frame};

/// Content types that declare a stream.
const STREAM_TYPES: [&str; 5] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/jsonl",
    "application/json-seq",
    "multipart/x-mixed-replace",
];

/// Frames that are buffered for a slow client.
const CHANNEL_CAPACITY: usize = 4;

/// Returns whether the `Content-Type` declares a stream.
pub(crate) fn is_declared(response: &Parts) -> bool {
    let Some(Ok(value)) = response.headers.get(CONTENT_TYPE).map(|value| value.to_str()) else { return false };
    let content_type = value.split(';').next().unwrap_or_default().trim();
    STREAM_TYPES.iter().any(|stream| stream.eq_ignore_ascii_case(content_type))
}

pub(crate) fn channel() -> (mpsc::Sender<StreamItem>, mpsc::Receiver<StreamItem>) {
    mpsc::channel(CHANNEL_CAPACITY)
}

/// The end of a forwarded response. Dropping it unsent aborts the client's response.
pub(crate) struct StreamEnd {
    client: mpsc::Sender<StreamItem>,
    last: Option<Frame<Bytes>>,
}

impl StreamEnd {
    pub(crate) async fn send(self) {
        // An error means that the client has disconnected.
        if let Some(last) = self.last
            && self.client.send(StreamItem::Frame(last)).await.is_err()
        {
            return;
        }
        let _ = self.client.send(StreamItem::End).await;
    }
}

/// Forwards a body frame by frame, except its end. Returns the end, and the complete body if it has at most `limit` bytes.
///
/// After the client disconnects, reads on for at most `after_disconnect`.
///
/// # Errors
///
/// The error of the body, or a disconnected client whose response does not end in time.
pub(crate) async fn forward<B>(
    body: PartialBody<B>,
    limit: usize,
    client: mpsc::Sender<StreamItem>,
    after_disconnect: Duration,
) -> Result<(StreamEnd, Option<Bytes>), BoxError>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let PartialBody { buffer, mut rest } = body;
    let mut copy = BoundedCopy { buffer: Some(buffer), limit };
    while let Some(frame) = until_disconnect(&client, next_frame(&mut rest)).await {
        let Some(frame) = frame else { return Ok((StreamEnd { client, last: None }, copy.into_bytes())) };
        let frame = frame?;
        copy.add(&frame);
        // With a known length, the client treats the last frame as the end: hold it back.
        if rest.is_end_stream() {
            return Ok((StreamEnd { client, last: Some(frame) }, copy.into_bytes()));
        }
        if client.send(StreamItem::Frame(frame)).await.is_err() {
            break;
        }
    }
    match tokio::time::timeout(after_disconnect, read_to_end(rest, &mut copy)).await {
        Ok(ended) => ended.map(|()| (StreamEnd { client, last: None }, copy.into_bytes())),
        Err(_elapsed) => Err("the client disconnected and the response did not end in time".into()),
    }
}

/// Reads the rest of a body whose client has disconnected.
async fn read_to_end<B>(mut rest: Pin<Box<B>>, copy: &mut BoundedCopy) -> Result<(), BoxError>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    while !rest.is_end_stream()
        && let Some(frame) = next_frame(&mut rest).await
    {
        copy.add(&frame?);
        // A body that is always ready would block the thread and outlast the timeout.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// Returns `None` if the client disconnects before `work` is done.
async fn until_disconnect<F: Future>(client: &mpsc::Sender<StreamItem>, work: F) -> Option<F::Output> {
    let (mut work, mut closed) = (pin!(work), pin!(client.closed()));
    std::future::poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => closed.as_mut().poll(context).map(|()| None),
    })
    .await
}

/// A copy of the forwarded bytes, or `None` once they exceed the limit.
struct BoundedCopy {
    buffer: Option<Buffer>,
    limit: usize,
}

impl BoundedCopy {
    fn add(&mut self, frame: &Frame<Bytes>) {
        let (Some(buffer), Some(bytes)) = (&mut self.buffer, frame.data_ref()) else { return };
        if buffer.len().saturating_add(bytes.len()) > self.limit {
            self.buffer = None;
        } else {
            buffer.push(bytes.clone());
        }
    }

    fn into_bytes(self) -> Option<Bytes> {
        self.buffer.map(Buffer::into_bytes)
    }
}
