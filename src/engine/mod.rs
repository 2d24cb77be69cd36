//! The engine: it composes the store's parts and owns the order of their effects.
//!
//! `execute.rs` has the order of every call on keys, and `flush.rs` that of a flush. Each states the bug that a step prevents.

mod backlog;
mod backpressure;
mod catch_up;
mod claim;
mod close;
pub(crate) mod core;
mod execute;
mod finish;
#[cfg(test)]
mod fixture;
mod flush;
mod forget;
mod gauges;
pub(crate) mod health;
mod leases;
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
mod writer;
