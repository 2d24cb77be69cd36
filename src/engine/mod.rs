//! The engine: it composes the store's parts and owns the order of their effects.
//!
//! Every call has the same order: look the keys up without a lock, take a record number, lock a key's shard, decide, change
//! the memtable, unlock, write the record. `claim.rs`, `finish.rs` and `flush.rs` state which bug each order prevents.

mod backpressure;
mod catch_up;
mod claim;
pub(crate) mod core;
mod finish;
#[cfg(test)]
mod fixture;
mod flush;
mod gauges;
mod health;
mod lookup;
mod maintenance;
mod meta_entries;
mod open;
mod outbox;
pub(crate) mod renewal;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod sequence;
mod side_writes;
mod timekeeping;
pub(crate) mod waiters;
pub(crate) mod workers;
