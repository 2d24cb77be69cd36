//! Tests of the HTTP layer, over a socket with a real client.

#[path = "../common/child.rs"]
mod child;
#[path = "../common/mod.rs"]
mod common;
mod handlers;
mod setup;

mod concurrency;
mod disconnects;
mod dispositions;
mod failures;
mod fingerprints;
mod keys;
mod leases;
mod processes;
mod replays;
mod streams;
