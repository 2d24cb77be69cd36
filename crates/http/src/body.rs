//! Request and response bodies: buffered up to a limit, or forwarded.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

/// The error type of bodies.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request as the handler gets it, or of a response as the layer sends it: buffered bytes, followed by the
/// unread rest of a body `B` or by the frames of a body that the layer forwards.
///
/// The layer buffers the body of a guarded request completely; its trailers are dropped. Other bodies are passed through.
pub struct Body<B> {
    buffered: Option<Bytes>,
    rest: Rest<B>,
}

enum Rest<B> {
    Empty,
    Unread(Pin<Box<B>>),
    Channel(mpsc::Receiver<StreamItem>),
}

/// An item of a forwarded response body. A channel that closes without `End` marks an aborted response.
pub(crate) enum StreamItem {
    Frame(Frame<Bytes>),
    End,
}

impl<B> Body<B> {
    pub(crate) fn full(bytes: Bytes) -> Self {
        Self { buffered: Some(bytes).filter(|bytes| !bytes.is_empty()), rest: Rest::Empty }
    }

    pub(crate) fn unread(body: B) -> Self {
        Self { buffered: None, rest: Rest::Unread(Box::pin(body)) }
    }

    /// Buffered bytes, followed by the frames that another task sends.
    pub(crate) fn streaming(buffered: Bytes, items: mpsc::Receiver<StreamItem>) -> Self {
        Self { buffered: Some(buffered).filter(|bytes| !bytes.is_empty()), rest: Rest::Channel(items) }
    }
}

impl<B> http_body::Body for Body<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(buffered) = self.buffered.take() {
            return Poll::Ready(Some(Ok(Frame::data(buffered))));
        }
        match &mut self.rest {
            Rest::Unread(rest) => rest.as_mut().poll_frame(context).map_err(Into::into),
            Rest::Channel(items) => {
                let item = ready!(items.poll_recv(context));
                if let Some(StreamItem::Frame(frame)) = item {
                    return Poll::Ready(Some(Ok(frame)));
                }
                self.rest = Rest::Empty;
                // Without `End` the client must see an aborted response, not a short one.
                Poll::Ready(item.is_none().then(|| Err("the response was aborted before its end".into())))
            }
            Rest::Empty => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.buffered.is_none()
            && match &self.rest {
                Rest::Empty => true,
                Rest::Unread(rest) => rest.is_end_stream(),
                Rest::Channel(_) => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let buffered = self.buffered.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let rest = match &self.rest {
            Rest::Empty => SizeHint::with_exact(0),
            Rest::Unread(rest) => rest.size_hint(),
            Rest::Channel(_) => SizeHint::new(),
        };
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(buffered));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(buffered));
        }
        hint
    }
}

impl<B> fmt::Debug for Body<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("buffered", &self.buffered.as_ref().map(Bytes::len)).finish_non_exhaustive()
    }
}

/// Collects the data frames of a body.
#[derive(Default)]
pub(crate) struct Buffer {
    // Most bodies have a single frame, which is kept without a copy.
    first: Bytes,
    all: BytesMut,
}

impl Buffer {
    pub(crate) fn len(&self) -> usize {
        self.first.len().saturating_add(self.all.len())
    }

    pub(crate) fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.first = data;
        } else {
            self.all.extend_from_slice(&std::mem::take(&mut self.first));
            self.all.extend_from_slice(&data);
        }
    }

    pub(crate) fn into_bytes(self) -> Bytes {
        if self.all.is_empty() { self.first } else { self.all.freeze() }
    }
}

/// The result of buffering a body.
pub(crate) enum Buffered<B> {
    Complete(Bytes),
    /// The body exceeds the limit: the bytes read so far, and the rest.
    TooLarge(Body<B>),
    Failed(BoxError),
}

/// Buffers a body of at most `limit` bytes. A body whose size hint exceeds the limit is not read.
pub(crate) async fn buffer<B>(body: B, limit: usize) -> Buffered<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    if body.size_hint().lower() > limit as u64 {
        return Buffered::TooLarge(Body::unread(body));
    }
    let mut partial = PartialBody::new(body);
    match partial.read_to_end(limit).await {
        Ok(true) => Buffered::Complete(partial.buffer.into_bytes()),
        Ok(false) => Buffered::TooLarge(partial.into_body()),
        Err(error) => Buffered::Failed(error),
    }
}

/// As [`buffer`], for at most `time`. Returns the partly read body after that.
pub(crate) async fn buffer_within<B>(body: B, limit: usize, time: Duration) -> Result<Buffered<B>, PartialBody<B>>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    if body.size_hint().lower() > limit as u64 {
        return Ok(Buffered::TooLarge(Body::unread(body)));
    }
    let mut partial = PartialBody::new(body);
    match tokio::time::timeout(time, partial.read_to_end(limit)).await {
        Ok(Ok(true)) => Ok(Buffered::Complete(partial.buffer.into_bytes())),
        Ok(Ok(false)) => Ok(Buffered::TooLarge(partial.into_body())),
        Ok(Err(error)) => Ok(Buffered::Failed(error)),
        Err(_elapsed) => Err(partial),
    }
}

pub(crate) async fn next_frame<B>(body: &mut Pin<Box<B>>) -> Option<Result<Frame<Bytes>, BoxError>>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    body.frame().await.map(|frame| frame.map_err(Into::into))
}

/// A partly read body.
pub(crate) struct PartialBody<B> {
    pub(crate) buffer: Buffer,
    pub(crate) rest: Pin<Box<B>>,
}

impl<B> PartialBody<B> {
    pub(crate) fn new(body: B) -> Self {
        Self { buffer: Buffer::default(), rest: Box::pin(body) }
    }

    fn into_body(self) -> Body<B> {
        Body { buffered: Some(self.buffer.into_bytes()), rest: Rest::Unread(self.rest) }
    }
}

impl<B> PartialBody<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// Reads to the end and returns true, or returns false after more than `limit` bytes. Cancel-safe.
    async fn read_to_end(&mut self, limit: usize) -> Result<bool, BoxError> {
        while let Some(frame) = next_frame(&mut self.rest).await {
            // Trailers are dropped.
            if let Ok(data) = frame?.into_data() {
                self.buffer.push(data);
            }
            if self.buffer.len() > limit {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
