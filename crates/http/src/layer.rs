//! The layer and its options.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::request;
use http::response;
use http::{HeaderName, Method, Response, Uri};
use onlyonce_core::{Engine, OnStoreFailure};
use tower_layer::Layer;

use crate::context::{KeySource, LayerContext};
use crate::disposition::Disposition;
use crate::service::Idempotent;
use crate::stats::LayerStats;

/// Builds an [`IdempotencyLayer`]: choose a scope to finish it. Returned by [`IdempotencyLayer::builder`].
///
/// The scope is mandatory because clients choose their keys freely. Without it, a client that happens to use another
/// client's key gets the response of that client.
#[must_use = "call `scope` or `shared_scope` to finish the layer"]
pub struct IdempotencyLayerBuilder {
    engine: Arc<dyn Engine>,
}

impl IdempotencyLayerBuilder {
    /// Sets the owner of each key. The same key in two scopes is two keys. Use the tenant or account of the authenticated
    /// request. Add the route if a client may use one key for two operations, with a separator that neither part can
    /// contain.
    ///
    /// A request whose scope is `None`, empty or longer than 255 bytes gets 403. Take the scope from the result of
    /// authentication, such as a request extension, never from a value that any client can set.
    ///
    /// ```
    /// # fn layer(store: std::sync::Arc<dyn onlyonce_core::Engine>) -> onlyonce_http::IdempotencyLayer {
    /// #[derive(Clone)]
    /// struct Tenant(String); // set by the authentication layer
    ///
    /// onlyonce_http::IdempotencyLayer::builder(store)
    ///     .scope(|request| request.extensions.get::<Tenant>().map(|tenant| tenant.0.clone()))
    /// # }
    /// ```
    pub fn scope<S: Into<Vec<u8>>>(
        self,
        scope: impl Fn(&request::Parts) -> Option<S> + Send + Sync + 'static,
    ) -> IdempotencyLayer {
        let scope = Arc::new(move |parts: &request::Parts| scope(parts).map(Into::into));
        IdempotencyLayer { context: LayerContext::new(self.engine, Some(scope)) }
    }

    /// Uses one scope for all clients. A client that sends the key and the request of another client gets the other
    /// client's response. Use it for services with one client, or whose responses are public.
    pub fn shared_scope(self) -> IdempotencyLayer {
        IdempotencyLayer { context: LayerContext::new(self.engine, None) }
    }
}

impl fmt::Debug for IdempotencyLayerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayerBuilder").finish_non_exhaustive()
    }
}

/// A tower layer that runs each request with an idempotency key once. The [module](super) describes its responses.
///
/// Clones share their counters. Routes with different options need layers of their own. Layers may share a store; with equal
/// scopes they share keys.
#[derive(Clone)]
#[must_use = "a layer does nothing until it is applied to a service"]
pub struct IdempotencyLayer {
    context: LayerContext,
}

impl IdempotencyLayer {
    /// Starts a layer on an engine, such as `onlyonce::Store`. The store's window is how long a retry gets the stored response, its `result_limit` is
    /// the largest response that is stored, and its lease is how long a key stays claimed after its process hangs.
    pub fn builder(engine: impl Into<Arc<dyn Engine>>) -> IdempotencyLayerBuilder {
        IdempotencyLayerBuilder { engine: engine.into() }
    }

    /// Sets the guarded methods. Requests with other methods pass unchanged, with or without a key. POST and PATCH by
    /// default.
    pub fn methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.context.options.methods = methods.into_iter().collect();
        self
    }

    /// Passes requests without a key to the handler unguarded, as Stripe does. By default they get 400.
    pub fn key_optional(mut self) -> Self {
        self.context.options.key_required = false;
        self
    }

    /// Sets the header that holds the key. `Idempotency-Key` by default. Replaces [`IdempotencyLayer::key`].
    pub fn key_header(mut self, name: HeaderName) -> Self {
        self.context.options.key_source = KeySource::Header(name);
        self
    }

    /// Takes the key from any part of the request, including the body, instead of a header. `None` means that the request
    /// has no key. The key may be any text; [`IdempotencyLayer::key_limit`] and [`IdempotencyLayer::validate_key`] apply.
    /// An empty key gets 400. Replaces [`IdempotencyLayer::key_header`].
    ///
    /// The layer reads the body before it knows the key. A body over [`IdempotencyLayer::body_limit`] therefore gets 413
    /// even if the key is optional and missing.
    ///
    /// ```
    /// # fn layer(layer: onlyonce_http::IdempotencyLayer) -> onlyonce_http::IdempotencyLayer {
    /// // JSON-RPC, where clients send the key as a parameter by convention.
    /// layer.key(|_request, body| {
    ///     let call: serde_json::Value = serde_json::from_slice(body).ok()?;
    ///     Some(call.pointer("/params/idempotencyKey")?.as_str()?.to_owned())
    /// })
    /// # }
    /// ```
    pub fn key(mut self, key: impl Fn(&request::Parts, &Bytes) -> Option<String> + Send + Sync + 'static) -> Self {
        self.context.options.key_source = KeySource::Hook(Arc::new(key));
        self
    }

    /// Sets the fingerprint of a request. A retry whose fingerprint differs from the first request's gets 422. The default
    /// is [`RequestFingerprint::bytes`](crate::RequestFingerprint::bytes): method, path, query and body, byte by byte.
    /// [`RequestFingerprint`](crate::RequestFingerprint) has more rules.
    ///
    /// The bytes may have any length; the store keeps a 16-byte hash. Nothing else is compared: a fingerprint without the
    /// path treats two routes as one. If two different requests have equal fingerprints, the second gets the response of
    /// the first, so leave out only data that cannot change the work. The closure runs on the thread that handles the
    /// request.
    ///
    /// ```
    /// # fn layer(layer: onlyonce_http::IdempotencyLayer) -> onlyonce_http::IdempotencyLayer {
    /// use onlyonce_http::RequestFingerprint;
    ///
    /// let rule = RequestFingerprint::canonical_json();
    /// layer.fingerprint(move |request, body| rule.compute(request, body))
    /// # }
    /// ```
    pub fn fingerprint<F: Into<Vec<u8>>>(
        mut self,
        fingerprint: impl Fn(&request::Parts, &Bytes) -> F + Send + Sync + 'static,
    ) -> Self {
        self.context.options.fingerprint = Arc::new(move |request, body| fingerprint(request, body).into());
        self
    }

    /// Sets the maximum key length in bytes, without quotes and escapes. 255 by default. Key and scope together must also
    /// fit the store's `key_limit`.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.context.options.key_limit = bytes;
        self
    }

    /// Accepts only keys for which `is_valid` returns true; other keys get 400. By default all keys of visible ASCII are
    /// valid. The draft recommends a format that is hard to guess, such as UUIDs. The closure gets the key without quotes
    /// and escapes.
    ///
    /// ```
    /// # fn layer(layer: onlyonce_http::IdempotencyLayer) -> onlyonce_http::IdempotencyLayer {
    /// layer.validate_key(|key| key.len() == 36 && key.chars().all(|c| c.is_ascii_hexdigit() || c == '-'))
    /// # }
    /// ```
    pub fn validate_key(mut self, is_valid: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.context.options.validate_key = Arc::new(is_valid);
        self
    }

    /// Sets the maximum size of a request body in bytes. The layer reads the body into memory before the handler runs. A
    /// larger body gets 413. 1 MiB by default.
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.context.options.body_limit = bytes;
        self
    }

    /// Adds response headers to the list of stored and replayed headers. Set-Cookie, Date, Content-Length and hop-by-hop
    /// headers are never stored, even if they are listed.
    ///
    /// The default list: Cache-Control, Content-Disposition, Content-Encoding, Content-Language, Content-Location,
    /// Content-Type, ETag, Last-Modified, Link, Location and Vary.
    pub fn store_headers(mut self, names: impl IntoIterator<Item = HeaderName>) -> Self {
        self.context.options.headers.extend(names);
        self
    }

    /// Replaces the list of stored and replayed headers. The exceptions of [`IdempotencyLayer::store_headers`] apply.
    pub fn store_only_headers(mut self, names: impl IntoIterator<Item = HeaderName>) -> Self {
        self.context.options.headers = names.into_iter().collect();
        self
    }

    /// Sets the rule that maps status and headers of a response to a [`Disposition`]. A handler overrides it with a
    /// `Disposition` in the extensions of its response.
    ///
    /// By default, these statuses are [`Disposition::Release`], because their specifications say that the request was not
    /// processed: 307, 308, 401, 405, 407, 411 to 415, 417, 421, 423, 426, 428, 429, 431. These are
    /// [`Disposition::Interrupted`], because the effect may have happened: 406, 408, 424, 425, 460, 499, 500 and above, and
    /// any other 4xx with a `Retry-After`. All others are [`Disposition::Store`]. `docs/http.md` has the reasons.
    ///
    /// After [`Attempt::begin`](crate::Attempt::begin), a `Release` of this rule counts as `Interrupted`.
    pub fn disposition(mut self, rule: impl Fn(&response::Parts) -> Disposition + Send + Sync + 'static) -> Self {
        self.context.options.disposition = Arc::new(rule);
        self
    }

    /// Declares that every handler inside this layer calls [`Attempt::begin`](crate::Attempt::begin) before its first
    /// effect. Then a 4xx, a 5xx or a service error without a call of `begin` releases the key, whatever the status: a
    /// malformed body, a missing permission, an exhausted connection pool. Responses after `begin`, and every 1xx, 2xx and
    /// 3xx, are treated as without this option.
    ///
    /// Do not set it for a handler that has an effect before `begin`: after a failure, the retry repeats the effect.
    pub fn explicit_begin(mut self) -> Self {
        self.context.options.explicit_begin = true;
        self
    }

    /// Rewrites a stored response before it is replayed. The closure gets the retry, its body and the stored response. It
    /// does not see problem responses of the layer. Use it for protocols whose responses identify the request:
    ///
    /// ```
    /// # fn layer(layer: onlyonce_http::IdempotencyLayer) -> onlyonce_http::IdempotencyLayer {
    /// // A JSON-RPC response has the `id` of its request, and each retry has a new `id`.
    /// layer.adapt_replay(|_request, body, response| {
    ///     use serde_json::{Map, Value};
    ///
    ///     let call = serde_json::from_slice::<Map<String, Value>>(body);
    ///     let result = serde_json::from_slice::<Map<String, Value>>(response.body());
    ///     let (Ok(call), Ok(mut result)) = (call, result) else { return response };
    ///     result.insert("id".to_owned(), call.get("id").cloned().unwrap_or_default());
    ///     response.map(|_| Value::Object(result).to_string().into())
    /// })
    /// # }
    /// ```
    pub fn adapt_replay(
        mut self,
        adapt: impl Fn(&request::Parts, &Bytes, Response<Bytes>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.context.options.adapt_replay = Some(Arc::new(adapt));
        self
    }

    /// Sets how long the layer buffers a response body before it starts to forward it. 1 second by default. A response
    /// whose `Content-Type` declares a stream (`text/event-stream`, `application/x-ndjson`, `application/jsonl`,
    /// `application/json-seq`, `multipart/x-mixed-replace`) is forwarded at once.
    ///
    /// A forwarded response reaches the client frame by frame. The layer stores it when it ends, and only then sends the
    /// end. If the body fails, the client's response is aborted and the outcome of the request is unknown.
    pub fn stream_after(mut self, limit: Duration) -> Self {
        self.context.options.stream_after = limit;
        self
    }

    /// Sets how long the layer keeps reading a forwarded response after its client has disconnected. 10 seconds by default.
    /// A response that ends in this time is stored. Otherwise it is dropped, and the outcome of the request is unknown.
    pub fn after_disconnect(mut self, limit: Duration) -> Self {
        self.context.options.after_disconnect = limit;
        self
    }

    /// Sets how long a request waits for a concurrent request with the same key, to get its response. Zero by default: the
    /// request gets 409 at once, as the draft says.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.context.options.wait = limit;
        self
    }

    /// Sets the maximum `Retry-After` of a 409. It is shorter if the lease ends earlier. 5 seconds by default.
    pub fn retry_after(mut self, at_most: Duration) -> Self {
        self.context.options.retry_after = at_most;
        self
    }

    /// Sets the behaviour while the store fails. [`OnStoreFailure::FailClosed`] by default.
    pub fn on_store_failure(mut self, policy: OnStoreFailure) -> Self {
        self.context.options.on_store_failure = policy;
        self
    }

    /// Sets the address of your documentation about idempotency keys. Problem responses link to it, and their `type` is
    /// this address with `#code` appended. Without it the `type` is `about:blank`.
    pub fn documentation(mut self, address: Uri) -> Self {
        self.context.options.documentation = Some(address);
        self
    }

    /// Returns the counters of this layer and its clones. The feature `metrics` also exports them to the `metrics` facade,
    /// summed over all layers.
    #[must_use]
    pub fn stats(&self) -> LayerStats {
        self.context.counters.stats()
    }

    /// Waits until no handler runs and no response is being forwarded, whether or not a client waits for it. Returns after
    /// `limit` at the latest, with the number of requests that are still running.
    ///
    /// Stop accepting requests first, and close the store afterwards: a request that is still running cannot store its
    /// response, and its outcome is unknown.
    pub async fn wait_idle(&self, limit: Duration) -> usize {
        self.context.running.wait_for_none(limit).await
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotent<S>;

    fn layer(&self, inner: S) -> Idempotent<S> {
        Idempotent::new(inner, self.context.clone())
    }
}

impl fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayer").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
