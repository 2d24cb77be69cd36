//! The layer, and its options.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::request;
use http::response;
use http::{HeaderName, Method, Response, Uri};
use tower_layer::Layer;

use super::fate::Fate;
use super::figures::Figures;
use super::guard::{Guard, KeyFrom, OnStoreFailure};
use super::service::Idempotent;
use crate::future::Store;

/// A layer without a scope, which is no layer yet. Made by [`IdempotencyLayer::builder`].
///
/// An idempotency key is a name that a client has chosen. Without a scope, one client's key finds another client's
/// answer.
#[must_use = "call `scope` or `one_scope_for_all_callers` to finish the layer"]
pub struct NeedsScope {
    store: Store,
}

impl NeedsScope {
    /// Whose keys they are: the same key in two scopes is two keys, and no scope sees the answers of another. Usually the
    /// tenant or account that the request was authenticated as; the route as well where one client may use a key for two
    /// operations. Put a separator between the two that neither can contain.
    ///
    /// `None`, an empty scope and one of more than 255 bytes refuse the request with 403. Take it from what authentication
    /// has found, such as a request extension, and not from what anybody may claim to be.
    ///
    /// ```
    /// # fn layer(store: onlyonce::future::Store) -> onlyonce::http::IdempotencyLayer {
    /// #[derive(Clone)]
    /// struct Tenant(String); // put there by the layer that authenticates
    ///
    /// onlyonce::http::IdempotencyLayer::builder(store)
    ///     .scope(|request| request.extensions.get::<Tenant>().map(|tenant| tenant.0.clone()))
    /// # }
    /// ```
    pub fn scope<S: Into<Vec<u8>>>(
        self,
        scope: impl Fn(&request::Parts) -> Option<S> + Send + Sync + 'static,
    ) -> IdempotencyLayer {
        let scope = Arc::new(move |parts: &request::Parts| scope(parts).map(Into::into));
        IdempotencyLayer { guard: Guard::new(self.store, Some(scope)) }
    }

    /// Uses one scope for all callers: a client that sends the key and the request of another client gets the answer of that
    /// other client. For services with one client, or whose answers are no secret.
    pub fn one_scope_for_all_callers(self) -> IdempotencyLayer {
        IdempotencyLayer { guard: Guard::new(self.store, None) }
    }
}

impl fmt::Debug for NeedsScope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NeedsScope").finish_non_exhaustive()
    }
}

/// Does each request under an idempotency key once. See the [module](super) for what it answers.
///
/// Clones share their figures. Give a service or a route a layer of its own where its options differ; layers may share a
/// store, and with the same scope they share keys.
#[derive(Clone)]
#[must_use = "a layer does nothing until a service is put behind it"]
pub struct IdempotencyLayer {
    guard: Guard,
}

impl IdempotencyLayer {
    /// A layer on a store, once it is said whose keys they are. The store's window is how long a retry gets the first
    /// answer, its `result_limit` how large an answer is kept, its lease how long a key stays taken when the process
    /// hangs.
    pub fn builder(store: Store) -> NeedsScope {
        NeedsScope { store }
    }

    /// The methods that are guarded. All others pass untouched, with a key or without. POST and PATCH by default.
    pub fn methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.guard.options.methods = methods.into_iter().collect();
        self
    }

    /// Lets requests without a key pass untouched, as Stripe does: each of them runs. By default they get 400.
    pub fn key_optional(mut self) -> Self {
        self.guard.options.key_required = false;
        self
    }

    /// The header that holds the key. `Idempotency-Key` by default. Replaces [`IdempotencyLayer::key`].
    pub fn key_header(mut self, name: HeaderName) -> Self {
        self.guard.options.key_from = KeyFrom::Header(name);
        self
    }

    /// Takes the key from anywhere in the request, the body included, instead of from a header. `None` means that the
    /// request has no key. The key may be any text; [`IdempotencyLayer::key_limit`] and [`IdempotencyLayer::key_form`] apply,
    /// and an empty key gets 400. Replaces [`IdempotencyLayer::key_header`].
    ///
    /// The body is read before the key is known, so that a body over [`IdempotencyLayer::body_limit`] gets 413 also where a
    /// key is optional and missing.
    ///
    /// ```
    /// # fn layer(layer: onlyonce::http::IdempotencyLayer) -> onlyonce::http::IdempotencyLayer {
    /// // JSON-RPC, where clients agree to send the key as a parameter.
    /// layer.key(|_request, body| {
    ///     let call: serde_json::Value = serde_json::from_slice(body).ok()?;
    ///     Some(call.pointer("/params/idempotencyKey")?.as_str()?.to_owned())
    /// })
    /// # }
    /// ```
    pub fn key(mut self, key: impl Fn(&request::Parts, &Bytes) -> Option<String> + Send + Sync + 'static) -> Self {
        self.guard.options.key_from = KeyFrom::Request(Arc::new(key));
        self
    }

    /// What makes two requests under one key the same: requests whose fingerprints are equal. A retry that is another
    /// request gets 422. By default [`RequestFingerprint::bytes`](super::RequestFingerprint::bytes): method, path, query and
    /// body, byte by byte; [`RequestFingerprint`](super::RequestFingerprint) has other rules ready-made.
    ///
    /// The bytes may be of any length; the store keeps a hash of 16 bytes. Nothing but them is compared: a fingerprint
    /// without the path takes one route for another. Requests that are wrongly taken for the same get the answer of the
    /// first one, so leave out only what cannot change the work. Runs on the thread that handles the request.
    ///
    /// ```
    /// # fn layer(layer: onlyonce::http::IdempotencyLayer) -> onlyonce::http::IdempotencyLayer {
    /// use onlyonce::http::RequestFingerprint;
    ///
    /// let rule = RequestFingerprint::canonical_json();
    /// layer.fingerprint(move |request, body| rule.of(request, body))
    /// # }
    /// ```
    pub fn fingerprint<F: Into<Vec<u8>>>(
        mut self,
        fingerprint: impl Fn(&request::Parts, &Bytes) -> F + Send + Sync + 'static,
    ) -> Self {
        self.guard.options.fingerprint = Arc::new(move |request, body| fingerprint(request, body).into());
        self
    }

    /// The longest key, in bytes, without quotes and escapes. 255 by default. With its scope it must also fit the store's
    /// `key_limit`.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.guard.options.key_limit = bytes;
        self
    }

    /// Which keys are accepted: by default all of visible ASCII. The draft recommends one form that is hard to guess, such as
    /// UUIDs, and to refuse all else, 400. Gets the key without quotes and escapes.
    ///
    /// ```
    /// # fn layer(layer: onlyonce::http::IdempotencyLayer) -> onlyonce::http::IdempotencyLayer {
    /// layer.key_form(|key| key.len() == 36 && key.chars().all(|c| c.is_ascii_hexdigit() || c == '-'))
    /// # }
    /// ```
    pub fn key_form(mut self, is_one: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        self.guard.options.key_form = Arc::new(is_one);
        self
    }

    /// The largest body of a request, in bytes: it is read into memory before the handler runs. One over it gets 413. 1 MiB
    /// by default.
    pub fn body_limit(mut self, bytes: usize) -> Self {
        self.guard.options.body_limit = bytes;
        self
    }

    /// Stores and replays these headers, too. Set-Cookie, Date, Content-Length and the headers of one connection are never
    /// stored, asked for or not.
    ///
    /// By default these are: Cache-Control, Content-Disposition, Content-Encoding, Content-Language, Content-Location,
    /// Content-Type, ETag, Last-Modified, Link, Location and Vary.
    pub fn keep_headers(mut self, names: impl IntoIterator<Item = HeaderName>) -> Self {
        self.guard.options.headers.extend(names);
        self
    }

    /// Stores and replays these headers, and no others: as [`IdempotencyLayer::keep_headers`], without the default ones.
    pub fn keep_only_headers(mut self, names: impl IntoIterator<Item = HeaderName>) -> Self {
        self.guard.options.headers = names.into_iter().collect();
        self
    }

    /// What an answer means for its key, by its status and headers. A handler overrules it with a [`Fate`] among its
    /// response's extensions.
    ///
    /// By default ([`Fate::Release`]) a status releases the key where its specification says that the request was not
    /// processed: 307, 308, 401, 405, 407, 411 to 415, 417, 421, 423, 426, 428, 429, 431. It is [`Fate::Interrupted`] where
    /// the effect may have happened before it: 406, 408, 424, 425, 460, 499, 500 and more, and any other 4xx with a
    /// `Retry-After`. All else is [`Fate::Store`].
    /// `docs/http.md` has the reasons.
    ///
    /// After [`Attempt::begin`](super::Attempt::begin) a `Release` of this rule counts as `Interrupted`.
    pub fn fate(mut self, fate: impl Fn(&response::Parts) -> Fate + Send + Sync + 'static) -> Self {
        self.guard.options.fate = Arc::new(fate);
        self
    }

    /// Declares that the handlers inside this layer call [`Attempt::begin`](super::Attempt::begin) before their first
    /// effect. Then an answer with 4xx or 5xx, or an error of the service, releases the key if `begin` was not called,
    /// whatever its status: a malformed body, a missing permission, no free connection. What comes after `begin`, and every
    /// 1xx, 2xx and 3xx, is decided as without this option.
    ///
    /// Do not set it for a handler that has an effect without `begin`: where that one fails, its retry has the effect again.
    pub fn explicit_begin(mut self) -> Self {
        self.guard.options.explicit_begin = true;
        self
    }

    /// Changes a stored answer before a retry gets it. Gets the retry, its body, and the answer; problems of the layer are
    /// not changed. For protocols whose answers name the request:
    ///
    /// ```
    /// # fn layer(layer: onlyonce::http::IdempotencyLayer) -> onlyonce::http::IdempotencyLayer {
    /// // The answer of JSON-RPC has the `id` of its request, and a retry has another one.
    /// layer.adapt_replay(|_request, body, answer| {
    ///     use serde_json::{Map, Value};
    ///
    ///     let call = serde_json::from_slice::<Map<String, Value>>(body);
    ///     let result = serde_json::from_slice::<Map<String, Value>>(answer.body());
    ///     let (Ok(call), Ok(mut result)) = (call, result) else { return answer };
    ///     result.insert("id".to_owned(), call.get("id").cloned().unwrap_or_default());
    ///     answer.map(|_| Value::Object(result).to_string().into())
    /// })
    /// # }
    /// ```
    pub fn adapt_replay(
        mut self,
        adapt: impl Fn(&request::Parts, &Bytes, Response<Bytes>) -> Response<Bytes> + Send + Sync + 'static,
    ) -> Self {
        self.guard.options.replay = Some(Arc::new(adapt));
        self
    }

    /// How long an answer that is to be stored may take from its head to its end before the layer passes it on as it
    /// comes. 1 second by default. An answer whose `Content-Type` declares a stream (`text/event-stream`,
    /// `application/x-ndjson`, `application/jsonl`, `application/json-seq`, `multipart/x-mixed-replace`) is passed on at
    /// once.
    ///
    /// The client gets the head and each piece when they come. The answer is stored when it ends, and only then the client
    /// gets its end. Where it breaks off, the client's answer breaks off and the outcome of the request is unknown.
    pub fn stream_after(mut self, limit: Duration) -> Self {
        self.guard.options.stream_after = limit;
        self
    }

    /// How long the layer reads on an answer that it passes on as it comes and whose client has hung up. 10 seconds by
    /// default. If it ends in that time, it is stored; if not, it is dropped, and the outcome of the request is unknown.
    pub fn after_hang_up(mut self, limit: Duration) -> Self {
        self.guard.options.after_hang_up = limit;
        self
    }

    /// How long a request waits for another one with its key, to be answered with the result of that one. Zero by default:
    /// it gets 409 at once, as the draft says.
    pub fn wait(mut self, limit: Duration) -> Self {
        self.guard.options.wait = limit;
        self
    }

    /// The longest Retry-After of a 409: less where the lease ends before. 5 seconds by default.
    pub fn retry_after(mut self, at_most: Duration) -> Self {
        self.guard.options.retry_after = at_most;
        self
    }

    /// What becomes of requests while the store fails. [`OnStoreFailure::FailClosed`] by default.
    pub fn on_store_failure(mut self, on_store_failure: OnStoreFailure) -> Self {
        self.guard.options.on_store_failure = on_store_failure;
        self
    }

    /// Where clients read about keys: the layer's own answers link to it, and their `type` is this address with their
    /// `code` behind a `#`. Without it, the `type` is `about:blank`.
    pub fn documentation(mut self, address: Uri) -> Self {
        self.guard.options.documentation = Some(address);
        self
    }

    /// What the layer has done so far, over all of its clones.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.guard.counters.figures()
    }

    /// Waits until no handler is at work and no answer is on its way as a stream, whether a client waits for it or not.
    /// Returns after `limit` at the latest, with the number of requests that are still at work: 0 if there are none.
    ///
    /// Stop taking requests before, and close the store afterwards: a request that is still at work then cannot store its
    /// answer, and its outcome is unknown.
    pub async fn idle(&self, limit: Duration) -> usize {
        self.guard.at_work.none(limit).await
    }
}

impl<S> Layer<S> for IdempotencyLayer {
    type Service = Idempotent<S>;

    fn layer(&self, inner: S) -> Idempotent<S> {
        Idempotent::new(inner, self.guard.clone())
    }
}

impl fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyLayer").field("figures", &self.figures()).finish_non_exhaustive()
    }
}
