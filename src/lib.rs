//! An embedded, persistent deduplication and idempotency store on RocksDB.
//!
//! At-least-once queues deliver twice, and clients retry. [`Store::claim`] gives the first caller of a key a [`Lease`] on its
//! work; every later one gets the stored result, or learns that the work is in progress. The store survives crashes and power
//! cuts.
//!
//! ```
//! use onlyonce::{Claim, Store};
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("store");
//! let store = Store::open(path)?;
//! match store.claim("order-4711").wait()? {
//!     Claim::Acquired(lease) => lease.complete("charged").wait()?,
//!     Claim::Completed(first) => println!("already done: {:?}", first.result()),
//!     Claim::InProgress(other) => println!("in progress elsewhere; retry after {:?}", other.retry_after),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | to | see |
//! |--|--|
//! | open a store | [`Store`], [`Builder`] |
//! | name a piece of work | [`Key`], [`Timestamp`] |
//! | claim, work, complete | [`Call`], [`Claim`], [`Lease`], [`Completion`] |
//! | filter duplicates without results | [`Store::record`] |
//! | process batches | [`Store::claim_batch`], [`Store::complete_batch`], [`Store::record_batch`] |
//! | store offsets and messages with results | [`Completion::offset`], [`Completion::message`], [`Store::outbox`] |
//! | handle errors | [`Error`], [`ErrorKind`] |
//! | operate | [`Store::stats`], [`Store::held`], [`Store::resolve`], [`Store::forget`], [`Store::inspect`] |
//!
//! Guarantees, architecture, operations and formats are described in the repository, in `docs/`.
#![cfg_attr(docsrs, feature(doc_cfg))]
// Nothing that a caller passes and nothing on disk may panic.
#![cfg_attr(
    not(test),
    warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)
)]

#[cfg(not(unix))]
compile_error!("onlyonce runs on Unix only: it needs file locks and directory syncs of a POSIX file system");

mod api;
mod buckets;
mod clock;
mod codec;
mod config;
#[cfg(feature = "delivery")]
#[cfg_attr(docsrs, doc(cfg(feature = "delivery")))]
pub mod delivery;
mod digest;
mod engine;
mod filter;
mod fs;
mod invariant;
mod journal;
mod memtable;
mod metrics;
mod rocks;
mod stats;
mod testing;
mod wake;

pub use api::{
    Builder, Call, Claim, ClaimKey, Complete, CompleteError, KeepAlive, Lease, Operation, Release, RunError,
    RunOutcome, Store,
};
#[cfg(feature = "tokio")]
#[cfg_attr(docsrs, doc(cfg(feature = "tokio")))]
pub use api::{DedupStream, Submitted, Unclaimed, UnclaimedReason};
pub use clock::{BootTime, Clock, ManualClock};
pub use config::Durability;
#[cfg(feature = "testing")]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub use onlyonce_core::testing::MemoryStore;
pub use onlyonce_core::{
    AttemptInfo, Cause, Completed, Completion, Error, ErrorKind, FencingToken, HeldKey, InProgress, Key, KeyError,
    KeyStatus, LeaseState, Message, MessageId, NewMessage, Offset, OnInterrupt, OnStoreFailure, Outcome, PriorAttempt,
    RecordOutcome, Resolution, Result, ResultError, SideWrites, StoredKey, StoredResult, Timestamp, TimestampError,
};
#[cfg(feature = "http")]
#[cfg_attr(docsrs, doc(cfg(feature = "http")))]
pub use onlyonce_http as http;
pub use stats::{BucketStats, Stats};
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub use testing::fuzz_checks;
#[cfg(feature = "__internals")]
#[doc(hidden)]
pub use testing::internals;

/// The examples of the documentation are compiled.
#[cfg(doctest)]
mod documentation {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[cfg(feature = "tokio")]
    #[doc = include_str!("../docs/async.md")]
    struct Async;
    #[cfg(feature = "http")]
    #[doc = include_str!("../docs/http.md")]
    struct Http;
    #[doc = include_str!("../docs/batches.md")]
    struct Batches;
    #[doc = include_str!("../docs/offsets-and-outbox.md")]
    struct OffsetsAndOutbox;
    #[doc = include_str!("../docs/stream-time.md")]
    struct StreamTime;
    #[cfg(feature = "delivery")]
    #[doc = include_str!("../docs/deliveries.md")]
    struct Deliveries;
}
