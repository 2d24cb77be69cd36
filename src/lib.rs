#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
// Nothing a caller passes and nothing on disk may panic.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)
)]

#[cfg(not(unix))]
compile_error!("onlyonce runs on Unix only: it needs Unix file locks, file modes and directory syncs; build it for Linux or macOS");

mod batch;
mod bucket;
mod claim;
mod clock;
mod codec;
mod concurrency;
mod config;
#[cfg(feature = "tokio")]
pub mod delivery;
mod entry;
mod error;
mod filter;
#[cfg(feature = "tokio")]
pub mod future;
#[cfg(feature = "http")]
pub mod http;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub mod internals;
mod invariant;
mod key;
mod kill_point;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod laws;
mod meter;
mod state;
mod stats;
mod storage;
mod store;
mod tx;
mod typed_result;

pub use claim::{Claim, CompleteError, Completed, InProgress, KeepAlive, Lease};
pub use clock::{BootTime, Clock, ManualClock};
pub use config::{Durability, OnInterrupt};
pub use entry::Prior;
pub use error::{Error, Outcome, Result};
pub use key::Key;
pub use stats::{BucketStats, Stats};
pub use store::{Builder, Check, Held, Phase, Ran, Recorded, Resolution, RunError, Store, Stored};
pub use tx::{Message, MessageId, Tx};
