//! The public face: one store, one lease, one call. Thin: it converts arguments and answers, and calls the engine.

#[cfg(feature = "tokio")]
mod awaited;
mod builder;
pub(crate) mod call;
#[cfg(feature = "tokio")]
mod committer;
#[cfg(feature = "tokio")]
mod dedup_stream;
#[cfg(feature = "tokio")]
mod engine_contract;
mod lease;
mod operations;
mod run;
pub(crate) mod shared;
mod store;

use std::sync::Arc;

pub use builder::Builder;
#[cfg(feature = "tokio")]
pub use call::Submitted;
pub use call::{Call, Operation};
#[cfg(feature = "tokio")]
pub use dedup_stream::{DedupStream, Unclaimed, UnclaimedReason};
pub use lease::{Complete, CompleteError, KeepAlive, Lease, Release};
pub use operations::ClaimKey;
pub use run::{RunError, RunOutcome};
pub use store::Store;

use crate::engine::response::Grant;
use shared::Shared;

/// The answer to [`Store::claim`].
pub type Claim<L = Lease> = onlyonce_core::Claim<L>;

/// The public form of the engine's answer.
fn claimed(answer: onlyonce_core::Claim<Grant>, shared: &Arc<Shared>) -> Claim {
    match answer {
        Claim::Acquired(grant) => Claim::Acquired(Lease::new(grant, Arc::clone(shared))),
        Claim::Completed(completed) => Claim::Completed(completed),
        Claim::InProgress(in_progress) => Claim::InProgress(in_progress),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_send_and_sync<T: Send + Sync>() {}
    fn is_send<T: Send>(_: &T) {}

    #[test]
    fn the_public_types_can_be_shared_between_threads() {
        is_send_and_sync::<Store>();
        is_send_and_sync::<Builder>();
        is_send_and_sync::<Lease>();
        is_send_and_sync::<KeepAlive<'_>>();
        is_send_and_sync::<Claim>();
        is_send_and_sync::<CompleteError>();
        is_send_and_sync::<RunError<std::io::Error>>();
        is_send_and_sync::<Call<ClaimKey<'_>>>();
        is_send_and_sync::<Call<Complete>>();
        is_send_and_sync::<Call<Release>>();
        is_send_and_sync::<crate::Error>();
        is_send_and_sync::<crate::Stats>();
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        is_send(&store.check("k"));
        is_send(&store.claim_batch(["k"]));
        #[cfg(feature = "tokio")]
        is_send(&store.claim("k").into_future());
    }
}
