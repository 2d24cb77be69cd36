//! What a layer and its services share: the store, the scope and the choices.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::request;
use http::response;
use http::{Method, Response, StatusCode, Uri};

use super::attempt::Fate;
use super::body::Body;
use super::figures::{AtWork, Counters};
use super::problem::Problem;
use crate::future::Store;

/// What becomes of requests under a key while the store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStoreFailure {
    /// They are answered with 503 and no handler runs. So is a request that was worked on and whose answer could not be
    /// stored: the client retries with the same key, and the handler is told. No answer is given that a retry would not
    /// get again.
    FailClosed,
    /// They run without protection, and each is counted in [`Figures::failed_open`](super::Figures::failed_open): a retry
    /// runs again, and two at once run both. An answer that could not be stored is given all the same.
    FailOpen,
}

pub(super) type Scope = Arc<dyn Fn(&request::Parts) -> Option<Vec<u8>> + Send + Sync>;

#[derive(Clone)]
pub(super) struct Options {
    pub(super) key_header: HeaderName,
    pub(super) key_limit: usize,
    pub(super) key_form: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    pub(super) key_required: bool,
    pub(super) methods: Vec<Method>,
    pub(super) body_limit: usize,
    pub(super) headers: Vec<HeaderName>,
    pub(super) fate: Arc<dyn Fn(&response::Parts) -> Fate + Send + Sync>,
    pub(super) wait: Duration,
    pub(super) retry_after: Duration,
    pub(super) on_store_failure: OnStoreFailure,
    pub(super) documentation: Option<Uri>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key_header: HeaderName::from_static("idempotency-key"),
            key_limit: 255,
            key_form: Arc::new(|_| true),
            key_required: true,
            methods: vec![Method::POST, Method::PATCH],
            body_limit: 1 << 20,
            headers: vec![
                header::CACHE_CONTROL,
                header::CONTENT_DISPOSITION,
                header::CONTENT_ENCODING,
                header::CONTENT_LANGUAGE,
                header::CONTENT_LOCATION,
                header::CONTENT_TYPE,
                header::ETAG,
                header::LAST_MODIFIED,
                header::LINK,
                header::LOCATION,
                header::VARY,
            ],
            fate: Arc::new(|response| fate_of(response.status)),
            wait: Duration::ZERO,
            retry_after: Duration::from_secs(5),
            on_store_failure: OnStoreFailure::FailClosed,
            documentation: None,
        }
    }
}

/// What a status says of the work, where nothing else is said. A server's error says nothing: a charge may have been made
/// before it.
fn fate_of(status: StatusCode) -> Fate {
    if status == StatusCode::TOO_MANY_REQUESTS {
        Fate::Release
    } else if status.is_server_error() {
        Fate::Interrupted
    } else {
        Fate::Store
    }
}

#[derive(Clone)]
pub(super) struct Guard {
    pub(super) store: Store,
    /// `None` where all callers share one.
    pub(super) scope: Option<Scope>,
    pub(super) options: Options,
    pub(super) counters: Arc<Counters>,
    pub(super) at_work: AtWork,
}

impl Guard {
    pub(super) fn new(store: Store, scope: Option<Scope>) -> Self {
        Self { store, scope, options: Options::default(), counters: Arc::default(), at_work: AtWork::new() }
    }

    /// The answer that says what is wrong, counted.
    pub(super) fn refuse<R>(&self, problem: Problem) -> Response<Body<R>> {
        let counters = &self.counters;
        let counter = match problem {
            Problem::KeyMissing
            | Problem::KeyMalformed(_)
            | Problem::KeyTooLong { .. }
            | Problem::ScopeMissing
            | Problem::BodyBroken
            | Problem::BodyTooLarge { .. } => &counters.refused,
            Problem::KeyReused => &counters.mismatched,
            Problem::Outstanding { .. } | Problem::Held => &counters.outstanding,
            Problem::StoreFailed { .. } | Problem::AnswerNotStored => &counters.failed_closed,
            Problem::Overtaken | Problem::HandlerFailed => &counters.interrupted,
            Problem::AnswerNotKept { .. } | Problem::AnswerUnreadable => &counters.replayed,
        };
        counter.add(1);
        self.problem(problem).map(Body::whole)
    }

    /// A request is answered without protection.
    pub(super) fn count_fail_open(&self) {
        self.counters.failed_open.add(1);
        self.store.count_fail_open();
    }

    pub(super) fn problem(&self, problem: Problem) -> Response<Bytes> {
        problem.response(self.options.documentation.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_all_is_stored_but_429_and_5xx() {
        for status in [200, 201, 204, 302, 400, 402, 404, 408, 409, 422, 499] {
            assert_eq!(fate_of(StatusCode::from_u16(status).unwrap()), Fate::Store, "{status}");
        }
        assert_eq!(fate_of(StatusCode::TOO_MANY_REQUESTS), Fate::Release);
        for status in [500, 502, 503, 504, 599] {
            assert_eq!(fate_of(StatusCode::from_u16(status).unwrap()), Fate::Interrupted, "{status}");
        }
    }
}
