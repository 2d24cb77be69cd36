//! The journal of a store, and the numbers of its records.

pub(crate) mod checkpoint;
mod medium;
pub(crate) mod numbers;
pub(crate) mod replayed;
pub(crate) mod store_journal;
pub(crate) mod tx;
