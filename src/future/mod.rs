//! The same store as futures, for Tokio.
//!
//! [`Store`] is made of a [`Store`](crate::Store) and has its verbs. No call blocks the thread that polls it: a
//! *committer*, two threads of the store's own, waits for the disk and wakes whoever asked. What comes at the same time
//! shares one row of the journal and one sync, so that a thousand tasks that finish a piece of work each cost about as
//! much as one batch.
//!
//! ```
//! use onlyonce::{Claim, future};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("store");
//! // Opening reads the journal back: do it before the runtime's work begins, or on a thread for such work.
//! let store = future::Store::new(onlyonce::Store::open(path)?)?;
//!
//! tokio::runtime::Runtime::new()?.block_on(async {
//!     match store.claim("order-4711").await? {
//!         Claim::Acquired(lease) => lease.complete("charged").await?,
//!         Claim::Completed(first) => println!("done before: {:?}", first.result()),
//!         Claim::InProgress(other) => println!("come back in {:?}", other.retry_after),
//!     }
//!     store.close().await?;
//!     Ok(())
//! })
//! # }
//! ```
//!
//! # Futures that are dropped
//!
//! A future may be dropped at any await, by a timeout or a `select!`, and leaves no key stuck:
//!
//! - A **claim** that is dropped before its answer was taken leaves the key unclaimed, or takes the lease back before
//!   anybody saw it: the next claim gets the key at once, with a higher attempt and prior
//!   [`Released`](crate::Prior::Released). Only a crash before the next seal can make that
//!   [`Crashed`](crate::Prior::Crashed).
//! - A **completion** that is dropped happens all the same once it is in the queue. Dropped before (not polled, or the
//!   queue full), it drops its lease, and the next claim is told [`Dropped`](crate::Prior::Dropped). Claim again to learn
//!   which.
//! - A **release** that is dropped happens, or drops its lease, likewise.
//! - Under [`OnInterrupt::Hold`](crate::OnInterrupt::Hold) a lease that is dropped so holds its key until it is resolved, as any
//!   interrupted work does there. So does a crash after a claim was taken back.
//! - A **record** that is dropped is made or not.
//!
//! # Limits
//!
//! Each of the two queues holds 1,024 calls unless [`Store::with_queue`] says otherwise; a batch is one call. Where one is
//! full, calls wait for room without blocking. A round of the committer takes calls until it has 4,096 keys or 64 MiB of
//! results.

mod committer;
mod keep_alive;
mod lease;
mod once;
mod store;

pub use keep_alive::KeepAlive;
pub(crate) use lease::Again;
pub use lease::Lease;
pub use once::{Once, Unclaimed, Why};
pub use store::Store;

/// The answer to [`Store::claim`].
pub type Claim = crate::claim::Claim<Lease>;
/// Why a completion failed.
pub type CompleteError = crate::claim::CompleteError<Lease>;
/// Why [`Store::run`] failed.
pub type RunError<E> = crate::store::RunError<E, Lease>;
