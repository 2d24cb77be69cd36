//! The filter: a bit-sliced Bloom filter in memory that returns which buckets may hold a key.
//!
//! Each row has one bit for every bucket, so one lookup covers all buckets. `docs/architecture.md` explains the
//! layout.

pub(crate) mod file;
pub(crate) mod matrix;
pub(crate) mod sizing;
pub(crate) mod stack;
