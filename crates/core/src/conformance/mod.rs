//! The checks that every [`Engine`](crate::Engine) passes.
//!
//! An engine's test implements [`Factory`] and runs the suite:
//!
//! ```
//! use onlyonce_core::BoxFuture;
//! use onlyonce_core::conformance::{self, Factory, Setup, Subject};
//! use onlyonce_core::testing::MemoryStore;
//!
//! struct InMemory;
//!
//! impl Factory for InMemory {
//!     fn start(&self, setup: Setup) -> BoxFuture<'_, Option<Subject>> {
//!         let mut builder = MemoryStore::builder()
//!             .window(setup.window)
//!             .lease(setup.lease)
//!             .on_interrupt(setup.on_interrupt)
//!             .result_limit(setup.result_limit)
//!             .key_limit(setup.key_limit)
//!             .in_flight_limit(setup.in_flight_limit)
//!             .held_limit(setup.held_limit);
//!         if let Some(max_ahead) = setup.max_ahead {
//!             builder = builder.stream_time(max_ahead);
//!         }
//!         Box::pin(async move { builder.build().ok().map(Subject::new) })
//!     }
//! }
//!
//! # let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
//! # runtime.block_on(async {
//! conformance::run(&InMemory).await.into_result()
//! # })?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The suite runs inside a Tokio runtime with time enabled, and passes time by sleeping. An engine whose clock can be set passes
//! it at once: see [`Subject::clock`]. On a runtime with several threads, calls that race do so in parallel.

mod bench;
mod claiming;
mod dropping;
mod finishing;
mod forgetting;
mod holding;
mod interrupting;
mod limits;
mod payloads;
mod racing;
mod recording;
mod renewing;
mod report;
mod side_writes;
mod stream_time;
mod suite;
mod waiting;
mod windows;

pub use bench::{Clock, Factory, Setup, Subject};
pub use report::{Failed, Outcome, Report};
pub use suite::run;
