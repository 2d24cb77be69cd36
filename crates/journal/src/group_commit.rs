//! Group commit: one thread at a time writes, and one syncs, for all callers that wait meanwhile.
//!
//! There is no thread of its own. A caller that finds nobody writing takes all queued records and writes them: it is the
//! *writer*. A caller that waits for the disk and finds nobody syncing is the *syncer*, for everything that is written by then.
//! One writes while the other syncs. When either has finished, it wakes the callers whose records are done, each by itself,
//! and first of all one that continues in its role. So no caller wakes up only to find that it has to wait again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::{Error, Result};
use super::record::Kind;
use super::sync::{AtomicBool, Mutex, MutexGuard, Thread, current, park, yield_now};

/// How often a syncer lets other threads run while more records arrive. One sync for all of them is cheaper than one for each.
const MAX_YIELDS: usize = 16;

/// When an append returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// When the operating system has the record. It survives a crash of the process.
    Process,
    /// When the record is on disk. It survives a power cut.
    Disk,
}

/// Records that wait to be written, in their order.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    payloads: Vec<u8>,
    records: Vec<(Kind, usize)>,
}

/// A batch keeps at most this much memory for the next one.
const KEPT_BYTES: usize = 1 << 20;

impl Batch {
    pub(crate) fn push(&mut self, kind: Kind, parts: &[&[u8]]) {
        let before = self.payloads.len();
        parts.iter().for_each(|part| self.payloads.extend_from_slice(part));
        self.records.push((kind, self.payloads.len() - before));
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = (Kind, &[u8])> {
        let mut left = self.payloads.as_slice();
        self.records.iter().map(move |(kind, len)| {
            let (payload, rest) = left.split_at_checked(*len).unwrap_or_default();
            left = rest;
            (*kind, payload)
        })
    }

    /// The number of records.
    pub(crate) fn len(&self) -> usize {
        self.records.len()
    }

    /// The bytes of all payloads.
    pub(crate) fn bytes(&self) -> usize {
        self.payloads.len()
    }

    fn clear(&mut self) {
        self.payloads.clear();
        self.payloads.shrink_to(KEPT_BYTES);
        self.records.clear();
    }
}

/// What writes and syncs. Only one thread at a time calls `write`, and only one `sync`.
pub(crate) trait Sink {
    /// Writes all records of a batch, or none.
    fn write(&self, batch: &Batch) -> Result<()>;

    /// Syncs everything that was written before the call.
    fn sync(&self) -> Result<()>;
}

/// The queue of records and of callers.
#[derive(Debug, Default)]
pub(crate) struct GroupCommit {
    state: Mutex<State>,
}

/// Records are counted from 1 in the order in which they are queued.
#[derive(Debug, Default)]
struct State {
    queued: Batch,
    /// A cleared batch, kept for its memory.
    spare: Batch,
    last_queued: u64,
    /// Records up to this one are written or rejected.
    written: u64,
    /// Records up to this one are on disk or rejected.
    durable: u64,
    is_writing: bool,
    is_syncing: bool,
    waiters: VecDeque<Arc<Waiter>>,
    /// Records that were not written, until all their callers know it.
    rejected: Vec<Rejected>,
    /// The error of a write or a sync whose outcome is unknown. It is permanent.
    failed: Option<Error>,
    syncs: u64,
}

#[derive(Debug)]
struct Rejected {
    first: u64,
    last: u64,
    callers: u64,
    error: Error,
}

#[derive(Debug)]
struct Waiter {
    record: u64,
    durability: Durability,
    thread: Thread,
    is_woken: AtomicBool,
}

impl Waiter {
    fn wake(&self) {
        self.is_woken.store(true, Ordering::Release);
        self.thread.unpark();
    }

    fn wait(&self) {
        while !self.is_woken.load(Ordering::Acquire) {
            park();
        }
    }
}

impl State {
    /// The answer for a caller, if it need not wait any more.
    fn answer(&mut self, record: u64, durability: Durability) -> Option<Result<()>> {
        if let Some(at) = self.rejected.iter().position(|rejected| (rejected.first..=rejected.last).contains(&record)) {
            return Some(Err(self.take_rejection(at)));
        }
        if self.is_done(record, durability) {
            return Some(Ok(()));
        }
        self.failed.clone().map(Err)
    }

    fn is_done(&self, record: u64, durability: Durability) -> bool {
        record <= if durability == Durability::Disk { self.durable } else { self.written }
    }

    #[cold]
    fn take_rejection(&mut self, at: usize) -> Error {
        let Some(rejected) = self.rejected.get_mut(at) else { return Error::Closed };
        let error = rejected.error.clone();
        rejected.callers -= 1;
        if rejected.callers == 0 {
            self.rejected.swap_remove(at);
        }
        error
    }

    /// Removes the waiters that are to be woken: first those that take over a role, then those whose records are done.
    fn take_woken(&mut self) -> Vec<Arc<Waiter>> {
        let mut woken = Vec::new();
        if self.waiters.is_empty() {
            return woken;
        }
        let mut needs_writer = !self.is_writing && self.last_queued > self.written;
        let mut needs_syncer = !self.is_syncing && self.written > self.durable;
        let (mut leaders, has_failed) = (0, self.failed.is_some());
        let mut left = VecDeque::with_capacity(self.waiters.len());
        for waiter in std::mem::take(&mut self.waiters) {
            let is_written = waiter.record <= self.written;
            let is_done = has_failed || self.is_done(waiter.record, waiter.durability);
            let leads = !is_done && std::mem::take(if is_written { &mut needs_syncer } else { &mut needs_writer });
            if leads {
                woken.insert(leaders, waiter);
                leaders += 1;
            } else if is_done {
                woken.push(waiter);
            } else {
                left.push_back(waiter);
            }
        }
        self.waiters = left;
        woken
    }
}

impl GroupCommit {
    /// Appends a record, and returns when it is as durable as asked.
    pub(crate) fn append(&self, kind: Kind, parts: &[&[u8]], durability: Durability, sink: &impl Sink) -> Result<()> {
        let mut state = self.state.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        state.queued.push(kind, parts);
        state.last_queued += 1;
        let record = state.last_queued;
        self.wait(state, record, durability, sink)
    }

    /// Returns when everything that was appended before is on disk.
    pub(crate) fn sync(&self, sink: &impl Sink) -> Result<()> {
        let state = self.state.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        // Records that are still queued are not acknowledged.
        let record = state.written;
        self.wait(state, record, Durability::Disk, sink)
    }

    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        record: u64,
        durability: Durability,
        sink: &impl Sink,
    ) -> Result<()> {
        loop {
            if let Some(answer) = state.answer(record, durability) {
                return answer;
            }
            if record > state.written && !state.is_writing {
                state = self.write(state, sink);
            } else if record <= state.written && !state.is_syncing {
                state = self.sync_written(state, sink);
            } else {
                let thread = current();
                let waiter = Arc::new(Waiter { record, durability, thread, is_woken: AtomicBool::new(false) });
                state.waiters.push_back(Arc::clone(&waiter));
                drop(state);
                waiter.wait();
                state = self.state.lock();
            }
        }
    }

    /// Writes all queued records.
    fn write<'a>(&'a self, mut state: MutexGuard<'a, State>, sink: &impl Sink) -> MutexGuard<'a, State> {
        state.is_writing = true;
        let spare = std::mem::take(&mut state.spare);
        let mut batch = std::mem::replace(&mut state.queued, spare);
        let last = state.last_queued;
        drop(state);
        let written = sink.write(&batch);
        batch.clear();
        let mut state = self.state.lock();
        state.is_writing = false;
        state.spare = batch;
        match written {
            Ok(()) => state.written = last,
            Err(error @ Error::Unknown { .. }) => state.failed = Some(error),
            Err(error) => {
                let first = state.written + 1;
                state.rejected.push(Rejected { first, last, callers: last + 1 - first, error });
                state.written = last;
            }
        }
        self.wake(state)
    }

    /// Syncs everything that is written.
    fn sync_written<'a>(&'a self, mut state: MutexGuard<'a, State>, sink: &impl Sink) -> MutexGuard<'a, State> {
        state.is_syncing = true;
        for _ in 0..MAX_YIELDS {
            let before = state.last_queued;
            MutexGuard::unlocked(&mut state, || (0..2).for_each(|_| yield_now()));
            if state.last_queued == before {
                break;
            }
        }
        let written = state.written;
        drop(state);
        let synced = sink.sync();
        let mut state = self.state.lock();
        state.is_syncing = false;
        match synced {
            Ok(()) => {
                state.durable = written;
                state.syncs += 1;
            }
            Err(error) => state.failed = Some(error),
        }
        self.wake(state)
    }

    fn wake<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let woken = state.take_woken();
        if !woken.is_empty() {
            MutexGuard::unlocked(&mut state, || woken.iter().for_each(|waiter| waiter.wake()));
        }
        state
    }

    /// Makes all later calls fail with this error.
    pub(crate) fn fail(&self, error: Error) {
        let mut state = self.state.lock();
        state.failed.get_or_insert(error);
        drop(self.wake(state));
    }

    /// How many syncs there were.
    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }
}
