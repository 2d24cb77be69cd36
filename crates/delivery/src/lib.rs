//! Exactly-once processing of deliveries from at-least-once queues.
//!
//! Part of [onlyonce](https://docs.rs/onlyonce), which re-exports it as `onlyonce::delivery`, with an adapter for each broker.
//!
//! A [`Processor`] wraps an [`Engine`](onlyonce_core::Engine): the store of the crate `onlyonce`, or another one. Its one
//! call, [`process`](Processor::process), takes a [`Delivery`] and the work, and acknowledges, delays or rejects the
//! delivery:
//!
//! | state of the delivery's key | action |
//! |---|---|
//! | new, or released | runs the work and renews the lease meanwhile |
//! | ... and the work succeeds | stores the result, then acknowledges |
//! | ... and the work fails or panics | releases the key with a backoff, and asks for redelivery after it |
//! | ... and it was the last attempt, or the failure is [permanent](Failure::permanent) | rejects: dead letter |
//! | ... and another holder takes the lease over | does not acknowledge: the redelivery finds the other holder's outcome |
//! | ... and the last allowed attempt crashed | rejects without running the work again |
//! | completed | acknowledges: a duplicate |
//! | in progress | asks for redelivery when the lease or the backoff ends |
//! | held for resolution | asks for redelivery after [`max_retry_after`](Processor::max_retry_after) |
//! | too far ahead of stream time | asks for redelivery after `max_retry_after` |
//! | ... and one of these three lasts longer than [`redelivery_timeout`](Processor::redelivery_timeout) | rejects |
//! | invalid (empty, too long, or with the fingerprint of another payload) | rejects |
//! | older than the window of a store on stream time, or without a timestamp there | rejects: cannot tell whether it was processed |
//! | timestamp in seconds, microseconds or nanoseconds on such a store | rejects |
//! | a digest, because the message has no id and [ids are required](Processor::require_ids) | rejects |
//! | over the store's in-flight limit | asks for redelivery after `max_retry_after` |
//! | unknown, because the store fails | [`OnStoreFailure`]: asks for redelivery, or runs the work without deduplication |
//!
//! If the queue fails to take an answer, such as an acknowledgement, `process` returns an [`AckError`]. No message is
//! lost: the queue delivers it again, and the store knows its outcome.
//!
//! ```
//! use onlyonce_core::{Key, testing::MemoryStore};
//! use onlyonce_delivery::{Delivery, Outcome, Processor};
//!
//! // From a broker's adapter, or your own:
//! struct Order(&'static str);
//!
//! impl Delivery for Order {
//!     type Error = std::io::Error;
//!
//!     fn key(&self) -> Key<'_> {
//!         Key::from(self.0)
//!     }
//!
//!     fn payload(&self) -> &[u8] {
//!         self.0.as_bytes()
//!     }
//!
//!     async fn ack(self) -> Result<(), Self::Error> {
//!         Ok(())
//!     }
//!
//!     async fn retry_after(self, _delay: std::time::Duration) -> Result<(), Self::Error> {
//!         Ok(())
//!     }
//!
//!     async fn reject(self, _reason: &str) -> Result<(), Self::Error> {
//!         Ok(())
//!     }
//! }
//!
//! # async fn charge(_order: &[u8], _token: u64) -> Result<String, std::io::Error> { Ok("receipt 1".to_owned()) }
//! # async fn find_charge(_order: &[u8]) -> Result<Option<String>, std::io::Error> { Ok(None) }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // In an application: `onlyonce::Store::open("orders.store")?`.
//! let processor = Processor::new(MemoryStore::new()).attempts(3);
//! for order in [Order("order-4711"), Order("order-4711")] {
//!     let outcome = processor
//!         .process(order, async |order, attempt| {
//!             // An earlier attempt was interrupted: it may have charged the card.
//!             if attempt.may_have_happened()
//!                 && let Some(receipt) = find_charge(order.payload()).await?
//!             {
//!                 return Ok(receipt);
//!             }
//!             Ok(charge(order.payload(), attempt.token().get()).await?)
//!         })
//!         .await?;
//!     assert!(matches!(outcome, Outcome::Done | Outcome::Duplicate(_)));
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # One process per queue
//!
//! One process owns a store and processes any number of deliveries concurrently. A second process with its own store
//! does not see duplicates across the two. To scale out, partition the work by key, so that all duplicates of a key reach
//! the same process: one partition, stream or queue per process.
//!
//! # Rejection and redrive
//!
//! The store counts attempts, so that attempts that crashed the process count as well. A rejection frees the key and
//! resets its attempts. The store keeps one fact for the rest of the window: whether an attempt may have had its effect. After
//! a redrive from the dead letters, [`Attempt::may_have_happened`] reports it. If the process crashes between the
//! rejection and this write, the redriven delivery is rejected once more; the next redrive runs it.
//!
//! # Limits on redelivery
//!
//! | cause of a redelivery | limit |
//! |---|---|
//! | the work failed, panicked, was dropped, or crashed its process | [`attempts`](Processor::attempts), counted by the store across restarts |
//! | another holder took the lease over | the same: the run counts as an attempt |
//! | the key is in progress or held, or its timestamp is too far ahead | [`redelivery_timeout`](Processor::redelivery_timeout), counted in this process |
//! | the work failed without the store, under [`OnStoreFailure::FailOpen`] | the same: the store counts no attempts then |
//! | the store fails, or is at its `in_flight_limit` | none: the fault is not the delivery's, and a limit would reject every delivery |
//! | the queue did not take the answer | none: each time [`process`](Processor::process) returns an [`AckError`]. The adapter shrinks dead letters that are too large; see its page in `docs/brokers` |
//!
//! # Dropped futures
//!
//! Dropping the future of `process` drops its lease and its delivery without an answer. The queue redelivers by its own
//! timeout, and the next attempt reports `may_have_happened`.

#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod attempt;
mod delivery;
mod failure;
#[cfg(feature = "metrics")]
mod metrics;
mod outcome;
mod process;
mod processor;
mod redeliveries;
mod setting_error;
mod stats;

pub use attempt::Attempt;
pub use delivery::{Delivery, KeyOrigin, WithKey, key_of, reason_line};
pub use failure::Failure;
pub use onlyonce_core::OnStoreFailure;
pub use outcome::{AckError, MissingId, Outcome, RedeliveryTimeout};
pub use processor::Processor;
pub use setting_error::SettingError;
pub use stats::ProcessorStats;
