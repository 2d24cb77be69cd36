//! A page: keys of one stripe and what is known of them, packed. An index of places, a list of slots, a heap of bytes.
//!
//! Nothing in it is an allocation of its own but large results and fingerprints, so that a key costs no call of the
//! allocator, and a page that was sealed goes in one piece.

use std::sync::Arc;

use hashbrown::HashTable;

use crate::entry::{Done, Entry, Holder, Kept, Processing};
use crate::error::Error;
use crate::invariant::{Invariant, Poison, STRICT};
use crate::key::Fingerprint;
use crate::storage::journal::RowNumbers;

/// Results up to this size lie in the heap; a larger one would be copied each time the heap grows.
const HEAP_RESULT_BYTES: usize = 1_024;

/// What a key takes beside its own bytes and its result's: a slot, a place in the index and the room kept for growth.
pub(super) const OVERHEAD_BYTES: usize = 112;

/// What a write changes in the figures of the table.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tally {
    /// Keys that somebody works on.
    pub(super) in_flight: isize,
    /// Keys that wait for a decision.
    pub(super) held: isize,
    /// Keys that a flush moves to their buckets: completed ones, and those whose attempt has ended.
    pub(super) flushable: isize,
    pub(super) flushable_bytes: isize,
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
    pub(crate) row: u64,
    /// What the key is until then: its attempt, and `Settling` or `Recording`.
    pub(crate) attempt: u32,
    pub(crate) holder: Holder,
}

impl Pending {
    /// Counts at once.
    const NONE: Self = Self { row: 0, attempt: 1, holder: Holder::Settling };
}

/// A key, and what is known of it.
#[derive(Debug, Clone)]
struct Slot {
    digest: u64,
    token: u64,
    /// The row that brings it into force; none is numbered 0.
    row: u64,
    /// When it was completed, or its holder became what it is.
    since_ms: u64,
    key_start: usize,
    key_len: u32,
    attempt: u32,
    /// Whether nobody had claimed the key that is being completed.
    recording: bool,
    fingerprint: Option<Box<Fingerprint>>,
    state: State,
}

#[derive(Debug, Clone)]
enum State {
    /// Removed.
    Gone,
    Processing(Holder),
    /// Completed, with nothing to keep.
    Absent,
    /// Completed, with a result too large to keep.
    Omitted,
    /// Completed; its result lies in the heap.
    Heap {
        start: usize,
        len: u32,
    },
    /// Completed; its result is large.
    Apart(Arc<[u8]>),
}

impl Slot {
    fn tally(&self) -> Tally {
        let result = match &self.state {
            State::Gone => return Tally::default(),
            State::Processing(Holder::Interrupted(_)) => return Tally { held: 1, ..Tally::default() },
            // An operator has decided already: it is in nobody's way.
            State::Processing(Holder::Resolved(_)) => return Tally::default(),
            State::Processing(Holder::Leased { .. } | Holder::Settling | Holder::Recording) => {
                return Tally { in_flight: 1, ..Tally::default() };
            }
            State::Processing(Holder::Open { .. }) | State::Absent | State::Omitted => 0,
            State::Heap { len, .. } => *len as usize,
            State::Apart(bytes) => bytes.len(),
        };
        let bytes = self.key_len as usize + result + OVERHEAD_BYTES;
        Tally { flushable: 1, flushable_bytes: bytes as isize, ..Tally::default() }
    }

    /// Whether a flush moves it to a bucket: it is completed, or about to be, or its attempt has ended.
    fn is_flushable(&self) -> bool {
        !matches!(self.state, State::Gone)
            && (!matches!(self.state, State::Processing(_))
                || matches!(self.state, State::Processing(Holder::Open { .. })))
    }

    fn processing(&self, holder: Holder) -> Processing {
        Processing {
            token: self.token,
            attempt: self.attempt,
            since_ms: self.since_ms,
            fingerprint: self.fingerprint.as_deref().copied(),
            holder,
        }
    }

    /// What the key is while the row that changes it is on its way.
    fn before(&self) -> Processing {
        self.processing(if self.recording { Holder::Recording } else { Holder::Settling })
    }
}

/// A key that a flush moves, in its place.
#[derive(Clone, Copy)]
pub(super) struct Flushable<'a> {
    page: &'a Page,
    slot: &'a Slot,
}

impl<'a> Flushable<'a> {
    pub(super) fn digest(self) -> u64 {
        self.slot.digest
    }

    pub(super) fn key(self) -> &'a [u8] {
        self.page.key(self.slot)
    }

    /// When it was completed, or its attempt ended.
    pub(super) fn time_ms(self) -> u64 {
        self.slot.since_ms
    }

    pub(super) fn entry(self) -> Option<Entry<&'a [u8]>> {
        self.page.at_rest(self.slot)
    }

    /// What to fail with where it has nothing that it was completed with.
    #[cold]
    pub(super) fn is_not(self) -> Error {
        let (token, state) = (self.slot.token, &self.slot.state);
        self.page.poison.broken(Invariant::OnlyEndedSealed, format_args!("the key with token {token} is {state:?}"))
    }
}

/// Keys of one stripe. Places of slots that are gone are used again by nobody: the next split leaves them behind.
#[derive(Debug, Default)]
pub(super) struct Page {
    places: HashTable<u32>,
    slots: Vec<Slot>,
    heap: Vec<u8>,
    /// Bytes of what lies apart: large results, fingerprints.
    apart_bytes: usize,
    poison: Arc<Poison>,
}

impl Page {
    /// An empty page, which ends the store where an invariant is broken.
    pub(super) fn of(poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..Self::default() }
    }

    /// An empty page with room for what another holds.
    fn like(other: &Self) -> Self {
        Self {
            places: HashTable::with_capacity(other.places.len()),
            slots: Vec::with_capacity(other.places.len()),
            heap: Vec::with_capacity(other.heap.len()),
            apart_bytes: 0,
            poison: Arc::clone(&other.poison),
        }
    }

    #[cfg(test)]
    pub(super) fn lose_slots(&mut self) {
        self.slots.clear();
    }

    /// The memory it takes.
    pub(super) fn bytes(&self) -> usize {
        self.slots.len() * OVERHEAD_BYTES + self.heap.len() + self.apart_bytes
    }

    // A part of few callers: as a call of its own it costs every key some thirty instructions.
    #[inline(always)]
    fn find(&self, digest: u64, key: &[u8]) -> Option<&Slot> {
        let Self { slots, heap, poison, .. } = self;
        let place = *self.places.find(spread(digest), |place| is(slots, heap, *place, digest, key))?;
        let slot = slots.get(place as usize);
        if slot.is_none_or(|slot| !lies_in(heap, slot)) {
            lost(poison, slot, heap, place);
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
    pub(super) fn get(&self, digest: u64, key: &[u8], rows: &RowNumbers) -> Option<Entry> {
        self.find(digest, key).map(|slot| self.entry(slot, rows))
    }

    /// What is known of a key in a page that was flushed.
    pub(super) fn get_flushed(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        self.find(digest, key).and_then(|slot| self.at_rest(slot)).map(|entry| entry.shared())
    }

    /// What a slot says when its row is written; `None` if it is in flight.
    fn at_rest<'a>(&'a self, slot: &'a Slot) -> Option<Entry<&'a [u8]>> {
        match &slot.state {
            State::Processing(holder @ Holder::Open { .. }) => Some(Entry::Processing(slot.processing(*holder))),
            _ => self.done(slot).map(Entry::Completed),
        }
    }

    fn entry(&self, slot: &Slot, rows: &RowNumbers) -> Entry {
        if !rows.is_settled(slot.row) {
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
    fn done<'a>(&'a self, slot: &'a Slot) -> Option<Done<&'a [u8]>> {
        let result = match &slot.state {
            State::Gone | State::Processing(_) => return None,
            State::Absent => Kept::Absent,
            State::Omitted => Kept::Omitted,
            State::Heap { start, len } => Kept::Stored(self.bytes_at(*start, *len)),
            State::Apart(bytes) => Kept::Stored(&**bytes),
        };
        let fingerprint = slot.fingerprint.as_deref().copied();
        Some(Done { token: slot.token, completed_ms: slot.since_ms, fingerprint, result })
    }

    /// Puts an entry in the place of whatever was there.
    pub(super) fn set(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>) -> Tally {
        self.settle(digest, key, entry, Pending::NONE)
    }

    /// As [`Page::set`], from the moment on at which a row is written.
    pub(super) fn settle(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>, pending: Pending) -> Tally {
        let (token, since_ms, attempt, fingerprint, state) = match entry {
            Entry::Processing(processing) => {
                let Processing { token, attempt, since_ms, fingerprint, holder } = processing;
                (token, since_ms, attempt, fingerprint, State::Processing(holder))
            }
            Entry::Completed(done) => {
                let state = self.keep(done.result);
                (done.token, done.completed_ms, pending.attempt, done.fingerprint, state)
            }
        };
        self.apart_bytes += apart_bytes(&state, fingerprint.is_some());
        let Self { places, slots, heap, poison, .. } = self;
        let is = |place: &u32| is(slots, heap, *place, digest, key);
        let hash = |place: &u32| hash(slots, *place);
        let mut new = Slot {
            digest,
            token,
            row: pending.row,
            since_ms,
            key_start: heap.len(),
            key_len: key.len() as u32,
            attempt,
            recording: pending.holder == Holder::Recording,
            fingerprint: fingerprint.map(Box::new),
            state,
        };
        match places.find(spread(digest), is).copied() {
            Some(place) => {
                let Some(slot) = slots.get_mut(place as usize).filter(|slot| lies_in(heap, slot)) else {
                    lost(poison, slots.get(place as usize), heap, place);
                    return Tally::default();
                };
                new.key_start = slot.key_start;
                let tally = new.tally() - slot.tally();
                *slot = new;
                tally
            }
            None => {
                places.insert_unique(spread(digest), slots.len() as u32, hash);
                heap.extend_from_slice(key);
                let tally = new.tally();
                slots.push(new);
                tally
            }
        }
    }

    fn keep(&mut self, result: Kept<&[u8]>) -> State {
        match result {
            Kept::Absent => State::Absent,
            Kept::Omitted => State::Omitted,
            Kept::Stored(bytes) if bytes.len() > HEAP_RESULT_BYTES => State::Apart(Arc::from(bytes)),
            Kept::Stored(bytes) => {
                let start = self.heap.len();
                self.heap.extend_from_slice(bytes);
                State::Heap { start, len: bytes.len() as u32 }
            }
        }
    }

    pub(super) fn remove(&mut self, digest: u64, key: &[u8]) -> Tally {
        let Self { places, slots, heap, poison, .. } = self;
        let is = |place: &u32| is(slots, heap, *place, digest, key);
        // A key that is not there was removed before.
        let Ok(found) = places.find_entry(spread(digest), is) else { return Tally::default() };
        let (place, _) = found.remove();
        let Some(slot) = slots.get_mut(place as usize).filter(|slot| lies_in(heap, slot)) else {
            lost(poison, slots.get(place as usize), heap, place);
            return Tally::default();
        };
        let before = slot.tally();
        slot.state = State::Gone;
        Tally::default() - before
    }

    /// Visits the keys in flight, also those whose completion is on its way.
    pub(super) fn in_flight(&self, rows: &RowNumbers) -> impl Iterator<Item = (u64, &[u8], Processing)> {
        self.slots.iter().filter(|slot| !matches!(slot.state, State::Gone)).filter_map(|slot| {
            match self.entry(slot, rows) {
                Entry::Processing(processing) => Some((slot.digest, self.key(slot), processing)),
                Entry::Completed(_) => None,
            }
        })
    }

    /// Visits the keys that a flush moves, in no order.
    pub(super) fn flushable(&self) -> impl Iterator<Item = Flushable<'_>> {
        self.slots.iter().filter(|slot| slot.is_flushable()).map(|slot| Flushable { page: self, slot })
    }

    /// Takes out the keys whose work has ended by rows below `start`, all of which are written, as a page of its own. What
    /// is in flight stays if `keep` says so; it is asked about each such key.
    pub(super) fn split(
        &mut self,
        start: u64,
        rows: &RowNumbers,
        mut keep: impl FnMut(&[u8], &Processing) -> bool,
    ) -> (Self, Tally) {
        let empty = Self::like(self);
        if STRICT {
            self.assert_sound();
        }
        let mut sealed = std::mem::replace(self, empty);
        let mut tally = Tally::default();
        let (indexed, mut keys) = (sealed.places.len(), 0);
        for place in 0..sealed.slots.len() {
            let Some(slot) = sealed.slots.get(place) else {
                lost(&sealed.poison, None, &sealed.heap, place as u32);
                break;
            };
            keys += usize::from(!matches!(slot.state, State::Gone));
            let stays = match slot.state {
                State::Gone => continue,
                _ if !slot.is_flushable() => true,
                _ => slot.row >= start,
            };
            if !stays {
                continue;
            }
            let key = sealed.key(slot);
            // A completion whose row is written behind the cut needs nobody's leave.
            let kept = match sealed.entry(slot, rows) {
                Entry::Processing(processing) => keep(key, &processing),
                Entry::Completed(_) => true,
            };
            let (digest, key) = (slot.digest, key.to_vec());
            if kept {
                self.take(&sealed, slot);
            } else {
                tally += Tally::default() - slot.tally();
            }
            sealed.remove(digest, &key);
        }
        if keys != indexed {
            let detail = format_args!("{indexed} entries for {keys} keys");
            sealed.poison.broken(Invariant::IndexedSlot, detail);
        }
        (sealed, tally)
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
            (State::Heap { .. }, Some(Done { result, .. })) => self.keep(result),
            (state, _) => state.clone(),
        };
        self.apart_bytes += apart_bytes(&state, slot.fingerprint.is_some());
        let place = self.slots.len() as u32;
        self.slots.push(Slot { key_start, state, ..slot.clone() });
        let slots = &self.slots;
        self.places.insert_unique(spread(slot.digest), place, |place| hash(slots, *place));
    }

    /// Takes back what was split off, where nothing newer is known.
    pub(super) fn absorb(&mut self, sealed: &Self) -> Tally {
        let mut tally = Tally::default();
        for slot in sealed.slots.iter().filter(|slot| !matches!(slot.state, State::Gone)) {
            if self.find(slot.digest, sealed.key(slot)).is_none() {
                self.take(sealed, slot);
            } else {
                tally += Tally::default() - slot.tally();
            }
        }
        tally
    }

    /// Removes every key for which `keep` says false.
    pub(super) fn retain(&mut self, rows: &RowNumbers, mut keep: impl FnMut(&Entry) -> bool) -> Tally {
        let gone: Vec<(u64, Vec<u8>)> = self
            .slots
            .iter()
            .filter(|slot| !matches!(slot.state, State::Gone) && !keep(&self.entry(slot, rows)))
            .map(|slot| (slot.digest, self.key(slot).to_vec()))
            .collect();
        let mut tally = Tally::default();
        for (digest, key) in gone {
            tally += self.remove(digest, &key);
        }
        tally
    }

    /// The figures of all its keys.
    pub(super) fn tally(&self) -> Tally {
        self.slots.iter().fold(Tally::default(), |mut sum, slot| {
            sum += slot.tally();
            sum
        })
    }
}

fn apart_bytes(state: &State, has_fingerprint: bool) -> usize {
    let result = if let State::Apart(bytes) = state { bytes.len() } else { 0 };
    result + if has_fingerprint { size_of::<Fingerprint>() } else { 0 }
}

/// The top bits of a digest are the same throughout a page; the index wants others at the top.
fn spread(digest: u64) -> u64 {
    digest.rotate_left(32)
}

/// Whether an entry of the index is of this key. One without a slot, or whose key lies outside the page, is taken for it, and
/// found out by whoever looks at the slot: what calls nothing that can fail is part of its caller.
fn is(slots: &[Slot], heap: &[u8], place: u32, digest: u64, key: &[u8]) -> bool {
    slots.get(place as usize).is_none_or(|slot| {
        slot.digest == digest && heap.get(slot.key_start..key_end(slot)).is_none_or(|found| found == key)
    })
}

fn lies_in(heap: &[u8], slot: &Slot) -> bool {
    slot.key_start <= key_end(slot) && key_end(slot) <= heap.len()
}

fn key_end(slot: &Slot) -> usize {
    slot.key_start.wrapping_add(slot.key_len as usize)
}

fn hash(slots: &[Slot], place: u32) -> u64 {
    slots.get(place as usize).map_or(0, |slot| spread(slot.digest))
}

/// An entry of the index without a slot, or whose slot has no key.
#[cold]
#[inline(never)]
fn lost(poison: &Poison, slot: Option<&Slot>, heap: &[u8], place: u32) {
    match slot {
        None => drop(poison.broken(Invariant::IndexedSlot, format_args!("there is no slot {place}"))),
        Some(slot) => no_bytes(poison, slot.key_start, slot.key_len, heap.len()),
    }
}

#[cold]
#[inline(never)]
fn no_bytes(poison: &Poison, start: usize, len: u32, heap: usize) {
    poison.broken(Invariant::KeyInPage, format_args!("{len} bytes from {start} on, of {heap}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leased(token: u64, fingerprint: Option<Fingerprint>) -> Entry<&'static [u8]> {
        let holder = Holder::Leased { until_monotonic_ms: 1 };
        Entry::Processing(Processing { token, attempt: 1, since_ms: 0, fingerprint, holder })
    }

    fn completed(token: u64, result: &[u8]) -> Entry<&[u8]> {
        Entry::Completed(Done { token, completed_ms: 5, fingerprint: None, result: Kept::Stored(result) })
    }

    fn behind_the_cut(row: u64) -> Pending {
        Pending { row, attempt: 1, holder: Holder::Settling }
    }

    #[test]
    fn a_page_knows_the_memory_that_it_takes_also_of_what_a_split_leaves() {
        let rows = RowNumbers::default();
        let mut page = Page::default();
        assert_eq!(page.bytes(), 0);
        page.set(1, b"ab", leased(1, Some([7; 16])));
        assert_eq!(page.bytes(), OVERHEAD_BYTES + 2 + 16);
        page.set(2, b"c", completed(2, &[0; 10]));
        page.settle(3, b"d", completed(3, &[0; 2_000]), behind_the_cut(9));
        page.settle(4, b"e", completed(4, &[0; 30]), behind_the_cut(9));
        assert_eq!(page.bytes(), 4 * OVERHEAD_BYTES + (2 + 16) + (1 + 10) + (1 + 2_000) + (1 + 30));
        let (sealed, _) = page.split(9, &rows, |_, _| true);
        assert_eq!(page.bytes(), 3 * OVERHEAD_BYTES + (2 + 16) + (1 + 2_000) + (1 + 30));
        let keys: Vec<&[u8]> = sealed.flushable().map(Flushable::key).collect();
        assert_eq!(keys, [b"c"]);
        for (digest, key, len) in [(3, b"d", 2_000), (4, b"e", 30)] {
            let Some(Entry::Completed(done)) = page.get(digest, key, &rows) else { panic!("it is behind the cut") };
            assert_eq!(done.result, Kept::Stored(Arc::from(vec![0; len])));
        }
    }

    #[test]
    fn what_was_removed_is_gone_for_a_split_and_for_whoever_removes_more() {
        let rows = RowNumbers::default();
        let mut page = Page::default();
        page.settle(1, b"gone", completed(1, b"r"), behind_the_cut(9));
        page.remove(1, b"gone");
        page.set(2, b"again", leased(2, None));
        page.remove(2, b"again");
        page.set(2, b"again", leased(3, None));
        assert_eq!(page.retain(&rows, |_| true), Tally::default());
        assert_eq!(page.get(2, b"again", &rows).unwrap().token(), 3);
        let mut asked = Vec::new();
        let (sealed, tally) = page.split(5, &rows, |key, _| {
            asked.push(key.to_vec());
            true
        });
        assert_eq!((asked, tally), (vec![b"again".to_vec()], Tally::default()));
        assert_eq!((sealed.flushable().count(), page.in_flight(&rows).count()), (0, 1));
        assert!(page.get(1, b"gone", &rows).is_none());
    }

    fn leased_tally() -> Tally {
        Tally { in_flight: 1, ..Tally::default() }
    }

    /// What a page whose parts were damaged says when it is used.
    fn broken(damage: impl FnOnce(&mut Page), uses: impl FnOnce(&mut Page)) -> String {
        let mut page = Page::default();
        page.set(1, b"first", completed(1, b"its result"));
        page.set(2, b"second", leased(2, None));
        page.poison.unbroken().unwrap();
        damage(&mut page);
        uses(&mut page);
        page.poison.unbroken().unwrap_err().to_string()
    }

    #[test]
    fn an_index_entry_without_a_slot_breaks_an_invariant_whatever_is_asked() {
        type Use = fn(&mut Page);
        let uses: [Use; 4] = [
            |page| drop(page.get(2, b"second", &RowNumbers::default())),
            |page| assert_ne!(page.set(2, b"second", completed(3, b"r")), leased_tally()),
            |page| assert_eq!(page.remove(2, b"second"), Tally::default()),
            |page| drop(page.split(9, &RowNumbers::default(), |_, _| true)),
        ];
        for uses in uses {
            let said = broken(|page| page.slots.truncate(1), uses);
            assert!(said.contains("points to a slot"), "{said}");
        }
        let gone = |page: &mut Page| page.slots[1].state = State::Gone;
        let said = broken(gone, |page| drop(page.get(2, b"second", &RowNumbers::default())));
        assert!(said.contains("points to a slot"), "{said}");
    }

    #[test]
    fn a_key_or_a_result_outside_its_page_breaks_an_invariant() {
        let get = |page: &mut Page| drop(page.get(1, b"first", &RowNumbers::default()));
        let said = broken(|page| page.slots[0].key_start = 1_000, get);
        assert!(said.contains("within the bytes of their page (5 bytes from 1000 on, of 21)"), "{said}");
        let said = broken(|page| page.slots[0].key_start = usize::MAX, get);
        assert!(said.contains("within the bytes of their page"), "{said}");
        let said = broken(|page| page.slots[0].state = State::Heap { start: 5, len: 500 }, get);
        assert!(said.contains("within the bytes of their page"), "{said}");
        let said =
            broken(|page| page.heap.truncate(3), |page| assert!(page.flushable().all(|here| here.key().is_empty())));
        assert!(said.contains("within the bytes of their page"), "{said}");
    }
}
