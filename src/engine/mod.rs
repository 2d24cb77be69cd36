//! The engine: composition of the store's parts, and the order of effects.

mod catch_up;
mod claim;
pub(crate) mod core;
mod finish;
mod lookup;
mod maintenance;
mod meta_entries;
mod outbox;
pub(crate) mod renewal;
pub(crate) mod request;
pub(crate) mod response;
pub(crate) mod sequence;
mod side_writes;
mod timekeeping;
pub(crate) mod transition;
pub(crate) mod waiters;
pub(crate) mod workers;
