//! Bodies: read up to a limit, and passed on.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request that the handler gets, or of a response that the layer gives: bytes that were read, then what
/// was not read of a body `B`, or what comes of a body that the layer reads on itself.
///
/// A request under a key was read as a whole; all else is passed on as it comes. The trailers of a body that was read as a
/// whole are gone.
pub struct Body<B> {
    read: Option<Bytes>,
    rest: Rest<B>,
}

enum Rest<B> {
    Nothing,
    Unread(Pin<Box<B>>),
    Pieces(mpsc::Receiver<Piece>),
}

/// What is sent to the body of an answer that another task reads. A sender that is dropped without the end says that the
/// answer is not whole.
pub(super) enum Piece {
    Frame(Frame<Bytes>),
    End,
}

impl<B> Body<B> {
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { read: Some(bytes).filter(|bytes| !bytes.is_empty()), rest: Rest::Nothing }
    }

    pub(super) fn untouched(body: B) -> Self {
        Self { read: None, rest: Rest::Unread(Box::pin(body)) }
    }

    /// What was read, and what another task reads.
    pub(super) fn in_pieces(read: Bytes, pieces: mpsc::Receiver<Piece>) -> Self {
        Self { read: Some(read).filter(|bytes| !bytes.is_empty()), rest: Rest::Pieces(pieces) }
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
        if let Some(read) = self.read.take() {
            return Poll::Ready(Some(Ok(Frame::data(read))));
        }
        match &mut self.rest {
            Rest::Unread(rest) => rest.as_mut().poll_frame(context).map_err(Into::into),
            Rest::Pieces(pieces) => {
                let piece = ready!(pieces.poll_recv(context));
                if let Some(Piece::Frame(frame)) = piece {
                    return Poll::Ready(Some(Ok(frame)));
                }
                self.rest = Rest::Nothing;
                // Without the end the client must not take what it has for the whole answer.
                Poll::Ready(piece.is_none().then(|| Err("the answer broke off before its end".into())))
            }
            Rest::Nothing => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_none()
            && match &self.rest {
                Rest::Nothing => true,
                Rest::Unread(rest) => rest.is_end_stream(),
                Rest::Pieces(_) => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.read.as_ref().map_or(0, |read| read.len() as u64);
        let rest = match &self.rest {
            Rest::Nothing => SizeHint::with_exact(0),
            Rest::Unread(rest) => rest.size_hint(),
            Rest::Pieces(_) => SizeHint::new(),
        };
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(read));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint
    }
}

impl<B> fmt::Debug for Body<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("read", &self.read.as_ref().map(Bytes::len)).finish_non_exhaustive()
    }
}

/// The data of a body, one after the other.
#[derive(Default)]
pub(super) struct Data {
    // Most bodies come in one piece, which need not be copied.
    first: Bytes,
    all: BytesMut,
}

impl Data {
    pub(super) fn len(&self) -> usize {
        self.first.len().saturating_add(self.all.len())
    }

    pub(super) fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.first = data;
        } else {
            self.all.extend_from_slice(&std::mem::take(&mut self.first));
            self.all.extend_from_slice(&data);
        }
    }

    pub(super) fn into_bytes(self) -> Bytes {
        if self.all.is_empty() { self.first } else { self.all.freeze() }
    }
}

/// What reading a body came to.
pub(super) enum Read<B> {
    Whole(Bytes),
    /// It is over the limit: what was read, and the rest.
    TooLarge(Body<B>),
    Broken(BoxError),
}

/// Reads a body unless it has more than `limit` bytes. One that says so beforehand is not touched.
pub(super) async fn read<B>(body: B, limit: usize) -> Read<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    if body.size_hint().lower() > limit as u64 {
        return Read::TooLarge(Body::untouched(body));
    }
    let mut reading = Reading::new(body);
    match reading.read_to_end(limit).await {
        Ok(true) => Read::Whole(reading.data.into_bytes()),
        Ok(false) => Read::TooLarge(reading.into_body()),
        Err(error) => Read::Broken(error),
    }
}

/// As [`read`], for `time` at most: gives up what it has read and the rest when that is over.
pub(super) async fn read_in<B>(body: B, limit: usize, time: Duration) -> Result<Read<B>, Reading<B>>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    if body.size_hint().lower() > limit as u64 {
        return Ok(Read::TooLarge(Body::untouched(body)));
    }
    let mut reading = Reading::new(body);
    match tokio::time::timeout(time, reading.read_to_end(limit)).await {
        Ok(Ok(true)) => Ok(Read::Whole(reading.data.into_bytes())),
        Ok(Ok(false)) => Ok(Read::TooLarge(reading.into_body())),
        Ok(Err(error)) => Ok(Read::Broken(error)),
        Err(_over) => Err(reading),
    }
}

/// What a body has next.
pub(super) async fn next<B>(body: &mut Pin<Box<B>>) -> Option<Result<Frame<Bytes>, BoxError>>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    body.frame().await.map(|frame| frame.map_err(Into::into))
}

/// A body that was read in part.
pub(super) struct Reading<B> {
    pub(super) data: Data,
    pub(super) rest: Pin<Box<B>>,
}

impl<B> Reading<B> {
    pub(super) fn new(body: B) -> Self {
        Self { data: Data::default(), rest: Box::pin(body) }
    }

    fn into_body(self) -> Body<B> {
        Body { read: Some(self.data.into_bytes()), rest: Rest::Unread(self.rest) }
    }
}

impl<B> Reading<B>
where
    B: http_body::Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    /// Reads to the end, which is true, or until there is more than the limit. Loses nothing where it is dropped.
    async fn read_to_end(&mut self, limit: usize) -> Result<bool, BoxError> {
        while let Some(frame) = next(&mut self.rest).await {
            // Trailers are left out.
            if let Ok(data) = frame?.into_data() {
                self.data.push(data);
            }
            if self.data.len() > limit {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
