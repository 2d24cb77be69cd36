//! One file per system.

pub mod bloom;
pub mod fjall;
pub mod liar;
pub mod lmdb;
pub mod moka;
pub mod onlyonce;
pub mod redb;
pub mod redis;
pub mod rocks;
pub mod sqlite;
