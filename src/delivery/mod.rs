//! Deliveries of a queue that delivers at least once, settled: each is worked on once, and its queue is told.
//!
//! A [`Processor`] is made of a [`future::Store`](crate::future::Store). Its one call,
//! [`process`](Processor::process), takes a [`Delivery`] and the work, and settles every case:
//!
//! | the key of the delivery | what is done |
//! |---|---|
//! | is new, or free again | the work runs, its lease is kept alive |
//! | ... and the work gives a result | it is stored, and only then the delivery is acknowledged |
//! | ... and the work fails, or panics | the key is let go after a backoff, and the delivery comes back then |
//! | ... and it was the last attempt, or fails [for good](Failure::permanent) | rejected: to the dead letters |
//! | ... and somebody else takes over | not acknowledged: it comes back, and is settled by what the other one did |
//! | ... and the last attempt before it crashed | rejected, without running the work once more |
//! | is completed | acknowledged: a duplicate |
//! | is in progress | it comes back when the lease or backoff is over |
//! | is held for a decision | it comes back after the longest wait |
//! | is too far ahead of stream time | it comes back after the longest wait |
//! | ... and one of these three goes on [for too long](Processor::give_up_after) | rejected |
//! | cannot be one (empty, too long, or with a fingerprint of another payload) | rejected |
//! | is too old for stream time, or has no timestamp there | rejected: nobody knows whether it was done |
//! | has a timestamp there that is plainly in seconds, microseconds or nanoseconds | rejected |
//! | is a digest, because the message has no id, and [ids are required](Processor::require_ids) | rejected |
//! | is one more than may be in flight | it comes back after the longest wait |
//! | cannot be claimed: the store fails | [`OnStoreFailure`]: it comes back, or the work runs unguarded |
//!
//! Whatever the queue does not take, an acknowledgement for example, is an error of `process`. Nothing is lost by it:
//! the queue delivers again, and that delivery is settled by what is stored.
//!
//! ```
//! use onlyonce::delivery::{Delivery, Processor, Settled};
//! use onlyonce::{Key, future};
//!
//! // A broker's adapter, or yours:
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
//!     async fn retry_after(self, _wait: std::time::Duration) -> Result<(), Self::Error> {
//!         Ok(())
//!     }
//!
//!     async fn reject(self, _why: &str) -> Result<(), Self::Error> {
//!         Ok(())
//!     }
//! }
//!
//! # async fn charge(_order: &[u8], _token: u64) -> Result<String, std::io::Error> { Ok("receipt 1".to_owned()) }
//! # async fn charge_already_made(_order: &[u8]) -> Result<Option<String>, std::io::Error> { Ok(None) }
//! # async fn consume(store: future::Store) -> Result<(), Box<dyn std::error::Error>> {
//! let processor = Processor::new(store).attempts(3);
//! for order in [Order("order-4711"), Order("order-4711")] {
//!     let settled = processor
//!         .process(order, async |order, job| {
//!             // An earlier attempt was cut off: the charge may have been made.
//!             if job.may_have_happened()
//!                 && let Some(receipt) = charge_already_made(order.payload()).await?
//!             {
//!                 return Ok(receipt);
//!             }
//!             Ok(charge(order.payload(), job.token()).await?)
//!         })
//!         .await?;
//!     assert!(matches!(settled, Settled::Done | Settled::Duplicate(_)));
//! }
//! # Ok(())
//! # }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let store = future::Store::new(onlyonce::Store::open(dir.path().join("store"))?)?;
//! # let runtime = tokio::runtime::Runtime::new()?;
//! # runtime.block_on(consume(store.clone()))?;
//! # Ok(runtime.block_on(store.close())?)
//! # }
//! ```
//!
//! # One process for a queue
//!
//! A store belongs to one process, which works on as many deliveries at a time as it likes. A duplicate that another
//! process gets, with a store of its own, is not known there. Where one process is not enough, split the work by key,
//! so that the duplicates of a key come to the same process: a partition, stream or queue for each.
//!
//! # Rejected deliveries, and their return
//!
//! Attempts are counted by the store, so that those count which took the process with them. When a delivery was
//! rejected, its key is free and its attempts begin anew; what is kept is the doubt: where an attempt may have had its
//! effect, [`Job::may_have_happened`] says so when the delivery comes back from the dead letters, for a window. If the
//! process dies between the rejection and that note, the delivery is rejected once more when it comes back, and runs
//! when it comes back again.
//!
//! # What bounds the number of times a delivery comes back
//!
//! | it comes back because | bound |
//! |---|---|
//! | its work failed, panicked, was dropped, or died with its process | [`attempts`](Processor::attempts), counted by the store across restarts |
//! | its lease was taken over | the same: the run counts as an attempt |
//! | its key is in progress or held, or its timestamp is too far ahead | [`give_up_after`](Processor::give_up_after), counted in this process |
//! | its work failed without the store, under [`OnStoreFailure::FailOpen`] | the same: the store counts no attempts then |
//! | the store fails, or is at its `in_flight_limit` | none: the fault is not the delivery's, and all of them would be rejected for it |
//! | the queue did not take the answer | none here: [`Unsettled`] reports it each time. A dead letter that is too large is made smaller by the adapter; its page in `docs/brokers` says how |
//!
//! # Dropped futures
//!
//! A `process` that is dropped drops its lease and its delivery: the next delivery runs, and its work is told. When
//! that comes is the queue's affair, for it was told nothing.

mod figures;
#[cfg(feature = "kafka")]
pub mod kafka;
#[cfg(feature = "kafka")]
mod kafka_record;
mod message;
#[cfg(feature = "nats")]
pub mod nats;
#[cfg(feature = "nats")]
mod nats_letter;
#[cfg(feature = "kafka")]
mod partitions;
mod processor;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
#[cfg(feature = "rabbitmq")]
mod rabbitmq_copy;
#[cfg(feature = "redis-streams")]
mod redis_reply;
#[cfg(feature = "redis-streams")]
pub mod redis_streams;
mod returning;
mod setting;
mod settled;
#[cfg(feature = "sqs")]
pub mod sqs;
#[cfg(feature = "sqs")]
mod sqs_letter;
mod work;

pub use figures::ProcessorStats;
pub use message::{Delivery, KeyOrigin, Keyed, key_of, reason_line};
pub use processor::{OnStoreFailure, Processor};
pub use setting::SettingError;
pub use settled::{GivenUp, NoId, Settled, Unsettled};
pub use work::{Failure, Job};
