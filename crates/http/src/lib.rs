//! A [tower](https://docs.rs/tower) layer, for axum and other servers, that runs each request with an `Idempotency-Key` once.
//!
//! It implements the IETF draft `draft-ietf-httpapi-idempotency-key-header`, and follows Stripe where the draft leaves a
//! choice. It works over any [`Engine`](onlyonce_core::Engine). `docs/http.md` of the repository lists every response of the layer, the effect of every status on the key, and advice on scopes and
//! windows.
//!
//! ```
//! use axum::{Extension, Router, routing::post};
//! use onlyonce_http::{Attempt, IdempotencyLayer};
//!
//! # let store = onlyonce_core::testing::MemoryStore::new();
//! // `store` is an `onlyonce::Store` or another engine.
//! let layer = IdempotencyLayer::builder(store)
//!     // The owner of the key. Take it from the result of authentication.
//!     .scope(|request| request.headers.get("x-tenant").map(|tenant| tenant.as_bytes().to_vec()));
//!
//! async fn charge(Extension(attempt): Extension<Attempt>) -> &'static str {
//!     if attempt.may_have_happened() {
//!         // An earlier attempt was interrupted: query the payment provider before charging again.
//!     }
//!     "charged"
//! }
//!
//! let app: Router = Router::new().route("/charges", post(charge)).route_layer(layer);
//! # drop(app);
//! ```
//!
//! # Processing of a request
//!
//! 1. A request passes unchanged if its method is not guarded (POST and PATCH are by default), or if it has no key and keys
//!    are optional.
//! 2. The layer reads the key. `"k"`, the structured-field string of the draft, and `k`, the bare form of Stripe's clients,
//!    are the same key. Keys are compared byte by byte. A hook can take the key from the body ([`IdempotencyLayer::key`]).
//! 3. The layer reads the body, up to a limit. Method, path, query and body form the fingerprint of the request, byte by
//!    byte or by another rule ([`RequestFingerprint`]).
//! 4. The layer claims the key. A completed key returns the stored response, with `Idempotent-Replayed: true`. A key in
//!    progress returns 409 with `Retry-After`. A key with another fingerprint returns 422.
//! 5. Otherwise the handler runs in its own task. The layer renews the lease meanwhile. A client that disconnects does not
//!    stop the handler: its response is stored, and a retry gets it.
//! 6. The layer stores the response, with an allow-list of headers, before it sends the response. A streaming response is
//!    forwarded as it arrives; the layer stores it before it sends the end ([`IdempotencyLayer::stream_after`]). A response
//!    that is not stored ([`Disposition`]) frees the key.
//!
//! Responses of the layer itself are `application/problem+json` (RFC 9457) with a machine-readable `code`.
//!
//! # Unknown outcomes
//!
//! A handler that panics, responds with 5xx, or runs in a process that stops may have had its effect. The next attempt runs
//! the handler, and [`Attempt::may_have_happened`] is true: query the other system before you repeat the effect. If work must
//! not run again before an operator has decided, open the store with [`OnInterrupt::Hold`](onlyonce_core::OnInterrupt::Hold).
//! Such a key returns 409 without `Retry-After` until [`Engine::resolve`](onlyonce_core::Engine::resolve) is called, with a
//! [`StoredResponse`] if the work was done.
//!
//! # Panics
//!
//! A guarded request spawns a task, and panics outside a Tokio runtime with a timer.

#![cfg_attr(docsrs, feature(doc_cfg))]
// Nothing a client sends and nothing in the store may panic.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)
)]

mod attempt;
mod body;
mod context;
mod disposition;
mod event;
mod execute;
mod fingerprint;
mod json;
mod key;
mod layer;
#[cfg(feature = "metrics")]
mod metrics;
mod problem;
mod service;
mod stats;
mod stored;
mod stream;

pub use attempt::Attempt;
pub use body::{Body, BoxError};
pub use disposition::Disposition;
pub use fingerprint::RequestFingerprint;
pub use layer::{IdempotencyLayer, IdempotencyLayerBuilder};
pub use service::Idempotent;
pub use stats::LayerStats;
pub use stored::StoredResponse;
