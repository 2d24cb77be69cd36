#![doc = include_str!("../README.md")]

mod batch;
mod bucket;
mod claim;
mod clock;
mod codec;
mod config;
mod entry;
mod error;
mod filter;
mod key;
mod state;
mod stats;
mod storage;
mod store;

pub use claim::{Claim, CompleteError, Completed, InProgress, Lease};
pub use clock::{Clock, ManualClock};
pub use config::{Durability, OnInterrupt};
pub use entry::Prior;
pub use error::{Error, Outcome, Result};
pub use key::Key;
pub use stats::{BucketStats, Stats};
pub use store::{Builder, Check, Held, Phase, Ran, Recorded, Resolution, RunError, Store, Stored};
