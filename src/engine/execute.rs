//! How every call executes its operations: the one order of effects.
//!
//! 1. Admit ([`Engine::admit`]): wait for room in memory, in the journal and among the reserved tokens.
//! 2. Look the keys up on disk, without a lock ([`Engine::look_up_on_disk`]).
//! 3. Take a record number ([`Engine::begin`]).
//! 4. For each key, under its shard's lock ([`Batch::execute`]): look it up in the memtable, take the machine's step, apply the
//!    change to the memtable, and add the event to the record.
//! 5. Append the record to the journal, with one sync if the configuration requires it, and publish the changes that depend on
//!    it ([`Batch::commit`]).
//! 6. Wake waiters, and count.
//!
//! A claimed key is visible as leased in step 4. Otherwise a concurrent claim could acquire the same key. Until its record is
//! written, no other call takes it over, even if its lease ends: otherwise the record could come after those of later attempts,
//! and a replay from there would find the key in progress, although it is completed and flushed.
//!
//! A completed, released or recorded key is visible as committing in step 4, and its new state counts only after step 5.
//! Otherwise a caller could skip its work because of a record that a crash takes back. The token is compared under the lock of
//! step 4: otherwise a late holder could overwrite the state of the next one.
//!
//! Renewals and dropped leases change only memory ([`Engine::execute_in_memory`]): a lease ends with its process anyway.

use super::core::{Engine, OpenRecord};
use super::lookup::DiskLookup;
use super::request::KeyRef;
use super::side_writes::Admitted;
use crate::clock::Now;
use crate::codec::{RecordKind, RecordWriter};
use crate::memtable::slot::Pending;
use crate::memtable::table::Shard;
use onlyonce_core::machine::{self, Change, Entry, Holder, Op, OwnWindow, Processing, Step};
use onlyonce_core::{Error, Result};

/// The operations of one call, and their record in the journal.
pub(super) struct Batch<'e> {
    engine: &'e Engine,
    open: OpenRecord<'e>,
    record: RecordWriter,
}

impl Engine {
    /// Begins the record of a call. `bytes` is about its size.
    pub(super) fn begin(&self, kind: RecordKind, now: Now, bytes: usize) -> Batch<'_> {
        Batch { engine: self, open: self.begin_record(), record: self.record_writer(kind, now, bytes) }
    }

    /// Executes an operation that changes only memory, on the entry that the memtable has.
    pub(super) fn execute_in_memory<O: Op<&'static [u8]>, R>(
        &self,
        key_ref: KeyRef<'_>,
        op: O,
        now: Now,
        answer: impl FnOnce(O::Answer<'_>) -> R,
    ) -> Result<R> {
        let KeyRef { digest, key, .. } = key_ref;
        self.require_key(key)?;
        let mut shard = self.tables.memtable.shard(digest);
        let stored = shard.get(digest, key);
        // Taken by no operation of this kind.
        let token = || Ok::<u64, Error>(self.writer.sequence.take());
        let Step { answer: answered, change } = machine::step(stored.as_ref(), op, now, self.policy, token)?;
        let answer = answer(answered);
        apply(&mut shard, digest, key, change, 0);
        Ok(answer)
    }
}

impl<'e> Batch<'e> {
    /// Executes an operation on a key. Under the shard's lock, `now` reads the time of the decision, `token` admits a new attempt
    /// and takes its token, and `answer` converts the machine's answer.
    #[inline(always)]
    pub(super) fn execute<'r, O: Op<&'r [u8]>, R>(
        &mut self,
        key_ref: KeyRef<'_>,
        on_disk: &DiskLookup,
        op: O,
        now: impl FnOnce() -> Result<Now>,
        token: impl FnOnce(Option<&Entry>) -> Result<u64>,
        answer: impl FnOnce(O::Answer<'_>, Now) -> Result<R>,
    ) -> Result<R> {
        let Self { engine, open, record } = self;
        let KeyRef { digest, key, .. } = key_ref;
        let executed = engine.with_locked_key(key_ref, on_disk, |shard, stored| {
            let now = now()?;
            let stored = stored.as_ref();
            let Step { answer: answered, change } = machine::step(stored, op, now, engine.policy, || token(stored))?;
            if let Some(event) = change.event() {
                record.event(key, event);
            }
            apply(shard, digest, key, change, open.number());
            answer(answered, now)
        });
        executed.flatten()
    }

    /// Writes the record, and publishes its changes.
    pub(super) fn commit(self, side_writes: &[Admitted<'_>], sync: bool) -> Result<()> {
        self.engine.append(self.open, self.record, side_writes, sync)
    }
}

/// Applies a change to the memtable. `record` has its event; 0: its record is written already, or it has none.
#[inline(always)]
pub(super) fn apply(shard: &mut Shard<'_>, digest: u64, key: &[u8], change: Change<&[u8]>, record: u64) {
    match change {
        Change::None => {}
        Change::InMemory(processing) => shard.set(digest, key, Entry::Processing(processing)),
        Change::Immediate(event) => match event.into_entry() {
            Some(entry) => {
                let pending = Pending { record, attempt: 0, holder: Holder::Committing };
                shard.set_pending(digest, key, entry, pending);
            }
            None => shard.remove(digest, key),
        },
        Change::OnceWritten { event, attempt, holder } => match event.into_entry() {
            Some(entry) => shard.set_pending(digest, key, entry, Pending { record, attempt, holder }),
            None => begin_removal(shard, digest, key, attempt, holder),
        },
    }
}

/// Until the record is written, other calls see the key as committing.
fn begin_removal(shard: &mut Shard<'_>, digest: u64, key: &[u8], attempt: u32, holder: Holder) {
    // A key that is only in buckets is removed from them.
    let Some(entry) = shard.get(digest, key) else { return };
    let (token, since_ms, own_window) = (entry.token(), entry.time_ms(), OwnWindow::NONE);
    let removing = Processing { token, attempt, since_ms, fingerprint: None, own_window, holder };
    shard.set(digest, key, Entry::Processing(removing));
}
