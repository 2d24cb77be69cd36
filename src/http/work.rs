//! The work on a request: the handler, under a lease that is kept alive, and its answer, stored.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use http::{Request, Response};
use tower_service::Service;

use super::attempt::{Attempt, Fate};
use super::body::{Body, BoxError, Read, read};
use super::guard::{Guard, OnStoreFailure};
use super::problem::Problem;
use super::stored::StoredResponse;
use crate::error::Error;
use crate::future::{KeepAlive, Lease};
use crate::tx::Tx;

/// What came of a handler.
enum Handled<R> {
    /// The answer, and what a retry gets.
    Done(Response<Body<R>>, StoredResponse),
    Undone(Fate, Response<Body<R>>),
    BrokenOff(BoxError),
}

/// Runs the handler and settles the lease. Dropped or unwound anywhere, it drops the lease: interrupted work.
pub(super) async fn work<S, B, R>(
    guard: &Guard,
    service: S,
    request: Request<Body<B>>,
    mut lease: Lease,
) -> Result<Response<Body<R>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let counters = &guard.counters;
    let attempt = request.extensions().get::<Attempt>().cloned();
    let handled = unless_overtaken(handle(guard, service, request), lease.keep_alive()).await;
    match handled {
        None => Ok(guard.refuse(Problem::Overtaken)),
        Some(Err(error)) => {
            counters.interrupted.add(1);
            Err(error)
        }
        Some(Ok(Handled::BrokenOff(error))) => {
            tracing::error!(key = %lease.key(), %error, "an answer broke off");
            Ok(guard.refuse(Problem::HandlerFailed))
        }
        Some(Ok(Handled::Undone(fate, response))) => {
            if fate == Fate::Release {
                counters.released.add(1);
                if let Err(error) = lease.release().await {
                    tracing::warn!(%error, "the key of a request that did nothing could not be released");
                }
            } else {
                counters.interrupted.add(1);
            }
            Ok(response)
        }
        Some(Ok(Handled::Done(response, answer))) => {
            let tx = attempt.map(|attempt| attempt.take_tx()).unwrap_or_default();
            Ok(store(guard, lease, response, answer, tx).await)
        }
    }
}

async fn handle<S, B, R>(guard: &Guard, mut service: S, request: Request<Body<B>>) -> Result<Handled<R>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let options = &guard.options;
    let (parts, body) = service.call(request).await?.into_parts();
    let said = parts.extensions.get::<Fate>().copied();
    let fate = said.unwrap_or_else(|| (options.fate)(&parts));
    if fate != Fate::Store {
        return Ok(Handled::Undone(fate, Response::from_parts(parts, Body::untouched(body))));
    }
    let answer = |body| StoredResponse::of(&parts, body, |name| options.headers.contains(name));
    let (body, answer) = match read(body, guard.store.result_limit()).await {
        Read::Whole(bytes) => (Body::whole(bytes.clone()), answer(bytes)),
        Read::TooLarge(body) => (body, answer(Bytes::new()).without_body()),
        Read::Broken(error) => return Ok(Handled::BrokenOff(error)),
    };
    Ok(Handled::Done(Response::from_parts(parts, body), answer))
}

/// Completes the lease with as much of the answer as the store keeps, and what the handler has added.
async fn store<R>(
    guard: &Guard,
    lease: Lease,
    response: Response<Body<R>>,
    answer: StoredResponse,
    tx: Tx,
) -> Response<Body<R>> {
    let counters = &guard.counters;
    let limit = guard.store.result_limit();
    let whole = answer.encode();
    let (bytes, body_kept) = if whole.len() <= limit {
        (whole, answer.body().is_some())
    } else {
        let head = answer.without_body();
        let bytes = head.encode();
        (if bytes.len() <= limit { bytes } else { head.status_alone().encode() }, false)
    };
    let takes_along = tx.len() > 0;
    let completed =
        if takes_along { lease.complete_with(bytes, |with| *with = tx).await } else { lease.complete(bytes).await };
    let Err(failed) = completed else {
        counters.stored.add(1);
        counters.bodies_not_kept.add(u64::from(!body_kept));
        return response;
    };
    if matches!(failed.error(), Error::Superseded { .. }) {
        return guard.refuse(Problem::Overtaken);
    }
    tracing::error!(error = %failed.error(), "a request was done and its answer could not be stored");
    match guard.options.on_store_failure {
        // Its messages are not stored either, and only another attempt can bring them back.
        OnStoreFailure::FailOpen if takes_along => guard.refuse(Problem::AnswerNotStored),
        OnStoreFailure::FailClosed => guard.refuse(Problem::AnswerNotStored),
        OnStoreFailure::FailOpen => {
            guard.count_fail_open();
            response
        }
    }
}

/// Does the work, unless somebody else gets the key meanwhile: then the work is theirs, and this one is dropped at its
/// await. A store that ends is no reason to leave a charge half done.
async fn unless_overtaken<F: Future>(work: F, mut alive: KeepAlive<'_>) -> Option<F::Output> {
    let mut work = pin!(work);
    let mut lost = pin!(alive.lost());
    let mut alone = true;
    std::future::poll_fn(|context| {
        // The work first: what is done is done.
        if let Poll::Ready(output) = work.as_mut().poll(context) {
            return Poll::Ready(Some(output));
        }
        if alone && let Poll::Ready(error) = lost.as_mut().poll(context) {
            if matches!(error, Error::Superseded { .. }) {
                return Poll::Ready(None);
            }
            alone = false;
        }
        Poll::Pending
    })
    .await
}
