//! The behaviour of a store, a module per topic. One binary, because each binary links RocksDB.
//!
//! Tests that start processes of this binary name the test to run with its module.

#[path = "../common/child.rs"]
mod child;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/oracle.rs"]
mod oracle;

mod claim_lifecycle;
mod clock;
mod format;
#[cfg(feature = "tokio")]
mod future;
mod growth;
mod hostile_input;
mod model;
mod opening;
mod outbox;
mod races;
mod stream_time;
mod window_expiry;
