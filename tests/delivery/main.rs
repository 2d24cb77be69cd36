//! The processor of deliveries on a local store: each row of the table of `onlyonce::delivery`, with a queue in memory.

mod ack_failures;
#[path = "../common/mod.rs"]
mod common;
mod duplicates;
mod failures;
mod faults;
mod fixture;
mod ids;
mod leases;
mod queue;
mod redelivery_timeout;
mod store_failures;
mod timestamps;
