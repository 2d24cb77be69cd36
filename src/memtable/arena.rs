//! A page: keys of one stripe and what is known of them, packed. An index of places, a list of slots, a heap of bytes.
//!
//! Nothing in it is an allocation of its own but large results and fingerprints, so that a key costs no call of the
//! allocator, and a page that was sealed goes in one piece.

use std::sync::Arc;

use hashbrown::HashTable;

use crate::entry::{CompletedEntry, Entry, Holder, OwnWindow, Processing};
use crate::invariant::{Invariant, Poison, STRICT};
use crate::journal::numbers::RecordNumbers;
use onlyonce_core::Error;
use onlyonce_core::Fingerprint;
use onlyonce_core::StoredResult;

/// Results up to this size lie in the heap; a larger one would be copied each time the heap grows.
const HEAP_RESULT_BYTES: usize = 1_024;

/// What a key takes beside its own bytes and its result's: a slot, a place in the index and the room kept for growth.
pub(crate) const OVERHEAD_BYTES: usize = 112;

/// What a write changes in the figures of the table.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Keys that somebody works on.
    pub(crate) in_flight: isize,
    /// Keys that wait for a decision.
    pub(crate) held: isize,
    /// Keys that a flush moves to their buckets: completed ones, and those whose attempt has ended.
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

/// A change that counts from the moment on at which its row is written.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    pub(crate) record: u64,
    /// What the key is until then: its attempt, and `Committing` or `CommittingUnclaimed`.
    pub(crate) attempt: u32,
    pub(crate) holder: Holder,
}

impl Pending {
    /// Counts at once.
    const NONE: Self = Self { record: 0, attempt: 1, holder: Holder::Committing };
}

/// A key, and what is known of it.
#[derive(Debug, Clone)]
struct Slot {
    digest: u64,
    token: u64,
    /// The row that brings it into force; none is numbered 0.
    record: u64,
    /// When it was completed, or its holder became what it is.
    since_ms: u64,
    key_start: usize,
    key_len: u32,
    attempt: u32,
    /// Whether nobody had claimed the key that is being completed.
    is_unclaimed: bool,
    own_window: OwnWindow,
    fingerprint: Option<Box<Fingerprint>>,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Removed.
    Gone,
    Processing(Holder),
    /// Completed, with nothing to keep.
    NoResult,
    /// Completed, with a result too large to keep.
    TooLarge,
    /// Completed; its result lies in the heap.
    Heap {
        start: usize,
        len: u32,
    },
    /// Completed; its result is large.
    Separate(Arc<[u8]>),
}

impl Slot {
    fn tally(&self) -> Tally {
        let result = match &self.state {
            State::Gone => return Tally::default(),
            State::Processing(Holder::Interrupted(_)) => return Tally { held: 1, ..Tally::default() },
            // An operator has decided already: it is in nobody's way.
            State::Processing(Holder::Resolved(_)) => return Tally::default(),
            State::Processing(Holder::Leased { .. } | Holder::Committing | Holder::CommittingUnclaimed) => {
                return Tally { in_flight: 1, ..Tally::default() };
            }
            State::Processing(Holder::Released { .. }) | State::NoResult | State::TooLarge => 0,
            State::Heap { len, .. } => *len as usize,
            State::Separate(bytes) => bytes.len(),
        };
        let bytes = self.key_len as usize + result + OVERHEAD_BYTES;
        Tally { flushable: 1, flushable_bytes: bytes as isize, ..Tally::default() }
    }

    /// Whether a flush moves it to a bucket: it is completed, or about to be, or its attempt has ended.
    fn is_flushable(&self) -> bool {
        !matches!(self.state, State::Gone)
            && (!matches!(self.state, State::Processing(_))
                || matches!(self.state, State::Processing(Holder::Released { .. })))
    }

    fn processing(&self, holder: Holder) -> Processing {
        Processing {
            token: self.token,
            attempt: self.attempt,
            since_ms: self.since_ms,
            fingerprint: self.fingerprint.as_deref().copied(),
            own_window: self.own_window,
            holder,
        }
    }

    /// What the key is while the row that changes it is on its way.
    fn before(&self) -> Processing {
        self.processing(if self.is_unclaimed { Holder::CommittingUnclaimed } else { Holder::Committing })
    }
}

/// A key that a flush moves, in its place.
#[derive(Clone, Copy)]
pub(crate) struct Flushable<'a> {
    arena: &'a ShardArena,
    slot: &'a Slot,
}

impl<'a> Flushable<'a> {
    pub(crate) fn digest(self) -> u64 {
        self.slot.digest
    }

    pub(crate) fn key(self) -> &'a [u8] {
        self.arena.key(self.slot)
    }

    /// When it was completed, or its attempt ended.
    pub(crate) fn time_ms(self) -> u64 {
        self.slot.since_ms
    }

    pub(crate) fn entry(self) -> Option<Entry<&'a [u8]>> {
        self.arena.at_rest(self.slot)
    }

    /// What to fail with where it has nothing that it was completed with.
    #[cold]
    pub(crate) fn is_not(self) -> Error {
        let (token, state) = (self.slot.token, &self.slot.state);
        self.arena.poison.broken(Invariant::OnlyEndedFlushed, format_args!("the key with token {token} is {state:?}"))
    }
}

/// Keys of one stripe. Places of slots that are gone are used again by nobody: the next split leaves them behind.
#[derive(Debug, Default)]
pub(crate) struct ShardArena {
    index: HashTable<u32>,
    slots: Vec<Slot>,
    heap: Vec<u8>,
    /// Bytes of what lies apart: large results, fingerprints.
    separate_bytes: usize,
    poison: Arc<Poison>,
}

impl ShardArena {
    /// An empty page, which ends the store where an invariant is broken.
    pub(crate) fn of(poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..Self::default() }
    }

    /// An empty page with room for what another holds.
    fn like(other: &Self) -> Self {
        Self {
            index: HashTable::with_capacity(other.index.len()),
            slots: Vec::with_capacity(other.index.len()),
            heap: Vec::with_capacity(other.heap.len()),
            separate_bytes: 0,
            poison: Arc::clone(&other.poison),
        }
    }

    #[cfg(test)]
    pub(crate) fn lose_slots(&mut self) {
        self.slots.clear();
    }

    /// The memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.len() * OVERHEAD_BYTES + self.heap.len() + self.separate_bytes
    }

    // A part of few callers: as a call of its own it costs every key some thirty instructions.
    #[inline(always)]
    fn find(&self, digest: u64, key: &[u8]) -> Option<&Slot> {
        let Self { slots, heap, poison, .. } = self;
        let slot_index = *self.index.find(spread(digest), |slot_index| is(slots, heap, *slot_index, digest, key))?;
        let slot = slots.get(slot_index as usize);
        if slot.is_none_or(|slot| !lies_in(heap, slot)) {
            lost(poison, slot, heap, slot_index);
            return None;
        }
        slot
    }

    fn key(&self, slot: &Slot) -> &[u8] {
        self.bytes_at(slot.key_start, slot.key_len)
    }

    fn bytes_at(&self, start: usize, len: u32) -> &[u8] {
        self.heap.get(start..start.wrapping_add(len as usize)).unwrap_or_else(|| {
            no_bytes(&self.poison, start, len, self.heap.len());
            &[]
        })
    }

    /// What is known of a key.
    pub(crate) fn get(&self, digest: u64, key: &[u8], records: &RecordNumbers) -> Option<Entry> {
        self.find(digest, key).map(|slot| self.entry(slot, records))
    }

    /// What is known of a key in a page that was flushed.
    pub(crate) fn get_flushed(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        self.find(digest, key).and_then(|slot| self.at_rest(slot)).map(|entry| entry.shared())
    }

    /// What a slot says when its row is written; `None` if it is in flight.
    fn at_rest<'a>(&'a self, slot: &'a Slot) -> Option<Entry<&'a [u8]>> {
        match &slot.state {
            State::Processing(holder @ Holder::Released { .. }) => Some(Entry::Processing(slot.processing(*holder))),
            _ => self.done(slot).map(Entry::Completed),
        }
    }

    fn entry(&self, slot: &Slot, records: &RecordNumbers) -> Entry {
        if !records.is_finished(slot.record) {
            return Entry::Processing(slot.before());
        }
        match (&slot.state, self.done(slot)) {
            (_, Some(done)) => Entry::Completed(done.shared()),
            (State::Processing(holder), None) => Entry::Processing(slot.processing(*holder)),
            (_, None) => {
                self.is_gone();
                Entry::Processing(slot.before())
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn is_gone(&self) {
        self.poison.broken(Invariant::IndexedSlot, format_args!("it points to one whose key was removed"));
    }

    /// What a slot was completed with.
    fn done<'a>(&'a self, slot: &'a Slot) -> Option<CompletedEntry<&'a [u8]>> {
        let result = match &slot.state {
            State::Gone | State::Processing(_) => return None,
            State::NoResult => StoredResult::None,
            State::TooLarge => StoredResult::TooLarge,
            State::Heap { start, len } => StoredResult::Bytes(self.bytes_at(*start, *len)),
            State::Separate(bytes) => StoredResult::Bytes(&**bytes),
        };
        let fingerprint = slot.fingerprint.as_deref().copied();
        let Slot { token, since_ms: completed_ms, own_window, .. } = *slot;
        Some(CompletedEntry { token, completed_ms, fingerprint, own_window, result })
    }

    /// Puts an entry in the place of whatever was there.
    pub(crate) fn set(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>) -> Tally {
        self.set_pending(digest, key, entry, Pending::NONE)
    }

    /// As [`ShardArena::set`], from the moment on at which a row is written.
    pub(crate) fn set_pending(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>, pending: Pending) -> Tally {
        let (token, since_ms, attempt, fingerprint, own_window, state) = match entry {
            Entry::Processing(processing) => {
                let Processing { token, attempt, since_ms, fingerprint, own_window, holder } = processing;
                (token, since_ms, attempt, fingerprint, own_window, State::Processing(holder))
            }
            Entry::Completed(done) => {
                let state = self.put_result(done.result);
                (done.token, done.completed_ms, pending.attempt, done.fingerprint, done.own_window, state)
            }
        };
        self.separate_bytes += separate_bytes(&state, fingerprint.is_some());
        let Self { index, slots, heap, poison, .. } = self;
        let is = |slot_index: &u32| is(slots, heap, *slot_index, digest, key);
        let hash = |slot_index: &u32| hash(slots, *slot_index);
        let mut new = Slot {
            digest,
            token,
            record: pending.record,
            since_ms,
            key_start: heap.len(),
            key_len: key.len() as u32,
            attempt,
            is_unclaimed: pending.holder == Holder::CommittingUnclaimed,
            own_window,
            fingerprint: fingerprint.map(Box::new),
            state,
        };
        match index.find(spread(digest), is).copied() {
            Some(slot_index) => {
                let Some(slot) = slots.get_mut(slot_index as usize).filter(|slot| lies_in(heap, slot)) else {
                    lost(poison, slots.get(slot_index as usize), heap, slot_index);
                    return Tally::default();
                };
                new.key_start = slot.key_start;
                let tally = new.tally() - slot.tally();
                *slot = new;
                tally
            }
            None => {
                index.insert_unique(spread(digest), slots.len() as u32, hash);
                heap.extend_from_slice(key);
                let tally = new.tally();
                slots.push(new);
                tally
            }
        }
    }

    fn put_result(&mut self, result: StoredResult<&[u8]>) -> State {
        match result {
            StoredResult::None => State::NoResult,
            StoredResult::TooLarge => State::TooLarge,
            StoredResult::Bytes(bytes) if bytes.len() > HEAP_RESULT_BYTES => State::Separate(Arc::from(bytes)),
            StoredResult::Bytes(bytes) => {
                let start = self.heap.len();
                self.heap.extend_from_slice(bytes);
                State::Heap { start, len: bytes.len() as u32 }
            }
        }
    }

    pub(crate) fn remove(&mut self, digest: u64, key: &[u8]) -> Tally {
        let Self { index, slots, heap, poison, .. } = self;
        let is = |slot_index: &u32| is(slots, heap, *slot_index, digest, key);
        // A key that is not there was removed before.
        let Ok(found) = index.find_entry(spread(digest), is) else { return Tally::default() };
        let (slot_index, _) = found.remove();
        let Some(slot) = slots.get_mut(slot_index as usize).filter(|slot| lies_in(heap, slot)) else {
            lost(poison, slots.get(slot_index as usize), heap, slot_index);
            return Tally::default();
        };
        let before = slot.tally();
        slot.state = State::Gone;
        Tally::default() - before
    }

    /// Visits the keys in flight, also those whose completion is on its way.
    pub(crate) fn in_flight(&self, records: &RecordNumbers) -> impl Iterator<Item = (u64, &[u8], Processing)> {
        self.slots.iter().filter(|slot| !matches!(slot.state, State::Gone)).filter_map(|slot| {
            match self.entry(slot, records) {
                Entry::Processing(processing) => Some((slot.digest, self.key(slot), processing)),
                Entry::Completed(_) => None,
            }
        })
    }

    /// Visits the keys that a flush moves, in no order.
    pub(crate) fn flushable(&self) -> impl Iterator<Item = Flushable<'_>> {
        self.slots.iter().filter(|slot| slot.is_flushable()).map(|slot| Flushable { arena: self, slot })
    }

    /// Takes out the keys whose work has ended by rows below `start`, all of which are written, as a page of its own. What
    /// is in flight stays if `keep` says so; it is asked about each such key.
    pub(crate) fn freeze(
        &mut self,
        start: u64,
        records: &RecordNumbers,
        mut keep: impl FnMut(&[u8], &Processing) -> bool,
    ) -> (Self, Tally) {
        let empty = Self::like(self);
        if STRICT {
            self.assert_sound();
        }
        let mut frozen = std::mem::replace(self, empty);
        let mut tally = Tally::default();
        let (indexed, mut keys) = (frozen.index.len(), 0);
        for slot_index in 0..frozen.slots.len() {
            let Some(slot) = frozen.slots.get(slot_index) else {
                lost(&frozen.poison, None, &frozen.heap, slot_index as u32);
                break;
            };
            keys += usize::from(!matches!(slot.state, State::Gone));
            let stays = match slot.state {
                State::Gone => continue,
                _ if !slot.is_flushable() => true,
                _ => slot.record >= start,
            };
            if !stays {
                continue;
            }
            let key = frozen.key(slot);
            // A completion whose row is written behind the cut needs nobody's leave.
            let kept = match frozen.entry(slot, records) {
                Entry::Processing(processing) => keep(key, &processing),
                Entry::Completed(_) => true,
            };
            let (digest, key) = (slot.digest, key.to_vec());
            if kept {
                self.take(&frozen, slot);
            } else {
                tally += Tally::default() - slot.tally();
            }
            frozen.remove(digest, &key);
        }
        if keys != indexed {
            let detail = format_args!("{indexed} entries for {keys} keys");
            frozen.poison.broken(Invariant::IndexedSlot, detail);
        }
        (frozen, tally)
    }

    /// Fails where an invariant of a page is broken. Visits every key.
    fn assert_sound(&self) {
        let keys = self.slots.iter().filter(|slot| !matches!(slot.state, State::Gone));
        for slot in keys {
            let found = self.find(slot.digest, self.key(slot));
            if !found.is_some_and(|found| std::ptr::eq(found, slot)) {
                let detail = format_args!("the key with token {} is not found in its page", slot.token);
                self.poison.broken(Invariant::IndexedSlot, detail);
            }
        }
    }

    /// Copies a slot of another page, which has no other here.
    fn take(&mut self, other: &Self, slot: &Slot) {
        let key_start = self.heap.len();
        self.heap.extend_from_slice(other.key(slot));
        let state = match (&slot.state, other.done(slot)) {
            (State::Heap { .. }, Some(CompletedEntry { result, .. })) => self.put_result(result),
            (state, _) => state.clone(),
        };
        self.separate_bytes += separate_bytes(&state, slot.fingerprint.is_some());
        let slot_index = self.slots.len() as u32;
        self.slots.push(Slot { key_start, state, ..slot.clone() });
        let slots = &self.slots;
        self.index.insert_unique(spread(slot.digest), slot_index, |slot_index| hash(slots, *slot_index));
    }

    /// Takes back what was split off, where nothing newer is known.
    pub(crate) fn absorb(&mut self, frozen: &Self) -> Tally {
        let mut tally = Tally::default();
        for slot in frozen.slots.iter().filter(|slot| !matches!(slot.state, State::Gone)) {
            if self.find(slot.digest, frozen.key(slot)).is_none() {
                self.take(frozen, slot);
            } else {
                tally += Tally::default() - slot.tally();
            }
        }
        tally
    }

    /// Removes every key for which `keep` says false.
    pub(crate) fn retain(&mut self, records: &RecordNumbers, mut keep: impl FnMut(&Entry) -> bool) -> Tally {
        let gone: Vec<(u64, Vec<u8>)> = self
            .slots
            .iter()
            .filter(|slot| !matches!(slot.state, State::Gone) && !keep(&self.entry(slot, records)))
            .map(|slot| (slot.digest, self.key(slot).to_vec()))
            .collect();
        let mut tally = Tally::default();
        for (digest, key) in gone {
            tally += self.remove(digest, &key);
        }
        tally
    }

    /// The figures of all its keys.
    pub(crate) fn tally(&self) -> Tally {
        self.slots.iter().fold(Tally::default(), |mut sum, slot| {
            sum += slot.tally();
            sum
        })
    }
}

fn separate_bytes(state: &State, has_fingerprint: bool) -> usize {
    let result = if let State::Separate(bytes) = state { bytes.len() } else { 0 };
    result + if has_fingerprint { size_of::<Fingerprint>() } else { 0 }
}

/// The top bits of a digest are the same throughout a page; the index wants others at the top.
fn spread(digest: u64) -> u64 {
    digest.rotate_left(32)
}

/// Whether an entry of the index is of this key. One without a slot, or whose key lies outside the page, is taken for it, and
/// found out by whoever looks at the slot: what calls nothing that can fail is part of its caller.
fn is(slots: &[Slot], heap: &[u8], slot_index: u32, digest: u64, key: &[u8]) -> bool {
    slots.get(slot_index as usize).is_none_or(|slot| {
        slot.digest == digest && heap.get(slot.key_start..key_end(slot)).is_none_or(|found| found == key)
    })
}

fn lies_in(heap: &[u8], slot: &Slot) -> bool {
    slot.key_start <= key_end(slot) && key_end(slot) <= heap.len()
}

fn key_end(slot: &Slot) -> usize {
    slot.key_start.wrapping_add(slot.key_len as usize)
}

fn hash(slots: &[Slot], slot_index: u32) -> u64 {
    slots.get(slot_index as usize).map_or(0, |slot| spread(slot.digest))
}

/// An entry of the index without a slot, or whose slot has no key.
#[cold]
#[inline(never)]
fn lost(poison: &Poison, slot: Option<&Slot>, heap: &[u8], slot_index: u32) {
    match slot {
        None => drop(poison.broken(Invariant::IndexedSlot, format_args!("there is no slot {slot_index}"))),
        Some(slot) => no_bytes(poison, slot.key_start, slot.key_len, heap.len()),
    }
}

#[cold]
#[inline(never)]
fn no_bytes(poison: &Poison, start: usize, len: u32, heap: usize) {
    poison.broken(Invariant::KeyInArena, format_args!("{len} bytes from {start} on, of {heap}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leased(token: u64, fingerprint: Option<Fingerprint>) -> Entry<&'static [u8]> {
        let holder = Holder::Leased { until_monotonic_ms: 1 };
        Entry::Processing(Processing {
            token,
            attempt: 1,
            since_ms: 0,
            own_window: OwnWindow::NONE,
            fingerprint,
            holder,
        })
    }

    fn completed(token: u64, result: &[u8]) -> Entry<&[u8]> {
        Entry::Completed(CompletedEntry {
            token,
            completed_ms: 5,
            own_window: OwnWindow::NONE,
            fingerprint: None,
            result: StoredResult::Bytes(result),
        })
    }

    fn behind_the_cut(record: u64) -> Pending {
        Pending { record, attempt: 1, holder: Holder::Committing }
    }

    #[test]
    fn an_own_window_lies_in_the_padding_of_a_slot() {
        const WITHOUT_PADDING: usize =
            5 * size_of::<u64>() + 2 * size_of::<u32>() + size_of::<bool>() + size_of::<usize>() + size_of::<State>();
        assert_eq!(size_of::<Slot>(), WITHOUT_PADDING.next_multiple_of(align_of::<Slot>()));
        let (arena, window) = (&mut ShardArena::default(), OwnWindow::from_ms(7).unwrap());
        let Entry::Completed(done) = completed(1, b"r") else { panic!("it is completed") };
        arena.set(1, b"k", Entry::Completed(CompletedEntry { own_window: window, ..done }));
        let Some(Entry::Completed(done)) = arena.get(1, b"k", &RecordNumbers::default()) else { panic!("it is there") };
        assert_eq!(done.own_window, window);
    }

    #[test]
    fn a_page_knows_the_memory_that_it_takes_also_of_what_a_split_leaves() {
        let records = RecordNumbers::default();
        let mut arena = ShardArena::default();
        assert_eq!(arena.bytes(), 0);
        arena.set(1, b"ab", leased(1, Some([7; 16])));
        assert_eq!(arena.bytes(), OVERHEAD_BYTES + 2 + 16);
        arena.set(2, b"c", completed(2, &[0; 10]));
        arena.set_pending(3, b"d", completed(3, &[0; 2_000]), behind_the_cut(9));
        arena.set_pending(4, b"e", completed(4, &[0; 30]), behind_the_cut(9));
        assert_eq!(arena.bytes(), 4 * OVERHEAD_BYTES + (2 + 16) + (1 + 10) + (1 + 2_000) + (1 + 30));
        let (frozen, _) = arena.freeze(9, &records, |_, _| true);
        assert_eq!(arena.bytes(), 3 * OVERHEAD_BYTES + (2 + 16) + (1 + 2_000) + (1 + 30));
        let keys: Vec<&[u8]> = frozen.flushable().map(Flushable::key).collect();
        assert_eq!(keys, [b"c"]);
        for (digest, key, len) in [(3, b"d", 2_000), (4, b"e", 30)] {
            let Some(Entry::Completed(done)) = arena.get(digest, key, &records) else { panic!("it is behind the cut") };
            assert_eq!(done.result, StoredResult::Bytes(Arc::from(vec![0; len])));
        }
    }

    #[test]
    fn what_was_removed_is_gone_for_a_split_and_for_whoever_removes_more() {
        let records = RecordNumbers::default();
        let mut arena = ShardArena::default();
        arena.set_pending(1, b"gone", completed(1, b"r"), behind_the_cut(9));
        arena.remove(1, b"gone");
        arena.set(2, b"again", leased(2, None));
        arena.remove(2, b"again");
        arena.set(2, b"again", leased(3, None));
        assert_eq!(arena.retain(&records, |_| true), Tally::default());
        assert_eq!(arena.get(2, b"again", &records).unwrap().token(), 3);
        let mut asked = Vec::new();
        let (frozen, tally) = arena.freeze(5, &records, |key, _| {
            asked.push(key.to_vec());
            true
        });
        assert_eq!((asked, tally), (vec![b"again".to_vec()], Tally::default()));
        assert_eq!((frozen.flushable().count(), arena.in_flight(&records).count()), (0, 1));
        assert!(arena.get(1, b"gone", &records).is_none());
    }

    fn leased_tally() -> Tally {
        Tally { in_flight: 1, ..Tally::default() }
    }

    /// What a page whose parts were damaged says when it is used.
    fn broken(damage: impl FnOnce(&mut ShardArena), uses: impl FnOnce(&mut ShardArena)) -> String {
        let mut arena = ShardArena::default();
        arena.set(1, b"first", completed(1, b"its result"));
        arena.set(2, b"second", leased(2, None));
        arena.poison.unbroken().unwrap();
        damage(&mut arena);
        uses(&mut arena);
        arena.poison.unbroken().unwrap_err().to_string()
    }

    #[test]
    fn an_index_entry_without_a_slot_breaks_an_invariant_whatever_is_asked() {
        type Use = fn(&mut ShardArena);
        let uses: [Use; 4] = [
            |arena| drop(arena.get(2, b"second", &RecordNumbers::default())),
            |arena| assert_ne!(arena.set(2, b"second", completed(3, b"r")), leased_tally()),
            |arena| assert_eq!(arena.remove(2, b"second"), Tally::default()),
            |arena| drop(arena.freeze(9, &RecordNumbers::default(), |_, _| true)),
        ];
        for uses in uses {
            let said = broken(|arena| arena.slots.truncate(1), uses);
            assert!(said.contains("points to a slot"), "{said}");
        }
        let gone = |arena: &mut ShardArena| arena.slots[1].state = State::Gone;
        let said = broken(gone, |arena| drop(arena.get(2, b"second", &RecordNumbers::default())));
        assert!(said.contains("points to a slot"), "{said}");
    }

    #[test]
    fn a_key_or_a_result_outside_its_page_breaks_an_invariant() {
        let get = |arena: &mut ShardArena| drop(arena.get(1, b"first", &RecordNumbers::default()));
        let said = broken(|arena| arena.slots[0].key_start = 1_000, get);
        assert!(said.contains("within the bytes of their page (5 bytes from 1000 on, of 21)"), "{said}");
        let said = broken(|arena| arena.slots[0].key_start = usize::MAX, get);
        assert!(said.contains("within the bytes of their page"), "{said}");
        let said = broken(|arena| arena.slots[0].state = State::Heap { start: 5, len: 500 }, get);
        assert!(said.contains("within the bytes of their page"), "{said}");
        let said = broken(
            |arena| arena.heap.truncate(3),
            |arena| assert!(arena.flushable().all(|here| here.key().is_empty())),
        );
        assert!(said.contains("within the bytes of their page"), "{said}");
    }
}
