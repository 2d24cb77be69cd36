//! Tests of the HTTP layer over a store on disk. `crates/http/tests` has the tests that need none.

#[path = "../common/child.rs"]
mod child;
#[path = "../../crates/http/tests/http/handlers.rs"]
#[allow(dead_code, reason = "the tests of onlyonce-http use the rest")]
mod handlers;
mod local;
#[path = "../../crates/http/tests/http/setup.rs"]
#[allow(dead_code, reason = "the tests of onlyonce-http use the rest")]
mod setup;

mod leases;
mod local_store;
mod processes;
