//! Answers that go through as they come, because they may last, and are kept for a retry all the same.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::response::Parts;
use http_body::Frame;
use tokio::sync::mpsc;

use super::body::{BoxError, Data, Piece, Reading, next};

/// Types of content that are sent as they arise.
const STREAMS: [&str; 5] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/jsonl",
    "application/json-seq",
    "multipart/x-mixed-replace",
];

/// Pieces on their way to a client that is slow.
const AHEAD: usize = 4;

/// Whether an answer says that it is a stream.
pub(super) fn is_declared(response: &Parts) -> bool {
    let Some(Ok(value)) = response.headers.get(CONTENT_TYPE).map(|value| value.to_str()) else { return false };
    let kind = value.split(';').next().unwrap_or_default().trim();
    STREAMS.iter().any(|stream| stream.eq_ignore_ascii_case(kind))
}

/// The way to the client, and what comes out of it there.
pub(super) fn channel() -> (mpsc::Sender<Piece>, mpsc::Receiver<Piece>) {
    mpsc::channel(AHEAD)
}

/// The end of an answer that went through. Dropped, it leaves the client with an answer that broke off.
pub(super) struct End {
    client: mpsc::Sender<Piece>,
    last: Option<Frame<Bytes>>,
}

impl End {
    /// Lets the client have the end.
    pub(super) async fn give(self) {
        // A client that has gone needs none.
        if let Some(last) = self.last
            && self.client.send(Piece::Frame(last)).await.is_err()
        {
            return;
        }
        let _ = self.client.send(Piece::End).await;
    }
}

/// Passes an answer on as it comes, but for its end. Gives the end and, where it has no more than `limit` bytes, the whole
/// of it.
///
/// A client that hangs up does not end it: for `after_hang_up` it is read on.
///
/// # Errors
///
/// The body's own, and one that says that the client has gone and the answer has not ended in time.
pub(super) async fn pass_on<B>(
    answer: Reading<B>,
    limit: usize,
    client: mpsc::Sender<Piece>,
    after_hang_up: Duration,
) -> Result<(End, Option<Bytes>), BoxError>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let Reading { data, mut rest } = answer;
    let mut kept = Kept { data: Some(data), limit };
    while let Some(frame) = unless_gone(&client, next(&mut rest)).await {
        let Some(frame) = frame else { return Ok((End { client, last: None }, kept.into_bytes())) };
        let frame = frame?;
        kept.add(&frame);
        // Where the length is known, the client takes the last piece for the end.
        if rest.is_end_stream() {
            return Ok((End { client, last: Some(frame) }, kept.into_bytes()));
        }
        if client.send(Piece::Frame(frame)).await.is_err() {
            break;
        }
    }
    match tokio::time::timeout(after_hang_up, read_on(rest, &mut kept)).await {
        Ok(ended) => ended.map(|()| (End { client, last: None }, kept.into_bytes())),
        Err(_over) => Err("its client hung up, and it did not end".into()),
    }
}

/// Reads to the end without a client, for a retry.
async fn read_on<B>(mut rest: Pin<Box<B>>, kept: &mut Kept) -> Result<(), BoxError>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    while !rest.is_end_stream()
        && let Some(frame) = next(&mut rest).await
    {
        kept.add(&frame?);
        // An answer that is always ready must not keep the thread, nor outlast its time.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// `None` when the client has gone before the work is done.
async fn unless_gone<F: Future>(client: &mpsc::Sender<Piece>, work: F) -> Option<F::Output> {
    let (mut work, mut gone) = (pin!(work), pin!(client.closed()));
    std::future::poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => gone.as_mut().poll(context).map(|()| None),
    })
    .await
}

/// What of an answer is kept for a retry: all of it, or nothing.
struct Kept {
    data: Option<Data>,
    limit: usize,
}

impl Kept {
    fn add(&mut self, frame: &Frame<Bytes>) {
        let (Some(data), Some(bytes)) = (&mut self.data, frame.data_ref()) else { return };
        if data.len().saturating_add(bytes.len()) > self.limit {
            self.data = None;
        } else {
            data.push(bytes.clone());
        }
    }

    fn into_bytes(self) -> Option<Bytes> {
        self.data.map(Data::into_bytes)
    }
}
