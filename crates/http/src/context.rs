//! The state that a layer shares with its services: the store, the options and the counters.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderName};
use http::request;
use http::response;
use http::{Method, Response, Uri};
use onlyonce_core::{Engine, OnStoreFailure};

use crate::body::Body;
use crate::disposition::{self, Disposition};
use crate::event::Event;
use crate::fingerprint::RequestFingerprint;
use crate::problem::Problem;
use crate::stats::{Counters, RunningRequests};

pub(crate) type ScopeHook = Arc<dyn Fn(&request::Parts) -> Option<Vec<u8>> + Send + Sync>;
pub(crate) type KeyHook = Arc<dyn Fn(&request::Parts, &Bytes) -> Option<String> + Send + Sync>;
pub(crate) type FingerprintHook = Arc<dyn Fn(&request::Parts, &Bytes) -> Vec<u8> + Send + Sync>;
pub(crate) type ReplayHook = Arc<dyn Fn(&request::Parts, &Bytes, Response<Bytes>) -> Response<Bytes> + Send + Sync>;

/// The part of a request that holds the key.
#[derive(Clone)]
pub(crate) enum KeySource {
    Header(HeaderName),
    Hook(KeyHook),
}

#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) key_source: KeySource,
    pub(crate) key_limit: usize,
    pub(crate) validate_key: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    pub(crate) key_required: bool,
    pub(crate) methods: Vec<Method>,
    pub(crate) body_limit: usize,
    pub(crate) headers: Vec<HeaderName>,
    pub(crate) fingerprint: FingerprintHook,
    pub(crate) disposition: Arc<dyn Fn(&response::Parts) -> Disposition + Send + Sync>,
    pub(crate) explicit_begin: bool,
    pub(crate) adapt_replay: Option<ReplayHook>,
    pub(crate) stream_after: Duration,
    pub(crate) after_disconnect: Duration,
    pub(crate) wait: Duration,
    pub(crate) retry_after: Duration,
    pub(crate) on_store_failure: OnStoreFailure,
    pub(crate) documentation: Option<Uri>,
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
pub(crate) struct LayerContext {
    pub(crate) engine: Arc<dyn Engine>,
    /// `None` for a scope that all clients share.
    pub(crate) scope: Option<ScopeHook>,
    pub(crate) options: Options,
    pub(crate) counters: Arc<Counters>,
    pub(crate) running: RunningRequests,
}

impl LayerContext {
    pub(crate) fn new(engine: Arc<dyn Engine>, scope: Option<ScopeHook>) -> Self {
        Self {
            engine,
            scope,
            options: Options::default(),
            counters: Arc::new(Counters::new()),
            running: RunningRequests::new(),
        }
    }

    /// Builds the response for a problem and counts it.
    pub(crate) fn reject<R>(&self, problem: Problem) -> Response<Body<R>> {
        let event = match problem {
            Problem::KeyMissing
            | Problem::KeyMalformed(_)
            | Problem::KeyTooLong { .. }
            | Problem::ScopeMissing
            | Problem::BodyIncomplete
            | Problem::BodyTooLarge { .. } => Event::Rejected,
            Problem::KeyReused => Event::PayloadMismatch,
            Problem::InProgress { .. } | Problem::Held => Event::InProgress,
            Problem::StoreUnavailable { .. } | Problem::OutcomeNotStored => Event::FailClosed,
            Problem::Superseded | Problem::HandlerFailed => Event::Interrupted,
            Problem::ResponseNotStored { .. } | Problem::ResponseUnreadable => Event::Replayed,
        };
        self.counters.count(event);
        problem.response(self.options.documentation.as_ref()).map(Body::full)
    }

    /// Counts a request that is served without deduplication.
    pub(crate) fn count_fail_open(&self) {
        self.counters.count(Event::FailOpen);
        self.engine.count_fail_open();
    }
}
