//! The end of the journal: encodes records, writes them to segments, and changes over to the next segment.
//!
//! Only whole blocks are written, from the last incomplete block on, and filled up with zeros. A power cut that tears such a
//! write changes nothing of the earlier records in its first block, because their bytes are the same before and after.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::error::{Result, not_written, unknown};
use super::group_commit::Batch;
use super::medium::{BLOCK, Medium, MediumFile};
use super::record::{self, Fragment, HEADER, Kind, Part, Salt};
use super::segment::{self, DATA_START, Header, JournalId, MIN_BYTES, Slot};

/// The smallest payload of a fragment that is not the last one of its record. A segment with less room is full.
const MIN_FRAGMENT: usize = 64;
/// A full segment has less than this unused at its end.
const UNUSED: usize = HEADER + MIN_FRAGMENT;
/// A new slot is this many times as large as everything that was written since the last checkpoint.
const GROWTH: usize = 4;
/// Encoded bytes are written at this size, so that a large record is not encoded twice in memory.
const WRITE_BYTES: usize = 1 << 20;

/// A segment that may have records which are still needed.
#[derive(Debug)]
pub(crate) struct Segment<F> {
    pub(crate) slot: Arc<Slot<F>>,
    pub(crate) first_lsn: u64,
}

/// The end of the journal.
pub(crate) struct Output<M: Medium> {
    medium: Arc<M>,
    journal: JournalId,
    /// The segments in use, the one that is written last.
    segments: VecDeque<Segment<M::File>>,
    /// Slots for the next segments. The first one is named by the active segment's header, so there is always one.
    spares: VecDeque<Arc<Slot<M::File>>>,
    /// The number of the active segment.
    number: u64,
    salt: Salt,
    next_lsn: u64,
    /// Where the next fragment begins in the active segment.
    position: usize,
    /// The encoded bytes from the start of a block to `position`.
    buffer: Vec<u8>,
    /// How many bytes of the buffer are written.
    flushed: usize,
    /// The number of the next slot that is created.
    next_slot: u64,
    /// Segments that were written since the last sync, without the active one.
    unsynced: Vec<Arc<Slot<M::File>>>,
    /// The bytes that were written to files.
    bytes: u64,
    /// `bytes` when segments were freed the last time.
    bytes_at_free: u64,
    /// The smallest size of a new slot.
    smallest: usize,
    largest: usize,
}

/// Where the journal continues.
pub(crate) struct Start<F> {
    pub(crate) journal: JournalId,
    /// Segments that are still needed, the oldest first.
    pub(crate) segments: VecDeque<Segment<F>>,
    /// The other slots. The first one becomes the active segment.
    pub(crate) spares: VecDeque<Arc<Slot<F>>>,
    /// The highest number that any segment has.
    pub(crate) last_number: u64,
    /// The number of the last segment that is needed.
    pub(crate) previous: u64,
    pub(crate) next_lsn: u64,
    /// Where the last checkpoint's replay begins.
    pub(crate) replay_from: u64,
}

/// A position that a sync makes durable.
pub(crate) struct Unsynced<F> {
    pub(crate) slots: Vec<Arc<Slot<F>>>,
    /// All fragments below are on disk after a sync of these slots.
    pub(crate) lsn: u64,
}

impl<M: Medium> Output<M> {
    /// Begins a segment after the last one. It is not synced yet.
    pub(crate) fn begin(medium: Arc<M>, start: Start<M::File>, smallest: usize, largest: usize) -> Result<Self> {
        let Start { journal, segments, spares, last_number, previous, next_lsn, replay_from: _ } = start;
        let slots = segments.iter().map(|segment| &segment.slot).chain(&spares);
        let next_slot = slots.map(|slot| u64::from(slot.slot) + 1).max().unwrap_or(0);
        let mut output = Self {
            medium,
            journal,
            segments,
            spares,
            number: last_number,
            salt: Salt::new(0),
            next_lsn,
            position: 0,
            buffer: Vec::new(),
            flushed: 0,
            next_slot,
            unsynced: Vec::new(),
            bytes: 0,
            bytes_at_free: 0,
            smallest,
            largest,
        };
        output.provide(0, 2)?;
        output.begin_segment(previous, next_lsn)?;
        Ok(output)
    }

    pub(crate) fn next_lsn(&self) -> u64 {
        self.next_lsn
    }

    pub(crate) fn bytes_written(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn segments(&self) -> u64 {
        self.segments.len() as u64
    }

    /// The bytes of all files: of segments in use, and of spare ones.
    pub(crate) fn allocated(&self) -> (u64, u64) {
        let used = self.segments.iter().map(|segment| segment.slot.bytes as u64).sum();
        (used, self.spares.iter().map(|slot| slot.bytes as u64).sum())
    }

    /// Writes a batch. `durable_lsn`: all fragments below are on disk.
    pub(crate) fn write(&mut self, batch: &Batch, durable_lsn: u64) -> Result<()> {
        // Before anything is written: a full disk rejects the batch as a whole.
        self.provide(batch.bytes() + batch.len() * HEADER, 1)?;
        for (kind, payload) in batch.records() {
            self.put(kind, payload, durable_lsn)?;
        }
        self.flush()
    }

    fn put(&mut self, kind: Kind, payload: &[u8], durable_lsn: u64) -> Result<()> {
        let (mut left, mut is_first) = (payload, true);
        loop {
            if self.room() < HEADER + left.len().min(MIN_FRAGMENT) {
                self.change_over(durable_lsn)?;
            }
            let room = self.room().saturating_sub(HEADER);
            let (payload, rest) = left.split_at_checked(room).unwrap_or((left, &[]));
            let part = Part::of(is_first, rest.is_empty());
            let fragment = Fragment { kind, part, lsn: self.next_lsn, durable_lsn };
            record::put(fragment, payload, self.salt, &mut self.buffer);
            self.position += HEADER + payload.len();
            self.next_lsn += 1;
            if self.buffer.len() >= WRITE_BYTES {
                self.flush()?;
            }
            if rest.is_empty() {
                return Ok(());
            }
            (left, is_first) = (rest, false);
        }
    }

    /// How many bytes fit into the active segment.
    fn room(&self) -> usize {
        self.segments.back().map_or(0, |segment| segment.slot.bytes - self.position)
    }

    /// Writes the new bytes of the buffer, and keeps its last block if that is incomplete.
    fn flush(&mut self) -> Result<()> {
        let Some(active) = self.segments.back().filter(|_| self.flushed < self.buffer.len()) else { return Ok(()) };
        let (slot, len) = (&active.slot, self.buffer.len());
        let unit = slot.file.unit();
        let (from, to) = (self.flushed / unit * unit, len.next_multiple_of(unit));
        self.buffer.resize(to, 0);
        if let Some(bytes) = self.buffer.get(from..).filter(|bytes| !bytes.is_empty()) {
            let offset = self.position + from - len;
            slot.file.write_at(bytes, offset as u64).map_err(|error| unknown("writing", &slot.place, error))?;
            self.bytes += bytes.len() as u64;
        }
        self.buffer.truncate(len);
        self.buffer.drain(..len / BLOCK * BLOCK);
        self.flushed = self.buffer.len();
        if self.buffer.capacity() > 2 * WRITE_BYTES {
            self.buffer.shrink_to(WRITE_BYTES);
        }
        Ok(())
    }

    fn change_over(&mut self, durable_lsn: u64) -> Result<()> {
        self.flush()?;
        self.begin_segment(self.number, durable_lsn)
    }

    /// Begins the next segment: in the slot that the header of the last one names.
    fn begin_segment(&mut self, previous: u64, durable_lsn: u64) -> Result<()> {
        let (Some(slot), Some(next)) = (self.spares.pop_front(), self.spares.front()) else {
            return Err(unknown("beginning", "the next segment", io::Error::other("there is no spare one")));
        };
        let mut salt = [0; 8];
        getrandom::fill(&mut salt).map_err(|error| unknown("choosing a salt for", &slot.place, error.into()))?;
        let salt = u64::from_le_bytes(salt);
        self.number += 1;
        let header = Header {
            journal: self.journal,
            number: self.number,
            previous,
            first_lsn: self.next_lsn,
            durable_lsn,
            salt,
            next_slot: next.slot,
        };
        let encoded = header.encoded();
        let past = std::mem::take(&mut *slot.past.lock());
        if let Some(offset) = past.bad_copy {
            // First the copy that is not valid, so that a power cut never leaves two of them.
            let copy = encoded.get(..BLOCK).unwrap_or_default();
            slot.file.write_at(copy, offset as u64).map_err(|error| unknown("writing", &slot.place, error))?;
            slot.file.sync().map_err(|error| unknown("syncing", &slot.place, error))?;
        }
        slot.file.write_at(&encoded, 0).map_err(|error| unknown("writing", &slot.place, error))?;
        self.bytes += encoded.len() as u64;
        // A power cut must not leave records and half a header: in a blank slot that would look like damage.
        if past.is_blank {
            slot.file.sync().map_err(|error| unknown("syncing", &slot.place, error))?;
        }
        self.unsynced.extend(self.segments.back().map(|active| Arc::clone(&active.slot)));
        self.segments.push_back(Segment { slot, first_lsn: self.next_lsn });
        self.salt = Salt::new(salt);
        self.position = DATA_START;
        self.buffer.clear();
        self.flushed = 0;
        Ok(())
    }

    /// How many bytes of fragments can be written without a new slot.
    pub(crate) fn allocated_bytes(&self) -> usize {
        let spares = self.spares.iter().rev().skip(1).map(|slot| slot.bytes - DATA_START - UNUSED);
        self.room().saturating_sub(UNUSED) + spares.sum::<usize>()
    }

    /// Makes slots until a batch of so many bytes fits.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<()> {
        self.provide(bytes, 1)
    }

    /// Makes slots until `bytes` more fit, and `spares` are left then.
    fn provide(&mut self, bytes: usize, spares: usize) -> Result<()> {
        let mut missing = bytes.saturating_sub(self.room().saturating_sub(UNUSED));
        let mut needed = spares;
        for slot in &self.spares {
            if missing == 0 {
                break;
            }
            missing = missing.saturating_sub(slot.bytes - DATA_START - UNUSED);
            needed += 1;
        }
        let before = self.spares.len();
        while missing > 0 || self.spares.len() < needed {
            let created = self.next_slot(missing).and_then(|(slot, bytes)| Slot::create(&*self.medium, slot, bytes));
            match created {
                Ok(slot) => {
                    if missing > 0 {
                        missing = missing.saturating_sub(slot.bytes - DATA_START - UNUSED);
                        needed += 1;
                    }
                    self.spares.push_back(Arc::new(slot));
                }
                Err(error) => {
                    // The space may be what others need. A slot that cannot be removed now is a spare one after the next open.
                    let unused = self.spares.split_off(before.max(1).min(self.spares.len()));
                    unused.iter().for_each(|slot| drop(self.medium.remove(&segment::name(slot.slot))));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// The number and the size of the next slot: several times as large as everything since the last checkpoint, so that it lasts
    /// until the one after it is created and there are never many; or as large as what is missing.
    pub(crate) fn next_slot(&mut self, missing: usize) -> Result<(u32, usize)> {
        let slot = u32::try_from(self.next_slot).map_err(|_| {
            not_written("creating", &self.medium.place(""), io::Error::other("all names of segments were used"))
        })?;
        self.next_slot += 1;
        let since_free = usize::try_from(self.bytes - self.bytes_at_free).unwrap_or(usize::MAX);
        let bytes = since_free.saturating_mul(GROWTH).max(missing.saturating_add(DATA_START + UNUSED + BLOCK));
        Ok((slot, bytes.clamp(self.smallest, self.largest) / BLOCK * BLOCK))
    }

    /// Begins a segment without records, so that the header says what is on disk, in another file than the records. Returns
    /// false if the active segment has no records, so that its header says it.
    pub(crate) fn finish(&mut self, durable_lsn: u64) -> Result<bool> {
        if self.position == DATA_START {
            return Ok(false);
        }
        self.provide(0, 2)?;
        self.begin_segment(self.number, durable_lsn)?;
        Ok(true)
    }

    /// Whether a caller that writes so many bytes, or changes to another segment, would have to create a slot.
    pub(crate) fn lacks_room(&self, bytes: usize) -> bool {
        self.spares.len() < 2 || self.allocated_bytes() < bytes
    }

    /// Adds a slot that was created in advance.
    pub(crate) fn add_spare(&mut self, slot: Slot<M::File>) {
        self.spares.push_back(Arc::new(slot));
    }

    /// Frees the segments whose fragments are all below `lsn`: they become spares, as long as all spares together are not
    /// larger than `spare_bytes`, and are removed otherwise. Returns the slots to remove.
    pub(crate) fn free_below(&mut self, lsn: u64, spare_bytes: u64) -> Vec<Arc<Slot<M::File>>> {
        let mut removed = Vec::new();
        self.bytes_at_free = self.bytes;
        while self.segments.get(1).is_some_and(|next| next.first_lsn <= lsn) {
            let Some(segment) = self.segments.pop_front() else { break };
            let (_, spare) = self.allocated();
            if self.spares.len() < 2 || spare + segment.slot.bytes as u64 <= spare_bytes {
                self.spares.push_back(segment.slot);
            } else {
                removed.push(segment.slot);
            }
        }
        // The first one is named by the active segment's header.
        while self.spares.len() > 2 && self.allocated().1 > spare_bytes {
            removed.extend(self.spares.pop_back());
        }
        removed
    }

    /// Takes what a sync must sync.
    pub(crate) fn take_unsynced(&mut self) -> Unsynced<M::File> {
        let mut slots = std::mem::take(&mut self.unsynced);
        slots.extend(self.segments.back().map(|active| Arc::clone(&active.slot)));
        Unsynced { slots, lsn: self.next_lsn }
    }
}

const _: () = assert!(MIN_BYTES as usize > DATA_START + HEADER + MIN_FRAGMENT);
