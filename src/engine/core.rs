//! The parts of a store, its requests and times, and its records until they are written.
//!
//! `execute.rs` has the order of a call's effects.
//!
//! A record's number is taken before the memtable shows its effect. So a flush, which waits for all records below its own number,
//! waits for the record of each effect that it freezes. Otherwise it could move a completion to its bucket although the call then
//! fails.
//!
//! No lock of a shard is held while the disk is read or written.

use std::sync::Arc;

use super::backlog::Backlog;
use super::health::Health;
use super::request::{KeyRef, Request, TimeSource};
use super::response::too_far_ahead;
use super::side_writes::{self, Admitted};
use super::waiters::{Waiter, Waiters};
use super::writer::Writer;
use crate::buckets::filters::Filters;
use crate::buckets::registry::BucketRegistry;
use crate::clock::{Now, Timeline};
use crate::codec::{RecordKind, RecordWriter};
use crate::config::{Config, MAX_KEY};
use crate::digest::Digester;
use crate::journal::replayed::Totals;
use crate::memtable::table::MemTable;
use crate::metrics::Metrics;
use crate::rocks::db::Db;
use crate::stats::Counters;
use crate::testing::sync_shim::{AtomicU64, Mutex};
use onlyonce_core::Key;
use onlyonce_core::machine::Policy;
use onlyonce_core::{Error, Result, TimestampError};

pub(crate) struct Engine {
    pub(super) config: Config,
    pub(super) policy: Policy,
    pub(super) digester: Digester,
    pub(super) timeline: Arc<Timeline>,
    pub(crate) health: Arc<Health>,
    pub(super) writer: Writer,
    pub(super) tables: Tables,
    /// Where calls wait for a flush.
    pub(super) backlog: Arc<Backlog>,
    /// Where calls wait for a key.
    pub(super) waiters: Arc<Waiters>,
    /// The outbox has no messages of records below this number.
    pub(super) delivered_below: AtomicU64,
    pub(super) counters: Counters,
    pub(super) metrics: Arc<Metrics>,
    /// Figures of the journal's replay at open.
    pub(super) replayed: Totals,
}

/// Where keys are: in memory, in buckets with their filters, or on the way from one to the other.
pub(super) struct Tables {
    pub(super) db: Arc<Db>,
    pub(super) memtable: MemTable,
    pub(super) buckets: BucketRegistry,
    pub(super) filters: Filters,
    /// Held during a flush, and by operations that must not overlap with one: dropping buckets, forgetting a key.
    pub(super) flush_lock: Mutex<()>,
    /// Incremented before flushed keys are removed from the memtable. A reader that sees it change reads the disk again: a
    /// key that it did not find on disk may be in a bucket now.
    pub(super) flush_generation: AtomicU64,
}

impl Engine {
    pub(crate) fn path(&self) -> &std::path::Path {
        self.tables.db.directory().root()
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn now(&self) -> Now {
        self.timeline.now()
    }

    /// Registers a waiter that is woken when work on a key of this digest ends. See [`Waiters::enter`].
    pub(crate) fn wait_for(&self, digest: u64) -> Waiter {
        self.waiters.enter(digest)
    }

    /// Encodes and digests the keys of a call that does not claim. Keys longer than `key_limit` are accepted: they may have
    /// been claimed when the limit was higher.
    pub(crate) fn request_about<'k, K: Into<Key<'k>>>(
        &self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Arc<Request>> {
        self.health.ready()?;
        Ok(Arc::new(Request::new(keys, TimeSource::Any, MAX_KEY, &self.digester)?))
    }

    /// Encodes and digests the keys of a call.
    pub(crate) fn request<'k, K: Into<Key<'k>>>(&self, keys: impl IntoIterator<Item = K>) -> Result<Arc<Request>> {
        self.health.ready()?;
        let time = if self.timeline.is_stream() { TimeSource::Stream } else { TimeSource::Clock };
        Ok(Arc::new(Request::new(keys, time, self.config.key_limit, &self.digester)?))
    }

    /// Converts a grant that was exported from the process back to its internal form.
    #[cfg(feature = "tokio")]
    pub(crate) fn imported(&self, grant: &onlyonce_core::Grant) -> Result<super::response::Grant> {
        let request = self.request_about(std::iter::once(&grant.key))?;
        Ok(super::response::Grant {
            request,
            index: 0,
            token: grant.token().get(),
            attempt: grant.attempt.number(),
            prior: grant.attempt.prior(),
            fingerprint: grant.key.payload_fingerprint().copied(),
            at_ms: grant.claimed_at.as_unix_ms(),
            claimed_monotonic_ms: grant.granted_at_ms,
        })
    }

    /// Advances stream time regardless of message timestamps, and syncs the new time.
    pub(crate) fn advance_stream_time(&self, to_ms: u64) -> Result<()> {
        self.health.ready()?;
        if !self.timeline.is_stream() {
            return Err(Error::Timestamp(TimestampError::Unexpected));
        }
        if !self.timeline.advance(to_ms) {
            let bounds = "up to a year ahead of the wall clock or of stream time, in milliseconds".to_owned();
            return Err(Error::Config { option: "advance_stream_time", value: to_ms.to_string(), bounds });
        }
        self.writer.save_time()
    }

    /// The time at which a key is decided. On stream time it follows the key's message. Read under the shard's lock, so after the lookup: if a bucket was
    /// dropped between the lookup and the lock, the new stream time makes the message too old. Read earlier, a message whose
    /// completion was in the dropped bucket would be processed twice.
    pub(super) fn moment_of(&self, request: &Request, key_ref: KeyRef<'_>, now: Now) -> Result<Now> {
        let Some(at_ms) = request.at_ms(key_ref.index) else { return Ok(now) };
        match self.timeline.follow(at_ms, request.timestamps_after(key_ref.index)) {
            Ok(time_ms) => Ok(Now { time_ms, ..now }),
            Err(leap) => Err(too_far_ahead(key_ref, at_ms, leap)),
        }
    }

    /// The time at which a check of a key decides. Unlike a claim, it does not advance stream time.
    pub(super) fn foreseen(&self, key_ref: KeyRef<'_>, at_ms: Option<u64>, now: Now) -> Result<Now> {
        let Some(at_ms) = at_ms else { return Ok(now) };
        match self.timeline.foresee(at_ms) {
            Ok(time_ms) => Ok(Now { time_ms, ..now }),
            Err(leap) => Err(too_far_ahead(key_ref, at_ms, leap)),
        }
    }

    /// A writer of a record whose base time is `now`.
    pub(super) fn record_writer(&self, kind: RecordKind, now: Now, capacity: usize) -> RecordWriter {
        RecordWriter::new(kind, now.time_ms, capacity)
    }

    /// Takes the number of a record that is about to be written. Call it before the memtable shows the record's effect: see the
    /// module's order.
    pub(super) fn begin_record(&self) -> OpenRecord<'_> {
        let number = self.tables.memtable.records().begin(|| self.writer.sequence.take());
        OpenRecord { engine: self, number, finished: false }
    }

    /// Writes a record with the side writes of its completions, and makes its effect visible.
    pub(super) fn append(
        &self,
        open: OpenRecord<'_>,
        record: RecordWriter,
        side_writes: &[Admitted<'_>],
        sync: bool,
    ) -> Result<()> {
        self.health.check_invariants()?;
        if !record.is_empty() {
            self.writer.write(sync, |tx| {
                tx.put_record(open.number, record.finish());
                side_writes::put(tx, open.number, side_writes);
            })?;
        }
        open.finish();
        Ok(())
    }
}

/// A record whose number is taken and that is not written yet.
pub(super) struct OpenRecord<'a> {
    engine: &'a Engine,
    number: u64,
    finished: bool,
}

impl OpenRecord<'_> {
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// Ends the record: it is written, or it has no effect in the memtable.
    pub(super) fn finish(mut self) {
        self.finished = true;
        self.engine.tables.memtable.records().finish(self.number);
    }
}

/// A record that is dropped unfinished stays open, so that its effect never becomes visible. Whether it is on disk is
/// unknown, so the store is poisoned.
impl Drop for OpenRecord<'_> {
    fn drop(&mut self) {
        if !self.finished && !self.engine.health.is_closed() {
            self.engine.health.poison("a record was abandoned before it was written");
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::engine::fixture::small_engine;

    #[test]
    fn each_store_digests_its_keys_with_its_own_secret() {
        let digest = || {
            let dir = tempfile::tempdir().unwrap();
            small_engine(&dir).request(["k"]).unwrap().digests().next().unwrap()
        };
        assert_ne!(digest(), digest());
    }

    #[test]
    fn an_abandoned_record_poisons_the_store_unless_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        engine.begin_record().finish();
        assert_eq!(engine.health.poisoned(), None);
        let (first, last) = (engine.begin_record(), engine.begin_record());
        drop(first);
        assert!(engine.health.poisoned().is_some_and(|reason| reason.contains("abandoned")));
        drop(last);

        let dir = tempfile::tempdir().unwrap();
        let engine = small_engine(&dir);
        let open = engine.begin_record();
        engine.close().unwrap();
        drop(open);
        assert_eq!(engine.health.poisoned(), None, "calls fail with `Closed` anyway");
    }
}
