//! An engine in memory, for tests without a disk.
//!
//! [`MemoryStore`] gives the same answers as the local store, and loses everything when it is dropped. Its time is Tokio's, so that
//! a test can pause it instead of sleeping.
//!
//! # Test a consumer
//!
//! A test claims keys through an [`EngineLease`](crate::EngineLease), as adapters do. With
//! `#[tokio::test(start_paused = true)]` the lease below expires at once.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use onlyonce_core::testing::MemoryStore;
//! use onlyonce_core::{Claim, Engine, EngineLease, Key, PriorAttempt, Result};
//!
//! /// The consumer under test: charges an order once, and answers a repeated delivery with the first receipt.
//! async fn charge(store: &Arc<dyn Engine>, order: &str) -> Result<String> {
//!     let key = Key::from(order).into_owned();
//!     match EngineLease::claim(store, key, Duration::from_secs(60)).await? {
//!         Claim::Acquired(lease) => {
//!             let receipt = match lease.attempt().may_have_happened() {
//!                 false => format!("receipt of {order}"),
//!                 true => format!("receipt of {order}, found at the bank"),
//!             };
//!             lease.complete(receipt.as_str()).await?;
//!             Ok(receipt)
//!         }
//!         Claim::Completed(first) => Ok(String::from_utf8_lossy(first.result().unwrap_or_default()).into_owned()),
//!         Claim::InProgress(_) => Ok("try later".to_owned()),
//!     }
//! }
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
//! # runtime.block_on(async {
//! let store: Arc<dyn Engine> = MemoryStore::new().into();
//! assert_eq!(charge(&store, "order-1").await?, "receipt of order-1");
//! assert_eq!(charge(&store, "order-1").await?, "receipt of order-1");
//!
//! // Another worker claimed the next order, and hangs. The consumer waits for its lease to expire.
//! let hung = EngineLease::claim(&store, Key::from("order-2"), Duration::ZERO).await?;
//! assert_eq!(charge(&store, "order-2").await?, "receipt of order-2, found at the bank");
//! # drop(hung);
//! # Ok::<(), onlyonce_core::Error>(())
//! # })?;
//! # Ok::<(), onlyonce_core::Error>(())
//! ```
//!
//! # Test a failing store
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use onlyonce_core::testing::MemoryStore;
//! use onlyonce_core::{Claim, Engine, EngineLease, Error, Key};
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
//! # runtime.block_on(async {
//! let store = MemoryStore::new();
//! let engine: Arc<dyn Engine> = store.clone().into();
//! let claim = || EngineLease::claim(&engine, Key::from("order-1"), Duration::ZERO);
//!
//! store.fail_with(Error::Closed);
//! assert!(matches!(claim().await, Err(Error::Closed)));
//!
//! store.recover();
//! assert!(matches!(claim().await?, Claim::Acquired(_)));
//! # Ok::<(), Error>(())
//! # })?;
//! # Ok::<(), onlyonce_core::Error>(())
//! ```

mod builder;
mod entry;
mod failure;
mod finishing;
mod keep_alive;
mod memory_store;
mod side_writes;
mod state;
mod stream_time;

pub use builder::MemoryStoreBuilder;
pub use memory_store::MemoryStore;
