//! A slot: one key's entry in an arena, and what it counts for.

use std::sync::Arc;

use onlyonce_core::Fingerprint;
use onlyonce_core::machine::{Holder, OwnWindow, Processing};

/// The memory of a key besides its bytes and its result: the slot, the index entry, and capacity kept for growth.
pub(crate) const OVERHEAD_BYTES: usize = 112;

/// A change of the memtable's counts.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Keys that are leased or committing.
    pub(crate) in_flight: isize,
    /// Keys that may be held for resolution.
    pub(crate) held: isize,
    /// Keys that a flush moves to their buckets: completed keys, and those whose attempt was released.
    pub(crate) flushable: isize,
    pub(crate) flushable_bytes: isize,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.in_flight += other.in_flight;
        self.held += other.held;
        self.flushable += other.flushable;
        self.flushable_bytes += other.flushable_bytes;
    }
}

impl std::ops::Sub for Tally {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            in_flight: self.in_flight - other.in_flight,
            held: self.held - other.held,
            flushable: self.flushable - other.flushable,
            flushable_bytes: self.flushable_bytes - other.flushable_bytes,
        }
    }
}

/// The part of an entry that applies until its record is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    /// The record whose write makes the entry visible.
    pub(crate) record: u64,
    /// The key's attempt until then.
    pub(crate) attempt: u32,
    /// The key's holder until then, unless it is claimed: `Committing` or `CommittingUnclaimed`.
    pub(crate) holder: Holder,
}

impl Pending {
    /// The entry is visible at once.
    pub(super) const NONE: Self = Self { record: 0, attempt: 1, holder: Holder::Committing };
}

/// A key and its entry.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) digest: u64,
    pub(super) token: u64,
    /// The record whose write makes the entry visible. 0: it is visible; no record has this number.
    pub(super) record: u64,
    /// When it was completed, or its holder changed last.
    pub(super) since_ms: u64,
    pub(super) key_start: usize,
    pub(super) key_len: u32,
    pub(super) attempt: u32,
    /// Whether the key is being completed without a claim.
    pub(super) is_unclaimed: bool,
    pub(super) own_window: OwnWindow,
    pub(super) fingerprint: Option<Box<Fingerprint>>,
    pub(super) state: State,
}

#[derive(Debug, Clone)]
pub(super) enum State {
    Removed,
    Processing(Holder),
    /// Completed without a result.
    NoResult,
    /// Completed with a result that was too large to store.
    TooLarge,
    /// Completed; the result is in the heap.
    Heap {
        start: usize,
        len: u32,
    },
    /// Completed; the result is large and has an allocation of its own.
    Separate(Arc<[u8]>),
}

impl Slot {
    pub(super) fn is_removed(&self) -> bool {
        matches!(self.state, State::Removed)
    }

    pub(super) fn tally(&self) -> Tally {
        let result = match &self.state {
            State::Removed => return Tally::default(),
            State::Processing(Holder::Interrupted(_)) => return Tally { held: 1, ..Tally::default() },
            // Resolved by an operator: it counts against neither limit.
            State::Processing(Holder::Resolved(_)) => return Tally::default(),
            State::Processing(
                Holder::Leased { .. } | Holder::Claiming { .. } | Holder::Committing | Holder::CommittingUnclaimed,
            ) => {
                return Tally { in_flight: 1, ..Tally::default() };
            }
            State::Processing(Holder::Released { .. }) | State::NoResult | State::TooLarge => 0,
            State::Heap { len, .. } => *len as usize,
            State::Separate(bytes) => bytes.len(),
        };
        let bytes = self.key_len as usize + result + OVERHEAD_BYTES;
        Tally { flushable: 1, flushable_bytes: bytes as isize, ..Tally::default() }
    }

    /// Whether a flush moves it to a bucket: it is completed or committing a completion, or its attempt was released.
    pub(super) fn is_flushable(&self) -> bool {
        !self.is_removed()
            && (!matches!(self.state, State::Processing(_))
                || matches!(self.state, State::Processing(Holder::Released { .. })))
    }

    pub(super) fn processing(&self, holder: Holder) -> Processing {
        Processing {
            token: self.token,
            attempt: self.attempt,
            since_ms: self.since_ms,
            fingerprint: self.fingerprint.as_deref().copied(),
            own_window: self.own_window,
            holder,
        }
    }

    /// The key's entry until its record is written.
    pub(super) fn unwritten(&self) -> Processing {
        self.processing(match self.state {
            State::Processing(Holder::Leased { until_monotonic_ms }) => Holder::Claiming { until_monotonic_ms },
            _ if self.is_unclaimed => Holder::CommittingUnclaimed,
            _ => Holder::Committing,
        })
    }
}

/// Bytes in allocations of a slot's own: a large result, a fingerprint.
pub(super) fn separate_bytes(state: &State, has_fingerprint: bool) -> usize {
    let result = if let State::Separate(bytes) = state { bytes.len() } else { 0 };
    result + if has_fingerprint { size_of::<Fingerprint>() } else { 0 }
}
