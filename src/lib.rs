#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]
// Nothing a caller passes and nothing on disk may panic.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)
)]

#[cfg(not(unix))]
compile_error!(
    "onlyonce runs on Unix only: it needs Unix file locks, file modes and directory syncs; build it for Linux or macOS"
);

mod batch;
mod buckets;
mod claim;
mod clock;
mod codec;
mod config;
#[cfg(feature = "tokio")]
pub mod delivery;
mod engine;
mod entry;
mod error;
mod filter;
mod fs;
#[cfg(feature = "tokio")]
pub mod future;
#[cfg(feature = "http")]
pub mod http;
mod invariant;
mod journal;
mod key;
mod memtable;
mod metrics;
mod rocks;
mod stats;
mod store;
mod testing;
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
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub use testing::fuzz_checks;
#[cfg(feature = "internals")]
#[doc(hidden)]
pub use testing::internals;
pub use tx::{Message, MessageId, Tx};
