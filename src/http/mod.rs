//! A layer for axum and other servers that use tower's layers: each request under an `Idempotency-Key` is processed once.
//!
//! It follows the IETF draft `draft-ietf-httpapi-idempotency-key-header`, with Stripe's habits where the draft leaves a
//! choice. `docs/http.md` has a table of every answer, of every status and what it means for the key, and advice on windows
//! and scopes.
//!
//! ```
//! use axum::{Extension, Router, routing::post};
//! use onlyonce::http::{Attempt, IdempotencyLayer};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("store");
//! let store = onlyonce::future::Store::new(onlyonce::Store::open(path)?)?;
//! let layer = IdempotencyLayer::builder(store.clone())
//!     // Whose key it is. Take it from what has authenticated the request.
//!     .scope(|request| request.headers.get("x-tenant").map(|tenant| tenant.as_bytes().to_vec()));
//!
//! async fn charge(Extension(attempt): Extension<Attempt>) -> &'static str {
//!     if attempt.may_have_happened() {
//!         // An earlier attempt was interrupted: ask the payment provider before charging again.
//!     }
//!     "charged"
//! }
//!
//! let app: Router = Router::new().route("/charges", post(charge)).route_layer(layer);
//! # drop(app);
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(store.close())?;
//! # Ok(())
//! # }
//! ```
//!
//! # What happens to a request
//!
//! 1. Its method is not guarded (by default all but POST and PATCH), or it has no key and needs none: it passes unchanged.
//! 2. Its key is read. `"k"`, a string of structured fields as the draft wants it, and `k`, as Stripe's clients send it, are
//!    the same key; keys are compared byte by byte, case-sensitive. A hook can take the key from the body
//!    ([`IdempotencyLayer::key`]).
//! 3. Its body is read, up to a limit, and its method, path, query and body become the key's fingerprint, byte by byte or by
//!    another rule ([`RequestFingerprint`]).
//! 4. The key is claimed. Completed before: the stored answer, with `Idempotent-Replayed: true`. In progress: 409, with
//!    `Retry-After`. Used with another fingerprint: 422.
//! 5. Otherwise the handler runs in a task of its own, under a lease that is renewed. A client that hangs up changes
//!    nothing: the work ends, its answer is stored, the retry gets it.
//! 6. The answer is stored, with the headers of a list, before the client gets it. An answer that is a stream goes through as
//!    it comes, and is stored before the client gets its end ([`IdempotencyLayer::stream_after`]). An answer that is not
//!    stored ([`Fate`]) frees the key.
//!
//! Answers of the layer itself are `application/problem+json` (RFC 9457), with a `code` for programs.
//!
//! # Unknown outcomes
//!
//! A handler that panics, whose process stops, or that answers with a 5xx may have done its work. The next attempt runs, and
//! [`Attempt::may_have_happened`] is true for it: the handler asks the other side before it repeats the effect. Where work
//! must not run again before an operator has decided, open the store with
//! [`OnInterrupt::Hold`](crate::OnInterrupt::Hold): such a key is answered with 409 without `Retry-After` until
//! [`Store::resolve`](crate::Store::resolve) is called, with a [`StoredResponse`] where the work was done.
//!
//! # Panics
//!
//! Outside of a Tokio runtime with time, a guarded request panics: it spawns a task.

mod attempt;
mod body;
mod fate;
mod figures;
mod fingerprint;
mod guard;
mod json;
mod key;
mod layer;
mod problem;
mod service;
mod stored;
mod stream;
mod work;

pub use attempt::Attempt;
pub use body::{Body, BoxError};
pub use fate::Fate;
pub use figures::Figures;
pub use fingerprint::RequestFingerprint;
pub use guard::OnStoreFailure;
pub use layer::{IdempotencyLayer, NeedsScope};
pub use service::Idempotent;
pub use stored::StoredResponse;

/// The page's code runs as its tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/http.md")]
struct Page;
