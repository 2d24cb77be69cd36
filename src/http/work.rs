//! The work on a request: the handler, under a lease that is kept alive, and its answer, stored.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use http::response::Parts;
use http::{Request, Response};
use tokio::sync::oneshot;
use tower_service::Service;

use super::attempt::Attempt;
use super::body::{Body, BoxError, Read, Reading, read_in};
use super::fate::{self, Fate};
use super::guard::{Guard, OnStoreFailure};
use super::problem::Problem;
use super::stored::StoredResponse;
use super::stream::{self, End};
use crate::error::Error;
use crate::future::{KeepAlive, Lease};
use crate::tx::Tx;

/// Takes the head of an answer that goes through as it comes, before its end.
pub(super) type Head<R> = oneshot::Sender<Response<Body<R>>>;

/// What came of a handler.
enum Handled<R> {
    /// How the client gets its answer, and what a retry gets.
    Done(Reply<R>, StoredResponse),
    Undone(Fate, Response<Body<R>>),
    BrokenOff(BoxError),
}

/// What a client gets of an answer that is stored.
enum Reply<R> {
    Whole(Response<Body<R>>),
    /// It has all but the end.
    End(End),
}

/// Runs the handler and settles the lease. Dropped or unwound anywhere, it drops the lease: interrupted work.
///
/// Gives the answer, unless its head was sent to `head`.
pub(super) async fn work<S, B, R>(
    guard: &Guard,
    service: S,
    request: Request<Body<B>>,
    mut lease: Lease,
    head: Head<R>,
) -> Result<Option<Response<Body<R>>>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let attempt = request.extensions().get::<Attempt>().cloned();
    let handled = unless_overtaken(handle(guard, service, request, head), lease.keep_alive()).await;
    match handled {
        None => Ok(Some(guard.refuse(Problem::Overtaken))),
        Some(Err(error)) => {
            let before = fate::is_before_work(guard.options.explicit_begin, attempt.as_ref());
            undone(guard, lease, if before { Fate::Release } else { Fate::Interrupted }).await;
            Err(error)
        }
        Some(Ok(Handled::BrokenOff(error))) => {
            tracing::error!(key = %lease.key(), %error, "the body of an answer failed: outcome unknown");
            Ok(Some(guard.refuse(Problem::HandlerFailed)))
        }
        Some(Ok(Handled::Undone(fate, response))) => {
            undone(guard, lease, fate).await;
            Ok(Some(response))
        }
        Some(Ok(Handled::Done(reply, answer))) => {
            let tx = attempt.map(|attempt| attempt.take_tx()).unwrap_or_default();
            match (reply, store(guard, lease, answer, tx).await) {
                (Reply::Whole(response), Ok(())) => Ok(Some(response)),
                (Reply::End(end), Ok(())) => {
                    end.give().await;
                    Ok(None)
                }
                // A client that has all but the end gets none: its answer breaks off.
                (_, Err(problem)) => Ok(Some(guard.refuse(problem))),
            }
        }
    }
}

/// Ends an attempt whose answer is not stored.
async fn undone(guard: &Guard, lease: Lease, fate: Fate) {
    if fate != Fate::Release {
        guard.counters.interrupted.add(1);
        return;
    }
    guard.counters.released.add(1);
    if let Err(error) = lease.release().await {
        tracing::warn!(%error, "failed to release the key of a request that did nothing");
    }
}

async fn handle<S, B, R>(
    guard: &Guard,
    mut service: S,
    request: Request<Body<B>>,
    head: Head<R>,
) -> Result<Handled<R>, S::Error>
where
    S: Service<Request<Body<B>>, Response = Response<R>>,
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let options = &guard.options;
    let attempt = request.extensions().get::<Attempt>().cloned();
    let (parts, body) = service.call(request).await?.into_parts();
    let fate = fate::of(&parts, attempt.as_ref(), options.explicit_begin, |parts| (options.fate)(parts));
    if fate != Fate::Store {
        return Ok(Handled::Undone(fate, Response::from_parts(parts, Body::untouched(body))));
    }
    let read = if stream::is_declared(&parts) {
        Err(Reading::new(body))
    } else {
        read_in(body, guard.store.result_limit(), options.stream_after).await
    };
    let answer = |body| StoredResponse::of(&parts, body, |name| options.headers.contains(name));
    let (body, answer) = match read {
        Ok(Read::Whole(bytes)) => (Body::whole(bytes.clone()), answer(bytes)),
        Ok(Read::TooLarge(body)) => (body, answer(Bytes::new()).without_body()),
        Ok(Read::Broken(error)) => return Ok(Handled::BrokenOff(error)),
        Err(begun) => return Ok(pass_on(guard, parts, begun, head).await),
    };
    Ok(Handled::Done(Reply::Whole(Response::from_parts(parts, body)), answer))
}

/// Gives the client the head of an answer and its pieces as they come, all but the end.
async fn pass_on<R>(guard: &Guard, parts: Parts, mut answer: Reading<R>, head: Head<R>) -> Handled<R>
where
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    let options = &guard.options;
    guard.counters.streamed.add(1);
    let _counted = CountPanic(guard);
    let stored = StoredResponse::of(&parts, Bytes::new(), |name| options.headers.contains(name));
    let (client, pieces) = stream::channel();
    let read = std::mem::take(&mut answer.data).into_bytes();
    answer.data.push(read.clone());
    // A client that has gone is noticed when the first piece is sent.
    let _ = head.send(Response::from_parts(parts, Body::in_pieces(read, pieces)));
    match stream::pass_on(answer, guard.store.result_limit(), client, options.after_hang_up).await {
        Ok((end, Some(body))) => Handled::Done(Reply::End(end), stored.with_body(body)),
        Ok((end, None)) => Handled::Done(Reply::End(end), stored.without_body()),
        Err(error) => Handled::BrokenOff(error),
    }
}

/// Counts a panic that comes after the head of the answer: nothing waits for the task any more.
struct CountPanic<'a>(&'a Guard);

impl Drop for CountPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.counters.interrupted.add(1);
            tracing::error!("the body of an answer panicked: outcome unknown");
        }
    }
}

/// Completes the lease with as much of the answer as the store keeps, and what the handler has added.
///
/// # Errors
///
/// What the client gets in place of its answer.
async fn store(guard: &Guard, lease: Lease, answer: StoredResponse, tx: Tx) -> Result<(), Problem> {
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
        return Ok(());
    };
    if matches!(failed.error(), Error::Superseded { .. }) {
        return Err(Problem::Overtaken);
    }
    tracing::error!(error = %failed.error(), "a request was processed, but its answer could not be stored");
    match guard.options.on_store_failure {
        // Its messages are not stored either, and only another attempt can bring them back.
        OnStoreFailure::FailOpen if takes_along => Err(Problem::AnswerNotStored),
        OnStoreFailure::FailClosed => Err(Problem::AnswerNotStored),
        OnStoreFailure::FailOpen => {
            guard.count_fail_open();
            Ok(())
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
