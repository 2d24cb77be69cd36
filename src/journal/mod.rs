//! The journal's record numbers.

pub(crate) mod numbers;
