//! The machine: what a key's state means, where it is kept, and in which order things happen.

mod along;
pub(crate) mod answer;
mod chunk;
mod claiming;
mod due;
pub(crate) mod engine;
pub(crate) mod hot_table;
pub(crate) mod keeper;
mod lookup;
mod notes;
mod outbox;
mod page;
pub(crate) mod renewal;
pub(crate) mod request;
pub(crate) mod sequence;
mod settling;
mod timekeeping;
pub(crate) mod transition;
pub(crate) mod upkeep;
pub(crate) mod waiting;
