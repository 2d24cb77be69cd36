//! The state machine of a key, for engines: [`step`] maps the stored [`Entry`], an operation, the time and the policy to an
//! answer and a [`Change`]. [`replay`] gives the change of an event that was written before.
//!
//! No I/O, no lock, no clock. An engine executes every operation in the same way: it looks the entry up, holds its lock, calls
//! [`step`], applies the change, writes its event, and answers. The table of states in the guarantees of `onlyonce` describes
//! the same rules.
//!
//! | call | operation |
//! |--|--|
//! | claim, record | [`Claim`], [`Record`] |
//! | check | none: [`decide`] answers it |
//! | complete, release, resolve | [`Complete`], [`Release`] |
//! | renew or drop a lease | [`Renew`], [`Abandon`] |
//! | forget | [`Forget`] |
//! | open: end the attempts of the last process | [`Crash`], after a [`replay`] of the journal |
//!
//! ```
//! use std::convert::Infallible;
//!
//! use onlyonce_core::machine::{Change, Claim, Decision, Event, KeyRequest, Opened, PlainMoment, Policy, Step, step};
//! use onlyonce_core::OnInterrupt;
//!
//! let now = PlainMoment { time_ms: 1_000, monotonic_ms: 0 };
//! let policy = Policy {
//!     window_ms: 60_000,
//!     on_interrupt: OnInterrupt::Rerun,
//!     is_stream: false,
//!     opened: Opened::at(now),
//!     first_token: 1,
//! };
//! let claim = Claim { request: KeyRequest::default(), until_monotonic_ms: 30_000 };
//! let Step { answer, change } = step(None, claim, now, policy, || Ok::<u64, Infallible>(1))?;
//! assert!(matches!(answer, Decision::Available(available) if available.attempt == 1));
//! assert!(matches!(change, Change::<Vec<u8>>::Immediate(Event::Claimed(processing)) if processing.token == 1));
//! # Ok::<(), Infallible>(())
//! ```

mod entry;
mod event;
#[cfg(test)]
mod exhaustive;
mod finish;
mod moment;
mod step;
#[cfg(test)]
mod tests;
mod transition;

pub use entry::{Backoff, CompletedEntry, Entry, Holder, OwnWindow, Processing};
pub use event::Event;
pub use finish::{Attempt, FinishedBy, remaining_ms};
#[cfg(feature = "testing")]
pub(crate) use moment::millis;
pub use moment::{Moment, PlainMoment};
pub use step::{
    Abandon, Abandoned, Acquired, Change, Claim, Complete, Crash, Finished, Forget, Forgotten, Op, Record, Release,
    Renew, Step, replay, step,
};
pub use transition::{Available, Decision, KeyRequest, LeaseState, Opened, Policy, counts, decide, held, lease_state};
