//! Group commit: one thread at a time writes, and one syncs, for all callers that wait meanwhile.
//!
//! There is no thread of its own. If no other caller writes, a caller takes all queued records and writes them: it is the
//! *writer*. If no other caller syncs, a caller that waits for the disk is the *syncer*, for everything that is written by then.
//! One writes while the other syncs. When either has finished, it wakes the callers whose records are done, each by itself,
//! and first of all one that continues in its role. So no caller wakes up only to find that it has to wait again.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::error::{Error, Result, unknown};
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
    /// No record is queued any more.
    is_closed: bool,
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

/// What a call waits for.
#[derive(Debug, Clone, Copy)]
struct Call {
    record: u64,
    durability: Durability,
    /// Whether the record is its own, so that it returns the record's error.
    is_append: bool,
}

#[derive(Debug)]
struct Waiter {
    call: Call,
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
    /// The error of all calls that begin now.
    fn refusal(&self) -> Option<Error> {
        self.failed.clone().or(self.is_closed.then_some(Error::Closed))
    }

    /// The answer for a call, if it need not wait any more.
    fn answer(&mut self, call: Call) -> Option<Result<()>> {
        if let Some(at) = self.rejection(call) {
            return Some(Err(self.take_rejection(at)));
        }
        if self.is_done(call) {
            return Some(Ok(()));
        }
        self.failed.clone().map(Err)
    }

    fn rejection(&self, call: Call) -> Option<usize> {
        let is_own = |rejected: &Rejected| call.is_append && (rejected.first..=rejected.last).contains(&call.record);
        self.rejected.iter().position(is_own)
    }

    fn is_done(&self, call: Call) -> bool {
        call.record <= if call.durability == Durability::Disk { self.durable } else { self.written }
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

    /// Removes the waiters that are to be woken: first those that take over a role, then those whose records are done. `call`
    /// has just written or synced: if it still waits for the disk, it is the next syncer itself.
    fn take_woken(&mut self, call: Call) -> Vec<Arc<Waiter>> {
        let mut woken = Vec::new();
        if self.waiters.is_empty() {
            return woken;
        }
        let mut needs_writer = !self.is_writing && self.last_queued > self.written;
        let continues = call.record <= self.written && !self.is_done(call) && self.rejection(call).is_none();
        let mut needs_syncer = !self.is_syncing && self.written > self.durable && !continues;
        let (mut leaders, has_failed) = (0, self.failed.is_some());
        let mut left = VecDeque::with_capacity(self.waiters.len());
        for waiter in std::mem::take(&mut self.waiters) {
            let is_written = waiter.call.record <= self.written;
            // A caller whose record is rejected does not take over a role.
            let is_done = has_failed || self.is_done(waiter.call) || self.rejection(waiter.call).is_some();
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
        if let Some(error) = state.refusal() {
            return Err(error);
        }
        state.queued.push(kind, parts);
        state.last_queued += 1;
        let record = state.last_queued;
        self.wait(state, Call { record, durability, is_append: true }, sink)
    }

    /// Returns when everything that was appended before is on disk.
    pub(crate) fn sync(&self, sink: &impl Sink) -> Result<()> {
        let state = self.state.lock();
        if let Some(error) = state.refusal() {
            return Err(error);
        }
        // Records that are still queued are not acknowledged.
        let record = state.written;
        self.wait(state, Call { record, durability: Durability::Disk, is_append: false }, sink)
    }

    /// Makes all later calls fail. Returns when everything that was appended before is on disk or rejected, or after a
    /// failure. The sink is not used any more then.
    pub(crate) fn close(&self, sink: &impl Sink) -> Result<()> {
        let mut state = self.state.lock();
        let refusal = state.refusal();
        state.is_closed = true;
        let record = state.last_queued;
        let closed = match refusal {
            Some(error) => {
                drop(state);
                Err(error)
            }
            None => self.wait(state, Call { record, durability: Durability::Disk, is_append: false }, sink),
        };
        // After a failure another thread may still write or sync.
        while closed.is_err() && self.is_in_use() {
            yield_now();
        }
        closed
    }

    fn is_in_use(&self) -> bool {
        let state = self.state.lock();
        state.is_writing || state.is_syncing
    }

    fn wait<'a>(&'a self, mut state: MutexGuard<'a, State>, call: Call, sink: &impl Sink) -> Result<()> {
        loop {
            if let Some(answer) = state.answer(call) {
                return answer;
            }
            if call.record > state.written && !state.is_writing {
                state = self.write(state, call, sink);
            } else if call.record <= state.written && !state.is_syncing {
                state = self.sync_written(state, call, sink);
            } else {
                let waiter = Arc::new(Waiter { call, thread: current(), is_woken: AtomicBool::new(false) });
                state.waiters.push_back(Arc::clone(&waiter));
                drop(state);
                waiter.wait();
                state = self.state.lock();
            }
        }
    }

    /// Writes all queued records.
    fn write<'a>(&'a self, mut state: MutexGuard<'a, State>, call: Call, sink: &impl Sink) -> MutexGuard<'a, State> {
        state.is_writing = true;
        let spare = std::mem::take(&mut state.spare);
        let mut batch = std::mem::replace(&mut state.queued, spare);
        let last = state.last_queued;
        drop(state);
        let panic = FailOnPanic { commits: self, role: |state| &mut state.is_writing, armed: true };
        let written = sink.write(&batch);
        panic.disarm();
        batch.clear();
        let mut state = self.state.lock();
        state.is_writing = false;
        state.spare = batch;
        match written {
            // After a failed sync, nothing is acknowledged any more.
            Ok(()) if state.failed.is_some() => {}
            Ok(()) => state.written = last,
            Err(error @ Error::Unknown { .. }) => state.failed = Some(error),
            Err(error) => {
                let first = state.written + 1;
                state.rejected.push(Rejected { first, last, callers: last + 1 - first, error });
                state.written = last;
            }
        }
        self.wake(state, call)
    }

    /// Syncs everything that is written.
    fn sync_written<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        call: Call,
        sink: &impl Sink,
    ) -> MutexGuard<'a, State> {
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
        let panic = FailOnPanic { commits: self, role: |state| &mut state.is_syncing, armed: true };
        let synced = sink.sync();
        panic.disarm();
        let mut state = self.state.lock();
        state.is_syncing = false;
        match synced {
            Ok(()) => {
                state.durable = written;
                state.syncs += 1;
            }
            Err(error) => state.failed = Some(error),
        }
        self.wake(state, call)
    }

    /// Makes all calls fail after a panic of the sink: what it wrote is unknown, and no other thread knows that it has ended.
    fn fail_after_panic(&self, role: fn(&mut State) -> &mut bool) {
        let mut state = self.state.lock();
        *role(&mut state) = false;
        state.failed = Some(unknown("writing to", "the journal", io::Error::other("the thread that wrote panicked")));
        for waiter in std::mem::take(&mut state.waiters) {
            waiter.wake();
        }
    }

    fn wake<'a>(&'a self, mut state: MutexGuard<'a, State>, call: Call) -> MutexGuard<'a, State> {
        let woken = state.take_woken(call);
        if !woken.is_empty() {
            MutexGuard::unlocked(&mut state, || woken.iter().for_each(|waiter| waiter.wake()));
        }
        state
    }

    /// Fails if all calls do.
    pub(crate) fn check(&self) -> Result<()> {
        self.state.lock().refusal().map_or(Ok(()), Err)
    }

    /// How many calls wait, and how many rejected batches have callers that do not know it yet.
    #[cfg(all(test, shuttle))]
    pub(crate) fn waiting(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.waiters.len(), state.rejected.len())
    }

    /// How many syncs there were.
    pub(crate) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }
}

/// Held while the sink is used.
struct FailOnPanic<'a> {
    commits: &'a GroupCommit,
    /// The flag of the thread's role: another thread may have the other one.
    role: fn(&mut State) -> &mut bool,
    armed: bool,
}

impl FailOnPanic<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for FailOnPanic<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.commits.fail_after_panic(self.role);
        }
    }
}

#[cfg(all(test, not(shuttle)))]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::Duration;

    use super::*;
    use crate::error::not_written;

    /// Counts records, and fails where it is asked to.
    #[derive(Default)]
    struct Counter {
        written: AtomicU64,
        durable: AtomicU64,
        writes: AtomicU64,
        syncs: AtomicU64,
        rejected_write: Option<u64>,
        failed_write: Option<u64>,
        failed_sync: Option<u64>,
    }

    impl Sink for Counter {
        fn write(&self, batch: &Batch) -> Result<()> {
            let this = Some(self.writes.fetch_add(1, Ordering::SeqCst));
            std::thread::sleep(Duration::from_micros(100));
            if this == self.rejected_write {
                return Err(not_written("creating", "a file", io::ErrorKind::StorageFull.into()));
            }
            if this == self.failed_write {
                return Err(unknown("writing", "a file", io::Error::other("the disk failed")));
            }
            self.written.fetch_add(batch.len() as u64, Ordering::SeqCst);
            Ok(())
        }

        fn sync(&self) -> Result<()> {
            let this = Some(self.syncs.fetch_add(1, Ordering::SeqCst));
            let written = self.written.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(500));
            if this == self.failed_sync {
                return Err(unknown("syncing", "a file", io::Error::other("the disk failed")));
            }
            self.durable.store(written, Ordering::SeqCst);
            Ok(())
        }
    }

    const THREADS: u64 = if cfg!(miri) { 4 } else { 32 };
    const RECORDS: u64 = if cfg!(miri) { 3 } else { 50 };

    /// Threads append; returns how many appends succeeded and failed.
    fn append(group: &GroupCommit, sink: &Counter) -> (u64, u64) {
        let (succeeded, failed) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (succeeded, failed) = (&succeeded, &failed);
                scope.spawn(move || {
                    for i in 0..RECORDS {
                        let disk = (thread + i) % 2 == 0;
                        let durability = if disk { Durability::Disk } else { Durability::Process };
                        match group.append(Kind::Data, &[b"record"], durability, sink) {
                            Ok(()) => {
                                let count = succeeded.fetch_add(1, Ordering::SeqCst) + 1;
                                assert!(sink.written.load(Ordering::SeqCst) >= count);
                            }
                            Err(_) => drop(failed.fetch_add(1, Ordering::SeqCst)),
                        }
                    }
                });
            }
        });
        (succeeded.into_inner(), failed.into_inner())
    }

    #[test]
    fn callers_share_writes_and_syncs() {
        let (group, sink) = (GroupCommit::default(), Counter::default());
        assert_eq!(append(&group, &sink), (THREADS * RECORDS, 0));
        group.sync(&sink).unwrap();
        assert_eq!(sink.written.load(Ordering::SeqCst), THREADS * RECORDS);
        assert_eq!(sink.durable.load(Ordering::SeqCst), THREADS * RECORDS);
        let (writes, syncs) = (sink.writes.into_inner(), sink.syncs.into_inner());
        assert_eq!(group.syncs(), syncs);
        // Under Miri's scheduler few threads arrive at the same time.
        assert!(cfg!(miri) || writes + syncs < THREADS * RECORDS, "{writes} writes, {syncs} syncs");
    }

    #[test]
    fn a_rejected_batch_fails_each_of_its_callers_once() {
        let sink = Counter { rejected_write: Some(2), ..Counter::default() };
        let group = GroupCommit::default();
        let (succeeded, failed) = append(&group, &sink);
        assert!(failed >= 1);
        assert_eq!(succeeded + failed, THREADS * RECORDS);
        assert_eq!(sink.written.load(Ordering::SeqCst), succeeded, "exactly the acknowledged records are written");
        assert!(group.state.lock().rejected.is_empty());
    }

    #[test]
    fn a_sync_does_not_take_the_error_of_a_rejected_record() {
        let mut state = State { written: 2, last_queued: 2, ..State::default() };
        let error = not_written("creating", "a file", io::ErrorKind::StorageFull.into());
        state.rejected.push(Rejected { first: 1, last: 2, callers: 2, error });
        let sync = Call { record: 2, durability: Durability::Disk, is_append: false };
        assert!(state.answer(sync).is_none());
        state.durable = 2;
        assert!(matches!(state.answer(sync), Some(Ok(()))));
        for record in [1, 2] {
            let append = Call { record, durability: Durability::Process, is_append: true };
            assert!(matches!(state.answer(append), Some(Err(Error::NotWritten { .. }))), "{record}");
        }
        assert!(state.rejected.is_empty());
    }

    #[test]
    fn a_failed_write_or_sync_fails_all_later_calls_and_is_not_repeated() {
        for sink in [
            Counter { failed_write: Some(1), ..Counter::default() },
            Counter { failed_sync: Some(1), ..Counter::default() },
        ] {
            let group = GroupCommit::default();
            let (succeeded, failed) = append(&group, &sink);
            // The failure may reach a caller between its write and its sync, so that none succeeds.
            assert!(failed >= 1 && succeeded + failed == THREADS * RECORDS);
            let used = || (sink.writes.load(Ordering::SeqCst), sink.syncs.load(Ordering::SeqCst));
            let before = used();
            assert!(sink.failed_sync.is_none() || before.1 == 2, "no sync after the one that failed");
            for _ in 0..2 {
                assert!(matches!(group.sync(&sink), Err(Error::Unknown { .. })));
                assert!(matches!(group.close(&sink), Err(Error::Unknown { .. })));
                let append = group.append(Kind::Data, &[b"late"], Durability::Process, &sink);
                assert!(matches!(append, Err(Error::Unknown { .. })));
            }
            assert_eq!(used(), before);
        }
    }

    /// Panics in its first write, after other callers have queued records.
    struct Panics(AtomicU64);

    impl Sink for Panics {
        fn write(&self, _: &Batch) -> Result<()> {
            std::thread::sleep(Duration::from_millis(20));
            assert!(self.0.fetch_add(1, Ordering::SeqCst) > 0, "a panic of the sink");
            Ok(())
        }

        fn sync(&self) -> Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_of_the_sink_fails_all_calls_and_leaves_none_waiting() {
        let (group, sink) = (GroupCommit::default(), Panics(AtomicU64::new(0)));
        let append = || group.append(Kind::Data, &[b"record"], Durability::Disk, &sink);
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let callers: Vec<_> = (0..4).map(|_| scope.spawn(append)).collect();
            callers.into_iter().map(|caller| caller.join().map_err(drop)).collect()
        });
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_err()).count(), 1, "the writer panicked: {outcomes:?}");
        assert!(outcomes.iter().flatten().all(|outcome| matches!(outcome, Err(Error::Unknown { .. }))), "{outcomes:?}");
        assert!(matches!(append(), Err(Error::Unknown { .. })));
        assert!(group.close(&sink).is_err());
    }

    #[test]
    fn a_close_waits_for_the_records_before_it_and_rejects_those_after_it() {
        let (group, sink) = (GroupCommit::default(), Counter::default());
        let succeeded = std::thread::scope(|scope| {
            let appends = scope.spawn(|| append(&group, &sink).0);
            while sink.written.load(Ordering::SeqCst) < THREADS {
                std::thread::yield_now();
            }
            group.close(&sink).unwrap();
            let written = sink.written.load(Ordering::SeqCst);
            assert_eq!(sink.durable.load(Ordering::SeqCst), written);
            let succeeded = appends.join().unwrap();
            assert_eq!(sink.written.load(Ordering::SeqCst), written, "nothing is written after the close");
            succeeded
        });
        assert_eq!(sink.written.load(Ordering::SeqCst), succeeded, "a record is written if its append succeeded");
        assert!(matches!(group.sync(&sink), Err(Error::Closed)));
    }

    /// Its first write lasts until it may end. Every sync fails.
    #[derive(Default)]
    struct SlowWrite {
        may_end: std::sync::atomic::AtomicBool,
        writes: AtomicU64,
        ended: AtomicU64,
    }

    impl Sink for SlowWrite {
        fn write(&self, _: &Batch) -> Result<()> {
            if self.writes.fetch_add(1, Ordering::SeqCst) == 1 {
                while !self.may_end.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            self.ended.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn sync(&self) -> Result<()> {
            Err(unknown("syncing", "a file", io::Error::other("the disk failed")))
        }
    }

    #[test]
    fn a_close_after_a_failed_sync_waits_for_the_write_and_the_write_is_not_acknowledged() {
        let (group, sink) = (GroupCommit::default(), SlowWrite::default());
        group.append(Kind::Data, &[b"written"], Durability::Process, &sink).unwrap();
        std::thread::scope(|scope| {
            let append = scope.spawn(|| group.append(Kind::Data, &[b"slow"], Durability::Process, &sink));
            while sink.writes.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            let sync = group.sync(&sink);
            assert!(matches!(sync, Err(Error::Unknown { .. })), "{sync:?}");
            let end = scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(30));
                sink.may_end.store(true, Ordering::SeqCst);
            });
            // The failure may be older than the close.
            let closed = group.close(&sink);
            assert!(closed.is_err());
            assert_eq!(sink.ended.load(Ordering::SeqCst), 2, "the sink is not used after the close");
            assert!(matches!(append.join().unwrap(), Err(Error::Unknown { .. })));
            end.join().unwrap();
        });
    }
}
