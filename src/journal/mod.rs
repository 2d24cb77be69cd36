//! The journal: record numbers, and which records are still being written.

pub(crate) mod numbers;
