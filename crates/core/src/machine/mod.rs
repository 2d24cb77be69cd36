//! The state machine of a key, for engines: it maps the stored [`Entry`], a call and the time to a decision and the next
//! entry.
//!
//! No I/O, no lock, no clock. An engine looks the entry up, holds its lock while the machine decides, stores the next entry,
//! and orders the effects. The table of states in the guarantees of `onlyonce` describes the same rules.
//!
//! | to | call |
//! |--|--|
//! | answer a claim, a check or a record | [`decide`] |
//! | get the entry of a claim or a record | [`Available::claimed`], [`Available::recorded`] |
//! | finish an attempt | [`finishable`], then [`Attempt::completed`] or [`Attempt::released`] |
//! | renew or interrupt a lease | [`Holder::renewed`], [`interrupted`], then [`Processing::with_holder`] |
//! | forget a key | [`check_forget`] |
//! | replay a journal | [`replay`], then [`crashed`] |
//!
//! ```
//! use onlyonce_core::machine::{Decision, KeyRequest, Opened, PlainMoment, Policy, decide};
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
//! let request = KeyRequest::default();
//! let Decision::Available(available) = decide(None, request, now, policy) else { panic!("the key is new") };
//! let processing = available.claimed(None, request, 1, 30_000, now);
//! assert_eq!((processing.token, processing.attempt), (1, 1));
//! ```

mod entry;
mod finish;
mod moment;
mod replay;
#[cfg(test)]
mod tests;
mod transition;

pub use entry::{Backoff, CompletedEntry, Entry, Holder, OwnWindow, Processing};
pub use finish::{
    Attempt, FinishedBy, Forget, check_forget, finishable, has_completed, interrupted, may_finish, remaining_ms,
    taken_back,
};
#[cfg(feature = "testing")]
pub(crate) use moment::millis;
pub use moment::{Moment, PlainMoment};
pub use replay::{Event, Replayed, crashed, replay};
pub use transition::{Available, Decision, KeyRequest, LeaseState, Opened, Policy, counts, decide, held, lease_state};
