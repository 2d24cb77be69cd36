//! Support for tests, benches and fuzzers: failpoints, checks, and synchronisation primitives that a model checker
//! can replace.

pub(crate) mod failpoint;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzz_checks;
#[cfg(feature = "__internals")]
#[doc(hidden)]
pub mod internals;
pub(crate) mod sync_shim;
