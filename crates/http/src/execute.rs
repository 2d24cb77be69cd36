//! Runs the handler under a renewed lease, and stores its response.

use bytes::Bytes;
use http::response::Parts;
use http::{Request, Response};
use onlyonce_core::{Completion, EngineLease, Error, OnStoreFailure, Release, SideWrites};
use tokio::sync::oneshot;
use tower_service::Service;

use crate::attempt::Attempt;
use crate::body::{Body, BoxError, Buffered, PartialBody, buffer_within};
use crate::context::LayerContext;
use crate::disposition::{self, Disposition};
use crate::event::Event;
use crate::problem::Problem;
use crate::stored::StoredResponse;
use crate::stream::{self, StreamEnd};

/// Passes the head of a streamed response to the client's task.
pub(crate) type HeadSender<R> = oneshot::Sender<Response<Body<R>>>;

enum HandlerOutcome<R> {
    /// The response is to be stored: the reply to this client, and the stored form for retries.
    Store(Reply<R>, StoredResponse),
    Discard(Disposition, Response<Body<R>>),
    BodyFailed(BoxError),
}

/// What the client gets once the response is stored.
enum Reply<R> {
    Complete(Response<Body<R>>),
    /// The client has everything but the end of the stream.
    End(StreamEnd),
}

/// Runs the handler and finishes the lease. If this future is dropped or panics, the lease is dropped: the attempt counts as
/// interrupted.
///
/// Returns the response, or `None` if its head was sent to `head`.
pub(crate) async fn execute<S, B, R>(
    context: &LayerContext,
    service: S,
    request: Request<Body<B>>,
    mut lease: EngineLease,
    head: HeadSender<R>,
) -> Result<Option<Response<Body<R>>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let attempt = request.extensions().get::<Attempt>().cloned();
    // An error here means that the lease was lost: the handler was dropped at its current await.
    let Ok(outcome) = lease.during(handle(context, service, request, head)).await else {
        return Ok(Some(context.reject(Problem::Superseded)));
    };
    match outcome {
        Err(error) => {
            let not_begun = disposition::failed_before_begin(context.options.explicit_begin, attempt.as_ref());
            discard(context, lease, if not_begun { Disposition::Release } else { Disposition::Interrupted }).await;
            Err(error)
        }
        Ok(HandlerOutcome::BodyFailed(error)) => {
            tracing::error!(key = %lease.key(), %error, "response body failed: outcome unknown");
            Ok(Some(context.reject(Problem::HandlerFailed)))
        }
        Ok(HandlerOutcome::Discard(disposition, response)) => {
            discard(context, lease, disposition).await;
            Ok(Some(response))
        }
        Ok(HandlerOutcome::Store(reply, stored)) => {
            let side_writes = attempt.map(|attempt| attempt.take_side_writes()).unwrap_or_default();
            match (reply, complete(context, lease, stored, side_writes).await) {
                (Reply::Complete(response), Ok(())) => Ok(Some(response)),
                (Reply::End(end), Ok(())) => {
                    end.send().await;
                    Ok(None)
                }
                // A stream whose end was not sent is aborted when `end` is dropped here.
                (_, Err(problem)) => Ok(Some(context.reject(problem))),
            }
        }
    }
}

/// Finishes an attempt whose response is not stored.
async fn discard(context: &LayerContext, lease: EngineLease, disposition: Disposition) {
    if disposition != Disposition::Release {
        context.counters.count(Event::Interrupted);
        return;
    }
    context.counters.count(Event::Released);
    if let Err(error) = lease.release(Release::default()).await {
        tracing::warn!(error = error.chain(), "failed to release the key of a request without effect");
    }
}

async fn handle<S, B, R>(
    context: &LayerContext,
    mut service: S,
    request: Request<Body<B>>,
    head: HeadSender<R>,
) -> Result<HandlerOutcome<R>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let options = &context.options;
    let attempt = request.extensions().get::<Attempt>().cloned();
    let (parts, body) = service.call(request).await?.into_parts();
    let disposition =
        disposition::decide(&parts, attempt.as_ref(), options.explicit_begin, |parts| (options.disposition)(parts));
    if disposition != Disposition::Store {
        return Ok(HandlerOutcome::Discard(disposition, Response::from_parts(parts, Body::unread(body))));
    }
    let buffered = if stream::is_declared(&parts) {
        Err(PartialBody::new(body))
    } else {
        buffer_within(body, context.engine.limits().result_bytes, options.stream_after).await
    };
    let stored = |body| StoredResponse::filtered(&parts, body, |name| options.headers.contains(name));
    let (body, stored) = match buffered {
        Ok(Buffered::Complete(bytes)) => (Body::full(bytes.clone()), stored(bytes)),
        Ok(Buffered::TooLarge(body)) => (body, stored(Bytes::new()).without_body()),
        Ok(Buffered::Failed(error)) => return Ok(HandlerOutcome::BodyFailed(error)),
        Err(partial) => return Ok(forward(context, parts, partial, head).await),
    };
    Ok(HandlerOutcome::Store(Reply::Complete(Response::from_parts(parts, body)), stored))
}

/// Sends the head to the client, then each frame as it arrives, except the end.
async fn forward<R>(
    context: &LayerContext,
    parts: Parts,
    mut body: PartialBody<R>,
    head: HeadSender<R>,
) -> HandlerOutcome<R>
where
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let options = &context.options;
    context.counters.count(Event::Streamed);
    let _count_panic = CountPanic(context);
    let stored = StoredResponse::filtered(&parts, Bytes::new(), |name| options.headers.contains(name));
    let (client, items) = stream::channel();
    let buffered = std::mem::take(&mut body.buffer).into_bytes();
    body.buffer.push(buffered.clone());
    // `stream::forward` detects a disconnected client.
    let _ = head.send(Response::from_parts(parts, Body::streaming(buffered, items)));
    match stream::forward(body, context.engine.limits().result_bytes, client, options.after_disconnect).await {
        Ok((end, Some(body))) => HandlerOutcome::Store(Reply::End(end), stored.with_body(body)),
        Ok((end, None)) => HandlerOutcome::Store(Reply::End(end), stored.without_body()),
        Err(error) => HandlerOutcome::BodyFailed(error),
    }
}

/// Counts a panic after the head was sent: then no task joins this one.
struct CountPanic<'a>(&'a LayerContext);

impl Drop for CountPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.counters.count(Event::Interrupted);
            tracing::error!("response body panicked: outcome unknown");
        }
    }
}

/// Completes the lease with the response, or with as much of it as fits the store's limit, and with the handler's side
/// writes.
///
/// # Errors
///
/// The problem that the client gets instead of the response.
async fn complete(
    context: &LayerContext,
    lease: EngineLease,
    response: StoredResponse,
    side_writes: SideWrites,
) -> Result<(), Problem> {
    let (bytes, has_body) = encode_within(context.engine.limits().result_bytes, response);
    let has_side_writes = !side_writes.is_empty();
    let completion = Completion::new(bytes).with_side_writes(side_writes);
    let Err(error) = lease.complete(completion).await else {
        context.counters.count(Event::Stored);
        if !has_body {
            context.counters.count(Event::BodyNotStored);
        }
        return Ok(());
    };
    if matches!(error, Error::Superseded { .. }) {
        return Err(Problem::Superseded);
    }
    tracing::error!(error = error.chain(), "failed to store the response of a processed request");
    match context.options.on_store_failure {
        // The side writes are lost, too, and only another attempt can repeat them.
        OnStoreFailure::FailOpen if has_side_writes => Err(Problem::OutcomeNotStored),
        OnStoreFailure::FailClosed => Err(Problem::OutcomeNotStored),
        OnStoreFailure::FailOpen => {
            context.count_fail_open();
            Ok(())
        }
    }
}

/// Encodes the whole response, else status and headers, else the status. Also returns whether the body is included.
fn encode_within(limit: usize, response: StoredResponse) -> (Vec<u8>, bool) {
    let bytes = response.encode();
    if bytes.len() <= limit {
        return (bytes, response.body().is_some());
    }
    let head = response.without_body();
    let bytes = head.encode();
    (if bytes.len() <= limit { bytes } else { head.status_only().encode() }, false)
}
