//! What a layer and its services share: the store, the scope and the choices.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::request;
use http::response;
use http::{Method, Response, Uri};

use super::body::Body;
use super::fate::{self, Fate};
use super::figures::{AtWork, Counters};
use super::fingerprint::RequestFingerprint;
use super::problem::Problem;
use crate::future::Store;

/// What becomes of requests under a key while the store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnStoreFailure {
    /// They are answered with 503 and no handler runs. So is a request that was worked on and whose answer could not be
    /// stored: the client retries with the same key, and
    /// [`Attempt::may_have_happened`](super::Attempt::may_have_happened) is true. No whole answer is given that a retry would
    /// not get again.
    FailClosed,
    /// They run without protection, and each is counted in [`Figures::failed_open`](super::Figures::failed_open): a retry
    /// runs again, and two at once run both. An answer that could not be stored is given all the same.
    FailOpen,
}

pub(super) type Scope = Arc<dyn Fn(&request::Parts) -> Option<Vec<u8>> + Send + Sync>;
pub(super) type KeyHook = Arc<dyn Fn(&request::Parts, &Bytes) -> Option<String> + Send + Sync>;
pub(super) type FingerprintHook = Arc<dyn Fn(&request::Parts, &Bytes) -> Vec<u8> + Send + Sync>;
pub(super) type ReplayHook = Arc<dyn Fn(&request::Parts, &Bytes, Response<Bytes>) -> Response<Bytes> + Send + Sync>;

/// Where a request has its key.
#[derive(Clone)]
pub(super) enum KeyFrom {
    Header(HeaderName),
    Request(KeyHook),
}

#[derive(Clone)]
pub(super) struct Options {
    pub(super) key_from: KeyFrom,
    pub(super) key_limit: usize,
    pub(super) key_form: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    pub(super) key_required: bool,
    pub(super) methods: Vec<Method>,
    pub(super) body_limit: usize,
    pub(super) headers: Vec<HeaderName>,
    pub(super) fingerprint: FingerprintHook,
    pub(super) fate: Arc<dyn Fn(&response::Parts) -> Fate + Send + Sync>,
    pub(super) explicit_begin: bool,
    pub(super) replay: Option<ReplayHook>,
    pub(super) stream_after: Duration,
    pub(super) after_hang_up: Duration,
    pub(super) wait: Duration,
    pub(super) retry_after: Duration,
    pub(super) on_store_failure: OnStoreFailure,
    pub(super) documentation: Option<Uri>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key_from: KeyFrom::Header(HeaderName::from_static("idempotency-key")),
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
            fingerprint: Arc::new(|request, body| RequestFingerprint::bytes().of(request, body).to_vec()),
            fate: Arc::new(fate::by_default),
            explicit_begin: false,
            replay: None,
            stream_after: Duration::from_secs(1),
            after_hang_up: Duration::from_secs(10),
            wait: Duration::ZERO,
            retry_after: Duration::from_secs(5),
            on_store_failure: OnStoreFailure::FailClosed,
            documentation: None,
        }
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
