//! An arena: the packed keys of one shard. It is an index, a list of slots and a heap of bytes.
//!
//! Only large results and fingerprints have allocations of their own. So a key costs no call of the allocator, and a frozen
//! arena is freed as a whole.

use std::sync::Arc;

use hashbrown::HashTable;

use super::slot::{OVERHEAD_BYTES, Pending, Slot, State, Tally, separate_bytes};
use crate::invariant::{Invariant, Poison, STRICT};
use crate::journal::numbers::RecordNumbers;
use onlyonce_core::machine::{CompletedEntry, Entry, Holder, Processing};
use onlyonce_core::{Error, StoredResult};

/// Results up to this size are stored in the heap. A larger one would be expensive to copy whenever the heap grows.
const HEAP_RESULT_BYTES: usize = 1_024;

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
        self.arena.ended_entry(self.slot)
    }

    /// The error for a key that has no entry to flush.
    #[cold]
    pub(crate) fn not_flushable(self) -> Error {
        let (token, state) = (self.slot.token, &self.slot.state);
        self.arena.poison.broken(Invariant::OnlyEndedFlushed, format_args!("the key with token {token} is {state:?}"))
    }
}

/// The keys of one shard. Removed slots are not reused: the next freeze drops them.
#[derive(Debug, Default)]
pub(crate) struct ShardArena {
    index: HashTable<u32>,
    slots: Vec<Slot>,
    heap: Vec<u8>,
    /// Bytes in separate allocations: large results, fingerprints.
    separate_bytes: usize,
    poison: Arc<Poison>,
}

impl ShardArena {
    /// An empty arena that poisons the store if an invariant is broken.
    pub(crate) fn of(poison: &Arc<Poison>) -> Self {
        Self { poison: Arc::clone(poison), ..Self::default() }
    }

    /// An empty arena with the capacity for the keys of another.
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

    /// The memory that it uses.
    pub(crate) fn bytes(&self) -> usize {
        self.slots.len() * OVERHEAD_BYTES + self.heap.len() + self.separate_bytes
    }

    // Inlined: as a call it costs about thirty instructions a key.
    #[inline(always)]
    fn find(&self, digest: u64, key: &[u8]) -> Option<&Slot> {
        let Self { slots, heap, poison, .. } = self;
        let slot_index =
            *self.index.find(spread(digest), |slot_index| is_key(slots, heap, *slot_index, digest, key))?;
        let slot = slots.get(slot_index as usize);
        if slot.is_none_or(|slot| !has_key_in(heap, slot)) {
            report_bad_index(poison, slot, heap, slot_index);
            return None;
        }
        slot
    }

    fn key(&self, slot: &Slot) -> &[u8] {
        self.bytes_at(slot.key_start, slot.key_len)
    }

    fn bytes_at(&self, start: usize, len: u32) -> &[u8] {
        self.heap.get(start..start.wrapping_add(len as usize)).unwrap_or_else(|| {
            report_out_of_range(&self.poison, start, len, self.heap.len());
            &[]
        })
    }

    /// The entry of a key.
    pub(crate) fn get(&self, digest: u64, key: &[u8], records: &RecordNumbers) -> Option<Entry> {
        self.find(digest, key).map(|slot| self.entry(slot, records))
    }

    /// The entry of a key in an arena that was flushed.
    pub(crate) fn get_flushed(&self, digest: u64, key: &[u8]) -> Option<Entry> {
        self.find(digest, key).and_then(|slot| self.ended_entry(slot)).map(|entry| entry.shared())
    }

    /// The entry of a slot whose record is written. `None` if the key is in progress.
    fn ended_entry<'a>(&'a self, slot: &'a Slot) -> Option<Entry<&'a [u8]>> {
        match &slot.state {
            State::Processing(holder @ Holder::Released { .. }) => Some(Entry::Processing(slot.processing(*holder))),
            _ => self.completed_entry(slot).map(Entry::Completed),
        }
    }

    fn entry(&self, slot: &Slot, records: &RecordNumbers) -> Entry {
        if !records.is_finished(slot.record) {
            return Entry::Processing(slot.unwritten());
        }
        match (&slot.state, self.completed_entry(slot)) {
            (_, Some(done)) => Entry::Completed(done.shared()),
            (State::Processing(holder), None) => Entry::Processing(slot.processing(*holder)),
            (_, None) => {
                self.report_removed_slot();
                Entry::Processing(slot.unwritten())
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn report_removed_slot(&self) {
        self.poison.broken(Invariant::IndexedSlot, format_args!("it points to a slot whose key was removed"));
    }

    /// The completion that a slot holds.
    fn completed_entry<'a>(&'a self, slot: &'a Slot) -> Option<CompletedEntry<&'a [u8]>> {
        let result = match &slot.state {
            State::Removed | State::Processing(_) => return None,
            State::NoResult => StoredResult::None,
            State::TooLarge => StoredResult::TooLarge,
            State::Heap { start, len } => StoredResult::Bytes(self.bytes_at(*start, *len)),
            State::Separate(bytes) => StoredResult::Bytes(&**bytes),
        };
        let fingerprint = slot.fingerprint.as_deref().copied();
        let Slot { token, since_ms: completed_ms, own_window, .. } = *slot;
        Some(CompletedEntry { token, completed_ms, fingerprint, own_window, result })
    }

    /// Replaces the entry of a key.
    pub(crate) fn set(&mut self, digest: u64, key: &[u8], entry: Entry<&[u8]>) -> Tally {
        self.set_pending(digest, key, entry, Pending::NONE)
    }

    /// As [`ShardArena::set`], visible once a record is written.
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
        let is = |slot_index: &u32| is_key(slots, heap, *slot_index, digest, key);
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
                let Some(slot) = slots.get_mut(slot_index as usize).filter(|slot| has_key_in(heap, slot)) else {
                    report_bad_index(poison, slots.get(slot_index as usize), heap, slot_index);
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
        let is = |slot_index: &u32| is_key(slots, heap, *slot_index, digest, key);
        // A missing key was removed before.
        let Ok(found) = index.find_entry(spread(digest), is) else { return Tally::default() };
        let (slot_index, _) = found.remove();
        let Some(slot) = slots.get_mut(slot_index as usize).filter(|slot| has_key_in(heap, slot)) else {
            report_bad_index(poison, slots.get(slot_index as usize), heap, slot_index);
            return Tally::default();
        };
        let before = slot.tally();
        slot.state = State::Removed;
        Tally::default() - before
    }

    /// Iterates over the keys in progress, including committing ones.
    pub(crate) fn in_flight(&self, records: &RecordNumbers) -> impl Iterator<Item = (u64, &[u8], Processing)> {
        self.slots.iter().filter(|slot| !slot.is_removed()).filter_map(|slot| match self.entry(slot, records) {
            Entry::Processing(processing) => Some((slot.digest, self.key(slot), processing)),
            Entry::Completed(_) => None,
        })
    }

    /// Iterates over the keys that a flush moves, in no order.
    pub(crate) fn flushable(&self) -> impl Iterator<Item = Flushable<'_>> {
        self.slots.iter().filter(|slot| slot.is_flushable()).map(|slot| Flushable { arena: self, slot })
    }

    /// Splits off the flushable keys whose records are below `start`, as the frozen arena. All records below `start` are
    /// written. Of the other keys, those in progress stay only if `keep`, which is called for each of them, returns true.
    pub(crate) fn freeze(
        &mut self,
        start: u64,
        records: &RecordNumbers,
        mut keep: impl FnMut(&[u8], &Processing) -> bool,
    ) -> (Self, Tally) {
        let empty = Self::like(self);
        if STRICT {
            self.check_index();
        }
        let mut frozen = std::mem::replace(self, empty);
        let mut tally = Tally::default();
        let (indexed, mut keys) = (frozen.index.len(), 0);
        for slot_index in 0..frozen.slots.len() {
            let Some(slot) = frozen.slots.get(slot_index) else {
                report_bad_index(&frozen.poison, None, &frozen.heap, slot_index as u32);
                break;
            };
            keys += usize::from(!slot.is_removed());
            let stays = match slot.state {
                State::Removed => continue,
                _ if !slot.is_flushable() => true,
                _ => slot.record >= start,
            };
            if !stays {
                continue;
            }
            let key = frozen.key(slot);
            let kept = match frozen.entry(slot, records) {
                Entry::Processing(processing) => keep(key, &processing),
                // Completions at or after `start` are kept unconditionally. Their records may refer to the claim, so the
                // checkpoint has the key as it was before.
                Entry::Completed(_) => {
                    if !slot.is_unclaimed {
                        keep(key, &slot.unwritten());
                    }
                    true
                }
            };
            let (digest, key) = (slot.digest, key.to_vec());
            if kept {
                self.copy_slot(&frozen, slot);
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

    /// Checks that the index finds each key. Visits all keys.
    fn check_index(&self) {
        let keys = self.slots.iter().filter(|slot| !slot.is_removed());
        for slot in keys {
            let found = self.find(slot.digest, self.key(slot));
            if !found.is_some_and(|found| std::ptr::eq(found, slot)) {
                let detail = format_args!("the key with token {} is not found in its arena", slot.token);
                self.poison.broken(Invariant::IndexedSlot, detail);
            }
        }
    }

    /// Copies a slot of another arena. This arena must not have the key.
    fn copy_slot(&mut self, other: &Self, slot: &Slot) {
        let key_start = self.heap.len();
        self.heap.extend_from_slice(other.key(slot));
        let state = match (&slot.state, other.completed_entry(slot)) {
            (State::Heap { .. }, Some(CompletedEntry { result, .. })) => self.put_result(result),
            (state, _) => state.clone(),
        };
        self.separate_bytes += separate_bytes(&state, slot.fingerprint.is_some());
        let slot_index = self.slots.len() as u32;
        self.slots.push(Slot { key_start, state, ..slot.clone() });
        let slots = &self.slots;
        self.index.insert_unique(spread(slot.digest), slot_index, |slot_index| hash(slots, *slot_index));
    }

    /// Takes back the keys of a frozen arena, except those that have a newer entry here.
    pub(crate) fn absorb(&mut self, frozen: &Self) -> Tally {
        let mut tally = Tally::default();
        for slot in frozen.slots.iter().filter(|slot| !slot.is_removed()) {
            if self.find(slot.digest, frozen.key(slot)).is_none() {
                self.copy_slot(frozen, slot);
            } else {
                tally += Tally::default() - slot.tally();
            }
        }
        tally
    }

    /// Removes each key for which `keep` returns false.
    pub(crate) fn retain(&mut self, records: &RecordNumbers, mut keep: impl FnMut(&Entry) -> bool) -> Tally {
        let removed: Vec<(u64, Vec<u8>)> = self
            .slots
            .iter()
            .filter(|slot| !slot.is_removed() && !keep(&self.entry(slot, records)))
            .map(|slot| (slot.digest, self.key(slot).to_vec()))
            .collect();
        let mut tally = Tally::default();
        for (digest, key) in removed {
            tally += self.remove(digest, &key);
        }
        tally
    }

    /// The counts of all keys.
    pub(crate) fn tally(&self) -> Tally {
        self.slots.iter().fold(Tally::default(), |mut sum, slot| {
            sum += slot.tally();
            sum
        })
    }
}

/// The index uses a hash's top bits. Those of the digest are the same for all keys of a shard, so they are rotated away.
fn spread(digest: u64) -> u64 {
    digest.rotate_left(32)
}

/// Whether an index entry belongs to this key. True for an entry without a slot, or with a key outside the heap: the caller
/// checks the slot it gets and reports the broken index, so that this function stays small enough to be inlined.
fn is_key(slots: &[Slot], heap: &[u8], slot_index: u32, digest: u64, key: &[u8]) -> bool {
    slots.get(slot_index as usize).is_none_or(|slot| {
        slot.digest == digest && heap.get(slot.key_start..key_end(slot)).is_none_or(|found| found == key)
    })
}

fn has_key_in(heap: &[u8], slot: &Slot) -> bool {
    slot.key_start <= key_end(slot) && key_end(slot) <= heap.len()
}

fn key_end(slot: &Slot) -> usize {
    slot.key_start.wrapping_add(slot.key_len as usize)
}

fn hash(slots: &[Slot], slot_index: u32) -> u64 {
    slots.get(slot_index as usize).map_or(0, |slot| spread(slot.digest))
}

/// Reports an index entry without a slot, or whose slot has no key in the heap.
#[cold]
#[inline(never)]
fn report_bad_index(poison: &Poison, slot: Option<&Slot>, heap: &[u8], slot_index: u32) {
    match slot {
        None => drop(poison.broken(Invariant::IndexedSlot, format_args!("there is no slot {slot_index}"))),
        Some(slot) => report_out_of_range(poison, slot.key_start, slot.key_len, heap.len()),
    }
}

#[cold]
#[inline(never)]
fn report_out_of_range(poison: &Poison, start: usize, len: u32, heap: usize) {
    poison.broken(Invariant::KeyInArena, format_args!("{len} bytes at {start}, of {heap}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use onlyonce_core::Fingerprint;
    use onlyonce_core::machine::OwnWindow;

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

    fn pending(record: u64) -> Pending {
        Pending { record, attempt: 1, holder: Holder::Committing }
    }

    #[test]
    fn an_own_window_fits_into_the_padding_of_a_slot() {
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
    fn an_arena_counts_its_memory_also_after_a_freeze() {
        let records = RecordNumbers::default();
        let mut arena = ShardArena::default();
        assert_eq!(arena.bytes(), 0);
        arena.set(1, b"ab", leased(1, Some([7; 16])));
        assert_eq!(arena.bytes(), OVERHEAD_BYTES + 2 + 16);
        arena.set(2, b"c", completed(2, &[0; 10]));
        arena.set_pending(3, b"d", completed(3, &[0; 2_000]), pending(9));
        arena.set_pending(4, b"e", completed(4, &[0; 30]), pending(9));
        assert_eq!(arena.bytes(), 4 * OVERHEAD_BYTES + (2 + 16) + (1 + 10) + (1 + 2_000) + (1 + 30));
        let (frozen, _) = arena.freeze(9, &records, |_, _| true);
        assert_eq!(arena.bytes(), 3 * OVERHEAD_BYTES + (2 + 16) + (1 + 2_000) + (1 + 30));
        let keys: Vec<&[u8]> = frozen.flushable().map(Flushable::key).collect();
        assert_eq!(keys, [b"c"]);
        for (digest, key, len) in [(3, b"d", 2_000), (4, b"e", 30)] {
            let Some(Entry::Completed(done)) = arena.get(digest, key, &records) else {
                panic!("its record is not below the start")
            };
            assert_eq!(done.result, StoredResult::Bytes(Arc::from(vec![0; len])));
        }
    }

    #[test]
    fn removed_keys_are_skipped_by_freeze_and_retain() {
        let records = RecordNumbers::default();
        let mut arena = ShardArena::default();
        arena.set_pending(1, b"removed", completed(1, b"r"), pending(9));
        arena.remove(1, b"removed");
        arena.set(2, b"again", leased(2, None));
        arena.remove(2, b"again");
        arena.set(2, b"again", leased(3, None));
        assert_eq!(arena.retain(&records, |_| true), Tally::default());
        assert_eq!(arena.get(2, b"again", &records).unwrap().token(), 3);
        let mut visited = Vec::new();
        let (frozen, tally) = arena.freeze(5, &records, |key, _| {
            visited.push(key.to_vec());
            true
        });
        assert_eq!((visited, tally), (vec![b"again".to_vec()], Tally::default()));
        assert_eq!((frozen.flushable().count(), arena.in_flight(&records).count()), (0, 1));
        assert!(arena.get(1, b"removed", &records).is_none());
    }

    fn leased_tally() -> Tally {
        Tally { in_flight: 1, ..Tally::default() }
    }

    /// The error after a damaged arena is used.
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
    fn an_index_entry_without_a_slot_breaks_an_invariant_in_every_operation() {
        type Use = fn(&mut ShardArena);
        let uses: [Use; 4] = [
            |arena| drop(arena.get(2, b"second", &RecordNumbers::default())),
            |arena| assert_ne!(arena.set(2, b"second", completed(3, b"r")), leased_tally()),
            |arena| assert_eq!(arena.remove(2, b"second"), Tally::default()),
            |arena| drop(arena.freeze(9, &RecordNumbers::default(), |_, _| true)),
        ];
        for uses in uses {
            let message = broken(|arena| arena.slots.truncate(1), uses);
            assert!(message.contains(Invariant::IndexedSlot.text()), "{message}");
        }
        let removed = |arena: &mut ShardArena| arena.slots[1].state = State::Removed;
        let message = broken(removed, |arena| drop(arena.get(2, b"second", &RecordNumbers::default())));
        assert!(message.contains(Invariant::IndexedSlot.text()), "{message}");
    }

    #[test]
    fn a_key_or_a_result_outside_its_arena_breaks_an_invariant() {
        let get = |arena: &mut ShardArena| drop(arena.get(1, b"first", &RecordNumbers::default()));
        let message = broken(|arena| arena.slots[0].key_start = 1_000, get);
        assert!(message.contains(&format!("{} (5 bytes at 1000, of 21)", Invariant::KeyInArena.text())), "{message}");
        let message = broken(|arena| arena.slots[0].key_start = usize::MAX, get);
        assert!(message.contains(Invariant::KeyInArena.text()), "{message}");
        let message = broken(|arena| arena.slots[0].state = State::Heap { start: 5, len: 500 }, get);
        assert!(message.contains(Invariant::KeyInArena.text()), "{message}");
        let message = broken(
            |arena| arena.heap.truncate(3),
            |arena| assert!(arena.flushable().all(|here| here.key().is_empty())),
        );
        assert!(message.contains(Invariant::KeyInArena.text()), "{message}");
    }
}
