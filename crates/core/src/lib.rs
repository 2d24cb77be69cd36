//! The vocabulary of [onlyonce](https://docs.rs/onlyonce): keys, completions, answers, errors, and the contract of a storage
//! engine. It depends on no storage engine and no async runtime.
//!
//! Applications use the crate `onlyonce`, which re-exports what they need. Depend on this crate to write an adapter for a
//! queue or a framework ([`EngineLease`]), or an engine ([`Engine`]).
//!
//! | to | see |
//! |--|--|
//! | name a piece of work | [`Key`], [`Timestamp`] |
//! | store its outcome | [`Completion`] |
//! | read answers | [`Claim`], [`Completed`], [`InProgress`], [`KeyStatus`], [`RecordOutcome`] |
//! | handle errors | [`Error`], [`ErrorKind`], [`Outcome`] |
//! | write an engine with the rules of `onlyonce` | [`machine`] |
//! | write an adapter | [`Engine`], [`EngineLease`], [`AttemptInfo`], [`OnStoreFailure`] |
//! | test without a disk | `testing::MemoryStore` (feature `testing`) |
//! | test an engine | `conformance` (feature `conformance`) |
#![cfg_attr(docsrs, feature(doc_cfg))]

mod answer;
mod attempt;
mod completion;
#[cfg(feature = "conformance")]
#[cfg_attr(docsrs, doc(cfg(feature = "conformance")))]
pub mod conformance;
mod engine;
mod error;
mod key;
mod lease;
pub mod machine;
#[cfg(feature = "testing")]
#[cfg_attr(docsrs, doc(cfg(feature = "testing")))]
pub mod testing;
mod timestamp;
#[cfg(feature = "bincode")]
mod typed;
pub mod wire;

pub use answer::{
    Claim, Completed, HeldKey, InProgress, KeyStatus, LeaseState, Message, MessageId, OnInterrupt, OnStoreFailure,
    RecordOutcome, Resolution, StoredKey, StoredResult,
};
pub use attempt::{AttemptInfo, FencingToken, PriorAttempt};
pub use completion::{Completion, NewMessage, Offset, SideWrites};
pub use engine::{Answers, BoxFuture, Engine, EngineStats, Finish, Grant, KeepAlive, Limits, Release};
pub use error::{
    Cause, Error, ErrorKind, KeyError, Outcome, Result, ResultError, TimestampError, chain, likely_unit, printable,
};
pub use key::{Fingerprint, Key, MAX_SCOPE};
pub use lease::EngineLease;
pub use timestamp::Timestamp;
