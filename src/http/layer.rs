//! The layer, and its options.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::request;
use http::response;
use http::{HeaderName, Method, Uri};
use tower_layer::Layer;

use super::attempt::Fate;
use super::figures::Figures;
use super::guard::{Guard, OnStoreFailure};
use super::service::Idempotent;
use crate::future::Store;

/// A layer without a scope, which is no layer yet. Made by [`IdempotencyLayer::builder`].
///
/// An idempotency key is a name that a client has chosen. Without a scope, one client's key finds another client's
/// answer.
#[must_use = "say whose keys they are"]
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

    /// Refuses a scope: whoever sends a key that somebody else has used with the same request gets the answer that was
    /// theirs. For services with one client, or whose answers are no secret.
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

    /// The header that holds the key. `Idempotency-Key` by default.
    pub fn key_header(mut self, name: HeaderName) -> Self {
        self.guard.options.key_header = name;
        self
    }

    /// The longest key, in bytes, without quotes and escapes. 255 by default. With its scope it must also fit the store's
    /// `key_limit`.
    pub fn key_limit(mut self, bytes: usize) -> Self {
        self.guard.options.key_limit = bytes;
        self
    }

    /// Which keys are taken: by default all of visible ASCII. The draft recommends one form that is hard to guess, such as
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

    /// Which answers are stored, by their status and headers. A handler overrules it with a [`Fate`] among its response's
    /// extensions.
    ///
    /// By default 429 is [`Fate::Release`], 5xx is [`Fate::Interrupted`] (it does not say that nothing has happened), and
    /// all else is [`Fate::Store`].
    pub fn fate(mut self, fate: impl Fn(&response::Parts) -> Fate + Send + Sync + 'static) -> Self {
        self.guard.options.fate = Arc::new(fate);
        self
    }

    /// Has a request wait so long for another one with its key, and answers with that one's result. Zero by default: it is
    /// told to come back, 409, as the draft says.
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

    /// Done when no handler is at work, whether a client waits for it or not. Stop taking requests before, and close the
    /// store afterwards.
    pub async fn idle(&self) {
        self.guard.at_work.none().await;
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
