//! Tests of the HTTP layer over the in-memory engine, with a real client. The tests of the root package that need a store on
//! disk share `setup` and `handlers`.

mod handlers;
mod memory;
mod setup;

mod auto_traits;
mod concurrency;
mod corpus;
mod disconnects;
mod dispositions;
mod failures;
mod fingerprints;
mod keys;
mod replays;
mod streams;
