//! Backpressure: calls wait while completed keys fill their share of memory, and wake the thread that flushes them.

use std::sync::atomic::Ordering;

use super::core::Engine;
use super::request::{Request, admit_bytes};
use onlyonce_core::Result;

/// The number of unflushed keys at which a flush is due. Fewer make more SSTs to search; more make a replay longer.
const FLUSH_KEYS: usize = 250_000;
/// A flush is due when unflushed keys or the journal's records take this share of the memory budget.
const FLUSH_SHARE: usize = 8;
/// Calls wait when unflushed keys take this share.
const BACKLOG_SHARE: usize = 4;

/// More than the journal has for an item besides its bytes.
const RECORD_BYTES: usize = 64;

/// What a call needs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Demand {
    /// The number of its keys, or of its other items in the journal.
    pub(super) items: usize,
    /// The number of tokens that it may take.
    pub(super) tokens: usize,
    /// The bytes of its items.
    pub(super) bytes: usize,
    /// Whether it changes more than keys in the memtable.
    pub(super) changes_database: bool,
}

impl Demand {
    /// What a claim or a record of these keys needs.
    pub(super) fn of(request: &Request) -> Self {
        let items = request.len();
        Self { items, tokens: items, bytes: request.key_bytes(), changes_database: false }
    }
}

impl Engine {
    /// Whether the memtable or the journal is large enough for a flush.
    pub(super) fn is_flush_due(&self) -> bool {
        let bytes = self.config().memory_budget / FLUSH_SHARE;
        self.tables.memtable.flushable() >= FLUSH_KEYS
            || self.tables.memtable.flushable_bytes() >= bytes
            || self.writer.journal.unflushed() >= bytes
            || self.writer.journal_bytes.load(Ordering::Relaxed) >= bytes as u64
    }

    /// Whether unflushed keys, or offsets and messages, fill the memory that they may use, so that calls wait.
    pub(super) fn is_backlogged(&self) -> bool {
        let bytes = self.config().memory_budget / BACKLOG_SHARE;
        self.tables.memtable.flushable_bytes() >= bytes || self.writer.journal.unflushed() >= bytes
    }

    /// Waits until there is room for a call: in memory, in one write, in the journal's segments, and among the reserved tokens.
    /// Fails if the call could not be written, before it has changed anything.
    pub(super) fn admit(&self, demand: Demand) -> Result<()> {
        // Even if the call writes nothing: a caller that waits for a key fails here once the store is poisoned or closed.
        self.health.ready()?;
        let Demand { items, tokens, bytes, changes_database } = demand;
        admit_bytes(bytes)?;
        self.wait_for_room()?;
        if changes_database {
            self.tables.db.check_writable()?;
        }
        self.writer.check_time_writable()?;
        self.writer.reserve_bytes(bytes.saturating_add(items.saturating_mul(RECORD_BYTES)))?;
        self.writer.reserve_tokens(tokens)
    }

    /// Waits while the backlog is full. Fails if flushes fail.
    fn wait_for_room(&self) -> Result<()> {
        while self.is_backlogged() {
            self.health.ready()?;
            self.backlog.flush_needed.wake();
            self.backlog.wait()?;
        }
        Ok(())
    }

    pub(super) fn wake_if_due(&self) {
        if self.is_flush_due() {
            self.backlog.flush_needed.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Options;
    use crate::engine::fixture::{engine, fill, small_engine};
    use crate::memtable::slot::OVERHEAD_BYTES;
    use onlyonce_core::Error;

    /// Adds a completed key that counts for `bytes` in the memtable.
    fn fill_counted(engine: &Engine, digest: u64, bytes: usize) {
        fill(engine, digest, bytes - OVERHEAD_BYTES - 1);
    }

    #[test]
    fn the_maintenance_thread_is_woken_when_a_flush_is_due() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        let woken = engine.backlog.flush_needed.receiver();
        let record = |key: &str| engine.record(&engine.request([key]).unwrap()).unwrap();
        record("a");
        assert!(woken.try_recv().is_err());
        fill(&engine, 1, 4 << 20);
        record("b");
        woken.try_recv().expect("a flush is due");
    }

    #[test]
    fn calls_wait_while_the_backlog_is_full_and_report_a_failed_flush() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        fill(&engine, 1, 8 << 20);
        let request = engine.request(["k"]).unwrap();
        engine.backlog.flushed(&Err(Error::io("writing", "/", "no space")));
        for refused in [engine.claim(&request).map(|_| ()), engine.record(&request).map(|_| ())] {
            let Err(Error::FlushFailed { source }) = refused else { panic!("{refused:?}") };
            assert!(onlyonce_core::chain(&source).contains("no space"), "{source}");
        }
        engine.backlog.flushed(&Ok(()));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| engine.claim(&request).unwrap().len());
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            engine.flush().unwrap();
            assert_eq!(waits.join().unwrap(), 1);
        });
    }

    #[test]
    fn a_flush_is_due_at_an_eighth_of_the_budget_and_calls_wait_at_a_quarter() {
        let dir = tempfile::tempdir().unwrap();
        let small = small_engine(&dir);
        let eighth = 4 << 20;
        let is_due_or_too_late = || (small.is_flush_due(), small.is_backlogged());
        for (journal, is_due) in [(0, false), (eighth - 1, false), (eighth, true)] {
            small.writer.journal_bytes.store(journal as u64, Ordering::Relaxed);
            assert_eq!(is_due_or_too_late(), (is_due, false), "{journal} bytes of records");
        }
        small.writer.journal_bytes.store(0, Ordering::Relaxed);
        let least = OVERHEAD_BYTES + 1;
        for (digest, bytes, is_due, is_too_late) in [
            (1, eighth - least, false, false),
            (2, least - 1, false, false),
            (3, least, true, false),
            (4, eighth - 2 * least, true, false),
            (5, least, true, false),
            (6, least, true, true),
        ] {
            if bytes >= least {
                fill_counted(&small, digest, bytes);
            }
            assert_eq!(
                is_due_or_too_late(),
                (is_due, is_too_late),
                "{} bytes",
                small.tables.memtable.flushable_bytes()
            );
        }

        let dir = tempfile::tempdir().unwrap();
        let large = engine(&dir, &Options::default());
        (1..FLUSH_KEYS as u64).for_each(|i| fill_counted(&large, i.wrapping_mul(0x9e37_79b9_7f4a_7c15), least));
        assert!(!large.is_flush_due());
        fill_counted(&large, 0, least);
        assert!(large.is_flush_due());
    }
}
