//! The journal: its parts put together.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::error::{Error, Result, not_written, unknown};
use super::group_commit::{Batch, Durability, GroupCommit, Sink};
use super::medium::{BLOCK, Medium, MediumFile};
use super::output::{Output, Start};
use super::record::{Kind, NO_CLAIM};
use super::recovery::{self, Recovered, Report};
use super::segment::{self, MAX_BYTES, MIN_BYTES, Slot};
use super::sync::Mutex;

/// The largest record. Its bytes, and those of the records that are written with it, are in memory twice for a moment.
pub const MAX_RECORD: usize = 1 << 31;

/// What other threads may append between [`Journal::reserve`] and an append.
const RESERVE: usize = 64 << 10;
/// The room below which [`Journal::maintain`] creates a segment, so that callers find one.
const PREPARE: usize = RESERVE + RESERVE / 2;

/// How much disk space a journal takes. Segments are allocated before they are needed, and used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// The size of the first segments, in bytes: a multiple of 4,096, at least 64 KiB. Default: 64 KiB. A journal that never
    /// has many records keeps two of them.
    pub smallest_segment: u64,
    /// The largest size of a segment, in bytes: a multiple of 4,096, at least `smallest_segment`, at most 1 GiB. Default:
    /// 32 MiB. A new segment is four times as large as everything that was written since the last checkpoint, within these bounds.
    pub largest_segment: u64,
    /// How many bytes of segments are kept for later use when a checkpoint frees them. Default: 64 MiB. At least two segments
    /// are kept.
    pub spare_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { smallest_segment: 64 << 10, largest_segment: 32 << 20, spare_bytes: 64 << 20 }
    }
}

impl Options {
    fn check(&self) -> Result<(usize, usize)> {
        for (option, value, least) in [
            ("smallest_segment", self.smallest_segment, MIN_BYTES),
            ("largest_segment", self.largest_segment, self.smallest_segment),
        ] {
            if value < least || value > MAX_BYTES || value % BLOCK as u64 != 0 {
                let bounds = "a multiple of 4,096, from 64 KiB to 1 GiB, and the smallest at most the largest";
                return Err(Error::Option { option, value, bounds });
            }
        }
        Ok((self.smallest_segment as usize, self.largest_segment as usize))
    }
}

/// A position between two records of an open journal. Another journal, and the same one after it is opened again, rejects it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The journal that returned it, since it was opened.
    opened: u64,
    lsn: u64,
}

/// What a journal has written and allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Bytes that were written to files since the open, with padding and headers.
    pub written_bytes: u64,
    /// Syncs of group commits since the open.
    pub syncs: u64,
    /// Segments that may have records which the next open passes on.
    pub segments: u64,
    /// Bytes of these segments.
    pub used_bytes: u64,
    /// Bytes of the segments that are kept for later use.
    pub spare_bytes: u64,
}

/// A journal. See the [crate](crate).
pub struct Journal<M: Medium> {
    medium: Arc<M>,
    commits: GroupCommit,
    end: End<M>,
    spare_bytes: u64,
    /// A number of its own for each open.
    opened: u64,
    /// Where the replay of the last checkpoint begins. Checkpoints, maintenance and the close run one at a time.
    replay_from: Mutex<u64>,
}

/// A journal that was read, before anything is appended to it.
pub struct Recovery<M: Medium> {
    medium: M,
    start: Start<M::File>,
}

impl<M: Medium> Recovery<M> {
    /// Begins a segment after what was read. From then on, everything that the recovery gave up is void.
    ///
    /// # Errors
    ///
    /// [`Error::Option`], and errors of the medium.
    pub fn start(self, options: &Options) -> Result<Journal<M>> {
        Journal::start(self.medium, options, self.start)
    }
}

/// What the group commit writes to.
struct End<M: Medium> {
    output: Mutex<Output<M>>,
    next_lsn: AtomicU64,
    durable_lsn: AtomicU64,
    /// The lsn after the last record that is not a mark: marks need not be synced.
    content_lsn: AtomicU64,
    /// The highest durable lsn that a record or a header states.
    stated_lsn: AtomicU64,
    /// How many bytes can be written without a new segment.
    allocated: AtomicUsize,
    /// Whether an append would soon have to create a segment.
    lacks_segment: AtomicBool,
}

impl<M: Medium> Sink for End<M> {
    fn write(&self, batch: &Batch) -> Result<()> {
        let mut output = self.output.lock();
        let durable_lsn = self.durable_lsn.load(Ordering::Acquire);
        output.write(batch, durable_lsn)?;
        self.publish_room(&output);
        let next_lsn = output.next_lsn();
        if next_lsn - durable_lsn < NO_CLAIM {
            self.stated_lsn.store(durable_lsn, Ordering::Release);
        }
        if batch.records().any(|(kind, _)| kind != Kind::Mark) {
            self.content_lsn.store(next_lsn, Ordering::Release);
        }
        self.next_lsn.store(next_lsn, Ordering::Release);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let unsynced = self.output.lock().take_unsynced();
        for slot in &unsynced.slots {
            slot.file.sync().map_err(|error| unknown("syncing", &slot.place, error))?;
        }
        self.durable_lsn.store(unsynced.lsn, Ordering::Release);
        Ok(())
    }
}

impl<M: Medium> End<M> {
    /// Called after each change of the segments or of the room in them.
    fn publish_room(&self, output: &Output<M>) {
        self.allocated.store(output.allocated_bytes(), Ordering::Release);
        self.lacks_segment.store(output.lacks_room(PREPARE), Ordering::Release);
    }

    fn is_durable_unstated(&self) -> bool {
        let content = self.durable_lsn.load(Ordering::Acquire).min(self.content_lsn.load(Ordering::Acquire));
        content > self.stated_lsn.load(Ordering::Acquire)
    }

    /// Writes down, on disk, that everything before is on disk.
    fn finish(&self) -> Result<()> {
        let mut output = self.output.lock();
        let durable_lsn = self.durable_lsn.load(Ordering::Acquire);
        match output.finish(durable_lsn) {
            Ok(false) => return Ok(()),
            Ok(true) => {}
            // The disk is full: a record of the last segment must do.
            Err(Error::NotWritten { .. }) => {
                let mut batch = Batch::default();
                batch.push(Kind::Mark, &[]);
                match output.write(&batch, durable_lsn) {
                    Err(Error::NotWritten { .. }) => return Ok(()),
                    written => written?,
                }
            }
            Err(error) => return Err(error),
        }
        drop(output);
        self.sync()
    }
}

impl<M: Medium> Journal<M> {
    /// Creates a journal whose first record is this checkpoint. It is on disk when this returns. The medium must have no
    /// segments; those of a creation that was interrupted must be removed before.
    ///
    /// # Errors
    ///
    /// [`Error::Option`], [`Error::Exists`], and errors of the medium.
    pub fn create(medium: M, options: &Options, checkpoint: &[u8]) -> Result<Self> {
        let names = medium.names().map_err(|error| not_written("listing", &medium.place(""), error))?;
        if let Some(name) = names.iter().find(|name| segment::slot(name).is_some()) {
            return Err(Error::Exists { place: medium.place(name) });
        }
        let start = Start {
            journal: recovery::new_id()?,
            segments: Default::default(),
            spares: Default::default(),
            last_number: 0,
            previous: 0,
            next_lsn: 1,
            replay_from: 1,
        };
        let journal = Self::start(medium, options, start)?;
        journal.checkpoint(journal.position(), checkpoint)?;
        Ok(journal)
    }

    /// Opens a journal: passes its last checkpoint, and all records that were appended at or after the checkpoint's position,
    /// to `visit`, in their order. What it passes is on disk.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] if there are no segments; [`Error::Corrupt`] if something is damaged or missing that was on disk, or
    /// if the creation was interrupted; [`Error::Option`]; errors of the medium; and
    /// any error of `visit`.
    pub fn open(
        medium: M,
        options: &Options,
        visit: impl FnMut(Recovered<'_>) -> Result<()>,
    ) -> Result<(Self, Report)> {
        options.check()?;
        let (recovery, report) = Self::recover(medium, visit)?;
        Ok((recovery.start(options)?, report))
    }

    /// Reads a journal as [`Journal::open`] does, and changes nothing yet.
    ///
    /// # Errors
    ///
    /// As [`Journal::open`].
    pub fn recover(medium: M, visit: impl FnMut(Recovered<'_>) -> Result<()>) -> Result<(Recovery<M>, Report)> {
        let (start, report) = recovery::recover(&medium, visit)?;
        Ok((Recovery { medium, start }, report))
    }

    /// Begins a segment, with its header on disk: from then on, everything that was given up is void.
    fn start(medium: M, options: &Options, start: Start<M::File>) -> Result<Self> {
        let (smallest, largest) = options.check()?;
        let medium = Arc::new(medium);
        let (next_lsn, replay_from) = (start.next_lsn, start.replay_from);
        let output = Output::begin(Arc::clone(&medium), start, smallest, largest)?;
        let end = End {
            output: Mutex::new(output),
            next_lsn: AtomicU64::new(next_lsn),
            durable_lsn: AtomicU64::new(next_lsn),
            content_lsn: AtomicU64::new(next_lsn),
            stated_lsn: AtomicU64::new(next_lsn),
            allocated: AtomicUsize::new(0),
            lacks_segment: AtomicBool::new(false),
        };
        end.publish_room(&end.output.lock());
        end.sync()?;
        let (commits, spare_bytes) = (GroupCommit::default(), options.spare_bytes);
        let opened = recovery::random()?;
        Ok(Self { medium, commits, end, spare_bytes, opened, replay_from: Mutex::new(replay_from) })
    }

    /// Appends a record that has these parts, one after the other. Returns when it is as durable as asked.
    ///
    /// Records are replayed in the order in which their appends returned; those that overlapped, in any order.
    ///
    /// # Errors
    ///
    /// [`Error::NotWritten`] if there is no space for it: it will never be replayed, and later appends may succeed.
    /// [`Error::Unknown`] if it may be replayed or not: then all later calls fail.
    pub fn append(&self, parts: &[&[u8]], durability: Durability) -> Result<()> {
        self.append_as(Kind::Data, parts, durability)
    }

    /// Allocates segments until there is room for this many bytes, with 16 bytes for each record, and for small records that
    /// other threads append at the same time. So a full disk is noticed before the caller has changed anything. It is no
    /// promise: other threads can use the room. Costs an atomic load if there is room, also after a close.
    ///
    /// # Errors
    ///
    /// [`Error::NotWritten`] if there is no space.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        let needed = bytes.saturating_add(RESERVE);
        if self.end.allocated.load(Ordering::Acquire) >= needed {
            return Ok(());
        }
        let mut output = self.end.output.lock();
        // Under the lock, so that no segment is created after a close.
        self.commits.check()?;
        output.allocate(needed)?;
        self.end.publish_room(&output);
        Ok(())
    }

    fn append_as(&self, kind: Kind, parts: &[&[u8]], durability: Durability) -> Result<()> {
        let bytes = parts.iter().map(|part| part.len()).fold(0, usize::saturating_add);
        if bytes > MAX_RECORD {
            return Err(Error::RecordTooLarge { bytes, limit: MAX_RECORD });
        }
        self.commits.append(kind, parts, durability, &self.end)
    }

    /// Returns when all records whose appends have returned are on disk.
    ///
    /// # Errors
    ///
    /// As [`Journal::append`].
    pub fn sync(&self) -> Result<()> {
        self.commits.sync(&self.end)
    }

    /// The position after all records whose appends have returned. Records whose appends have not returned may be before it
    /// or after it, so a checkpoint from here must have what they change. The simplest way: no append runs while the position
    /// is taken and the state is copied. Or: a record's change is in the state before the record is appended, and applying a
    /// record a second time changes nothing.
    pub fn position(&self) -> Position {
        Position { opened: self.opened, lsn: self.end.next_lsn.load(Ordering::Acquire) }
    }

    /// Appends a checkpoint, which replaces all records before `from`: the next open passes it and the records from there
    /// on. It is on disk when this returns, and the segments before `from` are free. Checkpoints are appended one at a time.
    ///
    /// # Errors
    ///
    /// As [`Journal::append`]; and [`Error::Option`] if `from` is before the position of an earlier checkpoint, whose records
    /// are gone, or not a position that this open journal has returned. Errors while removing a segment are ignored: it is removed or used later.
    pub fn checkpoint(&self, from: Position, checkpoint: &[u8]) -> Result<()> {
        let mut replay_from = self.replay_from.lock();
        let Position { opened, lsn } = from;
        if opened != self.opened || lsn < *replay_from || lsn > self.position().lsn {
            let bounds = "a position that this open journal has returned, at or after that of its last checkpoint";
            return Err(Error::Option { option: "from", value: lsn, bounds });
        }
        self.append_as(Kind::Checkpoint, &[&lsn.to_le_bytes(), checkpoint], Durability::Disk)?;
        *replay_from = lsn;
        let removed = {
            let mut output = self.end.output.lock();
            let removed = output.free_below(lsn, self.spare_bytes);
            self.end.publish_room(&output);
            removed
        };
        for slot in removed {
            // If it is still there at the next open, it is a spare segment.
            let _ = self.medium.remove(&segment::name(slot.slot));
        }
        Ok(())
    }

    /// Does what appends would have to do themselves otherwise: allocates a spare segment if there is none, and writes down
    /// how far the journal was synced, so that damage to the last records is noticed. Call it periodically, and when
    /// [`Journal::lacks_segment`] says so, from a thread that may wait for the disk.
    ///
    /// # Errors
    ///
    /// As [`Journal::append`].
    pub fn maintain(&self) -> Result<()> {
        let _one_at_a_time = self.replay_from.lock();
        self.commits.check()?;
        // Before a segment is created, which fails on a full disk.
        if self.end.is_durable_unstated() {
            self.append_as(Kind::Mark, &[], Durability::Process)?;
        }
        let reserved = {
            let mut output = self.end.output.lock();
            output.lacks_room(PREPARE).then(|| output.next_slot(0)).transpose()?
        };
        if let Some((slot, bytes)) = reserved {
            let slot = Slot::create(&*self.medium, slot, bytes)?;
            let mut output = self.end.output.lock();
            output.add_spare(slot);
            self.end.publish_room(&output);
        }
        Ok(())
    }

    /// Whether an append would soon have to create a segment itself, and wait for the disk. Costs an atomic load.
    pub fn lacks_segment(&self) -> bool {
        self.end.lacks_segment.load(Ordering::Acquire)
    }

    /// Waits for the calls that are under way, syncs all records, and writes down, in the header of another segment, that they
    /// are on disk. Later calls fail: what they would append is not written. When this returns, the journal does not touch its
    /// files any more.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`], and [`Error::Closed`] if it was closed before. A full disk is no error: then only damage to the last
    /// records is not noticed.
    pub fn close(&self) -> Result<()> {
        let _one_at_a_time = self.replay_from.lock();
        self.commits.close(&self.end)?;
        self.end.finish()
    }

    /// What was written and allocated.
    pub fn stats(&self) -> Stats {
        let output = self.end.output.lock();
        let (used_bytes, spare_bytes) = output.allocated();
        Stats {
            written_bytes: output.bytes_written(),
            syncs: self.commits.syncs(),
            segments: output.segments(),
            used_bytes,
            spare_bytes,
        }
    }
}

impl<M: Medium> std::fmt::Debug for Journal<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("place", &self.medium.place("")).finish_non_exhaustive()
    }
}
