//! The writer: how transactions reach the journal, together with the store's time if it has changed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::health::Health;
use super::meta_entries::TOKENS;
use super::sequence::Sequence;
use super::timekeeping::{Saving, TimeSaved};
use crate::clock::{Now, Timeline};
use crate::journal::store_journal::StoreJournal;
use crate::journal::tx::Tx;
use crate::metrics::Metrics;
use crate::rocks::db::Db;
use crate::testing::sync_shim::{AtomicBool, AtomicU64};
use onlyonce_core::Result;

/// Writes transactions. A write whose outcome is unknown poisons the store; any other error means that nothing has changed.
pub(super) struct Writer {
    pub(super) journal: StoreJournal,
    pub(super) sequence: Sequence,
    db: Arc<Db>,
    health: Arc<Health>,
    timeline: Arc<Timeline>,
    time_saved: TimeSaved,
    metrics: Arc<Metrics>,
    /// Bytes that were written to the journal since the last flush, or found at open.
    pub(super) journal_bytes: AtomicU64,
    /// Whether a write was not synced yet.
    unsynced: AtomicBool,
}

impl Writer {
    /// `replayed_bytes`: the bytes that the open has replayed.
    pub(super) fn new(
        journal: StoreJournal,
        sequence: Sequence,
        db: &Arc<Db>,
        health: &Arc<Health>,
        timeline: &Arc<Timeline>,
        metrics: &Arc<Metrics>,
        replayed_bytes: u64,
    ) -> Self {
        Self {
            journal,
            sequence,
            db: Arc::clone(db),
            health: Arc::clone(health),
            timeline: Arc::clone(timeline),
            time_saved: TimeSaved::default(),
            metrics: Arc::clone(metrics),
            journal_bytes: AtomicU64::new(replayed_bytes),
            unsynced: AtomicBool::new(false),
        }
    }

    /// Writes a transaction.
    pub(super) fn write(&self, sync: bool, fill: impl FnOnce(&mut Tx)) -> Result<()> {
        let bytes = self.write_uncounted(sync, fill)?;
        self.journal_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// As [`Writer::write`], for a transaction that does not bring the next flush closer. Returns its size.
    pub(super) fn write_uncounted(&self, sync: bool, fill: impl FnOnce(&mut Tx)) -> Result<usize> {
        self.health.ready()?;
        let mut tx = Tx::default();
        fill(&mut tx);
        let saving = self.time_saved.put_changed(&self.timeline, &mut tx, || self.db.check_writable().is_ok());
        let bytes = if tx.is_empty() { 0 } else { tx.len() };
        let written = {
            let _timer = self.metrics.commit(sync);
            self.journal.write(tx, sync)
        };
        written.inspect_err(|error| self.health.poison_by(error))?;
        if let Some(saving) = saving {
            saving.done();
        }
        // After the write: `sync_if_needed` clears the flag before it syncs. Set earlier, the flag of this write could be cleared by a
        // sync that does not include the write.
        self.unsynced.fetch_or(!sync, Ordering::Release);
        Ok(bytes)
    }

    /// Prepares the journal's next segment if there is none.
    pub(super) fn prepare_segment(&self) -> Result<()> {
        self.health.ready()?;
        self.journal.maintain().inspect_err(|error| self.health.poison_by(error))
    }

    /// Syncs the journal.
    pub(super) fn sync(&self) -> Result<()> {
        self.health.ready()?;
        self.journal.sync().inspect_err(|error| self.health.poison_by(error))
    }

    /// Syncs the journal if something was written without a sync.
    pub(super) fn sync_if_needed(&self) -> Result<()> {
        if self.unsynced.swap(false, Ordering::AcqRel) { self.sync() } else { Ok(()) }
    }

    #[cfg(test)]
    pub(super) fn is_unsynced(&self) -> bool {
        self.unsynced.load(Ordering::Acquire)
    }

    /// Ensures that `count` tokens, and the numbers of a few records, can be taken.
    pub(super) fn reserve_tokens(&self, count: usize) -> Result<()> {
        self.sequence
            .ensure(count as u64 + 16, |reserved| self.write(true, |tx| tx.put_meta(TOKENS, &reserved.to_le_bytes())))
    }

    /// Allocates room in the journal for so many bytes.
    pub(super) fn reserve_bytes(&self, bytes: usize) -> Result<()> {
        self.journal.reserve(bytes).inspect_err(|error| self.health.poison_by(error))
    }

    /// Fails if the next write has to store the time, and RocksDB rejects changes.
    pub(super) fn check_time_writable(&self) -> Result<()> {
        if self.is_time_outdated() { self.db.check_writable() } else { Ok(()) }
    }

    fn is_time_outdated(&self) -> bool {
        self.time_saved.is_outdated(&self.timeline)
    }

    /// Writes a change of the store's time at once; elapsed time alone is stored with the next write. `now` is the present.
    pub(super) fn save_time_if_changed(&self, now: Now) -> Result<()> {
        self.time_saved.refresh(now);
        if self.is_time_outdated() { self.write(false, |_| ()) } else { Ok(()) }
    }

    /// Syncs the store's time.
    pub(super) fn save_time(&self) -> Result<()> {
        self.timeline.ask_to_be_saved();
        if self.db.check_writable().is_ok() {
            return self.write(true, |_| ());
        }
        // After a failed flush, for example on a full disk. Each flush stores the time again.
        self.health.ready()?;
        let mut tx = Tx::default();
        let Some(saving) = self.time_saved.put_changed(&self.timeline, &mut tx, || true) else { return Ok(()) };
        self.journal.append_only(tx).inspect_err(|error| self.health.poison_by(error))?;
        saving.done();
        Ok(())
    }

    /// Writes the store's time when calls are rejected already.
    pub(super) fn write_last_time(&self) -> Result<()> {
        let mut tx = Tx::default();
        self.timeline.ask_to_be_saved();
        let saving = self.time_saved.put_changed(&self.timeline, &mut tx, || true);
        self.journal.write(tx, false)?;
        saving.into_iter().for_each(Saving::done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{record, small_engine};

    #[test]
    fn journal_bytes_are_counted_until_a_flush() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        let counted = || engine.writer.journal_bytes.load(Ordering::Relaxed);
        engine.flush().unwrap();
        assert_eq!(counted(), 0);
        record(&engine, "k");
        let one = counted();
        assert!(one > 0);
        engine.set_offset(b"stream", 3, 7).unwrap();
        let two = counted();
        assert!(two > one);
        engine.remove_messages([onlyonce_core::MessageId::new(1, 2)]).unwrap();
        assert!(counted() > two);
        engine.flush().unwrap();
        assert_eq!(counted(), 0);
    }

    #[test]
    fn a_write_asks_for_a_segment_when_the_last_spare_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        while engine.writer.journal.lacks_segment() {
            engine.writer.prepare_segment().unwrap();
        }
        let woken = engine.writer.journal.segment_needed.receiver();
        record(&engine, "k");
        assert!(woken.try_recv().is_err(), "there is one");
        let asked = (0..1_000).find(|i| {
            record(&engine, &format!("{i} {}", "k".repeat(500)));
            woken.try_recv().is_ok()
        });
        asked.expect("segments are taken");
        while engine.writer.journal.lacks_segment() {
            engine.writer.prepare_segment().unwrap();
        }
        record(&engine, "another");
        assert!(woken.try_recv().is_err(), "there is one again");
    }
}
