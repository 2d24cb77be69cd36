//! Bodies: read up to a limit, and passed on.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

/// Any error of a body.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of a request that the handler gets, or of a response that the layer gives: bytes that were read, then what
/// was not read of a body `B`.
///
/// A request under a key was read as a whole; all else is passed on as it comes. The trailers of a body that was read as a
/// whole are gone.
pub struct Body<B> {
    read: Option<Bytes>,
    rest: Option<Pin<Box<B>>>,
}

impl<B> Body<B> {
    pub(super) fn whole(bytes: Bytes) -> Self {
        Self { read: Some(bytes).filter(|bytes| !bytes.is_empty()), rest: None }
    }

    pub(super) fn untouched(body: B) -> Self {
        Self { read: None, rest: Some(Box::pin(body)) }
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
            Some(rest) => rest.as_mut().poll_frame(context).map_err(Into::into),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_none() && self.rest.as_ref().is_none_or(|rest| rest.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.read.as_ref().map_or(0, |read| read.len() as u64);
        let rest = self.rest.as_ref().map_or_else(|| SizeHint::with_exact(0), |rest| rest.size_hint());
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
    let mut rest = Box::pin(body);
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = rest.frame().await {
        let data = match frame.map(Frame::into_data) {
            Ok(Ok(data)) => data,
            // Trailers.
            Ok(Err(_)) => continue,
            Err(error) => return Read::Broken(error.into()),
        };
        // Most bodies come in one piece, which need not be copied.
        if first.is_empty() && all.is_empty() {
            first = data;
        } else {
            all.extend_from_slice(&std::mem::take(&mut first));
            all.extend_from_slice(&data);
        }
        if first.len().saturating_add(all.len()) > limit {
            let read = if all.is_empty() { first } else { all.freeze() };
            return Read::TooLarge(Body { read: Some(read), rest: Some(rest) });
        }
    }
    Read::Whole(if all.is_empty() { first } else { all.freeze() })
}
