//! The meta entries that a store keeps about itself: their keys in `meta`, and how they are read.

use crate::rocks::db::Db;
use onlyonce_core::{Error, Result};

pub(super) const FORMAT: &str = "format";
pub(super) const SECRET: &str = "secret";
pub(super) const SPAN: &str = "span";
pub(super) const ON_INTERRUPT: &str = "on-interrupt";
pub(super) const TOKENS: &str = "tokens";
pub(super) const HIGH_WATER: &str = "high-water";
pub(super) const FLOOR: &str = "floor";
/// Only in a store whose time runs on the clock.
pub(super) const CLOCK: &str = "clock";
/// Only in a store whose time runs on message timestamps.
pub(super) const STREAM_TIME: &str = "stream-time";

pub(super) fn meta<const N: usize>(db: &Db, name: &'static str) -> Result<[u8; N]> {
    db.meta(name)?.and_then(|value| value.try_into().ok()).ok_or_else(|| corrupt_meta(name))
}

pub(super) fn corrupt_meta(name: &str) -> Error {
    Error::Corrupt {
        place: format!("`{name}` in `meta`"),
        detail: "it is missing or has an unexpected form".to_owned(),
    }
}
