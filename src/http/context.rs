//! The state that a layer shares with its services: the store, the options and the counters.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::request;
use http::response;
use http::{Method, Response, Uri};

use super::body::Body;
use super::disposition::{self, Disposition};
use super::fingerprint::RequestFingerprint;
use super::problem::Problem;
use super::stats::{Counters, RunningRequests};
use crate::future::Store;

/// The behaviour of a layer while its store fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnStoreFailure {
    /// Requests get 503 and no handler runs. If the store fails after the handler, the client gets 503, too, and retries
    /// with the same key; [`Attempt::may_have_happened`](super::Attempt::may_have_happened) is then true. A client never
    /// gets a complete response that its retry would not get.
    FailClosed,
    /// Requests run without deduplication, and each counts in [`LayerStats::fail_open`](super::LayerStats::fail_open). A
    /// retry runs again, and two concurrent requests run both. The client gets its response even if it cannot be stored.
    FailOpen,
}

pub(super) type ScopeHook = Arc<dyn Fn(&request::Parts) -> Option<Vec<u8>> + Send + Sync>;
pub(super) type KeyHook = Arc<dyn Fn(&request::Parts, &Bytes) -> Option<String> + Send + Sync>;
pub(super) type FingerprintHook = Arc<dyn Fn(&request::Parts, &Bytes) -> Vec<u8> + Send + Sync>;
pub(super) type ReplayHook = Arc<dyn Fn(&request::Parts, &Bytes, Response<Bytes>) -> Response<Bytes> + Send + Sync>;

/// The part of a request that holds the key.
#[derive(Clone)]
pub(super) enum KeySource {
    Header(HeaderName),
    Hook(KeyHook),
}

#[derive(Clone)]
pub(super) struct Options {
    pub(super) key_source: KeySource,
    pub(super) key_limit: usize,
    pub(super) validate_key: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    pub(super) key_required: bool,
    pub(super) methods: Vec<Method>,
    pub(super) body_limit: usize,
    pub(super) headers: Vec<HeaderName>,
    pub(super) fingerprint: FingerprintHook,
    pub(super) disposition: Arc<dyn Fn(&response::Parts) -> Disposition + Send + Sync>,
    pub(super) explicit_begin: bool,
    pub(super) adapt_replay: Option<ReplayHook>,
    pub(super) stream_after: Duration,
    pub(super) after_disconnect: Duration,
    pub(super) wait: Duration,
    pub(super) retry_after: Duration,
    pub(super) on_store_failure: OnStoreFailure,
    pub(super) documentation: Option<Uri>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            key_source: KeySource::Header(HeaderName::from_static("idempotency-key")),
            key_limit: 255,
            validate_key: Arc::new(|_| true),
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
            fingerprint: Arc::new(|request, body| RequestFingerprint::bytes().compute(request, body).to_vec()),
            disposition: Arc::new(disposition::default_rule),
            explicit_begin: false,
            adapt_replay: None,
            stream_after: Duration::from_secs(1),
            after_disconnect: Duration::from_secs(10),
            wait: Duration::ZERO,
            retry_after: Duration::from_secs(5),
            on_store_failure: OnStoreFailure::FailClosed,
            documentation: None,
        }
    }
}

#[derive(Clone)]
pub(super) struct LayerContext {
    pub(super) store: Store,
    /// `None` for a scope that all clients share.
    pub(super) scope: Option<ScopeHook>,
    pub(super) options: Options,
    pub(super) counters: Arc<Counters>,
    pub(super) running: RunningRequests,
}

impl LayerContext {
    pub(super) fn new(store: Store, scope: Option<ScopeHook>) -> Self {
        Self { store, scope, options: Options::default(), counters: Arc::default(), running: RunningRequests::new() }
    }

    /// Builds the response for a problem and counts it.
    pub(super) fn reject<R>(&self, problem: Problem) -> Response<Body<R>> {
        let counters = &self.counters;
        let counter = match problem {
            Problem::KeyMissing
            | Problem::KeyMalformed(_)
            | Problem::KeyTooLong { .. }
            | Problem::ScopeMissing
            | Problem::BodyIncomplete
            | Problem::BodyTooLarge { .. } => &counters.rejected,
            Problem::KeyReused => &counters.payload_mismatches,
            Problem::InProgress { .. } | Problem::Held => &counters.in_progress,
            Problem::StoreUnavailable { .. } | Problem::OutcomeNotStored => &counters.fail_closed,
            Problem::Superseded | Problem::HandlerFailed => &counters.interrupted,
            Problem::ResponseNotStored { .. } | Problem::ResponseUnreadable => &counters.replayed,
        };
        counter.add(1);
        problem.response(self.options.documentation.as_ref()).map(Body::full)
    }

    /// Counts a request that is served without deduplication.
    pub(super) fn count_fail_open(&self) {
        self.counters.fail_open.add(1);
        self.store.count_fail_open();
    }
}
