//! The filter: which buckets may hold a key, from memory.
//!
//! One row of bits holds a bit for every bucket, so that one look answers for all of them. See
//! `docs/architecture.md` for why it is laid out this way.

pub(crate) mod file;
pub(crate) mod matrix;
pub(crate) mod sizing;
pub(crate) mod stack;
